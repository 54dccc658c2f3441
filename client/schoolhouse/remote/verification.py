"""Verification: one request in N is computed twice, by two replicas if possible, and compared before it is used."""

import contextlib
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import torch
from schoolhouse_wire import background, errors
from schoolhouse_wire.values.tensors import bytes_of
from schoolhouse_wire.values.tree import structure_of, tensors_of

from schoolhouse.errors import FeatureMismatchError, TeacherForwardError
from schoolhouse.remote.request import Request
from schoolhouse.teachers.protocol import Features

_log = logging.getLogger(__name__)
_WHAT = "verifying a request"


@dataclass(frozen=True)
class Verification:
    """How many requests were computed a second time, by outcome.

    `compared`: another replica computed the same features. `repeated`: the same replica did, since no other could.
    `differed`: the features differed, and an alarm was raised. `unchecked`: the second computation failed, so that
    nothing was compared.
    """

    compared: int = 0
    repeated: int = 0
    differed: int = 0
    unchecked: int = 0


class Verifier:
    """Decides which requests are verified, and counts the outcomes. Any thread may call."""

    def __init__(self, name: str, every: int, tolerance: float) -> None:
        """Verify one request in `every`, beginning with the first, or none for 0; `name` is the teacher's."""
        self.name, self.tolerance = name, tolerance
        self._every = every
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self.counts = Verification()

    def is_due(self) -> bool:
        """Whether the next request is to be verified; after an alarm every request is."""
        if not self._every:
            return False
        return next(self._turns) % self._every == 0 or self.counts.differed > 0

    def count(self, kind: str) -> int:
        """Count one more outcome of a kind; returns how many there are of it."""
        with self._lock:
            number: int = getattr(self.counts, kind) + 1
            self.counts = dataclasses.replace(self.counts, **{kind: number})
            return number


class Pair:
    """A request, and then the same request at another replica.

    When it is over it drops all references to requests, features and futures, which would outlive their use in a cycle.
    """

    def __init__(self, verifier: Verifier, first: Request, send: Callable[[Request], object]) -> None:
        """`send` dispatches a request."""
        self._outer: Future[Features] | None = Future()
        self._verifier = verifier
        self._first: Request | None = first
        self._second: Request | None = None
        self._send: Callable[[Request], object] | None = send

    def start(self, again: Callable[[Request], Request]) -> "Future[Features]":
        """Send the request, and return the future of its features; `again(request)` later makes the second request."""
        first, send, outer = self._first, self._send, self._outer
        assert first is not None
        assert send is not None
        assert outer is not None
        outer.add_done_callback(background.called(self._on_cancel, _WHAT, background.go_on))
        send(first)
        first.future.add_done_callback(background.called(lambda _future: self._on_first(again), _WHAT, self._failed))
        return outer

    def _on_cancel(self, outer: "Future[Features]") -> None:
        for request in (self._first, self._second) if outer.cancelled() else ():
            if request is not None:
                request.future.cancel()

    def _on_first(self, again: Callable[[Request], Request]) -> None:
        first, send, outer = self._first, self._send, self._outer
        if first is None or send is None or outer is None:
            return
        if first.future.cancelled() or first.future.exception() is not None:
            self._end(error=_error_of(first.future))
            return
        try:
            second = self._second = again(first)
            send(second)
        except Exception as err:  # such as max_pending, or a closed teacher, for which the features are still good
            self._unchecked(first.future.result(), err)
            return
        if outer.cancelled():  # before `_on_cancel` could see the second request
            second.future.cancel()
        second.future.add_done_callback(background.called(lambda _future: self._on_second(), _WHAT, self._failed))

    def _on_second(self) -> None:
        first, second = self._first, self._second
        if first is None or second is None:
            return
        if second.future.cancelled():  # since the user cancelled the outer future
            self._end(error=_error_of(second.future))
            return
        features, error = first.future.result(), _error_of(second.future)
        if isinstance(error, TeacherForwardError):
            self._alarm(first, second, f"the second one's forward failed: {error.message}")
        elif error is not None:
            self._unchecked(features, error)
        else:
            self._compare(first, second, features, second.future.result())

    def _compare(self, first: Request, second: Request, features: Features, others: Features) -> None:
        if others.revision != features.revision:
            error = FeatureMismatchError(f"the teacher has the revision {others.revision} by now")
            self._unchecked(features, error)
            return
        try:
            found = difference(features, others, self._verifier.tolerance)
        except Exception as err:  # such as no memory for the comparison
            self._unchecked(features, err)
            return
        if found:
            self._alarm(first, second, found)
            return
        alone = first.answered_by == second.answered_by
        if self._verifier.count("repeated" if alone else "compared") == 1 and alone:
            _log.warning(
                "teacher %r: verify_every compared a replica with itself, since no other could answer; that finds "
                "transient faults, not permanent ones",
                self._verifier.name,
            )
        self._end(features)

    def _unchecked(self, features: Features, error: BaseException) -> None:
        number = self._verifier.count("unchecked")
        if number & (number - 1) == 0:  # the 1st, 2nd, 4th, ...
            _log.warning(
                "teacher %r: a request could not be verified (%d so far): %s", self._verifier.name, number, error
            )
        self._end(features)

    def _alarm(self, first: Request, second: Request, found: str) -> None:
        self._verifier.count("differed")
        text = _alarm(self._verifier.name, first, second, found)
        _log.error(text)
        self._end(error=FeatureMismatchError(text))

    def _failed(self, error: BaseException) -> None:
        self._end(error=errors.typed(error, "this client"))

    def _end(self, features: Features | None = None, error: BaseException | None = None) -> None:
        outer, self._outer = self._outer, None
        self._first = self._second = self._send = None
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            if outer is not None and features is not None:
                outer.set_result(features)
            elif outer is not None:
                outer.set_exception(error)


