"""Clients with a valid token that mean harm: each is a coroutine that goes on for ever, and counts what it is told.

They speak the protocol themselves, in one event loop of a process of their own.
"""

import asyncio
import collections
import contextlib
import itertools

import grpc
import torch
from crowd import Session
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from students import batch

LEASE_S = 30.0  # of the sessions; none is silent for so long, unless it means to be
_WATCH, _LIST = (f"/schoolhouse.v1.DirectoryService/{name}" for name in ("Watch", "ListTeachers"))
_WIDE = teacher_pb2.Tap(module="body", side=teacher_pb2.Tap.OUTPUT)
_AGAIN_S = 0.2  # before whoever was thrown out comes again


class Hostile:
    """One token, its connection, and what it was told so far."""

    def __init__(self, address, token):
        self._address, self._token = address, token
        self.told = collections.Counter()
        self.connection = grpc.aio.insecure_channel(address, options=channel.CLIENT_OPTIONS)

    def call(self, method, requests):
        metadata = [("authorization", f"Bearer {self._token}")]
        return channel.with_its_own_status(self.connection.stream_stream(method)(requests, metadata=metadata))

    async def open(self, **opening):
        """A session of its own, within its token's job."""
        session = Session(self.connection, "", LEASE_S, self._token, **opening)
        channel.with_its_own_status(session._stream)
        return await session.open()

    async def again_and_again(self, attack):
        """Do it for ever, from the beginning each time that it is thrown out."""
        while True:
            try:
                await attack(self)
                self.told["done"] += 1
            except Exception as err:
                self.told[type(err).__name__] += 1
            await asyncio.sleep(_AGAIN_S)

    async def together(self, attack, times):
        """The same from many tasks at once."""
        await asyncio.gather(*(self.again_and_again(attack) for _ in range(times)))


async def _backlog(hostile, session, inputs, tap=None, depth=8):
    """Have `depth` requests in flight, and read all answers; calls that have to wait are made again at once."""
    more = {"tap": tap} if tap is not None else {}
    for request_id in range(depth):
        await session.ask(request_id, next(inputs), **more)
    for request_id in itertools.count(depth):
        said = await session.hear()
        kind = said.WhichOneof("kind")
        if kind == "failure":
            hostile.told[type(status.from_failure(said.failure)).__name__] += 1
        if kind != "resume":
            hostile.told[kind] += 1
        if kind in ("reply", "failure", "resume"):
            await session.ask(request_id, next(inputs), **more)


async def _live_on(session):
    """Say only that it lives, for ever."""
    while True:
        await session.say(renew=teacher_pb2.Renew())
        await asyncio.sleep(1.0)


async def silent(hostile):
    """Holds as many sessions as it gets, and says only that it lives."""

    async def hold(one):
        session = await one.open()
        one.told["opened"] += 1
        await _live_on(session)

    await hostile.together(hold, 24)


async def watching(hostile):
    """Holds as many watches as it gets, and reads none."""

    async def watch(one):
        request = directory_pb2.WatchRequest(teacher="teacher").SerializeToString()
        call = one.call(_WATCH, iter([request]))
        one.told[(await call.code()).name] += 1

    await hostile.together(watch, 150)


async def waiting(hostile):
    """Makes calls whose request never comes."""

    async def wait(one):
        async def nothing():
            await asyncio.sleep(3600)
            yield b""

        one.told[(await one.call(_LIST, nothing()).code()).name] += 1

    await hostile.together(wait, 100)


async def flooding(hostile):
    """Asks for little, as often as it can, also when it was told to wait."""
    session = await hostile.open()
    await _backlog(hostile, session, itertools.repeat(torch.ones(1, 8)), depth=200)


async def long(hostile):
    """Asks for one row that takes as long as a thousand."""
    await _backlog(hostile, await hostile.open(), itertools.repeat(torch.ones(1, 1000, 8)))


async def too_long(hostile):
    """Asks for more than a request may have."""
    await _backlog(hostile, await hostile.open(), itertools.repeat(torch.ones(1, 3000, 8)), depth=2)


async def guessing(hostile):
    """Asks for what the student will ask for, behind much else of its own."""
    own = (torch.full((64, 8), float(number)) for number in itertools.count())
    guessed = (batch(number)[1] for number in itertools.count())
    inputs = itertools.chain.from_iterable(zip(own, own, own, guessed, strict=False))
    await _backlog(hostile, await hostile.open(), inputs)


async def deaf(hostile):
    """Asks for what is large, and reads nothing of it."""

    async def ask(one):
        session = await one.open()
        for request_id in range(16):
            await session.ask(request_id, torch.full((512, 8), float(request_id)), _WIDE)
            one.told["asked"] += 1
        await _live_on(session)

    await hostile.together(ask, 4)


async def lying(hostile):
    """Says that it has mapped memory that it has not, and gives back what it never had."""

    async def attach(one):
        session = await one.open(shared_memory=True)
        await session.say(attached=teacher_pb2.Attached(attached=True))
        one.told["attached"] += 1
        for request_id in range(4):
            await session.ask(request_id, torch.full((64, 8), float(request_id)), _WIDE)
        await session.hear()
        await session.say(released=[64, 1 << 20, 1 << 40])
        one.told[await session.ended()] += 1

    async def rubbish(one):
        session = await one.open()
        await session.write(b"\xff" * 4000)
        one.told[await session.ended()] += 1

    await asyncio.gather(hostile.again_and_again(attach), hostile.again_and_again(rubbish))


async def half(hostile):
    """Makes calls whose inputs do not come."""
    session = await hostile.open()
    for request_id in range(64):
        await session.ask_half(request_id)
    hostile.told[await session.ended()] += 1


ATTACKS = {
    attack.__name__: attack
    for attack in (silent, watching, waiting, flooding, long, too_long, guessing, deaf, lying, half)
}


def run_hostile(commands, port, tokens):
    """Attack in a process of its own until it is killed; `tokens` is a dict of them by the attack."""
    torch.set_num_threads(1)

    async def run():
        found = {name: Hostile(f"127.0.0.1:{port}", token) for name, token in tokens.items()}
        tasks = [asyncio.ensure_future(one.again_and_again(ATTACKS[name.split("-")[0]])) for name, one in found.items()]
        commands.send((0, ""))  # it has no port
        while True:
            await asyncio.wait(tasks, timeout=0.5)
            with contextlib.suppress(BlockingIOError):
                commands.send({name: dict(one.told) for name, one in found.items()})

    with torch.no_grad():
        asyncio.run(run())
