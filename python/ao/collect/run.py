"""Running a target over what is wanted and not there yet.

Shapes: K rows, D d_model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ao.cache import contract_of
from ao.collect.handover import Handover
from ao.collect.missing import Share, cache_share, earlier_runs, plain_share, remove_leftovers
from ao.collect.sinks import CacheSink, PlainSink, Sink, finish_cache
from ao.collect.wanted import Unit
from ao.config import ModelConfig
from ao.distributed import Ranks, ranks
from ao.manifest import fingerprint
from ao.models import arch as archs
from ao.models.adapters import as_oracle, as_target, load_adapter
from ao.models.fused import fuse
from ao.models.load import DTYPES as COMPUTED
from ao.models.load import resolve_device
from ao.replica import load_replica
from ao.residuals import ROW_TYPES, collected
from ao.selftest import check_model

log = logging.getLogger(__name__)

ALIKE = 0.9999
"""Least cosine between rows of a layer above which they are called alike."""
SHARE_SECONDS = 1.0
"""From so much collecting on, the summary says how much of it was waiting for the disk."""


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
        The record: rows, tokens, seconds, tokens per second, and of the rank that collected longest the seconds, and those of
        them in which forwards waited for the disk; statistics by layer.

    Raises:
        FileExistsError: `out` holds something else.
        ValueError: the cache is of another target, or a value does not fit the type.
    """
    out = Path(out)
    started = time.perf_counter()
    with ranks(resolve_device(model.device), patient=True) as here:
        contract = contract_of(model, adapter)
        if dtype is None:
            dtype = (
                "F32" if plain else next(name for name, each in ROW_TYPES.items() if each == COMPUTED[model.precision])
            )
        run = fingerprint(contract, dtype, tokens_per_row, *(unit.digest for unit in units))[:16]
        if plain:
            share = plain_share(units, out, run, here)
        else:
            share = cache_share(units, earlier_runs(out, run, contract, dtype=dtype), out, run, here)
        if here.first:
            remove_leftovers(out)
        tally = Tally(units_before=share.units_before)
        if share.numbers:
            into = partial(PlainSink if plain else CacheSink, out, run, contract=contract, dtype=dtype)
            target = load_replica(model, here, which="base" if model.target is None else "target")
            total = sum(share.units[number].num_tokens for number in share.numbers)
            with _bar(total, here, show=progress) as bar:
                _run(
                    target, adapter, share, into, tally, dtype=dtype, tokens_per_row=tokens_per_row, progress=bar.update
                )
        tally.warn()
        record: dict[str, Any] = {"run": run, "units": len(units), **_together(tally, here)}
        if here.first:
            remove_leftovers(out, finished=run)
            if not plain:
                record["layers"] = finish_cache(out)
        record["seconds"] = time.perf_counter() - started
        return {**record, "first_rank": here.first}


def _bar(total: int, here: Ranks, *, show: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=total,
        desc="collect" if here.world == 1 else f"collect, rank 1 of {here.world}",
        unit=" tokens",
        unit_scale=True,
        disable=not (show and here.first),
    )


def _run(
    target: PreTrainedModel,
    adapter: str | Path | None,
    share: Share,
    into: Callable[..., Sink],
    tally: Tally,
    *,
    dtype: str,
    tokens_per_row: int,
    progress: Callable[[int], object],
) -> None:
    """Run the target over a rank's units, each into a sink of its own."""
    arch = archs.find(target)
    fuse(target)
    contexts = (ids for number in share.numbers for ids in share.units[number].contexts if len(ids))
    check_model(target, arch, list(islice(contexts, 4)))
    wearing: AbstractContextManager[None] = (
        as_target(target) if adapter is None else as_oracle(load_adapter(target, adapter))
    )
    started = time.perf_counter()
    with wearing, Handover(dtype=dtype) as handover:
        for number in share.numbers:
            unit = share.units[number]
            rows = collected(target, arch, unit.contexts, unit.wanted, tokens_per_row=tokens_per_row, progress=progress)
            hand_over(rows, into(number=number, unit=unit, width=arch.d_model), handover, tally)
            tally.tokens += unit.num_tokens
    tally.writer_seconds = handover.blocked_seconds
    tally.collect_seconds = time.perf_counter() - started


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
    """Those of them in which forwards waited for sinks."""
    alike: dict[int, Alike] = field(default_factory=dict)
    """By layer."""

    def warn(self) -> None:
        """Tell of layers whose vectors are all alike."""
        for layer, seen in sorted(self.alike.items()):
            rows, least = seen.found()
            if rows > 1 and least > ALIKE:
                log.warning(
                    "layer %d: its %d rows are all alike (least cosine %.6f); the target gives the same vector whatever it "
                    "reads, so nothing can be learnt from it",
                    layer, rows, least,
                )  # fmt: skip


