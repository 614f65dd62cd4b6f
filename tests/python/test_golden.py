"""Fifty steps of training in double precision, whose losses are checked in: on one, two and four ranks.

`python tests/python/test_golden.py` writes the file anew, for a change that is meant to change losses.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

import ao.train
from ao.config import ModelConfig, Recipe, parse_recipe
from ao.demo import world
from ao.distributed import Ranks, launch
from ao.models.load import load_model
from ao.pack import pack

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS = 50
READS = [{"share": 0.5, "all": True}, {"share": 0.5, "window": [1, 3]}]


def recipe() -> Recipe:
    sources = [
        {"name": "trait", "kind": "latentqa", "path": "world/train/latentqa", "count": 120, "reads": READS},
        {"name": "texts", "kind": "context_prediction", "path": "world/train/texts.jsonl", "count": 60},
    ]
    settings = {"steps": STEPS, "examples_per_step": 8, "learning_rate": 5e-3, "rank": 4, "alpha": 8, "window": 8}
    model = {"name": "demo", "precision": "fp32", "device": "cpu"}
    train = {**settings, "tokens_per_row": 300, "save_every": 0}
    return parse_recipe({"model": model, "data": {"sources": sources}, "train": train})


def packed(root: Path) -> Path:
    world.write_files(root / "world", seed=0, conversations=60, statements=30, texts=60, heldout=4)
    pack(recipe(), root=root, out=root / "packed")
    return root / "packed"


def in_double(data: Path, out: Path) -> dict[str, Any]:
    """What every rank calls."""
    own = ao.train.load_replica
    ao.train.load_replica = doubled
    try:
        return ao.train.train(recipe(), data=data, out=out, progress=False)
    finally:
        ao.train.load_replica = own


def doubled(config: ModelConfig, here: Ranks, **which: str) -> Any:
    return load_model(config, **which).double()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("golden"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_losses_are_what_they_were(processes, data, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    run = partial(in_double, data, tmp_path / "out")
    record = run() if processes == 1 else launch(run, processes=processes)
    assert record["ranks"] == processes
    assert len(golden) == STEPS
    assert_allclose(record["losses"], golden, rtol=1e-6)
    assert golden[-1] < 0.7 * golden[0]


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        found = in_double(packed(Path(folder)), Path(folder) / "out")["losses"]
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
