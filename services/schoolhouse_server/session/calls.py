"""What a call asks for, a forward or a head; which calls are refused; and what the replies say."""

import functools
import logging
from collections.abc import Awaitable, Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from schoolhouse.lm_head.head import Head
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.encodings import Sampled
from schoolhouse_wire.errors import (
    MessageTooLargeError,
    PermissionDeniedError,
    ProtocolError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherMemoryError,
    broke_too_often,
)
from schoolhouse_wire.limits import MAX_MODULE_NAME, MAX_NAME, MAX_RELEASED, MAX_TAPS, Limits
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments, Declared, pack

from schoolhouse_server.common.rows import tokens_of
from schoolhouse_server.device.device import lacks_memory
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.engine.jobs import Answer
from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.session.quotas import Sharing

_log = logging.getLogger(__name__)
_KEPT_BYTES = 4 << 10  # of taps; longer ones are not cached
_MAX_DRAWS = 1 << 28  # of all tokens of one request
_HEAD_LIMITS = Limits(max_payload_bytes=16 << 30)


def inputs_of(value: Any) -> tuple[Arguments, torch.Tensor | None]:
    """A call's arguments for forward, and its mask of positions; raises `ProtocolError` for any other value."""
    inputs, mask = value if type(value) is tuple and len(value) == 2 else (value, None)
    if not isinstance(inputs, Arguments):
        raise ProtocolError("a call's inputs are not the arguments of a forward")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool):
        raise ProtocolError("a call's positions are not a bool mask")
    return inputs, mask


def answer_head(
    loop: Loop,
    engine: Engine,
    wanted: Wanted,
    inputs: Arguments,
    done: Callable[[Answer | BaseException, int, Share | None], None],
    *,
    allowed: bool,
    room: Callable[[int], Awaitable[Share | None]],
) -> None:
    """Pass a head, or only its digest, with which a client checks the head that it has cached, or the error to `done`.

    It is got in another thread, as that waits for the forward that runs. Before it is brought to the host, `room` waits
    until its bytes may be unsent, and gives its share of them, which is passed on.
    """

    async def answer() -> None:
        share = None
        try:
            head = await loop.elsewhere(functools.partial(_head, engine, wanted, allowed=allowed))
            digest_only = bool(inputs.kwargs.get("digest_only"))
            if not digest_only:
                share = await room(head.nbytes)
            features = await loop.elsewhere(_packed, head, digest_only)
            found: Answer | BaseException = Answer(features, engine.description.revision, _HEAD_LIMITS)
        except Exception as err:
            found = err.with_traceback(None)
            if share is not None:
                share.end()
        except BaseException:  # cancelled
            if share is not None:
                share.end()
            raise
        done(found, 0, share)

    loop.task(answer(), name="schoolhouse-head", on_death=lambda err: done(err, 0, None))


def _packed(head: Head, digest_only: bool) -> Declared:
    return pack([head.digest if digest_only else head.to_value()])


def _head(engine: Engine, wanted: Wanted, *, allowed: bool) -> Head:
    """The head that a call is for.

    Raises:
        PermissionDeniedError: heads are not given out.
        ProtocolError: the call does not name exactly one head.
    """
    if not allowed:
        raise PermissionDeniedError(
            f"the head of {engine.description.name!r} is not given out, so encodings.hidden() cannot be used; choose "
            "another encoding, or ask whoever runs the server for serve(allow_head=True), or, in a pool file, "
            "`security: {allow_head: true}`"
        )
    heads = wanted.heads()
    if len(wanted.taps) != 1 or len(heads) != 1:
        raise ProtocolError("a call for a head must name one, as the encoding of its only tap")
    [(tap, name)] = heads.items()
    engine.check()  # raises after a forward that never returned, for which the head would wait for ever
    return engine.teacher.head(name, tap.module)


def opened_by(engine: Engine, sharing: Sharing, limits: Limits) -> teacher_pb2.Opened:
    """The Opened message that begins a session, without the offer of shared memory."""
    return teacher_pb2.Opened(
        revision=engine.description.revision,
        max_in_flight=sharing.max_in_flight,
        max_request_bytes=limits.max_payload_bytes,
        max_bytes_in_flight=sharing.max_job_bytes,
        lease_s=sharing.lease_s,
    )


def reply_of(request_id: int, digest: bytes, wanted: Wanted, answer: Answer, header: bytes) -> teacher_pb2.Reply:
    """A reply that repeats what it answers, so that the client can compare that with what it asked."""
    return teacher_pb2.Reply(
        request_id=request_id, revision=answer.revision, taps=wanted.to_wire(), input_digest=digest, features=header
    )


