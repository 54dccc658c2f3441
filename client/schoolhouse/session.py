"""One session with one replica: many requests in flight on one stream, each ended by its own reply or failure."""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import Message
from schoolhouse_wire import channel, framing, memory, pipes, shared_memory, status
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.shared_memory import ClientSegment
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse.errors import (
    FeatureMismatchError,
    ProtocolError,
    SchoolhouseError,
    TeacherUnavailableError,
)
from schoolhouse.request import Request, Traffic
from schoolhouse.sparse import decoded
from schoolhouse.teachers import Features


class Session:
    """A stream to one replica. `on_loss(session, requests, error)` receives what was unanswered at its end."""

    def __init__(
        self,
        address: str,
        teacher: str,
        *,
        job: str,
        shared_memory: bool,
        checksums: bool,
        on_loss: Callable[["Session", list[Request], SchoolhouseError], None],
        clock: Callable[[], float],
    ) -> None:
        self.address = address
        self.alive = False
        self._transport = "stream: shared memory is switched off here"  # until the replica's hello
        self._overflowed = 0  # replies that found no room in shared memory
        self._requests = self._sent_bytes = self._received_bytes = 0
        self._open_message = teacher_pb2.Open(
            protocol=channel.PROTOCOL, teacher=teacher, job=job, shared_memory=shared_memory, checksums=checksums
        )
        self._on_loss = on_loss
        self._clock = clock
        self._outbox: Outbox[Message | bytes] = Outbox()
        self._segment: ClientSegment | None = None
        self._pipes: pipes.Pipes | None = None
        self._attached: Message | None = None  # after it our messages go through pipes
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._in_flight: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._partial: dict[int, tuple[teacher_pb2.Reply, framing.Incoming]] = {}
        self._opened = threading.Event()
        self._window = 0
        self._hello = teacher_pb2.Opened()
        self._error: SchoolhouseError | None = None

    @property
    def transport(self) -> str:
        """How features come, and why so."""
        if not self._overflowed:
            return self._transport
        return f"{self._transport}, and the stream for {self._overflowed} replies that found no room there"

    @property
    def outstanding(self) -> int:
        """Requests given to this session that have no answer yet."""
        return len(self._in_flight) + len(self._waiting)

    @property
    def reads_here(self) -> bool:
        """Whether this thread is the one that receives its answers, as in a callback of a future."""
        return self._reader is threading.current_thread()

    @property
    def traffic(self) -> Traffic:
        """What the answered requests of this session moved."""
        return Traffic(self._requests, self._sent_bytes, self._received_bytes)

    def open(self, timeout_s: float) -> teacher_pb2.Opened:
        """Connect and wait for the replica's hello.

        Raises:
            TeacherUnavailableError: if there is none within `timeout_s`.
        """
        memory.keep_freed_memory()
        self._channel = grpc.insecure_channel(self.address, options=channel.CLIENT_OPTIONS)
        stub = self._channel.stream_stream(
            channel.SESSION_METHOD,
            request_serializer=framing.write_message,
            response_deserializer=lambda data: framing.read_message(teacher_pb2.ServerMessage, data),
        )
        self._outbox.put(iter([teacher_pb2.ClientMessage(open=self._open_message)]))
        self._call: Any = stub(self._sent())
        self._reader = threading.Thread(target=self._read, name=f"schoolhouse-session-{self.address}", daemon=True)
        self._reader.start()
        if not self._opened.wait(timeout_s):
            self.close()
            raise TeacherUnavailableError(f"no teacher answered at {self.address} within {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._hello

    def send(self, request: Request) -> bool:
        """Queue a request for this replica; False if the session has ended."""
        with self._lock:
            if not self.alive:
                return False
            self._waiting.append(request)
        self._pump()
        return True

    def cancel(self, request: Request) -> None:
        """Forget a request, and tell the replica, once the stream is ready for it.

        It takes no lock: the garbage collector may come here from a thread that holds one.
        """
        self._outbox.put(self._cancellation(request))

    def _cancellation(self, request: Request) -> Iterator[Message]:
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
                return
            request_id = next((i for i, other in self._in_flight.items() if other is request), None)
            if request_id is None:
                return
            del self._in_flight[request_id]
            self._partial.pop(request_id, None)
        self._pump()
        yield teacher_pb2.ClientMessage(cancel=teacher_pb2.Cancel(request_id=request_id))

    def close(self) -> None:
        """End the stream; what is unanswered goes to `on_loss`."""
        self._outbox.close()
        if self._pipes is not None:
            self._pipes.close()
        self._call.cancel()
        self._channel.close()

    def join(self, timeout_s: float) -> None:
        """Wait until a closed session's thread is at its end."""
        self._reader.join(timeout_s)

    def _pump(self) -> None:
        """Send what waits, as far as the window that the replica granted goes."""
        while True:
            with self._lock:
                if not self._waiting or len(self._in_flight) >= self._window:
                    return
                request = self._waiting.popleft()
                if request.future.done():  # cancelled, or past its deadline
                    continue
                request_id = next(self._ids)
                self._in_flight[request_id] = request
            self._outbox.put(self._messages(request_id, request))

    def _messages(self, request_id: int, request: Request) -> Iterator[Message | bytes]:
        def head(payload: teacher_pb2.Payload) -> Message:
            call = teacher_pb2.Call(
                request_id=request_id,
                taps=request.wanted.to_wire(),
                revision=request.revision,
                timeout_s=max(request.deadline - self._clock(), 0.001),
                inputs=request.outgoing.header,
                payload=payload,
                traceparent=request.sent(),
            )
            return teacher_pb2.ClientMessage(call=call, released=segment.released() if segment is not None else ())

        segment = self._segment
        yield from request.outgoing.messages(request_id, head, segment, lambda: request_id in self._in_flight)

    def _sent(self) -> Iterator[Message | bytes]:
        """What goes to the replica over the stream. What goes through pipes is sent meanwhile."""
        through = None
        for message in self._outbox:
            if through is None:
                yield message
                through = self._pipes if message is self._attached else None
            elif not through.send(framing.write_message(message)):
                return

    def _arrivals(self) -> Iterator[Any]:
        for message in self._call:
            yield message
            if self._pipes is not None:
                break
        for data in self._pipes or ():
            yield framing.read_message(teacher_pb2.ServerMessage, data)
        yield from self._call  # why it ended

    def _read(self) -> None:
        error: SchoolhouseError
        try:
            for message in self._arrivals():
                self._receive(message)
            error = TeacherUnavailableError(f"the teacher at {self.address} ended the session")
        except grpc.RpcError as err:
            error = status.from_rpc_error(err, self.address)
        except SchoolhouseError as err:  # the stream itself is broken: a frame that fits nothing
            error = err
        except Exception as err:
            error = ProtocolError(f"{self.address} sent what this client cannot read: {type(err).__name__}")
        self._end(error)

    def _end(self, error: SchoolhouseError) -> None:
        with self._lock:
            self.alive = False
            self._error = error
            lost = [*self._in_flight.values(), *self._waiting]
            self._in_flight.clear()
            self._waiting.clear()
            self._partial.clear()
        self._opened.set()
        self.close()
        self._outbox.clear()
        self._detach()
        self._on_loss(self, lost, error)

    def _detach(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def _receive(self, message: Any) -> None:
        if isinstance(message, framing.Frame):
            self._on_frame(message)
            return
        if message.released and self._segment is not None:
            for offset in message.released:
                self._segment.free(offset)
        if message.HasField("reply"):
            self._on_reply(message.reply)
        elif message.HasField("failure"):
            request = self._take(message.failure.request_id)
            if request is not None:
                request.fail(status.from_failure(message.failure))
            self._pump()
        elif message.HasField("opened"):
            self._on_opened(message.opened)

    def _on_opened(self, opened: teacher_pb2.Opened) -> None:
        if self._open_message.shared_memory:
            self._attach(opened)
        self._hello = opened
        self._window = opened.max_in_flight
        self.alive = True
        self._opened.set()

    def _attach(self, opened: teacher_pb2.Opened) -> None:
        if not opened.HasField("shared_memory"):
            self._transport = "stream: the replica offers no shared memory"
            return
        try:
            self._segment = shared_memory.attach(
                opened.shared_memory, self._outbox, checksums=self._open_message.checksums
            )
            self._transport = "shared memory"
        except OSError as err:
            reason = err.strerror or err
            self._transport = f"stream: the replica is on another machine or its memory cannot be opened: {reason}"
        if self._segment is not None:
            with contextlib.suppress(OSError):
                self._pipes = pipes.open_offered(opened.shared_memory)
                if not self._call.add_callback(self._pipes.end):  # it has ended already
                    self._pipes.end()
        attached = teacher_pb2.Attached(attached=self._segment is not None, pipes=self._pipes is not None)
        self._attached = teacher_pb2.ClientMessage(attached=attached)
        self._outbox.put(iter([self._attached]))

    def _on_reply(self, reply: teacher_pb2.Reply) -> None:
        request = self._in_flight.get(reply.request_id)
        if request is None:  # cancelled
            self._refuse(reply.payload)
            return
        try:
            incoming = framing.Incoming(reply.features, reply.payload, request.limits, self._segment)
        except SchoolhouseError as err:
            self._refuse(reply.payload)
            self.cancel(request)
            request.fail(err)
            return
        if incoming.complete:
            self._finish(reply, incoming)
        else:
            self._partial[reply.request_id] = reply, incoming

    def _refuse(self, payload: teacher_pb2.Payload) -> None:
        if self._segment is not None and payload.HasField("shared"):
            self._segment.refuse(payload.shared)

    def _on_frame(self, frame: framing.Frame) -> None:
        partial = self._partial.get(frame.request_id)
        if partial is None:
            return  # cancelled
        reply, incoming = partial
        try:
            incoming.add(frame.offset, frame.data, frame.digest)
        except SchoolhouseError as err:
            request = self._in_flight.get(frame.request_id)
            if request is not None:  # not cancelled meanwhile
                self.cancel(request)
                request.fail(err)
            return
        if incoming.complete:
            self._overflowed += self._segment is not None
            self._finish(reply, incoming)

    def _finish(self, reply: teacher_pb2.Reply, incoming: framing.Incoming) -> None:
        request = self._take(reply.request_id)
        if request is None:
            return
        self._requests += 1
        self._sent_bytes += request.outgoing.nbytes + len(request.outgoing.header)
        self._received_bytes += incoming.nbytes + len(reply.features)
        request.received(incoming.nbytes + len(reply.features))
        try:
            request.resolve(_features(request, reply, incoming))
        except Exception as err:  # no memory for what was packed, for one: it is this request's alone
            request.fail(err)
        self._pump()  # after the answer is delivered: who waits for it goes on meanwhile

    def _take(self, request_id: int) -> Request | None:
        with self._lock:
            request = self._in_flight.pop(request_id, None)
            self._partial.pop(request_id, None)
        return request


def _features(request: Request, reply: teacher_pb2.Reply, incoming: framing.Incoming) -> Features:
    """The features of a reply, or an error unless they are of this batch, these taps and this revision."""
    given = (list(reply.taps), reply.revision, reply.input_digest)
    expected = (list(request.wanted.to_wire()), request.revision, request.outgoing.digest)
    if given != expected:
        raise FeatureMismatchError(
            f"the features that came are of {_in_words(*given)}, where {_in_words(*expected)} was asked for"
        )
    values = incoming.value()
    taps = request.wanted.taps
    if not isinstance(values, list) or len(values) != len(taps):
        raise ProtocolError("a reply came whose features are not one for each tap")
    found = decoded(dict(zip(taps, values, strict=True)), request.heads)
    return Features(found, revision=reply.revision, input_digest=reply.input_digest)


def _in_words(taps: list[teacher_pb2.Tap], revision: str, digest: bytes) -> str:
    words = [" ".join(str(tap).split()) for tap in taps]
    return f"the taps {words}, the revision {revision!r} and the inputs {digest.hex()}"
