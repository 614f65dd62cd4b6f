"""Context tokens a second through a target with random weights, without and with the cache's writer.

A shape is built by name, block by block on its device, with random weights: only its speed means anything. `small` keeps
the cores of a laptop busy; `gemma-4-31b` is that model's whole text tower in NF4 and needs a GPU of 40 GB. Kept is, at
three layers, a quarter of the positions, as `ao collect` does of a data set, or every one, the most that the writer can be
asked for. What the cache gives back is compared with what the hooks read before anything is timed.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import corpus
import measure
from ao.cache import ActivationCache
from ao.collect.handover import Handover
from ao.collect.missing import remaining
from ao.collect.run import Tally, hand_over
from ao.collect.sinks import CacheSink
from ao.collect.wanted import UNIT_TOKENS, Unit, every_position
from ao.models import arch as archs
from ao.models.adapters import as_target
from ao.models.fused import fuse
from ao.models.load import DTYPES
from ao.residuals import collected
from shapes import SHAPES, built

TOKENS_PER_ROW = 8192
QUARTER = 0.25
"""Share of the positions that the examples of a data set read, about."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="what is built")
    parser.add_argument("--precision", choices=DTYPES, help="another one than the shape's")
    parser.add_argument("--tokens", type=int, help="context tokens of a pass; a tenth with --quick")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = SHAPES[args.shape]
    on_gpu = torch.cuda.is_available()
    if args.shape == "gemma-4-31b" and not on_gpu:
        raise SystemExit(f"--shape {args.shape} needs a GPU of 40 GB, and torch sees none; take --shape small")
    precision = args.precision or shape.precision
    model = built(shape.settings, precision, torch.device("cuda" if on_gpu else "cpu"))
    fuse(model)
    contexts = drawn(args.tokens or shape.tokens // (10 if args.quick else 1), vocab=model.config.vocab_size)
    shares = {"wanted": QUARTER, "all": 1.0}
    speed: dict[str, list[float]] = {name: [] for name in ("without", *shares)}
    blocked: dict[str, list[float]] = {name: [] for name in shares}
    gigabytes = {}
    with tempfile.TemporaryDirectory(dir=corpus.cache_folder(), prefix=".collect-") as folder, as_target(model):
        passes = Passes(model, shape.layers, Path(folder))
        passes.prove(contexts[:20])
        for _ in range(2 if args.quick else 3):
            seconds, _ = passes.run(contexts, keep=QUARTER, write=False)
            speed["without"].append(passes.tokens / seconds)
            for name, share in shares.items():
                seconds, waited = passes.run(contexts, keep=share, write=True)
                speed[name].append(passes.tokens / seconds)
                blocked[name].append(100 * waited / seconds)
                gigabytes[name] = passes.gigabytes
    width, blocks = shape.settings["hidden_size"], shape.settings["num_hidden_layers"]
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    about = (
        f"random weights, {blocks} blocks of {width}, {precision}, {where}; {passes.tokens:,} tokens, layers "
        f"{shape.layers}, passes in turns"
    )
    without = statistics.median(speed["without"])
    rows = []
    for name in shares:
        here = statistics.median(speed[name])
        of = "a quarter of the positions" if name == "wanted" else "every position"
        rows += [
            measure.row(
                f"collect/{args.shape}/{name}", "tokens/s", here, more_is_better=True, peers={"without_writer": without},
                note=f"{about}; {of}, {gigabytes[name]:.2g} GB a pass; with the writer "
                f"{measure.median_and_spread(speed[name])}, without {measure.median_and_spread(speed['without'])}",
            ),
            measure.row(
                f"collect/{args.shape}/{name}/writer_share", "%", 100 * (1 - here / without), more_is_better=False,
                note="of the tokens a second of a pass without statistics, copies and writer; target at most 3; forwards "
                f"waited for the writer {measure.median_and_spread(blocked[name])} % of the time",
            ),
        ]  # fmt: skip
    measure.tell(rows, as_json=args.json)


def drawn(tokens: int, *, vocab: int) -> list[np.ndarray]:
    """Contexts of random ids, as long as a mixture's: median 120, at most 512."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(120), 0.6, size=tokens), 16, 512).astype(int)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), tokens)]
    return [random.integers(3, vocab, size=length, dtype=np.int32) for length in lengths]


class Passes:
    """Passes over contexts, as `ao collect` makes them."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], folder: Path) -> None:
        self.model, self.layers, self.folder = model, layers, folder
        self.arch = archs.find(model)
        self.tokens = 0
        """Of the latest pass."""
        self.gigabytes = 0.0
        """Of rows that it kept."""

    def units(self, contexts: Sequence[np.ndarray], keep: float) -> list[Unit]:
        """What is wanted of contexts: a share of the positions, at the end of each, so that all of it is run."""
        units = []
        for unit in remaining(every_position(contexts, self.layers, unit_tokens=UNIT_TOKENS // 4), None).units:
            lengths, of = np.array([len(ids) for ids in unit.contexts]), unit.wanted
            kept = of.positions >= np.floor(lengths[of.contexts] * (1 - keep))
            units.append(unit.only(np.flatnonzero(kept)))
        return units

    def rows(self, unit: Unit) -> Iterator[list[tuple[int, np.ndarray, torch.Tensor]]]:
        """What the target gives of a unit, row by row."""
        return collected(self.model, self.arch, unit.contexts, unit.wanted, tokens_per_row=TOKENS_PER_ROW)

    def run(self, contexts: Sequence[np.ndarray], *, keep: float, write: bool) -> tuple[float, float]:
        """Seconds of a pass, and those of them in which forwards waited for the writer."""
        units = self.units(contexts, keep)
        self.tokens = sum(unit.num_tokens for unit in units)
        self.gigabytes = sum(len(unit.wanted.layers) for unit in units) * self.arch.d_model * 2 / 1e9
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started, waited = time.perf_counter(), 0.0
            if write:
                waited = self.collect(units, Path(folder))
            else:
                for unit in units:
                    for _ in self.rows(unit):
                        pass
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            return time.perf_counter() - started, waited

    def collect(self, units: Sequence[Unit], folder: Path) -> float:
        """Collect units into a cache; seconds in which forwards waited for the writer."""
        tally = Tally()
        with Handover(dtype="BF16") as handover:
            for number, unit in enumerate(units):
                sink = CacheSink(folder, "bench", number, {}, unit, dtype="BF16", width=self.arch.d_model)
                hand_over(self.rows(unit), sink, handover, tally)
        tally.warn()
        return handover.blocked_seconds

    def prove(self, contexts: Sequence[np.ndarray]) -> None:
        """Stop unless the cache gives back what is read with no thread beside; the model is warm behind this."""
        kept: dict[int, list[Any]] = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            units = self.units(contexts, 1.0)
            self.collect(units, Path(folder))
            for unit in units:
                for layer, indices, resid_KD in chain.from_iterable(self.rows(unit)):
                    kept.setdefault(layer, []).append((unit.keys()[indices], resid_KD.to(torch.bfloat16).cpu()))
            require_equal(ActivationCache.open(folder), kept)


def require_equal(cache: ActivationCache, kept: dict[int, list[Any]]) -> None:
    """Stop unless the cache holds exactly these rows under their keys."""
    for layer, parts in kept.items():
        keys = np.concatenate([keys for keys, _ in parts])
        rows_KD = torch.cat([rows_KD for _, rows_KD in parts]).view(torch.int16).numpy().view(np.uint16)
        found = cache.layer(layer).find(keys)
        if len(found) != len(cache.layer(layer)) or not np.array_equal(cache.layer(layer).gather(found), rows_KD):
            raise SystemExit(f"layer {layer}: the cache does not give back what was read")


if __name__ == "__main__":
    main()
