"""Our errors <-> failures on a session <-> gRPC status, both ways. Nothing else maps errors."""

from typing import NoReturn

from schoolhouse_wire.errors import (
    BY_CODE,
    AuthenticationError,
    PermissionDeniedError,
    ProtocolError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherInternalError,
    TeacherTimeoutError,
    TeacherUnavailableError,
    typed,
)
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.scrubbing import scrub
from schoolhouse_wire.v1 import teacher_pb2

_FAILURE_KEY = "schoolhouse-failure-bin"
_MAX_TEXT = 4096
_MAX_CHOICES = 20
_MAX_FAILURE_BYTES = 3072  # in metadata, of which gRPC drops what is above 8 KiB, and with it what the error was
_MAX_DETAILS = 250  # characters, of which one may take 12 bytes of metadata; of ASCII four times as many

_F = teacher_pb2.Failure
_TO_GRPC: dict[int, grpc.StatusCode] = {
    _F.UNKNOWN_TEACHER: grpc.StatusCode.NOT_FOUND,
    _F.UNKNOWN_TAP: grpc.StatusCode.NOT_FOUND,
    _F.TEACHER_FORWARD: grpc.StatusCode.INVALID_ARGUMENT,
    _F.MESSAGE_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    _F.UNSUPPORTED_VALUE: grpc.StatusCode.INVALID_ARGUMENT,
    _F.CORRUPT_PAYLOAD: grpc.StatusCode.DATA_LOSS,
    _F.PROTOCOL: grpc.StatusCode.FAILED_PRECONDITION,
    _F.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    _F.TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    _F.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    _F.REVISION_CHANGED: grpc.StatusCode.ABORTED,
    _F.LEASE_EXPIRED: grpc.StatusCode.UNAVAILABLE,
    _F.INTERNAL: grpc.StatusCode.INTERNAL,
    _F.OUT_OF_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    _F.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    _F.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
}
_FROM_GRPC: dict[grpc.StatusCode, type[SchoolhouseError]] = {
    grpc.StatusCode.UNAVAILABLE: TeacherUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TeacherTimeoutError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TeacherBusyError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.CANCELLED: TeacherUnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
}


def to_failure(error: BaseException, request_id: int = 0) -> teacher_pb2.Failure:
    """The failure that tells `error` to a peer, without paths, tokens and numbers of tensors that its text may have.

    An error that is not ours becomes INTERNAL without its text.
    """
    error = typed(error, "the teacher's server")
    text = _short(scrub(error.message))
    choices = [_sendable(choice[:_MAX_TEXT]) for choice in error.choices[:_MAX_CHOICES]]
    return teacher_pb2.Failure(request_id=request_id, code=error.code, message=_sendable(text), choices=choices)


def _sendable(text: str) -> str:
    """Without what UTF-8 cannot carry: a model's own error may hold anything."""
    return text.encode("utf-8", "backslashreplace").decode()


def from_failure(failure: teacher_pb2.Failure) -> SchoolhouseError:
    """The error that a peer told, no longer than one of ours."""
    choices = [_short(choice) for choice in failure.choices[:_MAX_CHOICES]]
    return BY_CODE.get(failure.code, TeacherInternalError)(
        _short(failure.message) or "no reason was given", choices=choices
    )


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End an RPC with `error`; raises, as `context.abort` does.

    The error loses its traceback: a frame of that may have the error, and the RPC, which is kept until the garbage
    collector runs then; so long gRPC counts it as one that is open.
    """
    error.__traceback__ = None
    failure = to_failure(error)
    details = failure.message[: 4 * _MAX_DETAILS if failure.message.isascii() else _MAX_DETAILS]
    if failure.ByteSize() > _MAX_FAILURE_BYTES:
        failure.message = details
        del failure.choices[:]
    context.set_trailing_metadata(((_FAILURE_KEY, failure.SerializeToString()),))
    context.abort(_TO_GRPC[failure.code], details)


def from_rpc_error(error: grpc.RpcError, target: str) -> SchoolhouseError:
    """The error that an RPC to `target` ended with. It raises nothing, whatever the peer sent."""
    try:
        for key, value in getattr(error, "trailing_metadata", tuple)() or ():
            if key == _FAILURE_KEY:
                return from_failure(teacher_pb2.Failure.FromString(value))
        code, details = error.code(), error.details()
        kind = _FROM_GRPC.get(code, ProtocolError)
        return kind(_short(f"{target}: {details or code.name.lower()}"))
    except Exception as err:
        return ProtocolError(f"{target} failed, and what it said of that cannot be read: {type(err).__name__}")
