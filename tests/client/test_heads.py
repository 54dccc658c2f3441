"""A head makes the logits that its operations say, travels as plain values, and is refused where these make none."""

import copy
import itertools
import json
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memfd import no_collector
from schoolhouse import errors
from schoolhouse.lm_head.describe import check_head, head_of
from schoolhouse.lm_head.head import Head
from schoolhouse.lm_head.operations import (
    ACTIVATIONS,
    Operation,
    activation,
    divide,
    layer_norm,
    linear,
    rms_norm,
    scale,
    softcap,
)
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.values import codec
from schoolhouse_wire.values.tree import map_tensors
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_weights(module, seed=1):
    """Also where the initial ones are zeros or ones, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1)
    return module.eval().requires_grad_(False)


def hidden_states(*shape, dtype=torch.float32, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trip(head):
    """Through the codec, as on the wire."""
    declared = codec.pack(head.to_value())
    payload = bytearray(declared.nbytes)
    end = 0
    for tensor in declared.tensors:
        start = -(-end // 64) * 64
        end = start + tensor.nbytes
        payload[start:end] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Head.from_value(codec.unpack(codec.read_layout(declared.header, Limits()), payload, Limits()))


class LlamaNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-5

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Parts(nn.Module):
    """A head that is no Sequential, as BERT's."""

    def __init__(self, *parts, after=lambda x: x):
        super().__init__()
        self.parts, self.after = nn.Sequential(*parts), after

    def forward(self, x):
        return self.after(self.parts(x))


def chains():
    return {
        "linear": nn.Linear(8, 11),
        "no bias": nn.Linear(8, 11, bias=False),
        "norm": nn.Sequential(nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 11)),
        "norm without bias": nn.Sequential(nn.LayerNorm(8, bias=False), nn.Linear(8, 11)),
        "norm without weights": nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 11)),
        "rms": nn.Sequential(nn.RMSNorm(8, eps=1e-3), nn.Linear(8, 11)),
        "rms of torch's eps": nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 11)),
        "llama": nn.Sequential(LlamaNorm(8), nn.Linear(8, 11, bias=False)),
        "gemma": nn.Sequential(GemmaNorm(8), nn.Linear(8, 11, bias=False)),
        "bert": Parts(nn.Linear(8, 6), nn.GELU(), nn.LayerNorm(6), nn.Dropout(0.5), nn.Identity(), nn.Linear(6, 11)),
        "gelu": nn.Sequential(nn.Linear(8, 6), nn.GELU(approximate="tanh"), nn.Linear(6, 11)),
        "others": nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 11), nn.Tanh()),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", chains())
def test_chains_are_exact_to_the_bit(name, dtype):
    module = random_weights(chains()[name]).to(dtype)
    head = trip(head_of(nn.ModuleDict({"head": module}), "head", "head"))
    hidden = hidden_states(2, 5, 8, dtype=dtype)
    logits = head.logits(hidden)
    assert logits.dtype == dtype
    assert torch.equal(logits, module(hidden))
    assert (head.classes, head.hidden_size, head.dtype) == (11, 8, dtype)
    check_head(head, hidden, module(hidden))


@pytest.mark.parametrize("name", chains())
def test_chains_against_float64(name):
    """Independently of torch's kernels: in 64 bits the same module is right to 1e-6."""
    module = random_weights(chains()[name])
    head = head_of(module, "", "")
    expected = copy.deepcopy(module).double()(hidden_states(7, 8).double())
    assert torch.allclose(head.logits(hidden_states(7, 8)).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_dense_formula():
    weight, bias = hidden_states(5, 3, seed=3), hidden_states(5, seed=4)
    norm, x = hidden_states(3, seed=5), hidden_states(4, 3)
    steps = [rms_norm(norm, 1e-2, offset=1, cast="after"), linear(weight, bias), scale(0.25), divide(3), softcap(2.0)]
    found = Head(steps).logits(x)
    for i in range(4):
        mean_square = sum(float(v) ** 2 for v in x[i]) / 3
        normed = [float(v) / math.sqrt(mean_square + 1e-2) * (1 + float(w)) for v, w in zip(x[i], norm, strict=True)]
        for j in range(5):
            logit = sum(n * float(w) for n, w in zip(normed, weight[j], strict=True)) + float(bias[j])
            assert found[i, j].item() == pytest.approx(2 * math.tanh(logit * 0.25 / 3 / 2), abs=1e-6)


# What a head is.


def some_head(dtype=torch.float32):
    return head_of(random_weights(chains()["bert"]).to(dtype), "", "")


def test_no_gradient_and_no_autocast():
    head = head_of(nn.Linear(8, 5), "", "")
    assert not any(weight.requires_grad for step in head.operations for weight in step.weights.values())
    hidden = hidden_states(4, 8).requires_grad_()
    plain = head.logits(hidden)
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.logits(hidden), plain)


