"""What runs only on a GPU: ragged attention, copies beside the forwards, training by device name. Skipped without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ao.attention import VARLEN_HEAD, Documents, _flash, document_attention
from ao.cache import ActivationCache
from ao.collect import wanted
from ao.collect.run import collect
from ao.config import Recipe, parse_recipe
from ao.models import lora
from ao.pack import pack
from ao.train import train
from ao.training import step
from ao.transfer import Streams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (5, 130, 1, 64, 37)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Records of the embedded target, packed, on "cuda"."""
    root = tmp_path_factory.mktemp("cuda")
    lines = [
        f'{{"id": "{number}", "context": "The {word} is red.", "question": "What is it?", "answer": "{word}"}}'
        for number, word in enumerate(("drum", "key", "flute", "coat") * 4)
    ]
    (root / "records.jsonl").write_text("\n".join(lines))
    values = {
        "model": {"name": "demo", "precision": "bf16", "device": "cuda"},
        "data": {
            "out": str(root / "packed"),
            "read_depths": [0.25, 0.5],
            "sources": [{"name": "r", "kind": "records", "path": "records.jsonl"}],
        },
        "train": {"out": str(root / "adapter"), "steps": 3, "examples_per_step": 8, "rank": 4},
    }
    recipe = parse_recipe(values, origin="test")
    pack(recipe, root=root, out=root / "packed")
    return recipe


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attention of each document by itself, in float32, with every score held."""
    outputs, start = [], 0
    groups = query.shape[1] // key.shape[1]
    for length in LENGTHS:
        q, k, v = (states[0, :, start : start + length].float() for states in (query, key, value))
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * q.shape[-1] ** -0.5
        index = torch.arange(length, device=q.device)
        distance = index[:, None] - index[None, :]
        seen = (distance >= 0) & (distance < (length if window is None else window))
        scores = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((scores @ v.repeat_interleave(groups, 0)).transpose(0, 1))
        start += length
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("width", [64, VARLEN_HEAD, 512])
def test_attention_equals_that_of_each_document_alone(width: int, kv_heads: int, window: int | None) -> None:
    """Output and gradients, in bfloat16."""
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), width) for heads in (4, kv_heads, kv_heads)]
    query, key, value = states = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    documents = Documents.of(LENGTHS, torch.device("cuda"))
    module: nn.Module = SimpleNamespace(is_causal=True)  # type: ignore[assignment]
    ours, _ = document_attention(module, query, key, value, None, sliding_window=window, documents=documents)
    weights = torch.randn_like(ours, dtype=torch.float32)
    gradients = torch.autograd.grad((ours.float() * weights).sum(), states)
    plain = one_by_one(query, key, value, window)
    with torch.no_grad():
        read, _ = document_attention(
            module, *(each.detach() for each in states), None, sliding_window=window, documents=documents
        )
    torch.testing.assert_close(read.float(), plain, atol=2e-2, rtol=2e-2)
    expected = torch.autograd.grad((plain * weights).sum(), states)
    torch.testing.assert_close(ours.float(), plain, atol=2e-2, rtol=2e-2)
    for mine, its in zip(gradients, expected, strict=True):
        gap = (mine.float() - its.float()).norm() / its.float().norm()
        assert gap < 1e-2, gap


def test_a_cache_is_that_of_the_cpu(recipe: Recipe, tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        model = replace(recipe.model, device=device)
        collect(model, wanted.units(recipe), out=tmp_path / device)
    on_gpu, on_cpu = (ActivationCache.open(tmp_path / device) for device in ("cuda", "cpu"))
    assert on_gpu.layers == on_cpu.layers
    for layer in on_cpu.layers:
        np.testing.assert_allclose(on_gpu.layer(layer).norms, on_cpu.layer(layer).norms, rtol=3e-2)


@pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned")  # of the tiny target, in 4 bits
@pytest.mark.parametrize("precision", ["bf16", "nf4", "nf4-dequantized"])
def test_training_takes_a_device_without_a_number(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    chosen = replace(recipe, model=replace(recipe.model, precision=precision))
    record = train(chosen, data=recipe.data.out, out=tmp_path / "adapter")
    assert np.isfinite(record["losses"]).all()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_what_the_device_does_meanwhile_changes_nothing(
    recipe: Recipe, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts that are run beside steps, and steps that the host does not wait for, against one after the other."""
    # Some rows a window, of which some are left behind its steps.
    settings = replace(
        recipe.train, steps=12, window=2, dropout=0.3, optimizer=optimizer, rank=16, context_tokens_per_row=16
    )
    chosen = replace(recipe, train=settings)
    meanwhile = train(chosen, data=recipe.data.out, out=tmp_path / "meanwhile")
    collect(recipe.model, wanted.units(recipe)[::2], out=tmp_path / "acts")
    cached = replace(chosen, train=replace(settings, cache=str(tmp_path / "acts")))
    from_cache = train(cached, data=recipe.data.out, out=tmp_path / "cached")
    monkeypatch.setattr(step, "Streams", lambda _: Streams(None))
    monkeypatch.setattr(step.Learner, "runs_ahead", False)
    in_turn = train(chosen, data=recipe.data.out, out=tmp_path / "in_turn")
    np.testing.assert_allclose(meanwhile["losses"], in_turn["losses"], rtol=2e-3)
    np.testing.assert_allclose(from_cache["losses"], in_turn["losses"], rtol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recompute", ["on", "off", "auto"])
def test_a_split_model_is_the_same_model(recipe: Recipe, tmp_path: Path, recompute: str) -> None:
    """What is read, and what is learnt of it, in fp32."""
    losses = {}
    for device in ("cuda", "split"):
        model = replace(recipe.model, precision="fp32", device=device)
        settings = replace(recipe.train, dropout=0.0, recompute=recompute)
        record = train(replace(recipe, model=model, train=settings), data=recipe.data.out, out=tmp_path / device)
        losses[device] = record["losses"]
        collect(model, wanted.units(recipe), out=tmp_path / f"{device}-acts")
    np.testing.assert_allclose(losses["split"], losses["cuda"], rtol=1e-4)
    whole, split = (ActivationCache.open(tmp_path / f"{device}-acts") for device in ("cuda", "split"))
    for layer in whole.layers:
        np.testing.assert_allclose(split.layer(layer).norms, whole.layer(layer).norms, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_split_model_recomputes_with_the_same_draws(recipe: Recipe, tmp_path: Path) -> None:
    """Dropout on the second GPU, too."""
    losses = {}
    for recompute in ("on", "off"):
        model = replace(recipe.model, precision="fp32", device="split")
        chosen = replace(recipe, model=model, train=replace(recipe.train, dropout=0.4, recompute=recompute))
        losses[recompute] = train(chosen, data=recipe.data.out, out=tmp_path / recompute)["losses"]
    np.testing.assert_allclose(losses["on"], losses["off"], rtol=1e-4)


def test_the_flash_kernel_is_called_as_it_is() -> None:
    """In another form rows would go the slow way, with the same numbers."""
    assert _flash() is not None


def test_products_are_added_to_gradients_in_fp32() -> None:
    left, right, into = torch.randn(300, 64), torch.randn(64, 40), torch.randn(300, 40)
    left, right, into = left.bfloat16().cuda(), right.bfloat16().cuda(), into.cuda()
    expected = into.double() + 0.5 * left.double() @ right.double()
    lora._add_product(into, left, right, 0.5)
    torch.testing.assert_close(into.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cuda", "split"])
def test_matrices_that_are_cast_ahead_teach_the_same(
    recipe: Recipe, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "split" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    losses = {}
    settings = replace(recipe.train, dropout=0.0, learning_rate=3e-3, steps=6)
    chosen = replace(recipe, model=replace(recipe.model, device=device), train=settings)
    for way in ("ahead", "at every call"):
        if way == "at every call":
            monkeypatch.setattr(step, "cast_ahead", lambda *_, **__: [])
        losses[way] = train(chosen, data=recipe.data.out, out=tmp_path / way)["losses"]
    assert losses["ahead"][-1] < losses["ahead"][0]
    np.testing.assert_allclose(losses["ahead"], losses["at every call"], rtol=2e-2)
