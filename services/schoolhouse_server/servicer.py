"""RPC in, engine call, RPC out: the gRPC services of one replica."""

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from google.protobuf.message import Message
from schoolhouse.errors import (
    ProtocolError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherInternalError,
    UnknownTeacherError,
)
from schoolhouse.taps import HEAD
from schoolhouse.tracing import tracer
from schoolhouse.wanted import Wanted
from schoolhouse_wire import channel, framing, pipes, shared_memory, status
from schoolhouse_wire.codec import Arguments, pack
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.shared_memory import ReplicaSegment
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.draining import Drain
from schoolhouse_server.engine import Answer, Engine, Job, Ticket
from schoolhouse_server.logs import SessionLog
from schoolhouse_server.spans import SessionSpans

_log = logging.getLogger(__name__)
_HEAD_LIMITS = Limits(max_payload_bytes=16 << 30)
MAX_IN_FLIGHT = 64


class Teachers:
    """TeacherService over the engines of one replica."""

    def __init__(
        self, engines: Mapping[str, Engine], limits: Limits, *, shared_memory_bytes: int, tracing: bool = False
    ) -> None:
        self._engines = engines
        self._limits = limits
        self._shared_memory_bytes = shared_memory_bytes
        self.tracer = tracer(tracing)
        self.sessions = 0
        self.drain = Drain()

    def find(self, name: str) -> Engine:
        """The engine of a teacher; raises `UnknownTeacherError` with those there are."""
        if name not in self._engines:
            names = sorted(self._engines)
            raise UnknownTeacherError(f"no teacher {name!r} here; there are: {', '.join(names)}", choices=names)
        return self._engines[name]

    def describe(
        self, request: teacher_pb2.DescribeRequest, context: grpc.ServicerContext
    ) -> teacher_pb2.DescribeResponse:
        """Static facts of a teacher."""
        try:
            found = self.find(request.teacher).description
        except SchoolhouseError as err:
            status.abort(context, err)
        return teacher_pb2.DescribeResponse(
            teacher=request.teacher,
            revision=found.revision,
            class_name=found.class_name,
            modules=found.modules,
            parameters=found.parameters,
            dtype=found.dtype,
            device=found.device,
            merge=found.merge,
            max_request_bytes=self._limits.max_payload_bytes,
            max_in_flight=MAX_IN_FLIGHT,
        )

    def session(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message | bytes]:
        """One client's stream: a thread reads requests, this one sends answers."""
        session = ServerSession(self, messages, self._limits, shared_memory_bytes=self._shared_memory_bytes)
        context.add_callback(session.close)
        self.sessions += 1
        try:
            session.start()
            yield from session.answers()
            if session.error is not None:
                status.abort(context, session.error)
        finally:
            self.sessions -= 1
            self.drain.leave(session)
            session.close()
            session.log.info("a session ended")
            session.outbox.clear()


@dataclass(frozen=True)
class _Partial:
    """A call whose payload is coming."""

    call: teacher_pb2.Call
    incoming: framing.Incoming
    began: float  # on time.perf_counter's clock


