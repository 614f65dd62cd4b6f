"""Reader of CSV files: Arrow reads them, and tells of rows that are no rows."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from ao.sources import blocks
from ao.sources.columns import Columns
from ao.sources.table import unreadable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    from ao.sources.table import Read

SHOWN = 60
"""Characters that a message shows of a bad row."""
ROWS = 4096
"""Rows of a batch where Arrow does not make the batches."""

_BAD_ROW = "columns, got"
"""What Arrow says of a row of another number of cells that it could not hand over."""


def read_csv(path: Path, columns: Columns) -> Read:
    """Rows of a CSV file with a header, every cell as text; blank lines are passed over.

    A row with another number of cells than the header, or with a cell that is read and not UTF-8, is `unreadable`.

    Raises:
        ValueError: it has no header, or a quote is not closed.
    """
    names = _header(path)
    chosen = columns.chosen(names, where=str(path))
    next_row = 0
    try:
        for batch, first_row in _by_arrow(path, names, chosen):
            yield batch, first_row
            next_row = first_row + batch.num_rows
    except _UnshowableError:
        yield from _one_by_one(path, names, chosen, next_row)


class _UnshowableError(Exception):
    """Arrow has met a row of another number of cells that is not UTF-8 either, so that it can show its text to nobody."""


def _by_arrow(path: Path, names: Sequence[str], chosen: Sequence[str]) -> Read:
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    # A row with one cell too many. If a quote is open it becomes part of a cell, as all does that stands behind the quote.
    end = "," * len(names)
    bad: deque[pa_csv.InvalidRow] = deque()

    def pass_over(row: pa_csv.InvalidRow) -> str:
        bad.append(row)
        return "skip"

    next_row = 0
    try:
        with pa_csv.open_csv(
            pa.PythonFile(_Stream(_with_end(blocks.read_blocks(path), end)), mode="r"),
            # With use_threads Arrow does not know the number of a bad row.
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=blocks.BLOCK + len(end) + 2),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=pass_over),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=chosen,
                strings_can_be_null=False,
                check_utf8=False,
            ),
        ) as reader:
            for batch in reader:
                while batch.num_rows:
                    until = min(_number(bad[0]) - next_row, batch.num_rows) if bad else batch.num_rows
                    if until == 0:
                        yield unreadable(_wrong_cells(bad.popleft())), next_row
                        next_row += 1
                    else:
                        yield from _in_utf8(batch.slice(0, until), next_row)
                        next_row += until
                        batch = batch.slice(until)
    except (pa.ArrowInvalid, OSError) as error:
        what = str(error)
        if "straddl" in what:
            what = f"a quote is not closed, or a row is longer than {blocks.BLOCK} bytes"
        elif _BAD_ROW in what:
            raise _UnshowableError from None
        raise ValueError(f"{path}: cannot be read as CSV from row {next_row} on: {what}") from None
    last = bad.pop() if bad else None
    if last is None or last.text != end:
        row = next_row - 1 if last is None else _number(last)
        raise ValueError(
            f"{path}: row {row}: a quote is not closed, so all that stands behind it is one cell; close it"
        )
    for row in bad:
        yield unreadable(_wrong_cells(row)), _number(row)


class _Stream:
    """Blocks as a file that Arrow reads."""

    closed = False

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks

    def read(self, size: int = -1) -> bytes:
        """The next block; Arrow asks for no less."""
        return next(self._blocks, b"")

    def close(self) -> None:
        self.closed = True


def _with_end(found: Iterator[bytes], end: str) -> Iterator[bytes]:
    last = next(found, b"")
    for block in found:
        yield last
        last = block
    yield last + f"\n{end}\n".encode()


def _number(row: pa_csv.InvalidRow) -> int:
    """From 0, where Arrow counts from 1, and the header too."""
    return row.number - 2


def _wrong_cells(row: pa_csv.InvalidRow) -> str:
    return _cells(row.expected_columns, row.actual_columns, row.text)


def _cells(expected: int, got: int, text: str) -> str:
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return (
        f"expected {expected} cells as the header has, got {got}: {shown!r}; a cell with a comma or a line break must "
        "stand in quotes"
    )


def _not_utf8(name: str, error: UnicodeDecodeError) -> str:
    return f"column {name!r}: not UTF-8: {error}"


def _in_utf8(batch: pa.RecordBatch, first_row: int) -> Read:
    """The rows in runs, those `unreadable` of which a cell is not UTF-8."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        wrong: dict[int, str] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for index, cell in enumerate(column.cast(pa.binary()).to_pylist()):
                try:
                    cell.decode()
                except UnicodeDecodeError as error:
                    wrong.setdefault(index, _not_utf8(name, error))
        for is_wrong, run in groupby(range(batch.num_rows), wrong.__contains__):
            start, *more = run
            found = (
                unreadable(*(wrong[row] for row in (start, *more))) if is_wrong else batch.slice(start, 1 + len(more))
            )
            yield found, first_row + start
    else:
        yield batch, first_row


def _one_by_one(path: Path, names: Sequence[str], chosen: Sequence[str], next_row: int) -> Read:
    """Rows from `next_row` on by the standard library's reader: slow, and whatever their bytes are."""
    import pyarrow as pa

    indices = [names.index(name) for name in chosen]
    with blocks.opened(path) as file, _any_length():
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = (row for row in csv.reader(text, strict=True) if row)
        try:
            rest = islice(rows, 1 + next_row, None)
            while some := list(islice(rest, ROWS)):
                for is_wrong, run in groupby(((row, _wrong(row, names, indices)) for row in some), _is_wrong):
                    found = list(run)
                    if is_wrong:
                        batch = unreadable(*(str(why) for _, why in found))
                    else:
                        cells = ([row[index] for row, _ in found] for index in indices)
                        batch = pa.record_batch([pa.array(column, pa.string()) for column in cells], names=list(chosen))
                    yield batch, next_row
                    next_row += len(found)
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read as CSV from row {next_row} on: {error}") from None


def _is_wrong(row_and_why: tuple[list[str], str | None]) -> bool:
    return row_and_why[1] is not None


def _wrong(row: list[str], names: Sequence[str], indices: Sequence[int]) -> str | None:
    """What is wrong with a row whose bytes are escaped where they are not UTF-8."""
    if len(row) != len(names):
        shown = ",".join(row).encode(errors="surrogateescape").decode(errors="replace")
        return _cells(len(names), len(row), shown)
    for index in indices:
        try:
            row[index].encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            return _not_utf8(names[index], error)
    return None


@contextmanager
def _any_length() -> Iterator[None]:
    """The standard library's reader refuses cells of 128 KiB, which a document may well have."""
    limit = csv.field_size_limit(blocks.BLOCK)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _header(path: Path) -> list[str]:
    with blocks.opened(path) as file:
        text = io.TextIOWrapper(io.BytesIO(file.read(blocks.BLOCK)), encoding="utf-8-sig", errors="replace", newline="")
        try:
            names = next(csv.reader(text, strict=True), [])
        except csv.Error as error:
            raise ValueError(f"{path}: its header is no CSV: {error}") from None
    if not names:
        raise ValueError(f"{path}: is empty; expected a CSV file with a header")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: the header has the column {twice[0]!r} twice; rename one")
    return names
