"""Readers: every format gives the same rows; what is wrong with a file is named."""

import csv
import datetime
import gzip
import json
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import real_data
from ao import sources
from ao.config import SourceConfig, parse_recipe
from ao.sources import blocks, files, hub
from ao.sources.ahead import ahead

CONTEXTS = {"kind": "context_prediction"}
LABELLED = {"kind": "classification", "text": "sentence", "label": "tense", "questions": ["Is it {label}?"]}


def config(**values: Any) -> SourceConfig:
    return parse_recipe({"data": {"sources": [{"name": "s", **values}]}}).data.sources[0]


def read(root: Path, **values: Any) -> list[sources.Rows]:
    return list(sources.rows(config(**values), root=root, seed=0))


def plain(found: list[sources.Rows]) -> list[Any]:
    """The rows as Python values, their numbers checked."""
    rows: list[Any] = []
    table = None
    for part in found:
        start = len(rows) if table == part.table["prefix"] else 0
        if start == 0:
            rows, table = [] if table is None else rows, part.table["prefix"]
        names = part.batch.schema.names
        values = part.batch.to_pylist()
        if names == ["json"]:
            values = [json.loads(row["json"]) for row in values if row["json"].strip()]
        rows += values
    return rows


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


ROWS = [
    {"sentence": f' {i}. "Caf\u00e9", so,\nsaid \U0001f680. ', "tense": ("past", "present")[i % 2]} for i in range(600)
]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """The same rows in every format."""
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS))
    write(tmp_path / "t.jsonl", lines)
    write(tmp_path / "t.ndjson", "\ufeff" + lines.rstrip())
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    with pa.CompressedOutputStream(str(tmp_path / "t.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    write(tmp_path / "t.json", ROWS)
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["sentence", "unused", "tense"])
        writer.writeheader()
        writer.writerows(row | {"unused": "x"} for row in ROWS)
    with pa.CompressedOutputStream(str(tmp_path / "t.csv.gz"), "gzip") as file:
        file.write((tmp_path / "t.csv").read_bytes())
    table = pa.Table.from_pylist([row | {"unused": 1} for row in ROWS])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=70)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as out:
        out.write_table(table)
    return tmp_path


FORMATS = ["t.jsonl", "t.ndjson", "t.jsonl.gz", "t.jsonl.zst", "t.json", "t.csv", "t.csv.gz", "t.parquet"]
FORMATS += ["file.arrow", "stream.arrow"]


@pytest.mark.parametrize("block", [97, 4096, 2**22])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tables: Path, name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", max(block, 512) if "csv" in name else block)
    monkeypatch.setattr(files, "ENTRIES", block)
    found = read(tables, path=name, **LABELLED)
    assert [{key: row[key] for key in ("sentence", "tense")} for row in plain(found)] == ROWS
    assert [part.first_row for part in found] == [
        sum(part.batch.num_rows for part in found[:index]) for index in range(len(found))
    ]
    assert {part.table["prefix"] for part in found} == {"s"}
    assert {part.table["origin"] for part in found} == {str(tables / name)}
    if block == 97 and not name.startswith("t.csv"):
        assert len(found) > 5
    if not name.endswith((".jsonl", ".ndjson", ".json", ".gz", ".zst")):
        assert found[0].batch.schema.names == ["sentence", "tense"]


