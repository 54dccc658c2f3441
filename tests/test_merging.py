"""Requests that run as one forward: each gets what it would get alone, and no one fails for another."""

import copy
import logging
import threading
import time

import pytest
import schoolhouse as sh
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import SAME, Asked, at_once, engine_of
from models import Net
from schoolhouse import encodings, errors
from schoolhouse_server import serve
from schoolhouse_server.batching import MergeSettings, Padding
from schoolhouse_server.engine import Engine
from schoolhouse_wire.encoder import encode
from torch import nn
from torch.nn import functional as F


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(*rows):
    """Requests of those rows, and what a forward of each alone gives."""
    xs = [randn(n, 8, seed=i) for i, n in enumerate(rows)]
    return [Asked(x) for x in xs], [Net().eval()(x) for x in xs]


def test_what_waits_together_runs_together_once_single_forwards_have_shown_that_it_may():
    with engine_of(Net()) as engine:
        asked, expected = pair(2, 3, 4)
        at_once(engine, *asked)
        assert [torch.equal(one.features[""], e) for one, e in zip(asked, expected, strict=True)] == [True] * 3
        runs = []
        for _ in range(12):
            before = engine.counters.forwards, engine.counters.rows
            asked, expected = pair(2, 3, 4)
            at_once(engine, *asked)
            for one, e in zip(asked, expected, strict=True):
                close(one.features[""], e)
            runs.append((engine.counters.forwards - before[0], engine.counters.rows - before[1]))
        # held against single ones at the 2nd, the 4th and the 8th; else a forward of nine rows, beside the gate's two
        checked, merged = (2 + 3 + 1, 2 + 9 + 9), (2 + 1, 2 + 9)
        assert runs == [checked, merged, checked, *[merged] * 3, checked, *[merged] * 5]
        assert engine.description.merge == "same-shape"


def test_of_many_small_requests_some_are_held_against_single_forwards():
    with engine_of(Net()) as engine:
        ran = []
        for _ in range(3):
            xs = [randn(1, 8, seed=i) for i in range(40)]
            asked = [Asked(x) for x in xs]
            ran.append([rows for rows, _ in at_once(engine, *asked)])
            for one, x in zip(asked, xs, strict=True):
                close(one.features[""], Net().eval()(x))
    assert ran == [[*[1] * 16, 16, *[1] * 16, 16, 8], [*[1] * 16, 16, 24], [40]]


TAPS = ["", "inner.fc", "inner.body", ("inner.fc", "input")]
KINDS = {"plain": None, "bf16": encodings.bf16, "int8": encodings.int8}


@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.integers(1, 5), st.sets(st.sampled_from(TAPS), min_size=1), st.sampled_from([*KINDS])),
            min_size=2,
            max_size=4,
        ),
        min_size=3,
        max_size=4,
    )
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_each_request_gets_its_own_rows_taps_and_encodings(rounds):
    net = Net().eval()
    with engine_of(Net()) as engine:
        for n, requests in enumerate(rounds):
            asked, xs = [], []
            for i, (rows, taps, kind) in enumerate(requests):
                xs.append(randn(rows, 8, seed=10 * n + i))
                made = dict.fromkeys(taps, KINDS[kind]) if KINDS[kind] else None
                asked.append(Asked(xs[-1], taps=sorted(taps, key=str), encodings=made))
            at_once(engine, *asked)
            for one, x, (rows, taps, kind) in zip(asked, xs, requests, strict=True):
                hidden = net.act(net.body(x))
                alone = {"": net(x), "inner.fc": net(x), "inner.body": hidden, ("inner.fc", "input"): hidden}
                features = one.features
                assert len(features) == len(taps)
                for tap in taps:
                    got = features[sh.Tap(tap) if isinstance(tap, str) else sh.Tap(*tap)]
                    got = got[0] if tap == TAPS[-1] else got
                    assert len(alone[tap]) == rows
                    if kind == "plain":
                        close(got, alone[tap])
                    else:
                        expected = encode(alone[tap], KINDS[kind]).dense()
                        torch.testing.assert_close(got.dense(), expected, rtol=2e-2, atol=2e-2)


class Words(nn.Module):
    """Attends over the tokens that count, of ids `[rows, length]`."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("table", torch.randn(10, 6, generator=generator))
        self.head = nn.Linear(6, 11, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(11, 6, generator=generator))

    def forward(self, ids, mask=None):
        x = self.table[ids]
        scores = x @ x.mT
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
        return self.head(scores.softmax(-1) @ x)


def ids(rows, length, seed=0):
    return torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(seed))


def served(module, **more):
    return serve(module, merge="pad", pad={"values": {"ids": 0}, "mask": "mask"}, **more)


class Held(nn.Module):
    """Counts its forwards, and holds those that are told to."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.began, self.go, self.shapes = threading.Semaphore(0), threading.Semaphore(0), []

    def forward(self, ids, mask=None, hold=False):
        if hold:
            self.began.release()
            assert self.go.acquire(timeout=20)
            return ids
        self.shapes.append(tuple(ids.shape))
        return self.inner(ids, mask)


