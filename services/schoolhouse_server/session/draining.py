"""The orderly end of a replica: no new sessions, open ones are told, and what is in flight is answered."""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from schoolhouse_wire.errors import TeacherUnavailableError

IDLE_S = 5.0  # sessions may be ended once none has had anything in flight for this long


class Leaving(Protocol):
    """A session that can be told that its replica is about to stop."""

    @property
    def teacher(self) -> str:
        """The name of its teacher."""
        ...

    @property
    def outstanding(self) -> int:
        """How many requests have no answer sent yet."""
        ...

    @property
    def calls(self) -> int:
        """How many requests have come so far."""
        ...

    def tell_draining(self) -> None:
        """Tell the client that the replica is about to stop."""
        ...


class Drain:
    """The sessions of a replica, and whether it is about to stop; `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: set[Leaving] = set()
        self._ended: set[str] = set()  # teachers that have failed for good
        self._deadline: float | None = None
        self._busy_at = 0.0
        self._calls = 0  # how many calls had come at the last look

    @property
    def began(self) -> bool:
        """Whether new sessions are refused."""
        return self._deadline is not None

    def check(self) -> None:
        """Raises `TeacherUnavailableError` once new sessions are refused."""
        if self._deadline is not None:
            raise TeacherUnavailableError("this replica is draining: it is about to stop; ask another one")

    def join(self, session: Leaving) -> None:
        """Add a session; raises as `check` does."""
        with self._lock:
            self.check()
            self._sessions.add(session)
            ended = session.teacher in self._ended
        if ended:
            session.tell_draining()

    def leave(self, session: Leaving) -> None:
        """Remove a session, if it is there."""
        with self._lock:
            self._sessions.discard(session)

    def begin(self, timeout_s: float) -> None:
        """Refuse new sessions, and tell the open ones; a second call changes nothing."""
        with self._lock:
            if self._deadline is not None:
                return
            self._busy_at = self._clock()
            self._deadline = self._busy_at + timeout_s
            told = list(self._sessions)
        for session in told:
            session.tell_draining()

    def tell(self, teacher: str) -> None:
        """Tell the sessions of a teacher that has failed for good, now and later, to go elsewhere."""
        with self._lock:
            self._ended.add(teacher)
            told = [session for session in self._sessions if session.teacher == teacher]
        for session in told:
            session.tell_draining()

    def over(self) -> bool:
        """Whether the replica may stop: no session is left, all were idle for `IDLE_S`, or its time is up; poll it."""
        with self._lock:
            if self._deadline is None:
                return False
            now = self._clock()
            calls = sum(session.calls for session in self._sessions)
            if calls != self._calls or any(session.outstanding for session in self._sessions):
                self._busy_at, self._calls = now, calls
            return not self._sessions or now - self._busy_at >= IDLE_S or now >= self._deadline
