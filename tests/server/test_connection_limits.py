"""Connections, streams and sessions are bounded, and those that say nothing, or dribble, are ended in time."""

import asyncio
import concurrent.futures
import contextlib
import gc
import socket
import time

import grpc
import pytest
import schoolhouse as sh
import torch
from ends import Said, loop
from fuzzing import Tiny
from memfd import no_collector, soon
from models import Net
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_server.replica.replica import Replica
from schoolhouse_server.session import receiving, server_session
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub, to_payload
from torch import nn


def limited(monkeypatch, **changed):
    """Servers with other options than they would have."""
    changed = {f"grpc.{name}": value for name, value in changed.items()}
    kept = [(name, value) for name, value in channel.SERVER_OPTIONS if name not in changed]
    assert len(kept) + len(changed) == len(channel.SERVER_OPTIONS)  # each is set, and to something
    monkeypatch.setattr(channel, "SERVER_OPTIONS", [*kept, *changed.items()])


@pytest.fixture
def impatient(monkeypatch):
    """Servers that wait for less than they would."""
    limited(monkeypatch, server_handshake_timeout_ms=500, max_connection_idle_ms=500)


@pytest.fixture
def narrow(monkeypatch):
    """Servers that take less than they would."""
    limited(monkeypatch, max_allowed_incoming_connections=3, max_concurrent_streams=2)


PREFACE, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\4\0\0\0\0\0"


def test_connections_that_say_nothing_are_closed(impatient):
    with serve(Tiny()) as server:
        for said in (b"", PREFACE[:10], PREFACE + SETTINGS):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
                silent.sendall(said)
                while silent.recv(4096):  # it says what it is, and then that it has ended
                    pass


def test_connections_are_few(narrow):
    with serve(Tiny()) as server:
        stubs = [Stub(server, shared_memory=False) for _ in range(3)]
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as fourth, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(fourth).result(1)
        for stub in stubs:
            stub.channel.close()
        assert soon(lambda: is_taken(server))  # once the server has seen that they are gone


def is_taken(server):
    try:
        stub = Stub(server, shared_memory=False)
    except grpc.RpcError:
        return False
    stub.channel.close()
    return True


def test_streams_of_a_connection_are_few(narrow):
    with serve(Tiny()) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain:
        opening = teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher"))
        streams = [open_stream(plain, opening) for _ in range(2)]
        with pytest.raises(grpc.RpcError) as caught:
            next(open_stream(plain, opening, timeout=1))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # it waits, on the client's side
        assert server.load("teacher").sessions == 2
        streams[0].cancel()
        open_stream(plain, opening)


def open_stream(plain, opening, timeout=20):
    session = plain.stream_stream(channel.SESSION_METHOD, request_serializer=framing.write_message)
    outbox = Said()  # which does not end
    outbox.put(iter([opening]))
    stream = session(iter(outbox), timeout=timeout)
    if timeout > 1:
        next(stream)
    stream.add_callback(outbox.close)
    return stream


@pytest.mark.parametrize("end", ["cancel", "error", "half-close"])
def test_sessions_that_ended_are_no_streams_of_their_connection_any_more(end):
    """gRPC counts a call for as long as Python holds it, and refuses those beyond the limit."""
    opening = teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher"))
    wrong = teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=0))
    with serve(Tiny()) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain, no_collector():
        session = plain.stream_stream(channel.SESSION_METHOD, request_serializer=framing.write_message)
        for _ in range(200):  # of 64
            if end == "cancel":
                open_stream(plain, opening).cancel()
            elif end == "error":
                with pytest.raises(grpc.RpcError, match="protocol 0"):
                    list(session(iter([wrong]), timeout=20))
            else:
                assert len(list(session(iter([opening]), timeout=20))) == 1
        calls = [found for found in gc.get_objects() if type(found).__name__ == "_ServicerContext"]
        assert len(calls) <= 5  # those that are about to end


def test_sessions_are_few_and_leave_room_for_other_calls():
    with Replica({"teacher": Tiny()}, max_sessions=2) as server:
        stubs = [Stub(server, shared_memory=False) for _ in range(2)]
        with pytest.raises(grpc.RpcError) as caught:
            Stub(server, shared_memory=False)
        error = status.from_rpc_error(caught.value, "it")
        assert type(error) is errors.TeacherBusyError
        assert "max_sessions is 2, and as many are open at this replica" in error.message
        describe = stubs[0].channel.unary_unary(
            "/schoolhouse.v1.TeacherService/Describe",
            request_serializer=teacher_pb2.DescribeRequest.SerializeToString,
            response_deserializer=teacher_pb2.DescribeResponse.FromString,
        )
        assert describe(teacher_pb2.DescribeRequest(teacher="teacher"), timeout=20).max_in_flight
        stubs[0].channel.close()
        assert soon(lambda: server._servicer.sessions == 1)
        Stub(server, shared_memory=False).channel.close()
        stubs[1].channel.close()


