"""Which replica a request goes to: by what is outstanding there and how far it is, and what that leaves alone."""

import collections
import random
import socket
import threading
import time

import pytest
import schoolhouse as sh
import torch
from directories import DRAINING, DirectoryServer, Scale, addresses, answer, ask, entry, replicas
from memfd import soon
from schoolhouse import errors
from schoolhouse.remote.directory import ELSEWHERE, SAME_HOST, SAME_ZONE, ReplicaSet, backoff_s, choose
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from traps import opened

# The choice, as a function.


def simulated(clients, servers, depth, seed, rounds=600):
    """Clients that hold `depth` requests each at servers that work on one at a time; returns what each one served."""
    rngs = [random.Random(100 * seed + i) for i in range(clients)]
    world = random.Random(seed + 1)
    queues = [collections.deque() for _ in range(servers)]
    own = [[0] * servers for _ in range(clients)]
    served = [0] * servers

    def send(client):
        others = [len(queue) - own[client][i] for i, queue in enumerate(queues)]
        server = choose([range(servers)], lambda i: own[client][i] + others[i], 1.0, rngs[client])
        queues[server].append(client)
        own[client][server] += 1

    for client in range(clients):
        for _ in range(depth):
            send(client)
    for _ in range(rounds):
        for server in world.sample(range(servers), servers):
            if queues[server]:
                client = queues[server].popleft()
                own[client][server] -= 1
                served[server] += 1
                send(client)
    return served


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("clients", "servers", "depth"), [(2, 3, 2), (2, 3, 4), (5, 4, 2), (1, 2, 4), (16, 3, 1)])
def test_two_choices_leave_no_replica_idle(clients, servers, depth, seed):
    served = simulated(clients, servers, depth, seed)
    assert min(served) > 0.85 * sum(served) / servers
    assert max(served) < 1.15 * sum(served) / servers


def test_a_choice_between_two_takes_the_lesser_one():
    costs = {"a": 3.0, "b": 2.0, "c": 1.0}
    taken = collections.Counter(choose([list(costs)], costs.get, 1.0, random.Random(seed)) for seed in range(600))
    assert taken["a"] == 0  # whichever the other one is, it is less busy
    assert 0.58 < taken["c"] / 600 < 0.75  # it is in two of the three pairs
    assert taken["b"] + taken["c"] == 600


@pytest.mark.parametrize(
    ("near", "far", "chosen"),
    [(0, 0, "near"), (2, 0, "near"), (2.1, 0, "far"), (8, 3, "near"), (8.1, 3, "far"), (5, 9, "near")],
)
def test_the_near_one_is_left_when_it_is_clearly_busier(near, far, chosen):
    costs = {"near": near, "far": far}
    assert choose([["near"], ["far"]], costs.get, 1.0, random.Random(0)) == chosen


def test_how_far_a_replica_is():
    here = socket.gethostname()
    said = [("", ""), (here, "a"), ("other", "a"), ("other", "b"), ("", "")]
    wire = directory_pb2.ReplicaSet(
        replicas=[directory_pb2.Replica(address=f"h:{i}", host=h, zone=z) for i, (h, z) in enumerate(said)]
    )

    def distances(zone):
        return [replica.distance for replica in ReplicaSet.from_wire(wire, "h:1", zone).replicas]

    assert distances("a") == [ELSEWHERE, SAME_HOST, SAME_ZONE, ELSEWHERE, ELSEWHERE]
    assert distances("") == [ELSEWHERE, SAME_HOST, ELSEWHERE, ELSEWHERE, ELSEWHERE]


def test_backoff_doubles_to_its_longest_with_full_jitter():
    waits = [[backoff_s(failures, random.Random(seed)) for seed in range(50)] for failures in range(1, 40)]
    for i, group in enumerate(waits):
        whole = min(0.1 * 2**i, 5.0)
        assert 0.02 <= min(group) < 0.02 + whole / 5
        assert whole * 0.8 < max(group) <= whole
    assert len({*waits[0]}) == 50


# With replicas.


