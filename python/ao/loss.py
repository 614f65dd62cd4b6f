"""The answer loss: only labelled positions reach the head.

Shapes: B rows, T tokens, D d_model, A answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ao.batch import Batch
from ao.models.arch import Arch, logits

CHUNK = 2048
"""Labelled positions that go through the head at once: 2 GB of fp32 logits at a vocabulary of 262,144."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What the loss asks for."""

    positions_A: torch.Tensor
    """Places in the flattened [B * T] whose next token is an answer token."""
    ids_A: torch.Tensor
    """Those answer tokens."""


def labels_of(batch: Batch, sequences: Sequence[np.ndarray], answer_starts: Sequence[int]) -> Labels:
    """Labels of a batch: every token from `answer_start` on, predicted from the token before it.

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
    return Labels(
        positions_A=torch.from_numpy(positions).to(device), ids_A=torch.from_numpy(ids.astype(np.int64)).to(device)
    )


def answer_loss(arch: Arch, resid_BTD: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Cross-entropy summed over the answer tokens; divide by the global number of them.

    A sum, not a mean, because rows and ranks hold different numbers of answer tokens.

    Args:
        arch: the model's parts; head and soft-cap are applied in fp32.
        resid_BTD: the decoder's last hidden state.
        labels: which positions count.
    """
    resid_AD = resid_BTD.reshape(-1, resid_BTD.shape[-1]).index_select(0, labels.positions_A)
    total = resid_AD.new_zeros((), dtype=torch.float32)
    for chunk_KD, ids_K in zip(resid_AD.split(CHUNK), labels.ids_A.split(CHUNK), strict=True):
        total = total + cross_entropy(logits(arch, chunk_KD), ids_K, reduction="sum")
    return total


@torch.no_grad()
def answer_log_probs(arch: Arch, resid_BTD: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Log-probability of each answer token, [A] in fp32."""
    resid_AD = resid_BTD.reshape(-1, resid_BTD.shape[-1]).index_select(0, labels.positions_A)
    pieces = []
    for chunk_KD, ids_K in zip(resid_AD.split(CHUNK), labels.ids_A.split(CHUNK), strict=True):
        pieces.append(-cross_entropy(logits(arch, chunk_KD), ids_K, reduction="none"))
    return torch.cat(pieces)
