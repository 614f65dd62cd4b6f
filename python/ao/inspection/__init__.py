"""`ao inspect`: what a path holds, a packed data set's summary and datapoints, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ao import _ao
from ao._ao import Framer
from ao.cache import ActivationCache
from ao.cache_files import PLAIN
from ao.cache_files import verify as verify_cache
from ao.inspection.found import KINDS, Found, find
from ao.inspection.rows import Style, described, row_text
from ao.inspection.verify import Verified, build_problems, verify
from ao.manifest import own_digest_problem
from ao.plan import Plan
from ao.prompt import framer, vocabulary_size
from ao.shards import PackedDataset
from ao.summary import added_up, many, printable, summarized, summary_lines

SHARDS_LISTED = 8
"""A data set of more shards tells their sizes in one line."""

_MADE_FOR = ("model", "num_layers", "weights", "tokenizer", "template", "placeholder", "date")


def inspect(
    path: Path,
    *,
    rows: Sequence[int] = (),
    ids: Sequence[str] = (),
    check: bool = False,
    model: str | None = None,
    plot: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Say what a path holds.

    Args:
        path: A packed data set, an unfinished one, a shard, a plan, activations, an adapter, or a run's folder.
        rows: Datapoints to show, by number; negative ones count from the end.
        ids: Datapoints to show, by the ids of their examples.
        check: Check checksums and contents instead.
        model: Where the tokenizer is: a folder or a Hub id; the model that the data set names without one.
        plot: PNG file to draw lengths and answers into.
        progress: Show a progress bar on stderr while checking.

    Returns:
        `kind`, `path` and `notes` (what to know, and what to do next); of a data set its manifest, or `rows` as
        `ao.inspection.rows.described` gives them, or what was `checked`, `problems` and whether it is `ok`.

    Raises:
        FileNotFoundError: there is nothing, or `model` is not there.
        IndexError: there is no such row.
        ValueError: it is nothing of ao's, has no rows to show, more than one thing is asked for, or `model` has another
            tokenizer.
    """
    found = find(Path(path))
    with _all_keys(found.path):
        return _inspected(found, rows=rows, ids=ids, check=check, model=model, plot=plot, progress=progress)


