"""A client follows the directory, outlives it, sends lost requests again, and keeps to one revision."""

import gc
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import schoolhouse as sh
import torch
from directories import (
    DirectoryServer,
    Scale,
    answer,
    ask,
    elsewhere,
    replicas,
    revision_of,
    stopped_in_mid_forward,
    threads,
)
from memfd import soon
from schoolhouse import encodings, errors
from schoolhouse.replicas import Known, Replica, ReplicaSet
from schoolhouse_server import serve
from schoolhouse_wire import channel, framing
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from stub import Stub
from torch import nn
from torch.nn import functional as F


def sessions(teacher):
    return {session.address for session in teacher.open_sessions()}


def addresses(*servers):
    return {f"127.0.0.1:{server.port}" for server in servers}


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
            teacher = sh.connect(directory.url, timeout_s=2)
            assert answer(teacher) == 2
        with DirectoryServer(directory.port) as anew:
            assert soon(lambda: teacher._dispatcher._known.settles_at is not None)  # it knows no such teacher
            assert answer(teacher, 2) == 4
            anew.publish()
            assert answer(teacher, 3) == 6
            anew.publish(server)
            assert soon(lambda: teacher._dispatcher._known.settles_at is None)
            assert answer(teacher, 4) == 8
            monkeypatch.setattr("schoolhouse.replicas.DOUBT_S", 0.3)
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
        before = threads()
        teacher = sh.connect(f"grpc://127.0.0.1:{port}/teacher")
        assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
        process.send_signal(signal.SIGSTOP)
        assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]
        one.close()
        assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]
        teacher.close()
        assert soon(lambda: threads() == before)


def test_a_directory_without_watches_is_asked_once():
    with replicas(Scale(2)) as (server,), DirectoryServer() as directory:
        directory.directory.Watch = lambda _request, context: context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        directory.publish(server)
        with sh.connect(directory.url) as teacher:
            assert [answer(teacher, i) for i in range(5)] == [2 * i for i in range(5)]


# What is lost is sent again.


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
            assert sessions(teacher) == addresses(other)


def test_a_session_that_the_server_ends_is_opened_again():
    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        for i in range(5):
            assert answer(teacher, i) == 2 * i
            [session] = teacher.open_sessions()
            session.close()
        assert answer(teacher, 7) == 14
        assert teacher.traffic().requests == 6


def test_requests_wait_for_a_replica_as_long_as_the_directory_answers():
    with DirectoryServer() as directory, replicas(Scale(2)) as (server,):
        directory.publish(server)
        with sh.connect(directory.url, retry_s=0, timeout_s=20) as teacher, serve(Scale(2)) as other:
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
        with sh.connect(directory.url, timeout_s=1) as teacher:
            server.close()
            error = ask(teacher).exception(20)
            assert isinstance(error, errors.TeacherUnavailableError)
            for words in ("within 1 s", f"127.0.0.1:{server.port}: ", "efused", "the directory", "answers"):
                assert words in str(error)
            assert not teacher._dispatcher._parked


@pytest.mark.parametrize("retry_s", [0, 1.0])
def test_how_long_a_request_waits_when_nothing_answers(retry_s):
    server = serve(Scale(2))
    with sh.connect(server.url, retry_s=retry_s) as teacher:
        assert answer(teacher) == 2
        server.close()
        assert soon(lambda: teacher._dispatcher._dark_since is not None)
        began = time.monotonic()
        with pytest.raises(errors.TeacherUnavailableError, match="retry_s.*tried: .*the directory.*is away"):
            answer(teacher)
        assert time.monotonic() - began >= retry_s


def test_waiting_requests_are_bounded_and_end_with_the_teacher():
    server = serve(Scale(2))
    teacher = sh.connect(server.url, max_pending=3)
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


