"""Pending requests: all those without an answer, with their deadlines, and those that wait for a replica."""

import functools
import heapq
import logging
import threading
import time
from collections.abc import Callable

from schoolhouse_wire import background
from schoolhouse_wire.loop import Alarm, Loop

from schoolhouse.errors import TeacherBusyError, TeacherUnavailableError
from schoolhouse.remote.request import Request

_REST_S = 1.0  # pause after an error in what is done in time
_SLACK = 64  # deadlines of answered requests that may stay in the heap
_SAY_AFTER_S, _SAY_AGAIN_S = 2.0, 30.0
_ALONE = "no replica of the teacher %r can be asked"
_HELD_BACK = "replicas of the teacher %r lost more requests than may be sent again at once, so some are held back"
_log = logging.getLogger("schoolhouse")


class Outstanding:
    """Holds up to `max_pending` requests, and calls `fail_late` with each at its deadline.

    It also calls `tend`, which returns the time when it wants to be called again, or None; `stir()` makes it call
    `tend` soon. Any thread may `add` and `remove`; the rest happens in the event loop.
    """

    def __init__(
        self,
        loop: Loop,
        max_pending: float,
        fail_late: Callable[[Request], None],
        tend: Callable[[], float | None],
    ) -> None:
        self._loop = loop
        self._max_pending = max_pending
        self._fail_late, self._tend = fail_late, tend
        self._lock = threading.Lock()  # while requests are counted
        self._requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._tend_at: float | None = None
        self._alarm: Alarm | None = None
        self._alarm_at = 0.0
        self._closed = False

    def add(self, request: Request) -> None:
        """Add a request.

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

    def remove(self, number: int) -> Request | None:
        """Forget the request of that number; None if it was forgotten already."""
        return self._requests.pop(number, None)

    def schedule(self, request: Request) -> None:
        """Fail the request at its deadline, which is new or has changed."""
        if len(self._deadlines) > 2 * len(self._requests) + _SLACK:
            self._deadlines = [one for one in self._deadlines if self._holds(*one)]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.clock.deadline, request.number))
        self._ring_by(self._deadlines[0][0])

    def _holds(self, deadline: float, number: int) -> bool:
        request = self._requests.get(number)
        return request is not None and request.clock.deadline == deadline  # not if it was rescheduled

    def stir(self) -> None:
        """Have `tend` called soon."""
        self._tend_at = 0.0
        self._ring_by(0.0)

    def close(self) -> None:
        """Call nothing more."""
        self._closed = True
        if self._alarm is not None:
            self._loop.cancel(self._alarm)

    def _ring_by(self, at: float) -> None:
        if self._alarm is not None and self._alarm.ring is not None:
            if self._alarm_at <= at:
                return
            self._loop.cancel(self._alarm)
        if self._closed:
            return
        self._alarm, self._alarm_at = self._loop.at(at, self._ring), at

    def _ring(self) -> None:
        """Do what is due, and set the alarm for what is due next."""
        background.run(self._fail_all_late, "failing late requests", background.go_on)
        if self._tend_at is not None and time.monotonic() >= self._tend_at and not self._closed:
            self._tend_at = None  # before `tend` runs, so that a `stir` during it has it run once more
            at = background.run(self._tend, "keeping time", lambda _error: time.monotonic() + _REST_S)
            if at is not None and self._tend_at is None:
                self._tend_at = at
        times = [self._tend_at, self._deadlines[0][0] if self._deadlines else None]
        if (next_at := min((at for at in times if at is not None), default=None)) is not None:
            self._ring_by(next_at)

    def _fail_all_late(self) -> None:
        while (late := self._take_late()) is not None:
            background.run(functools.partial(self._fail_late, late), "failing a late request", late.give_up)

    def _take_late(self) -> Request | None:
        """A request that is past its deadline; None if there is none."""
        while self._deadlines and self._deadlines[0][0] <= (now := time.monotonic()):
            request = self._requests.get(heapq.heappop(self._deadlines)[1])
            if request is not None and request.clock.deadline <= now:
                return request
        return None


class Parking:
    """Keeps requests, and logs that the student waits."""

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
        """Remove a request; returns whether it was here."""
        return self._since.pop(request, None) is not None

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
        since = self._alone_since if self._alone_since is not None else min(self._since.values(), default=now)
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
