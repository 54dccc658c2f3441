"""The outbox, which interleaves the messages of many requests on one stream."""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from schoolhouse_wire import background
from schoolhouse_wire.loop import Loop

T = TypeVar("T")


@dataclass(frozen=True)
class Elsewhere:
    """Yielded by a source that must copy much for its next message: `step` is called in another thread meanwhile."""

    step: Callable[[], object]


Source: TypeAlias = Iterator[T | Elsewhere]


class Outbox(Generic[T]):
    """Messages of many requests for one stream: `next` takes one of each in turn, and waits while there is none.

    Any thread may put, and a finalizer too; the rest happens in the loop. It has no bound of its own: its owner bounds
    the requests in flight. A source that works `Elsewhere` has its next turn when that is done; only one does so at a
    time.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._arrivals: deque[Source[T]] = deque()
        self._active: deque[Source[T]] = deque()
        self._away: deque[tuple[Source[T], Elsewhere]] = deque()  # the first one is at work
        self._waiter: asyncio.Future[None] | None = None
        self._ready: Callable[[], None] | None = None
        self._telling = False
        self._closed = False

    def put(self, messages: Source[T]) -> None:
        """Append a source of messages, which makes each when the stream is ready for it."""
        if not self._closed:
            self._arrivals.append(messages)
            self._loop.here(self._wake)

    def wake(self) -> None:
        """Have who waits in `next` look again."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake(self) -> None:
        self.wake()
        if self._ready is not None and not self._telling:
            self._telling = True
            self._loop.call(self._tell)  # not at once, since a finalizer may put in the middle of anything

    def _tell(self) -> None:
        self._telling = False
        if self._ready is not None:
            self._ready()

    def when_ready(self, ready: Callable[[], None]) -> None:
        """From now on call `ready()` soon after each `put`, for who takes messages by `take` and not by `next`."""
        self._ready = ready
        self._wake()

    def add(self, messages: Source[T]) -> None:
        """As `put`, in the loop, for who then takes the messages."""
        if not self._closed:
            self._arrivals.append(messages)

    def take(self) -> T | None:
        """The next message, if there is one now."""
        while not self._closed:
            while self._arrivals:
                self._active.append(self._arrivals.popleft())
            if not self._active:
                return None
            source = self._active.popleft()
            message = next(source, None)
            if isinstance(message, Elsewhere):
                self._send_away(source, message)
            elif message is not None:
                self._active.append(source)
                return message
        return None

    async def next(self) -> T | None:
        """The next message; None once the outbox is closed. Only one task may wait for it."""
        while (message := self.take()) is None and not self._closed:  # a source may close it as it ends
            self._waiter = self._loop.asyncio.create_future()
            await self._waiter
        return message

    def _send_away(self, source: Source[T], work: Elsewhere) -> None:
        self._away.append((source, work))
        if len(self._away) == 1:
            self._loop.task(self._work(), name="copying what is sent", on_death=background.go_on)

    async def _work(self) -> None:
        while self._away:
            source, work = self._away[0]
            try:
                await self._loop.elsewhere(work.step)
            except asyncio.CancelledError:
                raise
            except BaseException as err:
                source = itertools.chain(_thrown(source, err), source)
            self._away.popleft()
            if not self._closed:
                self._active.append(source)
            self._wake()

    def close(self) -> None:
        """Send nothing more; `next` returns None from now on. Any thread may call this."""
        self._closed = True
        self._loop.here(self._wake)

    def clear(self) -> None:
        """After `close`, free what was not sent. A finalizer must not call this, as sources may do anything."""
        assert self._closed
        self._ready = None
        self._active.clear()
        self._arrivals.clear()


def _thrown(source: Source[T], error: BaseException) -> Source[T]:
    """What a source yields when the error is raised in it, which happens in its turn."""
    with contextlib.suppress(StopIteration):
        yield source.throw(error)  # type: ignore[attr-defined]  # sources that work elsewhere are generators
