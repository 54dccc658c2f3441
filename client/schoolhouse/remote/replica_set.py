"""The replicas that a directory knows of a teacher, how far that is believed, and the choice among them."""

import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from schoolhouse_wire.v1 import directory_pb2

SAME_HOST, SAME_ZONE, ELSEWHERE = range(3)
DOUBT_S = 10.0  # that a directory is given to come up: a new one may know less than there is
_BUSIER, _SLACK = 2.0, 2.0
_LEAST_BACKOFF_S = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """One replica as the directory tells of it."""

    address: str
    id: str = ""
    revision: str = ""  # empty: not known
    draining: bool = False
    distance: int = ELSEWHERE
    queued: int = 0  # requests that waited for its device when the directory told of it

    def may_serve(self, revision: str) -> bool:
        """Whether it is of that revision, as far as is known; the empty one stands for any."""
        return not revision or self.revision in ("", revision)


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas of a teacher. `current` is the revision for jobs that begin now; empty: any."""

    replicas: tuple[Replica, ...] = ()
    current: str = ""

    @classmethod
    def from_wire(cls, found: directory_pb2.ReplicaSet, target: str, zone: str) -> "ReplicaSet":
        """What the directory at `target` said; a replica without an address is the server at `target` itself."""
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
        """Those that may be asked for that revision, serving ones before those that are about to stop."""
        found = [replica for replica in self.replicas if replica.may_serve(revision)]
        return tuple(sorted(found, key=lambda replica: (replica.draining, replica.distance)))

    def serves(self, revision: str) -> bool:
        """Whether any takes new requests for that revision."""
        return any(not replica.draining for replica in self.of(revision))

    def revisions(self) -> list[str]:
        """Those that there are."""
        return sorted({replica.revision for replica in self.replicas if replica.revision})


def _distance(replica: directory_pb2.Replica, here: str, zone: str) -> int:
    if replica.host and replica.host == here:
        return SAME_HOST
    return SAME_ZONE if zone and replica.zone == zone else ELSEWHERE


class Known:
    """The replica set that is believed. News that would leave nothing to ask are doubted for a while.

    A directory that was started anew has an empty table at first, or lists only some of the replicas.
    """

    def __init__(self, first: ReplicaSet) -> None:
        self.set = first
        self._doubted: tuple[ReplicaSet, float] | None = None

    def hear(self, found: ReplicaSet, revision: str, now: float) -> None:
        """Take what the directory says, for a client that asks for `revision`."""
        if found.of(revision) or not self.set.of(revision):
            self.set, self._doubted = found, None
        else:
            since = now if self._doubted is None else self._doubted[1]
            self._doubted = found, since

    def forget_doubts(self) -> None:
        """The directory is away: what it said last may not be so any more."""
        self._doubted = None

    def settle(self, now: float) -> bool:
        """Believe what was said for long enough; whether that changed the set."""
        if self._doubted is None or now < self._doubted[1] + DOUBT_S:
            return False
        self.set, self._doubted = self._doubted[0], None
        return True

    @property
    def settles_at(self) -> float | None:
        """When `settle` may have something to do."""
        return None if self._doubted is None else self._doubted[1] + DOUBT_S


def choose(tiers: Sequence[Sequence[T]], cost: Callable[[T], float], unit: float, rng: random.Random) -> T:
    """The better of two at random from the nearest tier, unless it is clearly busier than one from farther away.

    The power of two choices (Mitzenmacher 2001) keeps loads even without clients that all run after the same idle
    replica. Clearly busier is: a cost above twice that of the other and of two requests, each of which costs `unit`.

    Args:
        tiers: replicas by distance, the nearest first; no tier is empty.
        cost: what is outstanding at one.
        unit: cost of a usual request.
        rng: not the global one, whose numbers belong to the training.
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
    """How long to wait after that many failures in a row: from 0.02 s up to `first_s`, doubling, with full jitter.

    So clients of a replica that comes back do not come in step (Brooker, "Exponential backoff and jitter", 2015).
    """
    most = min(first_s * 2.0 ** min(failures - 1, 30), longest_s)
    return _LEAST_BACKOFF_S + rng.random() * (most - _LEAST_BACKOFF_S)
