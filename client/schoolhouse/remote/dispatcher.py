"""The dispatcher: gives each request to a replica, to another one if that is lost, and parks it while there is none."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Mapping

from schoolhouse_wire.errors import broke_too_often
from schoolhouse_wire.rpc.security import ClientSecurity

from schoolhouse.errors import (
    RevisionChangedError,
    SchoolhouseError,
    TeacherInternalError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse.lm_head.head import Head
from schoolhouse.remote import at_exit
from schoolhouse.remote.budget import RetryBudget
from schoolhouse.remote.connections import Connections
from schoolhouse.remote.directory import Known, ReplicaSet, revision_changed
from schoolhouse.remote.pending import Outstanding, Parking
from schoolhouse.remote.replica_pool import Link, Links
from schoolhouse.remote.request import Request, Traffic, late
from schoolhouse.remote.session import Session
from schoolhouse.remote.settings import Settings
from schoolhouse.remote.watching import Watch
from schoolhouse.taps import Tap

_LOOK_AGAIN_S = 0.1
_MAX_LOSSES = 4  # after so many losses a request fails, since it may itself be what kills the replicas


class Dispatcher:
    """The sessions with the replicas of one teacher, and the requests on their way through them.

    All of it happens in the event loop; other threads only `ask`, `close`, and look. Nothing in the loop refers to the
    RemoteTeacher, so that it is freed when nothing else uses it.
    """

    def __init__(
        self,
        target: str,
        name: str,
        revision: str,
        settings: Settings,
        security: ClientSecurity,
        first: ReplicaSet,
        connections: Connections,
    ) -> None:
        """`revision` is that of every request, or empty if each request has its own."""
        self._target, self._name, self._revision = target, name, revision
        self._settings, self._timeouts, self._security = settings, settings.timeouts, security
        self._pid = os.getpid()
        self._connections, self._loop = connections, connections.loop
        self._changed = asyncio.Event()  # set, and replaced, when a replica or the directory changes
        rng = random.Random()  # not the global generator: drawing from it would change the training
        self._links = Links(self._start, settings.timeouts.connect_s, rng, settings.sharing.max_replicas)
        self._known = Known(first)
        self._links.update(first, time.monotonic())
        self._where: dict[Request, Link] = {}
        self._parked = Parking(name, settings.timeouts.wait_s, self._tried)
        self._budget = RetryBudget(time.monotonic())
        self._past = Traffic()  # traffic of sessions that have ended
        self._watch = Watch(target, name, settings.zone, self, security, connections)
        self._watching = False
        self._directory_error: SchoolhouseError | None = None  # set while the directory does not answer
        self.outstanding = Outstanding(self._loop, settings.sharing.max_pending, self._fail_late, self._tend)
        self._used = False  # whether a session was ever open
        self.closed = False

    @property
    def current(self) -> str:
        """The current revision, which a request gets that may be answered by any."""
        return self._links.current

    @property
    def known(self) -> ReplicaSet:
        """The replica set as it is known now."""
        return self._known.set

    def sessions(self) -> list[Session]:
        """The sessions that are open or being opened."""
        return [link.session for link in self._links if link.session is not None]

    def traffic(self) -> Traffic:
        """Number of requests answered so far, and the bytes that they moved."""
        return sum((session.traffic for session in self.sessions()), self._past)

    async def open_one(self, revision: str) -> None:
        """Wait until a session is open, until that is hopeless, or until the connect timeout."""
        deadline = time.monotonic() + self._timeouts.connect_s
        while not self.closed and (now := time.monotonic()) < deadline:
            self._begin()
            if self._links.pick(revision, now) is not None or self._links.hopeless(revision, now) is not None:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(_LOOK_AGAIN_S, deadline - now))

    def _has_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def ask(self, request: Request) -> None:
        """Send a request on its way. Any thread may call this."""
        if self.closed:  # the loop itself may have ended by now
            request.fail(self._gone())
        else:
            self._loop.call(request.or_fail, self._ask, request)

    def _ask(self, request: Request) -> None:
        self.outstanding.schedule(request)
        self.dispatch(request)

    def follow(self, request: Request, revision: str, heads: Mapping[Tap, Head]) -> None:
        """Send a request that was refused on its way to another revision. Any thread may call this."""
        self._loop.call(request.or_fail, self._follow_to, request, revision, heads)

    def _follow_to(self, request: Request, revision: str, heads: Mapping[Tap, Head]) -> None:
        request.follow(revision, heads)
        self.dispatch(request)

    def ended(self, request: Request) -> None:
        """Forget a request that has ended; if it was cancelled, tell the replica. Any thread may call this."""
        if request.future.cancelled():
            self._loop.call(self.cancel, request)
        else:
            self._loop.here(self.forget, request)

    def close(self) -> None:
        """End the sessions; requests without an answer fail with `TeacherUnavailableError`. Any thread may call this.

        In a fork it does nothing: the sessions are the parent's.
        """
        if self._pid == os.getpid():
            self.closed = True
            self._loop.call(self._close)

    def _close(self) -> None:
        self._watch.close()
        for session in self.sessions():
            session.close()
        for request in self._parked.take_all():
            request.fail(self._gone())
        self.outstanding.close()

    def dispatch(self, request: Request, parked_at: float | None = None) -> None:
        """Give the request to a replica, or park it until there is one; fails it if waiting would not help."""
        while True:
            found = self._assign(request, parked_at)
            session = found.session if isinstance(found, Link) else None
            if isinstance(found, SchoolhouseError):
                request.refuse(found)
            if session is None:
                break
            if session.send(request):
                return
            self._links.ended(session)
            self.forget(request)
            request.take_back()
            parked_at = None  # its own time is running again
        if parked_at is None:
            self.outstanding.stir()

    def _assign(self, request: Request, parked_at: float | None) -> Link | SchoolhouseError | None:
        """The link to the replica for the request, counted there; None if it was parked or has ended; or its error."""
        now = time.monotonic()
        self._begin()
        asked = request.question
        link = None if self.closed else self._links.pick(asked.revision, now, asked.apart_from, asked.alone)
        if link is None:
            error = self._hopeless(request, now)
            if isinstance(error, RevisionChangedError) and self._follow(request):
                return self._assign(request, parked_at)
            self._parked.no_replica(now)
            if error is None:
                self._park(request, now if parked_at is None else parked_at)
            return error
        self._parked.found_replica(now)
        if not self._budget.allows(is_retry=request.is_retry, now=now):
            self._park(request, now if parked_at is None else parked_at)
            return None
        if request.queue(now):
            self.outstanding.schedule(request)
        self._links.take(link, request.nbytes)
        self._where[request] = link
        if request.done:  # meanwhile, in another thread
            self.forget(request)
            return None
        return link

    def _hopeless(self, request: Request, now: float) -> SchoolhouseError | None:
        if self.closed:
            return self._gone()
        error = self._links.hopeless(request.question.revision, now)
        if isinstance(error, RevisionChangedError):
            return revision_changed(self._name, self._target, request.question.revision, error.choices)
        return error

    def _park(self, request: Request, since: float) -> None:
        if not request.done and self._parked.put(request, since):
            self.outstanding.schedule(request)

    def _follow(self, request: Request) -> bool:
        """Move the request to the current revision, if the user wants that and it has no heads, which are of one."""
        current, asked = self._links.current, request.question
        if not self._settings.follow_revisions or asked.wanted.heads() or current in ("", asked.revision):
            return False
        return request.follow(current, asked.heads)

    def forget(self, request: Request) -> Link | None:
        """Drop every reference to a request that has ended, and return its link."""
        self._parked.drop(request)
        link = self._where.pop(request, None)
        if link is not None:
            self._links.give_back(link, request.nbytes)
            if link.leaving or link.strikes:
                self.outstanding.stir()
        return link

    def cancel(self, request: Request) -> None:
        """Forget the request, and tell the replica that works on it."""
        link = self.forget(request)
        session = link.session if link is not None else None
        if session is not None:
            session.cancel(request)

    def _begin(self) -> None:
        if not self._watching and not self.closed:
            at_exit.close_first(self)
            self._watching = True
            self._watch.start()

    def _start(self, link: Link) -> Session:
        at_exit.close_first(self)
        session = Session(
            link.replica.address,
            self._name,
            job=self._settings.job,
            weight=self._settings.sharing.weight,
            transport=self._settings.transport,
            security=self._security,
            revision=self._revision,
            listener=self,
            clock=time.monotonic,
            connections=self._connections,
        )
        session.start()
        self.outstanding.stir()  # to give it up if it does not open in time
        return session

    # Calls of the sessions.

    def on_opened(self, session: Session) -> None:
        """Send what is parked, if the replica has the right revision."""
        link = self._links.of(session)
        wrong = bool(self._revision) and session.revision != self._revision
        if link is not None and wrong:  # a server that ignores the revision in `Open`
            error = RevisionChangedError(f"it has revision {session.revision}", choices=(session.revision,))
            self._links.lost(link, error, time.monotonic())
        elif link is not None:
            self._links.opened(link)
            self._used = True
        self._has_changed()
        if link is None or wrong or self.closed:
            session.close()
        self._flush()
        self.outstanding.stir()  # to renew its lease in time

    def on_draining(self, session: Session) -> None:
        """Send nothing more to a replica that is about to stop; its session is closed when it is idle."""
        self._links.draining()
        self.outstanding.stir()

    def on_unavailable(self, session: Session, request: Request, error: TeacherUnavailableError) -> None:
        """Send the request elsewhere; a replica that refuses a request in this way is about to stop."""
        session.draining = True
        self.on_draining(session)
        request.turn_away(broke=error.broke)
        self._send_again(request, error)

    def on_wrong(self, session: Session, request: Request, error: SchoolhouseError) -> None:
        """Leave a replica that gave a wrong answer, none of which is used, and send the request elsewhere."""
        link = self._links.of(session)
        if link is not None:
            self._links.strike(link, error)
        session.close()
        request.lose()
        self._send_again(request, error)

    def on_broken(self, session: Session, request: Request, error: SchoolhouseError) -> None:
        """Send the request to another replica; if there is none, once more if only its bytes were damaged."""
        link = self._links.of(session)
        alone = link is None or self._links.other(link, time.monotonic()) is None
        request.lose(apart_from=session.address)
        if alone and (request.losses > 1 or isinstance(error, TeacherInternalError)):
            self.forget(request)
            request.fail(error)
        else:
            self._send_again(request, error)

    def on_loss(self, session: Session, lost: list[Request], error: SchoolhouseError) -> None:
        """Send again what has no answer, since requests are idempotent."""
        self._past += session.traffic
        link, now = self._links.of(session), time.monotonic()
        if link is not None:
            if not link.opened and now >= link.give_up_at:
                error = TeacherUnavailableError(f"no answer within {self._timeouts.connect_s:g} s")
            self._links.lost(link, error, now)
        self._has_changed()
        for request in lost:
            request.lose()
            request.or_fail(self._send_again, request, error)
        self.outstanding.stir()

    def _send_again(self, request: Request, error: SchoolhouseError) -> None:
        self.forget(request)
        if self.closed or request.done:
            request.fail(self._gone())  # not raised: its traceback would keep this frame and all lost requests alive
        elif (refused := broke_too_often(request.breaks)) is not None:
            request.fail(refused)
        elif request.losses < _MAX_LOSSES:
            self.dispatch(request)
        elif isinstance(error, TeacherUnavailableError):
            request.fail(
                TeacherUnavailableError(f"{request.losses} replicas were lost while they had this request; {error}")
            )
        else:
            request.fail(error)

    # Calls of the watch of the directory.

    def on_set(self, found: ReplicaSet) -> None:
        """Use the new replica set."""
        now = time.monotonic()
        self._known.hear(found, self._revision, now)
        self._links.update(self._known.set, now)
        if self._directory_error is not None:
            self._links.try_all_again()
        self._directory_error = None
        self._has_changed()
        self._flush()
        self.outstanding.stir()

    def on_silence(self, error: SchoolhouseError) -> None:
        """Go on with the known replicas while the directory does not answer."""
        self._known.forget_doubts()
        self._directory_error = error
        self._has_changed()
        self.outstanding.stir()

    # What is due at some time.

    def _tend(self) -> float | None:
        """Do what is due by now; returns when to call it again."""
        now = time.monotonic()
        if self._known.settle(now):
            self._links.update(self._known.set, now)
        overdue = [*self._links.overdue(now), *self._links.silent(now, self._timeouts.patience_s)]
        moving = self._links.waiting_where_it_ends()
        for session in overdue:
            session.close()
        for request in moving:
            self.forget(request)
            request.take_back()
            request.or_fail(self.dispatch, request)
        self._flush()
        times = [self._next_time(now), *(session.renew() for session in self.sessions())]
        return min((at for at in times if at is not None), default=None)

    def _hold(self, now: float) -> bool:
        """Keep a session open even if there is nothing to ask, as it tells the pool that the revision is in use.

        Returns whether there is none yet.
        """
        wanted = self._used and bool(self._revision) and not self.closed
        if not wanted or self._links.holds(self._revision) or self._links.hopeless(self._revision, now) is not None:
            return False
        return self._links.pick(self._revision, now) is None

    def _flush(self) -> None:
        """Try again to dispatch what is parked."""
        for request, since in self._parked.take_all().items():
            request.or_fail(self.dispatch, request, since)

    def _next_time(self, tended_at: float) -> float | None:
        """When to call `_tend` again at the latest. What fell due since `tended_at` has not been done yet."""
        now = time.monotonic()
        wanted = self._hold(now) or bool(self._parked)
        times = [self._known.settles_at, self._links.due_at(tended_at, wanted=wanted), self._parked.say(now)]
        if self._parked and self._budget.next_at > now:
            times.append(self._budget.next_at)
        if self._links.count > 1:
            times += [now + self._timeouts.patience_s / 4, self._links.exchange(self._revision, now)]
        return min((at for at in times if at is not None), default=None)

    def _fail_late(self, request: Request) -> None:
        waited_in_vain = self._parked.over() if request in self._parked else None
        self.cancel(request)
        request.fail(waited_in_vain or TeacherTimeoutError(late(request, self._timeouts.request_s)))

    def _tried(self) -> str:
        away = self._directory_error
        directory = f"the directory at {self._target} {'answers' if away is None else f'is away: {away.message}'}"
        return f"tried: {self._links.tried()}; {directory}"

    def _gone(self) -> SchoolhouseError:
        return TeacherUnavailableError(f"the connection to {self._name!r} at {self._target} was closed")
