"""A thousand sessions of one process: students that look at every answer, and others that are slow, silent or hostile.

They speak the protocol of sessions themselves, in one event loop, so that they cost the machine little.
"""

import asyncio
import collections
import contextlib
import random
import time
from dataclasses import dataclass, field

import grpc
import torch
from rooms import teacher_model
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments

STUDENTS, SLOW, SILENT = 970, 20, 20
PATIENCE_S = 60.0  # for any one answer
_STREAMS = 20  # of a connection; a server takes 64
_WHOLE = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
_WIDE = teacher_pb2.Tap(module="body", side=teacher_pb2.Tap.OUTPUT)


class Session:
    """A session that says what it likes, and reads when it likes; it knows when it last said anything."""

    def __init__(self, connection, job, lease_s, token=None, **opening):
        metadata = [("authorization", f"Bearer {token}")] if token is not None else None
        self._stream = connection.stream_stream(channel.SESSION_METHOD)(metadata=metadata)
        self._opening = teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher", job=job, **opening)
        self._lease_s = lease_s
        self._said_at = time.monotonic()
        self.late = False  # whether it was silent for so long that the server may have ended it

    async def open(self):
        await self.say(open=self._opening)
        self.opened = (await self.hear()).opened
        assert self.opened.revision
        return self

    async def say(self, **message):
        await self.write(teacher_pb2.ClientMessage(**message).SerializeToString())

    async def write(self, data):
        began = time.monotonic()
        try:
            await asyncio.wait_for(self._stream.write(data), PATIENCE_S)
        except (grpc.RpcError, asyncio.InvalidStateError):  # it has ended
            self._note()
            raise await self._reason() from None
        self._note()
        self._said_at = began

    def _note(self):
        self.late = self.late or time.monotonic() > self._said_at + 0.75 * self._lease_s  # the rest is for the way

    async def hear(self, renewing=True):
        """The next message; raises the typed error with which the session ended."""
        try:
            data = await self._read(renewing)
        except grpc.RpcError as err:
            self._note()
            raise status.from_rpc_error(err, "the replica") from None
        assert data is not grpc.aio.EOF
        return teacher_pb2.ServerMessage.FromString(data)

    async def _reason(self):
        """The typed error with which it ended."""
        try:
            while await self._stream.read() is not grpc.aio.EOF:
                pass
            return AssertionError("the session ended without an error")
        except grpc.RpcError as err:
            return status.from_rpc_error(err, "the replica")

    async def _read(self, renewing):
        reading = asyncio.ensure_future(self._stream.read())
        end = time.monotonic() + PATIENCE_S
        while not reading.done() and time.monotonic() < end:
            await asyncio.wait([reading], timeout=self._lease_s / 4)
            if renewing and not reading.done():
                await self.say(renew=teacher_pb2.Renew())
        assert reading.done(), "no answer came"
        return reading.result()

    async def ended(self):
        """The name of the error with which the session ends, after whatever else is said."""
        try:
            while True:
                await self.hear(renewing=False)
        except Exception as err:
            return type(err).__name__

    async def failure(self, request_id):
        """The error that a request is told; its session is to go on, and answer another one."""
        failure = (await self.hear()).failure
        assert failure.request_id == request_id
        await self.ask(1 << 20, torch.ones(1, 8))
        assert (await self.hear()).reply.request_id == 1 << 20
        return type(status.from_failure(failure)).__name__

    async def ask(self, request_id, x, tap=_WHOLE):
        made = framing.Outgoing(Arguments((x,)), limits=Limits(), snapshot=True)
        call = teacher_pb2.Call(request_id=request_id, taps=[tap], inputs=made.header, payload=made.payload)
        framing.add_checksum(call)
        await self.say(call=call)
        return made.digest

    async def answer(self, request_id, x):
        """The reply, and the digest that it is to have; a call that was not taken is made again once it may be."""
        while True:
            digest = await self.ask(request_id, x)
            said = await self.hear()
            if not said.HasField("wait"):
                return said.reply, digest
            assert (await self.hear()).HasField("resume")

    async def ask_half(self, request_id):
        """A call whose 67 KB of inputs never come."""
        made = framing.Outgoing(Arguments((torch.ones(2100, 8),)), limits=Limits(), snapshot=True)
        await self.say(call=teacher_pb2.Call(request_id=request_id, taps=[_WHOLE], inputs=made.header))

    async def end_asking(self):
        await self._stream.done_writing()

    def cancel(self):
        self._stream.cancel()


async def garbage(session):
    await session.open()
    await session.write(b"\xff" * 40)
    return await session.ended()


