"""LatentQA's JSON files (arXiv 2412.08686): stimuli with labels, and questions and answers about each label.

`qa.json` is {label: [[question, answer], ...]}. Each other file is a list of entries with a `label`, and one chat per
entry. What the oracle may read is what follows the turns that state the label outright:

- system.json: system, user (stimulus_user). Read from the user turn on, generation prompt included.
- control.json: user (control_user). Everything is read, nothing masked: the instruction itself.
- stimulus.json: user (control_user), assistant (control_model), user (stimulus_user). Read from the third turn on,
  generation prompt included.
- stimulus_completion.json: the same, then assistant (stimulus_model). Read from the third turn on, the reply included.

So do the published LatentQA and Activation Oracle loaders; the thoughts (`control_thought`, `stimulus_thought`) are not
used, as by default there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ao.config import LatentQASource
from ao.sources import files

log = logging.getLogger(__name__)

_TURNS = {
    "system": (("system", "system"), ("user", "stimulus_user")),
    "control": (("user", "control_user"),),
    "stimulus": (("user", "control_user"), ("assistant", "control_model"), ("user", "stimulus_user")),
    "stimulus_completion": (
        ("user", "control_user"),
        ("assistant", "control_model"),
        ("user", "stimulus_user"),
        ("assistant", "stimulus_model"),
    ),
}
_FIRST_READ = {"system": 1, "control": 0, "stimulus": 2, "stimulus_completion": 2}

Pair = tuple[str, str]


def examples(config: LatentQASource, *, seed: int, path: Path, drops: Counter[str]) -> Iterator[dict[str, Any]]:
    """One Example per stimulus and question, in the order of `config.types` and of the files.

    A stimulus whose label has no questions counts as a drop, `label_without_questions`.
    """
    # The published evaluation files lack completions; what is there is used.
    types = [kind for kind in config.types if kind != "stimulus_completion" or (path / f"{kind}.json").is_file()]
    types = types or list(config.types)
    if len(types) < len(config.types):
        log.warning("source %r: %s has no stimulus_completion.json; the other types are used", config.name, path)
    for name in ("qa", *types):
        if not (path / f"{name}.json").is_file():
            there = sorted(file.name for file in path.glob("*.json"))
            raise FileNotFoundError(
                f"source {config.name!r}: {path} has no {name}.json, only {there}; leave it out of types, or add it"
            )
    questions = _questions(path / "qa.json")
    stimuli = []
    for kind in types:
        for index, entry in enumerate(_entries(path / f"{kind}.json")):
            where = f"{path / kind}.json: entry {index}"
            messages = [{"role": role, "content": files.field(entry, name, where=where)} for role, name in _TURNS[kind]]
            stimuli.append((f"{config.name}/{kind}/{index}", kind, files.field(entry, "label", where=where), messages))

    unanswered = sum(label not in questions for _, _, label, _ in stimuli)
    if unanswered:
        drops["label_without_questions"] += unanswered

    def rows() -> Iterator[tuple[str, tuple[str, str, list[dict[str, str]], Pair]]]:
        for name, kind, label, messages in stimuli:
            pairs = [(f"{name}/{index}", pair) for index, pair in enumerate(questions.get(label, ()))]
            drawn = files.draw(lambda pairs=pairs: pairs, count=config.questions_per_stimulus, seed=seed)
            for row, pair in drawn:
                yield row, (kind, label, messages, pair)

    for name, (kind, label, messages, (question, answer)) in files.draw(rows, count=config.count, seed=seed):
        example: dict[str, Any] = {"id": name, "source": config.name, "context": messages}
        if first := _FIRST_READ[kind]:
            example["read"] = [{"message": first, "onwards": True}]
        yield example | {"question": question, "answer": answer, "meta": {"label": label, "type": kind}}


def _entries(path: Path) -> list[Any]:
    entries = files.read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(entries).__name__}")
    return entries


def _questions(path: Path) -> dict[str, list[Pair]]:
    by_label = files.read_json(path)
    if not isinstance(by_label, dict):
        raise ValueError(f"{path}: expected an object of labels, got {type(by_label).__name__}")
    questions: dict[str, list[Pair]] = {}
    for label, pairs in by_label.items():
        if not isinstance(pairs, list):
            raise ValueError(
                f"{path}: key {label!r}: expected a list of [question, answer], got {type(pairs).__name__}"
            )
        for index, pair in enumerate(pairs):
            is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)
            if not is_pair:
                raise ValueError(
                    f"{path}: key {label!r}, pair {index}: expected [question, answer] as texts, got {pair!r}"
                )
        questions[label.strip()] = [(question.strip(), answer.strip()) for question, answer in pairs]
    return questions
