"""What a call asks for: the inputs of a forward, or a head; and what it is told of an error."""

import logging
from typing import Any

import torch
from schoolhouse.errors import (
    PermissionDeniedError,
    ProtocolError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherMemoryError,
)
from schoolhouse.wanted import Wanted
from schoolhouse_wire.codec import Arguments, pack
from schoolhouse_wire.limits import Limits

from schoolhouse_server.device import lacks_memory
from schoolhouse_server.engine import Engine
from schoolhouse_server.jobs import Answer

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


def head_answer(engine: Engine, wanted: Wanted, inputs: Arguments, *, allowed: bool) -> Answer:
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


def as_told(error: BaseException) -> BaseException:
    """What a client is told of an error: that the host found no memory for its request is no fault of the server's."""
    if isinstance(error, SchoolhouseError) or not lacks_memory(error):
        return error
    _log.warning("there was no memory for a request: %s", error)
    return TeacherMemoryError("the teacher's host has no memory for this request, or for its features; ask for less")


def check_revision(asked: str, engine: Engine) -> None:
    """Raises `RevisionChangedError` for another one than the engine's; the empty one stands for any."""
    if asked not in ("", engine.description.revision):
        raise RevisionChangedError(
            f"revision {asked} was asked for; this replica has {engine.description.revision}",
            choices=(engine.description.revision,),
        )
