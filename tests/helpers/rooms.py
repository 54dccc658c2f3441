"""Replicas and a directory in processes of their own, which may be killed, stopped and started again, without Ray."""

import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from directories import DirectoryServer
from models import Net
from proxy import Proxy
from schoolhouse_server import serve
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.v1 import directory_pb2

WIDTH = 512  # so that features do not fit into a message's header
_START_TIMEOUT_S = 60.0
_context: Any = multiprocessing.get_context("forkserver")  # of one that has imported all: a start takes no second
_context.set_forkserver_preload(["torch", "schoolhouse", "schoolhouse_server.replica.replica"])


def teacher_model() -> Net:
    """The teacher, the same in every process."""
    return Net(WIDTH, seed=1).eval().requires_grad_(False)


def run_replica(commands: Connection, port: int, serving: dict[str, Any]) -> None:
    """Serve until the other side of `commands` is gone; a number there has as many replies be corrupted in memory."""
    torch.set_num_threads(1)
    write, left = shared_memory.Segment.write, [0]

    def corrupting(self: Any, offset: int, data: memoryview, digest: Any) -> None:
        write(self, offset, data, digest)
        if left[0]:
            left[0] -= 1
            self._view[offset + data.nbytes // 2] ^= 1

    shared_memory.Segment.write = corrupting
    with serve(teacher_model(), port=port, **serving) as server, contextlib.suppress(EOFError):
        commands.send((server.port, server.engines["teacher"].description.revision))
        while True:
            left[0] = commands.recv()


def run_directory(commands: Connection, port: int) -> None:
    """A directory of the replica sets that come, until the other side is gone."""
    with DirectoryServer(port) as directory, contextlib.suppress(EOFError):
        commands.send((directory.port, ""))
        while True:
            directory.publish(*[directory_pb2.Replica(**said) for said in commands.recv()])
            commands.send("published")


@dataclass
class Served:
    """A process, how to reach it, and the proxy before it if there is one."""

    process: Any
    commands: Connection
    port: int
    revision: str
    proxy: Proxy | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        pid: int = self.process.pid
        return pid

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """`kill -9`; returns when it is gone, with what this process held of it."""
        self.process.kill()
        self.process.join(20)
        self.process.close()
        self.commands.close()
        if self.proxy is not None:
            self.proxy.close()


def start(run: Any, *args: Any) -> Served:
    """Have `run(commands, *args)` in a process of its own, which first says its port and revision."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=run, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(_START_TIMEOUT_S), "the process did not start in time"
    return Served(process, ours, *ours.recv())


class Room:
    """Some replicas and their directory; with `proxied`, each replica is reached through a proxy alone."""

    def __init__(self, replicas: int = 2, *, proxied: bool = False, **serving: Any) -> None:
        self._proxied, self._serving = proxied, serving
        self.replicas: list[Served] = []
        self.directory = start(run_directory, 0)
        self.url = f"grpc://127.0.0.1:{self.directory.port}/teacher"
        for _ in range(replicas):
            self.add()
        self.publish()

    def add(self) -> Served:
        """One more replica; it is to be published."""
        served = start(run_replica, 0, self._serving)
        served.proxy = Proxy(served.port) if self._proxied else None
        self.replicas.append(served)
        return served

    def addresses(self) -> list[str]:
        """Where clients reach the replicas."""
        return [f"127.0.0.1:{one.port if one.proxy is None else one.proxy.port}" for one in self.replicas]

    def publish(self) -> None:
        """Have the directory say which replicas there are."""
        said = [
            {"id": f"{one.pid}", "address": address, "revision": one.revision}
            for one, address in zip(self.replicas, self.addresses(), strict=True)
        ]
        self.directory.commands.send(said)
        assert self.directory.commands.poll(20)
        self.directory.commands.recv()

    def replace(self, replica: int) -> None:
        """Kill a replica, and have another in its place."""
        self.replicas.pop(replica).kill()
        self.add()
        self.publish()

    def kill_directory(self) -> None:
        """Only the directory."""
        self.directory.kill()

    def restart_directory(self) -> None:
        """At the same port."""
        self.directory = start(run_directory, self.directory.port)
        self.publish()

    def restart(self) -> None:
        """Kill everything at once, and start as much anew; only the directory's port stays."""
        old, self.replicas = self.replicas, []
        for one in [self.directory, *old]:
            one.process.kill()
        for one in [self.directory, *old]:
            one.kill()
        for _ in old:
            self.add()
        self.restart_directory()

    def go_on(self) -> None:
        """What was stopped or held goes on."""
        for one in self.replicas:
            one.signal(signal.SIGCONT)
            if one.proxy is not None:
                one.proxy.go_on()

    def close(self) -> None:
        """End all."""
        for one in [*self.replicas, self.directory]:
            one.kill()

    def __enter__(self) -> "Room":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
