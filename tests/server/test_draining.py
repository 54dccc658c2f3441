"""A replica that must go: no new sessions, those there are told, what is in flight is answered."""

import threading
import time

import grpc
import pytest
import schoolhouse as sh
import torch
from memfd import soon
from models import Net
from schoolhouse.errors import TeacherUnavailableError
from schoolhouse_server import serve
from schoolhouse_server.session import draining
from schoolhouse_server.session.draining import Drain
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc
from schoolhouse_wire.values.codec import Arguments
from stub import Stub
from torch import nn


class Gate(nn.Module):
    """Holds each forward until it is opened."""

    def __init__(self):
        super().__init__()
        self.entered, self.opened = threading.Event(), threading.Event()

    def forward(self, x):
        self.entered.set()
        assert self.opened.wait(30)
        return x + 1


def listed(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=channel.CLIENT_OPTIONS) as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)
        [found] = stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=10).teachers
        return found.replicas[0]


@pytest.mark.parametrize("shared_memory", [False, True])
def test_what_is_in_flight_is_answered_and_the_session_is_told(shared_memory, monkeypatch):
    monkeypatch.setattr(draining, "IDLE_S", 60.0)
    gate = Gate()
    with serve(gate) as server:
        client = Stub(server, shared_memory=shared_memory)
        messages = framing.Outgoing(Arguments([torch.ones(2)], {}), limits=Limits(), snapshot=True)
        [message] = messages.messages(1, lambda payload: payload, None, lambda: True)
        client.ask(1, message, messages.header)
        assert gate.entered.wait(20)
        server.drain(60)
        assert next(a for a in client.answers if a.WhichOneof("kind")).WhichOneof("kind") == "draining"
        assert listed(server).state == directory_pb2.Replica.DRAINING
        assert not server.drained
        with pytest.raises(grpc.RpcError) as refused:
            Stub(server)
        error = status.from_rpc_error(refused.value, "x")
        assert isinstance(error, TeacherUnavailableError)
        assert "draining" in error.message
        gate.opened.set()
        answer = next(a for a in client.answers if a.WhichOneof("kind"))
        assert answer.reply.request_id == 1
        assert not server.drained  # the session is there, and was busy just now
        client.outbox.close()
        client.channel.close()
        assert soon(lambda: server.drained)


def test_a_drain_without_sessions_is_over_at_once():
    with serve(Net()) as server:
        assert not server.draining
        assert not server.drained
        server.drain(30)
        assert server.draining
        assert server.drained


class Session:
    teacher = "teacher"

    def __init__(self):
        self.outstanding, self.calls, self.told = 1, 1, 0

    def tell_draining(self):
        self.told += 1


def test_when_a_drain_is_over():
    now = [100.0]
    drain = Drain(lambda: now[0])
    one, other = Session(), Session()
    drain.join(one)
    drain.join(other)
    assert not drain.over()
    drain.begin(60.0)
    drain.begin(0.0)  # says nothing new
    assert (one.told, other.told) == (1, 1)
    with pytest.raises(TeacherUnavailableError, match="draining"):
        drain.join(Session())
    one.outstanding = other.outstanding = 0
    now[0] += draining.IDLE_S - 0.1
    assert not drain.over()
    one.outstanding = 1  # a call that was on its way
    assert not drain.over()
    one.outstanding = 0
    now[0] += draining.IDLE_S - 0.1
    one.calls += 1  # one that has come and gone meanwhile
    assert not drain.over()
    now[0] += draining.IDLE_S - 0.1
    assert not drain.over()
    now[0] += 0.2
    assert drain.over()
    one.outstanding = 1
    assert not drain.over()
    drain.leave(one)
    drain.leave(other)
    assert drain.over()


def test_a_drain_has_an_end():
    now = [0.0]
    drain = Drain(lambda: now[0])
    drain.join(Session())
    drain.begin(60.0)
    now[0] = 59.9
    assert not drain.over()
    now[0] = 60.0
    assert drain.over()


def test_a_student_goes_on_at_another_replica():
    model = Net(32, seed=1)
    with serve(Net(32, seed=1)) as first, serve(Net(32, seed=1)) as second:
        first._directory.publish(  # a pool's directory, with both
            directory_pb2.ReplicaSet(
                teacher="teacher",
                replicas=[
                    directory_pb2.Replica(id=str(s.port), address=f"127.0.0.1:{s.port}", revision="")
                    for s in (first, second)
                ],
            )
        )
        with sh.connect(first.url) as teacher:
            x = torch.randn(3, 8)
            for step in range(200):
                if step == 100:
                    first._context.drain.begin(30.0)
                if step == 150:
                    time.sleep(0.1)
                assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""], model(x))
