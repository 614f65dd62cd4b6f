"""Writing a unit of the activation cache: rows of NumPy or torch, appended as they come. No torch is needed.

Shapes: K rows, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ao._ao import ActivationWriter
from ao.cache import bits_of
from ao.manifest import canonical_json


class CacheWriter:
    """A unit that is being written: the rows of some contexts, for one or more layers.

    Rows are copied into aligned buffers, which a thread writes past the page cache. `finish` gives the unit its place; until
    then it is not there, and a writer that is dropped or abandoned leaves nothing.

    Args:
        folder: the cache; made if it is not there.
        run: what the units of one collection have in common, a name without slashes.
        unit: number of the unit in its run.
        contract: what the rows are, as `ao.cache.contract_of` gives it; one for all units of a cache.
        dtype: BF16, F16 or F32.
        width: values of a row, d_model.
        layers: layers that rows may come from.

    Raises:
        OSError: the folder cannot be made.
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        run: str,
        unit: int,
        contract: Mapping[str, Any],
        dtype: str,
        width: int,
        layers: Sequence[int],
    ) -> None:
        self._dtype, self._width = dtype, width
        self._writer = ActivationWriter(
            folder, run=run, unit=unit, contract_json=canonical_json(contract), dtype=dtype, width=width, layers=layers
        )

    def append(self, layer: int, keys: np.ndarray, norms: Any, rows: Any) -> None:
        """Take rows over.

        Args:
            layer: where they were read.
            keys: uint64 [K, 2], those of `ao.cache.context_keys` at the rows' positions.
            norms: float32 [K], an array or CPU tensor: the rows' norms before they were rounded to the cache's type.
            rows: [K, D], an array or CPU tensor of the cache's type; BF16 also as uint16. Copied once, into the writer's buffers.

        Raises:
            OSError: the disk is full, or fails.
            ValueError: something has another type or shape, or a key is there already.
        """
        keys, norms, rows = np.asarray(keys), bits_of(norms, "F32", "norms"), bits_of(rows, self._dtype, "rows")
        if keys.dtype != np.uint64:
            raise ValueError(f"keys: expected uint64 [K, 2], got {keys.dtype}; see context_keys")
        for name, values, shape in (
            ("keys", keys, (len(rows), 2)),
            ("norms", norms, (len(rows),)),
            ("rows", rows, (len(rows), self._width)),
        ):
            if values.shape != shape:
                raise ValueError(f"{name}: expected the shape {list(shape)}, got {list(values.shape)}")
        self._writer.append(layer, *map(np.ascontiguousarray, (keys, norms, rows)))

    def finish(self) -> str:
        """Give the files their names and write the index, whose name is returned."""
        return self._writer.finish()

    def abandon(self) -> None:
        """Remove what was written."""
        self._writer.abandon()
