"""The self-test of a loaded model: what is right passes, and each thing that is silently wrong is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from ao.attention import IMPLEMENTATION, Documents, document_attention
from ao.models import arch as archs
from ao.models.adapters import add_adapter
from ao.selftest import check_model
from conftest import FAMILIES, SMALL, sequences, small_model

LENGTHS = [9, 4, 13]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def leak() -> Iterator[None]:
    """Packed attention that takes the whole row for one document."""

    def leaky(module: nn.Module, query: torch.Tensor, *args: object, **kwargs: object) -> object:
        documents = Documents.of([query.shape[2]], query.device)
        return document_attention(module, query, *args, **{**kwargs, "documents": documents})

    AttentionInterface.register(IMPLEMENTATION, leaky)
    yield
    AttentionInterface.register(IMPLEMENTATION, document_attention)


def granite(logits_scaling: float) -> PreTrainedModel:
    """A family that divides its logits by a number."""
    config = CONFIG_MAPPING["granite"](**SMALL, logits_scaling=logits_scaling)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_are_right_pass(family, dtype, rng):
    model = small_model(family, dtype=dtype)
    check_model(model, archs.find(model), sequences(rng, LENGTHS))


def test_an_adapter_is_off_inside(gemma, rng):
    peft = add_adapter(gemma, rank=2, alpha=64, dropout=0.5)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    gemma.train()
    check_model(gemma, archs.find(gemma), sequences(rng, LENGTHS))
    assert gemma.training


def test_one_token_is_enough(gemma, rng):
    check_model(gemma, archs.find(gemma), sequences(rng, [1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_that_see_each_other_are_found(dtype, leak, rng):
    model = small_model("gemma4_text", dtype=dtype)
    with pytest.raises(RuntimeError, match=r"context \d of a shared forward differs .*: documents see each other"):
        check_model(model, archs.find(model), sequences(rng, LENGTHS))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_layer_is_found(dtype, rng):
    model = small_model("llama", dtype=dtype)
    arch = archs.find(model)
    first, second, third, fourth = arch.layers
    swapped = replace(arch, layers=nn.ModuleList([first, third, second, fourth]))
    with pytest.raises(RuntimeError, match=r"layer 2 is not hidden_states\[3\]: the layer lookup is off"):
        check_model(model, swapped, sequences(rng, LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_does_more_is_found(dtype, rng):
    scaled = granite(8.0).to(dtype)
    check_model(scaled, archs.find(scaled), sequences(rng, LENGTHS))
    with pytest.raises(RuntimeError, match="logits of selected positions differ from the model's own"):
        check_model(scaled, replace(archs.find(scaled), logit_scale=1.0), sequences(rng, LENGTHS))
    gemma = small_model("gemma4_text", dtype=dtype)
    with pytest.raises(RuntimeError, match="logits of selected positions differ from the model's own"):
        check_model(gemma, replace(archs.find(gemma), softcap=3.0), sequences(rng, LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma4_text", "qwen3_next"])
def test_a_model_that_looks_ahead_is_found(family, dtype, rng):
    model = small_model(family, dtype=dtype)
    arch = archs.find(model)
    arch.layers[0].register_forward_hook(lambda module, args, output: output + output.mean(dim=1, keepdim=True))
    with pytest.raises(RuntimeError, match="a later token moves earlier residuals"):
        check_model(model, arch, sequences(rng, LENGTHS))


def test_what_is_not_a_number_does_not_pass(gemma, rng):
    gemma.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"self-test: .*relative error nan"):
        check_model(gemma, archs.find(gemma), sequences(rng, LENGTHS))
