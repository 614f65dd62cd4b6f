"""Packed data sets, read by mapping: no copy, no torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ao import _ao
from ao.manifest import require_match
from ao.packed import SCHEMA, data_manifest

KINDS = ("base", "adapter", "difference")
"""What is read of the target: its base weights, its adapter, or the adapter minus the base."""

_DTYPES = {"U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_REMEDY = "rerun ao-pack or load the model named in manifest.json"


@dataclass(frozen=True, kw_only=True)
class Datapoint:
    """One tokenized, aligned training example; its arrays are read-only views into the shard.

    T input tokens, P placeholders, C context tokens. `placeholders`, `layers` and `read_positions` are parallel:
    placeholder p of the prompt stands for the output of layer `layers[p]` at context token `read_positions[p]`.
    """

    id: str
    """The example's id, plus `@L{layer}` where each layer makes a datapoint."""
    source: str
    """Name of the source."""
    input_ids: np.ndarray
    """Prompt and answer, int32 [T]."""
    answer_start: int
    """Index in `input_ids` of the first answer token."""
    placeholders: np.ndarray
    """Indices into `input_ids`, int32 [P]."""
    layers: np.ndarray
    """Block indices from 0, int16 [P]."""
    context_ids: np.ndarray
    """What the target reads, up to the last position that is read, int32 [C]."""
    read_positions: np.ndarray
    """Indices into `context_ids`, int32 [P]."""
    question: str
    """Question as text."""
    answer: str
    """Answer as text."""
    kind: str
    """One of `KINDS`."""
    meta: dict[str, Any]
    """The example's `meta`."""


