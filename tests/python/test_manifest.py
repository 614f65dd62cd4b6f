import os
import re
from pathlib import Path

import pytest

from ao.manifest import canonical_json, fingerprint, model_fingerprint, require_match, write_atomic


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "\u00e9"}) == '{"a":"\u00e9","b":[1,0.5]}'
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json(float("nan"))


def test_fingerprints_tell_parts_apart() -> None:
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("a", b"b") == fingerprint(b"a", "b")
    assert len(fingerprint({"a": 1})) == 64


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_into_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/file: there is no folder .*/none; make it first"):
        write_atomic(tmp_path / "none" / "file", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_says_what_which_expected_got_and_what_to_do() -> None:
    start, other = "9f2c" + "0" * 60, "41ab" + "0" * 60
    recorded = {"tokenizer": start, "layers": 8}
    require_match("shard-00003: packed for", expected=recorded, got={"layers": 8}, remedy="rerun ao-pack")
    for got, message in [
        ({"tokenizer": other}, "packed for tokenizer 9f2c0000.., got 41ab0000..; rerun ao-pack"),
        ({"tokenizer": start[:-1] + "1"}, f"packed for tokenizer '{start}', got '{start[:-1]}1'; rerun ao-pack"),
        ({"layers": 9}, "packed for layers 8, got 9; rerun ao-pack"),
        ({"adapter": "x"}, "packed for an unrecorded adapter, got 'x'; rerun ao-pack"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape('shard-00003: ' + message)}$"):
            require_match("shard-00003: packed for", expected=recorded, got=got, remedy="rerun ao-pack")


def test_model_fingerprints_see_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = b'{"a":{}}'
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    whole = model_fingerprint(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-1] + b"5")
    assert model_fingerprint(tmp_path) != whole
    monkeypatch.setattr("ao.manifest.WHOLE_FILES_BELOW", 0)
    by_header = model_fingerprint(tmp_path)
    weights.write_bytes(weights.read_bytes() + b"6")
    assert model_fingerprint(tmp_path) != by_header
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        model_fingerprint(tmp_path)
