"""Which requests of a session are in flight, and which wait until the replica has room for them."""

import heapq
import itertools
import threading
from collections import deque
from typing import Generic, Protocol, TypeVar

from schoolhouse_wire.v1 import teacher_pb2


class Sized(Protocol):
    """What a window reads of a request. It notes there that the replica sent it back, and how often it was lost."""

    told_to_wait: bool
    losses: int
    is_retry: bool

    @property
    def nbytes(self) -> int: ...
    @property
    def done(self) -> bool: ...


R = TypeVar("R", bound=Sized)


class Window(Generic[R]):
    """Holds a session to what its replica granted. Any thread may call.

    The replica grants the job as many requests and bytes as `opened` says. Other sessions of the job take their part of
    it, so that a request may come back: then nothing is sent until the replica has room again, and from then on one
    more than were taken, and one more with each window of replies.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._in_flight: dict[int, R] = {}
        self._waiting: deque[R] = deque()
        self._sent_back: list[tuple[int, R]] = []  # a heap: the first goes first again
        self._most = self._most_bytes = 0
        self._size = 0.0
        self._nbytes = 0
        self._paused = self._ended = False

    def __len__(self) -> int:
        return len(self._in_flight) + len(self._waiting) + len(self._sent_back)

    @property
    def in_flight(self) -> int:
        """Requests that the replica has."""
        return len(self._in_flight)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._in_flight

    def grant(self, opened: teacher_pb2.Opened) -> None:
        """Begin, with the replica's limits."""
        with self._lock:
            self._most, self._most_bytes = opened.max_in_flight, opened.max_bytes_in_flight
            self._size = float(self._most)

    def add(self, request: R) -> bool:
        """Have a request wait for its turn; False after `end`."""
        with self._lock:
            if not self._ended:
                self._waiting.append(request)
            return not self._ended

    def next(self) -> tuple[int, R] | None:
        """The request that may be sent now, in flight from here on, and its id."""
        with self._lock:
            while (self._sent_back or self._waiting) and not self._paused and not self._ended:
                request = self._sent_back[0][1] if self._sent_back else self._waiting[0]
                if not request.done and not self._fits(request):  # done: cancelled, or past its deadline
                    return None
                if self._sent_back:
                    heapq.heappop(self._sent_back)
                else:
                    self._waiting.popleft()
                if not request.done:
                    return self._start(request), request
            return None

    def get(self, request_id: int) -> R | None:
        """A request in flight."""
        return self._in_flight.get(request_id)

    def take(self, request_id: int) -> R | None:
        """The request that was answered, not in flight any more; None if it was cancelled."""
        with self._lock:
            request = self._stop(request_id)
            self._size = min(self._size + 1 / max(self._size, 1.0), self._most)
            return request

    def wait(self, request_id: int) -> None:
        """A request was sent back: pause, and take it first afterwards."""
        with self._lock:
            self._paused = True
            request = self._stop(request_id)
            if request is not None:
                request.told_to_wait = True
                heapq.heappush(self._sent_back, (request_id, request))

    def resume(self) -> None:
        """Go on, slowly."""
        with self._lock:
            self._paused = False
            self._size = min(len(self._in_flight) + 1, self._most)

    def remove(self, request: R) -> int | None:
        """Forget a request; its id if it is in flight."""
        with self._lock:
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
        """The requests that the replica has."""
        return list(self._in_flight.values())

    def take_back(self) -> list[R]:
        """Forget the requests that are not in flight, and return them in their order."""
        with self._lock:
            return self._take_waiting()

    def end(self) -> list[R]:
        """Take no more; returns what has no answer, what was in flight first."""
        with self._lock:
            self._ended = True
            in_flight = [*self._in_flight.values()]
            self._in_flight.clear()
            waiting = self._take_waiting()  # at once: else another thread might begin to send one of them
        for request in in_flight:
            request.losses += 1
            request.is_retry = True
        return in_flight + waiting

    def _take_waiting(self) -> list[R]:
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