@pytest.mark.parametrize(
    ("name", "told"), [("t.jsonl", 1), ("t.csv", 2), ("t.parquet", 1), ("t.csv.gz", None), ("t.json", None)]
)
@pytest.mark.parametrize("block", [3000, 2**22])
def test_a_glance_tells_how_many_examples_there_will_be(
    tables: Path, name: str, told: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About; a line break in a cell makes a row of a CSV count twice, and every row here has one."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    source = config(path=name, questions_per_text=2, **LABELLED)
    found = sources.expected_examples(source, sources.tables(source, root=tables, seed=0))
    assert found == (None if told is None else pytest.approx(2 * told * len(ROWS), rel=0.1))
    few = config(path=name, rows=7, **LABELLED)
    assert sources.expected_examples(few, sources.tables(few, root=tables, seed=0)) == (None if told is None else 7)


def test_lines_are_numbered_with_the_blank_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a"}\n\n  \n{"text": "b"}')
    found = read(tmp_path, path="a.jsonl", **CONTEXTS)
    assert found[0].table == {"prefix": "s", "origin": str(tmp_path / "a.jsonl"), "unit": "line"}
    lines = [line.strip() for part in found for line in part.batch.column(0).to_pylist()]
    assert lines == [b'{"text": "a"}', b"", b"", b'{"text": "b"}']
    assert [part.first_row for part in found] == [0, 3]


def test_only_so_many_rows_are_read(tables: Path) -> None:
    for name in ("t.jsonl", "t.parquet"):
        found = read(tables, path=name, rows=7, **LABELLED)
        assert [row["sentence"] for row in plain(found)] == [row["sentence"] for row in ROWS[:7]]


def test_text_files_are_paragraphs_or_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "\ufeff\n  One\nstill one.\n  \n\n\nTwo \u00e9.\r\n\r\nThree.\n")
    for block in (3, 2**22):
        monkeypatch.setattr(blocks, "BLOCK", block)
        found = read(tmp_path, path="a.txt", text="body", **CONTEXTS)
        assert plain(found) == [{"body": text} for text in ("One\nstill one.", "Two \u00e9.", "Three.")]
        assert found[0].table["unit"] == "entry"
    [whole] = plain(read(tmp_path, path="a.txt", documents="file", **CONTEXTS))
    assert whole["text"].startswith("One\nstill")
    assert whole["text"].endswith("Three.")
    (tmp_path / "b.txt").write_bytes(b"fine\n\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"b\.txt: document 1: not UTF-8"):
        read(tmp_path, path="b.txt", **CONTEXTS)


def test_a_folder_is_all_its_tables_by_name(tmp_path: Path) -> None:
    write(tmp_path / "d/b.csv", "sentence,tense\nB.,past\n")
    write(tmp_path / "d/deep/a.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "d/notes.md", "no table")
    write(tmp_path / "d/.hidden.csv", "sentence,tense\nH.,past\n")
    found = read(tmp_path, path="d", **LABELLED)
    assert [part.table["prefix"] for part in found] == ["s/b", "s/deep/a"]
    folder = config(path="d", **LABELLED)
    recorded = sources.inputs(folder, sources.tables(folder, root=tmp_path, seed=0), root=tmp_path)
    assert [entry["file"] for entry in recorded] == ["b.csv", "deep/a.jsonl"]
    assert str(tmp_path) not in json.dumps(recorded)
    write(tmp_path / "d/b.json", ROWS)
    with pytest.raises(ValueError, match=r"b\.csv and .*b\.json differ only in their suffix"):
        read(tmp_path, path="d", **LABELLED)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none has no file of \.jsonl"):
        read(tmp_path, path="none", **LABELLED)


def test_relations_bring_their_templates(tmp_path: Path) -> None:
    samples = [{"subject": "France", "object": "Paris"}, {"subject": "Italy", "object": "Rome"}]
    write(tmp_path / "r/capital.json", {"prompt_templates": ["The capital of {} is"], "samples": samples})
    [part] = read(tmp_path, kind="classification", path="r", questions=["True?"])
    assert part.table["templates"] == ["The capital of {} is"]
    assert (part.table["prefix"], part.table["unit"]) == ("s/capital", "entry")
    assert plain([part]) == samples


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "words,tense\nA.,past\n", r"t\.csv: column 'sentence' is missing; there are \['tense', 'words'\]"),
        ("t.csv", 'sentence,tense\nA.,past\nB.,"past\nC.,past\n', r"t\.csv: row 1: a quote is not closed"),
        ("t.csv", 'sentence,tense\nA.,past\n"B.,past\nC.,past\n', r"t\.csv: row 1: a quote is not closed"),
        ("t.csv", 'sentence,tense\n,,\n"B.,past\n,,\n', r"t\.csv: row 1: a quote is not closed"),
        (
            "t.csv",
            'sentence,tense\nA.,past\n"B.' + "x" * 2**23,
            r"from row 1 on: a quote is not closed, or a row is longer than \d+ bytes",
        ),
        (
            "t.csv.gz",
            gzip.compress(b"sentence,tense\n" + b"A.,past\n" * 9, mtime=0)[:-9],
            r"t\.csv\.gz: cannot be decompressed",
        ),
        ("t.csv", "sentence,sentence\nA.,B.\n", r"the header has the column 'sentence' twice"),
        ("t.csv", "", r"t\.csv: is empty; expected a CSV file with a header"),
        ("t.json", "[", r"t\.json: not JSON: "),
        ("t.json", '[]\n{"a": 1}', r"t\.json: not JSON: .*rename it to \.jsonl"),
        ("t.json", "3", r"t\.json: expected a list of objects, got int '3'"),
        ("t.json", {"samples": []}, r"t\.json: key 'samples': expected a list that is not empty.*or a relation"),
        ("t.json", {"samples": [1], "prompt_templates": ["x"]}, r"expected texts with \{\} for the subject, got 'x'"),
        ("t.parquet", "PAR1", r"t\.parquet: not a Parquet file"),
        ("t.arrow", "hello there", r"t\.arrow: not an Arrow IPC file or stream"),
        (
            "t.jsonl.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            r"t\.jsonl\.gz: cannot be decompressed: .*damaged or cut off",
        ),
        ("t.txt", "A.", r"t\.txt: cannot be read as classification; expected \.jsonl"),
        ("t.xlsx", "A.", r"t\.xlsx: cannot be read as classification"),
        ("t", "A.", r"cannot be read as classification"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: object, message: str) -> None:
    if isinstance(text, bytes):
        (tmp_path / name).write_bytes(text)
    else:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, path=name, **LABELLED)


