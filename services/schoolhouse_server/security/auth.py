"""Who asks: the token that came with an RPC, what it may do, and an end for what goes on after it was revoked."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator

import grpc
from schoolhouse.errors import (
    AuthenticationError,
    PermissionDeniedError,
    SchoolhouseError,
    TeacherUnavailableError,
)
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.security.tokens import Grant, Tokens

EVERYBODY = Grant(sha256="0" * 64, teachers=("*",), admin=True)  # who asks a server without tokens
_KEY, _SCHEME = "authorization", "bearer "
_WEIGHT = 1.0  # at most, of who has a token that says nothing of it

_log = logging.getLogger(__name__)


class Gate:
    """Who may ask a server, and for what: everybody, or those with one of these tokens."""

    def __init__(self, tokens: Tokens | None = None) -> None:
        self.tokens = tokens
        self._lock = threading.Lock()
        self._held: dict[object, tuple[Grant, Callable[[SchoolhouseError], None]]] = {}
        if tokens is not None:
            tokens.on_change(self._look)

    def start(self) -> None:
        """Follow the changes of the tokens file."""
        if self.tokens is not None:
            self.tokens.start()

    def close(self) -> None:
        """Follow them no longer."""
        if self.tokens is not None:
            self.tokens.close()

    def grant(self, context: grpc.ServicerContext) -> Grant:
        """What the client of this RPC may do; raises as `grant_of` does."""
        return EVERYBODY if self.tokens is None else self.grant_of(context.invocation_metadata())

    def grant_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Grant:
        """What the token in an RPC's metadata may do.

        Raises:
            AuthenticationError: there is none, or it is not known.
        """
        if self.tokens is None:
            return EVERYBODY
        given = [value for key, value in metadata or () if key == _KEY]
        if len(given) != 1:
            raise AuthenticationError(
                f"this server wants one token, and {len(given)} came: connect(token=...) sends it"
            )
        return self.known(bearer_of(given[0]))

    def known(self, token: str) -> Grant:
        """What a token may do; raises `AuthenticationError` where nobody has it."""
        found = EVERYBODY if self.tokens is None else self.tokens.grant(token)
        if found is None:
            raise AuthenticationError("this server does not know the token; was it revoked? Ask who runs the server")
        return found

    def opened(self, message: teacher_pb2.Open, grant: Grant) -> teacher_pb2.Open:
        """What a client opens a session with, as its token allows it.

        Raises:
            PermissionDeniedError: the token is not for that teacher, or the job's name is another's.
        """
        if self.tokens is None:
            return message
        check_teacher(message.teacher, grant)
        if grant.job is None and message.job and self.tokens.is_bound(message.job):
            raise PermissionDeniedError(f"the job's name {message.job!r} is bound to another token; give another one")
        found = teacher_pb2.Open()
        found.CopyFrom(message)
        found.job = grant.job or message.job
        found.weight = grant.weight or min(message.weight or _WEIGHT, _WEIGHT)
        return found

    @contextlib.contextmanager
    def held(self, grant: Grant, end: Callable[[SchoolhouseError], None]) -> Iterator[None]:
        """Meanwhile `end` is called with the reason as soon as the token may not do any more what `grant` says."""
        if self.tokens is None:
            yield
            return
        own = object()
        with self._lock:
            self._held[own] = grant, end
        try:
            self._compare(grant, end)  # it may have changed since it was looked up
            yield
        finally:
            with self._lock:
                self._held.pop(own, None)

    def _look(self) -> None:
        with self._lock:
            held = list(self._held.values())
        for grant, end in held:
            try:
                self._compare(grant, end)
            except Exception:
                _log.exception("a session whose token changed could not be ended")

    def _compare(self, grant: Grant, end: Callable[[SchoolhouseError], None]) -> None:
        assert self.tokens is not None
        now = self.tokens.now(grant)
        if now is None:
            end(AuthenticationError("the token of this session was revoked; ask who runs the server for another one"))
        elif now != grant:  # the client opens another one, with what holds now
            end(TeacherUnavailableError("what the token of this session may do has changed; connect again"))


def bearer_of(value: str | bytes) -> str:
    """The token in `Bearer TOKEN`; raises `AuthenticationError` for anything else."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise AuthenticationError("the authorization that came is not of the form 'Bearer TOKEN'")
    return text[len(_SCHEME) :].strip()


def check_teacher(name: str, grant: Grant) -> None:
    """Raises `PermissionDeniedError` where the token may not use it, whether or not there is such a teacher."""
    if not grant.allows(name):
        names = sorted(grant.teachers)
        text = f"the token may not use the teacher {name!r}; it may use: {', '.join(names) or 'none'}"
        raise PermissionDeniedError(text, choices=names)
