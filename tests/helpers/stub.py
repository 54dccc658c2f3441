"""A client of sessions that says what it likes."""

import grpc
from ends import Said
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.same_host import shared_memory
from schoolhouse_wire.v1 import teacher_pb2


class Stub:
    """A client that says what it likes."""

    def __init__(self, server, shared_memory=True, options=(), **opening):
        self.outbox = Said()
        options = [*channel.CLIENT_OPTIONS, *options]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.port}", options=options)
        call = self.channel.stream_stream(
            channel.SESSION_METHOD,
            request_serializer=framing.write_message,
            response_deserializer=lambda data: framing.read_message(teacher_pb2.ServerMessage, data),
        )
        self.answers = call(iter(self.outbox), timeout=30)
        opening = {"protocol": channel.PROTOCOL, "teacher": "teacher", "shared_memory": shared_memory} | opening
        self.say(open=teacher_pb2.Open(**opening))
        self.offer = next(self.answers).opened.shared_memory

    def say(self, **message):
        self.outbox.put(iter([teacher_pb2.ClientMessage(**message)]))

    def attach(self, **message):
        """Open the segment that was offered, and say so with the proof."""
        self.segment = shared_memory.attach(self.offer, Said(), checksums=False)
        self.say(attached=teacher_pb2.Attached(attached=True, proof=self.segment.proof, **message))

    def ask(self, request_id, payload, header):
        tap = teacher_pb2.Tap(module="", side=teacher_pb2.Tap.OUTPUT)
        self.say(call=teacher_pb2.Call(request_id=request_id, taps=[tap], timeout_s=20, inputs=header, payload=payload))

    def call(self, request_id, payload, header):
        self.ask(request_id, payload, header)
        return next(answer for answer in self.answers if answer.WhichOneof("kind"))


def inline(value):
    """Fields of a call whose inputs stand in it."""
    outgoing = framing.Outgoing(value, limits=Limits(), snapshot=True)
    return {"inputs": outgoing.header, "payload": outgoing.payload}


def to_payload(value):
    """The same for `Stub.call`."""
    made = inline(value)
    return {"payload": made["payload"], "header": made["inputs"]}
