"""The directory: a table of the teachers and where their replicas listen, and the DirectoryService that serves it."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import grpc
from schoolhouse_wire import background
from schoolhouse_wire.errors import SchoolhouseError, TeacherBusyError, TeacherUnavailableError, UnknownTeacherError
from schoolhouse_wire.rpc import status
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

from schoolhouse_server.security.auth import Gate, check_teacher
from schoolhouse_server.security.tokens import Grant

MAX_WATCHERS = 1024
_NOT_READY = "the directory has just started and does not know the replicas yet"
_LOADS_S = 2.0  # how often a watcher hears of loads that have changed
_UNBALANCED = ("jobs", "stage_s", "queue_delay_counts", "errors", "feature_bytes")  # no use in choosing a replica


@dataclass(frozen=True)
class _Entry:
    replicas: directory_pb2.ReplicaSet
    version: int  # grows when replicas, their states, the revision or the wanted number change


class Directory(directory_pb2_grpc.DirectoryServiceServicer):
    """Replica sets by teacher; if `load` is given, it reads the present load of a replica whenever somebody asks.

    A directory that is not `ready` answers that it is unavailable until its whole table has been published: after a
    restart it must not tell students that their teacher is gone. A client hears only of the teachers that its token is
    for, and, unless it is an admin, only of its own job.
    """

    def __init__(
        self,
        load: Callable[[str], directory_pb2.Load] | None = None,
        *,
        ready: bool = True,
        gate: Gate | None = None,
    ) -> None:
        self._entries: dict[str, _Entry] = {}
        self._changed = threading.Condition()
        self._load = load
        self._ready = ready
        self._gate = gate or Gate()
        self._watchers = 0
        self._closed = False

    def publish(self, replicas: directory_pb2.ReplicaSet) -> None:
        """Replace a teacher's replica set; watchers hear of it at once if anything but loads has changed."""
        with self._changed:
            before = self._entries.get(replicas.teacher)
            changed = before is None or _identity(before.replicas) != _identity(replicas)
            version = before.version if before is not None else 0
            self._entries[replicas.teacher] = _Entry(replicas, version + changed)
            if changed:
                self._changed.notify_all()

    def publish_all(self, table: Iterable[directory_pb2.ReplicaSet]) -> None:
        """Publish the replica sets of all teachers that there are; the directory is ready afterwards."""
        for replicas in table:
            self.publish(replicas)
        self._ready = True

    def sets(self) -> list[directory_pb2.ReplicaSet]:
        """All replica sets with their present loads, as copies that the caller may change.

        Raises:
            TeacherUnavailableError: the directory is not ready.
        """
        if not self._ready:
            raise TeacherUnavailableError(_NOT_READY)
        with self._changed:
            response = directory_pb2.ListTeachersResponse(teachers=[e.replicas for e in self._entries.values()])
        for replicas in response.teachers:
            self._fill(replicas)
        return list(response.teachers)

    def close(self) -> None:
        """End all watches."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def ListTeachers(  # noqa: N802  # the RPC's name
        self, request: directory_pb2.ListTeachersRequest, context: grpc.ServicerContext
    ) -> directory_pb2.ListTeachersResponse:
        """All teachers that the client may see, and their replicas."""
        self._check_ready(context)
        grant = self._grant(context)
        return directory_pb2.ListTeachersResponse(
            teachers=[_seen(one, grant) for one in self.sets() if grant.sees(one.teacher)]
        )

    def Watch(  # noqa: N802  # the RPC's name
        self, request: directory_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[directory_pb2.ReplicaSet]:
        """The replica set of one teacher, and each change of it; where only loads change, every two seconds."""
        self._check_ready(context)
        self._check_known(request.teacher, context)
        self._join(context)
        version, sent = 0, directory_pb2.ReplicaSet()
        while self._wait(request.teacher, version, context):
            self._grant(context, request.teacher)  # checked again: the token may have been revoked
            entry = self._entries[request.teacher]
            found = directory_pb2.ReplicaSet()
            found.CopyFrom(entry.replicas)
            self._fill(found, for_choice=True)
            if entry.version != version or found != sent:
                version, sent = entry.version, found
                yield found

    def _wait(self, teacher: str, version: int, context: grpc.ServicerContext) -> bool:
        """Wait until there may be news; False when the watch has ended."""

        def news() -> bool:
            return self._closed or not context.is_active() or self._entries[teacher].version != version

        with self._changed:
            self._changed.wait_for(news, _LOADS_S)
        return not self._closed and bool(context.is_active())

    def _join(self, context: grpc.ServicerContext) -> None:
        with self._changed:
            full = self._watchers >= MAX_WATCHERS
            self._watchers += not full
        if full:
            text = f"{MAX_WATCHERS} clients watch this directory, which is as many as it takes"
            status.abort(context, TeacherBusyError(text))
        if not context.add_callback(background.called(self._leave, "the end of a watch", background.go_on)):
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._watchers -= 1
            self._changed.notify_all()

    def _fill(self, replicas: directory_pb2.ReplicaSet, *, for_choice: bool = False) -> None:
        for replica in replicas.replicas:
            if self._load is not None:
                replica.load.CopyFrom(self._load(replicas.teacher))
            if for_choice:
                for name in _UNBALANCED:
                    replica.load.ClearField(name)

    def _check_ready(self, context: grpc.ServicerContext) -> None:
        if not self._ready:
            status.abort(context, TeacherUnavailableError(_NOT_READY))

    def _grant(self, context: grpc.ServicerContext, teacher: str | None = None) -> Grant:
        try:
            grant = self._gate.grant(context)
            if teacher is not None:
                check_teacher(teacher, grant)
        except SchoolhouseError as err:
            status.abort(context, err)
        return grant

    def _check_known(self, name: str, context: grpc.ServicerContext) -> None:
        grant = self._grant(context, name)
        with self._changed:
            names = sorted(filter(grant.sees, self._entries))
        if name not in names:
            text = f"no teacher {name!r}; there are: {', '.join(names) or 'none'}"
            status.abort(context, UnknownTeacherError(text, choices=names))


def _seen(replicas: directory_pb2.ReplicaSet, grant: Grant) -> directory_pb2.ReplicaSet:
    """What a token's holder may see of a teacher's load: only its own job, unless it is an admin."""
    if not grant.admin:
        for replica in replicas.replicas:
            own = [job for job in replica.load.jobs if grant.job is not None and job.job == grant.job]
            del replica.load.jobs[:]
            replica.load.jobs.extend(own)
    return replicas


def _identity(replicas: directory_pb2.ReplicaSet) -> tuple[object, ...]:
    described = tuple((r.id, r.address, r.revision, r.state, r.host, r.zone) for r in replicas.replicas)
    return replicas.wanted, replicas.revision, described
