"""Nothing that runs in the background ends without whoever waits for it being told: each of them is made to fail."""

import ast
import contextlib
import functools
import logging
import re
import sys
import threading
import traceback
import urllib.request
import weakref
from pathlib import Path

import grpc
import pytest
import schoolhouse as sh
import torch
from bad_replica import answered, bad_replica, url_of
from directories import (
    DRAINING,
    DirectoryServer,
    Scale,
    addresses,
    answer,
    ask,
    replicas,
    revision_of,
    sessions,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from loads import sets
from memfd import soon
from merging import Asked, randn
from models import Net
from rich.progress import Progress
from schoolhouse import at_exit, encodings, errors, handshake, outstanding
from schoolhouse.dispatcher import Dispatcher
from schoolhouse.outstanding import Outstanding
from schoolhouse.remote import RemoteTeacher
from schoolhouse.replicas import ReplicaSet
from schoolhouse.request import Request
from schoolhouse.session import Session
from schoolhouse.teachers import LocalTeacher
from schoolhouse.verifying import Pair
from schoolhouse.watching import Watch
from schoolhouse_server import calls, serve, tokens, web
from schoolhouse_server.directory import Directory
from schoolhouse_server.engine import Engine
from schoolhouse_server.executor import DaemonExecutor
from schoolhouse_server.membership import Member
from schoolhouse_server.server_session import ServerSession
from schoolhouse_server.spans import SessionSpans
from schoolhouse_server.timer import Timer
from schoolhouse_wire import background, shared_memory, status
from schoolhouse_wire.security import ClientSecurity
from schoolhouse_wire.v1 import teacher_pb2
from torch import nn

ROOT = Path(__file__).parent.parent
OURS = [
    path
    for folder in ("client", "services", "protos")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_pb2" not in path.name
]
KEY = "schoolhouse-failure-bin"


class Panic(BaseException):
    """As those that come from Rust."""


ERRORS = [RuntimeError, Panic]


class Trap:
    """In the place of an attribute: raises `times` times once it is `set`, and does what the original does else."""

    def __init__(self, monkeypatch, owner, name, error=ERRORS[0], times=1):
        self.sprung, self.left, self._times = threading.Event(), 0, times
        original = getattr(owner, name)

        def trap(*args, **kwargs):
            if self.left > 0:
                self.left -= 1
                self.sprung.set()
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, trap)

    @staticmethod
    def raising(error):
        """What raises it."""

        def fail(*_args):
            raise error

        return fail

    def set(self):
        self.left = self._times
        return self.sprung


# How they are made.


