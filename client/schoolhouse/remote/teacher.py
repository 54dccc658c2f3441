"""RemoteTeacher: the Teacher protocol over gRPC."""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from schoolhouse_wire import background, framing
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc import forks
from schoolhouse_wire.values import codec
from schoolhouse_wire.values.codec import Arguments

from schoolhouse.errors import RevisionChangedError, SchoolhouseError, TeacherUnavailableError, UsageError
from schoolhouse.lm_head.head import Head
from schoolhouse.remote import directory
from schoolhouse.remote.connections import Connections, connections
from schoolhouse.remote.dispatcher import Dispatcher
from schoolhouse.remote.facts import Facts
from schoolhouse.remote.heads import FetchedHeads
from schoolhouse.remote.request import Question, Request, Traffic, traced
from schoolhouse.remote.session import Session
from schoolhouse.remote.settings import Settings, settings_of
from schoolhouse.taps import Tap, TapLike
from schoolhouse.teachers.protocol import Features, TeacherDescription
from schoolhouse.teachers.query import Wanted
from schoolhouse.tracing import tracer

_LIMITS, _HEAD_LIMITS = Limits(), Limits(max_payload_bytes=16 << 30)
_ASK_AGAIN_S = 0.25
_LONG_BYTES = 1 << 20  # inputs from this size on are copied in another thread than that of an event loop
_FOLLOW_TIMEOUT_S = 2.0  # how long a submit waits for the facts of a new revision before it goes on with the last one


