"""A watch over threads that call into a device, to find out when one of them does not return."""

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.loop import Alarm, Loop

FORWARD_TIMEOUT_S = 600.0
MAX_FORWARD_TIMEOUT_S = 604_800.0


def checked_timeout_s(given: float) -> float:
    """Check the time that a forward may take, where 0 means any time.

    Raises:
        ConfigError: for an invalid time.
    """
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 <= given <= MAX_FORWARD_TIMEOUT_S:
        raise ConfigError(
            f"forward_timeout_s is {given!r}; it must be seconds up to {MAX_FORWARD_TIMEOUT_S:.0f}, more than the "
            "longest forward takes, or 0 for no limit"
        )
    return float(given)


class Pulse:
    """Since when one thread has been busy with work that should end soon; such work runs in a `with` of this object."""

    def __init__(self) -> None:
        self.since = math.inf

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.since = math.inf


class Watchdog:
    """Calls `bark` once, in the loop, when a thread has been busy for `timeout_s`; with 0, never."""

    def __init__(self, loop: Loop, timeout_s: float, pulses: Sequence[Pulse], bark: Callable[[], None]) -> None:
        self._loop, self._timeout_s, self._pulses, self._bark = loop, timeout_s, pulses, bark
        self._alarm: Alarm | None = None
        self._ended = False

    def start(self) -> None:
        """Begin to watch."""
        if self._timeout_s:
            self._alarm = self._loop.at(time.monotonic() + self._timeout_s, self._look)

    def end(self) -> None:
        """Stop watching."""
        self._ended = True
        if self._alarm is not None:
            self._loop.cancel(self._alarm)

    def _look(self) -> None:
        now = time.monotonic()
        due = min(now, *(pulse.since for pulse in self._pulses)) + self._timeout_s
        if self._ended:
            return
        if due <= now:
            self._bark()
        else:
            self._alarm = self._loop.at(due, self._look)
