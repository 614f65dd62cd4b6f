"""Memory: what a run took at most, over all its processes."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Samples the resident memory of this process and its children while it is open.

    A page that several processes share, as those of torch's libraries, counts once: Linux reports each process's part
    of it. Elsewhere the resident sets are added up, an upper bound.
    """

    def __init__(self, *, every: float = 0.5) -> None:
        self.bytes = 0
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stop.is_set():
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += _resident(process)
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, total)
            self._stop.wait(self._every)


def peak_rss_bytes(*, children: bool = False) -> int:
    """Greatest resident memory of this process so far; with `children`, and of its largest child that has ended."""
    import resource

    kinds = (resource.RUSAGE_SELF, *([resource.RUSAGE_CHILDREN] if children else []))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * sum(resource.getrusage(kind).ru_maxrss for kind in kinds)


def _resident(process: psutil.Process) -> int:
    if psutil.LINUX:
        return process.memory_full_info().pss
    return process.memory_info().rss
