"""The held-out part: datapoints that training never sees, nor any of their contexts, and their loss with a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ao.batch import rows_of
from ao.distributed import Ranks
from ao.manifest import finite
from ao.shards import Datapoint, PackedDataset, Part
from ao.training.step import Learner


def split(dataset: PackedDataset, count: int, *, seed: int) -> tuple[Part, Part]:
    """A training and a held-out part that share no context; the held-out one has `count` datapoints or a few more.

    Raises:
        ValueError: nothing would be left to train on.
    """
    groups = dataset.groups
    order = np.random.default_rng(seed).permutation(int(groups.max()) + 1) if count else np.empty(0, np.int64)
    # Contexts are taken in their drawn order until there are enough datapoints.
    sizes = np.bincount(groups)[order] if count else np.empty(0, np.int64)
    chosen = order[: int(np.searchsorted(np.cumsum(sizes), count)) + 1] if count else order
    is_held_out = np.isin(groups, chosen)
    if is_held_out.all():
        raise ValueError(
            f"train.held_out is {count}, but the data set has {len(dataset)} datapoints in {len(sizes)} contexts; "
            "nothing would be left to train on"
        )
    return Part(dataset, np.flatnonzero(~is_held_out)), Part(dataset, np.flatnonzero(is_held_out))


class HeldOut:
    """Scores of held-out datapoints, each rank scoring its own.

    Args:
        points: what this rank scores.
        donors: for each, whose activations it is shown as a control.
        vectors: activations of both by id, each [K, D].
        tokens_per_row: token budget of a row.
        packed: rows are sequences joined.
    """

    def __init__(
        self,
        points: Sequence[Datapoint],
        donors: Sequence[Datapoint],
        vectors: Mapping[str, torch.Tensor],
        *,
        tokens_per_row: int,
        packed: bool,
    ) -> None:
        self._vectors = vectors
        pairs = zip(points, donors, strict=True)
        self._shuffled = {point.id: _fitted(point, donor, vectors[donor.id]) for point, donor in pairs}
        lengths = [len(point.input_ids) for point in points]
        rows = rows_of(lengths, tokens_per_row=tokens_per_row, packed=packed)
        self._rows = [[points[index] for index in row] for row in rows]

    def score(self, learner: Learner) -> dict[str, float | None]:
        """Loss with the datapoints' own activations and with others' of the same layer, and how much the own ones tell;
        None where a number is not finite."""
        own, other = (learner.losses(self._rows, vectors) for vectors in (self._vectors, self._shuffled))
        found = {"held_out_loss": own, "held_out_loss_shuffled": other, "held_out_gain": other - own}
        return {name: finite(value) for name, value in found.items()}


def share_of(part: Part, here: Ranks) -> tuple[list[Datapoint], list[Datapoint]]:
    """What this rank scores, and a donor for each, which does not depend on the number of ranks: another datapoint that
    reads the same layers of another context; where there is none, the datapoint itself."""
    points = [part[index] for index in range(len(part))]
    by_layers: dict[tuple[int, ...], list[int]] = {}
    for index, point in enumerate(points):
        by_layers.setdefault(tuple(np.unique(point.layers).tolist()), []).append(index)
    donors = list(points)
    for alike in by_layers.values():
        for place, index in enumerate(alike):
            others = (alike[(place + step) % len(alike)] for step in range(1, len(alike)))
            own = part.groups[index]
            donors[index] = points[next((other for other in others if part.groups[other] != own), index)]
    mine = range(here.rank, len(points), here.world)
    return [points[index] for index in mine], [donors[index] for index in mine]


def _fitted(point: Datapoint, donor: Datapoint, vectors_KD: torch.Tensor) -> torch.Tensor:
    """As many vectors of the donor at each layer as the datapoint reads there, repeated where it has fewer."""
    parts = []
    for layer in dict.fromkeys(point.layers.tolist()):
        of_donor = vectors_KD[torch.from_numpy(np.flatnonzero(donor.layers == layer))]
        wanted = int((point.layers == layer).sum())
        parts.append(of_donor[torch.arange(wanted) % len(of_donor)])
    return torch.cat(parts)
