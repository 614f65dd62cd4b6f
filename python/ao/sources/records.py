"""JSONL lines that are Examples already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ao.config import RecordsSource
from ao.sources import files


def examples(config: RecordsSource, *, seed: int, path: Path) -> Iterator[dict[str, Any]]:
    """The Examples of a file as they stand, in file order; only their `source` is set to the source's name.

    Their fields are checked when they are packed.
    """
    if path.is_dir():
        raise ValueError(f"source {config.name!r}: {path} is a folder; expected a .jsonl file")

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in files.lines(path):
            where = f"{path}: line {number}"
            example = files.parse_object(line, where=where)
            yield files.field(example, "id", where=where), example

    for _, example in files.draw(rows, count=config.count, seed=seed):
        yield example | {"source": config.name}
