"""`ao-pack`: sources to a packed data set.

Here "pack" means tokenize, align and lay out in shards; rows of several sequences are made later, by the planner.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ao import _ao
from ao import sources as readers
from ao._ao import Framer, PackWriter, Source
from ao._ao import merge as merge_parts
from ao.build_folder import (
    WHOLE,
    is_whole,
    leave,
    partial_of,
    put_in_place,
    require_free,
    require_parts_of,
    shards_of,
)
from ao.config import DataConfig, ModelConfig, Recipe, SourceConfig, TrainConfig, source_counts, to_dict
from ao.manifest import canonical_json
from ao.prompt import framer, identity, resolve_layer
from ao.shards import PackedDataset
from ao.summary import summarized

log = logging.getLogger(__name__)


def pack(
    recipe: Recipe,
    *,
    root: Path,
    out: Path | None = None,
    part: tuple[int, int] = WHOLE,
    resume: bool = False,
    restart: bool = False,
    max_errors: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Build the packed data set of a recipe's `[data]` for its `[model]`, or one part of it.

    The build goes on in `OUT.partial`, which becomes `out` when it is whole. What stops it leaves the shards that are
    finished there, for `resume`; a build stopped before its first shard leaves nothing.

    Args:
        recipe: The recipe.
        root: Folder that relative source paths are taken from.
        out: Folder of the data set; `data.out` if left out. One that an equal recipe built is built anew.
        part: (i, n): build every n-th shard from the i-th on; `merge` joins the parts.
        resume: Go on with the shards of an unfinished build, and do nothing where `out` is whole already: its manifest is
            that of this build, and every shard is there with its size. One that is damaged, or was built by a version
            with other `RULES`, is built anew.
        restart: Remove an unfinished build first, and leave none.
        max_errors: How many bad rows are passed over and counted before the build stops.
        progress: Show a progress bar on stderr.

    Returns:
        The summary: counts, how full rows will be, drops and errors by reason, histograms, the same by source;
        `ao.summary.summary_text` writes it out.

    Raises:
        FileExistsError: `out` holds something else; nothing is touched.
        FileNotFoundError: a source or the model is missing.
        OSError: the disk is full or fails; a ConnectionError: the Hub cannot be reached.
        ValueError: a source cannot be read, is malformed or changes meanwhile, an example is malformed, an unfinished
            build is in the way, or nothing is left to pack.
    """
    started = time.perf_counter()
    out = Path(recipe.data.out) if out is None else out
    if max_errors < 0:
        raise ValueError(f"max_errors must not be negative, got {max_errors}; 0 stops at the first bad row")
    if not recipe.data.sources:
        raise ValueError("data.sources is empty; expected at least one [[data.sources]] in the recipe")
    found = _sources(recipe.data, root)
    stamps = _stamps(found, root)
    partial, surveyed = partial_of(out), None
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_settings, recipe.model, recipe.data)
        if not out.exists() and not partial.exists():
            # Nothing that stands there can end the build, so the rows are surveyed while the tokenizer loads.
            # What is wrong with the model ends the survey.
            check = lambda: loading.result() if loading.done() else None  # noqa: E731
            surveyed = _surveyed(found, recipe.data.seed, root, progress=progress, check=check)
        settings, oracle_framer = loading.result()
    settings = build_settings(**settings, inputs=_inputs(found, root))
    manifest = require_free(out, settings)
    if resume and manifest is not None and is_whole(out, manifest, settings):
        return _summary(manifest, out, oracle_framer, way="was there", seconds=time.perf_counter() - started)
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    is_new, writer = not partial.exists(), None
    before, lock = shards_of(partial, part), partial / f".lock-{part[0]}-of-{part[1]}"
    is_begun = lock.exists()
    try:
        writer = PackWriter(
            str(partial), oracle_framer, canonical_json(settings), part=part, resume=resume, max_errors=max_errors
        )
        native, total = surveyed or _surveyed(found, recipe.data.seed, root, progress=progress)
        packing = time.perf_counter()
        with _bar("pack", " examples", total, show=progress) as bar:
            for source, rows in _all_rows(found, native, recipe.data.seed, root):
                bar(writer.add(source, canonical_json(rows.table), rows.batch, rows.first_row)["offered"])
        if not writer.progress["offered"]:
            raise ValueError(f"no examples: the sources are empty ({', '.join(each.config.name for each in found)})")
        _require_unchanged(stamps)
        manifest = json.loads(writer.finish())
        done = writer.progress
    except BaseException as error:
        is_worth_it = writer is not None and writer.progress["datapoints"] + writer.progress["skipped"] > 0
        # No other frame knows the writer, so this ends its threads and frees its lock.
        writer = None
        if isinstance(error, _ChangedError):
            for shard in shards_of(partial, part) - before:
                shard.unlink()
        if not is_begun and shards_of(partial, part) == before:
            lock.unlink(missing_ok=True)  # or `ao inspect` would count this part among those that were begun
        leave(partial, keep=not restart and is_worth_it, clear=part == WHOLE and (is_new or restart))
        raise
    now = time.perf_counter()
    seconds = {"seconds": now - started, "packing_seconds": now - packing}
    if part[1] > 1:
        return _part_summary(partial, part, done, oracle_framer, **seconds)
    put_in_place(partial, out)
    return _summary(manifest, out, oracle_framer, way="packed", done=done, **seconds)


