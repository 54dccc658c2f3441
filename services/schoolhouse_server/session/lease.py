"""A session's lease, which ends when its client has been silent for too long."""

import threading
import time
from collections.abc import Callable

from schoolhouse_server.common.timer import Alarm, Timer


class Lease:
    """Calls `expire` once, in the timer's thread, after a silence of `lease_s`; with 0, never."""

    def __init__(self, timer: Timer, lease_s: float, expire: Callable[[], None]) -> None:
        self._timer = timer
        self._lease_s = lease_s
        self._expire = expire
        self._lock = threading.Lock()
        self._heard = 0.0
        self._listening = True
        self._ended = False
        self._alarm: Alarm | None = None

    def start(self) -> None:
        """Begin to count the silence."""
        self._heard = time.monotonic()
        if self._lease_s:
            self._check()

    def hear(self, listening: bool) -> None:
        """Note a message; while the server is not `listening`, as it works on one, the silence is not the client's."""
        self._heard = time.monotonic()
        self._listening = listening

    def end(self) -> None:
        """End the lease: `expire` is not called any more."""
        with self._lock:
            self._ended = True
            if self._alarm is not None:
                self._timer.cancel(self._alarm)

    def _check(self) -> None:
        with self._lock:
            if self._ended:
                return
            now = time.monotonic()
            end = (self._heard if self._listening else now) + self._lease_s
            if now < end:
                self._alarm = self._timer.at(end, self._check)
                return
            self._ended = True
        self._expire()
