"""What can be asked of a tap, how structures are encoded, and what is refused, on either side."""

import dataclasses
import math
import types
from typing import NamedTuple

import pytest
import schoolhouse as sh
import torch
from schoolhouse.sparse import PositionedFeatures, SampledLogits, TopKLogits, decode
from schoolhouse.teachers import encoder
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
    seeded,
)
from schoolhouse_wire.errors import ProtocolError, UnsupportedValueError
from schoolhouse_wire.v1 import teacher_pb2, values_pb2
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.packed import CastTensor, ScaledRows
from schoolhouse_wire.values.tree import map_tensors
from test_codec import trip
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MASK = torch.tensor([[True, False, True], [False, False, True]])


class Output(NamedTuple):
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]
    count: torch.Tensor
    note: str


def some(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def travelled(value, encoding, mask=None):
    return decode(trip(encode(value, encoding, mask)))


def test_what_users_type_is_what_travels():
    assert sh.encodings.bf16 == Cast(dtype=torch.bfloat16)
    assert sh.encodings.fp16 == Cast(dtype=torch.float16)
    assert sh.encodings.int8 == PerRow(dtype=torch.int8)
    assert sh.encodings.fp8 == PerRow(dtype=torch.float8_e4m3fn)
    assert sh.encodings.topk(5, temperature=2.0) == TopK(k=5, temperature=2.0)
    assert sh.encodings.sampled(9, seed=3) == Sampled(n=9, temperature=1.0, seed=3)
    assert sh.encodings.hidden(encoding=sh.encodings.bf16) == Hidden(head="lm_head", encoding=sh.encodings.bf16)
    assert sh.encodings.at_positions() == Encoding(positions=True)
    assert sh.encodings.at_positions(sh.encodings.topk(5)) == TopK(k=5, positions=True)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sh.encodings.topk(0), r"k is 0; it must be an integer in 1\.\."),
        (lambda: sh.encodings.topk(2.0), r"k is 2\.0"),
        (lambda: sh.encodings.topk(1, temperature=0), "temperature is 0; it must be above 0"),
        (lambda: sh.encodings.topk(1, temperature=math.nan), "temperature is nan"),
        (lambda: sh.encodings.sampled(65_536), r"n is 65536; it must be an integer in 1\.\.65535"),
        (lambda: sh.encodings.sampled(1, seed=-1), "seed is -1"),
        (lambda: sh.encodings.sampled(1, temperature=math.inf), "temperature is inf"),
        (lambda: sh.encodings.hidden(""), "head is ''; give the name"),
        (lambda: sh.encodings.hidden(encoding=sh.encodings.topk(2)), "choices: None, bf16, fp16, int8, fp8"),
        (lambda: sh.encodings.hidden(encoding=sh.encodings.at_positions(sh.encodings.bf16)), "without positions"),
        (lambda: sh.encodings.at_positions("bf16"), "encoding is 'bf16'; choices: None .*topk"),
    ],
)
def test_wrong_settings_are_refused_with_the_choices(make, named):
    with pytest.raises(sh.errors.ConfigError, match=named):
        make()


def test_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype is torch.int8; choices: torch.bfloat16, torch.float16"):
        Cast(dtype=torch.int8)
    with pytest.raises(ValueError, match="choices: torch.int8, torch.float8_e4m3fn"):
        PerRow(dtype=torch.float8_e5m2)


