"""Leases: a client that stands still loses what it had, and goes on when it wakes; one that lives never does."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import pytest
import schoolhouse as sh
import torch
from memfd import memfds, soon
from merging import Asked, engine_of, randn, submit
from models import Net
from schoolhouse.errors import TeacherTimeoutError
from schoolhouse_server import serve
from schoolhouse_server.session.lease import Lease
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc.channel import SESSION_METHOD
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub
from test_sharing import WAYS, Gate, answers, ask, job_of, load_of
from torch import nn

STUDENT = """
import sys, torch, schoolhouse as sh
transport = sh.Transport(shared_memory=sys.argv[2] == "True")
teacher = sh.connect(sys.argv[1], job="student", transport=transport)
futures = [teacher.submit((torch.full((1, 100_000), float(i)),), {}, [""]) for i in range(8)]
print("asked", flush=True)
for i, future in enumerate(futures):
    assert future.result(30)[""].eq(i + 1).all()
print("done", flush=True)
teacher.close()
"""


READER = """
import sys, torch, schoolhouse as sh
teacher = sh.connect(sys.argv[1], job="student", transport=sh.Transport(shared_memory=False))
futures = [teacher.submit((torch.full((1,), float(i)),), {}, [""]) for i in range(4)]
futures[0].result(30)
print("asked", flush=True)
for i, future in enumerate(futures):
    assert future.result(60)[""].eq(i).all()
