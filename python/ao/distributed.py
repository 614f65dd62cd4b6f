"""Ranks: one process a device, started by torchrun or by `launch`; one process without either."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    """Index of this process, from 0."""
    world: int
    """Number of processes."""
    device: torch.device
    """The device this process works on."""

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: logs, progress, files."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun or `launch` started, and leave them at the end.

    Each CPU rank takes its share of the cores, as two ranks of many threads get in each other's way.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(rank=0, world=1, device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world=world, device=device)
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., object], *args: object, processes: int) -> object:
    """Run a function in several processes of this machine, as torchrun would; returns what the first one returned.

    Raises:
        RuntimeError: a process failed; the first one's error is the cause.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="ao",
        max_restarts=0,
        start_method="spawn",
    )
    return elastic_launch(config, function)(*args)[0]
