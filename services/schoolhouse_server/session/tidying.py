"""Gives memory that was used, and has lain idle since, back to the system."""

import time
import weakref
from collections.abc import Callable

from schoolhouse_wire import background, memory
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.same_host.shared_memory import ReplicaSegment

EVERY_S = 10.0  # training asks again sooner than that, and reuses what it has


class Tidying:
    """Looks every ten seconds which segments took no block, and whether the replica answered nothing.

    Memory of segments goes back after one such interval. What the allocator of C keeps, and idle receive buffers, go
    back once after each spell of work, if `allocator`.
    """

    def __init__(self, loop: Loop, work: Callable[[], object], *, allocator: bool) -> None:
        """`work` returns something else whenever there was work, and None while there is."""
        self._loop, self._work, self._allocator = loop, work, allocator
        self._segments: weakref.WeakSet[ReplicaSegment] = weakref.WeakSet()
        self._seen: object = None
        self._trimmed: object = None

    def start(self) -> None:
        """Look for the first time in ten seconds; it ends with the loop."""
        self._loop.at(time.monotonic() + EVERY_S, self._ring)

    def add(self, segment: ReplicaSegment) -> None:
        """Look after a segment for as long as it lives."""
        self._segments.add(segment)

    def _ring(self) -> None:
        self._loop.task(self._tidy_up(), name="schoolhouse-tidies-up", on_death=background.go_on)
        self.start()

    async def _tidy_up(self) -> None:
        for segment in list(self._segments):
            await self._loop.elsewhere(segment.give_back_if_idle)
            del segment
        seen, self._seen = self._seen, self._work()
        if self._allocator and self._seen is not None and self._seen == seen != self._trimmed:
            self._trimmed = seen
            await self._loop.elsewhere(memory.give_back_freed)
