"""A client follows the directory, outlives it, and leaves nothing behind."""

import gc
import os
import signal

import grpc
import pytest
import schoolhouse as sh
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
    tasks,
)
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote.directory import Known, Replica, ReplicaSet
from schoolhouse_server import serve


def tell(process, *said):
    """Have its directory publish replicas, of the revision that is the last of the words."""
    process.stdin.write(" ".join(said) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "published\n"


# The directory.


def test_a_directory_may_die_and_return():
    with replicas(Scale(2), Scale(2)) as (one, other):
        with DirectoryServer() as directory:
            directory.publish(one)
            teacher = sh.connect(directory.url)
            assert answer(teacher) == 2
        assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]
        with DirectoryServer(directory.port) as anew:
            anew.publish(one, other)
            assert soon(lambda: answer(teacher) == 2 and sessions(teacher) == addresses(one, other))
        one.close()
        assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]
        teacher.close()


def test_a_directory_that_comes_up_empty_is_not_believed_at_once(monkeypatch):
    with replicas(Scale(2)) as (server,):
        with DirectoryServer() as directory:
            directory.publish(server)
            monkeypatch.setattr("schoolhouse.remote.directory.DOUBT_S", 60.0)
            teacher = sh.connect(directory.url, timeouts=sh.Timeouts(teacher_s=2))
            assert answer(teacher) == 2
        with DirectoryServer(directory.port) as anew:
            assert soon(lambda: teacher._dispatcher._known.settles_at is not None)  # it knows no such teacher
            assert answer(teacher, 2) == 4
            anew.publish()
            assert answer(teacher, 3) == 6
            anew.publish(server)
            assert soon(lambda: teacher._dispatcher._known.settles_at is None)
            assert answer(teacher, 4) == 8
            monkeypatch.setattr("schoolhouse.remote.directory.DOUBT_S", 0.3)
            anew.publish()
            assert soon(lambda: sessions(teacher) == set())  # by now it is
            with pytest.raises(errors.TeacherUnavailableError, match="the directory lists none"):
                answer(teacher)
        teacher.close()


def test_doubts_in_a_directory():
    def listed(*revisions):
        return ReplicaSet(tuple(Replica(f"h:{i}", revision=revision) for i, revision in enumerate(revisions)))

    known = Known(listed("r1", "r1"))
    known.hear(listed("r2"), "r1", now=10.0)
    known.hear(listed(), "r1", now=15.0)
    assert known.set == listed("r1", "r1")
    assert not known.settle(19.9)
    assert known.settles_at == 20.0  # since the first of them
    assert known.settle(20.1)
    assert known.set == listed()
    known.hear(listed("r2"), "r1", now=30.0)  # nothing is lost by it
    assert known.set == listed("r2")
    known.hear(listed("r1", "r2"), "r1", now=31.0)
    known.hear(listed("r2"), "r1", now=32.0)
    known.forget_doubts()
    assert not known.settle(99.0)
    known.hear(listed("r2"), "", now=33.0)  # for one that asks for any
    assert known.set == listed("r2")


def test_a_directory_that_hangs_is_not_missed():
    with elsewhere(2) as (process, _, _, port), replicas(Scale(2), Scale(2)) as (one, other):
        tell(process, *addresses(one, other), revision_of(one))
        assert soon(lambda: tasks() == []), tasks()  # those of earlier tests
        teacher = sh.connect(f"grpc://127.0.0.1:{port}/teacher")
        assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
        process.send_signal(signal.SIGSTOP)
        assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]
        one.close()
        assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]
        teacher.close()
        assert soon(lambda: tasks() == []), tasks()


def test_a_directory_without_watches_is_asked_once():
    with replicas(Scale(2)) as (server,), DirectoryServer() as directory:
        directory.directory.Watch = lambda _request, context: context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        directory.publish(server)
        with sh.connect(directory.url) as teacher:
            assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]


# What is left behind.


def test_a_closed_teacher_leaves_no_tasks_and_no_descriptors():
    assert soon(lambda: tasks() == [])
    with replicas(Scale(2), Scale(2)) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        for i in range(12):
            teacher = sh.connect(directory.url)
            assert answer(teacher) == 2
            assert {"schoolhouse-session", "schoolhouse-watch"} <= {*tasks()}
            if i % 2:
                teacher.close()  # otherwise it is not used any more
            del teacher
            assert soon(lambda: tasks() == []), tasks()
            if i == 3:
                before = len(os.listdir("/proc/self/fd"))
        assert soon(lambda: len(os.listdir("/proc/self/fd")) <= before + 3)  # the replicas close theirs a little later


def test_a_teacher_that_waits_in_vain_can_be_closed_and_leaves_nothing():
    server = serve(Scale(2))
    teacher = sh.connect(server.url)
    server.close()
    future = ask(teacher)
    del teacher
    gc.collect()
    assert tasks()  # the future needs it
    future.cancel()
    del future
    assert soon(lambda: tasks() == []), tasks()