@pytest.mark.parametrize(
    "message",
    [
        teacher_pb2.Encoding(cast=values_pb2.INT8),
        teacher_pb2.Encoding(cast=99),
        teacher_pb2.Encoding(per_row=values_pb2.FLOAT32),
        teacher_pb2.Encoding(topk=teacher_pb2.TopK(k=0, temperature=1)),
        teacher_pb2.Encoding(topk=teacher_pb2.TopK(k=1)),
        teacher_pb2.Encoding(topk=teacher_pb2.TopK(k=1, temperature=math.nan)),
        teacher_pb2.Encoding(sampled=teacher_pb2.Sampled(n=65_536, temperature=1)),
        teacher_pb2.Encoding(hidden=teacher_pb2.Hidden()),
        teacher_pb2.Encoding(
            hidden=teacher_pb2.Hidden(
                head="h", encoding=teacher_pb2.Encoding(topk=teacher_pb2.TopK(k=1, temperature=1))
            )
        ),
        teacher_pb2.Encoding(
            hidden=teacher_pb2.Hidden(head="h", encoding=teacher_pb2.Encoding(hidden=teacher_pb2.Hidden(head="h")))
        ),
        teacher_pb2.Encoding(hidden=teacher_pb2.Hidden(head="h", encoding=teacher_pb2.Encoding(positions=True))),
        teacher_pb2.Encoding.FromString(b"\x7a\x00"),  # a field 15, of some later version
        teacher_pb2.Encoding(
            topk=teacher_pb2.TopK.FromString(teacher_pb2.TopK(k=1, temperature=1).SerializeToString() + b"\x7a\x00")
        ),
    ],
)
def test_what_a_peer_may_not_ask(message):
    with pytest.raises(ProtocolError, match="encoding was asked for"):
        encoding_from_wire(message)


def test_draws_need_a_seed_before_they_travel():
    asked = sh.encodings.sampled(4)
    with pytest.raises(ValueError, match="no seed"):
        encoding_to_wire(asked)
    with pytest.raises(ValueError, match="no seed"):
        encode(some(2, 3), asked)
    assert seeded(asked, 7) == Sampled(n=4, seed=7)
    assert seeded(Sampled(n=4, seed=1), 7) == Sampled(n=4, seed=1)
    assert seeded(None, 7) is None


def test_as_computed_is_itself():
    value = (some(2, 3), {"a": 1})
    assert encode(value, None) is value
    assert encoding_to_wire(Encoding()) is encoding_to_wire(None) is None
    assert encoding_from_wire(teacher_pb2.Encoding()) is None


@pytest.mark.parametrize("encoding", [sh.encodings.bf16, sh.encodings.int8], ids=["bf16", "int8"])
def test_structures_keep_all_but_the_numbers(encoding):
    twice = some(2, 3, 4)
    value = Output(some(2, 3), (twice, twice), torch.arange(3), "kept")
    got = travelled(value, encoding)
    assert isinstance(got, Output)
    assert got.note == "kept"
    assert torch.equal(got.count, value.count)
    assert got.logits.dtype == torch.float32
    torch.testing.assert_close(got.logits, value.logits, atol=0.02, rtol=0.01)
    assert torch.equal(got.states[0], got.states[1])
    packed = encode(value, encoding)
    assert packed.states[0] is packed.states[1]
    arguments = travelled(Arguments([twice], {"mask": torch.ones(2, dtype=torch.bool)}), encoding)
    assert isinstance(arguments, Arguments)
    assert arguments.kwargs["mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        (sh.encodings.bf16, CastTensor),
        (sh.encodings.fp16, CastTensor),
        (sh.encodings.int8, ScaledRows),
        (sh.encodings.fp8, ScaledRows),
    ],
)
def test_what_would_not_become_smaller_travels_as_computed(encoding, packed):
    assert isinstance(encode(some(2, 3), encoding), packed)
    for tensor in (torch.arange(3), torch.ones(2, dtype=torch.bool), torch.empty(0, 3), torch.empty(3, 0)):
        assert encode(tensor, encoding) is tensor
    one_byte = some(2, 3).to(torch.float8_e5m2)
    assert encode(one_byte, encoding) is one_byte
    if packed is CastTensor:
        half = some(2, 3, dtype=torch.float16)
        assert encode(half, encoding) is half
    else:
        scalar = torch.tensor(3.14)
        assert encode(scalar, encoding) is scalar


