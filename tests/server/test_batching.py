"""Inputs of several requests as those of one forward, and its features as those of each."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schoolhouse.errors import ConfigError
from schoolhouse_server.common.rows import rows_of, tokens_of
from schoolhouse_server.merge.batching import Batch, Former, Layout, in_order
from schoolhouse_server.merge.settings import MergeSettings, Padding
from schoolhouse_server.merge.splitting import Constant, Rows, UnmergeableError, learn, unshared
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import tensors_of
from torch import nn
from torch.nn import functional as F

PAD = Padding(values={"ids": 9, "kinds": 0}, mask="mask")
SAME = Former(("x", "y"), None)
PADDED = Former(("ids", "kinds", "mask", "scale", "weight"), PAD)


def batch_of(former, *inputs):
    forms = [former.form(one) for one in inputs]
    assert len({form.key for form in forms}) == 1
    return Batch(former, inputs, forms)


def test_rows_and_tokens_of_a_request():
    assert rows_of(Arguments((torch.zeros(4, 8), torch.zeros(4), torch.tensor(2.0)))) == 4
    assert rows_of(Arguments((torch.zeros(7, 2),), {"a": torch.zeros(4, 8), "b": [torch.zeros(4)]})) == 4
    assert rows_of(Arguments((torch.tensor(1.0), "a"))) == 1
    assert tokens_of(Arguments((torch.zeros(4, 10, dtype=torch.int64),))) == 40
    assert tokens_of(Arguments((torch.zeros(4, 10, 64),))) == 40
    assert tokens_of(Arguments((torch.zeros(4, 8),))) == 4
    assert tokens_of(Arguments((torch.zeros(4, 3, 32, 32),))) == 4


X, TABLE = torch.arange(12.0).reshape(3, 4), torch.arange(5.0)
ALIKE = {
    "rows": (Arguments((X,)), Arguments((X[:1],))),
    "keyword": (Arguments((), {"x": X, "y": [X, 1]}), Arguments((), {"y": [X[:2], 1], "x": X[:2]})),
    "table": (Arguments((X, TABLE)), Arguments((X[:2], TABLE.clone()))),
    "number": (Arguments((X, torch.tensor(2.0))), Arguments((X[:2], torch.tensor(2.0)))),
    "NaN": (Arguments((X, float("nan"))), Arguments((X[:2], float("nan")))),
}
UNLIKE = {
    "another table": (Arguments((X, TABLE)), Arguments((X, TABLE + 1))),
    "another number": (Arguments((X, torch.tensor(2.0))), Arguments((X, torch.tensor(3.0)))),
    "bits of a table": (Arguments((X, torch.tensor(0.0))), Arguments((X, torch.tensor(-0.0)))),
    "a plain value": (Arguments((X, 1)), Arguments((X, True))),
    "the sign of zero": (Arguments((X, 0.0)), Arguments((X, -0.0))),
    "dtype": (Arguments((X,)), Arguments((X.double(),))),
    "width": (Arguments((X,)), Arguments((X[:, :3].contiguous(),))),
    "order in memory": (Arguments((X,)), Arguments((X.t().contiguous().t(),))),
    "how it is given": (Arguments((X,)), Arguments((), {"x": X})),
    "structure": (Arguments(([X],)), Arguments(((X,),))),
    "one is a table": (Arguments((X, X, TABLE)), Arguments((X, X, TABLE[:3]))),
}


@pytest.mark.parametrize("name", ALIKE)
def test_requests_that_differ_in_rows_are_alike(name):
    a, b = map(in_order, ALIKE[name])
    merged = batch_of(SAME, a, b).inputs([a, b])
    for got, one, other in zip(*map(tensors_of, (merged, a, b)), strict=True):
        expected = torch.cat([one, other]) if one.shape != other.shape or one.shape == X.shape else one
        assert torch.equal(got, expected)
        assert got.data_ptr() not in (one.data_ptr(), other.data_ptr())


@pytest.mark.parametrize("name", UNLIKE)
def test_requests_that_differ_in_more_are_not_alike(name):
    a, b = UNLIKE[name]
    assert SAME.form(a).key != SAME.form(b).key


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_nothing_can_be_merged_with():
    sparse = torch.eye(3).to_sparse()
    for inputs in [Arguments(), Arguments((torch.zeros(0, 3),)), Arguments((X, sparse)), Arguments((torch.tensor(1),))]:
        assert SAME.form(inputs) is None
    odd = Arguments((X, object()))
    assert SAME.form(odd).key != SAME.form(odd).key


def ids(rows, length, seed=0):
    return torch.randint(0, 9, (rows, length), generator=torch.Generator().manual_seed(seed))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=2, max_size=4),
    masked=st.lists(st.booleans(), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_lengths_that_may_be_padded_are_and_the_mask_says_so(shapes, masked):
    scale = torch.tensor(3.0)
    requests = []
    for i, (rows, length) in enumerate(shapes):
        kwargs = {"scale": scale, "kinds": ids(rows, length, i + 9), "weight": torch.full((rows,), float(i))}
        if masked[i]:
            kwargs["mask"] = ids(rows, length, i + 20) % 2
        requests.append(Arguments((ids(rows, length, i),), dict(sorted(kwargs.items()))))
    merged = batch_of(PADDED, *requests).inputs(requests)
    longest = max(length for _, length in shapes)
    masks = [r.kwargs.get("mask", torch.ones(s, dtype=torch.int64)) for r, s in zip(requests, shapes, strict=True)]
    for got, parts, value in [
        (merged[0], [r[0] for r in requests], 9),
        (merged.kwargs["kinds"], [r.kwargs["kinds"] for r in requests], 0),
        (merged.kwargs.get("mask"), masks, 0),
    ]:
        if got is None:
            assert len({length for _, length in shapes}) == 1
            assert not any(masked[: len(shapes)])
        else:
            expected = torch.cat([F.pad(part, (0, longest - part.shape[1]), value=value) for part in parts])
            assert torch.equal(got, expected)
    assert torch.equal(merged.kwargs["scale"], scale)
    assert merged.kwargs["weight"].tolist() == [float(i) for i, (rows, _) in enumerate(shapes) for _ in range(rows)]
    assert len(merged) == 1


def test_what_does_not_fit_the_padding_merges_with_its_own_length_only():
    mask = torch.ones(2, 4, dtype=torch.int64)
    for odd in [
        Arguments((ids(2, 4),), {"kinds": ids(2, 3)}),  # of two lengths
        Arguments((ids(2, 4),), {"mask": mask[:, :3]}),
        Arguments((ids(2, 4),), {"mask": mask[:, None, None]}),
        Arguments((ids(2, 4), ids(2, 4), None)),
        Arguments((), {"scale": torch.ones(2, 4)}),
    ]:
        form = PADDED.form(odd)
        assert not form.padded
        assert form.key == PADDED.form(odd).key
    assert PADDED.form(Arguments((ids(2, 4),), {"mask": None})).padded
    other = [Arguments((ids(2, n),), {"mask": m}) for n, m in ((4, None), (3, torch.ones(2, 3)))]
    merged = batch_of(PADDED, *other).inputs(other)
    assert torch.equal(merged.kwargs["mask"], torch.tensor([[1.0] * 4] * 2 + [[1.0, 1, 1, 0]] * 2))
    assert PADDED.form(Arguments((ids(2, 4), ids(2, 4), mask))).padded


class Shapes(nn.Module):
    """Features of several kinds, from x `[rows, length]`."""

    table = torch.arange(3.0)

    def forward(self, x):
        wide = x[:, :, None] * torch.arange(1.0, 4)
        return {
            "wide": wide,
            "pairs": (wide @ wide.mT)[:, None],
            "twice": x.repeat_interleave(2, dim=0),
            "table": self.table,
            "none": None,
            "ids": (x > 0).long(),
        }


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=2, max_size=4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_request_gets_its_own_rows_cut_to_its_length(shapes, seed):
    model, generator = Shapes(), torch.Generator().manual_seed(seed)
    xs = [torch.randn(shape, generator=generator) for shape in shapes]
    layout = Layout(*map(tuple, zip(*shapes, strict=True)))
    singles = [model(x) for x in xs]
    merged = model(torch.cat([F.pad(x, (0, layout.length - x.shape[1])) for x in xs]))
    rules = learn(merged, singles, layout)
    assert sum(isinstance(rule, Constant) for rule in rules.leaves) == 1
    rules.check(merged, layout)
    for i, single in enumerate(singles):
        part = rules.part(merged, layout, i, {})
        assert part.keys() == single.keys()
        assert part["none"] is None
        for name in single.keys() - {"none"}:
            torch.testing.assert_close(part[name], single[name], rtol=1e-5, atol=1e-5)


LAYOUT = Layout((1, 2), (4, 4))
PARTS = [torch.randn(1, 4), torch.randn(2, 4)]
BOTH = torch.cat(PARTS)
MIXED = {
    "rows": lambda x: x - x.mean(0),
    "attention across rows": lambda x: (x @ x.T).softmax(-1) @ x,
    "blocks": lambda x: torch.cat([x, x]),
    "flattened": lambda x: x.sum(),
    "rows second": lambda x: x.T,
    "number of rows": lambda x: len(x),
    "in a list": lambda x: [*x],
    "dtype": lambda x: x.double() if len(x) > 2 else x,
    "width": lambda x: x[:, : len(x)],
    "a choice": lambda x: x.argmax(0).expand(len(x), 4),
    "NaN": lambda x: x / (len(x) - 3),
    "complex": lambda x: torch.complex(x, x.mean(0).expand_as(x)),
    "the last one": lambda x: x.roll(1, 0),
}


@pytest.mark.parametrize("name", MIXED)
def test_features_that_depend_on_others_rows_are_refused(name):
    with pytest.raises(UnmergeableError):
        learn(MIXED[name](BOTH), [MIXED[name](part) for part in PARTS], LAYOUT)


def test_what_was_learned_is_held_to():
    rules = learn([BOTH, torch.zeros(3)], [[part, torch.zeros(3)] for part in PARTS], LAYOUT)
    assert rules.leaves[0] == Rows(1, (4,), torch.float32)
    other = Layout((3, 4, 1), (4, 4, 4))
    rules.check([torch.zeros(8, 4), torch.zeros(3)], other)
    for changed in [
        [torch.zeros(8, 4), torch.ones(3)],
        [torch.zeros(8, 5), torch.zeros(3)],
        [torch.zeros(7, 4), torch.zeros(3)],
        [torch.zeros(8, 4).double(), torch.zeros(3)],
        (torch.zeros(8, 4), torch.zeros(3)),
    ]:
        with pytest.raises(UnmergeableError):
            rules.check(changed, other)


def test_rounding_is_allowed_for_and_no_more():
    for dtype, tolerance in ((torch.float64, 6e-9), (torch.float32, 6e-4), (torch.bfloat16, 0.12)):
        singles = [torch.tensor([[8.0, 1.0]], dtype=dtype), torch.tensor([[1.0, 2.0]], dtype=dtype)]
        for times, fits in ((0.5, True), (2.0, False)):
            merged = torch.cat(singles)
            merged[1, 0] += 1.457 * tolerance * times  # what is usual beside 1 and 2: the mean of their roots, squared
            layout = Layout((1, 1), (1, 1))
            if fits:
                learn(merged, singles, layout)
            else:
                with pytest.raises(UnmergeableError, match="differs"):
                    learn(merged, singles, layout)


def test_a_part_keeps_no_others_memory():
    rules = learn([BOTH, BOTH], [[part, part] for part in PARTS], LAYOUT)
    parts = unshared(rules.part([BOTH, BOTH], LAYOUT, 0, {}))
    assert parts[0] is parts[1]  # and travels once
    assert torch.equal(parts[0], PARTS[0])
    assert parts[0].untyped_storage().nbytes() == PARTS[0].nbytes


WRONG = [
    {"mode": "always"},
    {"mode": "pad"},
    {"mode": "same-shape", "pad": PAD},
    {"max_batch_rows": 0},
    {"max_batch_tokens": 1.5},
    {"max_wait_ms": -1},
    {"max_wait_ms": 5000},
]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_settings_that_cannot_be(given):
    with pytest.raises(ConfigError, match="|".join(("merge", *given))):
        MergeSettings(**given)


@pytest.mark.parametrize("given", [{}, {"values": {}, "mask": "m"}, {"values": {"a": "b"}, "mask": "m"}, "ids", 3])
def test_a_padding_that_cannot_be(given):
    with pytest.raises(ConfigError, match="expected"):
        Padding.of(given)
    with pytest.raises(ConfigError, match="mask 'a'"):
        Padding.of({"values": {"a": 0}, "mask": "a"})
    assert dataclasses.asdict(Padding.of({"values": {"a": 0}, "mask": "m"})) == {"values": {"a": 0}, "mask": "m"}