def hand_over(
    rows: Iterable[list[tuple[int, np.ndarray, torch.Tensor]]], sink: Sink, handover: Handover, tally: Tally
) -> None:
    """Hand what `ao.residuals.collected` gives of a unit to its sink, which finishes behind it."""
    for layer, indices, resid_KD in chain.from_iterable(rows):
        norms_K = resid_KD.float().norm(dim=1)
        tally.alike.setdefault(layer, Alike()).see(resid_KD, norms_K)
        handover.give(sink, layer, indices, resid_KD, norms_K)
        tally.rows += len(indices)
    handover.finish(sink)


class Alike:
    """Whether the vectors of a layer are all alike; those of which some value is not finite are not looked at.

    All is kept where the vectors are, so that seeing more of them waits for nothing.
    """

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._least: torch.Tensor | None = None

    def see(self, resid_KD: torch.Tensor, norms_K: torch.Tensor) -> None:
        """Compare vectors [K, D] of these norms [K] with the first one of the layer."""
        if not len(resid_KD):
            return
        fine_K = norms_K.isfinite()
        unit_KD = torch.where(fine_K[:, None], resid_KD.float() / norms_K.clamp_min(1e-12)[:, None], 0)
        first_D = unit_KD.index_select(0, fine_K.byte().argmax().view(1))[0]
        if self._first is None or self._rows is None or self._least is None:
            self._first, self._rows, self._least = first_D, fine_K.sum(), norms_K.new_ones(())
        else:
            self._first = torch.where(self._rows > 0, self._first, first_D)
            self._rows = self._rows + fine_K.sum()
        # Zero vectors have no direction, but they are alike.
        is_some_K = (unit_KD != 0).any(dim=1) | (self._first != 0).any()
        cosines_K = torch.where(fine_K & is_some_K, unit_KD @ self._first, 1)
        self._least = torch.minimum(self._least, cosines_K.min())

    def found(self) -> tuple[int, float]:
        """How many vectors were compared, and their least cosine with the first."""
        if self._rows is None or self._least is None:
            return 0, 1.0
        return int(self._rows.item()), self._least.item()


def _together(tally: Tally, here: Ranks) -> dict[str, Any]:
    """The counts of all ranks, added up, and the seconds of the slowest; behind this every rank has finished."""
    of_ranks = torch.zeros(here.world, 5, dtype=torch.float64)
    own = [tally.units_before, tally.rows, tally.tokens, tally.collect_seconds, tally.writer_seconds]
    of_ranks[here.rank] = torch.tensor(own, dtype=torch.float64)
    each = here.sum_(of_ranks).tolist()
    units_before, rows, tokens, *_ = map(int, map(sum, zip(*each, strict=True)))
    *_, collect_seconds, writer_seconds = max(each, key=lambda counts: counts[3])
    return {
        "units_before": units_before,
        "rows": rows,
        "tokens": tokens,
        "collect_seconds": collect_seconds,
        "writer_seconds": writer_seconds,
        "tokens_per_second": tokens / collect_seconds if collect_seconds else 0.0,
    }


def summary_text(out: str | Path, record: Mapping[str, Any]) -> str:
    """What was collected or imported, as a person wants to read it."""
    lines = [f"{out}: nothing was missing"]
    if record["rows"] and "tokens" not in record:
        lines = [f"{out}: {record['rows']:,} rows imported, {record['seconds']:.1f} s"]
        if record["difference"]:
            lines.append(f"  rows read after the same ids differ by up to {record['difference']:.2g} of their norm")
    elif record["rows"]:
        collecting = record["collect_seconds"]
        # Of less, the share is chance.
        is_long = collecting >= SHARE_SECONDS
        share = f", {record['writer_seconds'] / collecting:.1%} of them waiting for the disk" if is_long else ""
        lines = [
            f"{out}: {record['rows']:,} rows of {record['tokens']:,} context tokens, {record['seconds']:.1f} s; "
            f"{record['tokens_per_second']:,.0f} tokens/s in {collecting:.1f} s of collecting{share}"
        ]
    for layer, of in record.get("layers", {}).items():
        norms = f"norms {of['mean']:.4g}, median {of['quantiles']['0.5']:.4g}" if "mean" in of else "none finite"
        bad = f", {of['not_finite']:,} not finite" if of["not_finite"] else ""
        lines.append(f"  layer {layer:>3}  {of['rows']:>11,} rows   {norms}{bad}")
    return "\n".join(lines)
