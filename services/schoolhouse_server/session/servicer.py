"""The gRPC TeacherService of one replica: descriptions of its teachers, and a session for each client."""

import functools
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.security.places import Places
from schoolhouse_server.session.calls import check_describe
from schoolhouse_server.session.context import ReplicaContext
from schoolhouse_server.session.server_session import ServerSession

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class TeacherServicer:
    """Handles the RPCs of TeacherService on one replica."""

    def __init__(self, context: ReplicaContext) -> None:
        self._context = context
        most = context.sharing.max_sessions
        self._places = Places(most, f"max_sessions is {most}, and as many are open at this replica")

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._places)

    async def describe(self, request: teacher_pb2.DescribeRequest, rpc: _Context) -> teacher_pb2.DescribeResponse:
        """The Describe RPC: static facts of a teacher."""
        check_describe(request)
        grant = self._context.gate.grant(rpc)
        found = self._context.find(request.teacher, grant).description
        modules = self._context.tappable(request.teacher, grant).modules
        classes = dict(zip(found.modules, found.module_classes, strict=True))
        return teacher_pb2.DescribeResponse(
            teacher=request.teacher,
            revision=found.revision,
            class_name=found.class_name,
            modules=modules,
            module_classes=[classes[name] for name in modules],
            parameters=found.parameters,
            dtype=found.dtype,
            device=found.device,
            merge=found.merge,
            max_request_bytes=self._context.limits.max_payload_bytes,
            max_in_flight=self._context.sharing.max_in_flight,
        )

    async def session(self, _messages: AsyncIterator[Any], rpc: _Context) -> None:
        """The Session RPC, one client's stream, for as long as that stays; raises the error with which it ends."""
        gate = self._context.gate
        grant = gate.grant(rpc)
        session = ServerSession(self._context, rpc, grant)
        end = functools.partial(self._context.loop.here, session.end)
        with self._places.held(gate.holder(grant, rpc.peer()), session.end, session.idle_since):
            self._context.sessions.add(session)
            try:
                with gate.held(grant, end, lambda: session.job):
                    await session.run()
            finally:
                self._context.sessions.discard(session)
                session.log.info("a session ended")
        if session.error is not None:
            raise session.error
