"""What `ao inspect --verify` checks: that shards are the files that were written, and hold what they say.

The arrays are read with safetensors and NumPy, apart from the reader that maps them, so neither vouches for itself.
N datapoints, P placeholders, C stored contexts of a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ao import _ao
from ao.manifest import canonical_json
from ao.pack import build_settings
from ao.summary import LENGTH_EDGES, added_up

NAMED = 3
"""Datapoints of a shard that are named of each kind of problem; the others are counted."""

_REMEDY = "build the data set again"


@dataclass
class Verified:
    """What was checked, and what is wrong."""

    shards: int = 0
    datapoints: int = 0
    contexts: int = 0
    tokens: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)
    """Headers of the shards whose counts could be read."""
    ids: dict[Path, np.ndarray] = field(default_factory=dict)
    """Hashes of each shard's ids, int64 [N]."""


def verify(
    folder: Path,
    entries: Sequence[Mapping[str, Any]],
    *,
    manifest: Mapping[str, Any],
    vocabulary: int | None = None,
    step: Callable[[int], object] = lambda num_bytes: None,
) -> Verified:
    """Check shards, and where `manifest` has counts, that they add up to them.

    Args:
        folder: Where the shards lie.
        entries: Of each, `file`, and what is known of it: `bytes`, `sha256`, `datapoints`, `examples`.
        manifest: With `build`, `framer`, `oracle`, `targets`, which every shard must have been made for.
        vocabulary: Number of token ids, where the tokenizer is at hand.
        step: Told the bytes of each shard when it is done.
    """
    done = Verified()
    for entry in entries:
        file = folder / entry["file"]
        if not file.is_file():
            done.problems.append(f"{entry['file']}: missing; {_REMEDY}, or copy the file here")
            continue
        size = file.stat().st_size
        done.bytes += size
        try:
            done.problems += [
                f"{entry['file']}: {what}" for what in _shard(done, file, size, entry, manifest, vocabulary)
            ]
        except (ValueError, OSError) as error:
            done.problems.append(str(error).removeprefix(f"{folder}/"))
        except (KeyError, TypeError) as error:
            done.problems.append(f"{entry['file']}: its header cannot be read ({error!r}); {_REMEDY}")
        step(size)
    done.problems += _repeated_ids(done.ids)
    if "counts" in manifest and len(done.headers) == len(entries):
        done.problems += _sums(manifest, [header["stats"] for header in done.headers])
    return done


def _shard(
    done: Verified,
    file: Path,
    size: int,
    entry: Mapping[str, Any],
    manifest: Mapping[str, Any],
    vocabulary: int | None,
) -> Iterator[str]:
    """What is wrong with one shard; a ValueError where it cannot be read further."""
    if size != (expected := entry.get("bytes", size)):
        yield f"expected {expected} bytes, got {size}; {_REMEDY}"
        return
    if "sha256" in entry:
        _ao.verify_shard(str(file), entry["sha256"])
    _ao.shard_layout(str(file))
    _ao.check_digest(str(file))
    header = json.loads(_ao.shard_metadata(str(file)))
    arrays = load_file(file)
    done.shards += 1
    done.datapoints += len(arrays["answer_start"])
    done.contexts += len(arrays["context_offsets"]) - 1
    done.tokens += len(arrays["input_ids"]) + len(arrays["context_ids"])
    shard = _Arrays(arrays, header)
    done.ids[file] = np.fromiter((hash(each) for each in shard.texts("id")), dtype=np.int64)
    if f"shard-{header['shard']:05d}.safetensors" != file.name:
        yield f"its header says that it is shard {header['shard']}; give the file its name back"
    if header["build"] != manifest["build"]:
        yield f"it belongs to build {header['build'][:8]}.., expected {manifest['build'][:8]}..; {_REMEDY}"
    for name, made_for in header["fingerprints"].items():
        if made_for != manifest[name]:
            yield f"its header has another {name} than the manifest; {_REMEDY}"
    yield from _counts(shard, entry)
    done.headers.append(header)
    for what, bad, described in _contents(shard, manifest, vocabulary):
        rows = np.unique(bad)
        for row in rows[:NAMED].tolist():
            yield f"{what} {row}{shard.named(what, row)}: {described(row)}"
        if len(rows) > NAMED:
            yield f"{what}: {len(rows) - NAMED} more like this"


