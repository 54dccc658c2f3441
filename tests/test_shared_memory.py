"""Shared memory: what goes through it is what the stream would bring, and whatever goes wrong there costs nobody more."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import pytest
import schoolhouse as sh
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire import channel, framing, shared_memory
from schoolhouse_wire.blocks import PAGE_BYTES, Blocks
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.v1 import teacher_pb2
from torch import nn

MIB = 1 << 20


def memfds(pid="self"):
    """How many descriptors and mappings of segments a process has."""
    fds = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            fds += "memfd:schoolhouse" in os.readlink(f"/proc/{pid}/fd/{fd}")
    with open(f"/proc/{pid}/maps") as maps:
        return fds, sum("memfd:schoolhouse" in line for line in maps)


def soon(check, timeout_s=20.0):
    """Whether it becomes true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        gc.collect()
        if check():
            return True
        time.sleep(0.05)
    return False


class Double(nn.Module):
    """Returns what it is given, and the first tensor twice over."""

    def forward(self, x, *more):
        return [x + x, x, more]


class Sized(nn.Module):
    """As many float32 as asked for, all of them the number asked for."""

    def forward(self, count, value):
        return torch.full((int(count),), float(value))


def ask(teacher, count, value):
    return teacher.submit((torch.tensor(count), torch.tensor(float(value))), {}, [""])


@pytest.fixture
def segments(monkeypatch):
    """The segments that replicas of this process made."""
    made, create = [], shared_memory.create
    monkeypatch.setattr(shared_memory, "create", lambda *args: made.append(create(*args)) or made[-1])
    return made


def in_use(segment):
    return sum(end - start for start, end in segment._blocks._taken.items()) > 0


@pytest.fixture
def pair():
    """A replica's segment of 4 MiB of replies, and a client's mapping of it."""
    theirs = shared_memory.create(4 * MIB, Outbox())
    return theirs, shared_memory.attach(theirs.offer, Outbox())


# The allocator.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "claim", "free"]), st.integers(0, 15), st.integers(1, 5)), max_size=60)
)
def test_blocks_are_apart_and_come_back(steps):
    region = Blocks(3 * PAGE_BYTES, 19 * PAGE_BYTES)
    pages, held = [None] * 16, {}  # the owner of each page
    for step, (what, place, count) in enumerate(steps):
        offset, size = (3 + place) * PAGE_BYTES, count * PAGE_BYTES - 7
        gaps = [i for i in range(17 - count) if pages[i : i + count] == [None] * count]
        if what == "take":
            got = region.take(size)
            assert got == ((3 + gaps[0]) * PAGE_BYTES if gaps else None)
        elif what == "claim":
            got = offset if region.claim(offset, size) else None
            assert (got is not None) == (place in gaps)
        else:
            assert region.free(offset) == (offset in held)
            count, owner = held.pop(offset, (0, None))
            pages = [None if page == owner else page for page in pages]
            continue
        if got is not None:
            first = got // PAGE_BYTES - 3
            pages[first : first + count] = [step] * count
            held[got] = (count, step)
    for offset in list(held):
        assert region.free(offset)
    assert region.free_parts() == [(3 * PAGE_BYTES, 19 * PAGE_BYTES)]


def test_a_block_that_does_not_fit_is_none():
    region = Blocks(0, 4 * PAGE_BYTES)
    assert region.take(5 * PAGE_BYTES) is None
    assert not region.claim(2 * PAGE_BYTES, 3 * PAGE_BYTES)
    assert not region.claim(5 * PAGE_BYTES, 1)
    assert region.take(4 * PAGE_BYTES) == 0
    assert Blocks(0, 0).take(1) is None


# What comes is what the stream brings.

