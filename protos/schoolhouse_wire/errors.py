"""The errors that cross the wire, one class per `Failure.Code`, so that both sides raise the same types.

`ConfigError` and `UsageError` are here too, since both sides raise them, but they never travel.
"""

from collections.abc import Sequence
from typing import ClassVar

from schoolhouse_wire.limits import MAX_BROKE
from schoolhouse_wire.v1 import teacher_pb2

Code = teacher_pb2.Failure.Code


class SchoolhouseError(Exception):
    """Base of all errors of this project. `choices` lists the valid alternatives, if there are any."""

    code: ClassVar[Code] = teacher_pb2.Failure.INTERNAL

    def __init__(self, message: str, *, choices: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.choices = tuple(choices)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.choices))


class ConfigError(SchoolhouseError, ValueError):
    """A setting given to `convert`, `connect` or a constructor is invalid; the message names it and the choices."""


def _rebuild(kind: type[SchoolhouseError], message: str, choices: tuple[str, ...]) -> SchoolhouseError:
    return kind(message, choices=choices)


class UnknownTeacherError(SchoolhouseError, LookupError):
    """No teacher of that name is served here; `choices` lists those that are."""

    code = teacher_pb2.Failure.UNKNOWN_TEACHER


class UnknownTapError(SchoolhouseError, LookupError):
    """The teacher has no such submodule, or it did not run in this forward."""

    code = teacher_pb2.Failure.UNKNOWN_TAP


class TeacherForwardError(SchoolhouseError, RuntimeError):
    """The teacher's forward raised an error on these inputs, which the message quotes. The teacher keeps running."""

    code = teacher_pb2.Failure.TEACHER_FORWARD


class MessageTooLargeError(SchoolhouseError, ValueError):
    """A request or a reply is larger, nested deeper or made of more parts than the receiver's limits allow."""

    code = teacher_pb2.Failure.MESSAGE_TOO_LARGE


class UnsupportedValueError(SchoolhouseError, TypeError):
    """A value cannot travel: not at all, or not in the encoding that was asked for."""

    code = teacher_pb2.Failure.UNSUPPORTED_VALUE


class CorruptPayloadError(SchoolhouseError):
    """Bytes were damaged on the way, or do not make up a valid value."""

    code = teacher_pb2.Failure.CORRUPT_PAYLOAD


class ProtocolError(SchoolhouseError):
    """The peer does not speak this version of the contract, or broke it."""

    code = teacher_pb2.Failure.PROTOCOL


class TeacherUnavailableError(SchoolhouseError, ConnectionError):
    """No replica of the teacher can be reached, or the one that had the request is gone.

    `broke` says that the replica got stuck, or lost its device, while it ran the request.
    """

    code = teacher_pb2.Failure.UNAVAILABLE
    broke = False


class LeaseExpiredError(TeacherUnavailableError):
    """The replica ended the session, since the client had sent nothing for longer than its lease."""

    code = teacher_pb2.Failure.LEASE_EXPIRED


class TeacherTimeoutError(SchoolhouseError, TimeoutError):
    """The deadline passed before the features arrived."""

    code = teacher_pb2.Failure.TIMEOUT


class TeacherBusyError(SchoolhouseError):
    """A bounded queue is full: more requests are under way than the limits allow."""

    code = teacher_pb2.Failure.BUSY


class RevisionChangedError(SchoolhouseError):
    """The teacher has no replica with the weights, that is the revision, that were asked for."""

    code = teacher_pb2.Failure.REVISION_CHANGED


class TeacherInternalError(SchoolhouseError):
    """The teacher's server failed by a fault of its own, or this client did, if the message says so."""

    code = teacher_pb2.Failure.INTERNAL


class TeacherMemoryError(SchoolhouseError, MemoryError):
    """The teacher has no memory for these inputs or features, not even for parts of the rows. It keeps running."""

    code = teacher_pb2.Failure.OUT_OF_MEMORY


class AuthenticationError(SchoolhouseError, PermissionError):
    """One side could not prove who it is: the client, for lack of a valid token or certificate, or the server."""

    code = teacher_pb2.Failure.UNAUTHENTICATED


class PermissionDeniedError(SchoolhouseError, PermissionError):
    """The server knows who asks, but its configuration does not allow this."""

    code = teacher_pb2.Failure.PERMISSION_DENIED


class UsageError(SchoolhouseError, RuntimeError):
    """A call at the wrong time or place: too early, too late, in another thread, or with arguments that none takes."""


BY_CODE: dict[int, type[SchoolhouseError]] = {
    kind.code: kind
    for kind in (
        UnknownTeacherError,
        UnknownTapError,
        TeacherForwardError,
        MessageTooLargeError,
        UnsupportedValueError,
        CorruptPayloadError,
        ProtocolError,
        TeacherUnavailableError,
        LeaseExpiredError,
        TeacherTimeoutError,
        TeacherBusyError,
        RevisionChangedError,
        TeacherInternalError,
        TeacherMemoryError,
        AuthenticationError,
        PermissionDeniedError,
    )
}


def broke_too_often(times: int) -> TeacherForwardError | None:
    """The error of a request under which so many replicas got stuck or broke; None if it may be tried once more."""
    if times < MAX_BROKE:
        return None
    return TeacherForwardError(
        f"{times} replicas got stuck, or lost their device, while they ran this request, so no other one is asked: a "
        "forward did not return within forward_timeout_s, or a kernel failed; ask for fewer or shorter rows, or look "
        "at the inputs"
    )


def typed(error: BaseException, whose: str) -> SchoolhouseError:
    """The error itself if it is one of ours; otherwise a `TeacherInternalError` of `whose` fault, without text."""
    if isinstance(error, SchoolhouseError):
        return error
    return TeacherInternalError(f"{whose} failed with a {type(error).__name__}; its log says more")
