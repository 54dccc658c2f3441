"""What a replica does not take: each limit refuses by a typed error, before memory or time is spent on it."""

import abc
import concurrent.futures
import dataclasses
import socket
import time

import grpc
import pytest
import schoolhouse as sh
import torch
import xxhash
from fuzzing import Tiny
from memfd import soon
from models import Net
from schoolhouse import errors
from schoolhouse_server import receiving, serve, server_session
from schoolhouse_server.replica import Replica
from schoolhouse_wire import channel, codec, framing, status
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.v1 import teacher_pb2, values_pb2
from stub import Stub
from torch import nn


def received(bundle, data=b"", limits=None):
    header = bundle.SerializeToString()
    digest = xxhash.xxh3_128_digest(header + data)
    return framing.Incoming(header, teacher_pb2.Payload(digest=digest, data=data), limits or Limits()).value()


def declared(**tensor):
    bundle = values_pb2.Bundle()
    bundle.root.list.items.add().tensor = 0
    bundle.tensors.add(**tensor)
    return bundle


def listed(count):
    bundle = values_pb2.Bundle()
    bundle.root.list.items.extend([values_pb2.Value(none=values_pb2.Nothing())] * count)
    return bundle


def test_an_empty_tensor_cannot_stand_for_a_large_one():
    assert received(declared(dtype=values_pb2.FLOAT32, shape=[0, 1 << 30]))[0].shape == (0, 1 << 30)
    with pytest.raises(errors.MessageTooLargeError, match="empty tensor"):  # its sum over 0 would be of 4 TiB
        received(declared(dtype=values_pb2.FLOAT32, shape=[0, 1 << 40]))


