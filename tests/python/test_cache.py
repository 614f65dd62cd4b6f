"""The activation cache from Python: against plain slices, other readers, other processes, kills and full disks."""

import copy
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import xxhash

import small_disk
from ao import _ao
from ao.cache import MODES, QUANTILES, ActivationCache, CachedLayer, context_keys, contract_of, norm_statistics
from ao.cache_files import manifest_text, verify
from ao.collect.missing import remove_leftovers
from ao.collect.sinks import finish_cache
from ao.config import ModelConfig
from ao.manifest import canonical_json, read_manifest
from ao.prompt import model_folder
from mixture import files

KILLS = int(os.environ.get("AO_KILLS", "4"))
SEED = int(os.environ.get("AO_KILL_SEED", "0"))
CONTRACT = {"model": "tiny", "precision": "bf16"}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
WIDTH = 7


def writer(folder: Path, unit: int = 0, **settings: Any) -> _ao.ActivationWriter:
    settings = {"run": "run", "contract": CONTRACT, "dtype": "F32", "width": WIDTH, "layers": [1, 3], **settings}
    contract = canonical_json(settings.pop("contract"))
    return _ao.ActivationWriter(folder, unit=unit, contract_json=contract, **settings)


def drawn(rows: int, dtype: str = "F32", seed: int = 0) -> np.ndarray:
    """Rows [rows, WIDTH] as the cache holds them."""
    values = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(TORCH[dtype])
    return values.view(torch.int16).numpy().view("<u2") if dtype == "BF16" else values.numpy()


def some_keys(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, 2), dtype=np.uint64)


def write_unit(folder: Path, unit: int, rows: int, *, keys: np.ndarray | None = None, **settings: Any) -> np.ndarray:
    """A unit with rows of layer 1; returns them."""
    own = drawn(rows, settings.get("dtype", "F32"), seed=unit)
    made = writer(folder, unit, **settings)
    keys = some_keys(rows, unit) if keys is None else keys
    made.append(1, keys, np.arange(rows, dtype=np.float32), own)
    made.finish()
    return own


@pytest.fixture
def cache(tmp_path: Path) -> tuple[CachedLayer, np.ndarray]:
    """A layer in three units, and its rows."""
    rows = [write_unit(tmp_path / "cache", unit, count) for unit, count in enumerate((5, 1, 9))]
    return ActivationCache.open(tmp_path / "cache").layer(1), np.concatenate(rows)


def test_keys_are_a_chain_of_hashes() -> None:
    ids, expected, last = [3, 0, 2**31 - 1], [], bytes(16)
    for token in ids:
        last = xxhash.xxh3_128_intdigest(last + token.to_bytes(4, "little", signed=True)).to_bytes(16, "little")
        expected.append([int.from_bytes(last[8:], "little"), int.from_bytes(last[:8], "little")])
    assert context_keys(np.array(ids)).tolist() == expected
    assert context_keys(np.array([], np.int32)).shape == (0, 2)
    with pytest.raises(ValueError, match=r"ids has values of 4 bytes and type \"f\""):
        _ao.context_keys(np.zeros(3, np.float32))
    for wrong in (np.array([2**32 + 5]), np.array([-1]), np.array([1.5]), np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match=r"expected token ids \[length\] from 0 below 2\*\*31"):
            context_keys(wrong)


