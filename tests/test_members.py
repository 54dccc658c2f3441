"""A replica as the keeper sees it, without a cluster: what of Ray's answers means that it has to be replaced."""

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError
from schoolhouse_server import members
from schoolhouse_server.members import Member, ReplicaFailedError


@pytest.fixture
def unavailable(monkeypatch):
    """A replica that serves, and that Ray cannot reach: each question fails at once."""

    def get(_call):
        raise ActorUnavailableError("it cannot be reached", b"0" * 16)

    monkeypatch.setattr(members, "ray", SimpleNamespace(wait=lambda calls, **_: (calls, []), get=get))
    actor = SimpleNamespace(report=SimpleNamespace(remote=object))
    return Member("one", 1, actor, object(), object(), phase="serving", where=members.Where("node", "host", ""))


def test_a_replica_that_cannot_be_reached_is_asked_again(unavailable):
    before = unavailable.pending
    unavailable.poll()
    assert unavailable.pending is not before


def test_a_replica_that_cannot_be_reached_for_long_is_replaced(unavailable):
    unavailable.poll()
    unavailable.asked_at -= members._HUNG_S
    with pytest.raises(ReplicaFailedError, match="did not answer for too long"):
        unavailable.poll()
