"""What a run leaves: the adapter, its contract, the recipe that was followed, a draft of its card, and the record."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from ao.card import FILE as CARD
from ao.card import model_card
from ao.checkpoint import OracleConfig
from ao.config import Recipe, SourceConfig, parse_recipe, to_toml
from ao.manifest import write_atomic
from ao.models.adapters import save_adapter
from ao.prompt import framer
from ao.shards import PackedDataset
from ao.training.state import RECORD
from ao.training.step import Learner


def write_run(
    recipe: Recipe, learner: Learner, dataset: PackedDataset, record: Mapping[str, Any], folder: Path, *, root: Path
) -> None:
    """Write all that is published of an adapter; the record comes last.

    Args:
        recipe: the recipe.
        learner: what was trained.
        dataset: what it was trained on.
        record: the record, up to now.
        folder: where it goes.
        root: folder that relative source paths of the recipe are taken from.
    """
    followed = as_followed(recipe, dataset, folder, root=root)
    published = _contract(recipe, learner, dataset, steps=record["steps"], examples=record["examples"]).to_json()
    save_adapter(learner.peft, folder, base=recipe.model.name, ao_config=published)
    write_atomic(folder / "recipe.toml", to_toml(followed))
    # A report in the folder is of an earlier adapter; `ao push` puts in the one that it finds then.
    write_atomic(folder / CARD, model_card(contract=published, recipe=followed, record=record))
    write_atomic(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")


def as_followed(recipe: Recipe, dataset: PackedDataset, folder: Path, *, root: Path) -> Recipe:
    """The recipe as the run followed it, to be read from the adapter's folder: `[data]` as the data set was packed, the
    folders that were used, and relative source paths that lead from there to the same files."""
    paths = {source.name: source.path for source in recipe.data.sources if source.path is not None}
    data = {**dataset.manifest["config"], "out": str(dataset.folder)}
    sources = []
    for source in data["sources"]:
        # A manifest records files by their last name.
        path = paths.get(source["name"], "")
        is_same = "path" in source and PurePath(path).name == source["path"]
        sources.append({**source, "path": _rebased(path, root, folder)} if is_same else source)
    packed = parse_recipe({"data": {**data, "sources": sources}}, origin=str(dataset.folder / "manifest.json")).data
    tasks = tuple(
        replace(task, sources=tuple(_moved(source, root, folder) for source in task.sources))
        for task in recipe.eval.tasks
    )
    train, scored = replace(recipe.train, out=str(folder)), replace(recipe.eval, tasks=tasks)
    return replace(recipe, data=packed, train=train, eval=scored)


def _moved(source: SourceConfig, root: Path, folder: Path) -> SourceConfig:
    return source if source.path is None else replace(source, path=_rebased(source.path, root, folder))


def _rebased(path: str, root: Path, folder: Path) -> str:
    if PurePath(path).is_absolute():
        return path
    file = root / path
    # The last name is a source's identity, so a link is not followed there.
    return os.path.relpath(file.parent.resolve() / file.name, folder.resolve())


def _contract(recipe: Recipe, learner: Learner, dataset: PackedDataset, *, steps: int, examples: int) -> OracleConfig:
    config = recipe.train
    return OracleConfig(
        model=recipe.model.name,
        injection=config.injection,
        injection_layer=config.injection_layer,
        injection_scale=config.injection_scale,
        rescale=config.rescale,
        layer_combinations=tuple(dataset.layer_combinations),
        num_layers=learner.arch.num_layers,
        framing=framer(recipe.model.name, recipe.model.revision).fingerprint,
        trained={
            "steps": steps,
            "examples": examples,
            "precision": recipe.model.precision,
            "target": recipe.model.target or recipe.model.name,
            "lora": {"r": config.rank, "alpha": config.alpha, "dropout": config.dropout},
        },
    )