@pytest.mark.parametrize("dtype", TORCH)
def test_other_readers_read_what_torch_and_numpy_gave(tmp_path: Path, dtype: str) -> None:
    """Batches of both kinds, on two layers; a tensor's memory goes to the writer as a view."""
    made = writer(tmp_path, dtype=dtype)
    whole = {layer: drawn(10, dtype, seed=layer) for layer in (1, 3)}
    for layer, rows in whole.items():
        made.append(layer, some_keys(4, 2 * layer), np.ones(4, np.float32), rows[:4])
        bits = torch.from_numpy(rows[4:].view("<i2") if dtype == "BF16" else rows[4:])
        tensor = bits.view(TORCH[dtype])
        seen = tensor.view(torch.int16 if dtype != "F32" else torch.int32).numpy()
        assert seen.ctypes.data == tensor.data_ptr(), "no copy"
        made.append(layer, some_keys(6, 2 * layer + 1), np.ones(6, np.float32), seen)
    assert made.rows == {1: 10, 3: 10}
    assert made.finish() == "run-00000.index.safetensors"
    cache = ActivationCache.open(tmp_path, contract={"model": "tiny"})
    assert (cache.layers, cache.dtype, cache.width, cache.contract) == ([1, 3], dtype, WIDTH, CONTRACT)
    for layer, rows in whole.items():
        path = tmp_path / f"run-00000-L{layer:03d}.safetensors"
        expected = torch.from_numpy(rows.view("<i2") if dtype == "BF16" else rows).view(TORCH[dtype])
        read = safetensors.torch.load_file(path)
        assert list(read) == ["activations"]
        assert torch.equal(read["activations"], expected)
        if dtype != "BF16":  # NumPy has no such type.
            assert np.array_equal(safetensors.numpy.load_file(path)["activations"], rows)
        # Ten lines of plain NumPy read it too: the header's length, the header, the rows.
        plain = path.read_bytes()
        header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
        assert header["activations"]["shape"] == [10, WIDTH]
        assert np.array_equal(np.frombuffer(plain, NUMPY[dtype], offset=4096).reshape(10, WIDTH), rows)
        assert np.array_equal(cache.layer(layer)[:], rows)
    assert verify(tmp_path) == []


def test_views_are_the_files_and_cannot_be_written(cache: tuple[CachedLayer, np.ndarray]) -> None:
    layer, rows = cache
    assert len(layer) == 15
    for at in (0, 4, 5, 6, 14, -1, -15):
        assert np.array_equal(layer[at], rows[at])
        assert not layer[at].flags.writeable
        assert not layer[at].flags.owndata
    for which in (slice(0, 5), slice(5, 6), slice(7, -2), slice(-3, None), slice(3, 3), slice(9, 2), slice(15, 20)):
        assert np.array_equal(layer[which], rows[which])
        assert layer[which].shape == rows[which].shape
    assert not layer[6:9].flags.writeable
    with pytest.raises(ValueError, match="assignment destination is read-only"):
        layer[0][0] = 1
    for which in (slice(4, 6), slice(0, 4, 2), slice(None, None, -1)):
        with pytest.raises(IndexError, match="do not lie side by side in one file; use gather"):
            layer[which]
    for at in (15, -16):
        with pytest.raises(IndexError, match=f"layer 1: row {at} of 15"):
            layer[at]
    assert np.array_equal(layer.norms, np.concatenate([np.arange(n) for n in (5, 1, 9)]))


@pytest.mark.parametrize("mode", MODES)
def test_gathering_equals_indexing(cache: tuple[CachedLayer, np.ndarray], mode: Any) -> None:
    layer, rows = cache
    for which in ([], [14], [3, 3, 3], list(range(15)), [14, 0, 5, 4, 0, 9]):
        wanted = np.array(which, dtype=np.int64)
        assert np.array_equal(layer.gather(wanted, mode=mode), rows[wanted])
        out = np.full((len(which), WIDTH), np.nan, np.float32)
        assert layer.gather(wanted, out, mode=mode) is out
        assert np.array_equal(out, rows[wanted])
        tensor = torch.full((len(which), WIDTH), torch.nan)
        assert layer.gather(wanted.astype(np.int32), tensor, mode=mode) is tensor
        assert np.array_equal(tensor.numpy(), rows[wanted])
        layer.prefetch(wanted)


def test_a_cache_that_was_read_goes_to_other_processes(cache: tuple[CachedLayer, np.ndarray]) -> None:
    layer, rows = cache
    layer.gather(np.array([3]))
    layer.find(some_keys(1))
    assert layer[0].shape == (WIDTH,)
    sent = copy.deepcopy(layer)  # through the same state as a process that is spawned
    assert np.array_equal(sent.gather(np.arange(15)), rows)
    assert np.array_equal(sent[:5], layer[:5])
    assert sent.find(some_keys(5)).tolist() == layer.find(some_keys(5)).tolist() == list(range(5))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_gathering_into_tensors_of_two_bytes(tmp_path: Path, dtype: str) -> None:
    rows = write_unit(tmp_path, 0, 4, dtype=dtype)
    layer = ActivationCache.open(tmp_path).layer(1)
    tensor = torch.zeros(2, WIDTH, dtype=TORCH[dtype])
    layer.gather(np.array([3, 1]), tensor)
    assert np.array_equal(tensor.view(torch.int16).numpy().view("<u2"), rows[[3, 1]].view("<u2"))
    with pytest.raises(
        ValueError, match=f"out: expected an array, or a CPU tensor of {TORCH[dtype]}, got torch.float32 on cpu"
    ):
        layer.gather(np.array([3, 1]), torch.zeros(2, WIDTH))


