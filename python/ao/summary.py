"""A packed data set's counts as text: what `ao-pack` says at its end, and `ao inspect` of a finished set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LENGTH_EDGES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Upper bounds, exclusive, of the buckets in which shards count lengths; what is longer goes into one bucket more."""
BAR = 24
"""Characters of the longest bar."""

_OF_SOURCES = (
    *("offered", "examples", "datapoints", "input_tokens", "answer_tokens", "context_tokens_read"),
    *("unanswerable", "without_donor"),
)
_OF_SHARDS = ("contexts", "context_tokens", "placeholders", "duplicates")
_BY_NAME = ("drops", "errors", "answers")


def added_up(shards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts in shards' headers (`stats`), added up as a manifest has them."""
    counts: Counter[str] = Counter(dict.fromkeys((*_OF_SOURCES, *_OF_SHARDS), 0))
    lengths = {name: [0] * (len(LENGTH_EDGES) + 1) for name in ("input", "context")}
    sources: dict[str, dict[str, Any]] = {}
    for stats in shards:
        counts.update({name: stats[name] for name in _OF_SHARDS})
        for name, column in lengths.items():
            column[:] = [mine + more for mine, more in zip(column, stats[f"{name}_lengths"], strict=True)]
        for name, source in stats["sources"].items():
            mine = sources.setdefault(name, {**dict.fromkeys(_OF_SOURCES, 0), **{key: Counter() for key in _BY_NAME}})
            for key in _OF_SOURCES:
                mine[key] += source[key]
                counts[key] += source[key]
            for key in _BY_NAME:
                mine[key].update(source[key])
    reasons = {key: sum((source[key] for source in sources.values()), Counter()) for key in ("drops", "errors")}
    return {
        "counts": dict(counts),
        **{key: dict(found) for key, found in reasons.items()},
        "lengths": {"edges": list(LENGTH_EDGES), **lengths},
        "sources": {
            name: {**source, **{key: dict(source[key]) for key in _BY_NAME}} for name, source in sorted(sources.items())
        },
    }


def summarized(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `summary_lines` shows of a manifest: its counts, the factor that sharing saves, drops, lengths, sources."""
    counts = manifest["counts"]
    return {
        **counts,
        "sharing": counts["context_tokens_read"] / max(1, counts["context_tokens"]),
        **{name: manifest[name] for name in ("drops", "errors", "lengths", "sources")},
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """What `ao.pack` returns, as a person wants to read it."""
    lines = [_headline(summary)]
    if summary.get("part"):
        return "\n".join([*lines, *reasons(summary), "  the other parts next, then --merge"])
    rows = summary["rows"]
    lines += [
        f"  {'tokenizer':<11} {summary['engine']}",
        f"  {'rows':<11} {rows['rows']:,} of {rows['tokens_per_row']:,} tokens, {rows['fill']:.1%} full; ao plan compares budgets",
    ]
    return "\n".join([*lines, *summary_lines(summary)])


def _headline(summary: Mapping[str, Any]) -> str:
    speed = f"{summary['examples_per_second']:,.0f} examples/s" if summary["way"] == "packed" else summary["way"]
    part = f" part {summary['part']}:" if summary.get("part") else ""
    return (
        f"{summary['out']}:{part} {summary['examples']:,} examples of {summary['offered']:,}, "
        f"{summary['datapoints']:,} datapoints, {summary['shards']:,} shards; {summary['seconds']:.1f} s, {speed}"
    )


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Tokens, contexts, what was left out and why, a line for each source, and lengths as bars."""
    lines = [
        f"  {'tokens':<11} {many(summary['input_tokens'])} of prompts and answers, "
        f"{many(summary['answer_tokens'])} of them learned",
        f"  {'contexts':<11} {many(summary['contexts'])} with {many(summary['context_tokens'])} tokens; datapoints read "
        f"{many(summary['context_tokens_read'])}, so sharing saves a factor of {summary['sharing']:.2f}",
        *reasons(summary),
    ]
    width = max(map(len, ("source", *summary["sources"])))
    lines += ["", f"  {'source':<{width}} {'offered':>11} {'kept':>11} {'datapoints':>11} {'dropped':>9} {'bad':>6}"]
    for name, counts in summary["sources"].items():
        lines.append(
            f"  {name:<{width}} {counts['offered']:>11,} {counts['examples']:>11,} {counts['datapoints']:>11,} "
            f"{sum(counts['drops'].values()):>9,} {sum(counts['errors'].values()):>6,}"
            + "".join(f"   {note}" for note in _notes(counts))
        )
    return [*lines, "", *histogram(summary["lengths"])]


def reasons(summary: Mapping[str, Any]) -> list[str]:
    """What was left out or bad, by reason, what is unanswerable, what repeats another datapoint, and the first errors."""
    lines = []
    for name, key in (("dropped", "drops"), ("bad", "errors")):
        if summary[key]:
            lines.append(f"  {name:<11} " + ", ".join(f"{num:,} {why}" for why, num in sorted(summary[key].items())))
    if summary.get("unanswerable") or summary.get("without_donor"):
        line = (
            f"  {'cannot tell':<11} {summary['unanswerable']:,} datapoints read a context that does not tell the answer"
        )
        if missed := summary["without_donor"]:
            line += f"; {missed:,} more were to, but their shard has none for them"
        lines.append(line)
    if summary.get("duplicates"):
        lines.append(f"  {'duplicates':<11} {summary['duplicates']:,} datapoints repeat another of their shard")
    return [*lines, *(f"    {message}" for message in summary.get("messages", ()))]


def _notes(counts: Mapping[str, Any]) -> Iterator[str]:
    """What a source's line says behind its numbers."""
    if counts["answers"]:
        yield balance(counts["answers"])
    for name, words in (("unanswerable", "unanswerable"), ("without_donor", "without a donor")):
        # Data sets of older versions lack these counts.
        if number := counts.get(name, 0):
            yield f"{number:,} {words}"


def balance(answers: Mapping[str, int]) -> str:
    """The most frequent answers with their shares."""
    total = sum(answers.values())
    most = sorted(answers.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = ", ".join(f"{printable(answer)} {num / total:.0%}" for answer, num in most[:4])
    return shown + (f", {len(most) - 4} more" if len(most) > 4 else "")


def buckets(edges: list[int]) -> list[str]:
    """Names of the buckets of lengths that `edges` bound."""
    starts = [0, *edges]
    return [*(f"{low}-{high - 1}" for low, high in zip(starts, edges, strict=False)), f"{starts[-1]}-"]


def histogram(lengths: Mapping[str, Any]) -> list[str]:
    """Datapoints by input and by context length, as bars, of the buckets that hold any."""
    columns = (lengths["input"], lengths["context"])
    most = [max(1, *column) for column in columns]
    lines = [f"  {'tokens':>11} {'inputs':>11}  {'':<{BAR}} {'contexts':>11}"]
    for bucket, *counts in zip(buckets(lengths["edges"]), *columns, strict=True):
        if any(counts):
            bars = ["#" * round(BAR * count / top) for count, top in zip(counts, most, strict=True)]
            lines.append(f"  {bucket:>11} {counts[0]:>11,}  {bars[0]:<{BAR}} {counts[1]:>11,}  {bars[1]}".rstrip())
    return lines


def many(number: int) -> str:
    """A number in three or four digits and a unit."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{number:,}"


def printable(text: str) -> str:
    """A text on one line, without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
