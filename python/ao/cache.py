"""The activation cache, read by mapping: no copy, no torch.

A cache is a folder of units. Each has, for every layer, one safetensors file with one tensor `activations` [rows, D], and
an index that says under which key each row stands. A key is a hash of the token ids up to and including the row's own, so
whatever was collected before is found again by any data set, seed or mixture. Only units with an index count.

Shapes: K rows, D d_model.
"""

from __future__ import annotations

import json
import mmap
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ao import _ao
from ao.cache_files import HEADER_BYTES, MANIFEST, NUMPY, CachedUnit, index_names, manifest_text, open_rows
from ao.config import ModelConfig
from ao.manifest import adapter_fingerprint, require_match, write_atomic
from ao.prompt import framer, identity, model_folder, target_of

SCHEMA = 1
"""Version of manifest, indexes and headers."""
MODES = ("auto", "warm", "hinted", "direct")
"""How rows are gathered. warm: through the page cache; hinted: all announced to it first; direct: past it, several at once;
auto: one of these, by whether a few of the rows are in the page cache."""
KEPT_MAPPED = 64
"""Files of a layer that stay mapped: each mapping keeps its file open, and a process may often have no more than 1,024."""
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""Of the norms of a layer, in the manifest."""

Mode = Literal["auto", "warm", "hinted", "direct"]


def contract_of(model: ModelConfig, adapter: str | Path | None = None) -> dict[str, Any]:
    """What rows are: which weights at which precision, whether with an adapter, and what a layer is."""
    name, revision = target_of(model)
    return {
        **identity(name, revision, framer=framer(name, revision)),
        # The commit: a branch, or none, names another one tomorrow.
        "revision": None if name == "demo" or Path(name).is_dir() else model_folder(name, revision).name,
        # Dequantized values are the same numbers.
        "precision": model.precision.removesuffix("-dequantized"),
        "adapter": None if adapter is None else adapter_fingerprint(adapter),
        "reads": "residual stream after block k, counted from 0: hidden_states[k + 1]",
    }


def context_keys(context_ids: np.ndarray) -> np.ndarray:
    """The key of each position of a context, uint64 [length, 2]: upper and lower half of an xxh3-128.

    Raises:
        ValueError: these are no token ids.

    Source: the key of position p is the xxh3-128 of the key of p - 1 and the id at p, so that a context that begins
    another has its keys.
    """
    ids = np.asarray(context_ids)
    if ids.ndim != 1 or (len(ids) and (ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < 2**31)):
        raise ValueError(
            f"context_ids: expected token ids [length] from 0 below 2**31, got {ids.dtype} {list(ids.shape)}"
        )
    ids = np.ascontiguousarray(ids, dtype=np.int32)
    return np.frombuffer(_ao.context_keys(ids), dtype=np.uint64).reshape(-1, 2)


class CachedLayer:
    """The rows of one layer, numbered over all units."""

    def __init__(self, layer: int, units: Sequence[CachedUnit], *, dtype: str, width: int) -> None:
        self.layer = layer
        self.dtype = dtype
        """BF16, F16 or F32."""
        self.width = width
        """Values of a row."""
        self._units = [unit for unit in units if layer in unit.rows]
        # A list: to find a row in it takes a tenth of what it takes in a small array.
        self._starts = [0, *accumulate(unit.rows[layer] for unit in self._units)]
        self._views: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What is open cannot be sent to another process, and keys are faster sorted there than sent.
        return {name: value for name, value in vars(self).items() if name not in ("_reader", "_keys")} | {"_views": {}}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, which: int | slice) -> np.ndarray:
        """A row [D], or rows [K, D] side by side in one unit, as a read-only view of the file; BF16 as its uint16 bits."""
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if step == 1 and stop <= start:
                return np.empty((0, self.width), dtype=NUMPY[self.dtype])
            unit = self._unit(start) if start < len(self) else 0
            if step != 1 or stop > self._starts[unit + 1]:
                raise IndexError(
                    f"layer {self.layer}: rows {start}..{stop} in steps of {step} do not lie side by side in one file; "
                    "use gather"
                )
            first = self._starts[unit]
            return self._view(unit)[start - first : stop - first]
        if not -len(self) <= which < len(self):
            raise IndexError(f"layer {self.layer}: row {which} of {len(self)}")
        which %= len(self)
        unit = self._unit(which)
        return self._view(unit)[which - self._starts[unit]]

    def _unit(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1

    def _view(self, unit: int) -> np.ndarray:
        if unit not in self._views:
            path = self._units[unit].file(self.layer)
            shape = (self._units[unit].rows[self.layer], self.width)
            dtype = np.dtype(NUMPY[self.dtype])
            # A mapping beyond the end of a file kills the process that touches it, and another layer's rows look like these.
            self.require_files()
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            view = np.frombuffer(mapping, dtype, count=shape[0] * shape[1], offset=HEADER_BYTES)
            if len(self._views) == KEPT_MAPPED:
                # What somebody still looks at stays mapped all the same.
                del self._views[next(iter(self._views))]
            self._views[unit] = view.reshape(shape)
        return self._views[unit]

    @cached_property
    def _reader(self) -> _ao.ActivationReader:
        return open_rows(self._units, self.layer)

    def require_files(self) -> None:
        """Refuse files that are missing, cut, or another's; their rows are not read.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged or another's; names it.
        """
        _ = self._reader

    @property
    def norms(self) -> np.ndarray:
        """Norm of each row, float32 [rows], as it was before rounding to the cache's type."""
        return np.concatenate([np.empty(0, "<f4"), *(unit.array("norms", self.layer) for unit in self._units)])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, int64 [K]; -1 where there is none.

        Args:
            keys: uint64 [K, 2], as `context_keys` gives them.

        Raises:
            ValueError: the keys are something else.
        """
        if keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2:
            raise ValueError(f"keys: expected uint64 [K, 2], got {keys.dtype} {list(keys.shape)}; see context_keys")
        hi, lo, rows = self._keys
        found = np.full(len(keys), -1, dtype=np.int64)
        missing, wanted, at = np.arange(len(keys)), keys, hi.searchsorted(keys[:, 0])
        # Keys that agree in 64 bits are rarer than broken disks, and told apart all the same.
        while len(at):
            inside = at < len(hi)
            inside[inside] = hi[at[inside]] == wanted[inside, 0]
            missing, wanted, at = missing[inside], wanted[inside], at[inside]
            is_it = lo[at] == wanted[:, 1]
            found[missing[is_it]] = rows[at[is_it]]
            missing, wanted, at = missing[~is_it], wanted[~is_it], at[~is_it] + 1
        return found

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Both halves of all units' keys and the row of each, by the upper half: a second's work for five million rows."""
        columns = [
            (
                unit.array("keys_hi", self.layer),
                unit.array("keys_lo", self.layer),
                unit.array("rows", self.layer) + np.int64(start),
            )
            for unit, start in zip(self._units, self._starts, strict=False)
        ]
        empty = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))
        hi, lo, rows = (np.concatenate(parts) for parts in zip(empty, *columns, strict=True))
        if len(columns) < 2:
            return hi, lo, rows
        # Stable: it merges what is sorted already.
        order = np.argsort(hi, kind="stable")
        return hi[order], lo[order], rows[order]

    def gather(self, rows: np.ndarray, out: Any = None, *, mode: Mode = "auto") -> Any:
        """Copy rows in any order; those that lie close are read together.

        Args:
            rows: numbers of rows, [K].
            out: what to fill: an array or CPU tensor [K, D] of the cache's type (BF16: also uint16), pinned or not; a new
                array without one.
            mode: one of `MODES`.

        Returns:
            `out`.

        Raises:
            IndexError: there is no such row.
            ValueError: `out` has another shape or type, or `rows` are no numbers.
        """
        rows = self._checked(rows)
        if out is None:
            out = np.empty((len(rows), self.width), dtype=NUMPY[self.dtype])
        if tuple(out.shape) != (len(rows), self.width):
            raise ValueError(f"out: expected the shape {[len(rows), self.width]}, got {list(out.shape)}")
        self._reader.gather(rows, bits_of(out, self.dtype, "out"), mode=mode)
        return out

    def prefetch(self, rows: np.ndarray) -> None:
        """Have rows read into the page cache while something else is done."""
        self._reader.prefetch(self._checked(rows))

    def tensor(self, which: int | slice) -> Any:
        """What `self[which]` gives, as a torch tensor of the cache's type over the same memory, which is read-only."""
        import torch

        view = self[which]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(view.view(np.int16) if self.dtype == "BF16" else view)
        return tensor.view(torch.bfloat16) if self.dtype == "BF16" else tensor

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            raise ValueError(f"rows: expected their numbers, got {rows.dtype} {list(rows.shape)}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"layer {self.layer}: rows {rows.min()}..{rows.max()} of {len(self)}")
        return np.ascontiguousarray(rows, dtype=np.int64)


def bits_of(values: Any, dtype: str, name: str) -> np.ndarray:
    """An array over the memory of an array or CPU tensor of a cache's type, for what sees bytes.

    Args:
        values: the array or tensor.
        dtype: BF16, F16 or F32.
        name: what errors call it.

    Raises:
        ValueError: it has another type, or is on a device.
    """
    if not isinstance(values, np.ndarray):
        import torch

        expected = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        if not isinstance(values, torch.Tensor) or values.dtype != expected or values.device.type != "cpu":
            found = f"{values.dtype} on {values.device}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"{name}: expected an array, or a CPU tensor of {expected}, got {found}")
        return values.detach().view(torch.int32 if dtype == "F32" else torch.int16).numpy().view(NUMPY[dtype])
    if values.dtype != np.dtype(NUMPY[dtype]):
        raise ValueError(f"{name}: expected {np.dtype(NUMPY[dtype])} for {dtype}, got {values.dtype}")
    return values


class ActivationCache:
    """A folder of units, as layers of rows."""

    def __init__(self, folder: Path, units: Sequence[CachedUnit]) -> None:
        self.folder = folder
        self.units = units
        first = json.loads(units[0].common)
        self.contract: dict[str, Any] = first["contract"]
        """What the rows are: model, weights, precision, what was read, the layers' convention."""
        self.dtype: str = first["dtype"]
        """BF16, F16 or F32."""
        self.width: int = first["width"]
        """d_model."""
        for unit in units:
            if unit.common != units[0].common:
                require_match(
                    f"{unit.path}: of the cache in {folder}",
                    expected=first,
                    got=json.loads(unit.common),
                    remedy="give each target a cache of its own, and move this unit there",
                )
        self._layers: dict[int, CachedLayer] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        contract: Mapping[str, Any] | None = None,
        run: str | None = None,
        unit: int | None = None,
        without: str | None = None,
        headers: bool = False,
    ) -> ActivationCache:
        """Open what is there, also while more is being written: units that are finished by then.

        Args:
            path: The folder.
            contract: Fields that the rows must have, as `contract_of` gives them, or some of them.
            run: Only units of this run.
            unit: Only units of this number.
            without: No units of this run.
            headers: Read the header of every index, whatever the manifest says: for what judges, deletes or writes.

        Raises:
            FileNotFoundError: there is no finished unit.
            ValueError: the header of an index that was read is damaged, units differ in what they hold, or the contract does
                not match.
        """
        folder = Path(path)
        indexes = index_names(folder, run=run, unit=unit)
        if without is not None:
            indexes = [index for index in indexes if not index.startswith(f"{without}-")]
        if not indexes:
            raise FileNotFoundError(f"{folder}: no finished unit of an activation cache; make one with ao collect")
        cache = cls(folder, CachedUnit.all(folder, indexes, headers=headers))
        if contract is not None:
            require_match(
                f"{folder}: collected from",
                expected=cache.contract,
                got=contract,
                remedy="collect the other target's activations into another folder",
            )
        return cache

    def split_damaged(self) -> tuple[ActivationCache | None, dict[Path, str]]:
        """The units whose files are there and fit, if any, and the indexes of the others with what is wrong with each."""
        whole, damaged = [], dict[Path, str]()
        for unit in self.units:
            try:
                unit.require_files()
                whole.append(unit)
            except (ValueError, OSError) as error:
                damaged[unit.path] = str(error)
        return ActivationCache(self.folder, whole) if whole else None, damaged

    @property
    def layers(self) -> list[int]:
        """Layers of which there are rows."""
        return sorted({layer for unit in self.units for layer in unit.rows})

    def layer(self, layer: int) -> CachedLayer:
        """The rows of a layer; none where nothing was collected."""
        if layer not in self._layers:
            self._layers[layer] = CachedLayer(layer, self.units, dtype=self.dtype, width=self.width)
        return self._layers[layer]

    def vectors(
        self, context_ids: np.ndarray, layers: np.ndarray, positions: np.ndarray, *, mode: Mode = "auto"
    ) -> Any:
        """Activations [K, D] of one context, one for each entry of the parallel `layers` and `positions`.

        Raises:
            IndexError: the context has no such position.
            KeyError: one was not collected.
            ValueError: the ids are no token ids, or layers and positions are not one number each.
        """
        keys, layers, positions = context_keys(context_ids), np.asarray(layers), np.asarray(positions)
        for name, numbers in (("layers", layers), ("positions", positions)):
            if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
                raise ValueError(f"{name}: expected numbers [K], got {numbers.dtype} {list(numbers.shape)}")
        if len(layers) != len(positions):
            raise ValueError(
                f"expected a layer for each position, got {len(layers)} layers and {len(positions)} positions"
            )
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(keys):
            raise IndexError(f"positions {positions.min()}..{positions.max()} of a context of {len(keys)} tokens")
        keys = keys[positions.astype(np.int64)]
        out = np.empty((len(keys), self.width), dtype=NUMPY[self.dtype])
        for layer in np.unique(layers).tolist():
            here = np.flatnonzero(layers == layer)
            rows = self.layer(layer).find(keys[here])
            if (rows < 0).any():
                missing = positions[here[rows < 0]].tolist()
                raise KeyError(f"{self.folder}: layer {layer}, positions {missing[:8]} were not collected")
            out[here] = self.layer(layer).gather(rows, mode=mode)
        return out

    def statistics(self) -> dict[str, Any]:
        """Of each layer: rows, and mean, quantiles and non-finite count of the norms."""
        return {str(layer): norm_statistics(self.layer(layer).norms) for layer in self.layers}

    def write_manifest(self) -> dict[str, Any]:
        """Write `manifest.json` for the units that are there, and return it."""
        manifest = {
            "schema": SCHEMA,
            "kind": "activations",
            "contract": self.contract,
            "dtype": self.dtype,
            "width": self.width,
            "layers": self.statistics(),
            "units": [
                {
                    "index": unit.index,
                    "bytes": unit.path.stat().st_size,
                    "xxh3": _ao.input_digest(str(unit.path)),
                    "rows": {str(layer): count for layer, count in unit.rows.items()},
                }
                for unit in self.units
            ],
        }
        write_atomic(self.folder / MANIFEST, manifest_text(manifest))
        return manifest


def norm_statistics(norms: np.ndarray) -> dict[str, Any]:
    """Rows, and of the finite norms mean and `QUANTILES`; how many are not finite."""
    finite = norms[np.isfinite(norms)].astype(np.float64)
    statistics: dict[str, Any] = {"rows": len(norms), "not_finite": len(norms) - len(finite)}
    if len(finite):
        statistics["mean"] = float(finite.mean())
        statistics["quantiles"] = dict(zip(map(str, QUANTILES), np.quantile(finite, QUANTILES).tolist(), strict=True))
    return statistics
