"""The files of an activation cache: what they are called, what an index says, what is damaged. Torch-free.

A unit has a file of rows for each layer and an index, which is written last: where it stands, the unit is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ao import _ao
from ao.manifest import canonical_json, read_manifest

MANIFEST = "manifest.json"
"""What a folder holds, in short, written when a run is done."""
HEADER_BYTES = 4096
"""Bytes of a file before its first row."""
INDEX = "*.index.safetensors"
"""The indexes of a folder."""
PLAIN = "*.plain.safetensors"
"""The plain files of a folder, which other tools read."""
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U32": "<u4", "U64": "<u8"}
"""Types of rows and of an index's arrays, by the names that safetensors gives them; BF16 by its bits."""

_OWN_DIGEST = ',"sha256":"'
"""What stands behind all that a manifest says, and before the digest of that."""
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


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What stands in a manifest: canonical JSON, and as its last field the sha256 of all before that field."""
    said = canonical_json(manifest).removesuffix("}")
    return f'{said}{_OWN_DIGEST}{hashlib.sha256(said.encode()).hexdigest()}"}}\n'


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
    end = INDEX.removeprefix("*") if unit is None else index_name("", unit)
    names = [name for name in names if name.endswith(end)]
    if run is not None:
        # Behind the run comes the number alone: another run may begin with this one's name.
        numbered = re.compile(rf"{re.escape(run)}-\d+{re.escape(INDEX.removeprefix('*'))}")
        names = filter(numbered.fullmatch, names)
    return sorted(names)


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
    def all(cls, folder: Path, indexes: Sequence[str], *, headers: bool = False) -> list[CachedUnit]:
        """The units of indexes of a folder, in their order; with `headers` whatever the manifest says of them.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged.
        """
        found = _ao.activation_units(folder, indexes, headers=headers)
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
        for layer in self.rows:
            open_rows([self], layer)

    def array(self, name: str, layer: int) -> np.ndarray:
        """An array of the index.

        Raises:
            KeyError: there is none of this name.
            ValueError: the index is damaged, or says something else than was known when the cache was opened.
            FileNotFoundError: it is gone.
        """
        # Read, not mapped: a mapping keeps its file open, and a large cache has hundreds of indexes.
        if f"{name}.{layer}" not in self._arrays:
            raise KeyError(f"{self.path}: no array {name}.{layer}")
        dtype, [count], offset = self._arrays[f"{name}.{layer}"]
        return np.fromfile(self.path, NUMPY[dtype], count=count, offset=offset)

    @cached_property
    def _arrays(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        known = (self.common, self.run, self.number, self.rows)
        try:
            [found] = _ao.activation_units(self.folder, [self.index], headers=True)
            arrays = _ao.activation_arrays(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}: gone since the cache was opened; open it again") from None
        if found != known:
            raise ValueError(
                f"{self.path}: its header says {list(found)}, and {list(known)} was known of it when the cache was opened; if "
                f"nobody wrote it again meanwhile, remove {self.folder / MANIFEST}, which is damaged, and open the cache again"
            )
        return {name: (dtype, shape, offset) for name, dtype, shape, offset in arrays}


def open_rows(units: Sequence[CachedUnit], layer: int) -> _ao.ActivationReader:
    """A reader of a layer's rows in units of one cache.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, another's, or holds other rows than its unit is to have.
    """
    common = json.loads(units[0].common)
    return _ao.ActivationReader(
        [unit.file(layer) for unit in units],
        rows=[unit.rows[layer] for unit in units],
        contract_json=json.dumps(common["contract"]),
        dtype=common["dtype"],
        width=common["width"],
    )


def unlisted(path: str | Path) -> list[Path]:
    """Files of rows that no index lists: they are about to get theirs, or their writer was killed before it wrote it."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    rows = {file.name: file for file in files if (of := UnitFile.named(file.name)) and of.kind == "rows"}
    for index in folder.glob(INDEX):
        try:
            [unit] = CachedUnit.all(folder, [index.name], headers=True)
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
    if (folder / MANIFEST).is_file():
        problems += _wrong_in_manifest(folder / MANIFEST, indexes, CachedUnit.all(folder, whole, headers=True))
    return problems


def _wrong_in_manifest(path: Path, indexes: Sequence[str], whole: Sequence[CachedUnit]) -> list[str]:
    """What a manifest says of the indexes of its folder, and of the whole units among them, that is not so."""
    folder = path.parent
    try:
        manifest = read_manifest(path)
        own = manifest.pop("sha256", None)
        digests = {str(unit["index"]): unit["xxh3"] for unit in manifest["units"]}
        rows = {str(unit["index"]): dict(unit["rows"]) for unit in manifest["units"]}
        common = canonical_json({name: manifest[name] for name in ("contract", "dtype", "width")})
        is_itself = path.read_bytes() == manifest_text(manifest).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{path}: damaged: {error}; run ao collect again"]
    problems = [
        f"{folder / name}: missing, though {MANIFEST} lists it" for name in sorted(digests.keys() - set(indexes))
    ]
    again = "run ao collect again, or remove it"
    if not is_itself:
        problems.append(f"{path}: damaged, or written by hand: its sha256 {own} is not that of what it says; {again}")
    other = {name for name in indexes if name in digests and _ao.input_digest(str(folder / name)) != digests[name]}
    problems += [f"{folder / name}: not the file that {MANIFEST} lists; run ao collect again" for name in sorted(other)]
    for unit in whole:
        found = (unit.common, {str(layer): count for layer, count in unit.rows.items()})
        if unit.index in rows.keys() - other and (common, rows[unit.index]) != found:
            problems.append(f"{path}: damaged: it does not say of {unit.index} what its header says; {again}")
    return problems
