"""Ranks: one process a device, started by torchrun or by `launch`; one process without either."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.multiprocessing.spawn import ProcessException

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long patient ranks wait for each other."""
START_METHOD = "spawn"
"""How launched ranks begin: each loads torch for itself, in the environment as it is then."""


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    """Index of this process, from 0."""
    world: int
    """Number of processes."""
    device: torch.device
    """The device this process works on."""
    local: int = 0
    """Index of this process on its machine."""

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: logs, progress, files."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.world > 1:
            dist.barrier()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place; patient ranks only add up what lies in CPU memory."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def ranks(device: torch.device, *, patient: bool = False) -> Iterator[Ranks]:
    """Join the other processes that torchrun or `launch` started, and leave them at the end.

    Ranks that work in step are told after minutes that one hangs, which is what the library's timeouts are for. `patient`
    ones do each their own work and meet when the last one is done, maybe hours later: they wait up to `PATIENCE`, off the
    GPU, where waiting would keep it busy.

    Each CPU rank takes no more than its share of the cores, as ranks of many threads get in each other's way, and no more
    threads than torch was set to before.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        if device.type == "cuda" and device.index is None:
            # Some of torch's questions about memory want to know which one.
            device = torch.device("cuda", torch.cuda.current_device())
        yield Ranks(rank=0, world=1, device=device)
        return
    threads = torch.get_num_threads()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // world)))
    in_step = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group("gloo" if patient else in_step, timeout=PATIENCE if patient else None)
    try:
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        yield Ranks(rank=dist.get_rank(), world=world, device=device, local=local)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def launch(function: Callable[..., Result], *args: object, processes: int) -> Result:
    """Run a function as so many ranks of this machine; this process is the first, which saves one copy of torch.

    Args:
        function: importable by name; called with `args` in every process.
        args: what can be sent to another process.
        processes: number of ranks.

    Returns:
        What the function returned here.

    Raises:
        RuntimeError: another rank failed; the message holds its error.
    """
    # The store is ours, so that no port has to be guessed; ranks find it as they find torchrun's.
    store = dist.TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
    others: Any = start_processes(
        _worker,
        (function, args, store.port, processes, torch.get_num_threads()),
        nprocs=processes - 1,
        join=False,
        start_method=START_METHOD,
    )
    try:
        with _environment(0, processes, store.port):
            result = function(*args)
        while not others.join():
            pass
    except ProcessException as reason:
        raise RuntimeError(_lost(reason, processes)) from None
    except RuntimeError as error:
        # A rank that died shows here as a broken connection; its own error says why.
        try:
            others.join(timeout=10)
        except ProcessException as reason:
            raise RuntimeError(_lost(reason, processes)) from error
        raise
    finally:
        for process in others.processes:
            if process.is_alive():
                process.terminate()
            process.join()
    return result


def _lost(reason: ProcessException, processes: int) -> str:
    return f"rank {reason.error_index + 1} of {processes} failed: {reason}"


def _worker(
    index: int, function: Callable[..., object], args: tuple[object, ...], port: int, world: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    with _environment(index + 1, world, port):
        function(*args)


@contextmanager
def _environment(rank: int, world: int, port: int) -> Iterator[None]:
    values = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
