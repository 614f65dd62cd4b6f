import numpy as np
import pytest

from ao.eval import scorers
from ao.eval.scorers import calibration_error, estimate, score_choices, token_f1

CONTROLS = ("a", "b")


def test_choices_by_hand() -> None:
    found = score_choices([np.log([0.1, 0.3]), np.log([0.2, 0.2, 0.6]), np.array([-1e9, -1e9 - 800])], [1, 0, 0])
    assert found.predictions.tolist() == [1, 2, 0]
    assert found.correct.tolist() == [1, 0, 1]
    assert found.right == pytest.approx([0.75, 0.2, 1])
    assert found.confidence == pytest.approx([0.75, 0.6, 1])
    assert found.brier == pytest.approx((2 * 0.25**2 + (0.8**2 + 0.2**2 + 0.6**2)) / 3)
    assert found.ece == pytest.approx((0.25 + 0.6 + 0) / 3)


def test_an_impossible_choice_is_one_that_is_not_taken() -> None:
    assert score_choices([np.array([-np.inf, -3.0])], [0]).right.tolist() == [0]


@pytest.mark.parametrize("log_probs", [[np.nan, -1.0], [-np.inf, -np.inf]])
def test_no_probability_is_an_error(log_probs: list[float]) -> None:
    with pytest.raises(ValueError, match="item 1: expected log-probabilities"):
        score_choices([np.array([-1.0, -2.0]), np.array(log_probs)], [0, 0])


def test_calibration_error_by_hand() -> None:
    # Bins of a fifteenth: .95 and .96 share the last one, .55 lies in the ninth, 1/3 closes the fifth.
    confidence = np.array([0.95, 0.96, 0.55, 1 / 3])
    correct = np.array([1.0, 0.0, 1.0, 0.0])
    assert calibration_error(confidence, correct) == pytest.approx((0.91 + 0.45 + 1 / 3) / 4)
    assert calibration_error(confidence, correct, bins=1) == pytest.approx(abs(2 - confidence.sum()) / 4)
    assert calibration_error(np.full(4, 0.75), np.array([1.0, 1, 1, 0])) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The red fox", "the RED fox", 1),
        ("the red fox", "red fox.", 4 / 6),
        ("a a b", "a b b", 4 / 6),
        (" near the", " near the\n", 1),
        ("cat", "dog", 0),
        ("", "dog", 0),
        ("dog", "\n", 0),
        ("", " \n", 1),
        ("caf\u00e9 \u4f60", "CAF\u00c9", 2 / 3),
    ],
)
def test_token_f1_by_hand(prediction: str, answer: str, expected: float) -> None:
    assert token_f1(prediction, answer) == pytest.approx(expected)


def test_gain_is_against_the_best_control() -> None:
    scores = {
        "oracle": np.ones(200),
        "a": np.zeros(200),
        "b": np.repeat([0.0, 1.0], [150, 50]),
        "outside": np.ones(200),
    }
    found = estimate(scores, oracle="oracle", controls=CONTROLS, resamples=2000, seed=0)
    assert found.best_control == "b"
    assert found.gain.score == 0.75
    low, high = found.gain.interval
    # Normal approximation: .75 +- 1.96 * sqrt(.25 * .75 / 200)
    assert low == pytest.approx(0.69, abs=0.01)
    assert high == pytest.approx(0.81, abs=0.01)
    assert found.estimates["oracle"].interval == (1, 1)
    assert found.estimates["b"].score == 0.25
    assert found.estimates["outside"].score == 1


def test_bootstrap_is_paired() -> None:
    noise = np.random.default_rng(0).random(100)
    found = estimate({"oracle": noise + 0.25, "a": noise}, oracle="oracle", controls=("a",), resamples=500, seed=0)
    assert found.gain.interval == pytest.approx((0.25, 0.25))
    assert found.estimates["a"].interval[1] - found.estimates["a"].interval[0] > 0.05


def test_best_control_is_chosen_in_each_resample() -> None:
    # Each item is solved by one control or the other: one of them always has at least half.
    scores = {"oracle": np.ones(100), "a": np.tile([0.0, 1.0], 50), "b": np.tile([1.0, 0.0], 50)}
    found = estimate(scores, oracle="oracle", controls=CONTROLS, resamples=1000, seed=0)
    assert found.gain.score == 0.5
    assert found.gain.interval[1] <= 0.5


def test_intervals_follow_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).random((3, 50))
    means = scorers.resampled_means(scores, resamples=400, seed=3)
    assert means.shape == (400, 3)
    assert not np.array_equal(means, scorers.resampled_means(scores, resamples=400, seed=4))
    monkeypatch.setattr(scorers, "_RESAMPLED_AT_ONCE", 50 * 7)
    assert scorers.resampled_means(scores, resamples=400, seed=3) == pytest.approx(means)
    # Standard error of a mean over items.
    assert means.std(axis=0) == pytest.approx(scores.std(axis=1) / np.sqrt(50), rel=0.15)
