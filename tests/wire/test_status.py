"""What a peer says of its failure, and one that says it so that nobody can read it."""

import threading

import grpc
import pytest
import schoolhouse as sh
from directories import DirectoryServer, Scale, addresses, answer, replicas, sessions
from hypothesis import given, settings
from hypothesis import strategies as st
from memfd import soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_server.replica.directory import Directory
from schoolhouse_server.session.server_session import ServerSession
from schoolhouse_wire.rpc import status
from schoolhouse_wire.v1 import teacher_pb2
from traps import Trap

KEY = "schoolhouse-failure-bin"


class Said(grpc.RpcError):
    """An RPC's end, as gRPC tells of it."""

    def __init__(self, trailers, code=grpc.StatusCode.UNAVAILABLE, details="gone"):
        self.trailing_metadata = lambda: trailers
        self.code, self.details = lambda: code, lambda: details


@settings(max_examples=100, deadline=None)
@given(
    trailers=st.none()
    | st.lists(st.tuples(st.sampled_from([KEY, "x"]), st.binary() | st.text() | st.none()), max_size=3),
    code=st.sampled_from([*grpc.StatusCode, None, 14]),
    details=st.none() | st.text() | st.binary(),
)
def test_whatever_a_peer_says_of_its_failure_is_a_typed_error(trailers, code, details):
    error = status.from_rpc_error(Said(trailers, code, details), "host:1")
    assert isinstance(error, errors.SchoolhouseError)
    assert error.message


@pytest.mark.parametrize("wrong", [b"\xff\xff", b"\x0a", "text", None, 5, b"\x1a\x02\xff\xff"], ids=repr)
def test_a_failure_that_cannot_be_read_breaks_the_contract(wrong):
    error = status.from_rpc_error(Said([(KEY, wrong)]), "host:1")
    assert type(error) is errors.ProtocolError
    assert "host:1" in error.message


def test_a_failure_of_any_size_is_as_long_as_one_of_ours():
    huge = teacher_pb2.Failure(code=teacher_pb2.Failure.BUSY, message="m" * 10**5, choices=["c" * 5000] * 1000)
    error = status.from_rpc_error(Said([(KEY, huge.SerializeToString())]), "host:1")
    assert type(error) is errors.TeacherBusyError
    assert len(error.message) == 4097
    assert [len(choice) for choice in error.choices] == [4097] * 20
    ours_ = status.from_failure(status.to_failure(errors.UnknownTapError("m" * 5000, choices=["c"] * 30)))
    assert (len(ours_.message), len(ours_.choices)) == (4097, 20)
    assert len(status.from_rpc_error(Said(None, details="d" * 10**6), "host:1").message) == 4097


def test_an_error_that_says_nothing_at_all_is_one():
    assert type(status.from_rpc_error(grpc.RpcError(), "host:1")) is errors.ProtocolError
    assert status.from_rpc_error(Said([(KEY, b"")]), "host:1").message == "no reason was given"


def malformed(context, _error=None):
    context.set_trailing_metadata(((KEY, b"\xff\xff"),))
    context.set_code(grpc.StatusCode.UNAVAILABLE)
    context.set_details("gone")


@pytest.mark.parametrize("shared", [True, False], ids=["pipes", "stream"])
def test_a_session_whose_end_cannot_be_read_is_opened_again(shared, monkeypatch):
    trap = Trap(monkeypatch, ServerSession, "_on_call", errors.TeacherUnavailableError("a restart"))
    monkeypatch.setattr(status, "end", malformed)
    with (
        serve(Scale(2)) as server,
        sh.connect(
            server.url, transport=sh.Transport(shared_memory=shared), timeouts=sh.Timeouts(request_s=20)
        ) as teacher,
    ):
        for i in range(3):
            trap.set()
            assert answer(teacher, i) == 2 * i
            assert trap.sprung.is_set()


def test_a_watch_whose_end_cannot_be_read_begins_again(monkeypatch):
    broken, watch = threading.Event(), Directory.Watch

    async def watched(self, request, context):
        if not broken.is_set():
            broken.set()
            malformed(context)
            return
        async for found in watch(self, request, context):
            yield found

    monkeypatch.setattr(Directory, "Watch", watched)
    with replicas(Scale(2), Scale(2)) as (one, other), DirectoryServer() as directory:
        directory.publish(one)
        with sh.connect(directory.url) as teacher:
            assert answer(teacher) == 2
            assert broken.wait(20)
            directory.publish(other)
            assert soon(lambda: answer(teacher) == 2 and sessions(teacher) == addresses(other))
