"""A request on its way to features, as a machine of states, and the traffic of answered ones."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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

State = Literal["new", "parked", "queued", "sent", "answered", "failed", "cancelled"]


class Transition(NamedTuple):
    """One line of the table: in `states`, `event` leads to the state `next`, or to the same one if that is None."""

    states: tuple[State, ...]
    event: str
    next: State | None
    caller: str


LIVE: tuple[State, ...] = ("new", "parked", "queued", "sent")
TRANSITIONS = (
    Transition(("new", "parked"), "park", "parked", "dispatcher: no replica can take it, or too much is sent again"),
    Transition(("new", "parked"), "follow", None, "dispatcher or teacher: its revision is gone, and it may follow"),
    Transition(("new", "parked"), "queue", "queued", "dispatcher: it chose a replica"),
    Transition(("queued",), "send", "sent", "flow control: the replica has room for it"),
    Transition(("sent",), "wait", "queued", "flow control: the replica sent it back, since the job is over its quota"),
    Transition(("queued",), "take_back", "new", "dispatcher: the replica that should get it is left"),
    Transition(("sent",), "turn_away", "new", "dispatcher: the replica refused it, since it is about to stop"),
    Transition(("queued", "sent"), "lose", "new", "dispatcher: the session ended, or the answer was wrong"),
    Transition(LIVE, "move", None, "replica pool: the replica was silent for too long, so its session is being closed"),
    Transition(("sent",), "answer", "answered", "session: the features have arrived"),
    Transition(LIVE, "fail", "failed", "whoever finds the error, also that it is late"),
    Transition(LIVE, "cancel", "cancelled", "whoever asked for the features, also through the future"),
)
_GOING_ON = ("PENDING", "RUNNING")
_NEXT = {(state, line.event): line.next or state for line in TRANSITIONS for state in line.states}


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What a request asks."""

    outgoing: framing.Outgoing
    wanted: Wanted
    revision: str
    heads: Mapping[Tap, Head]  # for the taps whose hidden states travel
    limits: Limits  # of the reply
    alone: bool = False  # must be computed unmerged and anew, since its bits are compared
    apart_from: str = ""  # address of a replica that is asked only if there is no other

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs, by which the client estimates the cost of the request."""
        return self.outgoing.nbytes + len(self.outgoing.header)


class Clock:
    """A request's own time, which stands still while it is parked: then `deadline` is the end of that wait."""

    def __init__(self, deadline: float) -> None:
        """`deadline` and all other times are on the clock of `time.monotonic`."""
        self.deadline = deadline
        self._left_s: float | None = None  # what is left of its own time, while that stands still
        self._stopped_at = self._waited_s = 0.0  # since when it stands still, and for how long it did in earlier waits

    def stop(self, since: float, wait_s: float) -> bool:
        """Stand still, for up to `wait_s` in all waits together; False if it stands still already."""
        if self._left_s is not None:
            return False
        self._left_s, self._stopped_at = max(self.deadline - since, 0.0), since
        self.deadline = since + max(wait_s - self._waited_s, 0.0)
        return True

    def start(self, now: float) -> bool:
        """Go on; False if it did not stand still."""
        if self._left_s is None:
            return False
        self.deadline, self._left_s = now + self._left_s, None
        self._waited_s += now - self._stopped_at
        return True