def dotted(node):
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def outside(tree):
    """What starts a thread, or has one call something, and is not of the helper's making."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & {f"threading.{name}" for name in ("Thread", "Timer")}
            yield from (name for name in names if name.startswith(("_thread.", "multiprocessing", "asyncio.")))
            yield from (name for name in names if name.endswith("PoolExecutor"))
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & {"_thread", "multiprocessing", "asyncio"}
        elif isinstance(node, ast.ClassDef):
            yield from {dotted(base) for base in node.bases} & {"threading.Thread", "threading.Timer"}
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in ("threading.Thread", "threading.Timer") or name.endswith("PoolExecutor"):
                yield name
            given = getattr(node.args[0], "func", None) if node.args else None
            if name.endswith((".add_done_callback", ".add_callback")) and dotted(given) != "background.called":
                yield name


def test_nothing_runs_in_the_background_that_the_helper_has_not_made():
    found = {path.name: names for path in OURS if (names := list(outside(ast.parse(path.read_text()))))}
    assert found == {"background.py": ["threading.Thread"]}


@pytest.mark.parametrize(
    "code",
    [
        "threading.Thread(target=f).start()",
        "from threading import Thread",
        "threading.Timer(1, f)",
        "class Mine(threading.Thread): pass",
        "concurrent.futures.ThreadPoolExecutor(1)",
        "from concurrent.futures import ProcessPoolExecutor",
        "import _thread",
        "import asyncio",
        "future.add_done_callback(f)",
        "call.add_callback(end)",
    ],
)
def test_what_the_helper_has_not_made_is_found(code):
    assert list(outside(ast.parse(code)))


def test_the_table_has_every_thread_and_no_other():
    made = "\n".join(path.read_text() for path in OURS if path.name != "background.py")
    rows = re.findall(r"^\| (`schoolhouse-.*?) ", background.__doc__.replace("`, `-", "`,`-"), re.MULTILINE)
    names = {name.strip("`") for row in rows for name in row.split(",")}
    prefixes = {"-out": "schoolhouse-engine", "-directory": "schoolhouse"}
    names = {prefixes.get(name, "") + name for name in names}
    for name in names:
        assert f'"{name}' in made
    assert made.count("background.thread(") == len(names - {"schoolhouse-directory"})


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_is_logged_and_told_and_has_its_traceback_no_more(error, deaths, caplog):
    told = []

    def fail():
        raise error

    assert background.run(fail, "a turn", lambda err: (type(err), err.__traceback__)) == (error, None)
    assert background.run(lambda: 7, "a turn", told.append) == 7
    background.called(lambda one: fail(), "a callback", told.append)(1)
    thread = background.thread(fail, name="schoolhouse-test", on_death=told.append)
    thread.start()
    thread.join(20)
    assert thread.daemon
    assert [type(err) for err in told] == [error, error]
    assert [record.message for record in caplog.records] == [
        "a turn failed",
        "a callback failed",
        "schoolhouse-test failed",
    ]
    for record in caplog.records:
        assert "in fail" in "".join(
            traceback.format_exception(record.exc_info[1], record.exc_info[1], record.exc_info[2])
        )
    deaths.clear()


def test_who_waits_is_told_although_the_log_cannot_be_written(deaths):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("no space left on device")

    told, broken = [], Broken()
    logging.getLogger().addHandler(broken)
    try:
        background.run(lambda: 1 / 0, "a turn", told.append)
    finally:
        logging.getLogger().removeHandler(broken)
    assert [type(error) for error in told] == [ZeroDivisionError]
    deaths.clear()


# What a peer says of its failure.


class Said(grpc.RpcError):
    """An RPC's end, as gRPC tells of it."""

    def __init__(self, trailers, code=grpc.StatusCode.UNAVAILABLE, details="gone"):
        self.trailing_metadata = lambda: trailers
        self.code, self.details = lambda: code, lambda: details


@settings(max_examples=100, deadline=None)
@given(
    trailers=st.none()
    | st.lists(st.tuples(st.sampled_from([KEY, "x"]), st.binary() | st.text() | st.none()), max_size=3),
    code=st.sampled_from([*grpc.StatusCode, None, 14]),
    details=st.none() | st.text() | st.binary(),
)
def test_whatever_a_peer_says_of_its_failure_is_a_typed_error(trailers, code, details):
    error = status.from_rpc_error(Said(trailers, code, details), "host:1")
    assert isinstance(error, errors.SchoolhouseError)
    assert error.message


@pytest.mark.parametrize("wrong", [b"\xff\xff", b"\x0a", "text", None, 5, b"\x1a\x02\xff\xff"], ids=repr)
def test_a_failure_that_cannot_be_read_breaks_the_contract(wrong):
    error = status.from_rpc_error(Said([(KEY, wrong)]), "host:1")
    assert type(error) is errors.ProtocolError
    assert "host:1" in error.message


def test_a_failure_of_any_size_is_as_long_as_one_of_ours():
    huge = teacher_pb2.Failure(code=teacher_pb2.Failure.BUSY, message="m" * 10**5, choices=["c" * 5000] * 1000)
    error = status.from_rpc_error(Said([(KEY, huge.SerializeToString())]), "host:1")
    assert type(error) is errors.TeacherBusyError
    assert len(error.message) == 4097
    assert [len(choice) for choice in error.choices] == [4097] * 20
    ours_ = status.from_failure(status.to_failure(errors.UnknownTapError("m" * 5000, choices=["c"] * 30)))
    assert (len(ours_.message), len(ours_.choices)) == (4097, 20)
    assert len(status.from_rpc_error(Said(None, details="d" * 10**6), "host:1").message) == 4097


