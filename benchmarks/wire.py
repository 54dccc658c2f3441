"""GB/s of features from a replica to a client, by shared memory and by stream, beside other ways to move bytes.

The peers are a raw gRPC byte stream, a bare TCP socket, and Ray Serve's gRPC ingress with `@serve.batch`, in one run.
Each server runs in its own process on loopback; all move the same bytes. Ours come from the replica's feature cache, so
that the wire is measured, and not a forward or a copy. Raw gRPC and TCP receive into a kept buffer and do not look at
it. Ours checks each byte that came over the stream; through shared memory it checks one KiB in 64, or all with
checksums, and its tensors stay where the replica put them. `python benchmarks/wire.py --json`
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
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
from torch import nn

Move = Callable[[int, int], None]  # moves `count` features of `size` bytes
SIZES = {"1KiB": 1 << 10, "1MiB": 1 << 20, "8MiB": 8 << 20, "64MiB": 64 << 20}
FRAME = 1 << 20
IN_FLIGHT = 4  # requests in flight for 1 MiB and more, as with a student that looks ahead


class Prepared(nn.Module):
    """A teacher that returns as many prepared bytes as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.data = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8)

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
    data = Prepared().data.numpy().tobytes()

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
    data = memoryview(Prepared().data.numpy().tobytes())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        client, _ = listener.accept()
        with client:
            while request := client.recv(8):
                client.sendall(data[: int.from_bytes(request, "little")])


def start(target: Callable[[Connection], None]) -> tuple[Any, Connection]:
    """Run a server in its own process; returns the address that it sends once ready, and the connection to it."""
    connection, _ = processes.start(target)
    return connection.recv(), connection


def measure(peers: dict[str, Move], rounds: int) -> dict[str, dict[str, float]]:
    """Median GB/s by peer and size, and calls/s at 1 KiB; the peers take turns, so that drift affects all alike."""
    figures: dict[str, dict[str, float]] = {peer: {} for peer in peers}
    for name, size in SIZES.items():
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


def over_schoolhouse(teacher: sh.RemoteTeacher) -> Move:
    """Ask for features with a few in flight; small ones one at a time, as the unary peer does."""

    def move(size: int, count: int) -> None:
        window: list[Any] = []
        x = torch.tensor(size)
        for _ in range(count):
            window.append(teacher.submit((x,), {}, [""]))
            if len(window) >= (1 if size <= 1 << 10 else IN_FLIGHT):
                assert window.pop(0).result()[""].nbytes == size
        for future in window:
            assert future.result()[""].nbytes == size

    return move


def over_raw(port: int) -> Move:
    """Plain gRPC: unary at 1 KiB, else a stream for each feature, received into a kept buffer."""
    opened = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)])
    kept = memoryview(bytearray(max(SIZES.values())))
    unary, stream = opened.unary_unary("/raw/Unary"), opened.unary_stream("/raw/Stream")

    def move(size: int, count: int) -> None:
        for _ in range(count):
            if size <= 1 << 10:
                unary(str(size).encode())
                continue
            buffer, at = kept[:size], 0
            for message in stream(str(size).encode()):
                buffer[at : at + len(message)] = message
                at += len(message)

    return move


def over_tcp(port: int) -> Move:
    """A bare socket, received into a kept buffer."""
    client = socket.create_connection(("127.0.0.1", port))
    kept = memoryview(bytearray(max(SIZES.values())))

    def move(size: int, count: int) -> None:
        for _ in range(count):
            client.sendall(size.to_bytes(8, "little"))
            buffer, at = kept[:size], 0
            while at < size:
                at += client.recv_into(buffer[at:])

    return move


def over_ray_serve(address: str) -> Move:
    """Ray Serve's gRPC ingress, with as many requests in flight as ours."""
    opened = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
    call = opened.unary_unary(
        METHOD, request_serializer=UInt64Value.SerializeToString, response_deserializer=BytesValue.FromString
    )

    def move(size: int, count: int) -> None:
        window: list[Any] = []
        for _ in range(count):
            window.append(call.future(UInt64Value(value=size), metadata=(("application", "features"),), timeout=60))
            if len(window) >= (1 if size <= 1 << 10 else IN_FLIGHT):
                assert len(window.pop(0).result().value) == size
        for future in window:
            assert len(future.result().value) == size

    return move


def main() -> None:
    """Measure all peers, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7, help="number of turns of each peer at each size")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # so that Ray Serve's proxy can import the peer's service
    url, _keep_ours = start(schoolhouse_server)
    raw_port, _keep_raw = start(raw_server)
    tcp_port, _keep_tcp = start(tcp_server)
    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray's own messages
        sh.connect(url, transport=sh.Transport(shared_memory=False)) as streamed,
        sh.connect(url, transport=sh.Transport(checksums=True)) as checked,
        sh.connect(url) as shared,
        ray_serve(max(SIZES.values())) as address,
    ):
        assert shared.describe().transport == "shared memory"
        peers = {
            "schoolhouse": over_schoolhouse(streamed),
            "schoolhouse_shm": over_schoolhouse(shared),
            "schoolhouse_shm_checksums": over_schoolhouse(checked),
            "grpc_raw": over_raw(raw_port),
            "tcp": over_tcp(tcp_port),
            "ray_serve": over_ray_serve(address),
        }
        figures = measure(peers, options.rounds)
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write("GB/s, and calls/s at 1 KiB\n")
    for peer, row in figures.items():
        sys.stdout.write(f"{peer:15} " + "  ".join(f"{name} {value:10.4f}" for name, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
