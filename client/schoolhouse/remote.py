"""RemoteTeacher: the Teacher protocol over gRPC, on whichever live replica has the least to do."""

import contextlib
import dataclasses
import functools
import heapq
import itertools
import os
import random
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from schoolhouse_wire import framing
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.limits import Limits

from schoolhouse import at_exit, discovery
from schoolhouse.errors import (
    ConfigError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse.fetched_heads import FetchedHeads
from schoolhouse.heads import Head
from schoolhouse.request import Request, Traffic, gone, traced
from schoolhouse.session import Session
from schoolhouse.settings import Settings
from schoolhouse.taps import Tap, TapLike, check_modules
from schoolhouse.teachers import Features, TeacherDescription
from schoolhouse.tracing import tracer
from schoolhouse.wanted import Wanted

_LIMITS, _HEAD_LIMITS = Limits(), Limits(max_payload_bytes=16 << 30)
_MAX_KNOWN_TAPS = 256
_REFRESH_TIMEOUT_S = 2.0


class RemoteTeacher:
    """A teacher behind gRPC. It connects at the first use and again in a process that was forked from this one."""

    def __init__(self, url: str, **settings: Any) -> None:
        """Without connecting; the settings are those of `connect`, but without a `head_folder` heads stay in memory."""
        self.url = url
        self._target, self._name = discovery.parse(url)
        self._settings = Settings(**settings)
        self._tracer = tracer(self._settings.tracing)
        self._closed = False
        self._pinned = ""  # the revision that it began with, also in a copy and after a fork
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._wake = threading.Condition()
        self._sessions: dict[str, Session] = {}
        self._addresses: list[str] = []
        self._past_traffic = Traffic()  # of sessions that have ended
        self._stale = False  # a replica was lost: ask the directory again
        self._description: TeacherDescription | None = None
        self._modules: dict[str, None] = {}
        self._known_taps: dict[tuple[TapLike, ...], Wanted] = {}
        self._heads = FetchedHeads(self._settings.head_folder, functools.partial(_ask, weakref.ref(self)))
        self._request_limits = _LIMITS
        self._outstanding: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count()
        self._watchdog: threading.Thread | None = None
        weakref.finalize(self, _shut, self._pid, self._sessions, self._wake).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.url, self._settings, self._pinned))

    def __repr__(self) -> str:
        return f"RemoteTeacher({self.url!r})"

    def __enter__(self) -> "RemoteTeacher":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def describe(self) -> TeacherDescription:
        """What the teacher is, from the teacher itself, and how its features come: asks a replica for that."""
        if self._pid != os.getpid():
            self._reset()
        facts = self.facts()
        with self._lock:
            if not self._sessions and not self._closed:
                self._open_any(facts.revision)
            found = sorted({session.transport for session in self._sessions.values()})
        return dataclasses.replace(facts, transport="; ".join(found) or "none: no session is open")

    def facts(self) -> TeacherDescription:
        """What `describe` says of the teacher itself; asked once, and its revision is what every reply must be of."""
        with self._lock:
            if self._description is None:
                timeout_s = self._settings.connect_timeout_s
                self._refresh(timeout_s)
                found, self._request_limits = discovery.describe(self._addresses, self._name, timeout_s)
                self._check_revision(found.revision, self._target, self._pinned or found.revision)
                self._description, self._pinned = found, found.revision
                self._modules = dict.fromkeys(found.modules)  # ordered, and quick to search
            return self._description

    def _open_any(self, revision: str) -> None:
        for address in self._addresses:
            with contextlib.suppress(SchoolhouseError):  # a request would say so
                self._sessions[address] = self._open(address, revision)
                return

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

        `encodings` say how taps travel, `positions` is the mask `[batch, length]` for those that need it. The first
        request whose hidden states travel in place of logits waits for the teacher's head.

        Raises:
            UnknownTapError: before anything is sent.
            ConfigError: for encodings of other taps, or positions that are missing or not needed; and where a callback
                of a future is the first to need a head.
            UnsupportedValueError, MessageTooLargeError: inputs that cannot travel.
            TeacherBusyError: `max_pending` requests are without an answer already.
        """
        if self._closed:
            raise ConfigError(f"{self!r} is closed; connect again")
        if self._pid != os.getpid():
            self._reset()
        revision = self.facts().revision
        if encodings or positions is not None:
            wanted = Wanted.of(taps, encodings, positions).with_seeds()
            names = (*(tap.module for tap in wanted.taps), *wanted.heads().values())
            check_modules(names, self._modules, f"teacher {self._name!r}")
        else:
            wanted = self._checked(tuple(taps))
        heads = {tap: self._heads.get(revision, name, tap.module) for tap, name in wanted.heads().items()}
        inputs = Arguments(args, kwargs)
        return self._send(inputs if wanted.mask is None else (inputs, wanted.mask), wanted, heads)

    def _send(
        self, inputs: Any, wanted: Wanted, heads: Mapping[Tap, Head], limits: Limits = _LIMITS
    ) -> "Future[Features]":
        outgoing = framing.Outgoing(inputs, limits=self._request_limits, snapshot=True)
        deadline = time.monotonic() + self._settings.timeout_s
        revision = self.facts().revision
        span = traced(self._tracer, outgoing, wanted, self._name, revision, self._settings.job)
        request = Request(outgoing, wanted, revision, deadline, heads, limits, span)
        self._watch(request)
        try:
            self._dispatch(request)
        except SchoolhouseError as err:
            request.fail(err)
        return request.future

    def _checked(self, taps: tuple[TapLike, ...]) -> Wanted:
        """The taps in their usual form, known to exist; a loop asks for the same ones again and again."""
        found = self._known_taps.get(taps)
        if found is None:
            found = Wanted.of(taps)
            check_modules((tap.module for tap in found.taps), self._modules, f"teacher {self._name!r}")
            if len(self._known_taps) < _MAX_KNOWN_TAPS:
                self._known_taps[taps] = found
        return found

    def traffic(self) -> Traffic:
        """Requests answered so far, and the bytes that they took."""
        with self._lock:
            return sum((session.traffic for session in self._sessions.values()), self._past_traffic)

    def open_sessions(self) -> list[Session]:
        """The sessions with its replicas."""
        return list(self._sessions.values())

    def close(self) -> None:
        """End the sessions; what is unanswered fails with `TeacherUnavailableError`.

        It happens by itself when nobody holds the teacher, or a future of its, any more.
        """
        self._closed = True
        _shut(self._pid, self._sessions, self._wake)

    def _answers_here(self) -> bool:
        """Whether this thread is one that ends requests, so that none would end while it waited."""
        sessions = self.open_sessions()
        return threading.current_thread() is self._watchdog or any(session.reads_here for session in sessions)

    def _watch(self, request: Request) -> None:
        """Hold the request to its deadline, and take it off when it is done."""
        request_id = next(self._ids)
        with self._wake:
            if len(self._outstanding) >= self._settings.max_pending:
                raise TeacherBusyError(
                    f"{len(self._outstanding)} requests are without an answer, as many as max_pending allows"
                )
            self._outstanding[request_id] = request
            heapq.heappush(self._deadlines, (request.deadline, request_id))
            if self._watchdog is None:
                self._watchdog = threading.Thread(
                    target=_watch_deadlines,
                    args=(weakref.ref(self), self._wake),
                    name="schoolhouse-deadlines",
                    daemon=True,
                )
                self._watchdog.start()
            if self._deadlines[0][1] == request_id:
                self._wake.notify()
        request.future.add_done_callback(lambda future: self._done(request_id, future))

    def _done(self, request_id: int, future: "Future[Features]") -> None:
        """Forget the request. The future must not refer to it: in a cycle, its features would outlive their use."""
        with self._wake:
            request = self._outstanding.pop(request_id, None)
        if request is not None and future.cancelled():
            self._cancel(request)

    def _cancel(self, request: Request) -> None:
        for session in list(self._sessions.values()):
            session.cancel(request)

    def _take_late(self) -> tuple[Request | None, float | None]:
        """A request that is past its deadline, or None and the seconds until there may be one."""
        while self._deadlines:
            pause = self._deadlines[0][0] - time.monotonic()
            if pause > 0:
                return None, pause
            request = self._outstanding.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                return request, None
        return None, None

    def _fail_late(self, request: Request) -> None:
        self._cancel(request)
        request.fail(
            TeacherTimeoutError(
                f"the teacher did not answer within {self._settings.timeout_s} s and was told to stop; "
                "raise timeout_s in connect(), or add replicas"
            )
        )

    def _dispatch(self, request: Request) -> None:
        """Give the request to the live replica with the least outstanding work that it has not tried."""
        while True:
            with self._lock:
                address = self._pick(request)
                request.tried.add(address)
                try:
                    session = self._sessions.get(address) or self._open(address, request.revision)
                except TeacherUnavailableError:
                    continue  # it is gone; _pick raises when no other is left
                self._sessions[address] = session
                if self._closed:  # meanwhile, and it ended only those that there were
                    session.close()
            if session.send(request):
                return

    def _pick(self, request: Request) -> str:
        candidates = self._untried(request)
        if not candidates:
            self._refresh(self._settings.connect_timeout_s)
            candidates = self._untried(request)
        elif self._stale:  # a replica was lost; others are at hand, so the directory may be away without harm
            with contextlib.suppress(TeacherUnavailableError):
                self._refresh(min(_REFRESH_TIMEOUT_S, self._settings.connect_timeout_s))
                candidates = self._untried(request) or candidates
        if not candidates:
            raise TeacherUnavailableError(f"no replica of {self._name!r} is left to ask at {self._target}")
        if len(candidates) == 1:
            return candidates[0]
        random.shuffle(candidates)
        return min(candidates, key=self._load)

    def _untried(self, request: Request) -> list[str]:
        return [address for address in self._addresses if address not in request.tried]

    def _load(self, address: str) -> int:
        session = self._sessions.get(address)
        return session.outstanding if session is not None else 0

    def _open(self, address: str, revision: str) -> Session:
        at_exit.close_first(self)
        session = Session(
            address,
            self._name,
            job=self._settings.job,
            shared_memory=self._settings.shared_memory,
            checksums=self._settings.checksums,
            on_loss=functools.partial(_on_loss, weakref.ref(self)),
            clock=time.monotonic,
        )
        opened = session.open(self._settings.connect_timeout_s)
        try:
            self._check_revision(opened.revision, address, revision)
        except RevisionChangedError:
            session.close()
            raise
        return session

    def _check_revision(self, found: str, address: str, expected: str) -> None:
        if found != expected:
            raise RevisionChangedError(
                f"teacher {self._name!r} at {address} has revision {found}; this client began with {expected}. "
                "Connect again to use the new one"
            )

    def _on_loss(self, session: Session, lost: list[Request], error: SchoolhouseError) -> None:
        """Send again, elsewhere, what a replica left unanswered; requests are idempotent."""
        with self._lock:
            self._stale = True
            self._past_traffic += session.traffic
            if self._sessions.get(session.address) is session:
                del self._sessions[session.address]
            if session.address in self._addresses:
                self._addresses.remove(session.address)
        for request in lost:
            if self._closed or request.future.done():
                request.fail(gone(error))  # not raised: this frame, and so all that was lost, would hang on it
                continue
            try:
                self._dispatch(request)
            except SchoolhouseError as err:
                request.fail(err if isinstance(err, RevisionChangedError) else gone(error))

    def _refresh(self, timeout_s: float) -> None:
        """Ask the server at the URL where the replicas are."""
        self._stale = False
        self._addresses = discovery.addresses(self._target, self._name, timeout_s)


def _rebuild(url: str, settings: Settings, pinned: str) -> RemoteTeacher:
    teacher = RemoteTeacher(url, **vars(settings))
    teacher._pinned = pinned
    return teacher


# What runs beside a teacher must not keep it alive: it closes when nobody uses it any more.


def _shut(pid: int, sessions: dict[str, Session], wake: threading.Condition) -> None:
    if pid != os.getpid():
        return  # a fork: the sessions are the parent's, and the lock may be held by a thread that is not here
    for session in list(sessions.values()):
        session.close()
    with wake:
        wake.notify_all()


def _ask(teacher: "weakref.ref[RemoteTeacher]", inputs: Arguments, wanted: Wanted) -> Features:
    found = teacher()
    assert found is not None
    if found._answers_here():
        raise ConfigError(
            f"the head {wanted.heads()[wanted.taps[0]]!r} is not here yet, and a callback of a future cannot wait for "
            "it: answers come in its thread. Submit one such request elsewhere first"
        )
    return found._send(inputs, wanted, {}, _HEAD_LIMITS).result()


def _on_loss(
    teacher: "weakref.ref[RemoteTeacher]", session: Session, lost: list[Request], error: SchoolhouseError
) -> None:
    found = teacher()
    if found is not None:
        found._on_loss(session, lost, error)
        return
    for request in lost:
        request.fail(error)


def _watch_deadlines(teacher: "weakref.ref[RemoteTeacher]", wake: threading.Condition) -> None:
    """Fail each request at its deadline."""
    while True:
        with wake:
            found = teacher()
            if found is None or found._closed:
                return
            late, pause = found._take_late()
            if late is None:
                del found
                wake.wait(pause)
                continue
        found._fail_late(late)
        del found, late
