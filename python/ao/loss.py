"""The answer loss: only labelled positions reach the head.

Shapes: B rows, T tokens, D d_model, A answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ao.batch import Batch
from ao.models.arch import Arch, capped_, logits, uncapped
from ao.transfer import to_device

CHUNK_BYTES = {"cuda": 2**27, "cpu": 3 * 2**22}
"""fp32 logits that are there at once, by kind of device; the loss holds them several times. A GPU wants products of some
size, a CPU what its cache holds."""


def chunk_of(arch: Arch, device: torch.device) -> int:
    """Labelled positions that go through the head at once."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * arch.vocab))


@dataclass(frozen=True, eq=False)
class Labels:
    """What the loss asks for."""

    positions_A: torch.Tensor
    """Places in the flattened [B * T] whose next token is an answer token."""
    ids_A: torch.Tensor
    """Those answer tokens."""
    weights_A: torch.Tensor | None = None
    """Weight of each in the sum, fp32; 1 without them."""


def labels_of(
    batch: Batch, sequences: Sequence[np.ndarray], answer_starts: Sequence[int], *, per_example: bool = False
) -> Labels:
    """Labels of a batch: every token from `answer_start` on, predicted from the token before it.

    Args:
        batch: the sequences, laid out.
        sequences: the same, each [length].
        answer_starts: index of each one's first answer token.
        per_example: weigh each token with 1 / its answer's length, so that a sum counts examples, not tokens.

    Raises:
        ValueError: a sequence has no answer token, or no token before its answer.
    """
    for index, (sequence, start) in enumerate(zip(sequences, answer_starts, strict=True)):
        if not 1 <= start < len(sequence):
            raise ValueError(
                f"sequence {index}: answer starts at token {start} of {len(sequence)}; expected at least one token on each side"
            )
    positions = np.concatenate(
        [
            first + np.arange(start - 1, len(sequence) - 1)
            for first, sequence, start in zip(batch.starts, sequences, answer_starts, strict=True)
        ]
    )
    ids = np.concatenate([sequence[start:] for sequence, start in zip(sequences, answer_starts, strict=True)])
    device = batch.input_ids_BT.device
    weights = None
    if per_example:
        lengths = np.array([len(sequence) - start for sequence, start in zip(sequences, answer_starts, strict=True)])
        weights = to_device(np.repeat(1 / lengths, lengths).astype(np.float32), device)
    return Labels(
        positions_A=to_device(positions, device),
        ids_A=to_device(ids.astype(np.int64), device),
        weights_A=weights,
    )


def answer_loss(arch: Arch, resid_BTD: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Cross-entropy summed over the answer tokens, each times its weight; divide by the global number of them, or of
    examples.

    A sum, not a mean, because rows and ranks hold different numbers of answer tokens. The gradient is that of the
    residuals alone: the head is frozen.

    Args:
        arch: the model's parts; head and soft-cap are applied in fp32.
        resid_BTD: the decoder's last hidden state.
        labels: which positions count.
    """
    resid_AD = resid_BTD.reshape(-1, resid_BTD.shape[-1]).index_select(0, labels.positions_A)
    return _AnswerLoss.apply(resid_AD, arch, labels)


class _AnswerLoss(torch.autograd.Function):
    """The loss with its gradient, chunk by chunk, so that no more than one chunk's logits are there at a time, twice."""

    @staticmethod
    def forward(ctx: Any, resid_AD: torch.Tensor, arch: Arch, labels: Labels) -> torch.Tensor:
        weights_A = labels.weights_A if labels.weights_A is not None else labels.ids_A.new_ones((), dtype=torch.float32)
        weights_A = weights_A.expand(len(labels.ids_A))
        total = resid_AD.new_zeros((), dtype=torch.promote_types(resid_AD.dtype, torch.float32))
        # Chunks of one size: a short last one would run at a fraction of the others' speed.
        gradients, num = [], -(-len(labels.ids_A) // chunk_of(arch, resid_AD.device))
        chunks = (each.tensor_split(num) for each in (resid_AD.detach(), labels.ids_A, weights_A))
        for chunk_KD, ids_K, weights_K in zip(*chunks, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                chunk_KD = chunk_KD.detach().requires_grad_(ctx.needs_input_grad[0])
                uncapped_KV = uncapped(arch, chunk_KD)
            # What the gradient needs is the head's weight, so its result may be written over.
            logits_KV = capped_(arch, uncapped_KV.detach())
            log_probs_KV = logits_KV.log_softmax(dim=-1)
            total -= (log_probs_KV.gather(1, ids_K[:, None])[:, 0] * weights_K).sum()
            if ctx.needs_input_grad[0]:
                gradient_KV = log_probs_KV.exp_()
                gradient_KV.scatter_add_(1, ids_K[:, None], gradient_KV.new_full((len(ids_K), 1), -1))
                gradient_KV.mul_(weights_K[:, None])
                if arch.softcap is not None:
                    # d(c tanh(x / c)) / dx = 1 - tanh(x / c)^2
                    gradient_KV.mul_(logits_KV.div_(arch.softcap).square_().neg_().add_(1))
                gradients += torch.autograd.grad(uncapped_KV, chunk_KD, gradient_KV)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_AD,) = ctx.saved_tensors
        return gradient_AD * upstream[0].to(gradient_AD.dtype), None, None


@torch.no_grad()
def answer_log_probs(arch: Arch, resid_BTD: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Log-probability of each answer token, [A] in fp32."""
    resid_AD = resid_BTD.reshape(-1, resid_BTD.shape[-1]).index_select(0, labels.positions_A)
    pieces, chunk = [], chunk_of(arch, resid_AD.device)
    for chunk_KD, ids_K in zip(resid_AD.split(chunk), labels.ids_A.split(chunk), strict=True):
        pieces.append(-cross_entropy(logits(arch, chunk_KD), ids_K, reduction="none"))
    return torch.cat(pieces)
