"""What one token can make a replica hold: shared memory, copies of frames and heads count, and go back when idle."""

import os

import grpc
import pytest
import schoolhouse as sh
import torch
from ends import loop
from memfd import MIB, memfds, soon
from schoolhouse.taps import HEAD, Tap
from schoolhouse.teachers.query import Wanted
from schoolhouse_server import serve
from schoolhouse_server.session import tidying
from schoolhouse_wire import memory
from schoolhouse_wire.encodings import Hidden
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from stub import Stub, inline, to_payload
from torch import nn

pytestmark = pytest.mark.usefixtures("no_segments")


class Tall(nn.Module):
    """One MiB for each row `[1]`, all of it the row's number."""

    def forward(self, x):
        return x.repeat(1, MIB // 4)


class Headed(nn.Module):
    """Its head has 4 MiB and a bias."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(8, 256), nn.Linear(256, 4096, bias=False)

    def forward(self, x):
        return self.lm_head(self.body(x))


def feature(teacher, number):
    return teacher.submit((torch.full((1, 1), float(number)),), {}, [""]).result(20)[""]


def held(segment):
    """The bytes that the system has provided for a segment."""
    return os.stat(f"/proc/self/fd/{segment.offer.fd}").st_blocks * 512


@pytest.mark.parametrize("proof", [b"", bytes(32)])
@pytest.mark.parametrize("pipes", [False, True])
def test_who_only_says_that_it_has_attached_shared_memory_gets_none(proof, pipes, segments):
    with serve(Tall()) as server:
        stub = Stub(server)
        proof = proof and stub.offer.nonce  # what travels proves nothing
        stub.say(attached=teacher_pb2.Attached(attached=True, pipes=pipes, proof=proof))
        with pytest.raises(grpc.RpcError, match="attached shared memory, and cannot tell what stands in it"):
            list(stub.answers)
        segments.clear()
        assert soon(lambda: memfds() == (0, 0))
        honest = Stub(server)
        honest.attach()
        answer = honest.call(1, **to_payload(Arguments((torch.ones(1, 1),))))
        assert answer.reply.payload.shared.nbytes == MIB


def test_shared_memory_that_clients_keep_is_within_the_bounds_and_the_rest_comes_over_the_stream():
    bounds = {"max_job_unsent_bytes": 8 * MIB, "max_unsent_bytes": 12 * MIB, "shared_memory_bytes": 6 * MIB}
    with serve(Tall(), **bounds) as server:
        shared = server._context.shared_bytes
        teachers = [sh.connect(server.url, job=job) for job in ("one", "one", "two", "three")]
        kept = [[feature(teacher, i) for i in range(1, 9)] for teacher in teachers]
        for features in kept:
            assert all(value.eq(i).all() for i, value in enumerate(features, 1))
        assert dict(shared._payers) == {"one": 8 * MIB, "two": 4 * MIB}
        for job, offered in (("one", False), ("two", False)):  # the replica's bound is reached
            assert (Stub(server, job=job).offer.nbytes > 0) == offered
        del kept, features
        teachers.pop().close()
        teachers.pop().close()
        assert soon(lambda: shared.nbytes == 8 * MIB)
        assert Stub(server, job="two").offer.nbytes
        assert not Stub(server, job="one").offer.nbytes
        with sh.connect(server.url, job="one") as teacher:
            assert feature(teacher, 3).eq(3).all()
        [teacher.close() for teacher in teachers]
        assert soon(lambda: shared.nbytes == 0)


def test_requests_in_shared_memory_count_too():
    with serve(nn.Flatten(), shared_memory_bytes=16 * MIB) as server, sh.connect(server.url, job="one") as teacher:
        teacher.submit((torch.zeros(1, MIB // 2),), {}, [""]).result(20)
        assert server._context.shared_bytes.nbytes == 4 * MIB  # 2 MiB each way


def test_memory_of_a_segment_that_lies_idle_goes_back():
    class Counts:
        nbytes = 0

        def take(self, nbytes):
            self.nbytes += nbytes
            return self.nbytes <= 8 * MIB

        add = take

    counts = Counts()
    segment = shared_memory.create(64 * MIB, Outbox(loop()), checksums=False, budget=counts)
    first, second = (segment.take(4 * MIB) for _ in range(2))
    for offset in (first, second):
        segment.copy(offset, memoryview(bytearray(b"x" * (4 * MIB))))
    assert segment.take(4 * MIB) is None
    counts.nbytes = 8 * MIB
    segment.give_back_if_idle()  # blocks were taken since the last call
    segment.free(second)
    assert held(segment) >= 8 * MIB
    segment.give_back_if_idle()
    assert 4 * MIB <= held(segment) < 5 * MIB
    assert counts.nbytes == 4 * MIB
    assert bytes(segment._view[first : first + 3]) == b"xxx"
    segment.free(first)
    segment.give_back_if_idle()
    assert held(segment) <= MIB
    assert counts.nbytes == 0
    assert segment.take(4 * MIB) == first


def test_an_idle_replica_gives_memory_back_once_after_each_spell_of_work(segments, monkeypatch):
    monkeypatch.setattr(tidying, "EVERY_S", 0.05)
    trims, trim = [], memory.give_back_freed
    monkeypatch.setattr(memory, "give_back_freed", lambda: trims.append(1) or trim())
    # Of such a small segment the block is large, so that the client gives it back at once.
    with serve(Tall(), shared_memory_bytes=16 * MIB) as server, sh.connect(server.url) as teacher:
        for spell in (1, 2):
            assert feature(teacher, spell).eq(spell).all()
            assert soon(lambda: not segments[0]._blocks._taken and server._context.shared_bytes.nbytes == 0)
            assert soon(lambda spell=spell: len(trims) >= spell)
        looks = server._context.tidying
        before = looks._trimmed
        assert soon(lambda: looks._seen == before)
        assert len(trims) <= 3  # not at every look


def test_the_copies_of_a_frame_that_nobody_reads_count():
    with serve(Tall()) as server:
        stubs = [Stub(server, shared_memory=False, job="deaf") for _ in range(3)]
        for number, stub in enumerate(stubs):
            stub.say(call=call(**inline(Arguments((torch.full((32, 1), float(number)),)))))
        copies = 2 * (2 * MIB)
        assert soon(lambda: of_job(server, "deaf") >= 3 * (32 * MIB + copies))
        assert of_job(server, "deaf") < 3 * (32 * MIB + copies + 1000)
        assert server.unsent.nbytes < 3 * (32 * MIB + 1000)  # others have their room all the same
        for stub in stubs[1:]:
            stub.answers.cancel()
        assert soon(lambda: of_job(server, "deaf") < 32 * MIB + copies + 1000)
        for answer in stubs[0].answers:
            if getattr(answer, "digest", b""):
                break
        assert soon(lambda: of_job(server, "deaf") == server.unsent.nbytes == 0)


def of_job(server, job):
    """Its unsent bytes."""
    return server.unsent._jobs.get(f"teacher/{job}", 0)


def call(request_id=1, taps=(teacher_pb2.Tap(side=teacher_pb2.Tap.OUTPUT),), timeout_s=20.0, **more):
    return teacher_pb2.Call(request_id=request_id, taps=taps, timeout_s=timeout_s, **more)


def test_heads_that_nobody_reads_are_within_the_bound():
    wanted = Wanted((Tap("", HEAD),), (Hidden(head="lm_head"),)).to_wire()
    with serve(Headed(), allow_head=True, max_job_unsent_bytes=6 * MIB) as server:
        stub = Stub(server, shared_memory=False)
        for i in range(1, 5):
            stub.say(call=call(i, wanted, 20.0 if i < 4 else 0.2, **inline(Arguments())))
        assert soon(lambda: server.unsent.nbytes >= 4 * MIB)
        with sh.connect(server.url, job="other") as other:
            assert other.submit((torch.ones(1, 8),), {}, [""]).result(20)[""].shape == (1, 4096)
        assert 4 * MIB <= server.unsent.nbytes <= 8 * MIB + 1000  # one head, and the copies of its frame
        answered = set()
        for answer in stub.answers:
            if (failure := getattr(answer, "failure", None)) is not None and failure.request_id:
                assert failure.code == teacher_pb2.Failure.TIMEOUT
                answered.add(failure.request_id)
            elif getattr(answer, "digest", b""):
                answered.add(answer.request_id)
            if len(answered) == 4:
                break
        assert soon(lambda: server.unsent.nbytes == 0)
