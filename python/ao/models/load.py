"""Loading the frozen base, text tower only, in the precision that the recipe asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from ao.config import ModelConfig
from ao.models import arch, split
from ao.prompt import model_folder

DTYPES = {
    "nf4": torch.bfloat16,
    "nf4-dequantized": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""Computation type by precision."""
FOUR_BIT = ("nf4", "nf4-dequantized")
"""Precisions whose numbers are NF4's."""
TEXT_TOWERS = ("model.language_model.", "language_model.model.", "model.text_model.")
"""How the names of a multimodal checkpoint's language model begin."""


def resolve_device(device: str) -> torch.device:
    """The device that a recipe means; of a split model the first."""
    asked = device
    if device == split.SPLIT:
        device = "cuda:0"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device: {asked!r} was asked for, but torch {torch.__version__} sees no CUDA device")
    return resolved


def named(config: ModelConfig, which: str) -> tuple[str, str | None]:
    """Name and revision of the "base" or the "target".

    Raises:
        ValueError: there is no such checkpoint.
    """
    name, revision = (config.name, config.revision) if which == "base" else (config.target, config.target_revision)
    if name is None:
        raise ValueError(f"model.{which} names no checkpoint")
    return name, revision


def load_model(config: ModelConfig, *, which: str = "base") -> PreTrainedModel:
    """Load a decoder-only language model, frozen, in eval mode, without other modalities' towers.

    Args:
        config: names the checkpoint, precision and device.
        which: "base" for `config.name`, "target" for `config.target`.

    Raises:
        FileNotFoundError: there is no such model, or its folder holds no safetensors.
        ValueError: a weight is missing or left over, which transformers itself only warns about; a file is damaged; or
            the checkpoint is quantized already, otherwise than the precision says; or there are no GPUs to split it over.
    """
    name, revision = named(config, which)
    folder = model_folder(name, revision)
    local = name == "demo" or Path(name).is_dir()
    if local and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model {name!r}: {folder} holds no *.safetensors; pickled weights are not read, so save it with save_pretrained"
        )
    source = str(folder) if local else name
    device = resolve_device(config.device)
    full_config = AutoConfig.from_pretrained(source, revision=revision)
    text_config = arch.text_config(full_config)
    if text_config is not full_config:
        setattr(text_config, arch.WHOLE_LAYERS, _layers_in_whole(full_config))
        if (quantized := getattr(full_config, "quantization_config", None)) is not None:
            text_config.quantization_config = _of_text_tower(quantized)
    if config.device == split.SPLIT:
        places = split.device_map(text_config, split.visible())
    else:
        places = {"": device} if config.precision in FOUR_BIT or device.type == "cuda" else None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            config=text_config,
            key_mapping=_text_tower_mapping(source, revision) if text_config is not full_config else None,
            dtype=DTYPES[config.precision],
            device_map=places,
            quantization_config=_quantization(full_config) if config.precision in FOUR_BIT else None,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{name}: a file of weights is damaged ({error}); copy or download it again") from None
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"{name}: the checkpoint lacks or misshapes weights of {type(model).__name__}: "
            f"missing {sorted(info['missing_keys'])[:5]}, mismatched {sorted(info['mismatched_keys'])[:5]}; "
            "the model would answer from random weights"
        )
    left_over = [
        key for key in info["unexpected_keys"] if not any(tower in key for tower in (*arch.OTHER_TOWERS, "mtp"))
    ]
    if left_over:
        raise ValueError(f"{name}: weights of the language model were not used: {sorted(left_over)[:5]}")
    _require_precision(model, config.precision, name)
    if config.device == split.SPLIT:
        split.connect(model)
    if config.precision == "nf4-dequantized":
        dequantize(model)
    setattr(model, arch.STOCK, config.attention == "stock")
    return freeze(model)