def test_two_clients_use_three_replicas_and_leave_random_numbers_alone():
    states = random.getstate(), torch.get_rng_state()
    modules = [Scale(3) for _ in range(3)]
    with replicas(*modules) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as one, sh.connect(directory.url) as other:
            assert soon(
                lambda: answer(one) == answer(other) == 3 and all(len(t.open_sessions()) == 3 for t in (one, other))
            )
            before = [server.engines["teacher"].served for server in servers]
            futures = []
            for i in range(120):
                futures += [(i, ask(one, i)), (i, ask(other, i + 0.5))]
                if len(futures) >= 8:
                    value, future = futures.pop(0)
                    assert future.result(20)[""][0].item() in (3 * value, 3 * (value + 0.5))
            for _, future in futures:
                future.result(20)
            shares = [server.engines["teacher"].served - b for server, b in zip(servers, before, strict=True)]
            assert sum(shares) == 240
            assert min(shares) > 24
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_what_others_queue_is_told_with_each_reply():
    module = Scale()
    with replicas(module) as (server,), sh.connect(server.url) as one, sh.connect(server.url) as other:
        assert answer(one) == answer(other) == 1
        module.gate.clear()
        module.entered.clear()
        first = ask(one, 2)
        assert module.entered.wait(20)
        rest = [ask(other, 10 + i) for i in range(7)]
        assert soon(lambda: server.engines["teacher"].queued == 7)
        module.gate.set()
        first.result(20)
        assert one.open_sessions()[0].others_queued > 0  # those of the other one
        [future.result(20) for future in rest]
        assert other.open_sessions()[0].others_queued == 0


def test_the_replica_of_this_machine_is_preferred_until_it_is_busy():
    near, far = Scale(), Scale()
    with replicas(near, far) as (here, there), DirectoryServer() as directory:
        directory.publish(entry(here, host=socket.gethostname()), entry(there, host="elsewhere"))
        with sh.connect(directory.url) as teacher:
            for i in range(20):
                assert answer(teacher, i) == i
            assert there.engines["teacher"].served == 0
            near.gate.clear()
            futures = [ask(teacher, i) for i in range(10)]
            assert soon(lambda: len(teacher.open_sessions()) == 2)
            futures += [ask(teacher, i) for i in range(10, 20)]
            assert soon(lambda: there.engines["teacher"].served > 0)
            near.gate.set()
            assert [future.result(20)[""][0].item() for future in futures] == [*range(20)]


@pytest.mark.parametrize("hang", [True, False])
def test_a_dead_address_holds_nothing_up(hang):
    with replicas(Scale(2)) as (server,), DirectoryServer() as directory, socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        if hang:
            dead.listen(8)  # connections are made, and nobody answers
        address = f"127.0.0.1:{dead.getsockname()[1]}"
        directory.publish(directory_pb2.Replica(id="dead", address=address, revision=entry(server).revision), server)
        with sh.connect(directory.url, timeouts=sh.Timeouts(connect_s=60)) as teacher:
            for i in range(50):
                assert answer(teacher, i, timeout_s=20) == 2 * i  # far less than the connect timeout


# Replicas that stop.


def held_at(module, teacher):
    """Requests, some of which are at this module, whose gate is closed."""
    module.gate.clear()
    module.entered.clear()
    held = []
    while not module.entered.is_set() or len(held) < 8:
        held.append(ask(teacher, len(held)))
        time.sleep(0.02)
    return held


@pytest.fixture
def pair():
    """Two replicas, the client has requests in flight at both, and the gate of the first is closed."""
    modules = Scale(2), Scale(2)
    with replicas(*modules) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(teacher.open_sessions()) == 2)
            yield modules, servers, directory, teacher, held_at(modules[0], teacher)


