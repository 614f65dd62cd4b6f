"""Training on the embedded model and a small demo world: the same losses however the work is cut, and by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import ao.distributed
import ao.train
import ao.training.identity
import ao.training.lookahead
import ao.training.step
from ao import Oracle
from ao.attention import IMPLEMENTATION
from ao.batch import lay_out
from ao.card import card_of
from ao.collect.run import collect
from ao.collect.wanted import units as wanted_units
from ao.config import Recipe, TrainConfig, load_recipe, parse_recipe
from ao.demo import world
from ao.distributed import START_METHOD, Ranks, launch
from ao.loss import labels_of
from ao.models.adapters import as_target
from ao.models.load import compile_blocks, load_model
from ao.pack import pack
from ao.prompt import framer, model_folder
from ao.push import push
from ao.residuals import Reading
from ao.shards import PackedDataset
from ao.train import train, windows
from ao.training import step
from ao.training.heldout import share_of, split
from ao.training.recompute import Recompute
from ao.training.state import checkpoints, load_checkpoint
from ao.training.step import Learner, Underway, learning_rate
from ao.training.tracking import Log

STEPS, PER_STEP = 6, 8
READS = [{"share": 0.5, "all": True}, {"share": 0.5, "window": [1, 3]}]
SOURCES = [
    {"name": "trait", "kind": "latentqa", "path": "world/train/latentqa", "count": 40, "reads": READS},
    {
        "name": "truth",
        "kind": "classification",
        "path": "world/train/statements/truth.csv",
        "text": "statement",
        "questions": ["Is this {label}?"],
        "count": 16,
        "reads": [{"window": [1, 4]}],
    },
    {
        "name": "texts",
        "kind": "context_prediction",
        "path": "world/train/texts.jsonl",
        "count": 16,
        "window": [1, 6],
        "predict": [1, 4],
    },
]
TRAIN = {
    "steps": STEPS,
    "examples_per_step": PER_STEP,
    "learning_rate": 5e-3,
    "rank": 4,
    "alpha": 8,
    "tokens_per_row": 512,
    "window": 4,
}


def recipe_of(data: dict | None = None, **changes: object) -> Recipe:
    model = {"name": "demo", "precision": "fp32", "device": "cpu"}
    return parse_recipe({"model": model, "data": {"sources": SOURCES, **(data or {})}, "train": {**TRAIN, **changes}})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    world.write_files(root / "world", seed=0, conversations=30, statements=30, texts=30, heldout=4)
    pack(recipe_of(), root=root, out=root / "packed")
    return root / "packed"


@pytest.fixture(scope="module")
def plain(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Record and adapter of one ordinary run, which others are compared with."""
    out = tmp_path_factory.mktemp("adapters") / "plain"
    return train(recipe_of(), data=packed, out=out, progress=False), out


def losses(data: Path, out: Path, **changes: object) -> list[float]:
    return train(recipe_of(**changes), data=data, out=out, progress=False)["losses"]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# --- the same numbers, however the work is cut -----------------------------------------------------------------------


def test_two_ranks_give_the_losses_of_one(plain, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(ao.distributed, "START_METHOD", START_METHOD)  # as users have it
    record, _ = plain
    run = partial(train, data=packed, out=tmp_path / "two", progress=False)
    both = launch(run, recipe_of(), processes=2)
    assert (record["ranks"], both["ranks"]) == (1, 2)
    assert_allclose(both["losses"], record["losses"], rtol=1e-6)
    for name in ("examples", "input_tokens", "answer_tokens", "steps"):
        assert both[name] == record[name]
    # Of all ranks, each of which runs a context that it reads.
    assert record["context_tokens"] <= both["context_tokens"] < 2 * record["context_tokens"]


@pytest.mark.parametrize("changes", [{"tokens_per_row": 150}, {"tokens_per_row": 1}, {"recompute": "on"}], ids=str)
def test_rows_and_recompute_change_no_loss(changes, plain, packed, tmp_path):
    assert_allclose(losses(packed, tmp_path / "out", **changes), plain[0]["losses"], rtol=1e-5)


def test_the_librarys_own_attention_gives_the_same_losses(plain, packed, tmp_path, monkeypatch):
    """In padded rows; ours is not called."""
    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, None)
    recipe = recipe_of()
    stock = replace(recipe, model=replace(recipe.model, attention="stock"))
    record = train(stock, data=packed, out=tmp_path / "out", progress=False)
    assert_allclose(record["losses"], plain[0]["losses"], rtol=1e-5)


@pytest.mark.parametrize(("recompute", "times"), [("off", 1), ("on", 2)])
def test_recompute_runs_the_blocks_again(recompute, times, packed, tmp_path, monkeypatch):
    calls = []

    def counted(config, here):
        model = load_model(config)
        # The look-ahead runs without gradients.
        count = lambda *_: calls.append(1) if torch.is_grad_enabled() else None  # noqa: E731
        model.model.layers[-1].mlp.register_forward_hook(count)
        return model

    monkeypatch.setattr(ao.train, "load_replica", counted)
    monkeypatch.setattr(ao.train, "check_learner", lambda *_: None)
    losses(packed, tmp_path / "out", steps=2, tokens_per_row=10**6, recompute=recompute)
    assert len(calls) == 2 * times


