"""Context tokens a second through a target with random weights, without and with the cache's writer.

A shape is built by name, block by block on its device, with random weights: only its speed means anything. `small` keeps
the cores of a laptop busy; `gemma-4-31b` is that model's whole text tower in NF4 and needs a GPU of 40 GB. Every position
is kept at three layers, which is the most that the writer can be asked for; `ao collect` keeps about a quarter of that.
What the cache gives back is compared with what the hooks read before anything is timed.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import corpus
import measure
from ao.cache import ActivationCache
from ao.collect.missing import remaining
from ao.collect.run import Alike
from ao.collect.sinks import CacheSink
from ao.collect.wanted import UNIT_TOKENS, every_position
from ao.models import arch as archs
from ao.models.adapters import as_target
from ao.models.load import DTYPES, fuse_norms
from ao.residuals import collected
from shapes import SHAPES, built

TOKENS_PER_ROW = 8192


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
    fuse_norms(model)
    contexts = drawn(args.tokens or shape.tokens // (10 if args.quick else 1), vocab=model.config.vocab_size)
    with tempfile.TemporaryDirectory(dir=corpus.cache_folder(), prefix=".collect-") as folder, as_target(model):
        passes = Passes(model, shape.layers, Path(folder))
        passes.prove(contexts[:20])
        without, with_writer, shares = [], [], []
        for _ in range(2 if args.quick else 3):
            seconds, _ = passes.run(contexts)
            without.append(passes.tokens / seconds)
            seconds, writer_seconds = passes.run(contexts, write=True)
            with_writer.append(passes.tokens / seconds)
            shares.append(100 * writer_seconds / seconds)
    width, blocks = shape.settings["hidden_size"], shape.settings["num_hidden_layers"]
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    about = (
        f"random weights, {blocks} blocks of {width}, {precision}, {where}; {passes.tokens:,} tokens, every position at "
        f"layers {shape.layers}, {passes.gigabytes:.2g} GB a pass, passes in turns"
    )
    ratio = 1 - statistics.median(with_writer) / statistics.median(without)
    rows = [
        measure.row(
            f"collect/{args.shape}", "tokens/s", statistics.median(with_writer), more_is_better=True,
            peers={"without_writer": statistics.median(without)},
            note=f"{about}; with the writer {measure.median_and_spread(with_writer)}, without "
            f"{measure.median_and_spread(without)}",
        ),
        measure.row(
            f"collect/{args.shape}/writer_share", "%", statistics.median(shares), more_is_better=False,
            note=f"of a pass's time inside the writer; target at most 3; by tokens/s the pass lost {ratio:.1%}",
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

    def run(
        self, contexts: Sequence[np.ndarray], *, write: bool = False, keep: dict[int, list[Any]] | None = None
    ) -> tuple[float, float]:
        """Seconds of a pass, and those of them that were spent in the writer; `keep` gets what was read, by layer."""
        self.tokens = sum(map(len, contexts))
        self.gigabytes = self.tokens * len(self.layers) * self.arch.d_model * 2 / 1e9
        alike = {layer: Alike() for layer in self.layers}
        writer_seconds = 0.0
        units = list(remaining(every_position(contexts, self.layers, unit_tokens=UNIT_TOKENS // 4), None).units)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started = time.perf_counter()
            for number, unit in enumerate(units):
                clock = time.perf_counter()
                out = Path(folder)
                sink = (
                    CacheSink(out, "bench", number, {}, unit, dtype="BF16", width=self.arch.d_model) if write else None
                )
                writer_seconds += time.perf_counter() - clock
                for layer, indices, resid_KD in collected(
                    self.model, self.arch, unit.contexts, unit.wanted, tokens_per_row=TOKENS_PER_ROW
                ):
                    norms_K = resid_KD.float().norm(dim=1)
                    alike[layer].see(resid_KD, norms_K)  # waits for the device, so the writer is not charged for it
                    rows_KD = resid_KD.to(torch.bfloat16).contiguous()
                    clock = time.perf_counter()
                    if sink is not None:
                        sink.append(layer, indices, norms_K.cpu(), rows_KD.cpu())
                    writer_seconds += time.perf_counter() - clock
                    if keep is not None:
                        keep.setdefault(layer, []).append((unit.keys()[indices], rows_KD.cpu()))
                clock = time.perf_counter()
                if sink is not None:
                    sink.finish()
                writer_seconds += time.perf_counter() - clock
            seconds = time.perf_counter() - started
            if keep is not None:
                require_equal(ActivationCache.open(folder), keep)
        return seconds, writer_seconds

    def prove(self, contexts: Sequence[np.ndarray]) -> None:
        """Stop unless the cache gives back what was read; the model is warm behind this."""
        self.run(contexts, write=True, keep={})


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
