"""The files of an activation cache: what they are called, what an index says, what is damaged. Torch-free.

A unit has a file of rows for each layer and an index, which is written last: where it stands, the unit is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ao import _ao
from ao.manifest import read_manifest

MANIFEST = "manifest.json"
HEADER_BYTES = 4096
"""Bytes of a file before its first row."""
INDEX = "*.index.safetensors"
"""The indexes of a folder."""
PLAIN = "*.plain.safetensors"
"""The plain files of a folder, which other tools read."""
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U32": "<u4", "U64": "<u8"}
"""Types of rows and of an index's arrays, by the names that safetensors gives them; BF16 by its bits."""

_FILE = re.compile(r"([0-9a-f]{16})-(\d{5,})(?:-L\d{3,}|\.(index|plain))\.safetensors")


class UnitFile(NamedTuple):
    """What the name of a unit's file says."""

    run: str
    unit: int
    kind: str
    """rows, index or plain."""

    @classmethod
    def named(cls, name: str) -> UnitFile | None:
        """Read the name of a file that `ao collect` wrote; other files give nothing."""
        match = _FILE.fullmatch(name)
        return match and cls(match[1], int(match[2]), match[3] or "rows")


def rows_name(run: str, unit: int, layer: int) -> str:
    """Name of the file of a layer's rows."""
    return f"{run}-{unit:05d}-L{layer:03d}.safetensors"


def index_name(run: str, unit: int) -> str:
    """Name of a unit's index."""
    return f"{run}-{unit:05d}{INDEX.removeprefix('*')}"


def index_names(folder: Path, *, run: str | None = None, unit: int | None = None) -> list[str]:
    """Names of the indexes of a folder, of a run, of the units of a number, sorted; none where there is no folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    start, end = "" if run is None else f"{run}-", INDEX.removeprefix("*") if unit is None else index_name("", unit)
    return sorted(name for name in names if name.endswith(end) and name.startswith(start))


def plain_name(run: str, unit: int) -> str:
    """Name of a unit's plain file."""
    return f"{run}-{unit:05d}{PLAIN.removeprefix('*')}"


class CachedUnit:
    """A finished unit, of which no more is known than what the manifest, or the header of its index, says."""

    def __init__(self, folder: Path, index: str, common: str, run: str, number: int, rows: dict[int, int]) -> None:
        self.folder = folder
        self.index = index
        """Name of the index."""
        self.common = common
        """Contract, type and width of the rows, as canonical JSON."""
        self.run = run
        self.number = number
        self.rows = rows
        """Rows of each layer that has any."""

    @classmethod
    def all(cls, folder: Path, indexes: Sequence[str]) -> list[CachedUnit]:
        """The units of indexes of a folder, in their order.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged.
        """
        found = _ao.activation_units(folder, indexes)
        return [cls(folder, index, *unit) for index, unit in zip(indexes, found, strict=True)]

    @property
    def path(self) -> Path:
        """Of the index."""
        return self.folder / self.index

    def file(self, layer: int) -> Path:
        """The file of a layer's rows."""
        return self.folder / rows_name(self.run, self.number, layer)

    def require_files(self) -> None:
        """Refuse files of rows that are missing, cut, or another's.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged or another's; names it.
        """
        common = json.loads(self.common)
        for layer, rows in self.rows.items():
            open_rows([self.file(layer)], rows, layer=layer, dtype=common["dtype"], width=common["width"])

    def array(self, name: str, layer: int) -> np.ndarray:
        """An array of the index.

        Raises:
            KeyError: there is none of this name.
            ValueError: the index is damaged, or another than was listed when the cache was opened.
        """
        # Read, not mapped: a mapping keeps its file open, and a large cache has hundreds of indexes.
        if f"{name}.{layer}" not in self._arrays:
            raise KeyError(f"{self.path}: no array {name}.{layer}")
        dtype, [count], offset = self._arrays[f"{name}.{layer}"]
        if name != "blocks" and count != self.rows[layer]:
            raise ValueError(
                f"{self.path}: layer {layer} has {count} rows, {self.rows[layer]} when the cache was opened; if it was not "
                "written again meanwhile, manifest.json is damaged: see ao inspect --verify"
            )
        return np.fromfile(self.path, NUMPY[dtype], count=count, offset=offset)

    @cached_property
    def _arrays(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        return {name: (dtype, shape, offset) for name, dtype, shape, offset in _ao.activation_arrays(self.path)}


def open_rows(paths: list[Path], rows: int, *, layer: int, dtype: str, width: int) -> _ao.ActivationReader:
    """A reader of the files of a layer, which must hold so many rows.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is damaged or another's, or they hold another number of rows.
    """
    reader = _ao.ActivationReader(paths, dtype=dtype, width=width)
    if len(reader) != rows:
        raise ValueError(
            f"{paths[0].parent}: layer {layer}: the files hold {len(reader)} rows, their indexes list {rows}; ao inspect "
            "--verify names what is damaged"
        )
    return reader


def unlisted(path: str | Path) -> list[Path]:
    """Files of rows that no index lists: they are about to get theirs, or their writer was killed before it wrote it."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    rows = {file.name: file for file in files if (of := UnitFile.named(file.name)) and of.kind == "rows"}
    for index in folder.glob(INDEX):
        try:
            [unit] = CachedUnit.all(folder, [index.name])
            listed = {unit.file(layer).name for layer in unit.rows}
        except (ValueError, OSError):
            # What it lists nobody can tell.
            listed = {name for name in rows if name.startswith(f"{index.name.removesuffix(INDEX[1:])}-")}
        rows = {name: file for name, file in rows.items() if name not in listed}
    return list(rows.values())


def verify(path: str | Path, *, step: Callable[[int], object] = lambda units: None) -> list[str]:
    """Check every byte of a cache; returns what is wrong, a line each.

    Args:
        path: The folder.
        step: Is told of each unit that is done, with a 1.

    Raises:
        FileNotFoundError: there is no unit.
    """
    folder = Path(path)
    problems, whole = [], list[str]()
    # Looked at again at the end, when the index of what was about to get one is there.
    rows_before = unlisted(folder)
    indexes = index_names(folder)
    if not indexes:
        raise FileNotFoundError(f"{folder}: no finished unit of an activation cache; make one with ao collect")
    for index in indexes:
        try:
            _ao.verify_activations(folder / index)
            whole.append(index)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        step(1)
    problems += [
        f"{file}: no index lists its rows, so nobody reads them; run the same ao collect again, or remove it"
        for file in unlisted(folder)
        if file in rows_before
    ]
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            listed = {str(unit["index"]): unit["xxh3"] for unit in read_manifest(manifest)["units"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return [*problems, f"{manifest}: damaged: {error}; run ao collect again"]
        missing = sorted(listed.keys() - set(indexes))
        problems += [f"{folder / name}: missing, though manifest.json lists it" for name in missing]
        problems += [
            f"{folder / name}: not the file that manifest.json lists; run ao collect again"
            for name in indexes
            if name in listed and _ao.input_digest(str(folder / name)) != listed[name]
        ]
        # One by one they are read from the headers.
        believed = _ao.activation_units(folder, whole)
        problems += [
            f"{manifest}: damaged: it does not say of {name} what its header says; run ao collect again"
            for name, unit in zip(whole, believed, strict=True)
            if [unit] != _ao.activation_units(folder, [name])
        ]
    return problems