def test_rows_of_zeros_are_exact():
    zeros = torch.zeros(2, 5)
    assert torch.equal(travelled(zeros, sh.encodings.int8), zeros)
    assert torch.equal(travelled(zeros, sh.encodings.fp8), zeros)


def test_the_largest_numbers_do_not_overflow():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        largest = torch.full((1, 3), torch.finfo(dtype).max, dtype=dtype)
        for encoding in (sh.encodings.int8, sh.encodings.fp8):
            assert torch.equal(travelled(largest, encoding), largest)


def test_numbers_that_an_encoding_cannot_hold_are_refused_with_choices():
    with pytest.raises(UnsupportedValueError, match=r"beyond 65504.*choices: bf16"):
        encode((some(2, 3), torch.tensor([1e5])), sh.encodings.fp16)
    with pytest.raises(UnsupportedValueError, match=r"choices: as computed"):
        encode(torch.tensor([1e300], dtype=torch.float64), sh.encodings.bf16)
    infinite = torch.tensor([[math.inf, math.nan, 1.0]])
    assert torch.equal(travelled(infinite, sh.encodings.fp16).isnan(), infinite.isnan())
    for bad in (math.nan, math.inf, -math.inf, 1e300):
        tensor = torch.tensor([[0.0, bad]], dtype=torch.float64)
        with pytest.raises(UnsupportedValueError, match="choices: bf16, as computed, or, for logits, topk"):
            encode(tensor, sh.encodings.int8)
    with pytest.raises(UnsupportedValueError, match="nothing can be drawn"):
        encode(torch.full((2, 3), -math.inf), Sampled(n=2, seed=0))


def test_logits_are_found_in_a_record_and_the_rest_is_as_computed():
    value = Output(some(2, 3, 7), (some(2, 3, 4),), torch.arange(3), "kept")
    got = travelled(value, TopK(k=2))
    assert isinstance(got.logits, TopKLogits)
    assert got.logits.shape == (2, 3, 7)
    assert torch.equal(got.states[0], value.states[0])
    for wrong in ((some(2, 3),), {"logits": some(2, 3)}, torch.arange(3), torch.tensor(1.0)):
        with pytest.raises(UnsupportedValueError, match="an encoding of logits.*choices: tap the layer"):
            encode(wrong, TopK(k=2))
    with pytest.raises(UnsupportedValueError, match="no classes"):
        encode(torch.empty(2, 0), TopK(k=2))


def test_a_mapping_that_takes_no_items_becomes_a_dict():
    got = map_tensors(types.MappingProxyType({"a": torch.ones(2)}), torch.neg)
    assert type(got) is dict
    assert got["a"].tolist() == [-1, -1]


def test_a_model_output_stays_one():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    for value in (
        outputs.CausalLMOutput(logits=some(2, 3, 7)),
        outputs.CausalLMOutputWithPast(logits=some(2, 3, 7), hidden_states=(some(2, 3, 4),) * 2),
    ):
        got = travelled(value, sh.encodings.at_positions(TopK(k=2)), MASK)
        moved = map_tensors(got, torch.clone)
        assert type(moved) is type(value)
        assert moved.logits.shape == (2, 3, 7)
        assert torch.equal(moved.logits.values.values, value.logits[MASK].topk(2).values)
        assert (moved.hidden_states is None) == (value.hidden_states is None)


