"""What a folder holds already, and what is left to collect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ao.cache import INDEX, PLAIN, ActivationCache
from ao.collect.wanted import Unit


def earlier_runs(
    out: Path, run: str, contract: Mapping[str, Any], *, dtype: str, width: int | None = None
) -> ActivationCache | None:
    """What other runs left in the folder.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: its rows are of another target, type or width.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    own = re.compile(r"\.?[0-9a-f]{16}-\d{5}(-L\d{3,}|\.index)\.safetensors(\..+\.partial)?|manifest\.json|norms\.png")
    if out.is_dir() and (strangers := [path.name for path in out.iterdir() if not own.fullmatch(path.name)]):
        raise FileExistsError(f"{out} holds {strangers[0]!r}, so it is no activation cache; choose another --out")
    if not any(path for path in out.glob(INDEX) if not path.name.startswith(run)):
        return None
    cache = ActivationCache.open(out, contract=contract, without=run)
    found, asked = (cache.contract, cache.dtype), (dict(contract), dtype)
    if found != asked or width not in (None, cache.width):
        raise ValueError(
            f"{out} holds rows of {cache.dtype} and {cache.width} values, asked for were {dtype}"
            + (f" and {width}" if width is not None else "")
            + ("" if found[0] == asked[0] else f"; its contract has {sorted(found[0])}, this one {sorted(asked[0])}")
            + "; choose another --out or --dtype"
        )
    return cache


def remaining(units: Sequence[Unit], old: ActivationCache | None) -> list[Unit]:
    """What each unit has to collect: what no unit before it holds, and no earlier run.

    Decided from the units and earlier runs alone, so that every rank, and a run that goes on, decides alike.
    """
    all_keys = [unit.keys() for unit in units]
    bounds = np.cumsum([0, *map(len, all_keys)])
    keys = np.concatenate([np.empty((0, 2), np.uint64), *all_keys])
    layers = np.concatenate([np.empty(0, np.int64), *(unit.wanted.layers for unit in units)])
    kept = np.zeros(len(keys), dtype=bool)
    for layer in np.unique(layers).tolist():
        here = np.flatnonzero(layers == layer)
        order = here[np.lexsort((here, keys[here, 1], keys[here, 0]))]
        is_first = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))
        kept[order[is_first]] = True
        if old is not None:
            firsts = order[is_first]
            kept[firsts[old.layer(layer).find(keys[firsts]) >= 0]] = False
    return [unit.only(kept[first:end]) for unit, first, end in zip(units, bounds, bounds[1:], strict=False)]


def is_there(out: Path, run: str, number: int, unit: Unit) -> bool:
    """Whether a run's unit is whole: its index, its files, and in it all that it is to hold."""
    try:
        cache, keys = ActivationCache.open(out, run=run, unit=number), unit.keys()
        for layer in np.unique(unit.wanted.layers).tolist():
            cached = cache.layer(layer)
            cached.require_files()
            if (cached.find(keys[unit.wanted.layers == layer]) < 0).any():
                return False
    except (FileNotFoundError, ValueError):
        return False
    return True


def plain_done(out: Path, run: str) -> set[int]:
    """Numbers of a run's units whose plain files are there.

    Raises:
        FileExistsError: the folder holds a cache.
    """
    if out.is_dir() and any(out.glob(INDEX)):
        raise FileExistsError(f"{out} is an activation cache; choose another --out for plain files")
    suffix = PLAIN.removeprefix("*")
    return {int(path.name.removesuffix(suffix).rpartition("-")[2]) for path in out.glob(f"{run}-*{suffix}")}
