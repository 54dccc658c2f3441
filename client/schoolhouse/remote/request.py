"""A request on its way to features, and the traffic of answered ones."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from schoolhouse_wire import background, errors, framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse.errors import FeatureMismatchError, ProtocolError, RevisionChangedError, SchoolhouseError
from schoolhouse.lm_head.head import Head
from schoolhouse.sparse import decoded
from schoolhouse.taps import Tap
from schoolhouse.teachers.protocol import Features
from schoolhouse.teachers.query import Wanted
from schoolhouse.tracing import RequestSpan, Tracer


@dataclass(frozen=True)
class Traffic:
    """Number of answered requests, and the bytes of headers and payloads that went over the wire for them."""

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
    """One batch on its way to features. It may be sent again to another replica.

    Its own time, of `request_s`, stands still while no replica can take it: then `deadline` is the end of that wait.
    """

    outgoing: framing.Outgoing
    wanted: Wanted
    revision: str
    deadline: float  # on time.monotonic's clock
    heads: Mapping[Tap, Head]  # for the taps whose hidden states travel
    limits: Limits  # of the reply
    span: RequestSpan | None = None  # if it is traced
    future: "Future[Features]" = field(default_factory=Future)
    number: int = -1  # its id in `Outstanding`
    losses: int = 0  # replicas that were lost while they had it, or that gave a wrong answer
    is_retry: bool = False  # it was sent before, and must be sent again
    moved: bool = False  # it was taken away from a silent replica once
    asked_at: float = 0.0  # when the replica was asked
    left_s: float | None = None  # what is left of its own time, while that stands still
    stopped_at: float = 0.0  # since when its own time stands still
    waited_s: float = 0.0  # for how long its own time stood still in earlier waits
    told_to_wait: bool = False  # a replica had no room for it
    alone: bool = False  # must be computed unmerged and anew, since its bits are compared
    apart_from: str = ""  # address of a replica that is asked only if there is no other
    answered_by: str = ""  # address of the replica that answered
    follow: "Callable[[Request], None] | None" = None  # moves it to the current revision if its own is gone

    def __post_init__(self) -> None:
        if self.span is not None:
            self.future.add_done_callback(background.called(self.span.done, "a span", background.go_on))

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs, by which the client estimates the cost of the request."""
        return self.outgoing.nbytes + len(self.outgoing.header)

    @property
    def done(self) -> bool:
        """Whether it is answered, failed or cancelled."""
        return self.future.done()

    def stop_clock(self, since: float, wait_s: float) -> bool:
        """Stop its own time, for up to `wait_s` in all its waits together; False if it is stopped already."""
        if self.left_s is not None:
            return False
        self.left_s, self.stopped_at = max(self.deadline - since, 0.0), since
        self.deadline = since + max(wait_s - self.waited_s, 0.0)
        return True

    def start_clock(self, now: float) -> bool:
        """Let its own time run again; False if it was running."""
        if self.left_s is None:
            return False
        self.deadline, self.left_s = now + self.left_s, None
        self.waited_s += now - self.stopped_at
        return True

    def sent(self) -> str:
        """Note that a replica is asked; returns the trace context for that call."""
        return self.span.sent() if self.span is not None else ""

    def received(self, nbytes: int) -> None:
        """Note the size of the reply."""
        if self.span is not None:
            self.span.received(nbytes)

    def resolve(self, features: Features) -> None:
        """Complete the future with the features, unless it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(features)

    def fail(self, error: BaseException) -> None:
        """Complete the future with the error, unless it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def refuse(self, error: SchoolhouseError) -> None:
        """Fail a request that no replica can answer, or move it to the current revision if it may follow."""
        if isinstance(error, RevisionChangedError) and self.follow is not None and not self.done:
            with contextlib.suppress(RuntimeError):  # if no thread can be started, it fails
                follow = functools.partial(self.follow, self)
                background.thread(follow, name="schoolhouse-follow", on_death=self.give_up).start()
                return
        self.fail(error)

    def or_fail(self, step: Callable[..., None], *args: object) -> None:
        """Run the next step of this request in a thread of many; an error in it fails this request alone."""
        background.run(functools.partial(step, *args), "a request's way", self.give_up)

    def give_up(self, error: BaseException) -> None:
        """Fail the request for an error in this client."""
        self.fail(errors.typed(error, "this client"))


def traced(
    tracer: Tracer | None, outgoing: framing.Outgoing, wanted: Wanted, teacher: str, revision: str, job: str
) -> RequestSpan | None:
    """Begin the span of a request; None without a tracer."""
    if tracer is None:
        return None
    taps = [f"{tap.module}:{tap.side}" for tap in wanted.taps]
    nbytes = outgoing.nbytes + len(outgoing.header)
    return tracer.request(teacher=teacher, revision=revision, job=job, taps=taps, sent_bytes=nbytes)


def features_of(request: Request, reply: teacher_pb2.Reply, incoming: framing.Incoming) -> Features:
    """The features of a reply; raises unless they are of the batch, the taps and the revision of the request."""
    given = (list(reply.taps), reply.revision, reply.input_digest)
    expected = (list(request.wanted.to_wire()), request.revision, request.outgoing.digest)
    if given != expected:
        raise FeatureMismatchError(
            f"the features that arrived are of {_in_words(*given)}, where {_in_words(*expected)} was asked for"
        )
    values = incoming.value()
    taps = request.wanted.taps
    if not isinstance(values, list) or len(values) != len(taps):
        raise ProtocolError("a reply arrived that does not hold one feature for each tap")
    found = decoded(dict(zip(taps, values, strict=True)), request.heads)
    return Features(found, revision=reply.revision, input_digest=reply.input_digest)


def late(request: Request, timeout_s: float) -> str:
    """A message that says why a request was late, and what to do."""
    if request.told_to_wait:
        return (
            f"the teacher did not answer within {timeout_s:g} s: the job was over its quota of requests or bytes in "
            "flight, or the teacher's queue was full. Raise timeouts=Timeouts(request_s=...) in connect(), look less "
            "far ahead, raise max_in_flight or max_job_bytes of the teacher, or add replicas"
        )
    return (
        f"the teacher did not answer within {timeout_s:g} s and was told to stop; raise "
        "timeouts=Timeouts(request_s=...) in connect(), or add replicas"
    )


def _in_words(taps: list[teacher_pb2.Tap], revision: str, digest: bytes) -> str:
    words = [" ".join(str(tap).split()) for tap in taps]
    return f"the taps {words}, the revision {revision!r} and the inputs {digest.hex()}"
