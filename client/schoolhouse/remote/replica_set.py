"""The replicas of a teacher that a directory lists, how far its news are believed, and the choice among them."""

import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from schoolhouse_wire.v1 import directory_pb2

SAME_HOST, SAME_ZONE, ELSEWHERE = range(3)
DOUBT_S = 10.0  # how long news that leave nothing to ask are doubted, since a new directory may not know all yet
_BUSIER, _SLACK = 2.0, 2.0
_LEAST_BACKOFF_S = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """One replica as the directory reports it."""

    address: str
    id: str = ""
    revision: str = ""  # empty if it is not known
    draining: bool = False
    distance: int = ELSEWHERE
    queued: int = 0  # requests that waited for its device at the time of the report

    def may_serve(self, revision: str) -> bool:
        """Whether its revision is `revision` or not known; true for the empty revision, which stands for any."""
        return not revision or self.revision in ("", revision)


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas of a teacher. `current` is the revision for jobs that begin now; empty means any."""

    replicas: tuple[Replica, ...] = ()
    current: str = ""

    @classmethod
    def from_wire(cls, found: directory_pb2.ReplicaSet, target: str, zone: str) -> "ReplicaSet":
        """The set that the directory at `target` reports; a replica without an address is the server at `target`."""
        here = socket.gethostname()
        replicas = tuple(
            Replica(
                address=replica.address or target,
                id=replica.id,
                revision=replica.revision,
                draining=replica.state == directory_pb2.Replica.DRAINING,
                distance=_distance(replica, here, zone),
                queued=replica.load.queued,
            )
            for replica in found.replicas
        )
        return cls(replicas, found.revision)

    def of(self, revision: str) -> tuple[Replica, ...]:
        """The replicas that may be asked for a revision, those that are about to stop last."""
        found = [replica for replica in self.replicas if replica.may_serve(revision)]
        return tuple(sorted(found, key=lambda replica: (replica.draining, replica.distance)))

    def serves(self, revision: str) -> bool:
        """Whether a replica takes new requests for that revision."""
        return any(not replica.draining for replica in self.of(revision))

    def revisions(self) -> list[str]:
        """The revisions of the replicas, as far as known."""
        return sorted({replica.revision for replica in self.replicas if replica.revision})


def _distance(replica: directory_pb2.Replica, here: str, zone: str) -> int:
    if replica.host and replica.host == here:
        return SAME_HOST
    return SAME_ZONE if zone and replica.zone == zone else ELSEWHERE


class Known:
    """The replica set that is believed. News that would leave no replica to ask are doubted for a while.

    The reason is that a restarted directory at first lists no replica, or only some.
    """

    def __init__(self, first: ReplicaSet) -> None:
        self.set = first
        self._doubted: tuple[ReplicaSet, float] | None = None

    def hear(self, found: ReplicaSet, revision: str, now: float) -> None:
        """Take news from the directory, for a client that asks for `revision`."""
        if found.of(revision) or not self.set.of(revision):
            self.set, self._doubted = found, None
        else:
            since = now if self._doubted is None else self._doubted[1]
            self._doubted = found, since

    def forget_doubts(self) -> None:
        """Forget doubted news, since the directory no longer answers and they may be outdated."""
        self._doubted = None

    def settle(self, now: float) -> bool:
        """Believe news that were doubted for long enough; returns whether that changed the set."""
        if self._doubted is None or now < self._doubted[1] + DOUBT_S:
            return False
        self.set, self._doubted = self._doubted[0], None
        return True

    @property
    def settles_at(self) -> float | None:
        """When `settle` may change the set; None if nothing is doubted."""
        return None if self._doubted is None else self._doubted[1] + DOUBT_S


def choose(tiers: Sequence[Sequence[T]], cost: Callable[[T], float], unit: float, rng: random.Random) -> T:
    """Choose the better of two random replicas of the nearest tier, unless it is clearly busier than a farther one.

    The power of two choices (Mitzenmacher 2001) keeps loads even without making all clients run to the same idle
    replica. A replica is clearly busier if its cost is above twice the other's cost plus two requests of `unit`.

    Args:
        tiers: replicas by distance, the nearest first; no tier is empty.
        cost: the outstanding cost of a replica.
        unit: cost of a usual request.
        rng: a generator of its own, as drawing from the global one would change the training.
    """
    chosen = _better_of_two(tiers[0], cost, rng)
    for tier in tiers[1:]:
        other = _better_of_two(tier, cost, rng)
        if cost(chosen) > _BUSIER * cost(other) + _SLACK * unit:
            chosen = other
    return chosen


def _better_of_two(tier: Sequence[T], cost: Callable[[T], float], rng: random.Random) -> T:
    count = len(tier)
    if count == 1:
        return tier[0]
    first, second = int(rng.random() * count), int(rng.random() * (count - 1))
    one, other = tier[first], tier[second + (second >= first)]
    return one if cost(one) <= cost(other) else other


def backoff_s(failures: int, rng: random.Random, *, first_s: float = 0.1, longest_s: float = 5.0) -> float:
    """How long to wait after that many failures in a row: exponential backoff with full jitter.

    The wait is at least 0.02 s; its upper bound begins at `first_s` and doubles up to `longest_s`. With jitter, the
    clients of a replica that comes back do not arrive all at once (Brooker, "Exponential backoff and jitter", 2015).
    """
    most = min(first_s * 2.0 ** min(failures - 1, 30), longest_s)
    return _LEAST_BACKOFF_S + rng.random() * (most - _LEAST_BACKOFF_S)
