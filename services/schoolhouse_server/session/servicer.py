"""TeacherService of one replica: what its teachers are, and a session for each client."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.message import Message
from schoolhouse.errors import (
    SchoolhouseError,
    TeacherBusyError,
    UnknownTeacherError,
)
from schoolhouse.tracing import tracer
from schoolhouse_wire import background
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import status
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.common.timer import Timer
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.security.auth import EVERYBODY, Gate, check_teacher
from schoolhouse_server.security.tokens import Grant
from schoolhouse_server.session.admission import Admission
from schoolhouse_server.session.calls import check_describe
from schoolhouse_server.session.draining import Drain
from schoolhouse_server.session.quotas import Sharing
from schoolhouse_server.session.server_session import ServerSession


class Teachers:
    """TeacherService over the engines of one replica."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        limits: Limits,
        *,
        shared_memory_bytes: int,
        sharing: Sharing,
        timer: Timer,
        gate: Gate,
        allow_head: bool,
        tracing: bool = False,
    ) -> None:
        self._lock = threading.Lock()
        self._engines = engines
        self._limits = limits
        self._shared_memory_bytes = shared_memory_bytes
        self.sharing = sharing
        self.timer = timer
        self.gate = gate
        self.allow_head = allow_head
        self.admissions = {name: Admission(sharing, timer) for name in engines}
        self.tracer = tracer(tracing)
        self.sessions = 0
        self.drain = Drain()

    def find(self, name: str, grant: Grant = EVERYBODY) -> Engine:
        """The engine of a teacher that the grant is for.

        Raises:
            PermissionDeniedError: it is for others.
            UnknownTeacherError: there is none; names those of the grant that there are.
            TeacherUnavailableError: it serves no more.
        """
        check_teacher(name, grant)
        if name not in self._engines:
            names = sorted(filter(grant.sees, self._engines))
            raise UnknownTeacherError(f"no teacher {name!r} here; there are: {', '.join(names)}", choices=names)
        self._engines[name].check()
        return self._engines[name]

    def describe(
        self, request: teacher_pb2.DescribeRequest, context: grpc.ServicerContext
    ) -> teacher_pb2.DescribeResponse:
        """Static facts of a teacher."""
        try:
            check_describe(request)
            found = self.find(request.teacher, self.gate.grant(context)).description
        except SchoolhouseError as err:
            status.abort(context, err)
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
            max_request_bytes=self._limits.max_payload_bytes,
            max_in_flight=self.sharing.max_in_flight,
        )

    def session(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message | bytes]:
        """One client's stream: a thread reads requests, this one sends answers."""
        grant = self.gate.grant(context)
        session = ServerSession(self, messages, self._limits, grant, shared_memory_bytes=self._shared_memory_bytes)
        try:
            self._enter()
        except SchoolhouseError as err:
            status.abort(context, err)
        session.cancel_stream = context.cancel
        context.add_callback(background.called(session.close, "closing a session", background.go_on))
        try:
            session.start()
            with self.gate.held(grant, session.end):
                yield from session.answers()
            if session.error is not None:
                status.abort(context, session.error)
        finally:
            with self._lock:
                self.sessions -= 1
            session.cancel_stream = None
            session.ended()
            session.log.info("a session ended")

    def _enter(self) -> None:
        """Take one more session, of which there are so few that other calls have room; else `TeacherBusyError`."""
        with self._lock:
            if self.sessions >= self.sharing.max_sessions:
                raise TeacherBusyError(
                    f"max_sessions is {self.sharing.max_sessions}, and as many are open at this replica"
                )
            self.sessions += 1
