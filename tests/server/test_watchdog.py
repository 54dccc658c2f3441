"""A replica that is at its end, by a forward that never returns or a device that broke: it says so, and is replaced."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import schoolhouse as sh
import torch
from directories import DirectoryServer
from memfd import soon
from merging import Asked, at_once, engine_of, pair, randn, submit
from models import Net
from schoolhouse import errors
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse_server import serve
from schoolhouse_server.cli import probe
from schoolhouse_server.device import watchdog
from schoolhouse_server.device.watchdog import Pulse, Watchdog
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.pool.config import TeacherSpec
from schoolhouse_wire import framing
from schoolhouse_wire.encodings import Hidden, encoding_to_wire
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub
from test_draining import listed
from torch import nn

UNAVAILABLE = teacher_pb2.Failure.UNAVAILABLE


class Hanging(nn.Module):
    """Does not return from an input of ones until told."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def forward(self, x):
        if x[0] == 1:
            assert self.go.wait(60)
        return x + 1


def ask(client, request_id, x):
    messages = framing.Outgoing(Arguments([x]), limits=Limits(), snapshot=True)
    [message] = messages.messages(request_id, lambda payload: payload, None, lambda: True)
    client.ask(request_id, message, messages.header)


def test_a_forward_that_never_returns_ends_the_replica_and_nobody_waits():
    module = Hanging()
    with serve({"teacher": module, "other": Net()}, forward_timeout_s=0.6) as server:
        server.engines["other"]._watchdog.end()  # else a machine that stands still for so long ends it, too
        address = f"127.0.0.1:{server.port}"
        assert probe.serves(address, timeout_s=20)
        client = Stub(server, shared_memory=False)
        ask(client, 1, torch.ones(2))
        ask(client, 2, torch.zeros(2))  # waits behind it
        told, failures = False, {}
        while not told or len(failures) < 2:
            message = next(client.answers)
            told |= message.WhichOneof("kind") == "draining"
            if message.HasField("failure"):
                failures[message.failure.request_id] = message.failure
        assert {failure.code for failure in failures.values()} == {UNAVAILABLE}
        assert "not returned for 0.6 s" in failures[1].message
        assert [failures[i].broke for i in (1, 2)] == [True, False]  # the one that ran
        ask(client, 3, torch.zeros(2))
        failure = next(a for a in client.answers if a.HasField("failure")).failure
        assert (failure.request_id, failure.code) == (3, UNAVAILABLE)
        assert not probe.serves(address)
        assert listed_state(server, "teacher") == directory_pb2.Replica.DRAINING
        assert server.trouble.stage == "stuck"
        with pytest.raises(errors.TeacherUnavailableError, match="has not returned"):
            server._context.find("teacher")
        with sh.connect(server.urls["other"]) as other:  # it goes on
            assert other.submit((torch.ones(1, 8),), {}, [""]).result(20)[""].shape == (1, 5)
        engine = server.engines["teacher"]
        assert (engine.running, engine.queued) == (0, 0)
        served = engine.served
        module.go.set()
        assert soon(lambda: not engine._threads[0].is_alive())  # and what it made goes nowhere
        assert (engine.running, engine.served) == (0, served)
        client.channel.close()


def listed_state(server, name):
    if len(server.engines) == 1:
        return listed(server).state
    return next(one for one in server._directory.sets() if one.teacher == name).replicas[0].state


def test_a_head_is_not_waited_for_where_a_forward_keeps_the_module():
    module = Hanging()
    with serve(module, forward_timeout_s=0.3) as server:
        client = Stub(server, shared_memory=False)
        ask(client, 1, torch.ones(2))
        assert next(a for a in client.answers if a.HasField("failure")).failure.code == UNAVAILABLE
        messages = framing.Outgoing(Arguments([]), limits=Limits(), snapshot=True)
        [payload] = messages.messages(2, lambda payload: payload, None, lambda: True)
        encoding = encoding_to_wire(Hidden(head="fc"))
        tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.HEAD, encoding=encoding)
        client.say(call=teacher_pb2.Call(request_id=2, taps=[tap], inputs=messages.header, payload=payload))
        failure = next(a for a in client.answers if a.HasField("failure")).failure
        assert (failure.request_id, failure.code) == (2, UNAVAILABLE)
        module.go.set()
        client.channel.close()


@pytest.mark.parametrize("rows", [5000, 2])  # small ones are encoded by the thread that runs forwards
def test_features_that_never_leave_the_device_count_too(rows):
    go = threading.Event()

    class Stuck(LocalTeacher):
        def encode(self, values, wanted):
            assert go.wait(60)
            return super().encode(values, wanted)

    told = threading.Event()
    engine = Engine(Stuck(nn.Identity()), max_queued=9, forward_timeout_s=0.3, on_trouble=told.set)
    asked = [Asked(randn(rows, 8, seed=i)) for i in range(6)]
    for one in asked:
        submit(engine, one.job)
    engine.start()
    for one in asked:
        assert isinstance(one.result(), errors.TeacherUnavailableError)
    assert told.wait(20)
    go.set()
    engine.close()


