"""Any value that can travel arrives as it was; any bytes whatever give a typed error or a value, never a crash."""

import contextlib
import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schoolhouse_wire import framing
from schoolhouse_wire.errors import SchoolhouseError
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values import codec
from schoolhouse_wire.values.tensors import DTYPES
from test_codec import Pair, raw, trip

SMALL = Limits(max_payload_bytes=1 << 20)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    data = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    tensor = data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        tensor = tensor[..., :: draw(st.integers(1, 2))]
    return tensor


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers() | st.tuples(st.integers(), st.booleans())
values = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.builds(Pair, inner, inner)
        | st.builds(
            codec.Arguments,
            st.lists(inner, max_size=3),
            st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
        )
    ),
    max_leaves=12,
)


def laid_out_alike(sent, received):
    """Dense ones have equal strides; what a copy of others has is pinned elsewhere."""
    if sent.numel() == 0 or torch.empty_like(sent).stride() != sent.stride():
        return True
    wide = [dim for dim, size in enumerate(sent.shape) if size > 1]
    return [received.stride(dim) for dim in wide] == [sent.stride(dim) for dim in wide]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b)) and laid_out_alike(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        kwargs = not isinstance(a, codec.Arguments) or same(a.kwargs, b.kwargs)
        return kwargs and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float | complex):
        return repr(a) == repr(b)
    return a == b


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_round_trip(value):
    assert same(value, trip(value))


@settings(max_examples=500, deadline=None)
@given(header=st.binary(max_size=200), data=st.binary(max_size=200), digest=st.binary(max_size=16))
def test_any_header_gives_a_typed_error_or_waits(header, data, digest):
    with contextlib.suppress(SchoolhouseError):
        framing.Incoming(header, teacher_pb2.Payload(data=data, digest=digest), SMALL)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=values, data=st.data())
def test_a_changed_byte_is_a_typed_error_or_a_value(value, data):
    outgoing = framing.Outgoing(value, limits=SMALL, snapshot=False)
    header = bytearray(outgoing.header)
    if not header:
        return
    at = data.draw(st.integers(0, len(header) - 1))
    header[at] ^= data.draw(st.integers(1, 255))
    try:
        layout = codec.read_layout(bytes(header), SMALL)
        codec.unpack(layout, bytearray(layout.nbytes), SMALL)
    except SchoolhouseError:
        pass


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"\x7a" + tail))
def test_any_message_is_parsed_or_refused(data):
    with contextlib.suppress(SchoolhouseError):
        framing.read_message(teacher_pb2.ClientMessage, data)
