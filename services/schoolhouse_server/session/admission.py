"""Which requests a teacher lets in, by the quotas of jobs and the bound of the queue; the others must wait."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.loop import Loop

from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.session.quotas import Sharing

_RESERVED_S = 1.0  # how long a place is kept for a session that was told to resume
_UNSENT = 2  # a session may have this many times `max_in_flight` requests in flight or unsent; then it must read


class FloodError(ProtocolError):
    """A client goes on calling although it was told to wait, or does not read; this ends the session."""


@dataclass(eq=False)
class _Quota:
    """What a payer has in flight over all of its sessions, reserved places included."""

    sessions: int = 0
    requests: int = 0
    nbytes: int = 0
    waiting: "dict[Place, None]" = field(default_factory=dict)  # an ordered set, the one that has waited longest first


@dataclass(eq=False)
class _Reply:
    """An answer that is not sent yet."""

    share: Share | None  # its share of the bytes that may be unsent
    wanted: bool = True  # whether the client has not cancelled it

    def end(self) -> None:
        """Give its share back, as it was sent or dropped."""
        if self.share is not None:
            self.share.end()


@dataclass(eq=False)
class Place:
    """A session's part of its payer's quota; `tell_wait(request_id)` and `tell_resume()` only queue a message.

    The payer is its job, or what stands for several jobs.
    """

    job: str
    sharing: Sharing  # its bounds of a job hold for this session
    tell_wait: Callable[[int], None]
    tell_resume: Callable[[], None]
    payer: str = ""
    admitted: dict[int, int] = field(default_factory=dict)  # the bytes of each request in flight
    replying: dict[int, _Reply] = field(default_factory=dict)  # answers that are not sent yet, by request
    wanted: int = 0  # bytes of the first request that was refused
    refused: set[int] = field(default_factory=set)  # requests refused since it last waited, without cancelled ones
    reserved: int | None = None  # bytes reserved with a place for its next request
    reserved_until: float = 0.0
    ended: bool = False

    def __post_init__(self) -> None:
        self.payer = self.payer or self.job


class Admission:
    """The requests of one teacher that are in flight: admitted, and neither answered nor cancelled.

    A session whose request was refused waits until there is a place for it, which is then kept for it for a second. The
    session that has waited longest goes first; no other session of its job, and none that waits for the whole queue,
    may pass it. All of this happens in the loop's thread.
    """

    def __init__(self, sharing: Sharing, loop: Loop) -> None:
        self._sharing = sharing
        self._loop = loop
        self._payers: dict[str, _Quota] = {}
        self._in_flight: Counter[str] = Counter()  # by job
        self._waiting: dict[Place, None] = {}  # those of all jobs, in the same order
        self._crowded = False  # whether a session of any job may wait for the whole queue
        self._requests = 0

    def in_flight(self) -> dict[str, int]:
        """How many requests of each job are in flight; any thread may ask."""
        return {job: requests for job, requests in list(self._in_flight.items()) if requests}

    def enter(self, place: Place) -> None:
        """Note that a session of the job begins."""
        self._payers.setdefault(place.payer, _Quota()).sessions += 1

    def leave(self, place: Place) -> None:
        """End a session, with all that it has in flight."""
        place.ended = True
        self._stop_waiting(place)
        self._drop_reservation(place)
        for request_id in list(place.admitted):
            self._free(place, place.admitted.pop(request_id))
        for reply in place.replying.values():
            reply.end()
        place.replying.clear()
        quota = self._payers[place.payer]
        quota.sessions -= 1
        self._resume(quota)
        if not quota.sessions:
            del self._payers[place.payer]

    def admit(self, place: Place, request_id: int, nbytes: int) -> bool:
        """Let a request in; if there is no place, tell its session to wait and return False.

        Raises:
            FloodError: the client goes on calling although it was told to wait.
        """
        if place.ended:
            return False
        if place not in self._waiting and self._is_next(place, nbytes):
            self._drop_reservation(place)
            self._take(place, nbytes)
            place.admitted[request_id] = nbytes
            return True
        self._refuse(place, request_id, nbytes)
        return False

    def reply(self, place: Place, request_id: int, share: Share | None = None) -> None:
        """Note that a request is answered; its reply is being sent until `sent` is called, and then `share` ends."""
        reply = _Reply(share)
        if place.ended:
            reply.end()
        else:
            place.replying[request_id] = reply
        self.end(place, request_id)

    def end(self, place: Place, request_id: int) -> None:
        """End a request that is answered, or needs no answer any more; does nothing if it has ended already."""
        nbytes = place.admitted.pop(request_id, None)
        if nbytes is not None:
            self._free(place, nbytes)
            self._resume(self._payers[place.payer])

    def cancelled(self, place: Place, request_id: int) -> None:
        """End a request that the client has cancelled; a reply that waits counts until the stream comes to drop it."""
        place.refused.discard(request_id)
        if (reply := place.replying.get(request_id)) is not None:
            reply.wanted = False
        self.end(place, request_id)

    def sent(self, place: Place, request_id: int) -> None:
        """Note that all of a reply is sent, or the rest of it dropped."""
        if (reply := place.replying.pop(request_id, None)) is not None:
            reply.end()
        if place in self._waiting:
            self._resume(self._payers[place.payer])

    def _is_next(self, place: Place, nbytes: int) -> bool:
        if place.reserved is not None:
            quota = self._payers[place.payer]
            return quota.requests == 1 or quota.nbytes - place.reserved + nbytes <= place.sharing.max_job_bytes
        # Sessions of other jobs wait because their own job is full, or have a place reserved: they may be passed.
        return self._has_room(place, nbytes) and not any(map(self._reads, self._payers[place.payer].waiting))

    def _has_room(self, place: Place, nbytes: int) -> bool:
        if self._requests >= self._sharing.max_queued:
            self._crowded = True
            return False
        return self._reads(place) and self._has_place_in_job(place, nbytes)

    def _reads(self, place: Place) -> bool:
        """Whether the client reads its replies fast enough that they do not pile up."""
        return len(place.admitted) + len(place.replying) < _UNSENT * place.sharing.max_in_flight

    def _has_place_in_job(self, place: Place, nbytes: int) -> bool:
        quota, sharing = self._payers[place.payer], place.sharing
        if quota.requests >= sharing.max_in_flight:
            return False
        return not quota.requests or quota.nbytes + nbytes <= sharing.max_job_bytes  # a large one is taken if alone

    def _take(self, place: Place, nbytes: int) -> None:
        quota = self._payers[place.payer]
        quota.requests += 1
        quota.nbytes += nbytes
        self._in_flight[place.job] += 1
        self._requests += 1

    def _free(self, place: Place, nbytes: int) -> None:
        quota = self._payers[place.payer]
        quota.requests -= 1
        quota.nbytes -= nbytes
        self._in_flight[place.job] -= 1
        if not self._in_flight[place.job]:
            del self._in_flight[place.job]
        self._requests -= 1

    def _refuse(self, place: Place, request_id: int, nbytes: int) -> None:
        if place not in self._waiting:
            self._drop_reservation(place)
            self._waiting[place] = self._payers[place.payer].waiting[place] = None
            place.wanted, place.refused = nbytes, set()
        place.refused.add(request_id)
        if len(place.refused) > place.sharing.max_in_flight:  # more than can have been sent before it was told
            raise FloodError(f"{len(place.refused)} calls came after the client was told to wait")
        place.tell_wait(request_id)
        self._resume(self._payers[place.payer])  # others may use what was reserved for it

    def _stop_waiting(self, place: Place) -> None:
        self._waiting.pop(place, None)
        self._payers[place.payer].waiting.pop(place, None)

    def _resume(self, job: _Quota) -> None:
        """Tell sessions for which there is room to resume, those that have waited longest first.

        Those of one job, for which something has changed, or of all if some may wait for the whole queue.
        """
        everybody, self._crowded = self._crowded, False
        line = self._waiting if everybody else job.waiting
        while (place := self._next_in(line, everybody)) is not None:
            self._stop_waiting(place)
            self._take(place, place.wanted)
            place.reserved, place.reserved_until = place.wanted, time.monotonic() + _RESERVED_S
            self._loop.at(place.reserved_until, lambda place=place: self._expire(place))  # type: ignore[misc]
            place.tell_resume()

    def _next_in(self, line: dict[Place, None], of_all_jobs: bool) -> Place | None:
        """The first session in line that has room; in each job, one that reads is passed by no other."""
        passed_over: set[str] = set()
        for place in line:
            if place.payer in passed_over or not self._reads(place):
                continue
            if self._has_room(place, place.wanted):
                return place
            if not of_all_jobs:
                return None
            passed_over.add(place.payer)
        return None

    def _drop_reservation(self, place: Place) -> None:
        if place.reserved is not None:
            self._free(place, place.reserved)
            place.reserved = None

    def _expire(self, place: Place) -> None:
        """Free a reserved place that was not used in time."""
        if place.reserved is not None and time.monotonic() >= place.reserved_until:
            self._drop_reservation(place)
            self._resume(self._payers[place.payer])
