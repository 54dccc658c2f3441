"""The shares of one teacher's requests in the bytes of features that are not sent yet.

A request holds its share from before its forward until its reply is sent or no longer wanted. The share's size is
estimated from the last request of its kind.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.encodings import Sampled
from schoolhouse_wire.values.tree import tensors_of

from schoolhouse_server.engine.fair_queue import Room
from schoolhouse_server.engine.jobs import Job, Ticket
from schoolhouse_server.engine.unsent import Share, Unsent

_MAX_KINDS = 4096


class Sizes:
    """How many bytes replies take, by the kind of request: its taps and encodings, and the dimensions of its inputs.

    Replies are assumed to grow in proportion to the inputs, as they do with rows and tokens.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, float] = {}  # bytes for each element of the inputs

    @staticmethod
    def kind_of(inputs: Any, wanted: Wanted) -> tuple[Hashable, int]:
        """A request's kind, and the number of elements of its inputs."""
        encodings: tuple[Any, ...] = wanted.encodings
        if any(encodings):
            encodings = tuple(dataclasses.replace(e, seed=None) if isinstance(e, Sampled) else e for e in encodings)
        dims, elements = [], 0
        for tensor in tensors_of(inputs):
            dims.append(tensor.dim())
            elements += tensor.numel()
        return (wanted.taps, encodings, *dims), max(elements, 1)

    def of(self, kind: Hashable, elements: int) -> int | None:
        """The bytes that the features of such a request take; None if not known."""
        found = self._known.get(kind)
        return None if found is None else round(found * elements)

    def learn(self, kind: Hashable, elements: int, nbytes: int) -> None:
        """Note that the features of such a request took `nbytes`."""
        self._known[kind] = nbytes / elements
        if len(self._known) > _MAX_KINDS:
            self._known.pop(next(iter(self._known)), None)  # the kind that was seen first


class Shares:
    """Gives tickets their shares in `unsent`; if that is None, there is no bound."""

    def __init__(self, unsent: Unsent | None, teacher: str) -> None:
        self._unsent, self._teacher, self._sizes = unsent, teacher, Sizes()

    def take(self, ticket: Ticket, nbytes: int | None) -> Room:
        """Take room for a reply of `nbytes`, None if unknown; each job has its bound with each teacher."""
        if self._unsent is not None:
            found = self._unsent.take(f"{self._teacher}/{ticket.account.job}", nbytes)
            if not isinstance(found, Share):
                return found
            ticket.share = found
        return "taken"

    def sized(self, job: Job) -> None:
        """Note a new request's kind, from which the size of its reply is estimated."""
        if self._unsent is not None:
            job.kind, job.elements = self._sizes.kind_of(job.inputs, job.wanted)

    def reserve(self, job: Job) -> Room:
        """Take room for a request whose turn it is; if others have joined it, the room of one of them will do."""
        if job.tickets[0].share is not None:
            return "taken"
        room = self.take(job.tickets[0], self._sizes.of(job.kind, job.elements))
        return "taken" if job.has_room else room

    def joins(self, ticket: Ticket, other: Job) -> bool:
        """Whether a ticket may join a request: its job waits for that already, or there is room for its reply."""
        of_its_own = any(one.account.job == ticket.account.job for one in other.tickets)
        return of_its_own or self.take(ticket, self._sizes.of(other.kind, other.elements)) == "taken"

    def measured(self, job: Job, nbytes: int) -> None:
        """Set the shares to the size of a request's features, before they go to the host.

        Raises:
            MessageTooLargeError: the features are larger than a bound.
        """
        if self._unsent is None:
            return
        self._sizes.learn(job.kind, job.elements, nbytes)
        self._unsent.check(nbytes)
        _resize(job, nbytes)

    def lacking(self, job: Job, nbytes: int) -> list[Ticket]:
        """The tickets of a request that cannot be answered, as there was room only for others.

        A ticket whose job has a share already gets another one. The shares of those that have joined since the features
        were `measured` get their size, `nbytes`, now.
        """
        if self._unsent is not None:
            _resize(job, nbytes)
        lack = [ticket for ticket in job.tickets if ticket.share is None] if self._unsent is not None else []
        shares = {ticket.account.job: ticket.share for ticket in job.tickets if lack and ticket.share is not None}
        for ticket in lack:
            if (found := shares.get(ticket.account.job)) is not None:
                ticket.share = found.beside()
        return [ticket for ticket in lack if ticket.share is None and not ticket.cancelled]


def _resize(job: Job, nbytes: int) -> None:
    for ticket in list(job.tickets):
        if (share := ticket.share) is not None:
            share.resize(nbytes)