class Request:
    """One batch on its way to features. It may be sent again to another replica.

    It is moved on in the event loop alone, by the dispatcher, or by the session to which that gave it until the session
    gives it back. Only an end may come from another thread, at any time: the future takes the first one, and whatever
    follows an end changes nothing. What the table below does not have raises `AssertionError`.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        question: Question,
        deadline: float,
        span: RequestSpan | None = None,
        follower: "Callable[[Request], None] | None" = None,
    ) -> None:
        """`span` is for a traced request; `follower(request)` has it `follow` later, with the current heads."""
        self.number = next(self._numbers)
        self.question, self.clock = question, Clock(deadline)
        self.future: Future[Features] = Future()
        self.losses = 0  # replicas that were lost while they had it, or that gave a wrong answer
        self.breaks = 0  # replicas that got stuck or broke while they ran it
        self.is_retry = False  # it was lost or turned away, and must be sent again
        self.moved = False  # it was taken away from a silent replica once
        self.told_to_wait = False  # a replica had no room for it
        self.asked_at = 0.0  # when the replica was asked
        self.answered_by = ""  # address of the replica that answered
        self._span, self._follower = span, follower
        self._state: State = "new"  # until it ends, which the future knows
        if span is not None:
            self.future.add_done_callback(background.called(span.done, "a span", background.go_on))

    @property
    def state(self) -> State:
        """Where it is on its way."""
        if not self.done:
            return self._state
        if self.future.cancelled():
            return "cancelled"
        return "answered" if self.future.exception() is None else "failed"

    @property
    def done(self) -> bool:
        """Whether it is answered, failed or cancelled."""
        return self.future._state not in _GOING_ON  # as `future.done()`, without its lock

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return self.question.nbytes

    def _on(self, event: str) -> bool:
        """Whether the event counts: not after the end. The state becomes the next one, unless that is an end."""
        if self.done:
            return False
        assert (self._state, event) in _NEXT, f"a request that is {self._state} was told to {event}"
        if (following := _NEXT[self._state, event]) in LIVE:
            self._state = following
        return True

    def park(self, since: float, wait_s: float) -> bool:
        """Let it wait, for up to `wait_s` in all its waits together; returns whether its deadline has changed."""
        return self._on("park") and self.clock.stop(since, wait_s)

    def queue(self, now: float) -> bool:
        """Give it to a session; returns whether its deadline has changed."""
        if not self._on("queue"):
            return False
        self.is_retry = False
        return self.clock.start(now)

    def send(self, now: float) -> bool:
        """Ask the replica; False if the request has ended."""
        if goes_on := self._on("send"):
            self.asked_at = now
        return goes_on

    def wait(self) -> None:
        """Queue it once more, as the replica has no room for it."""
        if self._on("wait"):
            self.told_to_wait = True

    def take_back(self) -> None:
        """Take it from a session that has not sent it."""
        self._on("take_back")

    def turn_away(self, *, broke: bool = False) -> None:
        """Take it from a replica that does not want it, or that `broke` while it ran it."""
        if self._on("turn_away"):
            self.is_retry = True
            self.breaks += broke

    def lose(self, apart_from: str = "") -> None:
        """Take it from a replica that is lost or at fault; that at `apart_from` is asked only if there is no other."""
        had_it = self._state == "sent"
        if self._on("lose"):
            self.losses += had_it
            self.is_retry = True
            self.question = replace(self.question, apart_from=apart_from or self.question.apart_from)

    def move(self) -> None:
        """Note that it is taken away from a silent replica, which happens only once."""
        if self._on("move"):
            self.moved = True

    def follow(self, revision: str, heads: Mapping[Tap, Head]) -> bool:
        """Ask for another revision, with the heads of that; False if the request has ended."""
        if goes_on := self._on("follow"):
            self.question = replace(self.question, revision=revision, heads=heads)
        return goes_on

    def answer(self, features: Features, address: str) -> None:
        """Complete the future with the features that the replica at `address` gave."""
        if self._on("answer"):
            self.answered_by = address
            with contextlib.suppress(InvalidStateError):  # it ended meanwhile
                self.future.set_result(features)

    def fail(self, error: BaseException) -> None:
        """Complete the future with the error."""
        if self._on("fail"):
            with contextlib.suppress(InvalidStateError):
                self.future.set_exception(error)

    def cancel(self) -> None:
        """Cancel the future, as its holder may do directly."""
        if self._on("cancel"):
            self.future.cancel()

    def traceparent(self) -> str:
        """The trace context for one more replica that is asked; empty if it is not traced."""
        return self._span.sent() if self._span is not None else ""

    def received(self, nbytes: int) -> None:
        """Note the size of the reply."""
        if self._span is not None:
            self._span.received(nbytes)

    def refuse(self, error: SchoolhouseError) -> None:
        """Fail a request that no replica can answer, or have it follow to the current revision if it may."""
        if isinstance(error, RevisionChangedError) and self._follower is not None and not self.done:
            self._follower(self)
        else:
            self.fail(error)

    def or_fail(self, step: Callable[..., None], *args: object) -> None:
        """Run the next step of this request; an error in it fails this request alone."""
        try:
            step(*args)
        except BaseException as err:
            background.failed(err, "a request's way", self.give_up)

    def give_up(self, error: BaseException) -> None:
        """Fail the request for an error in this client."""
        self.fail(errors.typed(error, "this client"))


Request.__doc__ = "\n".join(
    (
        f"{Request.__doc__}",
        "| state | event | next state | who calls it |",
        "|---|---|---|---|",
        *(
            f"| {', '.join(one.states)} | {one.event} | {one.next or 'the same'} | {one.caller} |"
            for one in TRANSITIONS
        ),
    )
)


def traced(tracer: Tracer | None, question: Question, teacher: str, job: str) -> RequestSpan | None:
    """Begin the span of a request; None without a tracer."""
    if tracer is None:
        return None
    taps = [f"{tap.module}:{tap.side}" for tap in question.wanted.taps]
    return tracer.request(teacher=teacher, revision=question.revision, job=job, taps=taps, sent_bytes=question.nbytes)


def features_of(question: Question, reply: teacher_pb2.Reply, incoming: framing.Incoming) -> Features:
    """The features of a reply; raises unless they are of the batch, the taps and the revision of the question."""
    given = (list(reply.taps), reply.revision, reply.input_digest)
    expected = (question.wanted.wire, question.revision, question.outgoing.digest)
    if given != expected:
        raise FeatureMismatchError(
            f"the features that arrived are of {_in_words(*given)}, where {_in_words(*expected)} was asked for"
        )
    values = incoming.value()
    taps = question.wanted.taps
    if not isinstance(values, list) or len(values) != len(taps):
        raise ProtocolError("a reply arrived that does not hold one feature for each tap")
    found = decoded(dict(zip(taps, values, strict=True)), question.heads)
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
