"""GB/s of features from a replica to a client, by shared memory and by stream, beside other ways to move bytes.

The peers are a raw gRPC byte stream, 2 MiB frames on a long-lived grpc.aio stream, Arrow Flight's exchange, a bare TCP
socket, a Ray actor that returns arrays through the object store, and Ray Serve's gRPC ingress with `@serve.batch`, in
one run. Each server runs in its own process on loopback; all move the same bytes, and whatever arrives is a tensor, of
which one byte in 4 KiB is held against what was sent. Ours come from the replica's feature cache, so that the wire is
measured, and not a forward or a copy. Raw gRPC, grpc.aio and TCP send from prepared memory, receive into a kept buffer,
and check no more than that. Ours checks each byte that came over the stream; through shared memory it checks one KiB in
64, or all with checksums, and its tensors stay where the replica put them. `python benchmarks/wire.py --json`
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import processes
import schoolhouse as sh
import torch
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value
from ray_serve_peer import METHOD, ray_serve
from schoolhouse_server import serve
from schoolhouse_wire import memory
from schoolhouse_wire.rpc import channel
from torch import nn

Move = Callable[[int, int], None]  # moves `count` features of `size` bytes
SIZES = {"1KiB": 1 << 10, "1MiB": 1 << 20, "8MiB": 8 << 20, "64MiB": 64 << 20}
FRAME = 1 << 20
AIO_FRAME, AIO_METHOD = 2 << 20, "/raw/Exchange"
FLIGHT_BATCH = 8 << 20  # at 64 MiB faster than batches of 2 or 64
EACH = 4096  # every page of a tensor is looked at
FLIGHT_MISSING = "pyarrow is not installed: pip install 'schoolhouse[bench]'"
IN_FLIGHT = 4  # requests in flight for 1 MiB and more, as with a student that looks ahead


def prepared() -> torch.Tensor:
    """The bytes that all servers send."""
    return torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Check:
    """Looks at each page of what arrived, and holds it against what was sent."""

    def __init__(self) -> None:
        self._expected = prepared()[::EACH].clone()

    def __call__(self, found: torch.Tensor, size: int) -> None:
        """Raises `AssertionError` if it is something else."""
        assert found.nbytes == size
        assert torch.equal(found[::EACH], self._expected[: -(-size // EACH)])


class Prepared(nn.Module):
    """A teacher that returns as many prepared bytes as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.data = prepared()

    def forward(self, size: torch.Tensor) -> torch.Tensor:
        """The first `size` bytes."""
        return self.data[: int(size)]


def wait_for_end(ready: Connection) -> None:
    """Return when the parent closes the connection, or is gone."""
    with contextlib.suppress(EOFError):
        ready.recv()


def schoolhouse_server(ready: Connection) -> None:
    """Serve `Prepared` with Schoolhouse, from its cache."""
    with serve(Prepared(), cache_bytes=2 * sum(SIZES.values())) as server:
        ready.send(server.url)
        wait_for_end(ready)


def raw_server(ready: Connection) -> None:
    """Serve prepared bytes over plain gRPC: a stream of 1 MiB messages, and a unary call."""
    memory.keep_freed_memory()  # as our server does
    data = prepared().numpy().tobytes()

    def stream(request: bytes, _context: Any) -> Any:
        size = int(request)
        for offset in range(0, size, FRAME):
            yield data[offset : min(size, offset + FRAME)]

    handlers = {
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Unary": grpc.unary_unary_rpc_method_handler(lambda request, _context: data[: int(request)]),
    }
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ready.send(port)
    wait_for_end(ready)


def tcp_server(ready: Connection) -> None:
    """Serve prepared bytes over a bare socket."""
    data = memoryview(prepared().numpy().tobytes())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        client, _ = listener.accept()
        with client:
            while request := client.recv(8):
                client.sendall(data[: int.from_bytes(request, "little")])