def bad_rows(found: list[sources.Rows]) -> dict[int, str]:
    """What is wrong with unreadable rows, by their numbers; all rows must be numbered one behind the other."""
    bad, next_row = {}, 0
    for part in found:
        assert part.first_row == next_row
        next_row += part.batch.num_rows
        if part.table.get("unreadable"):
            bad |= {part.first_row + at: why for at, why in enumerate(part.batch.column(0).to_pylist())}
    return bad


@pytest.mark.parametrize("block", [64, 600, 2**22])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\r\n"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("unshowable", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_bad_rows_of_a_csv_are_passed_over(
    tmp_path: Path, block: int, end: str, suffix: str, unshowable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand in the file, at its ends, side by side, with line breaks in cells, blank lines between."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    kinds: list[tuple[str, str | None]] = [
        ("{}.,past", None),
        ('"{}, so\nand ""so""",past', None),
        ("{}.", "expected 2 cells as the header has, got 1"),
        ('{}.,past,"much\nmore"', "expected 2 cells as the header has, got 3"),
        (",,", "expected 2 cells as the header has, got 3: ',,'"),
        *[("\udcff{},,", "expected 2 cells as the header has, got 3: '\ufffd")] * unshowable,
        ("\udce4{}.,past", "column 'sentence': not UTF-8"),
        ("{}.,p\udcff", "column 'tense': not UTF-8"),
    ]
    draw = random.Random(block)
    for _ in range(20):
        drawn = draw.choices(kinds, [6, 3, *[1] * (len(kinds) - 2)], k=draw.randint(1, 60))
        lines = [line.format(row) for row, (line, _) in enumerate(drawn)]
        blank = (draw.choice(["", "", "\n"]) for _ in lines)
        text = "\n".join(["sentence,tense", *(line + more for line, more in zip(lines, blank, strict=True))]) + end
        data = text.encode(errors="surrogateescape")
        (tmp_path / f"t.csv{suffix}").write_bytes(gzip.compress(data, mtime=0) if suffix else data)
        found = read(tmp_path, path=f"t.csv{suffix}", **LABELLED)
        bad = bad_rows(found)
        expected = {row: why for row, (_, why) in enumerate(drawn) if why is not None}
        assert bad.keys() == expected.keys()
        assert all(expected[row] in why for row, why in bad.items())
        good = {
            part.first_row + at: values["sentence"]
            for part in found
            if not part.table.get("unreadable")
            for at, values in enumerate(part.batch.to_pylist())
        }
        assert good.keys() == set(range(len(drawn))) - expected.keys()
        assert all(text.startswith(f"{row}") for row, text in good.items())


