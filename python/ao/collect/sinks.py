"""Where collected rows go: a unit of a cache, or a plain file.

Shapes: K rows, D d_model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save as serialize

from ao.cache import ActivationCache
from ao.cache_files import MANIFEST, plain_name
from ao.cache_writer import CacheWriter
from ao.collect.wanted import Unit
from ao.manifest import canonical_json, with_own_digest, write_atomic
from ao.residuals import ROW_TYPES


class Sink(Protocol):
    """Where rows go."""

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Take rows [K, D] of a layer over, in CPU memory: values `indices` [K] of what the unit wants."""

    def finish(self) -> None:
        """Put the unit in its place."""

    def abandon(self) -> None:
        """Leave nothing."""


class CacheSink(Sink):
    """A unit of the cache."""

    def __init__(
        self, out: Path, run: str, number: int, contract: dict[str, Any], unit: Unit, *, dtype: str, width: int
    ) -> None:
        self._keys = unit.keys()
        layers = np.unique(unit.wanted.layers).tolist()
        self._writer = CacheWriter(
            out, run=run, unit=number, contract=contract, dtype=dtype, width=width, layers=layers
        )

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Have rows copied to the writer."""
        self._writer.append(layer, self._keys[indices], norms_K, rows_KD)

    def finish(self) -> None:
        """Write the index."""
        self._writer.finish()

    def abandon(self) -> None:
        """Remove the files."""
        self._writer.abandon()


class PlainSink(Sink):
    """A plain safetensors file of a unit."""

    def __init__(
        self, out: Path, run: str, number: int, contract: dict[str, Any], unit: Unit, *, dtype: str, width: int
    ) -> None:
        self._path, self._unit = out / plain_name(run, number), unit
        layers, counts = np.unique(unit.wanted.layers, return_counts=True)
        about = {
            "kind": "plain_activations",
            "schema": 1,
            "contract": contract,
            "dtype": dtype,
            "width": width,
            "run": run,
            "unit": number,
            "rows": dict(zip(map(str, layers.tolist()), counts.tolist(), strict=True)),
            "sha256": "0" * 64,
        }
        self._metadata = {"ao": canonical_json(about)}
        self._indices: list[np.ndarray] = []
        self._rows: list[torch.Tensor] = []
        self._empty = torch.empty(0, width, dtype=ROW_TYPES[dtype])

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Keep a copy of rows."""
        self._indices.append(indices)
        self._rows.append(rows_KD.clone())

    def finish(self) -> None:
        """Write the file."""
        indices = np.concatenate(self._indices) if self._indices else np.empty(0, np.int64)
        wanted, lengths = self._unit.wanted, [len(ids) for ids in self._unit.contexts]
        order = np.argsort(indices)
        tensors = {
            "activations": torch.cat([self._empty, *self._rows])[torch.from_numpy(order)],
            "context": torch.from_numpy(wanted.contexts.astype(np.int32)),
            "layer": torch.from_numpy(wanted.layers.astype(np.int32)),
            "position": torch.from_numpy(wanted.positions.astype(np.int32)),
            "ids": torch.from_numpy(np.concatenate([np.empty(0, np.int32), *self._unit.contexts]).astype(np.int32)),
            "offsets": torch.from_numpy(np.cumsum([0, *lengths])),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, with_own_digest(serialize(tensors, metadata=self._metadata)))

    def abandon(self) -> None:
        """Forget the rows."""
        self._rows.clear()


def finish_cache(out: Path) -> dict[str, Any]:
    """The manifest and the picture of a cache that is whole now; returns the statistics by layer.

    What killed processes left of them is removed.
    """
    from ao.plots import norm_chart

    for name in (MANIFEST, "norms.png"):
        for left in out.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)

    try:
        cache = ActivationCache.open(out, headers=True)
    except FileNotFoundError:
        return {}
    layers = cache.write_manifest()["layers"]
    if layers:
        norm_chart(out / "norms.png", {layer: cache.layer(layer).norms for layer in cache.layers}, title=out.name)
    return layers
