"""The errors that cross the wire, one class per `Failure.Code`, so that both sides raise the same types.

`ConfigError` stands here too, as both sides raise it, but it never travels.
"""

from collections.abc import Sequence
from typing import ClassVar

from schoolhouse_wire.v1 import teacher_pb2

Code = teacher_pb2.Failure.Code


class SchoolhouseError(Exception):
    """Base of all errors of this project. `choices` lists what could have been asked for instead, if anything."""

    code: ClassVar[Code] = teacher_pb2.Failure.INTERNAL

    def __init__(self, message: str, *, choices: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.choices = tuple(choices)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.choices))


class ConfigError(SchoolhouseError, ValueError):
    """A setting given to `convert`, `connect` or a constructor is wrong; the message names it and the choices."""


def _rebuild(kind: type[SchoolhouseError], message: str, choices: tuple[str, ...]) -> SchoolhouseError:
    return kind(message, choices=choices)


class UnknownTeacherError(SchoolhouseError, LookupError):
    """No teacher of that name is served here; `choices` are those that are."""

    code = teacher_pb2.Failure.UNKNOWN_TEACHER


class UnknownTapError(SchoolhouseError, LookupError):
    """The teacher has no such submodule, or it did not run in this forward."""

    code = teacher_pb2.Failure.UNKNOWN_TAP


class TeacherForwardError(SchoolhouseError, RuntimeError):
    """The teacher's forward raised on these inputs; the message is its own. The teacher lives on."""

    code = teacher_pb2.Failure.TEACHER_FORWARD


class MessageTooLargeError(SchoolhouseError, ValueError):
    """A request or a reply is larger, deeper or more finely divided than the receiver's limits allow."""

    code = teacher_pb2.Failure.MESSAGE_TOO_LARGE


class UnsupportedValueError(SchoolhouseError, TypeError):
    """A value of this type cannot travel."""

    code = teacher_pb2.Failure.UNSUPPORTED_VALUE


class CorruptPayloadError(SchoolhouseError):
    """Bytes arrived that are not the bytes that were sent."""

    code = teacher_pb2.Failure.CORRUPT_PAYLOAD


class ProtocolError(SchoolhouseError):
    """The peer does not speak this version of the contract, or broke it."""

    code = teacher_pb2.Failure.PROTOCOL


class TeacherUnavailableError(SchoolhouseError, ConnectionError):
    """No replica of the teacher can be reached, or the one that held the request is gone."""

    code = teacher_pb2.Failure.UNAVAILABLE


class LeaseExpiredError(TeacherUnavailableError):
    """The replica ended the session, since the client had said nothing for longer than its lease lasts."""

    code = teacher_pb2.Failure.LEASE_EXPIRED


class TeacherTimeoutError(SchoolhouseError, TimeoutError):
    """The deadline passed before the features came."""

    code = teacher_pb2.Failure.TIMEOUT


class TeacherBusyError(SchoolhouseError):
    """A bounded queue is full: more requests are under way than the limits allow."""

    code = teacher_pb2.Failure.BUSY


class RevisionChangedError(SchoolhouseError):
    """The teacher now has other weights than those that this client started with."""

    code = teacher_pb2.Failure.REVISION_CHANGED


class TeacherInternalError(SchoolhouseError):
    """The teacher's server, or this client where the message says so, failed in a way that is its own fault."""

    code = teacher_pb2.Failure.INTERNAL


class TeacherMemoryError(SchoolhouseError, MemoryError):
    """The teacher has no memory for these inputs or features, nor for parts of their rows. The teacher lives on."""

    code = teacher_pb2.Failure.OUT_OF_MEMORY


class AuthenticationError(SchoolhouseError, PermissionError):
    """One side could not prove who it is: the client, for lack of a token or a certificate, or the server."""

    code = teacher_pb2.Failure.UNAUTHENTICATED


class PermissionDeniedError(SchoolhouseError, PermissionError):
    """The server knows who asks, and its configuration does not allow this."""

    code = teacher_pb2.Failure.PERMISSION_DENIED


class UsageError(SchoolhouseError, RuntimeError):
    """A call that makes no sense here: too early, too late, in another thread, or with arguments that nobody takes."""


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


def typed(error: BaseException, whose: str) -> SchoolhouseError:
    """The error itself if it is one of ours; else what `whose` fault it is, without its text."""
    if isinstance(error, SchoolhouseError):
        return error
    return TeacherInternalError(f"{whose} failed with a {type(error).__name__}; its log says more")
