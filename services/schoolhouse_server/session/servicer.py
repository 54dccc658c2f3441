"""The gRPC TeacherService of one replica: descriptions of its teachers, and a session for each client."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import Message
from schoolhouse_wire import background
from schoolhouse_wire.errors import SchoolhouseError, TeacherBusyError
from schoolhouse_wire.rpc import status
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.session.calls import check_describe
from schoolhouse_server.session.context import ReplicaContext
from schoolhouse_server.session.server_session import ServerSession


class TeacherServicer:
    """Handles the RPCs of TeacherService on one replica."""

    def __init__(self, context: ReplicaContext) -> None:
        self._lock = threading.Lock()
        self._context = context
        self.sessions = 0

    def describe(self, request: teacher_pb2.DescribeRequest, rpc: grpc.ServicerContext) -> teacher_pb2.DescribeResponse:
        """The Describe RPC: static facts of a teacher."""
        try:
            check_describe(request)
            found = self._context.find(request.teacher, self._context.gate.grant(rpc)).description
        except SchoolhouseError as err:
            status.abort(rpc, err)
        return teacher_pb2.DescribeResponse(
            teacher=request.teacher,
            revision=found.revision,
            class_name=found.class_name,
            modules=found.modules,
            module_classes=found.module_classes,
            parameters=found.parameters,
            dtype=found.dtype,
            device=found.device,
            merge=found.merge,
            max_request_bytes=self._context.limits.max_payload_bytes,
            max_in_flight=self._context.sharing.max_in_flight,
        )

    def session(self, messages: Iterator[Any], rpc: grpc.ServicerContext) -> Iterator[Message | bytes]:
        """The Session RPC, one client's stream: another thread reads requests, and this one sends answers."""
        grant = self._context.gate.grant(rpc)
        session = ServerSession(self._context, messages, grant)
        try:
            self._enter()
        except SchoolhouseError as err:
            status.abort(rpc, err)
        session.cancel_stream = rpc.cancel
        rpc.add_callback(background.called(session.close, "closing a session", background.go_on))
        try:
            session.start()
            with self._context.gate.held(grant, session.end):
                yield from session.answers()
            if session.error is not None:
                status.abort(rpc, session.error)
        finally:
            with self._lock:
                self.sessions -= 1
            session.cancel_stream = None
            session.ended()
            session.log.info("a session ended")

    def _enter(self) -> None:
        """Count one more session; raises `TeacherBusyError` at `max_sessions`, which leaves threads for other calls."""
        with self._lock:
            if self.sessions >= self._context.sharing.max_sessions:
                raise TeacherBusyError(
                    f"max_sessions is {self._context.sharing.max_sessions}, and as many are open at this replica"
                )
            self.sessions += 1
