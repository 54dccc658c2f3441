"""A request on its way to features, and what answered ones moved."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits

from schoolhouse.errors import SchoolhouseError, TeacherUnavailableError
from schoolhouse.heads import Head
from schoolhouse.taps import Tap
from schoolhouse.teachers import Features
from schoolhouse.tracing import RequestSpan, Tracer
from schoolhouse.wanted import Wanted


@dataclass(frozen=True)
class Traffic:
    """What went over the wire for answered requests, in bytes of headers and payloads."""

    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.requests + other.requests,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
        )


@dataclass(eq=False)
class Request:
    """One batch on its way to features. It may be sent again to another replica."""

    outgoing: framing.Outgoing
    wanted: Wanted
    revision: str
    deadline: float  # on time.monotonic's clock
    heads: Mapping[Tap, Head]  # of the taps whose hidden states travel
    limits: Limits  # of the reply
    span: RequestSpan | None = None  # where it is traced
    future: "Future[Features]" = field(default_factory=Future)
    tried: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.span is not None:
            self.future.add_done_callback(self.span.done)

    def sent(self) -> str:
        """Note that a replica is asked; the trace context for its call."""
        return self.span.sent() if self.span is not None else ""

    def received(self, nbytes: int) -> None:
        """Note how much came."""
        if self.span is not None:
            self.span.received(nbytes)

    def resolve(self, features: Features) -> None:
        """Give the features to who waits, unless it cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(features)

    def fail(self, error: BaseException) -> None:
        """Give the error to who waits, unless it cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


def gone(error: SchoolhouseError) -> SchoolhouseError:
    """What a request ends with that no replica could take over from the one that held it."""
    return TeacherUnavailableError(f"the replica that held the request is gone, and no other could take it: {error}")


def traced(
    tracer: Tracer | None, outgoing: framing.Outgoing, wanted: Wanted, teacher: str, revision: str, job: str
) -> RequestSpan | None:
    """The span of a request that begins, where there is a tracer."""
    if tracer is None:
        return None
    taps = [f"{tap.module}:{tap.side}" for tap in wanted.taps]
    nbytes = outgoing.nbytes + len(outgoing.header)
    return tracer.request(teacher=teacher, revision=revision, job=job, taps=taps, sent_bytes=nbytes)
