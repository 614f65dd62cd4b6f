"""`ao collect`: run a target over contexts once, and keep the activations that somebody wants.

What is to be collected is cut into units of consecutive contexts. A unit is written by one process and is there whole or
not at all, so a killed run goes on with the units that are missing, and ranks take every n-th one; the files are the same
whoever wrote them.

Shapes: P values wanted, K rows, D d_model.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from annotated_types import Ge, Lt, MinLen
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save as serialize
from tqdm import tqdm

from ao._ao import ActivationWriter, Framer, input_digest
from ao.cache import INDEX, ActivationCache, context_keys
from ao.config import ModelConfig, Recipe
from ao.distributed import Ranks, ranks
from ao.manifest import adapter_fingerprint, canonical_json, fingerprint, write_atomic
from ao.models import arch as archs
from ao.models.adapters import as_oracle, as_target, load_adapter
from ao.models.load import DTYPES as COMPUTED
from ao.models.load import fuse_norms, load_model, resolve_device
from ao.prompt import fingerprints, framer, identity, num_layers, resolve_layer
from ao.residuals import Wanted, collected
from ao.selftest import check_model
from ao.shards import PackedDataset

log = logging.getLogger(__name__)

UNIT_TOKENS = 2**19
"""Context tokens of a unit: what a kill loses at most, less than a minute of a large target on a GPU. A quarter of
it where every position is kept, so that a unit's index stays small."""
PLAIN_UNIT_TOKENS = 2**14
"""The same of a plain file, which is put together in memory."""
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
    plain: bool = False,
) -> list[Unit]:
    """What a recipe's packed data set reads, or every token of other contexts.

    Args:
        recipe: names the model and, without `data`, the data set.
        data: the packed data set.
        texts: instead, a JSONL file of `text` or `messages`.
        prompt: instead, one user turn.
        layers: indices or depths; without any those that the data set reads, or the recipe's depths.
        positions: "wanted" or "all"; other contexts than a data set's give all.
        plain: units for plain files, as for `collect`.

    Raises:
        ValueError: several of data, texts and prompt are given, or the data set is of another model or reads what cannot
            be collected.
    """
    if sum(given is not None for given in (data, texts, prompt)) > 1:
        raise ValueError("expected one of a packed data set, texts and a prompt, got several")
    model, unit_tokens = recipe.model, PLAIN_UNIT_TOKENS if plain else UNIT_TOKENS
    name, revision = _target(model)
    chosen = [resolve_layer(layer, num_layers(name, revision)) for layer in layers]
    if texts is None and prompt is None:
        packed = PackedDataset.open(recipe.data.out if data is None else data)
        packed.require(**fingerprints(model))
        packed.require_base()
        if positions == "all":
            unit_tokens //= 4
        return list(packed_units(packed, layers=chosen or None, positions=positions, unit_tokens=unit_tokens))
    target_framer = framer(name, revision)
    if texts is not None:
        contexts = text_contexts(Path(texts), target_framer)
    else:
        turns = json.dumps([{"role": "user", "content": prompt}])
        contexts = [np.asarray(target_framer.context(turns).ids, dtype=np.int32)]
    depths = chosen or [resolve_layer(depth, num_layers(name, revision)) for depth in recipe.data.read_depths]
    return list(every_position(contexts, sorted(set(depths)), unit_tokens=unit_tokens // 4))


def units_of(contexts: Sequence[np.ndarray], wanted: Wanted, *, unit_tokens: int) -> Iterator[Unit]:
    """Cut contexts into units of so many tokens, in their order, each with what is wanted of it."""
    unit_of = (np.cumsum([0, *map(len, contexts)])[:-1] // unit_tokens).astype(np.int64)
    # One number for (context, layer, position): sorting numbers is what NumPy does fastest.
    num_layers, longest = int(wanted.layers.max(initial=0)) + 1, max(map(len, contexts), default=1)
    numbers = np.unique((wanted.contexts.astype(np.int64) * num_layers + wanted.layers) * longest + wanted.positions)
    which, rest = np.divmod(numbers, num_layers * longest)
    layers, positions = np.divmod(rest, longest)
    for unit in np.unique(unit_of):
        first, end = np.searchsorted(unit_of, [unit, unit + 1]).tolist()
        here = slice(*np.searchsorted(which, [first, end]).tolist())
        yield Unit(list(contexts[first:end]), Wanted(which[here] - first, layers[here], positions[here]))


def packed_units(
    data: PackedDataset, *, layers: Sequence[int] | None, positions: Positions, unit_tokens: int
) -> Iterator[Unit]:
    """What a packed data set reads; with `layers` at those instead of its own, with "all" at every position."""
    everywhere = positions == "all"
    chosen = sorted({layer for several in data.layer_combinations for layer in several}) if layers is None else layers
    for shard in range(data.num_shards):
        contexts, which, own_layers, read = data.reads(shard)
        wanted = Wanted(which, own_layers, read)
        if everywhere or layers is not None:
            wanted = _at_layers(*(_everywhere(contexts) if everywhere else (which, read)), np.asarray(chosen))
        yield from units_of(contexts, wanted, unit_tokens=unit_tokens)


def every_position(contexts: Sequence[np.ndarray], layers: Sequence[int], *, unit_tokens: int) -> Iterator[Unit]:
    """Every position of some contexts."""
    return units_of(contexts, _at_layers(*_everywhere(contexts), np.asarray(layers)), unit_tokens=unit_tokens)


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


def _target(model: ModelConfig) -> tuple[str, str | None]:
    return (model.name, model.revision) if model.target is None else (model.target, model.target_revision)


def contract_of(model: ModelConfig, adapter: str | Path | None = None) -> dict[str, Any]:
    """What rows are: which weights at which precision, whether with an adapter, and what a layer is."""
    name, revision = _target(model)
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
        if plain:
            left, done = dict(enumerate(units)), _plain_done(out, run)
        else:
            earlier = _earlier(out, run, contract, dtype=dtype)
            left = {number: unit for number, unit in enumerate(remaining(units, earlier)) if len(unit.wanted.layers)}
            done = {number for number, unit in left.items() if _is_there(out, run, number, unit)}
        here.wait()  # no rank writes before every one knows what is there
        todo = {number: left[number] for number in sorted(set(left) - done)[here.rank :: here.world]}
        counts = {"rows": 0, "tokens": 0, "collect_seconds": 0.0, "writer_seconds": 0.0, "tokens_per_second": 0.0}
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
                    if plain:
                        sink: Sink = PlainSink(out, run, number, contract, unit)
                    else:
                        sink = CacheSink(out, run, number, contract, unit, dtype=dtype, width=arch.d_model)
                    try:
                        for layer, indices, resid_KD in collected(
                            target, arch, unit.contexts, unit.wanted, tokens_per_row=tokens_per_row, progress=bar.update
                        ):
                            norms_K = resid_KD.float().norm(dim=1)
                            alike.setdefault(layer, Alike()).see(resid_KD, norms_K)
                            rows_KD = _cast(resid_KD, dtype, layer)
                            clock = time.perf_counter()
                            sink.append(layer, indices, norms_K.cpu(), rows_KD.cpu())
                            counts["writer_seconds"] += time.perf_counter() - clock
                            counts["rows"] += len(indices)
                        clock = time.perf_counter()
                        sink.finish()
                        counts["writer_seconds"] += time.perf_counter() - clock
                    except BaseException:
                        sink.abandon()
                        raise
                    counts["tokens"] += unit.num_tokens
            counts["collect_seconds"] = time.perf_counter() - collecting
            counts["tokens_per_second"] = counts["tokens"] / counts["collect_seconds"]
        for layer, seen in sorted(alike.items()):
            if seen.rows > 1 and seen.least > ALIKE:
                log.warning(
                    "layer %d: its %d rows are all alike (least cosine %.6f); the target gives the same vector whatever it "
                    "reads, so nothing can be learnt from it",
                    layer, seen.rows, seen.least,
                )  # fmt: skip
        record: dict[str, Any] = {"run": run, "units": len(units), "units_before": len(done), **_together(counts, here)}
        if here.first and not plain:
            record["layers"] = _finish(out)
        record["seconds"] = time.perf_counter() - started
        return {**record, "first_rank": here.first}


class Sink(Protocol):
    """Where rows go."""

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Take rows [K, D] of a layer over, in CPU memory: values `indices` [K] of what the unit wants."""

    def finish(self) -> None:
        """Put the unit in its place."""

    def abandon(self) -> None:
        """Leave nothing."""


class CacheSink(Sink):
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
        """Have rows copied to the writer."""
        bits = torch.int32 if rows_KD.dtype == torch.float32 else torch.int16
        self._writer.append(layer, self._keys[indices], norms_K.numpy(), rows_KD.view(bits).numpy())

    def finish(self) -> None:
        """Write the index."""
        self._writer.finish()

    def abandon(self) -> None:
        """Remove the files."""
        self._writer.abandon()


class PlainSink(Sink):
    """A plain safetensors file of a unit."""

    def __init__(self, out: Path, run: str, number: int, contract: dict[str, Any], unit: Unit) -> None:
        self._path, self._unit = out / f"{run}-{number:05d}{PLAIN.removeprefix('*')}", unit
        self._metadata = {"ao": canonical_json({"kind": "plain_activations", "schema": 1, "contract": contract})}
        self._indices: list[np.ndarray] = []
        self._rows: list[torch.Tensor] = []

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """Keep rows in memory."""
        self._indices.append(indices)
        self._rows.append(rows_KD)

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
        """Forget the rows."""
        self._rows.clear()


class Alike:
    """Whether the vectors of a layer are all alike; those of which some value is not finite are not looked at."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.rows = 0
        self.least = 1.0

    def see(self, resid_KD: torch.Tensor, norms_K: torch.Tensor) -> None:
        """Compare vectors [K, D] of these norms [K] with the first one of the layer."""
        fine = norms_K.isfinite()
        if not fine.any():
            return
        unit_KD = resid_KD[fine].float() / norms_K[fine].clamp_min(1e-12)[:, None]
        if self.first is None:
            self.first = unit_KD[0].clone()
        self.rows += len(unit_KD)
        # Zero vectors have no direction, but they are alike.
        cosines_K = (unit_KD @ self.first).where(
            (unit_KD != 0).any(dim=1) | (self.first != 0).any(), torch.ones(()).to(unit_KD)
        )
        self.least = min(self.least, cosines_K.min().item())


def _cast(resid_KD: torch.Tensor, dtype: str, layer: int) -> torch.Tensor:
    rows_KD = resid_KD.to(DTYPES[dtype]).contiguous()
    if dtype == "F16" and (lost := resid_KD[rows_KD.isinf() & resid_KD.isfinite()]).numel():
        raise ValueError(
            f"layer {layer}: values up to {lost.abs().max().item():.0f} do not fit F16, whose greatest is 65504; use "
            "BF16 or F32"
        )
    return rows_KD


def _digest(unit: Unit) -> str:
    wanted = unit.wanted
    arrays = [*unit.contexts, wanted.contexts, wanted.layers, wanted.positions]
    return fingerprint(*(np.ascontiguousarray(array, dtype="<i8").tobytes() for array in arrays))


def _plain_done(out: Path, run: str) -> set[int]:
    if out.is_dir() and any(out.glob(INDEX)):
        raise FileExistsError(f"{out} is an activation cache; choose another --out for plain files")
    suffix = PLAIN.removeprefix("*")
    return {int(path.name.removesuffix(suffix).rpartition("-")[2]) for path in out.glob(f"{run}-*{suffix}")}


def _is_there(out: Path, run: str, number: int, unit: Unit) -> bool:
    """Whether a run's unit is whole: its index, its files, and in it all that it is to hold."""
    try:
        cache, keys = ActivationCache.open(out, run=run, unit=number), unit.keys()
        for layer in np.unique(unit.wanted.layers).tolist():
            cached = cache.layer(layer)
            cached.require_files()
            if (cached.find(keys[unit.wanted.layers == layer]) < 0).any():
                return False
    except (FileNotFoundError, ValueError):
        return False
    return True


def _earlier(
    out: Path, run: str, contract: Mapping[str, Any], *, dtype: str, width: int | None = None
) -> ActivationCache | None:
    """What other runs left in the folder.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: its rows are of another target, type or width.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    own = re.compile(r"\.?[0-9a-f]{16}-\d{5}(-L\d{3,}|\.index)\.safetensors(\..+\.partial)?|manifest\.json|norms\.png")
    if out.is_dir() and (strangers := [path.name for path in out.iterdir() if not own.fullmatch(path.name)]):
        raise FileExistsError(f"{out} holds {strangers[0]!r}, so it is no activation cache; choose another --out")
    if not any(path for path in out.glob(INDEX) if not path.name.startswith(run)):
        return None
    cache = ActivationCache.open(out, contract=contract, without=run)
    found, asked = (cache.contract, cache.dtype), (dict(contract), dtype)
    if found != asked or width not in (None, cache.width):
        raise ValueError(
            f"{out} holds rows of {cache.dtype} and {cache.width} values, asked for were {dtype}"
            + (f" and {width}" if width is not None else "")
            + ("" if found[0] == asked[0] else f"; its contract has {sorted(found[0])}, this one {sorted(asked[0])}")
            + "; choose another --out or --dtype"
        )
    return cache


def remaining(units: Sequence[Unit], old: ActivationCache | None) -> list[Unit]:
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


def _together(counts: Mapping[str, float], here: Ranks) -> dict[str, Any]:
    """The counts of all ranks, added up; behind this every rank has finished."""
    sums = here.sum_(torch.tensor(list(counts.values()), dtype=torch.float64, device=here.device)).tolist()
    return {name: type(counts[name])(value) for name, value in zip(counts, sums, strict=True)}


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
        share = record["writer_seconds"] / record["collect_seconds"]
        lines = [
            f"{out}: {record['rows']:,} rows of {record['tokens']:,} context tokens, {record['seconds']:.1f} s, "
            f"{record['tokens_per_second']:,.0f} tokens/s, writing took {share:.1%} of it"
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
    about = Sidecar.read(sidecar)
    with safe_open(file, framework="pt") as opened:
        if about.tensor not in opened.keys():  # noqa: SIM118 - the file is no mapping
            raise ValueError(f"{file}: no tensor {about.tensor!r}, only {sorted(opened.keys())}")
        values_TLD = opened.get_tensor(about.tensor)
    shape = (sum(map(len, about.ids)), len(about.layers))
    names = {dtype: name for name, dtype in DTYPES.items()}
    if values_TLD.dim() != 3 or tuple(values_TLD.shape[:2]) != shape or values_TLD.dtype not in names:
        raise ValueError(
            f"{file}: {about.tensor} is {values_TLD.dtype} {list(values_TLD.shape)}; {sidecar} says "
            f"[{shape[0]} tokens, {shape[1]} layers, D], and rows are BF16, F16 or F32"
        )
    contexts = [np.asarray(ids, dtype=np.int32) for ids in about.ids]
    unit = Unit(contexts, _at_layers(*_everywhere(contexts), np.asarray(about.layers)))
    keys = unit.keys()[:: shape[1]]
    _, first, serving = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    same = torch.from_numpy(first[serving.reshape(-1)])
    if len(differing := (values_TLD[same] != values_TLD).flatten(1).any(dim=1).nonzero().flatten()):
        row = int(differing[0])
        raise ValueError(
            f"{file}: tokens {int(same[row])} and {row} were read after the same ids, and have other activations; were the "
            "contexts padded, or read by a model with other mixers than causal attention?"
        )
    out, dtype, width = Path(out), names[values_TLD.dtype], values_TLD.shape[2]
    run = fingerprint(about.contract, dtype, _digest(unit), input_digest(str(file)))[:16]
    [left] = remaining([unit], _earlier(out, run, about.contract, dtype=dtype, width=width))
    sink = CacheSink(out, run, 0, about.contract, left, dtype=dtype, width=width)
    starts = np.cumsum([0, *map(len, contexts)])
    try:
        for column, layer in enumerate(about.layers):
            indices = np.flatnonzero(left.wanted.layers == layer)
            tokens = starts[left.wanted.contexts[indices]] + left.wanted.positions[indices]
            rows_KD = values_TLD[torch.from_numpy(tokens), column].contiguous()
            sink.append(layer, indices, rows_KD.float().norm(dim=1), rows_KD)
        sink.finish()
    except BaseException:
        sink.abandon()
        raise
    return _finish(out)


@dataclass(frozen=True)
class Sidecar:
    """What a tensor of another tool is."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, not a field

    tensor: str
    """Its name."""
    layers: list[Annotated[int, Ge(0), Lt(2**15)]]
    """Of its columns, blocks counted from 0."""
    ids: list[Annotated[list[Annotated[int, Ge(0), Lt(2**31)]], MinLen(1)]]
    """Token ids of each context."""
    contract: dict[str, Any]
    """What the rows are."""

    @classmethod
    def read(cls, path: str | Path) -> Sidecar:
        """Read a JSON file.

        Raises:
            ValueError: a key is missing, unknown or out of range; names it.
        """
        try:
            found = TypeAdapter(cls).validate_json(Path(path).read_bytes(), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: {where}: {first['msg']}; expected tensor, layers, ids and contract") from None
        if not found.ids or len(set(found.layers)) != len(found.layers):
            raise ValueError(f"{path}: expected one context at least, and each layer once, got layers {found.layers}")
        return found
