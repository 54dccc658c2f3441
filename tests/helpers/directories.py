"""A directory that is served without Ray, and replicas for it."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from memfd import soon
from schoolhouse.remote import connections
from schoolhouse_server import serve
from schoolhouse_server.replica.directory import Directory
from schoolhouse_server.replica.rpc_server import RpcServer
from schoolhouse_server.security.auth import Gate
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc
from torch import nn

SERVING, DRAINING = directory_pb2.Replica.SERVING, directory_pb2.Replica.DRAINING


class Scale(nn.Module):
    """Multiplies by a constant, its only weight; a forward waits for the gate."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, x):
        self.entered.set()
        assert self.gate.wait(30)
        return x * self.factor


def serving(loop, directory, *, ports=(0,), gate=None, max_rpcs=256, **more):
    """The gRPC server of a directory."""

    def add(server):
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(directory, server)
        return ("schoolhouse.v1.DirectoryService",)

    gate = gate or Gate()
    server = RpcServer(loop, add, gate=gate, max_rpcs=max_rpcs, host="127.0.0.1", ports=ports, **more)
    server.start()
    return server


class DirectoryServer:
    """A directory with a port of its own. `publish` takes replicas, or addresses with what is to be said of them."""

    def __init__(self, port=0, **more):
        self.loop = Loop("test-directory")
        self.directory = Directory(self.loop)
        self.server = serving(self.loop, self.directory, ports=(port,), **more)
        self.port = self.server.port
        self.url = f"grpc://127.0.0.1:{self.port}/teacher"

    def publish(self, *replicas, revision="", **said):
        found = [replica if isinstance(replica, directory_pb2.Replica) else entry(replica) for replica in replicas]
        for replica in found:
            replica.MergeFrom(directory_pb2.Replica(**said))
        self.directory.publish(directory_pb2.ReplicaSet(teacher="teacher", replicas=found, revision=revision))

    def close(self):
        self.directory.close()
        self.server.stop(0)
        self.loop.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()


def entry(replica, **said):
    """What a directory says of a replica that runs here."""
    revision = replica.engines["teacher"].description.revision
    address = f"127.0.0.1:{replica.port}"
    return directory_pb2.Replica(id=address, address=address, revision=revision, **said)


def revision_of(replica):
    return replica.engines["teacher"].description.revision


@contextlib.contextmanager
def replicas(*modules):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serve(module, allow_head=True)) for module in modules]


ELSEWHERE = """
import sys
from directories import DirectoryServer, Scale, entry
from schoolhouse_server import serve
with serve(Scale(float(sys.argv[1])), port=int(sys.argv[2])) as server, DirectoryServer() as directory:
    print(entry(server).address, entry(server).revision, directory.port, flush=True)
    for line in sys.stdin:  # replicas to publish: addresses and their revision
        *addresses, revision = line.split()
        directory.publish(*(
            type(entry(server))(id=address, address=address, revision=revision) for address in addresses
        ))
        print("published", flush=True)
"""


@contextlib.contextmanager
def elsewhere(factor=1.0, port=0):
    """A process with a replica and a directory: itself, the replica's address and revision, the directory's port."""
    command = [sys.executable, "-c", ELSEWHERE, str(factor), str(port)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        address, revision, directory_port = process.stdout.readline().split()
        yield process, address, revision, int(directory_port)
        process.kill()


@contextlib.contextmanager
def stopped_in_mid_forward(server, module, teacher):
    """The server closes while it computes: the sessions are gone, with what they had asked for."""
    assert module.entered.wait(20)
    closing = threading.Thread(target=server.close)
    closing.start()
    assert soon(lambda: not teacher.open_sessions())
    yield
    module.gate.set()
    closing.join(20)


def ask(teacher, value=1.0):
    return teacher.submit((torch.full((2,), float(value)),), {}, [""])


def answer(teacher, value=1.0, timeout_s=20):
    return ask(teacher, value).result(timeout_s)[""][0].item()


def sessions(teacher):
    """Addresses of the replicas that it has sessions with."""
    return {session.address for session in teacher.open_sessions()}


def addresses(*servers):
    return {f"127.0.0.1:{server.port}" for server in servers}


def tasks():
    """Names of what runs in the event loop of this process' clients: sessions, what they send, watches."""
    there = connections._connections
    return sorted(task.get_name() for task in list(there.loop._tasks)) if there is not None else []
