"""Threads for gRPC's handlers that, unlike those of ThreadPoolExecutor, do not keep the process alive."""

import functools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from schoolhouse_wire import background

_END_TIMEOUT_S = 5.0
_Work = tuple["Future[Any]", Callable[[], Any]]


class DaemonExecutor(Executor):
    """Runs calls in up to `max_workers` daemon threads, which are started when none is idle.

    A session's handler runs as long as its client stays. A script that ends without `close()`, for example by an
    exception, must end all the same.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers = max_workers
        self._name = name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._workers: list[threading.Thread] = []
        self._ended = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `fn(*args, **kwargs)` in a thread; beyond `max_workers`, the call waits until one is free."""
        if self._ended:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._queue.put((future, lambda: fn(*args, **kwargs)))
        if not self._idle.acquire(blocking=False):
            self._start_worker()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end after what was submitted, and wait at most 5 s for them; nothing is cancelled."""
        with self._lock:
            self._ended = True
            for _ in self._workers:
                self._queue.put(None)
        deadline = time.monotonic() + (_END_TIMEOUT_S if wait else 0.0)
        for worker in self._workers:
            worker.join(max(deadline - time.monotonic(), 0.0))

    def _start_worker(self) -> None:
        with self._lock:
            if len(self._workers) < self._max_workers:
                name = f"{self._name}-{len(self._workers) + 1}"
                worker = background.thread(self._work, name=name, on_death=background.go_on)
                worker.start()
                self._workers.append(worker)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            background.run(functools.partial(_answer, *work), "answering a call", background.go_on)
            del work
            self._idle.release()


def _answer(future: "Future[Any]", call: Callable[[], Any]) -> None:
    try:
        if future.set_running_or_notify_cancel():
            future.set_result(call())
    except BaseException as err:
        future.set_exception(err)
    finally:
        del future, call  # an error's traceback refers to this frame
