"""What a call asks for: the inputs of a forward, or a head; and what none may ask for."""

from collections.abc import Sized
from typing import Any

import torch
from schoolhouse.errors import ProtocolError, RevisionChangedError
from schoolhouse.wanted import Wanted
from schoolhouse_wire.codec import Arguments, pack
from schoolhouse_wire.limits import MAX_MODULE_NAME, MAX_NAME, MAX_RELEASED, MAX_TAPS, Limits
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.engine import Engine
from schoolhouse_server.jobs import Answer

_HEAD_LIMITS = Limits(max_payload_bytes=16 << 30)


def inputs_of(value: Any) -> tuple[Arguments, torch.Tensor | None]:
    """The arguments of a forward, and the mask of the positions; raises `ProtocolError` for what is neither."""
    inputs, mask = value if type(value) is tuple and len(value) == 2 else (value, None)
    if not isinstance(inputs, Arguments):
        raise ProtocolError("a call's inputs are not the arguments of a forward")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool):
        raise ProtocolError("a call's positions are not a bool mask")
    return inputs, mask


def head_answer(engine: Engine, wanted: Wanted, inputs: Arguments) -> Answer:
    """A head, or its digest, by which a client tells whether the one that it has is the same."""
    heads = wanted.heads()
    if len(wanted.taps) != 1 or len(heads) != 1:
        raise ProtocolError("a call for a head must name one, as the encoding of its only tap")
    [(tap, name)] = heads.items()
    head = engine.teacher.head(name, tap.module)
    value = head.digest if inputs.kwargs.get("digest_only") else head.to_value()
    return Answer(pack([value]), engine.description.revision, _HEAD_LIMITS)


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