def as_told(error: BaseException) -> BaseException:
    """The error that a client is told: `TeacherMemoryError` where the host ran out of memory, else the error itself."""
    if isinstance(error, SchoolhouseError) or not lacks_memory(error):
        return error
    _log.warning("there was no memory for a request: %s", error)
    return TeacherMemoryError("the teacher's host has no memory for this request, or for its features; ask for less")


def check_open(message: teacher_pb2.Open) -> None:
    """Raises `ProtocolError` for names that are too long; the job's name is checked by `Member`."""
    _check_length("Open", "teacher's name", message.teacher, MAX_NAME)
    _check_length("Open", "revision", message.revision, MAX_NAME)


def check_describe(request: teacher_pb2.DescribeRequest | ProtocolError) -> None:
    """Raises `ProtocolError` for a request that could not be parsed, or has too long a name."""
    if isinstance(request, ProtocolError):
        raise request
    _check_length("Describe", "teacher's name", request.teacher, MAX_NAME)


@dataclass(frozen=True)
class Asked:
    """What a call asks for, apart from its mask of positions; `key` is equal where the same is asked for."""

    wanted: Wanted
    key: tuple[bytes, ...]


def asked_by(call: teacher_pb2.Call) -> Asked:
    """Raises `ProtocolError` for more taps, or longer names, than a call may have, and for what it cannot ask for."""
    if len(call.taps) > MAX_TAPS:
        raise ProtocolError(f"a call has {len(call.taps)} taps; {MAX_TAPS} are allowed")
    _check_length("a call", "revision", call.revision, MAX_NAME)
    _check_length("a call", "traceparent", call.traceparent, MAX_NAME)
    key = tuple([tap.SerializeToString(deterministic=True) for tap in call.taps])
    return (_asked if sum(map(len, key)) <= _KEPT_BYTES else _asked.__wrapped__)(key)


@functools.lru_cache(maxsize=256)
def _asked(key: tuple[bytes, ...]) -> Asked:
    """Cached, as training asks for the same at every step."""
    taps = [*map(teacher_pb2.Tap.FromString, key)]
    for tap in taps:
        _check_length("a call", "tap", tap.module, MAX_MODULE_NAME)
        if tap.HasField("encoding"):
            _check_length("a call", "head", tap.encoding.hidden.head, MAX_MODULE_NAME)
    return Asked(Wanted.from_wire(taps, None), key)


def check_quota(nbytes: int, most: int | None) -> None:
    """Raises `MessageTooLargeError` for inputs that alone are more than a token allows; None allows any."""
    if most is not None and nbytes > most:
        raise MessageTooLargeError(
            f"the inputs of a request take {nbytes} bytes, and the token's max_job_bytes is {most}; send smaller "
            "batches, or ask whoever runs the server for more"
        )


def check_broke(times: int) -> None:
    """Raises `TeacherForwardError` for a request under which several replicas got stuck or broke."""
    if (refused := broke_too_often(times)) is not None:
        raise refused


def check_work(inputs: Arguments, wanted: Wanted, most_tokens: int | None) -> None:
    """Raises `MessageTooLargeError` for more tokens, or draws, than one request may have; None allows any tokens."""
    draws = max((encoding.n for encoding in wanted.encodings if isinstance(encoding, Sampled)), default=0)
    if most_tokens is None and not draws:
        return
    tokens = tokens_of(inputs)
    if most_tokens is not None and tokens > most_tokens:
        raise MessageTooLargeError(
            f"a request has {tokens} tokens (rows times length), and max_request_tokens of the teacher is "
            f"{most_tokens}; send smaller batches, or ask whoever runs the server for more"
        )
    if tokens * draws > _MAX_DRAWS:
        raise MessageTooLargeError(
            f"a request has {tokens} tokens with {draws} draws each, and {_MAX_DRAWS} draws are allowed; send smaller "
            "batches, or ask for fewer draws"
        )


def check_released(offsets: Sized) -> None:
    """Raises `ProtocolError` for more blocks at once than a client can hold."""
    if len(offsets) > MAX_RELEASED:
        raise ProtocolError(f"a message releases {len(offsets)} blocks; {MAX_RELEASED} are allowed")


def _check_length(where: str, what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise ProtocolError(f"{where} has a {what} of {len(text)} characters; {longest} are allowed")


def check_revision(asked: str, engine: Engine) -> None:
    """Raises `RevisionChangedError` for another revision than the engine's; an empty one stands for any."""
    if asked not in ("", engine.description.revision):
        raise RevisionChangedError(
            f"revision {asked} was asked for, and this replica has {engine.description.revision}",
            choices=(engine.description.revision,),
        )
