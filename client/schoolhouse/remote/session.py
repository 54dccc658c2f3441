"""One session with one replica: many requests in flight on one stream, each ended by its own reply or failure."""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

from google.protobuf.message import Message
from schoolhouse_wire import background, framing, memory
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.outbox import Elsewhere, Outbox
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.same_host.pipes import Later, Pipes
from schoolhouse_wire.same_host.shared_memory import ClientSegment
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse.errors import (
    CorruptPayloadError,
    FeatureMismatchError,
    ProtocolError,
    SchoolhouseError,
    TeacherInternalError,
    TeacherUnavailableError,
)
from schoolhouse.remote.connections import Connections
from schoolhouse.remote.flow_control import Window
from schoolhouse.remote.request import Question, Request, Traffic, features_of
from schoolhouse.remote.same_host import SameHost
from schoolhouse.remote.settings import Transport
from schoolhouse.teachers.protocol import Features

_WRONG = (CorruptPayloadError, ProtocolError, FeatureMismatchError)  # found here: the answer is not what was asked for
_BROKEN = (TeacherInternalError, CorruptPayloadError)  # reported by a replica: another one may do better
_Begun: TypeAlias = framing.Incoming | SchoolhouseError
_Made: TypeAlias = Features | Exception
_LONG_BYTES = 1 << 20  # what is made of so many bytes, or checked of them, is done in another thread


class SessionListener(Protocol):
    """What a session calls as its state changes, in the event loop."""

    def on_opened(self, session: "Session") -> None:
        """The replica has answered `Opened`: requests may be sent."""

    def on_draining(self, session: "Session") -> None:
        """The replica is about to stop: it answers what it has, and should get nothing more."""

    def on_unavailable(self, session: "Session", request: Request, error: TeacherUnavailableError) -> None:
        """The replica refused the request, since it is about to stop."""

    def on_wrong(self, session: "Session", request: Request, error: SchoolhouseError) -> None:
        """The answer is damaged, or is not what the request asked for: the replica cannot be trusted."""

    def on_broken(self, session: "Session", request: Request, error: SchoolhouseError) -> None:
        """The replica failed the request by a fault of its own, or received damaged bytes."""

    def on_loss(self, session: "Session", lost: list[Request], error: SchoolhouseError) -> None:
        """The session has ended, or was never opened; the requests in `lost` have no answer."""


