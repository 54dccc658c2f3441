"""Many clients of many replicas: each keeps to a few, evenly, goes beyond them only if it must, and comes back."""

import collections
import contextlib
import dataclasses
import random
import socket
import statistics
import time

import pytest
import schoolhouse as sh
from directories import DirectoryServer, Scale, addresses, answer, ask, entry, replicas, sessions
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote.directory import ELSEWHERE, SAME_HOST, SAME_ZONE, Replica
from schoolhouse.remote.subset import Subset
from schoolhouse_wire.v1 import directory_pb2

CLIENTS, REPLICAS, MOST = 512, 16, 4


@dataclasses.dataclass(eq=False)
class Link:
    """As much of one as a subset looks at."""

    replica: Replica
    opened: bool = True
    failures: int = 0
    requests: int = 0
    opening_s: float = 0.0

    def opening_for(self, now):
        return self.opening_s


def links(count=REPLICAS, **said):
    return [Link(Replica(f"10.0.0.{i}:7070", id=f"replica-{i}", **said)) for i in range(count)]


def clients(seed, count=CLIENTS, most=MOST):
    rng = random.Random(seed)
    made = [Subset(most, random.Random(rng.random())) for _ in range(count)]
    for one in made:
        one._identity = rng.getrandbits(64)
    return made


def names(kept):
    return {link.replica.id for link in kept}


def chosen(subsets, there):
    return [names(one.of(there, 0.0)) for one in subsets]


@pytest.mark.parametrize("seed", range(5))
def test_clients_spread_evenly(seed):
    """A replica's clients are a binomial number: of 512, each with 4 of 16, 128 with a deviation of 9.8."""
    found = chosen(clients(seed), links())
    assert {len(one) for one in found} == {MOST}
    counts = collections.Counter(name for one in found for name in one)
    assert len(counts) == REPLICAS
    mean, deviation = CLIENTS * MOST / REPLICAS, (CLIENTS * 4 / 16 * 12 / 16) ** 0.5
    assert all(abs(count - mean) < 5 * deviation for count in counts.values()), counts
    assert 0.4 * deviation < statistics.pstdev(counts.values()) < 2 * deviation
    pairs = collections.Counter(pair for one in found for pair in [(a, b) for a in one for b in one if a < b])
    assert len(pairs) == REPLICAS * (REPLICAS - 1) / 2  # whichever two are gone, others share their clients


def test_a_replica_that_goes_moves_only_its_own_clients_and_one_that_comes_gets_its_share():
    subsets, there = clients(7), links(REPLICAS + 1)
    more, fewer = chosen(subsets, there), chosen(subsets, there[:-1])
    moved = 0
    for before, after in zip(more, fewer, strict=True):
        if f"replica-{REPLICAS}" in before:
            assert len(before - after) == 1
            assert len(after) == MOST
            moved += 1
        else:
            assert before == after
    expected = CLIENTS * MOST / (REPLICAS + 1)  # 120, with a deviation of 9.6
    assert abs(moved - expected) < 50


def test_near_replicas_come_first():
    there = [*links(2, distance=SAME_HOST), *links(8, distance=SAME_ZONE)[2:], *links(16, distance=ELSEWHERE)[8:]]
    for found in chosen(clients(1, 50), there):
        assert {"replica-0", "replica-1"} < found
        assert len(found & {f"replica-{i}" for i in range(2, 8)}) == 2


def test_no_more_replicas_than_there_are_and_all_if_that_is_asked_for():
    assert {len(one) for one in chosen(clients(1, 9), links(3))} == {3}
    assert {len(one) for one in chosen(clients(1, 9, most=None), links())} == {REPLICAS}


@pytest.mark.parametrize("trouble", [{"failures": 2}, {"opening_s": 30.0}])
def test_a_replica_that_fails_is_not_counted_until_it_is_open(trouble):
    [one], there = clients(3, 1), links()
    before = one.of(there, 0.0)
    sick = before[1]
    vars(sick).update(opened=False, **trouble)
    during = one.of(there, 0.0)
    assert set(before) < set(during)
    assert len(during) == MOST + 1
    sick.opened = True
    assert one.of(there, 0.0) == before


def told(there, loads):
    """The links, with what the directory says of the loads now."""
    for link, load in zip(there, loads, strict=True):
        link.replica = dataclasses.replace(link.replica, queued=round(load))


