"""What a path holds: a packed data set, an unfinished one, a shard, a plan, an adapter, or a folder of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ao.cache import ActivationCache
from ao.cache_files import INDEX, MANIFEST, PLAIN, unlisted
from ao.manifest import read_manifest, require_match
from ao.packed import data_manifest
from ao.shards import PackedDataset

KINDS = {
    "packed": "a packed data set",
    "unfinished": "an unfinished build of a packed data set",
    "shard": "a shard of a packed data set",
    "plan": "the plan of an epoch",
    "activations": "an activation cache",
    "plain": "plain activations",
    "adapter": "an oracle's adapter",
    "run": "a folder of artifacts",
}
"""What each kind is, in words."""

_OF_ONE_KIND = ("contract", "dtype", "width")
"""What plain files that are shown together have in common."""


class Found:
    """What a path holds."""

    def __init__(
        self, kind: str, path: Path, *, content: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.kind = kind
        self.path = path
        self.content = dict(content or {})
        self.notes = list(notes)

    @property
    def what(self) -> str:
        """In words."""
        return KINDS[self.kind]

    @property
    def is_data(self) -> bool:
        """Whether there are datapoints."""
        return self.kind in ("packed", "unfinished", "shard")

    @property
    def shards(self) -> list[Path]:
        """The shards that are there, of a data set without a manifest."""
        return [self.path] if self.kind == "shard" else sorted(self.path.glob("shard-*.safetensors"))

    def open(self) -> PackedDataset:
        """Its datapoints."""
        return PackedDataset.open(self.path) if self.kind == "packed" else PackedDataset.of_shards(self.shards)


def find(path: Path) -> Found:
    """Look at a path; of a data set that does not stand yet, at its unfinished build.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is nothing of ao's, or damaged.
    """
    if not path.exists():
        unfinished = path.with_name(path.name + ".partial")
        if unfinished.is_dir():
            return _unfinished(unfinished)
        raise FileNotFoundError(f"{path}: there is no such file or folder; ao-pack makes packed data sets")
    if path.is_file():
        return _file(path)
    if any(path.glob(INDEX)):
        return _activations(path)
    if plain := sorted(path.glob(PLAIN)):
        return _plain(path, plain)
    if (path / "manifest.json").is_file():
        return _packed(path)
    if list(path.glob("shard-*.safetensors")) or list(path.glob("part-*-of-*.json")) or path.suffix == ".partial":
        return _unfinished(path)
    if (path / "adapter_config.json").is_file():
        return Found("adapter", path, content={"content": _adapter(path)})
    inside = {each.name: found.what for each in sorted(path.iterdir()) if each.is_dir() and (found := _glance(each))}
    if inside:
        first = path / next(iter(inside))
        return Found("run", path, content={"content": inside}, notes=[f"look at one of them: ao inspect {first}"])
    raise ValueError(
        f"{path}: neither a packed data set (manifest.json) nor an adapter (adapter_config.json); give the folder that "
        "ao-pack or ao train wrote"
    )


def _glance(folder: Path) -> Found | None:
    try:
        return find(folder)
    except (ValueError, OSError):
        return None


def _file(path: Path) -> Found:
    if path.name == "manifest.json":
        return find(path.parent)
    if path.suffix == ".toml":
        raise ValueError(f"{path}: a recipe; build its data set with ao-pack {path}, then inspect that folder")
    metadata = _metadata(path)
    if metadata.get("kind") == "plain_activations":
        return _plain(path, [path])
    if "contract" in metadata:
        raise ValueError(f"{path}: a file of an activation cache; inspect its folder, {path.parent}")
    if metadata.get("kind") == "plan":
        return Found("plan", path)
    return Found("shard", path)


def _metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file of ao's says of itself."""
    with open(path, "rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000))
    try:
        metadata = json.loads(json.loads(header)["__metadata__"]["ao"])
        if not isinstance(metadata, dict):
            raise TypeError(f"expected an object, got {metadata!r}")
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: neither a shard nor a plan; give a folder that ao-pack wrote, or a file of it"
        ) from None
    return metadata


def _packed(path: Path) -> Found:
    notes = []
    if path.suffix == ".partial":
        notes = [f"it is whole but for its name: mv {path} {path.with_suffix('')}"]
    return Found("packed", path, content=data_manifest(path), notes=notes)


def _activations(path: Path) -> Found:
    cache = ActivationCache.open(path, headers=True)
    layers = {}
    for layer, of in cache.statistics().items():
        norms = (
            f", norms {of['mean']:.4g} [{', '.join(f'{norm:.4g}' for norm in of['quantiles'].values())}]"
            if "mean" in of
            else ""
        )
        layers[f"layer {layer}"] = f"{of['rows']:,} rows{norms}" + (
            f", {of['not_finite']:,} not finite" if of["not_finite"] else ""
        )
    content = {**cache.contract, "rows": f"{cache.dtype}, {cache.width} values", "units": len(cache.units)}
    if any(", norms " in line for line in layers.values()):
        content["norms"] = "mean [1 %, 25 %, median, 75 %, 99 %]"
    content |= layers
    notes, listed, manifest = [], set(), path / MANIFEST
    try:
        if manifest.is_file():
            listed = {str(unit["index"]) for unit in read_manifest(manifest)["units"]}
    except (ValueError, KeyError, TypeError) as error:
        notes.append(f"{manifest}: damaged: {error}; the same ao collect writes it again")
        listed = {unit.index for unit in cache.units}
    if new := {unit.index for unit in cache.units} - listed:
        notes.append(
            f"{len(new)} units are not in the manifest yet: it is being collected, or was stopped; the same ao collect goes on"
        )
    _, damaged = cache.split_damaged()
    notes += [
        f"{problem}; its unit does not count: its ao collect writes it again, or remove {index.name.removesuffix(INDEX[1:])}*"
        for index, problem in damaged.items()
    ]
    if rows := unlisted(path):
        notes.append(
            f"{len(rows)} files of rows are in no index ({rows[0].name}): they are being written, or were left by a kill; the "
            "same ao collect goes on, or remove them"
        )
    return Found("activations", path, content={"content": content}, notes=notes)


