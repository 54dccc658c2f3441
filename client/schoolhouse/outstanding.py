"""The requests without an answer, their deadlines, and the thread that keeps time for a teacher."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from schoolhouse.errors import TeacherBusyError
from schoolhouse.request import Request


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
        self._wake = threading.Condition()  # no other lock is taken by who holds it
        self._requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name="schoolhouse-deadlines", daemon=True)
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
        with self._wake:
            if len(self._requests) >= self._max_pending:
                raise TeacherBusyError(
                    f"{len(self._requests)} requests are without an answer, as many as max_pending allows"
                )
            self._requests[request_id] = request
            heapq.heappush(self._deadlines, (request.deadline, request_id))
            if self._deadlines[0][1] == request_id:
                self._wake.notify()
        return request_id
            if len(self._deadlines) > 2 * len(self._requests) + _SLACK:
                self._deadlines = [one for one in self._deadlines if one[1] in self._requests]
                heapq.heapify(self._deadlines)

    def remove(self, request_id: int) -> Request | None:
        """Forget a request; None if it was forgotten already."""
        return self._requests.pop(request_id, None)

    def stir(self) -> None:
        """Have `tend` called soon."""
        with self._wake:
            self._stirred = True
            self._wake.notify()

    def close(self) -> None:
        """End the thread; returns at once."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _run(self) -> None:
        tend_at = self._tend()
        while True:
            with self._wake:
                if self._closed:
                    return
                late, next_at = self._take_late()
                if late is None and not self._stirred:
                    times = [at for at in (next_at, tend_at) if at is not None]
                    self._wake.wait(max(min(times) - time.monotonic(), 0.0) if times else None)
                due = self._stirred or (tend_at is not None and time.monotonic() >= tend_at)
                self._stirred = False
            if late is not None:
                self._fail_late(late)
                del late
            if due:
                tend_at = self._tend()

    def _take_late(self) -> tuple[Request | None, float | None]:
        """A request that is past its deadline, or None and the time when there may be one."""
        while self._deadlines:
            deadline, request_id = self._deadlines[0]
            if deadline > time.monotonic():
                return None, deadline
            heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None:
                return request, None
        return None, None
