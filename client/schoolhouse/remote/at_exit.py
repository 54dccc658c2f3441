"""At the end of the interpreter, close connections first, since they have threads inside gRPC."""

import atexit
import time
import weakref
from collections.abc import Collection
from typing import Protocol

from schoolhouse_wire import background

_TIMEOUT_S = 5.0


class _Thread(Protocol):
    def join(self, timeout_s: float) -> None: ...


class _Connection(Protocol):
    def threads(self) -> Collection[_Thread]: ...

    def close(self) -> None: ...


_in_use: "weakref.WeakSet[_Connection]" = weakref.WeakSet()


def close_first(connection: _Connection) -> None:
    """Close the connection at exit, before what was registered earlier, such as the close of a server in this process.

    The latest registration runs first, so each call registers anew.
    """
    _in_use.add(connection)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    """Close all, and wait for their threads: one that is inside torch or gRPC at the end aborts the process."""
    threads: list[_Thread] = []
    for connection in list(_in_use):
        threads += connection.threads()
        background.run(connection.close, "closing a connection at exit", background.go_on)
    deadline = time.monotonic() + _TIMEOUT_S
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
