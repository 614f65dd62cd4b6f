"""`ao-pack`: sources to a packed data set.

Here "pack" means tokenize, align and lay out in shards; rows of several sequences are made later, by the planner.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from ao._ao import Framer, PackWriter, Source
from ao.config import DataConfig, ModelConfig, Recipe, SourceConfig, to_dict
from ao.manifest import canonical_json, read_manifest, sync_folder, write_atomic
from ao.prompt import framer, identity, resolve_layer
from ao.sources import examples

log = logging.getLogger(__name__)

BATCH = 4096
"""Examples handed to the writer at once."""


def pack(recipe: Recipe, *, root: Path, out: Path | None = None, progress: bool = False) -> dict[str, Any]:
    """Build the packed data set of a recipe's `[data]` for its `[model]`.

    Args:
        recipe: The recipe.
        root: Folder that relative source paths are taken from.
        out: Folder of the data set; `data.out` if left out. One that an equal recipe built is built anew.
        progress: Show a progress bar on stderr.

    Returns:
        The manifest's counts, drops by reason, examples by source, seconds.

    Raises:
        FileExistsError: `out` holds something else; nothing is touched.
        FileNotFoundError: a source or the model is missing.
        ValueError: a source or an example is malformed, or nothing is left to pack. Nothing half-written stays.
    """
    started = time.perf_counter()
    out = Path(recipe.data.out) if out is None else out
    if not recipe.data.sources:
        raise ValueError("data.sources is empty; expected at least one [[data.sources]] in the recipe")
    settings, oracle_framer = _settings(recipe.model, recipe.data)
    _require_free(out, settings)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        manifest, by_source = _write(recipe.data, temporary, settings, oracle_framer, root=root, progress=progress)
        _replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    counts = manifest["counts"]
    return {
        "out": str(out),
        **{name: counts[name] for name in ("examples", "datapoints", "contexts", "context_tokens")},
        "input_tokens": counts["input_tokens"],
        "drops": manifest["drops"],
        "sources": by_source,
        "seconds": time.perf_counter() - started,
    }


def _settings(model: ModelConfig, data: DataConfig) -> tuple[dict[str, Any], Framer]:
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
    layers = [resolve_layer(depth, int(target["num_layers"])) for depth in data.read_depths]
    settings = {
        "seed": data.seed,
        "num_layers": target["num_layers"],
        "read_layers": list(dict.fromkeys(layers)),
        "layers_per_example": data.layers_per_example,
        "examples_per_shard": data.examples_per_shard,
        "max_input_tokens": data.max_input_tokens,
        "max_context_tokens": data.max_context_tokens,
        "oracle": oracle,
        "targets": {"base": target},
        "config": _recorded(data),
    }
    return settings, oracle_framer


def _recorded(data: DataConfig) -> dict[str, Any]:
    """The configuration as the manifest holds it: the same on every machine, so without folders."""
    config = to_dict(data)
    del config["out"]
    for source in config["sources"]:
        source["path"] = PurePath(source["path"]).name
    return config


def _require_free(out: Path, settings: dict[str, Any]) -> None:
    if not out.exists():
        return
    if not (out / "manifest.json").is_file():
        if out.is_dir() and not any(out.iterdir()):
            return
        raise FileExistsError(f"{out} exists and is no packed data set; choose another --out or remove it")
    manifest = read_manifest(out / "manifest.json")
    for part in ("config", "oracle", "targets"):
        old, new = manifest.get(part), settings[part]
        if canonical_json(old) != canonical_json(new):
            old = old if isinstance(old, dict) else {}
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            raise FileExistsError(
                f"{out} holds a data set with another {part} (differs in {', '.join(names)}); "
                "choose another --out or remove it"
            )


def _write(
    data: DataConfig, folder: Path, settings: dict[str, Any], oracle_framer: Framer, *, root: Path, progress: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    import pyarrow as pa

    writer = PackWriter(str(folder), oracle_framer, canonical_json(settings))
    drops: Counter[str] = Counter()
    by_source: dict[str, int] = {}
    for source in data.sources:
        lines = (_row(source, e) for e in examples(source, seed=data.seed, root=root, drops=drops))
        native = Source(_described(source))
        native.settle()
        table = canonical_json({"prefix": source.name, "origin": PurePath(source.path).name, "unit": "line"})
        num = 0
        counted = _counted(lines, source, progress=progress)
        while batch := list(islice(counted, BATCH)):
            column = pa.record_batch({"json": pa.array(batch, pa.large_binary())})
            writer.add(native, table, column, num)
            num += len(batch)
        by_source[source.name] = num
        if source.count is not None and num < source.count:
            log.warning("source %r has %d examples, fewer than its count of %d", source.name, num, source.count)
    if not any(by_source.values()):
        raise ValueError(f"no examples: the sources are empty ({', '.join(by_source)}); drops: {dict(drops)}")
    manifest = json.loads(writer.finish())
    manifest["drops"] = dict(sorted((drops + Counter(manifest["drops"])).items()))
    write_atomic(folder / "manifest.json", canonical_json(manifest))
    return manifest, by_source


def _row(source: SourceConfig, example: dict[str, Any]) -> bytes:
    if source.kind == "context_prediction":
        context = example["context"]
        example = {"text": context} if isinstance(context, str) else {"messages": context}
    return canonical_json(example).encode()


def _described(source: SourceConfig) -> str:
    """A source as the writer takes it: examples that are read in given ways, or texts that make their own questions."""
    if source.kind == "context_prediction":
        settings = ("name", "kind", "single_share", "window", "predict", "direction", "max_context_tokens")
        config = to_dict(source)
        return canonical_json({name: config[name] for name in settings})
    total = sum(read.share for read in source.reads)
    reads = []
    for read in source.reads:
        rule = {"all": True} if read.all else {"window": read.window, "before_end": read.before_end}
        reads.append({"share": read.share / total, **rule})
    return canonical_json({"name": source.name, "kind": "records", "reads": reads})


def _counted(lines: Iterable[bytes], source: SourceConfig, *, progress: bool) -> Iterator[bytes]:
    if not progress:
        return iter(lines)
    from tqdm import tqdm

    return iter(tqdm(lines, desc=f"pack {source.name}", total=source.count, unit=" examples"))


def _replace(temporary: Path, out: Path) -> None:
    if out.exists():
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old)
    else:
        temporary.rename(out)
    sync_folder(out.parent)
