"""Shared memory brings what the stream would bring; where it cannot be, or is full, the stream does."""

import os

import pytest
import schoolhouse as sh
import torch
from memfd import MIB, Double, Sized, ask, memfds, soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.same_host.blocks import PAGE_BYTES
from schoolhouse_wire.v1 import teacher_pb2

pytestmark = pytest.mark.usefixtures("no_segments")


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
        with (
            sh.connect(server.url) as shared,
            sh.connect(server.url, transport=sh.Transport(shared_memory=False)) as streamed,
        ):
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

    def create(*args, **kwargs):
        segment = made(*args, **kwargs)
        offer = teacher_pb2.SharedMemory.FromString(segment.offer.SerializeToString())
        change(offer)
        segment.offer = offer
        return segment

    monkeypatch.setattr(shared_memory, "create", create)
    with serve(Sized()) as server, sh.connect(server.url) as teacher:
        assert teacher.describe().transport.startswith(
            "stream: the replica is on another machine or its memory cannot be opened: "
        )
        assert ask(teacher, 100_000, 3).result(20)[""].eq(3).all()
        segments.clear()
        assert soon(lambda: memfds() == (0, 0))  # dropped by the replica although the session goes on
        assert ask(teacher, 100_000, 4).result(20)[""].eq(4).all()


def test_switched_off_on_either_side():
    with serve(Sized(), shared_memory_bytes=0) as server, sh.connect(server.url) as teacher:
        assert teacher.describe().transport == "stream: the replica offers no shared memory"
        assert ask(teacher, 100_000, 3).result(20)[""].eq(3).all()
    with serve(Sized()) as server, sh.connect(server.url, transport=sh.Transport(shared_memory=False)) as teacher:
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
        sh.connect("grpc://127.0.0.1:1/x", transport=sh.Transport(shared_memory=1))


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
        session = teacher.open_sessions()[0]
        assert len(session._same_host.segment._blocks._taken) <= 16  # told with the next replies
        assert len(segments[0]._blocks._taken) <= 24


def test_describe_says_how_many_replies_found_no_room():
    with serve(Sized(), shared_memory_bytes=4 * MIB) as server, sh.connect(server.url) as teacher:
        kept = [ask(teacher, 500_000, i).result(20) for i in range(5)]
        assert teacher.describe().transport == "shared memory, and the stream for 3 replies that found no room there"
        assert [features[""][0].item() for features in kept] == [0, 1, 2, 3, 4]
