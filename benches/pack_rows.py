"""Rows of a token budget from bare lengths: a million of them, ours against LightBinPack and seqpacker.

Lengths as measured on a mixture like the paper's: mean 89, median 76, 99 % below 385, at most 512. Each packer runs in a
process of its own, gets the lengths in the form it likes best, and is judged by a result that was proved valid: every
example in exactly one row, no row above its budget. `fill` is tokens over rows times budget.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import corpus
import measure

BUDGETS = (2048, 4096, 8192, 16384)
WINDOW = 4096
PACKERS = ("ours", "ours_in_order", "lightbinpack", "seqpacker")

Rows = tuple[np.ndarray, np.ndarray]
"""The examples row after row, and where each row begins, the end of the last one behind."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--lengths", type=int, help="how many; 1,000,000, or 50,000 with --quick")
    args = parser.parse_args()
    args.lengths = args.lengths or (50_000 if args.quick else 1_000_000)
    repeats = 2 if args.quick else 7
    if args.child:
        print(json.dumps(run_packer(args.child, drawn(args.lengths), repeats)))
        return
    found = {
        name: measure.child(__file__, "--child", name, "--lengths", args.lengths, *["--quick"] * args.quick)
        for name in PACKERS
    }
    measure.tell([row for budget in BUDGETS for row in rows_of(budget, args.lengths, found)], as_json=args.json)


def rows_of(budget: int, count: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Time and fill at one budget, over all examples and in arrival order."""
    of = {name: each[str(budget)] for name, each in found.items()}
    peers = {name: each for name, each in of.items() if not name.startswith("ours")}
    made = []
    for ours, order in (("ours", "all at once"), ("ours_in_order", f"arrival order within {WINDOW}")):
        mine = of[ours]
        name = "pack_rows" if ours == "ours" else "pack_rows_in_order"
        times = {peer: each["milliseconds"] for peer, each in peers.items()}
        spread = "; ".join(f"{each} {run['note']}" for each, run in (("ours", mine), *peers.items()))
        note = f"{count} lengths, {order}; medians, {spread}"
        made.append(
            measure.row(f"{name}/{budget}", "ms", mine["milliseconds"], peers=times, more_is_better=False, note=note)
        )
        fills = {peer: 100 * each["fill"] for peer, each in peers.items()}
        made.append(
            measure.row(f"{name}/{budget}/fill", "%", 100 * mine["fill"], peers=fills, more_is_better=True, note="")
        )
    return made


def drawn(count: int) -> np.ndarray:
    """Lengths with the mean, median, 99th percentile and maximum that were measured, int32 [count]."""
    random = np.random.default_rng(0)
    short = random.lognormal(np.log(74.5), 0.35, count)
    long = random.lognormal(np.log(232), 0.5, count)
    lengths = np.where(random.random(count) < 0.062, long, short)
    return np.clip(lengths, 20, 512).astype(np.int32)


def run_packer(name: str, lengths: np.ndarray, repeats: int) -> dict[str, Any]:
    """Fill and median milliseconds at every budget, the result proved each time before the next is timed."""
    prepared, pack, rows, note = packer(name, lengths)
    found = {}
    for budget in BUDGETS:
        order, offsets = rows(pack(prepared, budget))
        require_valid(lengths, order, offsets, budget)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            pack(prepared, budget)
            times.append(1e3 * (time.perf_counter() - started))
        fill = float(lengths.sum() / ((len(offsets) - 1) * budget))
        note_and_times = f"{note}, {measure.median_and_spread(times)} ms"
        found[budget] = {"milliseconds": statistics.median(times), "fill": fill, "note": note_and_times}
    return found


def packer(name: str, lengths: np.ndarray) -> tuple[Any, Callable[[Any, int], Any], Callable[[Any], Rows], str]:
    """The lengths as a packer wants them, the packer, what makes rows of its result, and a note."""
    if name.startswith("ours"):
        from ao._ao import pack_rows

        window = WINDOW if name == "ours_in_order" else None
        as_rows = lambda found: (np.asarray(found[0]), np.asarray(found[1]))  # noqa: E731
        return lengths, lambda given, budget: pack_rows(given, budget, window=window), as_rows, "NumPy in, buffers out"
    if name == "lightbinpack":
        sys.path.insert(0, str(corpus.peer("lightbinpack==0.1.1")))
        from lightbinpack import obfd

        def from_lists(found: list[list[int]]) -> Rows:
            offsets = np.cumsum([0, *map(len, found)])
            return np.fromiter((item for row in found for item in row), np.int64, count=offsets[-1]), offsets

        return lengths.tolist(), lambda given, budget: obfd(given, budget), from_lists, "obfd, list in, lists out"
    sys.path.insert(0, str(corpus.peer("seqpacker==0.1.3")))
    from seqpacker import Packer

    def from_flat(found: Rows) -> Rows:
        order, splits = found
        ends = splits if splits[-1] == len(order) else [*splits, len(order)]
        return order, np.asarray(ends if ends[0] == 0 else [0, *ends])

    pack = lambda given, budget: Packer(capacity=budget, strategy="obfd").pack_flat(given)  # noqa: E731
    return lengths.astype(np.int64), pack, from_flat, "obfd, NumPy in, NumPy out"


def require_valid(lengths: np.ndarray, order: np.ndarray, offsets: np.ndarray, budget: int) -> None:
    """Stop unless every example is in exactly one row and no row is above its budget."""
    if not np.array_equal(np.bincount(order, minlength=len(lengths)), np.ones(len(lengths), np.int64)):
        raise SystemExit("an example is in no row or in several")
    if offsets[0] != 0 or offsets[-1] != len(order):
        raise SystemExit(f"rows from {offsets[0]} to {offsets[-1]} of {len(order)} examples")
    if (most := np.add.reduceat(lengths[order], offsets[:-1]).max()) > budget:
        raise SystemExit(f"a row of {most} tokens with a budget of {budget}")


if __name__ == "__main__":
    main()
