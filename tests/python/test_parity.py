"""Packs equal the specification in `reference.py`, datapoint by datapoint, over scripts, tokenizers and kinds of sources."""

import csv
import json
import random
import shutil
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, Settings, build_all, read_tables

import real_data
import tiny
from ao.config import parse_recipe, to_dict
from ao.pack import pack
from ao.prompt import model_folder, num_layers, resolve_layer
from ao.shards import PackedDataset

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = Path(__file__).with_name("templates")

WORDS = {
    "plain": "The city of Paris is in France , she will go to the park and he went there",
    "latin": "Paris is thé Straße naïve I'll we're ﬁne ½ x² İstanbul DON'T 3rd 2024-11-23",
    "cyrillic": "Москва это город в России ёлка Й й",
    "greek": "Ἀθῆναι ὀξύς σίγμα ς",
    "arabic": "\u0627\u0644\u0642\u0627\u0647\u0631\u0629 \u0645\u062f\u0650\u064a\u0646\u064e\u0629 \u0661\u0662\u0663",
    "hebrew": "\u05d9\u05e8\u05d5\u05e9\u05c1\u05b8\u05dc\u05b7\u05d9\u05b4\u05dd \u05e2\u05d9\u05e8",
    "devanagari": "दिल्ली एक शहर है क़ क्ष",
    "thai": "กรุงเทพ เป็น เมืองหลวง น้ำ",
    "cjk": "北京 是 中国的首都 東京は 서울은 각 \u1100\u1161\u11a8 𠀀",
    "emoji": "\U0001f469\u200d\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001f44d\U0001f3fd",
    "combining": "e\u0301 a\u0328\u0301 Z\u0351\u036b\u0343 o\u0308\u0304 \u0301x q\u0307\u0323",
    "control": "a\x00b \x07 \x1b[0m \x1c \x85 \u200b \u200f\u202eabc\u202c \ufeff \u2028 \x7f",
    "code": "if(x){return\ty;} a_b->c::d // # /* \\n <b> {{x}} {% if %} [INST]",
    "marks": " ? ?? \ufffd \u2581 \u2581\u2581a <0x41> <note> Layer: 3 \u00a0 \u3000 ... \ue000",
}
SPACES = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "", "\u00a0", "      "]
# Name of a model: its tokenizer and its template among the golden files and the tests' templates.
GOLDEN_MODELS = {
    "gemma": ("gemma", GOLDEN / "gemma.jinja"),
    "qwen": ("qwen", GOLDEN / "qwen.jinja"),
    "gemma_4": ("gemma", TEMPLATES / "gemma_4.jinja"),
    "qwen_3": ("qwen", TEMPLATES / "qwen_3.jinja"),
}
MODELS = (*GOLDEN_MODELS, "tiny")
END_OF_TURN = {"gemma": "<turn|>", "qwen": "<|im_end|>", "tiny": "<|stop|>", "demo": "<turn|>"}
END_OF_TURN |= {name: END_OF_TURN[tokenizer] for name, (tokenizer, _) in GOLDEN_MODELS.items()}
BOS = {"gemma": "<bos>", "qwen": None}


