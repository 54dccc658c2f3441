"""What merging must not do: fail one for another, exceed its bounds, or mix what does not belong together."""

import copy
import logging
import threading
import time

import pytest
import schoolhouse as sh
import torch
from memfd import soon
from merging import SAME, Asked, Words, at_once, close, engine_of, ids, pair, randn, submit
from models import Net
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.merge.settings import MergeSettings, Padding
from torch import nn
from torch.nn import functional as F


class Picky(Net):
    """Raises for rows that it does not like, and for more than it has room for."""

    room = 100

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        if (x > 90).any():
            raise ValueError("poison")
        return super().forward(x)


def test_a_poisoned_request_fails_alone():
    with engine_of(Picky()) as engine:
        for _ in range(3):
            asked, expected = pair(2, 3)
            bad = Asked(torch.full((1, 8), 99.0))
            at_once(engine, asked[0], bad, asked[1])
            for one, e in zip(asked, expected, strict=True):
                close(one.features[""], e)
            error = bad.result()
            assert isinstance(error, errors.TeacherForwardError)
            assert "poison" in str(error)
        for _ in range(2):  # and nothing was learned against the others
            asked, _ = pair(2, 3)
            at_once(engine, *asked)
            assert [one.features[""].shape for one in asked] == [(2, 5), (3, 5)]
        bad = Asked(torch.full((1, 8), 99.0))
        asked, expected = pair(2, 3)
        ran = at_once(engine, asked[0], bad, asked[1])
        close(asked[1].features[""], expected[1])
        assert isinstance(bad.result(), errors.TeacherForwardError)
        close(asked[0].features[""], expected[0])
        assert [shape[0] for shape in ran] == [6, 2, 1, 3]  # together, and then one by one
        assert [shape[0] for shape in at_once(engine, *pair(2, 3)[0])] == [5]  # the others go on together


def test_a_batch_too_large_for_the_device_is_run_singly_and_later_ones_are_smaller():
    with engine_of(Picky()) as engine:
        at_once(engine, *pair(2, 2)[0])
        Picky.room = 6
        try:
            asked, expected = pair(2, 2, 2, 2)
            at_once(engine, *asked)
            for one, e in zip(asked, expected, strict=True):
                close(one.features[""], e)
            at_once(engine, *pair(2, 2)[0])
            asked, expected = pair(2, 2, 2, 2)
            ran = at_once(engine, *asked)
            for one, e in zip(asked, expected, strict=True):
                close(one.features[""], e)
            assert max(rows for rows, _ in ran) == 4
        finally:
            Picky.room = 100


def test_who_gave_up_or_came_too_late_is_left_out():
    with engine_of(Net()) as engine:
        at_once(engine, *pair(2, 2)[0])
        at_once(engine, *pair(2, 2)[0])
        asked, expected = pair(2, 3, 4, 5)
        asked[1].ticket.cancelled = True
        asked[2].ticket.deadline = time.monotonic() - 1
        ran = at_once(engine, *asked)
        close(asked[0].features[""], expected[0])
        close(asked[3].features[""], expected[3])
        assert isinstance(asked[2].result(), errors.TeacherTimeoutError)
        assert [shape[0] for shape in ran] == [7]
        assert asked[1].answers.empty()


@pytest.mark.parametrize("settings", [MergeSettings(mode="same-shape", max_batch_rows=6), SAME])
def test_a_batch_is_bounded_in_rows(settings):
    with engine_of(Net(), settings) as engine:
        asked, expected = pair(3, 3, 3, 7)
        at_once(engine, *asked)
        for one, e in zip(asked, expected, strict=True):
            close(one.features[""], e)
        asked, _ = pair(3, 3, 3, 7)
        at_once(engine, *asked)
        [one.result() for one in asked]
        asked, expected = pair(3, 3, 3, 7)
        ran = at_once(engine, *asked)
        for one, e in zip(asked, expected, strict=True):
            close(one.features[""], e)
        assert sorted(rows for rows, _ in ran) == ([3, 6, 7] if settings.max_batch_rows == 6 else [16])


