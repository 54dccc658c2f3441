"""How many replicas a teacher should have: a policy over queueing delay, with hysteresis; it needs no Ray or clock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schoolhouse_wire.v1 import directory_pb2

from schoolhouse_server.pool.config import Autoscale, Bounds

_QUIET_PART = 0.25  # of the target delay; only below that may there be a replica too many
_MAX_PATIENCE = 16
_BUSY_STAGE = "forward"


@dataclass(frozen=True)
class Pressure:
    """The load on a teacher's replicas: how long requests wait, and the sum of the replicas' busy shares of time."""

    delay_s: float
    busy: float


class Scaler:
    """Decides when to grow and when to shrink, from the pressure at each of many moments.

    It grows fast, in proportion to the delay, at most to twice as many replicas, and then waits until those serve. It
    shrinks slowly, by one replica at a time. If it has to grow soon after it shrank, it waits twice as long before it
    shrinks again, and up to 16 times as long: so with a load that needs all replicas, it tries ever more rarely.
    """

    def __init__(self) -> None:
        self._over_since: float | None = None
        self._under_since: float | None = None
        self._shrank_at = -math.inf
        self._patience = 1

    def decide(self, settings: Autoscale, bounds: Bounds, count: int, pressure: Pressure, now_s: float) -> int:
        """How many replicas there should be instead of `count`.

        While some of those do not serve yet, the caller gives `count` as `bounds.max`: no more are started before they
        serve, but there may be fewer.
        """
        over = pressure.delay_s > settings.target_delay_s
        under = pressure.delay_s < _QUIET_PART * settings.target_delay_s and (
            pressure.busy <= settings.max_busy * (count - 1)
        )
        self._over_since = (self._over_since if self._over_since is not None else now_s) if over else None
        self._under_since = (self._under_since if self._under_since is not None else now_s) if under else None
        if self._over_since is not None and now_s - self._over_since >= settings.up_after_s:
            return self._grow(settings, bounds, count, pressure.delay_s, now_s)
        shrink_after_s = settings.down_after_s * self._patience
        if self._under_since is not None and now_s - self._under_since >= shrink_after_s and count > bounds.min:
            self._under_since, self._shrank_at = None, now_s
            return count - 1
        return bounds.clamp(count)

    def _grow(self, settings: Autoscale, bounds: Bounds, count: int, delay_s: float, now_s: float) -> int:
        wanted = bounds.clamp(math.ceil(count * min(delay_s / settings.target_delay_s, 2.0)))
        if wanted > count:
            regretted = now_s - self._shrank_at <= 2 * settings.down_after_s * self._patience
            self._patience = min(2 * self._patience, _MAX_PATIENCE) if regretted else 1
        self._over_since = None
        return wanted


class Meter:
    """Computes the pressure from the loads that replicas report, which hold sums since their start."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, float]] = {}  # busy seconds by replica, and when they were read

    def read(self, loads: Sequence[tuple[str, directory_pb2.Load]], now_s: float) -> Pressure:
        """The pressure since the last reading; its delay is the mean over the replicas."""
        busy, read = 0.0, {}
        for replica, load in loads:
            spent_s = load.stage_s.get(_BUSY_STAGE, 0.0)
            before_s, before_at = self._before.get(replica, (spent_s, now_s))
            if now_s > before_at:
                busy += min((spent_s - before_s) / (now_s - before_at), 1.0)
            read[replica] = (spent_s, now_s)
        self._before = read
        delays = [load.queue_delay_s or _estimated_delay_s(load) for _, load in loads]
        return Pressure(sum(delays) / len(delays) if delays else 0.0, busy)


def _estimated_delay_s(load: directory_pb2.Load) -> float:
    """How long the last request in the queue will wait, if each takes as long as requests did on average."""
    return load.queued * load.stage_s.get(_BUSY_STAGE, 0.0) / load.served if load.served else 0.0
