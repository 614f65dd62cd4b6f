"""The processes of `train_throughput.py`: each builds a model for one way of training and does what it is asked.

Questions and answers are lines of JSON; the first line that comes is the setting, and the first answer is about the model.
"""

from __future__ import annotations

import json
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import measure
from ao.batch import rows_of
from ao.config import TrainConfig
from ao.distributed import Ranks, launch, ranks
from ao.models import arch as archs
from ao.models.fused import fuse
from ao.models.split import connect, device_map, devices_of, visible
from ao.shards import Datapoint
from ao.training.lookahead import LookAhead, looked_ahead
from ao.training.meter import PEAK_FLOPS
from ao.training.step import Learner, Underway, settled
from examples import PER_STEP, Setting, drawn, long_example
from recipe import Recipe
from shapes import SHAPES, built

RATE = 1e-4


def main() -> None:
    """Answer the first process's questions, in as many processes as the way has ranks."""
    way, setting = sys.argv[1], Setting(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(setting.threads)
    if way == "ours" and setting.ranks > 1:
        launch(serve, way, setting, processes=setting.ranks)
    else:
        serve(way, setting)


def serve(way: str, setting: Setting) -> None:
    """What a rank does: build, then do what is asked until nothing more is."""
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def asked(here: Ranks) -> dict[str, Any] | None:
        question = [json.loads(sys.stdin.readline() or "null") if here.first else None]
        if here.world > 1:
            torch.distributed.broadcast_object_list(question)
        return question[0]

    def answer(here: Ranks, what: dict[str, Any]) -> None:
        if here.first:
            print(json.dumps(what), file=answers, flush=True)

    with ranks(torch.device("cuda:0" if torch.cuda.is_available() else "cpu")) as here:
        if way == "ours" and here.device.type == "cuda" and setting.cap is not None:
            share = setting.cap * 2**30 / torch.cuda.get_device_properties(here.device).total_memory
            torch.cuda.set_per_process_memory_fraction(share, here.device)
        made = (Ours if way == "ours" else Card)(setting, here)
        answer(here, made.about)
        while (question := asked(here)) is not None:
            answer(here, getattr(made, question.pop("do"))(**question))


class Way:
    """What both ways have in common: the model, the questions, the counting of memory."""

    named_parameters: Any
    """Of the model with its adapter."""

    def __init__(self, setting: Setting, here: Ranks) -> None:
        self.setting, self.here = setting, here
        precision = setting.residency if isinstance(self, Ours) else setting.precision
        self.model: Any = built(SHAPES[setting.shape].settings, precision, here.device)
        if isinstance(self, Ours) and setting.split:
            for name, device in device_map(self.model.config, visible()).items():
                self.model.get_submodule(name).to(device)
            connect(self.model)
        self.devices = devices_of(self.model)
        self.arch = archs.find(self.model)
        linear_parameters = archs.linear_weights(self.arch)
        peak_flops, peak_from = peak_of(here.device, setting.threads)
        self.about: dict[str, Any] = {
            "linear_parameters": linear_parameters,
            "parameters": linear_parameters + self.arch.vocab * self.arch.d_model,
            "blocks": self.arch.num_layers,
            "where": where(here.device),
            "devices": here.world * len(self.devices) if here.device.type == "cuda" else 1,
            "peak_flops": peak_flops,
            "peak_from": peak_from,
        }
        self.start_counting()

    def start_counting(self) -> None:
        """Memory counts from here."""
        if self.here.device.type == "cuda":
            torch.cuda.empty_cache()
            for device in self.devices:
                torch.cuda.reset_peak_memory_stats(device)
            self._before = max(map(torch.cuda.memory_allocated, self.devices))
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
            self._before = measure.rss_bytes()

    def memory(self) -> dict[str, float]:
        """Greatest memory of this process, on one device, and how much of it came after the model was built."""
        on_gpu = self.here.device.type == "cuda"
        peak = max(map(torch.cuda.max_memory_allocated, self.devices)) if on_gpu else measure.peak_rss_bytes()
        return {"peak": peak, "over_model": peak - self._before}

    def gradient(self, to: str, *, by_length: bool = False) -> dict[str, Any]:
        """Loss of the first step without dropout; its gradient goes to a file, by block and linear.

        Args:
            to: the file.
            by_length: examples in the order of their lengths, so that other ones share a micro-batch.
        """
        dropouts = {module: module.p for module in self.model.modules() if isinstance(module, nn.Dropout)}
        for module in dropouts:
            module.p = 0.0
        points = drawn(self.setting, 1)[0]
        loss = self.backward(sorted(points, key=lambda point: len(point.context_ids)) if by_length else points)
        for module, p in dropouts.items():
            module.p = p
        if self.here.first:
            gradients = {key: each.grad.float().cpu().contiguous() for key, each in self.adapter().items()}
            save_file(gradients, to)
        return {"loss": loss}

    def adapter(self) -> dict[str, Any]:
        """The adapter's parameters by block and linear, whatever the adapter is called."""
        found = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                match = re.search(r"layers\.(\d+\..+\.lora_[AB])", name)
                if match is None:
                    raise SystemExit(f"{name}: trained, but no LoRA of a block")
                found[match[1]] = parameter
        return found

    def fill_adapter(self) -> None:
        """The same numbers for both ways, B's too: while it is zero, A has no gradient."""
        with torch.no_grad():
            for key, parameter in self.adapter().items():
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                scale = parameter.shape[1] ** -0.5 if key.endswith("A") else 0.01
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def finish(self) -> None:
        """Wait for the device."""
        if self.here.device.type == "cuda":
            torch.cuda.synchronize()

    def backward(self, points: Sequence[Datapoint]) -> float:
        """Leave the step's gradient in the parameters; returns the loss."""
        raise NotImplementedError


class Card(Way):
    """The published card's way."""

    def __init__(self, setting: Setting, here: Ranks) -> None:
        super().__init__(setting, here)
        self.recipe = Recipe(self.model, dropout=setting.dropout, rate=RATE)
        self.named_parameters = self.recipe.model.named_parameters
        self.about["recompute"] = 1.0
        self.fill_adapter()

    def backward(self, points: Sequence[Datapoint]) -> float:
        return self.recipe.backward(points)

    def gradient(self, to: str, *, by_length: bool = False) -> dict[str, Any]:
        answer = super().gradient(to, by_length=by_length)
        self.recipe.optimizer.zero_grad()
        return answer

    def turn(self, first: int, steps: int) -> dict[str, float]:
        """Seconds of some steps."""
        data = drawn(self.setting, first + steps)[first:]
        self.finish()
        started, cpu = time.perf_counter(), measure.cpu_seconds()
        for points in data:
            self.recipe.step(points)
        self.finish()
        return {"seconds": time.perf_counter() - started, "cpu_seconds": measure.cpu_seconds() - cpu}


class Ours(Way):
    """This package's way."""

    def __init__(self, setting: Setting, here: Ranks) -> None:
        super().__init__(setting, here)
        fuse(self.model, compiled=setting.compile)
        self.config = TrainConfig(
            learning_rate=RATE,
            optimizer=setting.optimizer,
            dropout=setting.dropout,
            tokens_per_row=setting.tokens_per_row,
            context_tokens_per_row=setting.tokens_per_row,
            recompute=setting.recompute,
            compile=setting.compile,
        )
        self.learner = Learner.of(self.model, self.config, here)
        self.named_parameters = self.model.named_parameters
        self.about["recompute"] = self.learner.recompute.blocks(PER_STEP * 72) / self.arch.num_layers
        self.losses: list[float] = []
        """Of the steps timed last."""
        self.fill_adapter()

    def backward(self, points: Sequence[Datapoint]) -> float:
        mine = self.mine(points)
        with self.learner.ready():
            loss_sum, answer_tokens, *_ = self.learner.backward(
                self.rows(mine), self.look_ahead(mine).vectors()
            ).tolist()
        return loss_sum / answer_tokens

    def turn(self, first: int, steps: int) -> dict[str, float]:
        """Seconds of some steps, those of them that waited for the target, and those before a step's rows were there."""
        return self.timed(drawn(self.setting, first + steps)[first:])

    def timed(self, data: Sequence[Sequence[Datapoint]]) -> dict[str, float]:
        """The same of these steps; leaves their losses in `losses`."""
        data = [self.mine(points) for points in data]
        windows = [data[begin : begin + self.config.window] for begin in range(0, len(data), self.config.window)]
        waits: dict[str, float] = {}

        @contextmanager
        def timing(what: str) -> Iterator[None]:
            clock = time.perf_counter()
            yield
            waits[what] += time.perf_counter() - clock

        def looking(window: Sequence[Sequence[Datapoint]]) -> LookAhead:
            points = [point for points in window for point in points]
            return self.look_ahead(points, stream=self.learner.aside, timing=partial(timing, "collecting"))

        def launched() -> Iterator[tuple[int, Underway]]:
            # The last one's steps were made at first.
            for window, vectors, advance in islice(chain([begun], ahead), len(windows)):
                for done, points in enumerate(window):
                    advance()
                    with timing("data_wait"):
                        rows = self.rows(points)
                    yield done, self.learner.step(rows, vectors, RATE)
            next(ahead)

        # Of the first window contexts are run before the clock starts, and behind the last one once more: in a long run each
        # window's are run while the steps of the one before it are made.
        ahead = looked_ahead(iter([*windows, windows[0]]), looking)
        with self.learner.ready():
            waits.update(collecting=0.0, data_wait=0.0)
            begun = next(ahead)
            self.finish()
            started, cpu = time.perf_counter(), measure.cpu_seconds()
            waits.update(collecting=0.0, data_wait=0.0)
            results = settled(launched(), lambda _: False, runs_ahead=self.learner.runs_ahead)
            self.losses = [result.loss for _, result in results]
        self.finish()
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": measure.cpu_seconds() - cpu,
            **waits,
        }

    def long(self, what: str, tokens: int) -> dict[str, float]:
        """Memory of a step over one long example, above the built model's."""
        points = [long_example(self.setting, what, tokens)]
        with self.learner.ready():
            self.learner.step(self.rows(points), self.look_ahead(points).vectors(), RATE).result()
        return self.memory()

    def mine(self, points: Sequence[Datapoint]) -> list[Datapoint]:
        """This rank's share of a step: the longest examples are dealt out first, to and fro."""
        order = sorted(range(len(points)), key=lambda index: -len(points[index].input_ids))
        rank, world = self.here.rank, self.here.world
        taken = {index for place, index in enumerate(order) if rank == _dealt(place, world)}
        return [point for index, point in enumerate(points) if index in taken]

    def rows(self, points: Sequence[Datapoint]) -> list[list[Datapoint]]:
        """A step's examples in rows of the token budget."""
        lengths = [len(point.input_ids) for point in points]
        found = rows_of(lengths, tokens_per_row=self.config.tokens_per_row, packed=self.arch.attention_only)
        return [[points[index] for index in row] for row in found]

    def look_ahead(self, points: Sequence[Datapoint], **settings: Any) -> LookAhead:
        """The vectors of some examples, by id, when they are asked for."""
        return LookAhead(self.model, self.arch, points, self.config, **settings)


def _dealt(place: int, world: int) -> int:
    """To whom the card at this place goes when the direction of dealing turns with each round."""
    turn, seat = divmod(place, world)
    return seat if turn % 2 == 0 else world - 1 - seat


def where(device: torch.device) -> str:
    """The device, for people."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def peak_of(device: torch.device, threads: int) -> tuple[float, str]:
    """Operations a second that the device can do, a CPU with so many threads, and where the figure is from."""
    if device.type == "cuda":
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return flops, "dense bf16, data sheet"
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(width, width, dtype=kind, device=device)
    best, before = float("inf"), torch.get_num_threads()
    torch.set_num_threads(threads)
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * width**3 / best, f"measured on a product of {width}"


if __name__ == "__main__":
    main()
