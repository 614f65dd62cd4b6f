"""What the host gives a device without waiting for it: copies that are made behind the device's own work, and two streams of
work of which one goes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device; to a GPU from pinned memory, as any other copy would wait for all that the GPU has to do."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_cpu_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that is on its way into pinned memory, where it is not there yet."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def arrival(device: torch.device) -> torch.cuda.Event | None:
    """What to wait for until the device is done with what it was given up to here, copies into CPU memory among it; None where
    that is so already."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def default_stream(device: torch.device) -> AbstractContextManager[object]:
    """Inside, work goes to a GPU's default stream."""
    return torch.cuda.stream(torch.cuda.default_stream(device)) if device.type == "cuda" else nullcontext()


class Streams:
    """Two streams of a GPU: kernels of the first are served before those of `aside`, which fill what it leaves idle. Without a
    GPU there are none."""

    def __init__(self, device: torch.device | None) -> None:
        self._first: torch.cuda.Stream | None = None
        self.aside: torch.cuda.Stream | None = None
        if device is not None:
            # The lower number goes first; 0 is the default.
            self._first, self.aside = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
            # Memory that is free in one stream is not free to another.
            torch.cuda.empty_cache()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Inside, work goes to the stream that is served first, behind what was given to the current one before."""
        if self._first is None or self.aside is None:
            yield
            return
        before = torch.cuda.current_stream(self._first.device)
        self._first.wait_stream(before)
        self.aside.wait_stream(before)
        try:
            with torch.cuda.stream(self._first):
                yield
        finally:
            before.wait_stream(self._first)
