"""Models with random weights, built by name: only their speed and their memory mean anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ao.models import arch as archs
from ao.models.load import DTYPES, dequantize, freeze


@dataclass(frozen=True)
class Shape:
    """A text tower of the Gemma 4 family: local and full attention, keys that are also values in the full layers."""

    settings: dict[str, Any]
    """What its configuration says where the family's default is another."""
    precision: str
    """As in a recipe."""
    layers: tuple[int, ...]
    """What is read: 25, 50 and 75 %."""
    tokens: int
    """Context tokens of a pass of collecting."""


FAMILY = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}
SHAPES = {
    "tiny": Shape(
        {
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 4096,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "num_global_key_value_heads": 1, "global_head_dim": 64, "sliding_window": 512,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        precision="fp32", layers=(2, 4, 6), tokens=4096,
    ),
    "cpu": Shape(
        {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 65_536,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "num_global_key_value_heads": 1, "global_head_dim": 128, "sliding_window": 512,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        precision="fp32", layers=(2, 4, 6), tokens=16_384,
    ),
    "small": Shape(
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32_768,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
            "num_global_key_value_heads": 2, "global_head_dim": 256, "sliding_window": 512,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
        precision="fp32", layers=(2, 4, 6), tokens=8192,
    ),
    "gemma-4-31b": Shape(
        {
            "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 60, "vocab_size": 262_144,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256,
            "num_global_key_value_heads": 4, "global_head_dim": 512, "sliding_window": 1024,
            "max_position_embeddings": 262_144,
        },
        precision="nf4", layers=(15, 30, 45), tokens=262_144,
    ),
}  # fmt: skip


@torch.no_grad()
def built(settings: dict[str, Any], precision: str, device: torch.device) -> PreTrainedModel:
    """A frozen text tower; no more of it than one matrix is ever on the device in full precision.

    Weights are the same in every process that builds on the same kind of device.

    Args:
        settings: a shape's.
        precision: as in a recipe.
        device: where it is built.
    """
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma4_text"](**FAMILY, **settings)
    dtype = DTYPES[precision]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if precision.startswith("nf4"):
        for name in archs.linears(archs.find(model)):
            linear = model.get_submodule(name)
            model.set_submodule(name, four_bit(random_like(linear.weight, dtype, device)))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(random_like(parameter, dtype, device), requires_grad=False))
    for name, parameter in model.named_parameters():
        # The family does not scale scores, its trained gains do. With gains of one attention picks single tokens, and a
        # rounding to bf16 anywhere turns the gradients by forty degrees.
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(parameter.shape[0] ** -0.25)
    model.tie_weights()
    model.to(device)  # the buffers
    if precision == "nf4-dequantized":
        dequantize(model)
    return freeze(model)


def random_like(parameter: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A matrix that keeps variances as they are; gains of one."""
    if parameter.ndim == 1:
        return torch.ones(parameter.shape, dtype=dtype, device=device)
    return torch.randn(parameter.shape, dtype=dtype, device=device).mul_(parameter.shape[-1] ** -0.5)


def four_bit(weight: torch.Tensor) -> nn.Module:
    """A linear as a recipe's NF4 makes it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    quantized = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear)
    linear.weight = quantized.to(weight.device)
    return linear
