"""When the interpreter ends: sessions end before it does."""

import atexit
import time
import weakref
from collections.abc import Collection
from typing import Protocol

_TIMEOUT_S = 5.0


class _Session(Protocol):
    def join(self, timeout_s: float) -> None: ...


class _Teacher(Protocol):
    def open_sessions(self) -> Collection[_Session]: ...

    def close(self) -> None: ...


_in_use: "weakref.WeakSet[_Teacher]" = weakref.WeakSet()


def close_first(teacher: _Teacher) -> None:
    """Have the teacher closed at exit, before what was registered earlier, such as the close of a server here."""
    _in_use.add(teacher)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    """A thread that is within torch or gRPC when the interpreter ends aborts the process."""
    sessions: list[_Session] = []
    for teacher in list(_in_use):
        sessions += teacher.open_sessions()
        teacher.close()
    deadline = time.monotonic() + _TIMEOUT_S
    for session in sessions:
        session.join(max(deadline - time.monotonic(), 0.0))
