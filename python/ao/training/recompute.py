"""Whether the backward pass recomputes the blocks' activations: what they would take, against what is free.

What a token takes is measured, not assumed: one short row is run, and what autograd keeps for its backward pass is added
up. Weights are kept anyway and do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from ao.batch import lay_out, layout
from ao.config import TrainConfig
from ao.loss import chunk_of
from ao.models import split
from ao.models.adapters import as_oracle
from ao.models.arch import Arch
from ao.training.lookahead import ASIDE_TOKENS, runs_beside

PROBE_TOKENS = (64, 128)
"""Tokens of the rows that are measured; what they keep alike, as copies of weights, is not a token's."""
SHARE = 0.9
"""Of the free memory that activations may take; the rest is for what kernels allocate while they run."""
CPU_SHARE = 0.5
"""The same in main memory, which other programs want, too."""


@dataclass(frozen=True)
class Recompute:
    """How many blocks a row recomputes, and what that rests on."""

    num_blocks: int
    """Blocks of the model."""
    always: bool | None = None
    """What the recipe says; None to decide by memory."""
    bytes_per_token: int = 0
    """What the backward pass keeps of a token without recompute."""
    input_bytes_per_token: int = 0
    """What it keeps of a token for each block that is recomputed: the block's input."""
    loss_bytes: int = 0
    """What the loss takes while all of that is there."""
    free_bytes: int = 0
    """What there is for all of it."""
    at_once: bool = False
    """Whether it is all blocks or none: where they lie on several devices, recomputing the first ones spares only theirs."""

    @property
    def possible(self) -> bool:
        """Whether any row may recompute."""
        return self.always is not False

    def blocks(self, tokens: int) -> int:
        """How many blocks a row of so many tokens recomputes: as few as fit."""
        if self.always is not None:
            return self.num_blocks if self.always else 0
        of_block = self.bytes_per_token / self.num_blocks
        room = (self.free_bytes - self.loss_bytes) / tokens
        missing = self.bytes_per_token - room
        if missing <= 0:
            return 0
        if self.at_once:
            return self.num_blocks
        # While a block is computed again, it is there as a whole.
        saved = max(of_block - self.input_bytes_per_token, 1)
        return min(self.num_blocks, int((missing + of_block) // saved) + 1)

    def __str__(self) -> str:
        if self.always is not None:
            return f"{'on' if self.always else 'off'}, as the recipe says"
        most = int((self.free_bytes - self.loss_bytes) / max(1, self.bytes_per_token))
        return (
            f"auto: a token keeps {self.bytes_per_token / 2**20:.2g} MiB, and {self.free_bytes / 2**30:.3g} GiB are free, so "
            f"rows of up to {max(0, most):,} tokens recompute nothing, longer ones "
            f"{'all blocks' if self.at_once else 'the blocks that do not fit'}"
        )


def choose_recompute(model: PreTrainedModel, arch: Arch, config: TrainConfig, device: torch.device) -> Recompute:
    """Measure a token, and what is free beside weights, gradient and optimizer."""
    if config.recompute != "auto":
        return Recompute(arch.num_layers, config.recompute == "on")
    weight: torch.Tensor = arch.head.get_parameter("weight")
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Not there yet: a flat copy of the adapter's weights, one as they are multiplied, the gradient, and the optimizer's states.
    coming = adapter * (4 + 2 + 4 + (2 if config.optimizer == "adamw8bit" else 8))
    # fp32 logits and what cap, softmax and their gradients make of them
    loss = 6 * 4 * chunk_of(arch, device) * arch.vocab
    free = [_free_bytes(each) for each in split.devices_of(model)]
    if runs_beside(model, device):
        coming += _beside_bytes(arch, config)
    if len(free) > 1:
        # Adapter and loss lie on the first; blocks take as much on each as there is on the one that has least.
        room = min(free[0] - coming - loss, *(each - 2 * adapter for each in free[1:]))
        coming, loss, free = 0, 0, [len(free) * room]
    return Recompute(
        arch.num_layers,
        bytes_per_token=kept_bytes_per_token(model, arch, device),
        input_bytes_per_token=arch.d_model * weight.element_size(),
        loss_bytes=loss,
        free_bytes=int(free[0]) - coming,
        at_once=len(split.devices_of(model)) > 1,
    )


def _beside_bytes(arch: Arch, config: TrainConfig) -> int:
    """What a row of contexts takes while a step runs: three tensors as wide as the widest linear, and six residuals. Vectors, a
    dequantized weight, and a target that is wider than the base are left to what `SHARE` holds back."""
    tokens = min(ASIDE_TOKENS, config.context_tokens_per_row)
    outputs = [module.out_features for module in arch.layers.modules() if isinstance(module, nn.Linear)]
    widest = max(outputs, default=4 * arch.d_model)
    return tokens * arch.head.get_parameter("weight").element_size() * (3 * widest + 6 * arch.d_model)


def kept_bytes_per_token(model: PreTrainedModel, arch: Arch, device: torch.device) -> int:
    """Bytes that autograd keeps of one token of a row for the backward pass."""
    few, many = (_kept_bytes(model, arch, device, tokens) for tokens in PROBE_TOKENS)
    return -(-(many - few) // (PROBE_TOKENS[1] - PROBE_TOKENS[0]))


def _kept_bytes(model: PreTrainedModel, arch: Arch, device: torch.device, tokens: int) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weights |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would be held by its own graph, and the whole forward with it.
        return tensor.detach()

    was_training = model.training
    model.train()
    batch = lay_out([np.zeros(tokens, np.int64)], packed=arch.attention_only, device=device)
    devices = [each for each in split.devices_of(model) if each.type == "cuda"]
    with (
        torch.random.fork_rng(devices=devices),
        layout(model, arch),
        as_oracle(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # Held until they are counted: memory that is freed would be given out again at the same place.
        resid_BTD = arch.decoder(**batch.model_inputs).last_hidden_state
    del resid_BTD
    model.train(was_training)
    return sum(kept.values())


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return CPU_SHARE * psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    # What torch's allocator holds and does not use is free to us, and a limit set on the process holds.
    limit = total * torch.cuda.get_per_process_memory_fraction(device)
    ours = torch.cuda.memory_allocated(device)
    reserved = torch.cuda.memory_reserved(device)
    return SHARE * min(free + reserved - ours, limit - ours)
