"""Replicas that die, hang, or answer with something else are left; with none, a student waits, says so, and goes on."""

import dataclasses
import logging
import random
import signal
import time

import pytest
import schoolhouse as sh
import torch
from bad_replica import answered, bad_replica
from directories import (
    DirectoryServer,
    Scale,
    addresses,
    answer,
    ask,
    elsewhere,
    replicas,
    revision_of,
    sessions,
)
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote import pending
from schoolhouse.remote.connections import connections
from schoolhouse.remote.directory import Replica, ReplicaSet
from schoolhouse.remote.replica_pool import Links
from schoolhouse.remote.request import Question, Request, Traffic
from schoolhouse.remote.session import Session
from schoolhouse.teachers.query import Wanted
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from torch import nn


def failing(code):
    def answers(call):
        failure = teacher_pb2.Failure(request_id=call.request_id, code=code, message="no")
        yield teacher_pb2.ServerMessage(failure=failure)

    return answers


WRONG = {
    "inputs": lambda call: [answered(call, input_digest=b"another")],
    "revision": lambda call: [answered(call, revision="another")],
    "taps": lambda call: [answered(call, taps=[])],
    "bytes": lambda call: [answered(call, payload=teacher_pb2.Payload(digest=b"0" * 16, data=b"12345678"))],
    "structure": lambda call: [answered(call, features=b"\xff\xff\xff")],
    "internal": failing(teacher_pb2.Failure.INTERNAL),
    "unknown": failing(99),
    "corrupt": failing(teacher_pb2.Failure.CORRUPT_PAYLOAD),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_replica_that_answers_wrongly_is_left_and_the_request_goes_to_another(wrong):
    with replicas(Scale(2)) as (good,), bad_replica(revision_of(good), WRONG[wrong]) as (bad, calls):
        with DirectoryServer() as directory:
            directory.publish(bad, good)
            with sh.connect(directory.url) as teacher:
                assert soon(lambda: answer(teacher) == 2 and calls)  # each is asked
                futures = [ask(teacher, i) for i in range(200)]
                assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(200)]
                if wrong not in ("internal", "unknown", "corrupt"):
                    assert len(calls) <= 60  # it was left: else it had half of them


@pytest.mark.parametrize("wrong", ["inputs", "bytes", "internal"])
def test_where_there_is_no_other_the_error_is_that_of_the_answer(wrong):
    with replicas(Scale(2)) as (good,), bad_replica(revision_of(good), WRONG[wrong]) as (bad, calls):
        with DirectoryServer() as directory:
            directory.publish(bad)
            kinds = {"inputs": errors.FeatureMismatchError, "bytes": errors.CorruptPayloadError}
            with sh.connect(directory.url) as teacher, pytest.raises(kinds.get(wrong, errors.TeacherInternalError)):
                answer(teacher)
            assert len(calls) == 1 if wrong == "internal" else 2 <= len(calls) <= 4


def test_a_stream_that_breaks_is_opened_again_where_there_is_no_other():
    def broken_once(call):
        yield b"\xff\xff\xff" if len(calls) == 3 else answered(call)

    with bad_replica("r1", broken_once) as (only, calls), DirectoryServer() as directory:
        directory.publish(only)
        with sh.connect(directory.url) as teacher:
            assert [answer(teacher) for _ in range(6)] == [-1] * 6
        assert len(calls) == 7


@pytest.mark.parametrize("kind", ["silent", "stopped"])
def test_a_replica_that_hangs_is_left_within_the_deadline(kind):
    with replicas(Scale(2)) as (good,), DirectoryServer() as directory:
        hung = bad_replica(revision_of(good), lambda _call: []) if kind == "silent" else elsewhere(2)
        with hung as found:
            stopped = directory_pb2.Replica(id="bad", address=found[1], revision=found[2]) if len(found) > 2 else None
            bad = stopped or found[0]
            directory.publish(bad, good)
            with sh.connect(directory.url, timeouts=sh.Timeouts(attempt_s=0.5, request_s=20)) as teacher:
                if kind == "stopped":
                    assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
                    found[0].send_signal(signal.SIGSTOP)
                for _ in range(3):
                    futures = [ask(teacher, i) for i in range(20)]
                    assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(20)]
                assert soon(lambda: addresses(good) <= sessions(teacher))
                if kind == "stopped":
                    found[0].send_signal(signal.SIGCONT)
                    assert soon(lambda: answer(teacher) == 2 and bad.address in sessions(teacher), timeout_s=60)


def test_where_all_are_slow_none_is_left():
    modules = [Scale(2), Scale(2)]
    with replicas(*modules) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
            before = teacher.open_sessions()
            for module in modules:
                module.gate.clear()
                module.entered.clear()
            futures = [ask(teacher, i) for i in range(12)]
            assert all(module.entered.wait(20) for module in modules)
            dispatcher = teacher._dispatcher  # not patient from now on: one that has nothing to do is no slow one
            dispatcher._timeouts = dataclasses.replace(dispatcher._timeouts, attempt_s=0.2)
            dispatcher.outstanding.stir()
            time.sleep(1)
            assert teacher.open_sessions() == before
            for module in modules:
                module.gate.set()
            assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(12)]


