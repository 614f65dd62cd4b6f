import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference as slow
import xxhash
from reference import Reference

import real_data
import tiny
from ao._ao import RULES
from ao.config import DataConfig, ModelConfig, load_recipe, parse_recipe, to_dict
from ao.pack import merge, pack
from ao.prompt import model_folder, resolve_layer
from ao.shards import PackedDataset
from ao.sources import blocks, files
from ao.summary import summary_text

USER = {"role": "user", "content": "  Where is Caf\u00e9 \U0001f469\u200d\U0001f680 e\u0301? "}
REPLY = {"role": "assistant", "content": "In the city of Paris."}
SYSTEM = {"role": "system", "content": "Think about France."}
ASKED = {"question": "Is this statement true?", "answer": "Yes"}

RECORDS: list[dict[str, Any]] = [
    {"id": "text", "context": "The city of Paris is in France.", **ASKED},
    {
        "id": "span",
        "context": "The city of Paris \u4f60\u597d.",
        "read": [{"start": 4, "end": 8}, {"start": 12, "end": 19}],
    },
    {"id": "open", "context": [SYSTEM, USER], "read": [{"message": 1, "onwards": True}]},
    {"id": "closed", "context": [SYSTEM, USER, REPLY], "read": [{"message": 2}], "positions": [0, -1, -1]},
    {"id": "turn", "context": [SYSTEM, USER, REPLY], "read": [{"message": 1}], "positions": "all"},
    {"id": "content", "context": [USER], "read": [{"message": 0, "start": 0, "end": 17}]},
    {"id": "window", "context": [USER, REPLY, USER], "positions": {"window": [2, 5], "before_end": [1, 3]}},
    {"id": "layers", "context": [USER], "layers": [0.5, 1], "positions": [3, 1]},
    {"id": "mark", "context": "a ? b", "question": "Why ? ? \n ? and <|stop|> ?", "answer": "No ? \u4f60"},
    {"id": "kind", "context": "She will go.", "target": "difference", "meta": {"b": [1], "a": None}},
]
RECORDS = [{**ASKED, **record} for record in RECORDS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_model(tmp_path_factory.mktemp("models") / "tiny"))


