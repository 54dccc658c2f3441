"""A job keeps to one revision of its teacher, or follows them; what it gets is of the one that it asked for."""

import concurrent.futures
import functools
import itertools
import pickle
import time
import weakref

import grpc
import pytest
import schoolhouse as sh
import torch
from directories import (
    DirectoryServer,
    Scale,
    addresses,
    answer,
    ask,
    replicas,
    revision_of,
    sessions,
    stopped_in_mid_forward,
)
from memfd import no_collector, soon
from schoolhouse import encodings, errors
from schoolhouse.lm_head.head import Head
from schoolhouse.lm_head.operations import linear
from schoolhouse.remote.heads import FetchedHeads
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.v1 import teacher_pb2
from stub import Stub
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def roll():
    """A directory, and replicas of two revisions: the first is listed."""
    with replicas(Scale(2), Scale(3)) as (old, new), DirectoryServer() as directory:
        directory.publish(old, revision=revision_of(old))
        yield directory, old, new


def test_a_job_keeps_its_revision_while_new_ones_get_the_next(roll, monkeypatch):
    monkeypatch.setattr("schoolhouse.remote.directory.DOUBT_S", 0.3)
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
    monkeypatch.setattr("schoolhouse.remote.directory.DOUBT_S", 0.2)
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
        seen, end = [], time.monotonic() + 20
        for i in itertools.count():
            if i >= 60 and (seen[-1] == revision_of(new) or time.monotonic() > end):
                break
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


def test_what_is_lost_while_a_job_follows_is_asked_of_the_next_revision(kept_port):
    module = Scale(2)
    with serve(module, port=kept_port) as server, sh.connect(server.url, follow_revisions=True) as teacher:
        assert answer(teacher) == 2
        module.gate.clear()
        module.entered.clear()
        futures = [ask(teacher, i) for i in range(5)]
        with stopped_in_mid_forward(server, module, teacher):
            pass
        with serve(Scale(3), port=kept_port) as anew:
            for i, future in enumerate(futures):
                features = future.result(20)
                assert (features[""][0].item(), features.revision) == (3 * i, revision_of(anew))


def test_a_server_that_comes_back_with_other_weights_is_not_asked(kept_port):
    module = Scale(2)
    with serve(module, port=kept_port) as server, sh.connect(server.url) as teacher:
        assert answer(teacher) == 2
        module.gate.clear()
        module.entered.clear()
        futures = [ask(teacher, i) for i in range(5)]
        with stopped_in_mid_forward(server, module, teacher):
            pass
        with serve(Scale(3), port=kept_port) as anew:
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


def test_heads_of_revisions_that_were_rolled_away_are_let_go():
    modules = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(4)]
    x, wish, heads = torch.randn(5, 4), {"1": encodings.hidden("1")}, []
    with replicas(*modules) as servers, DirectoryServer() as directory, no_collector():
        directory.publish(servers[0], revision=revision_of(servers[0]))
        with sh.connect(directory.url, follow_revisions=True, head_folder=None) as teacher:

            def has_come(revision):
                features = teacher.submit((x,), {}, ["1"], encodings=wish).result(20)
                if features.revision != revision:
                    return False
                heads.append(weakref.ref(features["1"].head))
                return True

            for server in servers:
                directory.publish(server, revision=revision_of(server))
                assert soon(functools.partial(has_come, revision_of(server)), collect=False)
            assert soon(lambda: [head() is None for head in heads] == [True, True, True, False], collect=False)


def test_a_teacher_keeps_a_bounded_number_of_heads():
    made = {}

    def ask(_revision, inputs, wanted):
        name = wanted.heads()[wanted.taps[0]]
        head = made.setdefault(name, Head([linear(torch.full((2, 2), float(len(made))))]))
        return {wanted.taps[0]: head.digest if inputs.kwargs else head.to_value()}

    heads = FetchedHeads(None, ask)
    with no_collector():
        found = [weakref.ref(heads.get("r", str(i % 60), "")) for i in range(120)]
        kept = [head for head in found if head() is not None]
        assert 1 < len(kept) < 20
        assert kept == found[-len(kept) :]


@pytest.mark.parametrize("cached", [False, True])
def test_what_waits_for_heads_that_are_gone_gets_those_of_the_next_revision(cached, monkeypatch):
    """Hidden states travel with the revision's head: both are of the next one, never one of each."""
    monkeypatch.setattr("schoolhouse.remote.directory.DOUBT_S", 0.2)
    old, new = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    x, wish = torch.randn(5, 4), {"1": encodings.hidden("1")}
    with replicas(old, new) as (one, other), DirectoryServer() as directory:
        directory.publish(one, revision=revision_of(one))
        with sh.connect(directory.url, follow_revisions=True, head_folder=None) as teacher:
            if cached:
                teacher.submit((x,), {}, ["1"], encodings=wish).result(20)
            one.close()
            assert soon(lambda: not teacher.open_sessions())
            with concurrent.futures.ThreadPoolExecutor(3) as pool:
                futures = [pool.submit(teacher.submit, (x,), {}, ["1"], encodings=wish) for _ in range(3)]
                if cached:
                    futures = [future.result(20) for future in futures]  # they wait for a replica
                directory.publish(other, revision=revision_of(other))
                for future in futures:
                    found = future.result(20)
                    features = found if cached else found.result(20)
                    assert features.revision == revision_of(other)
                    torch.testing.assert_close(features["1"].dense(), new(x).detach(), rtol=1e-5, atol=1e-6)


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