def ending_server():
    """A replica that ends its session at the first call; it counts them."""
    calls = []

    def session(messages, _context):
        for message in messages:
            if message.HasField("open"):
                yield teacher_pb2.ServerMessage(opened={"revision": "r1", "max_in_flight": 8})
            elif message.HasField("call"):
                calls.append(message.call.request_id)
                return

    found = directory_pb2.ReplicaSet(teacher="t", replicas=[directory_pb2.Replica()])
    described = teacher_pb2.DescribeResponse(teacher="t", revision="r1", modules=[""], max_request_bytes=1 << 20)
    handlers = {
        "TeacherService": {
            "Session": grpc.stream_stream_rpc_method_handler(
                session,
                request_deserializer=lambda data: framing.read_message(teacher_pb2.ClientMessage, data),
                response_serializer=framing.write_message,
            ),
            "Describe": grpc.unary_unary_rpc_method_handler(
                lambda *_: described, response_serializer=teacher_pb2.DescribeResponse.SerializeToString
            ),
        },
        "DirectoryService": {
            "ListTeachers": grpc.unary_unary_rpc_method_handler(
                lambda *_: directory_pb2.ListTeachersResponse(teachers=[found]),
                response_serializer=directory_pb2.ListTeachersResponse.SerializeToString,
            )
        },
    }
    server = grpc.server(ThreadPoolExecutor(8), options=channel.SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(f"schoolhouse.v1.{name}", methods)
            for name, methods in handlers.items()
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"grpc://127.0.0.1:{port}/t", calls


def test_a_request_that_ends_every_replica_is_given_up():
    server, url, calls = ending_server()
    try:
        with sh.connect(url) as teacher:
            with pytest.raises(errors.TeacherUnavailableError, match="4 replicas were lost"):
                ask(teacher).result(20)
            assert len(calls) == 4
    finally:
        server.stop(0).wait(10)


# Revisions.


@pytest.fixture
def roll():
    """A directory, and replicas of two revisions: the first is listed."""
    with replicas(Scale(2), Scale(3)) as (old, new), DirectoryServer() as directory:
        directory.publish(old, revision=revision_of(old))
        yield directory, old, new


def test_a_job_keeps_its_revision_while_new_ones_get_the_next(roll, monkeypatch):
    monkeypatch.setattr("schoolhouse.replicas.DOUBT_S", 0.3)
    directory, old, new = roll
    with sh.connect(directory.url) as begun:
        assert answer(begun) == 2
        directory.publish(new, old, revision=revision_of(new))
        with sh.connect(directory.url) as later:
            for i in range(20):
                features = ask(begun, i).result(20), ask(later, i).result(20)
                assert [f[""][0].item() for f in features] == [2 * i, 3 * i]
                assert [f.revision for f in features] == [revision_of(old), revision_of(new)]
            assert [sessions(begun), sessions(later)] == [addresses(old), addresses(new)]
            directory.publish(new, revision=revision_of(new))
            assert soon(lambda: not sessions(begun))
            with pytest.raises(errors.RevisionChangedError, match="Connect again.*follow_revisions") as caught:
                answer(begun)
            assert caught.value.choices == (revision_of(new),)
            assert answer(later) == 3


def test_requests_in_flight_at_the_last_replica_of_a_revision_are_answered(monkeypatch):
    monkeypatch.setattr("schoolhouse.replicas.DOUBT_S", 0.2)
    module = Scale(2)
    with replicas(module, Scale(3)) as (old, new), DirectoryServer() as directory:
        directory.publish(old)
        with sh.connect(directory.url) as teacher:
            assert answer(teacher) == 2
            module.gate.clear()
            futures = [ask(teacher, i) for i in range(5)]
            directory.publish(new)
            assert soon(lambda: any(link.leaving for link in teacher._dispatcher._links))
            assert isinstance(ask(teacher).exception(20), errors.RevisionChangedError)
            module.gate.set()
            assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(5)]


def test_a_revision_can_be_asked_for(roll):
    directory, old, new = roll
    directory.publish(new, old, revision=revision_of(new))
    with sh.connect(directory.url, revision=revision_of(old)) as teacher:
        assert teacher.describe().revision == revision_of(old)
        assert answer(teacher) == 2
    with pytest.raises(errors.RevisionChangedError, match="no replica of revision 12ab") as caught:
        sh.connect(directory.url, revision="12ab")
    assert set(caught.value.choices) == {revision_of(old), revision_of(new)}


def test_a_job_may_follow_the_revisions(roll):
    directory, old, new = roll
    factors = {revision_of(old): 2, revision_of(new): 3}
    with sh.connect(directory.url, follow_revisions=True) as teacher:
        seen = []
        for i in range(60):
            if i == 20:
                directory.publish(new, old, revision=revision_of(new))
            if i == 40:
                directory.publish(new, revision=revision_of(new))
            features = ask(teacher, i).result(20)
            assert features[""][0].item() == factors[features.revision] * i
            seen.append(features.revision)
            time.sleep(0.01)
        assert seen == sorted(seen, key=[revision_of(old), revision_of(new)].index)
        assert set(seen) == {*factors}
        assert teacher.describe().revision == revision_of(new)
        assert pickle.loads(pickle.dumps(teacher)).describe().revision == revision_of(new)