class ServerSession:
    """The requests of one client: receives them, queues them, and answers in whatever order they finish."""

    def __init__(
        self, teachers: Teachers, messages: Iterator[Any], limits: Limits, *, shared_memory_bytes: int
    ) -> None:
        self.outbox: Outbox[Message | bytes] = Outbox()
        self.error: SchoolhouseError | None = None
        self.calls = 0  # that came so far
        self._teachers = teachers
        self._spans = SessionSpans(teachers.tracer)
        self.log = SessionLog(_log, session=uuid.uuid4().hex[:8])
        self._job = ""
        self._messages = messages
        self._limits = limits
        self._partial: dict[int, _Partial] = {}
        self._tickets: dict[int, Ticket] = {}
        self._replying: set[int] = set()  # whose frames are on their way
        self._engine: Engine | None = None
        self._closed = False
        self._shared_memory_bytes = shared_memory_bytes
        self._offered: tuple[ReplicaSegment, pipes.Offered] | None = None
        self._segment: ReplicaSegment | None = None  # once the client has attached it
        self._pipes: pipes.Pipes | None = None  # in the place of the stream, once the client uses them

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="schoolhouse-reader", daemon=True).start()

    def close(self) -> None:
        """Drop what is queued: the client is gone."""
        self._closed = True
        for ticket in list(self._tickets.values()):
            ticket.cancelled = True
        self._spans.dropped()
        self.outbox.close()
        if self._pipes is not None:
            self._pipes.close()

    @property
    def outstanding(self) -> int:
        """Requests whose answers are not sent yet."""
        return len(self._tickets) + len(self._partial) + len(self._replying)

    def tell_draining(self) -> None:
        """Tell the client to take new requests elsewhere."""
        self.outbox.put(iter([teacher_pb2.ServerMessage(draining=teacher_pb2.Draining())]))

    def answers(self) -> Iterator[Message | bytes]:
        """What goes to the client over the stream. What goes through pipes is sent meanwhile."""
        for message in self.outbox:
            if self._pipes is None:
                yield message
            elif not self._pipes.send(framing.write_message(message)):
                return

    def _arrivals(self) -> Iterator[Any]:
        for message in self._messages:
            yield message
            if self._pipes is not None:
                break
        for data in self._pipes or ():
            yield framing.read_message(teacher_pb2.ClientMessage, data)

    def _read(self) -> None:
        try:
            for message in self._arrivals():
                self._receive(message)
        except SchoolhouseError as err:
            self.error = err
        except grpc.RpcError:
            pass  # the client went away
        except Exception as err:
            if type(err) is not Exception:  # grpc says "the client went away" with a bare one
                self.log.exception("a session failed")
                self.error = TeacherInternalError("the session failed; the server's log says why")
        self.close()  # and with it the pipes
        # What grpc raised refers to this frame, and grpc to that: what is large is not left to the garbage collector.
        self.outbox.clear()
        self._partial.clear()
        self._offered = self._segment = None

    def _receive(self, message: Any) -> None:
        if isinstance(message, framing.Frame):
            self._on_frame(message)
            return
        if message.released:
            self._free(message.released)
        if message.HasField("call"):
            self._on_call(message.call)
        elif message.HasField("cancel"):
            self._partial.pop(message.cancel.request_id, None)
            ticket = self._tickets.pop(message.cancel.request_id, None)
            if ticket is not None:
                ticket.cancelled = True
            self._replying.discard(message.cancel.request_id)
            self._spans.dropped(message.cancel.request_id)
        elif message.HasField("attached"):
            self._on_attached(message.attached)
        elif message.HasField("open"):
            self._on_open(message.open)

    def _on_open(self, message: teacher_pb2.Open) -> None:
        if self._engine is not None:
            raise ProtocolError("Open came twice")
        if message.protocol != channel.PROTOCOL:
            raise ProtocolError(f"the client speaks protocol {message.protocol}; this server speaks {channel.PROTOCOL}")
        self._teachers.drain.check()
        self._engine = self._teachers.find(message.teacher)
        self._job = message.job
        self.log = self.log.of(job=message.job, teacher=message.teacher)
        self.log.info("a session began")
        opened = teacher_pb2.Opened(
            revision=self._engine.description.revision,
            max_in_flight=MAX_IN_FLIGHT,
            max_request_bytes=self._limits.max_payload_bytes,
        )
        if message.shared_memory and self._shared_memory_bytes:
            with contextlib.suppress(OSError):  # this system has none: the stream does
                offered_pipes = pipes.Offered()
                offered = shared_memory.create(self._shared_memory_bytes, self.outbox, checksums=message.checksums)
                opened.shared_memory.CopyFrom(offered.offer)
                offered_pipes.describe_in(opened.shared_memory)
                self._offered = offered, offered_pipes
        self.outbox.put(iter([teacher_pb2.ServerMessage(opened=opened)]))
        self._teachers.drain.join(self)
        if self._closed:  # meanwhile, so that nobody takes it out again
            self._teachers.drain.leave(self)

    def _on_attached(self, message: teacher_pb2.Attached) -> None:
        offered, self._offered = self._offered, None
        if offered is None:
            return
        segment, offered_pipes = offered
        segment.withdraw()
        offered_pipes.withdraw()
        if message.attached:
            self._segment = segment
            self._pipes = offered_pipes.pipes if message.pipes else None
        if self._closed and self._pipes is not None:
            self._pipes.close()

    def _free(self, offsets: Iterable[int]) -> None:
        if self._segment is not None:
            for offset in offsets:
                self._segment.free(offset)

    def _on_call(self, call: teacher_pb2.Call) -> None:
        self.calls += 1
        try:
            if self._engine is None:
                raise ProtocolError("a call came before Open")
            self._check_room(call.request_id)
            self._spans.begin(call, self._engine.description.name, self._job)
            if call.revision not in ("", self._engine.description.revision):
                raise RevisionChangedError(
                    f"revision {call.revision} was asked for; this replica has {self._engine.description.revision}"
                )
            began = time.perf_counter()
            incoming = framing.Incoming(call.inputs, call.payload, self._limits, self._segment)
            partial = _Partial(call, incoming, began)
            if partial.incoming.complete:
                self._queue(partial)
            else:
                self._partial[call.request_id] = partial
        except Exception as err:
            self._fail(call.request_id, err)
        if self._segment is not None and call.payload.HasField("shared"):  # copied by now, or refused
            self._segment.done(call.payload.shared)

    def _check_room(self, request_id: int) -> None:
        computed = len(self._tickets) + len(self._partial)
        # A client knows that a reply is complete before its sender does.
        if computed >= MAX_IN_FLIGHT or computed + len(self._replying) >= 2 * MAX_IN_FLIGHT:
            raise TeacherBusyError(f"{MAX_IN_FLIGHT} requests of this session are in flight, as many as allowed")
        if request_id in self._tickets or request_id in self._partial or request_id in self._replying:
            raise ProtocolError(f"a call came with the id {request_id} of one that is in flight")

    def _on_frame(self, frame: framing.Frame) -> None:
        if frame.request_id not in self._partial:
            return  # refused or cancelled
        partial = self._partial[frame.request_id]
        try:
            partial.incoming.add(frame.offset, frame.data, frame.digest)
            if partial.incoming.complete:
                del self._partial[frame.request_id]
                self._queue(partial)
        except Exception as err:
            self._partial.pop(frame.request_id, None)
            self._fail(frame.request_id, err)

    def _queue(self, partial: "_Partial") -> None:
        assert self._engine is not None
        call, incoming = partial.call, partial.incoming
        inputs, mask = _inputs_of(incoming.value())
        wanted = Wanted.from_wire(call.taps, mask)
        request_id, digest = call.request_id, incoming.digest
        self._engine.count("receive", time.perf_counter() - partial.began)
        if any(tap.side == HEAD for tap in wanted.taps):
            self._answer(request_id, digest, wanted, self._head(wanted, inputs))
            return

        def done(result: Answer | BaseException) -> None:
            if self._tickets.pop(request_id, None) is not None:  # not cancelled
                self._answer(request_id, digest, wanted, result)

        ticket = self._tickets[request_id] = Ticket(done)
        ticket.trace = self._spans.of(request_id)
        deadline = time.monotonic() + call.timeout_s if call.timeout_s > 0 else float("inf")
        key = (digest, call.inputs, tuple(tap.SerializeToString(deterministic=True) for tap in call.taps))
        try:
            self._engine.submit(Job(inputs, wanted, key, deadline, [ticket]))
        except Exception:
            del self._tickets[request_id]
            raise

    def _head(self, wanted: Wanted, inputs: Arguments) -> Answer:
        """A head, or its digest, by which a client tells whether the one that it has is the same."""
        assert self._engine is not None
        heads = wanted.heads()
        if len(wanted.taps) != 1 or len(heads) != 1:
            raise ProtocolError("a call for a head must name one, as the encoding of its only tap")
        [(tap, name)] = heads.items()
        head = self._engine.teacher.head(name, tap.module)
        value = head.digest if inputs.kwargs.get("digest_only") else head.to_value()
        return Answer(pack([value]), self._engine.description.revision, _HEAD_LIMITS)

    def _answer(self, request_id: int, digest: bytes, wanted: Wanted, result: Answer | BaseException) -> None:
        """Declare the features, or the error."""
        if isinstance(result, BaseException):
            self._fail(request_id, result)  # not raised: its traceback, which holds all of a forward, would hold itself
            return
        try:
            outgoing = framing.Outgoing(result.features, limits=result.limits, snapshot=False)
            reply = teacher_pb2.Reply(
                request_id=request_id,
                revision=result.revision,
                taps=wanted.to_wire(),
                input_digest=digest,
                features=outgoing.header,
            )
            self._replying.add(request_id)
            self.outbox.put(self._reply(request_id, reply, outgoing))
        except Exception as err:
            self._fail(request_id, err)

    def _reply(
        self, request_id: int, reply: teacher_pb2.Reply, outgoing: framing.Outgoing
    ) -> Iterator[Message | bytes]:
        def head(payload: teacher_pb2.Payload) -> Message:
            reply.payload.CopyFrom(payload)
            return teacher_pb2.ServerMessage(reply=reply, released=segment.released() if segment is not None else ())

        segment = self._segment
        assert self._engine is not None
        began = time.perf_counter()
        try:
            yield from outgoing.messages(request_id, head, segment, lambda: request_id in self._replying)
        except SchoolhouseError as err:
            self._spans.failed(request_id, err)
            yield teacher_pb2.ServerMessage(failure=status.to_failure(err, request_id))
        finally:
            self._replying.discard(request_id)
            self._engine.count("send", time.perf_counter() - began)
            self._spans.sent(request_id, began)

    def _fail(self, request_id: int, error: BaseException) -> None:
        self._spans.failed(request_id, error)
        if isinstance(error, SchoolhouseError):
            self.log.info("a request failed: %s", type(error).__name__, request=request_id)
        else:
            self.log.error("a request failed", exc_info=error, request=request_id)
        self.outbox.put(iter([teacher_pb2.ServerMessage(failure=status.to_failure(error, request_id))]))


def _inputs_of(value: Any) -> tuple[Arguments, torch.Tensor | None]:
    """The arguments of a forward, and the mask of the positions."""
    inputs, mask = value if type(value) is tuple and len(value) == 2 else (value, None)
    if not isinstance(inputs, Arguments):
        raise ProtocolError("a call's inputs are not the arguments of a forward")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool):
        raise ProtocolError("a call's positions are not a bool mask")
    return inputs, mask
