"""Scores and their intervals: pure functions of numbers and strings.

Shapes: N items, C conditions, R resamples, S choices of an item.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ECE_BINS = 15
"""Equal-width bins of the calibration error."""

_LEVEL = 0.95
_RESAMPLED_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """Forced choices of N items under one condition."""

    predictions: np.ndarray
    """Index of the most probable choice, [N]; the first of equals."""
    correct: np.ndarray
    """1.0 where that is the right one, else 0.0, [N]."""
    probabilities: list[np.ndarray]
    """Probability of each choice among the choices, N arrays [S]."""
    right: np.ndarray
    """Probability of the right choice, [N]."""
    confidence: np.ndarray
    """Probability of the most probable choice, [N]."""
    brier: float
    """Mean over items of the sum over choices of (p - [choice is right])^2: 0 at best, 2 at worst."""
    ece: float
    """`calibration_error` of the confidence."""


def score_choices(log_probs: Sequence[np.ndarray], right: Sequence[int]) -> Choices:
    """Score forced choices: the prediction is the choice of the highest log-probability.

    Args:
        log_probs: for each item the log-probability of each choice, normalized over the choices here.
        right: for each item the index of the right choice.

    Raises:
        ValueError: a log-probability is not a number, or all choices of an item are impossible.
    """
    probabilities = []
    for index, log_probs_S in enumerate(log_probs):
        if np.isnan(log_probs_S).any() or not np.isfinite(log_probs_S.max()):
            raise ValueError(f"item {index}: expected log-probabilities of its choices, got {log_probs_S.tolist()}")
        odds_S = np.exp(log_probs_S - log_probs_S.max())
        probabilities.append(odds_S / odds_S.sum())
    predictions = np.array([int(p_S.argmax()) for p_S in probabilities])
    right_N = np.asarray(right)
    correct = (predictions == right_N).astype(np.float64)
    confidence = np.array([p_S.max() for p_S in probabilities])
    distances = [
        ((p_S - np.eye(len(p_S))[answer]) ** 2).sum() for p_S, answer in zip(probabilities, right, strict=True)
    ]
    return Choices(
        predictions=predictions,
        correct=correct,
        probabilities=probabilities,
        right=np.array([p_S[answer] for p_S, answer in zip(probabilities, right, strict=True)]),
        confidence=confidence,
        brier=float(np.mean(distances)),
        ece=calibration_error(confidence, correct),
    )


def calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error: sum over bins of n_b / n * |mean correct - mean confidence|.

    Bins are of equal width, ((b - 1) / bins, b / bins], over the probability of the prediction (arXiv 1706.04599).

    Args:
        confidence: probability of the predicted choice, [N].
        correct: whether it was right, 0 or 1, [N].
        bins: number of bins.

    Returns:
        A share, 0 for a perfectly calibrated oracle.
    """
    bin_N = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_N, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks of a text; white space only separates."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def token_f1(prediction: str, answer: str) -> float:
    """Overlap of two texts as bags of `words`: 2 * precision * recall / (precision + recall).

    As in SQuAD (arXiv 1606.05250), except that articles and punctuation count, for a predicted token may be either. Where
    one of the texts has no words the score is 1 if the other has none too, else 0.
    """
    predicted, wanted = words(prediction), words(answer)
    if not predicted or not wanted:
        return float(predicted == wanted)
    overlap = (Counter(predicted) & Counter(wanted)).total()
    return 2 * overlap / (len(predicted) + len(wanted))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over items with its 95 % interval."""

    score: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Scores of all conditions on the same items, and what the activations are worth."""

    estimates: dict[str, Estimate]
    """By condition."""
    gain: Estimate
    """Score of the oracle less that of the best control."""
    best_control: str
    """The control of the highest score; the first of equals."""


def estimate(
    scores: Mapping[str, np.ndarray], *, oracle: str, controls: Sequence[str], resamples: int, seed: int
) -> Gain:
    """Means, gain and their percentile bootstrap intervals, paired over items.

    gain = mean(oracle) - max over controls of mean(control). A resample draws N of the N items with replacement and takes
    the same items in every condition; the maximum is taken anew inside each resample, so the interval holds the choice of
    the best control. Intervals reach from the 2.5th to the 97.5th percentile over resamples.

    Args:
        scores: by condition the score of each item, [N].
        oracle: the condition that is judged.
        controls: the conditions that it is judged against.
        resamples: number of resamples.
        seed: the same seed gives the same intervals.
    """
    names = list(scores)
    scores_CN = np.stack([scores[name] for name in names])
    means_C = scores_CN.mean(axis=1)
    means_RC = resampled_means(scores_CN, resamples=resamples, seed=seed)
    rows = [names.index(name) for name in controls]
    first = names.index(oracle)
    gains_R = means_RC[:, first] - means_RC[:, rows].max(axis=1)
    best = rows[int(means_C[rows].argmax())]
    return Gain(
        estimates={
            name: Estimate(score=float(means_C[row]), interval=_interval(means_RC[:, row]))
            for row, name in enumerate(names)
        },
        gain=Estimate(score=float(means_C[first] - means_C[best]), interval=_interval(gains_R)),
        best_control=names[best],
    )


def resampled_means(scores_CN: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Means [R, C] over N items drawn with replacement, the same draw for all conditions of a resample."""
    num_items = scores_CN.shape[1]
    rng = np.random.default_rng(seed)
    # How often each item is drawn is all that a mean needs, and one matrix product takes all conditions.
    chunk = max(1, _RESAMPLED_AT_ONCE // num_items)
    means = []
    for start in range(0, resamples, chunk):
        draws_RN = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=min(chunk, resamples - start))
        means.append(draws_RN @ scores_CN.T / num_items)
    return np.concatenate(means)


def _interval(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
