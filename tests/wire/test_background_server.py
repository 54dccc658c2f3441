"""Each thread and callback of a server is made to fail: its client is told, and the replica goes on."""

import contextlib
import functools
import sys
import threading
import urllib.request

import pytest
import schoolhouse as sh
import torch
from directories import Scale, answer, ask, replicas
from loads import sets
from memfd import soon
from merging import Asked, randn, submit
from models import Net
from rich.progress import Progress
from schoolhouse import encodings, errors
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.observe import web
from schoolhouse_server.observe.spans import SessionSpans
from schoolhouse_server.security import tokens
from schoolhouse_server.session import calls
from schoolhouse_server.session.job_session import Member
from schoolhouse_server.session.server_session import ServerSession
from schoolhouse_wire.executor import DaemonExecutor
from torch import nn
from traps import Trap, each_error, opened

SERVER = {  # what is made to fail, and whether that takes the end of a session
    "the reader": (ServerSession, "_receive", False),
    "the reader, at a call": (ServerSession, "_on_call", False),
    "the reader, at its end": (ServerSession, "_clear", True),
    "an answer": (ServerSession, "_answer", False),
    "a failure": (ServerSession, "_tell_failed", False),
    "a reply": (ServerSession, "_reply", False),
    "what is sent": (Member, "sent", False),
    "a close": (ServerSession, "_drop", True),
    "a place that is left": (Member, "leave", True),
    "a span": (SessionSpans, "dropped", True),
}


@each_error
@pytest.mark.parametrize("what", SERVER)
def test_where_a_session_fails_its_client_is_told_and_the_replica_goes_on(what, error, monkeypatch, deaths):
    owner, name, at_end = SERVER[what]
    trap, module, begun = Trap(monkeypatch, owner, name, error), Scale(2), opened(monkeypatch)
    with replicas(module) as (server,):
        with sh.connect(server.url, timeouts=sh.Timeouts(request_s=30)) as other:
            assert answer(other) == 2
            with sh.connect(server.url, timeouts=sh.Timeouts(request_s=30)) as teacher:
                assert answer(teacher) == 2
                sprung = trap.set()
                if at_end:
                    end = functools.partial(begun[-1].end, errors.TeacherUnavailableError("a restart"))
                    server._loop.call(end)  # as a lease does
                wrong = teacher.submit((torch.ones(2), "no"), {}, [""])  # fails, as it should
                for future in (ask(teacher, 3), wrong):
                    told = future.exception(20)
                    assert told is None or isinstance(told, errors.SchoolhouseError)
                assert sprung.wait(20)
                assert [answer(teacher, i) for i in range(3)] == [0, 2, 4]
            assert answer(other, 7) == 14
        load = functools.partial(server.load, "teacher")
        assert soon(lambda: server._servicer.sessions == 0 and load().in_flight == load().queued == 0)
        assert soon(lambda: server.unsent.nbytes == 0)
        if what != "a place that is left":
            assert soon(lambda: load().sessions == 0)
    deaths.clear()


@each_error
@pytest.mark.parametrize(("owner", "name"), [(calls, "_head"), (ServerSession, "_answer")])
def test_who_asks_for_a_head_is_told(owner, name, error, monkeypatch, deaths):
    trap = Trap(monkeypatch, owner, name, error)
    with (
        replicas(Net()) as (server,),
        sh.connect(server.url, head_folder=None, timeouts=sh.Timeouts(request_s=30)) as teacher,
    ):
        trap.set()
        wish = {"fc": encodings.hidden("fc")}
        with contextlib.suppress(errors.SchoolhouseError):
            teacher.submit((torch.ones(1, 8),), {}, ["fc"], encodings=wish).result(20)
        assert trap.sprung.is_set()
        assert teacher.submit((torch.ones(1, 8),), {}, ["fc"], encodings=wish).result(20)["fc"].shape == (1, 5)
    deaths.clear()