def test_an_error_that_says_nothing_at_all_is_one():
    assert type(status.from_rpc_error(grpc.RpcError(), "host:1")) is errors.ProtocolError
    assert status.from_rpc_error(Said([(KEY, b"")]), "host:1").message == "no reason was given"


def malformed(context, _error=None):
    context.set_trailing_metadata(((KEY, b"\xff\xff"),))
    context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


@pytest.mark.parametrize("shared", [True, False], ids=["pipes", "stream"])
def test_a_session_whose_end_cannot_be_read_is_opened_again(shared, monkeypatch):
    trap = Trap(monkeypatch, ServerSession, "_on_call", errors.TeacherUnavailableError("a restart"))
    monkeypatch.setattr(status, "abort", malformed)
    with serve(Scale(2)) as server, sh.connect(server.url, shared_memory=shared, timeout_s=20) as teacher:
        for i in range(3):
            trap.set()
            assert answer(teacher, i) == 2 * i
            assert trap.sprung.is_set()


def test_a_watch_whose_end_cannot_be_read_begins_again(monkeypatch):
    broken, watch = threading.Event(), Directory.Watch

    def watched(self, request, context):
        if not broken.is_set():
            broken.set()
            malformed(context)
        yield from watch(self, request, context)

    monkeypatch.setattr(Directory, "Watch", watched)
    with replicas(Scale(2), Scale(2)) as (one, other), DirectoryServer() as directory:
        directory.publish(one)
        with sh.connect(directory.url) as teacher:
            assert answer(teacher) == 2
            assert broken.wait(20)
            directory.publish(other)
            assert soon(lambda: answer(teacher) == 2 and sessions(teacher) == addresses(other))


# The client's threads.

CLIENT = {  # what is made to fail, and whether that takes the end of a session
    "the reader": (Session, "_receive", False),
    "the reader, at a reply": (Session, "_on_reply", False),
    "the reader, at its end": (Session, "close", True),
    "the reader, as it tells of its end": (Dispatcher, "on_loss", True),
    "the reader, as it sends on what it had": (Dispatcher, "_send_again", True),
    "the reader, as another session opens": (Dispatcher, "on_opened", True),
    "a request's messages": (Request, "sent", False),
    "what is sent": (Session, "_outgoing", True),
    "a copy": (shared_memory, "_copy", False),
    "the deadlines": (Outstanding, "_take_late", False),
    "the deadlines, as they tend": (Dispatcher, "_tend", False),
    "the deadlines, as they flush": (Dispatcher, "_flush", False),
    "the watch": (Watch, "_sets", False),
    "the watch, as it tells": (Dispatcher, "on_set", False),
    "the watch, at what it hears": (ReplicaSet, "from_wire", False),
    "a request's end": (RemoteTeacher, "_done", False),
}


@pytest.fixture
def open_ones(monkeypatch):
    """The sessions that servers of this process have had."""
    found, start = [], ServerSession.start
    monkeypatch.setattr(ServerSession, "start", lambda self: (found.append(self), start(self))[1])
    return found


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("what", CLIENT)
def test_where_a_client_fails_who_waits_is_told_and_the_work_goes_on(what, error, monkeypatch, deaths, open_ones):
    owner, name, at_end = CLIENT[what]
    monkeypatch.setattr(outstanding, "_REST_S", 0.01)
    trap, module = Trap(monkeypatch, owner, name, error), Scale(2)
    with replicas(module) as (server,), DirectoryServer() as directory:
        directory.publish(server)
        with sh.connect(directory.url, timeout_s=30) as teacher:
            assert answer(teacher) == 2
            module.gate.clear()
            module.entered.clear()
            first = ask(teacher, 3)
            assert module.entered.wait(20)
            sprung = trap.set()
            directory.publish(server, zone="a")
            teacher._dispatcher._watch._call.cancel()  # it begins again
            if at_end:
                open_ones[-1].end(errors.TeacherUnavailableError("a restart"))
            module.gate.set()
            second = teacher.submit((torch.ones(3_000_000),), {}, [""])
            for future in (first, second):
                told = future.exception(20)
                assert told is None or isinstance(told, errors.SchoolhouseError)
            assert sprung.wait(20)
            assert [answer(teacher, i) for i in range(3)] == [0, 2, 4]
            assert {"schoolhouse-deadlines", "schoolhouse-watch"} < {*threads()}
            directory.publish(server, state=DRAINING)
            assert soon(lambda: teacher._dispatcher.known.replicas[0].draining, collect=False)  # it hears of what comes
    assert soon(lambda: threads() == []), threads()
    assert deaths
    deaths.clear()


