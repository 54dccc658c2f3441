"""Processes of benchmarks, each forked from one that has imported torch and Schoolhouse, so that it starts at once."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "schoolhouse.remote.teacher", "schoolhouse_server.replica.replica"])


def start(target: Callable[..., None], *args: Any) -> tuple[Connection, Any]:
    """Run `target(connection, *args)`; returns the other end of the connection, and the process.

    The process is to end when the connection does. In any case it ends with this one.
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return ours, process
