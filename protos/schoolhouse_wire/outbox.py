"""The outbox that interleaves the messages of many requests on one stream."""

import contextlib
import queue
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

PAUSE = b""  # a source's turn without a message: it works, and the others are not to wait until it is done


class Outbox(Generic[T]):
    """Messages of many requests for one stream: iterating takes one of each in turn, and blocks while there is none.

    Any thread may put; one thread iterates. Its bound is the number of requests that its owner lets in flight.
    """

    def __init__(self) -> None:
        self._arrivals: queue.SimpleQueue[Iterator[T] | None] = queue.SimpleQueue()
        self._active: deque[Iterator[T]] = deque()
        self._closed = False

    def put(self, messages: Iterator[T]) -> None:
        """Append a source of messages. They are made when the stream is ready for them."""
        if not self._closed:
            self._arrivals.put(messages)

    def close(self) -> None:
        """End the iteration at once; what was not yet sent is not sent any more."""
        self._closed = True
        self._arrivals.put(None)

    def clear(self) -> None:
        """After `close`, free what was not sent. Not for a finalizer: sources end, and may take locks for that."""
        assert self._closed
        self._active.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                self._arrivals.get_nowait()
        self._arrivals.put(None)  # for who iterates

    def __iter__(self) -> "Outbox[T]":
        return self

    def __next__(self) -> T:
        while not self._closed:
            self._admit()
            try:
                source = self._active.popleft()
            except IndexError:  # it was closed
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