def test_gathering_refuses_what_does_not_fit(cache: tuple[CachedLayer, np.ndarray]) -> None:
    layer, _ = cache
    for rows in ([15], [-1], [0, 99]):
        with pytest.raises(IndexError, match=r"layer 1: rows -?\d+\.\.\d+|layer 1: rows -1"):
            layer.gather(np.array(rows))
        with pytest.raises(IndexError):
            layer.prefetch(np.array(rows))
    for rows in (np.array([True, False]), np.array([0.5]), np.array([[1, 2]])):
        with pytest.raises(ValueError, match="rows: expected their numbers"):
            layer.gather(rows)
    one = np.array([1])
    for out in (np.zeros((2, WIDTH), "<f4"), np.zeros((WIDTH, 1), "<f4"), np.zeros(WIDTH, "<f4")):
        with pytest.raises(ValueError, match=r"out: expected the shape \[1, 7\]"):
            layer.gather(one, out)
    for out in (np.zeros((1, WIDTH)), np.zeros((1, WIDTH), "<u4"), np.zeros((1, WIDTH), "<u2")):
        with pytest.raises(ValueError, match="out: expected float32 for F32"):
            layer.gather(one, out)
    with pytest.raises(
        ValueError, match=r"out: expected an array, or a CPU tensor of torch\.float32, got torch\.bfloat16 on cpu"
    ):
        layer.gather(one, torch.zeros(1, WIDTH, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out is not contiguous"):
        layer.gather(np.array([1, 2]), np.zeros((2, 2 * WIDTH), "<f4")[:, ::2])
    with pytest.raises(ValueError, match="out is read-only"):
        layer.gather(one, layer[:1])
    with pytest.raises(ValueError, match='mode "fast": expected auto, warm, hinted or direct'):
        layer.gather(one, mode="fast")  # pyright: ignore[reportArgumentType]


def test_writing_refuses_what_does_not_fit(tmp_path: Path) -> None:
    made = writer(tmp_path)
    keys, norms, rows = some_keys(2), np.ones(2, np.float32), drawn(2)
    for wrong, message in (
        ((2, keys, norms, rows), r"layer 2 is not among the unit's, \[1, 3\]"),
        ((1, keys, norms, rows[:1]), "2 keys and 2 norms for 28 bytes of rows, which hold 28 each"),
        ((1, keys, norms[:1], rows), "2 keys and 1 norms"),
        ((1, keys.reshape(-1)[:3], norms[:1], rows[:1]), "keys have 8 bytes too many"),
        ((1, keys, norms.astype(np.float64), rows), "norms has values of 8 bytes"),
        ((1, keys, norms.astype(np.int32), rows), "norms has values of 4 bytes and type"),
        ((1, keys, norms, drawn(14).T), "rows is not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            made.append(*wrong)
    assert made.rows == {1: 0, 3: 0}
    made.append(1, keys, norms, rows)
    made.append(1, keys[:1], norms[:1], rows[:1])
    with pytest.raises(ValueError, match="rows 0 and 2 of layer 1 have the same key"):
        made.finish()
    for use in (made.finish, lambda: made.append(1, keys, norms, rows), lambda: made.rows):
        with pytest.raises(ValueError, match="this writer has finished"):
            use()
    made.abandon()
    assert list(tmp_path.iterdir()) == []
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "F64"}, 'rows of "F64" cannot be kept'),
        ({"width": 0}, "a row of 0 values"),
        ({"run": "../x"}, "cannot be a part of a file's name"),
        ({"contract": [1]}, "the contract is no JSON object"),
        ({"contract": {"text": "x" * 5000}}, "shorten the contract"),
    ]
    for settings, message in refused:
        with pytest.raises(ValueError, match=message):
            writer(tmp_path, **settings)


def test_an_abandoned_writer_leaves_nothing(tmp_path: Path) -> None:
    for leave in (lambda made: made.abandon(), lambda made: None):
        made = writer(tmp_path)
        made.append(1, some_keys(3), np.ones(3, np.float32), drawn(3))
        assert len(list(tmp_path.iterdir())) == 1
        leave(made)
        del made
        assert list(tmp_path.iterdir()) == []


def test_threads_may_share_a_writer(tmp_path: Path) -> None:
    """Each waited for the other: one for the writer with the interpreter in its hands, one for the interpreter."""
    script = f"""
import sys, threading
import numpy as np
from ao import _ao
made = _ao.ActivationWriter({str(tmp_path)!r}, run="r", unit=0, contract_json="{{}}", dtype="F32", width=512, layers=[1])
def append(part):
    for at in range(100):
        keys = np.stack([np.full(256, part * 100 + at), np.arange(256)], 1).astype(np.uint64)
        made.append(1, keys, np.ones(256, np.float32), np.full((256, 512), part, np.float32))
        made.rows
threads = [threading.Thread(target=append, args=(part,), daemon=True) for part in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
made.finish()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert len(ActivationCache.open(tmp_path).layer(1)) == 4 * 100 * 256
    assert verify(tmp_path) == []


def test_keys_are_found_over_units(tmp_path: Path) -> None:
    """Random keys, and keys whose upper halves agree, in one unit and over several."""
    rng = np.random.default_rng(0)
    keys = np.stack([rng.integers(0, 6, 200), rng.permutation(200)], axis=1).astype(np.uint64) * np.uint64(2**60 + 1)
    keys = np.concatenate([keys, some_keys(50)])
    held = rng.permutation(len(keys))[:180]
    for unit, part in enumerate(np.split(held, [1, 70])):
        write_unit(tmp_path, unit, len(part), keys=keys[part])
    layer = ActivationCache.open(tmp_path).layer(1)
    row_of = {tuple(key): row for row, key in enumerate(keys[held].tolist())}
    asked = keys[rng.integers(0, len(keys), 500)]
    expected = [row_of.get(tuple(key), -1) for key in asked.tolist()]
    assert -1 in expected
    assert layer.find(asked).tolist() == expected
    # Beyond the greatest, below the least, and halves that only fit one by one.
    odd = np.array([[2**64 - 1, 2**64 - 1], [0, 2**64 - 1], [0, 0], [keys[0, 0], keys[1, 1]]], dtype=np.uint64)
    assert layer.find(odd).tolist() == [row_of.get(tuple(key), -1) for key in odd.tolist()]
    assert layer.find(keys[:0]).tolist() == []
    assert ActivationCache.open(tmp_path).layer(9).find(asked[:3]).tolist() == [-1, -1, -1]
    for wrong in (keys.astype(np.int64), keys[:, 0], np.zeros((3, 3), np.uint64)):
        with pytest.raises(ValueError, match=r"keys: expected uint64 \[K, 2\], got"):
            layer.find(wrong)


def test_vectors_of_a_context(tmp_path: Path) -> None:
    ids = np.array([5, 6, 7, 8], dtype=np.int32)
    made = writer(tmp_path)
    rows = {1: drawn(3, seed=1), 3: drawn(2, seed=3)}
    made.append(1, context_keys(ids)[:3], np.ones(3, np.float32), rows[1])
    made.append(3, np.ascontiguousarray(context_keys(ids)[[3, 0]]), np.ones(2, np.float32), rows[3])
    made.finish()
    cache = ActivationCache.open(tmp_path)
    found = cache.vectors(ids, np.array([3, 1, 3, 1]), np.array([0, 2, 3, 0]))
    assert np.array_equal(found, [rows[3][1], rows[1][2], rows[3][0], rows[1][0]])
    with pytest.raises(KeyError, match=r"layer 1, positions \[3\] were not collected"):
        cache.vectors(ids, np.array([1, 1]), np.array([0, 3]))
    lists: Any = ([3, 1, 3, 1], [0, 2, 3, 0])
    assert np.array_equal(cache.vectors(ids, *lists), found)
    assert cache.vectors(ids, np.array([]), np.array([])).shape == (0, WIDTH)
    refused: list[tuple[Any, Any, type[Exception], str]] = [
        ([1], [0, 1, 2], ValueError, "expected a layer for each position, got 1 layers and 3 positions"),
        ([1, 1, 1, 3], [0, 1, 2], ValueError, "got 4 layers and 3 positions"),
        (1, [0], ValueError, r"layers: expected numbers \[K\], got int64 \[\]"),
        ([1], [[0]], ValueError, r"positions: expected numbers \[K\], got int64 \[1, 1\]"),
        ([1], [True], ValueError, r"positions: expected numbers \[K\], got bool"),
        ([1], [0.5], ValueError, r"positions: expected numbers \[K\], got float64"),
        ([1], [-1], IndexError, r"positions -1\.\.-1 of a context of 4 tokens"),
        ([1, 1], [0, 4], IndexError, r"positions 0\.\.4 of a context of 4 tokens"),
    ]
    for layers, positions, error, message in refused:
        with pytest.raises(error, match=message):
            cache.vectors(ids, layers, positions)


def test_units_of_other_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished unit of an activation cache; make one with ao collect"):
        ActivationCache.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished unit"):
        verify(tmp_path)
    write_unit(tmp_path, 0, 3)
    with pytest.raises(ValueError, match="collected from model 'tiny', got 'other'; collect the other target's"):
        ActivationCache.open(tmp_path, contract={"model": "other"})
    with pytest.raises(ValueError, match="collected from an unrecorded adapter"):
        ActivationCache.open(tmp_path, contract={"adapter": None})
    others: list[tuple[str, dict[str, Any], str]] = [
        ("a", {"contract": {"model": "other"}}, "contract .* give each target a cache of its own"),
        ("b", {"dtype": "F16"}, "dtype 'F32', got 'F16'"),
    ]
    for run, settings, message in others:
        write_unit(tmp_path, 1, 3, run=f"s{run}", **settings)
        with pytest.raises(ValueError, match=message):
            ActivationCache.open(tmp_path)
        for path in tmp_path.glob(f"s{run}-*"):
            path.unlink()


def test_a_contract_names_the_commit_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, commit = tmp_path / "models--acme--tiny", "1" * 40
    shutil.copytree(model_folder("demo"), hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    contracts = [contract_of(ModelConfig(name="acme/tiny", revision=revision)) for revision in (None, "main", commit)]
    assert contracts[0]["revision"] == commit
    assert contracts[0] == contracts[1] == contracts[2]
    assert contract_of(ModelConfig(name="demo"))["revision"] is None
    assert contract_of(ModelConfig(name=str(hub / "snapshots" / commit)))["revision"] is None


def test_norm_statistics_are_numpys(tmp_path: Path) -> None:
    norms = np.random.default_rng(0).lognormal(size=1000).astype(np.float32)
    norms[[3, 5, 7]] = np.nan, np.inf, -np.inf
    made = writer(tmp_path)
    made.append(1, some_keys(1000), norms, drawn(1000))
    made.finish()
    manifest = ActivationCache.open(tmp_path).write_manifest()
    assert (tmp_path / "manifest.json").read_text() == manifest_text(manifest)
    (found,) = manifest["layers"].values()
    finite = np.delete(norms, [3, 5, 7]).astype(np.float64)
    assert (found["rows"], found["not_finite"]) == (1000, 3)
    assert found["mean"] == pytest.approx(finite.mean(), rel=1e-12)
    assert found["quantiles"] == {str(q): pytest.approx(np.quantile(finite, q), rel=1e-12) for q in QUANTILES}
    assert norm_statistics(np.array([np.nan], np.float32)) == {"rows": 1, "not_finite": 1}


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_verify_lists_every_damage(tmp_path: Path) -> None:
    for unit in range(9):
        write_unit(tmp_path, unit, 3)
    ActivationCache.open(tmp_path).write_manifest()
    assert verify(tmp_path) == []
    rows = lambda unit: tmp_path / f"run-{unit:05d}-L001.safetensors"  # noqa: E731
    index = lambda unit: tmp_path / f"run-{unit:05d}.index.safetensors"  # noqa: E731
    rows(0).write_bytes(rows(0).read_bytes()[:-1])
    rows(1).write_bytes(rows(1).read_bytes()[:-9] + bytes(9))
    flip(rows(2), 4096)
    flip(rows(3), 100)
    rows(4).unlink()
    shutil.copy(rows(6), rows(5))
    flip(index(7), -1)
    index(8).unlink()
    found = verify(tmp_path)
    expected = [
        (rows(0), "expected 4180 bytes, got 4179"),
        (rows(1), "rows 0 to 2 have xxh3"),
        (rows(2), "rows 0 to 2 have xxh3"),
        (rows(3), "its header is not the one"),
        (rows(4), "no such file"),
        (rows(5), "its header is not the one"),
        (index(7), "what it holds has xxh3"),
        (index(8), "missing, though manifest.json lists it"),
        (index(7), "not the file that manifest.json lists"),
    ]
    assert len(found) == len(expected)
    for line, (path, what) in zip(found, expected, strict=True):
        assert line.startswith(f"{path}: "), line
        assert what in line
    # A cut file is refused before it is mapped: touching what is missing would kill the process.
    layer = ActivationCache.open(tmp_path).layer(1)
    with pytest.raises(ValueError, match=r"4179 bytes, and by its header .* with 3 rows"):
        layer[0]


def lie(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Write a manifest that says something else, with the digest of that; returns its path."""
    path = folder / "manifest.json"
    manifest = read_manifest(path)
    del manifest["sha256"]
    change(manifest)
    path.write_text(manifest_text(manifest))
    return str(path)


def three_units(folder: Path, run: str = "run", **settings: Any) -> Path:
    for unit in range(3):
        write_unit(folder, unit, 3, run=run, **settings)
    ActivationCache.open(folder).write_manifest()
    return folder


def set_rows(unit: int, rows: dict[str, int]) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["units"][unit].update(rows=rows)


def test_a_manifest_is_believed_until_it_is_read(tmp_path: Path) -> None:
    """What it says of a unit is compared with the unit's own files before any row of it is given out."""
    path = lie(three_units(tmp_path), set_rows(1, {"1": 2}))
    layer = ActivationCache.open(tmp_path).layer(1)
    assert len(layer) == 8, "the manifest is not read"
    found = r"run-00001\.index\.safetensors: its header says .*\{1: 3\}\], and .*\{1: 2\}\] was known.* remove .*manifest\.json"
    with pytest.raises(ValueError, match=found):
        layer.find(some_keys(1))
    for read in (lambda: layer.gather(np.array([0])), lambda: layer[0], lambda: layer.prefetch(np.array([0]))):
        with pytest.raises(ValueError, match=r"run-00001-L001\.safetensors: it holds 3 rows, its index lists 2"):
            read()
    assert len(ActivationCache.open(tmp_path, headers=True).layer(1)) == 9
    (line,) = verify(tmp_path)
    assert line.startswith(f"{path}: damaged: it does not say of run-00001.index.safetensors what its header says")
    Path(path).unlink()
    assert len(ActivationCache.open(tmp_path).layer(1)) == 9


def test_counts_that_add_up_are_compared_one_by_one(tmp_path: Path) -> None:
    path = three_units(tmp_path)
    lie(path, set_rows(0, {"1": 2}))
    lie(path, set_rows(2, {"1": 4}))
    layer = ActivationCache.open(tmp_path).layer(1)
    assert len(layer) == 9
    with pytest.raises(ValueError, match=r"run-00000-L001\.safetensors: it holds 3 rows, its index lists 2"):
        layer[2]


def test_rows_of_another_target_are_refused_whatever_the_manifest_says(tmp_path: Path) -> None:
    """Units of the same names and sizes, put there with their times, and the manifest behind them."""
    own, other = three_units(tmp_path / "own"), three_units(tmp_path / "other", contract={**CONTRACT, "model": "evil"})
    text = (own / "manifest.json").read_bytes()
    for file in other.glob("*.safetensors"):
        shutil.copy2(file, own / file.name)
    (own / "manifest.json").write_bytes(text)
    cache = ActivationCache.open(own, contract=CONTRACT)
    with pytest.raises(ValueError, match=r"its header says .*evil"):
        cache.layer(1).find(some_keys(1))
    with pytest.raises(ValueError, match=r"its rows are of .*evil.*, by its index of .*tiny"):
        cache.layer(1)[0]
    with pytest.raises(ValueError, match="collected from"):
        ActivationCache.open(own, contract=CONTRACT, headers=True)


def test_indexes_that_changed_places_are_refused(tmp_path: Path) -> None:
    three_units(tmp_path)
    text = (tmp_path / "manifest.json").read_bytes()
    first, second = (tmp_path / f"run-0000{unit}.index.safetensors" for unit in range(2))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"run-00000\.index\.safetensors: its header says .*'run', 1.*'run', 0"):
        ActivationCache.open(tmp_path).layer(1).find(some_keys(1))


