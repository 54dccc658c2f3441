"""Short calls to a directory and to a replica, to learn where a teacher's replicas are and what they serve."""

import time
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc, teacher_pb2, teacher_pb2_grpc

from schoolhouse.errors import (
    ConfigError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherTimeoutError,
    TeacherUnavailableError,
    UnknownTeacherError,
)
from schoolhouse.remote.handshake import why_not
from schoolhouse.remote.replica_set import ReplicaSet
from schoolhouse.teachers.protocol import TeacherDescription

_PATIENCE_S = 2.0  # how long to wait for one replica before the others are asked


class Address(NamedTuple):
    """The parts of a teacher's URL."""

    target: str  # HOST:PORT
    name: str
    host: str
    tls: bool


def parse(url: str) -> Address:
    """Split `grpc://HOST:PORT/NAME`, or `grpcs://HOST:PORT/NAME` for TLS, into its parts.

    Raises:
        ConfigError: for any other URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port, name = parts.hostname, parts.port, parts.path.strip("/")
    except (ValueError, AttributeError, TypeError):
        host, port, name = None, None, ""
    if not host or not port or not name or parts.scheme not in ("grpc", "grpcs") or "@" in parts.netloc:
        raise ConfigError(
            f"teacher_model: {url!r} is not a teacher's address; expected grpc://HOST:PORT/NAME, or grpcs:// with TLS, "
            "with a port from 1 to 65535"
        )
    return Address(parts.netloc, name, host, tls=parts.scheme == "grpcs")


def find(target: str, name: str, zone: str, timeout_s: float, security: ClientSecurity) -> ReplicaSet:
    """The replicas of the teacher `name`, from the directory or replica at `target`.

    Raises:
        TeacherUnavailableError: if no server answered there within `timeout_s`.
        AuthenticationError: if the server or this client could not prove who it is.
        ConfigError: if only one of the two speaks TLS, or if the server speaks HTTP and not gRPC.
        UnknownTeacherError: if there is no teacher of that name; lists those there are.
    """
    with channel.connect(target, security) as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)  # type: ignore[no-untyped-call]
        try:
            response = stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as err:
            raise _unreachable(err, target, timeout_s, security) from err
    sets = {found.teacher: found for found in response.teachers}
    if name not in sets:
        raise UnknownTeacherError(
            f"no teacher {name!r} at {target}; there are: {', '.join(sorted(sets)) or 'none'}", choices=sorted(sets)
        )
    return ReplicaSet.from_wire(sets[name], target, zone)


def describe(
    replicas: Sequence[str], name: str, revision: str, timeout_s: float, security: ClientSecurity
) -> tuple[TeacherDescription, Limits]:
    """Describe the teacher `name`, and the limits of requests to it, by asking replicas until one answers.

    Raises:
        TeacherUnavailableError: if no replica answers.
        RevisionChangedError: if `revision` is not empty, and the replicas that answer have other revisions.
    """
    error: SchoolhouseError = TeacherUnavailableError(f"teacher {name!r} has no live replica yet")
    deadline = time.monotonic() + timeout_s
    short_s = min(_PATIENCE_S, timeout_s / (2 * max(len(replicas), 1)))
    for patience_s in (short_s, timeout_s):  # a short wait first, so that one that hangs leaves time for the others
        for address in replicas:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                found = _described(address, name, min(patience_s, left_s), security)
            except SchoolhouseError as err:
                error = err
                continue
            if revision in ("", found.revision):
                return _in_words(found), Limits(max_payload_bytes=found.max_request_bytes)
            error = revision_changed(name, address, revision, [found.revision])
        if not isinstance(error, TeacherTimeoutError):
            raise error
    raise TeacherUnavailableError(f"no replica of {name!r} answered within {timeout_s:.3g} s; {error}") from error


def _described(address: str, name: str, timeout_s: float, security: ClientSecurity) -> teacher_pb2.DescribeResponse:
    with channel.connect(address, security) as opened:
        stub = teacher_pb2_grpc.TeacherServiceStub(opened)  # type: ignore[no-untyped-call]
        try:
            response: teacher_pb2.DescribeResponse = stub.Describe(
                teacher_pb2.DescribeRequest(teacher=name), timeout=timeout_s
            )
        except grpc.RpcError as err:
            raise status.from_rpc_error(err, address) from err
        return response


def _in_words(found: teacher_pb2.DescribeResponse) -> TeacherDescription:
    return TeacherDescription(
        name=found.teacher,
        revision=found.revision,
        class_name=found.class_name,
        modules=tuple(found.modules),
        module_classes=tuple(found.module_classes),
        parameters=tuple(found.parameters),
        dtype=found.dtype,
        device=found.device,
        merge=found.merge,
    )


def revision_changed(name: str, where: str, revision: str, there_are: Sequence[str]) -> RevisionChangedError:
    """The error for a revision that is asked for but has no replica."""
    return RevisionChangedError(
        f"teacher {name!r} at {where} has no replica of revision {revision}, with which this client began or which it "
        f"asked for; there are: {', '.join(there_are) or 'none'}. Connect again to use the current one, or with "
        "follow_revisions=True to follow changes",
        choices=there_are,
    )


def _unreachable(err: grpc.RpcError, target: str, timeout_s: float, security: ClientSecurity) -> SchoolhouseError:
    error = status.from_rpc_error(err, target)
    if not isinstance(error, TeacherUnavailableError | TeacherTimeoutError):
        return error
    why = why_not(target, security)
    if why is not None and not isinstance(why, TeacherUnavailableError):
        return why
    found = why.message if why is not None else "something listens there; is it the teacher's server, and is it well?"
    return TeacherUnavailableError(f"no server answered at {target} within {timeout_s:.3g} s: {found}")
