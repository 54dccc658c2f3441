"""The requests without an answer, their deadlines, and the thread that keeps time for a teacher."""

import functools
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable

from schoolhouse_wire import background

from schoolhouse.errors import TeacherBusyError
from schoolhouse.remote.request import Request

_REST_S = 1.0  # where keeping time failed
_SLACK = 64  # deadlines of answered requests that are kept anyway


class Outstanding:
    """Up to `max_pending` requests. A thread calls `fail_late` with each at its deadline.

    It also calls `tend`, which returns the time when it wants to be called again, or None; and again after `stir()`.
    """

    def __init__(
        self, max_pending: float, fail_late: Callable[[Request], None], tend: Callable[[], float | None]
    ) -> None:
        self._max_pending = max_pending
        self._fail_late, self._tend = fail_late, tend
        self._lock = threading.Lock()  # no other lock is taken by who holds it
        # Not a condition: the garbage collector may come to `stir` and `close` from this thread, as it begins to wait.
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whether `tend` is to be called
        self._requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count()
        self._thread = background.thread(self._run, name="schoolhouse-deadlines", on_death=self._fail_all)
        self._stirred = self._closed = False

    def start(self) -> None:
        """Begin to keep time, unless it has begun."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def runs_here(self) -> bool:
        """Whether this thread is the one that keeps time."""
        return self._thread is threading.current_thread()

    def add(self, request: Request) -> int:
        """Hold the request to its deadline; returns what `remove` takes.

        Raises:
            TeacherBusyError: there are `max_pending` already.
        """
        request_id = next(self._ids)
        with self._lock:
            if len(self._requests) >= self._max_pending:
                raise TeacherBusyError(
                    f"{len(self._requests)} requests are without an answer, as many as max_pending allows"
                )
            request.number = request_id
            self._requests[request_id] = request
            first = self._push(request)
        if first:
            self._wake.put(False)
        return request_id

    def reschedule(self, request: Request) -> None:
        """Its deadline is another one."""
        with self._lock:
            first = self._push(request)
        if first:
            self._wake.put(False)

    def _push(self, request: Request) -> bool:
        """Note its deadline; whether it is the first. The lock is held."""
        if len(self._deadlines) > 2 * len(self._requests) + _SLACK:
            self._deadlines = [one for one in self._deadlines if self._holds(*one)]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.deadline, request.number))
        return self._deadlines[0][1] == request.number

    def _holds(self, deadline: float, request_id: int) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.deadline == deadline  # else it was rescheduled

    def remove(self, request_id: int) -> Request | None:
        """Forget a request; None if it was forgotten already."""
        return self._requests.pop(request_id, None)

    def stir(self) -> None:
        """Have `tend` called soon. It takes no lock, nor does `close`."""
        if not self._stirred:
            self._stirred = True
            self._wake.put(True)

    def close(self) -> None:
        """End the thread; returns at once."""
        self._closed = True
        self._wake.put(False)

    def _run(self) -> None:
        tend_at: float | None = 0.0
        while not self._closed:
            tend_at = background.run(functools.partial(self._turn, tend_at), "keeping time", self._rest)

    def _turn(self, tend_at: float | None) -> float | None:
        """Do what is due next, or wait for it; returns when to tend."""
        late, next_at = self._take_late()
        at = min((at for at in (next_at, tend_at) if at is not None), default=None)
        stirred = self._wait_until(at if late is None else 0.0)
        due = stirred or (tend_at is not None and time.monotonic() >= tend_at)
        if late is not None:
            background.run(functools.partial(self._fail_late, late), "failing a late request", late.give_up)
        return self._tend() if due and not self._closed else tend_at

    def _rest(self, _error: BaseException) -> float:
        """Before the next turn, as that may fail, too."""
        time.sleep(_REST_S)
        return 0.0

    def _fail_all(self, error: BaseException) -> None:
        for request in list(self._requests.values()):
            request.give_up(error)

    def _wait_until(self, at: float | None) -> bool:
        """Until then, or until there is something new; returns whether that is that it was stirred."""
        try:
            stirred = self._wake.get(timeout=None if at is None else max(at - time.monotonic(), 0.0))
        except queue.Empty:
            return False
        if stirred:
            self._stirred = False  # before `tend`: who stirs from here on wants it once more
        return stirred

    def _take_late(self) -> tuple[Request | None, float | None]:
        """A request that is past its deadline, or None and the time when there may be one."""
        with self._lock:
            while self._deadlines:
                deadline, request_id = self._deadlines[0]
                if deadline > time.monotonic():
                    return None, deadline
                heapq.heappop(self._deadlines)
                request = self._requests.get(request_id)
                if request is not None and request.deadline <= time.monotonic():
                    return request, None
            return None, None