VALUES = {
    "bfloat16": lambda: (torch.randn(300, 700).bfloat16(),),
    "float64": lambda: (torch.randn(90, 900, dtype=torch.float64),),
    "complex64": lambda: (torch.randn(90, 900, dtype=torch.complex64),),
    "int8": lambda: (torch.randint(-128, 128, (900, 901), dtype=torch.int8),),
    "float8": lambda: (torch.ones(1), torch.randn(300, 901).to(torch.float8_e4m3fn)),
    "channels_last": lambda: (torch.randn(2, 16, 60, 60).contiguous(memory_format=torch.channels_last),),
    "transposed": lambda: (torch.randn(300, 701).t(),),
    "with gaps": lambda: (torch.randn(300, 1402)[:, ::2],),
    "special numbers": lambda: (torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]).repeat(30_000),),
    "many odd sizes": lambda: tuple(torch.randn(n) for n in (40_001, 3, 0, 1, 77_777, 13)),
    "nested": lambda: (torch.randn(50_000), {"a": [torch.randn(7), (None, "text", 3)], "b": torch.randn(40_000)}),
    "1 MiB and a byte": lambda: (torch.randint(0, 256, (MIB + 1,), dtype=torch.uint8),),
    "9 MiB": lambda: (torch.randn(9 * MIB // 4),),
}


def bits(value):
    """A value with its tensors as dtype, shape, strides and bytes."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous().view(-1).view(torch.uint8) if value.numel() else value
        return value.dtype, value.shape, value.stride(), whole.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.fixture
def double():
    with serve(Double()) as server:
        with sh.connect(server.url) as shared, sh.connect(server.url, shared_memory=False) as streamed:
            assert shared.describe().transport == "shared memory"
            yield shared, streamed


@pytest.mark.parametrize("name", VALUES)
def test_shared_memory_brings_what_the_stream_brings(double, name, monkeypatch):
    shared, streamed = double
    value = VALUES[name]()
    over_stream = streamed.submit(value, {}, ["", ("", "input")]).result(60)
    monkeypatch.setattr(framing.Outgoing, "frames", None)  # in both processes, which are one: no frame is made
    got = shared.submit(value, {}, ["", ("", "input")]).result(60)
    assert bits(list(got.values())) == bits(list(over_stream.values()))
    assert got.input_digest == over_stream.input_digest
    assert bits(got[""][1])[-1] == bits(value[0])[-1]


def test_features_can_be_changed_in_place_and_keep_their_neighbours(double):
    shared, _ = double
    first, second = (shared.submit((torch.full((50_000,), float(i)),), {}, [""]) for i in (1, 2))
    first.result(20)[""][0].fill_(9)
    assert second.result(20)[""][0].eq(4).all()
    assert first.result()[""][0].eq(9).all()


# Where it cannot be.


def wrong_nonce(offer):
    offer.nonce = bytes(len(offer.nonce))


def no_such_process(offer):
    offer.pid = (1 << 22) + 1  # above the kernel's largest


def no_such_descriptor(offer):
    offer.fd = 1 << 20


def too_short(offer):
    offer.nbytes += PAGE_BYTES


def regions_that_overlap(offer):
    offer.requests_at, offer.replies_at = offer.replies_at, offer.requests_at


def region_over_the_nonce(offer):
    offer.requests_at = 0


def another_memory(offer, flags=0):
    offer.fd = os.memfd_create("other", flags)  # not sealed, so that it may be cut short at any time
    os.ftruncate(offer.fd, offer.nbytes)
    os.pwrite(offer.fd, offer.nonce, 0)


def a_pipe(offer):
    offer.fd = os.pipe()[0]


OFFERS = [
    wrong_nonce,
    no_such_process,
    no_such_descriptor,
    too_short,
    regions_that_overlap,
    region_over_the_nonce,
    another_memory,
    a_pipe,
]


@pytest.mark.parametrize("change", OFFERS)
def test_an_offer_that_cannot_be_taken_leaves_the_stream(change, segments, monkeypatch):
    made = shared_memory.create

    def create(*args):
        segment = made(*args)
        offer = teacher_pb2.SharedMemory.FromString(segment.offer.SerializeToString())
        change(offer)
        segment.offer = offer
        return segment

    monkeypatch.setattr(shared_memory, "create", create)
    before = memfds()
    with serve(Sized()) as server, sh.connect(server.url) as teacher:
        assert teacher.describe().transport.startswith(
            "stream: the replica is on another machine or its memory cannot be opened: "
        )
        assert ask(teacher, 100_000, 3).result(20)[""].eq(3).all()
        segments.clear()
        assert soon(lambda: memfds() == before)  # dropped by the replica although the session goes on
        assert ask(teacher, 100_000, 4).result(20)[""].eq(4).all()


def test_switched_off_on_either_side():
    with serve(Sized(), shared_memory_bytes=0) as server, sh.connect(server.url) as teacher:
        assert teacher.describe().transport == "stream: the replica offers no shared memory"
        assert ask(teacher, 100_000, 3).result(20)[""].eq(3).all()
    with serve(Sized()) as server, sh.connect(server.url, shared_memory=False) as teacher:
        assert teacher.describe().transport == "stream: shared memory is switched off here"
        assert ask(teacher, 100_000, 3).result(20)[""].eq(3).all()
    assert sh.LocalTeacher(Sized()).describe().transport == "in process"


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), PermissionError(1, "not permitted")])
def test_a_system_without_it_uses_the_stream(error, monkeypatch):
    monkeypatch.setattr(os, "memfd_create", lambda *_: (_ for _ in ()).throw(error))
    with serve(Sized()) as server, sh.connect(server.url) as teacher:
        assert teacher.describe().transport == "stream: the replica offers no shared memory"
        assert ask(teacher, 100_000, 3).result(20)[""].eq(3).all()


def test_wrong_settings():
    for wrong in (-1, 1.5, "1"):
        with pytest.raises(errors.ConfigError, match="shared_memory_bytes"):
            serve(Sized(), shared_memory_bytes=wrong)
    with pytest.raises(errors.ConfigError, match="shared_memory.*True, False"):
        sh.connect("grpc://127.0.0.1:1/x", shared_memory=1)


def test_describe_says_of_a_closed_teacher_that_no_session_is_open():
    with serve(Sized()) as server:
        teacher = sh.connect(server.url)
        teacher.close()
        assert teacher.describe().transport == "none: no session is open"


# Room.


def test_what_has_no_room_comes_over_the_stream(segments):
    with serve(Sized(), shared_memory_bytes=MIB) as server, sh.connect(server.url) as teacher:
        kept = [ask(teacher, 100_000, i).result(20)[""] for i in range(5)]  # two fit at once
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        assert len(segments[0]._blocks._taken) == 2
        assert ask(teacher, 1_000_000, 7).result(20)[""].eq(7).all()  # more than there is
        big = torch.randn(200_000)
        assert torch.equal(
            teacher.submit((torch.tensor(50_000), big[:1]), {}, [""]).result(20)[""], big[:1].expand(50_000)
        )
        del kept
        assert soon(
            lambda: ask(teacher, 100_000, 8).result(20)[""].eq(8).all() and len(segments[0]._blocks._taken) <= 1
        )


def test_large_inputs_beyond_their_region_come_over_the_stream():
    with serve(Double(), shared_memory_bytes=MIB) as server, sh.connect(server.url) as teacher:
        for count in (30_000, 60_000, 90_000, 300_000):  # a quarter of 1 MiB is for requests
            x = torch.randn(count)
            assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""][0], x + x)


def test_blocks_come_back_over_thousands_of_requests(segments):
    with serve(Double(), shared_memory_bytes=8 * MIB) as server, sh.connect(server.url) as teacher:
        x = torch.randn(20_000)
        futures = []
        for _ in range(1000):
            futures.append(teacher.submit((x,), {}, [""]))
            if len(futures) == 8:
                assert torch.equal(futures.pop(0).result(20)[""][0], x + x)
        for future in futures:
            future.result(20)
        session = next(iter(teacher._sessions.values()))
        assert len(session._segment._blocks._taken) <= 16  # told with the next replies
        assert len(segments[0]._blocks._taken) <= 24


# Ends: cancelled, refused, closed, killed.


class Gated(Sized):
    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def forward(self, count, value):
        assert self.gate.wait(30)
        return super().forward(count, value)


def test_cancelled_requests_leave_no_blocks(segments):
    module = Gated()
    with serve(module) as server, sh.connect(server.url) as teacher:
        pad = torch.zeros(100_000)
        futures = [teacher.submit((torch.tensor(100_000), pad[:1]), {}, [""]) for _ in range(20)]
        for i, future in enumerate(futures):
            if i == 10:
                module.gate.set()
            future.cancel()
        for _ in range(30):
            future = ask(teacher, 200_000, 2)
            time.sleep(0.002)
            future.cancel()
        del futures, future
        session = next(iter(teacher._sessions.values()))

        def all_back():
            ask(teacher, 1, 1).result(20)  # tells what is done with
            return not segments[0]._blocks._taken and not session._segment._lent._taken

        assert soon(all_back)


def test_a_failed_reply_frees_its_block(segments):
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = torch.zeros(10_000_000)

        def forward(self, x):
            return self.memory.fill_(x.item())

    with serve(Reusing()) as server, sh.connect(server.url) as teacher:
        futures = [teacher.submit((torch.tensor(float(i)),), {}, [""]) for i in range(6)]
        for i, future in enumerate(futures):
            error = future.exception(60)
            assert isinstance(error, errors.CorruptPayloadError) if error else future.result()[""].eq(i).all()
        del futures, future, error
        assert soon(lambda: not segments[0]._blocks._taken)


def test_features_outlive_the_teacher_and_the_replica():
    before = memfds()
    with serve(Sized()) as server:
        with sh.connect(server.url) as teacher:
            kept = ask(teacher, 100_000, 5).result(20)[""]
            large = ask(teacher, 1_000_000, 6).result(20)[""]
        del teacher
    del server
    gc.collect()
    assert kept.eq(5).all()
    del large
    assert kept.eq(5).all()
    assert kept.add_(1).eq(6).all()
    del kept
    assert soon(lambda: memfds() == before)


def test_sessions_leave_neither_descriptors_nor_mappings():
    with serve(Sized()) as server:
        counts = []
        for i in range(50):
            with sh.connect(server.url) as teacher:
                assert ask(teacher, 50_000, i).result(20)[""].eq(i).all()
            del teacher
            if i in (5, 49):
                assert soon(lambda: memfds() == (0, 0)), memfds()
                counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[1] <= counts[0] + 5


SERVER = """
import sys, torch
from schoolhouse_server import serve
class Sized(torch.nn.Module):
    def forward(self, count, value):
        return torch.full((int(count),), float(value))
with serve(Sized()) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def served_elsewhere():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.stdin.close()


def shmem_kib():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


def test_a_killed_replica_leaves_what_it_delivered_and_nothing_else():
    named, held = set(os.listdir("/dev/shm")), shmem_kib()
    with served_elsewhere() as (process, url):
        teacher = sh.connect(url, connect_timeout_s=0.5)
        assert teacher.describe().transport == "shared memory"
        kept = [ask(teacher, 4_000_000, i).result(20)[""] for i in range(4)]
        assert shmem_kib() >= held + 30_000  # so that it is seen to go
        rest = [ask(teacher, 4_000_000, i) for i in range(8)]
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        for future in rest:
            with contextlib.suppress(errors.TeacherUnavailableError):
                future.result(30)
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        teacher.close()
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        assert set(os.listdir("/dev/shm")) == named
        del teacher, kept, rest, future
    assert soon(lambda: memfds() == (0, 0))
    assert soon(lambda: shmem_kib() < held + 20_000)


def test_a_fork_gives_nothing_back():
    with served_elsewhere() as (_process, url), sh.connect(url) as teacher:
        kept = [ask(teacher, 100_000, i).result(20)[""] for i in range(4)]
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what the test runner does at it
            signal.alarm(20)
            status = 7 if [feature[-1].item() for feature in kept] == [0, 1, 2, 3] else 1
            del kept
            gc.collect()
            teacher.close()
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        more = [ask(teacher, 100_000, i + 10).result(20)[""] for i in range(40)]
        assert all(feature.eq(i).all() for i, feature in enumerate(kept))
        assert all(feature.eq(i + 10).all() for i, feature in enumerate(more))
        assert len(next(iter(teacher._sessions.values()))._segment._lent._taken) == 44


# Peers that lie.


def block(offset, nbytes):
    return teacher_pb2.Block(offset=offset, nbytes=nbytes)


def wrong_blocks(peers, nbytes):
    """Blocks that a receiver of `nbytes` must refuse."""
    return [
        block(peers.start, nbytes + 1),
        block(peers.start, 0),
        block(peers.start + 64, nbytes),
        block(peers.start - PAGE_BYTES, nbytes),
        block(peers.stop - PAGE_BYTES, nbytes),
        block(peers.stop, nbytes),
        block((1 << 64) - PAGE_BYTES, nbytes),
        block(0, nbytes),
    ]


def test_blocks_outside_of_the_peers_region_are_refused(pair):
    theirs, ours = pair
    assert theirs._peers == ours._own
    for side in pair:
        for wrong in wrong_blocks(side._peers, 10_000):
            with pytest.raises(errors.ProtocolError):
                side.receive(wrong, 10_000)
    with pytest.raises(errors.ProtocolError):
        theirs.receive(block(0, 0), 0)


def test_a_block_that_is_still_in_use_is_refused(pair):
    theirs, ours = pair
    offset = theirs.take(10_000)
    held = ours.receive(block(offset, 10_000), 10_000)
    for again in (offset, offset + PAGE_BYTES):
        with pytest.raises(errors.ProtocolError, match="in use"):
            ours.receive(block(again, 10_000), 10_000)
    del held
    assert ours.released() == [offset]
    assert ours.receive(block(offset, 10_000), 10_000) is not None


def test_releases_of_what_is_not_taken_are_ignored(pair):
    offset = pair[0].take(10_000)
    for wrong in (0, offset + 1, offset + PAGE_BYTES, (1 << 64) - 1):
        pair[0].free(wrong)
    assert pair[0].take(10_000) != offset
    pair[0].free(offset)
    pair[0].free(offset)
    assert pair[0].take(10_000) == offset


def sent_through(outgoing, sender):
    """The payload of a value that is sent in a block."""
    *pauses, message = outgoing.messages(
        1, lambda payload: teacher_pb2.Reply(features=outgoing.header, payload=payload), sender, lambda: True
    )
    assert not any(pauses)
    return message.payload


def test_what_a_client_changes_later_was_not_what_was_checked(pair):
    theirs, ours = pair
    x = torch.randn(100_000)
    outgoing = framing.Outgoing([x], limits=Limits(), snapshot=True)
    payload = sent_through(outgoing, ours)
    incoming = framing.Incoming(outgoing.header, payload, Limits(), theirs)
    ours._view[payload.shared.offset : payload.shared.offset + 4] = b"\xff" * 4
    assert torch.equal(incoming.value()[0], x)
    expected = xxhash.xxh3_128_digest(outgoing.header + x.numpy().tobytes())
    assert incoming.digest == outgoing.digest == expected
    with pytest.raises(errors.CorruptPayloadError):
        framing.Incoming(outgoing.header, payload, Limits(), theirs)


def test_a_request_can_be_sent_again_elsewhere(pair):
    outgoing = framing.Outgoing([torch.randn(100_000)], limits=Limits(), snapshot=True)
    others = shared_memory.create(4 * MIB, Outbox())
    first = sent_through(outgoing, pair[1])
    second = sent_through(outgoing, shared_memory.attach(others.offer, Outbox()))
    for payload, receiver in ((first, pair[0]), (second, others)):
        assert framing.Incoming(outgoing.header, payload, Limits(), receiver).digest == outgoing.digest


def test_corrupt_bytes_are_refused_and_their_block_given_back(pair):
    theirs, ours = pair
    outgoing = framing.Outgoing([torch.randn(100_000)], limits=Limits(), snapshot=False)
    payload = sent_through(outgoing, theirs)
    theirs._view[payload.shared.offset] ^= 1
    with pytest.raises(errors.CorruptPayloadError):
        framing.Incoming(outgoing.header, payload, Limits(), ours)
    gc.collect()
    assert ours.released() == [payload.shared.offset]


def test_what_is_not_wanted_any_more_gives_its_block_back():
    outgoing = framing.Outgoing([torch.randn(1_500_000)], limits=Limits(), snapshot=False)
    for pauses in range(4):  # three turns of 2 MiB
        segment = shared_memory.create(8 * MIB, Outbox())
        wanted = iter([True] * pauses + [False])
        list(outgoing.messages(1, lambda payload: payload, segment, wanted.__next__))
        assert not segment._blocks._taken


def test_neither_side_can_cut_the_memory_short(pair):
    path = f"/proc/{pair[0].offer.pid}/fd/{pair[0].offer.fd}"
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    pair[0].withdraw()
    with pytest.raises(OSError, match=r"No such file|not the replica"):
        shared_memory.attach(pair[0].offer, Outbox())


class Stub:
    """A client that says what it likes."""

    def __init__(self, server):
        self.outbox = Outbox()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.port}", options=channel.CLIENT_OPTIONS)
        call = self.channel.stream_stream(
            channel.SESSION_METHOD,
            request_serializer=framing.write_message,
            response_deserializer=lambda data: framing.read_message(teacher_pb2.ServerMessage, data),
        )
        self.answers = call(self.outbox, timeout=30)
        self.say(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher", shared_memory=True))
        self.offer = next(self.answers).opened.shared_memory

    def say(self, **message):
        self.outbox.put(iter([teacher_pb2.ClientMessage(**message)]))

    def call(self, request_id, payload, header):
        tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
        self.say(call=teacher_pb2.Call(request_id=request_id, taps=[tap], timeout_s=20, inputs=header, payload=payload))
        return next(self.answers)


def test_a_client_that_lies_harms_only_itself(segments):
    outgoing = framing.Outgoing(Arguments([torch.randn(30_000)]), limits=Limits(), snapshot=True)
    digest = xxhash.xxh3_128_digest(outgoing.header + bytes(120_000))
    with serve(Double(), shared_memory_bytes=MIB) as server:
        stub = Stub(server)
        before = teacher_pb2.Payload(digest=digest, shared=block(stub.offer.requests_at, 120_000))
        assert stub.call(1, before, outgoing.header).failure.code == teacher_pb2.Failure.PROTOCOL  # not attached
        stub.say(attached=teacher_pb2.Attached(attached=True))
        stub.say(attached=teacher_pb2.Attached(attached=False))  # once is enough
        stub.say(released=[0, 4096, stub.offer.replies_at, stub.offer.replies_at + 1, (1 << 64) - 1])
        for i, wrong in enumerate(wrong_blocks(range(stub.offer.requests_at, stub.offer.replies_at), 120_000)):
            payload = teacher_pb2.Payload(digest=digest, shared=wrong)
            assert stub.call(2 + i, payload, outgoing.header).failure.code == teacher_pb2.Failure.PROTOCOL
        bad = teacher_pb2.Payload(digest=bytes(16), shared=block(stub.offer.requests_at, 120_000))
        assert stub.call(20, bad, outgoing.header).failure.code == teacher_pb2.Failure.CORRUPT_PAYLOAD
        answer = stub.call(21, before, outgoing.header)  # zeros, as the memory is
        assert answer.reply.payload.shared.offset >= stub.offer.replies_at
        stub.channel.close()
        with sh.connect(server.url) as teacher:
            x = torch.randn(30_000)
            assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""][0], x + x)
