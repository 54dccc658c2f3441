"""What a directory says of a teacher: its replicas, how far such news are believed, the choice among them.

Short calls to the directory and to a replica ask where the replicas are and what they serve.
"""

import random
import socket
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

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
from schoolhouse.remote.connections import Connections
from schoolhouse.remote.handshake import why_not
from schoolhouse.teachers.protocol import TeacherDescription

SAME_HOST, SAME_ZONE, ELSEWHERE = range(3)
DOUBT_S = 10.0  # how long news that leave nothing to ask are doubted, since a new directory may not know all yet
_BUSIER, _SLACK = 2.0, 2.0
_LEAST_BACKOFF_S = 0.02
_PATIENCE_S = 2.0  # how long to wait for one replica before the others are asked

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """One replica as the directory reports it."""

    address: str
    id: str = ""
    revision: str = ""  # empty if it is not known
    draining: bool = False
    distance: int = ELSEWHERE
    queued: int = 0  # requests that waited for its device at the time of the report

    @property
    def name(self) -> str:
        """Its id, or else its address."""
        return self.id or self.address

    def may_serve(self, revision: str) -> bool:
        """Whether its revision is `revision` or not known; true for the empty revision, which stands for any."""
        return not revision or self.revision in ("", revision)


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas of a teacher. `current` is the revision for jobs that begin now; empty means any."""

    replicas: tuple[Replica, ...] = ()
    current: str = ""

    @classmethod
    def from_wire(cls, found: directory_pb2.ReplicaSet, target: str, zone: str) -> "ReplicaSet":
        """The set that the directory at `target` reports; a replica without an address is the server at `target`."""
        here = socket.gethostname()
        replicas = tuple(
            Replica(
                address=replica.address or target,
                id=replica.id,
                revision=replica.revision,
                draining=replica.state == directory_pb2.Replica.DRAINING,
                distance=_distance(replica, here, zone),
                queued=replica.load.queued,
            )
            for replica in found.replicas
        )
        return cls(replicas, found.revision)

    def of(self, revision: str) -> tuple[Replica, ...]:
        """The replicas that may be asked for a revision, those that are about to stop last."""
        found = [replica for replica in self.replicas if replica.may_serve(revision)]
        return tuple(sorted(found, key=lambda replica: (replica.draining, replica.distance)))

    def serves(self, revision: str) -> bool:
        """Whether a replica takes new requests for that revision."""
        return any(not replica.draining for replica in self.of(revision))

    def revisions(self) -> list[str]:
        """The revisions of the replicas, as far as known."""
        return sorted({replica.revision for replica in self.replicas if replica.revision})


def _distance(replica: directory_pb2.Replica, here: str, zone: str) -> int:
    if replica.host and replica.host == here:
        return SAME_HOST
    return SAME_ZONE if zone and replica.zone == zone else ELSEWHERE


class Known:
    """The replica set that is believed. News that would leave no replica to ask are doubted for a while.

    The reason is that a restarted directory at first lists no replica, or only some.
    """

    def __init__(self, first: ReplicaSet) -> None:
        self.set = first
        self._doubted: tuple[ReplicaSet, float] | None = None

    def hear(self, found: ReplicaSet, revision: str, now: float) -> None:
        """Take news from the directory, for a client that asks for `revision`."""
        if found.of(revision) or not self.set.of(revision):
            self.set, self._doubted = found, None
        else:
            since = now if self._doubted is None else self._doubted[1]
            self._doubted = found, since

    def forget_doubts(self) -> None:
        """Forget doubted news, since the directory no longer answers and they may be outdated."""
        self._doubted = None

    def settle(self, now: float) -> bool:
        """Believe news that were doubted for long enough; returns whether that changed the set."""
        if self._doubted is None or now < self._doubted[1] + DOUBT_S:
            return False
        self.set, self._doubted = self._doubted[0], None
        return True

    @property
    def settles_at(self) -> float | None:
        """When `settle` may change the set; None if nothing is doubted."""
        return None if self._doubted is None else self._doubted[1] + DOUBT_S


def choose(tiers: Sequence[Sequence[T]], cost: Callable[[T], float], unit: float, rng: random.Random) -> T:
    """Choose the better of two random replicas of the nearest tier, unless it is clearly busier than a farther one.

    The power of two choices (Mitzenmacher 2001) keeps loads even without making all clients run to the same idle
    replica. A replica is clearly busier if its cost is above twice the other's cost plus two requests of `unit`.

    Args:
        tiers: replicas by distance, the nearest first; no tier is empty.
        cost: the outstanding cost of a replica.
        unit: cost of a usual request.
        rng: a generator of its own, as drawing from the global one would change the training.
    """
    chosen = _better_of_two(tiers[0], cost, rng)
    for tier in tiers[1:]:
        other = _better_of_two(tier, cost, rng)
        if cost(chosen) > _BUSIER * cost(other) + _SLACK * unit:
            chosen = other
    return chosen


def _better_of_two(tier: Sequence[T], cost: Callable[[T], float], rng: random.Random) -> T:
    count = len(tier)
    if count == 1:
        return tier[0]
    first, second = int(rng.random() * count), int(rng.random() * (count - 1))
    one, other = tier[first], tier[second + (second >= first)]
    return one if cost(one) <= cost(other) else other


def backoff_s(failures: int, rng: random.Random, *, first_s: float = 0.1, longest_s: float = 5.0) -> float:
    """How long to wait after that many failures in a row: exponential backoff with full jitter.

    The wait is at least 0.02 s; its upper bound begins at `first_s` and doubles up to `longest_s`. With jitter, the
    clients of a replica that comes back do not arrive all at once (Brooker, "Exponential backoff and jitter", 2015).
    """
    most = min(first_s * 2.0 ** min(failures - 1, 30), longest_s)
    return _LEAST_BACKOFF_S + rng.random() * (most - _LEAST_BACKOFF_S)


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


async def find(
    connections: Connections, target: str, name: str, zone: str, timeout_s: float, security: ClientSecurity
) -> ReplicaSet:
    """The replicas of the teacher `name`, from the directory or replica at `target`.

    Raises:
        TeacherUnavailableError: if no server answered there within `timeout_s`.
        AuthenticationError: if the server or this client could not prove who it is.
        ConfigError: if only one of the two speaks TLS, or if the server speaks HTTP and not gRPC.
        UnknownTeacherError: if there is no teacher of that name; lists those there are.
    """
    with connections.channel(target, security) as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)  # type: ignore[no-untyped-call]
        try:
            response = await stub.ListTeachers(
                directory_pb2.ListTeachersRequest(),
                timeout=timeout_s,
                wait_for_ready=True,
                metadata=channel.metadata(security),
            )
        except grpc.RpcError as err:
            error = status.from_rpc_error(err, target)
            raise await _unreachable(error, connections, target, timeout_s, security) from err
    sets = {found.teacher: found for found in response.teachers}
    if name not in sets:
        raise UnknownTeacherError(
            f"no teacher {name!r} at {target}; there are: {', '.join(sorted(sets)) or 'none'}", choices=sorted(sets)
        )
    return ReplicaSet.from_wire(sets[name], target, zone)


async def describe(
    connections: Connections,
    replicas: Sequence[str],
    name: str,
    revision: str,
    timeout_s: float,
    security: ClientSecurity,
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
                found = await _described(connections, address, name, min(patience_s, left_s), security)
            except SchoolhouseError as err:
                error = err
                continue
            if revision in ("", found.revision):
                return _in_words(found), Limits(max_payload_bytes=found.max_request_bytes)
            error = revision_changed(name, address, revision, [found.revision])
        if not isinstance(error, TeacherTimeoutError):
            raise error
    raise TeacherUnavailableError(f"no replica of {name!r} answered within {timeout_s:.3g} s; {error}") from error


async def _described(
    connections: Connections, address: str, name: str, timeout_s: float, security: ClientSecurity
) -> teacher_pb2.DescribeResponse:
    with connections.channel(address, security) as opened:
        stub = teacher_pb2_grpc.TeacherServiceStub(opened)  # type: ignore[no-untyped-call]
        try:
            response: teacher_pb2.DescribeResponse = await stub.Describe(
                teacher_pb2.DescribeRequest(teacher=name), timeout=timeout_s, metadata=channel.metadata(security)
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


async def _unreachable(
    error: SchoolhouseError, connections: Connections, target: str, timeout_s: float, security: ClientSecurity
) -> SchoolhouseError:
    if not isinstance(error, TeacherUnavailableError | TeacherTimeoutError):
        return error
    why = await connections.loop.elsewhere(why_not, target, security)
    if why is not None and not isinstance(why, TeacherUnavailableError):
        return why
    found = why.message if why is not None else "something listens there; is it the teacher's server, and is it well?"
    return TeacherUnavailableError(f"no server answered at {target} within {timeout_s:.3g} s: {found}")