def aio_server(ready: Connection) -> None:
    """Serve prepared frames on a long-lived grpc.aio stream, as many as each message asks for."""
    memory.keep_freed_memory()
    data = prepared().numpy().tobytes()
    whole = [data[offset : offset + AIO_FRAME] for offset in range(0, len(data), AIO_FRAME)]
    small = {size: data[:size] for size in SIZES.values() if size < AIO_FRAME}

    async def exchange(_messages: Any, context: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the client is gone
            while (request := await context.read()) is not grpc.aio.EOF:
                size = int(request)
                for frame in [small[size]] if size in small else whole[: size // AIO_FRAME]:
                    await context.write(frame)

    async def run() -> None:
        server = grpc.aio.server(options=channel.SERVER_OPTIONS)
        _, service, name = AIO_METHOD.split("/")
        handlers = {name: grpc.stream_stream_rpc_method_handler(exchange)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        ready.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await asyncio.get_running_loop().run_in_executor(None, wait_for_end, ready)
        await server.stop(1.0)

    asyncio.run(run())


def flight_server(ready: Connection) -> None:
    """Serve prepared bytes with Arrow Flight: on one exchange, record batches for each message of metadata."""
    import pyarrow
    from pyarrow import flight

    data = pyarrow.py_buffer(prepared().numpy())
    schema = pyarrow.schema([("features", pyarrow.uint8())])

    def batch(at: int, size: int) -> Any:
        column = pyarrow.Array.from_buffers(pyarrow.uint8(), size, [None, data.slice(at, size)])
        return pyarrow.record_batch([column], schema=schema)

    batches = {
        size: [batch(at, min(size - at, FLIGHT_BATCH)) for at in range(0, size, FLIGHT_BATCH)]
        for size in SIZES.values()
    }

    class Server(flight.FlightServerBase):  # type: ignore[misc]
        """Answers each message of an exchange."""

        def do_exchange(self, _context: Any, _descriptor: Any, reader: Any, writer: Any) -> None:
            """As many bytes as each message's metadata says."""
            writer.begin(schema)
            for chunk in reader:
                for part in batches[int(chunk.app_metadata.to_pybytes())]:
                    writer.write_batch(part)

    with Server("grpc://127.0.0.1:0") as server:
        ready.send(server.port)
        wait_for_end(ready)


def start(target: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """Run a server in its own process; returns the address that it sends once ready, and the connection to it."""
    connection, _ = processes.start(target)
    return connection.recv(), connection


def measure(peers: dict[str, Move], rounds: int, sizes: list[str]) -> dict[str, dict[str, float]]:
    """Median GB/s by peer and size, and calls/s at 1 KiB; the peers take turns, so that drift affects all alike."""
    figures: dict[str, dict[str, float]] = {peer: {} for peer in peers}
    for name, size in ((name, SIZES[name]) for name in sizes):
        count = max(8, min(400, (256 << 20) // size))
        rates: dict[str, list[float]] = {peer: [] for peer in peers}
        for turn in range(-1, rounds):
            for peer, move in peers.items():
                mine = count if peer != "ray_serve" else max(3, count // 8)
                began = time.perf_counter()
                move(size, mine)
                if turn >= 0:  # the turn before that warms up
                    rates[peer].append(mine / (time.perf_counter() - began))
        for peer, found in rates.items():
            figures[peer][name] = round(median(found) * size / 1e9, 5)
            if name == "1KiB":
                figures[peer]["calls_per_s"] = round(median(found), 1)
    return figures


def in_flight(size: int) -> int:
    """How many requests are in flight; small ones come one at a time, as from the unary peer."""
    return 1 if size <= 1 << 10 else IN_FLIGHT


def over_schoolhouse(teacher: sh.RemoteTeacher, check: Check) -> Move:
    """Ask for features with a few in flight."""

    def move(size: int, count: int) -> None:
        window: list[Any] = []
        x = torch.tensor(size)
        for _ in range(count):
            window.append(teacher.submit((x,), {}, [""]))
            if len(window) >= in_flight(size):
                check(window.pop(0).result()[""], size)
        for future in window:
            check(future.result()[""], size)

    return move


def over_raw(port: int, check: Check) -> Move:
    """Plain gRPC: unary at 1 KiB, else a stream for each feature, received into a kept buffer."""
    opened = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)])
    held = torch.empty(max(SIZES.values()), dtype=torch.uint8)
    kept = memoryview(held.numpy())
    unary, stream = opened.unary_unary("/raw/Unary"), opened.unary_stream("/raw/Stream")

    def move(size: int, count: int) -> None:
        for _ in range(count):
            if size <= 1 << 10:
                check(torch.frombuffer(bytearray(unary(str(size).encode())), dtype=torch.uint8), size)
                continue
            buffer, at = kept[:size], 0
            for message in stream(str(size).encode()):
                buffer[at : at + len(message)] = message
                at += len(message)
            check(held[:size], size)

    return move


def over_aio(port: int, check: Check) -> Move:
    """A long-lived grpc.aio stream, with a few requests in flight, received into a kept buffer."""
    loop = asyncio.new_event_loop()
    held = torch.empty(max(SIZES.values()), dtype=torch.uint8)
    kept = memoryview(held.numpy())

    async def opened() -> Any:
        options = channel.CLIENT_OPTIONS
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options).stream_stream(AIO_METHOD)()

    stream = loop.run_until_complete(opened())

    async def receive(size: int) -> None:
        at = 0
        while at < size:
            message = await stream.read()
            kept[at : at + len(message)] = message
            at += len(message)
        check(held[:size], size)

    async def move(size: int, count: int) -> None:
        ahead = in_flight(size)
        for number in range(count):
            await stream.write(str(size).encode())
            if number >= ahead - 1:
                await receive(size)
        for _ in range(min(ahead - 1, count)):
            await receive(size)

    return lambda size, count: loop.run_until_complete(move(size, count))


def over_flight(port: int, check: Check) -> Move:
    """One exchange of Arrow Flight; a single batch stays where it was received. Another thread asks: Flight blocks."""
    import pyarrow
    from pyarrow import flight

    client = flight.connect(f"grpc://127.0.0.1:{port}")
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"features"))
    writer.begin(pyarrow.schema([]))
    held = torch.empty(max(SIZES.values()), dtype=torch.uint8)

    def received() -> torch.Tensor:
        return torch.from_numpy(reader.read_chunk().data.column(0).to_numpy(zero_copy_only=True))

    def receive(size: int) -> None:
        at = 0
        while at < size:
            part = received()
            if part.nbytes == size:
                check(part, size)
                return
            held[at : at + part.nbytes] = part
            at += part.nbytes
        check(held[:size], size)

    def move(size: int, count: int) -> None:
        room = threading.Semaphore(in_flight(size))

        def ask() -> None:
            for _ in range(count):
                room.acquire()
                writer.write_metadata(str(size).encode())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        for _ in range(count):
            receive(size)
            room.release()
        asking.join()

    return move


@contextlib.contextmanager
def ray_actor(check: Check) -> Iterator[Move]:
    """A plain Ray actor whose arrays come through the object store, in the cluster that runs or one of its own."""
    import ray

    alone = not ray.is_initialized()
    if alone:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    class Teacher:
        """Returns prepared bytes."""

        def __init__(self) -> None:
            self._data = prepared().numpy()

        def get(self, size: int) -> Any:
            """As many as asked for."""
            return self._data[:size]

    actor = ray.remote(num_cpus=0)(Teacher).remote()

    def receive(ref: Any, size: int) -> None:
        check(torch.from_numpy(ray.get(ref)), size)

    def move(size: int, count: int) -> None:
        window: list[Any] = []
        for _ in range(count):
            window.append(actor.get.remote(size))
            if len(window) >= in_flight(size):
                receive(window.pop(0), size)
        for ref in window:
            receive(ref, size)

    try:
        yield move
    finally:
        ray.shutdown() if alone else ray.kill(actor)


def over_tcp(port: int, check: Check) -> Move:
    """A bare socket, received into a kept buffer."""
    client = socket.create_connection(("127.0.0.1", port))
    held = torch.empty(max(SIZES.values()), dtype=torch.uint8)
    kept = memoryview(held.numpy())

    def move(size: int, count: int) -> None:
        for _ in range(count):
            client.sendall(size.to_bytes(8, "little"))
            buffer, at = kept[:size], 0
            while at < size:
                at += client.recv_into(buffer[at:])
            check(held[:size], size)

    return move


def over_ray_serve(address: str, check: Check) -> Move:
    """Ray Serve's gRPC ingress, with as many requests in flight as ours."""
    opened = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
    call = opened.unary_unary(
        METHOD, request_serializer=UInt64Value.SerializeToString, response_deserializer=BytesValue.FromString
    )

    def receive(future: Any, size: int) -> None:
        check(torch.frombuffer(future.result().value, dtype=torch.uint8), size)

    def move(size: int, count: int) -> None:
        window: list[Any] = []
        for _ in range(count):
            window.append(call.future(UInt64Value(value=size), metadata=(("application", "features"),), timeout=60))
            if len(window) >= in_flight(size):
                receive(window.pop(0), size)
        for future in window:
            receive(future, size)

    return move


def all_peers(stack: contextlib.ExitStack, check: Check, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Move]]:
    """Start those that are wanted; what is open ends with `stack`."""
    ours = {
        "schoolhouse": sh.Transport(shared_memory=False),
        "schoolhouse_shm": sh.Transport(),
        "schoolhouse_shm_checksums": sh.Transport(checksums=True),
    }
    url, keep = start(schoolhouse_server)
    stack.callback(keep.close)
    for name, transport in ours.items():
        if wanted(name):
            teacher = stack.enter_context(sh.connect(url, transport=transport))
            assert (teacher.describe().transport == "shared memory") == transport.shared_memory
            yield name, over_schoolhouse(teacher, check)
    for name, (serving, over) in PEERS.items():
        if wanted(name) and (name != "arrow_flight" or importlib.util.find_spec("pyarrow") is not None):
            port, keep = start(serving)
            stack.callback(keep.close)
            yield name, over(port, check)
    if wanted("ray_serve"):
        yield "ray_serve", over_ray_serve(stack.enter_context(ray_serve(max(SIZES.values()))), check)
    if wanted("ray_actor"):
        yield "ray_actor", stack.enter_context(ray_actor(check))