def test_a_lone_replica_that_is_slow_is_not_left():
    module = Scale(2)
    with serve(module) as server, sh.connect(server.url, timeouts=sh.Timeouts(attempt_s=0.2, request_s=20)) as teacher:
        assert answer(teacher) == 2
        [session] = teacher.open_sessions()
        module.gate.clear()
        future = ask(teacher, 3)
        time.sleep(1)
        module.gate.set()
        assert future.result(20)[""][0].item() == 6
        assert teacher.open_sessions() == [session]


def test_a_session_that_was_idle_is_not_silent_since_then():
    now = 0.0

    def request():
        outgoing = framing.Outgoing([torch.ones(2)], limits=Limits(), snapshot=True)
        question = Question(outgoing=outgoing, wanted=Wanted((), ()), revision="r", heads={}, limits=Limits())
        made = Request(question, 1e6)
        made.queue(0.0)
        return made

    session = Session(
        "a", "teacher", job="", weight=1.0, transport=sh.Transport(shared_memory=False, tune_allocator=False),
        security=ClientSecurity(), listener=None, clock=lambda: now, connections=connections(),
    )  # fmt: skip
    session.alive = True
    session._window.grant(teacher_pb2.Opened(max_in_flight=8))
    now = 100.0
    assert session.send(request())
    now = 101.0
    assert session.send(request())
    assert len(session.asked()) == 2
    assert session.silent_since == 100


class Opened:
    """As much of a session as links look at."""

    draining, answered_at, slowest_s, silent_since = False, float("-inf"), 0.0, None

    def __init__(self, address, revision="r"):
        self.address, self.revision, self.traffic = address, revision, Traffic()


def test_the_circuit_opens_after_three_strikes_and_is_tried_with_one_request():
    links = Links(lambda link: Opened(link.replica.address), 10.0, random.Random(1))
    links.update(ReplicaSet((Replica("a", revision="r"),)), 0.0)
    now, rests = 0.0, []
    for _ in range(3):
        while links.pick("r", now) is None:
            [link] = links
            if link.session is not None:
                links.opened(link)
            now += 0.01
        links.take(link, 1)
        links.strike(link, errors.CorruptPayloadError("other bytes"))
        assert links.pick("r", now) is None
        links.lost(link, errors.TeacherUnavailableError("closed"), now)
        links.give_back(link, 1)
        assert "other bytes" in links.tried()
        rests.append(link.retry_at - now)
        assert link.retry_at == now or links.pick("r", now) is None
    now = link.retry_at + 1
    assert links.pick("r", now) is None
    links.opened(link)
    assert links.pick("r", now) is link
    links.take(link, 1)
    assert links.pick("r", now) is None  # one request at a time
    link.session.traffic = Traffic(1)
    assert links.pick("r", now) is link  # it has answered
    assert all(0 <= rest <= 0.1 * 2**i for i, rest in enumerate(rests))


def test_an_opening_that_breaks_is_tried_again_before_that_is_the_error():
    links = Links(lambda link: Opened(link.replica.address, revision=""), 10.0, random.Random(1))
    links.update(ReplicaSet((Replica("a", revision="r"),)), 0.0)
    [link], now, hopeless = links, 1.0, []
    for _ in range(4):
        links.pick("r", now)
        links.lost(link, errors.ProtocolError("what is this"), now)
        hopeless.append(links.hopeless("r", now) is not None)
        now = link.retry_at + 1
    assert hopeless == [False, False, True, True]


def test_a_second_computation_does_not_wait_for_a_replica_that_hangs():
    links = Links(lambda link: Opened(link.replica.address), 10.0, random.Random(1))
    links.update(ReplicaSet((Replica("a", revision="r"),)), 0.0)
    links.pick("r", 0.0)
    [a] = links
    links.opened(a)
    links.update(ReplicaSet((Replica("a", revision="r"), Replica("b", revision="r"))), 0.0)
    assert links.pick("r", 1.0, "a", soon=True) is None  # the other one is opened
    [_, b] = links
    links.lost(b, errors.TeacherUnavailableError("no answer"), 10.0)
    now = b.retry_at
    assert links.pick("r", now, "a") is None  # it is opened again
    assert b.session is not None
    assert links.pick("r", now, "a", soon=True) is a
    links.opened(b)
    assert links.pick("r", now, "a", soon=True) is b


