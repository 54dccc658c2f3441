"""Ends sessions whose clients do not read, where others wait for the memory that their replies take."""

import time
from collections.abc import Callable, Collection
from typing import Protocol

from schoolhouse_wire.errors import LeaseExpiredError, SchoolhouseError
from schoolhouse_wire.loop import Loop

UNREAD_S = 10.0  # a client may pause for so long, and longer while nobody waits
EVERY_S = 2.0


class Session(Protocol):
    """What is looked at of a session."""

    def unread_since(self) -> float:
        """Since when its client has taken nothing, on time.monotonic's clock; infinite if there is nothing to take."""

    def end(self, error: SchoolhouseError) -> None:
        """End it with this error."""


class Relief:
    """Looks every two seconds whether requests wait for memory, and then ends the session that was unread for longest.

    Several jobs that each stay within their bound could otherwise fill what is there for all, and read nothing.
    """

    def __init__(self, loop: Loop, starves: Callable[[], bool], sessions: Collection[Session]) -> None:
        self._loop, self._starves, self._sessions = loop, starves, sessions

    def start(self) -> None:
        """Look for the first time in two seconds; it ends with the loop."""
        self._loop.at(time.monotonic() + EVERY_S, self._look)

    def _look(self) -> None:
        self.start()
        if not self._starves() or not self._sessions:
            return
        session = min(self._sessions, key=lambda one: one.unread_since())
        if session.unread_since() <= time.monotonic() - UNREAD_S:
            session.end(
                LeaseExpiredError(
                    f"the client has read nothing for {UNREAD_S:g} s, and others waited for the memory that "
                    "its replies took, so its session was ended"
                )
            )
