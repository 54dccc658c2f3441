"""How far merged features may be from single ones: errors of small ones are found beside massive ones."""

import pytest
import torch
from merging import Asked, at_once, engine_of, randn
from schoolhouse_server.merge.batching import Layout
from schoolhouse_server.merge.splitting import UnmergeableError, learn
from torch import nn

MASSIVE = pytest.mark.parametrize(
    ("dtype", "massive"),
    [(torch.bfloat16, 1e3), (torch.float16, 1e3), (torch.float32, 3e4)],
    ids=["bfloat16", "float16", "float32"],
)


class Massive(nn.Module):
    """Hidden states `[rows, 16, 64]` of about 1, massive in a channel of the first token, and `mixed` in others."""

    def __init__(self, dtype, massive, mixed):
        super().__init__()
        self.weight = nn.Parameter(randn(8, 64, seed=5).div(8**0.5).to(dtype))
        self.massive, self.mixed = massive, mixed

    def forward(self, x):
        hidden = x @ self.weight
        hidden = hidden + self.mixed * hidden[..., 1:].std() * (torch.arange(64) % 7 == 3)
        first = (torch.arange(16)[:, None] == 0) & (torch.arange(64) == 9)
        return torch.where(first, self.massive, hidden)


def asked(dtype):
    return [Asked(i * randn(2, 16, 8, seed=i).to(dtype)) for i in (1, 2)]


@MASSIVE
def test_what_merging_changes_in_small_channels_is_found_beside_massive_ones(dtype, massive):
    with engine_of(Massive(dtype, massive, mixed=1.0)) as engine:
        for _ in range(4):
            for one in (ones := asked(dtype)):
                one.job.source = id(one)
            at_once(engine, *ones)
            for one in ones:
                assert torch.equal(one.features[""], engine.teacher.module.inner(*one.job.inputs))
        assert engine.merger.refusals == 1


@MASSIVE
def test_where_merging_changes_nothing_massive_ones_are_merged(dtype, massive):
    with engine_of(Massive(dtype, massive, mixed=0.0)) as engine:
        shapes = [at_once(engine, *asked(dtype)) for _ in range(3)]
        assert shapes[-1] == [(4, 16, 8)]
        assert engine.merger.refusals == 0


def in_another_order(x, weight):
    """The same product, whose sum is rounded in another order."""
    parts = zip(x.chunk(8, -1), weight.chunk(8, 0), strict=True)
    total = torch.zeros(())
    for a, b in parts:
        total = total + (a @ b).to(x.dtype)
    return total.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("after", [lambda y: y, torch.relu, lambda y: torch.relu(y - 2)])
def test_rounding_is_no_difference_also_where_terms_cancel(dtype, after):
    weight = randn(256, 96, seed=1).div(16).to(dtype)
    weight[:, 9] *= 300  # a channel that is large in all rows
    for seed in range(10):
        x = randn(12, 7, 256, seed=seed).to(dtype)
        x[0, 0] *= 100  # a row that is
        parts = x.split([5, 7])
        singles = [after(part @ weight).to(dtype) for part in parts]
        merged = after(in_another_order(x, weight)).to(dtype)
        assert not torch.equal(merged, torch.cat(singles)) or dtype is torch.float64
        learn(merged, singles, Layout((5, 7), (7, 7)))


@pytest.mark.parametrize("where", [(3, 2, 5), (0, 0, 5), (3, 2, 9)], ids=["usual", "massive row", "massive channel"])
def test_one_number_that_differs_by_what_is_usual_for_its_place_is_named(where):
    single = randn(6, 4, 64)
    single[:, :, 9] *= 1000
    single[0, 0] *= 1000
    merged = single.clone()
    merged[where] *= 3
    with pytest.raises(
        UnmergeableError, match="from the single one by .* is usual; rounding may explain 0.0006 of that"
    ):
        learn(merged, [single], Layout((6,), (4,)))
