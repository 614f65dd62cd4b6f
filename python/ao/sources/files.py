"""Readers of files: JSONL, JSON, CSV, Parquet, Arrow and plain text, each also compressed (.gz, .zst) where it is text.

A file is read in blocks of a few MiB, so memory does not grow with it; only a `.json` file is read whole. Errors of a
file's own layout (a `.json` that is none, a quote that is not closed) name the file and end the reading; what is wrong with
a single row is found, or with an `unreadable` one told, in Rust, which counts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ao.config import SourceConfig
from ao.sources import blocks
from ao.sources.blocks import BYTE_ORDER_MARK, opened, read_blocks, suffixes
from ao.sources.columns import Columns, plain, spelled
from ao.sources.csv_rows import read_csv
from ao.sources.table import Read, Table

if TYPE_CHECKING:
    import pyarrow as pa

ENTRIES = 4096
"""Entries of a `.json` file in one batch."""

_BLANK_LINES = re.compile(rb"\n[^\S\n]*\n\s*")


def file_tables(config: SourceConfig, *, path: Path, columns: Columns) -> list[Table]:
    """The tables of a file, or of all the files that can be read below a folder, by name.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is of another kind, or two files of a folder would give the same ids.
    """
    if not path.is_dir():
        return [_table(config, path=path, prefix=config.name, columns=columns)]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and _kind(config, file) is not None and not file.name.startswith(".")
    )
    if not files:
        raise FileNotFoundError(f"source {config.name!r}: {path} has no file of {_kinds(config)}")
    by_prefix: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(path).as_posix().removesuffix("".join(suffixes(file)))
        other = by_prefix.setdefault(f"{config.name}/{name}", file)
        if other is not file:
            raise ValueError(
                f"source {config.name!r}: {other} and {file} differ only in their suffix, so their rows would have the "
                "same ids; rename one, or take it out of the folder"
            )
    return [_table(config, path=file, prefix=prefix, columns=columns) for prefix, file in by_prefix.items()]


def _kind(config: SourceConfig, path: Path) -> str | None:
    found = suffixes(path)
    if not found or found[0] not in _READERS:
        return None
    if found[0] == ".txt" and config.kind != "context_prediction":
        return None
    return None if len(found) > 1 and found[0] in _BINARY else found[0]


def _kinds(config: SourceConfig) -> str:
    return " ".join(suffix for suffix in _READERS if suffix != ".txt" or config.kind == "context_prediction")


def _table(config: SourceConfig, *, path: Path, prefix: str, columns: Columns) -> Table:
    kind = _kind(config, path)
    if kind is None:
        raise ValueError(
            f"source {config.name!r}: {path}: cannot be read as {config.kind}; expected {_kinds(config)} "
            "(text also as .gz or .zst), or a folder of such files"
        )
    described: dict[str, Any] = {"prefix": prefix, "origin": str(path), "unit": _UNITS.get(kind, "row")}
    if kind == ".json":
        return _json_table(config, path, described)
    if kind == ".txt":
        whole = config.kind == "context_prediction" and config.documents == "file"
        name = getattr(config, "text", "text")
        return Table(described=described, files=(path,), batches=lambda: read_text(path, name=name, whole=whole))
    reader = _READERS[kind]
    return Table(described=described, files=(path,), batches=lambda: reader(path, columns))


def expected_rows(path: Path, *, whole: bool = False) -> int | None:
    """About how many rows a file has, or None where no glance tells.

    Args:
        path: The file.
        whole: A `.txt` file is one row.
    """
    kind, *compressed = suffixes(path)
    if kind == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    if kind not in (".jsonl", ".ndjson", ".csv", ".txt") or compressed:
        return None
    if kind == ".txt" and whole:
        return 1
    with open(path, "rb") as file:
        block = file.read(blocks.BLOCK)
    rows = len(_BLANK_LINES.findall(block)) if kind == ".txt" else block.count(b"\n")
    return round(rows * path.stat().st_size / max(1, len(block)))


# Text


def read_jsonl(path: Path, columns: Columns | None = None) -> Read:
    """Lines as they stand, in a column `json`; blank ones count as rows. No line is looked at here."""
    import numpy as np
    import pyarrow as pa

    def batch(block: bytes, ends: np.ndarray) -> pa.RecordBatch:
        offsets = np.concatenate([[0], ends])
        lines = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        )
        return pa.record_batch([lines], names=["json"])

    rest, first_row = b"", 0
    for block in read_blocks(path):
        block = rest + block if rest else block
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1
        if not len(ends):
            rest = block
            continue
        yield batch(block, ends), first_row
        first_row += len(ends)
        rest = block[ends[-1] :]
    if rest:
        yield batch(rest, np.array([len(rest)])), first_row


def read_text(path: Path, *, name: str, whole: bool) -> Read:
    """Documents of a text file in a column `name`: what stands between blank lines, or the whole file.

    Raises:
        ValueError: it is not UTF-8.
    """
    import pyarrow as pa

    first_row = 0
    for pieces in [[b"".join(read_blocks(path)).strip()]] if whole else _paragraphs(path):
        documents = [piece for piece in pieces if piece]
        if not documents:
            continue
        try:
            column = pa.array(documents, pa.large_binary()).cast(pa.large_string())
        except pa.ArrowInvalid:
            for index, document in enumerate(documents):
                try:
                    document.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}: document {first_row + index}: not UTF-8: {error}") from None
            raise
        yield pa.record_batch([column], names=[name]), first_row
        first_row += len(documents)


def _paragraphs(path: Path) -> Iterator[list[bytes]]:
    rest = b""
    for block in read_blocks(path):
        *pieces, rest = _BLANK_LINES.split(rest + block)
        yield [piece.strip() for piece in pieces]
    yield [rest.strip()]


# JSON


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    data = b"".join(read_blocks(path))
    try:
        return json.loads(data)
    except ValueError as error:
        remedy = "; one object a line is JSONL: rename it to .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{path}: not JSON: {error}{remedy}") from None


def json_batches(entries: Sequence[object]) -> Read:
    """Entries of a JSON file in a column `json`."""
    import pyarrow as pa

    for start in range(0, len(entries), ENTRIES):
        # Escaped, so that half a surrogate pair is a bad row and not the end of the reading.
        lines = [json.dumps(entry) for entry in entries[start : start + ENTRIES]]
        yield pa.record_batch([pa.array(lines, pa.large_string())], names=["json"]), start


def _json_table(config: SourceConfig, path: Path, described: dict[str, Any]) -> Table:
    """A list of objects, or for classification a relation file: {"samples": [...], "prompt_templates": [...]}."""
    with opened(path) as file:
        is_list = file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
    if is_list:
        return Table(described=described, files=(path,), batches=lambda: json_batches(read_json(path)))
    relation = read_json(path)
    if config.kind != "classification" or not isinstance(relation, dict):
        raise ValueError(f"{path}: expected a list of objects, got {_named(relation)}")
    described = described | {"templates": _relation_templates(path, relation)}
    return Table(described=described, files=(path,), batches=lambda: json_batches(relation["samples"]))


def _relation_templates(path: Path, relation: dict[str, Any]) -> list[str]:
    for key in ("samples", "prompt_templates"):
        if not isinstance(relation.get(key), list) or not relation[key]:
            raise ValueError(
                f"{path}: key {key!r}: expected a list that is not empty, got {_named(relation.get(key))}; a JSON file is "
                'a list of objects, or a relation: {"samples": [...], "prompt_templates": [...]}'
            )
    for template in relation["prompt_templates"]:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"{path}: prompt_templates: expected texts with {{}} for the subject, got {template!r}")
    return relation["prompt_templates"]


def _named(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


# Typed columns


def read_parquet(path: Path, columns: Columns) -> Read:
    """Rows of a Parquet file.

    Raises:
        ValueError: it is no Parquet file, or a column is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None
    with file:
        chosen = columns.chosen(file.schema_arrow.names, where=str(path))
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        per_batch = _per_batch(size, file.metadata.num_rows)
        batches = file.iter_batches(batch_size=per_batch, columns=chosen, use_threads=False)
        yield from _numbered(path, batches, columns, file.schema_arrow.metadata)


