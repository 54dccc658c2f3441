"""gRPC, which all of us import from here, and processes that are forked from one that has used it.

gRPC's threads are not in a fork. With gRPC's own support of forks, a child that does nothing with it is sometimes
aborted (`Mutex::Fer with pending CondVar queueing`), such as a `DataLoader`'s worker. So that support is off, unless
the environment says something else or gRPC was imported before this; and a child that would use gRPC, which would
hang, is refused. `import schoolhouse` does not import this module: the first connection does. Freeing a channel or a
server of the parent's would wait for its threads for ever, so a child never collects what was garbage at the fork.
"""

import contextlib
import gc
import os
from collections.abc import Iterator

from schoolhouse_wire.errors import UsageError

_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"


@contextlib.contextmanager
def _without_fork_support() -> Iterator[None]:
    """While gRPC is imported, which is when it reads the environment, and never again."""
    if _SUPPORT in os.environ:
        yield
        return
    os.environ[_SUPPORT] = "0"
    try:
        yield
    finally:
        del os.environ[_SUPPORT]


with _without_fork_support():
    import grpc as grpc

_user: int | None = None  # the process that was the first to use gRPC


def check() -> None:
    """Raise `UsageError` in a process that was forked from one that has used gRPC."""
    if _user not in (None, os.getpid()):
        raise UsageError(
            "this process was forked from one that is connected to a teacher, or serves one, and gRPC does not work "
            "in such a fork; start it by spawn or forkserver, as DataLoader(multiprocessing_context='forkserver') does"
        )


def before_grpc() -> None:
    """To be called before a channel or a server is made; raises as `check` does."""
    global _user
    check()
    _user = os.getpid()


def _in_child() -> None:
    if _user is not None:
        gc.freeze()


os.register_at_fork(after_in_child=_in_child)