def left(pair):
    """The rest: new requests go elsewhere, what was in flight is answered, and the session ends."""
    (module, _), (server, other), _, teacher, held = pair
    first = server.engines["teacher"]
    second = other.engines["teacher"]
    [session] = [session for session in teacher.open_sessions() if {session.address} == addresses(server)]
    assert soon(lambda: second.queued + second.running == 0 and first.queued + first.running == session.outstanding > 0)
    before, taken = second.served, first.queued + first.running
    assert [answer(teacher, i) for i in range(100, 120)] == [2 * i for i in range(100, 120)]
    assert second.served >= before + 20
    assert first.queued + first.running <= taken
    assert any(not future.done() for future in held)
    assert len(teacher.open_sessions()) == 2
    module.gate.set()
    assert [future.result(20)[""][0].item() for future in held] == [2 * i for i in range(len(held))]
    assert soon(lambda: len(teacher.open_sessions()) == 1)
    assert soon(lambda: server.load("teacher").sessions == 0)


def test_a_replica_that_the_directory_says_is_draining(pair):
    _, (server, other), directory, teacher, _ = pair
    directory.publish(entry(server, state=DRAINING), entry(other))
    assert soon(lambda: any(link.leaving for link in teacher._dispatcher._links))
    left(pair)


def test_a_replica_that_is_not_listed_any_more(pair):
    _, (_, other), directory, teacher, _ = pair
    directory.publish(other)
    assert soon(lambda: any(link.leaving for link in teacher._dispatcher._links))
    left(pair)


def test_a_replica_that_says_itself_that_it_is_draining(monkeypatch):
    started = opened(monkeypatch)
    modules = Scale(2), Scale(2)
    with replicas(*modules) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(teacher.open_sessions()) == 2)
            held = held_at(modules[0], teacher)
            engine = servers[0].engines["teacher"]
            [session] = [session for session in started if session._engine is engine]
            session.outbox.put(iter([teacher_pb2.ServerMessage(draining=teacher_pb2.Draining())]))
            assert soon(lambda: any(session.draining for session in teacher.open_sessions()))
            left((modules, servers, directory, teacher, held))


def test_requests_that_wait_at_a_replica_that_drains_go_elsewhere():
    modules = Scale(2), Scale(2)
    with replicas(*modules) as servers, DirectoryServer() as directory:
        for module in modules:
            module.gate.clear()
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            futures = [ask(teacher, i) for i in range(20)]
            assert soon(lambda: len(teacher.open_sessions()) == 2)
            futures += [ask(teacher, i) for i in range(20, 200)]  # more than the replicas take at once
            assert soon(lambda: all(session.outstanding > 70 for session in teacher.open_sessions()))
            directory.publish(servers[1])
            modules[1].gate.set()
            assert soon(lambda: sum(future.done() for future in futures) >= 200 - 64)
            modules[0].gate.set()
            assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(200)]


def test_a_replica_that_closes_loses_no_request():
    modules = Scale(2), Scale(2)
    with replicas(*modules) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(teacher.open_sessions()) == 2)
            modules[0].gate.clear()
            futures = [ask(teacher, i) for i in range(100)]
            assert modules[0].entered.wait(20)
            closing = threading.Thread(target=servers[0].close)
            closing.start()
            time.sleep(0.2)
            modules[0].gate.set()
            assert [future.result(20)[""][0].item() for future in futures] == [2 * i for i in range(100)]
            closing.join(20)


def test_a_replica_that_comes_back_is_used_again():
    with replicas(Scale(2), Scale(2)) as servers, DirectoryServer() as directory:
        directory.publish(*servers)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(teacher.open_sessions()) == 2)
            directory.publish(servers[0])
            assert soon(lambda: answer(teacher) == 2 and len(teacher.open_sessions()) == 1)
            directory.publish(*servers)
            assert soon(lambda: answer(teacher) == 2 and len(teacher.open_sessions()) == 2)


@pytest.mark.parametrize("settings", [{"zone": None}, {"revision": 1}, {"follow_revisions": 1}])
def test_wrong_settings(settings):
    with pytest.raises(errors.ConfigError, match=next(iter(settings))):
        sh.connect("grpc://127.0.0.1:1/x", **settings)
    with pytest.raises(errors.ConfigError, match="one of the two"):
        sh.connect("grpc://127.0.0.1:1/x", revision="r", follow_revisions=True)