@each_error
@pytest.mark.parametrize("when", ["open", "closing"])
@pytest.mark.parametrize("thread", ["in", "out"])
def test_an_engine_whose_thread_ends_answers_all_and_its_other_thread_ends(thread, when, error, monkeypatch, deaths):
    troubled = threading.Event()

    def trouble():
        troubled.set()
        raise RuntimeError("as bugs do")

    engine = Engine(LocalTeacher(nn.Identity()), max_queued=9, on_trouble=trouble)
    owner, name = (engine.runner, "compute") if thread == "in" else (engine._outlet, "land")
    began, go = threading.Event(), threading.Event()

    def fail(_work):
        began.set()
        assert go.wait(20)
        raise error

    setattr(owner, name, fail)
    engine.start()
    asked = [Asked(randn(5000, 8, seed=i)) for i in range(6)]
    for one in asked:
        submit(engine, one.job)
    assert began.wait(20)
    if when == "closing":
        engine.close(0.0)
    go.set()
    assert {type(one.result()) for one in asked} == {errors.TeacherUnavailableError}
    assert soon(lambda: not any(thread.is_alive() for thread in engine._threads), collect=False)
    assert (engine.running, engine.queued) == (0, 0)
    if when == "open":
        assert troubled.wait(20)
        assert engine.trouble.stage == "broken"
    engine.close()
    deaths.clear()


def test_one_who_cannot_be_told_keeps_an_answer_from_no_other(deaths):
    engine = Engine(LocalTeacher(nn.Identity()), max_queued=9)
    one, other, x = Asked(torch.ones(2)), Asked(torch.ones(2)), torch.ones(2)
    one.ticket.done = lambda _answer: 1 / 0
    other.job.key = one.job.key
    for asked in (one, other):
        submit(engine, asked.job)
    engine.start()
    assert torch.equal(other.features[""], x)
    third = Asked(torch.zeros(2))
    submit(engine, third.job)
    assert torch.equal(third.features[""], torch.zeros(2))
    assert engine.trouble is None
    engine.close()
    deaths.clear()


@each_error
def test_an_executor_goes_on_where_a_call_cannot_be_answered(error, deaths):
    workers, gate = DaemonExecutor(1, "test-background"), threading.Event()
    held = workers.submit(gate.wait, 20)
    lost = workers.submit(lambda: 1)
    lost.set_result(2)  # by somebody else
    failing = workers.submit(Trap.raising(error))
    last = workers.submit(lambda: 3)
    gate.set()
    assert (held.result(20), last.result(20)) == (True, 3)
    assert type(failing.exception(20)) is error
    workers.shutdown()
    deaths.clear()


@each_error
def test_a_tokens_file_is_followed_again_after_an_error(error, tmp_path, monkeypatch, deaths):
    path, token = tmp_path / "tokens.yaml", tokens.new_token()
    path.write_text("tokens: []")
    monkeypatch.setattr(tokens, "_LOOK_S", 0.01)
    trap, found = Trap(monkeypatch, tokens, "read_bytes", error, times=2), tokens.Tokens(path)
    found.start()
    assert trap.set().wait(20)
    path.write_text(f"tokens: [{{sha256: {tokens.digest_of(token)}, teachers: ['*']}}]")
    assert soon(lambda: found.grant(token) is not None, collect=False)
    found.close()
    deaths.clear()


@each_error
@pytest.mark.parametrize("name", ["service_actions", "process_request", "finish_request"])
def test_a_page_is_served_again_after_an_error(name, error, monkeypatch, deaths):
    monkeypatch.setattr(web, "_REST_S", 0.01)
    trap = Trap(monkeypatch, web.Server, name, error)
    with web.WebServer(sets) as server:
        sprung = trap.set()
        assert soon(lambda: (status_of(server.url), sprung.is_set()) == (200, True), collect=False)
    deaths.clear()


def status_of(url):
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(url, timeout=20) as answered:
            return answered.status
    return None


def test_a_student_of_the_demo_whose_lines_cannot_be_read_is_ended(deaths):
    demo = pytest.importorskip("schoolhouse_server.cli.demo")
    with Progress() as bars:
        job = demo._Job("plain", "", 1, bars, [])
        job._command = [sys.executable, "-c", "import time; print('no JSON', flush=True); time.sleep(600)"]
        with job, pytest.raises(RuntimeError, match="student 'plain' failed") as caught:
            job.wait(60)
    assert isinstance(caught.value.__cause__, ValueError)
    deaths.clear()
