"""Values survive the trip through bundles and frames, and bad declarations take no memory."""

import itertools
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from schoolhouse_wire import framing
from schoolhouse_wire.errors import CorruptPayloadError, MessageTooLargeError, ProtocolError, UnsupportedValueError
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import teacher_pb2, values_pb2
from schoolhouse_wire.values import codec, tensors

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Point:
    x: torch.Tensor
    label: str


def trip(value, snapshot=False):
    outgoing = framing.Outgoing(value, limits=Limits(), snapshot=snapshot)
    incoming = framing.Incoming(outgoing.header, outgoing.payload, Limits())
    for message in outgoing.frames(7):
        frame = framing.read_message(teacher_pb2.ServerMessage, message)
        by_the_book = teacher_pb2.ServerMessage.FromString(message).frame
        assert (by_the_book.request_id, by_the_book.offset) == (7, frame.offset)
        assert by_the_book.data == bytes(frame.data)
        incoming.add(frame.offset, frame.data, frame.digest)
    assert incoming.complete
    assert incoming.digest == outgoing.digest
    return incoming.value()


def raw(tensor):
    """The bytes of a tensor's elements in row-major order; torch cannot copy every dtype as itself."""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.dtype.itemsize)
    plain = tensor if same_size is None else tensor.view(same_size)
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", list(tensors.DTYPES), ids=str)
def test_every_dtype(dtype):
    data = torch.arange(64, dtype=torch.uint8)
    tensor = (data % 2).to(torch.bool) if dtype == torch.bool else data.view(dtype)
    apart = tensor.view(2, -1).t()
    back = trip([tensor, tensor[:0], tensor[:1].view(()), apart])
    assert [t.dtype for t in back] == [dtype] * 4
    assert torch.equal(raw(back[3]), raw(apart))
    assert back[0].shape == tensor.shape
    assert back[1].shape == (0,)
    assert back[2].shape == ()
    assert torch.equal(raw(back[0]), raw(tensor))


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("alone", [True, False])
def test_the_order_of_dimensions_in_memory(rank, alone):
    for order in itertools.permutations(range(rank)):
        memory = torch.randn([order[i] + 2 for i in range(rank)])  # sizes 2, 3, ... of dimensions 0, 1, ...
        tensor = memory.permute([order.index(dim) for dim in range(rank)])
        back = trip([tensor])[0] if alone else trip({"here": [tensor, "x"]})["here"][0]
        assert back.shape == tensor.shape == torch.Size(range(2, rank + 2))
        assert back.stride() == tensor.stride()
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("tensor", [torch.ones(3, 1).expand(3, 4), torch.arange(24.0).view(4, 6)[:, 1:4]])
def test_what_has_gaps_or_overlaps_becomes_row_major(tensor):
    back = trip([tensor])[0]
    assert back.is_contiguous()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.complex128])
def test_one_element_or_none_may_have_any_stride(dtype):
    large = torch.zeros(1 << 17, dtype=torch.uint8)  # so that the payload travels in frames
    one, none = torch.arange(4).to(dtype)[3::2], torch.zeros(4, dtype=dtype)[4::2]
    assert (one.stride(), none.stride()) == ((2,), (2,))
    for value in ([one, none], [large, one, none]):
        for snapshot in (True, False):
            back = trip(value, snapshot=snapshot)
            assert [t.tolist() for t in back] == [t.tolist() for t in value]


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [0, 1, 2], [1, 0, 0]])
def test_a_wrong_order_of_dimensions_is_refused(order):
    bundle = values_pb2.Bundle()
    bundle.root.list.items.add().tensor = 0
    bundle.tensors.add(dtype=values_pb2.FLOAT32, shape=[2, 3], dim_order=order)
    with pytest.raises(ProtocolError, match="rank 2"):
        codec.read_layout(bundle.SerializeToString(), Limits())


def test_the_table_of_dtypes_is_whole():
    quantized = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert set(tensors.DTYPES) == every - quantized