class _Arrays:
    """A shard's arrays with what is derived from them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
        self.header = header
        self._arrays = arrays
        self.lengths_N = np.diff(arrays["input_offsets"])
        self.row_P = np.repeat(np.arange(len(self.lengths_N)), np.diff(arrays["placeholder_offsets"]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def bytes_of(self, values: str, offsets: str) -> list[bytes]:
        data, width = self[values].tobytes(), self[values].itemsize
        ends = (self[offsets] * width).tolist()
        return [data[start:end] for start, end in pairwise(ends)]

    def texts(self, name: str) -> list[bytes]:
        return self.bytes_of(f"{name}_bytes", f"{name}_offsets")

    def named(self, what: str, row: int) -> str:
        if what != "datapoint":
            return ""
        start, end = self["id_offsets"][row : row + 2]
        return f" ({self['id_bytes'][start:end].tobytes().decode(errors='replace')})"


# What the header says


def _counts(shard: _Arrays, entry: Mapping[str, Any]) -> Iterator[str]:
    """Counts in the header, and in the manifest's entry, that are not those of the arrays."""
    stats = shard.header["stats"]
    for name, expected in _measured(shard).items():
        if (said := stats[name]) != expected:
            yield f"its header counts {name} {_short(said)}, its arrays hold {_short(expected)}; {_REMEDY}"
    listed, metas = shard.header["sources"], shard.texts("meta")
    for name, said in stats["sources"].items():
        rows_N = shard["source"] == (listed.index(name) if name in listed else 256)
        lengths_N, answers_N = shard.lengths_N[rows_N], shard["answer_start"][rows_N]
        expected: dict[str, Any] = {
            "datapoints": len(lengths_N),
            "input_tokens": int(lengths_N.sum()),
            "answer_tokens": int((lengths_N - answers_N).sum()),
            "context_tokens_read": int(shard["context_length"][rows_N].sum()),
            "unanswerable": sum(_is_unanswerable(metas[row]) for row in np.flatnonzero(rows_N)),
        }
        if said["answers"]:
            answers = shard.texts("answer")
            found = Counter(answers[row] for row in np.flatnonzero(rows_N))
            expected["answers"] = {answer.decode(errors="replace"): num for answer, num in found.items()}
        for key, value in expected.items():
            if said[key] != value:
                yield f"source {name!r}: its header counts {key} {_short(said[key])}, its arrays hold {_short(value)}"
        left_out = sum(said["drops"].values()) + sum(said["errors"].values())
        if said["offered"] != said["examples"] + left_out:
            yield (
                f"source {name!r}: {said['offered']} examples offered, but {said['examples']} kept and {left_out} left out"
            )
    for name in ("datapoints", "examples"):
        total = sum(source[name] for source in stats["sources"].values())
        if (said := entry.get(name, total)) != total:
            yield f"the manifest says {said} {name}, its header {total}; {_REMEDY}"


def _is_unanswerable(meta: bytes) -> bool:
    """Whether a datapoint's meta says that its context does not tell the answer."""
    if b'"unanswerable":true' not in meta:
        return False
    try:
        return bool(json.loads(meta).get("unanswerable") is True)
    except (ValueError, AttributeError):
        return False