DAY = datetime.datetime(2020, 1, 2)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([DAY.date()]),
        pa.array([DAY]),
        pa.array([DAY.time()]),
        pa.array([DAY - DAY]),
        pa.array([b"past"]),
        pa.array([b"past"], pa.binary(4)),
        pa.array([[DAY.date()]]),
        pa.array([{"day": DAY}]),
        pa.array([DAY.date()]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_columns_that_json_has_no_words_for_are_named(tmp_path: Path, values: pa.Array) -> None:
    """A date would be packed as the number of days that Arrow stores. A column that is not used may hold anything."""
    table = pa.table({"sentence": ["A."], "tense": values})
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as out:
        out.write_table(table)
    pq.write_table(table, tmp_path / "t.parquet")
    for name in ("t.arrow", "t.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: column 'tense': expected text, .*cast it to text"):
            read(tmp_path, path=name, **LABELLED)
        assert plain(read(tmp_path, path=name, text="sentence", **CONTEXTS)) == [{"sentence": "A."}]


TURNS = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": None}]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_of_a_chat_only_role_and_content_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Whatever else its messages hold, such as the time or the picture of a turn."""
    import datasets

    more = [("role", pa.string()), ("at", pa.timestamp("us")), ("content", pa.string()), ("picture", pa.binary())]
    chats = [[{**turn, "at": DAY, "picture": b"x"} for turn in TURNS], [], None]
    table = pa.table({"chat": pa.array(chats, kind(pa.struct(more)))})
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as out:
        out.write_table(table)
    pq.write_table(table, tmp_path / "t.parquet")
    saved = datasets.Dataset(table)
    saved.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **values: saved.to_iterable_dataset())
    for where in ({"path": "t.arrow"}, {"path": "t.parquet"}, {"path": "saved"}, {"dataset": "o/n"}):
        assert plain(read(tmp_path, text="chat", **where, **CONTEXTS)) == [{"chat": each} for each in (TURNS, [], None)]
    with pytest.raises(ValueError, match=r"column 'chat': expected text, .*cast it to text"):
        read(tmp_path, path="t.parquet", kind="records")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source 's': .*absent.* does not exist; its path is taken from"):
        read(tmp_path, kind="records", path="absent.jsonl")


# LatentQA

STIMULUS = {"control_user": "Be a pirate.", "control_model": "Arr.", "stimulus_user": "Hello?", "label": "pirate"}


@pytest.fixture
def latentqa(tmp_path: Path) -> Path:
    write(tmp_path / "qa.json", {" pirate": [["Who? ", "A pirate."], ["How?", "Gruffly."]]})
    write(tmp_path / "system.json", [{"system": "Be a pirate. ", "stimulus_user": "Hello?", "label": "pirate"}])
    write(tmp_path / "control.json", [{"control_user": "Be a pirate.", "label": "pirate"}])
    write(tmp_path / "stimulus.json", [STIMULUS | {"control_thought": "Hm."}, "x"])
    write(tmp_path / "stimulus_completion.json", [STIMULUS | {"stimulus_model": "Ahoy!"}])
    return tmp_path


def test_latentqa_stimuli_come_by_type(latentqa: Path) -> None:
    types = ["system", "control", "stimulus", "stimulus_completion"]
    found = read(latentqa, kind="latentqa", path=".", types=types)
    assert [(part.table["type"], part.table["prefix"]) for part in found] == [(kind, f"s/{kind}") for kind in types]
    assert plain(found[2:3]) == [STIMULUS, "x"]
    assert sources.questions(latentqa) == {"pirate": [("Who?", "A pirate."), ("How?", "Gruffly.")]}
    both = config(kind="latentqa", path=".", types=["system", "control"])
    recorded = sources.inputs(both, sources.tables(both, root=latentqa, seed=0), root=latentqa)
    assert [entry["file"] for entry in recorded] == ["control.json", "qa.json", "system.json"]


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("system.json", {}, r"system\.json: expected a list of entries, got dict"),
        ("system.json", "[", r"system\.json: not JSON"),
        ("qa.json", [], r"qa\.json: expected an object of labels, got list"),
        ("qa.json", {"pirate": "Who?"}, r"qa\.json: key 'pirate': expected a list of \[question, answer\], got str"),
        ("qa.json", {"pirate": [["Who?"]]}, r"qa\.json: key 'pirate', pair 0: expected \[question, answer\]"),
    ],
)
def test_latentqa_names_file_and_key(latentqa: Path, file: str, value: object, message: str) -> None:
    write(latentqa / file, value)
    reader = sources.questions if file == "qa.json" else lambda root: read(root, kind="latentqa", path=".")
    with pytest.raises(ValueError, match=message):
        reader(latentqa)


def test_latentqa_needs_the_files_of_its_types(latentqa: Path) -> None:
    (latentqa / "stimulus_completion.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no stimulus_completion\.json, only .*leave it out of types"):
        read(latentqa, kind="latentqa", path=".", types=["stimulus_completion"])
    # Beside other types it is used where present, as the published evaluation files lack it.
    assert len(read(latentqa, kind="latentqa", path=".", types=["system", "stimulus_completion"])) == 1
    (latentqa / "control.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no control\.json"):
        read(latentqa, kind="latentqa", path=".", types=["system", "control"])
    with pytest.raises(ValueError, match=r"is a file; expected the folder with qa\.json"):
        read(latentqa, kind="latentqa", path="qa.json")


