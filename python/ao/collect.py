"""`ao collect`: run a target over contexts once, and keep the activations that somebody wants.

What is to be collected is cut into units of consecutive contexts. A unit is written by one process and is there whole or
not at all, so a killed run goes on with the units that are missing, and ranks take every n-th one; the files are the same
whoever wrote them.

Shapes: P values wanted, K rows, D d_model.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from tqdm import tqdm

from ao._ao import ActivationWriter, Framer
from ao.cache import INDEX, ActivationCache, context_keys
from ao.config import ModelConfig, Recipe
from ao.distributed import Ranks, ranks
from ao.manifest import adapter_fingerprint, canonical_json, fingerprint, read_manifest, write_atomic
from ao.models import arch as archs
from ao.models.adapters import as_oracle, as_target, load_adapter
from ao.models.load import DTYPES as COMPUTED
from ao.models.load import fuse_norms, load_model, resolve_device
from ao.prompt import fingerprints, framer, identity, num_layers, resolve_layer
from ao.residuals import Wanted, collected
from ao.selftest import check_model
from ao.shards import PackedDataset

log = logging.getLogger(__name__)

UNIT_TOKENS = 2**17
"""Context tokens of a unit: what a kill loses at most, some ten seconds of a large target."""
ALIKE = 0.9999
"""Least cosine between rows of a layer above which they are called alike."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Types of rows by the name that safetensors gives them."""

PLAIN = "*.plain.safetensors"
"""The plain files of a folder."""

Positions = Literal["wanted", "all"]


@dataclass(frozen=True)
class Unit:
    """Consecutive contexts, and what is wanted of them."""

    contexts: list[np.ndarray]
    """Token ids, each [length]."""
    wanted: Wanted
    """Each (context, layer, position) once."""

    def keys(self) -> np.ndarray:
        """Key of each value wanted, uint64 [P, 2]."""
        offsets = np.cumsum([0, *map(len, self.contexts)])
        keys = np.concatenate([np.empty((0, 2), np.uint64), *map(context_keys, self.contexts)])
        return keys[offsets[self.wanted.contexts] + self.wanted.positions]

    def only(self, kept: np.ndarray) -> Unit:
        """The same with some of what is wanted, and contexts no longer than that needs."""
        wanted = Wanted(self.wanted.contexts[kept], self.wanted.layers[kept], self.wanted.positions[kept])
        lengths = np.zeros(len(self.contexts), dtype=np.int64)
        np.maximum.at(lengths, wanted.contexts, wanted.positions + 1)
        return Unit([ids[:length] for ids, length in zip(self.contexts, lengths, strict=True)], wanted)

    @property
    def num_tokens(self) -> int:
        """Context tokens that have to be run."""
        return sum(map(len, self.contexts))


# What is wanted


def units(
    recipe: Recipe,
    *,
    data: str | Path | None = None,
    texts: str | Path | None = None,
    prompt: str | None = None,
    layers: Sequence[float] = (),
    positions: Positions = "wanted",
) -> list[Unit]:
    """What a recipe's packed data set reads, or every token of other contexts.

    Args:
        recipe: names the model and, without `data`, the data set.
        data: the packed data set.
        texts: instead, a JSONL file of `text` or `messages`.
        prompt: instead, one user turn.
        layers: indices or depths; without any those that the data set reads, or the recipe's depths.
        positions: "wanted" or "all"; other contexts than a data set's give all.

    Raises:
        ValueError: several of data, texts and prompt are given, or the data set is of another model or reads what cannot
            be collected.
    """
    if sum(given is not None for given in (data, texts, prompt)) > 1:
        raise ValueError("expected one of a packed data set, texts and a prompt, got several")
    model = recipe.model
    name, revision = (model.name, model.revision) if model.target is None else (model.target, model.target_revision)
    chosen = [resolve_layer(layer, num_layers(name, revision)) for layer in layers]
    if texts is None and prompt is None:
        packed = PackedDataset.open(recipe.data.out if data is None else data)
        packed.require(**fingerprints(model))
        packed.require_base()
        return list(packed_units(packed, layers=chosen or None, positions=positions))
    target_framer = framer(name, revision)
    if texts is not None:
        contexts = text_contexts(Path(texts), target_framer)
    else:
        turns = json.dumps([{"role": "user", "content": prompt}])
        contexts = [np.asarray(target_framer.context(turns).ids, dtype=np.int32)]
    depths = chosen or [resolve_layer(depth, num_layers(name, revision)) for depth in recipe.data.read_depths]
    return list(context_units(contexts, layers=sorted(set(depths))))


