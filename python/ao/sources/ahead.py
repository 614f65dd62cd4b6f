"""Reading ahead: a thread reads the next items while the last one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], *, depth: int) -> Iterator[T]:
    """The items in their order, at most `depth` of them waiting. What reading raises is raised here, in its place.

    The thread stops where the reader does: when the returned iterator is closed or collected.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            put((None, error))
        else:
            put((None, StopIteration()))

    thread = threading.Thread(target=read, name="ao-read-ahead", daemon=True)

    def use() -> Iterator[T]:
        thread.start()
        try:
            while True:
                item, error = waiting.get()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield item  # pyright: ignore[reportReturnType] - an item comes without an error
        finally:
            stopped.set()
            thread.join()

    return use()