def test_what_is_lost_while_a_job_follows_is_asked_of_the_next_revision():
    module = Scale(2)
    with serve(module) as server, sh.connect(server.url, follow_revisions=True) as teacher:
        assert answer(teacher) == 2
        module.gate.clear()
        module.entered.clear()
        futures = [ask(teacher, i) for i in range(5)]
        with stopped_in_mid_forward(server, module, teacher):
            pass
        with serve(Scale(3), port=server.port) as anew:
            for i, future in enumerate(futures):
                features = future.result(20)
                assert (features[""][0].item(), features.revision) == (3 * i, revision_of(anew))


def test_a_server_that_comes_back_with_other_weights_is_not_asked():
    module = Scale(2)
    with serve(module) as server, sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        module.gate.clear()
        module.entered.clear()
        futures = [ask(teacher, i) for i in range(5)]
        with stopped_in_mid_forward(server, module, teacher):
            pass
        with serve(Scale(3), port=server.port) as anew:
            for future in [*futures, ask(teacher)]:
                error = future.exception(20)
                assert isinstance(error, errors.RevisionChangedError)
                assert error.choices == (revision_of(anew),)
            assert anew.engines["teacher"].served == 0


def test_heads_are_those_of_the_features_revision():
    old, new = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    x, wish = torch.randn(5, 4), {"1": encodings.hidden("1")}
    with replicas(old, new) as (one, other), DirectoryServer() as directory:
        directory.publish(one, revision=revision_of(one))
        with sh.connect(directory.url, follow_revisions=True, head_folder=None) as teacher:

            def logits():
                features = teacher.submit((x,), {}, ["1"], encodings=wish).result(20)
                return features.revision, features["1"]

            for server, module in ((one, old), (other, new)):
                directory.publish(server, revision=revision_of(server))
                assert soon(lambda server=server: logits()[0] == revision_of(server))
                expected = F.linear(F.linear(x, module[0].weight, module[0].bias), module[1].weight, module[1].bias)
                torch.testing.assert_close(logits()[1].dense(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_copies_keep_the_revision_while_both_are_there(roll):
    directory, old, new = roll
    with sh.connect(directory.url) as teacher:
        directory.publish(new, old, revision=revision_of(new))
        with pickle.loads(pickle.dumps(teacher)) as copied:
            assert answer(copied) == answer(teacher) == 2


def test_a_replica_refuses_a_session_of_another_revision():
    with serve(Scale(2)) as server:
        stub = Stub(server)
        stub.channel.close()
        opened = teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher", revision="another")
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as found:
            call = found.stream_stream(
                channel.SESSION_METHOD,
                request_serializer=framing.write_message,
                response_deserializer=lambda data: framing.read_message(teacher_pb2.ServerMessage, data),
            )(iter([teacher_pb2.ClientMessage(open=opened)]), timeout=20)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() == grpc.StatusCode.ABORTED
            assert revision_of(server) in caught.value.details()


# What is left behind.


def test_a_closed_teacher_leaves_no_threads_and_no_descriptors():
    assert soon(lambda: threads() == [])
    with replicas(Scale(2), Scale(2)) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        counts = []
        for i in range(12):
            teacher = sh.connect(directory.url)
            assert answer(teacher) == 2
            assert {"schoolhouse-deadlines", "schoolhouse-watch"} < {*threads()}
            if i % 2:
                teacher.close()  # otherwise it is not used any more
            del teacher
            assert soon(lambda: threads() == []), threads()
            if i in (3, 11):
                counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[1] <= counts[0] + 3


def test_a_teacher_that_waits_in_vain_can_be_closed_and_leaves_nothing():
    server = serve(Scale(2))
    teacher = sh.connect(server.url)
    server.close()
    future = ask(teacher)
    del teacher
    gc.collect()
    assert threads()  # the future needs it
    future.cancel()
    del future
    assert soon(lambda: threads() == []), threads()


def test_a_fork_watches_by_itself():
    """As after a fork, without one: real ones are in test_session.py and test_connections.py."""
    with replicas(Scale(2), Scale(2)) as (one, other), DirectoryServer() as directory:
        directory.publish(one)
        with sh.connect(directory.url, connect_timeout_s=2) as teacher:
            for child in range(2):
                assert answer(teacher) == 2
                parent, teacher._pid = teacher._dispatcher, -1
                if child:  # it has what was known before
                    directory.close()
                assert answer(teacher) == 2
                assert teacher._dispatcher is not parent
                parent.close()
                if not child:
                    directory.publish(other)
                assert soon(lambda: answer(teacher) == 2 and sessions(teacher) == addresses(other))
