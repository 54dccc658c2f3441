"""The event loop: calls and alarms from any thread, tasks whose failures are told, and its end."""

import asyncio
import os
import threading
import time

import pytest
from memfd import soon
from schoolhouse_wire.loop import Loop, eager
from traps import Trap, each_error


@pytest.fixture
def loop():
    made = Loop("test-loop").start()
    yield made
    made.stop()
    assert not made._thread.is_alive()


def test_it_rings_in_order_and_not_what_was_cancelled(loop):
    rung, go, now = [], threading.Event(), time.monotonic()
    loop.call(go.wait)  # nothing is due before all is said
    alarms = [loop.at(now + 0.01 * i, lambda i=i: rung.append(i)) for i in (3, 1, 2, 4)]
    loop.cancel(alarms[2])
    loop.cancel(alarms[2])
    go.set()
    assert soon(lambda: rung == [1, 3, 4])


def test_cancelled_alarms_are_not_kept(loop):
    def many():
        for _ in range(20_000):
            loop.cancel(loop.at(time.monotonic() + 1000, lambda: None))
        return len(loop.asyncio._scheduled)

    assert loop.ask(many) < 20_001
    loop.ask(lambda: None)
    assert soon(lambda: loop.ask(lambda: len(loop.asyncio._scheduled)) < 3000)


@pytest.mark.parametrize("far", [1e12, 1e300, float("inf")])
def test_a_deadline_that_is_far_away_ends_nothing(loop, far):
    rung = threading.Event()
    loop.cancel(loop.at(far, lambda: None))
    loop.at(far, lambda: None)
    loop.at(time.monotonic() + 0.1, rung.set)
    assert rung.wait(20)


@each_error
def test_it_outlives_what_it_calls(loop, error, deaths):
    rung = threading.Semaphore(0)
    for _ in range(3):
        loop.call(Trap.raising(error))
        loop.at(0.0, Trap.raising(error))
    loop.call(rung.release)
    loop.at(time.monotonic(), rung.release)
    for _ in range(2):
        assert rung.acquire(timeout=20)
    deaths.clear()


@each_error
def test_who_waits_for_a_task_that_fails_is_told(loop, error, deaths):
    told = []

    async def fail():
        raise error

    loop.call(lambda: loop.task(fail(), name="a task", on_death=told.append))
    assert soon(lambda: [type(one) for one in told] == [error])
    deaths.clear()


def test_many_calls_of_another_thread_wake_it_once(loop, monkeypatch):
    woken, held, made = [], threading.Event(), threading.Semaphore(0)
    wake = loop.asyncio.call_soon_threadsafe
    monkeypatch.setattr(loop.asyncio, "call_soon_threadsafe", lambda *args: (woken.append(args), wake(*args)))
    loop.call(held.wait)
    assert soon(lambda: not loop._waking)
    for _ in range(100):
        loop.call(made.release)
    held.set()
    for _ in range(100):
        assert made.acquire(timeout=20)
    assert len(woken) <= 2


def test_what_is_called_again_and_again_keeps_nothing_else_out(loop):
    again, made = [True], threading.Event()

    def once_more():
        if again:
            loop.call(once_more)

    loop.call(once_more)
    loop.at(time.monotonic(), made.set)
    assert made.wait(20)
    again.clear()


def test_calls_that_come_before_it_starts_are_made():
    loop, made = Loop("test-late"), threading.Event()
    loop.call(made.set)
    loop.start()
    assert made.wait(20)
    loop.stop()


def test_without_a_thread_the_next_start_tries_again(monkeypatch):
    loop = Loop("test-start")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Trap.raising(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            loop.start()
    assert loop.ask(lambda: 3) == 3
    loop.stop()


def test_what_is_done_elsewhere_holds_up_nobody(loop):
    go = threading.Event()
    waiting = loop.run(loop.elsewhere(go.wait, 20))
    assert loop.ask(lambda: 3) == 3
    go.set()
    assert waiting.result(20)
    with pytest.raises(ZeroDivisionError):
        loop.run(loop.elsewhere(lambda: 1 // 0)).result(20)


def test_what_is_run_eagerly_waits_only_where_it_must(loop):
    seen, go = [], threading.Event()

    async def work(waits):
        seen.append("begun")
        if waits:
            seen.append(await loop.elsewhere(go.wait, 20))
            with pytest.raises(ZeroDivisionError):
                await loop.elsewhere(lambda: 1 // 0)
            await asyncio.sleep(0)
        seen.append("ended")

    assert eager(work(False)) is None
    assert seen == ["begun", "ended"]

    async def later():
        rest = eager(work(True))
        assert seen == ["begun", "ended", "begun"]
        go.set()
        await rest

    loop.run(later()).result(20)
    assert seen[2:] == ["begun", True, "ended"]
    with pytest.raises(ZeroDivisionError):
        eager(_raises())


async def _raises():
    raise ZeroDivisionError


def test_what_is_run_eagerly_can_be_cancelled(loop):
    begun, seen = threading.Event(), []

    async def work():
        try:
            begun.set()
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def later():
        await eager(work())

    running = loop.run(later())
    assert begun.wait(20)
    running.cancel()
    assert soon(lambda: seen == ["cancelled"])


def test_its_end_cancels_tasks_and_refuses_more():
    loop, begun, ended = Loop("test-end").start(), threading.Event(), []

    async def wait():
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(True)

    loop.call(lambda: loop.task(wait(), name="a task", on_death=ended.append))
    assert begun.wait(20)
    loop.stop()
    loop.stop()
    assert ended == [True]
    loop.call(ended.append, "never")
    with pytest.raises(RuntimeError, match="stopped"):
        loop.ask(lambda: 3)
    assert ended == [True]


def test_only_events_that_grpc_hears_of_too_late_are_not_logged(loop, caplog):
    """The name is that of gRPC's callback, which reads from a socket that another thread may have closed."""
    socket = os.open(os.devnull, os.O_RDONLY)
    os.close(socket)

    def _handle_events():
        os.read(socket, 1)

    def another():
        os.read(socket, 1)

    for callback in (_handle_events, another):
        loop.call(loop.asyncio.call_soon, callback)
    assert soon(lambda: "another" in caplog.text)
    assert len(caplog.records) == 1