@contextmanager
def _all_keys(path: object) -> Iterator[None]:
    """Manifests and headers are read key by key; what one lacks is its damage, not ours."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{path}: its manifest or a shard's header lacks {error}; it is damaged or of another version of ao, so build "
            "the data set again"
        ) from error


def _inspected(
    found: Found,
    *,
    rows: Sequence[int],
    ids: Sequence[str],
    check: bool,
    model: str | None,
    plot: Path | None,
    progress: bool,
) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": found.kind, "path": str(found.path), "notes": found.notes}
    if sum((bool(rows or ids), check, plot is not None)) > 1:
        raise ValueError("datapoints (--row, --id), --verify and --plot are shown one at a time; give one of them")
    if found.kind == "activations" and (check or plot is not None):
        return {**result, **_activations(found, plot=plot, progress=progress)}
    if found.kind == "plain" and check:
        return {**result, "notes": [], **_plain_verified(found.path)}
    if found.kind == "plan" and check:
        return {**result, **_plan_verified(found.path)}
    if not found.is_data:
        if rows or ids or check or plot:
            checked = dict.fromkeys(("plain", "plan"), "--row, --id and --plot")
            also = {"activations": "--row and --id", **checked}.get(found.kind, "--row, --id, --verify and --plot")
            raise ValueError(f"{found.path}: {found.what}, without datapoints; {also} are for packed data sets")
        return {**result, **(_plan(found.path) if found.kind == "plan" else found.content)}
    if check:
        return {**result, **_verified(found, model, progress=progress)}
    if rows or ids:
        return {**result, **_rows(found, rows, ids, model)}
    summary = _summary(found)
    if plot is not None:
        if not summary["shards"]:
            raise ValueError(f"{found.path}: no shard is finished, so there is nothing to draw")
        from ao.plots import data_chart

        data_chart(plot, summary, title=found.path.name)
        result["plot"] = str(plot)
    return {**result, **summary}


def _activations(found: Found, *, plot: Path | None, progress: bool) -> dict[str, Any]:
    """A cache, drawn, or else checked."""
    cache = ActivationCache.open(found.path, headers=True)
    if plot is not None:
        from ao.plots import norm_chart

        norm_chart(plot, {layer: cache.layer(layer).norms for layer in cache.layers}, title=found.path.name)
        return {**found.content, "plot": str(plot)}
    with _bar(len(cache.units), show=progress, unit=" units") as step:
        problems = verify_cache(found.path, step=step)
    rows = sum(len(cache.layer(layer)) for layer in cache.layers)
    return {"ok": not problems, "problems": problems, "checked": {"units": len(cache.units), "rows": rows}}


def _plain_verified(path: Path) -> dict[str, Any]:
    """A plain file, or all of a folder, each checked against its own digest."""
    files = [path] if path.is_file() else sorted(path.glob(PLAIN))
    remedy = "remove it and run the same ao collect again"
    problems = [problem for file in files if (problem := own_digest_problem(file, remedy=remedy))]
    return {"ok": not problems, "problems": problems, "checked": {"files": len(files)}}


def _plan(path: Path) -> dict[str, Any]:
    """What a plan was made for, and its statistics."""
    plan = Plan.load(path)
    data = {"manifest_sha256": plan.data_sha256, "datapoints": plan.num_datapoints}
    return {"settings": asdict(plan.settings), "data": data, "plan": plan.statistics()}


def _plan_verified(path: Path) -> dict[str, Any]:
    """A plan, checked against its own digest and for what its arrays must be."""
    problems, checked = [], dict.fromkeys(("steps", "rows", "datapoints"), 0)
    try:
        statistics = Plan.load(path).statistics()
        checked = {name: statistics[name] for name in checked}
    except ValueError as error:
        problems = [str(error)]
    return {"ok": not problems, "problems": problems, "checked": checked}


def text(result: Mapping[str, Any], *, color: bool = False) -> str:
    """What `inspect` returns, for a terminal (`color`) or a page."""
    with _all_keys(result["path"]):
        return _text(result, Style(color=color))


def _text(result: Mapping[str, Any], style: Style) -> str:
    if "rows" in result:
        body = "\n\n\n".join(row_text(row, style) for row in result["rows"]).split("\n")
    elif "ok" in result:
        body = _verdict(result)
    elif result["kind"] in ("packed", "unfinished", "shard"):
        body = _summary_text(result, style)
    elif result["kind"] == "plan":
        body = [
            style.head(f"{result['path']}: the plan of an epoch"),
            *_table({**result["settings"], **result["plan"]}),
        ]
    else:
        body = [style.head(f"{result['path']}: {KINDS[result['kind']]}"), *_table(result.get("content", {}))]
    return "\n".join([*body, "", *result["notes"]] if result["notes"] else body)


# Summary


def _headers(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(_ao.shard_metadata(str(file))) for file in files]


def _summary(found: Found) -> dict[str, Any]:
    """The manifest, or what the shards that are there have of it, with the factor that sharing saves."""
    if found.kind == "packed":
        manifest = found.content
    elif found.shards:
        manifest = {**PackedDataset.of_shards(found.shards).manifest}
        manifest |= added_up([header["stats"] for header in _headers(found.shards)])
    else:
        return {"shards": []}
    return {name: value for name, value in manifest.items() if name != "kind"} | summarized(manifest)


def _summary_text(summary: Mapping[str, Any], style: Style) -> list[str]:
    lines = [style.head(f"{summary['path']}: {KINDS[summary['kind']]}")]
    shards = summary["shards"]
    if not shards:
        return [*lines, "  no shard is finished"]
    oracle, targets = summary["oracle"], summary["targets"]
    lines.append(f"  {'build':<11} {summary['build'][:12]}.., schema {summary['schema']}")
    lines.append(f"  {'oracle':<11} {_model(oracle)}")
    for name, target in targets.items():
        same = "the oracle's base" if target == oracle else _model(target)
        lines.append(f"  {'target':<11} {same}" + (f" ({name})" if len(targets) > 1 else ""))
    if config := summary.get("config"):
        lines.append(
            f"  {'recipe':<11} seed {config['seed']}; depths {', '.join(map(str, config['read_depths']))}, "
            f"{config['layers_per_example']} per example; {config['examples_per_shard']:,} examples a shard"
        )
    size = sum(shard["bytes"] for shard in shards)
    lines.append(
        f"  {'examples':<11} {summary['examples']:,} of {summary['offered']:,}, {summary['datapoints']:,} datapoints"
    )
    lines.append(f"  {'shards':<11} {len(shards):,} with {_size(size)}")
    if len(shards) <= SHARDS_LISTED:
        for shard in shards:
            sha256 = f"  sha256 {shard['sha256'][:12]}.." if "sha256" in shard else ""
            lines.append(
                f"    {shard['file']} {shard['datapoints']:>11,} datapoints {_size(shard['bytes']):>9}{sha256}"
            )
    return [*lines, *summary_lines(summary)]


def _size(num_bytes: int) -> str:
    number = many(num_bytes)
    return f"{number}B" if " " in number else f"{number} B"


def _model(made_for: Mapping[str, Any]) -> str:
    """Name and fingerprints, those cut that would fill the line."""
    shown = {name: str(made_for[name]) for name in _MADE_FOR[1:] if made_for.get(name)}
    short = {name: f"{value[:8]}.." if len(value) == 64 else repr(value) for name, value in shown.items()}
    short["num_layers"] = shown["num_layers"]
    return f"{made_for['model']} (" + ", ".join(f"{name} {value}" for name, value in short.items()) + ")"


def _table(values: Mapping[str, Any]) -> list[str]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {key}": each for key, each in value.items()}
        else:
            flat[name] = value
    flat = {name.replace("_", " "): value for name, value in flat.items() if value is not None}
    width = max(map(len, flat), default=0)
    return [f"  {name:<{width}}  {_number(value)}" for name, value in flat.items()]


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Datapoints


def _rows(found: Found, rows: Sequence[int], ids: Sequence[str], model: str | None) -> dict[str, Any]:
    data = found.open()
    chosen = list(rows)
    for each in ids:
        matches = data.find(each)
        if not matches:
            raise IndexError(f"{found.path}: no datapoint of an example {each!r}; ids stand in the sources' order")
        chosen += matches
    for row in chosen:
        if not -len(data) <= row < len(data):
            raise IndexError(f"{found.path}: there is no row {row}; rows are 0 to {len(data) - 1}, or -1 for the last")
    texts, why = _texts(data.manifest, model)
    notes = found.notes if found.kind != "packed" else []
    if texts is None:
        notes = [*notes, f"token ids only: {why}; --model FOLDER or OWNER/NAME says where the tokenizer is"]
    return {"notes": notes, "rows": [described(data, row, texts) for row in chosen]}


def _texts(manifest: Mapping[str, Any], model: str | None) -> tuple[Framer | None, str]:
    """The framer that the data set was packed with, or why there is none.

    Raises:
        FileNotFoundError: `model` is given and is not there.
        ValueError: `model` is given and has another tokenizer.
    """
    oracle = manifest["oracle"]
    name = oracle["model"] if model is None else model
    try:
        texts = framer(name, local=model is None)
        if (found := texts.fingerprint["tokenizer"]) != oracle["tokenizer"]:
            raise ValueError(
                f"model {name!r} has another tokenizer than the data set was packed with (expected "
                f"{oracle['tokenizer'][:8]}.., got {found[:8]}..)"
            )
    except (ValueError, OSError) as error:
        if model is not None:
            raise
        return None, str(error)
    return texts, ""


# Checks


def _verified(found: Found, model: str | None, *, progress: bool) -> dict[str, Any]:
    problems: list[str] = []
    if found.kind == "packed":
        manifest = found.content
        entries, folder = manifest["shards"], found.path
        problems += build_problems(manifest)
        listed = {entry["file"] for entry in entries}
        problems += [
            f"{file.name}: manifest.json does not list it; remove it, or build the data set again"
            for file in found.shards
            if file.name not in listed
        ]
        expected = [f"shard-{number:05d}.safetensors" for number in range(len(entries))]
        if sorted(listed) != expected:
            problems.append(
                f"manifest.json: expected {len(entries)} shards from {expected[0]} on, each once; build it again"
            )
    elif found.shards:
        folder, manifest = found.shards[0].parent, PackedDataset.of_shards(found.shards).manifest
        checksums = found.content.get("checksums", {})
        entries = [{"file": file.name, **checksums.get(file.name, {})} for file in found.shards]
        missing = sorted(set(checksums) - {entry["file"] for entry in entries})
        problems += [f"{name}: missing, though its part is finished; build that part again" for name in missing]
    else:
        return {"ok": True, "checked": {"shards": 0}, "problems": []}
    texts, why = _texts(manifest, model)
    name = manifest["oracle"]["model"] if model is None else model
    vocabulary = None if texts is None else vocabulary_size(name, local=model is None)
    total = sum(file.stat().st_size for entry in entries if (file := folder / entry["file"]).is_file())
    with _bar(total, show=progress) as step:
        done = verify(folder, entries, manifest=manifest, vocabulary=vocabulary, step=step)
    problems += done.problems
    notes = found.notes
    if texts is None:
        notes = [
            *notes,
            f"not checked: ids against the vocabulary, as the tokenizer is not at hand ({why}); see --model",
        ]
    return {"notes": notes, "ok": not problems, "checked": _checked(done, vocabulary), "problems": problems}


def _checked(done: Verified, vocabulary: int | None) -> dict[str, Any]:
    names = ("shards", "datapoints", "contexts", "tokens", "bytes")
    return {**{name: getattr(done, name) for name in names}, "vocabulary": vocabulary}


def _verdict(result: Mapping[str, Any]) -> list[str]:
    checked, problems = result["checked"], result["problems"]
    counted = ", ".join(f"{number:,} {name}" for name, number in checked.items())
    verdict = "all is well" if result["ok"] else f"{len(problems)} problem{'s' * (len(problems) != 1)}"
    return [f"{result['path']}: checked {counted}: {verdict}", *(f"  {printable(problem)}" for problem in problems)]


@contextmanager
def _bar(total: int, *, show: bool, unit: str = "B") -> Iterator[Callable[[int], object]]:
    if not show:
        yield lambda num_bytes: None
        return
    from tqdm import tqdm

    with tqdm(desc="verify", total=total, unit=unit, unit_scale=True, dynamic_ncols=True) as bar:
        yield bar.update
