"""Other tools' activations, put into a cache.

Shapes: T tokens, L layers, K rows, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Lt, MinLen
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from ao._ao import input_digest
from ao.collect.missing import earlier_runs, remaining
from ao.collect.sinks import CacheSink, finish_cache
from ao.collect.wanted import Unit
from ao.manifest import fingerprint
from ao.residuals import ROW_TYPES


def import_tensor(file: str | Path, sidecar: str | Path, *, out: str | Path) -> dict[str, Any]:
    """Put activations that another tool saved into a cache.

    Args:
        file: a safetensors file with one tensor [tokens, layers, D].
        sidecar: a JSON object: `tensor` (its name), `layers` (of its columns), `ids` (token ids of the contexts, a list
            each, together as many as the tensor has tokens), `contract` (what the rows are; for `ao train` what
            `contract_of` gives).
        out: folder of the cache.

    Returns:
        The statistics by layer.

    Raises:
        ValueError: sidecar and tensor do not agree.
    """
    about = Sidecar.read(sidecar)
    with safe_open(file, framework="pt") as opened:
        if about.tensor not in opened.keys():  # noqa: SIM118 - the file is no mapping
            raise ValueError(f"{file}: no tensor {about.tensor!r}, only {sorted(opened.keys())}")
        values_TLD = opened.get_tensor(about.tensor)
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
    _, first, serving = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    same = torch.from_numpy(first[serving.reshape(-1)])
    if len(differing := (values_TLD[same] != values_TLD).flatten(1).any(dim=1).nonzero().flatten()):
        row = int(differing[0])
        raise ValueError(
            f"{file}: tokens {int(same[row])} and {row} were read after the same ids, and have other activations; were the "
            "contexts padded, or read by a model with other mixers than causal attention?"
        )
    out, dtype, width = Path(out), names[values_TLD.dtype], values_TLD.shape[2]
    run = fingerprint(about.contract, dtype, unit.digest, input_digest(str(file)))[:16]
    [left] = remaining([unit], earlier_runs(out, run, about.contract, dtype=dtype, width=width)).units
    sink = CacheSink(out, run, 0, about.contract, left, dtype=dtype, width=width)
    starts = np.cumsum([0, *map(len, contexts)])
    try:
        for column, layer in enumerate(about.layers):
            indices = np.flatnonzero(left.wanted.layers == layer)
            tokens = starts[left.wanted.contexts[indices]] + left.wanted.positions[indices]
            rows_KD = values_TLD[torch.from_numpy(tokens), column].contiguous()
            sink.append(layer, indices, rows_KD.float().norm(dim=1), rows_KD)
        sink.finish()
    except BaseException:
        sink.abandon()
        raise
    return finish_cache(out)


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