class Writer:
    """Texts of many scripts."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self, words: int) -> str:
        """About so many words, of one script at a time or all mixed, with white space of all sorts around and between."""
        # Small tokenizers cut other scripts into bytes, and an answer of half a character is dropped.
        scripts = [list(WORDS), self.random.sample(list(WORDS), 2), ["plain"]][self.random.randrange(3)]
        parts = []
        for _ in range(self.random.randint(1, 2 * words)):
            choices = WORDS[self.random.choice(scripts)].split(" ")
            parts += [self.random.choice(choices), self.random.choice(SPACES)]
        text = "".join(parts)
        return text if text.strip() else "x" + text

    def line(self, words: int) -> str:
        """The same without outer white space or line breaks: what a label or a template is."""
        return " ".join(self.text(words).split()) or "x"


def save_models(folder: Path) -> dict[str, Path]:
    """Small tokenizers with templates: like Gemma's and Qwen's, simple and full ones, and the tests' own."""
    folders = {"tiny": tiny.save_model(folder / "tiny")}
    for name, (tokenizer, template) in GOLDEN_MODELS.items():
        folders[name] = folder / name
        folders[name].mkdir()
        shutil.copy(GOLDEN / f"{tokenizer}.json", folders[name] / "tokenizer.json")
        shutil.copy(template, folders[name] / "chat_template.jinja")
        special = {"bos_token": BOS[tokenizer], "eos_token": END_OF_TURN[name]}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (folders[name] / "tokenizer_config.json").write_text(json.dumps(settings))
        (folders[name] / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    return folders


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def write_jsonl(path: Path, rows: list[Any]) -> None:
    # Characters as they are, and here and there as escapes: both are JSON.
    lines = [json.dumps(row, ensure_ascii=number % 3 == 0) for number, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def write_sources(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Files of every kind with generated texts, and sources that use every setting."""
    write = Writer(seed)
    chance = write.random
    roles = [("user", "assistant"), ("user", "assistant", "user"), ("system", "user"), ("user",)]
    chats = [[{"role": role, "content": write.text(9)} for role in chance.choice(roles)] for _ in range(30)]
    texts = [write.text(40) for _ in range(60)]

    write_jsonl(folder / "texts.jsonl", [{"body": text, "other": [number]} for number, text in enumerate(texts)])
    with (folder / "texts.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n   \n" + json.dumps({"body": "  She went there. \n"}) + "\n" + json.dumps({"body": " "}) + "\n")
    unusable = [[{"role": "user", "content": "", "at": 1}, chats[0][0]], [{"role": "user", "content": None}], [], None]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in [*chats, *unusable]])

    labels = ["news", "2", "sport\u00e9", "other"]
    table = [{"a": write.text(6), "b": write.text(6), "kind": chance.choice(labels)} for _ in range(40)]
    (folder / "tables").mkdir()
    with (folder / "tables" / "some.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, ["a", "b", "kind"])
        rows.writeheader()
        # A CSV file cannot hold the character zero.
        rows.writerows({name: value.replace("\x00", "") for name, value in row.items()} for row in table)
    (folder / "tables" / "deep").mkdir()
    (folder / "tables" / "deep" / "more.json").write_text(json.dumps(table[:9]))
    samples = [{"subject": write.line(2), "object": chance.choice(labels[:3]), "more": 1} for _ in range(12)]
    relation = {"samples": samples, "prompt_templates": ["The kind of {} is", " {} is", "{}, which is {}:"]}
    (folder / "relation.json").write_text(json.dumps(relation))
    write_jsonl(folder / "flags.jsonl", [{"text": write.text(5), "label": number % 2 == 0} for number in range(8)])

    (folder / "qa").mkdir()
    questions = {label: [[write.text(8), write.text(5)] for _ in range(5)] for label in labels[1:]}
    (folder / "qa" / "qa.json").write_text(json.dumps(questions))
    turns = ("system", "control_user", "control_model", "stimulus_user", "stimulus_model")
    for kind in ("system", "control", "stimulus", "stimulus_completion"):
        rows = [{turn: write.text(9) for turn in turns} | {"label": chance.choice(labels)} for _ in range(12)]
        (folder / "qa" / f"{kind}.json").write_text(json.dumps(rows))

    write_jsonl(folder / "records.jsonl", [record(write, number) for number in range(60)])
    window = [{"share": 2, "window": [1, 4], "before_end": [0, 3]}, {"share": 1, "all": True}]
    return [
        {"name": "records", "kind": "records", "path": "records.jsonl", "reads": window},
        {
            "name": "lens",
            "kind": "context_prediction",
            "path": "texts.jsonl",
            "text": "body",
            "draws_per_text": 3,
            "window": [2, 9],
            "predict": [1, 9],
            "max_context_tokens": 64,
        },
        {
            "name": "chats",
            "kind": "context_prediction",
            "path": "chats.jsonl",
            "draws_per_text": 2,
            "count": 40,
            "direction": "previous",
            "predict": [1, 5],
        },
        {
            "name": "said",
            "kind": "context_prediction",
            "path": "chats.jsonl",
            "within": "assistant",
            "draws_per_text": 2,
            "predict": [1, 7],
            "max_context_tokens": 90,
        },
        {
            "name": "tables",
            "kind": "classification",
            "path": "tables",
            "text": "{a}: {b} ",
            "label": "kind",
            "questions": ["Is it {label}?", "Which kind is it?", "{label} or not {label}?", "{ {b}} {}: {label}"],
            "labels": {"news": ["news", "news!", "so"], "2": "two", "sport\u00e9": ["sport", "so"], "other": []},
            "prefix": "Answer: ",
            "questions_per_text": 4,
            "count": 120,
        },
        {
            "name": "relation",
            "kind": "classification",
            "path": "relation.json",
            "questions": ["Is this statement {label}?"],
        },
        {"name": "flags", "kind": "classification", "path": "flags.jsonl", "questions": ["{label}?", "True or false?"]},
        {
            "name": "qa",
            "kind": "latentqa",
            "path": "qa",
            "types": ["system", "control", "stimulus", "stimulus_completion"],
            "questions_per_stimulus": 3,
        },
    ]


def whole(text: str, at: int) -> int:
    """The next place that splits no character from its marks.

    Of characters that a normalizer joins or reorders, tokenizers' offsets tell only one.
    """
    joined = lambda character: unicodedata.combining(character) or "\u1160" <= character <= "\u11ff"  # noqa: E731
    return next(place for place in range(at, len(text) + 1) if place == len(text) or not joined(text[place]))


def record(write: Writer, number: int) -> dict[str, Any]:
    """An Example with some of the optional fields."""
    chance = write.random
    made: dict[str, Any] = {"id": f"r{number}", "question": write.text(8), "answer": write.text(4)}
    if chance.random() < 0.1:
        made["answer"] += chance.choice(sorted(set(END_OF_TURN.values())))
    if number % 2:
        made["context"] = "The " + write.text(20)
        text = made["context"]
        start = whole(text, chance.randint(0, len(text) // 2))
        spans = [{"start": start, "end": whole(text, chance.randint(start + 1, len(text)))}, {"start": 0, "end": 3}]
    else:
        roles = ["system", "user", "assistant", "user", "assistant"][chance.randint(0, 1) : chance.randint(2, 5)]
        outer = ["", " ", "\n", " \n ", "\t\n"]
        made["context"] = [
            {"role": role, "content": f"{chance.choice(outer)}A {write.text(9)} z{chance.choice(outer)}"}
            for role in roles
        ]
        message = chance.randrange(len(roles))
        spans = [chance.choice([{"message": message}, {"message": message, "onwards": True}])]
        if chance.random() < 0.5:
            content = made["context"][message]["content"]
            start = whole(content, chance.choice([0, 0, chance.randrange(len(content))]))
            start = min(start, len(content) - 1)
            end = whole(content, chance.randint(start + 1, min(len(content), start + chance.choice([2, 99]))))
            spans = [{"message": message, "start": start, "end": end}]
    if chance.random() < 0.7:
        made["read"] = spans[:1] if chance.random() < 0.5 else spans
    if chance.random() < 0.4:
        made["positions"] = chance.choice(
            ["all", [0, -1, 0], {"window": [1, 3]}, {"window": [2, 5], "before_end": [1, 2]}]
        )
    if chance.random() < 0.3:
        made["layers"] = chance.choice([[0.5], [1, 0.29, 7], [0]])
    if chance.random() < 0.3:
        made |= {"target": chance.choice(["adapter", "difference"]), "meta": {"b": [1], "a": {"\u00e9": None}}}
    return made


def require_equal(root: Path, out: Path, model: str, *, end_of_turn: str, data: dict[str, Any]) -> PackedDataset:
    """Pack, and compare every datapoint, the drops and the bad rows with the reference."""
    recipe = parse_recipe({"model": {"name": model}, "data": data})
    pack(recipe, root=root, out=out, max_errors=100)
    packed = PackedDataset.open(out, verify=True)
    settings = Settings(
        num_layers=num_layers(model),
        read_layers=list(dict.fromkeys(resolve_layer(depth, num_layers(model)) for depth in recipe.data.read_depths)),
        **{name: getattr(recipe.data, name) for name in ("seed", "layers_per_example", "examples_per_shard")},
        max_input_tokens=recipe.data.max_input_tokens,
        max_context_tokens=recipe.data.max_context_tokens,
    )
    sources = []
    for source in map(to_dict, recipe.data.sources):
        if source["kind"] == "latentqa":
            source["qa"] = json.loads((root / source["path"] / "qa.json").read_bytes())
        sources.append((source, read_tables(source, root)))
    reference = Reference(model_folder(model), end_of_turn=end_of_turn)
    expected, drops, errors, without_donor = build_all(reference, settings, sources)
    assert [datapoint.id for datapoint in packed] == [datapoint.id for datapoint in expected]
    for found, wanted in zip(packed, expected, strict=True):
        for field, value in asdict(wanted).items():
            got = getattr(found, field)
            assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, (wanted.id, field)
    assert packed.manifest["drops"] == drops
    assert packed.manifest["errors"] == errors
    counts = packed.manifest["counts"]
    assert counts["unanswerable"] == sum(point.meta.get("unanswerable") is True for point in expected)
    assert counts["without_donor"] == without_donor
    return packed


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_packs_equal_the_reference(tmp_path: Path, models: dict[str, Path], model: str, seed: int) -> None:
    sources = write_sources(tmp_path, seed)
    data = {
        "sources": sources,
        "seed": seed,
        "examples_per_shard": 64,
        "max_input_tokens": 600,
        "max_context_tokens": 200,
    }
    packed = require_equal(tmp_path, tmp_path / "packed", str(models[model]), end_of_turn=END_OF_TURN[model], data=data)
    assert len(packed) > 300
    assert {datapoint.source for datapoint in packed} == {source["name"] for source in sources}


@pytest.mark.parametrize("layers_per_example", ["each", "together"])
def test_layers_equal_the_reference(tmp_path: Path, models: dict[str, Path], layers_per_example: str) -> None:
    data = {"sources": write_sources(tmp_path, 2), "layers_per_example": layers_per_example, "examples_per_shard": 100}
    require_equal(tmp_path, tmp_path / "packed", str(models["gemma"]), end_of_turn=END_OF_TURN["gemma"], data=data)


def test_unanswerable_examples_equal_the_reference(tmp_path: Path, models: dict[str, Path]) -> None:
    """The same question about a context that does not tell, within the shard."""
    rule = {"share": 0.4, "answer": "I cannot tell."}
    sources = [source for source in write_sources(tmp_path, 3) if source["kind"] != "context_prediction"]
    # Bad rows are bad once, in their own line, whoever draws their contexts.
    bad = [{"id": f"bad{number}", "context": "Short.", "question": "?", "answer": "!"} for number in range(20)]
    with (tmp_path / "records.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row | {"positions": [99]}) + "\n" for row in bad)
    data = {"sources": [source | {"unanswerable": rule} for source in sources], "examples_per_shard": 50}
    packed = require_equal(
        tmp_path, tmp_path / "packed", str(models["qwen"]), end_of_turn=END_OF_TURN["qwen"], data=data
    )
    told = [datapoint for datapoint in packed if datapoint.answer == rule["answer"]]
    assert 0.3 < len(told) / len(packed) < 0.5
    assert all(datapoint.meta["unanswerable"] for datapoint in told)
    assert len(told) == packed.manifest["counts"]["unanswerable"]
    assert packed.manifest["errors"]["position_out_of_range"] >= 20


def test_an_unanswerable_example_without_a_donor_is_counted(tmp_path: Path, models: dict[str, Path]) -> None:
    lines = [{"id": f"r{number}", "context": "One text.", "question": "What?", "answer": "It."} for number in range(9)]
    write_jsonl(tmp_path / "same.jsonl", lines)
    source = {
        "name": "same",
        "kind": "records",
        "path": "same.jsonl",
        "unanswerable": {"share": 0.999, "answer": "No."},
    }
    packed = require_equal(
        tmp_path, tmp_path / "packed", str(models["qwen"]), end_of_turn=END_OF_TURN["qwen"], data={"sources": [source]}
    )
    counts = packed.manifest["sources"]["same"]
    assert (counts["unanswerable"], counts["without_donor"]) == (0, 9)
    assert {point.answer for point in packed} == {"It."}


def test_texts_with_several_labels_equal_the_reference(tmp_path: Path, models: dict[str, Path]) -> None:
    """A line for each name in a sentence, and claims about one text that are labelled each for itself."""
    names = ["Ada", "Bob", "Cleo", "Dan", "Eve"]
    told = {f"Sentence {number}.": {names[number % 5], names[number * 3 % 5], names[0]} for number in range(30)}
    told["Everybody came."] = set(names)
    rows = [
        {"text": text, "label": name, "about": name[::-1]} for text, named in told.items() for name in sorted(named)
    ]
    write_jsonl(tmp_path / "names.jsonl", rows)
    claims = [{"text": "A premise.", "claim": f"Claim {number}.", "label": number % 2 == 0} for number in range(12)]
    write_jsonl(tmp_path / "claims.jsonl", claims)
    asked_twice = {
        "questions": ["Is {label} in it?", "Who is {about} backwards?"],
        "questions_per_text": 2,
        "count": 150,
    }
    sources = [
        {"name": "names", "kind": "classification", "path": "names.jsonl", **asked_twice},
        {"name": "claims", "kind": "classification", "path": "claims.jsonl", "questions": ["{claim} Is that {label}?"]},
    ]
    packed = require_equal(
        tmp_path, tmp_path / "packed", str(models["qwen"]), end_of_turn=END_OF_TURN["qwen"], data={"sources": sources}
    )
    answers = set()
    for point in packed:
        if point.source == "names" and point.question.startswith("Is "):
            text = rows[int(point.id.split("/")[1])]["text"]
            assert (point.question.split()[1] in told[text]) == (point.answer == "Yes"), (text, point.question)
            answers.add(point.answer)
    assert answers == {"Yes", "No"}
    # Of the sentence that names all, nothing can be asked that is wrong.
    assert 0 < packed.manifest["drops"]["no_wrong_label"] < 5
    assert packed.manifest["sources"]["claims"]["examples"] == 12


REAL_SOURCES: list[dict[str, Any]] = [
    {"name": "qa", "kind": "latentqa", "path": "latentqa", "types": ["system", "control", "stimulus"], "count": 300},
    {
        "name": "truth",
        "kind": "classification",
        "path": "classification/geometry_of_truth",
        "text": "statement",
        "labels": {"1": "true", "0": "false"},
        "questions": ["Is this statement {label}?", "Is what is said here {label}?"],
        "prefix": "Answer with 'Yes' or 'No' only. ",
        "questions_per_text": 2,
        "count": 200,
    },
    {
        "name": "tense",
        "kind": "classification",
        "path": "classification/tense/tense_processed.json",
        "text": "sentence",
        "questions": ["Is this in the {label} tense?"],
        "count": 100,
    },
    {
        "name": "relations",
        "kind": "classification",
        "path": "classification/relations",
        "questions": ["Is this statement {label}?"],
        "count": 200,
    },
]


@real_data.needed
@pytest.mark.parametrize("model", ["demo", "gemma", "qwen"])
def test_real_files_equal_the_reference(tmp_path: Path, models: dict[str, Path], model: str) -> None:
    name = "demo" if model == "demo" else str(models[model])
    data = {"sources": REAL_SOURCES, "examples_per_shard": 256}
    require_equal(real_data.FOLDER, tmp_path / "packed", name, end_of_turn=END_OF_TURN[model], data=data)
