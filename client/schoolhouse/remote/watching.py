"""Watching the directory: a thread that receives each change of a teacher's replica set."""

import contextlib
import functools
import queue
import random
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from schoolhouse_wire import background, errors
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

from schoolhouse.errors import SchoolhouseError, TeacherUnavailableError, UnknownTeacherError
from schoolhouse.remote.directory import ReplicaSet, backoff_s


class Listener(Protocol):
    """What a watch calls, in its thread."""

    def on_set(self, found: ReplicaSet) -> None:
        """The directory has sent a replica set."""

    def on_silence(self, error: SchoolhouseError) -> None:
        """The directory does not answer; the watch tries again."""


class Watch:
    """Watches one teacher at the directory `target`; after an error again, with backoff, until `close()`."""

    def __init__(self, target: str, name: str, zone: str, listener: Listener, security: ClientSecurity) -> None:
        self._target, self._name, self._zone = target, name, zone
        self._listener, self._security = listener, security
        self._random = random.Random()
        self._closed = False
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()  # not an Event, whose lock `close` might wait for
        self._call: Any = None
        self._failures = 0  # failed attempts in a row
        self._thread = background.thread(self._run, name="schoolhouse-watch", on_death=self._on_error)

    def start(self) -> None:
        """Start the thread, unless it was started."""
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Tell the thread to end, without waiting for it. The garbage collector may call this in any thread."""
        self._closed = True
        self._ended.put(None)
        call = self._call
        if call is not None:
            call.cancel()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread of a closed watch has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def runs_here(self) -> bool:
        """Whether the calling thread is the one that watches."""
        return self._thread is threading.current_thread()

    def _run(self) -> None:
        while not self._closed:
            self._failures += 1
            background.run(self._watch, "a watch of the directory", self._on_error)
            with contextlib.suppress(queue.Empty):
                self._ended.get(timeout=backoff_s(max(self._failures, 1), self._random))

    def _watch(self) -> None:
        """Pass each replica set on to the listener until the RPC ends, and then its error."""
        error: SchoolhouseError = TeacherUnavailableError(f"the directory at {self._target} ended the watch")
        try:
            for found in self._sets():
                self._failures = 0
                self._listener.on_set(found)
        except grpc.RpcError as err:
            error = status.from_rpc_error(err, self._target)
        self._tell(error)

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

    def _sets(self) -> Iterator[ReplicaSet]:
        # A new channel each time: one that was refused waits for up to two minutes before it tries again.
        with channel.connect(self._target, self._security) as opened:
            stub = directory_pb2_grpc.DirectoryServiceStub(opened)  # type: ignore[no-untyped-call]
            call = self._call = stub.Watch(directory_pb2.WatchRequest(teacher=self._name))
            if self._closed:
                call.cancel()
            for found in call:
                yield ReplicaSet.from_wire(found, self._target, self._zone)
