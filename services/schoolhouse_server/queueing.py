"""The queue before a device: which requests run next, and together."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from schoolhouse.errors import TeacherBusyError

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests that wait for the device. `max_queued` is how many may."""

    def __init__(self, max_queued: int) -> None:
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: T) -> None:
        """Add a request; raises `TeacherBusyError` when the queue is full."""
        with self._changed:
            if len(self._waiting) >= self._max_queued:
                raise TeacherBusyError(f"{self._max_queued} requests are queued, as many as this teacher takes")
            self._waiting.append(request)
            self._changed.notify()

    def remove(self, request: T) -> bool:
        """Take a request out; False if it is not there, as it runs already."""
        with self._changed:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def take(
        self, fits: Callable[[list[T], T], bool], linger: Callable[[list[T]], float] = lambda _taken: 0.0
    ) -> list[T]:
        """Wait for a request, and take it with others that `fits(taken, other)` says may run with it; [] at the end.

        While nothing else waits, `linger(taken)` is asked how many more seconds to wait for one that fits; 0: none.
        """
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            taken = [self._waiting.popleft()]
            self._gather(taken, fits)
            while not self._waiting and not self._closed and (pause_s := linger(taken)) > 0:
                self._changed.wait(pause_s)
                self._gather(taken, fits)
            return taken

    def _gather(self, taken: list[T], fits: Callable[[list[T], T], bool]) -> None:
        for other in list(self._waiting):
            if fits(taken, other):
                self._waiting.remove(other)
                taken.append(other)

    def close(self) -> list[T]:
        """End `take`; returns what still waited."""
        with self._changed:
            self._closed = True
            left = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
            return left