class RemoteTeacher:
    """A teacher behind gRPC. It connects at its first use; a fork of a process that has used gRPC cannot use it."""

    def __init__(self, url: str, **settings: Any) -> None:
        """Make a teacher without connecting to it.

        The settings are those of `connect`, but without a `head_folder` heads stay in memory.
        """
        self.url = url
        self._target, self.name, host, tls = directory.parse(url)
        self._settings = settings_of(settings)
        self._security = self._settings.security.contents.towards(host, tls=tls)
        self._security.allow(self._target)
        self._tracer = tracer(self._settings.tracing)
        self._closed = False
        self._pinned = self._settings.revision  # the revision to keep to, also in a pickled copy; "" for any
        self._connecting = asyncio.Lock()  # held in the event loop, while the facts are asked for
        self._facts: Facts | None = None
        self._dispatcher: Dispatcher | None = None
        self._follow_at = 0.0  # when to ask for the facts of a new revision again
        self._heads = FetchedHeads(self._settings.head_folder, functools.partial(_ask, weakref.ref(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.url, self._settings, self._pinned))

    def __repr__(self) -> str:
        return f"RemoteTeacher({self.url!r})"

    def __enter__(self) -> "RemoteTeacher":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def describe(self) -> TeacherDescription:
        """Describe the teacher, and how its features travel, for which a session with a replica is opened."""
        facts, dispatcher = self._connected()
        connections().wait(dispatcher.open_one(facts.revision), "a session is not open yet")
        found = sorted({session.transport for session in self.open_sessions()})
        return dataclasses.replace(facts.description, transport="; ".join(found) or "none: no session is open")

    def facts(self) -> TeacherDescription:
        """The teacher's own description, without `transport`; it is asked for once, when the client connects."""
        return self._connected()[0].description

    def _connected(self) -> tuple[Facts, Dispatcher]:
        """What a request needs; waits for it if it is not there yet."""
        found = self._if_connected()
        return found or connections().wait(self._connect(), f"{self!r} is not connected yet")

    def _if_connected(self) -> tuple[Facts, Dispatcher] | None:
        """What a request needs, unless it must be waited for."""
        forks.check()
        facts, dispatcher = self._facts, self._dispatcher
        if facts is None or dispatcher is None:
            return None
        if self._is_behind(facts, dispatcher) and not connections().loop.runs_here:
            return None
        return facts, dispatcher

    def _is_behind(self, facts: Facts, dispatcher: Dispatcher) -> bool:
        """Whether the facts of a new revision are to be asked for."""
        changed = self._settings.follow_revisions and dispatcher.current not in ("", facts.revision)
        return changed and time.monotonic() >= self._follow_at

    async def _connect(self) -> tuple[Facts, Dispatcher]:
        """Connect, and learn the facts of the current revision; in the event loop."""
        async with self._connecting:
            if self._facts is None or self._dispatcher is None:
                self._facts, self._dispatcher = await self._first()
                if self._closed:  # `close` was called meanwhile, and found no dispatcher yet
                    self._dispatcher.close()
            elif self._is_behind(self._facts, self._dispatcher):
                await self._follow(self._dispatcher)
            return self._facts, self._dispatcher

    async def _first(self) -> tuple[Facts, Dispatcher]:
        there = connections()
        found, facts = await self._first_facts(there)
        if not self._settings.follow_revisions:
            self._pinned = facts.revision
        dispatcher = Dispatcher(self._target, self.name, self._pinned, self._settings, self._security, found, there)
        weakref.finalize(self, dispatcher.close).atexit = False
        return facts, dispatcher

    async def _first_facts(self, there: Connections) -> tuple[directory.ReplicaSet, Facts]:
        """Ask the directory and then a replica; as long as no replica answers, repeat both until the timeout."""
        timeout_s = self._settings.timeouts.connect_s
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(deadline - time.monotonic(), 0.001)
            found = await directory.find(there, self._target, self.name, self._settings.zone, left_s, self._security)
            revision = self._pinned or (found.current if found.serves(found.current) else "")
            try:
                return found, await self._learn(found, revision, max(deadline - time.monotonic(), 0.001))
            except TeacherUnavailableError:
                if time.monotonic() + _ASK_AGAIN_S > deadline:
                    raise
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _learn(self, found: directory.ReplicaSet, revision: str, timeout_s: float) -> Facts:
        addresses = [replica.address for replica in found.of(revision)]
        if not addresses and found.replicas:
            raise directory.revision_changed(self.name, self._target, revision, found.revisions())
        described = directory.describe(connections(), addresses, self.name, revision, timeout_s, self._security)
        return Facts(*await described)

    async def _follow(self, dispatcher: Dispatcher) -> None:
        """Learn the facts of a new revision; without an answer, go on with the last one."""
        timeout_s = min(_FOLLOW_TIMEOUT_S, self._settings.timeouts.connect_s)
        with contextlib.suppress(SchoolhouseError):
            self._facts = await self._learn(dispatcher.known, dispatcher.current, timeout_s)
        self._follow_at = time.monotonic() + timeout_s

    def submit(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        taps: Iterable[TapLike],
        *,
        encodings: Mapping[TapLike, Encoding | None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> "Future[Features]":
        """Send one batch; returns at once. Cancelling the future frees the teacher's slot.

        The loss or stop of a replica is not an error as long as another one, or the same one later, answers in time.
        `encodings` say how taps travel; `positions` is the mask `[batch, length]` for encodings that need one. The
        first request whose hidden states travel instead of logits waits for the teacher's head.

        Callbacks of the future run in the thread in which all connections of this process live: one that blocks holds
        them all up.

        Raises:
            UnknownTapError: for a tap that the teacher does not have; nothing is sent.
            ConfigError: for encodings of other taps, or positions that are missing or not needed.
            UsageError: after `close`; in a fork, as `connect` says; and in a callback of a future that would have to
                wait, for a head or for the connection.
            UnsupportedValueError, MessageTooLargeError: for inputs that cannot travel.
            TeacherBusyError: if `Sharing.max_pending` requests are already without an answer.
        """
        return self.begin(args, kwargs, taps, encodings, positions, alone=False).future

    async def ask(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        taps: Iterable[TapLike],
        *,
        encodings: Mapping[TapLike, Encoding | None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> Features:
        """As `submit`, for coroutines: `await teacher.ask(...)` is the features. Its event loop is never held up.

        Cancelling it cancels the request. The inputs must not change before it returns.

        Raises:
            As `submit`, and what the future of that would raise.
        """
        self._check_open()
        there = connections()
        found = self._if_connected()
        if found is None:
            found = await asyncio.wrap_future(there.loop.run(self._connect()))
        facts, dispatcher = found
        wanted = facts.wanted(taps, encodings, positions)
        heads = self._heads.known(facts.revision, wanted)
        if heads is None:
            fetch = there.waiters.submit(self._with_heads, facts, wanted, self._deadline())
            facts, heads = await asyncio.wrap_future(fetch)
        declared = codec.pack(_given(args, kwargs, wanted))
        declare = functools.partial(framing.Outgoing, declared, limits=facts.limits, snapshot=True)
        outgoing = declare() if declared.nbytes < _LONG_BYTES else await asyncio.to_thread(declare)
        request = self._asked(facts, wanted, outgoing, heads)
        return await asyncio.wrap_future(self._send(dispatcher, request))

    def begin(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        taps: Iterable[TapLike],
        encodings: Mapping[TapLike, Encoding | None] | None,
        positions: torch.Tensor | None,
        *,
        alone: bool,
    ) -> Request:
        """As `submit`, but returns the request. If it is to be `alone`, it is computed unmerged and anew."""
        self._check_open()
        facts, dispatcher = self._connected()
        wanted = facts.wanted(taps, encodings, positions)
        facts, heads = self._with_heads(facts, wanted, self._deadline())
        outgoing = framing.Outgoing(_given(args, kwargs, wanted), limits=facts.limits, snapshot=True)
        request = self._asked(facts, wanted, outgoing, heads, alone=alone)
        self._send(dispatcher, request)
        return request

    def begin_again(self, request: Request) -> Request:
        """Send an answered request once more, to be computed alone, by another replica than before if there is one."""
        assert self._dispatcher is not None
        asked = request.question
        question = dataclasses.replace(
            asked, outgoing=copy.copy(asked.outgoing), alone=True, apart_from=request.answered_by
        )
        again = Request(question, self._deadline())
        self._send(self._dispatcher, again)
        return again

    @property
    def loop(self) -> Loop:
        """The event loop of this process, in which futures are completed."""
        return connections().loop

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"{self!r} is closed; connect again")

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeouts.request_s

    def _with_heads(self, facts: Facts, wanted: Wanted, deadline: float) -> tuple[Facts, dict[Tap, Head]]:
        """The heads that a request needs; if their revision is gone and may be followed, those of the current one."""
        while True:
            try:
                names = wanted.heads().items()
                return facts, {tap: self._heads.get(facts.revision, name, tap.module) for tap, name in names}
            except RevisionChangedError:
                if not self._settings.follow_revisions or time.monotonic() + _ASK_AGAIN_S > deadline:
                    raise
            time.sleep(_ASK_AGAIN_S)
            facts, _ = self._connected()

    def _follow_later(self, request: Request) -> None:
        """Have a request whose revision is gone answered by the current one; elsewhere, since it may wait for heads."""
        follow = functools.partial(self._follow_with, request)
        connections().waiters.submit(background.run, follow, "following to another revision", request.give_up)

    def _follow_with(self, request: Request) -> None:
        try:
            facts, dispatcher = self._connected()
            while facts.revision == request.question.revision and not (request.done or self._closed):
                time.sleep(_ASK_AGAIN_S)
                facts, dispatcher = self._connected()
            facts, heads = self._with_heads(facts, request.question.wanted, request.clock.deadline)
            dispatcher.follow(request, facts.revision, heads)
        except Exception as err:
            request.fail(err)

    def _asked(
        self,
        facts: Facts,
        wanted: Wanted,
        outgoing: framing.Outgoing,
        heads: Mapping[Tap, Head],
        *,
        alone: bool = False,
    ) -> Request:
        question = Question(
            outgoing=outgoing, wanted=wanted, revision=facts.revision, heads=heads, limits=_LIMITS, alone=alone
        )
        return self._request(question, self._follow_later if heads and self._settings.follow_revisions else None)

    def _request(self, question: Question, follower: Callable[[Request], None] | None = None) -> Request:
        span = traced(self._tracer, question, self.name, self._settings.job)
        return Request(question, self._deadline(), span, follower)

    def _send(self, dispatcher: Dispatcher, request: Request) -> "Future[Features]":
        dispatcher.outstanding.add(request)
        # The future must not refer to the request: in a reference cycle, its features would outlive their use.
        done = functools.partial(self._done, dispatcher, request.number)
        request.future.add_done_callback(background.called(done, "forgetting a request", background.go_on))
        dispatcher.ask(request)
        return request.future

    def _done(self, dispatcher: Dispatcher, number: int, _future: "Future[Features]") -> None:
        """Forget the request. The future's callback refers to this method, which keeps the teacher alive until here."""
        request = dispatcher.outstanding.remove(number)
        if request is not None:
            dispatcher.ended(request)

    def traffic(self) -> Traffic:
        """Number of requests answered so far, and the bytes that they moved."""
        return self._dispatcher.traffic() if self._dispatcher is not None else Traffic()

    def open_sessions(self) -> list[Session]:
        """The open sessions with the teacher's replicas."""
        sessions = self._dispatcher.sessions() if self._dispatcher is not None else []
        return [session for session in sessions if session.alive]

    def close(self) -> None:
        """End the sessions; requests without an answer fail with `TeacherUnavailableError`.

        This also happens when nothing refers to the teacher, or to one of its futures, any more.
        """
        self._closed = True
        if self._dispatcher is not None:
            self._dispatcher.close()


def _rebuild(url: str, settings: Settings, pinned: str) -> RemoteTeacher:
    teacher = RemoteTeacher(url, **vars(settings))
    teacher._pinned = pinned
    return teacher


def _given(args: Sequence[Any], kwargs: Mapping[str, Any] | None, wanted: Wanted) -> Any:
    inputs = Arguments(args, kwargs)
    return inputs if wanted.mask is None else (inputs, wanted.mask)


def _ask(teacher: "weakref.ref[RemoteTeacher]", revision: str, inputs: Arguments, wanted: Wanted) -> Features:
    found = teacher()
    assert found is not None
    connections().check_wait(f"the head {wanted.heads()[wanted.taps[0]]!r} is not here yet")
    facts, dispatcher = found._connected()
    outgoing = framing.Outgoing(inputs, limits=facts.limits, snapshot=True)
    question = Question(outgoing=outgoing, wanted=wanted, revision=revision, heads={}, limits=_HEAD_LIMITS)
    return found._send(dispatcher, found._request(question)).result()
