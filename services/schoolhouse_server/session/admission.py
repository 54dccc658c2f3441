"""Which requests a teacher lets in: quotas of jobs, and the bound of the whole queue. The others are told to wait."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from schoolhouse.errors import ProtocolError

from schoolhouse_server.common.timer import Timer
from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.session.quotas import Sharing

_RESERVED_S = 1.0  # how long a place is kept for a session that was told to go on
_UNSENT = 2  # times `max_in_flight` that a session may have in flight or unsent: its client reads too slowly


class FloodError(ProtocolError):
    """A client goes on and on although it was told to wait, or does not read what it is told. It ends the session."""


@dataclass(eq=False)
class _Quota:
    """What a job has in flight, over all of its sessions, reserved places included."""

    sessions: int = 0
    requests: int = 0
    nbytes: int = 0


@dataclass(eq=False)
class _Reply:
    """An answer that is not sent yet."""

    share: Share | None  # of the bytes that may wait for that
    wanted: bool = True

    def end(self) -> None:
        """It was sent, or dropped."""
        if self.share is not None:
            self.share.end()


@dataclass(eq=False)
class Place:
    """A session's part of its job's quota. `tell_wait(request_id)` and `tell_resume()` only queue a message."""

    job: str
    sharing: Sharing  # whose bounds of a job hold for this session
    tell_wait: Callable[[int], None]
    tell_resume: Callable[[], None]
    admitted: dict[int, int] = field(default_factory=dict)  # bytes, by request
    replying: dict[int, _Reply] = field(default_factory=dict)  # answered, and not sent yet
    wanted: int = 0  # bytes of the first request that was refused
    refused: set[int] = field(default_factory=set)  # since it was told to go on, and not cancelled
    reserved: int | None = None  # bytes, kept with a place
    reserved_until: float = 0.0
    ended: bool = False


class Admission:
    """The requests of one teacher that are in flight: admitted, and neither answered nor cancelled.

    A session that was refused waits until there is a place for its request, which is then kept for it for a second. The
    one that has waited longest goes first, and nobody of its job, or of those that wait for the whole queue, passes it.
    """

    def __init__(self, sharing: Sharing, timer: Timer) -> None:
        self._sharing = sharing
        self._timer = timer
        self._lock = threading.Lock()
        self._jobs: dict[str, _Quota] = {}
        self._waiting: dict[Place, None] = {}  # in their order
        self._requests = 0

    def in_flight(self) -> dict[str, int]:
        """How many requests are in flight, by job."""
        with self._lock:
            return {name: quota.requests for name, quota in self._jobs.items() if quota.requests}

    def enter(self, place: Place) -> None:
        """A session begins."""
        with self._lock:
            self._jobs.setdefault(place.job, _Quota()).sessions += 1

    def leave(self, place: Place) -> None:
        """A session ends, with all that it has in flight."""
        with self._lock:
            place.ended = True
            self._waiting.pop(place, None)
            self._drop_reservation(place)
            for request_id in list(place.admitted):
                self._free(place, place.admitted.pop(request_id))
            for reply in place.replying.values():
                reply.end()
            place.replying.clear()
            quota = self._jobs[place.job]
            quota.sessions -= 1
            if not quota.sessions:
                del self._jobs[place.job]
            self._resume()

    def admit(self, place: Place, request_id: int, nbytes: int) -> bool:
        """Let a request in, or have its session wait.

        Raises:
            FloodError: the session goes on and on although it was told to wait.
        """
        with self._lock:
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
        """A request is answered, and the reply is on its way until `sent`, when `share` ends."""
        with self._lock:
            reply = _Reply(share)
            if place.ended:
                reply.end()
            else:
                place.replying[request_id] = reply
        self.end(place, request_id)

    def end(self, place: Place, request_id: int) -> None:
        """A request is answered, or needs no answer any more. Ignores what has ended."""
        with self._lock:
            nbytes = place.admitted.pop(request_id, None)
            if nbytes is not None:
                self._free(place, nbytes)
                self._resume()

    def cancelled(self, place: Place, request_id: int) -> None:
        """The client wants a request no more. What there is of a reply is there until the stream comes to drop it."""
        with self._lock:
            place.refused.discard(request_id)
            if (reply := place.replying.get(request_id)) is not None:
                reply.wanted = False
        self.end(place, request_id)

    def sent(self, place: Place, request_id: int) -> None:
        """All of a reply is sent, or what was left of it is dropped."""
        with self._lock:
            if (reply := place.replying.pop(request_id, None)) is not None:
                reply.end()
            if place in self._waiting:
                self._resume()

    def _is_next(self, place: Place, nbytes: int) -> bool:
        if place.reserved is not None:
            quota = self._jobs[place.job]
            return quota.requests == 1 or quota.nbytes - place.reserved + nbytes <= place.sharing.max_job_bytes
        # Those of other jobs wait for what is full, or it was kept for them.
        return self._has_room(place, nbytes) and not any(
            other.job == place.job and self._reads(other) for other in self._waiting
        )

    def _has_room(self, place: Place, nbytes: int) -> bool:
        free = self._requests < self._sharing.max_queued
        return free and self._reads(place) and self._has_place_in_job(place, nbytes)

    def _reads(self, place: Place) -> bool:
        """Whether the client takes its replies; else they would pile up."""
        return len(place.admitted) + len(place.replying) < _UNSENT * place.sharing.max_in_flight

    def _has_place_in_job(self, place: Place, nbytes: int) -> bool:
        quota, sharing = self._jobs[place.job], place.sharing
        if quota.requests >= sharing.max_in_flight:
            return False
        return not quota.requests or quota.nbytes + nbytes <= sharing.max_job_bytes  # a large one is taken when alone

    def _take(self, place: Place, nbytes: int) -> None:
        quota = self._jobs[place.job]
        quota.requests += 1
        quota.nbytes += nbytes
        self._requests += 1

    def _free(self, place: Place, nbytes: int) -> None:
        quota = self._jobs[place.job]
        quota.requests -= 1
        quota.nbytes -= nbytes
        self._requests -= 1

    def _refuse(self, place: Place, request_id: int, nbytes: int) -> None:
        if place not in self._waiting:
            self._drop_reservation(place)
            self._waiting[place] = None
            place.wanted, place.refused = nbytes, set()
        place.refused.add(request_id)
        if len(place.refused) > place.sharing.max_in_flight:  # more than can have been on their way
            raise FloodError(f"{len(place.refused)} calls came after the client was told to wait")
        place.tell_wait(request_id)
        self._resume()  # what was reserved for it may be of use for others

    def _resume(self) -> None:
        """Tell sessions to go on for which there is room, those that have waited longest first."""
        passed_over: set[str] = set()
        for place in list(self._waiting):
            if not self._reads(place):
                continue
            if place.job in passed_over or not self._has_room(place, place.wanted):
                passed_over.add(place.job)
                continue
            del self._waiting[place]
            self._take(place, place.wanted)
            place.reserved, place.reserved_until = place.wanted, time.monotonic() + _RESERVED_S
            self._timer.at(place.reserved_until, lambda place=place: self._expire(place))  # type: ignore[misc]
            place.tell_resume()

    def _drop_reservation(self, place: Place) -> None:
        if place.reserved is not None:
            self._free(place, place.reserved)
            place.reserved = None

    def _expire(self, place: Place) -> None:
        """Give a place away that was not used."""
        with self._lock:
            if place.reserved is not None and time.monotonic() >= place.reserved_until:
                self._drop_reservation(place)
                self._resume()