def wait_until(reached):
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def behind_a_gate(server, module, teacher, submit):
    """Futures of `submit()`, whose requests the engine finds all waiting."""
    gate = teacher.submit((torch.zeros(1, 1),), {"hold": True}, [""])
    assert module.began.acquire(timeout=20)
    joined = server.load("teacher").joined
    futures = submit()
    wait_until(lambda: server.load("teacher").queued + server.load("teacher").joined - joined == len(futures))
    module.go.release()
    gate.result(20)
    return [future.result(20) for future in futures]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.booleans()), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_lengths_are_padded_and_cut_back(shapes, seed, words_server):
    server, module, teacher = words_server
    batches = []
    for i, (rows, length, masked) in enumerate(shapes):
        mask = ids(rows, length, seed + i + 50) > 2 if masked else None
        if mask is not None:
            mask[:, 0] = True
        batches.append({"ids": ids(rows, length, seed + i)} | ({"mask": mask.long()} if masked else {}))
    for _ in range(2):
        got = behind_a_gate(
            server, module, teacher, lambda: [teacher.submit((), batch, ["", "inner.head"]) for batch in batches]
        )
        for batch, features in zip(batches, got, strict=True):
            close(features[""], Words()(**batch))
            close(features["inner.head"], Words()(**batch))


def test_requests_of_one_length_merge_whatever_that_is():
    settings = MergeSettings(mode="pad", pad=Padding(values={"ids": 0}, mask="mask"))
    engine = Engine(sh.LocalTeacher(Held(Words())), max_queued=9, merge=settings)
    for length in (3, 4, 5, 6, 3, 3, 3):
        jobs = [Asked(ids=ids(2, length, i)).job for i in range(2)]
        [engine.merger.prepare(job) for job in jobs]
        assert engine.merger.fits(jobs[:1], jobs[1])
        engine._compute(jobs)
    assert engine.merger.refusals == 0
    assert engine.teacher.module.shapes[-1] == (4, 3)
    assert engine.teacher.module.shapes[:3] == [(2, 3), (2, 3), (4, 3)]


@pytest.fixture(scope="module")
def words_server():
    module = Held(Words())
    with served(module) as server, sh.connect(server.url) as teacher:
        yield server, module, teacher
        assert server.engines["teacher"].merger.refusals == 0, server.engines["teacher"].merger._refused
        merged = [rows for rows, length in module.shapes if rows > 3]
        assert merged
        assert teacher.describe().merge == "pad"


def test_positions_and_hidden_states_of_merged_requests():
    torch.manual_seed(0)
    module = Held(Words())
    asked = {
        "hidden": {"inner.head": encodings.at_positions(encodings.hidden("inner.head"))},
        "topk": {"inner.head": encodings.at_positions(encodings.topk(3))},
        "plain": {},
    }
    with served(module) as server, sh.connect(server.url) as teacher:

        def submit():
            return [
                teacher.submit(
                    (),
                    {"ids": ids(2, 3 + i, i)},
                    ["inner.head"],
                    encodings=asked[name],
                    positions=(ids(2, 3 + i, i) > 4) if name != "plain" else None,
                )
                for i, name in enumerate(kinds)
            ]

        first = teacher.submit(
            (), {"ids": ids(1, 2)}, ["inner.head"], encodings=asked["hidden"], positions=ids(1, 2) > 4
        )
        first.result(20)  # so that the client has the head
        for kinds in (["hidden", "hidden"], ["topk", "plain"], ["hidden", "topk", "plain", "hidden"]) * 2:
            got = behind_a_gate(server, module, teacher, submit)
            for i, (name, features) in enumerate(zip(kinds, got, strict=True)):
                expected = Words()(ids(2, 3 + i, i))
                if name == "plain":
                    close(features["inner.head"], expected)
                    continue
                mask = ids(2, 3 + i, i) > 4
                form = features["inner.head"]
                assert torch.equal(form.mask, mask)
                if name == "hidden":
                    close(form.values.dense(), expected[mask])
                else:
                    close(form.values.values, expected[mask].topk(3).values)
        assert server.engines["teacher"].merger.refusals == 0


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
        asked[2].job.deadline = time.monotonic() - 1
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


def test_what_was_learned_of_a_merged_forward_counts_for_other_numbers_of_rows():
    class Long(Net):
        def __init__(self):
            super().__init__()
            self.late, self.runs = nn.Identity(), 0
            self.late.register_forward_hook(self.count)

        def count(self, *_):
            self.runs += 1

        def forward(self, x):
            return self.late(super().forward(x))

    module = Long()
    with engine_of(module) as engine:
        for n in (1, 2, 3):
            xs = [randn(n, 8, seed=1), randn(n + 1, 8, seed=2)]
            asked = [Asked(x, taps=["inner.fc"]) for x in xs]
            before = module.runs
            at_once(engine, *asked)
            for one, x in zip(asked, xs, strict=True):
                close(one.features["inner.fc", "output"], Net().eval()(x))
        assert module.runs == before  # it ended after its last tap


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
        wait_until(lambda: engine.cache.nbytes > before + 2 * 100 * 5 * 4)
        assert engine.cache.nbytes - before < 2 * (100 * 5 * 4 + 3000) + 3000
        for one, features in zip(asked, first, strict=True):
            again = Asked(one.job.inputs[0])
            again.job.key = one.job.key
            engine.submit(again.job)
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
