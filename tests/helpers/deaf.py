"""A client that stops reading what its replica sends, while the other ones of its process read on."""

import asyncio
import contextlib
import threading

from schoolhouse.remote.session import Session


class Deaf:
    """Which teacher does not read, and until when."""

    def __init__(self):
        self.go_on, self._teacher = threading.Event(), None

    def begin(self, teacher):
        """From now on it reads one more message, and waits with it."""
        self._teacher = teacher

    def holds(self, session):
        """Whether this session is that of the one who does not read."""
        return self._teacher is not None and not self.go_on.is_set() and session in self._teacher.open_sessions()


@contextlib.contextmanager
def deafness():
    """Sessions that begin in this context can be made deaf."""
    deaf, receive = Deaf(), Session._receive

    async def later(session, data):
        while not deaf.go_on.is_set():
            await asyncio.sleep(0.01)
        if (more := receive(session, data)) is not None:
            await more

    Session._receive = lambda session, data: (later if deaf.holds(session) else receive)(session, data)
    try:
        yield deaf
    finally:
        deaf.go_on.set()
        Session._receive = receive
