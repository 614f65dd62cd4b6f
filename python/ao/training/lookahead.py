"""Looking ahead: the vectors of a window's datapoints, from a cache or from the target.

Shapes: P vectors of a window, K of a datapoint, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedModel

from ao.cache import ActivationCache, context_keys
from ao.config import TrainConfig
from ao.injection import check_vectors
from ao.models.arch import Arch
from ao.residuals import ROW_TYPES, Read, read_vectors
from ao.shards import Datapoint


def look_ahead(
    target: PreTrainedModel,
    arch: Arch,
    points: Sequence[Datapoint],
    config: TrainConfig,
    cache: ActivationCache | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> dict[str, torch.Tensor]:
    """The vectors of datapoints by id, each [K, D]: what the cache holds, and of the rest each distinct context is run
    once, adapter off, for all its layers and examples."""
    vectors: dict[str, torch.Tensor] = {}
    missing = points
    if cache is not None and points:
        vectors = from_cache(cache, points, dtype=target.dtype, device=next(target.parameters()).device)
        missing = [point for point in points if point.id not in vectors]
    if missing:
        reads = [Read(point.context_ids, point.layers, point.read_positions) for point in missing]
        # Compiled blocks would compile again for every length of a row of contexts; such rows keep a GPU busy as it is.
        with torch.compiler.set_stance("force_eager"):
            vectors_PD, offsets = read_vectors(
                target, arch, reads, tokens_per_row=config.context_tokens_per_row, progress=progress
            )
        for point, first, end in zip(missing, offsets, offsets[1:], strict=False):
            vectors[point.id] = vectors_PD[first:end]
    return vectors


def from_cache(
    cache: ActivationCache, points: Sequence[Datapoint], *, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The vectors of those datapoints of which the cache holds every one."""
    offsets = np.cumsum([0, *(len(point.layers) for point in points)])
    keys = np.concatenate([context_keys(point.context_ids)[point.read_positions] for point in points])
    layers = np.concatenate([point.layers for point in points])
    vectors_PD = torch.empty(len(keys), cache.width, dtype=ROW_TYPES[cache.dtype], pin_memory=device.type == "cuda")
    found_P = np.zeros(len(keys), dtype=bool)
    for layer in np.intersect1d(layers, cache.layers):
        own = np.flatnonzero(layers == layer)
        rows = cache.layer(int(layer)).find(keys[own])
        there = rows >= 0
        out = torch.empty(int(there.sum()), cache.width, dtype=vectors_PD.dtype)
        cache.layer(int(layer)).gather(rows[there], out)
        vectors_PD[torch.from_numpy(own[there])] = out
        found_P[own[there]] = True
    whole = [bool(found_P[first:end].all()) for first, end in pairwise(offsets)]
    vectors_PD = vectors_PD.to(device, dtype, non_blocking=True)
    vectors = {
        point.id: vectors_PD[first:end]
        for point, first, end, all_there in zip(points, offsets, offsets[1:], whole, strict=False)
        if all_there
    }
    if vectors:
        check_vectors(torch.cat(list(vectors.values())), f"activations of the cache {cache.folder}")
    return vectors
