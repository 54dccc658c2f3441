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
from schoolhouse_server.engine.unsent import Full, Share, Unsent

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

    @property
    def nbytes(self) -> int:
        """The bytes that are unsent, of all teachers with these bounds."""
        return self._unsent.nbytes if self._unsent is not None else 0

    def take(self, ticket: Ticket, nbytes: int | None) -> Room:
        """Take room for a reply of `nbytes`, None if unknown; each job has its bound with each teacher."""
        if self._unsent is not None:
            found = self._unsent.take(self._payer(ticket.payer), nbytes)
            if not isinstance(found, Share):
                return found
            ticket.share = found
        return "taken"

    def take_for(self, payer: str, nbytes: int) -> Share | Full | None:
        """A share for what is sent without a ticket, or whose bound is full; None without bounds.

        One that is larger than the bound counts as the bound until it is resized.
        """
        return self._unsent.take(self._payer(payer), nbytes) if self._unsent is not None else None

    def add_for(self, payer: str, nbytes: int) -> Share | None:
        """A share for what is there already, whether there is room or not; None without bounds."""
        return self._unsent.add(self._payer(payer), nbytes) if self._unsent is not None else None

    def _payer(self, payer: str) -> str:
        return f"{self._teacher}/{payer}"

    def reserve(self, ticket: Ticket) -> Room:
        """Take room for the reply to a ticket whose turn it is."""
        if ticket.share is not None or ticket.job is None:
            return "taken"
        return self.take(ticket, self._sizes.of(ticket.job.kind, ticket.job.elements))

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
        """The tickets of a request that cannot be answered, as there is room only for others.

        Only the one whose turn it was has a share yet. Others of its payer get a part in that, and the rest shares of
        their own.
        """
        if self._unsent is None:
            return []
        _resize(job, nbytes)
        shares: dict[str, Share | None] = {
            ticket.payer: ticket.share for ticket in job.tickets if ticket.share is not None
        }
        lack = []
        for ticket in job.tickets:
            if ticket.share is not None or ticket.cancelled:
                continue
            if (found := shares.get(ticket.payer)) is not None:
                ticket.share = found.beside()
            elif self.take(ticket, nbytes) == "taken":
                shares[ticket.payer] = ticket.share
            else:
                lack.append(ticket)
        return lack


def _resize(job: Job, nbytes: int) -> None:
    for ticket in list(job.tickets):
        if (share := ticket.share) is not None:
            share.resize(nbytes)
