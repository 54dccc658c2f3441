"""Each encoding keeps the error that it states, on any numbers, through the codec; any settings travel."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schoolhouse import encodings
from schoolhouse.sparse import decode
from schoolhouse.teachers.encoder import encode
from schoolhouse_wire.encodings import (
    Cast,
    Encoding,
    Hidden,
    PerRow,
    Sampled,
    TopK,
    encoding_from_wire,
    encoding_to_wire,
)
from schoolhouse_wire.v1 import teacher_pb2
from test_codec import trip

quick = settings(max_examples=100, deadline=None)
FLOATS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
temperatures = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False)
narrow = st.builds(Cast, dtype=st.sampled_from([torch.bfloat16, torch.float16])) | st.builds(
    PerRow, dtype=st.sampled_from([torch.int8, torch.float8_e4m3fn])
)
asked = st.one_of(
    narrow,
    st.builds(TopK, k=st.integers(1, 2**31 - 1), temperature=temperatures),
    st.builds(Sampled, n=st.integers(1, 65_535), temperature=temperatures, seed=st.integers(0, 2**64 - 1)),
    st.builds(
        Hidden,
        head=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        encoding=st.none() | narrow,
    ),
    st.just(encodings.at_positions()),
)


@st.composite
def tensors(draw, dtypes=tuple(FLOATS), largest=3e4, min_rank=1, smallest=-30):
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(1, 5), min_size=min_rank, max_size=3))
    exponent = draw(st.integers(smallest, 0))
    numbers = st.floats(-largest, largest, width=32) | st.sampled_from([0.0, -0.0, 1.0, largest])
    count = torch.Size(shape).numel()
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    return (torch.tensor(values, dtype=torch.float64).reshape(shape) * 2.0**exponent).to(dtype)


@quick
@given(encoding=asked, positions=st.booleans())
def test_any_encoding_travels(encoding, positions):
    encoding = encodings.at_positions(encoding) if positions else encoding
    message = encoding_to_wire(encoding)
    assert message is not None
    assert encoding_from_wire(teacher_pb2.Encoding.FromString(message.SerializeToString())) == encoding


def within(got, tensor, bound):
    """`bound` in float64, and what rounding to the tensor's own dtype adds."""
    assert got.dtype == tensor.dtype
    assert got.shape == tensor.shape
    exact = tensor.double()
    own = exact.abs() * FLOATS[tensor.dtype] * 2 + torch.finfo(tensor.dtype).smallest_normal * FLOATS[tensor.dtype] * 2
    assert bool(((got.double() - exact).abs() <= bound + own).all())


@quick
@given(tensors(smallest=-200))
def test_casts(tensor):
    exact = tensor.double().abs()
    halves = tensor.dtype.itemsize == 2
    for encoding, relative, absolute in ((encodings.bf16, 2**-8, 2**-134), (encodings.fp16, 2**-11, 2**-25)):
        got = decode(trip(encode(tensor, encoding)))
        bound = torch.zeros_like(exact) if halves else (exact * relative).clamp(min=absolute)
        assert got.dtype == tensor.dtype
        assert bool(((got.double() - tensor.double()).abs() <= bound).all())


@quick
@given(tensors(smallest=-200))
def test_int8(tensor):
    largest = tensor.double().abs().amax(-1, keepdim=True)
    # float32 rounds the scale and the quotient, which is at most 127.
    bound = (largest / 254 * (1 + 2**-14)).clamp(min=2**-127)
    within(decode(trip(encode(tensor, encodings.int8))), tensor, bound)


@quick
@given(tensors(smallest=-200))
def test_fp8(tensor):
    exact = tensor.double().abs()
    largest = exact.amax(-1, keepdim=True)
    bound = (torch.maximum(exact * 2**-4, largest * 2**-18) * (1 + 2**-14)).clamp(min=2**-136)
    within(decode(trip(encode(tensor, encodings.fp8))), tensor, bound)


@quick
@given(tensors(largest=50.0), st.integers(1, 6), st.sampled_from([1.0, 0.5, 3.0]))
def test_topk(tensor, k, temperature):
    got = decode(trip(encode(tensor, encodings.topk(k, temperature))))
    scaled = tensor.double() / temperature
    kept = min(k, tensor.shape[-1])
    assert got.shape == tensor.shape
    assert got.values.shape == (*tensor.shape[:-1], kept)
    assert bool((got.indices.sort().values.diff() > 0).all())
    torch.testing.assert_close(
        got.values.double(), scaled.sort(descending=True).values[..., :kept], rtol=1e-6, atol=1e-38
    )
    torch.testing.assert_close(got.values.double(), scaled.gather(-1, got.indices), rtol=1e-6, atol=1e-38)
    others = scaled.sort(descending=True).values[..., kept:]
    torch.testing.assert_close(got.tail.double(), others.logsumexp(-1), rtol=1e-6, atol=1e-6)


@quick
@given(tensors(largest=50.0), st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_sampled(tensor, n, seed):
    got = decode(trip(encode(tensor, Sampled(n=n, seed=seed))))
    assert got.shape == tensor.shape
    assert bool((got.counts.sum(-1) == n).all())
    log_p = tensor.double().log_softmax(-1)
    drawn = got.counts > 0
    torch.testing.assert_close(
        got.log_probs.double()[drawn], log_p.gather(-1, got.indices)[drawn], rtol=1e-5, atol=1e-5
    )


@quick
@given(st.data(), st.sampled_from([None, encodings.int8, encodings.topk(2), Sampled(n=3, seed=1)]))
def test_positions(data, encoding):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(bits).reshape(batch, length)
    tensor = torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(sum(bits)))
    got = decode(trip(encode(tensor, encodings.at_positions(encoding), mask)))
    assert torch.equal(got.mask, mask)
    want = decode(encode(tensor[mask], encoding or Encoding()))
    if isinstance(want, torch.Tensor):
        assert torch.equal(got.values, want)
    else:
        assert torch.equal(got.values.indices, want.indices)
        assert got.shape == tensor.shape
