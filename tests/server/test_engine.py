"""The replica's engine: what overlaps, what is computed once, what is kept, and what is counted."""

import queue
import threading
import time

import pytest
import schoolhouse as sh
import torch
from merging import submit
from models import Net
from schoolhouse.errors import TeacherForwardError
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.query import Wanted
from schoolhouse_server import serve
from schoolhouse_server.engine.cache import FeatureCache
from schoolhouse_server.engine.engine import STAGES, Engine, Job, Ticket
from schoolhouse_wire.v1 import directory_pb2
from schoolhouse_wire.values.codec import Arguments, pack
from torch import nn

WHOLE = Wanted.of([""])


def whole(answers):
    """The features of the whole module in the answer that is put into a queue."""
    declared = answers.get(timeout=20).features
    [features] = declared.tensors
    assert declared.header == pack([features]).header
    return features


def job(x, key=None, **more):
    """A job and the queue that its answer is put into."""
    answers = queue.SimpleQueue()

    def done(result):
        answers.put(result)

    return Job(Arguments((x,)), WHOLE, key, [Ticket(done, deadline=time.monotonic() + 60)], **more), answers


class Held(LocalTeacher):
    """Encodes large features when told to."""

    def __init__(self, module):
        super().__init__(module)
        self.go, self.forwards = threading.Event(), queue.SimpleQueue()
        self.count = 0

    def forward(self, inputs, wanted):
        values = super().forward(inputs, wanted)
        self.count += 1
        self.forwards.put(inputs[0][0, 0].item())
        return values

    def encode(self, values, wanted):
        assert self.go.wait(20)
        return super().encode(values, wanted)


class Wide(nn.Module):
    """100 KB a row, so that the features travel in frames."""

    def forward(self, x):
        return x.repeat(1, 4000)


def test_forwards_go_on_while_features_are_on_their_way_out_but_not_without_end():
    teacher = Held(Wide())
    engine = Engine(teacher, max_queued=100)
    engine.start()
    jobs = [job(torch.full((1, 8), float(i)), i) for i in range(10)]
    for one, _ in jobs:
        submit(engine, one)
    begun = [teacher.forwards.get(timeout=20) for _ in range(4)]
    assert begun == [0, 1, 2, 3]
    time.sleep(0.2)
    assert teacher.count == 4  # one is being encoded, two wait for that, one waits to be handed over
    teacher.go.set()
    for i, (_, answers) in enumerate(jobs):
        assert torch.equal(whole(answers), torch.full((1, 32000), float(i)))
    engine.close()
    assert (engine.served, engine.running, engine.queued) == (10, 0, 0)


class Slow(nn.Module):
    """Counts its forwards, and holds them until told."""

    def __init__(self, width=5):
        super().__init__()
        self.fc = nn.Linear(8, width)
        self.go, self.began, self.forwards = threading.Event(), threading.Semaphore(0), 0

    def forward(self, x):
        self.forwards += 1
        self.began.release()
        assert self.go.wait(20)
        return self.fc(x)


def test_small_features_hold_up_no_slow_device_for_which_others_wait():
    teacher = Held(Slow())
    engine = Engine(teacher, max_queued=100)
    engine.start()
    first, answers = job(torch.zeros(1, 8), "first")
    submit(engine, first)
    assert teacher.module.began.acquire(timeout=20)
    time.sleep(0.05)  # that a forward takes
    teacher.module.go.set()
    teacher.go.set()
    whole(answers)
    teacher.module.go.clear()
    teacher.go.clear()
    jobs = [job(torch.full((1, 8), float(i)), i) for i in range(3)]
    for one, _ in jobs:
        submit(engine, one)
    teacher.module.go.set()
    assert [teacher.forwards.get(timeout=20) for _ in range(4)] == [0, 0, 1, 2]  # and nothing is encoded
    teacher.go.set()
    for i, (_, answers) in enumerate(jobs):
        assert torch.equal(whole(answers), teacher.module.fc(torch.full((1, 8), float(i))))
    engine.close()


def load_of(server):
    return server.load("teacher")


