"""Requests that are sent again are a bounded part of all; what is beyond that waits, and says so."""

from unittest import mock

import pytest
import schoolhouse as sh
from directories import (
    DirectoryServer,
    Scale,
    answer,
    ask,
    elsewhere,
    replicas,
    sessions,
)
from memfd import soon
from schoolhouse.remote import pending
from schoolhouse.remote.budget import RetryBudget
from schoolhouse_wire.v1 import directory_pb2


def test_the_budget_is_a_part_of_what_is_asked():
    budget = RetryBudget(0.0)
    burst = sum(budget.take(0.0) for _ in range(1000))
    assert burst == 256
    assert budget.next_at == pytest.approx(0.1)
    assert sum(budget.take(1.0) for _ in range(1000)) == 10
    for _ in range(51):
        budget.made()
    assert sum(budget.take(1.0) for _ in range(1000)) == 10


def test_what_is_beyond_the_budget_waits_and_is_not_lost():
    with elsewhere(2) as (process, address, revision, _), replicas(Scale(2)) as (good,), DirectoryServer() as directory:
        directory.publish(directory_pb2.Replica(id="a", address=address, revision=revision), good)
        with sh.connect(directory.url) as teacher:
            assert soon(lambda: answer(teacher) == 2 and len(sessions(teacher)) == 2)
            futures = [ask(teacher, i) for i in range(100)]
            teacher._dispatcher._budget._tokens = 0.0
            process.kill()
            assert [future.result(60)[""][0].item() for future in futures] == [2 * i for i in range(100)]


def test_what_is_held_back_says_so(caplog):
    held_back = "replicas of the teacher 'net' lost more requests than may be sent again at once, so some are held back"
    kept = pending.Parking("net", 5.0, lambda: "tried: everything")
    kept.put(mock.Mock(), 10.0)
    assert kept.say(11.0) == 12.0
    assert not caplog.records
    assert [kept.say(now) for now in (12.0, 13.0, 41.0)] == [42.0] * 3
    [said] = [record.getMessage() for record in caplog.records]
    assert said == f"{held_back} for 2 s; 1 requests wait, for up to 5 s each (teacher_s); tried: everything"
    assert f"{held_back} for 5 s (teacher_s); tried: everything" in str(kept.over())
    kept.no_replica(0.0)
    assert "no replica of the teacher 'net' can be asked for 5 s (teacher_s)" in str(kept.over())