def _measured(shard: _Arrays) -> dict[str, Any]:
    contexts = shard.bytes_of("context_ids", "context_offsets")
    width = shard["context_ids"].itemsize
    # By what is read, not by where it stands: two stored contexts may begin alike.
    read = [
        contexts[row][: length * width]
        for row, length in zip(shard["context"].tolist(), shard["context_length"].tolist(), strict=True)
    ]
    positions = shard.bytes_of("read_positions", "placeholder_offsets")
    inputs = shard.bytes_of("input_ids", "input_offsets")
    whole = set(zip(inputs, read, positions, shard["kind"].tolist(), strict=True))
    return {
        "contexts": len(shard["context_offsets"]) - 1,
        "context_tokens": len(shard["context_ids"]),
        "placeholders": len(shard["placeholders"]),
        "duplicates": len(shard.lengths_N) - len(whole),
        "input_lengths": _histogram(shard.lengths_N),
        "context_lengths": _histogram(shard["context_length"]),
    }


def _histogram(lengths: np.ndarray) -> list[int]:
    buckets = np.searchsorted(LENGTH_EDGES, lengths, side="right")
    return np.bincount(buckets, minlength=len(LENGTH_EDGES) + 1).tolist()


# What the arrays hold

_Problem = tuple[str, np.ndarray, Callable[[int], str]]


def _contents(shard: _Arrays, manifest: Mapping[str, Any], vocabulary: int | None) -> Iterator[_Problem]:
    """What is wrong in a shard's arrays: of what, which ones, and how each is described."""
    yield from _inputs(shard, manifest["oracle"])
    yield from _reads(shard, manifest["targets"]["base"])
    limit = 2**31 if vocabulary is None else vocabulary
    for what, values, offsets in (
        ("datapoint", "input_ids", "input_offsets"),
        ("stored context", "context_ids", "context_offsets"),
    ):
        ids = shard[values]
        where = np.flatnonzero((ids < 0) | (ids >= limit))
        rows = np.searchsorted(shard[offsets], where, side="right") - 1
        first = dict(zip(rows[::-1].tolist(), ids[where[::-1]].tolist(), strict=True))
        yield what, rows, lambda row, first=first: f"{first[row]} is no token id of a vocabulary of {limit}; {_REMEDY}"
    yield from _texts(shard)


def _inputs(shard: _Arrays, oracle: Mapping[str, Any]) -> Iterator[_Problem]:
    starts_N, ids = shard["input_offsets"][:-1], shard["input_ids"]
    end, placeholder = int(oracle["end_of_turn_id"]), int(oracle["placeholder_id"])
    last_N = ids[starts_N + shard.lengths_N - 1]
    yield (
        "datapoint",
        np.flatnonzero(last_N != end),
        lambda row: f"its answer ends with token {last_N[row]}, expected the end of turn, {end}; {_REMEDY}",
    )
    found_P = ids[starts_N[shard.row_P] + shard["placeholders"]]
    wrong = np.flatnonzero(found_P != placeholder)[::-1]
    first = dict(zip(shard.row_P[wrong].tolist(), wrong.tolist(), strict=True))
    yield (
        "datapoint",
        shard.row_P[wrong],
        lambda row: (
            f"the placeholder at {shard['placeholders'][first[row]]} is token {found_P[first[row]]}, expected the "
            f"placeholder {oracle['placeholder']!r}, {placeholder}; {_REMEDY}"
        ),
    )
    twice = np.flatnonzero((np.diff(shard["placeholders"]) == 0) & (np.diff(shard.row_P) == 0))
    yield "datapoint", shard.row_P[twice], lambda row: f"two of its placeholders are the same token; {_REMEDY}"


