"""A report as people read it: report.md, report.html and a table for the terminal, all from the same dict.

Nothing here computes a score; what is shown is what report.json says.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ao.manifest import write_atomic

EXPLANATIONS = {
    "oracle": "Injection on, adapter on: the score that is claimed.",
    "no_activation": "The same prompt with injection off and the placeholders kept: what the adapter knows without looking.",
    "shuffled": "The activations of another item in place of its own: whether these very activations matter.",
    "text": "The words at the read positions as text in the question, injection off: what reading them gives.",
    "untrained": "Injection on, adapter off: what the base makes of activations without training.",
    "full_text": "The whole context as text, injection off; outside the gain, for it holds more than was read.",
}
"""What each condition shows, a sentence each."""
GAIN = (
    "Gain is the score less that of the best of the four controls. Intervals are 95 % bootstrap intervals over items; "
    "that of the gain is paired, with the best control chosen anew in each resample."
)
"""What the gain is."""

_CONTROLS = ("no_activation", "shuffled", "text", "untrained")
_HEADER = ("task", "n", "score", "interval", *_CONTROLS, "gain", "gain interval", "ECE")


def write_report(report: Mapping[str, Any], out: Path, *, images: Mapping[str, Path] | None = None) -> None:
    """Write report.json, report.md and report.html.

    Args:
        report: as `ao.eval.run.evaluate` returns it.
        out: folder, which must exist.
        images: PNG files to show, by caption; the page holds them, report.md links to them.
    """
    images = images or {}
    write_atomic(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    links = {caption: Path(os.path.relpath(path, out)).as_posix() for caption, path in images.items()}
    write_atomic(out / "report.md", markdown(report, images=links))
    write_atomic(out / "report.html", html_page(report, images={name: p.read_bytes() for name, p in images.items()}))


def console_table(report: Mapping[str, Any]) -> str:
    """The scores as aligned plain text, without a newline at the end."""
    rows = [[cell.replace("_", " ") for cell in _HEADER], *(_row(task) for task in report["tasks"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(report: Mapping[str, Any], *, images: Mapping[str, str] | None = None) -> str:
    """The report as Markdown.

    Args:
        report: as `ao.eval.run.evaluate` returns it.
        images: links to images, by caption.
    """
    header = [cell.replace("_", " ") for cell in (*_HEADER, "full_text")]
    rows = [[*_row(task), _number(task["full_text"]["score"])] for task in report["tasks"]]
    parts = ["# Evaluation", _markdown_table(header, rows), GAIN]
    parts.append("\n".join(f"- **{name.replace('_', ' ')}**: {text}" for name, text in EXPLANATIONS.items()))
    parts += [f"![{_cell(caption)}](<{link}>)" for caption, link in (images or {}).items()]
    for title, key in (("Source", "by_source"), ("Layer", "by_layer")):
        split = [
            [task["name"], name, str(part["n"]), _number(part["score"])]
            for task in report["tasks"]
            for name, part in task[key].items()
        ]
        parts.append(f"## By {title.lower()}\n\n" + _markdown_table(["task", title.lower(), "n", "score"], split))
    notes = [note for task in report["tasks"] for note in _notes(task)]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {_cell(note)}" for note in notes))
    parts.append("## Run\n\n" + "\n".join(f"- {name}: {_cell(value)}" for name, value in _run(report)))
    return "\n\n".join(parts) + "\n"


def html_page(report: Mapping[str, Any], *, images: Mapping[str, bytes] | None = None) -> str:
    """The report as one self-contained page, for light and dark.

    Args:
        report: as `ao.eval.run.evaluate` returns it.
        images: PNG bytes, by caption.
    """
    header = [cell.replace("_", " ") for cell in (*_HEADER, "full_text")]
    rows = [[*_row(task), _number(task["full_text"]["score"])] for task in report["tasks"]]
    figures = []
    for caption, png in (images or {}).items():
        data = base64.b64encode(png).decode("ascii")
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    terms = (f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(text)}</dd>" for name, text in EXPLANATIONS.items())
    facts = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _run(report))
    return _PAGE.substitute(
        cards="\n".join(_card(task) for task in report["tasks"]),
        table=_html_table(header, rows),
        gain=escape(GAIN),
        terms="".join(terms),
        figures="\n".join(figures),
        details="\n".join(_details(task) for task in report["tasks"]),
        run="".join(facts),
    )


def _row(task: Mapping[str, Any]) -> list[str]:
    return [
        task["name"],
        str(task["n"]),
        _number(task["score"]),
        _interval(task["interval"]),
        *(_number(task["controls"][name]["score"]) for name in _CONTROLS),
        _signed(task["gain"]),
        _interval(task["gain_interval"], signed=True),
        "-" if task["ece"] is None else _number(task["ece"]),
    ]


def _number(value: float) -> str:
    return f"{value:.2f}"


def _signed(value: float) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:+.2f}"


def _interval(ends: Sequence[float], *, signed: bool = False) -> str:
    show = _signed if signed else _number
    return f"[{show(ends[0])}, {show(ends[1])}]"


def chance(task: Mapping[str, Any]) -> float | None:
    """Score of a blind choice among each question's choices; None where nothing is chosen."""
    choices = task["choices_per_question"]
    if not choices:
        return None
    return sum(part["n"] / choices[question] for question, part in task["by_question"].items()) / task["n"]


