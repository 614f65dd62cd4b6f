"""Seconds a training step on one device and on several of a machine, one replica of the base each, in one run.

Every rank builds the same shape with random weights, as `train_throughput.py` does. First each number of ranks makes the
same steps without dropout from the same adapter, and their losses must agree. Then the numbers take turns on the same steps
with dropout, collecting included. Two more figures say where what is lost goes: one rank alone with its share of a step,
about the best that so many ranks can do, and a reduction of the gradient by itself.

`python benches/train_scaling.py --ranks 1 2` starts its own processes; under torchrun it takes those that are there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import measure
from ao.distributed import Ranks, launch, ranks
from ao.shards import Datapoint
from examples import PER_STEP, Setting, drawn
from shapes import SHAPES
from ways import Ours, where

AIMS = {(2, 16): 1.5, (2, 64): 1.8, (4, 64): 3.5, (8, 64): 6.5}
"""How many times faster so many ranks are to be, by ranks and examples a step."""


@dataclass(frozen=True)
class Some(Ranks):
    """The first ranks of all."""

    group: Any = None

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


class Scaled(Ours):
    """A replica that works alone or with some of the others."""

    def __init__(self, setting: Setting, here: Ranks, counts: Sequence[int]) -> None:
        super().__init__(setting, here)
        self.all = here
        groups = {count: dist.new_group(list(range(count))) for count in counts if count > 1}
        self.some = {count: Some(here.rank, count, here.device, here.local, groups.get(count)) for count in counts}

    def with_ranks(self, count: int, data: Sequence[Sequence[Datapoint]]) -> dict[str, float] | None:
        """The time of these steps from the adapter's beginning on; None on a rank that waited."""
        self.all.wait()
        if self.all.rank >= count:
            return None
        self.here = self.learner.here = self.some[count]
        self.fill_adapter()
        self.learner.optimizer.state.clear()
        return self.timed(data)

    def reduction(self, count: int, repeats: int = 20) -> float:
        """Milliseconds of adding up the gradient."""
        self.all.wait()
        if self.all.rank >= count:
            return 0.0
        gradient = torch.zeros_like(self.learner.gradient)
        for _ in range(3):
            self.some[count].sum_(gradient)
        self.finish()
        started = time.perf_counter()
        for _ in range(repeats):
            self.some[count].sum_(gradient)
        self.finish()
        return 1e3 * (time.perf_counter() - started) / repeats


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="what is built: cpu, or tiny with --quick")
    parser.add_argument("--residency", choices=("nf4", "nf4-dequantized", "bf16", "fp32"), help="not the shape's own")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        help="numbers of ranks; 1, 2, 4 and 8 as far as there are devices; 1 is always among them",
    )
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 64], help="examples a step")
    parser.add_argument("--steps", type=int, help="timed steps of 16 examples a turn; those of 64 are a fourth as many")
    parser.add_argument("--turns", type=int, help="turns of each number of ranks")
    parser.add_argument("--equal-steps", type=int, help="steps whose losses are compared; 50")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the LoRA, while timing")
    parser.add_argument("--tokens-per-row", type=int, help="8192, or 192 on a CPU")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    args.shape = args.shape or ("tiny" if args.quick else "cpu")
    args.steps = args.steps or (2 if args.quick else 24 if on_gpu else 4)
    args.turns = args.turns or (1 if args.quick else 2)
    args.equal_steps = args.equal_steps or (3 if args.quick else 50 if on_gpu else 8)
    world = int(os.environ.get("WORLD_SIZE", "0"))
    counts = measure.rank_counts(args.ranks, world or torch.cuda.device_count() or 2)
    if any(count % PER_STEP for count in args.examples):
        parser.error(f"--examples: expected multiples of {PER_STEP}, got {args.examples}")
    if any(PER_STEP % count for count in counts):
        parser.error(f"--ranks: expected divisors of {PER_STEP}, got {args.ranks}")
    if world and counts[-1] > world:
        parser.error(f"--ranks: at most the {world} of torchrun, got {counts}")
    cores = len(os.sched_getaffinity(0))
    setting = Setting(
        shape=args.shape, residency=args.residency or SHAPES[args.shape].precision, recompute="auto",
        dropout=args.dropout, shared=1, tokens_per_row=args.tokens_per_row or (8192 if on_gpu else 192),
        # A CPU rank alone has no more threads than beside the others: what is measured is one device against several.
        ranks=counts[-1], threads=max(1, cores // counts[-1]), cap=None,
    )  # fmt: skip
    rows = run(setting, args, counts) if world else launch(run, setting, args, counts, processes=counts[-1])
    if rows:
        measure.tell(rows, as_json=args.json)


def run(setting: Setting, args: argparse.Namespace, counts: Sequence[int]) -> list[dict[str, Any]]:
    """The measurements of all ranks; the rows on the first."""
    torch.set_num_threads(setting.threads)
    with ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu")) as here:
        scaled = Scaled(setting, here, counts)
        agreement = require_equal_losses(scaled, counts, args.equal_steps)
        rows = []
        for examples in args.examples:
            rows += timed(scaled, args, counts, examples, agreement)
        return rows if here.first else []


def steps_of(setting: Setting, steps: int, examples: int) -> list[list[Datapoint]]:
    """Drawn steps of so many examples."""
    points = [point for step in drawn(setting, -(-steps * examples // PER_STEP)) for point in step]
    return [points[first : first + examples] for first in range(0, steps * examples, examples)]


def require_equal_losses(scaled: Scaled, counts: Sequence[int], steps: int) -> str:
    """Stop unless each number of ranks gives the same losses without dropout; returns how far they are apart."""
    dropouts = {module: module.p for module in scaled.model.modules() if isinstance(module, nn.Dropout)}
    for module in dropouts:
        module.p = 0.0
    data, losses = steps_of(scaled.setting, steps, PER_STEP), {}
    for count in counts:
        if scaled.with_ranks(count, data) is not None:
            losses[count] = torch.tensor(scaled.losses)
    for module, p in dropouts.items():
        module.p = p
    allowed = 1e-5 if scaled.setting.residency == "fp32" else 1e-2
    gaps = [((losses[count] - losses[1]) / losses[1]).abs().max() for count in losses] if 1 in losses else []
    gap = float(torch.stack(gaps).max()) if gaps else 0.0
    told(
        scaled.all,
        f"losses over {steps} steps",
        {count: [each[0].item(), each[-1].item()] for count, each in losses.items()},
    )
    # Written so that what is not a number fails too.
    if not gap <= allowed:
        raise SystemExit(f"losses differ between numbers of ranks: {gap:.1e} relative, expected at most {allowed}")
    return f"losses of {steps} steps without dropout at most {gap:.1e} apart"


def timed(
    scaled: Scaled, args: argparse.Namespace, counts: Sequence[int], examples: int, agreement: str
) -> list[dict[str, Any]]:
    """Each number of ranks on the same steps, in turns, behind one that is not timed."""
    steps = max(1, args.steps * PER_STEP // examples)
    data = steps_of(scaled.setting, steps, examples)
    shares = {count: steps_of(scaled.setting, steps, examples // count) for count in counts if count > 1}
    took: dict[str, list[float]] = {}
    collecting: dict[str, list[float]] = {}
    for turn in range(args.turns + 1):
        ways = {f"{count}": (count, data) for count in counts} | {
            f"1/{count}": (1, share) for count, share in shares.items()
        }
        for name, (count, chosen) in ways.items():
            result = scaled.with_ranks(count, chosen)
            told(scaled.all, f"{examples} examples, turn {turn}, ranks {name}", result)
            if turn > 0 and result is not None:
                took.setdefault(name, []).append(result["seconds"] / steps)
                collecting.setdefault(name, []).append(result["collecting"] / steps)
    reductions = {count: scaled.reduction(count) for count in counts if count > 1}
    if not scaled.all.first:
        return []
    about = f"{where(scaled.all.device)}, {scaled.setting.residency}, {args.turns} turns of {steps} steps; {agreement}"
    rows = []
    for count in counts:
        seconds, name = statistics.median(took[f"{count}"]), f"scaling/{args.shape}/{examples}/ranks_{count}"
        if count == 1:
            note = f"{about}; collecting {statistics.median(collecting['1']):.3f} of it"
            rows.append(measure.row(name, "s/step", seconds, more_is_better=False, note=note))
            continue
        aim = AIMS.get((count, examples))
        note = (
            f"{measure.median_and_spread(took[str(count)])}, aim {aim or 'none'}; collecting "
            f"{statistics.median(collecting[str(count)]):.3f} of it; one rank alone with its share "
            f"{statistics.median(took[f'1/{count}']):.3f}, a reduction {reductions[count]:.1f} ms"
        )
        alone = {"one_rank": statistics.median(took["1"])}
        rows.append(measure.row(name, "s/step", seconds, peers=alone, more_is_better=False, note=note))
    return rows


def told(here: Ranks, what: str, value: object) -> None:
    """Progress, on stderr."""
    if here.first:
        print(f"{what}: {value}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
