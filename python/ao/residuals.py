"""Reading the target's residual stream: each context once, all layers at once, no further than the deepest.

Layer k is the output of block k counted from 0, `hidden_states[k + 1]` in transformers.
Shapes: T tokens of a row, D d_model, P values wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ao.batch import Batch, lay_out, layout, rows_by_length, rows_of
from ao.injection import check_vectors
from ao.models.adapters import as_target
from ao.models.arch import Arch
from ao.transfer import to_device

ROW_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Types of kept rows by the name that safetensors gives them."""


class _DeepestLayerRead(Exception):
    """Ends a forward whose remaining blocks nobody wants."""


@dataclass(frozen=True)
class Read:
    """What is wanted of one context: one activation per entry of the two parallel arrays."""

    context_ids: np.ndarray
    """Token ids of the context, [length]."""
    layers: np.ndarray
    """Layer of each wanted activation, [K]."""
    positions: np.ndarray
    """Its token, an index into `context_ids`, [K]."""


@torch.no_grad()
def residuals(model: PreTrainedModel, arch: Arch, batch: Batch, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Residuals of a batch at the output of some blocks.

    Must run inside `as_target` where the model carries an oracle adapter; `Reading` does so.

    Args:
        model: the target.
        arch: its parts.
        batch: contexts, packed (inside `packed_rows`) or padded.
        layers: indices; the forward stops after the deepest.

    Returns:
        By layer [B * T, D], copies in the model's own precision.
    """
    for layer in layers:
        if not 0 <= layer < arch.num_layers:
            raise ValueError(f"read layer {layer}: expected 0..{arch.num_layers - 1}")
    captured: dict[int, torch.Tensor] = {}
    deepest = max(layers)

    def capture(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor | tuple) -> None:
            resid_BTD = output[0] if isinstance(output, tuple) else output
            # Cloned: some blocks go on to write into their output.
            captured[layer] = resid_BTD.detach().reshape(-1, resid_BTD.shape[-1]).clone()
            if layer == deepest:
                raise _DeepestLayerRead

        return hook

    with ExitStack() as stack:
        for layer in set(layers):
            stack.callback(arch.layers[layer].register_forward_hook(capture(layer)).remove)
        with suppress(_DeepestLayerRead):
            arch.decoder(**batch.model_inputs)
    if missing := set(layers) - set(captured):
        raise RuntimeError(
            f"layers {sorted(missing)} were never run: {arch.layers_path} is not on the model's text path"
        )
    return captured


@dataclass(frozen=True)
class Wanted:
    """Residuals wanted of some contexts; three parallel arrays [P]."""

    contexts: np.ndarray
    """Which context, an index."""
    layers: np.ndarray
    """Which layer."""
    positions: np.ndarray
    """Which token, an index into the context."""


def collected(
    model: PreTrainedModel,
    arch: Arch,
    contexts: Sequence[np.ndarray],
    wanted: Wanted,
    *,
    tokens_per_row: int,
    progress: Callable[[int], object] | None = None,
) -> Iterator[list[tuple[int, np.ndarray, torch.Tensor]]]:
    """Run each context once, in rows of a token budget, and give what is wanted of each row at once.

    Each row must run inside `as_target`, or `as_oracle` where the target is a base with an adapter. On a GPU it has only been
    launched when it is given.

    Args:
        model: the target.
        arch: its parts.
        contexts: token ids, each [length]; one of which nothing is wanted is not run.
        wanted: what is wanted of them.
        tokens_per_row: token budget of one forward.
        progress: told the context tokens of each finished row.

    Yields:
        For each layer that a row was read at: the layer, the indices [K] into `wanted` of what was read there, by context and
        position, and the residuals [K, D].
    """
    device = next(model.parameters()).device
    # Rows are given context by context, so that what is read together later lies together.
    by_context = np.lexsort((wanted.positions, wanted.contexts))
    bounds = np.searchsorted(wanted.contexts[by_context], np.arange(len(contexts) + 1))
    asked = np.flatnonzero(np.diff(bounds))
    lengths = [len(context) for context in contexts]
    start_of = np.zeros(len(contexts), dtype=np.int64)
    deepest = np.full(len(contexts), -1, dtype=np.int64)
    np.maximum.at(deepest, wanted.contexts, wanted.layers)
    for chosen in _rows(np.take(lengths, asked), deepest[asked], tokens_per_row, packed=arch.attention_only):
        row = asked[chosen].tolist()
        batch = lay_out([contexts[index] for index in row], packed=arch.attention_only, device=device)
        indices = np.concatenate([by_context[bounds[index] : bounds[index + 1]] for index in row])
        start_of[row] = batch.starts
        with layout(model, arch):
            captured = residuals(model, arch, batch, sorted(set(wanted.layers[indices].tolist())))
        found = []
        for layer in sorted(captured):
            here = indices[wanted.layers[indices] == layer]
            from_row = start_of[wanted.contexts[here]] + wanted.positions[here]
            found.append((layer, here, captured[layer][to_device(from_row, captured[layer].device)]))
        # Whoever works on the row next needs its memory.
        del captured
        yield found
        if progress is not None:
            progress(sum(lengths[index] for index in row))


def _rows(lengths: np.ndarray, deepest: np.ndarray, tokens_per_row: int, *, packed: bool) -> Iterator[np.ndarray]:
    """Rows of contexts that end at the same layer, and are about equally long: a row runs up to its deepest layer."""
    for layer in np.unique(deepest)[::-1]:
        own = np.flatnonzero(deepest == layer)
        if packed:
            rows = rows_by_length(lengths[own], tokens_per_row=tokens_per_row)
        else:
            rows = rows_of(lengths[own], tokens_per_row=tokens_per_row)
        for row in rows:
            yield own[row]


class Reading:
    """Activations for many reads, a row of contexts at a time; each distinct context is run once, and a prefix of another not
    at all.

    The oracle's adapter is off for every forward, whatever it is between them.

    Args:
        model: the target.
        arch: its parts.
        reads: what is wanted.
        tokens_per_row: token budget of one forward.
        progress: told the context tokens of each finished row.

    Raises:
        ValueError: a position lies outside its context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        reads: Sequence[Read],
        *,
        tokens_per_row: int = 8192,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        for index, read in enumerate(reads):
            if len(read.positions) and not 0 <= read.positions.min() <= read.positions.max() < len(read.context_ids):
                raise ValueError(
                    f"read {index}: positions {read.positions.min()}..{read.positions.max()} of a context of {len(read.context_ids)} tokens"
                )
        self.offsets = np.cumsum([0, *(len(read.positions) for read in reads)])
        """[len(reads) + 1], into the vectors."""
        contexts, context_of_read = distinct_contexts(
            [read.context_ids for read in reads], share_prefixes=arch.attention_only
        )
        wanted = Wanted(
            contexts=np.repeat(context_of_read, np.diff(self.offsets)),
            layers=np.concatenate([read.layers for read in reads]),
            positions=np.concatenate([read.positions for read in reads]),
        )
        self._as_target = as_target(model)
        self._rows = collected(model, arch, contexts, wanted, tokens_per_row=tokens_per_row, progress=progress)
        device = next(model.parameters()).device
        self._vectors_PD = torch.empty(int(self.offsets[-1]), arch.d_model, dtype=model.dtype, device=device)

    def row(self) -> bool:
        """Run the next row; False where none is left. A GPU may still be at it behind this."""
        with self._as_target:
            row = next(self._rows, None)
        for _, here, resid_KD in row or ():
            device = self._vectors_PD.device
            self._vectors_PD[to_device(here, device)] = resid_KD.to(device)
        return row is not None

    def vectors(self) -> torch.Tensor:
        """Run what is left, and give the vectors [P, D] in the order of the reads.

        Raises:
            ValueError: a vector is zero or not finite.
        """
        while self.row():
            pass
        check_vectors(self._vectors_PD, "activations of the target")
        return self._vectors_PD


def read_vectors(
    model: PreTrainedModel,
    arch: Arch,
    reads: Sequence[Read],
    *,
    tokens_per_row: int = 8192,
    progress: Callable[[int], object] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """The vectors [P, D] of a `Reading` at once, and its offsets [len(reads) + 1] into them."""
    reading = Reading(model, arch, reads, tokens_per_row=tokens_per_row, progress=progress)
    return reading.vectors(), reading.offsets


def distinct_contexts(contexts: Sequence[np.ndarray], *, share_prefixes: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """The contexts that have to be run, and for each given context which of them serves it.

    Under causal attention the residuals of a prefix are those of any longer context that begins with it.
    """
    keys = [np.ascontiguousarray(context, dtype=">i4").tobytes() for context in contexts]
    kept: list[bytes] = []
    serves: dict[bytes, int] = {}
    # Descending order puts a longer context right before its prefixes, with only fellow extensions in between.
    for key in sorted(set(keys), reverse=True):
        if not (kept and share_prefixes and kept[-1].startswith(key)):
            kept.append(key)
        serves[key] = len(kept) - 1
    runs = [np.frombuffer(key, dtype=">i4").astype(np.int64) for key in kept]
    return runs, np.array([serves[key] for key in keys], dtype=np.int64)