def write_lines(path: Path, examples: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")


def run(root: Path, model: str, *sources: dict[str, Any], out: str = "packed", **data: Any) -> dict[str, Any]:
    recipe = parse_recipe({"model": {"name": model}, "data": {"sources": list(sources), **data}})
    return pack(recipe, root=root, out=root / out)


def pack_records(root: Path, model: str, examples: list[dict[str, Any]], **data: Any) -> PackedDataset:
    write_lines(root / "records.jsonl", examples)
    run(root, model, {"name": "r", "kind": "records", "path": "records.jsonl"}, **data)
    return PackedDataset.open(root / "packed", verify=True)


def digest(folder: Path) -> str:
    files = sorted(folder.iterdir())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


TURNS = pa.struct({"role": pa.large_string(), "content": pa.large_string()})
SPANS = pa.struct({"message": pa.int8(), "start": pa.uint16(), "end": pa.int32(), "onwards": pa.bool_()})
NAMES = pa.dictionary(pa.int8(), pa.string())
SPELLINGS: dict[str, dict[str, pa.DataType]] = {
    "inferred": {},
    "large": {"question": pa.large_string(), "context": pa.large_list(TURNS), "meta": pa.struct({"x": pa.float32()})},
    "narrow": {"question": pa.string_view(), "positions": pa.list_(pa.int32()), "read": pa.large_list(SPANS)},
    "dictionary": {"question": NAMES, "answer": NAMES, "layers": pa.list_(pa.float32())},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_columns_mean_what_the_same_lines_mean(tmp_path: Path, model: str, spelling: str) -> None:
    """Lists, structs, nulls and every spelling of text, in a table that is not JSON."""
    given: list[dict[str, Any]] = [
        {"id": 'a "b" \n \x1f', "context": [USER, REPLY], "read": [{"message": 1}], "positions": [0, -1]},
        {"id": "c", "context": [SYSTEM, USER], "layers": [0.5, 0.75], "meta": {"x": 0.25, "y": None}},
        {"id": "d", "context": [USER], "read": [{"message": 0, "start": 4, "end": 8}, {"message": 0, "onwards": True}]},
    ]
    rows = [{**ASKED, **row} for row in given]
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    spelled = pa.schema([(field.name, SPELLINGS[spelling].get(field.name, field.type)) for field in table.schema])
    pq.write_table(table.cast(spelled), tmp_path / "columns.parquet", row_group_size=2)
    write_lines(tmp_path / "lines.jsonl", rows)
    built: dict[str, list[Any]] = {}
    for path in (tmp_path / "lines.jsonl", tmp_path / "columns.parquet"):
        run(tmp_path, model, {"name": "r", "kind": "records", "path": path.name}, out=path.stem)
        data = PackedDataset.open(tmp_path / path.stem, verify=True)
        built[path.stem] = [repr(replace(datapoint, meta=None)) for datapoint in data]
    assert len(built["lines"]) == len(rows)
    assert built["columns"] == built["lines"]


@pytest.mark.parametrize("name", ["tiny", "demo"])
@pytest.mark.parametrize("layers_per_example", ["one", "together"])
def test_datapoints_equal_the_reference(tmp_path: Path, model: str, name: str, layers_per_example: str) -> None:
    name = model if name == "tiny" else name
    data = pack_records(tmp_path, name, RECORDS, layers_per_example=layers_per_example)
    reference = Reference(model_folder(name), end_of_turn="<turn|>" if name == "demo" else "<|stop|>")
    assert [datapoint.id for datapoint in data] == [example["id"] for example in RECORDS]
    assert data.layer_combinations == sorted({tuple(dict.fromkeys(datapoint.layers.tolist())) for datapoint in data})
    for example, datapoint in zip(RECORDS, data, strict=True):
        readable = reference.readable(example)
        layers = list(dict.fromkeys(datapoint.layers.tolist()))
        positions = datapoint.read_positions[: len(datapoint.read_positions) // len(layers)].tolist()
        expected = reference.datapoint(example, layers=layers, positions=positions)
        for field, value in expected.items():
            assert np.atleast_1d(getattr(datapoint, field)).tolist() == value, (example["id"], field)
        rule = example.get("positions", "all")
        if rule == "all":
            assert positions == readable
        elif isinstance(rule, list):
            assert positions == [readable[index] for index in rule]
        else:
            assert positions in [readable[-k - end : len(readable) - end] for k in range(2, 6) for end in range(1, 4)]
        assert datapoint.question == example["question"]
        assert datapoint.answer == example["answer"]
        assert datapoint.meta == example.get("meta", {})
        assert datapoint.kind == example.get("target", "base")
        assert datapoint.source == "r"


def test_each_layer_makes_a_datapoint(tmp_path: Path, model: str) -> None:
    data = pack_records(tmp_path, model, RECORDS[:2], layers_per_example="each", read_depths=[0.25, 0.5])
    assert [datapoint.id for datapoint in data] == ["text@L2", "text@L4", "span@L2", "span@L4"]
    assert [set(datapoint.layers.tolist()) for datapoint in data] == [{2}, {4}, {2}, {4}]


@pytest.mark.parametrize("sources", ["layers one", "one layers"])
def test_no_id_is_one_that_another_makes_for_a_layer(tmp_path: Path, model: str, sources: str) -> None:
    of_layers = {"name": "layers", "kind": "records", "path": "layers.jsonl", "layers_per_example": "each"}
    of_one = {"name": "one", "kind": "records", "path": "one.jsonl"}
    both = [{"layers": of_layers, "one": of_one}[name] for name in sources.split()]
    ids = {"layers": ["a", "b@L2"], "one": ["b", "c@L2", "a@L", "a@L2b", "d"]}

    def packed(**more: list[str]) -> list[str]:
        for name, own in ids.items():
            write_lines(tmp_path / f"{name}.jsonl", [{**RECORDS[0], "id": each} for each in own + more.get(name, [])])
        run(tmp_path, model, *both, read_depths=[0.25, 0.5])
        return [point.id for point in PackedDataset.open(tmp_path / "packed", verify=True)]

    assert len(set(packed())) == 9
    told = {
        "layers one": r'source "one", .*example "a@L2": another example makes .* of this form: "a@L2"; rename one of the two',
        "one layers": r'source "layers", .*example "a": .* get "a@L" and their layer as ids, .*; rename one of the two',
    }
    with pytest.raises(ValueError, match=told[sources]):
        packed(one=["a@L2"])


def test_a_yes_or_no_keeps_its_labels(tmp_path: Path, model: str) -> None:
    """The generation prompt ends in an empty thought; the label is what follows it, whole."""
    records = [{**RECORDS[0], "id": answer, "answer": answer} for answer in ("Yes", "No")]
    reference = Reference(Path(model), end_of_turn="<|stop|>")
    for datapoint in pack_records(tmp_path, model, records):
        prompt, answer = np.split(datapoint.input_ids, [datapoint.answer_start])
        assert reference.tokenizer.decode(prompt).endswith("<|start|>assistant\n<|think|>\n\n<|/think|>")
        assert reference.tokenizer.decode(answer) == datapoint.answer + "<|stop|>"


def test_prefixes_share_a_context_but_show_their_own_tokens(tmp_path: Path, model: str) -> None:
    texts = ["The city of Paris is in France.", "The city of Paris", "The city of Paris", "She will go."]
    records = [{**ASKED, "id": str(index), "context": text} for index, text in enumerate(texts)]
    data = pack_records(tmp_path, model, records)
    assert len(set(data.groups.tolist())) == data.manifest["counts"]["contexts"] == 2
    assert data.groups[0] == data.groups[1] == data.groups[2] != data.groups[3]
    reference = Reference(Path(model), end_of_turn="<|stop|>")
    for text, datapoint, length in zip(texts, data, data.context_lengths, strict=True):
        assert datapoint.context_ids.tolist() == reference.context(text)[1]
        assert len(datapoint.context_ids) == length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anwser": "x"}, r"anwser"),
        ({"answer": None}, r"answer"),
        ({"answer": ""}, r"answer is empty"),
        ({"question": None}, r"question"),
        ({"context": ""}, r"context is an empty string"),
        ({"context": []}, r"context is an empty list"),
        ({"layers": [8]}, r"layer 8 is out of range: the model has layers 0 to 7"),
        ({"layers": [1.5]}, r"is out of range: the model has layers 0 to 7"),
        ({"positions": [99]}, r"99"),
        ({"positions": []}, r"position"),
        ({"read": [{"start": 0, "end": 99}]}, r"outside the context, which has 31 code points"),
        ({"id": "fine"}, r"fine"),
    ],
)
def test_bad_examples_are_named_and_leave_nothing(
    tmp_path: Path, model: str, change: dict[str, Any], message: str
) -> None:
    fine = {**RECORDS[0], "id": "fine"}
    bad = {key: value for key, value in ({**RECORDS[0], "id": "bad"} | change).items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        pack_records(tmp_path, model, [fine, bad])
    assert "'r'" in str(error.value) or '"r"' in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["records.jsonl"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [{"text": f"She will go to city {i}.", "label": "ab"[i % 2]} for i in range(300)]
    write_lines(tmp_path / "table.jsonl", table)
    labelled = {"name": "c", "kind": "classification", "path": "table.jsonl", "questions": ["Is it {label}?"]}
    texts = {"name": "t", "kind": "context_prediction", "path": "table.jsonl", "predict": [1, 4], "window": [1, 3]}

    def packed(out: str, **data: Any) -> str:
        run(tmp_path, model, labelled, texts, out=out, examples_per_shard=64, **data)
        return digest(tmp_path / out)

    first = packed("first")
    assert len(list((tmp_path / "first").iterdir())) > 8
    monkeypatch.setattr(blocks, "BLOCK", 700)
    assert packed("second") == first
    assert packed("first") == first
    assert packed("third", seed=1) != first


def test_lens_answers_are_the_tokens_beside_the_window(tmp_path: Path, model: str) -> None:
    texts = [
        {"text": f"She will go to the city of Paris and then, on day {i}, she went to the park."} for i in range(80)
    ]
    write_lines(tmp_path / "texts.jsonl", texts)
    source = {"name": "t", "kind": "context_prediction", "path": "texts.jsonl", "predict": [1, 4], "window": [2, 5]}
    run(tmp_path, model, source)
    reference = Reference(Path(model), end_of_turn="<|stop|>")
    seen = set()
    for datapoint in PackedDataset.open(tmp_path / "packed"):
        ids = reference.context(texts[int(datapoint.id.split("/")[1])]["text"])[1]
        window = datapoint.read_positions.tolist()
        assert window == list(range(window[0], window[0] + len(window)))
        assert datapoint.context_ids.tolist() == ids[: window[-1] + 1]
        words = datapoint.question.split()
        side, num = words[4], int(words[5])
        answer = ids[window[-1] + 1 :][:num] if side == "next" else ids[window[0] - num : window[0]]
        assert datapoint.answer == reference.tokenizer.decode(answer)
        assert datapoint.input_ids[datapoint.answer_start :].tolist() == reference.answer(datapoint.answer)
        seen |= {side, f"J{num}", f"K{len(window)}"}
    assert seen >= {"next", "previous", "J1", "J4", "K1", "K2", "K5"}


def test_drops_are_counted(tmp_path: Path, model: str) -> None:
    stimulus = {"system": "Be brief.", "stimulus_user": "Hello?", "label": "brief"}
    (tmp_path / "system.json").write_text(json.dumps([stimulus, stimulus | {"label": "unknown"}]))
    (tmp_path / "qa.json").write_text(json.dumps({"brief": [["How?", "Briefly."], ["How? " * 60, "Long."]]}))
    source = {"name": "s", "kind": "latentqa", "path": "."}
    summary = run(tmp_path, model, source, max_input_tokens=100)
    assert summary["drops"].pop("label_without_questions") == 1
    assert list(summary["drops"].values()) == [1]
    assert (summary["datapoints"], summary["offered"], summary["sources"]["s"]["offered"]) == (1, 3, 3)
    assert json.loads((tmp_path / "packed/manifest.json").read_text())["drops"]["label_without_questions"] == 1
    with pytest.raises(ValueError, match=r'no example was kept.*"input_too_long": 2'):
        run(tmp_path, model, source, out="none", max_input_tokens=8)
    with pytest.raises(ValueError, match="no examples: the sources are empty"):
        pack_records(tmp_path, model, [], out="none")
    assert not (tmp_path / "none").exists()


def test_a_finished_data_set_is_not_overwritten_by_another(tmp_path: Path, model: str) -> None:
    first = pack_records(tmp_path, model, RECORDS)
    before = digest(first.folder)
    with pytest.raises(FileExistsError, match=r"another config \(differs in seed\); choose another --out or remove it"):
        pack_records(tmp_path, model, RECORDS, seed=5)
    with pytest.raises(ValueError, match="answer"):
        pack_records(tmp_path, model, [{**RECORDS[0], "answer": ""}])
    assert digest(first.folder) == before
    assert len(pack_records(tmp_path, model, RECORDS[:3])) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists and is no packed data set"):
        run(tmp_path, model, {"name": "r", "kind": "records", "path": "records.jsonl"}, out="mine")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "packed", "records.jsonl"]


def test_a_stopped_build_goes_on(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(
        tmp_path / "texts.jsonl", [{"text": f"She will go to the city of Paris on day {i}."} for i in range(90)]
    )
    source = {"name": "t", "kind": "context_prediction", "path": "texts.jsonl", "predict": [1, 4], "window": [1, 3]}
    recipe = parse_recipe({"model": {"name": model}, "data": {"sources": [source], "examples_per_shard": 16}})
    monkeypatch.setattr(blocks, "BLOCK", 900)
    pack(recipe, root=tmp_path, out=tmp_path / "whole")

    read = files.read_jsonl

    def stopped(path: Path, columns: Any = None) -> Any:
        for number, part in enumerate(read(path, columns)):
            if number == 3:
                raise OSError("disk gone")
            yield part

    with monkeypatch.context() as patch:
        patch.setitem(files._READERS, ".jsonl", stopped)
        with pytest.raises(OSError, match="disk gone"):
            pack(recipe, root=tmp_path, out=tmp_path / "out")
    partial = tmp_path / "out.partial"
    kept = len(list(partial.glob("shard-*")))
    assert 1 <= kept < 6
    with pytest.raises(ValueError, match=r"out\.partial holds \d+ shards .*--resume, or remove the folder"):
        pack(recipe, root=tmp_path, out=tmp_path / "out")
    assert len(list(partial.glob("shard-*"))) == kept
    summary = pack(recipe, root=tmp_path, out=tmp_path / "out", resume=True)
    assert summary["skipped"] == 16 * kept
    assert not partial.exists()
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    # Whole already: nothing is done. Started anew in spite of a stopped one: that one goes.
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    assert pack(recipe, root=tmp_path, out=tmp_path / "out", resume=True)["examples"] == summary["examples"]
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == before
    partial.mkdir()
    (partial / "shard-00000.safetensors").write_text("old")
    pack(recipe, root=tmp_path, out=tmp_path / "out", restart=True)
    assert not partial.exists()


def test_a_set_of_other_rules_is_built_anew(tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "records.jsonl", RECORDS)
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    recipe = parse_recipe({"model": {"name": model}, "data": {"sources": [source]}})
    pack(recipe, root=tmp_path, out=tmp_path / "out")
    before, manifest = digest(tmp_path / "out"), tmp_path / "out/manifest.json"
    text = manifest.read_text()
    assert f'"rules":{RULES},' in text
    for older in (text.replace(f'"rules":{RULES},', f'"rules":{RULES - 1},'), text.replace(f'"rules":{RULES},', "")):
        caplog.clear()
        manifest.write_text(older)
        assert pack(recipe, root=tmp_path, out=tmp_path / "out", resume=True)["way"] == "packed"
        assert "another version of ao" in caplog.text
        assert digest(tmp_path / "out") == before
    assert pack(recipe, root=tmp_path, out=tmp_path / "out", resume=True)["way"] == "was there"


def test_parts_make_the_whole(tmp_path: Path, model: str) -> None:
    rows = [{"text": f"She will go to city {i}.", "label": "ab"[i % 2]} for i in range(100)]
    write_lines(tmp_path / "table.jsonl", rows)
    source = {
        "name": "c",
        "kind": "classification",
        "path": "table.jsonl",
        "questions": ["Is it {label}?"],
        "count": 70,
    }
    recipe = parse_recipe({"model": {"name": model}, "data": {"sources": [source], "examples_per_shard": 16}})
    whole = pack(recipe, root=tmp_path, out=tmp_path / "whole")
    parts = [pack(recipe, root=tmp_path, out=tmp_path / "out", part=(i, 3)) for i in (2, 0, 1)]
    assert [part["part"] for part in parts] == ["2/3", "0/3", "1/3"]
    assert sum(part["examples"] for part in parts) == whole["examples"] == 70
    assert "part 2/3: 16 examples" in summary_text(parts[0])
    merged = merge(recipe, out=tmp_path / "out")
    assert merged["sources"] == whole["sources"]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_bad_rows_are_counted_up_to_a_limit(tmp_path: Path, model: str) -> None:
    lines = ['{"text": "She will go."}', "{", '{"txt": "x"}', '{"text": "She went there."}']
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    source = {"name": "t", "kind": "context_prediction", "path": "texts.jsonl", "predict": [1, 1], "window": [1, 1]}
    recipe = parse_recipe({"model": {"name": model}, "data": {"sources": [source]}})
    with pytest.raises(ValueError, match=r"texts\.jsonl: line 2"):
        pack(recipe, root=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match="line"):
        pack(recipe, root=tmp_path, out=tmp_path / "out", max_errors=1)
    assert [file.name for file in tmp_path.iterdir()] == ["texts.jsonl"]
    summary = pack(recipe, root=tmp_path, out=tmp_path / "out", max_errors=2)
    assert sum(summary["errors"].values()) == 2
    assert len(summary["messages"]) == 2
    assert summary["examples"] == 2
    text = summary_text(summary)
    assert "2 examples of 4" in text
    assert "line 2" in text


def test_the_summary_says_how_full_rows_will_be(tmp_path: Path, model: str) -> None:
    write_lines(tmp_path / "records.jsonl", [{**RECORDS[0], "id": f"e{i}"} for i in range(500)])
    summary = run(tmp_path, model, {"name": "r", "kind": "records", "path": "records.jsonl"})
    lengths, rows = PackedDataset.open(tmp_path / "packed").lengths, json.loads(json.dumps(summary))["rows"]
    assert len(set(lengths.tolist())) == 1
    in_a_row = 8192 // lengths[0]
    assert (rows["tokens_per_row"], rows["rows"]) == (8192, -(-500 // in_a_row))
    assert rows["fill"] == pytest.approx(lengths.sum() / (8192 * rows["rows"]), abs=1e-6)
    assert f"{rows['rows']} of 8,192 tokens, {100 * rows['fill']:.1f}% full" in summary_text(summary)


@pytest.mark.parametrize("labels", [{}, {"a": "Ada", "b": "Ben"}])
@pytest.mark.parametrize("values", [{}, {"count": 12}])
def test_bad_rows_of_a_table_are_counted_too(
    tmp_path: Path, model: str, labels: dict[str, str], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a survey and without one; the good rows make what they make without the bad ones."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    good = [f"She will go to city {i}.,{'ab'[i % 2]}" for i in range(12)]
    rows = [*good[:4], "She will go to a,city,a", *good[5:8], '"so"', *good[9:], "She w\udce4s,a"]
    data = "\n".join(["text,label", *rows, ""]).encode(errors="surrogateescape")
    (tmp_path / "table.csv").write_bytes(data)
    source = {"name": "c", "kind": "classification", "path": "table.csv", "questions": ["Is it {label}?"], **values}
    recipe = parse_recipe({"model": {"name": model}, "data": {"sources": [source | {"labels": labels}]}})
    told = (
        r'source "c", .*table\.csv: row 4: expected 2 cells as the header has, got 3: .She will go to a,city,a.; a cell'
    )
    with pytest.raises(ValueError, match=told):
        pack(recipe, root=tmp_path, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"3 rows cannot be used, more than the 2"):
        pack(
            replace(recipe, data=replace(recipe.data, examples_per_shard=13)),
            root=tmp_path,
            out=tmp_path / "out",
            max_errors=2,
        )
    summary = pack(recipe, root=tmp_path, out=tmp_path / "out", max_errors=3)
    ids = [point.id for point in PackedDataset.open(tmp_path / "out", verify=True)]
    numbers = [int(each.split("/")[1]) for each in ids]
    assert set(numbers) <= {*range(13)} - {4, 8, 12}
    assert summary["offered"] == summary["examples"] + summary["errors"].get("bad_row", 0) == values.get("count", 13)
    if not values:
        assert summary["errors"] == {"bad_row": 3}
        assert "row 12: column 'text': not UTF-8" in summary_text(summary)
        made = {point.id: repr(point) for point in PackedDataset.open(tmp_path / "out")}
        (tmp_path / "table.csv").write_text("\n".join(["text,label", *good]))
        pack(recipe, root=tmp_path, out=tmp_path / "out")
        whole = {point.id: repr(point) for point in PackedDataset.open(tmp_path / "out")}
        assert made == {each: whole[each] for each in ids}


def test_the_summary_tells(tmp_path: Path, model: str) -> None:
    rows = [{"text": f"She will go to city {i}.", "label": "ab"[i % 2]} for i in range(40)]
    write_lines(tmp_path / "table.jsonl", rows)
    source = {"name": "c", "kind": "classification", "path": "table.jsonl", "questions": ["Is it {label}?"]}
    values = {"questions_per_text": 2, "labels": {"a": ["Anna", "A."], "b": "Ben"}, "layers_per_example": "each"}
    summary = run(tmp_path, model, source | values, read_depths=[0.25, 0.5])
    assert (summary["examples"], summary["datapoints"]) == (80, 160)
    assert summary["sharing"] == summary["context_tokens_read"] / summary["context_tokens"] > 3
    answers = summary["sources"]["c"]["answers"]
    assert set(answers) == {"Yes", "No"}
    text = summary_text(summary)
    assert f"No {answers['No'] / 160:.0%}" in text
    assert "sharing saves a factor of" in text
    assert sum(summary["lengths"]["input"]) == 160
    assert json.loads(json.dumps(summary)) == summary


def test_the_summary_tells_what_is_unanswerable(tmp_path: Path, model: str) -> None:
    rule = {"share": 0.5, "answer": "I cannot tell."}
    texts = [f"She will go to city {i}." for i in range(30)]
    for name, contexts in (("own", texts), ("same", texts[:1] * 30)):
        lines = [{**ASKED, "id": f"{name}{i}", "context": context} for i, context in enumerate(contexts)]
        write_lines(tmp_path / f"{name}.jsonl", lines)
    sources = [
        {"name": name, "kind": "records", "path": f"{name}.jsonl", "unanswerable": rule} for name in ("own", "same")
    ]
    summary = run(tmp_path, model, *sources)
    told, missed = summary["unanswerable"], summary["without_donor"]
    assert (summary["sources"]["own"]["unanswerable"], summary["sources"]["same"]["without_donor"]) == (told, missed)
    assert 5 < told < 25
    assert 5 < missed < 25
    marked = [point.meta.get("unanswerable") for point in PackedDataset.open(tmp_path / "packed")]
    assert marked.count(True) == told
    text = summary_text(summary)
    assert f"cannot tell {told} datapoints read a context that does not tell the answer; {missed} more were to" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["own"].endswith(f"   {told} unanswerable")
    assert lines["same"].endswith(f"   {missed} without a donor")


def test_shares_part_the_total(tmp_path: Path, model: str) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{**RECORDS[0], "id": f"{name}{i}"} for i in range(50)])
    sources = [
        {"name": name, "kind": "records", "path": f"{name}.jsonl", "share": share} for name, share in ("a1", "b3")
    ]
    sources = [source | {"share": float(source["share"])} for source in sources]
    summary = run(tmp_path, model, *sources, examples=40)
    assert {name: counts["examples"] for name, counts in summary["sources"].items()} == {"a": 10, "b": 30}


def test_the_manifest_says_what_it_was_packed_from(tmp_path: Path, model: str) -> None:
    manifest = pack_records(tmp_path, model, RECORDS, seed=3).manifest
    assert (manifest["schema"], manifest["kind"]) == (1, "packed")
    assert manifest["oracle"]["model"] == "tiny"
    assert manifest["oracle"] == manifest["targets"]["base"]
    assert manifest["config"]["seed"] == 3
    assert "out" not in manifest["config"]
    [entry] = manifest["inputs"]
    assert (entry["source"], entry["file"]) == ("r", "records.jsonl")
    assert entry["xxh3"] == xxhash.xxh3_128_hexdigest((tmp_path / "records.jsonl").read_bytes())
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_target_with_another_tokenizer_is_refused(tmp_path: Path, model: str) -> None:
    other = tiny.save_model(tmp_path / "other", template=tiny.TEMPLATE.replace("assistant", "model"))
    write_lines(tmp_path / "records.jsonl", RECORDS)
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    recipe = parse_recipe({"model": {"name": model, "target": str(other)}, "data": {"sources": [source]}})
    with pytest.raises(ValueError, match="has another template than"):
        pack(recipe, root=tmp_path, out=tmp_path / "packed")


HUB: dict[str, tuple[list[dict[str, Any]], dict[str, list[str]]]] = {
    "HuggingFaceFW/fineweb": ([{"text": "She will go to the city of Paris and then to the park.", "dump": "x"}], {}),
    "lmsys/lmsys-chat-1m": ([{"conversation": [USER, REPLY], "model": "m"}], {}),
    "HuggingFaceH4/ultrachat_200k": ([{"prompt": "p", "prompt_id": "i", "messages": [USER, REPLY]}], {}),
    "stanfordnlp/sst2": (
        [{"idx": i, "sentence": f"A fine film {i}. ", "label": i % 2} for i in range(2)],
        {"label": ["negative", "positive"]},
    ),
    "facebook/md_gender_bias": (
        [{"text": f"Person {i} went.", "title": "Ada", "persona": [], "gender": i} for i in range(3)],
        {"gender": ["gender-neutral", "female", "male"]},
    ),
    "stanfordnlp/snli": (
        [{"premise": "She went to the park.", "hypothesis": "She is in a {park}.", "label": i - 1} for i in range(4)],
        {"label": ["entailment", "neutral", "contradiction"]},
    ),
    "FrancophonIA/WiLI-2018": ([{"Text": f"A {name} text.", "language": name} for name in ("English", "Dutch")], {}),
    "fancyzhx/ag_news": (
        [{"text": f"Match {i}.", "label": i % 4} for i in range(4)],
        {"label": ["World", "Sports", "Business", "Sci/Tech"]},
    ),
}
"""A few rows of each data set that the paper's recipe streams, with its columns and classes."""


@real_data.needed
def test_the_papers_mixture_and_its_held_out_sets_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, *args: object, **values: object) -> Any:
        rows, classes = HUB[name]
        table = datasets.Dataset.from_list(rows * (60 // len(rows)))
        for column, names in classes.items():
            table = table.cast_column(column, datasets.ClassLabel(names=names))
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("latentqa", "classification"):
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copytree(real_data.FOLDER / name, tmp_path / "data" / name, copy_function=shutil.copyfile)
    named = tmp_path / "data/classification"
    write_lines(named / "ner.jsonl", [{"text": f"{who} went.", "entity": who} for who in ("Ada", "Bob") * 40])
    for file in ("headlines/21_headline_istrump", "headlines/22_headline_isobama", "headlines/23_headline_ischina"):
        (named / "headlines").mkdir(exist_ok=True)
        (named / f"{file}.csv").write_text("prompt,target\nA headline,1\nAnother one,0\n")
    (named / "historical_figures").mkdir()
    (named / "historical_figures/5_hist_fig_ismale.csv").write_text("prompt,target\nAda,0\nBob,1\n")
    shutil.copytree(Path(__file__).parents[2] / "recipes", tmp_path / "recipes")
    recipe = load_recipe(tmp_path / "recipes/gemma-4-31b-it.toml")
    recipe = replace(recipe, model=ModelConfig(name="demo"), data=replace(recipe.data, examples=600))
    summary = pack(recipe, root=tmp_path / "recipes", out=tmp_path / "packed")
    data = PackedDataset.open(tmp_path / "packed", verify=True)
    by_source: dict[str, list[Any]] = {}
    for datapoint in data:
        by_source.setdefault(datapoint.source, []).append(datapoint)
    assert {name: counts["examples"] for name, counts in summary["sources"].items() if name != "chats"} == {
        "latentqa": 64, "web_text": 60, "geometry_of_truth": 48, "relations": 48, "sst2": 48,
        "md_gender": 48, "snli": 30, "ner": 48, "tense": 48,
    }  # fmt: skip
    assert summary["sources"]["snli"]["drops"] == {"label_left_out": 30}
    assert len(by_source["web_text"]) == 180
    assert {point.answer for point in by_source["snli"]} == {"Yes", "No"}
    assert all(point.question.endswith(" She is in a {park}.") for point in by_source["snli"])
    assert all("{" not in point.question for name in by_source if name != "snli" for point in by_source[name])
    asked = {point.question.rsplit("someone ", 1)[-1] for point in by_source["md_gender"]}
    assert any("a woman" in question for question in asked)
    assert not any("neutral" in question for question in asked)
    chat = by_source["chats"][0]
    assert chat.context_ids.size > 5
    papers = load_recipe(tmp_path / "recipes/gemma-4-31b-it-paper.toml")
    chats = [replace(source, share=None, count=9) for source in papers.data.sources if source.name == "chats"]
    gated = replace(recipe, data=replace(recipe.data, sources=tuple(chats), examples=None))
    assert pack(gated, root=tmp_path / "recipes", out=tmp_path / "gated")["sources"]["chats"]["examples"] == 9
    for task in recipe.eval.tasks:
        held_out = replace(recipe, data=DataConfig(sources=task.sources, read_depths=(0.5,)))
        name = task.name
        pack(held_out, root=tmp_path / "recipes", out=tmp_path / name)
        points = list(PackedDataset.open(tmp_path / name))
        assert {point.answer for point in points} == {"Yes", "No"}, name
        assert all(len(point.read_positions) == 1 for point in points)


@real_data.needed
def test_real_files_equal_the_reference(tmp_path: Path) -> None:
    """LatentQA's own files, statements and tenses, packed for the demo's target."""
    sources = [
        {"name": "qa", "kind": "latentqa", "path": "latentqa", "types": ["system", "control", "stimulus"]},
        {
            "name": "truth",
            "kind": "classification",
            "path": "classification/geometry_of_truth",
            "text": "statement",
            "labels": {"1": "Yes", "0": "No"},
            "questions": ["Is this statement true?"],
        },
        {
            "name": "tense",
            "kind": "classification",
            "path": "classification/tense/tense_processed.json",
            "text": "sentence",
            "questions": ["Is this in the {label} tense?"],
        },
    ]
    values = {"model": {"name": "demo"}, "data": {"sources": [source | {"count": 60} for source in sources]}}
    recipe = parse_recipe(values)
    pack(recipe, root=real_data.FOLDER, out=tmp_path / "packed")
    data = PackedDataset.open(tmp_path / "packed", verify=True)
    assert len(data) == 180
    with_tables = []
    for source in recipe.data.sources:
        values = to_dict(source)
        if source.kind == "latentqa":
            values["qa"] = json.loads((real_data.FOLDER / "latentqa/qa.json").read_text())
        with_tables.append((values, slow.read_tables(values, real_data.FOLDER)))
    num_layers = data.manifest["targets"]["base"]["num_layers"]
    layers = [resolve_layer(depth, num_layers) for depth in recipe.data.read_depths]
    settings = slow.Settings(num_layers=num_layers, read_layers=layers)
    expected, drops, _, _ = slow.build_all(
        Reference(model_folder("demo"), end_of_turn="<turn|>"), settings, with_tables
    )
    assert [datapoint.id for datapoint in data] == [datapoint.id for datapoint in expected]
    assert data.manifest["drops"] == drops
    for datapoint, right in zip(data, expected, strict=True):
        for field in ("input_ids", "answer_start", "placeholders", "layers", "read_positions", "context_ids"):
            assert np.atleast_1d(getattr(datapoint, field)).tolist() == np.atleast_1d(getattr(right, field)).tolist()