class _Shard:
    """One shard, mapped and checked when it is first read: a set of a thousand shards opens at once."""

    def __init__(self, path: Path, *, num_bytes: int, num_datapoints: int) -> None:
        size = path.stat().st_size
        if size != num_bytes:
            raise ValueError(f"{path}: expected {num_bytes} bytes, got {size}; the shard is damaged, rerun ao-pack")
        self.path = path
        self.num_datapoints = num_datapoints

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        layout = _ao.shard_layout(str(self.path))
        with open(self.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {}
        for name, dtype, shape, offset in layout:
            count = int(np.prod(shape))
            # NumPy takes no view of nothing at the end of a buffer.
            view = np.frombuffer(mapping, _DTYPES[dtype], count=count, offset=offset) if count else np.empty(0)
            arrays[name] = view.astype(_DTYPES[dtype], copy=False).reshape(shape)
        found = len(arrays["answer_start"])
        if found != self.num_datapoints:
            raise ValueError(
                f"{self.path}: manifest.json says {self.num_datapoints} datapoints, the shard has {found}; rerun ao-pack"
            )
        return arrays

    @cached_property
    def sources(self) -> list[str]:
        return json.loads(_ao.shard_metadata(str(self.path)))["sources"]

    def row(self, values: str, offsets: str, index: int) -> np.ndarray:
        start, stop = self.arrays[offsets][index : index + 2]
        return self.arrays[values][start:stop]

    def text(self, name: str, index: int) -> str:
        return self.row(f"{name}_bytes", f"{name}_offsets", index).tobytes().decode()

    def datapoint(self, index: int) -> Datapoint:
        arrays = self.arrays
        context_ids = self.row("context_ids", "context_offsets", arrays["context"][index])
        return Datapoint(
            id=self.text("id", index),
            source=self.sources[arrays["source"][index]],
            input_ids=self.row("input_ids", "input_offsets", index),
            answer_start=int(arrays["answer_start"][index]),
            placeholders=self.row("placeholders", "placeholder_offsets", index),
            layers=self.row("layers", "placeholder_offsets", index),
            # A context that begins a longer one is stored as that one, and shows only its own tokens.
            context_ids=context_ids[: arrays["context_length"][index]],
            read_positions=self.row("read_positions", "placeholder_offsets", index),
            question=self.text("question", index),
            answer=self.text("answer", index),
            kind=KINDS[arrays["kind"][index]],
            meta=json.loads(self.text("meta", index) or "{}"),
        )


class PackedDataset:
    """A packed data set as a sequence of Datapoints, with columns for the planner."""

    def __init__(self, folder: Path, *, manifest: dict[str, Any], shards: list[_Shard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        self._starts = np.cumsum([0, *(shard.num_datapoints for shard in shards)])

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> PackedDataset:
        """Open a folder that `ao-pack` wrote. Each shard is mapped, and its structure checked, when it is first read.

        Args:
            path: The folder.
            verify: Check every shard now, its structure and its checksum.

        Raises:
            FileNotFoundError: no finished data set is there, or a shard is missing.
            ValueError: a shard has not the size that the manifest says, or the manifest is damaged or of another schema;
                when a shard is read, also: its structure is damaged.
        """
        folder = Path(path)
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{folder}: no manifest.json, so no finished data set; make one with ao-pack")
        manifest = data_manifest(folder)
        shards = []
        for entry in manifest["shards"]:
            file = folder / entry["file"]
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing, though manifest.json lists it; rerun ao-pack")
            shards.append(_Shard(file, num_bytes=entry["bytes"], num_datapoints=entry["datapoints"]))
            if verify:
                _ao.verify_shard(str(file), entry["sha256"])
                _ = shards[-1].arrays
        data = cls(folder, manifest=manifest, shards=shards)
        if (expected := manifest["counts"]["datapoints"]) != len(data):
            raise ValueError(
                f"{folder}: manifest.json counts {expected} datapoints, its shards hold {len(data)}; rerun ao-pack"
            )
        return data

    @classmethod
    def of_shards(cls, files: Sequence[Path]) -> PackedDataset:
        """Shards without a manifest, as one data set: those of an unfinished build, or a single one.

        Its `manifest` holds only what the shards' headers say: fingerprints, the build, and the shards themselves.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: there is no file, or one is not a shard of this version.
        """
        if not files:
            raise ValueError("expected at least one shard, got none; build some with ao-pack")
        headers = [json.loads(_ao.shard_metadata(str(file))) for file in files]
        entries = [
            {
                "file": file.name,
                "bytes": file.stat().st_size,
                **{
                    name: sum(source[name] for source in header["stats"]["sources"].values())
                    for name in ("datapoints", "examples")
                },
            }
            for file, header in zip(files, headers, strict=True)
        ]
        manifest = {"schema": SCHEMA, "build": headers[0]["build"], **headers[0]["fingerprints"], "shards": entries}
        shards = [
            _Shard(file, num_bytes=entry["bytes"], num_datapoints=entry["datapoints"])
            for file, entry in zip(files, entries, strict=True)
        ]
        return cls(files[0].parent, manifest=manifest, shards=shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Datapoint:
        num = len(self)
        if not -num <= index < num:
            raise IndexError(f"{self.folder}: datapoint {index} of {num}")
        shard, row = self._place(index % num)
        return shard.datapoint(row)

    def _place(self, index: int) -> tuple[_Shard, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard], index - int(self._starts[shard])

    def place(self, index: int) -> tuple[str, int]:
        """The file of datapoint `index`, counted from 0, and its number there."""
        shard, row = self._place(index)
        return shard.path.name, row

    def find(self, example: str) -> list[int]:
        """Indices of the datapoints of an example: of that id, or of that id with `@L{layer}` behind it."""
        found, wanted = [], example.encode()
        for start, shard in zip(self._starts.tolist(), self._shards, strict=False):
            texts, offsets = shard.arrays["id_bytes"].tobytes(), shard.arrays["id_offsets"]
            at = texts.find(wanted)
            while at >= 0:
                row = int(np.searchsorted(offsets, at, side="right")) - 1
                rest = texts[at + len(wanted) : offsets[row + 1]]
                is_layer = rest.startswith(b"@L") and rest[2:].isdigit()
                if offsets[row] == at and at + len(wanted) <= offsets[row + 1] and (not rest or is_layer):
                    found.append(start + row)
                at = texts.find(wanted, at + 1)
        return found

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def reads(self, shard: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """What the datapoints of one shard read: its stored contexts, and for each placeholder the number of the context
        among them, the layer and the position, in three parallel arrays."""
        arrays = self._shards[shard].arrays
        contexts = np.split(arrays["context_ids"], arrays["context_offsets"][1:-1])
        of_placeholder = np.repeat(arrays["context"], np.diff(arrays["placeholder_offsets"]))
        return contexts, of_placeholder, arrays["layers"], arrays["read_positions"]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Input tokens of each datapoint, int32 [N]."""
        return self._column(lambda shard: np.diff(shard.arrays["input_offsets"])).astype(np.int32)

    @cached_property
    def context_lengths(self) -> np.ndarray:
        """Context tokens of each datapoint, int32 [N]."""
        return self._column(lambda shard: shard.arrays["context_length"]).astype(np.int32)

    @cached_property
    def groups(self) -> np.ndarray:
        """Number of the stored context that each datapoint refers to, int64 [N]; over all shards, from 0."""
        first = np.cumsum([0, *(len(shard.arrays["context_offsets"]) - 1 for shard in self._shards)])
        columns = (start + shard.arrays["context"] for start, shard in zip(first, self._shards, strict=False))
        return np.concatenate(list(columns)).astype(np.int64)

    @cached_property
    def kinds(self) -> np.ndarray:
        """What each datapoint reads of the target, as an index into `KINDS`, uint8 [N]."""
        return self._column(lambda shard: shard.arrays["kind"])

    def require_base(self) -> None:
        """Refuse a data set that reads anything but the target itself.

        Raises:
            ValueError: a datapoint reads an adapter or a difference; names the first.
        """
        others = np.flatnonzero(self.kinds)
        if len(others):
            point = self[int(others[0])]
            raise ValueError(
                f"{self.folder}: datapoint {point.id!r} reads {point.kind!r} activations, and {len(others) - 1} others do "
                "not read the target itself either; only those can be collected: leave `target` out of the examples"
            )

    @cached_property
    def layer_combinations(self) -> list[tuple[int, ...]]:
        """Every set of layers that one prompt shows, in its order."""
        found: set[tuple[int, ...]] = set()
        for shard in self._shards:
            layers, offsets = shard.arrays["layers"], shard.arrays["placeholder_offsets"]
            if not len(layers):
                continue
            begins = np.append(True, layers[1:] != layers[:-1])
            begins[offsets[:-1]] = True
            where = np.flatnonzero(begins)
            datapoint = np.searchsorted(offsets, where, side="right") - 1
            several = np.bincount(datapoint)[datapoint] > 1
            found |= {(int(layer),) for layer in np.unique(layers[where[~several]])}
            splits = np.flatnonzero(np.diff(datapoint[several])) + 1
            found |= {tuple(runs.tolist()) for runs in np.split(layers[where[several]], splits) if len(runs)}
        return sorted(found)

    def _column(self, column: Any) -> np.ndarray:
        return np.concatenate([column(shard) for shard in self._shards])

    def require(self, *, oracle: Mapping[str, Any] | None = None, target: Mapping[str, Any] | None = None) -> None:
        """Refuse models that the data set was not packed for.

        Args:
            oracle: Fields of the loaded oracle, as `ao.prompt.fingerprints` gives them, or a part of them.
            target: The same of the target.

        Raises:
            ValueError: a field differs from the manifest's.
        """
        what = f"{self.folder.name}: packed for"
        if oracle is not None:
            require_match(what, expected=self.manifest["oracle"], got=oracle, remedy=_REMEDY)
        if target is not None:
            what = f"{self.folder.name}: packed for a target with"
            require_match(what, expected=self.manifest["targets"]["base"], got=target, remedy=_REMEDY)


class Part:
    """Some datapoints of a data set, with the columns that the planner takes."""

    def __init__(self, dataset: PackedDataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = indices

    @property
    def folder(self) -> Path:
        """Of the data set."""
        return self.dataset.folder

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Datapoint:
        return self.dataset[int(self.indices[index])]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Input tokens of each datapoint, int32 [N]."""
        return self.dataset.lengths[self.indices]

    @cached_property
    def context_lengths(self) -> np.ndarray:
        """Context tokens of each datapoint, int32 [N]."""
        return self.dataset.context_lengths[self.indices]

    @cached_property
    def groups(self) -> np.ndarray:
        """Number of the stored context of each datapoint, int64 [N]; those of the part count from 0."""
        return np.unique(self.dataset.groups[self.indices], return_inverse=True)[1].astype(np.int64)
