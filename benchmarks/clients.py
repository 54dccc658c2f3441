"""What a call of 1 KiB costs a replica and a client, by the number of clients, beside plain gRPC in the same run.

Each server has a process of its own, and so have the clients. To measure a replica, they are one asyncio process that
speaks the protocol of sessions with as little work as that takes; each has a session and a connection of its own and
one call in flight, and holds every reply against its call. The peers are echoes on long-lived streams, by grpc.aio and
by gRPC with threads, asked by the same process with messages of the same size. To measure a client, real teachers of
one process, each with its own connections, ask a replica. All take turns. CPU time is that of the whole process, all
threads. `python benchmarks/clients.py --json`
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import queue
import struct
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, Protocol

import grpc
import processes
import psutil
import schoolhouse as sh
import torch
import xxhash
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.same_host.pipes import open_ends
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from torch import nn

WIDTH = 256  # float32 numbers, 1 KiB, each way
JOBS = 16  # the clients are spread over so many
MOST_SYNC = 256  # clients of the peer that has a thread for each
LEASE_S = 600.0  # clients say nothing while others have their turn
TIMEOUT_S = 120.0
ECHO = "/peer/Echo"
_LENGTH = struct.Struct("<I")  # before each message in a pipe
Figures = dict[str, float]


def wait_for_end(ready: Connection) -> None:
    """Return when the parent closes the connection, or is gone."""
    with contextlib.suppress(EOFError):
        ready.recv()


def schoolhouse_server(ready: Connection, clients: int) -> None:
    """Serve one small layer with Schoolhouse."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_sessions": clients + 8, "max_in_flight": 2048, "lease_s": LEASE_S}
    with serve(nn.Linear(WIDTH, WIDTH), **settings) as server:
        ready.send(server.url)
        wait_for_end(ready)


def aio_server(ready: Connection, _clients: int) -> None:
    """Send back each message of a stream, on grpc.aio."""

    async def echo(_messages: Any, context: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the client is gone
            while (message := await context.read()) is not grpc.aio.EOF:
                await context.write(message)

    async def run() -> None:
        server = grpc.aio.server(options=channel.SERVER_OPTIONS)
        listen(server, echo, ready)
        await server.start()
        await asyncio.get_running_loop().run_in_executor(None, wait_for_end, ready)
        await server.stop(1.0)

    asyncio.run(run())


def sync_server(ready: Connection, clients: int) -> None:
    """Send back each message of a stream, on gRPC with a thread for each stream."""
    server = grpc.server(ThreadPoolExecutor(clients + 4), options=channel.SERVER_OPTIONS)
    listen(server, lambda messages, _context: messages, ready)
    server.start()
    wait_for_end(ready)


def listen(server: Any, echo: Callable[..., Any], ready: Connection) -> None:
    """Add the echo, and tell the parent where it listens."""
    _, service, name = ECHO.split("/")
    handler = grpc.method_handlers_generic_handler(service, {name: grpc.stream_stream_rpc_method_handler(echo)})
    server.add_generic_rpc_handlers((handler,))
    ready.send(f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}/")


class Client(Protocol):
    """A client that asks and waits for the answer, over and over."""

    async def open(self) -> None:
        """Open its stream."""

    async def ask(self) -> None:
        """Make a call, and check its answer."""


class Session:
    """A client of a replica, with a session over the stream, or in pipes: at 1 KiB that is what shared memory adds."""

    def __init__(self, connection: Any, number: int, *, pipes: bool) -> None:
        values = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(number))
        made = framing.Outgoing(Arguments((values,)), limits=Limits(), snapshot=True)
        tap = teacher_pb2.Tap(side=teacher_pb2.Tap.OUTPUT)
        self._message = teacher_pb2.ClientMessage(
            call=teacher_pb2.Call(taps=[tap], inputs=made.header, payload=made.payload)
        )
        self._digest = made.digest
        opening = {"protocol": channel.PROTOCOL, "teacher": "teacher", "job": f"job-{number % JOBS}"}
        self._open = teacher_pb2.ClientMessage(open=teacher_pb2.Open(shared_memory=pipes, **opening))
        self._ids = itertools.count(1)
        self._stream = connection.stream_stream(channel.SESSION_METHOD)()
        self._write, self._read = self._stream.write, self._stream.read
        self._pipes = pipes
        self._reply_digest = b""  # that of the first reply: the teacher is the same for ever

    async def open(self) -> None:
        """Open the session."""
        await self._write(self._open.SerializeToString())
        opened = teacher_pb2.ServerMessage.FromString(await self._read()).opened
        assert opened.revision
        if self._pipes:
            await self._use_pipes(opened.shared_memory)

    async def _use_pipes(self, offer: teacher_pb2.SharedMemory) -> None:
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        incoming, outgoing = open_ends(offer)
        made = asyncio.StreamReaderProtocol(reader)
        self._reading = await loop.connect_read_pipe(lambda: made, os.fdopen(incoming, "rb", buffering=0))
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(outgoing, "wb", buffering=0))
        proof = shared_memory.attach(offer, queue.SimpleQueue(), checksums=False).proof
        attached = teacher_pb2.ClientMessage(attached=teacher_pb2.Attached(attached=True, pipes=True, proof=proof))
        await self._write(attached.SerializeToString())

        async def write(message: bytes) -> None:
            writer.write(_LENGTH.pack(len(message)) + message)

        async def read() -> bytes:
            [size] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            return await reader.readexactly(size)

        self._write, self._read = write, read

    async def ask(self) -> None:
        """Call, and check that the reply is this call's, whole, and what the teacher said before."""
        call = self._message.call
        call.request_id = next(self._ids)
        framing.add_checksum(call)
        await self._write(self._message.SerializeToString())
        reply = teacher_pb2.ServerMessage.FromString(await self._read()).reply
        digest = xxhash.xxh3_128_digest(reply.features + reply.payload.data)
        assert (reply.request_id, reply.input_digest) == (call.request_id, self._digest)
        assert digest == reply.payload.digest == (self._reply_digest or digest)
        self._reply_digest = digest


