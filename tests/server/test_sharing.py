"""Jobs that share a teacher over real servers: who is served, who waits, and what they are told."""

import threading
import time
from concurrent.futures import wait
from types import SimpleNamespace

import grpc
import pytest
import schoolhouse as sh
import torch
from memfd import soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub
from torch import nn

WAYS = pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "stream"])


class Gate(nn.Module):
    """Notes the first number of each batch, and holds each forward until it is opened."""

    def __init__(self):
        super().__init__()
        self.opened, self.entered, self.seen = threading.Event(), threading.Semaphore(0), []
        self.pause_s = 0.0

    def forward(self, x):
        self.seen.append(int(x.flatten()[0]))
        self.entered.release()
        assert self.opened.wait(30)
        time.sleep(self.pause_s)
        return x + 1


def ask(teacher, number, rows=1, width=1):
    return teacher.submit((torch.full((rows, width), float(number)),), {}, [""])


def load_of(server):
    return server.load("teacher")


def job_of(server, name):
    return next((job for job in load_of(server).jobs if job.job == name), directory_pb2.JobLoad())  # not there yet


def answers(futures, numbers):
    for future, number in zip(futures, numbers, strict=True):
        assert future.result(30)[""].eq(number + 1).all()


def test_a_light_job_does_not_wait_for_all_that_a_heavy_one_has_queued():
    gate = Gate()
    with (
        serve(gate) as server,
        sh.connect(server.url, job="heavy") as heavy,
        sh.connect(server.url, job="light") as light,
    ):
        heavy.describe()  # its session is open: what is asked before goes in any order
        many = [ask(heavy, i, rows=8) for i in range(30)]
        assert gate.entered.acquire(timeout=20)
        assert soon(lambda: load_of(server).queued == 29)
        few = [ask(light, 100 + i, rows=8) for i in range(3)]
        assert soon(lambda: load_of(server).queued == 32)
        gate.opened.set()
        answers(few, range(100, 103))
        answers(many, range(30))
        assert gate.seen.index(102) < 8
        assert [n for n in gate.seen if n < 100] == [*range(30)]
        heavy.close()
        light.close()


class Timed(Gate):
    """Takes `seconds(x)` of the device, by the clock of a device that is emulated."""

    def __init__(self, monkeypatch, seconds):
        super().__init__()
        self.now, self._seconds = 0.0, seconds
        monkeypatch.setattr("schoolhouse_server.device.device.time", SimpleNamespace(perf_counter=lambda: self.now))

    def forward(self, x):
        self.now += self._seconds(x)
        return super().forward(x)