def merge(recipe: Recipe, *, out: Path | None = None) -> dict[str, Any]:
    """Prove that the parts in `OUT.partial` make one whole build, and make it `out`.

    Returns:
        The summary, as `pack` gives it.

    Raises:
        FileExistsError: `out` holds something else; nothing is touched.
        FileNotFoundError: there are no parts, or the model is missing.
        ValueError: a part or shard is missing, was changed, or belongs to another build or another recipe.
    """
    started = time.perf_counter()
    out = Path(recipe.data.out) if out is None else out
    partial = partial_of(out)
    if not partial.is_dir():
        raise FileNotFoundError(f"{partial} does not exist; build its parts first with --part i/n")
    settings, oracle_framer = _settings(recipe.model, recipe.data)
    require_free(out, settings)
    require_parts_of(settings, partial)
    manifest = json.loads(merge_parts(str(partial)))
    put_in_place(partial, out)
    return _summary(manifest, out, oracle_framer, way="merged", seconds=time.perf_counter() - started)


# Settings


@dataclass(frozen=True)
class _Found:
    """A source with its tables."""

    config: SourceConfig
    tables: list[readers.Table]
    count: int | None


def _sources(data: DataConfig, root: Path) -> list[_Found]:
    found = []
    for config, count in zip(data.sources, source_counts(data.sources, data.examples), strict=True):
        config = replace(config, count=count, share=None)
        with _reading(config):
            found.append(_Found(config, readers.tables(config, root=root, seed=data.seed), count))
    return found


def _settings(model: ModelConfig, data: DataConfig) -> tuple[dict[str, Any], Framer]:
    """The recipe as a manifest records it, `config`, `oracle` and `targets`, which takes none of the sources' files."""
    oracle_framer = framer(model.name, model.revision)
    oracle = identity(model.name, model.revision, framer=oracle_framer)
    target = oracle
    if model.target is not None:
        target = identity(model.target, model.target_revision, framer=framer(model.target, model.target_revision))
        for name in oracle_framer.fingerprint:
            if target[name] != oracle[name]:
                raise ValueError(
                    f"target {model.target!r} has another {name} than {model.name!r} ({target[name]}, {oracle[name]}); "
                    "contexts are packed with the oracle's, so both must be of one family"
                )
    return {"config": _recorded(data), "oracle": oracle, "targets": {"base": target}}, oracle_framer


def _inputs(found: list[_Found], root: Path) -> list[dict[str, Any]]:
    inputs = []
    for source in found:
        with _reading(source.config):
            inputs += readers.inputs(source.config, source.tables, root=root)
    return inputs


