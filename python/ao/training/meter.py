"""What a run's time goes to: rates, model FLOPs, waiting, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ao.memory import peak_rss_bytes
from ao.models.arch import Arch, linear_weights
from ao.training.step import StepResult

T = TypeVar("T")

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 FLOP/s that the makers' data sheets state, by a part of the device's name; of other devices no share is told."""


class Meter:
    """Adds up what steps do, for the log and for the record.

    MFU counts 4 N FLOPs a trained token, N the weights of the blocks' linears: forward, and backward to the inputs, as the
    weights are frozen. HFU adds what is run beside that: 2 N where the backward pass recomputes, and the target's blocks
    for its context tokens.
    """

    def __init__(self, arch: Arch, target: Arch, *, deepest: int, devices: Sequence[torch.device]) -> None:
        self._per_token = 4 * linear_weights(arch)
        self._beside = (2 * linear_weights(arch), 2 * linear_weights(target, upto=deepest))
        self._devices = devices
        name = torch.cuda.get_device_name(devices[0]) if devices[0].type == "cuda" else ""
        self._peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        self.seconds = {"total": 0.0, "target": 0.0, "data": 0.0, "eval": 0.0, "save": 0.0}
        self.counts = {
            **dict.fromkeys(("examples", "input_tokens", "answer_tokens", "context_tokens", "skipped_steps"), 0),
            "recomputed_tokens": 0.0,
        }
        self._contexts = 0
        self._clock = time.perf_counter()
        self._last = self._now()

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """What happens inside is a part of the run's seconds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The items; the wait for each counts as data."""
        while True:
            with self.timing("data"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def add_contexts(self, tokens: int) -> None:
        """This rank has run context tokens through the target, which the next step's result counts."""
        self._contexts += tokens

    def take_contexts(self) -> int:
        """Context tokens that no step has counted, which one does now."""
        tokens, self._contexts = self._contexts, 0
        return tokens

    def step(self, result: StepResult) -> None:
        """A step is done."""
        self.counts["recomputed_tokens"] += round(result.recomputed_tokens, 3)
        for name in ("examples", "input_tokens", "answer_tokens", "context_tokens"):
            self.counts[name] += getattr(result, name)
        self.counts["skipped_steps"] += result.skipped

    def line(self, *, ranks: int) -> dict[str, Any]:
        """Rates since the last line. FLOPs are those of one device."""
        now = self._now()
        did = {name: now[name] - self._last[name] for name in now}
        self._last = now
        seconds = max(did["total"], 1e-9)
        # Of a split base each device does its part.
        share = 1 / len(self._devices)
        trained = share * self._per_token * did["input_tokens"] / ranks
        beside = self._beside[0] * did["recomputed_tokens"] + self._beside[1] * did["context_tokens"]
        beside *= share / ranks
        line = {
            "examples_per_second": did["examples"] / seconds,
            "tokens_per_second": did["input_tokens"] / seconds,
            "context_tokens_per_second": did["context_tokens"] / seconds,
            "tflops": trained / seconds / 1e12,
            "mfu": None if self._peak is None else trained / seconds / self._peak,
            "hfu": None if self._peak is None else (trained + beside) / seconds / self._peak,
            "target_share": did["target"] / seconds,
            "data_wait": did["data"] / seconds,
            "peak_memory_bytes": self._peak_memory(),
        }
        return {name: value if value is None else float(f"{value:.5g}") for name, value in line.items()}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint counted."""
        self.seconds.update(saved["seconds"])
        self.counts.update(saved["counts"])
        self._last = self._now()

    def state(self) -> dict[str, Any]:
        """For a checkpoint and the record."""
        self._now()
        return {"seconds": dict(self.seconds), "counts": dict(self.counts)}

    def _now(self) -> dict[str, float]:
        clock = time.perf_counter()
        self.seconds["total"] += clock - self._clock
        self._clock = clock
        return {**self.seconds, **self.counts}

    def _peak_memory(self) -> int:
        if self._devices[0].type == "cuda":
            return max(map(torch.cuda.max_memory_allocated, self._devices))
        return peak_rss_bytes()
