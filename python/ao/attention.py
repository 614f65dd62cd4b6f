"""Attention that knows the documents of a packed row, without a dense mask.

A packed row [1, T] holds several documents one after the other. Registered with transformers as `ao_documents`, the
function below receives the row's `Documents` as a forward keyword in every layer, lays the documents side by side,
and runs causal attention inside each. Nothing crosses a border, because no other document is in reach.

Shapes: T tokens of the row, N documents, S longest document, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from ao.transfer import to_device

IMPLEMENTATION = "ao_documents"
"""Name under which transformers finds the function."""
VARLEN_HEAD = 256
"""Widest head that flash attention takes; wider ones are padded to rectangles."""
SCORES_BYTES = 2**28
"""fp32 scores of short documents that are there at once; the softmax holds them twice."""
SPREAD = 2
"""How many times as long the longest document of a rectangle may be as its shortest: so much padding at most."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a packed row lie."""

    longest: int
    """Tokens of the longest."""
    rectangles: tuple[tuple[int, int], ...]
    """Documents of like lengths are laid side by side: how many there are, and tokens of the longest of them."""
    slots_T: torch.Tensor
    """For each token of the row its place in the rectangles, one behind the other."""
    bounds: torch.Tensor
    """Where each document begins, and the end of the last, int32 [N + 1]."""
    _elsewhere: dict[torch.device, Documents] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Documents:
        """Documents of these lengths, one after the other."""
        begins = np.zeros(len(lengths), dtype=np.int64)
        rectangles: list[tuple[int, int]] = []
        slots = 0
        for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
            # A long document among short ones must not make all of them as long.
            if not rectangles or SPREAD * lengths[index] < rectangles[-1][1]:
                rectangles.append((0, lengths[index]))
            num, longest = rectangles[-1]
            rectangles[-1] = (num + 1, longest)
            begins[index] = slots
            slots += longest
        places = np.concatenate([begin + np.arange(length) for begin, length in zip(begins, lengths, strict=True)])
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        return cls(
            longest=max(lengths),
            rectangles=tuple(rectangles),
            slots_T=to_device(places, device),
            bounds=to_device(bounds, device),
        )

    def to(self, device: torch.device) -> Documents:
        """The same on a device; moved there once, as every block of another GPU asks."""
        if self.bounds.device == device:
            return self
        if device not in self._elsewhere:
            moved = replace(self, slots_T=self.slots_T.to(device), bounds=self.bounds.to(device))
            self._elsewhere[device] = moved
        return self._elsewhere[device]


def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        module: the attention module; its `is_causal` must not be False.
        query: [1, H, T, E]; `key` and `value` [1, G, T, E].
        attention_mask: must be None; documents replace it.
        scaling: factor on the scores; 1/sqrt(E) without one.
        dropout: must be 0, as frozen bases have it.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.
        softcap: cap on the scores, as Gemma 2 has it.
        documents: the row's borders.
        kwargs: what else the model passes on; attention sinks are refused.

    Returns:
        [1, T, H, E], and None for the weights.

    Raises:
        RuntimeError: called without documents, with a mask, or for attention that it does not implement.
    """
    if documents is None or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError(
            f"{IMPLEMENTATION}: expected one packed row with its documents and no mask, got a batch of {query.shape[0]}, "
            f"documents={documents is not None}, mask={attention_mask is not None}; use it inside `packed_rows`"
        )
    if dropout or kwargs.get("s_aux") is not None or getattr(module, "is_causal", True) is False:
        raise RuntimeError(
            f"{IMPLEMENTATION}: attention dropout, sinks and bidirectional attention are not implemented; set "
            '`attention = "stock"` under [model] for the model\'s own attention'
        )
    if query.shape[2] != documents.slots_T.shape[0] or key.shape[2] != query.shape[2]:
        raise RuntimeError(
            f"{IMPLEMENTATION}: the documents hold {documents.slots_T.shape[0]} tokens, the row {query.shape[2]} queries "
            f"and {key.shape[2]} keys; a key-value cache must be off"
        )
    if softcap is None and _fits_varlen(query):
        return _varlen(query, key, value, documents, scaling, sliding_window), None
    unpacked = zip(_unpack(query, documents), _unpack(key, documents), _unpack(value, documents), strict=True)
    outputs = [_rectangle(q, k, v, scaling, sliding_window, softcap) for q, k, v in unpacked]
    # [N, H, S, E] of each to [N * S, H, E].
    output = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
    return output.index_select(0, documents.slots_T).unsqueeze(0), None


def _rectangle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of documents side by side: [N, H, S, E] of queries, [N, G, S, E] of keys and values."""
    if softcap is not None:
        return _capped_attention(query, key, value, scaling, window, softcap)
    if query.is_cuda and _is_short(query, window) and not _needs_gradient(query, key, value):
        # No more documents at once than whose scores take some memory.
        several = max(1, SCORES_BYTES // (4 * query.shape[1] * query.shape[2] ** 2))
        pieces = zip(query.split(several), key.split(several), value.split(several), strict=True)
        return torch.cat([_short_attention(q, k, v, scaling) for q, k, v in pieces])
    if query.is_cuda and query.shape[-1] > VARLEN_HEAD and key.shape[1] != query.shape[1]:
        # With grouped heads of this width SDPA falls back to the kernel that holds every score.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if window is not None and query.shape[2] > window:
        return _banded_attention(query, key, value, scaling, window)
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )


@contextmanager
def packed_rows(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's forward takes packed rows with `documents=`; outside its own attention is back."""
    before = model.config._attn_implementation or "sdpa"
    if before == IMPLEMENTATION:
        yield
        return
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@cache
def _flash() -> Any:
    """torch's flash kernel for ragged batches as it is; None where a version has it with other arguments.

    `torch.nn.attention.varlen` calls the same, from a custom operator: several times what the kernel takes for a short row.
    """
    kernel = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if kernel is None:
        return None
    names = [argument.name for argument in kernel.default._schema.arguments]
    expected = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    if " ".join(names[:10]) != expected or not {"scale", "window_size_left", "window_size_right"} <= set(names):
        return None
    return kernel.default


def _fits_varlen(query: torch.Tensor) -> bool:
    """Whether torch's flash kernel for ragged batches takes this: on CUDA, in half precision, heads of at most 256."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and is_half and query.shape[-1] <= VARLEN_HEAD and _flash() is not None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same without padding: [1, T, H, E]; the kernel takes grouped heads as they are."""
    query, key, value = (_tokens_first(states).contiguous() for states in (query, key, value))
    bounds, longest = documents.bounds, documents.longest
    # Causal is a band that ends at the token itself.
    band = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    output, *_ = _flash()(query, key, value, bounds, bounds, longest, longest, 0.0, False, False, scale=scaling, **band)
    return output.unsqueeze(0)


def _tokens_first(states: torch.Tensor) -> torch.Tensor:
    """[1, H, T, E] of a row as [T, H, E]; an index instead of `squeeze` would fill a whole gradient with zeros first."""
    return states.squeeze(0).transpose(0, 1)


def _unpack(states: torch.Tensor, documents: Documents) -> list[torch.Tensor]:
    """[1, H, T, E] of a row to [N, H, S, E] of each rectangle; right padding is zero and no real token sees it."""
    flat = _tokens_first(states)
    sizes = [num * longest for num, longest in documents.rectangles]
    # index_copy's backward is a plain gather; gathering with repeated indices would scatter-add instead.
    padded = flat.new_zeros(sum(sizes), *flat.shape[1:]).index_copy(0, documents.slots_T, flat)
    pieces = zip(padded.split(sizes), documents.rectangles, strict=True)
    return [piece.unflatten(0, rectangle).transpose(1, 2) for piece, rectangle in pieces]


def _banded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int
) -> torch.Tensor:
    """Queries in blocks of a window, each with the keys of its own block and of the one before: memory and time are linear
    in the length, where a mask over the whole document would be quadratic."""
    num, length = query.shape[0], query.shape[2]
    blocks = -(-length // window)
    query, key, value = (
        nn.functional.pad(states, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window))
        for states in (query, key, value)
    )
    # [N, H, B, W, E] to [N * B, H, W, E], and keys and values to [N * B, H, 2 W, E].
    side_by_side = (
        torch.cat([nn.functional.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1], states], dim=3) for states in (key, value)
    )
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, *side_by_side))
    index = torch.arange(window, device=query.device)
    distance = window + index[:, None] - torch.arange(2 * window, device=query.device)[None, :]
    seen = ((distance >= 0) & (distance < window)).expand(blocks, 1, -1, -1).clone()
    seen[0, ..., :window] = False  # nothing stands before the first block
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen.repeat(num, 1, 1, 1),
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.unflatten(0, (num, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _is_short(query: torch.Tensor, window: int | None) -> bool:
    """Whether there is no ragged kernel for these heads, and the scores are fewer than the values of the queries."""
    length, width = query.shape[2:]
    inside = window is None or length <= window
    return width > VARLEN_HEAD and length <= width and inside and query.dtype != torch.float32


def _needs_gradient(*states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in states)


def _short_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Two products and a softmax: the kernels that hold no scores are slow for wide heads, and want keys and values of
    grouped heads repeated. Scores are kept in fp32, as those kernels do; without a gradient."""
    (num, heads, length, width), grouped = query.shape, key.shape[1]
    # All heads of a group are one long block of queries.
    rows = query.reshape(num * grouped, heads // grouped * length, width)
    key, value = (states.reshape(num * grouped, length, width) for states in (key, value))
    if query.is_cuda:
        scores = torch.bmm(rows, key.transpose(1, 2), out_dtype=torch.float32)
    else:
        scores = torch.bmm(rows.float(), key.transpose(1, 2).float())
    scores = scores.view(-1, length, length).mul_(width**-0.5 if scaling is None else scaling)
    scores.masked_fill_(~_band(length, None, query.device), float("-inf"))
    weights = scores.softmax(dim=-1).to(value.dtype).view(num * grouped, -1, length)
    return torch.bmm(weights, value).view(num, heads, length, width)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[S, S]: True where a query sees a key: not later, and fewer than `window` tokens back."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_band(query.shape[2], window, query.device), float("-inf"))
    return scores.float().softmax(dim=-1).to(value.dtype) @ value


AttentionInterface.register(IMPLEMENTATION, document_attention)