@contextmanager
def _reading(config: SourceConfig) -> Iterator[None]:
    """A file that the system does not let us read is the caller's to mend, like one that is missing."""
    try:
        yield
    except (FileNotFoundError, ConnectionError):
        raise
    except OSError as error:
        raise ValueError(f"source {config.name!r} cannot be read: {error}") from None


def build_settings(
    config: Mapping[str, Any], *, oracle: Mapping[str, Any], targets: Mapping[str, Any], inputs: Sequence[Any]
) -> dict[str, Any]:
    """What a build is decided by, beside the framer: settings of `PackWriter`, from what a manifest holds."""
    num_layers = int(targets["base"]["num_layers"])
    names = ("seed", "layers_per_example", "examples_per_shard", "max_input_tokens", "max_context_tokens")
    return {
        **{name: config[name] for name in names},
        "num_layers": num_layers,
        "read_layers": list(dict.fromkeys(resolve_layer(depth, num_layers) for depth in config["read_depths"])),
        "oracle": oracle,
        "targets": targets,
        "config": config,
        "inputs": inputs,
    }


def _recorded(data: DataConfig) -> dict[str, Any]:
    """The configuration as the manifest holds it: the same on every machine, so without folders."""
    config = to_dict(data)
    del config["out"]
    for source in config["sources"]:
        if "path" in source:
            source["path"] = PurePath(source["path"]).name
    return config


def _native(source: _Found, seed: int, root: Path) -> Source:
    """The source as Rust takes it."""
    config = source.config
    values = to_dict(config)
    kind = {
        "records": (),
        "context_prediction": (
            *("text", "single_share", "window", "predict", "direction"),
            *("max_context_tokens", "draws_per_text", "within"),
        ),
        "classification": ("text", "label", "questions", "prefix", "questions_per_text"),
        "latentqa": ("questions_per_stimulus",),
    }[config.kind]
    settings = {name: values[name] for name in ("name", "kind", "layers_per_example", *kind) if name in values}
    settings["seed"] = seed
    if source.count is not None and not readers.gives_count(config):
        settings["count"] = source.count
    if config.kind != "context_prediction":
        settings["reads"] = _reads(config)
        if config.unanswerable is not None:
            settings["unanswerable"] = to_dict(config.unanswerable)
    if config.kind == "classification":
        settings["labels"] = {
            value: [phrasings] if isinstance(phrasings, str) else list(phrasings)
            for value, phrasings in config.labels.items()
        }
        words = readers.words(source.tables)
        asks = any("{label}" in question for question in config.questions)
        if not asks and not any("templates" in table.described for table in source.tables):
            words = []  # no label is ever asked for, so none has to be found
        if words is not None:
            settings["words"] = words
    if config.kind == "latentqa":
        settings["questions"] = readers.questions(root / str(config.path))
    return Source(canonical_json(settings))


def _reads(config: Any) -> list[dict[str, Any]]:
    total = sum(read.share for read in config.reads)
    reads = []
    for read in config.reads:
        rule = {"all": True} if read.all else {"window": read.window, "before_end": read.before_end}
        reads.append({"share": read.share / total, **rule})
    return reads


# Building


def _surveyed(
    found: list[_Found], seed: int, root: Path, *, progress: bool, check: Callable[[], object] = lambda: None
) -> tuple[list[Source], int | None]:
    """The sources, ready to be packed, and how many examples they will give, or about how many, where that is known.

    `check` is called now and then, and may raise.
    """
    native = [_native(source, seed, root) for source in found]
    totals: list[int | None] = []
    with _bar("survey", " rows", None, show=progress and any(each.needs_survey for each in native)) as bar:
        surveyed = 0
        for source, each in zip(found, native, strict=True):
            if each.needs_survey:
                for rows in readers.rows(source.config, root=root, seed=seed, found=source.tables):
                    each.survey(canonical_json(rows.table), rows.batch, rows.first_row)
                    surveyed += rows.batch.num_rows
                    check()
                    bar(surveyed)
            total = each.settle()
            if total is not None and source.count is not None and total < source.count:
                log.warning(
                    "source %r has %d examples, fewer than its count of %d", source.config.name, total, source.count
                )
            # Where the rows that are read just give the count, nothing is counted first.
            total = source.count if total is None else total
            if total is None and progress:
                total = readers.expected_examples(source.config, source.tables)
            totals.append(total)
    known = [total for total in totals if total is not None]
    return native, sum(known) if len(known) == len(totals) else None


