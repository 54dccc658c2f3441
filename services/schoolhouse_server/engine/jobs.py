"""What an engine is asked for: a job is one forward, and its tickets are the clients that wait for it."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.values.codec import Arguments, Declared

from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.merge.batching import Form
from schoolhouse_server.observe.counters import JobCounters
from schoolhouse_server.observe.spans import AnswerSpan

_REPLY_LIMITS = Limits()


@dataclass(frozen=True)
class Answer:
    """A list of features, one for each wanted tap, in host memory and declared as they will be sent."""

    features: Declared
    revision: str
    limits: Limits = _REPLY_LIMITS


@dataclass(eq=False)
class Ticket:
    """One client's wait for a job; `done` is called once, in the loop, unless it was cancelled."""

    done: Callable[[Answer | BaseException], None]
    account: JobCounters = field(default_factory=lambda: JobCounters(""))  # the counters of the client's job
    deadline: float = math.inf
    payer: str = ""  # whose turn it waits for: that job, if nobody else is named
    cancelled: bool = False
    trace: AnswerSpan | None = None
    job: "Job | None" = None  # the job in flight that answers it
    share: Share | None = None  # of the bytes that may be unsent; passed on with the features
    queued_at: float = 0.0
    charged: float = 0.0  # device time, in seconds

    def __post_init__(self) -> None:
        self.payer = self.payer or self.account.job

    @property
    def weight(self) -> float:
        """The weight of the client's job."""
        return self.account.weight

    @property
    def cost(self) -> float:
        """How many seconds of the device it is expected to take."""
        assert self.job is not None
        return self.job.cost

    @property
    def twins(self) -> "Sequence[Ticket]":
        """All tickets that the same job answers."""
        return self.job.tickets if self.job is not None else ()

    def drop(self) -> None:
        """Give the share back, as nothing will be sent."""
        share, self.share = self.share, None
        if share is not None:
            share.end()


@dataclass(eq=False)
class Job:
    """One forward, and the tickets that wait for it: several, if the same was asked for while it was in flight.

    It runs as soon as one of them comes to its turn, and is charged to that one.
    """

    inputs: Arguments
    wanted: Wanted
    key: Hashable  # equal for requests of equal structure, digest of the inputs, taps and encodings
    tickets: list[Ticket] = field(default_factory=list)
    turn: Ticket | None = None  # the ticket in whose turn it runs
    begun_at: float = 0.0  # when it left the queue for the device; 0 before
    cache_key: bytes | None = None
    source: Hashable = None  # the session that sent it
    form: Form | None = None  # jobs of one form may be merged; None if it may not be merged
    cost: float = 1.0  # the device time that it is expected to take, in seconds
    spent_s: float | None = None  # the time that it has taken, as far as it is known
    parse_s: float = 0.0  # what it took to parse the inputs, which is charged too
    units: float = 1.0  # rows or tokens, whichever the engine counts
    rows: int = 0  # counted if it is not known
    kind: Hashable = None  # for jobs of one kind, features take as many bytes for each element of the inputs
    elements: int = 1
    alone: bool = False  # whether it is computed anew and by itself, as its client compares the bits
    again: int = 0  # how many times it has run without being answered

    @property
    def deadline(self) -> float:
        """The first deadline of those who wait for it."""
        return min((ticket.deadline for ticket in [*self.tickets] if not ticket.cancelled), default=math.inf)

    @property
    def content(self) -> tuple[Any, ...]:
        """What the key holds only as a digest."""
        return (self.inputs, self.wanted.mask)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return all(ticket.cancelled for ticket in self.tickets)


def charge(jobs: Sequence[Job], seconds: float) -> None:
    """Add to the time that jobs have taken; of a common forward, each has its part by what it was expected to take."""
    expected = sum([job.cost for job in jobs])
    for job in jobs:
        job.spent_s = (job.spent_s or 0.0) + seconds * job.cost / expected