class Session:
    """A stream to one replica: a task that reads and one that writes. All of it happens in the event loop."""

    def __init__(
        self,
        address: str,
        teacher: str,
        *,
        job: str,
        weight: float,
        transport: Transport,
        security: ClientSecurity,
        revision: str = "",
        listener: SessionListener,
        clock: Callable[[], float],
        connections: Connections,
    ) -> None:
        self.address = address
        self.alive = self.draining = False
        self.others_queued = 0  # other clients' requests that waited for the replica's device when it last answered
        self.answered_at = float("-inf")
        self.slowest_s = 0.0  # the longest time from asking the replica to its answer
        self._connections, self._loop = connections, connections.loop
        self._same_host = SameHost(connections.loop, wanted=transport.shared_memory, checksums=transport.checksums)
        self._requests = self._sent_bytes = self._received_bytes = 0
        self._open_message = teacher_pb2.Open(
            protocol=channel.PROTOCOL,
            teacher=teacher,
            job=job,
            weight=weight,
            shared_memory=self._same_host.wanted,
            checksums=transport.checksums,
            revision=revision,
        )
        self._tune_allocator = transport.tune_allocator
        self._security = security
        self._listener = listener
        self._clock = clock
        self._outbox: Outbox[Message | bytes] = Outbox(connections.loop)
        self._attached: Message | None = None  # the last message on the stream; later ones go through the pipes
        self._window: Window[Request] = Window()
        self._partial: dict[int, tuple[teacher_pb2.Reply, framing.Incoming]] = {}
        self._hello = teacher_pb2.Opened()
        self._said_at = self._heard_at = self._busy_since = clock()
        self._call: Any = None
        self._through: Pipes | None = None  # once all messages to the replica go through the pipes
        self._draining = self._closed = False

    @property
    def transport(self) -> str:
        """How features travel, and the reason if it is the stream."""
        return self._same_host.transport

    @property
    def outstanding(self) -> int:
        """Requests given to this session that have no answer yet."""
        return len(self._window)

    @property
    def silent_since(self) -> float | None:
        """Since when the replica has sent nothing although it has requests; None if it has none."""
        if not self.alive or not self._window.in_flight:
            return None
        return max(self._heard_at, self._busy_since)

    def asked(self) -> list[Request]:
        """The requests that the replica has."""
        return self._window.asked()

    @property
    def traffic(self) -> Traffic:
        """Number of requests answered in this session, and the bytes that they moved."""
        return Traffic(self._requests, self._sent_bytes, self._received_bytes)

    @property
    def revision(self) -> str:
        """Revision of the replica; empty until it has answered `Opened`."""
        return self._hello.revision

    def start(self) -> None:
        """Begin to connect; the listener's `on_opened` or `on_loss` says how that ends."""
        if self._tune_allocator:
            memory.keep_freed_memory()
        self._outbox.put(iter([teacher_pb2.ClientMessage(open=self._open_message)]))
        self._loop.task(self._run(), name="schoolhouse-session", on_death=background.go_on)

    def send(self, request: Request) -> bool:
        """Queue a request for this replica; False if the session has ended."""
        if not self.alive or not self._window.add(request):
            return False
        self._pump()
        return True

    def take_back(self) -> list[Request]:
        """Remove and return the requests that were not sent yet, or that the replica sent back."""
        return self._window.take_back()

    def cancel(self, request: Request) -> None:
        """Forget a request, and tell the replica if it has it."""
        request_id = self._window.remove(request)
        self._pump()
        if request_id is not None:
            self._partial.pop(request_id, None)
            cancel = teacher_pb2.Cancel(request_id=request_id)
            self._outbox.put(iter([teacher_pb2.ClientMessage(cancel=cancel)]))

    def close(self) -> None:
        """End the stream; requests without an answer go to the listener's `on_loss`. Any thread may call this."""
        self._loop.here(self._close)

    def _close(self) -> None:
        self._closed = True
        self._outbox.close()
        self._same_host.close()
        if self._call is not None:
            self._call.cancel()

    def _pump(self) -> None:
        """Send the waiting requests for which the window has room."""
        if not self._window.waits:
            return
        idle = not self._window.in_flight
        while (found := self._window.next(now := self._clock())) is not None:
            if idle:
                self._busy_since, idle = now, False
            self._outbox.add(self._messages(*found))
        self._drain()

    def renew(self) -> float | None:
        """Tell the replica that this client is alive, unless something was sent lately; returns when to call again."""
        if not self.alive or not self._hello.lease_s:
            return None
        now, every = self._clock(), self._hello.lease_s / 3
        if now < self._said_at + every:
            return self._said_at + every
        self._outbox.put(iter([teacher_pb2.ClientMessage(renew=teacher_pb2.Renew())]))
        return now + every

    # Sending.

    def _messages(self, request_id: int, request: Request) -> Iterator[Message | bytes | Elsewhere]:
        question = request.question

        def head(payload: teacher_pb2.Payload) -> Message:
            message = teacher_pb2.ClientMessage(released=segment.released() if segment is not None else ())
            call = message.call  # filled in place, since it may hold the inputs
            call.request_id, call.revision, call.alone = request_id, question.revision, question.alone
            call.taps.extend(question.wanted.wire)
            call.timeout_s = max(request.clock.deadline - self._clock(), 0.001)
            call.inputs, call.traceparent = question.outgoing.header, request.traceparent()
            call.broke = request.breaks
            call.payload.CopyFrom(payload)
            framing.add_checksum(call)
            return message

        segment = self._same_host.segment
        try:
            yield from question.outgoing.messages(request_id, head, segment, lambda: request_id in self._window)
        except GeneratorExit:
            raise
        except BaseException as err:  # it fails this request alone, and the stream goes on
            self.cancel(request)
            background.failed(err, "sending a request", request.give_up)

    async def _write(self) -> None:
        """Send what there is on the stream, up to `Attached` with pipes on: later messages go through the pipes."""
        while (message := await self._outbox.next()) is not None:
            self._said_at = self._clock()
            await self._call.write(framing.write_message(message))
            if message is self._attached and self._same_host.pipes is not None:
                self._through = self._same_host.pipes
                self._outbox.when_ready(self._drain)
                return

    def _drain(self) -> None:
        """Send what there is through the pipes, at once, as far as there is room; before they are used, by the task."""
        if self._through is None:
            self._outbox.wake()
        elif not self._draining:
            self._draining = True  # as what is sent may have the window changed, and that calls this again
            try:
                self._post(self._through)
            except BaseException as err:
                background.failed(err, "sending to a replica", self._hang_up)
            self._draining = False

    def _post(self, through: Pipes) -> None:
        while through.idle and (message := self._outbox.take()) is not None:
            self._said_at = self._clock()
            through.post(framing.write_message(message), self._drain)

    async def _write_or_end(self) -> None:
        try:
            await self._write()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the stream has ended, and the reading task sees why

    # Receiving.

    async def _run(self) -> None:
        error: SchoolhouseError = TeacherUnavailableError(f"the teacher at {self.address} ended the session")
        try:
            await self._talk()
        except grpc.RpcError as err:
            error = status.from_rpc_error(err, self.address)
        except SchoolhouseError as err:  # the stream itself is broken, as by a frame that cannot be parsed
            error = err.with_traceback(None)
        except asyncio.CancelledError:
            pass  # it was closed here
        except BaseException as err:
            background.failed(err, "schoolhouse-session", background.go_on)
            what = f"{self.address} sent a message that this client cannot read: {type(err).__name__}"
            error = ProtocolError(f"{what}; the log says more")
        self._end(error)

    async def _talk(self) -> None:
        """Read until the RPC ends; raises unless that is as it should."""
        with self._connections.channel(self.address, self._security) as opened:
            if self._closed:
                return
            stub: Any = opened.stream_stream(channel.SESSION_METHOD)
            self._call = call = channel.with_its_own_status(stub(metadata=channel.metadata(self._security)))
            writing = self._loop.task(self._write_or_end(), name="schoolhouse-sending", on_death=self._hang_up)
            try:
                await self._read(call)
            finally:
                call.cancel()
                writing.cancel()  # it would wait forever for an RPC that has not begun

    def _hang_up(self, _error: BaseException) -> None:
        self._call.cancel()

    async def _read(self, call: Any) -> None:
        while self._same_host.pipes is None and (data := await call.read()) is not grpc.aio.EOF:
            if (later := self._receive(data)) is not None:
                await later
        if (pipes := self._same_host.pipes) is not None:
            await pipes.each(self._receive)
        while await call.read() is not grpc.aio.EOF:  # raises the reason for the end
            pass

    def _end(self, error: SchoolhouseError) -> None:
        self.alive = False
        lost = self._window.end()
        background.run(self._free, "freeing what a session had", background.go_on)

        def give_up(err: BaseException) -> None:
            for request in lost:
                request.give_up(err)
            self._listener.on_loss(self, [], error)

        background.run(lambda: self._listener.on_loss(self, lost, error), "telling of a session's end", give_up)

    def _free(self) -> None:
        self._partial.clear()
        with contextlib.ExitStack() as freeing:  # so that each of these runs even if another raises
            freeing.callback(self._same_host.clear)
            freeing.callback(self._outbox.clear)
            freeing.callback(self._close)

    def _receive(self, data: bytes) -> Later:
        """Deal with a message; what takes long is returned, to be awaited before the next message."""
        message = framing.read_message(teacher_pb2.ServerMessage, data)
        self._heard_at = self._clock()
        if isinstance(message, framing.Frame):
            return self._on_frame(message)
        if message.released:
            self._same_host.free(message.released)
        kind = message.WhichOneof("kind")
        if kind == "reply":
            return self._on_reply(message.reply)
        if kind == "failure":
            request = self._take(message.failure.request_id)
            if request is not None:
                request.or_fail(self._on_failure, request, status.from_failure(message.failure))
            self._pump()
        elif kind == "wait":
            self._window.wait(message.wait.request_id)
        elif kind == "resume":
            self._window.resume()
            self._pump()
        elif kind == "opened":
            self._on_opened(message.opened)
        elif kind == "draining":
            self.draining = True
            self._listener.on_draining(self)
        return None

    def _on_failure(self, request: Request, error: SchoolhouseError) -> None:
        if isinstance(error, TeacherUnavailableError):
            self._listener.on_unavailable(self, request, error)
        elif isinstance(error, _BROKEN):
            self._listener.on_broken(self, request, error)
        else:
            request.fail(error)

    def _on_bad_answer(self, request_id: int, error: SchoolhouseError) -> None:
        request = self._window.get(request_id)
        if request is None:  # cancelled meanwhile
            return
        if isinstance(error, _WRONG):
            self._take(request_id)
            request.or_fail(self._listener.on_wrong, self, request, error)
        else:
            self.cancel(request)
            request.fail(error)

    def _on_opened(self, opened: teacher_pb2.Opened) -> None:
        self._attach(opened)
        self._hello = opened
        self._window.grant(opened)
        self.alive = not self._closed
        self._listener.on_opened(self)

    def _attach(self, opened: teacher_pb2.Opened) -> None:
        attached = self._same_host.attach(opened, self._outbox)
        if attached is None:
            return
        if (pipes := self._same_host.pipes) is not None:
            end = pipes.end
            self._call.add_done_callback(background.called(lambda _call: end(), "ending pipes", background.go_on))
        self._attached = teacher_pb2.ClientMessage(attached=attached)
        self._outbox.put(iter([self._attached]))

    def _on_reply(self, reply: teacher_pb2.Reply) -> Later:
        request, segment = self._window.get(reply.request_id), self._same_host.segment
        if request is None:  # cancelled
            self._same_host.refuse(reply.payload)
            return None
        begin = functools.partial(_begun, reply, request.question.limits, segment)
        if segment is not None and segment.receives_checksums and reply.payload.shared.nbytes > _LONG_BYTES:
            return self._begin_elsewhere(reply, begin)
        return self._on_begun(reply, begin())

    async def _begin_elsewhere(self, reply: teacher_pb2.Reply, begin: Callable[[], _Begun]) -> None:
        if (later := self._on_begun(reply, await self._loop.elsewhere(begin))) is not None:
            await later

    def _on_begun(self, reply: teacher_pb2.Reply, incoming: _Begun) -> Later:
        if isinstance(incoming, SchoolhouseError):
            self._same_host.refuse(reply.payload)
            self._on_bad_answer(reply.request_id, incoming)
        elif incoming.complete:
            return self._finish(reply, incoming)
        else:
            self._partial[reply.request_id] = reply, incoming
        return None

    def _on_frame(self, frame: framing.Frame) -> Later:
        partial = self._partial.get(frame.request_id)
        if partial is None:
            return None  # cancelled
        reply, incoming = partial
        try:
            incoming.add(frame.offset, frame.data, frame.digest)
        except SchoolhouseError as err:
            self._on_bad_answer(frame.request_id, err)
            return None
        if not incoming.complete:
            return None
        self._same_host.overflowed()
        return self._finish(reply, incoming)

    def _finish(self, reply: teacher_pb2.Reply, incoming: framing.Incoming) -> Later:
        request = self._window.get(reply.request_id)
        if request is None:
            return None
        now, nbytes = self._clock(), incoming.nbytes + len(reply.features)
        self._requests += 1
        self._sent_bytes += request.nbytes
        self._received_bytes += nbytes
        self.slowest_s = max(self.slowest_s, now - request.asked_at)
        self.others_queued, self.answered_at = max(reply.queued - self._window.in_flight + 1, 0), now
        request.received(nbytes)
        make = functools.partial(_features, request.question, reply, incoming)
        if nbytes > _LONG_BYTES and not request.question.wanted.as_computed:
            return self._finish_elsewhere(request, reply.request_id, make)
        self._on_features(request, reply.request_id, make())
        return None

    async def _finish_elsewhere(self, request: Request, request_id: int, make: Callable[[], _Made]) -> None:
        self._on_features(request, request_id, await self._loop.elsewhere(make))

    def _on_features(self, request: Request, request_id: int, made: _Made) -> None:
        self._take(request_id)
        if isinstance(made, _WRONG):
            request.or_fail(self._listener.on_wrong, self, request, made)
        elif isinstance(made, Exception):
            request.fail(made)
        else:
            request.answer(made, self.address)
        self._pump()  # last, so that the thread that waits for the answer already goes on

    def _take(self, request_id: int) -> Request | None:
        self._partial.pop(request_id, None)
        return self._window.take(request_id)


def _begun(reply: teacher_pb2.Reply, limits: Limits, segment: ClientSegment | None) -> _Begun:
    try:
        return framing.Incoming(reply.features, reply.payload, limits, segment)
    except SchoolhouseError as err:
        return err.with_traceback(None)


def _features(question: Question, reply: teacher_pb2.Reply, incoming: framing.Incoming) -> _Made:
    try:
        return features_of(question, reply, incoming)
    except Exception as err:  # such as no memory to unpack it, which fails this request alone
        return err.with_traceback(None)
