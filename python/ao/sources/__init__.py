"""Sources: files and data sets, read into Arrow record batches. What becomes of a row is decided in Rust (`ao._ao.Source`).

A batch is one column called `json`, a JSON object a row, or typed columns that mean the same object. Rows count from 0
within their table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ao.config import ClassificationSource, ContextPredictionSource, SourceConfig
from ao.sources.ahead import ahead
from ao.sources.columns import Columns
from ao.sources.files import expected_rows, file_tables
from ao.sources.hub import hub_table, is_saved, saved_table
from ao.sources.latentqa import questions, stimulus_tables
from ao.sources.table import Table, is_unreadable

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Rows",
    "Table",
    "expected_examples",
    "gives_count",
    "inputs",
    "needed_rows",
    "questions",
    "rows",
    "tables",
    "words",
]

READ_AHEAD = 4
"""Batches that are read while others are packed."""


class Rows(NamedTuple):
    """Consecutive rows of one table."""

    table: dict[str, Any]
    """What the rows have in common: id prefix, origin for errors, unit of row numbers, whether they are unreadable."""
    batch: pa.RecordBatch
    """The rows; of unreadable ones, what is wrong with each."""
    first_row: int
    """Number of the first one."""


def tables(config: SourceConfig, *, root: Path, seed: int) -> list[Table]:
    """The tables of a source, in the order of their names.

    Args:
        config: The source.
        root: Folder that a relative `config.path` is taken from.
        seed: Keys the shuffle of a streamed data set of which only some rows are read.

    Raises:
        FileNotFoundError: a file or data set is missing or out of reach; says what to do.
        ValueError: a file is of a kind that the source does not read.
    """
    columns = Columns.of(config)
    if config.dataset is not None:
        return [hub_table(config, columns=columns, seed=seed, limit=needed_rows(config))]
    path = root / str(config.path)
    if not path.exists():
        raise FileNotFoundError(
            f"source {config.name!r}: {path} does not exist; its path is taken from the recipe's folder"
        )
    if config.kind == "latentqa":
        return stimulus_tables(config, path=path)
    if is_saved(path):
        return [saved_table(config, path=path, columns=columns)]
    if config.split is not None:
        raise ValueError(
            f"source {config.name!r}: split={config.split!r}, but {path} is no data set that `save_to_disk` wrote; "
            "leave split out"
        )
    return file_tables(config, path=path, columns=columns)


def needed_rows(config: SourceConfig) -> int | None:
    """Rows of a streamed data set that give `config.count` examples, or `config.rows`; None for all.

    Where rows of some labels are left out these are three times as many.
    """
    if config.rows is not None or config.count is None or config.dataset is None:
        return config.rows
    rows = -(-config.count // _examples_per_row(config))
    return 3 * rows if config.kind == "classification" and not all(config.labels.values()) else rows


def gives_count(config: SourceConfig) -> bool:
    """Whether just as many rows are read as `config.count` needs, so that no example has to be drawn or left out."""
    rows = needed_rows(config)
    if config.dataset is None or rows is None or config.count is None:
        return False
    return rows * _examples_per_row(config) <= config.count


def expected_examples(config: SourceConfig, found: list[Table]) -> int | None:
    """About how many examples the rows of a source give without a count, or None where no glance at the files tells."""
    if config.dataset is not None or config.kind == "latentqa":
        return None
    whole = config.kind == "context_prediction" and config.documents == "file"
    try:
        rows = [expected_rows(file, whole=whole) for table in found for file in table.files]
    except (OSError, ValueError):
        return None  # Reading it says what is wrong.
    known = [number for number in rows if number is not None]
    if len(known) < len(rows):
        return None
    read = sum(known) if config.rows is None else min(sum(known), config.rows)
    return read * _examples_per_row(config)


def _examples_per_row(config: SourceConfig) -> int:
    match config:
        case ClassificationSource():
            return config.questions_per_text
        case ContextPredictionSource():
            return config.draws_per_text
        case _:
            return 1


def rows(config: SourceConfig, *, root: Path, seed: int, found: list[Table] | None = None) -> Iterator[Rows]:
    """The rows of a source, read ahead by a thread while the last ones are used; `config.rows` of them at most.

    Args:
        config: The source.
        root: Folder that a relative `config.path` is taken from.
        seed: As for `tables`.
        found: What `tables` gave, if it was asked.

    Raises:
        As `tables`, and ValueError where a file is malformed as a whole.
    """
    listed = tables(config, root=root, seed=seed) if found is None else found
    return ahead(_limited(listed, config.rows), depth=READ_AHEAD)


def _limited(found: list[Table], limit: int | None) -> Iterator[Rows]:
    left = limit
    for table in found:
        for batch, first_row in table.batches():
            if left is not None:
                if left <= 0:
                    return
                batch = batch.slice(0, left)
                left -= batch.num_rows
            described = {**table.described, "unreadable": True} if is_unreadable(batch) else table.described
            yield Rows(described, batch, first_row)


def words(found: list[Table]) -> list[str] | None:
    """The labels that tables declare before they are read, or None."""
    declared = [table.words for table in found]
    if not declared or any(names is None for names in declared):
        return None
    return sorted({name for names in declared for name in names or ()})


def files_of(config: SourceConfig, found: list[Table], *, root: Path) -> list[Path]:
    """The local files that a source is read from, sorted."""
    files = {file for table in found for file in table.files}
    if config.kind == "latentqa":
        files.add(root / str(config.path) / "qa.json")
    return sorted(files)


def inputs(config: SourceConfig, found: list[Table], *, root: Path) -> list[dict[str, Any]]:
    """What the data set is made from, without places: files by name, bytes and digest, data sets by their names."""
    recorded: list[dict[str, Any]] = []
    base = root / str(config.path)
    for file in files_of(config, found, root=root):
        from ao._ao import input_digest

        name = file.relative_to(base).as_posix() if base.is_dir() else file.name
        recorded.append(
            {"source": config.name, "file": name, "bytes": file.stat().st_size, "xxh3": input_digest(str(file))}
        )
    for table in found:
        if table.dataset is not None:
            recorded.append({"source": config.name, **table.dataset})
    return recorded
