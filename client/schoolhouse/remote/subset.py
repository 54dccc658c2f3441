"""Which few of many replicas a client keeps to, so that many clients do not all open sessions with all of them."""

import random
import secrets
from collections.abc import Sequence
from typing import Protocol, TypeVar

import xxhash

from schoolhouse.remote.directory import Replica

_SEED_BITS = 64
_SLOW_S = 2.0  # an opening that takes longer counts as failing, so that one more replica is asked meanwhile
_LOOK_EVERY_S = 5.0
_BUSY_FOR_S = 10.0  # how long its replicas must have been clearly busier before a client exchanges one
_BUSIER, _SLACK = 2.0, 4.0
_SHARE = 0.25  # of the clients that would exchange one, those that do so at the same look
_EXCHANGED_S = 600.0  # on average, after which a client goes back to the replica that it left


class Kept(Protocol):
    """What is looked at of a link to a replica."""

    replica: Replica
    opened: bool
    failures: int
    requests: int

    def opening_for(self, now: float) -> float: ...


L = TypeVar("L", bound=Kept)


class Subset:
    """Keeps a client to up to `most` replicas, or to all if that is None.

    They are the nearest, and among equally near ones those that rendezvous hashing gives (Thaler and Ravishankar 1998):
    each client has a random identity, and prefers the replicas in the order of a hash of that and their ids. So clients
    spread evenly; a replica that goes moves only the clients that kept to it, and one that comes gets its share of all.
    A replica that fails, or is slow to open, stays preferred, but the client uses one more meanwhile.

    If all that a client keeps to have for long been clearly busier with others' requests than another one, it exchanges
    the busiest for that. Only a share of such clients does so at a time, since all get the same news.
    """

    def __init__(self, most: int | None, rng: random.Random) -> None:
        self._most, self._random = most, rng
        self._identity = secrets.randbits(_SEED_BITS)
        self._exchanged: dict[str, tuple[int, float]] = {}  # by replica: -1 to prefer it, 1 to avoid it; and until when
        self._busy_since: float | None = None
        self.look_at = 0.0  # when to call `exchange`

    def of(self, links: Sequence[L], now: float) -> list[L]:
        """Those of the links that the client keeps to, and those that fail but are preferred to one of them."""
        if self._most is None or len(links) <= self._most:
            return list(links)
        kept, count = [], 0
        for link in sorted(links, key=lambda link: self.order(link.replica, now)):
            if count == self._most:
                break
            kept.append(link)
            count += link.opened or (not link.failures and link.opening_for(now) < _SLOW_S)
        return kept

    def changes_at(self, links: Sequence[L], now: float) -> float:
        """When `of` may give others than now, if nothing else changes."""
        times = [now + _SLOW_S - link.opening_for(now) for link in links if not link.opened and link.opening_for(now)]
        times += [until for _, until in self._exchanged.values()]
        return min((at for at in times if at > now), default=float("inf"))

    def order(self, replica: Replica, now: float) -> tuple[int, int, int]:
        """The smaller, the more it is preferred."""
        place, until = self._exchanged.get(replica.name, (0, 0.0))
        rank = xxhash.xxh3_64_intdigest(replica.name.encode(), seed=self._identity)
        return replica.distance, place if now < until else 0, rank

    def exchange(self, links: Sequence[L], now: float) -> bool:
        """Exchange a replica if that is due; returns whether it did."""
        if now < self.look_at:
            return False
        self.look_at = now + _LOOK_EVERY_S * (0.5 + self._random.random())
        kept = self.of(links, now)
        farthest = max((link.replica.distance for link in kept), default=0)
        calmest = min(map(_busy, kept), default=0)
        others = [link for link in links if link not in kept and link.replica.distance <= farthest]
        others = [link for link in others if calmest > _BUSIER * _busy(link) + _SLACK]
        if not others or self._busy_since is None:
            self._busy_since = now if others else None
            return False
        if now < self._busy_since + _BUSY_FOR_S or self._random.random() >= _SHARE:
            return False
        taken = min(self._random.sample(others, min(len(others), 2)), key=_busy)
        left = max(kept, key=lambda link: (link.replica.distance == taken.replica.distance, _busy(link)))
        until = now + _EXCHANGED_S * (0.5 + self._random.random())
        self._exchanged = {name: how for name, how in self._exchanged.items() if now < how[1]}
        self._exchanged |= {taken.replica.name: (-1, until), left.replica.name: (1, until)}
        self._busy_since = None
        return True


def _busy(link: Kept) -> int:
    """Requests of other clients that wait there, by the directory's latest report."""
    return max(link.replica.queued - link.requests, 0)
