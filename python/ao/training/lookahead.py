"""Looking ahead: the vectors of a window's datapoints, from a cache or from the target.

Shapes: P vectors of a window, K of a datapoint, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from ao.cache import ActivationCache, context_keys
from ao.config import TrainConfig
from ao.injection import check_vectors
from ao.models import split
from ao.models.arch import Arch, forward_writes
from ao.residuals import ROW_TYPES, Read, Reading
from ao.shards import Datapoint
from ao.transfer import arrival

Window = TypeVar("Window")

ASIDE_TOKENS = 4096
"""Token budget of a row that runs beside steps. Kernels of a long row keep those of a step waiting, and the host, too, as soon as
a thousand are waiting; short rows cost the host, which is what steps wait for, as much as long ones."""


def runs_beside(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether contexts are run beside steps: on one GPU, unless a forward writes what two at once would read."""
    return device.type == "cuda" and len(split.devices_of(model)) == 1 and not forward_writes(model)


class LookAhead:
    """The vectors of a window's datapoints: what the cache holds, and of the rest each distinct context is run once, adapter
    off, for all its layers and examples.

    Given a `stream`, contexts are run there, row by row, while the steps before the window run on the current one: a step's
    many small kernels leave a GPU idle, as the host launches them no faster, and a row of contexts fills the gaps. Without one
    nothing is done before the vectors are asked for.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        arch: Arch,
        points: Sequence[Datapoint],
        config: TrainConfig,
        cache: ActivationCache | None = None,
        *,
        progress: Callable[[int], object] | None = None,
        stream: torch.cuda.Stream | None = None,
        timing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`progress` is told the context tokens of the window with its vectors; work on it is done inside `timing`."""
        self._target, self._arch, self._points, self._config, self._cache = target, arch, points, config, cache
        self._progress = progress
        self._stream = stream
        self._timing = timing
        self._cached: dict[str, torch.Tensor] = {}
        self._missing: Sequence[Datapoint] = ()
        self._reading: Reading | None = None
        self._tokens = 0
        self._row_done: torch.cuda.Event | None = None
        # A longer context is a row of its own, for which no memory is held back.
        self._is_beside = stream is not None and all(len(point.context_ids) <= ASIDE_TOKENS for point in points)
        self._is_launched = False
        if stream is not None:
            self._begin()

    def advance(self) -> None:
        """Launch the next row beside what runs, unless the device is still at the one before."""
        # More of them would fill the stream's queue, and the host would wait.
        if not self._is_beside or self._is_launched or (self._row_done is not None and not self._row_done.query()):
            return
        if self._reading is not None and self._stream is not None:
            with self._aside():
                self._is_launched = not self._reading.row()
                self._row_done = arrival(self._stream.device)

    def vectors(self) -> dict[str, torch.Tensor]:
        """The vectors by the datapoint's id, each [K, D]; what is left is run first. To be asked for once.

        Raises:
            ValueError: a vector is zero or not finite.
        """
        if self._stream is None:
            self._begin()
        vectors = dict(self._cached)
        if self._reading is not None:
            with self._aside():
                vectors_PD = self._reading.vectors()
            for point, (first, end) in zip(self._missing, pairwise(self._reading.offsets), strict=True):
                vectors[point.id] = vectors_PD[first:end]
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for vectors_KD in {each.untyped_storage().data_ptr(): each for each in vectors.values()}.values():
                # Their memory is the other stream's, which must not use it again before this one is done with it.
                vectors_KD.record_stream(current)
        if self._progress is not None:
            # Now they are some steps' work; a checkpoint before those would count them twice.
            self._progress(self._tokens)
        return vectors

    def _begin(self) -> None:
        with self._aside():
            self._missing = self._points
            if self._cache is not None and self._points:
                device = next(self._target.parameters()).device
                self._cached = from_cache(self._cache, self._points, dtype=self._target.dtype, device=device)
                self._missing = [point for point in self._points if point.id not in self._cached]
            if self._missing:
                reads = [Read(point.context_ids, point.layers, point.read_positions) for point in self._missing]
                tokens_per_row = self._config.context_tokens_per_row
                if self._is_beside:
                    tokens_per_row = min(tokens_per_row, ASIDE_TOKENS)
                self._reading = Reading(
                    self._target, self._arch, reads, tokens_per_row=tokens_per_row, progress=self._count
                )

    def _count(self, tokens: int) -> None:
        self._tokens += tokens

    @contextmanager
    def _aside(self) -> Iterator[None]:
        # Compiled blocks would compile again for every length of a row of contexts; such rows keep a GPU busy as it is.
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with self._timing(), torch.compiler.set_stance("force_eager"), stream:
            yield


def looked_ahead(
    windows: Iterator[Window], looking: Callable[[Window], LookAhead]
) -> Iterator[tuple[Window, dict[str, torch.Tensor], Callable[[], None]]]:
    """Windows with their vectors, each a window ahead of its steps.

    Args:
        windows: what is trained on, window by window.
        looking: begins to look ahead for one.

    Yields:
        A window, its vectors, and what to call before each of its steps: it advances the window behind it.
    """
    following = next(windows, None)
    contexts = None if following is None else looking(following)
    while following is not None and contexts is not None:
        window, vectors = following, contexts.vectors()
        following = next(windows, None)
        contexts = None if following is None else looking(following)
        yield window, vectors, (lambda: None) if contexts is None else contexts.advance


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
