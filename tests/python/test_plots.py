import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from ao.plots import TOKENS_PER_PANEL, gain_chart, heat_map, visible

TEXTS = {"title": "Where it is read", "question": "What does $x$ or \\frac{1 mean, \u4f60?", "answer": "a \U0001f469"}


def draw(path: Path, num_tokens: int, **more: Any) -> np.ndarray:
    tokens = [f" word{index}" for index in range(num_tokens - 2)] + ["\n", " $\\x$"]
    values = np.linspace(0, 1, num_tokens * 2).reshape(num_tokens, 2)
    heat_map(path, values, tokens, [1, 3], **TEXTS, **more)
    return imread(path)


def test_heat_map_wraps_and_grows(tmp_path: Path) -> None:
    short = draw(tmp_path / "short.png", TOKENS_PER_PANEL)
    wrapped = draw(tmp_path / "long.png", 3 * TOKENS_PER_PANEL - 1, chance=0.125, source="a held-out chat")
    with_control = draw(tmp_path / "control.png", TOKENS_PER_PANEL, control=0.1)
    assert wrapped.shape[1] == short.shape[1] < 2400
    assert wrapped.shape[0] > 1.8 * short.shape[0]
    assert with_control.shape[0] > short.shape[0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["control.png", "long.png", "short.png"]


def test_heat_map_shows_the_values(tmp_path: Path) -> None:
    def dark(cell: float, control: float) -> int:
        values = np.zeros((3, 2))
        values[1, 1] = cell
        heat_map(tmp_path / "x.png", values, ["a", "b", "c"], [1, 3], **TEXTS, control=control)
        return int((imread(tmp_path / "x.png")[..., :3].max(axis=-1) < 0.35).sum())

    blank, square_inch = dark(0, 0), 160**2
    assert dark(1, 0) - blank == pytest.approx(square_inch * 0.3 * 0.3, rel=0.15)
    assert dark(0, 1) - blank == pytest.approx(square_inch * 3 * 0.3 * 0.2, rel=0.15)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, 5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("values", "control", "message"),
    [
        (np.zeros((2, 3)), None, "expected 2 tokens x 1 layers, got \\(2, 3\\)"),
        (np.full((2, 1), 1.5), None, "probabilities: expected values in 0..1, got 1.5"),
        (np.full((2, 1), np.nan), None, "probabilities: expected values"),
        (np.zeros((2, 1)), -0.1, "control: expected values in 0..1"),
    ],
)
def test_bad_heat_map(tmp_path: Path, values: np.ndarray, control: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heat_map(tmp_path / "bad.png", values, ["a", "b"], [1], **TEXTS, control=control)
    assert not any(tmp_path.iterdir())


def test_labels() -> None:
    assert visible(" poet") == "\u00b7poet"
    assert visible("\n\t") == "\u21b5\u2192"
    assert visible("\u4f60") == "\\u4f60"
    assert visible("incomprehensibilities") == "incomprehensi\u2026"


def test_gain_chart(tmp_path: Path) -> None:
    part = {"score": 0.5, "interval": [0.4, 0.6]}
    controls = dict.fromkeys(("no_activation", "shuffled", "text", "untrained"), part)
    task = {**part, "name": "a$_b$", "n": 9, "metric": "accuracy", "gain": 0.0, "gain_interval": [-0.1, 0.1]}
    heights = []
    for num in (1, 3):
        gain_chart(tmp_path / "gain.png", {"tasks": [{**task, "controls": controls}] * num})
        heights.append(imread(tmp_path / "gain.png").shape[0])
    assert heights[1] > 2 * heights[0]


def test_neither_pyplot_nor_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from ao.plots import heat_map; "
        "heat_map(sys.argv[1], np.ones((1, 1)), ['a'], [0], title='', question='', answer=''); "
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.png")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"
