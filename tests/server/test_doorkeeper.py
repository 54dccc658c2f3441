"""Calls whose request does not come: they hold nobody else up, whoever makes them, and end in time."""

import threading
import time

import grpc
import pytest
import schoolhouse as sh
from memfd import no_collector
from schoolhouse_server.replica.replica import Replica
from schoolhouse_server.security import interceptor
from schoolhouse_server.security.tokens import digest_of, new_token
from schoolhouse_wire.v1 import directory_pb2
from torch import nn

TOKEN = new_token()
DESCRIBE, CHECK = "/schoolhouse.v1.TeacherService/Describe", "/grpc.health.v1.Health/Check"
WATCH = "/schoolhouse.v1.DirectoryService/Watch"


@pytest.fixture
def server(tmp_path):
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f'tokens:\n- {{sha256: "{digest_of(TOKEN)}", teachers: ["*"]}}\n')
    with Replica({"t": nn.Linear(4, 4)}, tokens=tokens, max_sessions=8) as found:
        yield found


@pytest.fixture
def call(server):
    """Begins a call of a method whose requests are given."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=options) as opened:
        yield lambda method, requests, **settings: opened.stream_stream(method)(requests, **settings)


def nothing(until):
    until.wait(60)
    yield from ()


@pytest.mark.parametrize("method", [DESCRIBE, CHECK, WATCH])
def test_calls_without_a_token_or_a_request_keep_nobody_out(server, call, method):
    end = threading.Event()
    calls = [call(method, nothing(end)) for _ in range(2 * 8 + 16)]  # as many as the server takes at once
    if method != CHECK:  # of which some may wait a while
        assert {one.code() for one in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    else:
        while sum(one.done() for one in calls) < 16:
            time.sleep(0.01)
    with sh.connect(server.url, security=sh.Security(token=TOKEN)):
        pass
    end.set()


@pytest.mark.parametrize("method", [DESCRIBE, CHECK])
def test_a_request_that_does_not_come_in_time_is_waited_for_no_longer(monkeypatch, tmp_path, method):
    monkeypatch.setattr(interceptor.Doorkeeper.__init__, "__defaults__", (0.3,))
    end = threading.Event()
    with (
        Replica({"t": nn.Linear(4, 4)}) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened,
    ):
        stalled = opened.stream_stream(method)(nothing(end), timeout=20)
        assert stalled.code() is grpc.StatusCode.CANCELLED
    end.set()


def test_a_call_without_a_request_is_told_so(call):
    made = call(DESCRIBE, iter(()), metadata=[("authorization", f"Bearer {TOKEN}")], timeout=20)
    assert made.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "without its request" in made.details()


def test_a_request_that_cannot_be_parsed_is_told_so(call):
    made = call(WATCH, iter([b"\xff"]), metadata=[("authorization", f"Bearer {TOKEN}")], timeout=20)
    assert made.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "cannot be parsed" in made.details()


def test_who_watches_is_told_for_longer_than_a_request_may_take(monkeypatch):
    monkeypatch.setattr(interceptor.Doorkeeper.__init__, "__defaults__", (0.3,))
    with Replica({"t": nn.Linear(4, 4)}) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        request = directory_pb2.WatchRequest(teacher="t").SerializeToString()
        watch = opened.unary_stream(WATCH)(request, timeout=20)
        assert directory_pb2.ReplicaSet.FromString(next(watch)).teacher == "t"
        time.sleep(0.4)  # nothing ends it when the request would have been late
        server.drain(10.0)
        assert directory_pb2.ReplicaSet.FromString(next(watch)).replicas[0].state == directory_pb2.Replica.DRAINING
        watch.cancel()


@pytest.mark.parametrize(
    ("method", "request_", "known", "code"),
    [
        (DESCRIBE, b"\xff", True, "FAILED_PRECONDITION"),
        (DESCRIBE, b"\x0a\x01x", True, "NOT_FOUND"),
        (DESCRIBE, b"\x0a\x01t", False, "UNAUTHENTICATED"),
        (WATCH, b"\x0a\x01x", True, "NOT_FOUND"),
    ],
)
def test_calls_that_failed_are_no_streams_of_their_connection_any_more(call, method, request_, known, code):
    """gRPC counts a call for as long as Python holds it, and refuses those beyond the limit, of 64."""
    metadata = [("authorization", f"Bearer {TOKEN if known else new_token()}")]
    with no_collector():
        assert {call(method, iter([request_]), metadata=metadata, timeout=20).code().name for _ in range(150)} == {code}
