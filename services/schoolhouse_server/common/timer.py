"""A timer: one thread that makes calls at given times, such as deadlines of requests and leases of sessions."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from schoolhouse_wire import background

_REST_S = 1.0  # pause after the timer itself failed
_MANY = 1024  # cancelled entries that are kept before they are cleared out
_LONGEST_S = 3600.0  # the longest single sleep, as locks take no infinite or very long timeouts


@dataclass(eq=False)
class Alarm:
    """A call that is to be made; `ring` is None once it was cancelled, or made."""

    ring: Callable[[], None] | None


class Timer:
    """Makes calls at given times, on time.monotonic's clock; calls must be short, as they delay each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._cancelled = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def at(self, when: float, ring: Callable[[], None]) -> Alarm:
        """Call `ring` at time `when`, in the timer's thread."""
        alarm = Alarm(ring)
        with self._changed:
            heapq.heappush(self._alarms, (when, next(self._order), alarm))
            if self._thread is None and not self._closed:
                thread = background.thread(self._run, name="schoolhouse-timer", on_death=background.go_on)
                thread.start()
                self._thread = thread  # only now: if starting it raises, the next alarm tries again
            if self._alarms[0][2] is alarm:
                self._changed.notify()
        return alarm

    def cancel(self, alarm: Alarm) -> None:
        """Cancel a call, unless it has been made, or is being made just now."""
        with self._changed:
            if alarm.ring is None:
                return
            alarm.ring = None  # which also frees what it refers to
            self._cancelled += 1
            if self._cancelled > _MANY and 2 * self._cancelled > len(self._alarms):
                self._alarms = [entry for entry in self._alarms if entry[2].ring is not None]
                heapq.heapify(self._alarms)
                self._cancelled = 0

    def close(self) -> None:
        """Stop; no further calls are made."""
        with self._changed:
            self._closed = True
            self._alarms.clear()
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        while (ring := background.run(self._wait, "waiting for an alarm", _rest)) is not None:
            background.run(ring, "what was to be done in time", background.go_on)
            del ring

    def _wait(self) -> Callable[[], None] | None:
        """Wait for the next call that is due, and return it; None once closed."""
        with self._changed:
            while not self._closed:
                pause = min(self._alarms[0][0] - time.monotonic(), _LONGEST_S) if self._alarms else None
                if pause is not None and pause <= 0:
                    alarm = heapq.heappop(self._alarms)[2]
                    ring, alarm.ring = alarm.ring, None
                    if ring is not None:
                        return ring
                    self._cancelled -= 1
                else:
                    self._changed.wait(pause)
            return None


def _rest(_error: BaseException) -> Callable[[], None]:
    """Pause before waiting again, as that may fail once more."""
    return lambda: time.sleep(_REST_S)
