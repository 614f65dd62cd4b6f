"""From a task's configuration to its items: held-out examples, packed by the same code as training data."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ao.config import DataConfig, Recipe, TaskConfig
from ao.pack import pack
from ao.prompt import special_ids
from ao.shards import Datapoint, PackedDataset

if TYPE_CHECKING:
    from ao._ao import Framer
    from ao.residuals import Read

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One question about one read, with everything that its controls need."""

    id: str
    """Id of the datapoint."""
    source: str
    """Name of its source."""
    question: str
    """Question as text."""
    answer: str
    """Right answer as text."""
    layers: tuple[int, ...]
    """Layers of the prompt, in its order."""
    read: Read
    """What is read of the context: one activation per placeholder, layer-major."""
    prompt_ids: np.ndarray
    """Token ids of the oracle prompt, without the answer, [T]."""
    placeholders: np.ndarray
    """Indices of its placeholders, [K]."""
    read_text: str
    """The tokens at the read positions as text, special ones left out."""
    context_text: str
    """The whole context as text, up to the last position that is read; special tokens left out."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task's items, and for a choice task what can be answered."""

    config: TaskConfig
    items: Sequence[Item]
    choices: Mapping[str, tuple[str, ...]]
    """By question its possible answers, sorted; empty unless the scorer is `choice`."""


def load_task(task: TaskConfig, recipe: Recipe, *, framer: Framer, root: Path, out: Path, progress: bool) -> Task:
    """Pack a task's sources into `out` and draw its items.

    Args:
        task: the task.
        recipe: the recipe that it stands in; gives the model, the seed and the limits of lengths.
        framer: the oracle's, to write texts and to check that the data are packed for it.
        root: folder that relative source paths are taken from.
        out: folder of the packed data set.
        progress: show progress bars on stderr.

    Raises:
        ValueError: a question has only one answer in all the data, or the data are of another tokenizer or not of the base.
    """
    data = DataConfig(
        seed=recipe.eval.seed,
        read_depths=task.read_depths,
        layers_per_example="one",
        max_input_tokens=recipe.data.max_input_tokens,
        max_context_tokens=recipe.data.max_context_tokens,
        sources=task.sources,
    )
    pack(replace(recipe, data=data), root=root, out=out, restart=True, progress=progress)
    packed = PackedDataset.open(out)
    packed.require(oracle=framer.fingerprint)
    by_source: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    answers: dict[str, set[str]] = defaultdict(set)
    for index in range(len(packed)):
        datapoint = packed[index]
        by_source[datapoint.source].append((_key(recipe.eval.seed, datapoint.id), index))
        answers[datapoint.question].add(datapoint.answer)
    drawn = draw({source: [index for _, index in sorted(keyed)] for source, keyed in by_source.items()}, task.count)
    if len(drawn) < task.count:
        log.warning("eval task %r has %d examples, fewer than its count of %d", task.name, len(drawn), task.count)
    special = special_ids(recipe.model)
    items = [_item(packed[index], framer, special, task.name) for index in drawn]
    choices = {}
    if task.scorer == "choice":
        choices = choices_of({item.question: answers[item.question] for item in items}, task.name)
    return Task(config=task, items=items, choices=choices)


def draw(by_source: Mapping[str, Sequence[int]], count: int) -> list[int]:
    """The first `count` of several lists, as evenly from each as their lengths allow, in ascending order."""
    taken: list[int] = []
    remaining = sorted(by_source.items(), key=lambda entry: (len(entry[1]), entry[0]))
    # Shortest first: what a short list cannot give falls to the longer ones.
    for index, (_, candidates) in enumerate(remaining):
        share = -(-(count - len(taken)) // (len(remaining) - index))
        taken += candidates[:share]
    return sorted(taken)


def choices_of(answers: Mapping[str, set[str]], task: str) -> dict[str, tuple[str, ...]]:
    """The choices of each question: its distinct answers, sorted.

    Raises:
        ValueError: a question has only one, so that any oracle would be right.
    """
    for question, found in answers.items():
        if len(found) < 2:
            raise ValueError(
                f"eval task {task!r}: question {question!r} has one answer in all its data, {min(found)!r}, "
                'so nothing can be chosen; add sources that answer it otherwise, or use scorer = "token_f1"'
            )
    return {question: tuple(sorted(found)) for question, found in sorted(answers.items())}


def _key(seed: int, id_: str) -> bytes:
    return blake2b(f"{seed} eval draw {id_}".encode(), digest_size=16).digest()


def _item(datapoint: Datapoint, framer: Framer, special: np.ndarray, task: str) -> Item:
    from ao.residuals import Read

    def text(ids: np.ndarray) -> str:
        return framer.decode(np.ascontiguousarray(ids[~np.isin(ids, special)], dtype=np.int32).data)

    if datapoint.kind != "base":
        raise ValueError(
            f"eval task {task!r}: example {datapoint.id!r} reads {datapoint.kind!r} activations, but only those of the "
            "target itself can be scored; leave `target` out of its examples"
        )
    layers = tuple(dict.fromkeys(datapoint.layers.tolist()))
    num_positions = len(datapoint.read_positions) // len(layers)
    context_ids = datapoint.context_ids
    return Item(
        id=datapoint.id,
        source=datapoint.source,
        question=datapoint.question,
        answer=datapoint.answer,
        layers=layers,
        read=Read(
            context_ids=context_ids,
            layers=datapoint.layers.astype(np.int64),
            positions=datapoint.read_positions.astype(np.int64),
        ),
        prompt_ids=datapoint.input_ids[: datapoint.answer_start].astype(np.int64),
        placeholders=datapoint.placeholders.astype(np.int64),
        read_text=text(context_ids[datapoint.read_positions[:num_positions]]),
        context_text=text(context_ids),
    )