def test_hidden_states_of_another_dtype_are_cast_to_the_heads():
    head = some_head()
    hidden = hidden_states(4, 8, dtype=torch.bfloat16)
    assert torch.equal(head.logits(hidden), head.logits(hidden.float()))
    assert some_head(torch.bfloat16).logits(hidden.float()).dtype == torch.bfloat16


def test_hidden_states_of_another_size():
    with pytest.raises(ValueError, match=r"are \(4, 7\); this head takes \[\.\.\., 8\]"):
        some_head().logits(torch.zeros(4, 7))


def test_no_tensor_of_a_head_is_walked():
    head = some_head()
    assert map_tensors({"head": head}, lambda tensor: tensor + 1)["head"] is head


def test_the_copies_on_other_devices_are_made_once(monkeypatch):
    head, moves = some_head(), []
    monkeypatch.setattr(Head, "device", torch.device("cuda", 0))  # so that the CPU is another device
    monkeypatch.setattr(Operation, "to", lambda self, device: moves.append(device) or self)
    with ThreadPoolExecutor(4) as pool:
        (there,) = set(pool.map(lambda _: head.to("cpu"), range(8)))
    assert there is not head
    assert moves == [torch.device("cpu")] * len(head.operations)
    assert there.digest == head.digest
    assert there.to("cpu") is head.to("cpu")


def test_a_head_ends_with_its_copies_on_other_devices(monkeypatch):
    head = some_head()
    monkeypatch.setattr(Head, "device", torch.device("cuda", 0))  # so that the CPU is another device
    monkeypatch.setattr(Operation, "to", lambda self, device: self)
    with no_collector():
        ends = [weakref.ref(head), weakref.ref(head.to("cpu"))]
        assert ends[1]() is head.to("cpu")  # kept meanwhile
        del head
        assert [end() for end in ends] == [None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    head = some_head()
    there = head.to("cuda")
    assert (there.device.type, there.to("cpu"), head.to("cuda")) == ("cuda", head, there)
    assert Head(there.operations).digest == head.digest
    logits = head.logits(hidden_states(4, 8).cuda())
    assert logits.is_cuda
    assert torch.allclose(logits.cpu(), head.logits(hidden_states(4, 8)), rtol=1e-2, atol=1e-2)


def test_pickling():
    head = some_head()
    again = pickle.loads(pickle.dumps(head))
    assert (again.digest, repr(again)) == (head.digest, repr(head))


def test_the_digest_is_of_operations_and_weights():
    heads = [
        Head([linear(torch.ones(2, 2))]),
        Head([linear(torch.ones(2, 2).double())]),
        Head([linear(torch.ones(2, 2), torch.zeros(2))]),
        Head([linear(torch.zeros(2, 2))]),
        Head([linear(torch.ones(3, 2))]),
        Head([linear(torch.ones(2, 2)), scale(2)]),
        Head([linear(torch.ones(2, 2)), divide(2)]),
        Head([linear(torch.ones(2, 2)), scale(3)]),
        Head([scale(3), linear(torch.ones(2, 2))]),
    ]
    assert len({head.digest for head in heads}) == len(heads)
    assert Head([linear(torch.ones(2, 2).t())]).digest == heads[0].digest
    assert all(len(head.digest) == 32 for head in heads)


# What arrives.


@st.composite
def any_head(draw):
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    number = st.floats(0.1, 30)
    tensor = lambda *shape: hidden_states(*shape, dtype=dtype, seed=draw(st.integers(0, 99)))  # noqa: E731
    steps = []
    for before, after in itertools.pairwise(widths):
        kind = draw(st.sampled_from(["", "layer_norm", "rms_norm", "scale", "divide", "softcap", "activation"]))
        steps += {
            "": list,
            "layer_norm": lambda w=before: [layer_norm(tensor(w), draw(st.sampled_from([None, tensor(w)])), 1e-3)],
            "rms_norm": lambda w=before: [
                rms_norm(
                    tensor(w), 1e-3, offset=draw(st.integers(0, 1)), cast=draw(st.sampled_from(["before", "torch"]))
                )
            ],
            "scale": lambda: [scale(draw(number))],
            "divide": lambda: [divide(draw(number))],
            "softcap": lambda: [softcap(draw(number))],
            "activation": lambda: [activation(draw(st.sampled_from(list(ACTIVATIONS))))],
        }[kind]()
        steps.append(linear(tensor(after, before), draw(st.sampled_from([None, tensor(after)]))))
    return Head(steps)


@settings(max_examples=40, deadline=None)
@given(any_head())
def test_any_head_arrives_as_it_was(head):
    back = trip(head)
    hidden = hidden_states(3, head.hidden_size, dtype=head.dtype)
    assert (back.digest, back.nbytes, repr(back)) == (head.digest, head.nbytes, repr(head))
    assert torch.equal(back.logits(hidden).nan_to_num(), head.logits(hidden).nan_to_num())


def step(kind="linear", weights=None, settings=None):
    weights = {"weight": torch.ones(5, 8)} if weights is None else weights
    return {"kind": kind, "weights": weights, "settings": settings or {}}


def value_of(*operations):
    return {"digest": "", "operations": list(operations)}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"digest": "", "operations": {}},
        {"digest": 1, "operations": []},
        {"digest": "", "operations": [], "code": "x"},
        value_of("linear"),
        value_of({"kind": "linear"}),
        value_of(step(kind="eval")),
        value_of(step(kind=["linear"])),
        value_of(step(kind="__class__")),
        value_of(step(weights=[])),
    ],
)
def test_other_structures_are_refused(value):
    with pytest.raises(errors.ProtocolError):
        Head.from_value(value)


