"""The outbox, which interleaves the messages of many requests on one stream."""

import contextlib
import queue
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

PAUSE = b""  # yielded by a source that is still working on its message, so that the others get their turns


class Outbox(Generic[T]):
    """Messages of many requests for one stream: iteration takes one of each in turn, and blocks while there is none.

    Any thread may put; one thread iterates. It has no bound of its own: its owner bounds the requests in flight.
    """

    def __init__(self) -> None:
        self._arrivals: queue.SimpleQueue[Iterator[T] | None] = queue.SimpleQueue()
        self._active: deque[Iterator[T]] = deque()
        self._closed = False

    def put(self, messages: Iterator[T]) -> None:
        """Append a source of messages, which makes each when the stream is ready for it."""
        if not self._closed:
            self._arrivals.put(messages)

    def close(self) -> None:
        """End the iteration at once, without sending the rest."""
        self._closed = True
        self._arrivals.put(None)

    def clear(self) -> None:
        """After `close`, free what was not sent. A finalizer must not call this: ending a source may take locks."""
        assert self._closed
        self._active.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                self._arrivals.get_nowait()
        self._arrivals.put(None)  # again, to wake the thread that iterates

    def __iter__(self) -> "Outbox[T]":
        return self

    def __next__(self) -> T:
        while not self._closed:
            self._admit()
            try:
                source = self._active.popleft()
            except IndexError:  # closed meanwhile
                continue
            message = next(source, None)
            if message is None or self._closed:
                continue
            self._active.append(source)
            if message != PAUSE:
                return message
        raise StopIteration

    def _admit(self) -> None:
        while not self._active or not self._arrivals.empty():
            source = self._arrivals.get()
            if source is None:
                return
            self._active.append(source)
