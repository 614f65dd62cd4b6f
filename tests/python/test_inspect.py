"""`ao inspect`: datapoints shown as they are, and damage of every kind found and named."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tiny
from ao.cli import main
from ao.config import parse_recipe
from ao.inspection import inspect, text
from ao.inspection.rows import token_texts
from ao.inspection.verify import NAMED
from ao.manifest import canonical_json
from ao.pack import pack
from ao.plan import Plan, PlanSettings, command, table
from ao.prompt import framer
from ao.shards import PackedDataset
from ao.summary import LENGTH_EDGES, added_up

EXAMPLES = [
    {
        "id": f"e{i}",
        "context": f"The city of Paris {i // 3} is [in] France.\nIs it?",
        "question": f"Which ? {i}?",
        "answer": f"Yes {i}",
        "positions": [3 + i % 3, 6],
        "meta": {"day": i},
    }
    for i in range(25)
]
CLASSES = [{"text": f"Paris {i} is in France.", "label": "Yes" if i % 3 else "No"} for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Records read at each layer, labels at one, texts at all together."""
    root = tmp_path_factory.mktemp("packed")
    build(root, model)
    return root / "packed"


def recipe(model: Path, seed: int = 0) -> Any:
    sources = [
        {"name": "r", "kind": "records", "path": "records.jsonl", "layers_per_example": "each"},
        {"name": "c", "kind": "classification", "path": "classes.jsonl", "questions": ["Is it {label}?"]},
        {"name": "t", "kind": "context_prediction", "path": "texts.txt", "layers_per_example": "together"},
    ]
    sources[2] |= {"window": [1, 3], "predict": [1, 2]}
    data = {"sources": sources, "examples_per_shard": 10, "seed": seed}
    return parse_recipe({"model": {"name": str(model)}, "data": data})


def build(root: Path, model: Path, *, seed: int = 0, **keywords: Any) -> None:
    (root / "records.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    (root / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CLASSES))
    (root / "texts.txt").write_text("\n\n".join(f"She will go to the park {i}, and he went." for i in range(8)))
    pack(recipe(model, seed), root=root, out=root / "packed", **keywords)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "packed")


def shown(*args: object, **keywords: Any) -> str:
    return text(inspect(*args, **keywords))


def verified(path: Path, **keywords: Any) -> list[str]:
    result = inspect(path, check=True, **keywords)
    assert result["ok"] == (not result["problems"])
    return result["problems"]


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_summary_has_what_the_manifest_has(packed: Path) -> None:
    out, manifest = shown(packed), json.loads((packed / "manifest.json").read_text())
    result = inspect(packed)
    assert {name: result[name] for name in manifest if name != "kind"} == {
        name: value for name, value in manifest.items() if name != "kind"
    }
    counts = manifest["counts"]
    assert result["sharing"] == counts["context_tokens_read"] / counts["context_tokens"]
    assert f"{counts['examples']} of {counts['offered']}, {counts['datapoints']} datapoints" in out
    assert f"a factor of {result['sharing']:.2f}" in out
    assert f"tokenizer {manifest['oracle']['tokenizer'][:8]}.." in out
    for shard in manifest["shards"]:
        assert f"{shard['file']} {shard['datapoints']:>11,} datapoints" in out
        assert shard["sha256"][:12] in out
    answers = manifest["sources"]["c"]["answers"]
    assert f"Yes {answers['Yes'] / 12:.0%}" in out
    for column in ("input", "context"):
        assert sum(manifest["lengths"][column]) == counts["datapoints"]
    bars = [line for line in out.splitlines() if line.strip().startswith(("16-31", "32-47"))]
    assert all("#" in line for line in bars)


