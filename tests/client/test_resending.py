"""A request whose replica is lost is sent again, and waits for one to its deadline."""

import time

import pytest
import schoolhouse as sh
from bad_replica import bad_replica, url_of
from directories import (
    DirectoryServer,
    Scale,
    addresses,
    answer,
    ask,
    elsewhere,
    replicas,
    sessions,
    stopped_in_mid_forward,
)
from memfd import soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire.v1 import directory_pb2


def test_a_replica_that_restarts_loses_no_request():
    module = Scale(2)
    with serve(module) as server:
        with sh.connect(server.url) as teacher:
            assert answer(teacher) == 2
            module.gate.clear()
            module.entered.clear()
            futures = [ask(teacher, i) for i in range(100)]  # more than are sent at once
            with stopped_in_mid_forward(server, module, teacher):
                futures += [ask(teacher, i) for i in range(100, 110)]
            time.sleep(0.3)
            assert not any(future.done() for future in futures)
            with serve(Scale(2), port=server.port):
                assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(110)]


def test_a_killed_replica_loses_no_request():
    with (
        elsewhere(2) as (process, address, revision, _),
        replicas(Scale(2)) as (other,),
        DirectoryServer() as directory,
    ):
        directory.publish(directory_pb2.Replica(id="a", address=address, revision=revision), other)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
            futures = [ask(teacher, i) for i in range(300)]
            process.kill()
            futures += [ask(teacher, i) for i in range(300, 400)]
            assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(400)]
            assert soon(lambda: sessions(teacher) == addresses(other))


def test_a_session_that_the_server_ends_is_opened_again():
    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        for i in range(5):
            assert answer(teacher, i) == 2 * i
            [session] = teacher.open_sessions()
            session.close()
        assert answer(teacher, 7) == 14
        assert teacher.traffic().requests == 6


def test_requests_wait_for_a_replica():
    with DirectoryServer() as directory, replicas(Scale(2)) as (server,):
        directory.publish(server)
        with sh.connect(directory.url, timeouts=sh.Timeouts(teacher_s=20)) as teacher, serve(Scale(2)) as other:
            assert answer(teacher) == 2
            server.close()
            futures = [ask(teacher, i) for i in range(5)]
            time.sleep(0.5)
            assert not any(future.done() for future in futures)
            assert not futures[0].cancel() or futures[0].cancelled()
            directory.publish(other)
            assert [future.result(20)[""][0].item() for future in futures[1:]] == [2 * i for i in range(1, 5)]


def test_what_was_tried_is_told_at_the_deadline():
    with DirectoryServer() as directory, replicas(Scale(2)) as (server,):
        directory.publish(server)
        with sh.connect(directory.url, timeouts=sh.Timeouts(teacher_s=1)) as teacher:
            server.close()
            first = ask(teacher)
            assert soon(lambda: "efused" in teacher._dispatcher._links.tried())
            error = ask(teacher).exception(20)
            assert first.done()
            assert isinstance(error, errors.TeacherUnavailableError)
            for words in (
                "for 1 s",
                "teacher_s",
                "forward the batch again",
                f"127.0.0.1:{server.port}: ",
                "efused",
                "the directory",
                "answers",
            ):
                assert words in str(error)
            assert not teacher._dispatcher._parked


def test_how_long_a_request_waits_when_nothing_answers():
    server = serve(Scale(2))
    with sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=1.0)) as teacher:
        assert answer(teacher) == 2
        server.close()
        assert soon(lambda: teacher._dispatcher._directory_error is not None)
        began = time.monotonic()
        with pytest.raises(errors.TeacherUnavailableError, match="teacher_s.*tried: .*the directory.*is away"):
            answer(teacher)
        assert time.monotonic() - began >= 1


def test_waiting_requests_are_bounded_and_end_with_the_teacher():
    server = serve(Scale(2))
    teacher = sh.connect(server.url, sharing=sh.Sharing(max_pending=3))
    server.close()
    futures = [ask(teacher, i) for i in range(3)]
    with pytest.raises(errors.TeacherBusyError, match="max_pending"):
        ask(teacher)
    assert futures[0].cancel()
    futures.append(ask(teacher))
    teacher.close()
    for future in futures[1:]:
        with pytest.raises(errors.TeacherUnavailableError, match="was closed"):
            future.result(10)


def test_answers_that_are_errors_are_not_asked_for_again():
    with replicas(Scale(2), Scale(2)) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            entered = []
            for server in servers:
                teacher_module = server.engines["teacher"].teacher.module
                teacher_module.register_forward_pre_hook(lambda *_: entered.append(1))
            with pytest.raises(errors.TeacherForwardError):
                teacher.submit((None,), {}, [""]).result(20)
            assert len(entered) == 1


def test_a_request_that_ends_every_replica_is_given_up():
    with bad_replica("r1", lambda _call: None) as (replica, calls), sh.connect(url_of(replica)) as teacher:
        with pytest.raises(errors.TeacherUnavailableError, match="4 replicas were lost"):
            ask(teacher).result(20)
        assert len(calls) == 4
