import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny
from ao.config import parse_recipe
from ao.pack import pack
from ao.prompt import framer, identity
from ao.shards import PackedDataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    root = tmp_path_factory.mktemp("packed")
    lines = [
        json.dumps({"id": f"e{i}", "context": f"City {i // 2}", "question": f"Which {i}?", "answer": f"City {i}"})
        for i in range(25)
    ]
    (root / "records.jsonl").write_text("\n".join(lines))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    data = {"sources": [source], "examples_per_shard": 10, "layers_per_example": "each"}
    pack(parse_recipe({"model": {"name": model}, "data": data}), root=root, out=root / "packed")
    return root / "packed"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "packed")


def test_a_data_set_is_a_sequence_over_shards(packed: Path) -> None:
    data = PackedDataset.open(packed, verify=True)
    assert len(data) == 75
    assert len(data.manifest["shards"]) == 3
    ids = [datapoint.id for datapoint in data]
    assert ids == [f"e{i}@L{layer}" for i in range(25) for layer in (2, 4, 6)]
    assert data[-1].id == ids[-1]
    assert data[40].question == "Which 13?"
    with pytest.raises(IndexError, match="datapoint 75 of 75"):
        data[75]


def test_columns_agree_with_the_datapoints(packed: Path) -> None:
    data = PackedDataset.open(packed)
    assert data.lengths.tolist() == [len(datapoint.input_ids) for datapoint in data]
    assert data.context_lengths.tolist() == [len(datapoint.context_ids) for datapoint in data]
    assert (data.lengths.dtype, data.context_lengths.dtype, data.groups.dtype) == (np.int32, np.int32, np.int64)
    contexts: dict[int, list[int]] = {}
    for group, datapoint in zip(data.groups.tolist(), data, strict=True):
        ids = datapoint.context_ids.tolist()
        longest = contexts.setdefault(group, ids)
        assert longest[: len(ids)] == ids or ids[: len(longest)] == longest
    assert max(contexts) == len(contexts) - 1 == data.manifest["counts"]["contexts"] - 1


def test_arrays_are_views_that_cannot_be_written(packed: Path) -> None:
    datapoint = PackedDataset.open(packed)[0]
    for name in ("input_ids", "placeholders", "layers", "context_ids", "read_positions"):
        array = getattr(datapoint, name)
        assert array.base is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert datapoint.layers.dtype == np.int16


def test_a_truncated_shard_is_refused(copy: Path) -> None:
    shard = copy / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(
        ValueError, match=rf"shard-00001\.safetensors: expected {len(whole)} bytes, got {len(whole) - 8}"
    ):
        PackedDataset.open(copy)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors: missing, though manifest\.json lists it"):
        PackedDataset.open(copy)


def test_a_changed_shard_is_found_by_its_checksum(copy: Path) -> None:
    shard = copy / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    position = content.index(b"Which 24?")
    content[position] ^= 1
    shard.write_bytes(content)
    PackedDataset.open(copy)
    with pytest.raises(ValueError, match="shard-00002"):
        PackedDataset.open(copy, verify=True)


def test_folders_that_are_no_finished_data_set(copy: Path) -> None:
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"schema": 2}))
    with pytest.raises(ValueError, match="expected a packed data set of schema 1, got kind 'packed', schema 2"):
        PackedDataset.open(copy)
    manifest.write_text(json.dumps(content | {"counts": None}))
    with pytest.raises(ValueError, match=r"manifest\.json has at counts: Input should be .*, got None; it is damaged"):
        PackedDataset.open(copy)
    del content["shards"][1]["bytes"], content["oracle"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json lacks oracle, shards\.1\.bytes; it is damaged"):
        PackedDataset.open(copy)
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        PackedDataset.open(copy)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json, so no finished data set; make one with ao-pack"):
        PackedDataset.open(copy)


def test_a_model_with_another_tokenizer_is_refused(packed: Path, model: str, tmp_path: Path) -> None:
    data = PackedDataset.open(packed)
    loaded = identity(model, framer=framer(model))
    data.require(oracle=loaded, target=loaded)
    data.require(oracle={"tokenizer": loaded["tokenizer"]})
    folder = tiny.save_model(tmp_path / "other")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|think|>", "<|mull|>"))
    other = framer(str(folder)).fingerprint["tokenizer"]
    message = rf"packed: packed for tokenizer {loaded['tokenizer'][:8]}\.\., got {other[:8]}\.\.; rerun ao-pack or load"
    with pytest.raises(ValueError, match=message):
        data.require(oracle={"tokenizer": other})
    with pytest.raises(ValueError, match="packed for a target with num_layers 8, got 9"):
        data.require(target={"num_layers": 9})


def test_a_shard_of_which_nothing_was_kept_is_empty(tmp_path: Path, model: str) -> None:
    """Shard numbers count examples offered, so one may hold nothing; columns and rows pass over it."""
    lines = [
        json.dumps(
            {"id": f"e{i}", "context": "the sea " * (1 if i != 1 else 400), "question": "Is it?", "answer": "Yes"}
        )
        for i in range(3)
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    values = {"examples_per_shard": 1, "max_context_tokens": 50, "layers_per_example": "together"}
    values["sources"] = [{"name": "r", "kind": "records", "path": "records.jsonl"}]
    pack(parse_recipe({"model": {"name": model}, "data": values}), root=tmp_path, out=tmp_path / "p")
    data = PackedDataset.open(tmp_path / "p", verify=True)
    assert [shard["datapoints"] for shard in data.manifest["shards"]] == [1, 0, 1]
    assert [datapoint.id for datapoint in data] == ["e0", "e2"]
    assert len(data.lengths) == len(data.groups) == len(data.kinds) == 2
    assert data.layer_combinations == [(2, 4, 6)]
    assert data.groups.tolist() == [0, 1]