def test_padding_is_bounded_in_tokens_and_in_waste():
    pad = Padding(values={"ids": 0}, mask="mask")
    engine = sh.LocalTeacher(Words())
    tokens = MergeSettings(mode="pad", pad=pad, max_batch_tokens=40)
    merger = Engine(engine, max_queued=9, merge=tokens).merger
    made = [Asked(ids=ids(2, n)).job for n in (8, 8, 6, 20, 1)]
    [merger.prepare(job) for job in made]
    assert merger.fits(made[:1], made[1])
    assert merger.fits(made[:1], made[2])
    assert not merger.fits(made[:1], made[3])  # 4 rows of 20
    assert not merger.fits(made[:2], made[2])  # 6 of 8
    wide = Engine(engine, max_queued=9, merge=MergeSettings(mode="pad", pad=pad)).merger
    assert wide.fits(made[3:4], made[0])
    assert wide.fits(made[:1], made[4])
    assert not wide.fits([made[4], made[4], made[4]], made[3])  # 8 rows of 20 for 26 that were asked for


class Mixing(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return getattr(self, self.kind)(self.fc(x))

    def batch_statistics(self, x):
        return F.batch_norm(x, None, None, training=True)

    def attention_across_the_batch(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]

    def sequence_first(self, x):
        return self.lstm(x[:, None].expand(-1, 2, -1))[0]

    def noise(self, x):
        return x + torch.randn_like(x)

    def rare_noise(self, x):
        return x + (torch.rand(()) < 1e-9)

    def state(self, x):
        self.calls += 1
        return x + self.calls

    def running_mean(self, x):
        self.seen.add_(1)
        return x

    def running_mean_replaced(self, x):
        self.seen = 0.9 * self.seen + x.mean()
        return x

    def largest_of_all(self, x):
        return x, x.amax()

    def capacity(self, x):
        """Experts with room for two rows each."""
        choice = x.argmax(-1)
        place = (F.one_hot(choice, 8).cumsum(0) * F.one_hot(choice, 8)).sum(-1)
        return torch.where((place <= 2)[:, None], x, 0)


KINDS_OF_MIXING = [
    "batch_statistics",
    "attention_across_the_batch",
    "sequence_first",
    "noise",
    "rare_noise",
    "state",
    "running_mean",
    "running_mean_replaced",
    "largest_of_all",
    "capacity",
]


@pytest.mark.parametrize("kind", KINDS_OF_MIXING)
def test_what_cannot_be_merged_is_answered_singly_and_never_tried_again(kind, caplog):
    torch.manual_seed(0)
    module = Mixing(kind)
    with engine_of(module) as engine, caplog.at_level(logging.WARNING):
        for turn in range(3):
            xs = [randn(6, 8, seed=turn), randn(4, 8, seed=turn + 9)]
            asked = [Asked(x) for x in xs]
            ran = at_once(engine, *asked)
            got = [one.features[""] for one in asked]
            if kind not in ("noise", "rare_noise", "state", "running_mean"):
                for x, features in zip(xs, got, strict=True):
                    flat = [features] if isinstance(features, torch.Tensor) else features
                    with torch.no_grad():
                        expected = module(x)
                    expected = [expected] if isinstance(expected, torch.Tensor) else expected
                    assert all(torch.equal(f, e) for f, e in zip(flat, expected, strict=True))
            if turn:
                assert [len_ for len_, _ in ran] == [6, 4]
        assert engine.merger.refusals == 1
        [record] = [r for r in caplog.records if "not merged" in r.getMessage()]
        assert "'teacher'" in record.getMessage()


def test_a_tap_that_mixes_rows_does_not_keep_others_from_merging():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.Identity()

        def forward(self, x):
            self.norm(x - x.mean(0))
            return super().forward(x)

    with engine_of(Two()) as engine:
        for _ in range(3):
            xs = [randn(n, 8, seed=n) for n in (2, 3, 4)]
            taps = (["inner.fc"], ["inner.norm"], ["inner.fc"])
            asked = [Asked(x, taps=t) for x, t in zip(xs, taps, strict=True)]
            ran = at_once(engine, *asked)
            close(asked[0].features["inner.fc", "output"], Net().eval()(xs[0]))
            close(asked[1].features["inner.norm", "output"], xs[1] - xs[1].mean(0))
            close(asked[2].features["inner.fc", "output"], Net().eval()(xs[2]))
        assert sorted(shape[0] for shape in ran) in ([2, 3, 4, 6], [3, 6])


def test_a_model_that_begins_to_mix_rows_is_found_by_a_later_check():
    class Turning(Net):
        mixing = False

        def forward(self, x):
            out = super().forward(x)
            return out - out.mean(0) if self.mixing else out

    module = Turning()
    with engine_of(module) as engine:
        for _ in range(3):
            at_once(engine, *pair(2, 3)[0])
        module.mixing = True
        for _ in range(4):  # until the 4th, and past it
            asked, expected = pair(2, 3)
            at_once(engine, *asked)
            got = [one.features[""] for one in asked]
        for features, e in zip(got, expected, strict=True):
            close(features, e - e.mean(0))
        assert engine.merger.refusals == 1


def test_a_feature_that_did_not_depend_on_rows_and_then_does():
    class Flagged(Net):
        def forward(self, x):
            return super().forward(x), (x > 50).any()

    with engine_of(Flagged()) as engine:
        for _ in range(4):
            asked, _ = pair(2, 3)
            at_once(engine, *asked)
            assert [one.features[""][1].item() for one in asked] == [False, False]
        for turn in range(5):
            asked, _ = pair(2, 3)
            odd = Asked(torch.full((1, 8), 51.0))
            at_once(engine, *asked, odd)
            assert [one.features[""][1].item() for one in (*asked, odd)] == [False, False, True]
            assert turn or engine.merger.refusals == 0  # it is learned anew


def test_the_cache_keeps_each_requests_own_features_and_no_more():
    with engine_of(Net(64), cache_bytes=1 << 20) as engine:
        at_once(engine, *[Asked(randn(100, 8, seed=i)) for i in range(2)])
        at_once(engine, *[Asked(randn(100, 8, seed=i + 2)) for i in range(2)])
        asked = [Asked(randn(100, 8, seed=i + 4)) for i in range(2)]
        for one in asked:
            one.job.key = ("the same", id(one))
        before = engine.cache.nbytes
        ran = at_once(engine, *asked)
        first = [one.features[""] for one in asked]
        assert [rows for rows, _ in ran] == [200]
        assert soon(lambda: engine.cache.nbytes > before + 2 * 100 * 5 * 4)
        assert engine.cache.nbytes - before < 2 * (100 * 5 * 4 + 3000) + 3000
        for one, features in zip(asked, first, strict=True):
            again = Asked(one.job.inputs[0])
            again.job.key = one.job.key
            submit(engine, again.job)
            assert torch.equal(again.features[""], features)
        assert engine.cache.hits == 2


class Echo(nn.Module):
    """Features that tell whose row they are of."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(20):
            y = self.fc(x)
        return {"who": x[:, :2].clone(), "y": y}


def test_many_clients_each_get_their_own_rows():
    torch.manual_seed(0)
    module = Echo()
    alone = copy.deepcopy(module)  # hooks are on the other
    wrong, done = [], []
    with serve(module, merge="same-shape", max_wait_ms=5) as server:

        def work(me):
            with sh.connect(server.url, job=f"job-{me}") as teacher:
                for step in range(0, 60, 4):
                    xs = [randn(1 + (me + step + k) % 5, 64, seed=100 * me + step + k) for k in range(4)]
                    for k, x in enumerate(xs):
                        x[:, 0], x[:, 1] = me, step + k
                    futures = [teacher.submit((x,), {}, [""] if me % 2 else ["", "fc"]) for x in xs]
                    for x, future in zip(xs, futures, strict=True):
                        features = future.result(30)
                        if not torch.equal(features[""]["who"], x[:, :2]):
                            wrong.append((me, step))
                        close(features[""]["y"], alone.fc(x).detach())
            done.append(me)

        threads = [threading.Thread(target=work, args=(me,)) for me in range(6)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        engine = server.engines["teacher"]
        assert (wrong, sorted(done)) == ([], [*range(6)])
        assert engine.merger.refusals == 0
        assert engine.counters.rows / engine.counters.forwards > 3.5  # of 3 in a request
        assert server.load("teacher").batch_limit_rows == 256