def test_what_is_edited_by_hand_is_not_believed(tmp_path: Path) -> None:
    path = three_units(tmp_path) / "manifest.json"
    for change in (lambda text: text.replace('"rows":{"1":3}', '"rows":{}'), lambda text: text.replace("tiny", "tidy")):
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))
        cache = ActivationCache.open(tmp_path, contract=CONTRACT)
        assert [unit.rows for unit in cache.units] == [{1: 3}] * 3
        assert "damaged, or written by hand: its sha256" in verify(tmp_path)[0]
        path.write_text(text)


def test_nothing_is_deleted_on_a_manifests_word(tmp_path: Path) -> None:
    """Clean-up and the new manifest go by the headers."""
    three_units(tmp_path, run="0" * 16)
    before = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    lie(tmp_path, set_rows(1, {"1": 2}))
    remove_leftovers(tmp_path, finished="0" * 16)
    finish_cache(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == before
    assert verify(tmp_path) == []
    assert len(ActivationCache.open(tmp_path).layer(1)) == 9


def test_a_run_is_not_another_that_begins_alike(tmp_path: Path) -> None:
    for run in ("a", "a-b"):
        write_unit(tmp_path, 0, 3, run=run)
    for run in ("a", "a-b"):
        for only in ({}, {"unit": 0}):
            assert [unit.run for unit in ActivationCache.open(tmp_path, run=run, **only).units] == [run]
    assert len(ActivationCache.open(tmp_path, unit=0).units) == 2


def test_verify_lists_a_manifest_of_other_units(tmp_path: Path) -> None:
    write_unit(tmp_path, 0, 3)
    manifest = tmp_path / "manifest.json"
    ActivationCache.open(tmp_path).write_manifest()
    write_unit(tmp_path, 1, 3)
    assert verify(tmp_path) == [], "units that came later are no damage"
    write_unit(tmp_path, 0, 2)
    (line,) = verify(tmp_path)
    assert "run-00000.index.safetensors: not the file that manifest.json lists; run ao collect again" in line
    for damaged in (
        "",
        "[]",
        "{}",
        '{"units": 3}',
        '{"units": [3]}',
        '{"units": [{"index": "x"}]}',
        "[" * 100_000,
        "\xff",
    ):
        manifest.write_text(damaged, encoding="latin-1")
        (line,) = verify(tmp_path)
        assert line.startswith(f"{manifest}: damaged: "), line


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 8, bytes(8), b"\x02" + bytes(7) + b"{}", bytes(5000)])
def test_a_foreign_index_is_refused(tmp_path: Path, content: bytes) -> None:
    write_unit(tmp_path, 0, 3)
    (tmp_path / "other.index.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"other.index.safetensors: not a file of activations: .*; remove its unit's index and run ao collect again",
    ):
        ActivationCache.open(tmp_path)
    (line,) = verify(tmp_path)
    assert "other.index.safetensors" in line


