"""The extension's face: buffers, errors, packs, plans, threads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ao._ao import (
    AoError,
    Framer,
    PackWriter,
    Source,
    input_digest,
    shard_layout,
    shard_metadata,
    verify_shard,
    write_atomic,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_framer(name: str = "gemma") -> Framer:
    special_tokens = {"gemma": {"bos_token": "<bos>", "eos_token": "<eos>"}, "qwen": {"eos_token": "<|im_end|>"}}
    tokenizer, template = (GOLDEN / f"{name}.json").read_text(), (GOLDEN / f"{name}.jinja").read_text()
    return Framer(tokenizer, template, json.dumps(special_tokens[name]))


def settings(**changes: Any) -> str:
    base = {"seed": 0, "num_layers": 4, "read_layers": [1, 2], "layers_per_example": "together"}
    return json.dumps({**base, "max_input_tokens": 500, "max_context_tokens": 500, **changes})


def settled(**source: Any) -> Source:
    made = Source(json.dumps({"name": "s", **source}))
    assert not made.needs_survey
    assert made.settle() is None
    return made


TABLE = json.dumps({"prefix": "s", "origin": "s.jsonl", "unit": "line"})


def json_rows(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.record_batch({"json": [json.dumps(row) for row in rows]})


def test_buffers_are_numpy_arrays_without_a_copy() -> None:
    framer = golden_framer()
    prompt = framer.prompt((1, 2), 3, "Is it?")
    ids, placeholders = np.asarray(prompt.ids), np.asarray(prompt.placeholders)
    assert ids.dtype == placeholders.dtype == np.int32
    assert ids[placeholders].tolist() == [framer.placeholder_id] * 6
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    assert framer.decode(ids) == framer.decode(ids.tolist()) == prompt.text
    assert np.asarray(framer.context('"a b"').token_spans).shape[1] == 2
    assert framer.encode("").tolist() == []


def test_a_pack_is_written_and_read(tmp_path: Path) -> None:
    framer = golden_framer("qwen")
    writer = PackWriter(tmp_path / "packed", framer, settings())
    examples = [{"id": f"e{i}", "context": f"the sea {i}", "question": "Is it?", "answer": "Yes"} for i in range(5)]
    counts = writer.add(settled(kind="records"), TABLE, json_rows(examples), 0)
    assert counts["offered"] == 5
    assert (counts["drops"], counts["errors"], counts["messages"]) == ({}, {}, [])
    manifest = json.loads(writer.finish())
    [shard] = manifest["shards"]
    path = tmp_path / "packed" / shard["file"]
    verify_shard(path, shard["sha256"])
    assert (shard["examples"], shard["datapoints"]) == (5, 5)
    described = json.loads(shard_metadata(path))
    assert described["sources"] == ["s"]
    arrays = {}
    for name, dtype, shape, offset in shard_layout(path):
        kind = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}[dtype]
        arrays[name] = np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape)
    start, end = arrays["input_offsets"][:2]
    ids = arrays["input_ids"][start:end]
    assert framer.decode(ids[arrays["answer_start"][0] :]) == "Yes<|im_end|>"
    assert set(ids[arrays["placeholders"][: arrays["placeholder_offsets"][1]]]) == {framer.placeholder_id}


def test_errors_are_ours_and_builtin_where_they_mean_the_same(tmp_path: Path) -> None:
    assert issubclass(AoError, ValueError)
    for missing in (shard_layout, shard_metadata):
        with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
            missing(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "file", b"")
    with pytest.raises(OSError, match="renaming into place"):
        write_atomic(tmp_path, b"")
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(AoError, match="short: not a shard: it has 3 bytes"):
        shard_layout(tmp_path / "short")
    writer = PackWriter(tmp_path / "p", golden_framer(), settings())
    writer.add(
        settled(kind="records"), TABLE, json_rows([{"id": "x", "context": "a", "question": "q", "answer": ""}]), 0
    )
    with pytest.raises(AoError, match=r'source "s", s\.jsonl: line 1, example "x": the answer is empty'):
        writer.finish()
    with pytest.raises(AoError, match="stopped at an error"):
        writer.finish()
    assert not list((tmp_path / "p").glob("*.safetensors"))
    with pytest.raises(AoError, match="must be settled"):
        PackWriter(tmp_path / "q", golden_framer(), settings()).add(
            Source('{"name": "s", "kind": "records"}'), TABLE, json_rows([]), 0
        )
    with pytest.raises(AoError, match='the column "json" must hold text'):
        PackWriter(tmp_path / "r", golden_framer(), settings()).add(
            settled(kind="records"), TABLE, pa.record_batch({"json": [1, 2]}), 0
        )
    with pytest.raises(AoError, match="not a token id"):
        golden_framer().decode([-1])
    with pytest.raises(AoError, match="the context is not what it should be"):
        golden_framer().context("{}")


def test_columns_of_any_type_are_rows_like_json(tmp_path: Path) -> None:
    """A table and the JSON lines that say the same give the same bytes, whatever types the columns have."""
    rows = [
        {
            "id": f"e{i}",
            "context": [{"role": "user", "content": f'the "sea" \n{i}'}],
            "question": "Is it?",
            "answer": "Yes",
        }
        | {"layers": [0.5, 0.25], "meta": {"i": i, "none": "x"}, "read": [{"message": 0, "start": 0, "end": 3}]}
        for i in range(7)
    ]
    table = pa.Table.from_pylist(rows)
    plain = table.combine_chunks().to_batches()[0]
    schema = table.schema.set(2, pa.field("question", pa.dictionary(pa.int32(), pa.string())))
    schema = schema.set(3, pa.field("answer", pa.large_string()))
    encoded = table.cast(schema).combine_chunks().to_batches()[0]
    manifests = []
    for name, batch in {"json": json_rows(rows), "plain": plain, "encoded": encoded}.items():
        writer = PackWriter(tmp_path / name, golden_framer("qwen"), settings(layers_per_example="each"))
        writer.add(settled(kind="records"), TABLE, batch, 0)
        manifests.append(json.loads(writer.finish())["shards"])
    assert manifests[0] == manifests[1] == manifests[2]
    assert manifests[0][0]["datapoints"] == 14


def test_an_input_digest_is_the_xxh3_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert input_digest(tmp_path / "file") == "06b05ab6733a618578af5f94892f3950"


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", b"one")
    write_atomic(str(tmp_path / "f"), b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"two"


def test_one_framer_serves_many_threads() -> None:
    framer = golden_framer()
    expected = [framer.prompt([1], 1 + at % 7, f"question {at}").ids.tolist() for at in range(200)]
    found: list[list[list[int]]] = []

    def work() -> None:
        found.append([framer.prompt([1], 1 + at % 7, f"question {at}").ids.tolist() for at in range(200)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[2])
from test_binding import TABLE, golden_framer, json_rows, settings, settled
from ao._ao import PackWriter
writer = PackWriter(sys.argv[1], golden_framer(), settings(layers_per_example="one"))
rows = [{"text": "the sea is fine " * (1 + i % 9)} for i in range(5000)]
writer.add(settled(kind="context_prediction"), TABLE, json_rows(rows), 0)
writer.finish()
"""


def test_the_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    written = []
    for threads in ("1", "2", "4"):
        folder = tmp_path / threads
        command = [sys.executable, "-c", PROGRAM, str(folder), str(Path(__file__).parent)]
        subprocess.run(command, check=True, env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)})
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1] == written[2]