def read_arrow(path: Path, columns: Columns) -> Read:
    """Rows of an Arrow IPC file (also called Feather 2) or stream.

    Raises:
        ValueError: it is neither, or a column is missing.
    """
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        try:
            if file.size() >= 6 and file.read_at(6, 0) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                schema = reader.schema
                found = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(file)
                schema, found = reader.schema, iter(reader)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not an Arrow IPC file or stream (Feather 1 is not read): {error}") from None
        chosen = columns.chosen(schema.names, where=str(path))
        yield from _numbered(path, (batch.select(chosen) for batch in found), columns, schema.metadata)


def _numbered(
    path: Path, batches: Iterator[pa.RecordBatch], columns: Columns, metadata: dict[bytes, bytes] | None
) -> Read:
    """Batches of at most about `BLOCK` bytes with their first row's number, class numbers spelled out.

    Raises:
        ValueError: the file is damaged, or a column holds what JSON has no words for.
    """
    import pyarrow as pa

    names = class_names(metadata, columns.label)
    first_row = 0
    try:
        for found in batches:
            whole = plain(found, columns, where=str(path))
            per_batch = _per_batch(whole.nbytes, whole.num_rows)
            for start in range(0, whole.num_rows, per_batch):
                batch = whole.slice(start, per_batch)
                yield batch if names is None else spelled(batch, str(columns.label), names), first_row
                first_row += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged after row {first_row}: {error}") from None


def class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str] | None:
    """The names of the classes that numbers in column `label` stand for, as `datasets` leaves them in a file."""
    if label is None or metadata is None or b"huggingface" not in metadata:
        return None
    feature = json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {}).get(label)
    is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return feature.get("names") if is_class else None


def _per_batch(num_bytes: int, num_rows: int) -> int:
    return max(1, blocks.BLOCK * num_rows // max(num_bytes, 1)) if num_rows else 1


_READERS: dict[str, Callable[[Path, Columns], Read]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": lambda path, columns: json_batches(read_json(path)),
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": lambda path, columns: read_text(path, name="text", whole=False),
}
_BINARY = {".parquet", ".arrow", ".feather"}
_UNITS = {".jsonl": "line", ".ndjson": "line", ".json": "entry", ".txt": "entry"}
