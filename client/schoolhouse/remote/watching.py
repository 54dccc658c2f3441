"""Watching the directory: a task that receives each change of a teacher's replica set."""

import asyncio
import functools
import random
from typing import Any, Protocol

from schoolhouse_wire import background, errors
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

from schoolhouse.errors import SchoolhouseError, TeacherUnavailableError, UnknownTeacherError
from schoolhouse.remote.connections import Connections
from schoolhouse.remote.directory import ReplicaSet, backoff_s


class Listener(Protocol):
    """What a watch calls, in the event loop."""

    def on_set(self, found: ReplicaSet) -> None:
        """The directory has sent a replica set."""

    def on_silence(self, error: SchoolhouseError) -> None:
        """The directory does not answer; the watch tries again."""


class Watch:
    """Watches one teacher at the directory `target`; after an error again, with backoff, until `close()`."""

    def __init__(
        self,
        target: str,
        name: str,
        zone: str,
        listener: Listener,
        security: ClientSecurity,
        connections: Connections,
    ) -> None:
        self._target, self._name, self._zone = target, name, zone
        self._listener, self._security = listener, security
        self._connections = connections
        self._random = random.Random()
        self._closed = False
        self._call: Any = None
        self._task: asyncio.Task[None] | None = None
        self._failures = 0  # failed attempts in a row

    def start(self) -> None:
        """Begin to watch."""
        self._task = self._connections.loop.task(self._run(), name="schoolhouse-watch", on_death=self._on_error)

    def close(self) -> None:
        """End the task."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            self._failures += 1
            try:
                await self._watch()
            except asyncio.CancelledError:
                if self._closed:
                    return
                self._tell(self._ended())  # the RPC alone was cancelled
            except BaseException as err:
                background.failed(err, "a watch of the directory", self._on_error)
            await asyncio.sleep(backoff_s(max(self._failures, 1), self._random))

    async def _watch(self) -> None:
        """Pass each replica set on to the listener until the RPC ends, and then its error."""
        error = self._ended()
        try:
            with self._connections.channel(self._target, self._security) as opened:
                stub = directory_pb2_grpc.DirectoryServiceStub(opened)  # type: ignore[no-untyped-call]
                request = directory_pb2.WatchRequest(teacher=self._name)
                self._call = stub.Watch(request, metadata=channel.metadata(self._security))
                while (found := await self._call.read()) is not grpc.aio.EOF:
                    self._failures = 0
                    self._listener.on_set(ReplicaSet.from_wire(found, self._target, self._zone))
        except grpc.RpcError as err:
            error = status.from_rpc_error(err, self._target)
        finally:
            if self._call is not None:
                self._call.cancel()
                self._call = None  # gRPC keeps a thread and descriptors as long as it is here
        self._tell(error)

    def _ended(self) -> SchoolhouseError:
        return TeacherUnavailableError(f"the directory at {self._target} ended the watch")

    def _on_error(self, error: BaseException) -> None:
        tell = functools.partial(self._tell, errors.typed(error, "this client"))
        background.run(tell, "telling of a watch", background.go_on)

    def _tell(self, error: SchoolhouseError) -> None:
        if self._closed:
            return
        if isinstance(error, UnknownTeacherError):  # the directory did answer: it has no replicas of the teacher
            self._listener.on_set(ReplicaSet())
        else:
            self._listener.on_silence(error)
