"""What the tests of faults share: when a fault comes, and that nothing leaks."""

import contextlib
from dataclasses import dataclass

import pytest
import schoolhouse as sh
from leaks import Held, settled
from memfd import memfds, soon
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


proxied = pytest.mark.parametrize("room", [{"proxied": True}], indirect=True, ids=["proxied"])
