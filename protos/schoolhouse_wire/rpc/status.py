"""The mapping between our errors, failures on a session and gRPC's status. Nothing else maps errors."""

from typing import Any

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
_MAX_FAILURE_BYTES = 3072  # in the metadata: gRPC drops metadata above 8 KiB, and the error would be lost
_MAX_DETAILS = 250  # characters, each of which may take 12 bytes of metadata; four times as many if all are ASCII

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
    """The failure that reports `error` to a peer, without the paths, tokens and tensors that its text may contain.

    An error that is not one of ours becomes INTERNAL without its text.
    """
    error = typed(error, "the teacher's server")
    text = _short(scrub(error.message))
    choices = [_sendable(choice[:_MAX_TEXT]) for choice in error.choices[:_MAX_CHOICES]]
    broke = isinstance(error, TeacherUnavailableError) and error.broke
    return teacher_pb2.Failure(
        request_id=request_id, code=error.code, message=_sendable(text), choices=choices, broke=broke
    )


def _sendable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot encode, as the error of a model may contain anything."""
    return text.encode("utf-8", "backslashreplace").decode()


def from_failure(failure: teacher_pb2.Failure) -> SchoolhouseError:
    """The error that a peer reported, cut to the length of one of ours."""
    choices = [_short(choice) for choice in failure.choices[:_MAX_CHOICES]]
    error = BY_CODE.get(failure.code, TeacherInternalError)(
        _short(failure.message) or "no reason was given", choices=choices
    )
    if isinstance(error, TeacherUnavailableError):
        error.broke = failure.broke
    return error


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"


def end(context: "grpc.aio.ServicerContext[Any, Any]", error: BaseException) -> None:
    """Have an RPC end with `error` once its handler returns.

    The traceback is removed from the error. Its frames may refer to the error and to the RPC; in such a cycle the RPC
    would live until the garbage collector runs, and gRPC would count it as open until then. For the same reason this
    does not use `context.abort`, which raises an error that the RPC refers to.
    """
    error.__traceback__ = None
    failure = to_failure(error)
    details = failure.message[: 4 * _MAX_DETAILS if failure.message.isascii() else _MAX_DETAILS]
    if failure.ByteSize() > _MAX_FAILURE_BYTES:
        failure.message = details
        del failure.choices[:]
    context.set_trailing_metadata(((_FAILURE_KEY, failure.SerializeToString()),))
    context.set_code(_TO_GRPC[failure.code])
    context.set_details(details)


def from_rpc_error(error: grpc.RpcError, target: str) -> SchoolhouseError:
    """The error with which an RPC to `target` ended. It never raises, whatever the peer sent."""
    try:
        for key, value in getattr(error, "trailing_metadata", tuple)() or ():
            if key == _FAILURE_KEY:
                return from_failure(teacher_pb2.Failure.FromString(value))
        code, details = error.code(), error.details()
        kind = _FROM_GRPC.get(code, ProtocolError)
        return kind(_short(f"{target}: {details or code.name.lower()}"))
    except Exception as err:
        return ProtocolError(f"{target} failed, and its error cannot be read: {type(err).__name__}")