def test_structures():
    value = {
        "t": (1, -2.5, "x", None, True, 2**90, 1j, b"raw"),
        3: [torch.randn(3, 4).t(), torch.randn(4).expand(2, 4)],
        ("a", 1): Pair(torch.ones(2), 1),
        "p": Point(torch.zeros(0, 3), "l"),
    }
    back = trip(value)
    assert back["t"] == value["t"]
    assert [type(v) for v in back["t"]] == [type(v) for v in value["t"]]
    assert all(torch.equal(a, b) for a, b in zip(back[3], value[3], strict=True))
    assert type(back["a", 1]) is Pair
    assert type(back["p"]) is Point
    assert back["p"].x.shape == (0, 3)


def test_values_without_tensors():
    assert trip((1, "a")) == (1, "a")


def test_model_output():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=torch.ones(2))
    back = trip(value)
    assert type(back) is outputs.BaseModelOutput
    assert back.attentions is None
    assert torch.equal(back[0], torch.ones(2))


def test_a_type_that_is_not_here_has_attributes():
    gone = namedtuple("gone", "logits loss")
    gone.__qualname__ = "Nowhere"
    back = trip(gone(torch.ones(1), 2))
    assert back.loss == 2
    empty = trip(gone(None, 3))
    assert empty.logits is None
    assert list(empty) == ["loss"]
    assert back["logits"] is back[0] is back.logits


def test_large_payloads_travel_in_frames():
    value = [torch.randn(700_000), torch.randn(3), torch.randn(600_001)]
    assert all(torch.equal(a, b) for a, b in zip(trip(value), value, strict=True))


def test_corruption_is_found():
    outgoing = framing.Outgoing(torch.randn(100_000), limits=Limits(), snapshot=False)
    incoming = framing.Incoming(outgoing.header, outgoing.payload, Limits())
    (message,) = outgoing.frames(1)
    frame = framing.read_message(teacher_pb2.ServerMessage, message)
    data = bytearray(frame.data)
    data[5000] ^= 1
    with pytest.raises(CorruptPayloadError):
        incoming.add(0, memoryview(data), frame.digest)


def test_frames_out_of_order_are_refused():
    outgoing = framing.Outgoing(torch.randn(600_000), limits=Limits(), snapshot=False)
    incoming = framing.Incoming(outgoing.header, outgoing.payload, Limits())
    frames = [framing.read_message(teacher_pb2.ServerMessage, m) for m in outgoing.frames(1)]
    with pytest.raises(ProtocolError):
        incoming.add(frames[1].offset, frames[1].data, frames[1].digest)


def test_declared_sizes_are_checked_before_memory_is_taken():
    bundle = values_pb2.Bundle()
    bundle.root.tensor = 0
    bundle.tensors.add(dtype=values_pb2.FLOAT32, shape=[1 << 40, 1 << 20])
    with pytest.raises(MessageTooLargeError, match="over the limit"):
        framing.Incoming(bundle.SerializeToString(), teacher_pb2.Payload(), Limits())


UNSUPPORTED = {
    "object": lambda: object(),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    "set": lambda: {"k": [set()]},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("inside", [lambda value: value, lambda value: [value]])
def test_unsupported_values_say_where(name, inside):
    value = inside(UNSUPPORTED[name]())
    with pytest.raises(UnsupportedValueError, match="value.*cannot travel"):
        codec.pack(value)


def test_the_deepest_nesting_travels():
    value = deep = []
    for _ in range(Limits.max_nesting - 1):
        deep.append([])
        deep = deep[0]
    deep.append(1)
    assert trip(value) == value
    with pytest.raises(MessageTooLargeError, match="nested"):
        codec.pack([value])


def test_endless_nesting_is_refused():
    value = []
    value.append(value)
    with pytest.raises(MessageTooLargeError, match="nested"):
        codec.pack(value)
