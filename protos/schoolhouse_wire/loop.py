"""An event loop in a thread of its own, in which connections live: sessions and watches are tasks, deadlines timers.

A replica has one loop, and a client process has one for all its connections. What other threads want of the loop they
`call`; what would hold it up, such as copying many bytes, it does `elsewhere`. In a fork nothing happens that is asked
of it: a fork shares the file descriptors that wake the parent's loop, but has not its thread.
"""

import asyncio
import errno
import functools
import os
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from schoolhouse_wire import background
from schoolhouse_wire.executor import DaemonExecutor

T = TypeVar("T")
_Task: TypeAlias = "asyncio.Task[None]"

_HELPERS = 4  # threads for what is done elsewhere
_STOP_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Alarm:
    """A call that is to be made; `ring` is None once it was cancelled, or made."""

    ring: Callable[[], None] | None
    handle: asyncio.TimerHandle | None = None


class Loop:
    """An asyncio loop that runs in a daemon thread from its first use until `stop`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._waking = False  # whether the loop has been woken up to make the calls
        self._stopped = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._helpers = DaemonExecutor(_HELPERS, f"{name}-helper")
        self._tasks: set[_Task] = set()  # the loop itself holds only weak references
        self._asyncio: asyncio.AbstractEventLoop | None = None

    @property
    def asyncio(self) -> asyncio.AbstractEventLoop:
        """The asyncio loop, for what runs in it."""
        assert self._asyncio is not None
        return self._asyncio

    @property
    def runs_here(self) -> bool:
        """Whether the calling thread is the loop's."""
        return self._thread is not None and self._thread.ident == threading.get_ident() and self._pid == os.getpid()

    @property
    def busy(self) -> bool:
        """Whether tasks are under way."""
        return bool(self._tasks) and self._pid == os.getpid()

    def start(self) -> "Loop":
        """Start the thread, unless it runs; raises `RuntimeError` if there can be no more threads."""
        with self._lock:
            if self._thread is None and not self._stopped:
                if self._asyncio is None:
                    self._asyncio = asyncio.new_event_loop()
                    self._asyncio.set_exception_handler(_on_exception)
                thread = background.thread(self._run, name=self._name, on_death=background.go_on)
                thread.start()
                self._thread = thread  # only now: if starting it raises, the next call tries again
                self.call(lambda: None)  # makes the calls that came before
        return self

    def call(self, step: Callable[..., object], *args: Any) -> None:
        """Have the loop call `step(*args)` soon; calls from many threads share one wake-up.

        It takes no lock, so that the garbage collector may call it anywhere. In a fork it does nothing.
        """
        if self._pid != os.getpid():
            return
        self._calls.append((step, args))
        if not self._waking and self._asyncio is not None:
            self._waking = True
            try:
                (self._asyncio.call_soon if self.runs_here else self._asyncio.call_soon_threadsafe)(self._make_calls)
            except RuntimeError:  # closed
                self._calls.clear()

    def _make_calls(self) -> None:
        self._waking = False  # first: what is added from here on wakes the loop again, which has other work before it
        for _ in range(len(self._calls)):
            step, args = self._calls.popleft()
            try:
                step(*args)
            except BaseException as err:
                background.failed(err, "what the event loop was asked to do", background.go_on)

    def here(self, step: Callable[..., object], *args: Any) -> None:
        """Call `step(*args)`: at once in the loop's own thread, else soon, there."""
        if self.runs_here:
            step(*args)
        else:
            self.call(step, *args)

    def at(self, when: float, ring: Callable[[], None]) -> Alarm:
        """Call `ring` at `when`, on time.monotonic's clock, in the loop's thread; any thread may ask."""
        alarm = Alarm(ring)
        self.here(self._set, alarm, when)
        return alarm

    def _set(self, alarm: Alarm, when: float) -> None:
        if alarm.ring is not None:
            alarm.handle = self.asyncio.call_at(when, _rung, alarm)

    def cancel(self, alarm: Alarm) -> None:
        """Cancel a call, unless it has been made, or is being made just now."""
        alarm.ring = None  # which also frees what it refers to
        if alarm.handle is not None:
            self.here(alarm.handle.cancel)

    def run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine in the loop, for another thread to wait for."""
        if self._stopped:
            work.close()
            raise RuntimeError(f"the loop {self._name} has stopped")
        self.start()
        return asyncio.run_coroutine_threadsafe(work, self.asyncio)

    def ask(self, step: Callable[..., T], *args: Any, timeout_s: float | None = None) -> T:
        """What `step(*args)` returns, called in the loop; waits for it, in another thread, for at most `timeout_s`."""

        async def answer() -> T:
            return step(*args)

        return self.run(answer()).result(timeout_s)

    def task(self, work: Coroutine[Any, Any, None], *, name: str, on_death: Callable[[BaseException], None]) -> _Task:
        """Begin a task, in the loop's thread; if it fails, the error is logged and `on_death(error)` called."""
        task = self.asyncio.create_task(_watched(work, name, on_death), name=name)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._on_end, work))
        return task

    def _on_end(self, work: Coroutine[Any, Any, None], task: _Task) -> None:
        self._tasks.discard(task)
        work.close()  # for a task that was cancelled before it began

    async def elsewhere(self, step: Callable[..., T], *args: Any) -> T:
        """The result of `step(*args)`, called in another thread, so that the loop goes on meanwhile."""
        return await self.asyncio.run_in_executor(self._helpers, functools.partial(step, *args))

    def stop(self) -> None:
        """Cancel all tasks and timers, and end the thread; not to be called in it."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._stopped = True
            thread = self._thread
        if thread is None:
            return
        try:
            self.asyncio.call_soon_threadsafe(self.asyncio.stop)
        except RuntimeError:  # stopped before
            return
        thread.join(_STOP_TIMEOUT_S)
        self._helpers.shutdown()

    def _run(self) -> None:
        asyncio.set_event_loop(self.asyncio)
        try:
            while not self._stopped:
                background.run(self.asyncio.run_forever, self._name, background.go_on)
        finally:
            self._finish()

    def _finish(self) -> None:
        tasks = asyncio.all_tasks(self.asyncio)
        for task in tasks:
            task.cancel()
        if tasks:
            self.asyncio.run_until_complete(asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S))
        self.asyncio.run_until_complete(self.asyncio.shutdown_asyncgens())
        self.asyncio.close()
        self._calls.clear()


def eager(work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
    """Run a coroutine up to the first time that it waits; returns the rest, to be awaited, or None if it has ended."""
    try:
        waits_for = work.send(None)
    except StopIteration:
        return None
    return _rest(work, waits_for)


@types.coroutine
def _rest(work: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    while True:
        try:
            value = yield waits_for
        except BaseException as err:
            step = functools.partial(work.throw, err)
        else:
            step = functools.partial(work.send, value)
        try:
            waits_for = step()
        except StopIteration:
            return


def _on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a callback raised, unless gRPC's own has come too late.

    Whichever thread drops the last of its objects closes the socket that wakes the loops, also while one of them is
    about to read from it; then there are no events left to be told of.
    """
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name.endswith("_handle_events"):
            return
    loop.default_exception_handler(context)


def _rung(alarm: Alarm) -> None:
    ring, alarm.ring, alarm.handle = alarm.ring, None, None
    if ring is not None:
        background.run(ring, "what was to be done in time", background.go_on)


async def _watched(work: Coroutine[Any, Any, None], name: str, on_death: Callable[[BaseException], None]) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except BaseException as err:
        background.failed(err, name, on_death)
