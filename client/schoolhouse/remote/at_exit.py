"""At the end of the interpreter, end connections first: a thread inside gRPC or torch would abort the process then."""

import atexit
import time
import weakref
from typing import Protocol

from schoolhouse_wire import background

from schoolhouse.remote import connections

_TIMEOUT_S = 5.0
_LOOK_AGAIN_S = 0.005


class _Connection(Protocol):
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
    """Close all, wait until sessions and channels have ended, and end the event loop's thread."""
    for connection in list(_in_use):
        background.run(connection.close, "closing a connection at exit", background.go_on)
    deadline = time.monotonic() + _TIMEOUT_S
    while connections.busy() and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)
    connections.stop()
