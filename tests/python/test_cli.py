"""The command line: every stage on a small world, one JSON object on stdout, and errors that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import ao.train
from ao.cli import main, pack_main
from ao.config import load_recipe
from ao.demo import world
from ao.shards import PackedDataset

RECIPE = """
[model]
name = "demo"
precision = "fp32"
device = "cpu"

[data]
out = "packed"

[[data.sources]]
name = "trait"
kind = "latentqa"
path = "world/train/latentqa"
count = 24
reads = [{ share = 0.5, all = true }, { share = 0.5, window = [1, 3], before_end = [0, 4] }]

[[data.sources]]
name = "texts"
kind = "context_prediction"
path = "world/train/texts.jsonl"
count = 8
window = [1, 4]
predict = [1, 3]

[train]
out = "adapter"
steps = 3
examples_per_step = 8
rank = 2
alpha = 4
learning_rate = 5e-3

[eval]
out = "eval"
bootstrap = 50
max_new_tokens = 3

[[eval.tasks]]
name = "trait"
count = 10
[[eval.tasks.sources]]
name = "trait"
kind = "latentqa"
path = "world/heldout/latentqa"

[[eval.tasks]]
name = "texts"
scorer = "token_f1"
count = 6
[[eval.tasks.sources]]
name = "texts"
kind = "context_prediction"
path = "world/heldout/texts.jsonl"
window = [1, 4]
predict = [1, 3]
"""
QUESTION = "What mood is the assistant in?"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*args: object, entry: Callable[[Sequence[str]], None] = main) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            entry([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else -1
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the files it names."""
    folder = tmp_path_factory.mktemp("project")
    world.write_files(folder / "world", seed=0, conversations=20, statements=2, texts=20, heldout=20)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def packed(project: Path) -> Path:
    pack_main([str(project / "recipe.toml"), "--out", str(project / "packed")])
    return project / "packed"


@pytest.fixture(scope="module")
def adapter(project: Path, packed: Path) -> Path:
    main(["train", str(project / "recipe.toml"), "--data", str(packed), "--out", str(project / "adapter")])
    return project / "adapter"


@pytest.fixture
def broken(tmp_path: Path, project: Path) -> Callable[[str, str], Path]:
    """The recipe with a part of its text replaced, beside links to the same files."""

    def write(old: str, new: str) -> Path:
        assert old in RECIPE
        (tmp_path / "world").symlink_to(project / "world")
        (tmp_path / "recipe.toml").write_text(RECIPE.replace(old, new))
        return tmp_path / "recipe.toml"

    return write


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def one_object(out: str) -> dict[str, Any]:
    assert out.count("\n") == 1
    return json.loads(out)


# --- each stage by itself --------------------------------------------------------------------------------------------


def test_pack_tells_what_it_packed(run, project, tmp_path):
    code, out, _ = run(project / "recipe.toml", "--out", tmp_path / "a", "--json", entry=pack_main)
    summary = one_object(out)
    assert code == 0
    assert {name: counts["offered"] for name, counts in summary["sources"].items()} == {"trait": 24, "texts": 8}
    assert summary["examples"] == 32 - sum(summary["drops"].values())
    assert len(PackedDataset.open(tmp_path / "a", verify=True)) == summary["datapoints"]
    code, out, _ = run("pack", project / "recipe.toml", "--out", tmp_path / "b")
    assert code == 0
    assert f"{summary['examples']} examples of 32, {summary['datapoints']} datapoints" in out
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    # A flag wins over the recipe.
    code, out, _ = run(project / "recipe.toml", "--out", tmp_path / "c", "--data.seed", 7, "--json", entry=pack_main)
    assert PackedDataset.open(tmp_path / "c").manifest["config"]["seed"] == 7