def _reads(shard: _Arrays, target: Mapping[str, Any]) -> Iterator[_Problem]:
    layers = int(target["num_layers"])
    deep_P = np.flatnonzero(shard["layers"] >= layers)
    yield "datapoint", shard.row_P[deep_P], lambda row: f"it reads a layer that a target of {layers} layers has not"
    last_N = np.zeros(len(shard.lengths_N), dtype=np.int64)
    np.maximum.at(last_N, shard.row_P, shard["read_positions"])
    yield (
        "datapoint",
        np.flatnonzero(shard["context_length"] != last_N + 1),
        lambda row: (
            f"its context has {shard['context_length'][row]} tokens, expected {last_N[row] + 1}, as the last one that is "
            f"read is {last_N[row]}; {_REMEDY}"
        ),
    )
    stored_C = np.diff(shard["context_offsets"])
    used_C = np.zeros(len(stored_C), dtype=np.int64)
    np.maximum.at(used_C, shard["context"], shard["context_length"])
    yield (
        "stored context",
        np.flatnonzero(used_C != stored_C),
        lambda row: f"{stored_C[row]} tokens are stored, datapoints show {used_C[row]} of them; {_REMEDY}",
    )


def _texts(shard: _Arrays) -> Iterator[_Problem]:
    for name in ("id", "question", "answer", "meta"):
        bad = [row for row, text in enumerate(shard.texts(name)) if not _is_fine(name, text)]
        expected = "a JSON object" if name == "meta" else "UTF-8 and not empty"
        yield (
            "datapoint",
            np.array(bad, dtype=np.int64),
            lambda row, name=name, expected=expected: f"its {name} must be {expected}; {_REMEDY}",
        )


def _is_fine(name: str, text: bytes) -> bool:
    try:
        if name == "meta":
            return not text or isinstance(json.loads(text), dict)
        return bool(text.decode())
    except ValueError:
        return False


# What holds over all shards


def _repeated_ids(hashes: Mapping[Path, np.ndarray]) -> Iterator[str]:
    """Ids that stand more than once: found by their hashes, proved by reading again the shards that hold them."""
    values, counts = np.unique(np.concatenate([*hashes.values(), np.empty(0, np.int64)]), return_counts=True)
    suspects = values[counts > 1]
    seen: dict[bytes, str] = {}
    repeated = []
    for file, found in hashes.items():
        rows = np.flatnonzero(np.isin(found, suspects))
        if len(rows):
            texts = _Arrays(load_file(file), {}).texts("id")
            for row in rows.tolist():
                if (text := texts[row]) in seen:
                    repeated.append((text, seen[text], file.name))
                seen.setdefault(text, file.name)
    for text, first, again in repeated[:NAMED]:
        yield f"{again}: the id {text.decode(errors='replace')!r} stands in {first} already; ids must differ"
    if len(repeated) > NAMED:
        yield f"{len(repeated) - NAMED} more ids stand twice"


def _sums(manifest: Mapping[str, Any], stats: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name, expected in added_up(stats).items():
        if (said := manifest.get(name, {})) != expected:
            keys = [key for key in {**said, **expected} if said.get(key) != expected.get(key)]
            shown = ", ".join(
                f"{key}: {_short(said.get(key))}, not {_short(expected.get(key))}" for key in keys[:NAMED]
            )
            yield f"manifest.json: {name} differ from what the shards' headers add up to ({shown}); {_REMEDY}"


def build_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Whether the recipe, inputs and fingerprints of a manifest are those that its build's checksum was made from."""
    if any("e" in repr(number) for number in _floats(manifest)):
        return  # Python and Rust write such numbers differently, and a checksum would differ with them.
    try:
        settings = build_settings(
            manifest["config"], oracle=manifest["oracle"], targets=manifest["targets"], inputs=manifest["inputs"]
        )
        versions = {"schema": manifest["schema"], "rules": manifest.get("rules")}
        text = canonical_json({"framer": manifest["framer"], "settings": settings, **versions})
    except ValueError as error:
        yield f"manifest.json: no build has its config or inputs: {error}; {_REMEDY}"
        return
    if (found := hashlib.sha256(text.encode()).hexdigest()) != manifest["build"]:
        yield (
            "manifest.json: its config, inputs or fingerprints are not those that it was built from (expected build "
            f"{manifest['build'][:8]}.., got {found[:8]}..); {_REMEDY}"
        )


def _floats(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(each)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
