"""Memory stays flat however many requests are served, replicas that are killed meanwhile included."""

import pytest
import schoolhouse as sh
import torch
from leaks import rss_mib
from rooms import WIDTH, teacher_model

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums to less than 1")
TAPS = ["body", "fc"]
GROWTH_MIB = 16.0  # the allocators' own; features of 128 KiB that are kept by each tenth request would take more


@pytest.mark.parametrize(
    ("requests", "every"),
    [(1000, 250), pytest.param(10_000, 1000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])],
)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_memory_is_flat(room, requests, every, shared_memory):
    expected = teacher_model().body(torch.ones(64, 8)).relu()  # in place, as the forward goes on
    with sh.connect(room.url, transport=sh.Transport(shared_memory=shared_memory)) as teacher:
        ask(teacher, 300, expected)
        kept = room.replicas[1].pid
        before = rss_mib(), rss_mib(kept)
        for _ in range(requests // every):
            room.replicas[0].process.kill()  # with what is in flight there
            room.replace(0)
            room.replicas.insert(0, room.replicas.pop())
            ask(teacher, every, expected)
        assert teacher.traffic().requests == 300 + requests
        grown = rss_mib() - before[0], rss_mib(kept) - before[1]
    assert max(grown) < GROWTH_MIB, grown


def ask(teacher, count, expected):
    """So many requests, a few at a time."""
    futures = []
    for i in range(count):
        futures.append(teacher.submit((torch.ones(64, 8),), {}, TAPS))
        if len(futures) == 8 or i == count - 1:
            found = [future.result(60)["body"] for future in futures]
            assert all(torch.equal(features, expected) for features in found)
            assert found[0].shape == (64, WIDTH)
            futures.clear()
