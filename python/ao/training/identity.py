"""What makes two runs one: the settings, model and data that a checkpoint must agree with; and the versions it was made with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ao.config import Recipe, to_dict
from ao.manifest import canonical_json
from ao.shards import PackedDataset

log = logging.getLogger(__name__)

_VERSIONS = {"ao": "activation-oracles"} | {name: name for name in ("torch", "transformers", "peft", "numpy")}
_FREE = ("out", "log_every", "eval_every", "save_every", "keep", "track", "recompute")
"""Settings of `[train]` that may change between a run and its resumption: no loss depends on them."""
_LAST_DIGITS = ("train.tokens_per_row", "train.context_tokens_per_row", "train.cache")
"""Those that may change, too, as they only cut the work in another way: sums are rounded differently."""


def identity_of(recipe: Recipe, dataset: PackedDataset) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    settings = {name: value for name, value in to_dict(recipe.train).items() if name not in _FREE}
    model = {name: value for name, value in to_dict(recipe.model).items() if name != "device"}
    shards = [entry["sha256"] for entry in dataset.manifest["shards"]]
    return {"train": settings, "model": model, "shards": shards}


def require_same_run(folder: Path, run: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Refuse a checkpoint of another run.

    Returns:
        The settings that differ and may, as "train.cache was A, now B".

    Raises:
        ValueError: names every setting that differs.
    """
    saved, free = run["identity"], []
    others = [] if saved["shards"] == identity["shards"] else [_other_shards(saved["shards"], identity["shards"])]
    for part in ("train", "model"):
        for key in sorted({*saved[part], *identity[part]}):
            name, was, now = f"{part}.{key}", saved[part].get(key), identity[part].get(key)
            if canonical_json(was) == canonical_json(now):
                continue
            # A step of a token budget is made of rows, so there the rows decide what is in a step.
            makes_steps = key == "tokens_per_row" and identity[part].get("tokens_per_step") is not None
            if name in _LAST_DIGITS and not makes_steps:
                free.append(f"{name} was {json.dumps(was)}, now {json.dumps(now)}")
            else:
                others.append(f"{name} was {json.dumps(was)}, got {json.dumps(now)}")
    if others:
        raise ValueError(
            f"{folder}: of another run: {'; '.join(others)}; undo the change, or begin anew, with --restart or another --out"
        )
    return free


def _other_shards(saved: Sequence[str], now: Sequence[str]) -> str:
    differ = sum(was != got for was, got in zip(saved, now, strict=False)) + abs(len(saved) - len(now))
    return f"the data set had {len(saved)} shards, got {len(now)}, {differ} of them with other contents"


def versions() -> dict[str, str]:
    """Of this package and the libraries that losses depend on."""
    return {name: version(distribution) for name, distribution in _VERSIONS.items()}


def tell_changes(checkpoint: Path, run: Mapping[str, Any], changes: Sequence[str], *, ranks: int) -> None:
    """Tell where a run is resumed with other settings, on another number of ranks, or under other versions than before."""
    if run["ranks"] != ranks:
        changes = [*changes, f"ranks were {run['ranks']}, now {ranks}"]
    if changes:
        but = ", and dropout draws other units" if run["identity"]["train"]["dropout"] else ""
        log.warning("%s: %s; what follows may differ in the last digits%s", checkpoint, "; ".join(changes), but)
    saved = run["versions"]
    others = [f"{name} {saved.get(name)}, now {now}" for name, now in versions().items() if saved.get(name) != now]
    if others:
        log.warning("%s: written with %s; what follows may differ in the last digits", checkpoint, ", ".join(others))
