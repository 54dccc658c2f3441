"""One client's session on a replica: its requests come in, are queued, and are answered in any order."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import Message
from schoolhouse.taps import HEAD
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire import background, framing
from schoolhouse_wire.errors import (
    LeaseExpiredError,
    ProtocolError,
    SchoolhouseError,
    TeacherInternalError,
    TeacherTimeoutError,
)
from schoolhouse_wire.loop import Alarm, eager
from schoolhouse_wire.outbox import Elsewhere, Outbox
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import read_layout

from schoolhouse_server.common.logs import SessionLog
from schoolhouse_server.common.rows import rows_of
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.engine.jobs import Answer, Job, Ticket
from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.observe.spans import SessionSpans
from schoolhouse_server.security.tokens import Grant
from schoolhouse_server.session.admission import FloodError
from schoolhouse_server.session.calls import (
    answer_head,
    as_told,
    asked_by,
    check_broke,
    check_open,
    check_quota,
    check_released,
    check_revision,
    check_work,
    inputs_of,
    opened_by,
    reply_of,
)
from schoolhouse_server.session.context import ReplicaContext
from schoolhouse_server.session.job_session import Member
from schoolhouse_server.session.notices import Telling
from schoolhouse_server.session.quotas import LEASE_S, Sharing
from schoolhouse_server.session.receiving import Partial, Receiving
from schoolhouse_server.session.same_host import SameHost
from schoolhouse_server.session.tappable import Tappable

_log = logging.getLogger(__name__)
_FAILED = "the session failed; the server's log says why"
_END_S = 1.0  # how long a session may take to send what it is about to send, before it ends without that
_SHORT_BYTES = 16 << 10  # the structure of inputs up to this is read faster than it is handed to another thread
_LOOK_AGAIN_S = 0.05  # while a head waits for room
_COPIES = 2  # of a frame: the serialized message, and gRPC's own
_AT_ONCE_BYTES = 1 << 20  # payloads up to this are read faster than they are handed to another thread


class ServerSession:
    """The requests of one client: receives them, queues them, and answers in whatever order they finish.

    One task reads and one writes; all of it happens in the replica's loop.
    """

    def __init__(self, context: ReplicaContext, rpc: "grpc.aio.ServicerContext[Any, Any]", grant: Grant) -> None:
        self.outbox: Outbox[Message | bytes] = Outbox(context.loop)
        self._telling = Telling(self.outbox, self._end_if_answered)
        self._asked_all = False  # whether the client has ended its half of the stream, and waits for the last answers
        self.error: SchoolhouseError | None = None
        self._context, self._loop = context, context.loop
        self._rpc = rpc
        self._spans = SessionSpans(context.tracer)
        self.log = SessionLog(_log, session=uuid.uuid4().hex[:8])
        self._limits = context.limits
        self._grant = grant
        self._most_bytes: int | None = None  # of one request's inputs, for a token with such a bound
        self._receiving = Receiving(self._loop, context.sharing.lease_s or LEASE_S, self._fail)
        self._tickets: dict[int, Ticket] = {}
        self._engine: Engine | None = None
        self._tappable: Tappable | None = None  # both None before Open
        self._member: Member | None = None  # None before Open
        self._unopened: Alarm | None = None  # ends the session if no Open comes
        self._writer: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._closed = False
        self._asked_at = time.monotonic()  # when the last call came, or the session began
        self._took_at = 0.0  # when the client last took a message, or a reply came while there was nothing else to take
        self._copies: Share | None = None
        self._same_host = SameHost(self._loop, context.shared_memory_bytes)

    @property
    def job(self) -> str:
        """The name of the client's job; empty before Open."""
        return self._member.account.job if self._member is not None else ""

    def idle_since(self) -> float:
        """Since when it has nothing to do, on time.monotonic's clock; infinite while it has."""
        at_work = self._member is not None and self._member.outstanding > 0
        return float("inf") if at_work else self._asked_at

    def unread_since(self) -> float:
        """Since when its client has taken nothing of what there is to send; infinite if there is nothing."""
        return self._took_at if self._member is not None and self._member.unsent else float("inf")

    async def run(self) -> None:
        """Read and answer until the client is gone, has got all that it asked for, or is to be told `error`.

        A client that does not even send Open is bounded by the lease too.
        """
        lease_s = self._context.sharing.lease_s or LEASE_S
        self._unopened = self._loop.at(time.monotonic() + lease_s, lambda: self._expire(lease_s))
        reader = self._loop.task(self._read(), name="schoolhouse-session-reads", on_death=self._on_error)
        self._writer = self._loop.task(self._write(), name="schoolhouse-session-writes", on_death=self._on_error)
        try:
            await asyncio.wait([self._writer])
        finally:
            with contextlib.ExitStack() as ending:  # in reverse
                ending.callback(self._clear)
                ending.callback(self._writer.cancel)
                ending.callback(reader.cancel)
                ending.callback(self.close)

    def close(self) -> None:
        """Drop what is queued, and free its places, as the client is gone."""
        first, self._closed = not self._closed, True
        with contextlib.ExitStack() as ending:  # so that each of these is done, whatever another one raises
            ending.callback(self._same_host.close)
            ending.callback(self._over.set)
            ending.callback(self.outbox.close)
            ending.callback(self._spans.dropped)
            if first and self._member is not None:
                ending.callback(self._context.drain.leave, self._member)
                ending.callback(self._member.leave)
                ending.callback(self._drop)
            self._stop_waiting_for_open()

    def _stop_waiting_for_open(self) -> None:
        if self._unopened is not None:
            self._loop.cancel(self._unopened)

    def _drop(self) -> None:
        assert self._engine is not None
        while self._tickets:
            self._engine.cancel(self._tickets.popitem()[1])

    def _expire(self, lease_s: float) -> None:
        self.end(LeaseExpiredError(f"the client said nothing for {lease_s:g} s, so its session was ended"))

    def end(self, error: SchoolhouseError) -> None:
        """End the session with this error, of which the client hears as soon as it has read what was sent before."""
        if not self._closed:
            self.error = error
        try:
            self.close()
        finally:
            self._loop.at(time.monotonic() + _END_S, self._abandon)

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.cancel()

    async def _write(self) -> None:
        """Send what there is to send, over the stream or, once the client has them, through pipes."""
        with contextlib.suppress(grpc.aio.BaseError):  # the client is gone, or the server has stopped
            while (message := await self.outbox.next()) is not None:
                if (pipes := self._same_host.pipes) is not None:
                    pipes.post(framing.write_message(message), self._drain)
                    self.outbox.when_ready(self._drain)
                    await self._over.wait()
                    return
                await self._rpc.write(message)
                self._took_at = time.monotonic()

    def _drain(self) -> None:
        """Send what there is through the pipes, as far as there is room."""
        try:
            while (pipes := self._same_host.pipes) is not None and pipes.idle:
                self._took_at = time.monotonic()
                if (message := self.outbox.take()) is None:
                    return
                pipes.post(framing.write_message(message), self._drain)
        except BaseException as err:
            background.failed(err, "sending through pipes", self._on_error)

    async def _read(self) -> None:
        try:
            while self._same_host.pipes is None and (message := await self._rpc.read()) is not grpc.aio.EOF:
                await self._hear(message)
            if (pipes := self._same_host.pipes) is not None:
                await pipes.each(lambda data: eager(self._hear(framing.received(teacher_pb2.ClientMessage, data))))
            elif not self._closed:
                self._asked_all = True
                self._receiving.give_up()
                self._end_if_answered()
                return
        except SchoolhouseError as err:
            self.end(err.with_traceback(None))  # whose frames refer to the session, which refers to it
            return
        except grpc.aio.BaseError:
            pass  # as in `_write`
        self.close()

    async def _hear(self, message: Any) -> None:
        if self._closed:
            return
        if self._member is not None:
            self._member.hear(listening=False)
        await self._receive(message)
        if self._member is not None:
            self._member.hear(listening=True)

    def _on_error(self, _error: BaseException) -> None:
        self.end(TeacherInternalError(_FAILED))

    def _end_if_answered(self) -> None:
        """End the stream if the client will ask for nothing more, and has got all that it has asked for."""
        outstanding = self._member.outstanding if self._member is not None else 0
        if self._asked_all and not outstanding and not self._telling:
            self.outbox.close()

    def _clear(self) -> None:
        """Drop what is large or gRPC's: a call that waits for the garbage collector would count as open."""
        self.outbox.clear()
        self._receiving.clear()
        self._same_host.clear()
        self._end_copies()
        self._writer = None
        del self._rpc

    async def _receive(self, message: Any) -> None:
        if isinstance(message, ProtocolError):
            raise message
        if isinstance(message, framing.Frame):
            await self._on_frame(message)
            return
        if message.released:
            check_released(message.released)
            self._same_host.free(message.released)
        if message.HasField("call"):
            await self._on_call(framing.unchanged(message.call))
        elif message.HasField("cancel"):
            self._on_cancel(message.cancel.request_id)
        elif message.HasField("attached"):
            self._same_host.attached(message.attached)
            if (segment := self._same_host.segment) is not None:
                self._context.tidying.add(segment)
        elif message.HasField("open"):
            self._on_open(message.open)

    def _on_open(self, message: teacher_pb2.Open) -> None:
        if self._engine is not None:
            raise ProtocolError("Open came twice")
        if message.protocol != channel.PROTOCOL:
            raise ProtocolError(f"the client speaks protocol {message.protocol}; this server speaks {channel.PROTOCOL}")
        check_open(message)
        self._context.drain.check()
        message = self._context.gate.opened(message, self._grant)
        sharing = self._context.sharing.within(self._grant.max_in_flight, self._grant.max_job_bytes)
        engine = self._engine = self._context.find(message.teacher, self._grant)
        self._tappable = self._context.tappable(message.teacher, self._grant)
        check_revision(message.revision, engine)
        self._most_bytes = sharing.max_job_bytes if self._grant.max_job_bytes is not None else None
        self._enter(message, engine, sharing)
        self._context.gate.opened(message, self._grant)  # again: the file may have changed before the job was known
        self.log.info("a session began")
        opened = opened_by(engine, sharing, self._limits)
        assert self._member is not None
        if message.shared_memory:
            account = self._context.shared_bytes.account(self._member.payer)
            self._same_host.offer(opened, self.outbox, account, checksums=message.checksums)
        self._telling.tell(teacher_pb2.ServerMessage(opened=opened))
        self._context.drain.join(self._member)

    def _enter(self, message: teacher_pb2.Open, engine: Engine, sharing: Sharing) -> None:
        admission = self._context.admissions[message.teacher]
        payer = self._context.gate.payer(self._grant)
        self._member = Member(message, engine.counters, admission, sharing, self._telling.tell, payer)
        self.log = self.log.of(job=self._member.account.job, teacher=message.teacher)
        self._stop_waiting_for_open()
        lease_s = self._context.sharing.lease_s
        self._member.start_lease(self._loop, lease_s, lambda: self._expire(lease_s))

    def _on_cancel(self, request_id: int) -> None:
        self._receiving.drop(request_id)
        ticket = self._tickets.pop(request_id, None)
        if self._engine is not None and ticket is not None:
            self._engine.cancel(ticket)
        if self._member is not None:
            self._member.cancelled(request_id)
        self._spans.dropped(request_id)

    async def _on_call(self, call: teacher_pb2.Call) -> None:
        self._telling.check_read()
        self._asked_at = time.monotonic()
        try:
            if self._engine is None or self._member is None or self._tappable is None:
                raise ProtocolError("a call came before Open")
            if self._member.has(call.request_id):
                self._refuse_twin(call.request_id)
                return
            asked = asked_by(call)
            # Admitted before memory is taken for it. The header is parsed only once, if it is short.
            nbytes = len(call.inputs) + read_layout(call.inputs, self._limits).nbytes
            check_quota(nbytes, self._most_bytes)
            if not self._member.admit(call.request_id, nbytes):
                return
            self._spans.begin(call, self._engine.description.name, self._member.account.job)
            check_revision(call.revision, self._engine)
            check_broke(call.broke)
            self._tappable.check(asked.wanted)
            began = time.perf_counter()
            read = functools.partial(framing.Incoming, call.inputs, call.payload, self._limits, self._same_host.segment)
            small = nbytes <= _AT_ONCE_BYTES or not call.payload.HasField("shared")
            partial = Partial(call, asked, read() if small else await self._loop.elsewhere(read), began)
            if partial.incoming.complete:
                await self._queue(partial)
            else:
                self._receiving.begin(partial)
        except FloodError:
            raise
        except Exception as err:
            self._fail(call.request_id, err)
        finally:
            segment = self._same_host.segment
            if segment is not None and call.payload.HasField("shared"):  # its inputs are copied by now, or refused
                segment.done(call.payload.shared)

    def _refuse_twin(self, request_id: int) -> None:
        error = ProtocolError(f"a call has the id {request_id} of another one that is in flight")
        self._telling.tell(teacher_pb2.ServerMessage(failure=status.to_failure(error, request_id)))

    async def _on_frame(self, frame: framing.Frame) -> None:
        try:
            if (partial := self._receiving.add(frame)) is not None:
                await self._queue(partial)
        except Exception as err:
            self._fail(frame.request_id, err)

    async def _queue(self, partial: Partial) -> None:
        assert self._engine is not None
        call, incoming, parses = partial.call, partial.incoming, time.perf_counter()
        read = incoming.value
        value = read() if len(call.inputs) <= _SHORT_BYTES else await self._loop.elsewhere(read)
        inputs, mask = inputs_of(value)
        parse_s = time.perf_counter() - parses
        wanted = partial.asked.wanted if mask is None else dataclasses.replace(partial.asked.wanted, mask=mask)
        request_id, digest = call.request_id, incoming.digest
        self._engine.count("receive", time.perf_counter() - partial.began)
        answer = functools.partial(self._or_end, self._answer, request_id, digest, wanted)
        if any(tap.side == HEAD for tap in wanted.taps):
            deadline = time.monotonic() + call.timeout_s if call.timeout_s > 0 else float("inf")
            room = functools.partial(self._room_for_head, request_id, deadline)
            answer_head(self._loop, self._engine, wanted, inputs, answer, allowed=self._context.allow_head, room=room)
            return

        check_work(inputs, wanted, self._context.max_request_tokens)
        rows = rows_of(inputs)

        def done(result: Answer | BaseException) -> None:
            if (ticket := self._tickets.pop(request_id, None)) is not None:  # not cancelled
                answer(result, rows, ticket.share)

        assert self._member is not None
        deadline = time.monotonic() + call.timeout_s if call.timeout_s > 0 else float("inf")
        ticket = Ticket(done, self._member.account, deadline, self._member.payer, trace=self._spans.of(request_id))
        # A request that is to be computed alone must equal no other, so that neither joins the other.
        alone = call.alone or call.broke > 0  # so that nobody else is with it, should it break this replica, too
        own = object() if alone else None
        scope = None if self._context.jobs_share_results else self._member.account.job
        key = (digest, call.inputs, partial.asked.key, scope, own)
        job = Job(inputs, wanted, key, [ticket], rows=rows, source=id(self), alone=alone, parse_s=parse_s)
        await self._engine.prepare(job, incoming.nbytes)
        if self._closed or not self._member.has(request_id):  # it was cancelled meanwhile
            return
        self._tickets[request_id] = ticket
        try:
            self._engine.submit(job)
        except Exception:
            self._tickets.pop(request_id, None)
            raise

    async def _room_for_head(self, request_id: int, deadline: float, nbytes: int) -> Share | None:
        """Wait until the bytes of a head may be unsent, and count them."""
        assert self._engine is not None
        assert self._member is not None
        while isinstance(found := self._engine.shares.take_for(self._member.payer, nbytes), str):
            if self._closed or not self._member.has(request_id) or time.monotonic() >= deadline:
                raise TeacherTimeoutError("the head was not sent, as other replies of the job or teacher were not read")
            await asyncio.sleep(_LOOK_AGAIN_S)
        if found is not None:
            found.resize(nbytes)
        return found

    def _or_end(self, step: Callable[..., None], *args: Any) -> None:
        """Run a step on behalf of the engine; if it raises, the session fails."""
        background.run(functools.partial(step, *args), "answering a request", self._on_error)

    def _answer(
        self,
        request_id: int,
        digest: bytes,
        wanted: Wanted,
        result: Answer | BaseException,
        rows: int = 0,
        share: Share | None = None,
    ) -> None:
        """Send the features of a request, or its error."""
        assert self._engine is not None
        if isinstance(result, BaseException):
            self._fail(request_id, result)  # not raised: the traceback, which holds a whole forward, would hold itself
            return
        try:
            outgoing = framing.Outgoing(result.features, limits=result.limits, snapshot=False)
            reply = reply_of(request_id, digest, wanted, result, outgoing.header)
            reply.queued = self._engine.queued
            assert self._member is not None
            if not self._member.unsent:
                self._took_at = time.monotonic()
            self._member.answered(request_id, rows, wanted, result.features, share)
            self.outbox.put(self._reply(request_id, reply, outgoing))
        except Exception as err:
            if share is not None:
                share.end()
            self._fail(request_id, err)

    def _reply(
        self, request_id: int, reply: teacher_pb2.Reply, outgoing: framing.Outgoing
    ) -> Iterator[Message | bytes | Elsewhere]:
        def head(payload: teacher_pb2.Payload) -> Message:
            reply.payload.CopyFrom(payload)
            return teacher_pb2.ServerMessage(reply=reply, released=segment.released() if segment is not None else ())

        segment, member = self._same_host.segment, self._member
        assert self._engine is not None
        assert member is not None
        began = time.perf_counter()
        try:
            for message in outgoing.messages(request_id, head, segment, lambda: member.wants(request_id)):
                if isinstance(message, bytes):
                    self._count_copies(len(message))
                yield message
        except Exception as err:  # only this request fails, and the stream goes on
            told = as_told(err)
            if not isinstance(told, SchoolhouseError):
                self.log.exception("a reply failed", request=request_id)
            self._spans.failed(request_id, told)
            yield teacher_pb2.ServerMessage(failure=status.to_failure(told, request_id))
        finally:
            member.sent(request_id)
            if not member.replying:
                self._end_copies()
            self._engine.count("send", time.perf_counter() - began)
            self._spans.sent(request_id, began)
            self._end_if_answered()

    def _count_copies(self, nbytes: int) -> None:
        """Count the copies of a frame that this process and gRPC hold until the client reads: one frame at a time."""
        assert self._engine is not None
        assert self._member is not None
        if self._copies is None:
            self._copies = self._engine.shares.add_for(self._member.payer, _COPIES * nbytes)
        elif self._copies.nbytes < _COPIES * nbytes:
            self._copies.resize(_COPIES * nbytes)

    def _end_copies(self) -> None:
        copies, self._copies = self._copies, None
        if copies is not None:
            copies.end()

    def _fail(self, request_id: int, error: BaseException) -> None:
        self._or_end(self._tell_failed, request_id, error)

    def _tell_failed(self, request_id: int, error: BaseException) -> None:
        error = as_told(error)
        self._spans.failed(request_id, error)
        if isinstance(error, SchoolhouseError):
            self.log.info("a request failed: %s", type(error).__name__, request=request_id)
        else:
            self.log.error("a request failed", exc_info=error, request=request_id)
        failure, member = teacher_pb2.ServerMessage(failure=status.to_failure(error, request_id)), self._member
        self._telling.tell(failure, lambda: member.failed(request_id, error) if member is not None else None)