def test_weights_and_the_time_on_the_device_decide_about_shares(monkeypatch):
    gate = Timed(monkeypatch, lambda x: len(x) * 0.1)
    settings = {"a": (3.0, 2), "b": (1.0, 4), "c": (1.0, 1)}  # weight and rows
    with serve(gate, max_in_flight=200) as server:
        teachers = {
            job: sh.connect(server.url, job=job, sharing=sh.Sharing(weight=weight))
            for job, (weight, _) in settings.items()
        }
        futures = [ask(teachers["c"], 0)]
        assert gate.entered.acquire(timeout=20)
        for i, (job, (_, rows)) in enumerate(settings.items()):
            futures += [ask(teachers[job], 1000 * (i + 1) + n, rows) for n in range(150)]
        assert soon(lambda: load_of(server).queued == 450)
        gate.opened.set()
        wait(futures, 60)
        part = gate.seen[:101]  # while all wait
        rows = [sum(rows for n in part if n // 1000 == i + 1) for i, (_, rows) in enumerate(settings.values())]
        assert rows[0] / 3 == pytest.approx(rows[1], abs=10)
        assert job_of(server, "a").weight == 3
        assert job_of(server, "a").cost == 300
        for teacher in teachers.values():
            teacher.close()


def test_the_shape_of_the_inputs_does_not_make_a_request_cheap(monkeypatch):
    """Two jobs ask for one row each; a row of one of them takes fifty times as long, for its length."""
    gate = Timed(monkeypatch, lambda x: x.shape[1] * 0.1)
    with serve(gate, max_in_flight=200) as server:
        teachers = {name: sh.connect(server.url, job=name) for name in ("long", "short", "first")}
        first = ask(teachers["first"], 0)
        assert gate.entered.acquire(timeout=20)
        asked = [ask(teachers["long"], i, width=50) for i in range(1, 21)]
        asked += [ask(teachers["short"], 100 + i, width=1) for i in range(100)]
        assert soon(lambda: load_of(server).queued == 120)
        gate.opened.set()
        wait([first, *asked], 60)
        last = max(at for at, number in enumerate(gate.seen) if number >= 100)
        # The short ones take as long as two long ones. A few more may begin before the first one's time is known.
        assert sum(0 < number < 100 for number in gate.seen[:last]) <= 8
        assert job_of(server, "long").device_s == pytest.approx(20 * 50 * 0.1, rel=0.05)
        assert job_of(server, "short").device_s == pytest.approx(100 * 0.1, rel=0.05)
        for teacher in teachers.values():
            teacher.close()


def test_tokens_are_counted_where_asked_for():
    with serve(nn.Identity(), cost="tokens") as server, sh.connect(server.url, job="t") as teacher:
        teacher.submit((torch.ones(3, 7, 2),), {}, [""]).result(20)
        teacher.submit((torch.ones(5),), {}, [""]).result(20)
        assert job_of(server, "t").cost == 3 * 7 + 5
        assert job_of(server, "t").rows == 8


@WAYS
def test_beyond_its_quota_a_job_waits_and_is_then_served(shared_memory):
    gate, width = Gate(), 100_000
    with serve(gate, max_in_flight=4) as server:
        ranks = [
            sh.connect(server.url, job="ddp", transport=sh.Transport(shared_memory=shared_memory)) for _ in range(3)
        ]
        futures = [ask(rank, 10 * r + i, width=width) for i in range(8) for r, rank in enumerate(ranks)]
        assert soon(lambda: job_of(server, "ddp").in_flight == 4)
        assert soon(lambda: job_of(server, "ddp").waits >= 2)
        time.sleep(0.2)
        assert job_of(server, "ddp").in_flight == 4
        assert load_of(server).queued <= 4
        gate.opened.set()
        answers(futures, [10 * r + i for i in range(8) for r in range(3)])
        assert sorted(gate.seen) == sorted(10 * r + i for i in range(8) for r in range(3))
        assert dict(load_of(server).errors) == {}
        assert soon(lambda: job_of(server, "ddp").in_flight == 0)
        for rank in ranks:
            rank.close()


@WAYS
def test_a_job_keeps_to_its_bytes_and_a_request_larger_than_that_goes_alone(shared_memory):
    gate = Gate()
    with serve(gate, max_job_bytes=1_000_000) as server:
        ranks = [
            sh.connect(server.url, job="ddp", transport=sh.Transport(shared_memory=shared_memory)) for _ in range(2)
        ]
        futures = [ask(ranks[i % 2], i, width=100_000) for i in range(8)]
        assert soon(lambda: job_of(server, "ddp").in_flight == 2)
        large = ask(ranks[0], 50, width=400_000)
        time.sleep(0.1)
        assert job_of(server, "ddp").in_flight == 2
        gate.opened.set()
        answers([*futures, large], [*range(8), 50])
        for rank in ranks:
            rank.close()


def test_the_bound_of_the_queue_makes_jobs_wait_and_none_of_them_starves():
    gate = Gate()
    gate.pause_s = 0.005
    with serve(gate, max_queued=4) as server:
        teachers = [sh.connect(server.url, job=f"job-{i}") for i in range(6)]
        futures = [ask(teacher, 100 * t + i) for i in range(20) for t, teacher in enumerate(teachers)]
        assert soon(lambda: sum(job.in_flight for job in load_of(server).jobs) == 4)
        assert soon(lambda: sum(job.waits > 0 for job in load_of(server).jobs) >= 5)
        gate.opened.set()
        answers(futures, [100 * t + i for i in range(20) for t in range(6)])
        first = [n // 100 for n in gate.seen[:90]]  # who starved would come after the 100 of the others
        assert all(first.count(t) >= 3 for t in range(6)), gate.seen
        for teacher in teachers:
            teacher.close()


def test_a_greedy_rank_does_not_keep_another_from_its_turn():
    gate = Gate()
    gate.pause_s = 0.01
    with serve(gate, max_in_flight=2) as server:
        greedy, modest = (sh.connect(server.url, job="ddp") for _ in range(2))
        futures = [ask(greedy, i) for i in range(100)]
        assert gate.entered.acquire(timeout=20)
        one = ask(modest, 1000)
        assert soon(lambda: job_of(server, "ddp").waits >= 1)
        gate.opened.set()
        answers([one], [1000])
        assert gate.seen.index(1000) < 60  # as soon as its threads run; one that is kept from its turn is the last
        answers(futures, range(100))
        greedy.close()
        modest.close()


@WAYS
def test_cancelled_while_it_waits(shared_memory):
    gate = Gate()
    with serve(gate, max_in_flight=2) as server:
        ranks = [
            sh.connect(server.url, job="ddp", transport=sh.Transport(shared_memory=shared_memory)) for _ in range(2)
        ]
        for _ in range(5):
            futures = [ask(ranks[i % 2], i, width=700_000) for i in range(12)]
            time.sleep(0.02)
            for i, future in enumerate(futures):
                if i % 3:
                    future.cancel()
        kept = ask(ranks[1], 500)
        gate.opened.set()
        answers([kept], [500])
        answers(futures[::3], range(0, 12, 3))
        assert soon(lambda: job_of(server, "ddp").in_flight == 0)
        for rank in ranks:
            rank.close()


@WAYS
def test_many_that_are_cancelled_over_quota_do_not_cost_the_session(shared_memory):
    gate = Gate()
    with serve(gate, max_in_flight=1) as server:
        one, other = (
            sh.connect(server.url, job="ddp", transport=sh.Transport(shared_memory=shared_memory)) for _ in range(2)
        )
        first = ask(one, 0)
        assert gate.entered.acquire(timeout=20)
        other.describe()
        [session] = other.open_sessions()
        kept = []
        for i in range(10):
            for j in range(100):
                ask(other, 100 * i + j, width=30_000).cancel()
            kept.append(ask(other, 5000 + i))
        gate.opened.set()
        answers([first, *kept], [0, *range(5000, 5010)])
        assert other.open_sessions() == [session]
        one.close()
        other.close()


def test_a_deadline_that_passes_over_quota_says_so():
    gate = Gate()
    with serve(gate, max_in_flight=1) as server:
        with (
            sh.connect(server.url, job="j") as one,
            sh.connect(server.url, job="j") as other,
        ):
            first = ask(one, 0)
            assert gate.entered.acquire(timeout=20)
            second, outstanding = ask(other, 1), other._dispatcher.outstanding
            [request] = outstanding._requests.values()
            assert soon(lambda: request.told_to_wait)
            request.clock.deadline = time.monotonic()
            other._dispatcher._loop.call(outstanding.schedule, request)
            with pytest.raises(errors.TeacherTimeoutError, match="over its quota"):
                second.result(20)
            gate.opened.set()
            answers([first, ask(other, 2)], [0, 2])
            assert 1 not in gate.seen


def test_prefetch_goes_on_over_quota():
    def student(url, results):
        model = sh.convert(nn.Linear(4, 3), mode=[("kd_loss", {"teacher_model": url, "criterion": nn.MSELoss()})])
        batches = [torch.full((2, 4), float(i)) for i in range(30)]
        for x in model.prefetch(batches, depth=8):
            model(x)
            results.append(model.compute_kd_loss().item())

    with serve(nn.Linear(4, 3), max_in_flight=2, max_queued=3) as server:
        results = [[] for _ in range(3)]
        threads = [threading.Thread(target=student, args=(server.url, one)) for one in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [len(one) for one in results] == [30] * 3
        assert dict(load_of(server).errors) == {}


def test_a_deadline_is_kept_although_the_device_is_busy():
    gate = Gate()
    outgoing = framing.Outgoing(Arguments([torch.ones(1, 1)]), limits=Limits(), snapshot=True)
    with serve(gate) as server, sh.connect(server.url) as teacher:
        first = ask(teacher, 0)
        assert gate.entered.acquire(timeout=20)
        stub = Stub(server, shared_memory=False)
        tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
        call = {"taps": [tap], "inputs": outgoing.header, "payload": outgoing.payload}
        stub.say(call=teacher_pb2.Call(request_id=1, timeout_s=0.2, **call))
        failure = next(stub.answers).failure
        assert (failure.request_id, failure.code) == (1, teacher_pb2.Failure.TIMEOUT)
        assert load_of(server).queued == 0
        assert not first.done()
        gate.opened.set()
        answers([first], [0])
        stub.channel.close()


def test_a_cancelled_request_leaves_the_queue_at_once():
    gate = Gate()
    with serve(gate) as server, sh.connect(server.url, job="j") as teacher:
        futures = [ask(teacher, 0)]
        assert gate.entered.acquire(timeout=20)
        futures += [ask(teacher, i) for i in range(1, 5)]
        assert soon(lambda: load_of(server).queued == 4)
        futures[2].cancel()
        assert soon(lambda: load_of(server).queued == 3)
        assert soon(lambda: job_of(server, "j").in_flight == 4)
        gate.opened.set()
        answers([futures[i] for i in (0, 1, 3, 4)], (0, 1, 3, 4))
        assert gate.seen == [0, 1, 3, 4]


@WAYS
def test_a_client_that_ignores_wait_is_ended(shared_memory):
    gate = Gate()
    outgoing = framing.Outgoing(Arguments([torch.ones(1, 1)]), limits=Limits(), snapshot=True)
    with serve(gate, max_in_flight=4) as server:
        stub = Stub(server, shared_memory=shared_memory)
        for i in range(30):
            stub.ask(i, outgoing.payload, outgoing.header)
        with pytest.raises(Exception, match="calls came after the client was told to wait"):
            for _ in stub.answers:
                pass
        assert soon(lambda: load_of(server).queued == sum(job.in_flight for job in load_of(server).jobs) == 0)
        gate.opened.set()
        stub.channel.close()


@WAYS
def test_a_client_that_does_not_read_what_failed_is_ended(shared_memory):
    with serve(nn.Identity(), lease_s=0) as server:
        little = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]  # that is read ahead
        stub = Stub(server, shared_memory, little)
        for i in range(10_000):
            stub.ask(i, teacher_pb2.Payload(), b"what cannot be read")
        assert soon(lambda: load_of(server).sessions == 0)
        with pytest.raises(grpc.RpcError, match="were not read"):
            for _ in stub.answers:
                pass
        stub.channel.close()


def test_a_client_that_reads_is_told_of_all_that_failed():
    with serve(nn.Identity()) as server:
        stub = Stub(server, shared_memory=False)
        reading = threading.Thread(target=lambda: [next(stub.answers) for _ in range(5000)])
        reading.start()
        for i in range(5000):
            stub.ask(i, teacher_pb2.Payload(), b"what cannot be read")
        reading.join(30)
        assert load_of(server).sessions == 1
        stub.channel.close()


def test_the_work_of_one_request_is_bounded_before_it_runs():
    gate = Gate()
    gate.opened.set()
    with (
        serve(gate, max_request_tokens=100) as server,
        sh.connect(server.url) as teacher,
    ):
        for fitting in ((100, 1), (50, 7)):  # matrices of numbers have no length
            teacher.submit((torch.ones(fitting),), {}, [""]).result(20)
        ran = load_of(server).forwards
        for large in ((101, 1), (10, 11, 3)):
            with pytest.raises(errors.MessageTooLargeError, match="max_request_tokens of the teacher is 100"):
                teacher.submit((torch.ones(large),), {}, [""]).result(20)
        assert load_of(server).forwards == ran
    with serve(gate) as server, sh.connect(server.url) as teacher:
        with pytest.raises(errors.MessageTooLargeError, match="5000 tokens with 65535 draws"):
            teacher.submit((torch.ones(5000, 2),), {}, [""], encodings={"": sh.encodings.sampled(65_535)}).result(20)
        with pytest.raises(errors.MessageTooLargeError, match="values"):
            teacher.submit(([1, ""] * 10_000,), {}, [""]).result(20)
        assert load_of(server).forwards == 0


def test_weights_and_settings_out_of_bounds():
    with serve(nn.Identity()) as server:
        for weight in (0, 0.001, 101, "1"):
            with pytest.raises(errors.ConfigError, match="weight is"):
                sh.connect(server.url, sharing=sh.Sharing(weight=weight))
        with pytest.raises(errors.ConfigError, match="257 characters"):
            sh.connect(server.url, job=257 * "x")
        for wrong in ({"weight": float("nan")}, {"weight": -1.0}, {"job": 257 * "x"}):
            with pytest.raises(grpc.RpcError, match="Open has"):
                Stub(server, **wrong)
    for wrong in (
        {"cost": "bytes"},
        {"max_request_tokens": 0},
        {"max_request_tokens": 2.5},
        {"max_in_flight": 0},
        {"max_job_bytes": 0},
        {"max_queued": 0},
        {"max_unsent_bytes": 0},
        {"max_job_unsent_bytes": 1.5},
        {"lease_s": -1},
        {"max_sessions": 0},
        {"max_sessions": 65_537},
    ):
        with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
            serve(nn.Identity(), **wrong)


def test_clients_without_a_name_are_jobs_of_their_own():
    with (
        serve(nn.Identity()) as server,
        sh.connect(server.url) as a,
        sh.connect(server.url) as b,
    ):
        for teacher in (a, b, b):
            ask(teacher, 1).result(20)
        jobs = sorted((job.job, job.requests) for job in load_of(server).jobs)
        assert jobs == [("anonymous-1", 1), ("anonymous-2", 2)]


def test_names_that_are_only_alike_can_be_taken():
    with serve(nn.Identity()) as server, sh.connect(server.url, job="anonymous-1b") as teacher:
        ask(teacher, 1).result(20)
        assert [job.job for job in load_of(server).jobs] == ["anonymous-1b"]


@pytest.mark.parametrize("name", ["anonymous-1", "anonymous-40", "(ended)"])
def test_names_that_the_replica_gives_cannot_be_taken(name):
    with (
        serve(nn.Identity()) as server,
        sh.connect(server.url, job=name) as teacher,
        pytest.raises(errors.ProtocolError, match="keeps for itself"),
    ):
        ask(teacher, 1).result(20)
