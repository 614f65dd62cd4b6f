"""What a folder holds already, and what is left to collect."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ao.cache import ActivationCache
from ao.cache_files import INDEX, PLAIN, UnitFile, unlisted
from ao.collect.wanted import Unit, Units
from ao.distributed import Ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LEFT_SECONDS = 3600.0
"""After so long without a change a temporary file that its writer does not lock is one that a killed process left."""

_TEMPORARY = re.compile(r"\.(.+?\.safetensors)\..+\.(?:partial|tmp)")
_OTHERS = re.compile(r"manifest\.json|norms\.png|\.(manifest\.json|norms\.png)\.\d+\.tmp")


def earlier_runs(
    out: Path, run: str, contract: Mapping[str, Any], *, dtype: str, width: int | None = None
) -> ActivationCache | None:
    """What other runs left in the folder; a unit whose files are missing or do not fit is left out, and told.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: its rows are of another target, type or width.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    if out.is_dir() and (strangers := [path.name for path in out.iterdir() if not _is_own(path.name)]):
        raise FileExistsError(f"{out} holds {strangers[0]!r}, so it is no activation cache; choose another --out")
    if not any(path for path in out.glob(INDEX) if not path.name.startswith(run)):
        return None
    cache = ActivationCache.open(out, contract=contract, without=run, headers=True)
    found, asked = (cache.contract, cache.dtype), (dict(contract), dtype)
    if found != asked or width not in (None, cache.width):
        raise ValueError(
            f"{out} holds rows of {cache.dtype} and {cache.width} values, asked for were {dtype}"
            + (f" and {width}" if width is not None else "")
            + ("" if found[0] == asked[0] else f"; its contract has {sorted(found[0])}, this one {sorted(asked[0])}")
            + ("; choose another --out" if width is not None else "; choose another --out or --dtype")
        )
    cache, damaged = cache.split_damaged()
    for index, problem in damaged.items():
        log.warning(
            "%s; its unit counts as not collected, and the cache cannot be read until it is whole: run its ao collect again, "
            "or remove %s*",
            problem, index.with_name(index.name.removesuffix(INDEX[1:])),
        )  # fmt: skip
    return cache


def _is_own(name: str) -> bool:
    temporary = _TEMPORARY.fullmatch(name)
    of = UnitFile.named(temporary[1] if temporary else name)
    return (of is not None and of.kind != "plain") or _OTHERS.fullmatch(name) is not None


def remove_leftovers(out: Path, *, finished: str | None = None) -> None:
    """Remove what killed processes left of units, whatever run they were of; what a living one writes stays.

    Args:
        out: the folder.
        finished: a run whose every process has finished; what is left of it goes at once, and rows without an index, too.
    """
    for path in sorted(out.glob(".*")):
        if not (match := _TEMPORARY.fullmatch(path.name)) or not (of := UnitFile.named(match[1])):
            continue
        try:
            if of.run == finished or (_is_free(path) if of.kind == "rows" else _is_old(path)):
                path.unlink()
        except FileNotFoundError:
            continue  # its writer has finished, or another process was here first
    if finished is not None:
        _remove_damaged(out, finished)
        for path in unlisted(out):
            if path.name.startswith(f"{finished}-"):
                path.unlink()


