"""What an engine is asked for: a job is one forward, and its tickets are the clients that wait for it."""

from collections.abc import Callable, Hashable
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
    cancelled: bool = False
    trace: AnswerSpan | None = None
    job: "Job | None" = None  # the job in flight that answers it
    share: Share | None = None  # of the bytes that may be unsent; passed on with the features

    def drop(self) -> None:
        """Give the share back, as nothing will be sent."""
        share, self.share = self.share, None
        if share is not None:
            share.end()


@dataclass(eq=False)
class Job:
    """One forward, and the tickets that wait for it: several, if the same was asked for while it was in flight."""

    inputs: Arguments
    wanted: Wanted
    key: Hashable  # equal for requests of equal structure, digest of the inputs, taps and encodings
    deadline: float
    tickets: list[Ticket] = field(default_factory=list)
    queued_at: float = 0.0
    begun_at: float = 0.0  # when it left the queue for the device; 0 before
    cache_key: bytes | None = None
    source: Hashable = None  # the session that sent it
    form: Form | None = None  # jobs of one form may be merged; None if it may not be merged
    cost: float = 1.0  # in rows or tokens, whichever the engine charges
    rows: int = 0  # counted if it is not known
    kind: Hashable = None  # for jobs of one kind, features take as many bytes for each element of the inputs
    elements: int = 1
    alone: bool = False  # whether it is computed anew and by itself, as its client compares the bits
    again: int = 0  # how many times it has run without being answered

    @property
    def job(self) -> str:
        """The name of the client's job whose turn it takes in the queue."""
        return self.tickets[0].account.job

    @property
    def weight(self) -> float:
        """The weight of that job."""
        return self.tickets[0].account.weight

    @property
    def has_room(self) -> bool:
        """Whether at least one of its tickets has room for its features among those that are not sent yet."""
        return any(ticket.share is not None for ticket in self.tickets)

    @property
    def content(self) -> tuple[Any, ...]:
        """What the key holds only as a digest."""
        return (self.inputs, self.wanted.mask)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return all(ticket.cancelled for ticket in self.tickets)