def wait_until(reached):
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_identical_requests_in_flight_are_computed_once_for_all_clients():
    module = Slow()
    x = torch.randn(3, 8)
    with serve(module) as server, sh.connect(server.url) as a, sh.connect(server.url) as b:
        first = a.submit((torch.zeros(1, 8),), {}, [""])
        assert module.began.acquire(timeout=20)
        same = [teacher.submit((x.clone(),), {}, [""]) for teacher in (a, b, a)]
        others = [a.submit((x,), {}, ["fc"]), b.submit((x + 1,), {}, [""]), b.submit((), {"x": x}, [""])]
        wait_until(lambda: load_of(server).joined == 2 and load_of(server).queued == 4)
        module.go.set()
        expected = module.fc(x)
        for future in same:
            features = future.result(20)
            assert torch.equal(features[""], expected)
        assert torch.equal(others[0].result(20)["fc"], expected)
        assert torch.equal(others[1].result(20)[""], module.fc(x + 1))
        assert torch.equal(others[2].result(20)[""], expected)
        first.result(20)
        assert module.forwards == 5
        load = load_of(server)
        assert (load.joined, load.served, load.cached, load.missed) == (2, 7, 0, 0)
        a.submit((x,), {}, [""]).result(20)  # not in flight any more
        assert module.forwards == 6


def test_one_of_several_who_wait_may_cancel():
    module = Slow()
    x = torch.randn(3, 8)
    with serve(module) as server, sh.connect(server.url) as a, sh.connect(server.url) as b:
        a.submit((torch.zeros(1, 8),), {}, [""])
        assert module.began.acquire(timeout=20)
        one = a.submit((x,), {}, [""])
        other = b.submit((x,), {}, [""])
        wait_until(lambda: load_of(server).joined == 1)
        assert one.cancel()
        module.go.set()
        assert torch.equal(other.result(20)[""], module.fc(x))


def test_equal_digests_alone_do_not_join():
    module = Slow()
    engine = Engine(LocalTeacher(module), max_queued=10)
    engine.start()
    jobs = [job(x, "the same key") for x in (torch.zeros(1, 8), torch.ones(1, 8), torch.ones(1, 8))]
    submit(engine, jobs[0][0])
    assert module.began.acquire(timeout=20)
    for one, _ in jobs[1:]:
        submit(engine, one)
    module.go.set()
    given = [whole(answers) for _, answers in jobs]
    assert torch.equal(given[0], module.fc(torch.zeros(1, 8)))
    assert torch.equal(given[1], module.fc(torch.ones(1, 8)))
    assert torch.equal(given[2], given[1])
    assert engine.joined == 1
    engine.close()


def test_an_error_reaches_all_who_wait():
    class Failing(Slow):
        def forward(self, x):
            super().forward(x)
            raise ValueError("bad")

    module = Failing()
    with serve(module) as server, sh.connect(server.url) as a, sh.connect(server.url) as b:
        futures = [teacher.submit((torch.ones(1, 8),), {}, [""]) for teacher in (a, b)]
        wait_until(lambda: load_of(server).joined == 1)
        module.go.set()
        for future in futures:
            with pytest.raises(TeacherForwardError, match="bad"):
                future.result(20)
        assert module.forwards == 1


class Counted(Net):
    def __init__(self):
        super().__init__(32)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return super().forward(x)


@pytest.mark.parametrize("rows", [4, 5000])
def test_the_cache_serves_later_epochs_and_other_jobs(rows):
    module = Counted()
    data = [torch.randn(rows, 8) for _ in range(3)]
    with serve(module, cache_bytes=10 << 20) as server:
        for _ in range(3):
            with sh.connect(server.url) as teacher:
                for x in data:
                    features = teacher.submit((x,), {}, ["", "fc"]).result()
                    assert torch.equal(features[""], Net(32).eval()(x))
                    assert torch.equal(features["fc"], features[""])
        assert module.forwards == 3
        with sh.connect(server.url) as teacher:
            teacher.submit((data[0],), {}, ["fc"]).result()  # other taps, other features
            teacher.submit((data[0].to(torch.float32).t().contiguous().t(),), {}, ["", "fc"]).result()  # another layout
        assert module.forwards == 5
        entries = server.engines["teacher"].cache.nbytes
        assert 5 * rows * 5 * 4 < entries < 5 * (rows * 5 * 4 + 5000)
        assert load_of(server).cache_bytes == entries
        load = load_of(server)
        assert (load.cached, load.missed, load.served) == (6, 5, 11)