# Hugging Face data sets


def labelled_set(num_rows: int = 30) -> Any:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "tense": datasets.ClassLabel(names=["past", "present"])}
    )
    rows = [{"sentence": f"S {index}.", "tense": index % 2} for index in range(num_rows)]
    rows[3]["tense"] = -1
    return datasets.Dataset.from_list(rows, features=features)


NAMES = ["past", "present", "past", "-1", "past"]


def test_a_saved_set_spells_its_classes(tmp_path: Path) -> None:
    import datasets

    saved = labelled_set()
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select(range(4))}).save_to_disk(str(tmp_path / "two"))
    saved.to_parquet(str(tmp_path / "t.parquet"))
    for path, values in [("one", {}), ("two", {"split": "train"}), ("two", {}), ("t.parquet", {})]:
        found = read(tmp_path, path=path, **LABELLED, **values)
        assert [row["tense"] for row in plain(found)][:5] == NAMES
        assert plain(found)[29] == {"sentence": "S 29.", "tense": "present"}
    assert len(plain(read(tmp_path, path="two", split="test", **LABELLED))) == 4
    assert sources.words(sources.tables(config(path="one", **LABELLED), root=tmp_path, seed=0)) == ["past", "present"]
    assert sources.words(sources.tables(config(path="t.parquet", **LABELLED), root=tmp_path, seed=0)) is None
    dated = saved.add_column("day", [datetime.date(2020, 1, 2)] * 30)
    dated.save_to_disk(str(tmp_path / "dated"))
    with pytest.raises(ValueError, match=r"dated: column 'day': expected text"):
        read(tmp_path, path="dated", **{**LABELLED, "label": "day"})
    with pytest.raises(ValueError, match=r"two has no split 'dev', only \['test', 'train'\]"):
        read(tmp_path, path="two", split="dev", **LABELLED)
    with pytest.raises(ValueError, match=r"split='train', but .* is no data set that `save_to_disk` wrote"):
        read(tmp_path, path="t.parquet", split="train", **LABELLED)


def stream(monkeypatch: pytest.MonkeyPatch, num_rows: int = 30, asked: list[Any] | None = None) -> None:
    import datasets

    def load(*args: object, **values: object) -> Any:
        if asked is not None:
            asked.append((args, values))
        return labelled_set(num_rows).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_streamed_set_is_read_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    stream(monkeypatch, asked=asked)
    found = read(tmp_path, dataset="o/n", subset="x", revision="r", **LABELLED)
    values = {"data_dir": None, "split": "train", "revision": "r", "streaming": True}
    assert asked == [(("o/n", "x"), values)]
    # What the branch is now is what both passes read, and what is recorded.
    monkeypatch.setattr(hub, "_commit", lambda config: "c0ffee")
    copied = config(dataset="o/n", subset="x", revision="refs/convert/parquet", **LABELLED)
    [entry] = sources.inputs(copied, sources.tables(copied, root=tmp_path, seed=0), root=tmp_path)
    assert asked[1] == (("o/n", None), values | {"data_dir": "x", "revision": "c0ffee"})
    assert (entry["revision"], entry["fingerprint"]) == ("refs/convert/parquet", "c0ffee")
    monkeypatch.undo()
    stream(monkeypatch)
    assert [row["sentence"] for row in plain(found)] == [f"S {index}." for index in range(30)]
    assert [row["tense"] for row in plain(found)][:5] == NAMES
    assert found[0].table == {"prefix": "s", "origin": "o/n (x, train, r)", "unit": "row"}
    streamed = config(dataset="o/n", **LABELLED)
    recorded = sources.inputs(streamed, sources.tables(streamed, root=tmp_path, seed=0), root=tmp_path)
    assert recorded == [{"source": "s", "dataset": "o/n", "split": "train"}]
    with pytest.raises(ValueError, match=r"o/n \(train\): column 'text' is missing; there are \['sentence', 'tense'\]"):
        read(tmp_path, dataset="o/n", **LABELLED | {"text": "{text}"})


