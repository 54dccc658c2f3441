"""Flow control of a session: which requests are in flight, and which wait until the replica has room for them."""

import heapq
import itertools
from collections import deque
from typing import Generic, Protocol, TypeVar

from schoolhouse_wire.v1 import teacher_pb2


class Sized(Protocol):
    """What a window needs of a request."""

    @property
    def nbytes(self) -> int: ...
    @property
    def done(self) -> bool: ...
    def send(self, now: float) -> bool: ...
    def wait(self) -> None: ...


R = TypeVar("R", bound=Sized)


class Window(Generic[R]):
    """Keeps a session within what its replica granted.

    `Opened` says how many requests and bytes the replica grants to the job. Other sessions of the same job use a part
    of that, so the replica may send a request back: then nothing is sent until it has room again. From then on the
    window is one more than the requests in flight, and grows by one with each window of replies.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._in_flight: dict[int, R] = {}
        self._waiting: deque[R] = deque()
        self._sent_back: list[tuple[int, R]] = []  # a heap by id, so that they are sent again in their order
        self._most = self._most_bytes = 0
        self._size = 0.0
        self._nbytes = 0
        self._paused = self._ended = False

    def __len__(self) -> int:
        return len(self._in_flight) + len(self._waiting) + len(self._sent_back)

    @property
    def waits(self) -> bool:
        """Whether there are requests that the replica does not have yet."""
        return bool(self._waiting or self._sent_back)

    @property
    def in_flight(self) -> int:
        """Number of requests that the replica has."""
        return len(self._in_flight)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._in_flight

    def grant(self, opened: teacher_pb2.Opened) -> None:
        """Open the window, with the limits that the replica grants."""
        self._most, self._most_bytes = opened.max_in_flight, opened.max_bytes_in_flight
        self._size = float(self._most)

    def add(self, request: R) -> bool:
        """Queue a request; False after `end`."""
        if not self._ended:
            self._waiting.append(request)
        return not self._ended

    def next(self, now: float) -> tuple[int, R] | None:
        """The next request that may be sent, with its id; it is in flight from `now` on. None if there is none."""
        while (self._sent_back or self._waiting) and not self._paused and not self._ended:
            request = self._sent_back[0][1] if self._sent_back else self._waiting[0]
            if not request.done and not self._fits(request):  # done: cancelled, or past its deadline
                return None
            if self._sent_back:
                heapq.heappop(self._sent_back)
            else:
                self._waiting.popleft()
            if request.send(now):
                return self._start(request), request
        return None

    def get(self, request_id: int) -> R | None:
        """The request in flight with that id, or None."""
        return self._in_flight.get(request_id)

    def take(self, request_id: int) -> R | None:
        """Remove and return a request that was answered; None if it was cancelled."""
        request = self._stop(request_id)
        self._size = min(self._size + 1 / max(self._size, 1.0), self._most)
        return request

    def wait(self, request_id: int) -> None:
        """Pause, since the replica sent a request back; it is sent first afterwards."""
        self._paused = True
        request = self._stop(request_id)
        if request is not None:
            request.wait()
            heapq.heappush(self._sent_back, (request_id, request))

    def resume(self) -> None:
        """Go on, with a small window."""
        self._paused = False
        self._size = min(len(self._in_flight) + 1, self._most)

    def remove(self, request: R) -> int | None:
        """Forget a request; returns its id if it was in flight."""
        if request in self._waiting:
            self._waiting.remove(request)
            return None
        for i, (_, other) in enumerate(self._sent_back):
            if other is request:
                del self._sent_back[i]
                heapq.heapify(self._sent_back)
                return None
        request_id = next((i for i, other in self._in_flight.items() if other is request), None)
        if request_id is not None:
            self._stop(request_id)
        return request_id

    def asked(self) -> list[R]:
        """The requests that the replica has, in the order in which they were sent."""
        return list(self._in_flight.values())

    def end(self) -> list[R]:
        """Accept no more; returns the requests without an answer, first those that were in flight."""
        self._ended = True
        in_flight = [*self._in_flight.values()]
        self._in_flight.clear()
        return in_flight + self.take_back()

    def take_back(self) -> list[R]:
        """Remove the requests that are not in flight, and return them in order."""
        left = [*(request for _, request in sorted(self._sent_back)), *self._waiting]
        self._sent_back.clear()
        self._waiting.clear()
        return left

    def _fits(self, request: R) -> bool:
        if not self._in_flight:
            return self._most > 0
        if len(self._in_flight) >= int(self._size):
            return False
        return not self._most_bytes or self._nbytes + request.nbytes <= self._most_bytes

    def _start(self, request: R) -> int:
        request_id = next(self._ids)
        self._in_flight[request_id] = request
        self._nbytes += request.nbytes
        return request_id

    def _stop(self, request_id: int) -> R | None:
        request = self._in_flight.pop(request_id, None)
        if request is not None:
            self._nbytes -= request.nbytes
        return request