def test_the_cache_is_bounded_and_forgets_what_was_not_used_for_longest():
    values = {i: pack([torch.full((10_000,), float(i))]) for i in range(4)}
    cache = FeatureCache(100_000)
    keys = [cache.key(Arguments((torch.tensor(i),)), "w") for i in range(4)]
    for i in range(2):
        cache.put(keys[i], values[i])
    assert cache.get(keys[0]) == values[0]
    cache.put(keys[2], values[2])
    assert cache.get(keys[1]) is None
    assert cache.get(keys[0]) == values[0]
    assert cache.get(keys[2]) == values[2]
    cache.put(keys[3], pack([torch.zeros(25_001)]))  # larger than all of it
    assert 80_000 < cache.nbytes < 86_000
    cache.put(keys[2], values[3])
    assert 80_000 < cache.nbytes < 86_000
    assert (cache.hits, cache.misses) == (3, 1)
    assert len({*keys, cache.key(Arguments((torch.tensor(0),)), "other")}) == 5


@pytest.mark.parametrize("feature", [torch.zeros(0), 1.5, "a" * 500, torch.zeros(4), dict.fromkeys(range(100))])
def test_the_cache_counts_what_is_no_memory_of_a_tensor(feature):
    cache = FeatureCache(100_000)
    for i in range(1000):
        cache.put(bytes([i % 256, i // 256]), pack([feature]))
    kept = [i for i in range(1000) if cache.get(bytes([i % 256, i // 256])) is not None]
    assert 20 <= len(kept) <= 100, len(kept)
    assert kept == [*range(1000 - len(kept), 1000)]


class Reused(nn.Module):
    """Returns memory that its next forward writes into, and that is no buffer."""

    def __init__(self, width):
        super().__init__()
        self.kept = torch.zeros(1, width)

    def forward(self, x):
        return self.kept.copy_(x[:, :1].expand(1, self.kept.shape[1]))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_memory_that_a_module_uses_again_never_gives_another_batchs_features(cache_bytes):
    with serve(Reused(4), cache_bytes=cache_bytes) as server, sh.connect(server.url) as teacher:
        for _ in range(3):
            futures = [teacher.submit((torch.full((1, 8), float(i)),), {}, [""]) for i in range(40)]
            for i, future in enumerate(futures):
                assert torch.equal(future.result()[""], torch.full((1, 4), float(i)))
    with serve(Reused(100_000), cache_bytes=cache_bytes) as server, sh.connect(server.url) as teacher:
        for _ in range(3):
            futures = [teacher.submit((torch.full((1, 8), float(i)),), {}, [""]) for i in range(20)]
            for i, future in enumerate(futures):
                assert torch.equal(future.result()[""], torch.full((1, 100_000), float(i)))


def test_where_the_time_goes_is_counted_by_stage():
    with serve(Wide()) as server, sh.connect(server.url) as teacher:
        for i in range(5):
            teacher.submit((torch.full((10, 8), float(i)),), {}, [""]).result()
        wait_until(lambda: load_of(server).stage_s["send"] > 0)  # counted after the last frame
        spent = dict(load_of(server).stage_s)
        assert set(spent) == set(STAGES)
        assert all(0 <= seconds < 20 for seconds in spent.values())
        assert spent["forward"] > 0
        assert spent["receive"] > 0
        assert isinstance(load_of(server), directory_pb2.Load)


def test_forwards_are_short_by_cpu_time_unless_they_sleep():
    runner = Engine(LocalTeacher(nn.Linear(8, 5)), max_queued=9).runner
    assert not runner.short  # nothing is known yet
    runner._took(2e-4, 3e-4)
    assert runner.short
    runner._took(2e-4, 1.0)  # once the machine did something else
    assert runner.short
    for _ in range(30):
        runner._took(2e-4, 0.03)  # as an emulated device sleeps
    assert not runner.short
    for _ in range(30):
        runner._took(2e-4, 3e-4)
    assert runner.short
    for _ in range(30):
        runner._took(5e-3, 5e-3)
    assert not runner.short
