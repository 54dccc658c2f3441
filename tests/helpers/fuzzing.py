"""Sessions made of any bytes: messages as a client would send them, changed in many ways; and a server for them."""

import collections
import contextlib
import logging
import queue
import threading

import grpc
import torch
import xxhash
from ends import Ends
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.errors import SchoolhouseError
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from torch import nn

LIMITS = Limits(max_payload_bytes=1 << 20)
LAST = (1 << 40) + 1  # the id of a call that is never changed: it is answered, or the session has ended
_NUMBERS = (0, 1, 2, 63, 64, 127, 128, 4096, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
_REALS = (0.0, -1.0, 1e-300, 0.5, 1e300, float("inf"), float("-inf"), float("nan"))


class Source:
    """Choices made by bytes; 0 once they are used up."""

    def __init__(self, data):
        self._data, self._at = data, 0

    @property
    def left(self):
        return max(len(self._data) - self._at, 0)

    def take(self, count):
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def below(self, bound):
        size = 1 if bound <= 256 else 4
        return int.from_bytes(self.take(size), "little") % bound

    def one_of(self, items):
        return items[self.below(len(items))]


class Tiny(nn.Module):
    """A teacher that costs nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 8)

    def forward(self, x, scale=1.0, **others):
        return {"logits": self.fc(self.body(x)) * scale, "others": others}


def _call(request_id, value, *taps, **fields):
    outgoing = framing.Outgoing(value, limits=LIMITS, snapshot=True)
    message = teacher_pb2.Call(
        request_id=request_id, taps=taps, inputs=outgoing.header, payload=outgoing.payload, timeout_s=5, **fields
    )
    return teacher_pb2.ClientMessage(call=message), list(outgoing.frames(request_id))


def _tap(module="", side=teacher_pb2.Tap.OUTPUT, **encoding):
    return teacher_pb2.Tap(module=module, side=side, encoding=teacher_pb2.Encoding(**encoding) if encoding else None)


def _templates():
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    nested = Arguments(
        (x,), {"scale": 2.0, "a": [1, (None, "b")], "c": {"d": x[0], 3: 1j, (1, "e"): 2**70}, "mask": mask}
    )
    topk = {"topk": teacher_pb2.TopK(k=2, temperature=1.0)}
    sampled = {"sampled": teacher_pb2.Sampled(n=5, temperature=1.0, seed=7)}
    hidden = {"hidden": teacher_pb2.Hidden(head="fc"), "positions": True}
    calls = [
        _call(1, Arguments((x,)), _tap()),
        _call(2, nested, _tap("body"), _tap("fc", teacher_pb2.Tap.INPUT)),
        _call(3, Arguments((x,)), _tap("fc", **topk)),
        _call(4, Arguments((x,)), _tap("fc", **sampled)),
        _call(5, (Arguments((x,)), mask), _tap("fc", **hidden)),
        _call(6, Arguments((x,)), _tap("fc", cast=11), _tap("body", per_row=3), traceparent="00-" + "1" * 40),
        _call(7, Arguments((), {"digest_only": True}), _tap("fc", teacher_pb2.Tap.HEAD, hidden={"head": "fc"})),
        _call(8, Arguments((torch.randn(50, 100, 4),)), _tap("body")),
    ]
    shared = teacher_pb2.ClientMessage()
    shared.CopyFrom(calls[0][0])
    shared.call.payload.shared.offset, shared.call.payload.shared.nbytes = 4096, 96
    small = [
        teacher_pb2.ClientMessage(cancel={"request_id": 1}),
        teacher_pb2.ClientMessage(renew={}),
        teacher_pb2.ClientMessage(attached={"attached": True}),
        teacher_pb2.ClientMessage(released=[4096, 8192]),
        shared,
    ]
    return [message for message, _ in calls] + small, [frame for _, frames in calls for frame in frames]


MESSAGES, FRAMES = _templates()
OPEN = teacher_pb2.ClientMessage(
    open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="teacher", job="fuzz", shared_memory=True)
)
LAST_CALL, _ = _call(LAST, Arguments((torch.ones(1, 1, 4),)), _tap())


def session_of(source, most=64):
    """The serialized messages of one session."""
    opening = OPEN.SerializeToString()
    found = [opening if source.below(8) else changed_bytes(source, opening)]
    while source.left and len(found) < most:
        found.append(message_of(source))
    return found


def message_of(source):
    """One serialized message: as it should be, changed in a field or in its bytes, or any bytes."""
    kind = source.below(64)  # few are of bytes that may be no message: these end the session
    if kind == 0:
        return source.take(source.below(200))
    if kind in (1, 2):
        return changed_bytes(source, source.one_of([OPEN, *MESSAGES]).SerializeToString())
    if kind < 10:
        return _frame(source)
    if kind < 14:
        return source.one_of(FRAMES)
    message = teacher_pb2.ClientMessage()
    message.CopyFrom(source.one_of(MESSAGES))
    if kind < 40 and message.HasField("call"):
        _change_inputs(source, message.call)
    elif kind < 60:
        _change_field(source, message)
    return message.SerializeToString()


def changed_bytes(source, data):
    """Bytes set, flipped, inserted, taken out, or cut off."""
    changed = bytearray(data)
    for _ in range(1 + source.below(4)):
        at, how = source.below(len(changed) + 1), source.below(5)
        if how == 0:
            changed[at : at + 1] = source.take(1)
        elif how == 1 and at < len(changed):
            changed[at] ^= 1 << source.below(8)
        elif how == 2:
            changed[at:at] = source.take(source.below(12))
        elif how == 3:
            del changed[at : at + source.below(12)]
        else:
            changed[at:] = changed[at : at + source.below(64)]
    return bytes(changed)


def _change_inputs(source, call):
    """Another structure, with a digest that fits to it or not; or another payload."""
    how = source.below(4)
    if how == 3:
        call.payload.data = changed_bytes(source, call.payload.data)
    else:
        call.inputs = changed_bytes(source, call.inputs)
    if how and call.payload.digest:
        call.payload.digest = xxhash.xxh3_128_digest(call.inputs + call.payload.data)


def _change_field(source, message):
    """Some field of the message, or of one within it, becomes another."""
    if not message.DESCRIPTOR.fields:
        return
    field = source.one_of(message.DESCRIPTOR.fields)
    if field.message_type is not None and message.ListFields():
        field = source.one_of([found for found, _ in message.ListFields()])
    if field.message_type is not None:
        many = field.is_repeated
        if many and source.below(2):
            getattr(message, field.name).add()
        items = list(getattr(message, field.name)) if many else [getattr(message, field.name)]
        if items:
            _change_field(source, source.one_of(items))
        return
    value = _value(source, field)
    with contextlib.suppress(ValueError):  # an integer that the field does not take
        if field.is_repeated:
            getattr(message, field.name).extend([value] * source.below(300))
        else:
            setattr(message, field.name, value)


def _value(source, field):
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        count = source.one_of((0, 1, 8, 300, 5000))
        data = source.take(8) * (count // 8 + 1)
        return data[:count] if field.type == FieldDescriptor.TYPE_BYTES else data[:count].decode("latin-1")
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return source.one_of(_REALS)
    return source.one_of(_NUMBERS)


def _frame(source):
    data = source.take(source.below(100))
    request_id, offset = source.below(10), source.one_of((*_NUMBERS, 1 << 64, 1 << 69))
    return framing.write_frame(request_id, offset, source.take(source.one_of((0, 0, 16, 5))), [memoryview(data)])


def parse(data):
    """What a receiver does with one message, without a server; whether that took it, and else the error's name."""
    try:
        message = framing.read_message(teacher_pb2.ClientMessage, data)
        if isinstance(message, framing.Frame):
            same_by_the_book(data, message)
        elif message.HasField("call"):
            incoming = framing.Incoming(message.call.inputs, message.call.payload, LIMITS)
            if incoming.complete:
                incoming.value()
            else:
                incoming.add(0, memoryview(bytes(incoming.nbytes)), b"")
        framing.read_message(teacher_pb2.ServerMessage, data)
    except SchoolhouseError as err:
        return type(err).__name__
    return "taken"


def same_by_the_book(data, frame):
    """Frames are read by hand: what protobuf reads of the same bytes is the same, where it reads them."""
    try:
        told = teacher_pb2.ClientMessage.FromString(data).frame
    except DecodeError:
        return
    assert told.request_id == frame.request_id
    assert (told.offset, told.digest, told.data) == (frame.offset, frame.digest, bytes(frame.data))


class Live:
    """A server, and what came of the sessions that it was sent."""

    def __init__(self, timeout_s=20.0, **settings):
        self.server = serve(Tiny(), max_request_bytes=LIMITS.max_payload_bytes, **settings)
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}", options=channel.CLIENT_OPTIONS)
        self._session = self._channel.stream_stream(channel.SESSION_METHOD)
        self.ends = collections.Counter()  # of sessions: "answered", or the status
        self.reasons = collections.Counter()  # what these say, the first word or two
        self.failures = collections.Counter()  # of requests, by code
        self.faults = []  # what the server did not expect
        self.taken = 0  # messages that it has read
        self._count, self._original = threading.Lock(), framing.received

    def __enter__(self):
        framing.received = self._received
        self._handler = _Faults(self.faults)
        logging.getLogger("schoolhouse_server").addHandler(self._handler)
        return self

    def __exit__(self, *_exc):
        framing.received = self._original
        logging.getLogger("schoolhouse_server").removeHandler(self._handler)
        self._channel.close()
        self.server.close()

    def _received(self, kind, data):
        with self._count:
            self.taken += 1
        return self._original(kind, data)

    def send(self, messages):
        """Send a session, and a last call that is as it should be: it is answered, or the session ends, in time."""
        told = queue.SimpleQueue()
        for message in [*messages, LAST_CALL.SerializeToString()]:
            told.put(message)
        answers = self._session(iter(told.get, None), timeout=self._timeout_s)
        try:
            end = "answered" if any(map(self._is_last, answers)) else "OK"
        except grpc.RpcError as err:
            end = err.code().name
            self.reasons[f"{end}: {(err.details() or '')[:40]}"] += 1
        told.put(None)
        answers.cancel()
        self.ends["pipes ended" if end == "OK" and any(map(_leaves_stream, messages)) else end] += 1

    def send_through_pipes(self, messages):
        """The same through the pipes of a session, which begins as it should."""
        told = queue.SimpleQueue()
        told.put(OPEN.SerializeToString())
        answers = self._session(iter(told.get, None), timeout=self._timeout_s)
        offer = framing.read_message(teacher_pb2.ServerMessage, next(answers)).opened.shared_memory
        ours = Ends.of(offer)
        told.put(teacher_pb2.ClientMessage(attached={"attached": True, "pipes": True}).SerializeToString())
        alarm = threading.Timer(self._timeout_s, ours.close)
        alarm.start()
        sender = threading.Thread(target=lambda: all(map(ours.send, [*messages, LAST_CALL.SerializeToString()])))
        sender.start()
        end = "answered" if any(map(self._is_last, ours)) else "OK"
        if end == "OK":  # why, it says on the stream
            try:
                next(answers, None)
            except grpc.RpcError as err:
                end = err.code().name
        alarm.cancel()
        ours.close()
        sender.join()
        told.put(None)
        answers.cancel()
        self.ends[end] += 1

    def _is_last(self, data):
        answer = framing.read_message(teacher_pb2.ServerMessage, data)
        if isinstance(answer, framing.Frame):
            return False
        kind = answer.WhichOneof("kind")
        if kind == "failure":
            self.failures[teacher_pb2.Failure.Code.Name(answer.failure.code)] += 1
        return kind in ("reply", "failure", "wait") and getattr(answer, kind).request_id == LAST

    def wrong(self):
        """What should not have been: untyped failures, ends that are the server's fault or come too late."""
        untyped = [code for code in ("INTERNAL", "CODE_UNSPECIFIED") if self.failures[code]]
        ends = [end for end in ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "OK") if self.ends[end]]
        return [*untyped, *ends, *self.faults]


def _leaves_stream(data):
    """Whether a message says that the session goes on through pipes, which nobody has opened: that ends it."""
    try:
        return teacher_pb2.ClientMessage.FromString(data).attached.pipes
    except DecodeError:
        return False


class _Faults(logging.Handler):
    """Remembers errors that are no answer to a client: their types and where they were raised."""

    def __init__(self, faults):
        super().__init__(logging.ERROR)
        self._faults = faults

    def emit(self, record):
        if len(self._faults) < 20:
            self._faults.append(self.format(record))
