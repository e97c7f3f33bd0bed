"""An iterator that works ahead in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

Item = TypeVar("Item")
_LEAVE_SECONDS = 1.0  # to wait for an item that nobody wants any more, such as after Ctrl+C


def ahead(items: Iterator[Item], most: int) -> Iterator[Item]:
    """The same items in the same order; up to `most` are made before they are asked for.

    An exception of the iterator is raised where its item would have come. Leaving early stops the thread.
    """
    made: Queue[tuple[Any, BaseException | None]] = Queue(most)
    end = object()
    stopped = Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(end)
        except BaseException as error:  # raised again in the thread that asks
            put(end, error)

    thread = Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a system that starts no further one: then each item is made when it is asked for
        yield from items
        return
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join(_LEAVE_SECONDS)
