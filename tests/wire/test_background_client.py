"""Each task and callback of a client is made to fail: who waits is told, and the work goes on."""

import functools
import weakref

import pytest
import schoolhouse as sh
import torch
from bad_replica import answered, bad_replica, url_of
from directories import DRAINING, DirectoryServer, Scale, answer, ask, replicas, revision_of, tasks
from memfd import soon
from models import Net
from schoolhouse import errors
from schoolhouse.remote import at_exit, connections, handshake, pending
from schoolhouse.remote.directory import ReplicaSet
from schoolhouse.remote.dispatcher import Dispatcher
from schoolhouse.remote.pending import Outstanding
from schoolhouse.remote.request import Question, Request
from schoolhouse.remote.session import Session
from schoolhouse.remote.teacher import RemoteTeacher
from schoolhouse.remote.verification import Pair
from schoolhouse.remote.watching import Watch
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.v1 import teacher_pb2
from traps import Panic, Trap, each_error, opened

CLIENT = {  # what is made to fail, and whether that takes the end of a session
    "the reader": (Session, "_receive", False),
    "the reader, at a reply": (Session, "_on_reply", False),
    "the reader, at its end": (Session, "_close", True),
    "the reader, as it tells of its end": (Dispatcher, "on_loss", True),
    "the reader, as it sends on what it had": (Dispatcher, "_send_again", True),
    "the reader, as another session opens": (Dispatcher, "on_opened", True),
    "a request's messages": (Request, "traceparent", False),
    "what is sent": (Session, "_write", True),
    "what is sent through pipes": (Session, "_post", False),
    "a copy": (shared_memory, "_copy", False),
    "a request's way": (Dispatcher, "_ask", False),
    "a request's way, at the choice of a replica": (Dispatcher, "_assign", False),
    "the alarm": (Outstanding, "_ring", False),
    "the deadlines": (Outstanding, "_take_late", False),
    "the deadlines, as they tend": (Dispatcher, "_tend", False),
    "the deadlines, as they flush": (Dispatcher, "_flush", False),
    "the watch": (Watch, "_watch", False),
    "the watch, as it tells": (Dispatcher, "on_set", False),
    "the watch, at what it hears": (ReplicaSet, "from_wire", False),
    "a request's end": (RemoteTeacher, "_done", False),
}


@each_error
@pytest.mark.parametrize("what", CLIENT)
def test_where_a_client_fails_who_waits_is_told_and_the_work_goes_on(what, error, monkeypatch, deaths):
    owner, name, at_end = CLIENT[what]
    monkeypatch.setattr(pending, "_REST_S", 0.01)
    trap, module, begun = Trap(monkeypatch, owner, name, error), Scale(2), opened(monkeypatch)
    with replicas(module) as (server,), DirectoryServer() as directory:
        directory.publish(server)
        with sh.connect(directory.url, timeouts=sh.Timeouts(request_s=30)) as teacher:
            assert answer(teacher) == 2
            module.gate.clear()
            module.entered.clear()
            first = ask(teacher, 3)
            assert module.entered.wait(20)
            watch = teacher._dispatcher._watch
            assert soon(lambda: watch._call is not None)
            sprung = trap.set()
            directory.publish(server, zone="a")
            teacher._dispatcher._loop.call(lambda: watch._call and watch._call.cancel())  # it begins again in any case
            if at_end:
                end = functools.partial(begun[-1].end, errors.TeacherUnavailableError("a restart"))
                server._loop.call(end)  # as a lease does
            module.gate.set()
            second = teacher.submit((torch.ones(3_000_000),), {}, [""])
            for future in (first, second):
                told = future.exception(20)
                assert told is None or isinstance(told, errors.SchoolhouseError)
            assert sprung.wait(20)
            assert [answer(teacher, i) for i in range(3)] == [0, 2, 4]
            assert "schoolhouse-watch" in tasks()
            directory.publish(server, state=DRAINING)
            assert soon(lambda: teacher._dispatcher.known.replicas[0].draining, collect=False)  # it hears of what comes
    assert soon(lambda: tasks() == []), tasks()
    assert deaths
    deaths.clear()


ANSWERS = {  # of a replica, and who is told of it
    "on_unavailable": lambda call: [failure(call, teacher_pb2.Failure.UNAVAILABLE)],
    "on_broken": lambda call: [failure(call, teacher_pb2.Failure.INTERNAL)],
    "on_wrong": lambda call: [answered(call, revision="another")],
}


def failure(call, code):
    return teacher_pb2.ServerMessage(failure={"request_id": call.request_id, "code": code})


@each_error
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
    with replicas(module) as (server,), sh.connect(server.url, timeouts=sh.Timeouts(request_s=1)) as teacher:
        module.gate.clear()
        trap.set()
        assert isinstance(ask(teacher).exception(20), errors.SchoolhouseError)
        assert isinstance(ask(teacher, 2).exception(20), errors.TeacherTimeoutError)
        module.gate.set()
    deaths.clear()


def test_a_request_whose_revision_is_gone_fails_where_it_cannot_follow(monkeypatch, deaths):
    trap = Trap(monkeypatch, RemoteTeacher, "_with_heads", Panic())
    with replicas(Net()) as (server,), sh.connect(server.url, follow_revisions=True) as teacher:
        assert teacher.describe().revision == revision_of(server)
        question = Question(outgoing=None, wanted=None, revision="", heads={}, limits=None)
        request = Request(question, 0.0, follower=teacher._follow_later)
        trap.set()
        request.refuse(errors.RevisionChangedError("gone"))
        assert isinstance(request.future.exception(20), errors.TeacherInternalError)
    deaths.clear()


def test_why_a_server_is_silent_is_not_known_where_that_cannot_be_found_out(monkeypatch, deaths):
    Trap(monkeypatch, handshake, "_look", Panic()).set()
    assert handshake.why_not("127.0.0.1:1", ClientSecurity()) is None
    assert deaths
    deaths.clear()


@each_error
@pytest.mark.parametrize("name", ["_on_first", "_on_second"])
def test_a_verified_request_whose_comparison_fails_is_told(name, error, monkeypatch, deaths):
    trap = Trap(monkeypatch, Pair, name, error)
    with replicas(Scale(2)) as (server,), sh.VerifiedTeacher(sh.connect(server.url), every=1) as teacher:
        trap.set()
        assert isinstance(ask(teacher).exception(20), errors.TeacherInternalError)
        assert answer(teacher, 2) == 4
    deaths.clear()


def test_at_exit_every_connection_is_closed(monkeypatch, deaths):
    class Connection:
        def close(self):
            closed.append(self)
            raise RuntimeError("as bugs do")

    closed, ones, stopped = [], [Connection(), Connection()], []
    monkeypatch.setattr(connections, "busy", lambda: False)
    monkeypatch.setattr(connections, "stop", lambda: stopped.append([*closed]))
    monkeypatch.setattr(at_exit, "_in_use", weakref.WeakSet(ones))
    at_exit._close_all()
    assert {*closed} == {*ones} == {*stopped[0]}
    deaths.clear()
