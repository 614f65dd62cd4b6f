"""The target's own answers, as a file of chats that context prediction reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from ao import rollouts as module
from ao.cli import main
from ao.config import ModelConfig, parse_recipe
from ao.pack import pack
from ao.rollouts import PERSONAS, rollouts
from ao.shards import PackedDataset

MODEL = ModelConfig(name="demo", precision="fp32", device="cpu")


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    chat = [{"role": "user", "content": "Where does the queen live?"}, {"role": "assistant", "content": "Far away."}]
    rows: list[object] = [{"text": f"Tell me about day {index}."} for index in range(20)]
    return write(tmp_path / "asked.jsonl", [*rows, {"id": "mine", "messages": chat}])


def answer(prompts: Path, out: Path, **values: Any) -> dict[str, Any]:
    return rollouts(MODEL, prompts=prompts, out=out, max_new_tokens=8, **values)


def test_answers_are_chats_with_personas_for_half(prompts: Path, tmp_path: Path) -> None:
    record = answer(prompts, tmp_path / "out.jsonl")
    chats = read(tmp_path / "out.jsonl")
    assert record["answered"] + record["empty"] == 21
    assert len(chats) == record["answered"] > 15
    assert {chat["id"] for chat in chats} <= {*(f"asked/{index}" for index in range(20)), "mine"}
    personas = [chat["messages"][0]["content"] for chat in chats if chat["messages"][0]["role"] == "system"]
    assert 4 < len(personas) < 17
    assert set(personas) <= set(PERSONAS)
    assert len(set(personas)) > 2
    for chat in chats:
        assert [turn["role"] for turn in chat["messages"]][-2:] == ["user", "assistant"]
        assert chat["messages"][-1]["content"].strip()
        assert "<" not in chat["messages"][-1]["content"]
    [mine] = [chat for chat in chats if chat["id"] == "mine"]
    assert mine["messages"][-2]["content"] == "Where does the queen live?"


def test_the_same_seed_gives_the_same_answers(prompts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        answer(prompts, tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_what_is_there_is_not_answered_again(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    out = tmp_path / "out.jsonl"
    answer(prompts, out, count=6)
    first = out.read_bytes()
    # A run that was killed while it wrote.
    out.write_bytes(first + b'{"id": "asked/6", "mess')
    record = answer(prompts, out)
    assert record["skipped"] == first.count(b"\n")
    assert out.read_bytes().startswith(first)
    ids = [chat["id"] for chat in read(out)]
    assert len(ids) == len(set(ids))
    assert answer(prompts, out)["answered"] <= record["empty"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "x"}, "row 1: expected a text under 'text' or a chat with a user turn, got 'None'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "row 1: expected a text"),
        ({"id": "first", "text": "x"}, "the id 'first' repeats"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, row: object, message: str) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"id": "first", "text": "Hello?"}, row])
    with pytest.raises(ValueError, match=message):
        answer(prompts, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_another_file_is_not_written_to(prompts: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"thesis": 1}])
    with pytest.raises(ValueError, match=r"other\.jsonl: line 1: not a line of `ao rollouts`"):
        answer(prompts, other)
    assert read(other) == [{"thesis": 1}]


def test_rollouts_are_read_within_the_answers(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[model]\nname = "demo"\nprecision = "fp32"\ndevice = "cpu"\n[[data.sources]]\nname = "own"\n'
        'kind = "context_prediction"\npath = "out.jsonl"\nwithin = "assistant"\nwindow = [1, 3]\npredict = [1, 2]\n'
    )
    (tmp_path / "personas.txt").write_text("You are a stone.\n\n")
    args = ["rollouts", str(tmp_path / "recipe.toml"), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")]
    main(
        [
            *args,
            "--personas",
            str(tmp_path / "personas.txt"),
            "--persona-share",
            "1",
            "--max-new-tokens",
            "12",
            "--json",
        ]
    )
    record = json.loads(capsys.readouterr().out)
    chats = {f"own/{row}": chat["messages"] for row, chat in enumerate(read(tmp_path / "out.jsonl"))}
    assert len(chats) == record["answered"] > 10
    assert {messages[0]["content"] for messages in chats.values()} == {"You are a stone."}
    recipe = parse_recipe(
        {
            "model": {"name": "demo"},
            "data": {
                "sources": [
                    {
                        "name": "own",
                        "kind": "context_prediction",
                        "path": "out.jsonl",
                        "within": "assistant",
                        "window": [1, 3],
                        "predict": [1, 2],
                    }
                ]
            },
        }
    )
    pack(recipe, root=tmp_path, out=tmp_path / "packed")
    data = PackedDataset.open(tmp_path / "packed")
    assert len(data) > 5
    for datapoint in data:
        messages = chats[datapoint.id.rsplit("/", 1)[0]]
        assert datapoint.answer.strip() in messages[-1]["content"]
