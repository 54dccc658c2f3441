"""A session's lease, which ends when its client has been silent for too long."""

import time
from collections.abc import Callable

from schoolhouse_wire.loop import Alarm, Loop


class Lease:
    """Calls `expire` once, in the loop, after a silence of `lease_s`; with 0, never."""

    def __init__(self, loop: Loop, lease_s: float, expire: Callable[[], None]) -> None:
        self._loop = loop
        self._lease_s = lease_s
        self._expire = expire
        self._heard = 0.0
        self._listening = True
        self._alarm: Alarm | None = None

    def start(self) -> None:
        """Begin to count the silence."""
        self._heard = time.monotonic()
        if self._lease_s:
            self._alarm = self._loop.at(self._heard + self._lease_s, self._check)

    def hear(self, listening: bool) -> None:
        """Note a message; while the server is not `listening`, as it works on one, the silence is not the client's."""
        self._heard = time.monotonic()
        self._listening = listening

    def end(self) -> None:
        """End the lease: `expire` is not called any more."""
        if self._alarm is not None:
            self._loop.cancel(self._alarm)

    def _check(self) -> None:
        now = time.monotonic()
        end = (self._heard if self._listening else now) + self._lease_s
        if now < end:
            self._alarm = self._loop.at(end, self._check)
        else:
            self._expire()
