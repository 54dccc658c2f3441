"""Pending requests: all those without an answer, with their deadlines, and those that wait for a replica."""

import functools
import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable

from schoolhouse_wire import background

from schoolhouse.errors import TeacherBusyError, TeacherUnavailableError
from schoolhouse.remote.request import Request

_REST_S = 1.0  # pause after an error in the thread
_SLACK = 64  # deadlines of answered requests that may stay in the heap
_SAY_AFTER_S, _SAY_AGAIN_S = 2.0, 30.0
_ALONE = "no replica of the teacher %r can be asked"
_HELD_BACK = "replicas of the teacher %r lost more requests than may be sent again at once, so some are held back"
_log = logging.getLogger("schoolhouse")


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

    def add(self, request: Request) -> None:
        """Add a request, to fail it at its deadline.

        Raises:
            TeacherBusyError: if there are `max_pending` requests already.
        """
        with self._lock:
            if len(self._requests) >= self._max_pending:
                raise TeacherBusyError(
                    f"{len(self._requests)} requests are without an answer, as many as "
                    "sharing=Sharing(max_pending=...) in connect() allows"
                )
            self._requests[request.number] = request
            first = self._push(request)
        if first:
            self._wake.put(False)

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
        heapq.heappush(self._deadlines, (request.clock.deadline, request.number))
        return self._deadlines[0][1] == request.number

    def _holds(self, deadline: float, number: int) -> bool:
        request = self._requests.get(number)
        return request is not None and request.clock.deadline == deadline  # not if it was rescheduled

    def remove(self, number: int) -> Request | None:
        """Forget the request of that number; None if it was forgotten already."""
        return self._requests.pop(number, None)

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
                deadline, number = self._deadlines[0]
                if deadline > time.monotonic():
                    return None, deadline
                heapq.heappop(self._deadlines)
                request = self._requests.get(number)
                if request is not None and request.clock.deadline <= time.monotonic():
                    return request, None
            return None, None


class Parking:
    """Keeps requests, and logs that the student waits. The caller holds a lock, except for `drop` and `pop`."""

    def __init__(self, teacher: str, timeout_s: float, why: Callable[[], str]) -> None:
        """A request stays for up to `timeout_s`; `why()` says in words what was tried."""
        self._teacher, self._timeout_s, self._why = teacher, timeout_s, why
        self._since: dict[Request, float] = {}
        self._alone_since: float | None = None  # since when no replica can be asked
        self._say_at = 0.0
        self._said = False

    def __bool__(self) -> bool:
        return bool(self._since)

    def __contains__(self, request: Request) -> bool:
        return request in self._since

    def put(self, request: Request, since: float) -> bool:
        """Keep a request, and stop its own time; returns whether that changed its deadline."""
        self._since[request] = since
        return request.park(since, self._timeout_s)

    def drop(self, request: Request) -> bool:
        """Remove a request; returns whether it was here. Takes no lock."""
        return self._since.pop(request, None) is not None

    def pop(self) -> Request | None:
        """Remove and return any request; None if there is none. Takes no lock."""
        try:
            return self._since.popitem()[0]
        except KeyError:  # empty, or emptied by another thread
            return None

    def take_all(self) -> dict[Request, float]:
        """Remove and return all requests, each with the time since when it waits."""
        taken, self._since = self._since, {}
        return taken

    def no_replica(self, now: float) -> None:
        """Note that no replica can take a request."""
        if self._alone_since is None:
            self._alone_since, self._say_at = now, now

    def found_replica(self, now: float) -> None:
        """Note that a replica can take requests, and log that the teacher is back."""
        if self._said and self._alone_since is not None:
            _log.warning("the teacher %r is back after %.0f s", self._teacher, now - self._alone_since)
        self._alone_since, self._said = None, False

    def say(self, now: float) -> float | None:
        """Log that the student waits, if that is due; returns when to call again."""
        if not self._since:
            return None
        alone = self._alone_since is not None
        since = self._alone_since if self._alone_since is not None else min(list(self._since.values()), default=now)
        if now < (say_at := max(self._say_at, since + _SAY_AFTER_S)):
            return say_at
        self._said, self._say_at = alone, now + _SAY_AGAIN_S
        _log.warning(
            f"{_ALONE if alone else _HELD_BACK} for %.0f s; %d requests wait, for up to %g s each (teacher_s); %s",
            self._teacher,
            now - since,
            len(self._since),
            self._timeout_s,
            self._why(),
        )
        return self._say_at

    def over(self) -> TeacherUnavailableError:
        """The error for a request that has waited for too long."""
        state = (_ALONE if self._alone_since is not None else _HELD_BACK) % self._teacher
        return TeacherUnavailableError(
            f"{state} for {self._timeout_s:g} s (teacher_s); "
            f"{self._why()}. Start the teacher again, or see what `schoolhouse status` and `schoolhouse logs` say "
            "about it; then forward the batch again, and training goes on from there. To wait longer, raise "
            "timeouts=Timeouts(teacher_s=...) in connect()"
        )
