"""Plans: rows and steps over a packed data set, their file, their cursor and their command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

import tiny
from ao._ao import AoError, pack_rows, plan
from ao.cli import main
from ao.config import parse_recipe
from ao.inspection import inspect, text
from ao.manifest import canonical_json, with_own_digest
from ao.pack import pack
from ao.plan import Plan, PlanSettings, compare
from ao.shards import PackedDataset

QUESTIONS = (
    "Which?",
    "Which of the many cities is it that this is about?",
    "Is it one?",
    "Say where it lies, if anywhere.",
)
ROWS = PlanSettings(tokens_per_row=256, window=4)
EXAMPLES = PlanSettings(tokens_per_row=256, examples_per_step=16, window=4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 examples of 50 contexts, on three layers each."""
    root = tmp_path_factory.mktemp("planned")
    model = tiny.save_model(root / "model")
    records = [
        {
            "id": f"e{i}",
            "context": f"City {i // 3} " * (1 + i // 3 % 5),
            "question": QUESTIONS[i % 4],
            "answer": f"City {i}",
        }
        for i in range(150)
    ]
    (root / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    data = {"sources": [source], "examples_per_shard": 60, "layers_per_example": "each"}
    pack(parse_recipe({"model": {"name": str(model)}, "data": data}), root=root, out=root / "packed")
    return root / "packed"


@pytest.fixture(scope="module")
def data(packed: Path) -> PackedDataset:
    return PackedDataset.open(packed)


def flat(rows: list[np.ndarray]) -> list[int]:
    return sorted(np.concatenate(rows).tolist())


# --- rows and steps --------------------------------------------------------------------------------------------------


def test_rows_are_full_and_steps_whole(data: PackedDataset) -> None:
    made = Plan.make(data, replace(ROWS, tokens_per_step=512, ranks=2))
    steps = list(made.steps())
    assert len(steps) == len(made) > 20
    seen = [index for rows in steps for row in rows for index in row.tolist()]
    assert len(set(seen)) == len(seen)
    assert all(len(rows) == 2 and max(data.lengths[row].sum() for row in rows) <= 256 for rows in steps)
    assert made.fill > 0.95
    assert made.row_tokens.tolist() == [data.lengths[row].sum() for rows in steps for row in rows]
    assert made.row_context_tokens.tolist() == [data.context_lengths[row].sum() for rows in steps for row in rows]
    found = made.statistics()
    assert found["datapoints"] + found["left_out"] == len(data)
    assert found["tokens"] == data.lengths[seen].sum()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("settings", [replace(ROWS, tokens_per_step=1024), EXAMPLES], ids=["tokens", "examples"])
def test_the_data_order_is_the_same_for_any_number_of_ranks(settings: PlanSettings, data: PackedDataset) -> None:
    one = Plan.make(data, settings)
    for ranks in (2, 4):
        several = one.for_ranks(data, ranks)
        assert several.settings.ranks == ranks
        assert [flat(rows) for rows in several.steps()] == [flat(rows) for rows in one.steps()]
        by_rank = [list(several.steps(rank=rank)) for rank in range(ranks)]
        assert all(rows for steps in by_rank for rows in steps)
        for whole, *parts in zip(several.steps(), *by_rank, strict=True):
            assert [row.tolist() for row in whole] == [row.tolist() for part in parts for row in part]
    assert [flat(rows) for rows in one.steps()] != [
        flat(rows) for rows in Plan.make(data, replace(settings, epoch=1)).steps()
    ]


def test_a_context_falls_into_one_window(data: PackedDataset) -> None:
    made = Plan.make(data, replace(EXAMPLES, examples_per_step=18))
    assert len(made) == 25
    windows = list(made.windows())
    assert [len(window) for window in windows] == [4, 4, 4, 4, 4, 4, 1]
    run = 0
    for window in windows:
        indices = np.concatenate([row for rows in window for row in rows])
        run += sum(
            data.context_lengths[indices[data.groups[indices] == group]].max() for group in set(data.groups[indices])
        )
    alone = int(data.context_lengths[made.order].sum())
    assert made.context_tokens["alone"] == alone
    assert made.context_tokens["in_windows"] == made.context_tokens["in_ranks"] == run
    assert made.sharing["at_all"] >= made.sharing["in_windows"] == alone / run > 8


def test_steps_go_on_from_a_cursor(data: PackedDataset) -> None:
    made = Plan.make(data, EXAMPLES)
    whole = [flat(rows) for rows in made.steps()]
    for start in (0, 1, 3, 4, len(made) - 1, len(made)):
        assert [flat(rows) for rows in made.steps(start)] == whole[start:]
        windows = [[flat(rows) for rows in window] for window in made.windows(start)]
        assert [step for window in windows for step in window] == whole[start:]
        assert all(len(window) == 4 for window in windows[1:-1])
    assert [flat(rows) for window in made.windows(2, end=7) for rows in window] == whole[2:7]


def test_padded_rows_are_rectangles(data: PackedDataset) -> None:
    made = Plan.make(data, replace(ROWS, padded=True))
    assert all(len(row) * data.lengths[row].max() <= 256 for rows in made.steps() for row in rows)


def test_other_limits_hold(data: PackedDataset) -> None:
    made = Plan.make(data, replace(ROWS, context_tokens_per_row=60, examples_per_row=4))
    assert made.row_context_tokens.max() <= 60
    assert np.diff(made.row_offsets).max() <= 4


def test_what_is_longer_than_a_row_is_named_or_stands_alone(data: PackedDataset) -> None:
    longest = int(data.lengths.max())
    short = replace(ROWS, tokens_per_row=longest - 1)
    first = data[int(np.flatnonzero(data.lengths == longest)[0])].id
    with pytest.raises(ValueError, match=rf"'{first}' has {longest} input .*too many for a row of {longest - 1}, and"):
        Plan.make(data, short)
    made = Plan.make(data, replace(short, longer_alone=True))
    above = made.row_tokens > longest - 1
    assert above.any()
    assert (np.diff(made.row_offsets)[above] == 1).all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"examples_per_step": 2, "ranks": 3}, "at least ranks = 3, got 2"),
        ({"tokens_per_step": 300}, "multiple of tokens_per_row"),
        ({"tokens_per_step": 256, "examples_per_step": 8}, "one of them"),
        ({"window": 0}, "window"),
        ({"examples_per_row": 0}, "at least 1"),
        ({"seed": -1}, "plan: seed must not be negative, got -1"),
        ({"epoch": -1}, "plan: epoch must not be negative, got -1"),
        ({"tokens_per_row": 0}, "plan: tokens_per_row must be positive, got 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_refused(changes: dict[str, Any], problem: str, data: PackedDataset) -> None:
    with pytest.raises(ValueError, match=problem):
        Plan.make(data, replace(ROWS, **changes))


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_file_that_anybody_reads(data: PackedDataset, tmp_path: Path) -> None:
    made = Plan.make(data, replace(EXAMPLES, ranks=2))
    made.save(tmp_path / "a.safetensors")
    Plan.make(data, replace(EXAMPLES, ranks=2)).save(tmp_path / "b.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == (tmp_path / "b.safetensors").read_bytes()
    assert len(content) < 20_000
    arrays = load(content)
    assert arrays["order"].tolist() == made.order.tolist()
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "order": "int32",
        "row_offsets": "int64",
        "row_ranks": "int32",
        "row_tokens": "int32",
        "row_context_tokens": "int32",
        "step_offsets": "int64",
    }
    again = Plan.load(tmp_path / "a.safetensors", data)
    assert again.settings == made.settings
    assert again.statistics() == made.statistics()
    pairs = zip(again.steps(3, rank=1), made.steps(3, rank=1), strict=True)
    assert all([row.tolist() for row in a] == [row.tolist() for row in b] for a, b in pairs)
    assert [flat(rows) for rows in again.for_ranks(data, 4).steps()] == [flat(rows) for rows in made.steps()]


def test_a_plan_for_other_data_is_refused(packed: Path, data: PackedDataset, tmp_path: Path) -> None:
    Plan.make(data, ROWS).save(tmp_path / "plan.safetensors")
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "more": 1}))
    opened = PackedDataset.open(other)
    with pytest.raises(
        ValueError, match=r"plan: made for a data set whose manifest\.json has sha256 .*make the plan again"
    ):
        Plan.load(tmp_path / "plan.safetensors", opened)
    with pytest.raises(ValueError, match="made for a data set"):
        Plan.load(tmp_path / "plan.safetensors").for_ranks(opened, 1)


