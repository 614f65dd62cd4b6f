"""The demo world: what its ends give away, what is held out, and that a seed gives the same bytes."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from ao.demo import lessons, world

SIZES = {"conversations": 300, "statements": 300, "texts": 200, "heldout": 100}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write_files(folder, seed=3, **SIZES)
    return folder


def table(path: Path) -> list[tuple[str, str]]:
    with path.open() as file:
        return [(row["statement"], row["label"]) for row in csv.DictReader(file)]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(files: Path, tmp_path: Path) -> None:
    counts = world.write_files(tmp_path / "again", seed=3, **SIZES)
    world.write_files(tmp_path / "other", seed=4, **SIZES)
    for path in counts:
        assert (tmp_path / "again" / path).read_bytes() == (files / path).read_bytes()
        assert (tmp_path / "other" / path).read_bytes() != (files / path).read_bytes()
    assert counts["train/statements/truth.csv"] == 300
    assert counts["heldout/latentqa/system.json"] == 100


@pytest.mark.parametrize("name", world.STATEMENT_SETS)
def test_tails_are_the_same_for_every_label(name: str, files: Path) -> None:
    endings = defaultdict(set)
    for text, label in table(files / f"train/statements/{name}.csv"):
        endings[label].update(text.rstrip(".").split()[-4:])
    assert set(endings) == set(world.STATEMENT_SETS[name])
    allowed = {word for form in world.TAILS for word in form.split() if "{" not in word}
    allowed |= {*world.AGES, *world.PLACES}
    for words in endings.values():
        assert words <= allowed


def test_claims_are_true_as_often_as_false_and_by_the_facts(files: Path) -> None:
    rows = table(files / "train/statements/truth.csv")
    for text, label in rows:
        name = text.split()[0]
        holds = any(
            text.startswith(form.format(name=name, value=world.fact(name, kind)) + " ")
            for kind, (form, _) in world.FACTS.items()
        )
        assert label == str(holds).lower()
    assert 0.4 < Counter(label for _, label in rows)["true"] / len(rows) < 0.6


def test_facts_stay_when_anything_else_changes() -> None:
    assert [world.fact("Ada", kind) for kind in world.FACTS] == ["Delhi", "snake"]


def test_heldout_names_statements_and_pairs_are_not_trained_on(files: Path) -> None:
    names = {part: {text.split()[0] for text, _ in table(files / part / "statements/truth.csv")} for part in PARTS}
    assert names["train"]
    assert names["heldout"]
    assert not names["train"] & names["heldout"]

    cores = {
        part: {" ".join(text.split()[:-4]) for text, _ in table(files / part / "statements/topic.csv")}
        for part in PARTS
    }
    assert not cores["train"] & cores["heldout"]

    pairs = {part: trait_object_pairs(files / part / "latentqa/system.json") for part in PARTS}
    assert not pairs["train"] & pairs["heldout"]


PARTS = ("train", "heldout")


def trait_object_pairs(path: Path) -> set[tuple[str, str]]:
    pairs = set()
    for entry in json.loads(path.read_text()):
        words = set(entry["stimulus_user"].rstrip(".?").split())
        (thing,) = words & set(world.OBJECTS)
        pairs |= {(value, thing) for value in entry["label"].split("-")}
    return pairs


def test_every_label_has_questions_and_heldout_ones_only_name(files: Path) -> None:
    for part in PARTS:
        asked = json.loads((files / part / "latentqa/qa.json").read_text())
        for entry in json.loads((files / part / "latentqa/system.json").read_text()):
            values = entry["label"].split("-")
            answers = Counter(answer for _, answer in asked[entry["label"]])
            assert all(answers[value] == 1 for value in values)
            assert answers["Yes"] == answers["No"] == (3 if part == "train" else 0)


def test_user_turns_do_not_tell_the_traits() -> None:
    rng = Random(0)
    shown = {word for values in world.TRAITS.values() for pair in values.items() for word in pair}
    for _ in range(300):
        _, user, _ = world.chat(rng, world.random_traits(rng), rng.choice(world.OBJECTS))
        assert not shown & set(user.rstrip(".?").split())


def test_documents_repeat_by_seed_and_weigh_something() -> None:
    first = list(islice(lessons.documents(5), 200))
    assert first == list(islice(lessons.documents(5), 200))
    assert first != list(islice(lessons.documents(6), 200))
    for document in first:
        assert document[0][0].startswith("<bos>")
        assert max(weight for _, weight in document) > 0


def test_yes_and_no_are_even() -> None:
    answers = Counter(answers[0] for _, _, answers in islice(lessons.quiz(0), 8000))
    assert 0.9 < answers["Yes"] / answers["No"] < 1.1
