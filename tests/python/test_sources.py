import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import real_data
from ao.config import SourceConfig, parse_recipe
from ao.sources import examples


def config(**values: Any) -> SourceConfig:
    return parse_recipe({"data": {"sources": [{"name": "s", **values}]}}).data.sources[0]


def read(root: Path, *, seed: int = 0, drops: Counter[str] | None = None, **values: Any) -> list[dict[str, Any]]:
    return list(examples(config(**values), seed=seed, root=root, drops=drops))


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


# LatentQA

STIMULUS = {"control_user": "Be a pirate.", "control_model": "Arr.", "stimulus_user": "Hello?", "label": "pirate"}


@pytest.fixture
def latentqa(tmp_path: Path) -> Path:
    write(tmp_path / "qa.json", {"pirate": [["Who?", "A pirate."], ["How?", "Gruffly."]]})
    write(tmp_path / "system.json", [{"system": "Be a pirate. ", "stimulus_user": "Hello?", "label": "pirate"}])
    write(tmp_path / "control.json", [{"control_user": "Be a pirate.", "label": "pirate"}])
    write(tmp_path / "stimulus.json", [STIMULUS, STIMULUS | {"label": "nobody"}])
    write(tmp_path / "stimulus_completion.json", [STIMULUS | {"stimulus_model": "Ahoy!"}])
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "roles", "span"),
    [
        ("system", ["system", "user"], [{"message": 1, "onwards": True}]),
        ("control", ["user"], None),
        ("stimulus", ["user", "assistant", "user"], [{"message": 2, "onwards": True}]),
        ("stimulus_completion", ["user", "assistant", "user", "assistant"], [{"message": 2, "onwards": True}]),
    ],
)
def test_latentqa_masks_the_turns_that_state_the_label(
    latentqa: Path, kind: str, roles: list[str], span: list[object] | None
) -> None:
    first, second = read(latentqa, kind="latentqa", path=".", types=[kind])
    assert [message["role"] for message in first["context"]] == roles
    assert first["context"][0]["content"] == "Be a pirate."
    assert first.get("read") == span
    assert (first["id"], first["source"]) == (f"s/{kind}/0/0", "s")
    assert (second["question"], second["answer"]) == ("How?", "Gruffly.")


def test_latentqa_counts_labels_without_questions(latentqa: Path) -> None:
    drops: Counter[str] = Counter()
    assert len(read(latentqa, kind="latentqa", path=".", types=["stimulus"], drops=drops)) == 2
    assert drops == {"label_without_questions": 1}


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("system.json", [{"system": "x", "label": "pirate"}], r"system\.json: entry 0: key 'stimulus_user' is missing"),
        (
            "system.json",
            [{"system": 3, "stimulus_user": "y", "label": "z"}],
            r"entry 0: key 'system': expected text, got 3",
        ),
        ("system.json", ["x"], r"system\.json: entry 0: expected an object, got str"),
        ("system.json", {}, r"system\.json: expected a list of entries, got dict"),
        ("system.json", "[", r"system\.json: not JSON"),
        ("qa.json", [], r"qa\.json: expected an object of labels, got list"),
        ("qa.json", {"pirate": [["Who?"]]}, r"qa\.json: key 'pirate', pair 0: expected \[question, answer\]"),
    ],
)
def test_latentqa_names_file_entry_and_key(latentqa: Path, file: str, value: object, message: str) -> None:
    write(latentqa / file, value)
    with pytest.raises(ValueError, match=message):
        read(latentqa, kind="latentqa", path=".", types=["system"])


def test_latentqa_needs_the_files_of_its_types(latentqa: Path) -> None:
    (latentqa / "stimulus_completion.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no stimulus_completion\.json, only .*leave it out of types"):
        read(latentqa, kind="latentqa", path=".", types=["stimulus_completion"])
    # Beside other types it is used where present, as the published evaluation files lack it.
    with_rest = read(latentqa, kind="latentqa", path=".", types=["system", "stimulus_completion"])
    assert with_rest == read(latentqa, kind="latentqa", path=".", types=["system"])
    (latentqa / "control.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no control\.json"):
        read(latentqa, kind="latentqa", path=".", types=["system", "control"])


# Classification