def test_top_k_holds_the_k_and_the_sum_of_the_others():
    logits = some(2, 3, 9, dtype=torch.bfloat16)
    got = travelled(logits, TopK(k=4))
    assert got.values.dtype == torch.bfloat16
    assert torch.equal(got.values, logits.sort(descending=True).values[..., :4])
    assert torch.equal(logits.gather(-1, got.indices), got.values)
    rest = logits.double().sort(descending=True).values[..., 4:]
    torch.testing.assert_close(got.tail.double(), rest.exp().sum(-1).log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.logsumexp.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    mass = rest.exp().sum(-1) / logits.double().exp().sum(-1)
    torch.testing.assert_close(got.log_tail_mass.double(), mass.log(), rtol=1e-5, atol=1e-5)
    assert encode(logits, TopK(k=4)).indices.dtype == torch.uint16
    assert encode(torch.zeros(1, 65_537), TopK(k=1)).indices.dtype == torch.int32
    tempered = travelled(logits, TopK(k=4, temperature=2.0))
    assert tempered.values.dtype == torch.float32
    assert torch.equal(tempered.values, logits.float().sort(descending=True).values[..., :4] / 2)


def test_a_small_tail_is_not_lost_beside_a_large_head():
    logits = torch.tensor([[60.0, 0.0, -1.0]])
    got = travelled(logits, TopK(k=1))
    assert got.tail.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)


def test_k_of_all_classes_has_no_tail():
    got = travelled(some(2, 3), TopK(k=50))
    assert got.values.shape == (2, 3)
    assert got.tail.tolist() == [-math.inf, -math.inf]


def test_draws_are_counted_and_have_exact_probabilities():
    logits = some(2, 3, 9)
    got = travelled(logits, Sampled(n=300, temperature=2.0, seed=4))
    assert isinstance(got, SampledLogits)
    assert got.shape == (2, 3, 9)
    assert got.counts.sum(-1).unique().tolist() == [300]
    exact = (logits.double() / 2).log_softmax(-1).gather(-1, got.indices)
    drawn = got.counts > 0
    torch.testing.assert_close(got.log_probs.double()[drawn], exact[drawn], rtol=1e-6, atol=1e-6)
    for row, counts in zip(got.indices.flatten(0, 1), got.counts.flatten(0, 1), strict=True):
        kept = row[counts > 0].tolist()
        assert len(set(kept)) == len(kept)
    again = travelled(logits, Sampled(n=300, temperature=2.0, seed=4))
    assert torch.equal(again.counts, got.counts)
    assert not torch.equal(encode(logits, Sampled(n=300, seed=5)).counts, encode(logits, Sampled(n=300, seed=6)).counts)
    assert encode(logits, Sampled(n=255, seed=0)).counts.dtype == torch.uint8
    assert encode(logits, Sampled(n=256, seed=0)).counts.dtype == torch.uint16


def test_classes_of_tiny_probability_are_drawn_as_often_as_they_should():
    p = torch.full((1, 150_000), 0.003 / 149_999, dtype=torch.float64)  # 2e-8 each
    p[0, 0] = 0.997
    got = encode(p.log().float(), Sampled(n=65_535, seed=0))
    others = int(got.counts.long()[got.indices.long() > 0].sum())
    assert abs(others - 197) < 5 * math.sqrt(197)