# Other processes

CHILD = """
import json, sys
import numpy as np
from ao import _ao
folder, first, units, rows, width = sys.argv[1], *map(int, sys.argv[2:])
for unit in range(first, units):
    made = _ao.ActivationWriter(
        folder, run="run", unit=unit, contract_json='{"model":"tiny"}', dtype="F32", width=width, layers=[1, 3]
    )
    rng = np.random.default_rng(unit)
    for batch in range(4):
        for layer in (1, 3):
            keys = rng.integers(0, 2**64, (rows, 2), dtype=np.uint64)
            made.append(layer, keys, np.ones(rows, np.float32), rng.random((rows, width), dtype=np.float32))
    made.finish()
    print(unit, flush=True)
"""


def child(folder: Path, first: int = 0, units: int = 6, rows: int = 300, width: int = 500) -> list[str]:
    """A process that writes units of two files of 2.4 MB."""
    return [sys.executable, "-c", CHILD, *map(str, (folder, first, units, rows, width))]


def test_only_finished_units_are_seen_while_others_are_written(tmp_path: Path) -> None:
    with subprocess.Popen(child(tmp_path, units=4), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # What was announced is there, and all that is there is whole.
            cache = ActivationCache.open(tmp_path)
            assert len(cache.units) >= int(line) + 1
            layer = cache.layer(3)
            assert len(layer) == 1200 * len(cache.units)
            units = [layer[1200 * unit : 1200 * unit + 1200] for unit in range(len(cache.units))]
            assert np.array_equal(layer.gather(np.arange(len(layer))[::-7]), np.concatenate(units)[::-7])
    assert process.returncode == 0
    made = writer(tmp_path, 9, contract={"model": "tiny"}, width=500)
    made.append(1, some_keys(1), np.ones(1, np.float32), np.ones((1, 500), np.float32))
    assert len(ActivationCache.open(tmp_path).units) == 4, "one that is under way does not count"
    made.abandon()
    assert verify(tmp_path) == []


def test_several_processes_read_at_once(tmp_path: Path) -> None:
    rows = np.concatenate([write_unit(tmp_path, unit, 50) for unit in range(3)])
    script = f"""
import sys
import numpy as np
from ao.cache import MODES, ActivationCache
layer = ActivationCache.open({str(tmp_path)!r}).layer(1)
rows = np.random.default_rng(0).integers(0, 150, 40)
found = [layer.gather(rows, mode=mode) for mode in MODES for _ in range(20)]
assert all(np.array_equal(found[0], other) for other in found)
sys.stdout.buffer.write(found[0].tobytes())
"""
    readers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(3)]
    expected = rows[np.random.default_rng(0).integers(0, 150, 40)].tobytes()
    for reader in readers:
        assert reader.communicate()[0] == expected
        assert reader.returncode == 0


