"""Places that are bounded, of sessions, watches and calls: who holds many keeps nobody out."""

import contextlib
import itertools
import threading

import grpc
import pytest
import schoolhouse as sh
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memfd import soon
from schoolhouse_server.cli import probe
from schoolhouse_server.replica.replica import Replica
from schoolhouse_server.security import places as module
from schoolhouse_server.security.places import Places
from schoolhouse_server.security.tokens import digest_of, new_token
from schoolhouse_wire import framing
from schoolhouse_wire.errors import TeacherBusyError, TeacherUnavailableError
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from torch import nn

GREEDY, HONEST = new_token(), new_token()
WATCH = "/schoolhouse.v1.DirectoryService/Watch"
LIST = "/schoolhouse.v1.DirectoryService/ListTeachers"


class Held:
    """A place of `places`, until it is closed or taken away."""

    def __init__(self, places, holder, idle_since=float("inf")):
        self.error, self.stack = None, contextlib.ExitStack()
        self.stack.enter_context(places.held(holder, self.end, lambda: idle_since))

    def end(self, error):
        self.error = error


def test_who_has_most_gives_one_up_for_who_has_none():
    places = Places(4, "it is full")
    many = [Held(places, "greedy", idle_since=at) for at in (3.0, float("inf"), 1.0, float("inf"))]
    first = Held(places, "honest")
    assert [type(one.error) for one in many] == [type(None), type(None), TeacherUnavailableError, type(None)]
    second = Held(places, "honest")
    assert many[0].error is not None  # the next that was idle
    with pytest.raises(TeacherBusyError, match="it is full"):  # two each
        Held(places, "honest")
    Held(places, "third")
    assert many[1].error is not None  # of those at work the oldest
    assert first.error is None
    assert second.error is None
    assert len(places) == 4


def test_who_is_idle_gives_its_place_up_but_not_for_one_who_has_more(monkeypatch):
    monkeypatch.setattr(module, "time", type("Time", (), {"monotonic": lambda: 100.0}))
    places = Places(2, "it is full")
    one, other = Held(places, "a", idle_since=80.0), Held(places, "b", idle_since=95.0)
    third = Held(places, "c", idle_since=95.0)
    assert one.error is not None
    assert other.error is third.error is None
    with pytest.raises(TeacherBusyError, match="it is full"):  # nobody has been idle for long
        Held(places, "c")
    other.stack.close()
    others = Held(places, "c", idle_since=0.0)
    fourth = Held(places, "d", idle_since=0.0)
    assert others.error is not None
    with pytest.raises(TeacherBusyError, match="it is full"):  # `d` would have fewer than `c`
        Held(places, "c")
    assert fourth.error is None


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 8))
def test_nobody_is_kept_out_by_one_who_has_more(holders, most):
    places, held = Places(most, "it is full"), []
    for holder in holders:
        mine = [one for one in held if one.error is None]
        counts = {name: sum(one.holder == name for one in mine) for name in "abc"}
        try:
            one = Held(places, holder)
        except TeacherBusyError:
            assert len(mine) == most
            assert max(counts.values()) <= counts[holder] + 1
            continue
        one.holder = holder
        held.append(one)
        assert len(places) <= most
        assert len(places) == sum(one.error is None for one in held)


@pytest.fixture
def server(tmp_path):
    tokens = tmp_path / "tokens.yaml"
    entry = '- {{sha256: "{}", job: {}, teachers: ["*"], max_in_flight: 1}}\n'
    lines = (entry.format(digest_of(token), job) for token, job in ((GREEDY, "greedy"), (HONEST, "honest")))
    tokens.write_text("tokens:\n" + "".join(lines))
    with Replica({"t": nn.Linear(4, 4)}, tokens=tokens, max_sessions=8) as found:
        yield found


def opened(server, token):
    """Begins streams of a method, with a token, over a connection of its own."""
    made = grpc.insecure_channel(f"127.0.0.1:{server.port}", options=[("grpc.use_local_subchannel_pool", 1)])
    metadata = [("authorization", f"Bearer {token}")]
    return made, lambda method, requests: made.stream_stream(method)(requests, metadata=metadata, timeout=60)


def opening(until):
    """Open, and then the client says only that it lives."""
    yield teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="t")).SerializeToString()
    while not until.wait(0.5):
        yield teacher_pb2.ClientMessage(renew=teacher_pb2.Renew()).SerializeToString()


def first_of(call):
    """What comes first on a stream, or its error."""
    try:
        return framing.received(teacher_pb2.ServerMessage, next(call))
    except grpc.RpcError as err:
        return err.code()


def test_a_token_with_all_sessions_and_watches_keeps_no_other_one_out(server):
    until = threading.Event()
    made, call = opened(server, GREEDY)
    sessions = [call(channel.SESSION_METHOD, opening(until)) for _ in range(12)]
    found = [first_of(one) for one in sessions]
    assert sum(isinstance(one, teacher_pb2.ServerMessage) for one in found) == 8
    request = directory_pb2.WatchRequest(teacher="t").SerializeToString()
    watches = [call(WATCH, iter([request])) for _ in range(200)]
    assert soon(lambda: len(server._directory._watchers) == 2 * 8 + 64)
    silent = [call(LIST, silence(until)) for _ in range(80)]
    assert probe.serves(f"127.0.0.1:{server.port}", timeout_s=20)
    with sh.connect(server.url, job="honest", security=sh.Security(token=HONEST)) as teacher:
        for _ in range(5):
            assert teacher.submit((torch.ones(1, 4),), {}, [""]).result(30)[""].shape == (1, 4)
        ended = [one for one in sessions if one.done() and one.code() is grpc.StatusCode.UNAVAILABLE]
        assert len(ended) == 1
        held = [place.holder for place in server._directory._places._taken]
        assert held.count(digest_of(HONEST)) == 1
        assert len(held) == len(server._directory._watchers) == 2 * 8 + 64
    until.set()
    for one in itertools.chain(sessions, watches, silent):
        one.cancel()
    made.close()


def silence(until):
    until.wait(60)
    yield from ()


def test_a_session_at_work_is_no_idle_one(server):
    """A client that asks again and again keeps its session, while others of its token come and go."""
    until = threading.Event()
    made, call = opened(server, GREEDY)
    with sh.connect(server.url, security=sh.Security(token=GREEDY)) as teacher:
        teacher.submit((torch.ones(1, 4),), {}, [""]).result(30)
        idle = [call(channel.SESSION_METHOD, opening(until)) for _ in range(7)]
        assert all(isinstance(first_of(one), teacher_pb2.ServerMessage) for one in idle)
        teacher.submit((torch.ones(1, 4),), {}, [""]).result(30)
        assert server._servicer.sessions == 8
        with sh.connect(server.url, security=sh.Security(token=HONEST)) as other:
            other.submit((torch.ones(1, 4),), {}, [""]).result(30)
        [ended] = [one for one in idle if one.done()]
        assert ended is idle[0]
    until.set()
    for one in idle:
        one.cancel()
    made.close()
