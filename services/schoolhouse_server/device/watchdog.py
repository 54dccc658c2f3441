"""A watch on threads that call into a device: it tells when one of them does not come back."""

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from schoolhouse.errors import ConfigError

from schoolhouse_server.common.timer import Alarm, Timer

FORWARD_TIMEOUT_S = 600.0
MAX_FORWARD_TIMEOUT_S = 604_800.0


def checked_timeout_s(given: float) -> float:
    """The time that a forward may take, or 0 for any.

    Raises:
        ConfigError: for what is neither.
    """
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 <= given <= MAX_FORWARD_TIMEOUT_S:
        raise ConfigError(
            f"forward_timeout_s is {given!r}; it must be seconds up to {MAX_FORWARD_TIMEOUT_S:.0f}, more than the "
            "longest forward takes, or 0 for no limit"
        )
    return float(given)


class Pulse:
    """Since when one thread has been at work that should end soon: that which runs within a `with` of this."""

    def __init__(self) -> None:
        self.since = math.inf

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.since = math.inf


class Watchdog:
    """Calls `bark` once, in the timer's thread, when a thread has been at its work for `timeout_s`; 0: never."""

    def __init__(self, timer: Timer, timeout_s: float, pulses: Sequence[Pulse], bark: Callable[[], None]) -> None:
        self._timer, self._timeout_s, self._pulses, self._bark = timer, timeout_s, pulses, bark
        self._alarm: Alarm | None = None
        self._ended = False

    def start(self) -> None:
        """Begin to watch."""
        if self._timeout_s:
            self._alarm = self._timer.at(time.monotonic() + self._timeout_s, self._look)

    def end(self) -> None:
        """Watch no more."""
        self._ended = True
        if self._alarm is not None:
            self._timer.cancel(self._alarm)

    def _look(self) -> None:
        now = time.monotonic()
        due = min(now, *(pulse.since for pulse in self._pulses)) + self._timeout_s
        if self._ended:
            return
        if due <= now:
            self._bark()
        else:
            self._alarm = self._timer.at(due, self._look)
