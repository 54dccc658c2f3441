"""What a teacher's client does in time, whatever its threads wait for: fails late requests, and renews its leases."""

import heapq
import itertools
import math
import threading
import time
from collections.abc import Mapping

from schoolhouse.errors import TeacherBusyError, TeacherTimeoutError
from schoolhouse.requests import Request
from schoolhouse.session import Session


class Deadlines:
    """Requests without an answer, and a thread that looks after them and after `sessions`, from the first one on."""

    def __init__(self, sessions: Mapping[str, Session], *, timeout_s: float, max_pending: int) -> None:
        self._sessions = sessions
        self._timeout_s = timeout_s
        self._max_pending = max_pending
        self._wake = threading.Condition()
        self._outstanding: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def runs_here(self) -> bool:
        """Whether this is the thread that fails late requests."""
        return threading.current_thread() is self._thread

    def add(self, request: Request) -> int:
        """Hold a request to its deadline; returns what `forget` takes.

        Raises:
            TeacherBusyError: `max_pending` requests are without an answer already.
        """
        request_id = next(self._ids)
        with self._wake:
            if len(self._outstanding) >= self._max_pending:
                raise TeacherBusyError(
                    f"{len(self._outstanding)} requests are without an answer, as many as max_pending allows"
                )
            self._outstanding[request_id] = request
            heapq.heappush(self._deadlines, (request.deadline, request_id))
            self._start()
            if self._deadlines[0][1] == request_id:
                self._wake.notify()
        return request_id

    def forget(self, request_id: int) -> Request | None:
        """The request, which is done; None if it was forgotten."""
        with self._wake:
            return self._outstanding.pop(request_id, None)

    def look(self) -> None:
        """There is a new session."""
        with self._wake:
            self._start()
            self._wake.notify()

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="schoolhouse-deadlines", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            renew_s = min((session.renew() for session in list(self._sessions.values())), default=math.inf)
            with self._wake:
                if self._closed:
                    return
                late, pause = self._take_late()
                if late is None:
                    pause = min(pause, renew_s)
                    self._wake.wait(pause if pause < math.inf else None)
                    continue
            self._fail(late)
            del late

    def _take_late(self) -> tuple[Request | None, float]:
        """A request that is past its deadline, or None and the seconds until there may be one."""
        while self._deadlines:
            pause = self._deadlines[0][0] - time.monotonic()
            if pause > 0:
                return None, pause
            request = self._outstanding.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                return request, 0.0
        return None, math.inf

    def _fail(self, request: Request) -> None:
        for session in list(self._sessions.values()):
            session.cancel(request)
        request.fail(TeacherTimeoutError(_reason(request, self._timeout_s)))


def _reason(request: Request, timeout_s: float) -> str:
    if request.told_to_wait:
        return (
            f"the teacher did not answer within {timeout_s} s: the job was over its quota of requests or bytes in "
            "flight, or the teacher's queue was full. Raise timeout_s in connect(), look less far ahead, raise "
            "max_in_flight or max_job_bytes of the teacher, or add replicas"
        )
    return (
        f"the teacher did not answer within {timeout_s} s and was told to stop; raise timeout_s in connect(), or add "
        "replicas"
    )
