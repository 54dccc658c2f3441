"""What is by chance as it would be if rows were the requests' own: numbers of rows, and rows that are all the same."""

import pytest
import torch
from merging import Asked, at_once, close, engine_of, randn
from schoolhouse_server.merge.batching import Layout
from schoolhouse_server.merge.splitting import VaryingError, learn
from torch import nn


class Experts(nn.Module):
    """Tokens whose first number is above 0 go to the expert `one`."""

    def __init__(self):
        super().__init__()
        self.one = nn.Identity()

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen = tokens[:, 0] > 0
        out = 2 * tokens
        out[chosen] = self.one(tokens[chosen])
        return out.view_as(x)


def routed(chosen, rows, seed):
    """Sequences of which `chosen` tokens go to the expert."""
    x = randn(rows, 4, 3, seed=seed)
    x[..., 0] = -1
    x.view(-1, 3)[:chosen, 0] = 1
    return x


@pytest.mark.parametrize("rows", [1, 2])
def test_the_tokens_of_an_expert_are_paired_with_their_request_also_after_chance_made_them_equally_many(rows):
    with engine_of(Experts()) as engine:
        for turn, counts in enumerate([(2, 2), (2, 2), (1, 3), (3, 1), (2, 2)]):
            xs = [routed(n, rows, 10 * turn + i) for i, n in enumerate(counts)]
            asked = [Asked(x, taps=["inner.one"]) for x in xs]
            at_once(engine, *asked)
            for one, x in zip(asked, xs, strict=True):
                assert torch.equal(one.features["inner.one", "output"], x[x[..., 0] > 0])
        assert engine.merger.refusals == 1
        assert [shape[0] for shape in at_once(engine, *[Asked(x, taps=["inner.one"]) for x in xs])] == [rows, rows]


class Heads(nn.Module):
    """Attention folds its heads into the rows."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Identity()

    def forward(self, x):
        return self.heads(x.unflatten(1, (4, 2)).flatten(0, 1)).view_as(x)


def test_rows_that_are_several_for_each_request_are_merged_once_enough_requests_had_them():
    with engine_of(Heads()) as engine:
        merged = []
        for turn in range(12):
            xs = [randn(2, 8, seed=2 * turn + i) for i in range(2)]
            asked = [Asked(x, taps=["inner.heads"]) for x in xs]
            merged.append([rows for rows, _ in at_once(engine, *asked)] == [4])
            for one, x in zip(asked, xs, strict=True):
                close(one.features["inner.heads", "output"], x.reshape(8, 2))
        assert merged == [False] * 8 + [True] * 4
        assert engine.merger.refusals == 0


def test_other_sizes_than_those_that_were_learned_are_by_chance():
    layout = Layout((1, 1), (4, 4))
    twos, threes = ([torch.ones(n, 5), torch.ones(n, 5)] for n in (2, 3))
    rules = learn(torch.cat(twos), twos, layout)
    assert rules.doubtful
    rules.agree(rules)
    for singles in (threes, [torch.ones(0, 5)] * 2):
        other = learn(torch.cat(singles), singles, layout)
        with pytest.raises(VaryingError):
            other.agree(rules)
        with pytest.raises(VaryingError):
            rules.agree(other)
    with pytest.raises(VaryingError):
        rules.check(torch.cat(threes), layout)
    plain = [randn(2, 4, 3), randn(3, 4, 3)]
    assert not learn(torch.cat(plain), plain, Layout((2, 3), (4, 4))).doubtful


class Timed(nn.Module):
    """Takes a time for each row, and reads the first: callers give one for all."""

    def forward(self, x, times):
        return x * times[0]


@pytest.mark.parametrize("rows", [(2, 3), (2, 2), (1, 1)])
def test_one_row_that_stands_for_all_is_told_from_rows_that_differ(rows):
    with engine_of(Timed()) as engine:
        for turn, times in enumerate([(1, 1), (1, 1), (1, 5), (5, 1)]):
            xs = [randn(n, 8, seed=2 * turn + i) for i, n in enumerate(rows)]
            asked = [Asked(x, times=torch.full((len(x),), t)) for x, t in zip(xs, times, strict=True)]
            at_once(engine, *asked)
            for one, x, t in zip(asked, xs, times, strict=True):
                close(one.features[""], x * t)
        assert engine.merger.refusals == 1