@pytest.mark.parametrize("steps_ahead", [1, STEPS])
def test_looking_ahead_changes_no_loss(steps_ahead, plain, packed, tmp_path, monkeypatch):
    """The steps of the plan, their contexts collected for fewer or more of them at once."""

    def cut(*args):
        steps = [rows for _, window in windows(*args) for rows in window]
        for first in range(0, len(steps), steps_ahead):
            yield first, steps[first : first + steps_ahead]

    monkeypatch.setattr(ao.train, "windows", cut)
    assert_allclose(losses(packed, tmp_path / "out"), plain[0]["losses"], rtol=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(plain, packed, tmp_path):
    record, out = plain
    assert losses(packed, tmp_path / "again") == record["losses"]
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(out)
    assert losses(packed, tmp_path / "other", seed=1) != record["losses"]
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(out)


# --- by hand ---------------------------------------------------------------------------------------------------------


def loss_by_hand(model, target, points):
    """Mean answer loss of datapoints, each alone: the library's full logits and masked labels, and a hook of three lines."""
    total = count = 0
    for point in points:
        with torch.no_grad():
            context = torch.tensor(point.context_ids.tolist())[None]
            states = target(input_ids=context, output_hidden_states=True, use_cache=False).hidden_states
        vectors = [
            states[layer + 1][0, at] for layer, at in zip(point.layers.tolist(), point.read_positions, strict=True)
        ]

        def hook(module, args, output, point=point, vectors=vectors):
            for place, vector in zip(point.placeholders.tolist(), vectors, strict=True):
                output[0, place] += output[0, place].norm() * vector / vector.norm()
            return output

        ids = torch.tensor(point.input_ids.tolist())[None]
        labels = ids.clone()
        labels[:, : point.answer_start] = -100
        handle = model.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        handle.remove()
        supervised = int((labels != -100).sum())
        total, count = total + float(loss) * supervised, count + supervised
    return total / count


def steps_of(packed: Path, **changes: object) -> list[list]:
    """The datapoints of each step, on one rank."""
    here = Ranks(rank=0, world=1, device=torch.device("cpu"))
    found = windows(PackedDataset.open(packed), recipe_of(**changes).train, here)
    return [[point for points in rows for point in points] for _, window in found for rows in window]


def first_step(packed: Path) -> list:
    return steps_of(packed)[0]


def bare(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_first_loss_is_the_obvious_one(plain, packed):
    """B is zero before the first step, so the oracle is the bare model."""
    model = bare(model_folder("demo"))
    points = first_step(packed)
    assert len({len(point.input_ids) for point in points}) > 1
    assert plain[0]["losses"][0] == pytest.approx(loss_by_hand(model, model, points), rel=1e-5)


def test_another_target_is_read(plain, packed, tmp_path):
    tuned = Path(shutil.copytree(model_folder("demo"), tmp_path / "tuned"))
    target = bare(tuned)
    target.model.layers[1].self_attn.o_proj.weight.data *= -1
    target.save_pretrained(tuned)
    recipe = recipe_of(steps=1)
    recipe = replace(recipe, model=replace(recipe.model, target=str(tuned)))
    record = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    expected = loss_by_hand(bare(model_folder("demo")), target, first_step(packed))
    assert record["losses"] == [pytest.approx(expected, rel=1e-5)]
    assert abs(record["losses"][0] / plain[0]["losses"][0] - 1) > 1e-3


def test_yes_and_no_keep_all_their_labels(packed):
    """The generation prompt ends in an empty thought that a rendered conversation lacks; nothing is counted off for it."""
    text = framer("demo")
    points = [point for point in PackedDataset.open(packed) if point.answer in ("Yes", "No")]
    assert {point.answer for point in points} == {"Yes", "No"}
    sequences = [point.input_ids for point in points]
    batch = lay_out(sequences, packed=True, device=torch.device("cpu"))
    labels = labels_of(batch, sequences, [point.answer_start for point in points])
    asked = np.split(labels.ids_A.numpy(), np.arange(2, len(labels.ids_A), 2))
    assert len(asked) == len(points)
    for point, ids in zip(points, asked, strict=True):
        assert text.decode(ids.astype(np.int32)) == f"{point.answer}<turn|>"
        assert text.decode(point.input_ids[: point.answer_start].astype(np.int32)).endswith(
            "<|channel>thought\n<channel|>"
        )
    # What each label is predicted from is the token before it.
    flat = np.concatenate(sequences)
    assert flat[labels.positions_A.numpy() + 1].tolist() == labels.ids_A.tolist()


def test_the_record_counts_what_was_trained_on(plain, packed):
    record, out = plain
    points = [point for step in steps_of(packed) for point in step]
    assert record["examples"] == len(points) == STEPS * PER_STEP
    assert record["input_tokens"] == sum(len(point.input_ids) for point in points)
    assert record["answer_tokens"] == sum(len(point.input_ids) - point.answer_start for point in points)
    assert record["skipped_steps"] == 0
    assert len(record["losses"]) == record["steps"] == STEPS
    written = json.loads((out / "training.json").read_text())
    assert written == {name: value for name, value in record.items() if name != "first_rank"}


def test_the_rate_rises_and_falls():
    config = TrainConfig(steps=10, warmup=0.2, learning_rate=1.0)
    assert_allclose(
        [learning_rate(step, config) for step in range(10)],
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    )
    cold = TrainConfig(steps=4, warmup=0.0, learning_rate=2.0)
    assert_allclose([learning_rate(step, cold) for step in range(4)], [2, 2, 4 / 3, 2 / 3])
    warm = TrainConfig(steps=4, warmup=1.0, learning_rate=2.0)
    assert_allclose([learning_rate(step, warm) for step in range(4)], [0.5, 1, 1.5, 2])


def test_the_rate_reaches_the_optimizer(packed, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    losses(packed, tmp_path / "out")
    assert seen == [[learning_rate(index, recipe_of().train)] for index in range(STEPS)]


def test_every_epoch_shows_everything_once_in_its_own_order(packed):
    dataset = PackedDataset.open(packed)
    steps = 2 * (len(dataset) // PER_STEP) + 1
    ids = [point.id for step in steps_of(packed, steps=steps) for point in step]
    epoch = len(dataset) // PER_STEP * PER_STEP
    first, second = ids[:epoch], ids[epoch : 2 * epoch]
    assert len(ids) == steps * PER_STEP
    assert len(set(first)) == len(set(second)) == epoch
    assert first != second


def test_one_integer_resumes(packed):
    """From any step on, the steps that follow and their windows are those of the whole run, also in a later epoch."""
    dataset, here = PackedDataset.open(packed), Ranks(rank=0, world=1, device=torch.device("cpu"))
    config = recipe_of(steps=20, tokens_per_row=150).train
    ids = lambda found: [[[point.id for point in points] for points in rows] for rows in found]  # noqa: E731
    whole = [(first, ids(window)) for first, window in windows(dataset, config, here)]
    assert max(len(rows) for _, window in whole for rows in window) > 1
    for start in (0, 1, 4, 8, 9, 10, 19):
        found = [(first, ids(window)) for first, window in windows(dataset, config, here, False, start)]
        assert found == whole[len(whole) - len(found) :]
        assert found[0][0] <= start < found[0][0] + len(found[0][1])


# --- what comes out --------------------------------------------------------------------------------------------------


def test_training_fits_what_it_sees(packed, tmp_path, monkeypatch):
    """Every step the same eight examples: their loss falls."""
    points = first_step(packed)
    monkeypatch.setattr(ao.train, "windows", lambda *args: ((step, [[points]]) for step in range(12)))
    found = losses(packed, tmp_path / "out", steps=12, learning_rate=1e-2)
    assert found[-1] < 0.5 * found[0]


def test_the_oracle_reads_the_adapter_and_its_answer_moves(plain):
    _, out = plain
    oracle = Oracle.from_pretrained("demo", out, device="cpu")
    assert oracle.config.layer_combinations == ((1,), (3,), (4,))
    assert oracle.config.framing == framer("demo").fingerprint
    assert oracle.config.trained["steps"] == STEPS
    activations = oracle.read([{"role": "system", "content": "You are a poet."}, {"role": "user", "content": "Hello."}])
    prompt = oracle._prompt("What persona does the assistant have?", (3,), activations.at(3))
    trained, untrained = (
        oracle.choice_log_probs([prompt], [["poet", "banker", "Yes"]], adapter=adapter)[0] for adapter in (True, False)
    )
    assert np.abs(trained - untrained).max() > 0.1


def test_eight_bit_states_train_alike(packed, tmp_path):
    # Below 4096 weights a tensor keeps its states in fp32, so the rank is high here.
    exact, found = (
        losses(packed, tmp_path / optimizer, optimizer=optimizer, rank=64) for optimizer in ("adamw", "adamw8bit")
    )
    assert found[0] == exact[0]
    assert found != exact
    assert_allclose(found, exact, rtol=0.05)


@pytest.mark.parametrize("precision", ["bf16", "nf4", "nf4-dequantized"])
def test_the_settings_of_a_large_run_go_together(precision, packed, tmp_path):
    """Low precision, recompute, dropout and 8-bit states in one run, and an oracle of it that answers."""
    recipe = recipe_of(steps=3, recompute="on", dropout=0.05, optimizer="adamw8bit", rank=64)
    recipe = replace(recipe, model=replace(recipe.model, precision=precision))
    record = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    # Before the first step the oracle is the base, whose loss hardly depends on the precision; B then moves it.
    exact = train(recipe_of(steps=1), data=packed, out=tmp_path / "exact", progress=False)
    assert record["losses"][0] == pytest.approx(exact["losses"][0], rel=0.2)
    assert record["skipped_steps"] == 0
    oracle = Oracle.from_pretrained("demo", tmp_path / "out", precision=precision, device="cpu")
    assert oracle.config.trained["precision"] == precision
    answer = oracle.ask(oracle.read("The queen sings.")[-2:], "Who sings?", choices=["queen", "king"])
    assert answer.probabilities != answer.control.probabilities


def test_dropout_is_on_while_training(plain, packed, tmp_path):
    found = losses(packed, tmp_path / "out", dropout=0.5)
    # B is zero at first, so dropout shows from the second step on.
    assert found[0] == plain[0]["losses"][0]
    assert found[1] != plain[0]["losses"][1]
    assert losses(packed, tmp_path / "again", dropout=0.5) == found


@pytest.mark.parametrize(("bad", "skipped"), [({2}, 1), (set(range(STEPS)), None)])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_step_without_a_finite_gradient_is_skipped(optimizer, bad, skipped, packed, tmp_path, monkeypatch):
    calls = iter(range(10**6))
    answer_loss = ao.training.step.answer_loss

    def broken(*args):
        return answer_loss(*args) * (math.nan if next(calls) in bad else 1.0)

    step, has_moved = Learner.step, []

    def watched(self, *args, **kwargs):
        def numbers():
            return [self.weights.detach().clone(), *map(torch.as_tensor, self.optimizer.state[self.weights].values())]

        before = [each.clone() for each in numbers()]
        underway = step(self, *args, **kwargs)
        has_moved.append(not all(map(torch.equal, before, numbers())))
        return underway

    monkeypatch.setattr(Learner, "step", watched)
    monkeypatch.setattr(ao.training.step, "answer_loss", broken)
    monkeypatch.setattr(ao.train, "check_learner", lambda *_: None)
    # One row a step, so that a call is a step; one bad step in ten is let pass.
    recipe = recipe_of(steps=10, tokens_per_row=10**6, log_every=1, optimizer=optimizer, rank=16)
    if skipped is None:
        with pytest.raises(RuntimeError, match="gradient was not finite in 2 of the first 2 of 10 steps"):
            train(recipe, data=packed, out=tmp_path / "out", progress=False)
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        return
    record = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    assert record["skipped_steps"] == 1
    assert has_moved == [at != 2 for at in range(10)]
    assert [step for step, loss in enumerate(record["losses"]) if loss is None] == [2]
    assert "NaN" not in (tmp_path / "out" / "training.json").read_text()
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert "NaN" not in log
    assert [json.loads(line)["gradient_norm"] is None for line in log.splitlines()] == [at == 2 for at in range(10)]


def test_a_draft_of_the_card_lies_beside_the_adapter(packed, tmp_path):
    out = tmp_path / "out"
    record = train(recipe_of(steps=3, log_every=1, held_out=8, eval_every=2), data=packed, out=out, progress=False)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    scores = {name: value for name, value in last.items() if name.startswith("held_out")}
    assert record["held_out"] == {"step": 3, "datapoints": record["held_out"]["datapoints"], **scores}
    assert 8 <= record["held_out"]["datapoints"] < 16
    card = (out / "README.md").read_text()
    assert f"| its own | {scores['held_out_loss']:.3f} |" in card
    assert "| layers read | 1, 3, 4 of 6, one in a prompt |" in card
    assert card_of(out) == card


def test_the_recipe_beside_the_adapter_is_the_one_that_was_followed(packed, tmp_path):
    """Of what was packed, by flags or not, with the folders that were used; and it packs the same data set again."""
    shares = [{**{key: each[key] for key in each if key != "count"}, "share": 1} for each in SOURCES]
    task = {"name": "t", "sources": [SOURCES[1]]}
    values = {"model": {"name": "demo", "precision": "fp32", "device": "cpu"}, "train": {**TRAIN, "steps": 1}}
    values["data"] = {"out": "elsewhere", "examples": 60, "sources": shares}
    recipe = parse_recipe({**values, "eval": {"tasks": [task]}})
    flags = replace(recipe, data=replace(recipe.data, examples=30))
    data, out, root = tmp_path / "p2", tmp_path / "runs" / "o2", packed.parent
    pack(flags, root=root, out=data)
    train(replace(recipe, train=replace(recipe.train, held_out=4)), data=data, out=out, root=root, progress=False)
    for folder in (out, out / "best"):
        saved = load_recipe(folder / "recipe.toml")
        assert (saved.data.examples, saved.data.out, saved.train.out) == (30, str(data), str(folder))
        assert "share 1 of 30" in (folder / "README.md").read_text()
        assert card_of(folder) == (folder / "README.md").read_text()
        pack(saved, root=folder, out=tmp_path / "again")
        assert (tmp_path / "again/manifest.json").read_bytes() == (data / "manifest.json").read_bytes()
        (path,) = (source.path for source in saved.eval.tasks[0].sources)
        assert (folder / path).samefile(root / SOURCES[1]["path"])
    best = json.loads((out / "best" / "training.json").read_text())
    assert (best["steps"], len(best["losses"])) == (1, 1)
    push(out / "best", "me/oracle", dry_run=True)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "field", "value", "problem"),
    [
        ("oracle", "tokenizer", "0" * 64, r"packed for tokenizer 00000000\.\., got"),
        ("oracle", "template", "0" * 64, r"packed for template 00000000\.\., got"),
        ("oracle", "num_layers", 60, "packed for num_layers 60, got 6"),
        ("targets", "tokenizer", "0" * 64, r"packed for a target with tokenizer 00000000\.\., got"),
    ],
)
def test_data_of_another_model_are_refused(part, field, value, problem, packed, tmp_path):
    data = Path(shutil.copytree(packed, tmp_path / "packed"))
    manifest = json.loads((data / "manifest.json").read_text())
    (manifest["targets"]["base"] if part == "targets" else manifest["oracle"])[field] = value
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=problem):
        train(recipe_of(), data=data, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_fewer_examples_than_a_step_takes_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"holds 7\d datapoints, fewer than train\.examples_per_step = 100"):
        losses(packed, tmp_path / "out", examples_per_step=100)
    assert not (tmp_path / "out").exists()


def test_an_injection_layer_beyond_the_model_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"injection layer: expected 0\.\.5, got 6"):
        losses(packed, tmp_path / "out", injection_layer=6)


