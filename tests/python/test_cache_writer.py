"""Rows that go into a cache from NumPy and torch, and reading them where descriptors are few and processes fork."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ao.cache import KEPT_MAPPED, MODES, ActivationCache, context_keys
from ao.cache_writer import CacheWriter

WIDTH = 4
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NUMPY = {"F16": np.float16, "F32": np.float32}


def writer(folder: Path, dtype: str = "F32", unit: int = 0) -> CacheWriter:
    return CacheWriter(folder, run="run", unit=unit, contract={"model": "tiny"}, dtype=dtype, width=WIDTH, layers=[1])


@pytest.mark.parametrize("dtype", TORCH)
def test_tensors_and_arrays_of_the_caches_type_are_taken(tmp_path: Path, dtype: str) -> None:
    rows = torch.randn(6, WIDTH).to(TORCH[dtype])
    norms, keys = rows.float().norm(dim=-1), context_keys(np.arange(6))
    made = writer(tmp_path, dtype)
    made.append(1, keys[:2], norms[:2], rows[:2].requires_grad_())
    made.append(1, keys[2:4], norms[2:4].numpy(), rows.detach().t().contiguous().t()[2:4])
    bits = rows.detach()[4:].view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else rows.detach()[4:].numpy()
    made.append(1, keys[4:], norms[4:], bits)
    assert made.finish() == "run-00000.index.safetensors"
    layer = ActivationCache.open(tmp_path).layer(1)
    assert torch.equal(layer.tensor(slice(0, 6)), rows.detach())
    assert np.array_equal(layer.norms, norms.numpy())


def test_what_would_be_stored_as_something_else_is_refused(tmp_path: Path) -> None:
    keys, norms, rows = context_keys(np.arange(3)), np.ones(3, np.float32), np.ones((3, WIDTH), np.float32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rows": rows.astype(np.float64)}, r"rows: expected float32 for F32, got float64"),
        ({"rows": rows.astype(np.int32)}, r"rows: expected float32"),
        ({"rows": rows.astype(">f4")}, r"rows: expected float32"),
        ({"rows": torch.ones(3, WIDTH, dtype=torch.bfloat16)}, r"rows: expected an array, or a CPU tensor of torch.float32"),
        ({"rows": torch.ones(3, WIDTH, device="meta")}, r"got torch.float32 on meta"),
        ({"rows": rows.tolist()}, r"got list"),
        ({"rows": rows.T.copy()}, r"keys: expected the shape \[4, 2\], got \[3, 2\]"),
        ({"rows": np.ones((3, 5), np.float32)}, r"rows: expected the shape \[3, 4\], got \[3, 5\]"),
        ({"keys": keys.view(np.int64)}, r"keys: expected uint64 \[K, 2\], got int64"),
        ({"norms": norms[:2]}, r"norms: expected the shape \[3\], got \[2\]"),
    ]  # fmt: skip
    made = writer(tmp_path)
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            made.append(1, **({"keys": keys, "norms": norms, "rows": rows} | changed))
    made.append(1, keys, norms, rows)
    made.finish()
    assert np.array_equal(ActivationCache.open(tmp_path).layer(1)[:], rows)


def units(folder: Path, count: int) -> None:
    for unit in range(count):
        made = writer(folder, unit=unit)
        ids = np.array([unit, 0])
        made.append(1, context_keys(ids), np.ones(2, np.float32), np.full((2, WIDTH), unit, np.float32))
        made.finish()


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files where the system shows them")
def test_a_cache_of_many_files_keeps_few_open(tmp_path: Path) -> None:
    units(tmp_path, 3 * KEPT_MAPPED)
    before = len(os.listdir("/proc/self/fd"))
    layer = ActivationCache.open(tmp_path).layer(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 3 * KEPT_MAPPED + 8, hard))
    try:
        for mode in MODES:
            assert np.array_equal(layer.gather(np.arange(len(layer)), mode=mode)[:, 0], np.arange(len(layer)) // 2)
        first = layer[0]
        assert [layer[row][0] for row in range(len(layer))] == [row // 2 for row in range(len(layer))]
        assert first[0] == 0, "a view outlives its place among the mapped files"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("mode", MODES)
def test_a_forked_process_reads_on(tmp_path: Path, mode: Any) -> None:
    """As workers of a torch DataLoader do, where fork is the default."""
    units(tmp_path, 12)
    layer = ActivationCache.open(tmp_path).layer(1)
    rows = np.arange(len(layer))
    expected = layer.gather(rows, mode=mode)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(layer.gather(rows, mode=mode), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