PEERS: dict[str, tuple[Callable[[Connection], None], Callable[[int, Check], Move]]] = {
    "grpc_raw": (raw_server, over_raw),
    "grpc_aio": (aio_server, over_aio),
    "tcp": (tcp_server, over_tcp),
    "arrow_flight": (flight_server, over_flight),
}
NAMES = ["schoolhouse", "schoolhouse_shm", "schoolhouse_shm_checksums", *PEERS, "ray_serve", "ray_actor"]


def main() -> None:
    """Measure all peers, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7, help="number of turns of each peer at each size")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="sizes to measure")
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=NAMES, help="what to measure")
    options = parser.parse_args()
    here = str(Path(__file__).parent)  # so that Ray Serve's proxy can import the peer's service
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    warnings.filterwarnings("ignore", message="The given .* is not writable")  # nobody writes into what arrived
    check = Check()
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:  # Ray's own messages
        peers = dict(all_peers(stack, check, lambda name: name in options.peers))
        figures: dict[str, Any] = measure(peers, options.rounds, options.sizes)
    if "arrow_flight" in options.peers and "arrow_flight" not in figures:
        figures["arrow_flight"] = {"missing": FLIGHT_MISSING}
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write("GB/s, and calls/s at 1 KiB\n")
    for peer, row in figures.items():
        sys.stdout.write(f"{peer:26}" + "  ".join(f"{name} {shown(value)}" for name, value in row.items()) + "\n")


def shown(value: float | str) -> str:
    """A figure in its column."""
    return value if isinstance(value, str) else f"{value:10.4f}"


if __name__ == "__main__":
    main()
