"""Verification: one request in N is computed twice, by two replicas if possible, and compared before it is used."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from schoolhouse_wire import background, errors
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.values.tensors import bytes_of
from schoolhouse_wire.values.tree import structure_of, tensors_of

from schoolhouse.errors import ConfigError, FeatureMismatchError, TeacherForwardError
from schoolhouse.remote.request import Request, Traffic
from schoolhouse.taps import TapLike
from schoolhouse.teachers.protocol import Features, TeacherDescription

if TYPE_CHECKING:
    from schoolhouse.remote.teacher import RemoteTeacher

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


class VerifiedTeacher:
    """A teacher that verifies: one request in `every` is computed a second time, and compared before it is used.

    Both run unmerged and are computed anew, the second one on another replica, or on the same one if there is no other,
    so that the results are the same to the bit. Such a request takes twice as long. If they differ, an ERROR is logged,
    the request's future raises `FeatureMismatchError`, and every later request is verified.

    It is given to `convert` in place of the teacher, which closes with it. A pickled copy begins to count anew.
    """

    def __init__(self, teacher: "RemoteTeacher", *, every: int, tolerance: float = 0.0) -> None:
        """Wrap a teacher, as `connect` returns it. Any thread may call the methods.

        Args:
            teacher: the teacher that is asked.
            every: verify one request in this many, beginning with the first.
            tolerance: by how much numbers may differ, as a fraction of the largest in their tensor, for replicas on
                unlike devices, which round differently. Class indices of `topk` and `sampled` must be equal in any
                case.

        Raises:
            ConfigError: for an invalid value, or a teacher that is not behind gRPC.
        """
        from schoolhouse.remote.teacher import RemoteTeacher  # late, since it imports gRPC

        if not isinstance(teacher, RemoteTeacher):
            raise ConfigError(
                f"a {type(teacher).__name__} cannot be verified, since it cannot be asked twice at two replicas; "
                "choices: a RemoteTeacher, as connect(...) returns it"
            )
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(
                f"every is {every!r}; it must be a whole number from 1: one request in that many is verified"
            )
        if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance is {tolerance!r}; it must be a number from 0 to below 1")
        self.teacher, self.every, self.tolerance = teacher, every, tolerance
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._counts = Verification()

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(VerifiedTeacher, every=self.every, tolerance=self.tolerance), (self.teacher,)

    def __repr__(self) -> str:
        return f"VerifiedTeacher({self.teacher!r}, every={self.every}, tolerance={self.tolerance})"

    def __enter__(self) -> "VerifiedTeacher":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def describe(self) -> TeacherDescription:
        """Describe the teacher, as `RemoteTeacher.describe` does."""
        return self.teacher.describe()

    def submit(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        taps: Iterable[TapLike],
        *,
        encodings: Mapping[TapLike, Encoding | None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> "Future[Features]":
        """Send one batch as `RemoteTeacher.submit` does, which says what it takes and raises; verify it if it is due.

        The future of a request that is verified raises `FeatureMismatchError` if the two results differ.
        """
        if next(self._turns) % self.every and not self._counts.differed:
            return self.teacher.submit(args, kwargs, taps, encodings=encodings, positions=positions)
        return Pair(self, self.teacher.begin(args, kwargs, taps, encodings, positions, alone=True)).start()

    def traffic(self) -> Traffic:
        """Number of requests answered so far, second ones included, and the bytes that they moved."""
        return self.teacher.traffic()

    def verification(self) -> Verification:
        """How many requests were computed twice so far, by the outcome."""
        return self._counts

    def count(self, kind: str) -> int:
        """Count one more outcome of a kind; returns how many there are of it."""
        with self._lock:
            number: int = getattr(self._counts, kind) + 1
            self._counts = dataclasses.replace(self._counts, **{kind: number})
            return number

    def close(self) -> None:
        """Close the teacher."""
        self.teacher.close()


class Pair:
    """A request, and then the same request at another replica.

    When it is over it drops all references to requests, features and futures, which would outlive their use in a cycle.
    """

    def __init__(self, by: VerifiedTeacher, first: Request) -> None:
        """`first` was sent already."""
        self._outer: Future[Features] | None = Future()
        self._by = by
        self._first: Request | None = first
        self._second: Request | None = None

    def start(self) -> "Future[Features]":
        """The future of the features, which both answers complete."""
        first, outer = self._first, self._outer
        assert first is not None
        assert outer is not None
        outer.add_done_callback(background.called(self._on_cancel, _WHAT, background.go_on))
        first.future.add_done_callback(background.called(lambda _future: self._on_first(), _WHAT, self._failed))
        return outer

    def _on_cancel(self, outer: "Future[Features]") -> None:
        for request in (self._first, self._second) if outer.cancelled() else ():
            if request is not None:
                request.future.cancel()

    def _on_first(self) -> None:
        first, outer = self._first, self._outer
        if first is None or outer is None:
            return
        if first.future.cancelled() or first.future.exception() is not None:
            self._end(error=_error_of(first.future))
            return
        try:
            second = self._second = self._by.teacher.begin_again(first)
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
            loop = self._by.teacher.loop
            comparing = self._compare(first, second, features, second.future.result())
            loop.here(functools.partial(loop.task, comparing, name="schoolhouse-comparison", on_death=self._failed))

    async def _compare(self, first: Request, second: Request, features: Features, others: Features) -> None:
        if others.revision != features.revision:
            error = FeatureMismatchError(f"the teacher has the revision {others.revision} by now")
            self._unchecked(features, error)
            return
        try:
            found = await self._by.teacher.loop.elsewhere(difference, features, others, self._by.tolerance)
        except Exception as err:  # such as no memory for the comparison
            self._unchecked(features, err)
            return
        if found:
            self._alarm(first, second, found)
            return
        alone = first.answered_by == second.answered_by
        if self._by.count("repeated" if alone else "compared") == 1 and alone:
            _log.warning(
                "teacher %r: a request was verified by the replica that had answered it, since no other could answer; "
                "that finds transient faults, not permanent ones",
                self._by.teacher.name,
            )
        self._end(features)

    def _unchecked(self, features: Features, error: BaseException) -> None:
        number = self._by.count("unchecked")
        if number & (number - 1) == 0:  # the 1st, 2nd, 4th, ...
            _log.warning(
                "teacher %r: a request could not be verified (%d so far): %s", self._by.teacher.name, number, error
            )
        self._end(features)

    def _alarm(self, first: Request, second: Request, found: str) -> None:
        self._by.count("differed")
        text = _alarm(self._by.teacher.name, first, second, found)
        _log.error(text)
        self._end(error=FeatureMismatchError(text))

    def _failed(self, error: BaseException) -> None:
        self._end(error=errors.typed(error, "this client"))

    def _end(self, features: Features | None = None, error: BaseException | None = None) -> None:
        outer, self._outer = self._outer, None
        self._first = self._second = None
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
        "broken, or their devices are unlike: then allow for rounding with VerifiedTeacher(..., tolerance=...). The "
        "features are not used; stop the replica whose features are not those of a local teacher, and forward the "
        "batch again"
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
