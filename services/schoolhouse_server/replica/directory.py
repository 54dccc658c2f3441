"""The directory: a table of the teachers and where their replicas listen, and the DirectoryService that serves it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from schoolhouse_wire.errors import SchoolhouseError, TeacherUnavailableError, UnknownTeacherError
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

from schoolhouse_server.security.auth import Gate, check_teacher
from schoolhouse_server.security.places import Places
from schoolhouse_server.security.tokens import Grant

MAX_WATCHERS = 4096
_NOT_READY = "the directory has just started and does not know the replicas yet"
_LOADS_S = 2.0  # how often a watcher hears of loads that have changed
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Entry:
    replicas: directory_pb2.ReplicaSet
    version: int  # grows when replicas, their states, the revision or the wanted number change


@dataclass(frozen=True)
class _Told:
    """What watchers of one teacher are told, made once for all of them."""

    replicas: directory_pb2.ReplicaSet
    version: int
    made_at: float


class Directory(directory_pb2_grpc.DirectoryServiceServicer):
    """Replica sets by teacher; if `load` is given, it reads the present load of a replica whenever somebody asks.

    A directory that is not `ready` answers that it is unavailable until its whole table has been published: after a
    restart it must not tell students that their teacher is gone. A client hears only of the teachers that its token is
    for, and, unless it is an admin, only of its own job. Any thread may publish; `loop` serves.
    """

    def __init__(
        self,
        loop: Loop,
        load: Callable[[str], directory_pb2.Load] | None = None,
        *,
        ready: bool = True,
        gate: Gate | None = None,
        max_watchers: int | None = None,
    ) -> None:
        self._loop = loop
        self._entries: dict[str, _Entry] = {}
        self._told: dict[str, _Told] = {}
        self._lock = threading.Lock()
        self._load = load
        self._ready = ready
        self._gate = gate or Gate()
        self._watchers: dict[asyncio.Event, str] = {}  # set when there is news of the teacher
        most = max_watchers or MAX_WATCHERS
        self._places = Places(most, f"{most} clients watch this directory, which is as many as it takes")
        self._closed = False

    def publish(self, replicas: directory_pb2.ReplicaSet) -> None:
        """Replace a teacher's replica set; watchers hear of it at once if anything but loads has changed."""
        with self._lock:
            before = self._entries.get(replicas.teacher)
            changed = before is None or _identity(before.replicas) != _identity(replicas)
            version = before.version if before is not None else 0
            self._entries[replicas.teacher] = _Entry(replicas, version + changed)
        if changed:
            self._loop.call(self._wake, replicas.teacher)

    def _wake(self, teacher: str | None = None) -> None:
        for news, watched in self._watchers.items():
            if teacher in (watched, None):
                news.set()

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
        self._check_ready()
        response = directory_pb2.ListTeachersResponse(teachers=[e.replicas for e in list(self._entries.values())])
        for replicas in response.teachers:
            self._fill(replicas)
        return list(response.teachers)

    def close(self) -> None:
        """End all watches."""
        self._closed = True
        self._loop.call(self._wake)

    async def ListTeachers(  # noqa: N802  # the RPC's name
        self, _request: directory_pb2.ListTeachersRequest, context: _Context
    ) -> directory_pb2.ListTeachersResponse:
        """All teachers that the client may see, and their replicas."""
        self._check_ready()
        grant = self._gate.grant(context)
        return directory_pb2.ListTeachersResponse(
            teachers=[_seen(one, grant) for one in self.sets() if grant.sees(one.teacher)]
        )

    async def Watch(  # noqa: N802  # the RPC's name
        self, request: directory_pb2.WatchRequest, context: _Context
    ) -> AsyncIterator[directory_pb2.ReplicaSet]:
        """The replica set of one teacher, and each change of it; where only loads change, every two seconds."""
        self._check_ready()
        grant = self._grant(context, request.teacher)
        self._check_known(request.teacher, grant)
        with self._joined(request.teacher, self._gate.holder(grant, context.peer())) as (news, ended):
            version, sent = 0, directory_pb2.ReplicaSet()
            while not self._closed:
                if ended:
                    raise ended[0]
                self._grant(context, request.teacher)  # checked again: the token may have been revoked
                told = self._now(request.teacher)
                if told.version != version or told.replicas != sent:
                    version, sent = told.version, told.replicas
                    yield sent
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOADS_S):
                        await news.wait()
                news.clear()

    @contextlib.contextmanager
    def _joined(self, teacher: str, holder: str) -> Iterator[tuple[asyncio.Event, list[SchoolhouseError]]]:
        """What is set when there is news, and the reason once the watch has to end."""
        news, ended = asyncio.Event(), list[SchoolhouseError]()

        def end(error: SchoolhouseError) -> None:
            ended.append(error)
            news.set()

        with self._places.held(holder, end):
            self._watchers[news] = teacher
            try:
                yield news, ended
            finally:
                del self._watchers[news]

    def _now(self, teacher: str) -> _Told:
        """What watchers are told now; loads may be a second old, so that they are read once for many watchers."""
        entry, told, now = self._entries[teacher], self._told.get(teacher), time.monotonic()
        if told is None or told.version != entry.version or now - told.made_at > _LOADS_S / 2:
            found = directory_pb2.ReplicaSet()
            found.CopyFrom(entry.replicas)
            self._fill(found, for_choice=True)
            told = self._told[teacher] = _Told(found, entry.version, now)
        return told

    def _fill(self, replicas: directory_pb2.ReplicaSet, *, for_choice: bool = False) -> None:
        for replica in replicas.replicas:
            if self._load is not None:
                replica.load.CopyFrom(self._load(replicas.teacher))
            if for_choice:
                replica.load.CopyFrom(_for_choice(replica.load))

    def _check_ready(self) -> None:
        if not self._ready:
            raise TeacherUnavailableError(_NOT_READY)

    def _grant(self, context: _Context, teacher: str) -> Grant:
        grant = self._gate.grant(context)
        check_teacher(teacher, grant)
        return grant

    def _check_known(self, name: str, grant: Grant) -> None:
        names = sorted(filter(grant.sees, list(self._entries)))
        if name not in names:
            raise UnknownTeacherError(f"no teacher {name!r}; there are: {', '.join(names) or 'none'}", choices=names)


def _seen(replicas: directory_pb2.ReplicaSet, grant: Grant) -> directory_pb2.ReplicaSet:
    """What a token's holder may see of a teacher's load; unless it is an admin, its own job and what clients choose by.

    From totals it could tell what other jobs do, and from the cache's counters whether another one asked for the same.
    """
    if not grant.admin:
        for replica in replicas.replicas:
            own = [job for job in replica.load.jobs if grant.job is not None and job.job == grant.job]
            replica.load.CopyFrom(_for_choice(replica.load))
            replica.load.jobs.extend(own)
    return replicas


def _for_choice(load: directory_pb2.Load) -> directory_pb2.Load:
    """What clients choose among replicas by."""
    return directory_pb2.Load(queued=load.queued)


def _identity(replicas: directory_pb2.ReplicaSet) -> tuple[object, ...]:
    described = tuple((r.id, r.address, r.revision, r.state, r.host, r.zone) for r in replicas.replicas)
    return replicas.wanted, replicas.revision, described
