"""What the event loop of a replica takes from a launch-bound forward, by the number of calls that it answers meanwhile.

The forward is many small kernels, each of which gives the interpreter up and takes it back. One client keeps the device
busy; others ask for what is in the replica's feature cache, which is work for the loop and none for the device, at each
rate in turn. Forwards/s are those of the replica's own counter, over those in turns in which only a process that spins
keeps the other core busy. `python benchmarks/beside.py --json`
"""

import argparse
import asyncio
import contextlib
import json
import sys
import threading
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import grpc
import processes
import schoolhouse as sh
import torch
from clients import LEASE_S, TIMEOUT_S, WIDTH, Session, wait_for_end
from schoolhouse_server import serve
from schoolhouse_wire.rpc import channel
from torch import nn

CLIENTS = 32  # that ask for what is cached
IN_FLIGHT = 3  # requests that wait for the device


def replica(ready: Connection, layers: int) -> None:
    """Serve a deep stack of small layers; the parent is told the number of forwards whenever it asks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)))
    with serve(stack, cache_bytes=64 << 20, max_sessions=CLIENTS + 8, max_in_flight=2048, lease_s=LEASE_S) as server:
        ready.send(server.url)
        with contextlib.suppress(EOFError):
            while True:
                ready.recv()
                ready.send((time.perf_counter(), server.load("teacher").forwards))


def device_client(ready: Connection, url: str) -> None:
    """Keep the device busy with requests of which no two are equal, until the parent ends."""
    torch.set_num_threads(1)
    with sh.connect(url, job="forwards") as teacher:
        over = threading.Event()
        window: list[Any] = []

        def ask() -> None:
            while not over.is_set():
                window.append(teacher.submit((torch.randn(1, WIDTH),), {}, [""]))
                if len(window) >= IN_FLIGHT:
                    window.pop(0).result(TIMEOUT_S)

        asking = threading.Thread(target=ask)
        asking.start()
        ready.send("ready")
        wait_for_end(ready)
        over.set()
        asking.join()


def loop_clients(commands: Connection, url: str) -> None:
    """Ask for what is cached at the rate, in calls/s, and for the seconds of each command; tells the calls made."""
    torch.set_num_threads(1)
    asyncio.run(_loop_clients(commands, url))


async def _loop_clients(commands: Connection, url: str) -> None:
    address = url.removeprefix("grpc://").split("/")[0]
    opened = [grpc.aio.insecure_channel(address, options=channel.CLIENT_OPTIONS) for _ in range(CLIENTS)]
    clients = [Session(one, number, pipes=False) for number, one in enumerate(opened)]
    for client in clients:
        await asyncio.wait_for(client.open(), TIMEOUT_S)
        await asyncio.wait_for(client.ask(), TIMEOUT_S)  # cached from now on
    commands.send("ready")

    async def ask(client: Session, number: int, rate: float, began: float, end: float) -> int:
        calls, every = 0, CLIENTS / rate
        while (due := began + every * (calls + number / CLIENTS)) < end and time.perf_counter() < end:
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            await client.ask()
            calls += 1
        return calls

    with contextlib.suppress(EOFError):
        while True:
            rate, seconds = await asyncio.get_running_loop().run_in_executor(None, commands.recv)
            now = time.perf_counter()
            made = await asyncio.gather(*(ask(one, i, rate, now, now + seconds) for i, one in enumerate(clients)))
            commands.send(sum(made))


def spin(commands: Connection) -> None:
    """Keep a core busy for the seconds of each command."""
    with contextlib.suppress(EOFError):
        while True:
            seconds = commands.recv()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
            commands.send(0)


def measure(layers: int, rates: list[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Forwards/s by the rate of other calls, over those without any; all rates take turns."""
    server, _ = processes.start(replica, layers)
    url = server.recv()
    asking, _ = processes.start(loop_clients, url)
    assert asking.recv() == "ready"
    device, _ = processes.start(device_client, url)
    assert device.recv() == "ready"
    spinning, _ = processes.start(spin)

    def forwards() -> tuple[float, int]:
        server.send("forwards")
        found: tuple[float, int] = server.recv()
        return found

    def turn(rate: int) -> tuple[float, float]:
        busy, command = (asking, (rate, seconds)) if rate else (spinning, seconds)
        began, before = forwards()
        busy.send(command)
        calls = busy.recv()
        ended, after = forwards()
        return (after - before) / (ended - began), calls / (ended - began)

    turns: dict[int, list[tuple[float, float]]] = {rate: [] for rate in (0, *rates)}
    for number in range(-1, rounds):
        for rate, found in turns.items():
            figures = turn(rate)
            found += [figures] if number >= 0 else []
    for connection in (asking, device, spinning, server):
        connection.close()
    bare = median(one for one, _ in turns[0])
    rows = {
        str(rate): {
            "calls_per_s": round(median(calls for _, calls in found), 1),
            "forwards_of_bare": round(median(one for one, _ in found) / bare, 3),
        }
        for rate, found in turns.items()
        if rate
    }
    return {"layers": layers, "bare_forwards_per_s": round(bare, 1), "rates": rows}


def main() -> None:
    """Measure, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=300, help="of the teacher; two kernels each")
    parser.add_argument("--rates", type=int, nargs="+", default=[50, 200, 500, 1000, 2000], help="calls/s")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each rate")
    options = parser.parse_args()
    figures = measure(options.layers, options.rates, options.seconds, options.rounds)
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(f"{figures['layers']} layers, {figures['bare_forwards_per_s']} forwards/s without other calls\n")
    for rate, row in figures["rates"].items():
        sys.stdout.write(f"  {rate:>5} calls/s wanted, {row['calls_per_s']:>7} made: {row['forwards_of_bare']:.3f}\n")


if __name__ == "__main__":
    main()
