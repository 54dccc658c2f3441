"""Requests that run as one forward: each gets what it would get alone, and no one fails for another."""

import threading
import time

import pytest
import schoolhouse as sh
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import Asked, Words, at_once, close, engine_of, ids, pair, randn
from models import Net
from schoolhouse import encodings
from schoolhouse.teachers.encoder import encode
from schoolhouse_server import serve
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.merge.settings import MergeSettings, Padding
from torch import nn


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


def served(module, **more):
    return serve(module, merge="pad", pad={"values": {"ids": 0}, "mask": "mask"}, **{"allow_head": True, **more})


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
        engine.runner.compute(jobs)
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
