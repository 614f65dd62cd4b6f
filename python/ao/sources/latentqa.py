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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ao.config import LatentQASource
from ao.sources.files import json_batches, read_json
from ao.sources.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

# Nothing else is handed over: the thoughts are most of the bytes.
_KEYS = {
    "system": ("system", "stimulus_user", "label"),
    "control": ("control_user", "label"),
    "stimulus": ("control_user", "control_model", "stimulus_user", "label"),
    "stimulus_completion": ("control_user", "control_model", "stimulus_user", "stimulus_model", "label"),
}


def stimulus_tables(config: LatentQASource, *, path: Path) -> list[Table]:
    """The stimulus files of a folder, in the order of `config.types`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no list of entries.
    """
    if not path.is_dir():
        raise ValueError(f"source {config.name!r}: {path} is a file; expected the folder with qa.json and the stimuli")
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
    return [_table(config, kind, path / f"{kind}.json") for kind in types]


def _table(config: LatentQASource, kind: str, file: Path) -> Table:
    def batches() -> Iterator[tuple[pa.RecordBatch, int]]:
        entries = read_json(file)
        if not isinstance(entries, list):
            raise ValueError(f"{file}: expected a list of entries, got {type(entries).__name__}")
        return json_batches([_kept(entry, kind) for entry in entries])

    described = {"prefix": f"{config.name}/{kind}", "origin": str(file), "unit": "entry", "type": kind}
    return Table(described=described, files=(file,), batches=batches)


def _kept(entry: object, kind: str) -> object:
    return {key: entry[key] for key in _KEYS[kind] if key in entry} if isinstance(entry, dict) else entry


def questions(path: Path) -> dict[str, list[tuple[str, str]]]:
    """By label its questions with their answers, from a folder's qa.json.

    Raises:
        ValueError: it has another layout; names the label and the pair.
    """
    file = path / "qa.json"
    by_label = read_json(file)
    if not isinstance(by_label, dict):
        raise ValueError(f"{file}: expected an object of labels, got {type(by_label).__name__}")
    found: dict[str, list[tuple[str, str]]] = {}
    for label, pairs in by_label.items():
        if not isinstance(pairs, list):
            raise ValueError(
                f"{file}: key {label!r}: expected a list of [question, answer], got {type(pairs).__name__}"
            )
        for index, pair in enumerate(pairs):
            is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)
            if not is_pair:
                raise ValueError(
                    f"{file}: key {label!r}, pair {index}: expected [question, answer] as texts, got {pair!r}"
                )
        found[label.strip()] = [(question.strip(), answer.strip()) for question, answer in pairs]
    return found