def _remove_damaged(out: Path, run: str) -> None:
    """Remove the indexes of a run's units that are not whole when it has finished: all that it wanted of them is elsewhere."""
    try:
        _, damaged = ActivationCache.open(out, run=run, headers=True).split_damaged()
    except FileNotFoundError:
        return
    for index in damaged:
        index.unlink()


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock under which rows are written; where there are no locks nobody can tell."""
    if fcntl is None:
        return False
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > LEFT_SECONDS


@dataclass(frozen=True)
class Remaining:
    """What is left to collect."""

    units: Sequence[Unit]
    """What is left of each unit."""
    numbers: Sequence[int]
    """Those of which something is left."""


def remaining(units: Sequence[Unit], old: ActivationCache | None) -> Remaining:
    """What each unit has to collect: what no unit before it holds, and no earlier run.

    Decided from the units and earlier runs alone, so that a run that goes on decides alike. Each unit is built once for that
    and once when it is asked for; in between only a byte of each value wanted is kept.
    """
    keys_of: dict[int, list[np.ndarray]] = {}
    layers_of = [np.empty(0, dtype=np.int16)]
    for unit in units:
        keys = unit.keys()
        layers_of.append(unit.wanted.layers.astype(np.int16))
        for layer in np.unique(unit.wanted.layers).tolist():
            keys_of.setdefault(layer, []).append(keys[unit.wanted.layers == layer])
    layers, bounds = np.concatenate(layers_of), np.cumsum(list(map(len, layers_of)))
    kept = np.zeros(len(layers), dtype=bool)
    for layer in sorted(keys_of):
        keys = np.concatenate(keys_of.pop(layer))
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys the first unit's comes first
        firsts = order[np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))]
        if old is not None:
            firsts = firsts[old.layer(layer).find(keys[firsts]) < 0]
        kept[np.flatnonzero(layers == layer)[firsts]] = True
    kept_of = np.split(kept, bounds[1:-1]) if len(units) else []
    numbers = [number for number, own in enumerate(kept_of) if own.any()]
    return Remaining(Units([1] * len(units), lambda number: [units[number].only(kept_of[number])]), numbers)


@dataclass(frozen=True)
class Share:
    """What one rank has to collect."""

    units: Sequence[Unit]
    """What is left of each unit of the run."""
    numbers: Sequence[int]
    """The rank's own of those that are not there."""
    units_before: int
    """How many of its own were there already."""


def cache_share(units: Sequence[Unit], old: ActivationCache | None, out: Path, run: str, here: Ranks) -> Share:
    """A rank's units of a cache of which something is left.

    Whose a unit is follows from its number alone. Ranks look at the folder at different moments, so what is left differs
    between them where another run finishes meanwhile; every unit is somebody's all the same.
    """
    left = remaining(units, old)
    mine = [number for number in left.numbers if number % here.world == here.rank]
    missing = [number for number in mine if not is_there(out, run, number, left.units)]
    return Share(left.units, missing, len(mine) - len(missing))


def plain_share(units: Sequence[Unit], out: Path, run: str, here: Ranks) -> Share:
    """A rank's units without a plain file."""
    there, mine = plain_done(out, run), range(len(units))[here.rank :: here.world]
    missing = [number for number in mine if number not in there]
    return Share(units, missing, len(mine) - len(missing))


def is_there(out: Path, run: str, number: int, units: Sequence[Unit]) -> bool:
    """Whether a run's unit is whole: its index, its files, and in it all that it is to hold."""
    try:
        cache = ActivationCache.open(out, run=run, unit=number, headers=True)
        unit = units[number]  # built only now, as a fresh run has no index
        keys = unit.keys()
        for layer in np.unique(unit.wanted.layers).tolist():
            cached = cache.layer(layer)
            cached.require_files()
            if (cached.find(keys[unit.wanted.layers == layer]) < 0).any():
                return False
    except (FileNotFoundError, ValueError):
        return False
    return True


def plain_done(out: Path, run: str) -> set[int]:
    """Numbers of a run's units whose plain files are there, with headers that fit their lengths.

    Raises:
        FileExistsError: the folder holds a cache.
    """
    if out.is_dir() and any(out.glob(INDEX)):
        raise FileExistsError(f"{out} is an activation cache; choose another --out for plain files")
    files = {path: of for path in out.glob(f"{run}-{PLAIN}") if (of := UnitFile.named(path.name))}
    return {of.unit for path, of in files.items() if _has_fitting_header(path)}


def _has_fitting_header(path: Path) -> bool:
    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False
