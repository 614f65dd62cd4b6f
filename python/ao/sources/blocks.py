"""A file's bytes, decompressed and in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK = 4 * 2**20
"""Bytes of a block."""
COMPRESSED = (".gz", ".zst")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def suffixes(path: Path) -> list[str]:
    """A file's format and, behind it, its compression: [".jsonl", ".gz"]."""
    found = path.suffixes
    return found[-2:] if found and found[-1] in COMPRESSED else found[-1:]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file's bytes, decompressed."""
    import pyarrow as pa

    if suffixes(path)[-1] not in COMPRESSED:
        with open(path, "rb", buffering=0) as file:
            yield file
        return
    with pa.input_stream(str(path), compression="detect") as stream:
        try:
            yield stream
        except OSError as error:
            # What the codec says of a damaged stream; ours to say which file that was.
            raise ValueError(f"{path}: cannot be decompressed: {error}; the file is damaged or cut off") from None


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes without a byte order mark, about `BLOCK` at a time."""
    with opened(path) as file:
        first = True
        while block := file.read(BLOCK):
            yield block.removeprefix(BYTE_ORDER_MARK) if first else block
            first = False
