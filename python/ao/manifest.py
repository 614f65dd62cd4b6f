"""Canonical JSON, fingerprints and atomic writes: what every artifact's manifest is made with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHOLE_FILES_BELOW = 64 * 2**20
"""Weights smaller than this in total are fingerprinted whole, larger ones by their headers and sizes (bytes)."""

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Pieces of a large file of weights that are looked at, evenly spread, and their size."""


_OWN_DIGEST = rb"""\"sha256\":\""""
"""What stands before a file's own digest: JSON in the JSON of its header."""


def canonical_json(obj: object) -> str:
    """JSON with sorted keys and no spaces; equal objects give equal text.

    Raises:
        ValueError: a number is not finite.
        TypeError: something is not JSON.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def finite(value: float) -> float | None:
    """The number, or None, which JSON writes as null, where it is not finite."""
    return value if math.isfinite(value) else None


def fingerprint(*parts: object) -> str:
    """Sha256 (64 hex digits) of parts in order: bytes as they are, strings as UTF-8, others as canonical JSON."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else (part if isinstance(part, str) else canonical_json(part)).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: the disk is full or fails.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first, or choose another place")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def with_own_digest(data: bytes) -> bytes:
    """Put into a safetensors file its own sha256: that of the file with 64 zeros in its place.

    Args:
        data: the file, whose metadata `ao` is a JSON object with `sha256` of 64 zeros.
    """
    return data.replace(_OWN_DIGEST + b"0" * 64, _OWN_DIGEST + hashlib.sha256(data).hexdigest().encode(), 1)


def own_digest_problem(path: str | Path, *, remedy: str) -> str | None:
    """What is wrong with a file that `with_own_digest` made, every byte looked at; nothing where it is whole."""
    try:
        header = _safetensors_header(Path(path))
    except ValueError as error:
        return f"{error}; or {remedy}"
    if not (place := re.search(re.escape(_OWN_DIGEST) + rb"([0-9a-f]{64})", header)):
        return f"{path}: its header has no sha256; {remedy}"
    digest = hashlib.sha256(len(header).to_bytes(8, "little"))
    digest.update(header[: place.start(1)] + b"0" * 64 + header[place.end(1) :])
    with open(path, "rb") as file:
        file.seek(8 + len(header))
        while piece := file.read(2**20):
            digest.update(piece)
    expected, found = place[1].decode(), digest.hexdigest()
    if found != expected:
        return f"{path}: damaged: it has sha256 {found[:8]}.., expected {expected[:8]}..; {remedy}"
    return None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}; the file is damaged, make it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def require_match(what: str, *, expected: Mapping[str, Any], got: Mapping[str, Any], remedy: str) -> None:
    """Compare the fields of `got` with those recorded; fields that `got` leaves out are not asked for.

    Args:
        what: Which thing, and what it was done for: "shard-00003: packed for".
        expected: Fields as recorded.
        got: Fields as found.
        remedy: What the user can do.

    Raises:
        ValueError: a field differs; the message names the first one.
    """
    for name, value in got.items():
        if name not in expected:
            raise ValueError(f"{what} an unrecorded {name}, got {_short(value)}; {remedy}")
        if expected[name] != value:
            wanted, found = _short(expected[name]), _short(value)
            if wanted == found:
                wanted, found = repr(expected[name]), repr(value)
            raise ValueError(f"{what} {name} {wanted}, got {found}; {remedy}")


def _short(value: object) -> str:
    is_digest = isinstance(value, str) and len(value) >= 32 and all(c in "0123456789abcdef" for c in value)
    return f"{str(value)[:8]}.." if is_digest else repr(value)


def model_fingerprint(folder: str | Path) -> str:
    """Fingerprint of a model folder: its config.json and its weights, whatever the folder is called.

    Weights count whole below `WHOLE_FILES_BELOW`; above, each file counts by name, size, safetensors header and `SAMPLES`
    pieces, which tell one trained checkpoint from another.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: a weight file is no safetensors file.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in files) < WHOLE_FILES_BELOW
    parts: list[object] = [(folder / "config.json").read_bytes()]
    for file in files:
        parts += [file.name, file.stat().st_size, file.read_bytes() if whole else _sampled(file)]
    return fingerprint(*parts)


def _sampled(path: Path) -> bytes:
    header = _safetensors_header(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        for piece in range(SAMPLES):
            file.seek(8 + len(header) + (size - 8 - len(header)) * piece // SAMPLES)
            header += file.read(SAMPLE_BYTES)
    return header


def adapter_fingerprint(folder: str | Path) -> str:
    """Fingerprint of a LoRA adapter: its settings and its weights.

    Raises:
        FileNotFoundError: the folder lacks one of them.
    """
    files = [Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"adapter {str(folder)!r}: no {file.name} there; give the folder of a LoRA adapter")
    return fingerprint(*(file.read_bytes() for file in files))


def _safetensors_header(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < path.stat().st_size else b""
    if not header.startswith(b"{") or len(header) != length:
        raise ValueError(f"{path}: not a safetensors file: its header should have {length} bytes; download it again")
    return header
