"""Checks of a learner before the first step: seconds that save a run whose adapter does nothing.

`ao.selftest` checks the base; here is what training adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ao.shards import Datapoint
from ao.training.step import Learner


def check_learner(learner: Learner, points: Sequence[Datapoint], vectors: Mapping[str, torch.Tensor]) -> None:
    """Check that what is about to be trained can be trained; nothing is changed.

    Args:
        learner: the learner, inside `ready`.
        points: a few datapoints.
        vectors: their activations.

    Raises:
        RuntimeError: the adapter, the injection or the labels do nothing, a row's datapoints see each other, or the
            gradient is zero or not finite; the message says which.
    """
    exact = learner.arch.head.weight.dtype == torch.float32 and learner.here.device.type == "cpu"
    weights = learner.weights.detach().clone()
    devices = [device for device in learner.devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        try:
            with torch.no_grad():
                learner.weights.add_(0.02 * torch.randn_like(learner.weights))
            moved = _loss(learner, points, vectors)
            turned = {name: -vectors_KD for name, vectors_KD in vectors.items()}
            other = _loss(learner, points, turned)
            alone = sum(_loss(learner, [point], vectors) for point in points)
            learner.gradient.zero_()
            learner.row_loss(points, vectors)
            norm = float(learner.gradient.norm())
        finally:
            with torch.no_grad():
                learner.weights.copy_(weights)
            learner.gradient.zero_()
        bare = _loss(learner, points, vectors)
    if not math.isfinite(bare):
        raise RuntimeError(
            f"self-test: the loss of the untrained oracle is {bare}; the base or its precision is broken"
        )
    if moved == bare:
        raise RuntimeError("self-test: other weights of the adapter give the same loss: the adapter does nothing")
    if other == moved:
        raise RuntimeError("self-test: opposite activations give the same loss: the injection does nothing")
    if not (math.isfinite(norm) and norm > 0):
        raise RuntimeError(f"self-test: the adapter's gradient has norm {norm}; expected finite and positive")
    error = abs(alone / moved - 1)
    if error > (1e-4 if exact else 0.02):
        raise RuntimeError(
            f"self-test: datapoints in one row have another loss than one by one (relative error {error:.2g}): they see "
            "each other"
        )


@torch.no_grad()
def _loss(learner: Learner, points: Sequence[Datapoint], vectors: Mapping[str, torch.Tensor]) -> float:
    """The loss sum of one row, dropout off."""
    learner.model.eval()
    loss, _ = learner.row_loss(points, vectors)
    learner.model.train()
    return float(loss)
