"""What the sources share: keyed draws and readers whose errors name file, line and key."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def key(seed: int, name: str, purpose: str) -> int:
    """A uniform 64-bit number that depends on these three alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=8).digest(), "little")


def draw(rows: Callable[[], Iterable[tuple[str, T]]], *, count: int | None, seed: int) -> Iterator[tuple[str, T]]:
    """Of rows (id, value) the `count` with the smallest keys, or all of fewer, in their order.

    `rows` is called twice where there is a count, so that nothing has to be held.
    """
    if count is None:
        yield from rows()
        return
    keys = np.fromiter((key(seed, name, "draw") for name, _ in rows()), dtype=np.uint64)
    keep = np.zeros(len(keys), dtype=bool)
    keep[np.argsort(keys, kind="stable")[:count]] = True
    for kept, row in zip(keep, rows(), strict=True):
        if kept:
            yield row


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, numbered from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_object(line: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object of a JSONL line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def field(entry: object, name: str, *, where: str) -> str:
    """A text field of an entry, stripped; it must be there and not be empty."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    value = column(entry, name, where=where)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: key {name!r}: expected text, got {value!r}")
    return value.strip()


def column(entry: dict[str, Any], name: str, *, where: str) -> Any:
    """A field of an entry; it must be there."""
    if name not in entry:
        raise ValueError(f"{where}: key {name!r} is missing; there are {sorted(map(str, entry))}")
    return entry[name]


def read_table(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a CSV, JSON (a list of objects) or JSONL file, each with where it stands, for errors."""
    if path.suffix == ".csv":
        rows: list[tuple[str, dict[str, Any]]] = []
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                for row in csv.DictReader(file, strict=True):
                    where = f"{path}: row {len(rows) + 1}"
                    if None in row or None in row.values():
                        raise ValueError(f"{where}: has another number of cells than the header")
                    rows.append((where, row))
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: not a CSV file in UTF-8: {error}, after row {len(rows)}") from None
        return rows
    if path.suffix == ".jsonl":
        places = ((f"{path}: line {number}", line) for number, line in lines(path))
        return [(where, parse_object(line, where=where)) for where, line in places]
    if path.suffix != ".json":
        raise ValueError(f"{path}: expected .csv, .json or .jsonl, got {path.suffix or 'no suffix'}")
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of objects")
    return [(f"{path}: entry {index}", entry) for index, entry in enumerate(entries)]