def test_rows_are_drawn_from_a_few_at_a_time(monkeypatch):
    logits, asked = some(2, 30, 9), Sampled(n=20, temperature=2.0, seed=3)
    whole, rows, draws = encode(logits, asked), [], encoder._draws
    monkeypatch.setattr(encoder, "_HOST_ELEMENTS", 4 * (9 + 20))
    monkeypatch.setattr(encoder, "_draws", lambda part, *rest: rows.append(len(part)) or draws(part, *rest))
    parted = encode(logits, asked)
    assert rows == [4] * 15
    assert torch.equal(parted.indices, whole.indices)
    assert torch.equal(parted.counts, whole.counts)
    assert torch.equal(parted.log_probs, whole.log_probs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_of_a_few_rows_at_a_time_are_those_of_all(dtype, temperature, monkeypatch):
    logits = some(3, 11, 500).to(dtype)
    monkeypatch.setattr(encoder, "_HOST_ELEMENTS", 1000)
    got = encode(logits, TopK(k=7, temperature=temperature))
    scaled = logits.float() / temperature
    values, indices = scaled.topk(7)
    rest = scaled.double().exp().sum(-1) - values.double().exp().sum(-1)
    assert got.values.dtype == (dtype if temperature == 1 else torch.float32)
    assert torch.equal(got.values.float(), values)
    assert torch.equal(got.indices.int(), indices.int())
    torch.testing.assert_close(got.tail, rest.log().float())


def test_no_temporary_tensor_is_much_larger_than_what_is_drawn():
    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
            return result

    few, many = some(300, 100), some(30_000, 200)
    with Largest() as largest:
        encode(few, Sampled(n=65_535, seed=1))
        encode(many, TopK(k=1))
    assert largest.nbytes <= 24 << 20  # the 300 x 65,535 draws take 157 MB in the sort alone


def test_a_row_that_never_varies_is_padded():
    logits = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    got = travelled(logits, Sampled(n=100, seed=0))
    assert got.counts[0].tolist() == [100, 0, 0, 0]
    assert got.log_probs[0].tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("encoding", [TopK(k=2), Sampled(n=3, seed=0)], ids=["topk", "sampled"])
def test_logits_of_no_rows_and_of_one(encoding):
    assert travelled(torch.empty(0, 5), encoding).shape == (0, 5)
    assert travelled(some(5), encoding).shape == (5,)


def test_only_the_positions_travel():
    value = Output(some(2, 3, 7), (some(2, 3, 4),), torch.arange(3), "kept")
    got = travelled(value, sh.encodings.at_positions(), MASK)
    assert isinstance(got.logits, PositionedFeatures)
    assert got.logits.shape == (2, 3, 7)
    assert torch.equal(got.logits.mask, MASK)
    assert torch.equal(got.logits.values, value.logits[MASK])
    assert torch.equal(got.states[0].values, value.states[0][MASK])
    assert torch.equal(got.count, value.count)
    sparse = travelled(value, sh.encodings.at_positions(TopK(k=2)), MASK)
    assert torch.equal(sparse.logits.values.values, value.logits[MASK].topk(2).values)
    assert torch.equal(sparse.states[0].values, value.states[0][MASK])
    small = travelled(value, sh.encodings.at_positions(sh.encodings.int8), MASK)
    assert torch.equal(small.logits.values, travelled(value.logits[MASK], sh.encodings.int8))
    none = travelled(value.logits, sh.encodings.at_positions(Sampled(n=2, seed=0)), torch.zeros_like(MASK))
    assert none.values.shape == (0, 7)


def test_rows_that_do_not_travel_may_hold_anything():
    logits = some(2, 3, 7).masked_fill(~MASK[..., None], math.nan)
    for encoding in (sh.encodings.int8, Sampled(n=2, seed=0)):
        travelled(logits, dataclasses.replace(encoding, positions=True), MASK)


@pytest.mark.parametrize(
    ("value", "mask"),
    [
        (some(2, 4, 7), MASK),
        (some(2, 3), MASK),
        (torch.ones(2, 3, 4, dtype=torch.int64), MASK),
        (some(2, 3, 4), None),
        (some(2, 3, 4), MASK.long()),
        (some(2, 3, 4), torch.tensor(True)),
    ],
)
def test_positions_that_do_not_fit_are_refused(value, mask):
    with pytest.raises(UnsupportedValueError, match=r"mask.*\[batch, length\]"):
        encode(value, sh.encodings.at_positions(), mask)


def test_hidden_states_are_what_the_head_was_called_with():
    states = some(2, 3, 4)
    asked = Hidden(head="lm_head")
    assert torch.equal(travelled(Arguments([states]), asked), states)
    assert torch.equal(travelled(Arguments([], {"x": states, "flag": True}), asked), states)
    coded = travelled(Arguments([states]), Hidden(head="lm_head", encoding=sh.encodings.bf16, positions=True), MASK)
    assert torch.equal(coded.values, states[MASK].bfloat16().float())
    for wrong in (Arguments([states, states]), Arguments([torch.arange(3)]), (states,)):
        with pytest.raises(UnsupportedValueError, match="the head 'lm_head' was called with . floating-point tensors"):
            encode(wrong, asked)