def test_parts_are_merged_to_the_same_bytes(run, project, tmp_path):
    args = [project / "recipe.toml", "--data.examples-per-shard", 8]
    assert run(*args, "--out", tmp_path / "whole", entry=pack_main)[0] == 0
    for part in ("1/2", "0/2"):
        code, out, _ = run(*args, "--out", tmp_path / "parts", "--part", part, entry=pack_main)
        assert code == 0
        assert f"parts.partial: part {part}: " in out
        if part == "1/2":
            refused(run, [*args, "--out", tmp_path / "parts", "--merge"], 2, "parts are missing", entry=pack_main)
    code, out, _ = run(*args, "--out", tmp_path / "parts", "--merge", entry=pack_main)
    assert code == 0
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    refused(run, [*args, "--part", "2/2"], 2, "--part '2/2': expected i/n", entry=pack_main)
    refused(run, [*args, "--out", tmp_path / "none", "--merge"], 2, "build its parts first", entry=pack_main)


def test_train_writes_an_adapter_and_how_it_was_made(run, project, packed, tmp_path):
    args = ("train", project / "recipe.toml", "--data", packed, "--out", tmp_path / "adapter", "--train.steps", 2)
    code, out, _ = run(*args, "--json")
    record = one_object(out)
    assert not {"losses", "first_rank"} & set(record)
    assert (code, record["steps"], record["examples"], record["ranks"]) == (0, 2, 16, 1)
    assert files(tmp_path / "adapter") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "log.jsonl",
        "ao_config.json",
        "recipe.toml",
        "training.json",
    }
    recipe = load_recipe(tmp_path / "adapter" / "recipe.toml")
    assert (recipe.train.steps, recipe.train.rank) == (2, 2)
    code, out, _ = run(*args)
    assert (code, out.count("\n")) == (0, 1)
    assert "2 steps, last loss " in out


def test_ask_prints_answers_with_their_controls(run, adapter):
    asked = ("ask", "Look at my red drum.", QUESTION, "--adapter", adapter)
    code, out, _ = run(*asked, "--system", "You feel calm.", "--choices", "calm", "angry", "--layer", "all", "--json")
    answers = one_object(out)["answers"]
    assert code == 0
    assert [answer["layer"] for answer in answers] == [1, 3, 4]
    for answer in answers:
        assert answer["confidence"] == max(answer["probabilities"].values())
        assert set(answer["probabilities"]) == {"calm", "angry"}
        assert answer["control"]["probabilities"] != answer["probabilities"]
    code, out, _ = run(*asked, "--probe", "token:-1", "--layer", 0.5, "--choices", "calm", "angry", "--control", "none")
    assert code == 0
    assert out.startswith("layer 3: ")
    assert "control" not in out
    code, out, _ = run(*asked, "--raw", "--control", "text")
    assert (code, out.count("[control: ")) == (0, 1)


def test_the_parts_of_a_prompt_that_are_read_decide_the_answer(run, adapter):
    def probabilities(*flags: object) -> dict[str, float]:
        flags = ("--adapter", adapter, "--choices", "calm", "angry", "--control", "none", "--json", *flags)
        _, out, _ = run("ask", "Look at my red drum.", QUESTION, *flags)
        return one_object(out)["answers"][0]["probabilities"]

    found = [
        probabilities(*flags)
        for flags in ((), ("--raw",), ("--system", "You feel calm."), ("--probe", "token:2"), ("--layer", "1"))
    ]
    assert len({tuple(each.values()) for each in found}) == len(found)


