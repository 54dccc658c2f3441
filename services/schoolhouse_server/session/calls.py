"""What a call asks for: the inputs of a forward, or a head; what none may ask for, and what it is told."""

import logging
from collections.abc import Callable, Sized
from typing import Any

import torch
from schoolhouse.errors import (
    PermissionDeniedError,
    ProtocolError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherMemoryError,
)
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire import background
from schoolhouse_wire.limits import MAX_MODULE_NAME, MAX_NAME, MAX_RELEASED, MAX_TAPS, Limits
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments, pack

from schoolhouse_server.device.device import lacks_memory
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.engine.jobs import Answer
from schoolhouse_server.session.quotas import Sharing

_log = logging.getLogger(__name__)
_HEAD_LIMITS = Limits(max_payload_bytes=16 << 30)


def inputs_of(value: Any) -> tuple[Arguments, torch.Tensor | None]:
    """The arguments of a forward, and the mask of the positions; raises `ProtocolError` for what is neither."""
    inputs, mask = value if type(value) is tuple and len(value) == 2 else (value, None)
    if not isinstance(inputs, Arguments):
        raise ProtocolError("a call's inputs are not the arguments of a forward")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool):
        raise ProtocolError("a call's positions are not a bool mask")
    return inputs, mask


def answer_head(
    engine: Engine, wanted: Wanted, inputs: Arguments, done: Callable[[Answer | BaseException], None], *, allowed: bool
) -> None:
    """Have `done` get a head, from a thread of its own: it waits for the forward that runs, and who asks does not."""

    def run() -> None:
        try:
            found: Answer | BaseException = _head_answer(engine, wanted, inputs, allowed=allowed)
        except Exception as err:
            found = err
        done(found)

    background.thread(run, name="schoolhouse-head", on_death=done).start()


def _head_answer(engine: Engine, wanted: Wanted, inputs: Arguments, *, allowed: bool) -> Answer:
    """A head, or its digest, by which a client tells whether the one that it has is the same.

    Raises:
        PermissionDeniedError: it is not `allowed` to give heads out.
        ProtocolError: it is no call for one head.
    """
    if not allowed:
        raise PermissionDeniedError(
            f"the head of {engine.description.name!r} is not given out, so encodings.hidden() cannot be used; choose "
            "another encoding, or ask who runs the server for serve(allow_head=True), in a pool's file `security: "
            "{allow_head: true}`"
        )
    heads = wanted.heads()
    if len(wanted.taps) != 1 or len(heads) != 1:
        raise ProtocolError("a call for a head must name one, as the encoding of its only tap")
    [(tap, name)] = heads.items()
    engine.check()  # a forward that does not return keeps the module, and a head waits for it
    head = engine.teacher.head(name, tap.module)
    value = head.digest if inputs.kwargs.get("digest_only") else head.to_value()
    return Answer(pack([value]), engine.description.revision, _HEAD_LIMITS)


def opened_by(engine: Engine, sharing: Sharing, limits: Limits) -> teacher_pb2.Opened:
    """What a client is told as its session begins, but for shared memory."""
    return teacher_pb2.Opened(
        revision=engine.description.revision,
        max_in_flight=sharing.max_in_flight,
        max_request_bytes=limits.max_payload_bytes,
        max_bytes_in_flight=sharing.max_job_bytes,
        lease_s=sharing.lease_s,
    )


def reply_of(request_id: int, digest: bytes, wanted: Wanted, answer: Answer, header: bytes) -> teacher_pb2.Reply:
    """A reply that says what it answers, so that it can be held against what was asked."""
    return teacher_pb2.Reply(
        request_id=request_id, revision=answer.revision, taps=wanted.to_wire(), input_digest=digest, features=header
    )


def as_told(error: BaseException) -> BaseException:
    """What a client is told of an error: that the host found no memory for its request is no fault of the server's."""
    if isinstance(error, SchoolhouseError) or not lacks_memory(error):
        return error
    _log.warning("there was no memory for a request: %s", error)
    return TeacherMemoryError("the teacher's host has no memory for this request, or for its features; ask for less")


def check_open(message: teacher_pb2.Open) -> None:
    """Raises `ProtocolError` for names longer than any; that of the job is the member's to check."""
    _check_length("Open", "teacher's name", message.teacher, MAX_NAME)
    _check_length("Open", "revision", message.revision, MAX_NAME)


def check_describe(request: teacher_pb2.DescribeRequest | ProtocolError) -> None:
    """Raises `ProtocolError` for a request that cannot be parsed, or a name longer than any."""
    if isinstance(request, ProtocolError):
        raise request
    _check_length("Describe", "teacher's name", request.teacher, MAX_NAME)


def check_call(call: teacher_pb2.Call) -> None:
    """Raises `ProtocolError` for more taps, or longer names, than a call may have."""
    if len(call.taps) > MAX_TAPS:
        raise ProtocolError(f"a call came with {len(call.taps)} taps; {MAX_TAPS} are allowed")
    for tap in call.taps:
        _check_length("a call", "tap", tap.module, MAX_MODULE_NAME)
        if tap.HasField("encoding"):
            _check_length("a call", "head", tap.encoding.hidden.head, MAX_MODULE_NAME)
    _check_length("a call", "revision", call.revision, MAX_NAME)
    _check_length("a call", "traceparent", call.traceparent, MAX_NAME)


def check_released(offsets: Sized) -> None:
    """Raises `ProtocolError` for more blocks at once than a client can hold."""
    if len(offsets) > MAX_RELEASED:
        raise ProtocolError(f"a message came that releases {len(offsets)} blocks; {MAX_RELEASED} are allowed")


def _check_length(where: str, what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise ProtocolError(f"{where} came with a {what} of {len(text)} characters; {longest} are allowed")


def check_revision(asked: str, engine: Engine) -> None:
    """Raises `RevisionChangedError` for another one than the engine's; the empty one stands for any."""
    if asked not in ("", engine.description.revision):
        raise RevisionChangedError(
            f"revision {asked} was asked for; this replica has {engine.description.revision}",
            choices=(engine.description.revision,),
        )
