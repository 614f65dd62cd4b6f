"""What the oracle is asked about, and what it says: activations of a context, and answers with their controls.

Shapes: T tokens, L layers, K vectors, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Activations:
    """Residuals of one context, at some layers, of some or all of its tokens.

    Indexing selects tokens: `acts[-10:]`, `acts[3]`, `acts[[0, 5]]`.
    """

    values: torch.Tensor
    """Raw residuals [T, L, D]."""
    layers: tuple[int, ...]
    """Layer of each column: layer k is the output of block k."""
    positions: np.ndarray
    """Index of each token in the context, [T]."""
    context_ids: np.ndarray
    """The whole context."""
    context_text: str
    """The whole context as text, turn marks included."""
    spans: np.ndarray
    """Code points of `context_text` that each token covers, [T, 2]; tokens that share a character all cover it."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Activations:
        chosen = np.atleast_1d(np.arange(len(self))[which]).copy()
        if len(chosen) == 0:
            raise IndexError(f"no token left: {which} of {len(self)} tokens")
        return replace(
            self,
            values=self.values[torch.from_numpy(chosen)],
            positions=self.positions[chosen],
            spans=self.spans[chosen],
        )

    def at(self, layer: int) -> torch.Tensor:
        """Residuals [T, D] of one layer."""
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not read; read: {', '.join(map(str, self.layers))}")
        return self.values[:, self.layers.index(layer)]

    @property
    def tokens(self) -> tuple[str, ...]:
        """Text of each token."""
        return tuple(self.context_text[start:stop] for start, stop in self.spans)

    @property
    def text(self) -> str:
        """The tokens as text; a character that neighbours share stands there once."""
        pieces, (last, end) = [], (0, 0)
        for start, stop in self.spans.tolist():
            pieces.append(self.context_text[end if last <= start < end else start : stop])
            last, end = start, stop
        return "".join(pieces)


@dataclass(frozen=True)
class Answer:
    """What the oracle said."""

    text: str
    """The answer; among choices the most probable one."""
    layer: int | tuple[int, ...]
    """Layer it was read from; several where one prompt showed them."""
    confidence: float | None = None
    """Probability of the choice among the choices, or share of samples that agree; None for one greedy answer."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Probability of each choice, where there were choices."""
    control: Answer | None = None
    """The same question without these activations."""

    def __str__(self) -> str:
        return self.text


def together(activations: Activations, layers: Sequence[int]) -> torch.Tensor:
    """Vectors of all tokens, layer after layer, as a prompt of these layers shows them: [len(layers) * T, D]."""
    return torch.cat([activations.at(layer) for layer in layers])


def spread(vectors_KD: torch.Tensor, num: int) -> torch.Tensor:
    """`num` vectors evenly spaced over those given, repeated where there are fewer."""
    where = np.linspace(0, len(vectors_KD) - 1, num).round().astype(np.int64)
    return vectors_KD[torch.from_numpy(where).to(vectors_KD.device)]
