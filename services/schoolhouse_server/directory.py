"""Which teachers there are and where their replicas listen: a table, and the DirectoryService over it."""

import threading
from collections.abc import Callable, Iterator

import grpc
from schoolhouse.errors import UnknownTeacherError
from schoolhouse_wire import status
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

_POLL_S = 0.5  # how soon a watcher's thread notices that its client has left


class Directory(directory_pb2_grpc.DirectoryServiceServicer):
    """Replica sets by teacher. `load` reads the present load of a replica at each ListTeachers, if given."""

    def __init__(self, load: Callable[[str], directory_pb2.Load] | None = None) -> None:
        self._sets: dict[str, directory_pb2.ReplicaSet] = {}
        self._versions: dict[str, int] = {}
        self._changed = threading.Condition()
        self._load = load
        self._closed = False

    def publish(self, replicas: directory_pb2.ReplicaSet) -> None:
        """Replace a teacher's replica set; watchers hear of it when its replicas or their wanted number changed."""
        with self._changed:
            before = self._sets.get(replicas.teacher)
            self._sets[replicas.teacher] = replicas
            if before is None or _identity(before) != _identity(replicas):
                self._versions[replicas.teacher] = self._versions.get(replicas.teacher, 0) + 1
                self._changed.notify_all()

    def sets(self) -> list[directory_pb2.ReplicaSet]:
        """All replica sets with their present loads; they are the caller's."""
        with self._changed:
            response = directory_pb2.ListTeachersResponse(teachers=self._sets.values())
        if self._load is not None:
            for replicas in response.teachers:
                for replica in replicas.replicas:
                    replica.load.CopyFrom(self._load(replicas.teacher))
        return list(response.teachers)

    def close(self) -> None:
        """End all watches."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def ListTeachers(  # noqa: N802  # the RPC's name
        self, request: directory_pb2.ListTeachersRequest, context: grpc.ServicerContext
    ) -> directory_pb2.ListTeachersResponse:
        """All teachers and their replicas."""
        return directory_pb2.ListTeachersResponse(teachers=self.sets())

    def Watch(  # noqa: N802  # the RPC's name
        self, request: directory_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[directory_pb2.ReplicaSet]:
        """The replica set of one teacher, and each change of it."""
        name, seen = request.teacher, 0
        if name not in self._sets:
            names = sorted(self._sets)
            error = UnknownTeacherError(f"no teacher {name!r}; there are: {', '.join(names) or 'none'}", choices=names)
            status.abort(context, error)
        while context.is_active():
            with self._changed:
                if self._closed:
                    return
                if self._versions[name] == seen:
                    self._changed.wait(_POLL_S)
                    continue
                seen, found = self._versions[name], self._sets[name]
            yield found


def _identity(replicas: directory_pb2.ReplicaSet) -> tuple[int, tuple[tuple[str, str, str], ...]]:
    return replicas.wanted, tuple((r.id, r.address, r.revision) for r in replicas.replicas)
