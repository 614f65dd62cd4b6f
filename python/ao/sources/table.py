"""One table of a source: what its rows share, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Read = Iterator[tuple["pa.RecordBatch", int]]
"""Record batches, each with the number of its first row."""
Batches = Callable[[], Read]
"""Reads a table from its start."""

_UNREADABLE = b"ao.unreadable"


def unreadable(*why: str) -> pa.RecordBatch:
    """Rows that cannot be read: for each, what is wrong with it."""
    import pyarrow as pa

    return pa.record_batch({"json": why}).replace_schema_metadata({_UNREADABLE: b""})


def is_unreadable(batch: pa.RecordBatch) -> bool:
    """Whether a batch holds no rows, but what is wrong with them."""
    return _UNREADABLE in (batch.schema.metadata or {})


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file, a split of a data set, or one of LatentQA's stimulus files."""

    described: dict[str, Any]
    """Id prefix of its rows, origin for errors, unit that they are counted in ("line" from 1, "row" and "entry" from 0),
    for LatentQA's stimuli their type, for relations their templates."""
    batches: Batches
    """Reads it; may be called again."""
    files: tuple[Path, ...] = ()
    """The files that it is read from."""
    dataset: dict[str, str] | None = field(default=None)
    """Names of a Hub's data set and its fingerprint."""
    words: tuple[str, ...] | None = None
    """Its labels, where it declares them."""
