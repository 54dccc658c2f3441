"""What a client knows of each replica: the session with it, its outstanding requests, and when to try it again."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from schoolhouse.errors import (
    CorruptPayloadError,
    ProtocolError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherInternalError,
    TeacherTimeoutError,
    TeacherUnavailableError,
    UnknownTeacherError,
)
from schoolhouse.remote.directory import Replica, ReplicaSet, backoff_s, choose
from schoolhouse.remote.request import Request
from schoolhouse.remote.session import Session
from schoolhouse.remote.subset import Subset

_LONGEST_BACKOFF_S, _LONGEST_REST_S = 2.0, 30.0  # for a replica that cannot be reached, and for one that misbehaves
_TRIAL_AFTER = 3  # strikes that put a replica on trial until it has answered
_RECOVERED = 32  # answers in one session that clear the strikes
_NEXT_OPENING_S = 0.25
_LEFT_OVER_S = 10.0  # how long a session stays open that is not kept to, as when a preferred replica is back
_FRESH_S = 5.0  # how long a replica's report of its queue is believed
# Errors that may pass. An unknown teacher may, as a lost replica can still be listed after its port went to another's.
_PASSING = (TeacherUnavailableError, TeacherTimeoutError, TeacherBusyError, UnknownTeacherError)
# Errors for which the replica of an open session gets a strike. When a session opens, one is a puzzle that may pass.
_BROKEN = (CorruptPayloadError, ProtocolError, TeacherInternalError)
_BELIEVED_AFTER = 3  # puzzles in a row after which the error is believed


@dataclass(eq=False)
class Link:
    """One replica, and the session with it if there is one."""

    replica: Replica
    told_at: float  # when the directory reported its load
    listed: bool = True  # whether it is in the directory's replica set
    session: Session | None = None
    opened: bool = False
    began_at: float = 0.0  # when the session was begun
    give_up_at: float = 0.0  # when to give up a session that is being opened
    left_over_since: float | None = None  # since when it is open but not one of those that are kept to
    nbytes: int = 0  # bytes of the inputs outstanding there
    requests: int = 0  # requests outstanding there
    failures: int = 0  # sessions in a row that failed
    strikes: int = 0  # faults of its own: silence with requests in hand, or wrong answers
    strike: SchoolhouseError | None = None  # the fault for which its session is being closed
    puzzles: int = 0  # openings in a row that ended with an error of `_BROKEN`
    retry_at: float = 0.0
    error: SchoolhouseError | None = None  # with which the last session ended

    @property
    def revision(self) -> str:
        """The revision that the replica reports, or else the directory; empty if it is not known."""
        return self.session.revision if self.session is not None and self.opened else self.replica.revision

    def may_serve(self, revision: str) -> bool:
        """Whether its revision is `revision` or not known; true for the empty revision, which stands for any."""
        return not revision or self.revision in ("", revision)

    @property
    def leaving(self) -> bool:
        """Whether it gets no new requests, since it is about to stop or is not listed any more."""
        stops = self.session is not None and self.session.draining
        return stops or self.replica.draining or not self.listed

    @property
    def on_trial(self) -> bool:
        """Whether it gets a single request at a time, until it has answered one."""
        answered = self.session is not None and self.session.traffic.requests
        return self.strikes >= _TRIAL_AFTER and not answered

    def opening_for(self, now: float) -> float:
        """For how long its session has been opening; 0 if none is."""
        return 0.0 if self.session is None or self.opened else now - self.began_at

    def refuses(self, now: float) -> bool:
        """Whether it lately failed with an error that does not pass by itself, such as other weights."""
        passing = isinstance(self.error, _PASSING) or 0 < self.puzzles < _BELIEVED_AFTER
        return self.error is not None and not passing and now < self.retry_at

    def others(self, now: float) -> int:
        """Requests of other clients that wait there, by the latest report; 0 without a recent one."""
        session = self.session
        if session is not None and session.answered_at > now - _FRESH_S:
            return session.others_queued
        return self.replica.queued if self.told_at > now - _FRESH_S else 0


class Links:
    """The links to all replicas of a teacher, by address."""

    def __init__(
        self,
        start: Callable[[Link], Session],
        connect_timeout_s: float,
        rng: random.Random,
        max_replicas: int | None = None,
    ) -> None:
        """`start(link)` begins to open a session with the replica of a link."""
        self._subset = Subset(max_replicas, rng)
        self._start = start
        self._connect_timeout_s = connect_timeout_s
        self._random = rng
        self._by_address: dict[str, Link] = {}
        self._tiers: dict[str, tuple[float, list[list[Link]]]] = {}  # cache by revision: expiry, and usable links
        self._unit = 0.0  # bytes of a usual request, a running average
        self._next_opening_at = 0.0  # while nothing is open, when to begin to open another session
        self._slowest_s = 0.0  # the slowest answer of sessions that have ended
        self.current = ""  # the revision for requests that may be answered by any

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._by_address.values()))

    @property
    def count(self) -> int:
        """Number of links."""
        return len(self._by_address)

    def of(self, session: Session) -> Link | None:
        """The link of a session; None if the link has another session by now."""
        link = self._by_address.get(session.address)
        return link if link is not None and link.session is session else None

    def update(self, found: ReplicaSet, now: float) -> None:
        """Use a new replica set; replicas that are not listed any more are left once they are idle."""
        self._tiers.clear()
        for link in self:
            link.listed = False
        for replica in found.replicas:
            link = self._by_address.setdefault(replica.address, Link(replica, now))
            if link.replica.id != replica.id or link.replica.revision != replica.revision:  # a new one at the address
                link.failures = link.strikes = link.puzzles = 0
                link.retry_at, link.error = 0.0, None
            link.replica, link.told_at, link.listed = replica, now, True
        self._settle_current(found.current)
        self._drop_gone()

    def _settle_current(self, wanted: str) -> None:
        there = [link.revision for link in self if not link.leaving and link.revision]
        self.current = next((r for r in (wanted, self.current, *there) if r in there), self.current)

    def pick(self, revision: str, now: float, apart_from: str = "", soon: bool = False) -> Link | None:
        """Choose an open link for a revision, or None. If a link that is not open would be better, begin to open it.

        The link at the address `apart_from` is chosen only if there is no other; with `soon`, also if all others could
        not be reached at the last try.
        """
        until, tiers = self._tiers.get(revision, (0.0, []))
        if now >= until:
            until, tiers = self._tiers[revision] = self._usable(revision, now)
        if apart_from:
            others = _those(tiers, lambda link: link.replica.address != apart_from) or _those(
                _in_tiers(self._able(revision, now)), lambda link: link.replica.address != apart_from
            )
            hopeful = _those(others, lambda link: link.opened or not link.failures) if soon else others
            tiers = hopeful or tiers
        if any(link.strikes for tier in tiers for link in tier):
            tiers = _those(tiers, lambda link: not (link.on_trial and link.requests))
        if not tiers:
            return None
        link = self._choose(tiers, now)
        if link.opened:
            return link
        ready = _those(tiers, lambda link: link.opened)
        if not ready:
            self._open_another(tiers, now)
            return None
        self._open(link, now)
        return self._choose(ready, now)

    def holds(self, revision: str) -> bool:
        """Whether a session for that revision is open."""
        return any(link.opened and not link.leaving and link.may_serve(revision) for link in self)

    def _open_another(self, tiers: list[list[Link]], now: float) -> None:
        """While nothing is open, begin to open the best link, and a little later the next, as the first may hang."""
        fresh = _those(tiers, lambda link: link.session is None)
        if fresh and now >= self._next_opening_at:
            self._next_opening_at = now + _NEXT_OPENING_S
            self._open(self._choose(fresh, now), now)

    def _choose(self, tiers: list[list[Link]], now: float) -> Link:
        if len(tiers) == len(tiers[0]) == 1:
            return tiers[0][0]
        return choose(tiers, lambda link: link.nbytes + link.others(now) * self._unit, self._unit, self._random)

    def _usable(self, revision: str, now: float) -> tuple[float, list[list[Link]]]:
        mine = [link for link in self if link.may_serve(revision) and not link.leaving]
        until = min((link.retry_at for link in mine if link.retry_at > now), default=float("inf"))
        able = self._able(revision, now)
        return min(until, self._subset.changes_at(able, now)), _in_tiers(self._subset.of(able, now))

    def _able(self, revision: str, now: float) -> list[Link]:
        """The links that may be asked for a revision."""
        mine = [link for link in self if link.may_serve(revision) and not link.leaving]
        return [link for link in mine if link.session is not None or link.retry_at <= now]

    def _open(self, link: Link, now: float) -> None:
        if link.session is None:
            self._tiers.clear()
            link.began_at, link.give_up_at = now, now + self._connect_timeout_s
            try:
                link.session = self._start(link)
            except Exception as err:
                self._put_aside(link, TeacherUnavailableError(f"{link.replica.address}: {err}"), now)

    def try_all_again(self) -> None:
        """Try all replicas without backoff, since the directory answers again and they may, too."""
        self._tiers.clear()
        for link in self:
            link.retry_at = 0.0

    def take(self, link: Link, nbytes: int) -> None:
        """Add a request to the load of a link."""
        link.nbytes += nbytes
        link.requests += 1
        self._unit += (nbytes - self._unit) / (16 if self._unit else 1)

    def give_back(self, link: Link, nbytes: int) -> None:
        """Subtract a request that has ended from the load of a link."""
        link.nbytes -= nbytes
        link.requests -= 1

    def opened(self, link: Link) -> None:
        """Note that the session of a link is open."""
        self._tiers.clear()
        link.opened, link.error = True, None
        self._settle_current(self.current)

    def ended(self, session: Session) -> None:
        """Note that a session takes no requests any more; its `on_loss` follows."""
        link = self.of(session)
        if link is not None:
            link.opened = False
            self._tiers.clear()

    def draining(self) -> None:
        """Note that a session has begun to drain."""
        self._tiers.clear()

    def lost(self, link: Link, error: SchoolhouseError, now: float) -> None:
        """Note that the session of a link has ended. One that had answered is tried again soon, others with backoff."""
        assert link.session is not None
        answered, draining = link.session.traffic.requests, link.session.draining
        strike, link.strike = link.strike, None
        if strike is None and link.session.revision and isinstance(error, _BROKEN):
            strike = error
        puzzles = not link.session.revision and isinstance(error, _BROKEN)
        link.puzzles = link.puzzles + 1 if puzzles else 0
        self._slowest_s = max(self._slowest_s, link.session.slowest_s)
        link.session, link.opened = None, False
        if answered >= _RECOVERED:
            link.strikes = 0
        if strike is not None:
            link.strikes += 1
            error = TeacherUnavailableError(strike.message)  # as an error that may pass
        elif answered and not draining:
            link.failures = 0
        self._put_aside(link, error, now)

    def strike(self, link: Link, error: SchoolhouseError) -> None:
        """Send nothing more to a replica that made a fault; the caller closes its session."""
        self._tiers.clear()
        link.strike, link.opened = error, False

    def other(self, link: Link, now: float) -> Link | None:
        """Another link that could take the requests of `link`, an open one if possible."""
        others = [
            other
            for other in self
            if other is not link
            and not other.leaving
            and other.may_serve(link.revision)
            and (other.session is not None or other.retry_at <= now)
        ]
        return min(others, key=lambda other: (not other.opened, *self._subset.order(other.replica, now)), default=None)

    def silent(self, now: float, patience_s: float) -> list[Session]:
        """Leave replicas that have requests and have sent nothing for `patience_s`, if another can take the requests.

        If twice the time of the slowest answer is longer than `patience_s`, that counts. Returns the sessions to close.
        A request is moved at most once in this way, and if all replicas are slow it stays where it is.
        """
        found = []
        slowest_s = max((link.session.slowest_s for link in self if link.session is not None), default=0.0)
        patience_s = max(patience_s, 2 * max(slowest_s, self._slowest_s))
        for link in self if self.count > 1 else ():
            session = link.session
            if session is None or not _is_silent(link, now - patience_s):
                continue
            moving, other = session.asked(), self.other(link, now)
            if other is None or _is_silent(other, now - patience_s) or all(request.moved for request in moving):
                continue
            if not _goes_on(other, session.silent_since):  # the other may be as slow, and this one was asked first
                continue
            if not other.opened:
                self._open(other, now)
                continue
            for request in moving:
                request.move()
            why = f"{link.replica.address}: it had requests and sent nothing for {patience_s:.3g} s"
            self.strike(link, TeacherTimeoutError(why))
            found.append(session)
        return found

    def _put_aside(self, link: Link, error: SchoolhouseError, now: float) -> None:
        self._tiers.clear()
        self._next_opening_at = 0.0
        link.error = error
        link.failures += 1
        longest_s = _LONGEST_REST_S if link.strikes else _LONGEST_BACKOFF_S
        link.retry_at = now + backoff_s(link.failures, self._random, longest_s=longest_s)
        self._drop_gone()

    def _drop_gone(self) -> None:
        for link in self:
            if not link.listed and link.session is None:
                del self._by_address[link.replica.address]

    def overdue(self, now: float) -> list[Session]:
        """Sessions to close: idle ones of replicas that are left, and those that did not open in time."""
        left_over = self._left_over(now)
        idle = [link.session for link in self if (link.leaving or link in left_over) and not link.requests]
        slow = [link.session for link in self if not link.opened and now >= link.give_up_at]
        return [session for session in {*idle, *slow} if session is not None]

    def _left_over(self, now: float) -> list[Link]:
        """Open ones that have long been none of those that are kept to, while one of these is open."""
        kept: list[Link] = []
        for revision in {link.revision for link in self if link.opened}:
            found = self._subset.of(self._able(revision, now), now)
            kept += found if any(link.opened for link in found) else self
        for link in self:
            if not link.opened or link in kept:
                link.left_over_since = None
            elif link.left_over_since is None:
                link.left_over_since = now
        since = [(link, link.left_over_since) for link in self]
        return [link for link, at in since if at is not None and now >= at + _LEFT_OVER_S]

    def exchange(self, revision: str, now: float) -> float | None:
        """Exchange a replica for one that is less busy, if that is due; returns when to call again."""
        able = self._able(revision, now)
        if len(able) == len(self._subset.of(able, now)):
            return None
        if self._subset.exchange(able, now):
            self._tiers.clear()
        return self._subset.look_at

    def waiting_where_it_ends(self) -> list[Request]:
        """Take back the requests that replicas which are left have not been sent yet, if another replica is open."""
        if not any(link.opened and not link.leaving for link in self):
            return []
        ending = [link.session for link in self if link.leaving and link.session is not None]
        return [request for session in ending for request in session.take_back()]

    def due_at(self, now: float, *, wanted: bool) -> float | None:
        """When an opening takes too long or, if `wanted`, a replica may be tried again; None if nothing is due."""
        times = [link.give_up_at for link in self if link.session is not None and not link.opened]
        if wanted:
            fresh = [link for link in self if link.session is None and not link.leaving]
            times += [max(link.retry_at, self._next_opening_at) for link in fresh]
            times.append(self._subset.changes_at(list(self), now))
        return min((at for at in times if now < at < float("inf")), default=None)

    def hopeless(self, revision: str, now: float) -> SchoolhouseError | None:
        """The error for a request of that revision if waiting for a replica would not help it; otherwise None."""
        listed = [link for link in self if link.listed]
        mine = [link for link in listed if link.may_serve(revision)]
        if mine and not all(link.refuses(now) for link in mine):
            return None
        if mine and not isinstance(mine[0].error, RevisionChangedError):
            return mine[0].error
        others = {link.revision for link in listed if link.revision not in ("", revision)}
        others |= {choice for link in mine if link.error is not None for choice in link.error.choices}
        return RevisionChangedError("", choices=sorted(others)) if listed else None

    def tried(self) -> str:
        """The state of each replica in words, for messages."""
        return "; ".join(map(_state, self)) or "the directory lists none"


def _in_tiers(links: list[Link]) -> list[list[Link]]:
    tiers: dict[int, list[Link]] = {}
    for link in links:
        tiers.setdefault(link.replica.distance, []).append(link)
    return [tiers[distance] for distance in sorted(tiers)]


def _is_silent(link: Link, since: float) -> bool:
    silent_since = link.session.silent_since if link.session is not None and link.opened else None
    return silent_since is not None and silent_since <= since


def _goes_on(link: Link, since: float | None) -> bool:
    """Whether the replica has answered since then, or has nothing to answer."""
    session = link.session
    if session is None or not link.opened or session.silent_since is None or since is None:
        return True
    return session.answered_at > since


def _those(tiers: list[list[Link]], wanted: Callable[[Link], bool]) -> list[list[Link]]:
    return [found for tier in tiers if (found := [link for link in tier if wanted(link)])]


def _state(link: Link) -> str:
    address = link.replica.address
    if link.error is not None:
        return f"{address}: {link.error.message.removeprefix(f'{address}: ')}"
    if link.leaving:
        return f"{address}: it is about to stop"
    return f"{address}: open" if link.opened else f"{address}: not open yet"
