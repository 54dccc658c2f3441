"""Authentication: what the token of an RPC allows, and the end of sessions whose token is revoked or changed."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from schoolhouse_wire.errors import (
    AuthenticationError,
    PermissionDeniedError,
    SchoolhouseError,
    TeacherUnavailableError,
)
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.security.tokens import Grant, Tokens

EVERYBODY = Grant(sha256="0" * 64, teachers=("*",), admin=True)  # for every client of a server without tokens
_KEY, _SCHEME = "authorization", "bearer "
_BOUND = "the job's name {!r} is bound to another token; give another one"
_WEIGHT = 1.0  # the largest weight that a client may ask for if its token sets none

_log = logging.getLogger(__name__)


class Gate:
    """Who may ask a server, and for what: everybody, or only clients with one of the given tokens."""

    def __init__(self, tokens: Tokens | None = None) -> None:
        self.tokens = tokens
        self._lock = threading.Lock()
        self._held: dict[object, tuple[Grant, Callable[[SchoolhouseError], None], Callable[[], str]]] = {}
        if tokens is not None:
            tokens.on_change(self._look)

    def start(self) -> None:
        """Begin to follow changes of the tokens file."""
        if self.tokens is not None:
            self.tokens.start()

    def close(self) -> None:
        """Stop following changes of the tokens file."""
        if self.tokens is not None:
            self.tokens.close()

    def grant(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Grant:
        """What the client of this RPC may do; raises as `grant_of` does."""
        return EVERYBODY if self.tokens is None else self.grant_of(context.invocation_metadata() or ())

    def grant_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Grant:
        """What the token in an RPC's metadata may do.

        Raises:
            AuthenticationError: there is no token, or it is not known.
        """
        if self.tokens is None:
            return EVERYBODY
        given = [value for key, value in metadata or () if key == _KEY]
        if len(given) != 1:
            raise AuthenticationError(
                f"this server wants one token, and the call had {len(given)}: "
                "connect(security=Security(token=...)) sends one"
            )
        return self.known(bearer_of(given[0]))

    def known(self, token: str) -> Grant:
        """What a token may do; raises `AuthenticationError` for an unknown token."""
        found = EVERYBODY if self.tokens is None else self.tokens.grant(token)
        if found is None:
            raise AuthenticationError("this server does not know the token; was it revoked? Ask who runs the server")
        return found

    def opened(self, message: teacher_pb2.Open, grant: Grant) -> teacher_pb2.Open:
        """A client's Open with the job and weight that its token allows.

        Raises:
            PermissionDeniedError: the token is not for that teacher, or the job's name belongs to another token.
        """
        if self.tokens is None:
            return message
        check_teacher(message.teacher, grant)
        if grant.job is None and message.job and self.tokens.is_bound(message.job):
            raise PermissionDeniedError(_BOUND.format(message.job))
        found = teacher_pb2.Open()
        found.CopyFrom(message)
        found.job = grant.job or message.job
        found.weight = grant.weight or min(message.weight or _WEIGHT, _WEIGHT)
        return found

    def payer(self, grant: Grant) -> str:
        """What stands for all jobs of a token that may name any job, so that many names get no more; else nothing."""
        return f"\0{grant.sha256}" if self.tokens is not None and grant.job is None else ""

    def holder(self, grant: Grant, peer: str) -> str:
        """Whose places a client takes: its token's, or without tokens its host's, of gRPC's `ipv4:HOST:PORT`."""
        return grant.sha256 if self.tokens is not None else peer.rpartition(":")[0]

    @contextlib.contextmanager
    def held(
        self, grant: Grant, end: Callable[[SchoolhouseError], None], job: Callable[[], str] = str
    ) -> Iterator[None]:
        """Within the `with`, call `end` with the reason, in any thread, once the client may not go on as it is.

        That is once its token's grant is no longer `grant`, or another token is bound to the name that `job()` returns.
        """
        if self.tokens is None:
            yield
            return
        own = object()
        with self._lock:
            self._held[own] = grant, end, job
        try:
            self._compare(grant, end, job)  # the grant may have changed since it was looked up
            yield
        finally:
            with self._lock:
                self._held.pop(own, None)

    def _look(self) -> None:
        with self._lock:
            held = list(self._held.values())
        for one in held:
            try:
                self._compare(*one)
            except Exception:
                _log.exception("a session whose token changed could not be ended")

    def _compare(self, grant: Grant, end: Callable[[SchoolhouseError], None], job: Callable[[], str]) -> None:
        assert self.tokens is not None
        now = self.tokens.now(grant)
        if now is None:
            end(AuthenticationError("the token of this session was revoked; ask who runs the server for another one"))
        elif now != grant:  # the client then opens another session, with the new grant
            end(TeacherUnavailableError("what the token of this session may do has changed; connect again"))
        elif grant.job is None and (name := job()) and self.tokens.is_bound(name):
            end(PermissionDeniedError(_BOUND.format(name)))


def bearer_of(value: str | bytes) -> str:
    """The token in `Bearer TOKEN`; raises `AuthenticationError` for anything else."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise AuthenticationError("the call's authorization metadata is not of the form 'Bearer TOKEN'")
    return text[len(_SCHEME) :].strip()


def check_teacher(name: str, grant: Grant) -> None:
    """Raises `PermissionDeniedError` if the token may not use the teacher, whether or not such a teacher exists."""
    if not grant.allows(name):
        names = sorted(grant.teachers)
        text = f"the token may not use the teacher {name!r}; it may use: {', '.join(names) or 'none'}"
        raise PermissionDeniedError(text, choices=names)
