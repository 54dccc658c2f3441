"""What goes wrong in an engine ends one request: no thread, no memory, no count and no later request with it."""

import threading
import time
import weakref

import pytest
import schoolhouse as sh
import torch
from memfd import no_collector
from merging import submit
from schoolhouse import errors
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse_server import serve
from schoolhouse_server.engine.engine import Engine, Ticket
from schoolhouse_server.session.quotas import MAX_IN_FLIGHT
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub
from test_engine import Slow, Wide, job, load_of, wait_until, whole
from torch import nn


class Panic(BaseException):
    """As those that come from Rust."""


def leave():
    raise SystemExit(3)


def panic():
    raise Panic


BAD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "large sparse": lambda: torch.eye(300).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.ones(3, device="meta"),
    "exit": leave,
    "panic": panic,
}


class Bad(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make() if x.any() else x


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", BAD)
def test_whatever_a_forward_returns_or_raises_the_engine_goes_on(name, cache_bytes):
    expected = errors.TeacherForwardError if name in ("exit", "panic") else errors.UnsupportedValueError
    with (
        serve(Bad(BAD[name]), cache_bytes=cache_bytes) as server,
        sh.connect(server.url, timeouts=sh.Timeouts(request_s=10)) as teacher,
    ):
        for _ in range(3):
            with pytest.raises(expected):
                teacher.submit((torch.ones(2),), {}, [""]).result()
            assert torch.equal(teacher.submit((torch.zeros(2),), {}, [""]).result()[""], torch.zeros(2))
        assert (load_of(server).in_flight, load_of(server).served) == (0, 6)


class Leaky(nn.Module):
    """Remembers, weakly, what it worked on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        inner = x + 1
        self.seen += [weakref.ref(x), weakref.ref(inner)]
        if x[0, 0] < 0:
            raise ValueError("negative")
        return inner[..., None].repeat(1, 1, 10_000)

    def gone(self):
        return all(ref() is None for ref in self.seen)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_an_answered_request_leaves_nothing_to_the_garbage_collector(value, monkeypatch):
    tickets = []

    class Watched(Ticket):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            tickets.append(weakref.ref(self))

    monkeypatch.setattr("schoolhouse_server.session.server_session.Ticket", Watched)
    module = Leaky()
    encodings = {"": sh.encodings.at_positions()}
    with serve(module) as server, sh.connect(server.url) as teacher, no_collector():
        mask = torch.ones(4, 8, dtype=torch.bool)
        future = teacher.submit((torch.full((4, 8), value),), {}, [""], encodings=encodings, positions=mask)
        assert (future.exception(20) is None) == (value > 0)
        wait_until(module.gone)
        wait_until(lambda: tickets and all(ticket() is None for ticket in tickets))


def test_the_cache_keeps_no_objects_that_stayed_with_the_teacher():
    class KeyValues:
        pass

    class Generating(nn.Module):
        def forward(self, x):
            made.append(weakref.ref(held := KeyValues()))
            return [x, held]

    made = []
    with serve(Generating(), cache_bytes=1 << 20) as server, sh.connect(server.url) as teacher:
        for _ in range(2):
            with pytest.raises(errors.UnsupportedValueError, match="KeyValues stayed with the teacher"):
                teacher.submit((torch.ones(2),), {}, [""]).result()[""][1].keys  # noqa: B018
        assert load_of(server).cached == 1
        wait_until(lambda: made[0]() is None)


def test_inputs_that_cannot_be_pinned_fail_alone():
    with serve(nn.Linear(8, 5)) as server, sh.connect(server.url, timeouts=sh.Timeouts(request_s=10)) as teacher:
        device = server.engines["teacher"].device
        pin, failing = device.pin, iter([True, False, True, False])

        def pin_or_fail(value):
            if next(failing):
                raise RuntimeError("CUDA error: out of memory")
            return pin(value)

        device.pin = pin_or_fail
        for x in (torch.ones(1, 8), torch.ones(10_000, 8)):
            with pytest.raises(errors.TeacherMemoryError, match="memory"):
                teacher.submit((x,), {}, [""]).result()
            assert teacher.submit((x,), {}, [""]).result()[""].shape == (len(x), 5)
        assert load_of(server).sessions == 1


def test_a_request_that_comes_while_the_engine_closes_is_refused():
    engine = Engine(LocalTeacher(nn.Linear(8, 5)), max_queued=10)
    engine.start()
    one = job(torch.ones(1, 8))[0]
    engine.loop.run(engine.prepare(one, 0)).result(20)
    engine.close()
    with pytest.raises(errors.TeacherUnavailableError, match="shutting down"):
        engine.submit(one)


def test_closing_answers_those_who_wait_and_counts_them():
    module = Slow()
    engine = Engine(LocalTeacher(module), max_queued=10)
    engine.start()
    jobs = [job(torch.full((1, 8), float(i)), i) for i in range(4)]
    for one, _ in jobs:
        submit(engine, one)
    assert module.began.acquire(timeout=20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    for _, answers in jobs[1:]:
        assert isinstance(answers.get(timeout=20), errors.TeacherUnavailableError)
    assert (engine.running, engine.served, engine.queued) == (1, 3, 0)
    module.go.set()
    assert whole(jobs[0][1]).shape == (1, 5)
    closing.join(20)
    assert (engine.running, engine.served, engine.queued) == (0, 4, 0)


def test_who_joins_a_request_that_turns_out_to_be_late_is_answered():
    engine = Engine(LocalTeacher(nn.Linear(8, 5)), max_queued=10)
    engine.start()
    late, answers = job(torch.ones(1, 8), "key")
    late.tickets[0].deadline = time.monotonic() - 1
    other, others_answers = job(torch.ones(1, 8), "key")

    def both():
        engine.submit(late)
        engine._queue.go()
        wait_until(lambda: engine._answers._arrived)  # it was taken, and nobody waited
        engine.submit(other)

    engine.loop.ask(both)
    assert isinstance(answers.get(timeout=20), errors.TeacherTimeoutError)
    assert whole(others_answers).shape == (1, 5)
    assert engine.joined == 1
    engine.close()


def test_each_of_those_who_wait_for_the_same_has_its_own_deadline_and_its_own_turn():
    """A client that guesses what others ask for, and is in no hurry, holds nobody up."""
    engine = Engine(LocalTeacher(nn.Linear(8, 5)), max_queued=100)
    order = []

    def ask(key, name, timeout_s=60.0):
        found, answers = job(torch.full((1, 8), float(hash(key) % 97)), key)
        ticket = found.tickets[0]
        ticket.payer, ticket.deadline = name, time.monotonic() + timeout_s
        done, ticket.done = ticket.done, lambda result: (order.append((name, key)), done(result))
        engine.submit(found)
        return answers

    def all_of_them():
        for i in range(20):
            ask(f"other {i}", "hostile")
        return [ask("guessed", name, s) for name, s in (("hostile", 60.0), ("honest", 60.0), ("hasty", 0.01))]

    _, honest, hasty = engine.loop.ask(all_of_them)
    assert engine.joined == 2
    assert isinstance(hasty.get(timeout=20), errors.TeacherTimeoutError)  # the others wait on
    order.clear()
    engine.start()
    assert whole(honest).shape == (1, 5)
    wait_until(lambda: len(order) == 22)
    assert order.index(("honest", "guessed")) <= 3
    engine.close()


def test_who_cancels_leaves_those_who_wait_for_the_same_where_they_were():
    engine = Engine(LocalTeacher(nn.Linear(8, 5)), max_queued=100)
    (first, _), (second, answers), (third, more) = [job(torch.ones(1, 8), "key") for _ in range(3)]
    engine.loop.ask(lambda: [engine.submit(one) for one in (first, second, third)])
    ticket = first.tickets[0]
    engine.loop.ask(engine.cancel, ticket)
    assert engine.queued == 1
    assert ticket.job is None
    engine.start()
    assert whole(answers).shape == whole(more).shape == (1, 5)
    assert engine.counters.forwards == 1
    engine.close()


def test_a_client_that_does_not_read_is_not_answered_without_end():
    outgoing = framing.Outgoing(Arguments([torch.ones(10, 8)]), limits=Limits(), snapshot=True)
    with serve(Wide(), cache_bytes=10 << 20) as server:
        other = Stub(server, shared_memory=False)
        other.call(0, outgoing.payload, outgoing.header)  # from here on the cache answers, at once
        other.channel.close()
        stub = Stub(server, shared_memory=False)
        for i in range(4 * MAX_IN_FLIGHT):
            stub.ask(i, outgoing.payload, outgoing.header)
        wait_until(lambda: load_of(server).cached > MAX_IN_FLIGHT)
        served = 0
        while served != (served := load_of(server).served):
            time.sleep(0.5)
        assert served <= 2 * MAX_IN_FLIGHT + 10  # some left before the stream was full
        stub.channel.close()


def test_an_id_in_flight_is_not_taken_twice():
    outgoing = framing.Outgoing(Arguments([torch.ones(1, 8)]), limits=Limits(), snapshot=True)
    module = Slow()
    with serve(module) as server:
        stub = Stub(server, shared_memory=False)
        stub.ask(1, outgoing.payload, outgoing.header)
        failure = stub.call(1, outgoing.payload, outgoing.header).failure
        assert (failure.request_id, failure.code) == (1, teacher_pb2.Failure.PROTOCOL)
        module.go.set()
        assert next(stub.answers).reply.request_id == 1
        stub.channel.close()