def damaged(path: Path, **changes: np.ndarray | dict[str, Any] | None) -> None:
    """Replace arrays of a plan or objects of its metadata, or leave arrays out, and give it the digest that it then has."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = {**json.loads(header["__metadata__"]["ao"]), "sha256": "0" * 64}
    described |= {name: value for name, value in changes.items() if isinstance(value, dict)}
    arrays = {**load(content), **{name: value for name, value in changes.items() if not isinstance(value, dict)}}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    path.write_bytes(with_own_digest(save(arrays, metadata={"ao": canonical_json(described)})))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"row_ranks": None}, "'row_ranks' is missing"),
        ({"order": np.zeros(3, np.int64)}, "'order' is not a list of int32"),
        ({"row_offsets": np.array([0, 5], np.int64)}, "'row_offsets' does not rise"),
        ({"step_offsets": np.array([], np.int64)}, "'step_offsets' does not rise"),
        ({"row_tokens": np.zeros(1, np.int32)}, "'row_tokens' has 1 entries"),
        ({"context_tokens": {"alone": None}}, "metadata at context_tokens.alone: Input should be a valid integer"),
        (
            {"data": {"manifest_sha256": "x", "datapoints": "450"}},
            "metadata at data.datapoints: Input should be a valid",
        ),
        ({"data": {}}, "metadata at data.manifest_sha256: Field required"),
        ({"settings": {"tokens_per_row": 9, "window": "x"}}, "metadata at settings.window: Input should be a valid"),
        ({"settings": {"tokens_per_row": 9, "window": 0}}, "metadata at settings: .*window must be positive, got 0"),
        ({"settings": {"tokens_per_row": 9, "ranks": 0}}, "metadata at settings: .*ranks must be positive, got 0"),
        ({"settings": {"tokens_per_row": 9, "cranks": 1}}, "metadata at settings.cranks: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_damaged_plan_is_refused(changes: dict[str, Any], problem: str, data: PackedDataset, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    Plan.make(data, ROWS).save(path)
    damaged(path, **changes)
    with pytest.raises(ValueError, match=problem):
        Plan.load(path)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("row_ranks", 1, "'row_ranks' is not made of numbers below 1"),
        ("row_ranks", -1, "'row_ranks' is not made of numbers below 1"),
        ("row_tokens", 0, "'row_tokens' has a row without tokens"),
        ("row_context_tokens", -7, "'row_context_tokens' has a row without tokens"),
    ],
)
def test_rows_that_no_plan_has_are_refused(
    name: str, value: int, problem: str, data: PackedDataset, tmp_path: Path
) -> None:
    path = tmp_path / "plan.safetensors"
    made = Plan.make(data, ROWS)
    made.save(path)
    changed = getattr(made, name).copy()
    changed[3] = value
    damaged(path, **{name: changed})
    with pytest.raises(ValueError, match=problem):
        Plan.load(path)


def test_every_flipped_bit_of_a_plan_is_found(data: PackedDataset, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    Plan.make(data, replace(EXAMPLES, ranks=2)).save(path)
    whole = path.read_bytes()
    assert inspect(path, check=True)["ok"]
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, header, 7), *range(header, len(whole), 97)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"plan\.safetensors"):
            Plan.load(path)
    result = inspect(path, check=True)
    assert (result["ok"], result["checked"]["steps"]) == (False, 0)
    assert "plan.safetensors: damaged: it has sha256" in text(result)


@pytest.mark.parametrize("wrong", [-1, 450, None])
def test_an_order_that_leads_nowhere_is_refused(wrong: int | None, data: PackedDataset, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    made = Plan.make(data, ROWS)
    made.save(path)
    order = made.order.copy()
    order[0] = order[1] if wrong is None else wrong
    damaged(path, order=order)
    with pytest.raises(ValueError, match="different numbers below 450"):
        Plan.load(path)


def test_metadata_that_lack_something_are_refused(data: PackedDataset, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    Plan.make(data, ROWS).save(path)
    described = {"kind": "plan", "schema": 2, "settings": {"tokens_per_row": 3}}
    path.write_bytes(save(load(path.read_bytes()), metadata={"ao": json.dumps(described)}))
    with pytest.raises(ValueError, match="its header has no sha256; make it again with ao plan"):
        Plan.load(path)


def test_other_files_are_no_plans(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such plan"):
        Plan.load(tmp_path / "none")
    (tmp_path / "text").write_text("not a plan")
    with pytest.raises(ValueError, match="text: not a plan"):
        Plan.load(tmp_path / "text")
    with pytest.raises(ValueError, match="expected a plan of schema 2, got kind None"):
        Plan.load(next(packed.glob("shard-*.safetensors")))


# --- the command -----------------------------------------------------------------------------------------------------


def test_budgets_are_compared(data: PackedDataset) -> None:
    small, large = compare(data, ROWS, [40, 512])
    assert small["plan"] is None
    assert small["longer"] == int((data.lengths > 40).sum()) > 0
    assert large["longer"] == 0
    assert large["plan"] == Plan.make(data, replace(ROWS, tokens_per_row=512)).statistics()


def test_the_command_compares_and_writes(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(packed), "--tokens-per-row", "40", "512"])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["tokens/row", "rows"]
    assert "impossible" in first
    assert second.split()[0] == "512"
    out = tmp_path / "plan.safetensors"
    main(["plan", str(packed), "--tokens-per-row", "512", "--examples-per-step", "16", "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    plan = Plan.load(out, PackedDataset.open(packed))
    assert plan.settings == replace(EXAMPLES, tokens_per_row=512, window=64)
    assert printed == {"budgets": [{"tokens_per_row": 512, "longer": 0, "plan": plan.statistics()}], "out": str(out)}
    for flags, code, words in (
        (["--out", str(tmp_path / "none")], 2, "expected one --tokens-per-row with --out, got 4"),
        (["--tokens-per-row", "512", "0"], 2, "tokens_per_row must be positive, got 0"),
        (["--epoch", "-1"], 2, "plan: epoch must not be negative, got -1"),
        (["--tokens-per-row", "8", "9"], 1, "impossible"),
        (["--examples-per-step", "451"], 1, "16384 impossible: 450 datapoints do not fill one step"),
        (
            ["--examples-per-step", "451", "--tokens-per-row", "512", "--out", str(tmp_path / "none")],
            2,
            "holds 450 datapoints with",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["plan", str(packed), *flags])
        assert stop.value.code == code
        assert words in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "none").exists()


# --- the extension ---------------------------------------------------------------------------------------------------


def test_rows_over_bare_lengths() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, size=5000).astype(np.int32)
    for window in (None, 500):
        order, offsets = (np.asarray(buffer) for buffer in pack_rows(lengths, 2048, window=window))
        assert (order.dtype, offsets.dtype) == (np.int32, np.int64)
        assert sorted(order.tolist()) == list(range(5000))
        assert np.add.reduceat(lengths[order], offsets[:-1]).max() <= 2048
        assert len(offsets) - 1 == -(-int(lengths.sum()) // 2048)
    with pytest.raises(AoError, match="example 0 has"):
        pack_rows(lengths + np.int32(2048), 2048)
    with pytest.raises((TypeError, BufferError)):
        pack_rows(lengths.astype(np.int64), 2048)


def test_wrong_columns_are_refused() -> None:
    lengths, groups = np.full(5, 9, np.int32), np.arange(5)
    settings = json.dumps({"tokens_per_row": 20, "tokens_per_step": 20, "window": 1, "ranks": 1, "seed": 0, "epoch": 0})
    assert len(np.asarray(plan(lengths, lengths, groups, settings)["order"])) == 4
    with pytest.raises(AoError, match="equally long"):
        plan(lengths, lengths, groups[:3], settings)
    with pytest.raises(AoError, match="unknown field"):
        plan(lengths, lengths, groups, settings.replace("window", "windows"))
