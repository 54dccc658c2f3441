"""Bytes that change on their way never reach a step, over any transport; features say what made them."""

import contextlib
import random

import pytest
import schoolhouse as sh
import torch
import xxhash
from google.protobuf.message import DecodeError
from models import converted
from schoolhouse import errors
from schoolhouse.remote.session import Session
from schoolhouse.teachers.fingerprint import revision_of
from schoolhouse_server import serve
from schoolhouse_server.session.server_session import ServerSession
from schoolhouse_wire import framing
from schoolhouse_wire.framing import Frame, read_message
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.outbox import Elsewhere
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values import codec
from stub import Stub
from torch import nn

TAP = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
SMALL, LARGE = 16, 700_000  # numbers: within a message, and in frames or a block


class Negative(nn.Module):
    """Returns as much as it gets."""

    def forward(self, x):
        return -x


def changed(messages, segment, at):
    """Messages with one bit of their payload flipped, at that part of it."""
    for message in messages:
        if isinstance(message, Elsewhere):
            yield message
        elif isinstance(message, bytes):
            data = bytearray(message)
            frame = read_message(teacher_pb2.ServerMessage, message)
            assert isinstance(frame, Frame)
            data[len(data) - 1 - int((1 - at) * (frame.data.nbytes - 1))] ^= 1
            yield bytes(data)
        else:
            payload = getattr(message, message.WhichOneof("kind")).payload
            place = int(at * ((len(payload.data) or payload.shared.nbytes) - 1))
            if payload.HasField("shared"):
                segment._view[payload.shared.offset + place] ^= 1
            elif payload.data:
                data = bytearray(payload.data)
                data[place] ^= 1
                payload.data = bytes(data)
            yield message


WAYS = {"message": (SMALL, sh.Transport(shared_memory=False)), "frames": (LARGE, sh.Transport(shared_memory=False))}
WAYS |= {
    "shared memory": (LARGE, sh.Transport(checksums=True)),
    "small beside shared memory": (SMALL, sh.Transport(checksums=True)),
}


@pytest.mark.parametrize("at", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("side", ["request", "reply"])
@pytest.mark.parametrize("way", WAYS)
def test_a_bit_that_changes_on_the_way_is_found(way, side, at, monkeypatch):
    size, transport = WAYS[way]
    owner, name = (Session, "_messages") if side == "request" else (ServerSession, "_reply")
    original = getattr(owner, name)

    def flipping(self, *args):
        segment = self._same_host.segment
        return changed(original(self, *args), segment, at)

    x = torch.arange(1.0, size + 1)
    with serve(Negative()) as server:
        monkeypatch.setattr(owner, name, flipping)
        with sh.connect(server.url, transport=transport) as teacher:
            assert isinstance(teacher.submit((x,), {}, [""]).exception(20), errors.CorruptPayloadError)
            assert teacher.describe().transport.startswith("shared memory" if transport.checksums else "stream")
        served = server.engines["teacher"].served
        assert (served == 0) == (side == "request")  # a request that was changed is not computed at all
        monkeypatch.setattr(owner, name, original)
        with sh.connect(server.url, transport=transport) as teacher:
            assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""], -x)


CHANGES = {
    "id": lambda call: setattr(call, "request_id", call.request_id ^ 4),
    "tap": lambda call: setattr(call.taps[0], "module", "another"),
    "revision": lambda call: setattr(call, "revision", "another"),
    "deadline": lambda call: setattr(call, "timeout_s", 1e-9),
    "structure": lambda call: setattr(call, "inputs", call.inputs[:-1]),
}


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("what", CHANGES)
def test_a_call_that_changes_on_the_way_is_sent_again(what, size, monkeypatch):
    original, changed_ones = Session._messages, []

    def changing(self, *args):
        for message in original(self, *args):
            if not changed_ones and isinstance(message, teacher_pb2.ClientMessage) and message.HasField("call"):
                CHANGES[what](message.call)
                changed_ones.append(message)
            yield message

    x = torch.arange(1.0, size + 1)
    with serve(Negative()) as server, sh.connect(server.url) as teacher:
        monkeypatch.setattr(Session, "_messages", changing)
        assert torch.equal(teacher.submit((x,), {}, [""]).result(20)[""], -x)
        assert changed_ones
        assert server.engines["teacher"].served == 1


