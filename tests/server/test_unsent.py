"""Features that are not sent yet: a client that does not read has few of them made, and no other one waits."""

import threading
import time
from contextlib import contextmanager

import pytest
import schoolhouse as sh
import torch
from deaf import deafness
from memfd import MIB, soon
from merging import Asked, engine_of, submit
from schoolhouse import encodings, errors
from schoolhouse.teachers.query import Wanted
from schoolhouse_server import serve
from schoolhouse_server.engine.fair_queue import FairQueue
from schoolhouse_server.engine.shares import Sizes
from schoolhouse_server.engine.unsent import Share, Unsent
from schoolhouse_server.observe.counters import JobCounters
from schoolhouse_server.session import relief
from schoolhouse_wire.values.codec import Arguments
from stub import Stub, to_payload
from test_queueing import Request
from torch import nn

WAYS = pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "stream"])
BOUNDS = {"max_job_unsent_bytes": 8 * MIB, "max_unsent_bytes": 20 * MIB, "shared_memory_bytes": 4 * MIB}

COPIES = 2 * (MIB + 64)  # of the frame that a session is about to send, which count beyond the bound


class Tall(nn.Module):
    """One MiB for each row `[1]`, all of it the row's number."""

    def forward(self, x):
        if (x < 0).any():
            raise ValueError("negative")
        return x.repeat(1, MIB // 4)


def ask(teacher, number, rows=1, **more):
    return teacher.submit((torch.full((rows, 1), float(number)),), {}, [""], **more)


def forwards(server):
    return server.load("teacher").forwards


@contextmanager
def deaf(url, shared_memory):
    """A client that has read one answer and reads no more, and what has it read on."""
    transport = sh.Transport(shared_memory=shared_memory)
    with deafness() as deaf, sh.connect(url, job="deaf", transport=transport) as teacher:
        ask(teacher, 0).result(20)
        deaf.begin(teacher)
        yield teacher, deaf.go_on
        deaf.go_on.set()


def settled(server):
    """Forwards so far, once no more come; those that go on are seen within a second."""
    count, since = forwards(server), time.monotonic()
    while time.monotonic() < since + 1:
        time.sleep(0.05)
        if forwards(server) != count:
            count, since = forwards(server), time.monotonic()
    return count


@WAYS
@pytest.mark.parametrize("merge", ["never", "same-shape"])
def test_what_waits_for_a_client_that_does_not_read_is_bounded_and_others_are_served(shared_memory, merge):
    with serve(Tall(), merge=merge, **BOUNDS) as server:
        with deaf(server.url, shared_memory=shared_memory) as (teacher, go_on):
            futures = [ask(teacher, i) for i in range(1, 60)]
            assert soon(lambda: server.load("teacher").queued > 0)
            # 8 MiB unsent; of those sent, 4 MiB in shared memory, the last one of them, and what a stream has room for.
            assert settled(server) <= 1 + 8 + 4 + 1 + 16
            assert server.unsent.nbytes <= 8 * MIB + COPIES
            with sh.connect(server.url, job="other", transport=sh.Transport(shared_memory=shared_memory)) as other:
                for i in range(30):
                    assert ask(other, i).result(20)[""].eq(i).all()
            assert not futures[-1].done()
            go_on.set()
            for i, future in enumerate(futures, 1):
                assert future.result(30)[""].eq(i).all()
            assert dict(server.load("teacher").errors) == {}
        assert soon(lambda: server.unsent.nbytes == 0)


@pytest.mark.parametrize("cache_bytes", [0, 100 * MIB])
def test_features_that_are_made_for_others_are_not_kept_without_end_for_a_client_that_does_not_read(cache_bytes):
    with (
        serve(Tall(), cache_bytes=cache_bytes, **BOUNDS) as server,
        sh.connect(server.url, job="reads") as reads,
    ):
        if cache_bytes:
            [ask(reads, i).result(20) for i in range(1, 40)]
        with deaf(server.url, shared_memory=False) as (teacher, go_on):
            pairs = [(ask(reads, i), ask(teacher, i)) for i in range(1, 40)]
            for i, (one, _) in enumerate(pairs, 1):
                assert one.result(20)[""].eq(i).all()
            assert server.unsent.nbytes <= 8 * MIB + COPIES
            assert soon(lambda: server.load("teacher").queued > 0)
            go_on.set()
            for i, (_, other) in enumerate(pairs, 1):
                assert other.result(30)[""].eq(i).all()
        assert soon(lambda: server.unsent.nbytes == 0)


def test_however_a_request_ends_its_bytes_are_free_again():
    with serve(Tall(), **BOUNDS) as server:
        with sh.connect(server.url, job="j") as teacher:
            for number in (1, -1):
                futures = [ask(teacher, number) for _ in range(6)]
                assert [future.exception(20) is None for future in futures] == [number > 0] * 6
            assert soon(lambda: server.unsent.nbytes == 0)
            too_large = {"": encodings.fp16}
            with pytest.raises(errors.UnsupportedValueError):
                ask(teacher, 1e6, encodings=too_large).result(20)
            assert soon(lambda: server.unsent.nbytes == 0)
        with deaf(server.url, shared_memory=False) as (teacher, _):
            futures = [ask(teacher, i) for i in range(1, 50)]
            assert soon(lambda: server.unsent.nbytes > 4 * MIB)
            [future.cancel() for future in futures[::2]]
            assert soon(lambda: server.load("teacher").queued < 45)
            assert server.unsent.nbytes <= 8 * MIB + COPIES
        assert soon(lambda: server.unsent.nbytes == 0)  # its session has ended
        with sh.connect(server.url, job="deaf") as teacher:
            assert ask(teacher, 3).result(20)[""].eq(3).all()


def test_what_was_cancelled_counts_as_long_as_the_stream_has_not_dropped_it():
    with (
        serve(Tall(), **BOUNDS) as server,
        deaf(server.url, shared_memory=False) as (teacher, go_on),
    ):
        for turn in range(3):
            futures = [ask(teacher, 100 * turn + i) for i in range(1, 20)]
            settled(server)
            [future.cancel() for future in futures]
        assert settled(server) <= 1 + 8 + 1 + 16
        go_on.set()
        assert ask(teacher, 3).result(20)[""].eq(3).all()
        assert soon(lambda: server.unsent.nbytes == 0)


def test_features_larger_than_the_bound_are_refused_by_the_name_of_the_setting():
    with serve(Tall(), **BOUNDS) as server, sh.connect(server.url) as teacher:
        for rows in (9, 8, 9):
            if rows == 8:
                assert ask(teacher, 1, rows).result(20)[""].shape == (8, MIB // 4)
                continue
            with pytest.raises(errors.MessageTooLargeError, match=f"{9 * MIB} bytes, and max_job_unsent_bytes .*fewer"):
                ask(teacher, 1, rows).result(20)
        assert soon(lambda: server.unsent.nbytes == 0)
    bounds = {"max_unsent_bytes": 2 * MIB, "max_job_unsent_bytes": 5 * MIB}
    with serve(Tall(), **bounds) as server, sh.connect(server.url) as teacher:
        with pytest.raises(errors.MessageTooLargeError, match=f"max_unsent_bytes of the teacher is {2 * MIB}"):
            ask(teacher, 1, 3).result(20)


def test_shares_are_within_the_bounds_of_a_job_and_of_all():
    freed = []
    among = Unsent(10, 6)
    among.follow(lambda: freed.append(among.nbytes))
    one = among.take("a", None)  # of unknown size: one at a time
    other = among.take("b", None)
    assert isinstance(one, Share)
    assert isinstance(other, Share)
    assert (among.nbytes, among.take("a", None), freed) == (0, "job", [])
    one.resize(4)
    assert freed == [4]
    other.end()
    two, three = among.take("a", 2), among.take("b", 4)
    assert (among.nbytes, among.take("a", 1), among.take("c", 1), freed) == (10, "job", "replica", [4, 4])
    assert (among.take("a", None), among.take("c", None)) == ("job", "replica")
    beside = two.beside()  # for the same features, which are in memory once
    for share in (one, two, three, two):
        share.end()
    assert among.nbytes == 2
    for _ in range(2):
        beside.end()
    one.resize(5)
    assert (among.nbytes, among._jobs, freed[-1]) == (0, {}, 0)
    assert isinstance(among.take("a", 100), Share)  # it may turn out to be smaller
    with pytest.raises(errors.MessageTooLargeError):
        among.check(7)


def test_sizes_grow_with_the_inputs_and_are_those_of_a_kind():
    sizes, wanted = Sizes(), Wanted.of([""])
    kind, elements = sizes.kind_of(Arguments((torch.ones(2, 8),)), wanted)
    assert sizes.of(kind, elements) is None
    sizes.learn(kind, elements, 320)
    for shape, nbytes in (((2, 8), 320), ((4, 8), 640), ((2, 4), 160)):
        assert sizes.of(*sizes.kind_of(Arguments((torch.ones(shape),)), wanted)) == nbytes
    for inputs, other in (
        (Arguments((torch.ones(2, 8, 1),)), wanted),
        (Arguments((torch.ones(2, 8),)), Wanted.of(["fc"])),
        (Arguments((torch.ones(2, 8),)), Wanted.of([""], {"": encodings.bf16})),
    ):
        assert sizes.of(*sizes.kind_of(inputs, other)) is None
    drawn = [Wanted.of([""], {"": encodings.sampled(3)}).with_seeds() for _ in range(2)]
    kinds = {sizes.kind_of(Arguments(), one)[0] for one in drawn}
    assert len(kinds) == 1


class Sent(Asked):
    """A request of a job, 32 bytes for each row, whose reply is sent as soon as it is there."""

    def __init__(self, job, rows=1, like=None, **more):
        super().__init__(torch.ones(rows, 8), **more)
        self.ticket.account = JobCounters(job)
        self.ticket.done = self.send
        if like is not None:
            self.job.key = like.job.key

    def send(self, result):
        self.ticket.drop()
        self.answers.put(result)


@contextmanager
def holding(max_bytes, max_job_bytes):
    """An engine that has made one reply for job a, and is at one for job h until it is let go on; and that."""
    bound = Unsent(max_bytes, max_job_bytes)
    with engine_of(nn.Identity(), unsent=bound) as engine:
        first, held, gate = Sent("a"), Sent("h", hold=True), engine.teacher.module
        submit(engine, first.job)
        first.result()
        submit(engine, held.job)
        assert gate.began.acquire(timeout=20)
        yield engine, gate.go.release
        held.result()
        assert bound.nbytes == 0


def test_where_the_replica_is_full_those_that_have_their_room_go_on():
    with holding(160, 64) as (engine, go_on):
        queued = [Sent("a") for _ in range(2)]
        joining = [Sent(job, like=one) for job in "bc" for one in queued]
        last = Sent("d", rows=2)  # it goes first, and b and c have all but the 32 bytes of what is held
        for one in (*queued, *joining, last):
            submit(engine, one.job)
        go_on()
        for one in (*queued, *joining, last):
            assert one.features[""].eq(1).all()


@pytest.mark.parametrize("job", ["deaf", "other"])
def test_a_request_of_a_new_kind_waits_for_no_reply_that_nobody_reads(job):
    with holding(80, 64) as (engine, go_on):
        unread, new = Sent("deaf"), Sent(job)
        unread.ticket.done = unread.answers.put
        new.job.inputs = Arguments((torch.ones(1, 1, 8),))
        for one in (unread, new):
            submit(engine, one.job)
        go_on()
        assert unread.features[""].eq(1).all()
        assert new.features[""].shape == (1, 1, 8)
        unread.ticket.drop()


def test_a_request_beside_one_of_its_job_that_was_cancelled_has_its_bytes():
    with holding(160, 64) as (engine, go_on):
        one = Sent("a", hold=True)
        two = Sent("a", like=one, hold=True)
        submit(engine, one.job)
        go_on()
        assert engine.teacher.module.began.acquire(timeout=20)
        submit(engine, two.job)
        engine.loop.ask(engine.cancel, one.ticket)
        found = []
        two.ticket.done = lambda result: (found.append(two.ticket.share.nbytes), two.send(result))
        go_on()
        two.result()
        assert found == [32]


class Rooms:
    """What is full, by job; the rest has room."""

    def __init__(self):
        self.full, self.asked = {}, []

    def __call__(self, request):
        self.asked.append(request.job)
        return self.full.get(request.job, "taken")


def test_a_job_that_is_full_keeps_its_turn_and_its_order_and_others_go_on():
    rooms = Rooms()
    queue = FairQueue(100, rooms)
    requests = {job: [Request(job, 1.0 + i) for i in range(4)] for job in "abc"}
    for of_job in zip(*requests.values(), strict=True):
        [queue.put(one) for one in of_job]
    rooms.full = {"b": "job"}
    served = [taken for _ in range(8) for taken in queue.take(lambda _taken, other: other.job == "b")]
    assert {one.job for one in served} == {"a", "c"}
    assert queue.oldest() is None  # of those that only wait for the device
    found = []
    thread = threading.Thread(target=lambda: found.extend(queue.take()))
    thread.start()
    queue.wake()  # there is no room
    rooms.full = {}
    queue.wake()
    thread.join(20)
    assert found + [one for _ in range(3) for one in queue.take()] == requests["b"]


def test_where_the_replica_is_full_nobody_passes_the_one_whose_turn_it_is():
    rooms = Rooms()
    queue = FairQueue(100, rooms)
    for job in "ab":
        queue.put(Request(job))
    rooms.full = {"a": "replica"}
    found = []
    thread = threading.Thread(target=lambda: found.extend([*queue.take(), *queue.take()]))
    thread.start()
    assert soon(lambda: rooms.asked == ["a"])
    queue.wake()
    assert soon(lambda: len(rooms.asked) == 2)
    rooms.full = {}
    queue.wake()
    thread.join(20)
    assert [one.job for one in found] == ["a", "b"]
    assert rooms.asked[:3] == ["a"] * 3


def test_jobs_that_read_nothing_do_not_take_all_memory_for_ever(monkeypatch):
    """Each stays within its bound, and says that it lives; together they have all that there is for replies."""
    monkeypatch.setattr(relief, "UNREAD_S", 0.2)
    monkeypatch.setattr(relief, "EVERY_S", 0.1)
    with serve(Tall(), **(BOUNDS | {"shared_memory_bytes": 0})) as server:
        stubs = [Stub(server, shared_memory=False, job=f"deaf-{i}") for i in range(4)]
        for number, stub in enumerate(stubs):
            stub.ask(1, **to_payload(Arguments((torch.full((7, 1), float(number)),))))
        assert soon(lambda: server.unsent.nbytes > 13 * MIB)
        with sh.connect(server.url, job="honest") as teacher:
            for _ in range(3):
                assert len(teacher.submit((torch.ones(7, 1),), {}, [""]).result(15)[""]) == 7
        assert server.load("teacher").sessions < 4  # of the four that were there
        for stub in stubs:
            stub.channel.close()


def test_who_waits_behind_one_that_is_cancelled_is_served():
    rooms = Rooms()
    queue = FairQueue(100, rooms)
    large = Request("large")
    for one in (large, Request("small")):
        queue.put(one)
    rooms.full = {"large": "replica"}
    found = []
    thread = threading.Thread(target=lambda: found.extend(queue.take()))
    thread.start()
    assert soon(lambda: rooms.asked == ["large"])
    assert queue.remove(large)
    thread.join(20)
    assert [one.job for one in found] == ["small"]
