"""Running a target over what is wanted and not there yet.

Shapes: K rows, D d_model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ao.cache import contract_of
from ao.collect.missing import Remaining, earlier_runs, is_there, plain_done, remaining
from ao.collect.sinks import DTYPES, CacheSink, PlainSink, Sink, finish_cache
from ao.collect.wanted import Unit
from ao.config import ModelConfig
from ao.distributed import Ranks, ranks
from ao.manifest import fingerprint
from ao.models import arch as archs
from ao.models.adapters import as_oracle, as_target, load_adapter
from ao.models.load import DTYPES as COMPUTED
from ao.models.load import fuse_norms, load_model, resolve_device
from ao.residuals import collected
from ao.selftest import check_model

log = logging.getLogger(__name__)

ALIKE = 0.9999
"""Least cosine between rows of a layer above which they are called alike."""


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
        units: what is wanted; several times gone through, and only this rank's own are built for long.
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
    with ranks(resolve_device(model.device), patient=True) as here:
        contract = contract_of(model, adapter)
        if dtype is None:
            dtype = "F32" if plain else next(name for name, each in DTYPES.items() if each == COMPUTED[model.precision])
        run = fingerprint(contract, dtype, tokens_per_row, *(unit.digest for unit in units))[:16]
        if plain:
            left, there = Remaining(units, range(len(units))), plain_done(out, run)
            mine = left.numbers[here.rank :: here.world]
            done = there.intersection(mine)
        else:
            left = remaining(units, earlier_runs(out, run, contract, dtype=dtype))
            mine = left.numbers[here.rank :: here.world]
            done = {number for number in mine if is_there(out, run, number, left.units)}
        todo = {number: left.units[number].num_tokens for number in mine if number not in done}
        tally = Tally(units_before=len(done))
        if todo:
            which = "base" if model.target is None else "target"
            target = load_model(replace(model, device=str(here.device)), which=which)
            arch = archs.find(target)
            fuse_norms(target)
            contexts = (ids for number in todo for ids in left.units[number].contexts if len(ids))
            check_model(target, arch, list(islice(contexts, 4)))
            wearing: AbstractContextManager[None] = (
                as_target(target) if adapter is None else as_oracle(load_adapter(target, adapter))
            )
            collecting = time.perf_counter()
            bar = tqdm(
                total=sum(todo.values()),
                desc="collect",
                unit=" tokens",
                unit_scale=True,
                disable=not (progress and here.first),
            )
            with wearing, bar:
                for number in todo:
                    unit = left.units[number]
                    kind = PlainSink if plain else CacheSink
                    sink: Sink = kind(out, run, number, contract, unit, dtype=dtype, width=arch.d_model)
                    rows = collected(
                        target, arch, unit.contexts, unit.wanted, tokens_per_row=tokens_per_row, progress=bar.update
                    )
                    write(rows, sink, tally, dtype=dtype)
                    tally.tokens += unit.num_tokens
            tally.collect_seconds = time.perf_counter() - collecting
        tally.warn()
        record: dict[str, Any] = {"run": run, "units": len(units), **_together(tally, here)}
        if here.first and not plain:
            record["layers"] = finish_cache(out)
        record["seconds"] = time.perf_counter() - started
        return {**record, "first_rank": here.first}


@dataclass
class Tally:
    """What one rank did, and saw."""

    units_before: int = 0
    """Units that were there already."""
    rows: int = 0
    tokens: int = 0
    """Context tokens run."""
    collect_seconds: float = 0.0
    """From the first forward to the last byte."""
    writer_seconds: float = 0.0
    """Those of them spent in sinks."""
    alike: dict[int, Alike] = field(default_factory=dict)
    """By layer."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Charge what is done meanwhile to the writer."""
        clock = time.perf_counter()
        yield
        self.writer_seconds += time.perf_counter() - clock

    def warn(self) -> None:
        """Tell of layers whose vectors are all alike."""
        for layer, seen in sorted(self.alike.items()):
            if seen.rows > 1 and seen.least > ALIKE:
                log.warning(
                    "layer %d: its %d rows are all alike (least cosine %.6f); the target gives the same vector whatever it "
                    "reads, so nothing can be learnt from it",
                    layer, seen.rows, seen.least,
                )  # fmt: skip


def write(rows: Iterable[tuple[int, np.ndarray, torch.Tensor]], sink: Sink, tally: Tally, *, dtype: str) -> None:
    """Put what `ao.residuals.collected` gives of a unit into a sink.

    Raises:
        ValueError: a value does not fit the type; the sink keeps nothing then, as after any other error.
    """
    try:
        for layer, indices, resid_KD in rows:
            norms_K = resid_KD.float().norm(dim=1)
            tally.alike.setdefault(layer, Alike()).see(resid_KD, norms_K)  # waits for the device, on nobody's account
            rows_KD = _cast(resid_KD, dtype, layer)
            with tally.writing():
                sink.append(layer, indices, norms_K.cpu(), rows_KD.cpu())
            tally.rows += len(indices)
        with tally.writing():
            sink.finish()
    except BaseException:
        sink.abandon()
        raise


def _cast(resid_KD: torch.Tensor, dtype: str, layer: int) -> torch.Tensor:
    rows_KD = resid_KD.to(DTYPES[dtype]).contiguous()
    if dtype == "F16" and (lost := resid_KD[rows_KD.isinf() & resid_KD.isfinite()]).numel():
        raise ValueError(
            f"layer {layer}: values up to {lost.abs().max().item():.0f} do not fit F16, whose greatest is 65504; use "
            "BF16 or F32"
        )
    return rows_KD


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


def _together(tally: Tally, here: Ranks) -> dict[str, Any]:
    """The counts of all ranks, added up; behind this every rank has finished."""
    own = [tally.units_before, tally.rows, tally.tokens, tally.collect_seconds, tally.writer_seconds]
    speed = tally.tokens / tally.collect_seconds if tally.collect_seconds else 0.0
    sums = here.sum_(torch.tensor([*own, speed], dtype=torch.float64)).tolist()
    units_before, rows, tokens, collect_seconds, writer_seconds, speed = sums
    return {
        "units_before": int(units_before),
        "rows": int(rows),
        "tokens": int(tokens),
        "collect_seconds": collect_seconds,
        "writer_seconds": writer_seconds,
        "tokens_per_second": speed,
    }


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