print("done", flush=True)
"""


@contextlib.contextmanager
def student_of(server, code, *arguments):
    """A student that has asked; it ends with the test, also when it was stopped."""
    command = [sys.executable, "-W", "ignore", "-c", code, server.url, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as student:
        try:
            assert student.stdout.readline() == "asked\n"
            yield student
            assert student.stdout.readline() == "done\n"
            assert student.wait(20) == 0
        finally:
            student.kill()


def shorten_lease_of_student(server):
    """That of the session that it has. Before and after, it and others may be as slow as the machine is."""
    for member in list(server._context.drain._sessions):
        if member.account.job == "student":
            member._lease._lease_s = 0.3
            member._lease._check()


@WAYS
def test_a_stopped_student_frees_its_places_and_goes_on_when_it_wakes(shared_memory):
    gate = Gate()
    with serve(gate, max_in_flight=6) as server, sh.connect(server.url, job="other") as other:
        with student_of(server, STUDENT, str(shared_memory)) as student:
            assert soon(lambda: job_of(server, "student").in_flight == 6)
            os.kill(student.pid, signal.SIGSTOP)
            shorten_lease_of_student(server)
            assert soon(lambda: job_of(server, "student").sessions == 0)
            assert soon(lambda: (job_of(server, "student").in_flight, load_of(server).queued) == (0, 0))
            gate.opened.set()
            answers([ask(other, 50)], [50])
            assert soon(lambda: load_of(server).sessions == 1)
            if shared_memory:
                assert soon(lambda: memfds()[1] <= 2)  # this process's own two mappings of the other one's
            os.kill(student.pid, signal.SIGCONT)


def test_a_stopped_student_that_does_not_read_is_cut_off():
    class Wide(nn.Module):
        def forward(self, x):
            return x.expand(6_000_000).clone()

    with serve(Wide()) as server:
        with student_of(server, READER) as student:
            os.kill(student.pid, signal.SIGSTOP)
            shorten_lease_of_student(server)
            assert soon(lambda: load_of(server).sessions == 0)
            os.kill(student.pid, signal.SIGCONT)


LONG_S = 4.5  # a lease with room for a machine that stands still: a client renews its own each third of it


@pytest.fixture(scope="module")
def kept():
    """Of clients that said nothing of their own for more than a lease, whether they had their session still.

    By way: of one that waited for its answer, of one that was idle and was answered again, and of one that had only
    asked what there is. And the jobs of each teacher.
    """
    gate, ways = Gate(), (True, False)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve({"waiting": gate, "idle": nn.Identity()}, lease_s=LONG_S))
        teachers = [
            (name, way, stack.enter_context(sh.connect(server.urls[name], transport=sh.Transport(shared_memory=way))))
            for name in ("waiting", "idle")
            for way in ways
        ]
        futures = {(name, way): ask(teacher, 0) for name, way, teacher in teachers}
        answers([futures["idle", way] for way in ways], [-1, -1])  # as they were asked for
        described = stack.enter_context(sh.connect(server.urls["idle"]))
        described.describe()
        teachers.append(("described", True, described))
        assert soon(lambda: all(teacher.open_sessions() for _, _, teacher in teachers))
        before = {(name, way): teacher.open_sessions() for name, way, teacher in teachers}
        time.sleep(LONG_S + 1.0)
        after = {(name, way): teacher.open_sessions() for name, way, teacher in teachers}
        gate.opened.set()
        answers([futures["waiting", way] for way in ways], [0, 0])
        answers([ask(teacher, 0) for name, _, teacher in teachers if name == "idle"], [-1, -1])
        assert all(session.alive for found in after.values() for session in found)
        jobs = {name: len(server.load(name).jobs) for name in server.engines}
    return {key: sessions == after[key] for key, sessions in before.items()}, jobs


@WAYS
def test_a_client_that_is_idle_or_waits_keeps_its_session(kept, shared_memory):
    same, jobs = kept
    assert same["waiting", shared_memory]
    assert same["idle", shared_memory]
    assert jobs == {"waiting": 2, "idle": 3}  # without a name each session is a job of its own


def test_a_session_that_was_only_described_is_renewed_too(kept):
    same, _ = kept
    assert same["described", True]


@pytest.fixture
def _told_in_time(monkeypatch):
    """A session that ends is given the time to say why, however slow the machine is."""
    monkeypatch.setattr("schoolhouse_server.session.server_session._END_S", 60.0)


@pytest.mark.usefixtures("_told_in_time")
@pytest.mark.parametrize("lease_s", [0.3, 0])
def test_a_silent_client_is_told_why_its_session_ends(lease_s):
    with serve(nn.Identity(), lease_s=lease_s) as server:
        if not lease_s:
            stub = Stub(server, shared_memory=False)
            time.sleep(1.0)
            assert load_of(server).sessions == 1
            stub.channel.close()
        else:
            with pytest.raises(grpc.RpcError) as caught:
                next(Stub(server, shared_memory=False).answers)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "said nothing for 0.3 s" in caught.value.details()


def test_while_it_works_on_a_message_the_silence_is_not_the_clients():
    loop, expired = Loop("lease").start(), threading.Event()
    lease = Lease(loop, 0.2, expired.set)
    lease.hear(listening=False)
    loop.ask(lease.start)
    assert not expired.wait(0.7)
    lease.hear(listening=True)
    assert expired.wait(20)
    loop.stop()


def test_a_request_without_deadline_that_joins_one_with_leaves_the_deadlines_of_others():
    with engine_of(Net()) as engine:
        gate, x = engine.teacher.module, randn(1, 8)
        held = Asked(torch.ones(1), timeout_s=float("inf"), hold=True)
        submit(engine, held.job)
        assert gate.began.acquire(timeout=20)
        first, second = Asked(x), Asked(x, timeout_s=float("inf"))
        first.job.key = second.job.key = "one"
        submit(engine, first.job)
        submit(engine, second.job)
        assert engine.joined == 1
        looked = threading.Event()
        engine.loop.call(lambda: (engine._expire(), looked.set()))  # as at the first one's deadline
        assert looked.wait(20)
        late = Asked(randn(2, 8), timeout_s=0.1)
        submit(engine, late.job)
        assert isinstance(late.answers.get(timeout=20), TeacherTimeoutError)  # while the device is at the one held
        gate.go.release()
        held.result()
        assert torch.equal(second.features[""], Net().eval()(x))


@pytest.mark.usefixtures("_told_in_time")
def test_a_client_that_names_a_deadline_far_away_leaves_the_leases_of_others_alone():
    gate = Gate()
    outgoing = framing.Outgoing(Arguments([torch.ones(1, 1)]), limits=Limits(), snapshot=True)
    tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
    with serve(gate) as server:
        stub = Stub(server, shared_memory=False)
        call = {"taps": [tap], "timeout_s": 1e300, "inputs": outgoing.header, "payload": outgoing.payload}
        stub.say(call=teacher_pb2.Call(request_id=1, **call))
        assert gate.entered.acquire(timeout=20)
        stub.channel.close()
        assert soon(lambda: load_of(server).sessions == 0)
        server._context.sharing = dataclasses.replace(server._context.sharing, lease_s=0.3)
        with pytest.raises(grpc.RpcError, match="said nothing for 0.3 s"):
            next(Stub(server, shared_memory=False).answers)
        gate.opened.set()


@pytest.mark.usefixtures("_told_in_time")
def test_a_client_that_never_opens_its_session_is_ended():
    with serve(nn.Identity(), lease_s=0.5) as server:
        never = threading.Event()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            answers = channel.stream_stream(SESSION_METHOD)((never.wait() and b"" for _ in range(1)), timeout=20)
            with pytest.raises(grpc.RpcError, match=r"said nothing for 0\.5 s"):
                next(answers)
            never.set()