@torch.no_grad()
def dequantize(model: nn.Module) -> int:
    """Hold the values of 4-bit weights in the type that they are computed in: the same numbers, no work at every pass.

    Returns how many linears were replaced; each 4-bit weight is freed as soon as it is copied.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name in names:
        packed: Any = model.get_submodule(name)
        with torch.device("meta"):
            linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state).to(packed.compute_dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if packed.bias is not None:
            linear.bias = packed.bias
        model.set_submodule(name, linear)
    return len(names)


def compile_blocks(layers: nn.ModuleList) -> None:
    """Compile each block's forward by itself, so that hooks on blocks stay outside and see what they always see.

    Rows should come in few lengths: each new one compiles again.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model a frozen base: eval mode, no gradients, no cache by default, and weights that no read changes."""
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    # Penalties, suppressed tokens and samplers of a checkpoint would fill whatever an answer's own settings leave open.
    model.generation_config = GenerationConfig()
    if getattr(arch.text_config(model.config), "attn_logit_softcapping", None):
        # Fused attention leaves the cap on the scores out, and older transformers choose it all the same.
        model.set_attn_implementation("eager")
    # The backward pass of cuDNN attention returns NaN with an explicit mask on Hopper (torch 2.11 and later).
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise the first forward without gradients repacks the 4-bit weights for good, and gradients go wrong.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - modules declare no such name
    return model


def adamw8bit(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit state; tensors under 4,096 elements keep 32 bits."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **settings)


def enable_recompute(model: PreTrainedModel) -> None:
    """Keep only the blocks' inputs for the backward pass and compute the rest again (gradient checkpointing)."""
    model.enable_input_require_grads()
    # Renamed in transformers 5.23; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def recompute_runs_hooks() -> bool:
    """Whether a block that is computed again runs its hooks again: up to transformers 5.22 checkpointing wraps the call of a
    block, later its forward."""
    return "__call__" in vars(GradientCheckpointingLayer)


def recompute_blocks(layers: nn.ModuleList, count: int) -> None:
    """Of a model with `enable_recompute`, recompute only the first `count` blocks: when their turn comes, what the later
    ones kept is free again."""
    for index, layer in enumerate(layers):
        setattr(layer, "gradient_checkpointing", index < count)  # noqa: B010 - modules declare no such name


def _quantization(config: PretrainedConfig) -> object | None:
    if getattr(config, "quantization_config", None) is not None:
        return None  # a checkpoint that is quantized already brings its own
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # Naming modules drops the library's default, the tied head, so it is named again; patterns match whole names.
        llm_int8_skip_modules=["lm_head", r".*router.*"],
    )


def _require_precision(model: PreTrainedModel, precision: str, name: str) -> None:
    """A checkpoint that is quantized already brings its own linears, whatever was asked for.

    Some of them may be left unquantized, as it chose; the rest are to be what `precision` says.
    """
    dtype, kinds = DTYPES[precision], set[str]()
    for path in arch.linears(arch.find(model)):
        linear: Any = model.get_submodule(path)
        if (state := getattr(linear.weight, "quant_state", None)) is not None:
            kinds.add(state.quant_type)
            linear.compute_dtype = dtype
        elif linear.weight.element_size() == 1:
            kinds.add(str(linear.weight.dtype).removeprefix("torch."))
    expected = {"nf4"} if precision in FOUR_BIT else set[str]()
    if kinds != expected:
        remedy = 'ask for "nf4" or "nf4-dequantized"' if kinds == {"nf4"} else "name a checkpoint that is not quantized"
        raise ValueError(
            f"model.precision: {precision!r} was asked for, but the linears of {name} are held in "
            f"{', '.join(sorted(kinds)) or dtype}; {remedy}"
        )


def _of_text_tower(quantized: Any) -> Any:
    """How a multimodal checkpoint is quantized, in the names of the text-only class."""
    if not isinstance(quantized, dict) or not quantized.get("llm_int8_skip_modules"):
        return quantized
    skipped = [
        re.sub(f"^({'|'.join(map(re.escape, TEXT_TOWERS))})", "model.", name)
        for name in quantized["llm_int8_skip_modules"]
    ]
    return {**quantized, "llm_int8_skip_modules": skipped}


def _layers_in_whole(config: PretrainedConfig) -> str:
    """Where the blocks lie in the model that the checkpoint's name alone loads."""
    with torch.device("meta"):
        return arch.find(AutoModelForCausalLM.from_config(config)).layers_path


def _text_tower_mapping(source: str, revision: str | None) -> dict[str, str]:
    """How a multimodal checkpoint's tensor names map to those of the text-only class."""
    names = _tensor_names(source, revision)
    for prefix in TEXT_TOWERS:
        if any(name.startswith(prefix) for name in names):
            return {f"^{re.escape(prefix)}": "model."}
    raise ValueError(
        f"{source}: a multimodal checkpoint without a known text tower; its tensors begin {sorted(names)[:3]}"
    )


def _tensor_names(source: str, revision: str | None) -> set[str]:
    index = cached_file(
        source, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    with safe_open(cached_file(source, "model.safetensors", revision=revision), framework="pt") as file:
        return set(file.keys())