def test_a_target_of_another_width_is_refused(packed, tmp_path):
    narrow = Path(shutil.copytree(model_folder("demo"), tmp_path / "narrow"))
    config = AutoConfig.from_pretrained(narrow)
    width, config.hidden_size = config.hidden_size, config.hidden_size // 2
    AutoModelForCausalLM.from_config(config).save_pretrained(narrow)
    recipe = recipe_of()
    recipe = replace(recipe, model=replace(recipe.model, target=str(narrow)))
    with pytest.raises(
        ValueError, match=rf"narrow': its activations have d_model {width // 2}, .* 'demo' takes {width}"
    ):
        train(recipe, data=packed, out=tmp_path / "out", progress=False)


@pytest.mark.parametrize("target", ["adapter", "difference"])
def test_activations_that_cannot_be_collected_yet_are_refused(target, tmp_path):
    """Trained as if they were the base's own they would teach something else."""
    example = {"context": "The queen sings.", "question": "Who?", "answer": "queen"}
    lines = [json.dumps({"id": str(index), **example}) for index in range(PER_STEP)]
    lines[-1] = json.dumps({"id": "last", **example, "target": target})
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    recipe = recipe_of({"sources": [{"name": "r", "kind": "records", "path": "records.jsonl"}]}, steps=1)
    pack(recipe, root=tmp_path, out=tmp_path / "packed")
    with pytest.raises(ValueError, match=f"'last' reads {target!r} activations"):
        train(recipe, data=tmp_path / "packed", out=tmp_path / "out", progress=False)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a process that ends."""


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_resumed_run_ends_in_the_same_bytes(killed_after, optimizer, packed, tmp_path, monkeypatch):
    """In mid-window, with dropout and held-out scores; what was done behind the last checkpoint is done again."""
    changes = {"dropout": 0.3, "held_out": 8, "eval_every": 3, "save_every": 2, "optimizer": optimizer, "rank": 16}
    recipe = recipe_of(log_every=1, **changes)
    whole = train(recipe, data=packed, out=tmp_path / "whole", progress=False)
    step, done = Learner.step, iter(range(10**6))

    def dying(self, *args, **kwargs):
        if next(done) == killed_after:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dying)
        with pytest.raises(Killed):
            train(recipe, data=packed, out=tmp_path / "out", progress=False)
    if killed_after > 1:
        with pytest.raises(FileExistsError, match="--resume goes on with it, --restart removes it"):
            train(recipe, data=packed, out=tmp_path / "out", progress=False)
    record = train(recipe, data=packed, out=tmp_path / "out", resume=True, progress=False)
    assert record["losses"] == whole["losses"]
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    assert record["best_held_out"] == whole["best_held_out"]
    lines, expected = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("out", "whole")
    )
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm", "learning_rate", "held_out_loss", "held_out_loss_shuffled"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in expected]


def test_two_ranks_resume_what_two_ranks_began(packed, tmp_path):
    recipe = recipe_of(dropout=0.3, save_every=2)
    launched = partial(train, data=packed, progress=False)
    whole = launch(partial(launched, out=tmp_path / "whole"), recipe, processes=2)
    # The run's checkpoint of two steps, as a killed run would have left it.
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-000002", tmp_path / "out/checkpoints/step-000002")
    again = launch(partial(launched, out=tmp_path / "out", resume=True), recipe, processes=2)
    assert again["losses"] == whole["losses"]


def stopped_on_rank_1(recipe: Recipe, data: Path, out: Path) -> None:
    """Resume a run, which a signal to the second rank stops, as on GPUs: results are read when the next step is launched."""
    step, signals = Learner.step, iter([signal.SIGTERM])

    def signalled(self: Learner, *args: Any, **kwargs: Any) -> Underway:
        if self.here.rank == 1:
            for number in signals:
                os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "runs_ahead", True)
        patch.setattr(Learner, "step", signalled)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data=data, out=out, resume=True, progress=False)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(plain, packed, tmp_path, caplog):
    recipe, out = recipe_of(save_every=0), tmp_path / "out"
    train(recipe_of(save_every=2), data=packed, out=out, progress=False)
    # As a run leaves it that is killed behind step 2.
    (out / "training.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-000004")
    launch(partial(stopped_on_rank_1, data=packed, out=out), recipe, processes=2)
    # The signal comes in step 3, step 4 tells of it, and by then step 5 has been launched.
    assert checkpoints(out)[-1].name == "step-000005"
    record = train(recipe, data=packed, out=out, resume=True, progress=False)
    told = [text.split(": ")[1] for text in caplog.messages if "ranks were" in text]
    but = "what follows may differ in the last digits"
    assert told == [f"ranks were 1, now 2; {but}", f"ranks were 2, now 1; {but}"]
    assert_allclose(record["losses"], plain[0]["losses"], rtol=1e-5)
    assert (record["ranks"], record["ran_on"]) == (1, [1, 2, 1])
    assert "on 1 process, then 2 processes, then 1 process" in (out / "README.md").read_text()


def test_a_rank_that_was_not_there_draws_units_of_its_own(packed, tmp_path):
    recipe = recipe_of(dropout=0.3, save_every=2)
    train(recipe, data=packed, out=tmp_path / "out", progress=False)
    folder = checkpoints(tmp_path / "out")[0]
    states = []
    for rank in range(2):
        here = Ranks(rank=rank, world=2, device=torch.device("cpu"))
        learner = Learner.of(load_model(recipe.model), recipe.train, here)
        before = torch.get_rng_state()
        load_checkpoint(folder, learner)
        states.append((before, torch.get_rng_state()))
    (_, resumed), (new, kept) = states
    assert torch.equal(resumed, load_file(folder / "random-0.safetensors")["cpu"])
    assert torch.equal(kept, new)
    assert not torch.equal(kept, resumed)


def test_a_signal_saves_and_stops(packed, tmp_path, monkeypatch, caplog):
    recipe = recipe_of(save_every=0)
    step, signals = Learner.step, iter([signal.SIGTERM])

    def signalled(self, *args, **kwargs):
        for number in signals:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", signalled)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data=packed, out=tmp_path / "out", progress=False)
    # It is answered at once, as loading and a window may take minutes.
    said = [text.split(":")[0] for text in caplog.messages if "stop" in text]
    assert said == ["asked to stop", "stopped after 2 of 6 steps; --resume goes on from there"]
    found = [path.name for path in checkpoints(tmp_path / "out")]
    # The flag is read before a step, and the signal came within the first.
    assert found == ["step-000002"]
    record = train(recipe, data=packed, out=tmp_path / "out", resume=True, progress=False)
    assert record["losses"] == losses(packed, tmp_path / "whole")


def test_results_that_are_read_a_step_later_are_the_same(packed, tmp_path, monkeypatch):
    """As on a GPU; scores, checkpoints and a stop are of the adapter behind their own step all the same."""
    recipe = recipe_of(dropout=0.3, held_out=8, eval_every=4, save_every=5, log_every=1)
    whole = train(recipe, data=packed, out=tmp_path / "whole", progress=False)
    step, launches = Learner.step, []

    def signalled(self, *args, **kwargs):
        launches.append(args)
        if len(launches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "runs_ahead", True)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", signalled)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data=packed, out=tmp_path / "out", progress=False)
    # The flag is read before the second step, and the third has been launched when that one tells it.
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-000003"]
    record = train(recipe, data=packed, out=tmp_path / "out", resume=True, progress=False)
    assert record["losses"] == whole["losses"]
    assert record["best_held_out"] == whole["best_held_out"]
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    lines, expected = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("out", "whole")
    )
    for name in ("step", "loss", "gradient_norm", "learning_rate", "held_out_loss"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in expected]


def test_the_last_checkpoints_and_the_best_are_kept(packed, tmp_path):
    recipe = recipe_of(steps=8, save_every=1, keep=2, held_out=8, eval_every=2)
    record = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    found = {path.name for path in checkpoints(tmp_path / "out")}
    best = f"step-{record['best_held_out']['step']:06d}"
    assert found >= {"step-000006", "step-000007"}
    assert found <= {"step-000006", "step-000007", best}
    Oracle.from_pretrained("demo", tmp_path / "out" / "best", precision="fp32", device="cpu")
    at_best = tmp_path / "out" / "checkpoints" / best
    if at_best.is_dir():
        weights = load_file(at_best / "state.safetensors")["weights"]
        tensors = load_file(tmp_path / "out" / "best" / "adapter_model.safetensors").values()
        assert_allclose(sum(float(each.sum()) for each in tensors), float(weights.sum()), rtol=1e-4)
    contract = json.loads((tmp_path / "out" / "best" / "ao_config.json").read_text())
    assert contract["ao"]["trained"]["steps"] == record["best_held_out"]["step"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_numbers_and_goes_on_with_its_run(name, packed, tmp_path, monkeypatch):
    calls: list[tuple] = []
    library = SimpleNamespace(
        init=lambda **settings: calls.append(("init", settings)),
        log=lambda numbers, step: calls.append(("log", step, numbers["loss"])),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, library)
    recipe = recipe_of(track=(name,), log_every=2, save_every=2)
    record = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    assert [call[0] for call in calls] == ["init", *["log"] * (STEPS // 2), "finish"]
    assert calls[1][1:] == (2, record["losses"][1])
    (tmp_path / "out" / "training.json").unlink()
    train(recipe, data=packed, out=tmp_path / "out", progress=False, resume=True)
    begun, resumed = (call[1] for call in calls if call[0] == "init")
    assert "resume" not in begun
    assert resumed["resume"] == "allow"
    assert begun["name"] == resumed["name"]
    assert begun.get("id") == resumed.get("id")
    assert ("id" in begun) == (name == "wandb")
    # Another run is another one, in the same folder as in one whose last name is the same.
    for out in (tmp_path / "out", tmp_path / "other" / "out"):
        train(recipe, data=packed, out=out, progress=False)
    names = [call[1]["name"] for call in calls if call[0] == "init"]
    assert len(set(names)) == len(names) - 1
    assert names[-1].startswith("other-out-")


@pytest.mark.parametrize("step", [0, 4])
def test_tensorboard_hides_steps_that_are_done_again(step, tmp_path, monkeypatch):
    """And nothing before the first number comes, as a start may fail."""
    made: list[tuple] = []

    def writer(folder, purge_step):
        made.append((folder, purge_step))
        return SimpleNamespace(add_scalar=lambda *args: made.append(args), close=lambda: made.append(("close",)))

    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(SummaryWriter=writer))
    with Log(tmp_path, ("tensorboard",), run="r", config={}, step=step) as lines:
        assert made == []
        lines.write(step + 1, {"loss": 0.5})
    assert made == [(str(tmp_path / "tensorboard"), step + 1), ("loss", 0.5, step + 1), ("close",)]


def test_other_versions_are_told(packed, tmp_path, monkeypatch, caplog):
    recipe = recipe_of(save_every=2)
    train(recipe, data=packed, out=tmp_path / "out", progress=False)
    (tmp_path / "out" / "training.json").unlink()
    monkeypatch.setattr(ao.training.identity, "version", lambda _: "99")
    train(recipe, data=packed, out=tmp_path / "out", progress=False, resume=True)
    assert any("now 99; what follows may differ" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"learning_rate": 1e-3}, r"run: train\.learning_rate was 0\.005, got 0\.001; undo"),
        ({"steps": 7, "seed": 1}, r"run: train\.seed was 0, got 1; train\.steps was 6, got 7; undo"),
        ({"tokens_per_step": 512}, r"run: train\.tokens_per_step was null, got 512; undo"),
    ],
    ids=["rate", "steps", "tokens"],
)
def test_another_run_is_not_resumed(changes, problem, packed, tmp_path):
    train(recipe_of(save_every=2), data=packed, out=tmp_path / "out", progress=False)
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(ValueError, match=problem):
        train(recipe_of(save_every=2, **changes), data=packed, out=tmp_path / "out", resume=True, progress=False)
    # What no loss depends on may change.
    train(recipe_of(save_every=3, log_every=1), data=packed, out=tmp_path / "out", resume=True, progress=False)


def test_budgets_and_cache_may_change_where_memory_ran_out(packed, tmp_path, caplog):
    recipe = recipe_of(save_every=2)
    whole = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    (tmp_path / "out" / "training.json").unlink()
    collect(recipe.model, wanted_units(recipe, data=packed), out=tmp_path / "acts", dtype="F32")
    changes = {"tokens_per_row": 150, "context_tokens_per_row": 100, "cache": str(tmp_path / "acts")}
    record = train(recipe_of(**changes), data=packed, out=tmp_path / "out", resume=True, progress=False)
    assert_allclose(record["losses"], whole["losses"], rtol=1e-5)
    (said,) = (text for text in caplog.messages if "last digits" in text)
    for part in ("train.tokens_per_row was 512, now 150", "context_tokens_per_row was 8192, now 100", "cache was null"):
        assert part in said


def test_rows_may_not_change_where_they_make_the_steps(packed, tmp_path):
    rows = {"tokens_per_step": 300, "save_every": 2}
    train(recipe_of(tokens_per_row=150, **rows), data=packed, out=tmp_path / "out", progress=False)
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(ValueError, match=r"train\.tokens_per_row was 150, got 300"):
        train(recipe_of(tokens_per_row=300, **rows), data=packed, out=tmp_path / "out", resume=True, progress=False)


# --- the held-out part, and the ways to train ------------------------------------------------------------------------


def test_the_held_out_part_shares_no_context_with_training(packed):
    dataset = PackedDataset.open(packed)
    training, held_out = split(dataset, 10, seed=0)
    assert len(training) + len(held_out) == len(dataset)
    assert 10 <= len(held_out) < 20
    assert not set(dataset.groups[training.indices]) & set(dataset.groups[held_out.indices])
    assert {held_out[at].id for at in range(len(held_out))} == {dataset[int(at)].id for at in held_out.indices}
    nothing = split(dataset, 0, seed=0)
    assert (len(nothing[0]), len(nothing[1])) == (len(dataset), 0)
    with pytest.raises(ValueError, match="nothing would be left to train on"):
        split(dataset, len(dataset), seed=0)


def test_a_control_shows_another_context_whatever_the_ranks(packed):
    _, held_out = split(PackedDataset.open(packed), 24, seed=0)
    ranks = [Ranks(rank=rank, world=2, device=torch.device("cpu")) for rank in range(2)]
    points, donors = share_of(held_out, Ranks(rank=0, world=1, device=torch.device("cpu")))
    pairs = {point.id: donor.id for point, donor in zip(points, donors, strict=True)}
    others = [share_of(held_out, here) for here in ranks]
    assert {p.id: d.id for mine in others for p, d in zip(*mine, strict=True)} == pairs
    group_of = {held_out[index].id: group for index, group in enumerate(held_out.groups.tolist())}
    for point, donor in zip(points, donors, strict=True):
        assert group_of[point.id] != group_of[donor.id]
        assert set(point.layers) == set(donor.layers)


def test_a_later_run_in_the_same_folder_is_the_one_resumed(packed, tmp_path, monkeypatch):
    train(recipe_of(), data=packed, out=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"another run: train\.steps was 6, got 8"):
        train(recipe_of(steps=8), data=packed, out=tmp_path / "out", resume=True, progress=False)
    step, done = Learner.step, iter(range(10**6))

    def dying(self, *args, **kwargs):
        if next(done) == 5:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dying)
        with pytest.raises(Killed):
            train(recipe_of(steps=8, save_every=2), data=packed, out=tmp_path / "out", progress=False)
    record = train(recipe_of(steps=8, save_every=2), data=packed, out=tmp_path / "out", resume=True, progress=False)
    assert record["steps"] == 8


def test_a_mean_over_examples_weighs_each_alike(packed, tmp_path):
    model = bare(model_folder("demo"))
    points = first_step(packed)
    each = [loss_by_hand(model, model, [point]) for point in points]
    found = losses(packed, tmp_path / "out", steps=1, loss="per_example_mean", tokens_per_row=150)
    # One datapoint's loss by hand is the mean over its answer.
    assert found == [pytest.approx(np.mean(each), rel=1e-5)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_give_the_same_losses(plain, packed, tmp_path, monkeypatch):
    """Two of them, one of each kind, traced, and run without a compiler; rows are filled up to 256 tokens."""
    monkeypatch.setattr(step, "compile_blocks", lambda layers: compile_blocks(layers[:2]))
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled(*args, backend="aot_eager", **kwargs))
    monkeypatch.setattr(ao.train, "check_learner", lambda *_: None)
    found = losses(packed, tmp_path / "out", compile=True, steps=2, warmup=1.0)
    assert_allclose(found, losses(packed, tmp_path / "plain", steps=2, warmup=1.0), rtol=1e-4)


def test_steps_of_a_token_budget(packed, tmp_path):
    record = train(
        recipe_of(tokens_per_step=300, tokens_per_row=150), data=packed, out=tmp_path / "out", progress=False
    )
    assert record["steps"] == STEPS
    assert record["input_tokens"] <= STEPS * 300


@pytest.mark.parametrize("share", [1, 2])
def test_a_cache_gives_the_losses_of_looking_ahead(share, plain, packed, tmp_path, monkeypatch):
    """One that holds all contexts, or every second one: what it lacks is collected."""
    recipe = recipe_of()
    units = [unit.only(np.flatnonzero(unit.wanted.contexts % share == 0)) for unit in wanted_units(recipe, data=packed)]
    collect(recipe.model, units, out=tmp_path / "acts", dtype="F32")
    read: list[int] = []

    def counted(target, arch, reads, **kwargs):
        read.append(len(reads))
        return Reading(target, arch, reads, **kwargs)

    monkeypatch.setattr(ao.training.lookahead, "Reading", counted)
    found = losses(packed, tmp_path / "out", cache=str(tmp_path / "acts"))
    assert 0 < sum(read) < plain[0]["examples"] if share > 1 else not read
    assert_allclose(found, plain[0]["losses"], rtol=1e-5)


@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        ("adapter", "the adapter does nothing"),
        ("injection", "the injection does nothing"),
        ("packing", "they see each other"),
    ],
)
def test_the_self_test_names_what_is_broken(breaks, problem, packed, tmp_path, monkeypatch):
    row_loss = Learner.row_loss

    def broken(self, points, vectors):
        if breaks == "adapter":
            with as_target(self.model):
                loss, counts = row_loss(self, points, vectors)
            return loss, counts
        if breaks == "injection":
            vectors = {name: torch.ones_like(each) for name, each in vectors.items()}
        loss, counts = row_loss(self, points, vectors)
        return (loss * 1.1, counts) if breaks == "packing" and len(points) > 1 else (loss, counts)

    monkeypatch.setattr(Learner, "row_loss", broken)
    with pytest.raises(RuntimeError, match=problem):
        losses(packed, tmp_path / "out")


def test_the_log_tells_rates_and_scores(packed, tmp_path):
    train(recipe_of(log_every=2, held_out=8, eval_every=3), data=packed, out=tmp_path / "out", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert lines[0].keys() >= {
        *("loss", "gradient_norm", "learning_rate", "examples_per_second", "tokens_per_second", "mfu", "hfu"),
        *("tflops", "peak_memory_bytes", "data_wait", "target_share"),
    }
    assert lines[0]["examples_per_second"] > 0
    # A score's line tells the rates, too, also where it is none of every `log_every` steps.
    assert lines[1].keys() == lines[0].keys() | {"held_out_loss", "held_out_loss_shuffled", "held_out_gain"}
    with pytest.raises(ModuleNotFoundError, match=r"train\.track names 'wandb'"):
        losses(packed, tmp_path / "other", track=("wandb",))


@pytest.mark.parametrize("fails_at", ["plan", "trackers", "collecting"])
def test_a_start_that_fails_leaves_an_earlier_run(fails_at, packed, tmp_path, monkeypatch):
    recipe, out = recipe_of(steps=3, held_out=8, eval_every=1, save_every=1), tmp_path / "out"
    train(recipe, data=packed, out=out, progress=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changes = {"plan": {"examples_per_step": 100}, "trackers": {"track": ("wandb",)}, "collecting": {}}[fails_at]

    def fail(*args, **kwargs):
        raise Killed

    # Settings are looked at before the model is loaded, which here cannot be.
    monkeypatch.setattr(ao.train, "LookAhead" if fails_at == "collecting" else "load_replica", fail)
    with pytest.raises({"plan": ValueError, "trackers": ModuleNotFoundError, "collecting": Killed}[fails_at]):
        train(recipe_of(seed=1, **changes), data=packed, out=out, progress=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_score_that_is_not_finite_is_never_the_best(packed, tmp_path, monkeypatch):
    own, calls = Learner.losses, iter(range(10**6))

    def broken(self, rows, vectors):
        found = own(self, rows, vectors)
        return math.nan if next(calls) == 0 else found

    monkeypatch.setattr(Learner, "losses", broken)
    recipe = recipe_of(steps=2, held_out=8, eval_every=1, save_every=1)
    record = train(recipe, data=packed, out=tmp_path / "out", progress=False)
    first, last = (json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert first["held_out_loss"] is None
    assert record["best_held_out"] == {"step": 2, "loss": last["held_out_loss"]}


def test_recomputed_tokens_are_added_up_row_by_row(packed, tmp_path, monkeypatch):
    """Of rows that recompute as many blocks as they have tokens, up to all."""
    monkeypatch.setattr(Recompute, "blocks", lambda self, tokens: min(self.num_blocks, tokens // 40))
    changes = {"steps": 2, "tokens_per_row": 150}
    record = train(recipe_of(**changes), data=packed, out=tmp_path / "out", progress=False)
    here = Ranks(rank=0, world=1, device=torch.device("cpu"))
    found = windows(PackedDataset.open(packed), recipe_of(**changes).train, here)
    tokens = [sum(len(point.input_ids) for point in points) for _, w in found for rows in w for points in rows]
    shares = [min(6, each // 40) / 6 for each in tokens]
    assert len(set(shares)) > 1
    assert record["recomputed_tokens"] == pytest.approx(sum(map(np.multiply, tokens, shares)), abs=0.01)