def units_of(contexts: Sequence[np.ndarray], wanted: Wanted) -> Iterator[Unit]:
    """Cut contexts into units of `UNIT_TOKENS`, in their order, each with what is wanted of it."""
    unit_of = (np.cumsum([0, *map(len, contexts)])[:-1] // UNIT_TOKENS).astype(np.int64)
    values = np.stack([wanted.contexts, wanted.layers, wanted.positions]).astype(np.int64)
    values = np.unique(values, axis=1)
    for unit in np.unique(unit_of):
        first, end = np.searchsorted(unit_of, [unit, unit + 1]).tolist()
        which, layers, positions = values[:, np.searchsorted(values[0], first) : np.searchsorted(values[0], end)]
        yield Unit(list(contexts[first:end]), Wanted(which - first, layers, positions))


def packed_units(data: PackedDataset, *, layers: Sequence[int] | None, positions: Positions) -> Iterator[Unit]:
    """What a packed data set reads; with `layers` at those instead of its own, with "all" at every position."""
    everywhere = positions == "all"
    chosen = sorted({layer for several in data.layer_combinations for layer in several}) if layers is None else layers
    for shard in range(data.num_shards):
        contexts, which, own_layers, read = data.reads(shard)
        wanted = Wanted(which, own_layers, read)
        if everywhere or layers is not None:
            wanted = _at_layers(*(_everywhere(contexts) if everywhere else (which, read)), np.asarray(chosen))
        yield from units_of(contexts, wanted)


def context_units(contexts: Sequence[np.ndarray], *, layers: Sequence[int]) -> Iterator[Unit]:
    """Every position of some contexts."""
    return units_of(contexts, _at_layers(*_everywhere(contexts), np.asarray(layers)))


def _everywhere(contexts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(ids) for ids in contexts]
    return np.repeat(np.arange(len(contexts)), lengths), np.concatenate([np.empty(0, int), *map(np.arange, lengths)])


def _at_layers(which: np.ndarray, positions: np.ndarray, layers: np.ndarray) -> Wanted:
    return Wanted(np.repeat(which, len(layers)), np.tile(layers, len(which)), np.repeat(positions, len(layers)))


def text_contexts(path: Path, oracle_framer: Framer) -> list[np.ndarray]:
    """The contexts of a JSONL file: an object a line, with `text` or `messages`.

    Raises:
        ValueError: a line is neither; names it.
    """
    contexts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                context = row["messages"] if "messages" in row else row["text"]
                contexts.append(np.asarray(oracle_framer.context(json.dumps(context)).ids, dtype=np.int32))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number}: expected an object with text or messages, got {line[:60]!r} ({error})"
                ) from None
    return contexts


# Collecting


def contract_of(model: ModelConfig, adapter: str | Path | None = None) -> dict[str, Any]:
    """What rows are: which weights at which precision, whether with an adapter, and what a layer is."""
    name, revision = (model.name, model.revision) if model.target is None else (model.target, model.target_revision)
    return {
        **identity(name, revision, framer=framer(name, revision)),
        "revision": revision,
        "precision": model.precision,
        "adapter": None if adapter is None else adapter_fingerprint(adapter),
        "reads": "residual stream after block k, counted from 0: hidden_states[k + 1]",
    }