def test_any_bit_of_a_call_that_changes_is_found():
    outgoing = framing.Outgoing(codec.Arguments((torch.ones(SMALL),)), limits=Limits(), snapshot=False)
    call = teacher_pb2.Call(
        request_id=7, taps=[TAP], revision="r", timeout_s=9.0, inputs=outgoing.header, payload=outgoing.payload
    )
    framing.add_checksum(call)
    sent = call.SerializeToString()
    at = sent.index(outgoing.payload.data)
    assert framing.unchanged(teacher_pb2.Call.FromString(sent)) == call
    for bit in range(8 * len(sent)):
        if bit // 8 in range(at, at + len(outgoing.payload.data)):
            continue  # it has a digest of its own
        flipped = bytearray(sent)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(DecodeError):
            arrived = teacher_pb2.Call.FromString(bytes(flipped))
            if arrived.checksum:  # else that is what changed, and the rest is as it was
                with pytest.raises(errors.CorruptPayloadError):
                    framing.unchanged(arrived)


def test_a_step_is_not_computed_from_what_was_corrupt(monkeypatch):
    original = ServerSession._reply
    student = nn.Linear(SMALL, SMALL)
    with serve(Negative()) as server, sh.connect(server.url) as teacher:
        model = converted(student, teacher, nn.MSELoss())
        monkeypatch.setattr(ServerSession, "_reply", lambda self, *args: changed(original(self, *args), None, 0.5))
        model(torch.ones(2, SMALL))
        with pytest.raises(errors.CorruptPayloadError):
            model.compute_kd_loss()
        assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    "transport", [sh.Transport(), sh.Transport(checksums=True), sh.Transport(shared_memory=False)], ids=str
)
def test_features_carry_the_digest_of_the_inputs_that_made_them(size, transport):
    """XXH3-128 over the bundle and the bytes, computed here."""
    x = torch.arange(1.0, size + 1)
    header = codec.pack(codec.Arguments((x,), {})).header
    with serve(Negative()) as server, sh.connect(server.url, transport=transport) as teacher:
        features = teacher.submit((x,), {}, [""]).result(20)
        assert features.input_digest == xxhash.xxh3_128_digest(header + x.numpy().tobytes())
        assert features.revision == teacher.describe().revision == revision_of(server.engines["teacher"].teacher.module)


def test_a_call_for_another_revision_is_not_computed():
    outgoing = framing.Outgoing(codec.Arguments((torch.ones(SMALL),)), limits=Limits(), snapshot=False)
    with serve(Negative()) as server:
        stub = Stub(server)
        asked = teacher_pb2.Call(
            request_id=1, taps=[TAP], revision="another", inputs=outgoing.header, payload=outgoing.payload
        )
        stub.say(call=asked)
        failure = next(stub.answers).failure
        assert failure.code == teacher_pb2.Failure.REVISION_CHANGED
        assert [*failure.choices] == [server.engines["teacher"].description.revision]
        assert server.engines["teacher"].served == 0
        stub.channel.close()


class Model(nn.Module):
    def __init__(self, slope=0.1, buffer=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc, self.act = nn.Linear(6, 6), nn.LeakyReLU(slope)
        self.register_buffer("scale", torch.tensor(buffer))


class Renamed(Model):
    pass


def test_the_revision_tells_each_bit_of_the_weights():
    """Of parameters and buffers, and of the settings that the modules tell of themselves."""
    known = revision_of(Model())
    assert known == revision_of(Model())
    assert known != revision_of(Model(slope=0.2))
    assert known != revision_of(Model(buffer=1.0000001))
    assert known != revision_of(Renamed())
    assert known != revision_of(Model().double())
    rng = random.Random(0)
    for _ in range(200):
        model = Model()
        tensor = rng.choice([model.fc.weight, model.fc.bias])
        flat = tensor.detach().view(torch.int32).flatten()
        flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(31)
        assert revision_of(model) != known
