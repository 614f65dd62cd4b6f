"""Rows on their way from the device to a sink, while the forwards that follow them run.

Shapes: K rows, D d_model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from ao.collect.sinks import Sink
from ao.residuals import ROW_TYPES
from ao.transfer import arrival, to_cpu_memory

PENDING_BYTES = 512 * 2**20
"""What may be under way in CPU memory before the forwards wait for the sinks."""


class _Pending(NamedTuple):
    num_bytes: int
    arrived: torch.cuda.Event | None
    """When the rows are in CPU memory."""
    done: Future[None]


class Handover:
    """Hands rows to sinks: the device copies them behind its own work, a thread has the sinks take them, in order.

    Leaving it waits for everything. Whatever ends it early, sinks that have not finished are abandoned.
    """

    def __init__(self, *, dtype: str, pending_bytes: int = PENDING_BYTES) -> None:
        """Hand rows over as `dtype`, BF16, F16 or F32."""
        self.blocked_seconds = 0.0
        """What the forwards have waited for sinks; waiting for the device is not in it."""
        self._dtype = dtype
        self._pending_bytes = pending_bytes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="handover")
        self._pending: deque[_Pending] = deque()
        self._open: list[Sink] = []
        self._has_failed = False

    def __enter__(self) -> Handover:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait(until=-1)
        finally:
            self._pool.shutdown(cancel_futures=True)
            for sink in self._open:
                sink.abandon()

    def give(self, sink: Sink, layer: int, indices: np.ndarray, resid_KD: torch.Tensor, norms_K: torch.Tensor) -> None:
        """Have a sink take rows [K, D] of a layer with their norms [K]: values `indices` [K] of what its unit wants.

        Raises:
            ValueError: a value of these or earlier rows does not fit the type.
        """
        rows_KD = resid_KD.to(ROW_TYPES[self._dtype])
        # Found where the rows are, told where they are taken: asking here would wait for the device.
        lost = resid_KD.new_zeros(())
        if self._dtype == "F16":
            lost = torch.where(rows_KD.isinf() & resid_KD.isfinite(), resid_KD.abs(), 0).max()
        num_bytes = rows_KD.numel() * rows_KD.element_size()
        self._begin(sink)
        self._wait(until=self._pending_bytes - num_bytes)
        here = to_cpu_memory(norms_K), to_cpu_memory(rows_KD), to_cpu_memory(lost)

        def take() -> None:
            norms_K, rows_KD, lost = here
            if lost > 0:
                raise ValueError(
                    f"layer {layer}: values up to {lost.item():.0f} do not fit F16, whose greatest is 65504; use BF16 or F32"
                )
            sink.append(layer, indices, norms_K, rows_KD)

        self._submit(take, num_bytes, rows_KD.device)

    def finish(self, sink: Sink) -> None:
        """Have a sink finish behind the rows that it was given."""
        self._begin(sink)

        def finish() -> None:
            sink.finish()
            self._open.remove(sink)

        self._submit(finish, 0, torch.device("cpu"))

    def _begin(self, sink: Sink) -> None:
        if sink not in self._open:
            self._open.append(sink)

    def _submit(self, work: Callable[[], None], num_bytes: int, device: torch.device) -> None:
        arrived = arrival(device)

        def behind_the_device() -> None:
            # A sink that lacks rows must not finish.
            if self._has_failed:
                return
            try:
                if arrived is not None:
                    arrived.synchronize()
                work()
            except BaseException:
                self._has_failed = True
                raise

        self._pending.append(_Pending(num_bytes, arrived, self._pool.submit(behind_the_device)))

    def _wait(self, *, until: int) -> None:
        """Until at most so many bytes are under way, or with -1 nothing; what has gone wrong in the thread is raised here."""
        while self._pending and (self._pending[0].done.done() or sum(each.num_bytes for each in self._pending) > until):
            first = self._pending.popleft()
            if first.arrived is not None:
                first.arrived.synchronize()
            started = time.perf_counter()
            first.done.result()
            self.blocked_seconds += time.perf_counter() - started