def collect(
    model: ModelConfig,
    units: Sequence[Unit],
    *,
    out: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    plain: bool = False,
    tokens_per_row: int = 8192,
    progress: bool = False,
) -> dict[str, Any]:
    """Collect what is not there yet. Under torchrun every process calls this with the same arguments.

    Args:
        model: the target; its `target` where that is another checkpoint than the base.
        units: what is wanted.
        out: folder of the cache.
        adapter: folder of a LoRA adapter that the target wears.
        dtype: BF16, F16 or F32; without one what the model computes in, and F32 where `plain`.
        plain: write a plain safetensors file for each unit, complete in itself, instead of a cache; see
            docs/activations.md.
        tokens_per_row: token budget of one forward.
        progress: show a progress bar on stderr.

    Returns:
        The record: rows, tokens, seconds, tokens per second, share of the time spent in the writer, statistics by layer.

    Raises:
        FileExistsError: `out` holds something else.
        ValueError: the cache is of another target, or a value does not fit the type.
    """
    out = Path(out)
    started = time.perf_counter()
    with ranks(resolve_device(model.device)) as here:
        contract = contract_of(model, adapter)
        if dtype is None:
            dtype = "F32" if plain else next(name for name, each in DTYPES.items() if each == COMPUTED[model.precision])
        run = fingerprint(contract, dtype, tokens_per_row, *(_digest(unit) for unit in units))[:16]
        done = _done(out, run, plain=plain)
        left = units if plain else _remaining(units, _earlier(out, run, contract, dtype))
        todo = {
            number: unit for number, unit in enumerate(left) if number % here.world == here.rank and number not in done
        }
        record = {
            "run": run,
            "units": len(units),
            "units_before": len(done),
            "rows": 0,
            "tokens": 0,
            "writer_seconds": 0.0,
        }
        alike: dict[int, Alike] = {}
        if todo:
            which = "base" if model.target is None else "target"
            target = load_model(replace(model, device=str(here.device)), which=which)
            arch = archs.find(target)
            fuse_norms(target)
            check_model(target, arch, [ids for unit in todo.values() for ids in unit.contexts if len(ids)][:4])
            wearing: AbstractContextManager[None] = (
                as_target(target) if adapter is None else as_oracle(load_adapter(target, adapter))
            )
            collecting = time.perf_counter()
            total = sum(unit.num_tokens for unit in todo.values())
            bar = tqdm(
                total=total, desc="collect", unit=" tokens", unit_scale=True, disable=not (progress and here.first)
            )
            with wearing, bar:
                for number, unit in todo.items():
                    sink = (
                        PlainSink(out, run, number, contract, unit)
                        if plain
                        else CacheSink(out, run, number, contract, unit, dtype=dtype, width=arch.d_model)
                    )
                    try:
                        for layer, indices, resid_KD in collected(
                            target, arch, unit.contexts, unit.wanted, tokens_per_row=tokens_per_row, progress=bar.update
                        ):
                            norms_K = resid_KD.float().norm(dim=1)
                            alike.setdefault(layer, Alike()).see(resid_KD, norms_K)
                            rows_KD = _cast(resid_KD, dtype, layer)
                            clock = time.perf_counter()
                            sink.append(layer, indices, norms_K, rows_KD)
                            record["writer_seconds"] += time.perf_counter() - clock
                            record["rows"] += len(indices)
                        clock = time.perf_counter()
                        sink.finish()
                        record["writer_seconds"] += time.perf_counter() - clock
                    except BaseException:
                        sink.abandon()
                        raise
                    record["tokens"] += unit.num_tokens
            seconds = time.perf_counter() - collecting
            record |= {"collect_seconds": seconds, "tokens_per_second": record["tokens"] / seconds}
        for layer, seen in sorted(alike.items()):
            if seen.rows > 1 and seen.least > ALIKE:
                log.warning(
                    "layer %d: its %d rows are all alike (least cosine %.6f); the target gives the same vector whatever it "
                    "reads, so nothing can be learnt from it",
                    layer, seen.rows, seen.least,
                )  # fmt: skip
        _together(record, here)
        if here.first and not plain:
            record["layers"] = _finish(out)
        record["seconds"] = time.perf_counter() - started
        return {**record, "first_rank": here.first}


class CacheSink:
    """A unit of the cache."""

    def __init__(
        self, out: Path, run: str, number: int, contract: dict[str, Any], unit: Unit, *, dtype: str, width: int
    ) -> None:
        self._keys = unit.keys()
        self._writer = ActivationWriter(
            out,
            run=run,
            unit=number,
            contract_json=canonical_json(contract),
            dtype=dtype,
            width=width,
            layers=np.unique(unit.wanted.layers).tolist(),
        )

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Take rows over."""
        bits = torch.int32 if rows_KD.dtype == torch.float32 else torch.int16
        self._writer.append(layer, self._keys[indices], norms_K.cpu().numpy(), rows_KD.cpu().view(bits).numpy())

    def finish(self) -> None:
        """Put the unit in its place."""
        self._writer.finish()

    def abandon(self) -> None:
        """Leave nothing."""
        self._writer.abandon()


class PlainSink:
    """A plain safetensors file of a unit."""

    def __init__(self, out: Path, run: str, number: int, contract: dict[str, Any], unit: Unit) -> None:
        self._path, self._unit = out / f"{run}-{number:05d}{PLAIN.removeprefix('*')}", unit
        self._metadata = {"ao": canonical_json({"kind": "plain_activations", "schema": 1, "contract": contract})}
        self._indices: list[np.ndarray] = []
        self._rows: list[torch.Tensor] = []

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Take rows over."""
        self._indices.append(indices)
        self._rows.append(rows_KD.cpu())

    def finish(self) -> None:
        """Write the file."""
        indices = np.concatenate(self._indices) if self._indices else np.empty(0, np.int64)
        wanted, lengths = self._unit.wanted, [len(ids) for ids in self._unit.contexts]
        order = np.argsort(indices)
        tensors = {
            "activations": torch.cat(self._rows)[torch.from_numpy(order)] if self._rows else torch.empty(0, 0),
            "context": torch.from_numpy(wanted.contexts.astype(np.int32)),
            "layer": torch.from_numpy(wanted.layers.astype(np.int32)),
            "position": torch.from_numpy(wanted.positions.astype(np.int32)),
            "ids": torch.from_numpy(np.concatenate([np.empty(0, np.int32), *self._unit.contexts]).astype(np.int32)),
            "offsets": torch.from_numpy(np.cumsum([0, *lengths])),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, serialize(tensors, metadata=self._metadata))

    def abandon(self) -> None:
        """Leave nothing."""
        self._rows.clear()


