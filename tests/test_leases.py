"""Leases: a client that stands still loses what it had, and goes on when it wakes; one that lives never does."""

import contextlib
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
from merging import Asked, engine_of, randn
from models import Net
from schoolhouse.errors import TeacherTimeoutError
from schoolhouse_server import serve
from schoolhouse_server.lease import Lease
from schoolhouse_server.timer import Timer
from schoolhouse_wire import framing
from schoolhouse_wire.channel import SESSION_METHOD
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import teacher_pb2
from stub import Stub
from test_sharing import WAYS, Gate, answers, ask, job_of, load_of
from torch import nn

STUDENT = """
import sys, torch, schoolhouse as sh
teacher = sh.connect(sys.argv[1], job="student", shared_memory=sys.argv[2] == "True")
futures = [teacher.submit((torch.full((1, 100_000), float(i)),), {}, [""]) for i in range(8)]
print("asked", flush=True)
for i, future in enumerate(futures):
    assert future.result(30)[""].eq(i + 1).all()
print("done", flush=True)
teacher.close()
"""


READER = """
import sys, torch, schoolhouse as sh
teacher = sh.connect(sys.argv[1], job="student", shared_memory=False)
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


@WAYS
def test_a_stopped_student_frees_its_places_and_goes_on_when_it_wakes(shared_memory):
    gate = Gate()
    with serve(gate, lease_s=0.6, max_in_flight=6) as server, sh.connect(server.url, job="other") as other:
        with student_of(server, STUDENT, str(shared_memory)) as student:
            assert soon(lambda: job_of(server, "student").in_flight == 6)
            os.kill(student.pid, signal.SIGSTOP)
            assert soon(lambda: job_of(server, "student").sessions == 0)
            assert (job_of(server, "student").in_flight, load_of(server).queued) == (0, 0)
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

    with serve(Wide(), lease_s=0.5) as server:
        with student_of(server, READER) as student:
            os.kill(student.pid, signal.SIGSTOP)
            assert soon(lambda: load_of(server).sessions == 0)
            os.kill(student.pid, signal.SIGCONT)


@WAYS
def test_a_client_that_is_idle_or_waits_keeps_its_session(shared_memory):
    gate = Gate()
    with serve(gate, lease_s=1.0) as server, sh.connect(server.url, shared_memory=shared_memory) as teacher:
        future = ask(teacher, 0)
        assert soon(lambda: len(teacher.open_sessions()) == 1)
        [session] = teacher.open_sessions()
        time.sleep(1.6)
        gate.opened.set()
        answers([future], [0])
        time.sleep(1.6)
        answers([ask(teacher, 1)], [1])
        assert teacher.open_sessions() == [session]
        assert len(load_of(server).jobs) == 1


def test_a_session_that_was_only_described_is_renewed_too():
    with serve(nn.Identity(), lease_s=0.3) as server, sh.connect(server.url) as teacher:
        teacher.describe()
        [session] = teacher.open_sessions()
        time.sleep(1.0)
        assert teacher.open_sessions() == [session]
        assert session.alive


@pytest.mark.parametrize("lease_s", [0.3, 0])
def test_a_silent_client_is_told_why_its_session_ends(lease_s):
    with serve(nn.Identity(), lease_s=lease_s) as server:
        stub = Stub(server, shared_memory=False)
        if not lease_s:
            time.sleep(1.0)
            assert load_of(server).sessions == 1
        else:
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.answers)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "said nothing for 0.3 s" in caught.value.details()
        stub.channel.close()


def test_while_it_works_on_a_message_the_silence_is_not_the_clients():
    timer, expired = Timer(), threading.Event()
    lease = Lease(timer, 0.2, expired.set)
    lease.start()
    lease.hear(listening=False)
    assert not expired.wait(0.7)
    lease.hear(listening=True)
    assert expired.wait(5)
    timer.close()


def test_the_timer_rings_in_order_and_not_what_was_cancelled():
    timer, rung = Timer(), []
    now = time.monotonic()
    alarms = [timer.at(now + 0.05 * i, lambda i=i: rung.append(i)) for i in (3, 1, 2, 4)]
    timer.at(now + 0.01, lambda: 1 / 0)  # fails, and the others ring
    timer.cancel(alarms[2])
    timer.cancel(alarms[2])
    assert soon(lambda: rung == [1, 3, 4])
    for _ in range(20_000):
        timer.cancel(timer.at(now + 1000, lambda: None))
    assert len(timer._alarms) < 3000
    timer.close()


@pytest.mark.parametrize("far", [1e12, 1e300, float("inf")])
def test_a_deadline_that_is_far_away_does_not_end_the_timer(far):
    timer, rung = Timer(), threading.Event()
    timer.cancel(timer.at(far, lambda: None))
    timer.at(far, lambda: None)
    time.sleep(0.1)  # it sleeps until then
    timer.at(time.monotonic() + 0.1, rung.set)
    assert rung.wait(5)
    timer.close()


def test_a_request_without_deadline_that_joins_one_with_leaves_the_deadlines_of_others():
    with engine_of(Net()) as engine:
        gate, x = engine.teacher.module, randn(1, 8)
        held = Asked(torch.ones(1), timeout_s=float("inf"), hold=True)
        engine.submit(held.job)
        assert gate.began.acquire(timeout=20)
        first, second = Asked(x, timeout_s=0.2), Asked(x, timeout_s=float("inf"))
        first.job.key = second.job.key = "one"
        engine.submit(first.job)
        engine.submit(second.job)
        assert engine.joined == 1
        time.sleep(0.4)  # the first one's deadline is over, and the second has none
        late = Asked(randn(2, 8), timeout_s=0.1)
        engine.submit(late.job)
        assert isinstance(late.answers.get(timeout=5), TeacherTimeoutError)  # while the device is at the one held
        gate.go.release()
        held.result()
        assert torch.equal(second.features[""], Net().eval()(x))


def test_a_client_that_names_a_deadline_far_away_leaves_the_leases_of_others_alone():
    gate = Gate()
    outgoing = framing.Outgoing(Arguments([torch.ones(1, 1)]), limits=Limits(), snapshot=True)
    tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
    with serve(gate, lease_s=0.5) as server:
        stub = Stub(server, shared_memory=False)
        call = {"taps": [tap], "timeout_s": 1e300, "inputs": outgoing.header, "payload": outgoing.payload}
        stub.say(call=teacher_pb2.Call(request_id=1, **call))
        assert gate.entered.acquire(timeout=10)
        assert soon(lambda: load_of(server).sessions == 0)
        time.sleep(1.5)  # nothing else is left to ring
        silent = Stub(server, shared_memory=False)
        assert soon(lambda: load_of(server).sessions == 0)
        gate.opened.set()
        stub.channel.close()
        silent.channel.close()


def test_a_client_that_never_opens_its_session_is_ended():
    with serve(nn.Identity(), lease_s=0.5) as server:
        never = threading.Event()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            answers = channel.stream_stream(SESSION_METHOD)((never.wait() and b"" for _ in range(1)), timeout=10)
            with pytest.raises(grpc.RpcError, match=r"said nothing for 0\.5 s"):
                next(answers)
            never.set()
