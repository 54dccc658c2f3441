"""A client that ends its half of the stream, as a generator of a few calls does, gets all the answers and then OK."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from grpc._cython import cygrpc
from memfd import soon
from schoolhouse_server import serve
from schoolhouse_server.session.server_session import ServerSession
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from torch import nn


class Gated(nn.Module):
    """Adds one, once it is opened; raises for NaN."""

    def __init__(self):
        super().__init__()
        self.opened = threading.Event()

    def forward(self, x):
        assert self.opened.wait(30)
        if x.isnan().any():
            raise ValueError("no number")
        return x + 1


@pytest.fixture
def module():
    return Gated()


@pytest.fixture
def server(module):
    with serve(module, shared_memory_bytes=0) as found:
        yield found


@pytest.fixture
def session(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=channel.CLIENT_OPTIONS) as opened:
        yield opened.stream_stream(
            channel.SESSION_METHOD,
            request_serializer=framing.write_message,
            response_deserializer=lambda data: framing.received(teacher_pb2.ServerMessage, data),
        )


OPEN = teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher"))


def messages(request_id, x):
    """Of one call."""
    tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
    outgoing = framing.Outgoing(Arguments([x]), limits=Limits(), snapshot=True)

    def head(payload):
        call = teacher_pb2.Call(
            request_id=request_id, taps=[tap], inputs=outgoing.header, payload=payload, timeout_s=30
        )
        return teacher_pb2.ClientMessage(call=call)

    return list(outgoing.messages(request_id, head, None, lambda: True))


def kinds(answers):
    """What came for each request: (id, kind), and frames beside."""
    found = [answer for answer in answers if isinstance(answer, teacher_pb2.ServerMessage)]
    named = [(answer, answer.WhichOneof("kind")) for answer in found]
    return [(getattr(getattr(answer, kind), "request_id", 0), kind) for answer, kind in named if kind is not None]


def test_all_that_was_asked_is_answered(server, module, session):
    nan = torch.full((2,), float("nan"))
    call = session(
        iter([OPEN, *messages(1, torch.ones(2)), *messages(2, nan), *messages(3, torch.ones(300_000))]), timeout=30
    )
    first = next(call)
    assert soon(lambda: sum(job.in_flight for job in server.load("teacher").jobs) == 3)
    module.opened.set()
    rest = list(call)
    assert kinds([first]) == [(0, "opened")]
    assert sorted(kinds(rest)) == [(1, "reply"), (2, "failure"), (3, "reply")]
    assert sum(len(frame.data) for frame in rest if isinstance(frame, framing.Frame)) == 1_200_000
    assert call.code() is grpc.StatusCode.OK
    assert soon(lambda: not server.load("teacher").sessions)


def test_a_call_whose_payload_does_not_come_any_more_fails(server, module, session):
    module.opened.set()
    whole, cut = messages(1, torch.ones(2)), messages(2, torch.ones(300_000))
    assert len(cut) == 2
    answers = list(session(iter([OPEN, *whole, cut[0]]), timeout=30))
    assert sorted(kinds(answers)) == [(0, "opened"), (1, "reply"), (2, "failure")]
    [failure] = [answer.failure for answer in answers if answer.WhichOneof("kind") == "failure"]
    assert failure.code == teacher_pb2.Failure.PROTOCOL
    assert "ended within this call's payload" in failure.message
    assert not any(job.in_flight for job in server.load("teacher").jobs)


def test_who_goes_away_then_frees_its_places(server, module, session):
    call = session(iter([OPEN, *messages(1, torch.ones(2)), *messages(2, torch.ones(2))]), timeout=30)
    next(call)
    assert soon(lambda: sum(job.in_flight for job in server.load("teacher").jobs) == 2)
    call.cancel()
    assert soon(lambda: not server.load("teacher").sessions)
    assert server.engines["teacher"].queued == 0
    module.opened.set()


def test_no_answer_is_lost_as_the_last_ones_come(module, session):
    """Failures and replies end in several threads at once."""
    module.opened.set()
    nan, unknown = torch.full((2,), float("nan")), teacher_pb2.Call(request_id=9)

    def run(_):
        calls = [*messages(1, torch.ones(2)), *messages(2, nan), *messages(3, torch.ones(70_000))]
        answers = list(session(iter([OPEN, *calls, teacher_pb2.ClientMessage(call=unknown)]), timeout=30))
        return sorted(kinds(answers))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(200)))
    assert found == [[(0, "opened"), (1, "reply"), (2, "failure"), (3, "reply"), (9, "failure")]] * 200


def test_a_session_without_a_call_ends(server, session):
    assert kinds(session(iter([OPEN]), timeout=30)) == [(0, "opened")]
    assert list(session(iter([]), timeout=30)) == []
    assert soon(lambda: not server.load("teacher").sessions)


class Stopped:
    """What a session reads from and writes to, once gRPC has stopped its server and not yet cancelled the call."""

    async def read(self):
        raise cygrpc._ServerStoppedError("Server already stopped.")

    async def write(self, _message):
        raise cygrpc._ServerStoppedError("Server already stopped.")


def test_a_session_whose_server_has_stopped_ends(server, session, monkeypatch):
    """`deaths` finds what it does not handle."""
    receive = ServerSession._receive

    async def last(held, message):
        await receive(held, message)
        held._rpc = Stopped()

    monkeypatch.setattr(ServerSession, "_receive", last)
    assert list(session(iter([OPEN]), timeout=30)) == []
    assert soon(lambda: not server._loop.busy)
