import json
import logging
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from ao.config import EvalConfig, ModelConfig, Recipe, TaskConfig, parse_recipe
from ao.decode import OraclePrompt
from ao.eval import run
from ao.eval.controls import CONDITIONS, CONTROLS
from ao.eval.report import console_table, html_page, markdown
from ao.eval.run import evaluate
from ao.eval.tasks import Item, Task, load_task
from ao.prompt import framer
from ao.residuals import Read

PERSONAS = ("poet", "pirate|x")
QUESTION = "Which <persona>?"
NUM_ITEMS = 40


class FakeFramer:
    def prompt(self, layers: list[int], num_positions: int, question: str) -> Any:
        class Prompt:
            ids = np.array([ord(char) for char in question], dtype=np.int32)
            placeholders = np.arange(len(layers) * num_positions, dtype=np.int32)

        return Prompt()


class FakeOracle:
    """Knows item k's answer from its vector, which holds k, with the adapter on; from nothing else."""

    def __init__(self) -> None:
        self.framer: Any = FakeFramer()

    def read_vectors(self, reads: Sequence[Read]) -> list[torch.Tensor]:
        return [torch.full((len(read.positions), 1), float(read.context_ids[0])) for read in reads]

    def _known(self, prompt: OraclePrompt, adapter: bool) -> str | None:
        if prompt.vectors_KD is None or not adapter:
            return None
        return answer_of(int(prompt.vectors_KD[0, 0]))

    def choice_log_probs(
        self,
        prompts: Sequence[OraclePrompt],
        choices: Sequence[Sequence[str]],
        *,
        adapter: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        found = []
        for prompt, options in zip(prompts, choices, strict=True):
            known = self._known(prompt, adapter)
            # Without activations the first choice, barely.
            odds = [0.9 if option == known else 0.1 for option in options] if known else [0.51, 0.49]
            found.append(np.log(odds) - 7)
            if progress is not None:
                progress(1)
        return found

    def generate(
        self,
        prompts: Sequence[OraclePrompt],
        *,
        max_new_tokens: int,
        adapter: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        assert max_new_tokens == 5
        return [f"the {known}" if (known := self._known(prompt, adapter)) else " " for prompt in prompts]


def answer_of(index: int) -> str:
    return PERSONAS[index % 2]


def task(scorer: Any) -> Task:
    items = [
        Item(
            id=f"item {index}",
            source=f"source {index % 4 // 2}",
            question=QUESTION,
            answer=answer_of(index),
            layers=(2,) if index < 10 else (11,),
            read=Read(context_ids=np.array([index]), layers=np.array([2]), positions=np.array([0])),
            prompt_ids=np.arange(5),
            placeholders=np.array([1]),
            read_text=" verily",
            context_text="all",
        )
        for index in range(NUM_ITEMS)
    ]
    source: Any = {"name": "s", "kind": "records", "path": "x"}
    config = TaskConfig(name=scorer, sources=(source,), scorer=scorer, count=NUM_ITEMS)
    return Task(config=config, items=items, choices={QUESTION: tuple(sorted(PERSONAS))} if scorer == "choice" else {})


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    monkeypatch.setattr(run, "load_task", lambda config, *_, **__: task(config.scorer))
    monkeypatch.setattr(run, "version", lambda name: "1.0")
    tasks = (task("choice").config, task("token_f1").config)
    recipe = Recipe(eval=EvalConfig(tasks=tasks, max_new_tokens=5, bootstrap=200, seed=3))
    oracle: Any = FakeOracle()
    return evaluate(oracle, recipe, root=tmp_path, out=tmp_path, seconds={"pack": 1.5}), tmp_path


def test_report_field_by_field(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, out = evaluated
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report) == {"schema", "tasks", "seconds", "peak_rss_bytes", "versions", "seed"}
    assert (report["schema"], report["seed"]) == (1, 3)
    assert set(report["versions"]) == {"ao", "torch", "transformers", "peft", "numpy"}
    assert report["peak_rss_bytes"] > 2**20
    assert set(report["seconds"]) == {"pack", "eval", "total"}
    assert report["seconds"]["total"] == pytest.approx(1.5 + report["seconds"]["eval"], abs=0.002)
    for entry, metric in zip(report["tasks"], ("accuracy", "token_f1"), strict=True):
        assert (entry["metric"], entry["n"], list(entry["controls"])) == (metric, NUM_ITEMS, list(CONTROLS))
        for part in (entry, entry["full_text"], *entry["controls"].values()):
            low, high = part["interval"]
            assert 0 <= low <= part["score"] <= high <= 1
            assert {"ece", "brier", "unparsed"} < set(part)
        assert entry["gain_interval"][0] <= entry["gain"] <= entry["gain_interval"][1]
        best = entry["controls"][entry["best_control"]]["score"]
        assert best == max(part["score"] for part in entry["controls"].values())
        assert entry["gain"] == pytest.approx(entry["score"] - best, abs=2e-6)
        assert {name: part["n"] for name, part in entry["by_layer"].items()} == {"2": 10, "11": 30}
        assert {name: part["n"] for name, part in entry["by_source"].items()} == {"source 0": 20, "source 1": 20}
        assert entry["by_question"] == {QUESTION: {"n": NUM_ITEMS, "score": entry["score"]}}


def test_report_values(evaluated: tuple[dict[str, Any], Path]) -> None:
    choice, generated = evaluated[0]["tasks"]
    assert choice["name"] == "choice"
    assert (choice["score"], choice["ece"], choice["brier"]) == (1, 0.1, 0.02)
    assert choice["controls"]["no_activation"]["score"] == 0.5
    assert choice["controls"]["no_activation"]["ece"] == 0.01
    assert choice["full_text"]["score"] == 0.5
    assert choice["choices_per_question"] == {QUESTION: 2}
    assert (generated["ece"], generated["brier"], generated["choices_per_question"]) == (None, None, {})
    # "the poet" for "poet": 2 / 3; "the pirate|x" for "pirate|x": 6 / 7.
    assert generated["score"] == pytest.approx((2 / 3 + 6 / 7) / 2, abs=1e-6)
    assert generated["unparsed"] == 0
    assert generated["controls"]["text"] == {
        "score": 0,
        "interval": [0, 0],
        "ece": None,
        "brier": None,
        "unparsed": NUM_ITEMS,
    }


def test_records(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, out = evaluated
    records = [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 2 * NUM_ITEMS
    assert all(list(record["conditions"]) == list(CONDITIONS) for record in records)
    assert records[0]["conditions"]["oracle"] == {
        "prediction": "poet",
        "score": 1,
        "probability": 0.9,
        "confidence": 0.9,
    }
    assert {name: value for name, value in records[0].items() if name != "conditions"} == {
        "id": "item 0",
        "task": "choice",
        "source": "source 0",
        "question": QUESTION,
        "answer": "poet",
        "layers": [2],
        "read": " verily",
        "choices": sorted(PERSONAS),
    }
    for entry, part in zip(report["tasks"], (records[:NUM_ITEMS], records[NUM_ITEMS:]), strict=True):
        for name in CONTROLS:
            mean = np.mean([record["conditions"][name]["score"] for record in part])
            assert mean == pytest.approx(entry["controls"][name]["score"], abs=1e-5)


def test_same_seed_same_numbers(tmp_path: Path, evaluated: tuple[dict[str, Any], Path]) -> None:
    report, out = evaluated
    again = tmp_path / "again"
    again.mkdir()
    oracle: Any = FakeOracle()
    tasks = (task("choice").config, task("token_f1").config)
    recipe = Recipe(eval=EvalConfig(tasks=tasks, max_new_tokens=5, bootstrap=200, seed=3))
    assert evaluate(oracle, recipe, root=again, out=again)["tasks"] == report["tasks"]
    assert (again / "records.jsonl").read_bytes() == (out / "records.jsonl").read_bytes()


def test_markdown(evaluated: tuple[dict[str, Any], Path]) -> None:
    text = markdown(evaluated[0], images={"A [map]": "heat map.png"})
    assert "| task | n | score | interval | no activation | shuffled | text | untrained | gain |" in text
    assert "| choice | 40 | 1.00 | [1.00, 1.00] | 0.50 |" in text
    assert "- **untrained**: Injection on, adapter off" in text
    assert "![A [map]](<heat map.png>)" in text
    assert "- choice: accuracy, chance 0.50; best control: " in text
    assert "| token_f1 | source 1 | 20 |" in text
    assert text.isascii()


def test_console_table_is_aligned(evaluated: tuple[dict[str, Any], Path]) -> None:
    lines = console_table(evaluated[0]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[:3] == ["choice", "40", "1.00"]


class Balanced(HTMLParser):
    """Fails on an element that is not closed."""

    EMPTY = frozenset({"meta", "img", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_page_is_whole_and_escaped(evaluated: tuple[dict[str, Any], Path]) -> None:
    page = html_page(evaluated[0], images={"<b>": b"png"})
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen.count("svg") == 2
    assert "persona" not in parser.seen
    assert "Which &lt;persona&gt;?" in page
    assert 'src="data:image/png;base64,cG5n" alt="&lt;b&gt;"' in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a/b",), ("..",), ("",)])
def test_bad_task_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    oracle: Any = FakeOracle()
    source: Any = {"name": "s", "kind": "records", "path": "x"}
    recipe = Recipe(eval=EvalConfig(tasks=tuple(TaskConfig(name=name, sources=(source,)) for name in names)))
    with pytest.raises(ValueError, match=r"^eval\.tasks"):
        evaluate(oracle, recipe, root=tmp_path, out=tmp_path)


def packed_task(root: Path, examples: list[dict[str, Any]], **more: Any) -> Task:
    model = str(tiny.save_model(root / "model"))
    lines = "\n".join(map(json.dumps, examples))
    (root / "examples.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "name": "t",
        "sources": [{"name": "r", "kind": "records", "path": "examples.jsonl"}],
        "read_depths": [0.25, 0.5],
        **more,
    }
    recipe = parse_recipe({"model": {"name": model}, "eval": {"tasks": [values], "seed": 1}})
    return load_task(
        recipe.eval.tasks[0], recipe, framer=framer(model), root=root, out=root / "tasks" / "t", progress=False
    )


CHAT = [{"role": "user", "content": "The city of Paris is in France."}]


def test_task_from_packed_examples(tmp_path: Path) -> None:
    examples = [
        {"id": f"e{index}", "context": CHAT, "question": "Is it?", "answer": ("Yes", "No")[index % 2]}
        for index in range(20)
    ]
    found = packed_task(tmp_path, examples, count=8)
    assert len(found.items) == 8
    assert found.choices == {"Is it?": ("No", "Yes")}
    assert {item.layers for item in found.items} == {(2,), (4,)}
    text = "user\nThe city of Paris is in France.\nassistant\n\n\n"
    for item in found.items:
        assert (item.read_text, item.context_text) == (text, text)
        assert len(item.placeholders) == len(item.read.positions) == len(item.read.context_ids)
        placeholder = framer(str(tmp_path / "model")).placeholder_id
        assert (item.prompt_ids[item.placeholders] == placeholder).all()
        assert (item.prompt_ids == placeholder).sum() == len(item.placeholders)
        assert set(item.read.layers.tolist()) == set(item.layers)
    again = packed_task(tmp_path, examples[::-1], count=8)
    assert sorted(item.id for item in again.items) == sorted(item.id for item in found.items)


def test_too_few_examples_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    example = {"id": "a", "context": "Paris is in France.", "question": "Where?", "answer": "in France"}
    with caplog.at_level(logging.WARNING):
        found = packed_task(tmp_path, [example], count=8, scorer="token_f1")
    assert (len(found.items), found.choices) == (1, {})
    assert "eval task 't' has 1 examples, fewer than its count of 8" in caplog.text


def test_only_the_target_itself_is_scored(tmp_path: Path) -> None:
    example = {"id": "a", "context": "Paris", "question": "Where?", "answer": "there", "target": "difference"}
    with pytest.raises(ValueError, match="example 'a' reads 'difference' activations"):
        packed_task(tmp_path, [example], scorer="token_f1")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = framer(str(tiny.save_model(tmp_path / "other", template=tiny.TEMPLATE + " ")))
    (tmp_path / "x.jsonl").write_text('{"id":"a","context":"Paris","question":"Q","answer":"A"}', encoding="utf-8")
    model = tiny.save_model(tmp_path / "model")
    source: Any = {"name": "r", "kind": "records", "path": "x.jsonl"}
    recipe = parse_recipe({"eval": {"tasks": [{"name": "t", "sources": [source]}]}})
    recipe = Recipe(model=ModelConfig(name=str(model)), eval=recipe.eval)
    with pytest.raises(ValueError, match="template"):
        load_task(recipe.eval.tasks[0], recipe, framer=other, root=tmp_path, out=tmp_path / "packed", progress=False)