def test_threads_read_at_once(cache: tuple[CachedLayer, np.ndarray]) -> None:
    layer, rows = cache
    wrong: list[Any] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for mode in (*MODES, *MODES):
            which = rng.integers(0, 15, 12)
            if not np.array_equal(layer.gather(which, mode=mode), rows[which]):
                wrong.append((seed, mode))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files that the child leaves, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    subprocess.run(child(folder), check=True, stdout=subprocess.DEVNULL)
    return files(folder), time.monotonic() - started


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path: Path, undisturbed: tuple[dict[str, bytes], float]) -> None:
    expected, seconds = undisturbed
    assert len(expected) == 18
    draws = random.Random(SEED)
    kills = amid = 0
    for turn in range(100 * KILLS):
        folder = tmp_path / str(turn)
        folder.mkdir()
        while True:
            done = [index.name for index in folder.glob("*.index.safetensors")]
            # Those that are done are whole and the first ones; going on means the units that are missing.
            assert sorted(done) == sorted(name for name in expected if ".index." in name)[: len(done)]
            assert not done or verify(folder) == []
            process = subprocess.Popen(child(folder, first=len(done)), stdout=subprocess.DEVNULL)
            if kills < KILLS:
                # Half of the time goes to imports: wait for the first file, then for a while.
                end = time.monotonic() + draws.uniform(0, seconds / 2)
                begun = set(os.listdir(folder))
                while process.poll() is None and (set(os.listdir(folder)) == begun or time.monotonic() < end):
                    time.sleep(0.0005)
                process.kill()
            if process.wait() == 0:
                break
            kills += 1
            amid += any(name.endswith(".partial") for name in os.listdir(folder))
        assert files(folder) == expected, "and nothing torn is left"
        if kills >= KILLS:
            break
    print(f"{kills} kills, {amid} of them within a file")
    assert amid >= max(1, KILLS // 5)


def test_a_full_disk_keeps_finished_units(tmp_path: Path, undisturbed: tuple[dict[str, bytes], float]) -> None:
    """On a real small disk, as in test_failures; with three units and a half."""
    expected, _ = undisturbed
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    size = sum(map(len, expected.values())) * 7 // 12
    script = f"""
        mount -t tmpfs -o size={size} none {disk} || exit 77
        {shlex.join(child(disk))} >{kept}/done 2>{kept}/err
        ls -A {disk} >{kept}/names
        mount -o remount,size=1g {disk} || exit 77
        {shlex.join(child(disk, first=3))} || exit 1
        cp -r {disk} {kept}/disk
    """
    done = small_disk.run(script, proof=kept / "names")
    error = (kept / "err").read_text()
    assert "No space left on device" in error
    assert "free some space" in error
    assert (kept / "done").read_text().split() == ["0", "1", "2"]
    assert set((kept / "names").read_text().split()) == {name for name in expected if name < "run-00003"}
    assert done.returncode == 0, done.stderr
    assert files(kept / "disk") == expected


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails the writing thread (EFBIG), whichever call comes next."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    done = subprocess.run(child(tmp_path), check=False, preexec_fn=limited, capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert "raise the limit" in done.stderr
    assert list(tmp_path.iterdir()) == []
