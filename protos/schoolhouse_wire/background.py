"""What runs in threads of ours, and in others' threads for us: none ends without whoever waits for it being told.

`thread` makes every thread; loops `run` each of their turns, so that one that fails is not the last; what futures and
gRPC call back is `called`. All of them log an error, whatever it is, with its traceback, and call `on_death(error)`.
`failed` does that for a generator, and would for a task of an event loop. A test finds threads that are not made here.

| What runs | Who waits for it | Should it fail |
|---|---|---|
| `schoolhouse-session` (client) | the requests that a replica has | another replica gets them, or a new session |
| the messages of a request | who waits for its features | it fails alone, and the session goes on |
| what a session sends (gRPC's thread) | the requests that a replica has | the call is cancelled; the reader sees it |
| `schoolhouse-watch` | requests that look for a replica | they have those known; it watches again, with backoff |
| `schoolhouse-deadlines` | requests that are late or parked | the one that is to blame fails; it goes on |
| `schoolhouse-follow` | a request whose revision is gone | it fails |
| `schoolhouse-handshake` | who asks why a server is silent | that is not known |
| callbacks of a request's future | who waits for verified features | they get the error in their place |
| `schoolhouse-copier` | who copies into shared memory | the error is raised there; it goes on |
| `schoolhouse-reader` (replica) | the client of that session | the session ends with `TeacherInternalError` |
| `schoolhouse-engine-in`, `-out` | all requests of that teacher | others answer them; the replica is to be replaced |
| `schoolhouse-head` | who asks for a head | the request fails |
| `schoolhouse-timer` | all who have an alarm | the others ring in time |
| `schoolhouse-rpc`, `-directory` | gRPC, for each call | the call fails; the thread takes the next one |
| `schoolhouse-tokens` | who revokes a token | it looks at the file again a moment later |
| `schoolhouse-http` | who looks at the page or the metrics | it serves them again a second later |
| `schoolhouse-keeper` | the whole pool | its process ends, and Ray starts it again |
| `schoolhouse-demo` | the demo | the student is ended, and the demo says why |
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


def run(body: Callable[[], T], what: str, on_death: Callable[[BaseException], T]) -> T:
    """What `body` returns, or, should it raise, what `on_death(error)` does, which tells whoever waits."""
    try:
        return body()
    except BaseException as err:
        return failed(err, what, on_death)


def failed(error: BaseException, what: str, on_death: Callable[[BaseException], T]) -> T:
    """Log the error and tell of it, where `run` cannot stand, as in a generator.

    Who is told gets it without its traceback: whoever keeps it would keep all that the frames hold.
    """
    with contextlib.suppress(Exception):  # of a program's own handler
        _log.error("%s failed", what, exc_info=error)
    return on_death(error.with_traceback(None))


def thread(body: Callable[[], None], *, name: str, on_death: Callable[[BaseException], None]) -> threading.Thread:
    """A thread that is to be started, and then runs `body`; it does not keep the process alive."""
    return threading.Thread(target=run, args=(body, name, on_death), name=name, daemon=True)


def called(body: Callable[P, T], what: str, on_death: Callable[[BaseException], T]) -> Callable[P, T]:
    """What somebody else's thread is to call, with what `body` takes."""
    return lambda *args, **kwargs: run(functools.partial(body, *args, **kwargs), what, on_death)


def go_on(_error: BaseException) -> None:
    """For work that nobody waits for, or that is done again: it is in the log, and that is all."""
