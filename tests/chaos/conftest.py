"""What the tests of faults share: how many faults a test injects, a room of replicas, and that nothing leaks."""

import contextlib
from dataclasses import dataclass

import pytest
import schoolhouse as sh
import torch
from leaks import Held, settled
from memfd import memfds, soon
from rooms import Room
from schoolhouse_server import serve
from students import train

EVERY = 20  # steps from one fault to the next


@dataclass(frozen=True)
class Rounds:
    """How often a fault comes, and in how many steps."""

    count: int

    @property
    def steps(self):
        return EVERY * (self.count + 1)

    def of(self, step):
        """Which round begins with this step, or None; the first steps have none."""
        return step // EVERY - 1 if step % EVERY == 0 and step else None


@pytest.fixture(params=[1, pytest.param(50, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])])
def rounds(request):
    return Rounds(request.param)


@pytest.fixture(scope="session")
def used_once():
    """What is made once in a process, such as gRPC's own threads, is there."""
    with serve(torch.nn.Identity()) as server, sh.connect(server.url) as teacher:
        teacher.submit((torch.ones(1),), {}, [""]).result(20)


def ask_each(room):
    """Have every replica have served somebody; returns what each holds without a client."""
    for replica in room.replicas:
        with sh.connect(f"grpc://127.0.0.1:{replica.port}/teacher") as teacher:
            train(teacher, 2)
    assert soon(lambda: all(memfds(replica.pid) == (0, 0) for replica in room.replicas))
    return {replica.pid: Held.now(replica.pid) for replica in room.replicas}


@contextlib.contextmanager
def nothing_leaks(room):
    """Neither here, nor in the replicas that are still there at the end, is anything held that was not before."""
    replicas, here = ask_each(room), Held.now()
    yield
    room.go_on()
    assert settled(here) == {}
    left = replicas.keys() & {replica.pid for replica in room.replicas}
    assert [leaked for pid in left if (leaked := settled(replicas[pid], pid))] == []


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:kd_loss_weight sums to less than 1"))


@pytest.fixture
def room(used_once, request):
    """Two replicas; nothing leaks."""
    with Room(**getattr(request, "param", {})) as found, nothing_leaks(found):
        yield found


proxied = pytest.mark.parametrize("room", [{"proxied": True}], indirect=True, ids=["proxied"])