def _plain(path: Path, files: Sequence[Path]) -> Found:
    """A plain file, or a folder of them: what the rows of the first one are, and how many all have."""
    abouts, damaged = {}, []
    for file in files:
        try:
            abouts[file] = _metadata(file)
        except ValueError:
            damaged.append(f"{file}: damaged: its header cannot be read; the same ao collect writes it again")
    if not abouts:
        raise ValueError(damaged[0])
    first, rows = next(iter(abouts.values())), Counter[str]()
    for file, about in abouts.items():
        if lacking := [name for name in (*_OF_ONE_KIND, "rows") if name not in about]:
            raise ValueError(f"{file}: its header lacks {', '.join(lacking)}; collect it again")
        own = {name: about[name] for name in _OF_ONE_KIND}
        expected = {name: first[name] for name in _OF_ONE_KIND}
        require_match(
            f"{file}: of the files in {path}", expected=expected, got=own, remedy="inspect the files one by one"
        )
        rows.update(about["rows"])
    layers = {f"layer {layer}": f"{rows[layer]:,} rows" for layer in sorted(rows, key=int)}
    content = {**first["contract"], "rows": f"{first['dtype']}, {first['width']} values", "files": len(files), **layers}
    notes = [*damaged, "docs/activations.md shows how they are read"]
    return Found("plain", path, content={"content": content}, notes=notes)


def _unfinished(path: Path) -> Found:
    """A build that goes on or was stopped: which parts are done, and how it becomes whole."""
    parts, begun = ({}, {})
    for file in path.iterdir():
        if match := re.fullmatch(r"part-(\d+)-of-(\d+)\.json", file.name):
            parts[int(match[1]), int(match[2])] = read_manifest(file)
        elif match := re.fullmatch(r"\.lock-(\d+)-of-(\d+)", file.name):
            begun[int(match[1]), int(match[2])] = file
    divisions = {of for _, of in (*parts, *begun)}
    num_shards = len(list(path.glob("shard-*.safetensors")))
    notes = [f"{num_shards} shards are finished; {path.with_suffix('')} will stand when all are"]
    for of in sorted(divisions):
        missing = [index for index in range(of) if (index, of) not in parts]
        if of == 1:
            notes.append("if no process is at work on it: ao-pack RECIPE --resume goes on; or remove the folder")
        elif missing:
            steps = ", ".join(f"{index}/{of}" + (" (begun)" if (index, of) in begun else "") for index in missing)
            notes.append(
                f"{of - len(missing)} of {of} parts are finished; run --part {steps}, then ao-pack RECIPE --merge"
            )
        else:
            notes.append(f"all {of} parts are finished: ao-pack RECIPE --merge")
    if len(builds := _builds(path, parts)) > 1:
        each = "; ".join(f"{build[:12]}..: {_some(names)}" for build, names in builds.items())
        notes = [
            f"its files are of {len(builds)} builds, so they do not join: recipe, model, version or source files differed",
            f"{each}; remove the files of the wrong ones and build their parts again as the others were",
        ]
    checksums = {
        shard["file"]: {name: shard[name] for name in ("sha256", "bytes", "datapoints", "examples")}
        for part in parts.values()
        for shard in part.get("shards", [])
    }
    return Found("unfinished", path, content={"checksums": checksums}, notes=notes)


def _builds(path: Path, parts: Mapping[tuple[int, int], Mapping[str, Any]]) -> dict[str, list[str]]:
    """The files of each build: what says that parts are finished, and shards. One that is damaged says nothing."""
    builds: dict[str, list[str]] = {}
    for (index, of), part in sorted(parts.items()):
        builds.setdefault(str(part.get("identity", {}).get("build")), []).append(f"part-{index}-of-{of}.json")
    for shard in sorted(path.glob("shard-*.safetensors")):
        try:
            builds.setdefault(str(_metadata(shard).get("build")), []).append(shard.name)
        except ValueError:
            continue
    return builds


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _adapter(path: Path) -> dict[str, Any]:
    """What an adapter says of itself, without loading it."""
    lora = read_manifest(path / "adapter_config.json")
    shown = {"base": lora.get("base_model_name_or_path"), "rank": lora.get("r"), "alpha": lora.get("lora_alpha")}
    if (path / "ao_config.json").is_file():
        config = read_manifest(path / "ao_config.json")
        shown |= {
            "model": config.get("model_name"),
            "injection": config.get("ao", {}).get("injection"),
            "injected after block": config.get("hook_onto_layer"),
            "layers read": config.get("act_layer_combinations", config.get("layer_combinations")),
        }
    return {name: value for name, value in shown.items() if value is not None}
