"""Where a decoder-only model keeps its parts, found by structure and never by the model's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Entries of `config.layer_types` whose only mixer over tokens is attention."""

OTHER_TOWERS = ("vision", "visual", "audio")
"""Parts of a module's path that mark another modality's tower."""


WIDE = 256
"""A head is wide for so many times fewer rows than it has outputs."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's own configuration, also inside a multimodal one."""
    return config.get_text_config(decoder=True)


STOCK = "ao_stock_attention"
"""Set on a model that is to run padded rows through its own attention, whatever its mixers are."""
WHOLE_LAYERS = "ao_whole_layers"
"""Set on the configuration of a multimodal model's text tower: dotted path of the blocks in the whole model."""


@dataclass(frozen=True)
class Arch:
    """The parts of a loaded decoder-only model."""

    decoder: nn.Module
    """Embeddings, blocks and final norm; returns `last_hidden_state`."""
    layers: nn.ModuleList
    """The blocks; layer k is `layers[k]`, its output `hidden_states[k + 1]`."""
    layers_path: str
    """Dotted path of the blocks in the model."""
    head: nn.Module
    """Maps [*, d_model] to [*, vocab]."""
    d_model: int
    """Width of the residual stream."""
    vocab: int
    """Rows of the head."""
    logit_scale: float
    """What the head gives is multiplied by it, before any cap; 1 in most families."""
    softcap: float | None
    """Logits are capped to softcap * tanh(logits / softcap) where the configuration says so."""
    attention_only: bool
    """True where attention is the one mixer that sees other tokens: documents may then share a row and contexts a prefix."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)


def find(model: PreTrainedModel) -> Arch:
    """Find the parts of a model.

    Raises:
        ValueError: the blocks cannot be found, or their number differs from `num_hidden_layers`.
    """
    config = text_config(model.config)
    num_layers = config.num_hidden_layers
    decoder = model.get_decoder()
    candidates = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not _other_tower(name)
    ]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__}: no list of {num_layers} blocks below its decoder {type(decoder).__name__}; "
            "only decoder-only models with one list of blocks are supported"
        )
    name, layers = min(candidates, key=lambda item: item[0].count("."))
    decoder_path = next(path for path, module in model.named_modules() if module is decoder)
    path = ".".join(part for part in (decoder_path, name) if part)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it with a language-model head")
    return Arch(
        decoder=decoder,
        layers=layers,
        layers_path=path,
        head=head,
        d_model=config.hidden_size,
        vocab=head.weight.shape[0] if hasattr(head, "weight") else config.vocab_size,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        attention_only=_attention_only(config, layers) and not getattr(model, STOCK, False),
    )


def layers_in_whole(model: PreTrainedModel) -> str:
    """Dotted path of the blocks in what `AutoModelForCausalLM` makes of the model's checkpoint, which may be multimodal."""
    return getattr(model.config, WHOLE_LAYERS, None) or find(model).layers_path


def forward_writes(model: nn.Module) -> bool:
    """Whether a forward changes what another one at the same time would read: rotary embeddings whose frequencies depend on the
    length of the input are written over at every forward."""
    kinds: set[str] = set()
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        kinds.update(found.values() if isinstance(found, dict) else [found] if found else [])
    return any(kind == "longrope" or "dynamic" in kind for kind in kinds)


def linears(arch: Arch) -> list[str]:
    """Full names of the linears inside the blocks, in order: what LoRA adapts.

    Routers of mixtures of experts are left out (a linear with one output per expert is one), as are other towers
    and the head.
    """
    num_experts = {
        experts for module in arch.layers.modules() if isinstance(experts := getattr(module, "num_experts", None), int)
    }
    return [
        f"{arch.layers_path}.{name}"
        for name, module in arch.layers.named_modules()
        if isinstance(module, nn.Linear) and module.out_features not in num_experts and "router" not in name.split(".")
    ]


def linear_weights(arch: Arch, *, upto: int | None = None) -> int:
    """Number of weights of the blocks' linears, as LoRA adapts them, up to and with block `upto`; experts that are no
    linears do not count."""
    names = {name.removeprefix(f"{arch.layers_path}.") for name in linears(arch)}
    return sum(
        module.in_features * module.out_features
        for name, module in arch.layers.named_modules()
        if isinstance(module, nn.Linear) and name in names and (upto is None or int(name.partition(".")[0]) <= upto)
    )


@torch.no_grad()
def logits(arch: Arch, resid_KD: torch.Tensor) -> torch.Tensor:
    """Logits [K, vocab] of final residuals [K, d_model] in fp32, or more where the model has more, soft-capped as it does;
    without a gradient."""
    return capped_(arch, uncapped(arch, resid_KD))


def uncapped(arch: Arch, resid_KD: torch.Tensor) -> torch.Tensor:
    """What `logits` caps, with a gradient."""
    from_head = _wide_product(arch.head, resid_KD) if resid_KD.device.type == "cpu" else arch.head(resid_KD)
    logits_KV = from_head.to(torch.promote_types(from_head.dtype, torch.float32))
    return logits_KV if arch.logit_scale == 1 else logits_KV * arch.logit_scale


def _wide_product(head: nn.Module, resid_KD: torch.Tensor) -> torch.Tensor:
    """The head's product; of a few rows with a large vocabulary the other way round, which a CPU does up to twice as fast."""
    if type(head) is not nn.Linear or head.bias is not None or WIDE * len(resid_KD) > head.out_features:
        return head(resid_KD)
    return (head.weight @ resid_KD.t()).t().contiguous()


def capped_(arch: Arch, logits_KV: torch.Tensor) -> torch.Tensor:
    """Cap logits in place, where the model does: c tanh(x / c)."""
    return logits_KV if arch.softcap is None else logits_KV.div_(arch.softcap).tanh_().mul_(arch.softcap)


def _logit_scale(config: PretrainedConfig) -> float:
    """By the two names that families have for it; the self-test compares with the model's own logits."""
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        return 1 / divisor
    return getattr(config, "logit_scale", None) or 1.0


def _other_tower(name: str) -> bool:
    return any(tower in name for tower in OTHER_TOWERS)


def _attention_only(config: PretrainedConfig, layers: nn.ModuleList) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and not set(layer_types) <= ATTENTION_LAYER_TYPES:
        return False
    # Convolutions and recurrent state carry other tokens without asking the attention function.
    return not any(isinstance(module, nn.Conv1d) or hasattr(module, "A_log") for module in layers.modules())
