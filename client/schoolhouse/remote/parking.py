"""Parking: requests that wait since no replica can take them, or since too many retries are sent already."""

import logging
from collections.abc import Callable

from schoolhouse.errors import TeacherUnavailableError
from schoolhouse.remote.request import Request

_SAY_AFTER_S, _SAY_AGAIN_S = 2.0, 30.0
_ALONE = "no replica of the teacher %r can be asked"
_HELD_BACK = "replicas of the teacher %r lost more requests than may be sent again at once, so some are held back"
_log = logging.getLogger("schoolhouse")


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
        return request.stop_clock(since, self._timeout_s)

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
