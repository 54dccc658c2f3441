"""Blocks of shared memory: their allocator, and peers that lie about them."""

import gc
import os

import pytest
import schoolhouse as sh
import torch
import xxhash
from ends import loop
from hypothesis import given, settings
from hypothesis import strategies as st
from memfd import MIB, Double
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.outbox import Elsewhere, Outbox
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.same_host.blocks import PAGE_BYTES, Blocks
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub

pytestmark = pytest.mark.usefixtures("no_segments")


@pytest.fixture
def pair():
    """A replica's segment of 4 MiB of replies, and a client's mapping of it."""
    theirs = shared_memory.create(4 * MIB, Outbox(loop()), checksums=True)
    return theirs, shared_memory.attach(theirs.offer, Outbox(loop()), checksums=True)


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
    made = outgoing.messages(
        1, lambda payload: teacher_pb2.Reply(features=outgoing.header, payload=payload), sender, lambda: True
    )
    [message] = [one for one in made if not (isinstance(one, Elsewhere) and (one.step() or True))]
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
    others = shared_memory.create(4 * MIB, Outbox(loop()), checksums=True)
    first = sent_through(outgoing, pair[1])
    second = sent_through(outgoing, shared_memory.attach(others.offer, Outbox(loop()), checksums=True))
    for payload, receiver in ((first, pair[0]), (second, others)):
        assert framing.Incoming(outgoing.header, payload, Limits(), receiver).digest == outgoing.digest


@pytest.mark.parametrize("checksums", [True, False])
def test_large_payloads_arrive_whole(checksums):
    for sizes in ((5_000_001, 3), (17, 9_000_000), (20 * MIB + 5,)):
        theirs = shared_memory.create(64 * MIB, Outbox(loop()), checksums=checksums)
        ours = shared_memory.attach(theirs.offer, Outbox(loop()), checksums=checksums)
        values = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
        outgoing = framing.Outgoing(values, limits=Limits(), snapshot=False)
        payload = sent_through(outgoing, theirs)
        given = framing.Incoming(outgoing.header, payload, Limits(), ours).value()
        assert all(map(torch.equal, given, values))
        other = framing.Outgoing([value ^ 1 for value in values], limits=Limits(), snapshot=False)
        mixed = sent_through(other, theirs)
        mixed.digest = payload.digest  # a block of another reply
        with pytest.raises(errors.CorruptPayloadError):
            framing.Incoming(outgoing.header, mixed, Limits(), ours)


def test_without_a_thread_left_one_copies_alone(monkeypatch):
    theirs = shared_memory.create(16 * MIB, Outbox(loop()), checksums=False)
    outgoing = framing.Outgoing(
        [torch.randint(0, 256, (5_000_001,), dtype=torch.uint8)], limits=Limits(), snapshot=False
    )
    ours = shared_memory.attach(theirs.offer, Outbox(loop()), checksums=False)

    def refused(_thread):
        raise RuntimeError("can't start new thread")

    for left in (False, True):
        with monkeypatch.context() as patch:
            if not left:
                patch.setattr(shared_memory.threading.Thread, "start", refused)
            payload = sent_through(outgoing, theirs)
        assert torch.equal(framing.Incoming(outgoing.header, payload, Limits(), ours).value()[0], outgoing._tensors[0])
        assert (theirs._copier._thread is not None) == left


def test_without_checksums_a_reply_is_checked_in_spots():
    theirs = shared_memory.create(4 * MIB, Outbox(loop()), checksums=False)
    ours = shared_memory.attach(theirs.offer, Outbox(loop()), checksums=False)
    values = [torch.randint(0, 256, (200_000,), dtype=torch.uint8)]
    outgoing = framing.Outgoing(values, limits=Limits(), snapshot=False)
    for at, seen in ((0, True), (1023, True), (1024, False), (65535, False), (65536, True), (199_999, False)):
        payload = sent_through(outgoing, theirs)
        theirs._view[payload.shared.offset + at] ^= 1
        if seen:
            with pytest.raises(errors.CorruptPayloadError):
                framing.Incoming(outgoing.header, payload, Limits(), ours)
        else:
            assert not torch.equal(framing.Incoming(outgoing.header, payload, Limits(), ours).value()[0], values[0])
        gc.collect()
        theirs.free(ours.released()[0])
    request = sent_through(outgoing, ours)  # what the replica works on is checked whole
    ours._view[request.shared.offset + 199_999] ^= 1
    with pytest.raises(errors.CorruptPayloadError):
        framing.Incoming(outgoing.header, request, Limits(), theirs)


def test_corrupt_bytes_are_refused_and_their_block_given_back(pair):
    theirs, ours = pair
    outgoing = framing.Outgoing([torch.randn(100_000)], limits=Limits(), snapshot=False)
    payload = sent_through(outgoing, theirs)
    theirs._view[payload.shared.offset] ^= 1
    with pytest.raises(errors.CorruptPayloadError):
        framing.Incoming(outgoing.header, payload, Limits(), ours)
    gc.collect()
    assert ours.released() == [payload.shared.offset]


def test_what_is_not_wanted_any_more_gives_its_block_back(monkeypatch):
    monkeypatch.setattr(framing, "_TURN_BYTES", 2 << 20)
    outgoing = framing.Outgoing([torch.randn(1_500_000)], limits=Limits(), snapshot=False)
    for pauses in range(4):  # three turns of 2 MiB
        segment = shared_memory.create(8 * MIB, Outbox(loop()), checksums=True)
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
        shared_memory.attach(pair[0].offer, Outbox(loop()), checksums=True)


def test_a_client_that_lies_harms_only_itself(segments):
    outgoing = framing.Outgoing(Arguments([torch.randn(30_000)]), limits=Limits(), snapshot=True)
    digest = xxhash.xxh3_128_digest(outgoing.header + bytes(120_000))
    with serve(Double(), shared_memory_bytes=MIB) as server:
        stub = Stub(server)
        before = teacher_pb2.Payload(digest=digest, shared=block(stub.offer.requests_at, 120_000))
        assert stub.call(1, before, outgoing.header).failure.code == teacher_pb2.Failure.PROTOCOL  # not attached
        stub.attach()
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
        del stub
        with sh.connect(server.url) as teacher:
            x = torch.randn(30_000)
            assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""][0], x + x)