def test_eval_scores_every_task_beside_its_controls(run, project, adapter, tmp_path):
    args = ("eval", project / "recipe.toml", "--adapter", adapter)
    code, out, _ = run(*args, "--out", tmp_path / "a", "--json")
    report = one_object(out)
    assert code == 0
    assert [(task["name"], task["n"], task["metric"]) for task in report["tasks"]] == [
        ("trait", 10, "accuracy"),
        ("texts", 6, "token_f1"),
    ]
    for task in report["tasks"]:
        assert set(task["controls"]) == {"no_activation", "shuffled", "text", "untrained"}
        best = max(control["score"] for control in task["controls"].values())
        assert task["gain"] == pytest.approx(task["score"] - best, abs=2e-6)
    assert report == json.loads((tmp_path / "a" / "report.json").read_text())
    assert {"records.jsonl", "report.md", "report.html"} <= files(tmp_path / "a")
    code, out, _ = run(*args, "--out", tmp_path / "b")
    assert code == 0
    assert "trait" in out
    assert json.loads((tmp_path / "b" / "report.json").read_text())["tasks"] == report["tasks"]


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(run: Run, args: Sequence[object], code: int, *words: str, entry: Any = main) -> None:
    """The command fails alike with and without --json, and says these words."""
    found, out, err = run(*args, entry=entry)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in err
    found, out, err = run(*args, "--json", entry=entry)
    problem = one_object(out)
    assert (found, problem["exit_code"]) == (code, code)
    assert problem["error"] in err
    assert all(word in problem["error"] for word in words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[train]", "[train", ["recipe.toml: not a TOML file"]),
        ("steps = 3", "stepz = 3", ["train.stepz: unknown key", "--help"]),
        ("steps = 3", 'steps = "many"', ["train.steps", "'many'"]),
        ("steps = 3", "steps = 0", ["train.steps must be positive, got 0"]),
        ("count = 24", "cuont = 24", ["cuont: unknown key"]),
        (
            'kind = "latentqa"\npath = "world/train',
            'kind = "latent"\npath = "world/train',
            ["data.sources.0", "latentqa"],
        ),
        ('path = "world/train/texts.jsonl"\n', "", ["path"]),
        ("[data]\n", "[data]\nread_depths = [1.5]\n", ["data.read_depths: a depth lies in [0, 1), got 1.5"]),
        ('path = "world/train/latentqa"', 'path = "nowhere"', ["'trait'", "nowhere"]),
        (
            "count = 24",
            'types = ["control"]',
            ["no control.json"],
        ),
        ('name = "demo"', 'name = "./no-model"', ["model './no-model': there is no such folder"]),
    ],
)
def test_bad_recipes_leave_nothing(run, broken, tmp_path, old, new, words):
    recipe = broken(old, new)
    before = files(tmp_path)
    refused(run, [recipe, "--out", tmp_path / "out"], 2, *words, entry=pack_main)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"id": "b", "context": "x", "question": "q"}, ['"b"', "answer"]),
        ({"id": "b", "context": "x", "question": "q", "answer": "a", "anser": 1}, ["line 2", "anser"]),
        ({"id": "b", "context": "", "question": "q", "answer": "a"}, ['"b"', "context"]),
        ({"id": "b", "context": "x", "question": "q", "answer": "a", "layers": [6]}, ['"b"', "6"]),
        ({"id": "b", "context": "x", "question": "q", "answer": "a", "positions": [9]}, ['"b"', "9"]),
        ({"id": "a", "context": "x", "question": "q", "answer": "a"}, ['"a"', "unique"]),
    ],
)
def test_bad_examples_leave_nothing(run, tmp_path, example, words):
    good = {"id": "a", "context": "The queen sings.", "question": "q", "answer": "a"}
    (tmp_path / "records.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(example)}\n")
    (tmp_path / "recipe.toml").write_text(
        '[model]\nname = "demo"\n[[data.sources]]\nname = "r"\nkind = "records"\npath = "records.jsonl"\n'
    )
    before = files(tmp_path)
    refused(run, [tmp_path / "recipe.toml", "--out", tmp_path / "out"], 2, 'source "r"', *words, entry=pack_main)
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", ["pack", "train", "eval"])
def test_a_missing_recipe_is_named(run, command, tmp_path):
    refused(run, [command, tmp_path / "none.toml"], 2, "none.toml", "no such recipe")


@pytest.mark.parametrize("command", ["pack", "train", "eval"])
def test_a_recipe_that_is_not_called_toml_is_refused(run, command, project, tmp_path):
    """Its values would not become the flags' defaults, and those of the package would win over it."""
    shutil.copy(project / "recipe.toml", tmp_path / "recipe")
    refused(run, [command, tmp_path / "recipe", "--out", tmp_path / "out"], 2, "recipe", ".toml")


