"""What an engine is asked for: one forward, and who waits for it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.values.codec import Arguments, Declared

from schoolhouse_server.common.timer import Alarm
from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.merge.batching import Form
from schoolhouse_server.observe.counters import JobCounters
from schoolhouse_server.observe.spans import AnswerSpan

_REPLY_LIMITS = Limits()


@dataclass(frozen=True)
class Answer:
    """A list of features, one of each tap that was wanted, in host memory and declared as they will be sent."""

    features: Declared
    revision: str
    limits: Limits = _REPLY_LIMITS


@dataclass(eq=False)
class Ticket:
    """One client's share in a job; `done` is called once, from a thread of the engine's, unless it was cancelled."""

    done: Callable[[Answer | BaseException], None]
    account: JobCounters = field(default_factory=lambda: JobCounters(""))  # of whom it is
    cancelled: bool = False
    trace: AnswerSpan | None = None
    job: "Job | None" = None  # while that is in flight
    share: Share | None = None  # of the bytes that may wait to be sent; it goes to who is told of the features

    def drop(self) -> None:
        """Nothing will be sent."""
        share, self.share = self.share, None
        if share is not None:
            share.end()


@dataclass(eq=False)
class Job:
    """One forward, and who waits for it: several, if they asked for the same while it was in flight."""

    inputs: Arguments
    wanted: Wanted
    key: Hashable  # equal for requests of equal structure, digest and wishes
    deadline: float
    tickets: list[Ticket] = field(default_factory=list)
    queued_at: float = 0.0
    cache_key: bytes | None = None
    source: Hashable = None  # the session that sent it
    form: Form | None = None  # what it may be merged with; None: nothing
    cost: float = 1.0  # in the unit that the engine charges
    rows: int = 1
    kind: Hashable = None  # of the same, features take as many bytes for each element of the inputs
    elements: int = 1
    alarm: Alarm | None = None  # at its deadline
    alone: bool = False  # computed anew and by itself: its client compares the bits
    again: int = 0  # times that it has run and was not answered with what came of it

    @property
    def job(self) -> str:
        """Whose turn it takes."""
        return self.tickets[0].account.job

    @property
    def weight(self) -> float:
        """Of that job."""
        return self.tickets[0].account.weight

    @property
    def has_room(self) -> bool:
        """Whether there is room to send its features to one who waits for them."""
        return any(ticket.share is not None for ticket in self.tickets)

    @property
    def content(self) -> tuple[Any, ...]:
        """What the key has only a digest of."""
        return (self.inputs, self.wanted.mask)

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return all(ticket.cancelled for ticket in self.tickets)
