"""What a replica counts, by job, held against what was sent."""

import math
import time

import pytest
import schoolhouse as sh
import torch
from memfd import soon
from schoolhouse import encodings, errors
from schoolhouse_server import serve
from schoolhouse_server.common.rows import rows_of, tokens_of
from schoolhouse_server.observe.counters import ENDED, QUEUE_DELAY_BUCKETS_S, Counters
from schoolhouse_wire.v1 import directory_pb2
from schoolhouse_wire.values.codec import Arguments
from test_sharing import Gate, ask, job_of, load_of
from torch import nn


def test_a_replica_counts_rows_bytes_and_errors_by_job():
    with serve(nn.Linear(8, 4), cache_bytes=1 << 20) as server:
        with (
            sh.connect(server.url, job="a", sharing=sh.Sharing(weight=2.0)) as a,
            sh.connect(server.url, job="b") as b,
        ):
            x = torch.randn(6, 8)
            a.submit((x,), {}, [""]).result(20)
            b.submit((x,), {}, [""]).result(20)  # from the cache
            a.submit((x + 1,), {}, [""], encodings={"": encodings.bf16}).result(20)
            wishes = {"": encodings.int8, ("", "input"): None}
            b.submit((x + 2,), {}, ["", ("", "input")], encodings=wishes).result(20)
            with pytest.raises(errors.TeacherForwardError):
                b.submit((torch.ones(1, 3),), {}, [""]).result(20)
            traffic = {"a": a.traffic(), "b": b.traffic()}
            load = load_of(server)
            jobs = {job.job: job for job in load.jobs}
            assert {name: (job.requests, job.rows, job.errors, job.sessions) for name, job in jobs.items()} == {
                "a": (2, 12, 0, 1),
                "b": (2, 12, 1, 1),
            }
            assert (jobs["a"].cost, jobs["b"].cost) == (12, 6 + 1)  # nothing for the cache; one that fails was run
            assert (load.forwards, load.rows) == (3, 18)  # the one that failed is none
            assert dict(load.errors) == {"TeacherForwardError": 1}
            for name, sent in traffic.items():
                assert jobs[name].received_bytes >= sent.sent_bytes
                assert jobs[name].sent_bytes == pytest.approx(sent.received_bytes, abs=200)  # alignment
            assert load.feature_bytes["none"] == 2 * 6 * 4 * 4 + 6 * 8 * 4
            assert load.feature_bytes["bf16"] == 6 * 4 * 2
            assert load.feature_bytes["int8"] == 6 * 4 + 6 * 4
            assert sum(load.queue_delay_counts) == 4
            assert len(load.queue_delay_counts) == len(QUEUE_DELAY_BUCKETS_S) + 1
            assert load.uptime_s > 0
        assert soon(lambda: [job.sessions for job in load_of(server).jobs] == [0, 0])
        assert job_of(server, "a").rows == 12


def test_the_delay_is_the_age_of_what_waits_and_falls_when_nothing_does():
    gate = Gate()
    with serve(gate) as server, sh.connect(server.url) as teacher:
        futures = [ask(teacher, i) for i in range(3)]
        assert gate.entered.acquire(timeout=20)
        assert soon(lambda: load_of(server).queued == 2)
        time.sleep(0.3)
        assert load_of(server).queue_delay_s >= 0.3
        opened_at = time.monotonic()
        gate.opened.set()
        for future in futures:
            future.result(20)
        load = load_of(server)
        mean, fell = load.queue_delay_s, math.exp(-(time.monotonic() - opened_at) / 2)
        [counts] = load.jobs
        assert counts.queue_s >= 0.6
        assert 0.08 * counts.queue_s * fell < mean < 0.11 * counts.queue_s  # a tenth of each, of those before less
        time.sleep(0.2)
        assert load_of(server).queue_delay_s < 0.91 * mean  # it falls to 1/e in 2 s


def test_of_ended_jobs_the_last_are_kept_and_the_others_summed():
    counters = Counters()
    for i in range(300):
        job = counters.enter(f"job-{i}", 1.0)
        counters.answered(job, rows=2)
        counters.leave(job)
    again = counters.enter("job-299", 4.0)
    load = directory_pb2.Load()
    counters.fill(load, {"job-299": 3}, {"job-299": 5})
    jobs = {job.job: job for job in load.jobs}
    assert len(jobs) == 257
    assert (jobs[ENDED].requests, jobs[ENDED].rows) == (44, 88)
    assert "job-43" not in jobs
    assert "job-44" in jobs
    assert (jobs["job-299"].weight, jobs["job-299"].queued, jobs["job-299"].in_flight) == (4.0, 3, 5)
    assert again.requests == 1


@pytest.mark.parametrize(
    ("inputs", "rows", "tokens"),
    [
        (Arguments([torch.ones(3, 5, 2)]), 3, 15),
        (Arguments([], {"input_ids": torch.ones(2, 7, dtype=torch.int64)}), 2, 14),
        (Arguments([torch.ones(2, 7)]), 2, 2),
        (Arguments([torch.ones(4), torch.ones(2, 9, dtype=torch.int64)]), 4, 4),
        (Arguments([torch.tensor(1.0)]), 1, 1),
        (Arguments([torch.ones(0, 5)]), 0, 0),
        (Arguments(["text"]), 1, 1),
    ],
)
def test_how_large_a_request_is(inputs, rows, tokens):
    assert (rows_of(inputs), tokens_of(inputs)) == (rows, tokens)


def test_sessions_are_those_of_the_teacher():
    modules = {"one": nn.Linear(8, 4), "two": nn.Linear(8, 4), "none": nn.Linear(8, 4)}
    with serve(modules) as server:
        names = ["one", "two", "two"]
        teachers = [sh.connect(server.urls[name]) for name in names]
        for teacher in teachers:
            teacher.submit((torch.ones(1, 8),), {}, [""]).result(20)
        assert [server.load(name).sessions for name in modules] == [1, 2, 0]
        for teacher in teachers:
            teacher.close()
        assert soon(lambda: [server.load(name).sessions for name in modules] == [0, 0, 0])