def test_the_reason_of_a_refusal_is_not_lost_while_the_client_writes():
    """gRPC's aio client has an internal error in place of a status that comes in the middle of a write."""
    opening = teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher"))

    async def refused(address):
        async with grpc.aio.insecure_channel(address) as opened:
            for _ in range(200):
                call = channel.with_its_own_status(opened.stream_stream(channel.SESSION_METHOD)())
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    for _ in range(3):
                        await call.write(opening.SerializeToString())
                yield await call.code()

    async def codes(address):
        return {code async for code in refused(address)}

    with Replica({"teacher": Tiny()}, max_sessions=1) as server:
        stub = Stub(server, shared_memory=False)
        found = loop().run(codes(f"127.0.0.1:{server.port}")).result(60)
        assert found == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        stub.channel.close()


def test_a_client_beyond_the_sessions_of_a_replica_waits_for_one_to_end():
    with serve(nn.Identity(), max_sessions=1) as server:
        first, x = sh.connect(server.url), torch.ones(1, 8)
        first.submit((x,), {}, [""]).result(20)
        with (
            sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=1)) as late,
            pytest.raises(errors.TeacherUnavailableError) as told,
        ):
            late.submit((x,), {}, [""]).result(20)
        assert "max_sessions is 1, and as many are open at this replica" in str(told.value)
        with sh.connect(server.url) as patient:
            waiting = patient.submit((x,), {}, [""])
            assert not concurrent.futures.wait([waiting], 0.5).done
            first.close()
            assert waiting.result(20)


def test_a_payload_that_dribbles_in_is_dropped_and_the_session_goes_on(monkeypatch):
    monkeypatch.setattr(receiving, "SLOWEST_BYTES_S", 1 << 20)
    outgoing = framing.Outgoing(Arguments([torch.ones(50_000, 8)]), limits=Limits(), snapshot=True)  # 1.6 MB
    tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
    with serve(Net(), lease_s=3) as server:
        stub = Stub(server, shared_memory=False)
        began = time.monotonic()
        stub.say(call=teacher_pb2.Call(request_id=1, taps=[tap], inputs=outgoing.header))
        for at in range(1000):
            frame = framing.write_frame(1, at, b"", [memoryview(b"\0")])
            stub.outbox.put(iter([frame]))
            time.sleep(0.05)
            if server.load("teacher").errors:
                break
        assert 4.4 < time.monotonic() - began < 40  # 3 s, and 1.5 for the bytes
        answer = next(stub.answers)
        assert (answer.failure.request_id, answer.failure.code) == (1, teacher_pb2.Failure.TIMEOUT)
        assert "1600000 bytes have not come within 4.5 s" in answer.failure.message
        assert soon(lambda: not any(job.in_flight for job in server.load("teacher").jobs))
        assert stub.call(2, **to_payload(Arguments([torch.ones(1, 8)]))).reply.request_id == 2
        stub.channel.close()


def test_a_payload_that_comes_in_time_is_not_dropped_later(monkeypatch):
    begun = []

    class Remembered(receiving.Receiving):
        def begin(self, partial):
            super().begin(partial)
            begun.append(self._partial[partial.call.request_id])

    monkeypatch.setattr(server_session, "Receiving", Remembered)
    with serve(Net()) as server, sh.connect(server.url, transport=sh.Transport(shared_memory=False)) as teacher:
        x = torch.ones(50_000, 8)
        assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""], Net().eval()(x))
        [(partial, alarm)] = begun
        assert partial.incoming.nbytes == x.nbytes
        assert alarm.ring is None  # it was to ring when the payload was late
        assert not server.load("teacher").errors


def test_open_must_come_even_where_a_client_may_be_silent_for_ever(monkeypatch):
    monkeypatch.setattr(server_session, "LEASE_S", 0.3)
    with serve(Tiny(), lease_s=0) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain:
        waits = (time.sleep(5) or b"" for _ in range(1))
        with pytest.raises(grpc.RpcError, match=r"said nothing for 0\.3 s"):
            next(plain.stream_stream(channel.SESSION_METHOD)(waits, timeout=20))