def test_pack_touches_nothing_that_is_not_its_own(run, project, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(run, [project / "recipe.toml", "--out", tmp_path / "out"], 2, "is no packed data set", entry=pack_main)
    assert files(tmp_path) == {"out", "out/thesis.txt"}


def test_training_on_no_or_damaged_data_is_refused(run, project, packed, tmp_path):
    args = ["train", project / "recipe.toml", "--out", tmp_path / "adapter", "--data"]
    refused(run, [*args, tmp_path / "none"], 2, "none: no manifest.json", "make one with ao-pack")
    cut = Path(shutil.copytree(packed, tmp_path / "cut"))
    shard = next(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(run, [*args, cut], 2, shard.name, "the shard is damaged, rerun ao-pack")
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["oracle"]["tokenizer"] = "f" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(run, [*args, other], 2, "other: packed for tokenizer ffffffff..", "rerun ao-pack or load the model")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "./nowhere"], ["'./nowhere'", "no such folder", "ao train"]),
        (["--adapter", "ADAPTER", "--layer", "deep"], ["--layer 'deep': expected an index", '"all"']),
        (["--adapter", "ADAPTER", "--layer", "2"], ["layer 2 was not read"]),
        (["--adapter", "ADAPTER", "--probe", "first"], ["probe 'first': expected token:INDEX"]),
        (["--adapter", "ADAPTER", "--probe", "token:400"], ["400"]),
        (["--adapter", "ADAPTER", "--choices", "Yes"], ["choices: expected at least two"]),
        (["--adapter", "ADAPTER", "--raw", "--system", "You feel calm."], ["--system", "--raw"]),
        (["--adapter", "ADAPTER", "--base", "./nowhere"], ["model './nowhere'", "no such folder"]),
    ],
)
def test_bad_questions_are_refused(run, adapter, flags, words):
    flags = [adapter if flag == "ADAPTER" else flag for flag in flags]
    refused(run, ["ask", "Look at my drum.", QUESTION, *flags], 2, *words)