@pytest.mark.parametrize(
    "value",
    [
        value_of(),
        value_of(step("scale", {}, {"factor": 1.0})),
        value_of(step(weights={})),
        value_of(step(weights={"weight": 1.0})),
        value_of(step(weights={"weight": torch.ones(5)})),
        value_of(step(weights={"weight": torch.ones(0, 8)})),
        value_of(step(weights={"weight": torch.ones(5, 8, dtype=torch.int8)})),
        value_of(step(weights={"weight": torch.ones(5, 8, dtype=torch.complex64)})),
        value_of(step(weights={"weight": torch.ones(5, 8), "bias": torch.ones(8)})),
        value_of(step(weights={"weight": torch.ones(5, 8), "bias": torch.ones(5).double()})),
        value_of(step(weights={"weight": torch.ones(5, 8), "more": torch.ones(5)})),
        value_of(step(weights={1: torch.ones(5, 8)})),
        value_of(step(settings={"eps": 1.0})),
        value_of(step(), step()),
        value_of(step("layer_norm", {"weight": torch.ones(7)}, {"eps": 1e-5}), step()),
        value_of(step("layer_norm", {"weight": torch.ones(8), "bias": torch.ones(7)}, {"eps": 1e-5}), step()),
        value_of(step("layer_norm", {}, {"eps": -1.0}), step()),
        value_of(step("rms_norm", {"weight": torch.ones(8)}, {"eps": 1e-5, "offset": 0.0}), step()),
        value_of(step("rms_norm", {"weight": torch.ones(8)}, {"eps": 1e-5, "offset": 0.0, "cast": "x"}), step()),
        value_of(step("rms_norm", {"weight": torch.ones(8)}, {"eps": 1e-5, "offset": 0.0, "cast": []}), step()),
        value_of(step(), step("scale", {}, {"factor": 10**400})),
        value_of(step(), step("scale", {}, {"factor": math.nan})),
        value_of(step(), step("scale", {}, {"factor": True})),
        value_of(step(), step("divide", {}, {"divisor": 0.0})),
        value_of(step(), step("softcap", {}, {"cap": 0.0})),
        value_of(step(), step("activation", {}, {"name": "__import__"})),
        value_of(step(), step("activation", {}, {"name": torch.ones(2)})),
    ],
)
def test_what_makes_no_head_is_refused(value):
    with pytest.raises(errors.CorruptPayloadError, match="do not make a head"):
        Head.from_value(value)


def test_a_changed_weight_is_refused():
    value = some_head().to_value()
    value["operations"][0]["weights"] = {
        name: weight.clone() for name, weight in value["operations"][0]["weights"].items()
    }
    Head.from_value(value)
    value["operations"][0]["weights"]["bias"][0] += 1e-6
    with pytest.raises(errors.CorruptPayloadError, match="digest"):
        Head.from_value(value)


def test_settings_are_plain_json():
    assert json.loads(json.dumps([dict(one.settings) for one in some_head().operations]))[1] == {"name": "gelu"}
    with pytest.raises(ValueError, match="choices: linear, layer_norm"):
        Operation("eval", {}, {})
