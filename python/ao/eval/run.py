"""`ao eval`: every task under every condition, to records.jsonl and a report.

The numbers depend on the oracle, the recipe and the data alone; only `seconds` and `peak_rss_bytes` are measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ao import memory
from ao.config import EvalConfig, Recipe
from ao.eval import scorers
from ao.eval.controls import CONDITIONS, CONTROLS, Condition, condition
from ao.eval.report import write_report
from ao.eval.tasks import Task, load_task
from ao.manifest import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from ao.oracle import Oracle

SCHEMA = 1
"""Version of report.json."""

_DIGITS = 6
_VERSIONS = {"ao": "activation-oracles"} | {name: name for name in ("torch", "transformers", "peft", "numpy")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What all items of a task gave under one condition."""

    predictions: Sequence[str]
    """Chosen or generated answers, one an item."""
    scores: np.ndarray
    """Score of each item in 0..1, [N]."""
    choices: scorers.Choices | None
    """Probabilities, where the answers were chosen."""
    unparsed: int
    """Generated answers without a word; they score 0 unless the right answer has none either."""


def evaluate(
    oracle: Oracle,
    recipe: Recipe,
    *,
    root: Path,
    out: Path,
    progress: bool = False,
    seconds: Mapping[str, float] | None = None,
    peak_rss_bytes: int | None = None,
) -> dict[str, Any]:
    """Score an oracle on the recipe's `[eval]` tasks beside its controls.

    Writes `tasks/NAME/` (packed examples), `records.jsonl` (a line an item), `report.json`, `report.md`, `report.html`.

    Args:
        oracle: the oracle.
        recipe: gives the tasks, and the model that they are packed for.
        root: folder that relative source paths are taken from.
        out: folder of the artifacts; made if missing.
        progress: show progress bars on stderr.
        seconds: what earlier stages took, by name; taken over into the report and its total.
        peak_rss_bytes: peak memory of the whole run; measured over this process and its largest child if left out.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: there are no tasks, two have one name, or one cannot be scored.
    """
    started = time.perf_counter()
    _check_names([task.name for task in recipe.eval.tasks])
    # All tasks are loaded before the first is scored: bad input shows at once.
    tasks = _load_tasks(oracle, recipe, root=root, out=out, progress=progress)
    reports, records = [], []
    for task in tasks:
        outcomes = run_task(oracle, task, recipe.eval, progress=progress)
        reports.append(task_report(task, outcomes, recipe.eval))
        records += task_records(task, outcomes)
    spent = dict(seconds or {}) | {"eval": time.perf_counter() - started}
    report = {
        "schema": SCHEMA,
        "tasks": reports,
        "seconds": {name: round(value, 3) for name, value in {**spent, "total": sum(spent.values())}.items()},
        "peak_rss_bytes": memory.peak_rss_bytes(children=True) if peak_rss_bytes is None else peak_rss_bytes,
        "versions": {name: version(distribution) for name, distribution in _VERSIONS.items()},
        "seed": recipe.eval.seed,
    }
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    write_atomic(out / "records.jsonl", "".join(f"{line}\n" for line in lines))
    write_report(report, out)
    return report


def _load_tasks(oracle: Oracle, recipe: Recipe, *, root: Path, out: Path, progress: bool) -> list[Task]:
    """Pack and draw every task; on an error what was packed here goes again."""
    packed: list[Path] = []
    tasks = []
    try:
        for task in recipe.eval.tasks:
            folder = out / "tasks" / task.name
            if not folder.exists():
                packed.append(folder)
            tasks.append(load_task(task, recipe, framer=oracle.framer, root=root, out=folder, progress=progress))
    except BaseException:
        for folder in packed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return tasks


def run_task(oracle: Oracle, task: Task, config: EvalConfig, *, progress: bool = False) -> dict[str, Outcome]:
    """Answer all items of a task under every condition; by condition, in the order of `CONDITIONS`."""
    from tqdm import tqdm

    vectors = oracle.read_vectors([item.read for item in task.items])
    outcomes = {}
    with tqdm(
        total=len(CONDITIONS) * len(task.items),
        desc=f"eval {task.config.name}",
        unit=" answers",
        file=sys.stderr,
        disable=not progress,
    ) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        for name in CONDITIONS:
            asked = condition(name, task.items, vectors, framer=oracle.framer, seed=config.seed)
            answer = _choose if task.config.scorer == "choice" else _generate
            outcomes[name] = answer(oracle, task, asked, config, advance)
    return outcomes


