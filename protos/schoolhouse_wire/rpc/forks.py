"""The one place that imports gRPC, and what happens in processes that are forked from one that has used it.

A fork does not have gRPC's threads. With gRPC's own fork support, a child that never touches gRPC, such as a
`DataLoader`'s worker, is sometimes aborted (`Mutex::Fer with pending CondVar queueing`). So that support is turned off,
unless the environment says otherwise or something else has imported gRPC before; and a child that tries to use gRPC,
which would hang, gets a `UsageError`. `import schoolhouse` does not import this module; the first connection does.
Freeing a channel or a server of the parent would wait for the parent's threads for ever, so a child never collects
objects that existed at the fork.
"""

import contextlib
import gc
import os
from collections.abc import Iterator

from schoolhouse_wire.errors import UsageError

_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"


@contextlib.contextmanager
def _without_fork_support() -> Iterator[None]:
    """Context for the import of gRPC, the only time at which it reads the environment."""
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

_user: int | None = None  # id of the process that has used gRPC


def check() -> None:
    """Raise `UsageError` in a process that was forked from one that has used gRPC."""
    if _user not in (None, os.getpid()):
        raise UsageError(
            "this process was forked from one that is connected to a teacher, or serves one, and gRPC does not work "
            "in such a fork; start it by spawn or forkserver, as DataLoader(multiprocessing_context='forkserver') does"
        )


def before_grpc() -> None:
    """Call this before a channel or a server is made; raises as `check` does."""
    global _user
    check()
    _user = os.getpid()


def _in_child() -> None:
    if _user is not None:
        gc.freeze()


os.register_at_fork(after_in_child=_in_child)