def test_a_structure_of_too_many_values():
    most = Limits().max_values
    assert received(listed(most - 1)) == [None] * (most - 1)
    with pytest.raises(errors.MessageTooLargeError, match=f"more than {most} values"):
        received(listed(most))
    with pytest.raises(errors.MessageTooLargeError, match="header"):
        received(listed(Limits().max_header_bytes // 4))


@pytest.mark.parametrize("kind", ["tuple", "dict", "record", "arguments", "keyword"])
def test_values_are_counted_wherever_they_stand(kind):
    bundle, text = values_pb2.Bundle(), values_pb2.Value(text="x" * 40_000)
    within = {
        "tuple": bundle.root.tuple.items,
        "dict": bundle.root.dict.values,
        "record": bundle.root.record.values,
        "arguments": bundle.root.arguments.positional,
    }.get(kind)
    if within is not None:
        within.extend([text] * 10)
    else:
        for i in range(10):
            bundle.root.arguments.keyword[str(i)].CopyFrom(text)
    with pytest.raises(errors.MessageTooLargeError, match="more than 10 values"):
        codec.read_layout(bundle.SerializeToString(), Limits(max_values=10))


def test_an_integer_of_too_many_bytes():
    most = 2 ** (8 * 1024 - 1) - 1
    assert received(values_pb2.Bundle.FromString(codec.pack(most).header)) == most
    with pytest.raises(errors.UnsupportedValueError, match="over 1024 bytes"):
        codec.pack(most + 1)
    bundle = values_pb2.Bundle()
    bundle.root.big_integer = bytes(1025)
    with pytest.raises(errors.MessageTooLargeError, match="1024 bytes"):
        received(bundle)


def test_keys_that_collide_are_few():
    """All multiples of 2**61 - 1 have the hash 0: a dict of n of them takes the square of n."""
    bundle = values_pb2.Bundle()
    for i in range(1025):
        bundle.root.dict.keys.add().big_integer = (i * (2**61 - 1)).to_bytes(16, "little")
        bundle.root.dict.values.add().boolean = True
    with pytest.raises(errors.MessageTooLargeError, match="1024 keys that are not strings"):
        received(bundle)
    assert len(received(values_pb2.Bundle.FromString(codec.pack({str(i): i for i in range(2000)}).header))) == 2000


@pytest.mark.parametrize("key", [{"list": {}}, {"record": {}}, {"opaque": "x"}, {"tuple": {"items": [{"list": {}}]}}])
def test_keys_are_scalars(key):
    bundle = values_pb2.Bundle()
    bundle.root.dict.keys.add().CopyFrom(values_pb2.Value(**key))
    bundle.root.dict.values.add().boolean = True
    with pytest.raises(errors.CorruptPayloadError, match="key"):
        received(bundle)


def test_a_bool_is_0_or_1():
    bundle = declared(dtype=values_pb2.BOOL, shape=[4])
    assert received(bundle, b"\0\1\1\0")[0].tolist() == [False, True, True, False]
    with pytest.raises(errors.CorruptPayloadError, match="neither 0 nor 1"):
        received(bundle, b"\0\1\2\0")


def test_an_order_of_far_more_dimensions_than_there_are():
    bundle = declared(dtype=values_pb2.FLOAT32, shape=[2], dim_order=range(1_000_000))
    with pytest.raises(errors.ProtocolError, match="rank 1"):
        received(bundle)


@dataclasses.dataclass
class Abstract(abc.ABC):
    x: int

    @abc.abstractmethod
    def make(self): ...


def test_records_that_cannot_be_made():
    bundle = values_pb2.Bundle()
    record = bundle.root.record
    record.kind, record.type_name = values_pb2.Record.DATACLASS, f"{__name__}.Abstract"
    record.names.append("x")
    record.values.add().integer = 1
    with pytest.raises(errors.CorruptPayloadError, match="Abstract"):
        received(bundle)
    record.type_name = "." * 1025
    with pytest.raises(errors.MessageTooLargeError, match="1024 characters"):
        received(bundle)


def test_frames_without_data_lead_nowhere():
    outgoing = framing.Outgoing(torch.randn(100_000), limits=Limits(), snapshot=False)
    incoming = framing.Incoming(outgoing.header, outgoing.payload, Limits())
    with pytest.raises(errors.ProtocolError, match="does not follow"):
        incoming.add(0, memoryview(b""), b"")


# What a live replica refuses.


def inline(value):
    outgoing = framing.Outgoing(value, limits=Limits(), snapshot=True)
    return {"inputs": outgoing.header, "payload": outgoing.payload}


@pytest.mark.parametrize("field", ["teacher", "job", "revision"])
def test_names_that_are_too_long_to_open(field):
    with serve(Tiny()) as server, pytest.raises(grpc.RpcError) as caught:
        Stub(server, shared_memory=False, **{field: "é" * 257})
    error = status.from_rpc_error(caught.value, "it")
    assert type(error) is errors.ProtocolError
    assert "257 characters; 256 are allowed" in error.message


def long_calls():
    tap = {"module": "", "side": teacher_pb2.Tap.OUTPUT}
    hidden = teacher_pb2.Encoding(hidden=teacher_pb2.Hidden(head="x" * 1025))
    return {
        "tap": {"taps": [tap | {"module": "x" * 1025}]},
        "head": {"taps": [tap | {"encoding": hidden}]},
        "revision": {"taps": [tap], "revision": "x" * 257},
        "traceparent": {"taps": [tap], "traceparent": "x" * 257},
        "4097 taps": {"taps": [tap | {"module": str(i)} for i in range(4097)]},
    }


def test_calls_of_too_much_fail_alone():
    with serve(Tiny()) as server:
        stub = Stub(server, shared_memory=False)
        for i, (what, call) in enumerate(long_calls().items()):
            stub.say(call=teacher_pb2.Call(request_id=i, **inline(Arguments([torch.ones(1, 4)])), **call))
            answer = next(stub.answers)
            assert answer.failure.code == teacher_pb2.Failure.PROTOCOL
            assert what in answer.failure.message
        assert stub.call(9, **to_payload(Arguments([torch.ones(1, 4)]))).reply.request_id == 9
        stub.channel.close()


def to_payload(value):
    made = inline(value)
    return {"payload": made["payload"], "header": made["inputs"]}


def test_a_message_that_releases_more_blocks_than_there_can_be():
    with serve(Tiny()) as server:
        stub = Stub(server, shared_memory=False)
        stub.say(released=range(65_537))
        with pytest.raises(grpc.RpcError, match="releases 65537 blocks; 65536 are allowed"):
            next(stub.answers)
        stub.channel.close()


@pytest.mark.parametrize("method", ["Session", "Describe"])
def test_what_cannot_be_parsed_is_answered_by_what_is_wrong(method, caplog):
    with serve(Tiny()) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain:
        call = plain.stream_unary(f"/schoolhouse.v1.TeacherService/{method}")  # which is no other on the wire
        with pytest.raises(grpc.RpcError) as caught:
            call(iter([b"\xff\xff"]), timeout=20)
    error = status.from_rpc_error(caught.value, "it")
    assert type(error) is errors.ProtocolError
    assert "cannot be parsed" in error.message
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_compressed_messages_are_not_inflated():
    with serve(Tiny()) as server:
        target = f"127.0.0.1:{server.port}"
        with grpc.insecure_channel(target, compression=grpc.Compression.Gzip) as plain:
            with pytest.raises(grpc.RpcError) as caught:
                plain.unary_unary("/schoolhouse.v1.TeacherService/Describe")(bytes(1 << 20), timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_message_that_is_too_large():
    with serve(Tiny()) as server:
        stub = Stub(server, shared_memory=False, options=[("grpc.max_send_message_length", -1)])
        stub.say(open=teacher_pb2.Open(job="x" * (channel.MAX_MESSAGE_BYTES + 1)))
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.answers)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        stub.channel.close()


def test_what_is_wrong_is_told_however_long_it_is():
    names = {f"{i:03}" + "é" * 253: nn.Identity() for i in range(20)}
    with serve(names) as server, pytest.raises(grpc.RpcError) as caught:
        Stub(server, shared_memory=False, teacher="ü" * 256)
    error = status.from_rpc_error(caught.value, "it")
    assert type(error) is errors.UnknownTeacherError
    assert "no teacher 'üü" in error.message


def test_what_a_model_says_may_be_what_utf8_cannot_carry():
    class Odd(nn.Module):
        def forward(self, x):
            raise ValueError("lone \ud800 surrogate")

    with serve(Odd()) as server, sh.connect(server.url) as teacher:
        with pytest.raises(errors.TeacherForwardError, match=r"lone \\ud800 surrogate"):
            teacher.submit((torch.ones(1),), {}, [""]).result(20)


# Who takes their time, or comes too often.


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
    outbox = Outbox()  # which does not end
    outbox.put(iter([opening]))
    stream = session(outbox, timeout=timeout)
    if timeout > 1:
        next(stream)
    stream.add_callback(outbox.close)
    return stream


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
        assert soon(lambda: server._teachers.sessions == 1)
        Stub(server, shared_memory=False).channel.close()
        stubs[1].channel.close()


def test_a_client_beyond_the_sessions_of_a_replica_waits_for_one_to_end():
    with serve(nn.Identity(), max_sessions=1) as server:
        first, x = sh.connect(server.url), torch.ones(1, 8)
        first.submit((x,), {}, [""]).result(20)
        with sh.connect(server.url, teacher_timeout_s=1) as late, pytest.raises(errors.TeacherUnavailableError) as told:
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
    with serve(Net()) as server, sh.connect(server.url, shared_memory=False) as teacher:
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
