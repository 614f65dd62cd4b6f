"""The folder of a build: beside its place while it is made, what is found in either, and how one becomes the other."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ao._ao import RULES
from ao.manifest import canonical_json, read_manifest, sync_folder
from ao.shards import PackedDataset

log = logging.getLogger(__name__)

WHOLE = (0, 1)
"""The only part of a build that is not divided."""
SHARDS = "shard-*.safetensors"
"""The finished shards of a folder."""


def partial_of(out: Path) -> Path:
    """The folder that is built in, beside `out`."""
    if out.name in ("", ".."):
        raise ValueError(
            f"out {str(out)!r}: expected a folder with a name, made where it does not exist, such as packed"
        )
    return out.with_name(out.name + ".partial")


def shards_of(partial: Path, part: tuple[int, int] = WHOLE) -> set[Path]:
    """The finished shards of a part."""
    index, num_parts = part
    return {shard for shard in partial.glob(SHARDS) if int(shard.stem.rpartition("-")[2]) % num_parts == index}


def leave(partial: Path, *, keep: bool, clear: bool) -> None:
    """Of a build that stopped, keep the finished shards and say so; where there are none, leave nothing."""
    num_shards = len(shards_of(partial))
    if num_shards and keep:
        log.warning("%s keeps %d finished shards; --resume goes on with them", partial, num_shards)
    elif clear:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of the same recipe in `out`, if there is one.

    Raises:
        FileExistsError: there is something else.
    """
    if not out.exists():
        return None
    if not (out / "manifest.json").is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise FileExistsError(f"{out} exists and is no packed data set; choose another --out or remove it")
    manifest = read_manifest(out / "manifest.json")
    if difference := _difference(manifest, settings):
        raise FileExistsError(f"{out} holds a data set with {difference}; choose another --out or remove it")
    return manifest


def is_whole(out: Path, manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do in `out`, which holds a data set of the same recipe."""
    if manifest.get("rules") != RULES:
        # A reader takes it as it is, but built now it would have other bytes.
        log.warning("%s was built by another version of ao, which makes other datapoints; it is built anew", out)
        return False
    if canonical_json(manifest.get("inputs")) != canonical_json(settings["inputs"]):
        return False
    try:
        PackedDataset.open(out)
    except (FileNotFoundError, ValueError) as error:
        log.warning("%s; --resume does so now", error)
        return False
    return True


def require_parts_of(settings: Mapping[str, Any], partial: Path) -> None:
    """Refuse parts of another recipe; a merge that was stopped may have left a manifest in their place."""
    for file in sorted(partial.glob("*.json")):
        described = read_manifest(file)
        if difference := _difference(described.get("identity", described), settings):
            raise ValueError(
                f"{file} is of a build with {difference}; merge with the recipe and flags that the parts were built with"
            )


def _difference(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """What differs between what a manifest, or a part's identity, records and the settings of a build."""
    for name in ("config", "oracle", "targets"):
        old, new = found.get(name), settings[name]
        if canonical_json(old) != canonical_json(new):
            old = old if isinstance(old, dict) else {}
            keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            return f"another {name} (differs in {', '.join(keys)})"
    return None


def put_in_place(partial: Path, out: Path) -> None:
    """Give a whole build its name; what had it goes behind that."""
    if out.exists():
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    sync_folder(out.parent)