def test_the_marked_tokens_are_those_that_are_read(packed: Path, model: Path) -> None:
    data = PackedDataset.open(packed)
    texts = framer(str(model))
    for row in (0, 4, 74, 80, -1, -4):
        result = inspect(packed, rows=[row], model=str(model))
        point, found = data[row], result["rows"][0]
        assert found["id"] == point.id
        assert "".join(found["input_tokens"]) == texts.decode(point.input_ids)
        assert "".join(found["context_tokens"]) == texts.decode(point.context_ids)
        # Read from the page itself: what stands in marks is what the arrays say, and nothing else is marked.
        page = text(result, color=True)
        context = page[page.index("context\x1b") :]
        marked = [part.split("]\x1b[0m")[0] for part in context.split("\x1b[30;43m[")[1:]]
        expected = [texts.decode([point.context_ids[at]]) for at in np.unique(point.read_positions)]
        assert marked == [token.replace("\n", "\\n") for token in expected]
        learned = [part.split("]\x1b[0m")[0] for part in page.split("\x1b[30;42m[")[1:]]
        assert "".join(learned) == point.answer + "<|stop|>"
        placeholders = [part.split("]\x1b[0m")[0] for part in page.split("\x1b[30;46m[")[1:]]
        assert placeholders == [f"?{number}@{layer}" for number, layer in enumerate(point.layers.tolist(), start=1)]
        table = [line.split() for line in page[page.index("position") :].splitlines()[1:] if line.strip()]
        numbers = [list(map(int, line[:3])) for line in table[: len(point.layers)]]
        assert numbers == [
            [number, layer, at]
            for number, (layer, at) in enumerate(
                zip(point.layers.tolist(), point.read_positions.tolist(), strict=True), start=1
            )
        ]