@pytest.fixture
def tenses(tmp_path: Path) -> Path:
    rows = [{"sentence": f" Sentence {i}, so.  ", "tense": ("past", "present", "future")[i % 3]} for i in range(600)]
    with open(tmp_path / "tense.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sentence", "tense"])
        writer.writeheader()
        writer.writerows(rows)
    write(tmp_path / "tense.json", rows)
    write(tmp_path / "tense.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


TENSE = {"kind": "classification", "text": "sentence", "label": "tense", "questions": ["Is it {label}?"]}


def test_tables_of_all_formats_give_the_same_examples(tenses: Path) -> None:
    by_format = [read(tenses, path=f"tense.{suffix}", **TENSE) for suffix in ("csv", "json", "jsonl")]
    assert by_format[0] == by_format[1] == by_format[2]
    text = "Sentence 7, so."
    assert by_format[0][7]["context"] == [{"role": "user", "content": text}]
    assert by_format[0][7]["read"] == [{"message": 0, "start": 0, "end": len(text)}]


def test_yes_no_questions_are_balanced_and_right(tenses: Path) -> None:
    asked = Counter()
    for index, example in enumerate(read(tenses, path="tense.csv", prefix="Say it. ", **TENSE)):
        label = ("past", "present", "future")[index % 3]
        is_right = example["question"] == f"Say it. Is it {label}?"
        assert example["answer"] == ("Yes" if is_right else "No")
        asked[example["question"], example["answer"]] += 1
    assert 250 < sum(number for (_, answer), number in asked.items() if answer == "Yes") < 350
    assert len(asked) == 6
    assert min(asked.values()) > 60


def test_a_question_without_label_is_answered_by_its_wording(tenses: Path) -> None:
    values = {
        **TENSE,
        "questions": ["Which tense?", "When?"],
        "labels": {"past": "Past", "present": "Now", "future": "Later"},
    }
    found = read(tenses, path="tense.csv", questions_per_text=2, **values)
    assert [example["answer"] for example in found[:6:2]] == ["Past", "Now", "Later"]
    assert {example["question"] for example in found[:2]} == {"Which tense?", "When?"}
    assert len({example["id"] for example in found}) == 1200


def test_relations_become_true_and_false_statements(tmp_path: Path) -> None:
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
    samples = [{"subject": subject, "object": capital} for subject, capital in capitals.items()]
    write(tmp_path / "r/capital.json", {"prompt_templates": ["The capital of {} is"], "samples": samples})
    labels = {"true": "Yes", "false": "No"}
    found = read(tmp_path, kind="classification", path="r", labels=labels, questions=["Is this true?"])
    assert [example["answer"] for example in found] == ["Yes", "No"] * 3
    assert found[0]["context"][0]["content"] == "The capital of France is Paris."
    assert found[1]["context"][0]["content"] in {"The capital of France is Rome.", "The capital of France is Madrid."}
    assert found[1]["id"] == "s/capital/0/false/0"


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("sentence,tense\nA.,past\n", {"text": "words"}, r"t\.csv: row 1: key 'words' is missing; there are"),
        ("sentence,tense\nA.,past\n ,past\n", {}, r"t\.csv: row 2: key 'sentence': expected text"),
        ("sentence,tense\nA.,\n", {}, r"t\.csv: row 1: key 'tense': expected a label, got ''"),
        ("sentence,tense\nA.\n", {}, r"t\.csv: row 1: has another number of cells"),
        ("sentence,tense\nA.,past\n", {}, r"needs two labels or more, got \['past'\]"),
        ("sentence,tense\nA.,past\n", {"labels": {"now": "Now"}}, r"label 'past' has no wording; labels has \['now'\]"),
        ("sentence,tense\nA.,past\n", {"questions": []}, "questions is empty"),
    ],
)
def test_bad_tables_name_row_and_column(tmp_path: Path, text: str, values: dict[str, Any], message: str) -> None:
    write(tmp_path / "t.csv", text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, path="t.csv", **{**TENSE, **values})


# Plain text, chats, records


def test_texts_chats_and_paragraphs(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    write(tmp_path / "a.jsonl", f'{{"text": "One."}}\n\n{json.dumps(chat)}\n')
    one, two = read(tmp_path, kind="context_prediction", path="a.jsonl")
    assert (one["id"], one["context"]) == ("s/1", "One.")
    assert (two["id"], two["context"]) == ("s/3", chat["messages"])
    write(tmp_path / "a.txt", "\nOne\nstill one.\n  \n\nTwo.")
    found = read(tmp_path, kind="context_prediction", path="a.txt")
    assert [(example["id"], example["context"]) for example in found] == [("s/2", "One\nstill one."), ("s/6", "Two.")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('"text"', "line 2: expected a JSON object, got str"),
        ('{"txt": "a"}', r"line 2: key 'text' is missing; there are \['txt'\]"),
        ('{"text": " "}', "line 2: key 'text': expected text, got ' '"),
        ('{"messages": []}', "line 2: key 'messages': expected a list of messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 0: expected an object with texts role and content"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, kind="context_prediction", path="a.jsonl")


def test_records_pass_through(tmp_path: Path) -> None:
    record = {"id": "r1", "context": "Some text", "question": "What?", "answer": "That.", "positions": [0, -1]}
    write(tmp_path / "a.jsonl", json.dumps(record))
    assert read(tmp_path, kind="records", path="a.jsonl") == [record | {"source": "s"}]
    write(tmp_path / "a.jsonl", json.dumps({"context": "x"}))
    with pytest.raises(ValueError, match="line 1: key 'id' is missing"):
        read(tmp_path, kind="records", path="a.jsonl")


# Draws


def test_a_count_draws_by_key_and_keeps_the_order(tenses: Path) -> None:
    everything = read(tenses, path="tense.csv", **TENSE)
    drawn = read(tenses, path="tense.csv", count=100, **TENSE)
    assert len(drawn) == 100
    assert drawn == [example for example in everything if example in drawn]
    assert drawn == read(tenses, path="tense.csv", count=100, **TENSE)
    assert drawn != read(tenses, path="tense.csv", count=100, seed=1, **TENSE)
    more = read(tenses, path="tense.csv", count=200, **TENSE)
    assert all(example in more for example in drawn)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source 's': .*absent.* does not exist; its path is taken from"):
        read(tmp_path, kind="records", path="absent.jsonl")


@real_data.needed
def test_the_published_files_are_read() -> None:
    drops: Counter[str] = Counter()
    types = ["system", "control", "stimulus"]
    found = read(real_data.FOLDER, kind="latentqa", path="latentqa", types=types, drops=drops)
    assert len(found) == 2 * (567 + 500 + 567)
    assert not drops
    truth = {"kind": "classification", "text": "statement", "labels": {"1": "Yes", "0": "No"}, "questions": ["True?"]}
    assert len(read(real_data.FOLDER, path="classification/geometry_of_truth", **truth)) == 14808
    relations = {"kind": "classification", "labels": {"true": "Yes", "false": "No"}, "questions": ["True?"]}
    answers = Counter(e["answer"] for e in read(real_data.FOLDER, path="classification/relations", **relations))
    assert answers == {"Yes": 4118, "No": 4118}
