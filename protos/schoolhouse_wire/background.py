"""Background work, in our threads or in callbacks: if it fails, whoever waits for it is told.

`thread` makes every thread, and `Loop.task` every task of an event loop; a thread that loops wraps each of its turns in
`run`, so that it survives one that fails; `called` wraps what futures and gRPC call back. All of them log any error
with its traceback, and then call `on_death(error)`. `failed` does that in a generator or a task. A test finds threads
and tasks that are made in another way.

| What runs | What waits for it | If it fails |
|---|---|---|
| `schoolhouse-client`, the thread of a client's loop | all its requests | it logs the error, and goes on |
| `schoolhouse-session`, a task | the requests that a replica has | they go to another replica, or to a new session |
| the messages of a request | the caller that waits for its features | the request fails; the session goes on |
| `schoolhouse-sending`, a task | the requests that a replica has | the call is cancelled; the session sees it |
| `schoolhouse-watch`, a task | requests that look for a replica | they use the known ones; it watches again later |
| deadlines, leases, retries: alarms | requests that are late or parked | that one fails; the alarm is set again |
| `schoolhouse-comparison`, a task | the caller that waits for verified features | it gets the error instead |
| `schoolhouse-channel`, a task | nothing; it closes a channel | the channel is closed when it is freed |
| `schoolhouse-waiter` | requests that need a head, or whose revision is gone | the request fails |
| `schoolhouse-handshake` | the caller that asks why a server is silent | the reason stays unknown |
| callbacks of a request's future | the caller that waits for verified features | it gets the error instead |
| `schoolhouse-copier` | the thread that copies into shared memory | it raises the error; the copier goes on |
| `schoolhouse-replica`, the thread of a replica's loop | all its clients | it logs the error, and goes on |
| `schoolhouse-session-reads`, a task | the client of that session | it ends with `TeacherInternalError` |
| `schoolhouse-session-writes`, a task | the client of that session | it ends with `TeacherInternalError` |
| `schoolhouse-engine-in`, `-out` | all requests of that teacher | other replicas answer them; this one is replaced |
| `schoolhouse-head`, a task | the request for a head | the request fails |
| `schoolhouse-tidies-up`, a task | the replica, whose idle memory stays its own | it looks again ten seconds later |
| leases, deadlines, watchdog, relief: alarms of the replica | whose time it is | the other alarms still ring in time |
| an RPC, in gRPC's task | its client | it is told an error without the text of the exception |
| `schoolhouse-directory`, the thread of a directory's loop | all its clients | it logs the error, and goes on |
| `schoolhouse-tokens` | the operator who revokes a token | it reads the file again a moment later |
| `schoolhouse-http` | readers of the page or the metrics | it serves again a second later |
| `schoolhouse-keeper` | the whole pool | its process ends, and Ray starts it again |
| `schoolhouse-demo` | the demo | the student is ended, and the demo says why |
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


def run(body: Callable[[], T], what: str, on_death: Callable[[BaseException], T]) -> T:
    """Return what `body` returns or, if it raises, what `on_death(error)` returns, which tells whoever waits."""
    try:
        return body()
    except BaseException as err:
        return failed(err, what, on_death)


def failed(error: BaseException, what: str, on_death: Callable[[BaseException], T]) -> T:
    """Log an error and call `on_death`, where `run` cannot be used, as in a generator.

    `on_death` gets the error without its traceback, which would keep everything in its frames alive.
    """
    with contextlib.suppress(Exception):  # raised by a logging handler of the program
        _log.error("%s failed", what, exc_info=error)
    return on_death(error.with_traceback(None))


def thread(body: Callable[[], None], *, name: str, on_death: Callable[[BaseException], None]) -> threading.Thread:
    """A daemon thread that runs `body`; the caller starts it."""
    return threading.Thread(target=run, args=(body, name, on_death), name=name, daemon=True)


def called(body: Callable[P, T], what: str, on_death: Callable[[BaseException], T]) -> Callable[P, T]:
    """A callback for somebody else's thread, which takes the arguments of `body`."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return body(*args, **kwargs)
        except BaseException as err:
            return failed(err, what, on_death)

    return call


def go_on(_error: BaseException) -> None:
    """An `on_death` that does nothing, for work that nothing waits for, or that is done again."""