def _choose(
    oracle: Oracle, task: Task, asked: Condition, config: EvalConfig, progress: Callable[[int], None]
) -> Outcome:
    choices = [task.choices[item.question] for item in task.items]
    log_probs = oracle.choice_log_probs(asked.prompts, choices, adapter=asked.adapter, progress=progress)
    right = [options.index(item.answer) for options, item in zip(choices, task.items, strict=True)]
    found = scorers.score_choices(log_probs, right)
    predictions = [options[which] for options, which in zip(choices, found.predictions, strict=True)]
    return Outcome(predictions=predictions, scores=found.correct, choices=found, unparsed=0)


def _generate(
    oracle: Oracle, task: Task, asked: Condition, config: EvalConfig, progress: Callable[[int], None]
) -> Outcome:
    predictions = oracle.generate(
        asked.prompts, max_new_tokens=config.max_new_tokens, adapter=asked.adapter, progress=progress
    )
    pairs = zip(predictions, task.items, strict=True)
    scores = np.array([scorers.token_f1(prediction, item.answer) for prediction, item in pairs])
    unparsed = sum(not scorers.words(prediction) for prediction in predictions)
    return Outcome(predictions=predictions, scores=scores, choices=None, unparsed=unparsed)


def task_report(task: Task, outcomes: Mapping[str, Outcome], config: EvalConfig) -> dict[str, Any]:
    """A task's entry in report.json."""
    found = scorers.estimate(
        {name: outcome.scores for name, outcome in outcomes.items()},
        oracle="oracle",
        controls=CONTROLS,
        resamples=config.bootstrap,
        seed=config.seed,
    )

    def row(name: str) -> dict[str, Any]:
        part, choices = found.estimates[name], outcomes[name].choices
        return {
            "score": _rounded(part.score),
            "interval": [_rounded(end) for end in part.interval],
            "ece": None if choices is None else _rounded(choices.ece),
            "brier": None if choices is None else _rounded(choices.brier),
            "unparsed": outcomes[name].unparsed,
        }

    scores = outcomes["oracle"].scores
    return {
        "name": task.config.name,
        "metric": "accuracy" if task.config.scorer == "choice" else task.config.scorer,
        "n": len(task.items),
        **row("oracle"),
        "controls": {name: row(name) for name in CONTROLS},
        "full_text": row("full_text"),
        "gain": _rounded(found.gain.score),
        "gain_interval": [_rounded(end) for end in found.gain.interval],
        "best_control": found.best_control,
        "choices_per_question": {question: len(options) for question, options in task.choices.items()},
        "by_layer": _split([item.layers for item in task.items], scores),
        "by_source": _split([item.source for item in task.items], scores),
        "by_question": _split([item.question for item in task.items], scores),
    }


def task_records(task: Task, outcomes: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    """A task's lines in records.jsonl.

    By condition the prediction and its score, and for a choice the probabilities of the right answer (`probability`) and of
    the predicted one (`confidence`).
    """
    for index, item in enumerate(task.items):
        conditions = {}
        for name, outcome in outcomes.items():
            conditions[name] = {
                "prediction": outcome.predictions[index],
                "score": _rounded(outcome.scores[index]),
            }
            if outcome.choices is not None:
                conditions[name]["probability"] = _rounded(outcome.choices.right[index])
                conditions[name]["confidence"] = _rounded(outcome.choices.confidence[index])
        yield {
            "id": item.id,
            "task": task.config.name,
            "source": item.source,
            "question": item.question,
            "answer": item.answer,
            "layers": list(item.layers),
            "read": item.read_text,
            "choices": list(task.choices.get(item.question, ())),
            "conditions": conditions,
        }


def _split(keys: Sequence[Any], scores: np.ndarray) -> dict[str, dict[str, float]]:
    parts: dict[Any, list[float]] = defaultdict(list)
    for key, score in zip(keys, scores.tolist(), strict=True):
        parts[key].append(score)
    return {
        key if isinstance(key, str) else " ".join(map(str, key)): {"n": len(part), "score": _rounded(np.mean(part))}
        for key, part in sorted(parts.items())
    }


def _rounded(value: float | np.floating) -> float:
    return round(float(value), _DIGITS)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("eval.tasks is empty; expected at least one [[eval.tasks]] in the recipe")
    if len(set(names)) != len(names):
        raise ValueError(f"eval.tasks: names must differ, got {list(names)}")
    for name in names:
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"eval.tasks: {name!r} names a folder of the report; expected a plain name without '/'")