class Alike:
    """Whether the vectors of a layer are all alike."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.rows = 0
        self.least = 1.0

    def see(self, resid_KD: torch.Tensor, norms_K: torch.Tensor) -> None:
        """Compare vectors [K, D] of these norms [K] with the first one of the layer."""
        unit_KD = resid_KD.float() / norms_K.clamp_min(1e-12)[:, None]
        if self.first is None:
            self.first = unit_KD[0].clone()
        self.rows += len(unit_KD)
        self.least = min(self.least, (unit_KD @ self.first).min().item())


def _cast(resid_KD: torch.Tensor, dtype: str, layer: int) -> torch.Tensor:
    rows_KD = resid_KD.to(DTYPES[dtype]).contiguous()
    if dtype == "F16" and rows_KD.isinf().any() and not resid_KD.isinf().any():
        raise ValueError(
            f"layer {layer}: values up to {resid_KD.abs().max().item():.0f} do not fit F16, whose greatest is 65504; use "
            "BF16 or F32"
        )
    return rows_KD


def _digest(unit: Unit) -> str:
    wanted = unit.wanted
    arrays = [*unit.contexts, wanted.contexts, wanted.layers, wanted.positions]
    return fingerprint(*(np.ascontiguousarray(array, dtype="<i8").tobytes() for array in arrays))


def _done(out: Path, run: str, *, plain: bool) -> set[int]:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    suffix = (PLAIN if plain else INDEX).removeprefix("*")
    return {int(path.name.removesuffix(suffix).rpartition("-")[2]) for path in out.glob(f"{run}-*{suffix}")}


def _earlier(out: Path, run: str, contract: dict[str, Any], dtype: str) -> ActivationCache | None:
    """What earlier runs left in the folder.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: its rows are of another target or type.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return None
    try:
        cache = ActivationCache.open(out, contract=contract)
    except FileNotFoundError:
        if all(path.name.endswith(".partial") or path.suffix == ".safetensors" for path in out.iterdir()):
            return None  # a run that was stopped within its first unit
        raise FileExistsError(f"{out} exists and is no activation cache; choose another --out") from None
    if cache.dtype != dtype:
        raise ValueError(f"{out} holds rows of {cache.dtype}, asked for were {dtype}; choose another --out or --dtype")
    others = [unit for unit in cache.units if unit.about["run"] != run]
    return ActivationCache(out, others) if others else None


def _remaining(units: Sequence[Unit], old: ActivationCache | None) -> list[Unit]:
    """What each unit has to collect: what no unit before it holds, and no earlier run.

    Decided from the units and earlier runs alone, so that every rank, and a run that goes on, decides alike.
    """
    all_keys = [unit.keys() for unit in units]
    bounds = np.cumsum([0, *map(len, all_keys)])
    keys = np.concatenate([np.empty((0, 2), np.uint64), *all_keys])
    layers = np.concatenate([np.empty(0, np.int64), *(unit.wanted.layers for unit in units)])
    kept = np.zeros(len(keys), dtype=bool)
    for layer in np.unique(layers).tolist():
        here = np.flatnonzero(layers == layer)
        order = here[np.lexsort((here, keys[here, 1], keys[here, 0]))]
        is_first = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))
        kept[order[is_first]] = True
        if old is not None:
            firsts = order[is_first]
            kept[firsts[old.layer(layer).find(keys[firsts]) >= 0]] = False
    return [unit.only(kept[first:end]) for unit, first, end in zip(units, bounds, bounds[1:], strict=False)]


