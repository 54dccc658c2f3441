"""RemoteTeacher: the Teacher protocol over gRPC, on whichever live replica has the least to do."""

import contextlib
import heapq
import itertools
import os
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from schoolhouse_wire import framing
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.limits import Limits

from schoolhouse import discovery
from schoolhouse.errors import (
    ConfigError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse.session import Request, Session, Traffic
from schoolhouse.taps import Tap, TapLike, as_taps, check_modules
from schoolhouse.teachers import Features, TeacherDescription

_MAX_KNOWN_TAPS = 256
_REFRESH_TIMEOUT_S = 2.0


def connect(
    url: str,
    *,
    job: str = "",
    timeout_s: float = 60.0,
    connect_timeout_s: float = 10.0,
    max_pending: int = 1024,
) -> "RemoteTeacher":
    """Connect to the teacher at `grpc://HOST:PORT/NAME`, a directory or a replica.

    The C allocator of this process is told to keep up to 512 MiB of freed memory (`schoolhouse_wire.memory`): without
    that, receiving features costs about half as much again.

    Args:
        url: where the teacher is.
        job: name of the job that asks, for the operator's eyes.
        timeout_s: deadline of each request, in seconds.
        connect_timeout_s: how long to wait for a server, in seconds.
        max_pending: how many requests may be without an answer before `submit` raises `TeacherBusyError`.

    Raises:
        TeacherUnavailableError: no server there within `connect_timeout_s`.
        UnknownTeacherError: no teacher of that name; lists those there are.
    """
    teacher = RemoteTeacher(
        url, job=job, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, max_pending=max_pending
    )
    teacher.describe()
    return teacher


class RemoteTeacher:
    """A teacher behind gRPC. It connects at the first use and again in a process that was forked from this one."""

    def __init__(
        self,
        url: str,
        *,
        job: str = "",
        timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        max_pending: int = 1024,
    ) -> None:
        self.url = url
        self._target, self._name = discovery.parse(url)
        self._settings: dict[str, Any] = {
            "job": job,
            "timeout_s": timeout_s,
            "connect_timeout_s": connect_timeout_s,
            "max_pending": max_pending,
        }
        for name in ("timeout_s", "connect_timeout_s", "max_pending"):
            if self._settings[name] <= 0:
                raise ConfigError(f"{name} is {self._settings[name]}; it must be above 0")
        self._limits = Limits()
        self._closed = False
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
        self._known_taps: dict[tuple[TapLike, ...], tuple[Tap, ...]] = {}
        self._request_limits = self._limits
        self._outstanding: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count()
        self._watchdog: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.url, self._settings))

    def __repr__(self) -> str:
        return f"RemoteTeacher({self.url!r})"

    def __enter__(self) -> "RemoteTeacher":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def describe(self) -> TeacherDescription:
        """Static facts, from the teacher itself; asked once, and its revision is what every reply must be of."""
        with self._lock:
            if self._description is None:
                timeout_s = self._settings["connect_timeout_s"]
                self._refresh(timeout_s)
                self._description, self._request_limits = discovery.describe(self._addresses, self._name, timeout_s)
                self._modules = dict.fromkeys(self._description.modules)  # ordered, and quick to search
            return self._description

    def submit(
        self, args: Sequence[Any], kwargs: Mapping[str, Any] | None, taps: Iterable[TapLike]
    ) -> "Future[Features]":
        """Send one batch; returns at once. Cancelling the future frees the teacher's slot.

        Raises:
            UnknownTapError: before anything is sent.
            UnsupportedValueError, MessageTooLargeError: inputs that cannot travel.
            TeacherBusyError: `max_pending` requests are without an answer already.
        """
        if self._closed:
            raise ConfigError(f"{self!r} is closed; connect again")
        if self._pid != os.getpid():
            self._reset()
        description = self._description or self.describe()
        wanted = self._checked(tuple(taps))
        outgoing = framing.Outgoing(Arguments(args, kwargs), limits=self._request_limits, snapshot=True)
        deadline = time.monotonic() + self._settings["timeout_s"]
        request = Request(outgoing, wanted, description.revision, deadline)
        self._watch(request)
        try:
            self._dispatch(request)
        except SchoolhouseError as err:
            request.fail(err)
        return request.future

    def _checked(self, taps: tuple[TapLike, ...]) -> tuple[Tap, ...]:
        """The taps in their usual form, known to exist; a loop asks for the same ones again and again."""
        found = self._known_taps.get(taps)
        if found is None:
            found = as_taps(taps)
            check_modules((tap.module for tap in found), self._modules, f"teacher {self._name!r}")
            if len(self._known_taps) < _MAX_KNOWN_TAPS:
                self._known_taps[taps] = found
        return found

    def traffic(self) -> Traffic:
        """Requests answered so far, and the bytes that they took."""
        with self._lock:
            return sum((session.traffic for session in self._sessions.values()), self._past_traffic)

    def close(self) -> None:
        """End the sessions; what is unanswered fails with `TeacherUnavailableError`."""
        self._closed = True
        with self._wake:
            self._wake.notify_all()
        for session in list(self._sessions.values()):
            session.close()

    def _watch(self, request: Request) -> None:
        """Hold the request to its deadline, and take it off when it is done."""
        request_id = next(self._ids)
        with self._wake:
            if len(self._outstanding) >= self._settings["max_pending"]:
                raise TeacherBusyError(
                    f"{len(self._outstanding)} requests are without an answer, as many as max_pending allows"
                )
            self._outstanding[request_id] = request
            heapq.heappush(self._deadlines, (request.deadline, request_id))
            if self._watchdog is None:
                self._watchdog = threading.Thread(target=self._expire, name="schoolhouse-deadlines", daemon=True)
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

    def _expire(self) -> None:
        """Fail each request at its deadline."""
        while not self._closed:
            with self._wake:
                now = time.monotonic()
                if not self._deadlines or self._deadlines[0][0] > now:
                    self._wake.wait(self._deadlines[0][0] - now if self._deadlines else None)
                    continue
                _, request_id = heapq.heappop(self._deadlines)
                request = self._outstanding.get(request_id)
            if request is not None:
                self._cancel(request)
                request.fail(
                    TeacherTimeoutError(
                        f"the teacher did not answer within {self._settings['timeout_s']} s and was told to stop; "
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
                    session = self._sessions.get(address) or self._open(address, request)
                except TeacherUnavailableError:
                    continue  # it is gone; _pick raises when no other is left
                self._sessions[address] = session
            if session.send(request):
                return

    def _pick(self, request: Request) -> str:
        candidates = self._untried(request)
        if not candidates:
            self._refresh(self._settings["connect_timeout_s"])
            candidates = self._untried(request)
        elif self._stale:  # a replica was lost; others are at hand, so the directory may be away without harm
            with contextlib.suppress(TeacherUnavailableError):
                self._refresh(min(_REFRESH_TIMEOUT_S, self._settings["connect_timeout_s"]))
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

    def _open(self, address: str, request: Request) -> Session:
        session = Session(
            address,
            self._name,
            job=self._settings["job"],
            limits=self._limits,
            on_loss=self._on_loss,
            clock=time.monotonic,
        )
        opened = session.open(self._settings["connect_timeout_s"])
        if opened.revision != request.revision:
            session.close()
            raise RevisionChangedError(
                f"teacher {self._name!r} at {address} has revision {opened.revision}; this client began with "
                f"{request.revision}. Connect again to use the new one"
            )
        return session

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
            try:
                if self._closed or request.future.done():
                    raise error
                self._dispatch(request)
            except SchoolhouseError as err:
                request.fail(err if isinstance(err, RevisionChangedError) else _gone(error))

    def _refresh(self, timeout_s: float) -> None:
        """Ask the server at the URL where the replicas are."""
        self._stale = False
        self._addresses = discovery.addresses(self._target, self._name, timeout_s)


def _gone(error: SchoolhouseError) -> SchoolhouseError:
    return TeacherUnavailableError(f"the replica that held the request is gone, and no other could take it: {error}")


def _rebuild(url: str, settings: dict[str, Any]) -> RemoteTeacher:
    return RemoteTeacher(url, **settings)