class Echoed:
    """A client of an echo, with a stream; its messages are as long as a session's."""

    def __init__(self, connection: Any, number: int) -> None:
        values = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(number))
        self._message = values.numpy().tobytes() + bytes(120)  # a call has about 120 bytes beside its 1 KiB
        self._stream = connection.stream_stream(ECHO)()

    async def open(self) -> None:
        """Have the stream opened."""
        await self.ask()

    async def ask(self) -> None:
        """Send a message, and check that it comes back."""
        await self._stream.write(self._message)
        assert await self._stream.read() == self._message


def light_clients(commands: Connection, url: str, system: str, count: int, streams: int) -> None:
    """Ask for as long as each command says, in one asyncio process, until the parent closes the connection."""
    torch.set_num_threads(1)
    asyncio.run(_light_clients(commands, url, system, count, streams))


async def _light_clients(commands: Connection, url: str, system: str, count: int, streams: int) -> None:
    address = url.removeprefix("grpc://").split("/")[0]
    options = channel.CLIENT_OPTIONS
    connections = [grpc.aio.insecure_channel(address, options=options) for _ in range(-(-count // streams))]
    clients: list[Client] = []
    for number in range(count):
        connection = connections[number // streams]
        ours = system.startswith("schoolhouse")
        clients.append(
            Session(connection, number, pipes=system == "schoolhouse_shm") if ours else Echoed(connection, number)
        )
    for begin in range(0, count, 32):  # not all at once: a machine may have a small backlog of connections
        await asyncio.wait_for(asyncio.gather(*(client.open() for client in clients[begin : begin + 32])), TIMEOUT_S)
    commands.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            seconds: Any = await asyncio.get_running_loop().run_in_executor(None, commands.recv)
            commands.send(await asyncio.wait_for(turn(clients, seconds), seconds + TIMEOUT_S))


async def turn(clients: Sequence[Client], seconds: float) -> tuple[int, float, float]:
    """All clients ask for `seconds`; returns their calls, the seconds, and the least client's share of the mean."""
    began = time.perf_counter()
    end = began + seconds

    async def ask(client: Client) -> int:
        calls = 0
        while time.perf_counter() < end:
            await client.ask()
            calls += 1
        return calls

    calls = await asyncio.gather(*map(ask, clients))
    return sum(calls), time.perf_counter() - began, min(calls) / max(sum(calls) / len(calls), 1e-9)


def teachers(commands: Connection, url: str, shared_memory: bool, count: int) -> None:
    """As `light_clients`, with as many real teachers, which one thread asks and waits for."""
    torch.set_num_threads(1)
    transport = sh.Transport(shared_memory=shared_memory)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(sh.connect(url, job=f"job-{i % JOBS}", transport=transport)) for i in range(count)
        ]
        inputs = [torch.randn(1, WIDTH) for _ in clients]
        outputs = [
            client.submit((x,), {}, [""]).result(TIMEOUT_S)[""].clone()
            for client, x in zip(clients, inputs, strict=True)
        ]
        commands.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                commands.send(teachers_turn(clients, inputs, outputs, commands.recv()))


def teachers_turn(
    clients: list[sh.RemoteTeacher], inputs: list[torch.Tensor], outputs: list[torch.Tensor], seconds: float
) -> tuple[int, float, float]:
    """As `turn`."""
    answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def ask(i: int) -> None:
        clients[i].submit((inputs[i],), {}, [""]).add_done_callback(lambda done: answers.put((i, done)))

    began = time.perf_counter()
    calls, busy = [0] * len(clients), len(clients)
    for i in range(busy):
        ask(i)
    while busy:
        i, done = answers.get(timeout=TIMEOUT_S)
        assert torch.equal(done.result()[""], outputs[i])
        calls[i] += 1
        if time.perf_counter() < began + seconds:
            ask(i)
        else:
            busy -= 1
    return sum(calls), time.perf_counter() - began, min(calls) / max(sum(calls) / len(calls), 1e-9)


@dataclass
class Pair:
    """A server and its clients, each in a process of its own."""

    server: psutil.Process
    clients: psutil.Process
    commands: Connection
    keep: Connection

    @classmethod
    def start(cls, serving: Callable[..., None], asking: Callable[..., None], clients: int, *args: Any) -> "Pair":
        """Start both; returns when all clients are connected."""
        keep, server = processes.start(serving, clients)
        commands, client = processes.start(asking, keep.recv(), *args)
        pair = cls(psutil.Process(server.pid), psutil.Process(client.pid), commands, keep)
        assert commands.recv() == "ready"
        return pair

    def turn(self, seconds: float) -> Figures:
        """The figures of one turn."""
        before = [cpu_s(process) for process in (self.server, self.clients)]
        self.commands.send(seconds)
        calls, took_s, least_share = self.commands.recv()
        server_s, clients_s = (cpu_s(p) - was for p, was in zip((self.server, self.clients), before, strict=True))
        return {
            "calls_per_s": calls / took_s,
            "server_us": 1e6 * server_s / calls,
            "client_us": 1e6 * clients_s / calls,
            "server_threads": self.server.num_threads(),
            "client_threads": self.clients.num_threads(),
            "server_rss_mb": self.server.memory_info().rss / (1 << 20),
            "least_share": least_share,
        }

    def close(self) -> None:
        """End the clients, then the server."""
        for connection, process in ((self.commands, self.clients), (self.keep, self.server)):
            connection.close()
            with contextlib.suppress(psutil.Error):
                process.wait(TIMEOUT_S)


def cpu_s(process: psutil.Process) -> float:
    """Seconds of CPU time that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def in_turns(pairs: dict[str, Pair], seconds: float, rounds: int) -> dict[str, Figures]:
    """Medians of each pair's figures; the pairs take turns, and the first turn warms up."""
    found: dict[str, list[Figures]] = {name: [] for name in pairs}
    try:
        for number in range(-1, rounds):
            for name, pair in pairs.items():
                figures = pair.turn(seconds if number >= 0 else min(seconds, 0.5))
                found[name] += [figures] if number >= 0 else []
    finally:
        for pair in pairs.values():
            pair.close()
    return {
        name: {key: round(median(one[key] for one in turns), 2) for key in turns[0]} for name, turns in found.items()
    }


SERVERS = {
    "schoolhouse": schoolhouse_server,
    "schoolhouse_shm": schoolhouse_server,
    "grpc_aio": aio_server,
    "grpc_sync": sync_server,
}


def measure_server(count: int, streams: int, seconds: float, rounds: int) -> dict[str, Figures]:
    """What calls cost the servers, with so many clients."""
    pairs = {
        name: Pair.start(serving, light_clients, count, name, count, streams)
        for name, serving in SERVERS.items()
        if name != "grpc_sync" or count <= MOST_SYNC
    }
    return in_turns(pairs, seconds, rounds)


def measure_client(count: int, seconds: float, rounds: int) -> dict[str, Figures]:
    """What calls cost a process with so many real teachers, over the stream and with shared memory."""
    pairs = {
        name: Pair.start(schoolhouse_server, teachers, count, shared, count)
        for name, shared in (("stream", False), ("shared_memory", True))
    }
    return in_turns(pairs, seconds, rounds)


def ratios(clients: dict[str, dict[str, Figures]]) -> Figures:
    """The server's CPU time of an aio echo's by the number of clients, and its calls/s of those at 16 clients."""
    found = {
        f"server_us_of_aio_{count}": row["schoolhouse"]["server_us"] / max(row["grpc_aio"]["server_us"], 1e-9)
        for count, row in clients.items()
    }
    if "16" in clients:
        base = clients["16"]["schoolhouse"]["calls_per_s"]
        for count in clients.keys() - {"1", "16"}:
            found[f"calls_per_s_{count}_of_16"] = clients[count]["schoolhouse"]["calls_per_s"] / base
    return {name: round(value, 2) for name, value in sorted(found.items())}


def main() -> None:
    """Measure all, and print tables, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 16, 256, 1000], help="numbers of light clients")
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 16, 128], help="numbers of real teachers")
    parser.add_argument("--streams", type=int, default=1, help="light clients that share a connection, 64 at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each")
    options = parser.parse_args()
    clients = {
        str(count): measure_server(count, options.streams, options.seconds, options.rounds) for count in options.clients
    }
    connections = {str(count): measure_client(count, options.seconds, options.rounds) for count in options.connections}
    figures = {"clients": clients, "ratios": ratios(clients), "connections": connections}
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    for name, table in (("light clients", clients), ("real teachers of one process", connections)):
        for count, row in table.items():
            sys.stdout.write(f"{count} {name}\n")
            for system, found in row.items():
                sys.stdout.write(
                    f"  {system:16} " + "  ".join(f"{key} {value:g}" for key, value in found.items()) + "\n"
                )
    sys.stdout.write("  ".join(f"{name} {value:g}" for name, value in figures["ratios"].items()) + "\n")


if __name__ == "__main__":
    main()