def test_layers_are_told_where_not_all_tokens_are_read_at_the_same(copy: Path, model: Path) -> None:
    row = next(i for i, point in enumerate(PackedDataset.open(copy)) if point.source == "t")
    page = shown(copy, rows=[row], model=str(model))
    assert "at layers 2, 4, 6" in page
    assert " @2" not in page

    def part(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        start = arrays["placeholder_offsets"][PackedDataset.open(copy).place(row)[1]]
        arrays["read_positions"][start] -= 1

    file = change(copy, part, PackedDataset.open(copy).place(row)[0])
    assert file.is_file()
    page = shown(copy, rows=[row], model=str(model))
    assert " @2]" in page
    assert " @4,6]" in page


def test_a_long_prompt_and_a_long_context_are_cut_where_nothing_is_read(tmp_path: Path, model: Path) -> None:
    words = " ".join(f"the city {i}" for i in range(300))
    example = {
        "id": "long",
        "context": words,
        "question": "Is it?",
        "answer": "Yes",
        "positions": [5, *range(900, 950)],
    }
    (tmp_path / "records.jsonl").write_text(json.dumps(example))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    read = parse_recipe({"model": {"name": str(model)}, "data": {"sources": [source]}})
    pack(read, root=tmp_path, out=tmp_path / "packed")
    page = shown(tmp_path / "packed", rows=[0], model=str(model))
    assert "[?1@" in page
    assert " .. [?51@" in page
    assert "[?30@" not in page
    assert f"  | .. {900 - 60 - 66} tokens ..\n" in page
    assert "and 11 more; --json lists all" in page
    assert len(inspect(tmp_path / "packed", rows=[0], model=str(model))["rows"][0]["placeholders"]) == 51


def test_a_shard_of_which_nothing_was_kept_is_whole(tmp_path: Path, model: Path) -> None:
    rows = [
        {"id": f"e{i}", "context": "the city " * (200 if i < 10 else 9), "question": "q?", "answer": "a"}
        for i in range(12)
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    data = {"sources": [source], "examples_per_shard": 5, "max_context_tokens": 50}
    pack(parse_recipe({"model": {"name": str(model)}, "data": data}), root=tmp_path, out=tmp_path / "packed")
    assert [shard["datapoints"] for shard in inspect(tmp_path / "packed")["shards"]] == [0, 0, 2]
    assert verified(tmp_path / "packed", model=str(model)) == []
    assert inspect(tmp_path / "packed", rows=[0], ids=["e11"])["rows"][1]["id"] == "e11"
    assert "10 context_too_long" in shown(tmp_path / "packed")


def test_a_duplicate_may_read_the_beginning_that_two_stored_contexts_have_in_common(
    tmp_path: Path, model: Path
) -> None:
    texts = [f"The city of Paris is in France {end}." for end in ("today", "now")]
    asked = {"question": "Is it?", "answer": "Yes"}
    records = [
        {"id": f"{at}{positions}", "context": text, "positions": positions, **asked}
        for at, text in enumerate(texts)
        for positions in ([0, 1], [-1])
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    data = {"read_depths": [0.5], "sources": [source]}
    pack(parse_recipe({"model": {"name": str(model)}, "data": data}), root=tmp_path, out=tmp_path / "packed")
    counts = PackedDataset.open(tmp_path / "packed").manifest["counts"]
    assert (counts["contexts"], counts["duplicates"]) == (2, 1)
    assert verified(tmp_path / "packed") == []


def test_an_example_is_found_by_its_id(packed: Path) -> None:
    def ids(example: str) -> list[str]:
        return [row["id"] for row in inspect(packed, ids=[example])["rows"]]

    assert ids("e1") == ["e1@L2", "e1@L4", "e1@L6"]
    assert ids("e24@L4") == ["e24@L4"]
    assert ids("t/3/0") == ["t/3/0"]
    for absent in ("e", "1", "e1@L", "@L2", "e25"):
        with pytest.raises(IndexError, match="no datapoint of an example"):
            ids(absent)


def test_without_the_tokenizer_ids_and_stored_texts_are_shown(packed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, point = shown(packed, rows=[4]), PackedDataset.open(packed)[4]
    assert "token ids only: model tiny: no such folder, and not in the Hub's local cache; --model" in page
    flat = " ".join(line.removeprefix("  | ") for line in page.splitlines())
    prompt = list(map(str, point.input_ids[: point.answer_start].tolist()))
    for number, at in enumerate(point.placeholders.tolist(), start=1):
        prompt[at] = f"[?{number}@{point.layers[number - 1]}]"
    assert " ".join(prompt) in flat
    assert " ".join(f"[{token}]" for token in point.input_ids[point.answer_start :].tolist()) in flat
    assert f"question  {point.question}" in page
    assert f"answer    {point.answer}" in page
    assert f"day {point.meta['day']}" in page


def test_a_tokenizer_that_is_another_one_is_refused(packed: Path, tmp_path: Path, monkeypatch) -> None:
    other = tiny.save_model(tmp_path / "tiny")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|think|>", "<|mull|>"))
    with pytest.raises(ValueError, match="another tokenizer than the data set was packed with"):
        inspect(packed, rows=[0], model=str(other))
    # A folder that happens to have the model's name is not taken for it.
    monkeypatch.chdir(tmp_path)
    assert "token ids only: model 'tiny' has another tokenizer" in shown(packed, rows=[0])


def test_tokens_together_are_the_text(model: Path) -> None:
    texts = framer(str(model))
    for sample in ("Hé 🎉 the city\n", "日本語 text", "e\u0301\u202e x", ""):
        ids = texts.encode(sample)
        tokens = token_texts(texts, ids)
        assert len(tokens) == len(ids)
        assert "".join(tokens) == sample


def test_texts_cannot_command_the_terminal(tmp_path: Path, model: Path) -> None:
    example = {"id": "a\x1b[2J", "context": "x \x1b[31m\u202e y", "question": "q\x07?", "answer": "\x1b]0;title"}
    (tmp_path / "records.jsonl").write_text(json.dumps(example))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    read = parse_recipe({"model": {"name": str(model)}, "data": {"sources": [source]}})
    pack(read, root=tmp_path, out=tmp_path / "packed")
    for keywords in ({"model": str(model)}, {}):
        page = shown(tmp_path / "packed", rows=[0], **keywords)
        assert all(char.isprintable() or char == "\n" for char in page)
    assert "\\x1b[2J" in page


# --- on the command line ---------------------------------------------------------------------------------------------


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ao.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "inspect", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def on_a_terminal(*args: object, **environment: str) -> str:
    """What the command writes where stdout is a terminal."""
    ours, its = pty.openpty()
    code = "import sys; from ao.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "inspect", *map(str, args)]
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    with subprocess.Popen(command, stdout=its, stderr=subprocess.DEVNULL, env=variables | environment) as process:
        os.close(its)
        out = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the terminal is gone with the process
                break
            if not chunk:
                break
            out += chunk
        assert process.wait() == 0
    os.close(ours)
    return out.decode()


def test_colours_on_a_terminal_only(packed: Path, model: Path) -> None:
    args = (packed, "--row", 0, "--model", model)
    assert "\x1b[30;43m[" in on_a_terminal(*args)
    assert "\x1b" not in on_a_terminal(*args, NO_COLOR="1")
    piped = run(*args)
    assert piped.returncode == 0
    assert "\x1b" not in piped.stdout
    assert "[?1@2][?2@2]" in piped.stdout
    assert "The city[ of] Paris [0]" in piped.stdout
    # A terminal that lacks a character gets its code.
    assert run(*args, PYTHONIOENCODING="ascii").returncode == 0


def test_one_json_object_and_exit_codes(packed: Path, copy: Path, capsys) -> None:
    def call(*args: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = 0
        try:
            main(["inspect", *map(str, args), "--json"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return code, json.loads(out)

    assert call(packed)[1]["counts"]["datapoints"] == len(PackedDataset.open(packed))
    code, result = call(packed, "--row", -1, 0, "--id", "e3@L2")
    last = len(PackedDataset.open(packed)) - 1
    assert (code, [row["row"] for row in result["rows"]]) == (0, [last, 0, 9])
    code, result = call(packed, "--verify")
    assert (code, result["ok"], result["problems"]) == (0, True, [])
    assert result["checked"]["shards"] == 5
    flip(copy / "shard-00002.safetensors")
    code, result = call(copy, "--verify")
    assert (code, result["ok"]) == (1, False)
    code, result = call(packed, "--row", last + 1)
    assert (code, f"no row {last + 1}; rows are 0 to {last}" in result["error"]) == (2, True)
    assert call(packed / "nothing")[0] == 2


def test_inspecting_needs_no_torch(packed: Path, model: Path) -> None:
    code = (
        "import sys; from ao.cli import main\n"
        f"main(['inspect', {str(packed)!r}, '--row', '0', '--model', {str(model)!r}, '--json'])\n"
        f"main(['inspect', {str(packed)!r}, '--verify', '--json'])\n"
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"


# --- what is found ---------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def change(packed: Path, edit: Change, name: str = "shard-00000.safetensors", *, is_whole: bool = True) -> Path:
    """Edit a shard's arrays and header, and list the result in the manifest as if it had been written so.

    Unless it `is_whole`, the digest in its header stays.
    """
    file = packed / name
    with safe_open(file, framework="numpy") as opened:
        metadata = json.loads(opened.metadata()["ao"])
    arrays = {key: array.copy() for key, array in load_file(file).items()}
    edit(arrays, metadata)
    if is_whole:
        save_file(arrays, file)
        data = file.read_bytes()
        data = data[8 + int.from_bytes(data[:8], "little") :]
        del metadata["digest"]
        metadata["digest"] = xxhash.xxh3_128_hexdigest(data + canonical_json(metadata).encode())
    save_file(arrays, file, metadata={"ao": json.dumps(metadata)})
    manifest = json.loads((packed / "manifest.json").read_text())
    for entry in manifest["shards"]:
        if entry["file"] == name:
            entry |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    (packed / "manifest.json").write_text(json.dumps(manifest))
    return file


def test_a_whole_data_set_has_no_problem(packed: Path, model: Path) -> None:
    result = inspect(packed, check=True, model=str(model))
    assert result["problems"] == []
    data = PackedDataset.open(packed)
    checked = result["checked"]
    assert (checked["shards"], checked["datapoints"]) == (5, len(data))
    assert checked["contexts"] == data.manifest["counts"]["contexts"]
    assert checked["vocabulary"] > 256
    assert result["notes"] == []
    assert "all is well" in text(result)
    # Writing a shard again as it is must not be what the tests below find.
    assert verified(packed, model=str(model)) == []


def test_records_that_say_their_own_source_are_counted_by_it(tmp_path: Path, model: Path) -> None:
    lines = [{**example, **({"source": "mine"} if i % 5 == 0 else {})} for i, example in enumerate(EXAMPLES)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    values = {"model": {"name": str(model)}, "data": {"sources": [source]}}
    summary = pack(parse_recipe(values), root=tmp_path, out=tmp_path / "packed")
    assert {name: counts["examples"] for name, counts in summary["sources"].items()} == {"mine": 5, "r": 20}
    assert verified(tmp_path / "packed") == []


def test_headers_add_up_to_the_manifest(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    headers = []
    for entry in manifest["shards"]:
        with safe_open(packed / entry["file"], framework="numpy") as opened:
            headers.append(json.loads(opened.metadata()["ao"])["stats"])
    assert {name: manifest[name] for name in added_up(headers)} == added_up(headers)
    assert manifest["lengths"]["edges"] == list(LENGTH_EDGES)


def test_every_flipped_byte_is_found(copy: Path) -> None:
    file = copy / "shard-00001.safetensors"
    whole = file.read_bytes()
    for at in (0, 9, 200, len(whole) // 2, len(whole) - 1):
        content = bytearray(whole)
        content[at] ^= 4
        file.write_bytes(content)
        problems = verified(copy)
        assert any(problem.startswith("shard-00001.safetensors: damaged: sha256") for problem in problems), at


def test_missing_cut_and_foreign_shards_are_named(copy: Path) -> None:
    file = copy / "shard-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    assert verified(copy) == [
        f"shard-00003.safetensors: expected {len(content)} bytes, got {len(content) - 8}; build the data set again"
    ]
    file.unlink()
    assert verified(copy) == ["shard-00003.safetensors: missing; build the data set again, or copy the file here"]
    file.write_bytes(content)
    assert verified(copy) == []
    shutil.copy(file, copy / "shard-00009.safetensors")
    assert verified(copy) == [
        "shard-00009.safetensors: manifest.json does not list it; remove it, or build the data set again"
    ]


def test_a_shard_in_anothers_place_is_found(copy: Path) -> None:
    (copy / "shard-00000.safetensors").write_bytes((copy / "shard-00001.safetensors").read_bytes())
    change(copy, lambda arrays, metadata: None)
    problems = verified(copy)
    assert any("its header says that it is shard 1" in problem for problem in problems)
    assert any("stands in" in problem and "ids must differ" in problem for problem in problems)


def wrong_answer(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["input_ids"][arrays["input_offsets"][3] - 1] -= 1


def wrong_placeholder(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["placeholders"][arrays["placeholder_offsets"][4]] -= 1


def wrong_placeholder_token(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    row = 5
    at = arrays["placeholders"][arrays["placeholder_offsets"][row]]
    arrays["input_ids"][arrays["input_offsets"][row] + at] = 7


def same_placeholder_twice(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    first = arrays["placeholder_offsets"][2]
    arrays["placeholders"][first] = arrays["placeholders"][first + 1]


def deep_layer(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["layers"][arrays["placeholder_offsets"][6]] = 8


def unknown_token(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["input_ids"][arrays["input_offsets"][7] + 1] = 600


def negative_context_token(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["context_ids"][arrays["context_offsets"][1]] = -1


def reads_before_its_end(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    end = arrays["placeholder_offsets"][9]
    arrays["read_positions"][end - 1] -= 1


def reads_outside(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    end = arrays["placeholder_offsets"][9]
    arrays["read_positions"][end - 1] += 1


def context_that_nobody_shows_whole(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["stats"]["context_tokens"] += 1
    arrays["context_ids"] = np.append(arrays["context_ids"], arrays["context_ids"][-1:])
    arrays["context_offsets"][-1] += 1


def repeated_id(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    offsets = arrays["id_offsets"]
    arrays["id_bytes"][offsets[1] : offsets[2]] = arrays["id_bytes"][offsets[0] : offsets[1]]


def text_that_is_no_utf8(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["question_bytes"][arrays["question_offsets"][8]] = 0xFF


def empty_question(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["question_offsets"][10] = arrays["question_offsets"][9]


def meta_that_is_no_object(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    arrays["meta_bytes"][arrays["meta_offsets"][8]] = ord("(")


def another_build(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["build"] = "f" * 64


def another_tokenizer(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["fingerprints"]["oracle"]["tokenizer"] = "f" * 64


def count_of_a_source(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["stats"]["sources"]["r"]["answer_tokens"] += 1


def count_of_unanswerable(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["stats"]["sources"]["r"]["unanswerable"] += 1


def count_of_contexts(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["stats"]["duplicates"] += 1


def count_of_lengths(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["stats"]["input_lengths"][0] += 1


def offered_and_forgotten(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    metadata["stats"]["sources"]["r"]["offered"] += 1


def header_without_counts(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    del metadata["stats"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (wrong_answer, "datapoint 2 (e0@L6): its answer ends with token"),
        (wrong_placeholder, "datapoint 4 (e1@L4): the placeholder at 8 is token"),
        (
            wrong_placeholder_token,
            "datapoint 5 (e1@L6): the placeholder at 9 is token 7, expected the placeholder ' ?'",
        ),
        (same_placeholder_twice, "datapoint 2 (e0@L6): two of its placeholders are the same token"),
        (deep_layer, "datapoint 6 (e2@L2): it reads a layer that a target of 8 layers has not"),
        (unknown_token, "datapoint 7 (e2@L4): 600 is no token id of a vocabulary of"),
        (negative_context_token, "stored context 1: -1 is no token id of a vocabulary of"),
        (reads_before_its_end, "datapoint 8 (e2@L6): its context has 7 tokens, expected 6"),
        (reads_outside, "datapoint 8: it reads outside its context"),
        (context_that_nobody_shows_whole, "tokens are stored, datapoints show"),
        (repeated_id, "the id 'e0@L2' stands in shard-00000.safetensors already"),
        (text_that_is_no_utf8, "datapoint 8 (e2@L6): its question must be UTF-8 and not empty"),
        (empty_question, "datapoint 9 (e3@L2): its question must be UTF-8 and not empty"),
        (meta_that_is_no_object, "datapoint 8 (e2@L6): its meta must be a JSON object"),
        (another_build, "it belongs to build ffffffff.., expected"),
        (another_tokenizer, "its header has another oracle than the manifest"),
        (count_of_a_source, "source 'r': its header counts answer_tokens"),
        (count_of_unanswerable, "source 'r': its header counts unanswerable 1, its arrays hold 0"),
        (count_of_contexts, "its header counts duplicates 1, its arrays hold 0"),
        (count_of_lengths, "its header counts input_lengths"),
        (offered_and_forgotten, "source 'r': 11 examples offered, but 10 kept and 0 left out"),
        (header_without_counts, "its header cannot be read (KeyError('stats'))"),
    ],
)
def test_what_a_shard_holds_is_checked(copy: Path, model: Path, edit: Change, words: str) -> None:
    change(copy, edit)
    problems = verified(copy, model=str(model))
    assert any(
        problem.split(": ")[0].endswith("shard-00000.safetensors") and words in problem for problem in problems
    ), problems


@pytest.mark.parametrize("edit", [text_that_is_no_utf8, count_of_contexts])
def test_a_shard_without_a_manifest_is_checked_against_its_own_digest(copy: Path, edit: Change) -> None:
    file = change(copy, edit, is_whole=False)
    assert any("shard-00000.safetensors: damaged: digest expected" in problem for problem in verified(file))


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(copy: Path) -> None:
    whole = (copy / "manifest.json").read_bytes()
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(len(whole), size=60), rng.integers(7, size=60), strict=True):
        content = bytearray(whole)
        content[at] ^= 1 << int(bit)
        (copy / "manifest.json").write_bytes(content)
        try:
            problems = verified(copy)
        except ValueError as error:
            problems = [str(error)]
        assert problems, (at, bit)


def test_counts_that_differ_from_the_headers_are_found(copy: Path) -> None:
    whole = (copy / "manifest.json").read_text()
    for edit, words in (
        (
            lambda m: m["counts"].update(input_tokens=1),
            "manifest.json: counts differ from what the shards' headers add up to",
        ),
        (lambda m: m["drops"].update(too_long=2), "manifest.json: drops differ"),
        (lambda m: m["sources"]["c"]["answers"].update(Yes=1), "manifest.json: sources differ"),
        (lambda m: m["lengths"]["input"].reverse(), "manifest.json: lengths differ"),
        (lambda m: m["shards"][1].update(datapoints=3), "shard-00001.safetensors: the manifest says 3 datapoints"),
        (lambda m: m["config"].update(seed=1), "manifest.json: its config, inputs or fingerprints are not those"),
        (lambda m: m["inputs"][0].update(bytes=1), "manifest.json: its config, inputs or fingerprints are not those"),
        (lambda m: m["shards"].pop(), "shard-00004.safetensors: manifest.json does not list it"),
        (
            lambda m: m["shards"][0].update(file="shard-00001.safetensors"),
            "expected 5 shards from shard-00000.safetensors",
        ),
    ):
        manifest = json.loads(whole)
        edit(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert any(words in problem for problem in verified(copy)), words
    for name in ("counts", "oracle", "config", "lengths"):
        manifest = json.loads(whole)
        manifest[name].popitem()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        try:
            problems = verified(copy)
        except ValueError as error:
            problems = [str(error)]
        assert any(words in problem for problem in problems for words in ("lacks ", "differ", "not those"))
    (copy / "manifest.json").write_text('{"kind": "packed", "schema": 1}')
    with pytest.raises(ValueError, match=r"manifest\.json lacks build, framer, oracle"):
        inspect(copy)


def places(value: object, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where anything stands in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*above, key)
        yield from places(each, *above, key)


WRONG = [None, True, 0, -1, 1e9, float("nan"), 2**70, "x", "../x", "shard-00000.safetensors", [], [1], {}, {"a": 1}]


def test_whatever_a_manifest_holds_it_is_shown_or_named(copy: Path) -> None:
    """Each value taken away, and put to something else: no reader stumbles over it, and the check finds it."""
    whole, rng = (copy / "manifest.json").read_text(), random.Random(0)
    for place in places(json.loads(whole)):
        for wrong in ("absent", rng.choice(WRONG)):
            manifest = json.loads(whole)
            inner = manifest
            for key in place[:-1]:
                inner = inner[key]
            if wrong == "absent":
                del inner[place[-1]]
            elif inner[place[-1]] == wrong:
                continue
            else:
                inner[place[-1]] = wrong
            (copy / "manifest.json").write_text(json.dumps(manifest))
            for read in (
                lambda: shown(copy),
                lambda: shown(copy, rows=[0]),
                lambda: table(command(copy, [512])["budgets"]),
            ):
                with suppress(ValueError, FileNotFoundError):
                    read()
            try:
                problems = verified(copy)
            except ValueError as error:
                problems = [str(error)]
            assert any(copy.name in problem or ".json" in problem or "shard-" in problem for problem in problems), (
                place,
                wrong,
                problems,
            )


def test_many_problems_of_one_kind_are_counted(copy: Path) -> None:
    def every_answer(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        arrays["input_ids"][arrays["input_offsets"][1:] - 1] -= 1

    change(copy, every_answer)
    problems = [problem for problem in verified(copy) if "answer ends" in problem or "more like this" in problem]
    assert len(problems) == NAMED + 1
    assert problems[-1].endswith(f"datapoint: {30 - NAMED} more like this")


# --- other things that a path may hold -------------------------------------------------------------------------------


def test_unfinished_builds_say_how_to_go_on(tmp_path: Path, model: Path, packed: Path) -> None:
    partial = tmp_path / "packed.partial"
    build(tmp_path, model, part=(1, 2))
    # The name of the data set that is to be finds it too.
    for path in (partial, tmp_path / "packed"):
        page = shown(path)
        assert f"{partial}: an unfinished build of a packed data set" in page
        assert "1 of 2 parts are finished; run --part 0/2, then ao-pack RECIPE --merge" in page
    result = inspect(partial)
    manifest = json.loads((packed / "manifest.json").read_text())
    assert [shard["file"] for shard in result["shards"]] == [shard["file"] for shard in manifest["shards"][1::2]]
    assert result["examples"] == sum(shard["examples"] for shard in manifest["shards"][1::2])
    assert inspect(partial, rows=[0])["rows"][0]["id"] == "e10@L2"
    assert verified(partial) == []
    flip(partial / "shard-00003.safetensors")
    assert any("shard-00003" in problem and "sha256" in problem for problem in verified(partial))
    (partial / "shard-00003.safetensors").unlink()
    assert verified(partial) == ["shard-00003.safetensors: missing, though its part is finished; build that part again"]
    build(tmp_path, model, part=(0, 2))
    assert "all 2 parts are finished: ao-pack RECIPE --merge" in shown(partial)
    alone = tmp_path / "alone.partial"
    alone.mkdir()
    (alone / ".lock-0-of-1").touch()
    assert "no shard is finished" in shown(alone)
    assert "ao-pack RECIPE --resume goes on" in shown(alone)
    assert verified(alone) == []
    moved = shutil.copytree(packed, tmp_path / "whole.partial")
    assert f"mv {moved} {tmp_path / 'whole'}" in shown(moved)


def test_parts_of_two_builds_are_not_said_to_join(tmp_path: Path, model: Path) -> None:
    for name, seed, part in (("one", 0, (0, 2)), ("other", 1, (1, 2))):
        (tmp_path / name).mkdir()
        build(tmp_path / name, model, seed=seed, part=part)
    shutil.copytree(tmp_path / "other" / "packed.partial", tmp_path / "one" / "packed.partial", dirs_exist_ok=True)
    page = shown(tmp_path / "one" / "packed.partial")
    assert "its files are of 2 builds, so they do not join" in page
    assert re.search(r": part-0-of-2\.json, shard-00000\.safetensors.*: part-1-of-2\.json, shard-00001", page)
    assert "--merge" not in page


def test_a_shard_is_shown_by_itself(packed: Path, model: Path) -> None:
    file = packed / "shard-00002.safetensors"
    result = inspect(file)
    assert (result["kind"], result["examples"]) == ("shard", 10)
    assert "a shard of a packed data set" in text(result)
    data = PackedDataset.open(packed)
    first = next(index for index in range(len(data)) if data.place(index)[0] == file.name)
    assert inspect(file, rows=[0])["rows"][0]["id"] == data[first].id
    assert verified(file) == []


def test_a_plan_is_shown(packed: Path, tmp_path: Path) -> None:
    data = PackedDataset.open(packed)
    plan = Plan.make(data, PlanSettings(tokens_per_row=512))
    plan.save(tmp_path / "epoch.plan")
    result = inspect(tmp_path / "epoch.plan")
    assert result["kind"] == "plan"
    assert result["plan"] == plan.statistics()
    page = text(result)
    assert re.search(r"\n  tokens per row +512\n", page)
    assert re.search(rf"\n  fill +{plan.statistics()['fill']}\n", page)
    with pytest.raises(ValueError, match="the plan of an epoch, without datapoints"):
        inspect(tmp_path / "epoch.plan", rows=[0])


def test_one_thing_is_shown_at_a_time(packed: Path, tmp_path: Path) -> None:
    for asked in (
        {"rows": [0], "check": True},
        {"ids": ["x"], "plot": tmp_path / "x.png"},
        {"check": True, "plot": Path("x")},
    ):
        with pytest.raises(ValueError, match="one at a time"):
            inspect(packed, **asked)


def test_other_folders_and_files_are_named(tmp_path: Path, packed: Path, monkeypatch) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text('{"r": 16, "base_model_name_or_path": "demo"}')
    (tmp_path / "run" / "adapter" / "ao_config.json").write_text('{"model_name": "demo", "hook_onto_layer": 1}')
    shutil.copytree(packed, tmp_path / "run" / "packed")
    page = shown(tmp_path / "run" / "adapter")
    assert "an oracle's adapter" in page
    assert "injected after block  1" in page
    page = shown(tmp_path / "run")
    assert "packed   a packed data set" in page
    assert "adapter  an oracle's adapter" in page
    with pytest.raises(ValueError, match="an oracle's adapter, without datapoints; --row"):
        inspect(tmp_path / "run" / "adapter", check=True)
    monkeypatch.chdir(tmp_path / "run")
    assert inspect(Path("."))["kind"] == "run"
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "notes.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("recipe.toml", "a recipe; build its data set with ao-pack"),
        ("notes.txt", "neither a shard nor a plan"),
        ("empty", "neither a packed data set"),
    ):
        with pytest.raises(ValueError, match=words):
            inspect(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        inspect(tmp_path / "none")
    assert inspect(packed / "manifest.json")["kind"] == "packed"


def test_a_picture_is_drawn(packed: Path, tmp_path: Path) -> None:
    inspect(packed, plot=tmp_path / "a.png")
    inspect(packed, plot=tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_on_packing_reads_shards_with_safetensors_alone(packed: Path, tmp_path: Path, monkeypatch) -> None:
    """The snippet of docs/packing.md, run as it stands, gives what the data set's own reader gives."""
    page = (Path(__file__).parents[2] / "docs" / "packing.md").read_text(encoding="utf-8")
    code = page.split("<!-- test: plain -->\n```python\n")[1].split("```")[0]
    assert "ao" not in re.findall(r"(?:from|import) (\w+)", code)
    (tmp_path / "packed").symlink_to(packed)
    monkeypatch.chdir(tmp_path)
    found: list[tuple[Any, ...]] = []
    # The snippet ends inside its loop over datapoints.
    exec(f"{code}    found.append((input_ids, labels, where, layers, context_ids, read))", {"found": found})
    data = PackedDataset.open(packed)
    assert len(found) == data.manifest["shards"][0]["datapoints"]
    for point, (input_ids, labels, *arrays) in zip(data, found, strict=False):
        assert input_ids.tolist() == point.input_ids.tolist()
        learned = point.input_ids[point.answer_start :].tolist()
        assert labels.tolist() == [-100] * point.answer_start + learned
        expected = (point.placeholders, point.layers, point.context_ids, point.read_positions)
        assert [array.tolist() for array in arrays] == [array.tolist() for array in expected]
