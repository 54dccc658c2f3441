"""A replica that answers as a test likes."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.v1 import directory_pb2, teacher_pb2


@contextlib.contextmanager
def bad_replica(revision, answers, modules=("",)):
    """`answers(call)` gives the messages for a call; None: the session ends.

    Yields what a directory says of it, and the calls that came. It is a directory of itself, too.
    """
    calls = []

    def session(messages, _context):
        for message in messages:
            if message.HasField("open"):
                yield teacher_pb2.ServerMessage(opened={"revision": revision, "max_in_flight": 8})
            elif message.HasField("call"):
                calls.append(message.call)
                said = answers(message.call)
                if said is None:
                    return
                yield from said

    described = teacher_pb2.DescribeResponse(
        teacher="teacher", revision=revision, modules=modules, max_request_bytes=1 << 20, max_in_flight=8
    )
    itself = directory_pb2.ReplicaSet(teacher="teacher", replicas=[directory_pb2.Replica(revision=revision)])
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
    listing = {
        "ListTeachers": grpc.unary_unary_rpc_method_handler(
            lambda *_: directory_pb2.ListTeachersResponse(teachers=[itself]),
            response_serializer=directory_pb2.ListTeachersResponse.SerializeToString,
        )
    }
    for service, found in {"TeacherService": methods, "DirectoryService": listing}.items():
        handler = grpc.method_handlers_generic_handler(f"schoolhouse.v1.{service}", found)
        server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        address = f"127.0.0.1:{port}"
        yield directory_pb2.Replica(id="bad", address=address, revision=revision), calls
    finally:
        server.stop(0).wait(10)


def url_of(replica):
    """What `connect` takes, to ask this replica alone."""
    return f"grpc://{replica.address}/teacher"


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
