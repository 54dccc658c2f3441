"""A request on its way to features, and what answered ones moved."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits

from schoolhouse.heads import Head
from schoolhouse.taps import Tap
from schoolhouse.teachers import Features
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
    future: "Future[Features]" = field(default_factory=Future)
    losses: int = 0  # replicas that were lost while they had it

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs: what it costs, as far as that is known here."""
        return self.outgoing.nbytes + len(self.outgoing.header)

    def resolve(self, features: Features) -> None:
        """Give the features to who waits, unless it cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(features)

    def fail(self, error: BaseException) -> None:
        """Give the error to who waits, unless it cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