def _all_rows(
    found: list[_Found], native: list[Source], seed: int, root: Path
) -> Iterator[tuple[Source, readers.Rows]]:
    for source, each in zip(found, native, strict=True):
        for rows in readers.rows(source.config, root=root, seed=seed, found=source.tables):
            yield each, rows


@contextmanager
def _bar(name: str, unit: str, total: int | None, *, show: bool) -> Iterator[Callable[[int], object]]:
    """A function that moves a progress bar, with rate and time left, to a number; on stderr, or nowhere."""
    if not show:
        yield lambda number: None
        return
    from tqdm import tqdm

    with tqdm(desc=name, total=total, unit=unit, unit_scale=True, dynamic_ncols=True) as bar:
        yield lambda number: bar.update(number - bar.n)
        if total is not None:
            bar.total = bar.n  # It may have been estimated.


class _ChangedError(ValueError):
    """A file is no longer what it was when its digest was taken."""


def _stamps(found: list[_Found], root: Path) -> dict[Path, tuple[int, int, int]]:
    """What tells that a file was changed or replaced, of each file that is read."""
    files = [file for source in found for file in readers.files_of(source.config, source.tables, root=root)]
    return {file: _stamp(file) for file in files}


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _require_unchanged(stamps: Mapping[Path, tuple[int, int, int]]) -> None:
    for file, stamp in stamps.items():
        if not file.exists() or _stamp(file) != stamp:
            raise _ChangedError(
                f"{file} was changed while it was packed, so what was built of it now is removed; pack again once "
                "nothing writes to it"
            )


# Summary


def _summary(
    manifest: Mapping[str, Any],
    out: Path,
    oracle_framer: Framer,
    *,
    way: str,
    seconds: float,
    packing_seconds: float | None = None,
    done: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "out": str(out),
        "way": way,
        "shards": len(manifest["shards"]),
        **summarized(manifest),
        "rows": _filled(PackedDataset.open(out)),
        "messages": list(done["messages"]) if done is not None else [],
        "engine": oracle_framer.engine,
        **_speed(done, seconds, packing_seconds),
    }


def _filled(data: PackedDataset) -> dict[str, Any]:
    """How full rows of the budget that training has by default will be: rows, and the share of them that tokens fill."""
    budget = TrainConfig.tokens_per_row
    num_rows = len(_ao.pack_rows(data.lengths, budget, longer_alone=True)[1]) - 1
    fill = int(data.lengths.sum()) / (num_rows * budget)
    return {"tokens_per_row": budget, "rows": num_rows, "fill": round(fill, 6)}


def _part_summary(
    partial: Path, part: tuple[int, int], done: Mapping[str, Any], oracle_framer: Framer, **seconds: float
) -> dict[str, Any]:
    names = ("offered", "examples", "datapoints", "input_tokens", "unanswerable", "without_donor", "drops", "errors")
    return {
        "out": str(partial),
        "way": "packed",
        "part": f"{part[0]}/{part[1]}",
        "shards": len(shards_of(partial, part)),
        **{name: done[name] for name in (*names, "messages")},
        "engine": oracle_framer.engine,
        **_speed(done, **seconds),
    }


def _speed(done: Mapping[str, Any] | None, seconds: float, packing_seconds: float | None = None) -> dict[str, Any]:
    built = 0 if done is None else done["offered"] - done["skipped"]
    rate = built / packing_seconds if packing_seconds else 0.0
    skipped = 0 if done is None else done["skipped"]
    return {"skipped": skipped, "seconds": round(seconds, 3), "examples_per_second": round(rate, 1)}
