"""The outbox: messages of many requests in turn, what is copied elsewhere, and its end."""

import asyncio
import threading

import pytest
from memfd import soon
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.outbox import Elsewhere, Outbox


@pytest.fixture
def loop():
    made = Loop("test-outbox").start()
    yield made
    made.stop()


def taken(loop, outbox, count):
    """So many messages, or fewer if it ends before."""

    async def take():
        found = []
        while len(found) < count and (message := await outbox.next()) is not None:
            found.append(message)
        return found

    return loop.run(take()).result(20)


def test_each_request_has_its_turn(loop):
    outbox = Outbox(loop)
    for one in ("abc", "xy", "1"):
        outbox.put(iter(one))
    assert taken(loop, outbox, 6) == ["a", "x", "1", "b", "y", "c"]


def test_who_waits_gets_what_another_thread_puts(loop):
    outbox = Outbox(loop)
    waiting = loop.run(outbox.next())
    outbox.put(iter(["late"]))
    assert waiting.result(20) == "late"


def test_while_one_copies_elsewhere_the_others_go_on(loop):
    outbox, go = Outbox(loop), threading.Event()

    def slow():
        yield Elsewhere(lambda: go.wait(20))
        yield "slow"

    outbox.put(slow())
    outbox.put(iter("ab"))
    assert taken(loop, outbox, 2) == ["a", "b"]
    go.set()
    assert taken(loop, outbox, 1) == ["slow"]


def test_an_error_elsewhere_is_raised_in_its_source_alone(loop):
    outbox, raised = Outbox(loop), []

    def failing(last):
        try:
            yield Elsewhere(lambda: 1 // 0)
        except ZeroDivisionError:
            raised.append(last)
            if last:
                yield "failed"

    outbox.put(failing(last=True))
    outbox.put(failing(last=False))
    outbox.put(iter("a"))
    assert taken(loop, outbox, 2) == ["a", "failed"]
    waiting = loop.run(outbox.next())
    assert soon(lambda: raised == [True, False])
    outbox.close()
    assert waiting.result(20) is None


def test_its_end_is_seen_by_who_waits(loop):
    outbox = Outbox(loop)
    waiting = loop.run(outbox.next())
    outbox.close()
    assert waiting.result(20) is None
    outbox.put(iter("late"))
    assert taken(loop, outbox, 1) == []


def test_a_source_may_close_it_as_it_ends(loop):
    outbox = Outbox(loop)

    def last():
        yield "last"
        outbox.close()

    outbox.put(last())
    assert taken(loop, outbox, 2) == ["last"]


def test_who_takes_by_itself_is_told_when(loop):
    outbox, told = Outbox(loop), threading.Semaphore(0)
    loop.ask(outbox.when_ready, told.release)
    assert told.acquire(timeout=20)
    outbox.put(iter("a"))
    assert told.acquire(timeout=20)
    assert loop.ask(outbox.take) == "a"
    assert loop.ask(outbox.take) is None


def test_what_was_not_sent_is_let_go(loop):
    outbox, ended = Outbox(loop), []

    def source():
        try:
            yield 1
            yield 2
        finally:
            ended.append(True)

    outbox.put(source())
    assert taken(loop, outbox, 1) == [1]
    outbox.close()

    async def clear():
        outbox.clear()
        await asyncio.sleep(0)

    loop.run(clear()).result(20)
    assert ended == [True]