ANSWERS = {  # of a replica, and who is told of it
    "on_unavailable": lambda call: [failure(call, teacher_pb2.Failure.UNAVAILABLE)],
    "on_broken": lambda call: [failure(call, teacher_pb2.Failure.INTERNAL)],
    "on_wrong": lambda call: [answered(call, revision="another")],
}


def failure(call, code):
    return teacher_pb2.ServerMessage(failure={"request_id": call.request_id, "code": code})


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", ANSWERS)
def test_a_request_whose_bad_answer_cannot_be_dealt_with_fails_alone(name, error, monkeypatch, deaths):
    trap, bad = Trap(monkeypatch, Dispatcher, name, error), [True]

    def answers(call):
        return ANSWERS[name](call) if bad.pop() else [answered(call)]

    with bad_replica("r1", answers) as (replica, _), sh.connect(url_of(replica)) as teacher:
        trap.set()
        assert isinstance(ask(teacher).exception(20), errors.TeacherInternalError)
        bad[:] = [False]
        assert answer(teacher) == -1
        assert len(deaths) == 1
    deaths.clear()


def test_a_late_request_that_cannot_be_failed_as_usual_fails_all_the_same(monkeypatch, deaths):
    trap, module = Trap(monkeypatch, Dispatcher, "cancel"), Scale(2)
    with replicas(module) as (server,), sh.connect(server.url, timeout_s=1) as teacher:
        module.gate.clear()
        trap.set()
        assert isinstance(ask(teacher).exception(20), errors.SchoolhouseError)
        assert isinstance(ask(teacher, 2).exception(20), errors.TeacherTimeoutError)
        module.gate.set()
    deaths.clear()


def test_a_request_whose_revision_is_gone_fails_where_it_cannot_follow(monkeypatch, deaths):
    trap = Trap(monkeypatch, RemoteTeacher, "_with_heads", Panic())
    request = Request(None, None, "", 0.0, {}, None)
    with replicas(Net()) as (server,), sh.connect(server.url, follow_revisions=True) as teacher:
        assert teacher.describe().revision == revision_of(server)
        request.follow = teacher._follow_with
        trap.set()
        request.refuse(errors.RevisionChangedError("gone"))
        assert isinstance(request.future.exception(20), errors.TeacherInternalError)
    deaths.clear()


def test_why_a_server_is_silent_is_not_known_where_that_cannot_be_found_out(monkeypatch, deaths):
    Trap(monkeypatch, handshake, "_look", Panic()).set()
    assert handshake.why_not("127.0.0.1:1", ClientSecurity()) is None
    assert deaths
    deaths.clear()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", ["_on_first", "_on_second"])
def test_a_verified_request_whose_comparison_fails_is_told(name, error, monkeypatch, deaths):
    trap = Trap(monkeypatch, Pair, name, error)
    with replicas(Scale(2)) as (server,), sh.connect(server.url, verify_every=1) as teacher:
        trap.set()
        assert isinstance(ask(teacher).exception(20), errors.TeacherInternalError)
        assert answer(teacher, 2) == 4
    deaths.clear()


def test_at_exit_every_connection_is_closed(monkeypatch, deaths):
    class Connection:
        def threads(self):
            return []

        def close(self):
            closed.append(self)
            raise RuntimeError("as bugs do")

    closed, ones = [], [Connection(), Connection()]
    monkeypatch.setattr(at_exit, "_in_use", weakref.WeakSet(ones))
    at_exit._close_all()
    assert {*closed} == {*ones}
    deaths.clear()


