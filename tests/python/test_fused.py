"""Fused operations give the library's numbers, and what computes something else is left alone."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ao.models.fused import fuse, fuse_norms, fuse_rotary
from conftest import FAMILIES, sequences, small_model


def logits_and_gradient(model, ids):
    """Of an input that needs gradients, as a block's does behind the first adapter."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    torch.manual_seed(0)
    return logits.detach(), torch.autograd.grad((logits * torch.randn_like(logits)).sum(), embedded)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_embeddings_give_the_same_numbers(family, rng):
    """In double precision, so that the last digit does not hide anything."""
    model, ids = small_model(family, dtype=torch.float64), torch.from_numpy(sequences(rng, [9])[0])[None]
    before = logits_and_gradient(model, ids)
    # Cohere turns pairs of neighbours, and qwen3_next's is linear attention in half of its blocks.
    assert fuse_rotary(model) == {"cohere": 0, "qwen3_next": 2}.get(family, 4)
    for mine, its in zip(logits_and_gradient(model, ids), before, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)
    assert fuse_rotary(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_embeddings_in_half_precision(dtype, rng):
    """As near to fp32 as the library's."""
    ids = torch.from_numpy(sequences(rng, [9])[0])[None]
    whole = logits_and_gradient(small_model("llama"), ids)
    half = small_model("llama", dtype=dtype)
    before = logits_and_gradient(half, ids)
    assert fuse_rotary(half) == 4
    for mine, its, exact in zip(logits_and_gradient(half, ids), before, whole, strict=True):
        assert not torch.equal(mine, its)
        assert (mine - exact).norm() < 1.5 * (its - exact).norm()


def test_another_arithmetic_is_left_alone(rng):
    """GLM turns pairs of neighbours, and half of a head's width."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["glm"](**{**FAMILIES["llama"], "partial_rotary_factor": 0.5})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert fuse_rotary(model) == 0


def test_part_of_a_head_is_left_to_the_library(rng):
    """Phi-3's function turns a part where the angles are narrower than the head."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["phi3"](**{**FAMILIES["llama"], "partial_rotary_factor": 0.5})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.from_numpy(sequences(rng, [9])[0])[None]
    before = logits_and_gradient(model, ids)
    fuse_rotary(model)
    assert all(torch.equal(mine, its) for mine, its in zip(logits_and_gradient(model, ids), before, strict=True))


def test_norms_give_the_same_numbers(gemma, rng):
    ids = torch.from_numpy(sequences(rng, [9])[0])[None]
    before = gemma(input_ids=ids, use_cache=False).logits
    assert fuse_norms(gemma) > 20
    torch.testing.assert_close(gemma(input_ids=ids, use_cache=False).logits, before, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_norms_alone_are_fused(gemma):
    norms, rotary = fuse(gemma)
    assert norms > 20
    assert rotary == 0
