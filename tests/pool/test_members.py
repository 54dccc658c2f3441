"""A replica as the keeper sees it, without a cluster: what of Ray's answers means that it has to be replaced."""

from types import SimpleNamespace

import pytest
from ray import exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorUnavailableError
from schoolhouse.errors import ConfigError
from schoolhouse_server.pool import replica_handle
from schoolhouse_server.pool.replica_handle import Member, ReplicaFailedError, why


@pytest.fixture
def unavailable(monkeypatch):
    """A replica that serves, and that Ray cannot reach: each question fails at once."""

    def get(_call):
        raise ActorUnavailableError("it cannot be reached", b"0" * 16)

    monkeypatch.setattr(replica_handle, "ray", SimpleNamespace(wait=lambda calls, **_: (calls, []), get=get))
    actor = SimpleNamespace(report=SimpleNamespace(remote=object))
    return Member("one", 1, actor, object(), object(), phase="serving", where=replica_handle.Where("node", "host", ""))


def test_a_replica_that_cannot_be_reached_is_asked_again(unavailable):
    before = unavailable.pending
    unavailable.poll()
    assert unavailable.pending is not before


def test_a_replica_that_cannot_be_reached_for_long_is_replaced(unavailable):
    unavailable.poll()
    unavailable.asked_at -= replica_handle._HUNG_S
    with pytest.raises(ReplicaFailedError, match="did not answer for 60 s"):
        unavailable.poll()


def died(**fields):
    """As Ray raises it where an actor is gone."""
    about = {"actor_id": b"0" * 16, "class_name": "TeacherActor", "pid": 7, "name": "teacher/net/0/a", **fields}
    return exceptions.ActorDiedError(ActorDiedErrorContext(**about))


def raised(error):
    """As Ray raises what an actor's method, or its constructor, raised."""
    stack = (
        f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n{type(error).__name__}: {error}\n'
    )
    return exceptions.RayTaskError("start", stack, error, actor_id="7")


PREEMPTED = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
NODE = "The actor died because its node has died. Node Id: 5\n\tthe actor's node was terminated: no heartbeats"
MEMORY = "1 worker(s) were killed due to the node running low on memory.\nMemory was 7 GB\nPID\tMEM\n7\t5.91"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (died(error_message="its worker process has died. Exit: EOF"), "its worker process has died. Exit: EOF"),
        (died(error_message=NODE), " ".join(NODE.split())),
        (died(error_message="gone", node_death_info=PREEMPTED), "its node was preempted: gone"),
        (
            died(error_message="", node_death_info=PREEMPTED),
            "its node was preempted: The actor died unexpectedly before finishing this task.",
        ),
        (exceptions.OutOfMemoryError(MEMORY), " ".join(MEMORY.split())),
        (exceptions.ActorDiedError(raised(ModuleNotFoundError("no x\nhere"))), "ModuleNotFoundError: no x here"),
        (raised(ConfigError("build: no x")), "build: no x"),
        (raised(ValueError("wrong\nweights")), "ValueError: wrong weights"),
        (exceptions.ActorUnschedulableError("no such node"), "The actor is not schedulable: no such node"),
        (exceptions.OutOfMemoryError("x" * 5000), "x" * 600),
    ],
)
def test_why_a_replica_is_gone(error, says):
    assert why(error) == says


@pytest.mark.parametrize("phase", ["starting", "serving"])
def test_one_that_is_killed_for_its_memory_has_failed_to_start_only_if_it_was_starting(unavailable, monkeypatch, phase):
    def get(_call):
        raise exceptions.OutOfMemoryError(MEMORY)

    monkeypatch.setattr(replica_handle.ray, "get", get)
    unavailable.phase = phase
    with pytest.raises(ReplicaFailedError, match="running low on memory") as caught:
        unavailable.poll()
    assert caught.value.starting == (phase == "starting")


def test_waiting_for_a_node_is_no_loading(unavailable, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(replica_handle.time, "monotonic", lambda: now[0])
    loading = Member("one", 1, unavailable.actor, object(), object(), load_timeout_s=10.0)
    replica_handle.ray.wait = lambda calls, **_: ([], calls)  # no answer
    for _ in range(100):
        loading.hears("waits for {GPU: 1}: no node has it free")
        assert not loading.seen().placed
        now[0] += 100.0
        loading.poll()
    loading.hears("")
    replica_handle.ray.wait = lambda calls, **_: (calls if calls == [loading.pending_where] else [], [])
    replica_handle.ray.get = lambda _call: replica_handle.Where("node", "host", "", since_s=4.0)
    loading.poll()
    now[0] += 5.0
    loading.poll()
    now[0] += 2.0
    with pytest.raises(ReplicaFailedError, match="not loaded within 10 s, its load_timeout_s"):
        loading.poll()
