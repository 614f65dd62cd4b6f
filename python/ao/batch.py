"""Batches: token sequences laid out for one forward pass.

Where attention is the one mixer, sequences are joined into one packed row [1, T]; elsewhere they are right-padded rows
[B, T]. Every index of a batch points into the flattened [B * T], so both layouts are used alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ao import _ao
from ao.attention import Documents, packed_rows
from ao.models.arch import Arch
from ao.transfer import to_device


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences of one forward pass."""

    input_ids_BT: torch.Tensor
    """Token ids; right padding, where there is any, repeats id 0 and is seen by no real token."""
    position_ids_BT: torch.Tensor
    """Positions, from 0 in each sequence."""
    documents: Documents | None
    """Borders of a packed row; None for padded rows."""
    starts: np.ndarray
    """Where each sequence begins in the flattened [B * T]."""

    @property
    def model_inputs(self) -> dict[str, object]:
        """Keyword arguments of a forward without a key-value cache."""
        inputs = {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT, "use_cache": False}
        return inputs if self.documents is None else {**inputs, "documents": self.documents}


def layout(model: PreTrainedModel, arch: Arch) -> AbstractContextManager[None]:
    """Inside, the model takes the batches that `lay_out(packed=arch.attention_only)` makes."""
    return packed_rows(model) if arch.attention_only else nullcontext()


def lay_out(sequences: Sequence[np.ndarray], *, packed: bool, device: torch.device, multiple: int = 1) -> Batch:
    """Lay sequences out for one forward, in their order.

    Args:
        sequences: token ids, each [length], none empty.
        packed: join them into one row; else right-pad them to a rectangle.
        device: where the tensors go.
        multiple: a packed row is filled up to a multiple of so many tokens with documents that nobody reads, so that
            compiled code meets few lengths.
    """
    lengths = [len(sequence) for sequence in sequences]
    if min(lengths, default=0) == 0:
        raise ValueError(f"a batch needs sequences with tokens, got lengths {lengths[:8]}")
    if packed:
        num, missing = len(lengths), -sum(lengths) % multiple
        if missing:
            # No longer than the others, which may be laid side by side in a rectangle.
            filling = [min(max(lengths), missing - at) for at in range(0, missing, max(lengths))]
            sequences = [*sequences, *(np.zeros(length, dtype=np.int64) for length in filling)]
            lengths = [*lengths, *filling]
        ids = np.concatenate(sequences)[None]
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        starts = np.cumsum([0, *lengths[:-1]])[:num]
        documents = Documents.of(lengths, device)
    else:
        longest = max(lengths)
        ids = np.zeros((len(sequences), longest), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        positions = np.tile(np.arange(longest), (len(sequences), 1))
        starts = np.arange(len(sequences)) * longest
        documents = None
    return Batch(
        input_ids_BT=to_device(np.ascontiguousarray(ids, dtype=np.int64), device),
        position_ids_BT=to_device(np.ascontiguousarray(positions, dtype=np.int64), device),
        documents=documents,
        starts=starts,
    )


def rows_of(lengths: Sequence[int] | np.ndarray, *, tokens_per_row: int, packed: bool = False) -> list[np.ndarray]:
    """Split sequences into rows of a token budget.

    Args:
        lengths: tokens of each sequence; one longer than the budget gets a row of its own.
        tokens_per_row: budget.
        packed: a row costs the sum of its lengths; else it is padded, and costs its sequences times the longest.

    Returns:
        Index arrays that together hold every sequence once.
    """
    order, offsets = _ao.pack_rows(
        np.asarray(lengths, dtype=np.int32), tokens_per_row, padded=not packed, longer_alone=True
    )
    return np.split(np.asarray(order), np.asarray(offsets)[1:-1]) if len(lengths) else []


def rows_by_length(lengths: Sequence[int] | np.ndarray, *, tokens_per_row: int) -> list[np.ndarray]:
    """The same of packed rows whose sequences are about equally long, from the longest on: attention that has no kernel for
    ragged rows lays them out in rectangles."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    rows: list[list[int]] = []
    left = 0
    for index in order.tolist():
        if not rows or lengths[index] > left:
            rows.append([])
            left = tokens_per_row
        rows[-1].append(index)
        left -= int(lengths[index])
    return [np.array(row) for row in rows]
