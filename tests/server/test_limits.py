"""What a replica does not take: each limit refuses by a typed error, before memory or time is spent on it."""

import abc
import dataclasses

import grpc
import pytest
import schoolhouse as sh
import torch
import xxhash
from fuzzing import Tiny
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import teacher_pb2, values_pb2
from schoolhouse_wire.values import codec
from schoolhouse_wire.values.codec import Arguments
from stub import Stub, inline, to_payload
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
