"""Pictures of answers and scores, as PNG files: a heat map over tokens and layers, and scores beside their controls.

Only matplotlib's objects are used, never pyplot: no global state, no window, the same bytes each time.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ao.manifest import write_atomic
from ao.summary import buckets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TOKENS_PER_PANEL = 36
"""Longer contexts wrap into several panels."""

_INK, _SOFT, _LINE = "#1d2230", "#667085", "#d9d7d0"
_MONO, _SANS = "DejaVu Sans Mono", "DejaVu Sans"
# Inches.
_LEFT, _CELL, _LANE, _LANE_GAP = 1.15, 0.3, 0.2, 0.08
_LINE_HEIGHT, _LABEL_CHARACTER = 0.19, 0.068
_LONGEST_LABEL = 14
_VISIBLE = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\r": "\u240d"}


def heat_map(
    path: str | Path,
    probabilities: np.ndarray,
    tokens: Sequence[str],
    layers: Sequence[int],
    *,
    title: str,
    question: str,
    answer: str,
    source: str = "",
    chance: float | None = None,
    control: np.ndarray | float | None = None,
) -> None:
    """Draw the probability of the right answer over tokens (across) and read layers (down to up, the deepest on top).

    Args:
        path: PNG file to write.
        probabilities: in 0..1, [tokens, layers].
        tokens: text of each token; white space is made visible.
        layers: index of each layer.
        title: title.
        question: what was asked.
        answer: the right answer.
        source: where the context comes from.
        chance: probability of a blind guess, marked on the colour bar.
        control: probability of the right answer without activations, one for each token or one for all; a lane of its own.

    Raises:
        ValueError: shapes differ or a value is no probability.
    """
    values_TL = np.asarray(probabilities, dtype=np.float64)
    if values_TL.shape != (len(tokens), len(layers)) or not values_TL.size:
        raise ValueError(f"heat map: expected {len(tokens)} tokens x {len(layers)} layers, got {values_TL.shape}")
    control_T = None if control is None else np.broadcast_to(np.asarray(control, dtype=np.float64), len(tokens))
    for what, values in (("probabilities", values_TL), ("control", control_T)):
        if values is not None and not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"heat map: {what}: expected values in 0..1, got {values.min()} to {values.max()}")

    num_panels = math.ceil(len(tokens) / TOKENS_PER_PANEL)
    per_panel = math.ceil(len(tokens) / num_panels)
    parts = [slice(first, first + per_panel) for first in range(0, len(tokens), per_panel)]
    labels = [visible(token) for token in tokens]
    # Sizes are in inches from here on, so that cells and labels keep theirs whatever the length of the context.
    grid_height = _CELL * len(layers) + (0.0 if control_T is None else _LANE + _LANE_GAP)
    label_heights = [_LABEL_CHARACTER * max(map(len, labels[part])) + 0.3 for part in parts]
    bar_height = max(grid_height, 1.0)
    bar_left = _LEFT + _CELL * per_panel + 0.25
    width = max(bar_left + 1.1, 6.0)
    caption = _caption(question, answer, source, width)
    top = 0.78 + _LINE_HEIGHT * len(caption)
    height = top + max(grid_height * len(parts) + sum(label_heights), bar_height + 0.3)
    figure = _figure(width, height)
    _text(figure, 0.2, height - 0.36, title, size=12.5, weight="bold")
    for line, text in enumerate(caption):
        _text(figure, 0.2, height - 0.62 - _LINE_HEIGHT * line, text, size=9, color=_SOFT)

    bottom = height - top
    for part, label_height in zip(parts, label_heights, strict=True):
        bottom -= grid_height
        _panel(figure, bottom, values_TL[part], labels[part], layers, None if control_T is None else control_T[part])
        bottom -= label_height
    _color_bar(figure, (bar_left, height - top - bar_height, 0.13, bar_height), chance)
    _save(figure, path)


def gain_chart(path: str | Path, report: Mapping[str, Any]) -> None:
    """Draw each task's score and those of its controls, with their 95 % intervals, and write the gain beside them.

    Args:
        path: PNG file to write.
        report: as `ao.eval.run.evaluate` returns it.
    """
    tasks = report["tasks"]
    rows = ("oracle", "no_activation", "shuffled", "text", "untrained")
    step = 0.24
    block = step * len(rows) + 0.55
    width, height = 8.2, block * len(tasks) + 0.75
    figure = _figure(width, height)
    _text(figure, 0.2, height - 0.32, "Oracle and controls", size=12.5, weight="bold")
    for index, task in enumerate(tasks):
        bottom = height - 0.55 - block * (index + 1) + 0.3
        axes = _axes(figure, 1.3, bottom, width - 3.3, step * len(rows))
        parts = {"oracle": task, **task["controls"]}
        for place, name in enumerate(rows):
            part, y = parts[name], len(rows) - 1 - place
            color = "#1f5fbf" if name == "oracle" else "#8b94a3"
            axes.plot(part["interval"], [y, y], color=color, linewidth=3, alpha=0.55, solid_capstyle="round")
            axes.plot([part["score"]], [y], "o", color=color, markersize=6.5)
        best = max(task["controls"].values(), key=lambda part: part["score"])["score"]
        axes.axvline(best, color=_SOFT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", ".5", "", "1"])
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in reversed(rows)])
        axes.grid(axis="x", color=_LINE, linewidth=0.6)
        middle = bottom + step * len(rows) / 2
        metric = {"accuracy": "accuracy", "token_f1": "token F1"}[task["metric"]]
        _text(figure, 0.2, bottom + step * len(rows) + 0.05, visible_line(task["name"]), size=10, weight="bold")
        _text(figure, width - 1.85, middle + 0.14, f"gain {task['gain']:+.2f}", size=11, weight="bold")
        low, high = task["gain_interval"]
        _text(figure, width - 1.85, middle - 0.08, f"[{low:+.2f}, {high:+.2f}]", size=9, color=_SOFT)
        _text(figure, width - 1.85, middle - 0.28, f"{metric}, n = {task['n']}", size=9, color=_SOFT)
    _save(figure, path)


def norm_chart(path: str | Path, norms: Mapping[int, np.ndarray], *, title: str) -> None:
    """Draw the norms of cached activations, a histogram for each layer, the deepest on top.

    Args:
        path: PNG file to write.
        norms: of the rows, by layer; those that are not finite are counted beside the others.
        title: title.
    """
    step = 0.62
    width, height = 8.2, step * len(norms) + 1.0
    figure = _figure(width, height)
    _text(figure, 0.2, height - 0.36, visible_line(title), size=12.5, weight="bold")
    _text(figure, 0.2, height - 0.58, "norms of the residual stream, rows by layer", size=9, color=_SOFT)
    finite = {layer: values[np.isfinite(values)] for layer, values in norms.items()}
    there = np.concatenate([np.empty(0), *finite.values()])
    there = there[there > 0] if (there > 0).any() else np.ones(1)
    least, most = np.quantile(there, [0.0005, 0.9995])
    edges = np.geomspace(least * 0.98, most * 1.02, 90)
    for place, (layer, values) in enumerate(sorted(finite.items())):
        bottom = 0.42 + step * place
        axes = _axes(figure, 1.15, bottom, width - 3.1, step * 0.8)
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        axes.fill_between(edges[:-1], counts, step="post", color="#1f5fbf", alpha=0.85, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, max(1, counts.max()) * 1.05)
        axes.set_yticks([])
        axes.minorticks_off()
        ticks = np.unique([float(f"{tick:.2g}") for tick in np.geomspace(least, most, 5)])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks] if place == 0 else [""] * len(ticks))
        axes.grid(axis="x", color=_LINE, linewidth=0.6)
        _text(figure, 0.2, bottom + 0.14, f"layer {layer}", size=9.5)
        bad = len(norms[layer]) - len(values)
        mean = f"mean {values.mean():.4g}" if len(values) else "none finite"
        _text(figure, width - 1.85, bottom + 0.2, f"{len(norms[layer]):,} rows, {mean}", size=8.5, color=_SOFT)
        if bad:
            _text(figure, width - 1.85, bottom + 0.03, f"{bad:,} not finite", size=8.5, color="#c0392b")
    _save(figure, path)


def data_chart(path: str | Path, summary: Mapping[str, Any], *, title: str) -> None:
    """Draw a packed data set: datapoints by input and context length, and the shares of the answers that are labels.

    Args:
        path: PNG file to write.
        summary: with `lengths` and `sources` as in a manifest.
        title: title.
    """
    lengths, names = summary["lengths"], buckets(summary["lengths"]["edges"])
    shown = [row for row, pair in enumerate(zip(lengths["input"], lengths["context"], strict=True)) if any(pair)]
    labelled = {name: source["answers"] for name, source in summary["sources"].items() if source["answers"]}
    step, wide = 0.22, 3.1
    high, low = step * len(shown), 0.34 * len(labelled) + (0.6 if labelled else 0.2)
    width, height = 8.2, high + low + 1.1
    figure = _figure(width, height)
    _text(figure, 0.2, height - 0.36, visible_line(title), size=12.5, weight="bold")
    for left, name, color in ((1.15, "input", "#1f5fbf"), (1.4 + wide, "context", "#8b94a3")):
        axes = _axes(figure, left, low + 0.1, wide, high)
        counts = [lengths[name][row] for row in shown]
        axes.barh(range(len(shown)), counts, color=color, height=0.75)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * max(1, *counts))
        axes.set_xticks([])
        axes.set_yticks(range(len(shown)), [names[row] for row in shown] if name == "input" else [""] * len(shown))
        for row, count in enumerate(counts):
            axes.text(count, row, f" {count:,}", va="center", size=8, color=_SOFT, family=_SANS)
        _text(figure, left, height - 0.72, f"{name} tokens of a datapoint", size=9, color=_SOFT)
    for row, (name, answers) in enumerate(labelled.items()):
        axes = _axes(figure, 1.15, low - 0.5 - 0.34 * row, width - 1.5, 0.22)
        most = sorted(answers.items(), key=lambda entry: (-entry[1], entry[0]))
        at, total = 0.0, sum(answers.values())
        for place, (answer, count) in enumerate(most):
            share = count / total
            axes.barh([0], [share], left=[at], color=_colors()(0.15 + 0.7 * (place % 5) / 4), edgecolor="white")
            if share > 0.08:
                label = f"{visible_line(answer)[: int(90 * share)]} {share:.0%}"
                axes.text(at + 0.01, 0, label, va="center", size=8, color=_INK, family=_SANS, parse_math=False)
            at += share
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.set_yticks([0], [visible_line(name)[:_LONGEST_LABEL]])
    _save(figure, path)


def visible(token: str) -> str:
    """A token as a label: white space as signs, what the font lacks as its code, long ones shortened."""
    shown = "".join(_VISIBLE.get(char, char if _drawable(char) else f"\\u{ord(char):x}") for char in token)
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "\u2026"


def visible_line(text: str) -> str:
    """A text on one line, what the font lacks replaced by a box."""
    return "".join(char if _drawable(char) else "\u25a1" for char in " ".join(text.split()))


@cache
def _drawable(char: str) -> bool:
    return char.isprintable() and all(ord(char) in _glyphs(family) for family in (_MONO, _SANS))


@cache
def _glyphs(family: str) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=family))).get_charmap())


def _caption(question: str, answer: str, source: str, width: float) -> list[str]:
    parts = [f"Question: {question}", f"Right answer: {answer}"] + ([f"Context: {source}"] if source else [])
    return [line for part in parts for line in textwrap.wrap(visible_line(part), int(width * 13))]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _text(
    figure: Figure, x: float, y: float, text: str, *, size: float, color: str = _INK, weight: str = "normal"
) -> None:
    """Put a line at a place in inches from the lower left."""
    width, height = figure.get_size_inches()
    # Questions are other people's text: a dollar sign in them is no formula.
    figure.text(
        x / width, y / height, visible_line(text), size=size, color=color, weight=weight, family=_SANS, parse_math=False
    )


@cache
def _colors() -> Colormap:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # Evenly perceived, light to dark; without its black end, where .8 and 1 look alike.
    return ListedColormap(colormaps["magma_r"](np.linspace(0.0, 0.88, 256)))


def _axes(figure: Figure, left: float, bottom: float, wide: float, high: float) -> Axes:
    """Axes at a place in inches from the lower left."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK, labelfontfamily=_SANS)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _panel(
    figure: Figure,
    bottom: float,
    values_TL: np.ndarray,
    labels: Sequence[str],
    layers: Sequence[int],
    control_T: np.ndarray | None,
) -> None:
    num_tokens, num_layers = values_TL.shape
    edges_T = np.arange(num_tokens + 1)
    style: dict[str, Any] = {"cmap": _colors(), "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 0.8}
    base = bottom if control_T is None else bottom + _LANE + _LANE_GAP
    lowest = axes = _axes(figure, _LEFT, base, _CELL * num_tokens, _CELL * num_layers)
    axes.pcolormesh(edges_T, np.arange(num_layers + 1), values_TL.T, **style)
    axes.set_yticks(np.arange(num_layers) + 0.5, [f"layer {layer}" for layer in layers])
    axes.set_xticks([])
    if control_T is not None:
        lowest = _axes(figure, _LEFT, bottom, _CELL * num_tokens, _LANE)
        lowest.pcolormesh(edges_T, [0, 1], control_T[None], **style)
        lowest.set_yticks([0.5], ["no activation"])
        lowest.tick_params(labelcolor=_SOFT)
    lowest.set_xticks(np.arange(num_tokens) + 0.5, labels, rotation=90)
    for label in lowest.get_xticklabels():
        label.set(family=_MONO, size=8, color=_INK, parse_math=False)


def _color_bar(figure: Figure, place: tuple[float, float, float, float], chance: float | None) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = _axes(figure, *place)
    figure.colorbar(ScalarMappable(Normalize(0, 1), _colors()), cax=axes)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK, labelfontfamily=_SANS)
    axes.spines[:].set_visible(False)
    ticks = {0.0: "0", 0.5: ".5", 1.0: "1"}
    if chance is not None:
        ticks = {value: text for value, text in ticks.items() if abs(value - chance) > 0.12}
        ticks[chance] = f"{chance:.2f} chance".removeprefix("0")
        axes.plot([0, 1], [chance, chance], color=_INK, linewidth=1.4)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_title("P(right)", fontsize=8.5, color=_SOFT, family=_SANS, loc="left", pad=9)


def _save(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    # The name of the program and its version would change the bytes from one matplotlib to the next.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
