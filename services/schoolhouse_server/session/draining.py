"""The end of a replica that has sessions: no new ones, those there are told, and what is in flight is answered."""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from schoolhouse.errors import TeacherUnavailableError

IDLE_S = 5.0  # a session that had nothing in flight for so long since it was told may be ended


class Leaving(Protocol):
    """A session that can be told that its replica is about to stop."""

    @property
    def teacher(self) -> str:
        """Whose features it asks for."""
        ...

    @property
    def outstanding(self) -> int:
        """Requests whose answers are not sent yet."""
        ...

    @property
    def calls(self) -> int:
        """Requests that came so far."""
        ...

    def tell_draining(self) -> None:
        """Say so to the client."""
        ...


class Drain:
    """The sessions of a replica, and whether it is about to stop. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: set[Leaving] = set()
        self._ended: set[str] = set()  # teachers that can serve no more
        self._deadline: float | None = None
        self._busy_at = 0.0
        self._calls = 0  # that had come when somebody looked last

    @property
    def began(self) -> bool:
        """Whether it takes no new sessions."""
        return self._deadline is not None

    def check(self) -> None:
        """Raises `TeacherUnavailableError` once it takes no new sessions."""
        if self._deadline is not None:
            raise TeacherUnavailableError("this replica is draining: it is about to stop; ask another one")

    def join(self, session: Leaving) -> None:
        """Take a session in; raises as `check` does."""
        with self._lock:
            self.check()
            self._sessions.add(session)
            ended = session.teacher in self._ended
        if ended:
            session.tell_draining()

    def leave(self, session: Leaving) -> None:
        """Take a session out, if it is in."""
        with self._lock:
            self._sessions.discard(session)

    def begin(self, timeout_s: float) -> None:
        """Take no more sessions and tell those there are; a second call changes nothing."""
        with self._lock:
            if self._deadline is not None:
                return
            self._busy_at = self._clock()
            self._deadline = self._busy_at + timeout_s
            told = list(self._sessions)
        for session in told:
            session.tell_draining()

    def tell(self, teacher: str) -> None:
        """Tell the sessions of one teacher, which can serve them no more, that its replica is about to stop."""
        with self._lock:
            self._ended.add(teacher)
            told = [session for session in self._sessions if session.teacher == teacher]
        for session in told:
            session.tell_draining()

    def over(self) -> bool:
        """Whether it may stop: no session is left, all have been idle for `IDLE_S`, or its time is up. Poll it."""
        with self._lock:
            if self._deadline is None:
                return False
            now = self._clock()
            calls = sum(session.calls for session in self._sessions)
            if calls != self._calls or any(session.outstanding for session in self._sessions):
                self._busy_at, self._calls = now, calls
            return not self._sessions or now - self._busy_at >= IDLE_S or now >= self._deadline
