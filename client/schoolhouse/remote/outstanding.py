"""Outstanding requests: those without an answer, their deadlines, and the thread that watches these for a teacher."""

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

_REST_S = 1.0  # pause after an error in the thread
_SLACK = 64  # deadlines of answered requests that may stay in the heap


class Outstanding:
    """Holds up to `max_pending` requests, and calls `fail_late` with each at its deadline, in a thread of its own.

    The thread also calls `tend`, which returns the time when it wants to be called again, or None; `stir()` makes it
    call `tend` soon.
    """

    def __init__(
        self, max_pending: float, fail_late: Callable[[Request], None], tend: Callable[[], float | None]
    ) -> None:
        self._max_pending = max_pending
        self._fail_late, self._tend = fail_late, tend
        self._lock = threading.Lock()  # no other lock is taken while it is held
        # Not a Condition: the garbage collector may call `stir` or `close` in this thread just as it begins to wait.
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True to have `tend` called
        self._requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count()
        self._thread = background.thread(self._run, name="schoolhouse-deadlines", on_death=self._fail_all)
        self._stirred = self._closed = False

    def start(self) -> None:
        """Start the thread, unless it was started."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def runs_here(self) -> bool:
        """Whether the calling thread is the one that keeps time."""
        return self._thread is threading.current_thread()

    def add(self, request: Request) -> int:
        """Add a request, to fail it at its deadline; returns its id for `remove`.

        Raises:
            TeacherBusyError: if there are `max_pending` requests already.
        """
        request_id = next(self._ids)
        with self._lock:
            if len(self._requests) >= self._max_pending:
                raise TeacherBusyError(
                    f"{len(self._requests)} requests are without an answer, as many as "
                    "sharing=Sharing(max_pending=...) in connect() allows"
                )
            request.number = request_id
            self._requests[request_id] = request
            first = self._push(request)
        if first:
            self._wake.put(False)
        return request_id

    def reschedule(self, request: Request) -> None:
        """Note that the deadline of a request has changed."""
        with self._lock:
            first = self._push(request)
        if first:
            self._wake.put(False)

    def _push(self, request: Request) -> bool:
        """Add the request's deadline; returns whether it is the earliest. The caller holds the lock."""
        if len(self._deadlines) > 2 * len(self._requests) + _SLACK:
            self._deadlines = [one for one in self._deadlines if self._holds(*one)]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.deadline, request.number))
        return self._deadlines[0][1] == request.number

    def _holds(self, deadline: float, request_id: int) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.deadline == deadline  # not if it was rescheduled

    def remove(self, request_id: int) -> Request | None:
        """Forget a request; None if it was forgotten already."""
        return self._requests.pop(request_id, None)

    def stir(self) -> None:
        """Have `tend` called soon. Like `close`, it takes no lock."""
        if not self._stirred:
            self._stirred = True
            self._wake.put(True)

    def close(self) -> None:
        """Tell the thread to end; returns at once."""
        self._closed = True
        self._wake.put(False)

    def _run(self) -> None:
        tend_at: float | None = 0.0
        while not self._closed:
            tend_at = background.run(functools.partial(self._turn, tend_at), "keeping time", self._rest)

    def _turn(self, tend_at: float | None) -> float | None:
        """Wait for what is due next, and do it; returns when to call `tend`."""
        late, next_at = self._take_late()
        at = min((at for at in (next_at, tend_at) if at is not None), default=None)
        stirred = self._wait_until(at if late is None else 0.0)
        due = stirred or (tend_at is not None and time.monotonic() >= tend_at)
        if late is not None:
            background.run(functools.partial(self._fail_late, late), "failing a late request", late.give_up)
        return self._tend() if due and not self._closed else tend_at

    def _rest(self, _error: BaseException) -> float:
        """Pause after an error, since the next turn may fail, too."""
        time.sleep(_REST_S)
        return 0.0

    def _fail_all(self, error: BaseException) -> None:
        for request in list(self._requests.values()):
            request.give_up(error)

    def _wait_until(self, at: float | None) -> bool:
        """Wait until `at`, or until a wake-up; returns whether it was `stir` that woke it."""
        try:
            stirred = self._wake.get(timeout=None if at is None else max(at - time.monotonic(), 0.0))
        except queue.Empty:
            return False
        if stirred:
            self._stirred = False  # before `tend` runs, so that a `stir` during it has it run once more
        return stirred

    def _take_late(self) -> tuple[Request | None, float | None]:
        """A request that is past its deadline; or None, and the next deadline."""
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