def _together(record: dict[str, Any], here: Ranks) -> None:
    """Add the ranks' counts up; behind this every rank has finished."""
    names = ("rows", "tokens", "writer_seconds", "tokens_per_second")
    sums = torch.tensor([record.get(name, 0) for name in names], dtype=torch.float64, device=here.device)
    record |= dict(zip(names, here.sum_(sums).tolist(), strict=True))
    record |= {name: int(record[name]) for name in ("rows", "tokens")}


def _finish(out: Path) -> dict[str, Any]:
    """The manifest and the picture of a cache that is whole now; returns the statistics by layer."""
    from ao.plots import norm_chart

    try:
        cache = ActivationCache.open(out)
    except FileNotFoundError:
        return {}
    layers = cache.write_manifest()["layers"]
    if layers:
        norm_chart(out / "norms.png", {layer: cache.layer(layer).norms for layer in cache.layers}, title=out.name)
    return layers


def summary_text(out: str | Path, record: Mapping[str, Any]) -> str:
    """What was collected, as a person wants to read it."""
    lines = [f"{out}: nothing was missing"]
    if record.get("rows"):
        share = record["writer_seconds"] / record["seconds"]
        lines = [
            f"{out}: {record['rows']:,} rows of {record['tokens']:,} context tokens, {record['seconds']:.1f} s, "
            f"{record['tokens_per_second']:,.0f} tokens/s, {share:.1%} of the time for writing"
        ]
    for layer, of in record.get("layers", {}).items():
        norms = f"norms {of['mean']:.4g}, median {of['quantiles']['0.5']:.4g}" if "mean" in of else "none finite"
        bad = f", {of['not_finite']:,} not finite" if of["not_finite"] else ""
        lines.append(f"  layer {layer:>3}  {of['rows']:>11,} rows   {norms}{bad}")
    return "\n".join(lines)


# Other people's files


def import_tensor(file: str | Path, sidecar: str | Path, *, out: str | Path) -> dict[str, Any]:
    """Put activations that another tool saved into a cache.

    Args:
        file: a safetensors file with one tensor [tokens, layers, D].
        sidecar: a JSON object: `tensor` (its name), `layers` (of its columns), `ids` (token ids of the contexts, a list
            each, together as many as the tensor has tokens), `contract` (what the rows are; for `ao train` what
            `contract_of` gives).
        out: folder of the cache.

    Returns:
        The statistics by layer.

    Raises:
        ValueError: sidecar and tensor do not agree.
    """
    about = read_manifest(sidecar)
    if absent := {"tensor", "layers", "ids", "contract"} - set(about):
        raise ValueError(f"{sidecar}: lacks {sorted(absent)}; expected tensor, layers, ids and contract")
    contexts = [np.asarray(ids, dtype=np.int32) for ids in about["ids"]]
    with safe_open(file, framework="pt") as opened:
        if about["tensor"] not in opened.keys():  # noqa: SIM118 - the file is no mapping
            raise ValueError(f"{file}: no tensor {about['tensor']!r}, only {sorted(opened.keys())}")
        values_TLD = opened.get_tensor(about["tensor"])
    shape = (sum(map(len, contexts)), len(about["layers"]))
    names = {dtype: name for name, dtype in DTYPES.items()}
    if values_TLD.dim() != 3 or tuple(values_TLD.shape[:2]) != shape or values_TLD.dtype not in names:
        raise ValueError(
            f"{file}: {about['tensor']} is {values_TLD.dtype} {list(values_TLD.shape)}; {sidecar} says "
            f"[{shape[0]} tokens, {shape[1]} layers, D], and rows are BF16, F16 or F32"
        )
    keys = np.concatenate([context_keys(ids) for ids in contexts])
    _, first = np.unique(keys, axis=0, return_index=True)
    first.sort()
    unit = Unit(contexts, _at_layers(*_everywhere(contexts), np.asarray(about["layers"])))
    dtype = names[values_TLD.dtype]
    run = fingerprint(about["contract"], dtype, _digest(unit))[:16]
    _earlier(Path(out), run, about["contract"], dtype)
    sink = CacheSink(Path(out), run, 0, about["contract"], unit, dtype=dtype, width=values_TLD.shape[2])
    try:
        for column, layer in enumerate(about["layers"]):
            rows_KD = values_TLD[first, column].contiguous()
            sink.append(layer, first * shape[1], rows_KD.float().norm(dim=1), rows_KD)
        sink.finish()
    except BaseException:
        sink.abandon()
        raise
    return _finish(Path(out))
