"""Inputs that spoil a forward: numbers that are not finite, and crashes. They stay with their own request."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import Asked, at_once, close, engine_of, pair, randn
from models import Net
from schoolhouse import errors
from schoolhouse_server.device import nonfinite
from schoolhouse_server.merge.settings import MergeSettings, Padding
from torch import nn

NAN, INF = float("nan"), float("inf")


class Timid(Net):
    """Returns nothing but zeros if any number is not finite, whoever's it is."""

    def forward(self, x):
        y = super().forward(x.nan_to_num(posinf=1e3))
        return y if x.isfinite().all() else torch.zeros_like(y)


class Spreading(nn.Module):
    """The logarithm of each number; where one has none, nobody gets any."""

    def forward(self, x):
        y = x.log()
        return y + 0.0 * y.sum()


def shown_to_merge(engine, make, times=2):
    for _ in range(times):
        asked = make()
        at_once(engine, *asked)
        [one.features for one in asked]


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_inputs_that_are_not_finite_run_alone(number):
    bad = randn(2, 8)
    bad[1, 3] = number
    with engine_of(Timid()) as engine:
        shown_to_merge(engine, lambda: pair(2, 3)[0])
        for _ in range(2):
            asked, expected = pair(2, 3)
            poisoned = Asked(bad)
            ran = at_once(engine, asked[0], poisoned, asked[1])
            for one, e in zip(asked, expected, strict=True):
                close(one.features[""], e)
            assert not poisoned.features[""].any()
            assert max(rows for rows, _ in ran) == 5  # of the others, together
        assert engine.merger.refusals == 0


def positive(seed):
    return randn(2, 8, seed=seed).abs() + 0.1


def test_a_nan_that_a_forward_makes_reaches_no_other_request():
    with engine_of(Spreading()) as engine:
        shown_to_merge(engine, lambda: [Asked(positive(i)) for i in range(2)])
        for _ in range(2):
            asked = [Asked(positive(i)) for i in range(2)]
            poisoned = Asked(-positive(3))
            at_once(engine, asked[0], poisoned, asked[1])
            for one in asked:
                assert torch.equal(one.features[""], one.job.inputs[0].log())  # from a forward of its own
            assert poisoned.features[""].isnan().all()
        assert engine.merger.refusals == 1  # such a teacher's requests are not merged any more


def test_a_nan_of_one_row_keeps_no_others_from_being_merged_later():
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    def poisoned():
        one = Asked(-positive(3))
        one.job.source = "somebody"
        return one

    with engine_of(Log()) as engine:
        shown_to_merge(engine, lambda: [Asked(positive(i)) for i in range(2)])
        for turn in range(5):
            asked, bad = [Asked(positive(i)) for i in range(2)], poisoned()
            ran = at_once(engine, asked[0], bad, asked[1])
            for one in asked:
                close(one.features[""], one.job.inputs[0].log())
            assert bad.features[""].isnan().all()
            if turn >= 3:  # by then that session's requests run by themselves
                assert sorted(rows for rows, _ in ran) == [2, 4]
        assert engine.merger.refusals == 0


class Masked(nn.Module):
    """Logits of which the last class never is."""

    def forward(self, x):
        y = x * 2
        y[:, -1] = -INF
        return y


def test_infinities_that_belong_there_are_looked_at_ever_more_rarely():
    with engine_of(Masked()) as engine:
        ran = []
        for _ in range(9):
            asked, _ = pair(2, 3)
            at_once(engine, *asked)
            for one in asked:
                assert torch.equal(one.features[""], Masked()(one.job.inputs[0]))
            ran.append([rows for rows, _ in engine.teacher.module.batches])  # with what ran again before it answered
        assert ran.count([5]) >= 3
        assert any(rows[:1] == [5] and len(rows) > 1 for rows in ran)  # held against single ones after all
        assert engine.merger.refusals == 0


def test_what_is_not_finite_where_a_request_is_padded_is_nobodys():
    class Inverse(nn.Module):
        def forward(self, x, mask=None):
            return 1.0 / x

    pad = MergeSettings(mode="pad", pad=Padding(values={"x": 0}, mask="mask"))
    with engine_of(Inverse(), pad) as engine:
        for _ in range(3):
            asked = [Asked(x=positive(1)[..., None][:, :5]), Asked(x=positive(2)[..., None][:, :3])]
            ran = at_once(engine, *asked)
            for one in asked:
                close(one.features[""], 1.0 / one.job.inputs.kwargs["x"])
        assert [rows for rows, *_ in ran] == [4]


class Crash(BaseException):
    pass


class Crashing(Net):
    def forward(self, x):
        if (x > 90).any():
            raise Crash("no such token")
        return super().forward(x)


def test_a_crash_hits_only_its_own_request():
    with engine_of(Crashing()) as engine:
        shown_to_merge(engine, lambda: pair(2, 3)[0])
        asked, expected = pair(2, 3)
        bad = Asked(torch.full((1, 8), 99.0))
        ran = at_once(engine, asked[0], bad, asked[1])
        for one, e in zip(asked, expected, strict=True):
            close(one.features[""], e)
        error = bad.result()
        assert isinstance(error, errors.TeacherForwardError)
        assert "no such token" in str(error)
        assert [rows for rows, _ in ran] == [6, 2, 1, 3]


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.5, -448.0, NAN, INF, -INF]), min_size=1), st.sampled_from(DTYPES))
def test_what_is_finite_is_told_of_any_dtype(numbers, dtype):
    tensor = torch.tensor(numbers, dtype=torch.float32).to(dtype)
    numbers = tensor.to(torch.complex64).real.tolist()
    values = {"a": [tensor, torch.tensor([7])], "b": torch.ones(2)}
    assert nonfinite.is_finite(values) == all(abs(number) < INF for number in numbers)
    kinds = {"nan": any(n != n for n in numbers), "infinite": any(abs(n) == INF for n in numbers)}
    assert nonfinite.kind(values) == next((kind for kind, found in kinds.items() if found), "finite")


def test_a_sum_that_is_too_large_is_no_infinity():
    assert nonfinite.is_finite(torch.full((4,), torch.finfo(torch.float32).max))
    assert nonfinite.is_finite([torch.tensor([1]), torch.zeros(0), "text", torch.eye(3).to_sparse()])