def _error_of(future: "Future[Features]") -> BaseException | None:
    if future.cancelled():
        return FeatureMismatchError("it was cancelled")
    return future.exception()


def _alarm(name: str, first: Request, second: Request, found: str) -> str:
    one, other = first.answered_by, second.answered_by or "another replica"
    if one == other:
        return (
            f"teacher {name!r}: the replica {one} computed the same inputs twice, and {found}. Its device is broken, "
            "or its forward draws random numbers or keeps state, which cannot be verified. The features are not used"
        )
    return (
        f"teacher {name!r}: the replicas {one} and {other} computed the same inputs, and {found}. One of them is "
        "broken, or their devices are unlike: then allow for rounding with verify_tolerance in connect(). The features "
        "are not used; stop the replica whose features are not those of a local teacher, and forward the batch again"
    )


def difference(features: Features, others: Features, tolerance: float) -> str:
    """Where features of the same taps differ, in words; empty if they do not.

    Features are the same if all bits are equal, or, for floating-point tensors, if no number is off by more than
    `tolerance` times the largest in its tensor.
    """
    for tap, value in features.items():
        other = others[tap]
        if _structure(value) != _structure(other):
            return f"the features of {tuple(tap)} have another structure, shape or dtype"
        for mine, theirs in zip(tensors_of(value), tensors_of(other), strict=True):
            if found := _differ(mine, theirs, tolerance):
                return f"of {tuple(tap)} {found}"
    return ""


def _structure(value: Any) -> Any:
    return structure_of(value, lambda tensor: (tensor.dtype, tensor.shape), type)


def _differ(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> str:
    if mine is theirs or torch.equal(bytes_of(mine.contiguous()), bytes_of(theirs.contiguous())):
        return ""
    if mine.is_complex():
        mine, theirs = torch.view_as_real(mine.resolve_conj()), torch.view_as_real(theirs.resolve_conj())
    one, other = mine.double(), theirs.double()
    unlike = ~((one == other) | (one.isnan() & other.isnan()))
    if not unlike.any():  # equal numbers with other bits
        return "" if tolerance else "zeros have another sign, or NaN other bits"
    largest = other.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax().item()
    by = (one - other).abs()[unlike].nan_to_num(nan=torch.inf).amax().item()
    if mine.is_floating_point() and by <= tolerance * largest:
        return ""
    return f"{int(unlike.sum())} of {unlike.numel()} numbers differ, by up to {by:.3g}, the largest being {largest:.3g}"
