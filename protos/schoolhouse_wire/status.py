"""Our errors <-> failures on a session <-> gRPC status, both ways. Nothing else maps errors."""

from typing import NoReturn

import grpc

from schoolhouse_wire.errors import (
    BY_CODE,
    ProtocolError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherInternalError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse_wire.v1 import teacher_pb2

_FAILURE_KEY = "schoolhouse-failure-bin"
_MAX_TEXT = 4096
_MAX_CHOICES = 20

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
}
_FROM_GRPC: dict[grpc.StatusCode, type[SchoolhouseError]] = {
    grpc.StatusCode.UNAVAILABLE: TeacherUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TeacherTimeoutError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TeacherBusyError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.CANCELLED: TeacherUnavailableError,
}


def to_failure(error: BaseException, request_id: int = 0) -> teacher_pb2.Failure:
    """The failure that tells `error` to a peer; an error that is not ours becomes INTERNAL without its text."""
    if not isinstance(error, SchoolhouseError):
        error = TeacherInternalError(f"the teacher's server failed with a {type(error).__name__}; its log says more")
    text = error.message if len(error.message) <= _MAX_TEXT else error.message[:_MAX_TEXT] + "…"
    return teacher_pb2.Failure(
        request_id=request_id, code=error.code, message=text, choices=error.choices[:_MAX_CHOICES]
    )


def from_failure(failure: teacher_pb2.Failure) -> SchoolhouseError:
    """The error that a peer told."""
    return BY_CODE.get(failure.code, TeacherInternalError)(failure.message, choices=failure.choices)


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End an RPC with `error`; raises, as `context.abort` does."""
    failure = to_failure(error)
    context.set_trailing_metadata(((_FAILURE_KEY, failure.SerializeToString()),))
    context.abort(_TO_GRPC[failure.code], failure.message)


def from_rpc_error(error: grpc.RpcError, target: str) -> SchoolhouseError:
    """The error that an RPC to `target` ended with."""
    for key, value in getattr(error, "trailing_metadata", tuple)() or ():
        if key == _FAILURE_KEY:
            return from_failure(teacher_pb2.Failure.FromString(value))
    code, details = error.code(), error.details()
    kind = _FROM_GRPC.get(code, ProtocolError)
    return kind(f"{target}: {details or code.name.lower()}")
