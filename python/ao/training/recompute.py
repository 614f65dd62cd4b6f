"""Whether the backward pass recomputes the blocks' activations: what they would take, against what is free.

What a token takes is measured, not assumed: one short row is run, and what autograd keeps for its backward pass is added
up. Weights are kept anyway and do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from ao.batch import lay_out, layout
from ao.config import TrainConfig
from ao.models.adapters import as_oracle
from ao.models.arch import Arch

PROBE_TOKENS = 64
"""Tokens of the row that is measured."""
SHARE = 0.9
"""Of the free memory that activations may take; the rest is for what kernels allocate while they run."""
CPU_SHARE = 0.5
"""The same in main memory, which other programs want, too."""


@dataclass(frozen=True)
class Recompute:
    """A decision and what it rests on."""

    on: bool
    """Keep only the blocks' inputs, and compute the rest again."""
    bytes_per_token: int
    """What the backward pass keeps of a token without recompute; 0 where it was not measured."""
    needed_bytes: int
    """The same of a whole row with its logits."""
    free_bytes: int
    """What there was."""

    def __str__(self) -> str:
        if not self.bytes_per_token:
            return f"{'on' if self.on else 'off'}, as the recipe says"
        return (
            f"{'on' if self.on else 'off'}: a row without it keeps {self.needed_bytes / 2**30:.2g} GiB "
            f"({self.bytes_per_token / 2**20:.2g} MiB a token), {self.free_bytes / 2**30:.3g} GiB may be taken"
        )


def choose_recompute(model: PreTrainedModel, arch: Arch, config: TrainConfig, device: torch.device) -> Recompute:
    """Decide for rows of `config.tokens_per_row`, after the weights and the adapter are there.

    Of a row, every token is counted as labelled at most `CHUNK` at a time, as the loss takes them.
    """
    if config.recompute != "auto":
        return Recompute(config.recompute == "on", 0, 0, 0)
    per_token = kept_bytes_per_token(model, arch, device)
    # The optimizer's states and the gradient are not there yet: 4 and twice 4 bytes a weight of the adapter.
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = int(_free_bytes(device)) - 12 * adapter
    needed = per_token * config.tokens_per_row
    return Recompute(needed > free, per_token, needed, free)


def kept_bytes_per_token(model: PreTrainedModel, arch: Arch, device: torch.device) -> int:
    """Bytes that autograd keeps of one token of a row for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weights |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    batch = lay_out([np.zeros(PROBE_TOKENS, np.int64)], packed=arch.attention_only, device=device)
    state = torch.random.get_rng_state()
    with layout(model, arch), as_oracle(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        arch.decoder(**batch.model_inputs)
    torch.random.set_rng_state(state)
    model.train(was_training)
    return -(-sum(kept.values()) // PROBE_TOKENS)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return CPU_SHARE * psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    # What torch's allocator holds and does not use is free to us, and a limit set on the process holds.
    limit = total * torch.cuda.get_per_process_memory_fraction(device)
    ours = torch.cuda.memory_allocated(device)
    reserved = torch.cuda.memory_reserved(device)
    return SHARE * min(free + reserved - ours, limit - ours)