def _metric(task: Mapping[str, Any]) -> str:
    if (blind := chance(task)) is None:
        return "token F1"
    return f"accuracy, chance {_number(blind)}"


def _notes(task: Mapping[str, Any]) -> Iterable[str]:
    yield f"{task['name']}: {_metric(task)}; best control: {task['best_control'].replace('_', ' ')}."
    if task["unparsed"]:
        yield f"{task['name']}: {task['unparsed']} of {task['n']} answers of the oracle hold no word."
    if task["gain_interval"][0] <= 0:
        yield f"{task['name']}: the interval of the gain reaches zero; this score shows no reading of activations."


def _run(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("seed", str(report["seed"])),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())),
        ("peak memory", f"{report['peak_rss_bytes'] / 2**30:.2f} GiB"),
        ("versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items())),
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(task: Mapping[str, Any]) -> str:
    clear = "clear" if task["gain_interval"][0] > 0 else "unclear"
    return (
        f"<section><header><h2>{escape(task['name'])}</h2><p>{escape(_metric(task))}, n = {task['n']}</p></header>"
        f'<p class="gain {clear}"><b>{_signed(task["gain"])}</b> gain '
        f"{_interval(task['gain_interval'], signed=True)}</p>{_dots(task)}</section>"
    )


def _dots(task: Mapping[str, Any]) -> str:
    """Scores with intervals as a drawing; units of its view box: 1 = a pixel at full width."""
    left, width, step = 96, 260, 22
    lines = {"oracle": task, **{name: task["controls"][name] for name in _CONTROLS}, "full_text": task["full_text"]}
    height = step * len(lines) + 22
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x = left + width * value
        parts.append(f'<line class="grid" x1="{x}" y1="4" x2="{x}" y2="{height - 20}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height - 5}" text-anchor="middle">{value:g}</text>')
    if (blind := chance(task)) is not None:
        x = left + width * blind
        parts.append(f'<line class="chance" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{height - 20}"/>')
    for index, (name, part) in enumerate(lines.items()):
        y = 4 + step * (index + 0.5)
        low, point, high = (left + width * value for value in (part["interval"][0], part["score"], part["interval"][1]))
        kind = name if name in ("oracle", "full_text") else "control"
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name.replace("_", " "))}</text>')
        parts.append(f'<line class="{kind}" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>')
        parts.append(f'<circle class="{kind}" cx="{point:.1f}" cy="{y}" r="4.5"/>')
        parts.append(f'<text class="value" x="{left + width + 12}" y="{y + 4}">{_number(part["score"])}</text>')
    return f'<svg viewBox="0 0 {left + width + 44} {height}" role="img">{"".join(parts)}</svg>'


def _details(task: Mapping[str, Any]) -> str:
    tables = []
    for key in ("by_source", "by_layer", "by_question"):
        rows = [[name, str(part["n"]), _number(part["score"])] for name, part in task[key].items()]
        tables.append(_html_table([key.replace("by_", ""), "n", "score"], rows))
    return f"<details><summary>{escape(task['name'])}</summary>{''.join(tables)}</details>"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Activation oracle: evaluation</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1d2230; --soft: #667085; --line: #e4e2dc;
  --oracle: #1f5fbf; --control: #98a1b0; --text: #c98a1b; --bad: #b3402e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161c; --card: #1c1f28; --ink: #e8eaf0; --soft: #98a1b3;
  --line: #2f3440; --oracle: #7db0ff; --control: #7a8496; --text: #e0b15a; --bad: #f0907f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1.5rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0; } h3 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem; margin: 0; }
section header p, figcaption, .note { color: var(--soft); margin: 0; font-size: .87rem; }
.gain { margin: .5rem 0 .4rem; color: var(--soft); } .gain b { font-size: 1.9rem; margin-right: .2rem; }
.gain.clear b { color: var(--oracle); } .gain.unclear b { color: var(--bad); }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; } svg text { fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 10.5px; } svg .value { font-variant-numeric: tabular-nums; }
svg line { stroke-width: 3; stroke-linecap: round; opacity: .6; }
svg line.grid { stroke: var(--line); stroke-width: 1; opacity: 1; }
svg line.chance { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
svg .oracle { stroke: var(--oracle); } svg circle.oracle { fill: var(--oracle); }
svg .control { stroke: var(--control); } svg circle.control { fill: var(--control); }
svg .full_text { stroke: var(--text); } svg circle.full_text { fill: var(--card); stroke-width: 2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; white-space: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .8rem 0; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
figure { margin: 1rem 0; } img { max-width: 100%; border-radius: 6px; display: block; margin: 0 auto .5rem; background: #fff; }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
.note { margin: .8rem 0; } details .wide { margin: .8rem 0 1.4rem; } details th:first-child { width: 75%; }
</style>
</head>
<body>
<h1>Does the oracle read activations?</h1>
<div class="cards">
$cards
</div>
<h3>Scores</h3>
$table
<p class="note">$gain</p>
<dl>$terms</dl>
$figures
<h3>By source, layer and question</h3>
$details
<h3>Run</h3>
<dl>$run</dl>
</body>
</html>
""")
"""The page; every value that goes in is escaped where it is made."""