# The server's.

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


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("what", SERVER)
def test_where_a_session_fails_its_client_is_told_and_the_replica_goes_on(what, error, monkeypatch, deaths, open_ones):
    owner, name, at_end = SERVER[what]
    trap, module = Trap(monkeypatch, owner, name, error), Scale(2)
    with replicas(module) as (server,):
        with sh.connect(server.url, timeout_s=30) as other:
            assert answer(other) == 2
            with sh.connect(server.url, timeout_s=30) as teacher:
                assert answer(teacher) == 2
                sprung = trap.set()
                if at_end:
                    end = functools.partial(open_ones[-1].end, errors.TeacherUnavailableError("a restart"))
                    server._timer.at(0.0, end)  # as a lease does
                wrong = teacher.submit((torch.ones(2), "no"), {}, [""])  # fails, as it should
                for future in (ask(teacher, 3), wrong):
                    told = future.exception(20)
                    assert told is None or isinstance(told, errors.SchoolhouseError)
                assert sprung.wait(20)
                assert [answer(teacher, i) for i in range(3)] == [0, 2, 4]
            assert answer(other, 7) == 14
        load = functools.partial(server.load, "teacher")
        assert soon(lambda: server._teachers.sessions == 0 and load().in_flight == load().queued == 0)
        assert soon(lambda: server.unsent.nbytes == 0)
        if what != "a place that is left":
            assert soon(lambda: load().sessions == 0)
    deaths.clear()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize(("owner", "name"), [(calls, "_head_answer"), (ServerSession, "_answer")])
def test_who_asks_for_a_head_is_told(owner, name, error, monkeypatch, deaths):
    trap = Trap(monkeypatch, owner, name, error)
    with replicas(Net()) as (server,), sh.connect(server.url, head_folder=None, timeout_s=30) as teacher:
        trap.set()
        wish = {"fc": encodings.hidden("fc")}
        with contextlib.suppress(errors.SchoolhouseError):
            teacher.submit((torch.ones(1, 8),), {}, ["fc"], encodings=wish).result(20)
        assert trap.sprung.is_set()
        assert teacher.submit((torch.ones(1, 8),), {}, ["fc"], encodings=wish).result(20)["fc"].shape == (1, 5)
    deaths.clear()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
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
        engine.submit(one.job)
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
        engine.submit(asked.job)
    engine.start()
    assert torch.equal(other.features[""], x)
    third = Asked(torch.zeros(2))
    engine.submit(third.job)
    assert torch.equal(third.features[""], torch.zeros(2))
    assert engine.trouble is None
    engine.close()
    deaths.clear()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_a_timer_outlives_what_it_calls_and_its_own_errors(error, monkeypatch, deaths):
    monkeypatch.setattr("schoolhouse_server.timer._REST_S", 0.01)
    trap, timer, rung = Trap(monkeypatch, Timer, "_wait", error), Timer(), threading.Semaphore(0)

    def fail():
        rung.release()
        raise error

    for _ in range(3):
        timer.at(0.0, fail)
    timer.at(1.0, rung.release)
    for _ in range(4):
        assert rung.acquire(timeout=20)
    trap.set()
    timer.at(2.0, rung.release)
    timer.at(3.0, rung.release)
    for _ in range(2):
        assert rung.acquire(timeout=20)
    assert timer._thread.is_alive()
    timer.close()
    deaths.clear()


def test_a_timer_for_which_there_was_no_thread_begins_with_the_next_alarm(monkeypatch):
    timer, rung = Timer(), threading.Semaphore(0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Trap.raising(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            timer.at(0.0, rung.release)
    timer.at(0.0, rung.release)
    for _ in range(2):
        assert rung.acquire(timeout=20)
    timer.close()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
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


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
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


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", ["service_actions", "process_request", "finish_request"])
def test_a_page_is_served_again_after_an_error(name, error, monkeypatch, deaths):
    monkeypatch.setattr(web, "_REST_S", 0.01)
    trap = Trap(monkeypatch, web._Server, name, error)
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
    demo = pytest.importorskip("schoolhouse_server.demo")
    with Progress() as bars:
        job = demo._Job("plain", "", 1, bars, [])
        job._command = [sys.executable, "-c", "import time; print('no JSON', flush=True); time.sleep(600)"]
        with job, pytest.raises(RuntimeError, match="student 'plain' failed") as caught:
            job.wait(60)
    assert isinstance(caught.value.__cause__, ValueError)
    deaths.clear()
