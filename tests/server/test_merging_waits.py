"""How long a free device waits for more requests: not at all when alone, and no longer than it is worth."""

import threading
from types import SimpleNamespace

import pytest
from schoolhouse_server.engine.fair_queue import FairQueue
from schoolhouse_server.merge import merging
from schoolhouse_server.merge.merging import Waiting


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still, for who merges alone: threads of earlier tests go on."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(merging, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def job(source, deadline=float("inf")):
    return SimpleNamespace(source=source, deadline=deadline)


def waits(waiting, taken):
    pause_s = waiting.pause_s(taken)
    waiting.ended(taken)
    return pause_s


def test_one_session_alone_never_waits(clock):
    waiting = Waiting(0.002, lambda: 0.010)
    for _ in range(3):
        waiting.seen("a")
        assert waits(waiting, [job("a")]) == 0
    waiting.seen("b")
    assert waits(waiting, [job("a")]) == pytest.approx(0.002)
    clock.s += 0.2  # b has not been heard of for long
    waiting.seen("a")
    assert waits(waiting, [job("a")]) == 0


def test_the_wait_ends_with_the_last_session_and_is_bounded_by_a_forward_and_the_deadline(clock):
    waiting = Waiting(0.1, lambda: 0.010)
    for source in "abc":
        waiting.seen(source)
    assert waits(waiting, [job(source) for source in "abc"]) == 0
    taken = [job("a")]
    assert waiting.pause_s(taken) == pytest.approx(0.005)  # half a forward
    clock.s += 0.002
    taken.append(job("b"))
    assert waiting.pause_s(taken) == pytest.approx(0.003)
    taken.append(job("c"))
    assert waiting.pause_s(taken) == 0
    waiting.ended(taken)
    assert waits(waiting, [job("a", clock.s + 0.012)]) == pytest.approx(0.002)  # so that the forward is in time
    assert waits(waiting, [job("a", clock.s + 0.001)]) == 0
    assert waits(Waiting(0.1, lambda: 0.0), [job("a")]) == 0  # nothing is known of forwards yet


def test_one_that_comes_during_the_wait_shortens_it_to_its_own_deadline(clock):
    waiting = Waiting(1.0, lambda: 0.4)
    for source in "abc":
        waiting.seen(source)
    taken = [job("a")]
    assert waiting.pause_s(taken) == pytest.approx(0.2)
    taken.append(job("b", clock.s + 0.45))
    assert waiting.pause_s(taken) == pytest.approx(0.05)
    taken[1].deadline = clock.s + 0.1
    assert waiting.pause_s(taken) == 0


def test_waiting_that_gains_nothing_backs_off_and_is_tried_now_and_then(clock):
    waiting = Waiting(0.008, lambda: 1.0)
    waits_s = []
    for _ in range(40):
        waiting.seen("a"), waiting.seen("b")
        waits_s.append(waits(waiting, [job("a")]))
    assert waits_s[:5] == pytest.approx([0.008, 0.004, 0.002, 0.001, 0.0])
    assert sum(s > 0 for s in waits_s) == 5
    for _ in range(200):  # it is worth it again
        waiting.seen("a"), waiting.seen("b")
        taken = [job("a")]
        if waiting.pause_s(taken):
            taken.append(job("b"))
        waiting.ended(taken)
    waiting.seen("a"), waiting.seen("b")
    assert waits(waiting, [job("a")]) == pytest.approx(0.008)


def waiting_one(name):
    return SimpleNamespace(name=name, payer=name[0], weight=1.0, cost=1.0, queued_at=0.0, twins=[])


def names(taken):
    return [request.name for request in taken]


def test_a_queue_lingers_while_nothing_else_waits():
    queue = FairQueue(10)
    queue.put(waiting_one("a1"))
    threads = []

    def meanwhile(work, *args):
        """Lingers, while another thread does that as soon as it can: it waits for the queue's lock."""
        threads.append(threading.Thread(target=work, args=args))
        threads[-1].start()
        return 60.0

    def is_of_its_job(taken, other):
        return other.payer == taken[0].payer

    taken = queue.take(is_of_its_job, lambda taken: 0.0 if len(taken) > 1 else meanwhile(queue.put, waiting_one("a2")))
    assert names(taken) == ["a1", "a2"]
    queue.put(waiting_one("a1")), queue.put(waiting_one("b1"))
    taken = queue.take(is_of_its_job, lambda _taken: pytest.fail("a1 has waited long enough"))
    assert names(taken) == ["b1"]
    assert names(queue.take(lambda *_: False, lambda _taken: meanwhile(queue.close))) == ["a1"]
    assert queue.take(lambda *_: False, lambda _taken: 60.0) == []
    [thread.join() for thread in threads]