def test_of_two_that_are_slow_the_one_that_was_asked_first_is_not_left():
    links = Links(lambda link: Opened(link.replica.address), 10.0, random.Random(1))
    links.update(ReplicaSet((Replica("a", revision="r"), Replica("b", revision="r"))), 0.0)
    request = Request(None, 1e6)
    for link in links:
        links._open(link, 0.0)
        links.opened(link)
        link.session.asked = lambda: [request]
    a, b = (link.session for link in links)
    a.silent_since, b.silent_since = 1.0, 1.1
    assert links.silent(1.25, 0.2) == []
    b.answered_at = b.silent_since = 1.26  # and it has another one to answer
    assert links.silent(1.3, 0.2) == [a]
    assert request.moved


def test_a_student_says_that_it_waits_and_then_what_to_do(caplog, monkeypatch):
    monkeypatch.setattr(pending, "_SAY_AFTER_S", 0.2)
    server = serve(Scale(2))
    with (
        sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=3.0)) as teacher,
        caplog.at_level(logging.WARNING, "schoolhouse"),
    ):
        assert answer(teacher) == 2
        server.close()
        with pytest.raises(errors.TeacherUnavailableError, match=r"for 3 s .*schoolhouse status.*forward the batch"):
            answer(teacher)
        [said] = [record.message for record in caplog.records if "can be asked for" in record.message]
        assert "1 requests wait" in said
        assert "tried: 127.0.0.1" in said


def test_the_requests_own_time_stands_still_while_there_is_no_teacher(caplog):
    server = serve(Scale(2))
    with sh.connect(server.url, timeouts=sh.Timeouts(request_s=2.5, teacher_s=30)) as teacher:
        assert answer(teacher) == 2
        server.close()
        future = ask(teacher, 4)
        time.sleep(3)
        assert not future.done()
        with serve(Scale(2), port=server.port):
            assert future.result(20)[""][0].item() == 8
    assert any("is back after" in record.message for record in caplog.records)


def test_its_own_time_goes_on_afterwards():
    server = serve(Scale(2))
    with sh.connect(server.url, timeouts=sh.Timeouts(request_s=1.0, teacher_s=30)) as teacher:
        teacher.describe()
        server.close()
        future = ask(teacher, 4)
        time.sleep(0.5)
        slow = Scale(2)
        slow.gate.clear()
        with serve(slow, port=server.port):
            with pytest.raises(errors.TeacherTimeoutError):
                future.result(20)
            slow.gate.set()


def test_a_replica_that_refuses_all_requests_keeps_none_for_ever():
    refusing = failing(teacher_pb2.Failure.UNAVAILABLE)
    with bad_replica("r1", refusing) as (only, calls), DirectoryServer() as directory:
        directory.publish(only)
        with sh.connect(directory.url, timeouts=sh.Timeouts(request_s=1.0, teacher_s=2.0)) as teacher:
            with pytest.raises((errors.TeacherUnavailableError, errors.TeacherTimeoutError)):
                answer(teacher)
        assert len(calls) > 1  # it was tried again


def test_a_port_that_went_to_another_teacher_is_not_the_last_word():
    with DirectoryServer() as directory:
        with serve(Scale(2)) as server:
            directory.publish(server)
            teacher = sh.connect(directory.url)
            assert answer(teacher) == 2
        with teacher, serve(Scale(3), name="other", port=server.port):
            future = ask(teacher, 4)
            assert soon(lambda: "no teacher 'teacher' here" in teacher._dispatcher._tried())
            with serve(Scale(2)) as moved:
                directory.publish(moved)
                assert future.result(20)[""][0].item() == 8


def test_training_goes_on_from_the_batch_that_failed():
    """Under prefetch too: nothing of the loader is lost, and the losses are those of an undisturbed run."""

    def trained(disturb):
        torch.manual_seed(0)
        student, seen, failed = nn.Linear(3, 2), [], []
        loader = [torch.randn(4, 3) for _ in range(6)]
        server = serve(made())
        with sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=0.5)) as teacher:
            teacher.describe()  # has a session open
            settings = {"teacher_model": teacher, "criterion": nn.MSELoss()}
            model = sh.convert(student, mode=[("kd_loss", settings)])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for i, x in enumerate(model.prefetch(loader, depth=2)):
                if disturb and i == 2:
                    server.close()
                for _ in range(40):
                    try:
                        model(x)
                        loss = model.compute_kd_loss()
                        break
                    except errors.TeacherUnavailableError:
                        server = server if failed else serve(made(), port=server.port)
                        failed.append(i)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(loss.item())
        server.close()
        assert bool(failed) == disturb
        return seen

    assert trained(True) == trained(False)


def made():
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def test_no_memory_on_the_device_is_the_requests_own_error():
    with replicas(Scale(2)) as (good,), DirectoryServer() as directory:
        with bad_replica(revision_of(good), failing(teacher_pb2.Failure.OUT_OF_MEMORY)) as (bad, calls):
            directory.publish(bad)
            with sh.connect(directory.url) as teacher, pytest.raises(errors.TeacherMemoryError):
                answer(teacher)
            assert len(calls) == 1