async def opens_twice(session):
    await session.open()
    await session.say(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher"))
    return await session.ended()


async def damaged(session):
    await session.open()
    await session.say(call=teacher_pb2.Call(request_id=1, taps=[_WHOLE], checksum=12345))
    return await session.ended()


async def calls_after_wait(session):
    await session.open()
    with contextlib.suppress(Exception):  # it has ended
        for request_id in range(200):
            await session.ask_half(request_id)
    return await session.ended()


async def twin(session):
    await session.open()
    await session.ask_half(7)
    await session.ask(7, torch.ones(1, 8))
    return await session.failure(7)


async def half_open(session):
    await session.open()
    await session.ask_half(7)
    return await session.failure(7)


async def cut_off(session):
    await session.open()
    await session.ask_half(7)
    await session.end_asking()
    return type(status.from_failure((await session.hear(renewing=False)).failure)).__name__


async def asleep(session):
    await session.open()
    return await session.ended()


async def never_opens(session):
    return await session.ended()


HOSTILE = {  # and the error that each is to be told
    garbage: "ProtocolError",
    opens_twice: "ProtocolError",
    damaged: "CorruptPayloadError",
    calls_after_wait: "ProtocolError",
    twin: "ProtocolError",
    half_open: "TeacherTimeoutError",
    cut_off: "ProtocolError",
    asleep: "LeaseExpiredError",
    never_opens: "LeaseExpiredError",
}


@dataclass
class Report:
    """What came of the crowd so far."""

    opened: bool = False  # whether all but the hostile ones have had a session at once
    least_answers: int = 0  # of any student, since then
    told: dict[str, dict[str, int]] = field(default_factory=dict)  # how often the hostile ones were told which error
    wrong: list[str] = field(default_factory=list)  # what should not have been


class Crowd:
    """All of them; `report` is of the present."""

    def __init__(self, port, lease_s):
        self._address, self._lease_s = f"127.0.0.1:{port}", lease_s
        self._teacher = teacher_model()
        self._answers = [0] * STUDENTS
        self._open = 0
        self._connections = {}
        self._tasks = set()
        self._told = collections.defaultdict(collections.Counter)
        self._wrong = []

    def report(self):
        opened = self._open == STUDENTS + SLOW + SILENT
        told = {kind: dict(found) for kind, found in self._told.items()}
        return Report(opened, min(self._answers) if opened else 0, told, self._wrong[:20])

    async def begin(self):
        """All but the hostile ones have their sessions once this returns, and all go on in tasks."""
        kinds = [(self._student, STUDENTS), (self._slow, SLOW), (self._silent, SILENT)]
        members = [(kind, number) for kind, count in kinds for number in range(count)]
        for at in range(0, len(members), 50):
            await asyncio.gather(*(self._enter(*member) for member in members[at : at + 50]))
        for number in range(2):
            for kind in HOSTILE:
                self._go(self._hostile(kind, number))

    def _session(self, kind, number):
        job = f"{kind.__name__}-{number % 2 if kind == self._slow else number % 16}"
        place = (kind.__name__, number // _STREAMS if kind == self._student else number)
        if place not in self._connections:
            self._connections[place] = grpc.aio.insecure_channel(self._address, options=channel.CLIENT_OPTIONS)
        return Session(self._connections[place], job, self._lease_s)

    def _go(self, work):
        async def guarded():
            try:
                await work
            except Exception as err:
                self._wrong.append(f"{work.__name__}: {err!r}")

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _enter(self, kind, number):
        session = await self._session(kind, number).open()
        self._open += 1
        self._go(self._stay(kind, number, session))

    async def _stay(self, kind, number, session):
        """Go on for ever; a session that ended since this process was itself too late is opened again."""
        while True:
            try:
                await kind(session, number)
            except Exception as err:
                if type(err).__name__ != "LeaseExpiredError" or not session.late:
                    raise
                session = await self._session(kind, number).open()

    async def _student(self, session, number):
        """Asks now and then, and compares each answer with what a teacher in this process makes of the same."""
        generator, choices = torch.Generator().manual_seed(number), random.Random(number)
        request_id = 0
        while True:
            await asyncio.sleep(choices.uniform(0.2, 0.6) * self._lease_s)
            await session.say(renew=teacher_pb2.Renew())
            await asyncio.sleep(choices.uniform(0.2, 0.6) * self._lease_s)
            x, request_id = torch.randn(1, 8, generator=generator), request_id + 1
            reply, digest = await session.answer(request_id, x)
            assert (reply.request_id, reply.input_digest) == (request_id, digest), reply
            [found] = framing.Incoming(reply.features, reply.payload, Limits()).value()
            assert torch.equal(found, self._teacher(x))
            self._answers[number] += self._open == STUDENTS + SLOW + SILENT

    async def _slow(self, session, number):
        """Asks for 8 MiB, never reads any of it, and is alive."""
        for request_id in range(8):
            await session.ask(request_id, torch.full((512, 8), float(number)), _WIDE)
        await self._silent(session, number)

    async def _silent(self, session, _number):
        """Says that it is alive, as late as it may."""
        while True:
            await asyncio.sleep(0.7 * self._lease_s)
            await session.say(renew=teacher_pb2.Renew())

    async def _hostile(self, kind, number):
        while True:
            session = self._session(kind, number)
            self._told[kind.__name__][await kind(session)] += 1
            session.cancel()
            await asyncio.sleep(0.5)


def run_crowd(commands, port, lease_s):
    """A crowd in a process of its own, which tells every half second what came of it until it is killed."""
    torch.set_num_threads(1)

    async def run():
        commands.send((0, ""))  # it has no port
        crowd = Crowd(port, lease_s)
        beginning = asyncio.ensure_future(crowd.begin())
        while True:
            await asyncio.sleep(0.5)
            if beginning.done():
                beginning.result()
            commands.send(crowd.report())

    with torch.no_grad():
        asyncio.run(run())