def test_some_rows_of_a_stream_come_from_its_shuffle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream(monkeypatch, num_rows=300)

    def drawn(seed: int, **values: Any) -> list[str]:
        found = sources.rows(config(dataset="o/n", **LABELLED, **values), root=tmp_path, seed=seed)
        return [row["sentence"] for row in plain(list(found))]

    ten = drawn(0, rows=10)
    assert len(set(ten)) == 10
    assert ten == drawn(0, rows=10) != drawn(1, rows=10)
    assert ten != [f"S {index}." for index in range(10)]
    # A count is as many rows as give it.
    assert drawn(0, count=20, questions_per_text=2) == ten
    assert len(drawn(0, count=21, questions_per_text=2)) == 11
    assert len(drawn(0, count=20, labels={"past": "past", "present": []})) == 60


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("DatasetNotFoundError:Dataset 'o/n' is a gated dataset on the Hub.", FileNotFoundError, r"o/n \(train\) is gated\. Open its page on the Hub.*accept its terms.*hf auth login.*save_to_disk"),  # noqa: E501
        ("DatasetNotFoundError:Dataset 'o/n' doesn't exist on the Hub", FileNotFoundError, r"the Hub knows none of this name, or it is private"),  # noqa: E501
        ("ConnectionError:Couldn't reach the Hub", ConnectionError, r"the Hub cannot be reached .*save_to_disk.*path = \"FOLDER\""),
        ("RuntimeError:Dataset scripts are no longer supported, but found n.py", ValueError, r'revision = "refs/convert/parquet"'),
        ("ValueError:Bad split: dev. Available splits: ['train']", ValueError, r"data set o/n \(train\): Bad split: dev"),
    ],
)  # fmt: skip
def test_a_set_out_of_reach_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, kind: type[Exception], message: str
) -> None:
    import builtins

    import datasets
    from datasets import exceptions

    name, text = error.split(":", 1)

    def load(*args: object, **values: object) -> Any:
        raise (getattr(exceptions, name, None) or getattr(builtins, name))(text)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind, match=message):
        read(tmp_path, dataset="o/n", **LABELLED)


def test_a_stream_that_breaks_off_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    class ConnectError(Exception):
        __module__ = "httpx"

    def rows() -> Iterator[dict[str, object]]:
        yield from ({"sentence": f"S {index}.", "tense": "past"} for index in range(1500))
        raise ConnectError("no route")

    features = datasets.Features({"sentence": datasets.Value("string"), "tense": datasets.Value("string")})
    broken = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **values: broken)
    items = sources.rows(config(dataset="o/n", **LABELLED), root=tmp_path, seed=0)
    assert next(items).batch.num_rows == 1000
    with pytest.raises(
        ConnectionError, match=r"o/n \(train\): the stream broke off after 1000 rows \(no route\).*--resume"
    ):
        list(items)


# Reading ahead


def test_reading_ahead_is_bounded_keeps_order_and_stops() -> None:
    taken: list[int] = []

    def count() -> Iterator[int]:
        for index in range(1000):
            taken.append(index)
            yield index

    items = ahead(count(), depth=3)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()
    assert len(taken) <= 10
    assert not [thread for thread in threading.enumerate() if thread.name == "ao-read-ahead"]
    assert list(ahead(range(100), depth=1)) == list(range(100))


def test_what_reading_raises_is_raised_in_its_place() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("line 2")

    items = ahead(broken(), depth=2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="line 2"):
        next(items)


def test_readers_load_their_libraries_late() -> None:
    import subprocess

    code = "import sys, ao.sources; print([m for m in ('pyarrow', 'datasets', 'numpy', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


@real_data.needed
def test_the_published_files_are_read() -> None:
    types = ["system", "control", "stimulus"]
    found = read(real_data.FOLDER, kind="latentqa", path="latentqa", types=types)
    assert [sum(p.batch.num_rows for p in found if p.table["type"] == kind) for kind in types] == [567, 500, 567]
    assert sum(map(len, sources.questions(real_data.FOLDER / "latentqa").values())) > 1000
    truth = {"kind": "classification", "text": "statement", "questions": ["True?"]}
    found = read(real_data.FOLDER, path="classification/geometry_of_truth", **truth)
    assert sum(part.batch.num_rows for part in found) == 14808
    assert {row["label"] for row in plain(found)} == {"0", "1"}
    found = read(real_data.FOLDER, path="classification/relations", kind="classification", questions=["True?"])
    assert sum(part.batch.num_rows for part in found) == 4118
    assert all(part.table["templates"] for part in found)