def test_clients_of_busy_replicas_exchange_some_and_not_all_at_once():
    """Half of the replicas have work of their own. The load of one is that, and 1 for each client that uses it."""
    subsets, there = clients(11), links()
    own = [400.0 if i < 8 else 0.0 for i in range(REPLICAS)]

    def loads():
        found = [*own]
        for one in chosen_now():
            least = min(one, key=lambda i: own[i])  # where its requests go, by the choice of two
            found[least] += 1
        return found

    def chosen_now():
        return [[int(link.replica.id.removeprefix("replica-")) for link in one.of(there, now)] for one in subsets]

    now, moves = 0.0, []
    before = sum(all(own[i] for i in one) for one in chosen_now())
    assert 0.015 * CLIENTS < before < 0.08 * CLIENTS  # those that have only busy ones: 8*7*6*5 of 16*15*14*13, 3.8 %
    for _ in range(60):
        told(there, loads())
        moves.append(sum(one.exchange(there, now) for one in subsets))
        now += 5.0
    assert sum(all(own[i] for i in one) for one in chosen_now()) == 0
    assert sum(moves[:2]) == 0  # it must last
    assert max(moves) <= 0.5 * before + 2  # and then not all at once
    assert sum(moves[30:]) == 0  # it comes to rest
    assert sum(moves) < 2 * before
    now += 3600.0
    assert chosen_now() == [[int(n.removeprefix("replica-")) for n in names] for names in ordered(subsets, there, now)]


def ordered(subsets, there, now):
    """What clients keep to that have exchanged nothing."""
    plain = []
    for one in subsets:
        fresh = Subset(MOST, random.Random(0))
        fresh._identity = one._identity
        plain.append([link.replica.id for link in fresh.of(there, now)])
    return plain


def test_a_client_does_not_flee_from_its_own_requests():
    [one], there = clients(5, 1), links()
    for link in one.of(there, 0.0):
        link.requests = 50
        link.replica = dataclasses.replace(link.replica, queued=50)
    assert not any(one.exchange(there, 5.0 * i) for i in range(100))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "4"])
def test_a_wrong_number_of_replicas_is_refused(wrong):
    with pytest.raises(errors.ConfigError, match="max_replicas is .*; it must be None, or a whole number from 1"):
        sh.Sharing(max_replicas=wrong)


# With replicas.


def test_a_client_keeps_to_its_replicas_leaves_one_that_is_gone_and_comes_back(monkeypatch, kept_port):
    monkeypatch.setattr("schoolhouse.remote.replica_pool._LEFT_OVER_S", 0.2)
    modules = [Scale(2) for _ in range(5)]
    timeouts = sh.Timeouts(request_s=30, attempt_s=0.4)  # by which it also looks after its sessions
    with replicas(*modules) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url, sharing=sh.Sharing(max_replicas=2), timeouts=timeouts) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
            own = sessions(teacher)
            for _ in range(10):
                futures = [ask(teacher, i) for i in range(20)]
                assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(20)]
                assert sessions(teacher) == own
            [gone, *_] = [server for server in servers if addresses(server) < own]
            directory.publish(*(server for server in servers if server is not gone))
            assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2 and sessions(teacher) != own)
            assert len(sessions(teacher) & own) == 1
            directory.publish(*servers)
            assert soon(lambda: answer(teacher) == 2 and sessions(teacher) == own)


def test_features_come_from_the_right_revision_and_from_beyond_the_few_if_it_is_only_there(monkeypatch):
    old, new = [Scale(2) for _ in range(3)], [Scale(3) for _ in range(3)]
    with replicas(*old, *new) as servers, DirectoryServer() as directory:
        few = sh.Sharing(max_replicas=1)
        directory.publish(*servers, revision=entry(servers[0]).revision)
        with sh.connect(directory.url, sharing=few) as one:
            directory.publish(*servers, revision=entry(servers[-1]).revision)
            with sh.connect(directory.url, sharing=few) as other:
                assert soon(lambda: answer(one) == 2 and answer(other) == 3)
                for i in range(30):
                    assert (answer(one, i), answer(other, i)) == (2 * i, 3 * i)
                assert [len(sessions(teacher)) for teacher in (one, other)] == [1, 1]
                assert sessions(one) < addresses(*servers[:3])
                directory.publish(*servers[1:], revision=entry(servers[-1]).revision)
                assert soon(lambda: answer(one, 4) == 8 and sessions(one) <= addresses(*servers[1:3]))


def test_where_those_that_are_kept_to_hang_another_one_is_asked_soon():
    with contextlib.ExitStack() as stack, replicas(Scale(2)) as (server,), DirectoryServer() as directory:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(6)]  # they never answer
        hanging = [f"127.0.0.1:{one.getsockname()[1]}" for one in silent]
        revision = entry(server).revision
        listed = [directory_pb2.Replica(id=address, address=address, revision=revision) for address in hanging]
        directory.publish(server, *listed)
        few, patient = sh.Sharing(max_replicas=1), sh.Timeouts(connect_s=120, request_s=100)
        with sh.connect(directory.url, sharing=few, timeouts=patient) as teacher:
            began = time.monotonic()
            assert answer(teacher, timeout_s=100) == 2
            assert time.monotonic() - began < 40  # 2 s for each that hangs