def test_eval_without_tasks_or_adapter_is_refused(run, project, adapter, broken, tmp_path):
    recipe = broken(RECIPE[RECIPE.index("[[eval.tasks]]") :], "")
    refused(run, ["eval", recipe, "--adapter", adapter, "--out", tmp_path / "out"], 2, "eval.tasks is empty")
    args = ["eval", project / "recipe.toml", "--adapter", "./nowhere", "--out", tmp_path / "out"]
    refused(run, args, 2, "'./nowhere'", "no such folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["frobnicate"],
        ["train"],
        ["ask", "a prompt without a question"],
        ["ask", "a", "b", "--precision", "fp99"],
        ["ask", "a", "b", "--control", "nonsense"],
        ["train", "RECIPE", "--train.steps", "many"],
        ["train", "RECIPE", "--train.stepz", "3"],
    ],
)
def test_usage_errors_exit_with_two(run, project, args):
    args = [project / "recipe.toml" if arg == "RECIPE" else arg for arg in args]
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err
    code, out, _ = run(*args, "--json")
    problem = one_object(out)
    assert (code, problem["exit_code"], problem["kind"]) == (2, 2, "UsageError")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device", "adapter"), 3),
        (RuntimeError("rank 1 of 2 failed"), 3),
        (MemoryError("no memory"), 3),
        (PermissionError(13, "Permission denied", "adapter"), 3),
        (ModuleNotFoundError("train.track names 'wandb', which is not installed"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_at_run_time_have_their_own_codes(run, project, packed, monkeypatch, error, code):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(ao.train, "train", fail)
    words = ["interrupted"] if code == 130 else [str(error)]
    refused(run, ["train", project / "recipe.toml", "--data", packed], code, *words)


def test_a_folder_that_is_no_adapter_is_not_written_into(run, project, packed, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    args = ["train", project / "recipe.toml", "--data", packed, "--out", tmp_path]
    refused(run, args, 2, "holds files that are no adapter; choose another --out")
    assert files(tmp_path) == {"notes.txt"}


# --- packing: what is there already, and what does not fit together --------------------------------------------------


def test_a_merge_takes_only_parts_of_its_own_recipe(run, project, tmp_path):
    """Its flags decide what it is: other settings, or another data set in OUT, are refused before anything is touched."""
    args = [project / "recipe.toml", "--out", tmp_path / "out"]
    for part in ("0/2", "1/2"):
        assert run(*args, "--part", part, entry=pack_main)[0] == 0
    before = files(tmp_path)
    other = [*args, "--data.seed", 99, "--merge"]
    refused(run, other, 2, "part-0-of-2.json", "another config (differs in seed)", "merge with", entry=pack_main)
    for flags in (["--part", "1/2"], ["--resume"], ["--max-errors", 4]):
        refused(run, [*args, "--merge", *flags], 2, f"--merge with {flags[0]}: a merge builds nothing", entry=pack_main)
    assert files(tmp_path) == before
    assert run(project / "recipe.toml", "--out", tmp_path / "kept", "--data.seed", 5, entry=pack_main)[0] == 0
    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept.partial")
    args = [project / "recipe.toml", "--out", tmp_path / "kept", "--merge"]
    refused(run, args, 2, "holds a data set with another config (differs in seed)", entry=pack_main)
    assert PackedDataset.open(tmp_path / "kept").manifest["config"]["seed"] == 5


def test_resume_looks_at_what_is_there(run, project, packed, tmp_path):
    """A whole data set is left alone; one that lacks a shard, or has half of one, is built anew."""
    out = Path(shutil.copytree(packed, tmp_path / "packed"))
    args = (project / "recipe.toml", "--out", out, "--resume", "--json")
    assert one_object(run(*args, entry=pack_main)[1])["way"] == "was there"
    shard = next(out.glob("shard-*"))
    whole = shard.read_bytes()
    for spoil in (shard.unlink, lambda: shard.write_bytes(whole[:-8])):
        spoil()
        code, printed, _ = run(*args, entry=pack_main)
        assert (code, one_object(printed)["way"]) == (0, "packed")
        assert shard.read_bytes() == whole


def test_errors_cannot_be_fewer_than_none(run, project, tmp_path):
    args = [project / "recipe.toml", "--out", tmp_path / "out", "--max-errors", -1]
    refused(run, args, 2, "max_errors must not be negative, got -1", entry=pack_main)
    assert not files(tmp_path)


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_data_set_has_a_name(run, project, out):
    for more in ([], ["--merge"]):
        args = [project / "recipe.toml", "--out", out, *more]
        refused(run, args, 2, f"out {out!r}: expected a folder with a name", entry=pack_main)


def test_a_hub_out_of_reach_is_no_bad_input(run, tmp_path, monkeypatch):
    import datasets

    def load(*args: object, **values: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = '[[data.sources]]\nname = "s"\nkind = "context_prediction"\ndataset = "nobody/nothing"\n'
    (tmp_path / "recipe.toml").write_text(source)
    args = [tmp_path / "recipe.toml", "--out", tmp_path / "out"]
    words = "error: source 's': data set nobody/nothing (train): the Hub cannot be reached"
    code, _, err = run(*args, entry=pack_main)
    assert (code, err.startswith(words)) == (3, True)


@pytest.mark.parametrize("command", [["--help"], ["plan", "--help"]])
def test_help_into_a_closed_pipe_is_quiet(command):
    code = "import sys; from ao.cli import main; main(sys.argv[1:])"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *command], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ranks_that_would_share_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "packed"])
    assert stop.value.code == 2
    assert "error: inspect: 2 ranks were started, but only train and collect share" in capsys.readouterr().err
