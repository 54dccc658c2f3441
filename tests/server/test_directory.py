"""The directory: says when it does not know, tells watchers what changed, and has bounds."""

import contextlib
import time

import directories
import grpc
import pytest
from memfd import soon
from schoolhouse.errors import TeacherBusyError, TeacherUnavailableError, UnknownTeacherError
from schoolhouse_server.replica import directory as module
from schoolhouse_server.replica.directory import Directory
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

SERVING, DRAINING = directory_pb2.Replica.SERVING, directory_pb2.Replica.DRAINING


def replicas(*ids, name="net", revision="r1", state=SERVING, **load):
    made = [
        directory_pb2.Replica(id=i, address=f"{i}:1", revision=revision, state=state, load=directory_pb2.Load(**load))
        for i in ids
    ]
    return directory_pb2.ReplicaSet(teacher=name, replicas=made, wanted=len(ids), revision=revision)


@pytest.fixture
def serving():
    """A directory behind gRPC as the pool's is, and a stub of it, or one for each of several connections."""
    with contextlib.ExitStack() as stack:

        def start(directory, connections=1):
            server = directories.serving(directory._loop, directory, max_rpcs=module.MAX_WATCHERS + 64)
            stack.callback(directory._loop.stop)
            stack.callback(server.stop, 0)
            stack.callback(directory.close)
            target, options = f"127.0.0.1:{server.port}", channel.CLIENT_OPTIONS
            opened = [stack.enter_context(grpc.insecure_channel(target, options)) for _ in range(connections)]
            stubs = [directory_pb2_grpc.DirectoryServiceStub(one) for one in opened]
            return stubs if connections > 1 else stubs[0]

        yield start


def watch(stub, name="net", timeout=30):
    return stub.Watch(directory_pb2.WatchRequest(teacher=name), timeout=timeout)


def error_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), status.from_rpc_error(caught.value, "x")


def test_one_that_was_restarted_is_unavailable_until_it_knows_all(serving):
    directory = Directory(Loop("directory"), ready=False)
    stub = serving(directory)
    for call in (
        lambda: stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=20),
        lambda: next(watch(stub)),
    ):
        code, error = error_of(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert isinstance(error, TeacherUnavailableError)
    directory.publish_all([replicas("a"), replicas("b", name="other")])
    found = stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=20).teachers
    assert [one.teacher for one in found] == ["net", "other"]
    assert isinstance(error_of(lambda: next(watch(stub, "nets")))[1], UnknownTeacherError)


def test_watchers_hear_of_what_changed_at_once_and_of_loads_in_time(serving, monkeypatch):
    monkeypatch.setattr(module, "_LOADS_S", 0.3)
    directory = Directory(Loop("directory"))
    directory.publish(replicas("a", queued=1))
    stub = serving(directory)
    news = watch(stub)
    assert next(news).replicas[0].load.queued == 1
    more = {"served": 7, "cached": 3, "joined": 2}
    directory.publish(replicas("a", queued=2, stage_s={"forward": 1.0}, jobs=[directory_pb2.JobLoad(job="x")], **more))
    heard = next(news).replicas[0].load
    assert heard == directory_pb2.Load(queued=2)  # what a choice needs, and no more
    listed = stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=20).teachers[0].replicas[0].load
    assert listed.jobs[0].job == "x"
    for changed in (
        replicas("a", "b"),
        replicas("a", "b", state=DRAINING),
        replicas("b", "a", revision="r2"),
    ):
        directory.publish(changed)
        assert next(news) == changed
    news.cancel()
    assert soon(lambda: not directory._watchers)


def test_loads_of_its_own_server_reach_watchers(serving, monkeypatch):
    monkeypatch.setattr(module, "_LOADS_S", 0.1)
    loads = iter(range(1000))
    directory = Directory(Loop("directory"), lambda name: directory_pb2.Load(queued=next(loads)))
    directory.publish(replicas("a"))
    news = watch(serving(directory))
    first, second = next(news), next(news)
    assert second.replicas[0].load.queued > first.replicas[0].load.queued


def test_as_many_watchers_as_it_takes_and_no_more(serving, monkeypatch):
    monkeypatch.setattr(module, "MAX_WATCHERS", 1024)
    directory = Directory(Loop("directory"))
    directory.publish(replicas("a"))
    stub, *others = serving(directory, connections=33)
    watches = [watch(others[i % 32], timeout=150) for i in range(module.MAX_WATCHERS)]
    assert all(len(next(one).replicas) == 1 for one in watches)
    code, error = error_of(lambda: next(watch(stub)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(error, TeacherBusyError)
    assert stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=20).teachers  # it is not in their way
    directory.publish(replicas("a", "b"))
    began = time.monotonic()
    assert all(len(next(one).replicas) == 2 for one in watches)
    assert time.monotonic() - began < 30
    for one in watches[:10]:
        one.cancel()
    assert soon(lambda: len(directory._watchers) == module.MAX_WATCHERS - 10, timeout_s=60, collect=False)
    assert next(watch(stub)).replicas
    for one in watches:
        one.cancel()
