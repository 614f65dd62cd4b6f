"""Other tools' activations, put into a cache.

Shapes: T tokens, L layers, K rows, D d_model.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Lt, MinLen
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from ao._ao import input_digest
from ao.collect.missing import earlier_runs, is_there, remaining, remove_leftovers
from ao.collect.run import Alike, Tally
from ao.collect.sinks import CacheSink, finish_cache
from ao.collect.wanted import Unit
from ao.manifest import fingerprint
from ao.residuals import ROW_TYPES

ROWS = 2**16
"""Rows that are compared, or put into the cache, together."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""By how much of their norm rows may differ that were read after the same ids: a forward's rounding depends on its shape."""


def import_tensor(file: str | Path, sidecar: str | Path, *, out: str | Path) -> dict[str, Any]:
    """Put activations that another tool saved into a cache; of several processes of torchrun the first alone does it.

    Args:
        file: a safetensors file with one tensor [tokens, layers, D].
        sidecar: a JSON object: `tensor` (its name), `layers` (of its columns), `ids` (token ids of the contexts, a list
            each, together as many as the tensor has tokens), `contract` (what the rows are; for `ao train` what
            `contract_of` gives).
        out: folder of the cache.

    Returns:
        The record: rows, seconds, units, those that were there before, statistics by layer, the greatest difference of rows
        that were read after the same ids (of which the first is kept) over their norm; and whether this is the first rank.

    Raises:
        ValueError: sidecar and tensor do not agree.
    """
    if int(os.environ.get("RANK", "0")):
        return {"first_rank": False}
    started = time.perf_counter()
    about = Sidecar.read(sidecar)
    values_TLD = _tensor(file, about.tensor)
    shape = (sum(map(len, about.ids)), len(about.layers))
    names = {dtype: name for name, dtype in ROW_TYPES.items()}
    if values_TLD.dim() != 3 or tuple(values_TLD.shape[:2]) != shape or values_TLD.dtype not in names:
        raise ValueError(
            f"{file}: {about.tensor} is {values_TLD.dtype} {list(values_TLD.shape)}; {sidecar} says "
            f"[{shape[0]} tokens, {shape[1]} layers, D], and rows are BF16, F16 or F32"
        )
    contexts = [np.asarray(ids, dtype=np.int32) for ids in about.ids]
    unit = Unit.whole(contexts, about.layers)
    keys = unit.keys()[:: shape[1]]
    difference = _require_alike(file, values_TLD, keys)
    out, dtype, width = Path(out), names[values_TLD.dtype], values_TLD.shape[2]
    run = fingerprint(about.contract, dtype, unit.digest, input_digest(str(file)))[:16]
    [left] = remaining([unit], earlier_runs(out, run, about.contract, dtype=dtype, width=width)).units
    remove_leftovers(out)
    is_done = is_there(out, run, 0, [left])
    tally = Tally(units_before=int(is_done))
    if not is_done and len(left.wanted.layers):
        sink = CacheSink(out, run, 0, about.contract, left, dtype=dtype, width=width)
        starts = np.cumsum([0, *map(len, contexts)])
        try:
            for column, layer in enumerate(about.layers):
                of_layer = np.flatnonzero(left.wanted.layers == layer)
                for indices in np.split(of_layer, range(ROWS, len(of_layer), ROWS)):
                    tokens = starts[left.wanted.contexts[indices]] + left.wanted.positions[indices]
                    rows_KD = values_TLD[torch.from_numpy(tokens), column].contiguous()
                    norms_K = rows_KD.float().norm(dim=1)
                    tally.alike.setdefault(layer, Alike()).see(rows_KD, norms_K)
                    sink.append(layer, indices, norms_K, rows_KD)
                    tally.rows += len(indices)
            sink.finish()
        except BaseException:
            sink.abandon()
            raise
    tally.warn()
    remove_leftovers(out, finished=run)
    return {
        "run": run,
        "units": 1,
        "units_before": tally.units_before,
        "rows": tally.rows,
        "difference": difference,
        "layers": finish_cache(out),
        "seconds": time.perf_counter() - started,
        "first_rank": True,
    }


def _tensor(file: str | Path, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            if name not in opened.keys():  # noqa: SIM118 - the file is no mapping
                raise ValueError(f"{file}: no tensor {name!r}, only {sorted(opened.keys())}")
            return opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a safetensors file ({error}); save the tensor with safetensors.torch.save_file"
        ) from None


def _require_alike(file: str | Path, values_TLD: torch.Tensor, keys: np.ndarray) -> float:
    """Compare tokens of one key (uint64 [T, 2]) with the first of them; returns the greatest difference."""
    _, first, serving = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    kept = first[serving.reshape(-1)]
    repeats = np.flatnonzero(kept != np.arange(len(kept)))
    tolerance, greatest = TOLERANCE[values_TLD.dtype], 0.0
    tokens_at_once = max(1, ROWS // values_TLD.shape[1])
    for tokens in np.split(repeats, range(tokens_at_once, len(repeats), tokens_at_once)):
        differences_K = _differences(values_TLD[torch.from_numpy(tokens)], values_TLD[torch.from_numpy(kept[tokens])])
        if len(wrong := (differences_K > tolerance).nonzero().flatten()):
            at = int(wrong[0])
            raise ValueError(
                f"{file}: tokens {kept[tokens[at]]} and {tokens[at]} were read after the same ids, and have other "
                f"activations: they differ by {differences_K[at]:.2g} of their norm, where rounding gives less than "
                f"{tolerance:.2g}; were the contexts padded, or read by a model with other mixers than causal attention?"
            )
        greatest = max(greatest, differences_K.max().item() if len(tokens) else 0.0)
    return greatest


def _differences(values_KLD: torch.Tensor, first_KLD: torch.Tensor) -> torch.Tensor:
    """Norm of the difference over the norm of the first, [K], of the layer where it is greatest; of what is finite beside
    what is not, infinite."""
    values_KLD, first_KLD = values_KLD.float(), first_KLD.float()
    # What is no number equals nothing, itself included.
    is_same_KLD = (values_KLD == first_KLD) | (values_KLD.isnan() & first_KLD.isnan())
    norms_KL = torch.where(is_same_KLD, 0, values_KLD - first_KLD).norm(dim=2)
    scales_KL = first_KLD.nan_to_num(0, 0, 0).norm(dim=2).clamp_min(1e-30)
    return (norms_KL / scales_KL).nan_to_num(nan=torch.inf).amax(dim=1)


@dataclass(frozen=True)
class Sidecar:
    """What a tensor of another tool is."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, not a field

    tensor: str
    """Its name."""
    layers: list[Annotated[int, Ge(0), Lt(2**15)]]
    """Of its columns, blocks counted from 0."""
    ids: list[Annotated[list[Annotated[int, Ge(0), Lt(2**31)]], MinLen(1)]]
    """Token ids of each context."""
    contract: dict[str, Any]
    """What the rows are."""

    @classmethod
    def read(cls, path: str | Path) -> Sidecar:
        """Read a JSON file.

        Raises:
            ValueError: a key is missing, unknown or out of range; names it.
        """
        try:
            found = TypeAdapter(cls).validate_json(Path(path).read_bytes(), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: {where}: {first['msg']}; expected tensor, layers, ids and contract") from None
        if not found.ids or len(set(found.layers)) != len(found.layers):
            raise ValueError(f"{path}: expected one context at least, and each layer once, got layers {found.layers}")
        return found
