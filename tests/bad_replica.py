"""A replica that answers as a test likes."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch
from schoolhouse_wire import channel, framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2


@contextlib.contextmanager
def bad_replica(revision, answers):
    """`answers(call)` gives the messages for a call. Yields what a directory says of it, and the calls that came."""
    calls = []

    def session(messages, _context):
        for message in messages:
            if message.HasField("open"):
                yield teacher_pb2.ServerMessage(opened={"revision": revision, "max_in_flight": 8})
            elif message.HasField("call"):
                calls.append(message.call)
                yield from answers(message.call)

    described = teacher_pb2.DescribeResponse(
        teacher="teacher", revision=revision, modules=[""], max_request_bytes=1 << 20, max_in_flight=8
    )
    methods = {
        "Session": grpc.stream_stream_rpc_method_handler(
            session,
            request_deserializer=lambda data: framing.read_message(teacher_pb2.ClientMessage, data),
            response_serializer=framing.write_message,
        ),
        "Describe": grpc.unary_unary_rpc_method_handler(
            lambda *_: described, response_serializer=teacher_pb2.DescribeResponse.SerializeToString
        ),
    }
    server = grpc.server(ThreadPoolExecutor(8), options=channel.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("schoolhouse.v1.TeacherService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        address = f"127.0.0.1:{port}"
        yield directory_pb2.Replica(id="bad", address=address, revision=revision), calls
    finally:
        server.stop(0).wait(10)


def answered(call, value=-1.0, **changes):
    """A reply to a call whose feature is full of `value`; `changes` are of its fields."""
    outgoing = framing.Outgoing([torch.full((2,), value)], limits=Limits(), snapshot=True)
    said = {
        "request_id": call.request_id,
        "revision": call.revision,
        "taps": call.taps,
        "input_digest": call.payload.digest,
        "features": outgoing.header,
        "payload": outgoing.payload,
    }
    return teacher_pb2.ServerMessage(reply=teacher_pb2.Reply(**(said | changes)))