class Clock:
    """Time, and a timer on it, that go on when they are told to."""

    def __init__(self, monkeypatch):
        self.now, self.alarms = 1000.0, []
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))

    def at(self, when, ring):
        self.alarms.append((when, ring))

    def go_on(self, seconds):
        end = self.now + seconds
        while due := sorted((alarm for alarm in self.alarms if alarm[0] <= end), key=lambda alarm: alarm[0]):
            self.alarms.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
        self.now = end


def test_forwards_that_each_return_in_time_are_no_hang_together(monkeypatch):
    class Slow(nn.Module):
        def forward(self, x):
            clock.go_on(1.0)
            return x

    clock = Clock(monkeypatch)
    engine = Engine(LocalTeacher(Slow()), max_queued=99, forward_timeout_s=1.5)
    engine._watchdog._loop = clock
    engine.start()
    asked = [Asked(randn(1, 8, seed=i)) for i in range(25)]
    for one in asked:
        submit(engine, one.job)
    for one in asked:
        assert torch.equal(one.features[""], one.job.inputs[0])
    engine.close()


@pytest.mark.parametrize("work", ["learn", "split"])
def test_what_waits_for_the_device_beside_forwards_counts_too(work):
    """A merged forward is only begun when it returns; who looks at what it makes waits for it."""
    go, told = threading.Event(), threading.Event()
    with engine_of(Net(), on_trouble=told.set) as engine:
        if work == "split":
            for _ in range(2):  # so that it is learned
                at_once(engine, *pair(2, 3)[0])
        inside = threading.Event()
        setattr(engine.merger, work, lambda *_args: (inside.set(), go.wait(60)))
        gate = engine.teacher.module
        first = Asked(torch.ones(1), hold=True)
        submit(engine, first.job)
        assert gate.began.acquire(timeout=20)
        asked = pair(2, 3)[0]
        for one in asked:
            submit(engine, one.job)
        gate.go.release()
        assert inside.wait(20)
        engine._watchdog._timeout_s = 0.2  # not before: what comes first may take its time
        engine._watchdog._look()
        assert told.wait(20)
        assert engine.trouble.stage == "stuck"
        go.set()


def test_a_student_goes_on_where_a_replica_hangs():
    modules = Hanging(), Hanging()
    modules[1].go.set()
    with serve(modules[0], forward_timeout_s=0.5) as first, serve(modules[1]) as second, DirectoryServer() as directory:
        directory.publish(first, second)
        with sh.connect(directory.url, timeouts=sh.Timeouts(request_s=60)) as teacher:
            futures = [teacher.submit((torch.full((2,), float(i % 2)),), {}, [""]) for i in range(20)]
            for i, future in enumerate(futures):
                assert torch.equal(future.result(60)[""], torch.full((2,), float(i % 2) + 1))
        modules[0].go.set()


def test_one_request_does_not_end_every_replica():
    """It gets two of four stuck, and then fails; what was queued behind it is answered by the others."""
    modules = [Hanging() for _ in range(4)]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serve(module, forward_timeout_s=0.5)) for module in modules]
        [stack.callback(module.go.set) for module in modules]
        directory = stack.enter_context(DirectoryServer())
        directory.publish(*servers)
        teacher = stack.enter_context(sh.connect(directory.url, timeouts=sh.Timeouts(request_s=60)))
        bad = teacher.submit((torch.ones(2),), {}, [""])
        good = [teacher.submit((torch.zeros(2),), {}, [""]) for _ in range(8)]
        with pytest.raises(errors.TeacherForwardError, match="2 replicas got stuck"):
            bad.result(60)
        for future in good:
            assert torch.equal(future.result(60)[""], torch.ones(2))
        assert sum(server.trouble is not None for server in servers) == 2


def test_a_request_that_says_that_it_broke_replicas_is_not_run():
    with serve(Hanging(), forward_timeout_s=60) as server:
        client = Stub(server, shared_memory=False)
        outgoing = framing.Outgoing(Arguments([torch.ones(2)]), limits=Limits(), snapshot=True)
        [payload] = outgoing.messages(1, lambda payload: payload, None, lambda: True)
        tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
        client.say(call=teacher_pb2.Call(request_id=1, taps=[tap], inputs=outgoing.header, payload=payload, broke=2))
        failure = next(a for a in client.answers if a.HasField("failure")).failure
        assert failure.code == teacher_pb2.Failure.TEACHER_FORWARD
        assert server.engines["teacher"].counters.forwards == 0
        client.channel.close()


def fails(_x):
    raise RuntimeError("CUDA error: device-side assert triggered")


class Asserting(nn.Module):
    def forward(self, x, *_hold):
        return fails(x) if (x > 90).any() else x


def test_who_breaks_a_device_alone_is_told_so_and_no_more_is_taken():
    told = threading.Event()
    engine = Engine(LocalTeacher(Asserting()), max_queued=9, on_trouble=told.set)
    engine.start()
    bad = Asked(torch.full((2, 8), 99.0))
    submit(engine, bad.job)
    assert isinstance(bad.result(), errors.TeacherForwardError)  # the device is in order
    assert engine.trouble is None
    engine.device.is_broken = lambda: True
    bad = Asked(torch.full((2, 8), 99.0))
    submit(engine, bad.job)
    error = bad.result()
    assert isinstance(error, errors.TeacherForwardError)
    assert "device-side assert" in str(error)
    assert told.wait(20)
    assert engine.trouble.stage == "broken"
    with pytest.raises(errors.TeacherUnavailableError, match="ask another replica"):
        submit(engine, Asked(randn(2, 8)).job)
    engine.close()


def test_those_who_were_on_a_device_together_as_it_broke_are_sent_elsewhere():
    with engine_of(Asserting()) as engine:
        engine.device.is_broken = lambda: True
        asked, bad = pair(2, 3)[0], Asked(torch.full((2, 8), 99.0))
        gate = engine.teacher.module
        first = Asked(torch.ones(1), hold=True)
        submit(engine, first.job)
        assert gate.began.acquire(timeout=20)
        for one in (bad, *asked):
            submit(engine, one.job)
        gate.go.release()
        first.result()
        answers = [one.result() for one in (bad, *asked)]
        assert {type(answer) for answer in answers} == {errors.TeacherUnavailableError}
        assert all(answer.broke for answer in answers)  # nobody knows which one it was
        assert engine.running == 0


def test_ordinary_errors_ask_no_more_of_the_device():
    with engine_of(Net()) as engine:
        engine.device.is_broken = lambda: pytest.fail("it waits for all of the device's work")
        asked = Asked(randn(2, 8), taps=["no_such_module"])
        submit(engine, asked.job)
        assert isinstance(asked.result(), errors.UnknownTapError)
        assert len(at_once(engine, *pair(2)[0])) == 1


def test_the_dog_barks_once_and_not_at_those_who_rest(monkeypatch):
    clock, pulse, barks = Clock(monkeypatch), Pulse(), []
    dog = Watchdog(clock, 0.2, [pulse, Pulse()], lambda: barks.append(clock.now))
    dog.start()
    for _ in range(8):
        with pulse:
            clock.go_on(0.05)
    clock.go_on(1.0)
    assert not barks
    with pulse:
        began = clock.now
        clock.go_on(1.0)
    assert barks == [pytest.approx(began + 0.2)]
    assert not clock.alarms


def test_the_dog_looks_at_the_real_time():
    loop, pulse, barked = Loop("dog").start(), Pulse(), threading.Event()
    dog = Watchdog(loop, 0.1, [pulse], barked.set)
    dog.start()
    with pulse:
        assert barked.wait(20)
    dog.end()
    loop.stop()


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "600", True, None])
def test_a_time_that_is_none_is_refused(wrong):
    with pytest.raises(errors.ConfigError, match="forward_timeout_s is .*; it must be seconds"):
        serve(nn.Identity(), forward_timeout_s=wrong)


@pytest.mark.ray
def test_a_pool_replaces_a_replica_that_hangs_and_the_request_is_answered(cluster, tmp_path):
    from schoolhouse_server.pool.config import load_pool
    from schoolhouse_server.pool.driver import launch

    flag, file = tmp_path / "hang-once", tmp_path / "pool.yaml"
    flag.touch()
    file.write_text(
        "port: 0\nteachers: {net: {build: 'slow_model:HangingOnce', kwargs: {flag: '" + str(flag) + "'}, threads: 1, "
        "forward_timeout_s: 1, resources: {num_cpus: 0.5}}}\n"
    )
    pool = launch(load_pool(file))
    try:
        pool.wait(120)
        with sh.connect(pool.url("net"), timeouts=sh.Timeouts(request_s=120)) as teacher:
            assert torch.equal(teacher.submit((torch.ones(2),), {}, [""]).result(120)[""], torch.ones(2))
        assert not flag.exists()
    finally:
        pool.down()


def test_a_pool_file_may_say_it():
    assert TeacherSpec(build="a:b", forward_timeout_s=1800).forward_timeout_s == 1800
    assert TeacherSpec(build="a:b").forward_timeout_s == 600
    with pytest.raises(ValueError, match="forward_timeout_s"):
        TeacherSpec(build="a:b", forward_timeout_s=-1)
