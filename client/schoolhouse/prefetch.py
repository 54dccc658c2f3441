"""Look-ahead over a data loader: the teacher works on the next batches while the student trains on this one."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from schoolhouse_wire.codec import Arguments

from schoolhouse.batches import Inputs, bound, call_of, summary, taken_by
from schoolhouse.errors import ConfigError, SchoolhouseError, TeacherBusyError
from schoolhouse.step import Answer, Distillation, Step
from schoolhouse.taps import tensors_of


@dataclass(eq=False)
class _Entry:
    """One batch that the teacher was asked for. `answer` is None while its queue was full."""

    number: int
    batch: Any  # until it is yielded
    call: Arguments
    inputs: Inputs  # of the call, as the teacher got it
    answer: Answer | None = None
    used: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(tensor.nbytes for tensor in tensors_of(self.call))

    def features_nbytes(self) -> int | None:
        """Bytes of the features, once they are here."""
        future = self.answer.future if self.answer is not None else None
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return sum(tensor.nbytes for tensor in tensors_of(future.result()))


class Ahead:
    """The batches of one loop: those asked for ahead, and those yielded whose forward may still come."""

    def __init__(self, state: Distillation, depth: int, max_bytes: int, progress: Callable[[float], Any]) -> None:
        self.waiting: deque[_Entry] = deque()
        self._yielded: deque[_Entry] = deque()
        self._state = state
        self._depth = depth
        self._max_bytes = max_bytes
        self._progress = progress
        self._largest = 0  # features of a batch so far, in bytes

    def has_room(self) -> bool:
        """Whether the teacher may be asked for one more batch."""
        if not self.waiting:
            return True
        if any(entry.answer is None for entry in self.waiting):
            return False
        known = [entry.features_nbytes() for entry in (*self.waiting, *self._yielded)]
        self._largest = max([self._largest, *(nbytes for nbytes in known if nbytes is not None)])
        held = sum(entry.nbytes for entry in (*self.waiting, *self._yielded))
        held += sum(self._largest if nbytes is None else nbytes for nbytes in known)
        next_one = self.waiting[-1].nbytes + self._largest
        return len(self.waiting) <= self._depth and held + next_one <= self._max_bytes

    def ask(self, entry: _Entry) -> None:
        """Ask the teacher for a batch; what it raises is kept for the step; with a full queue it is asked later."""
        try:
            entry.answer = self._state.request(entry.call, entry.call.kwargs)
        except TeacherBusyError:
            pass
        except SchoolhouseError as err:
            entry.answer = _failed(err)

    def take(self) -> Any:
        """The next batch; its forward may come from now on."""
        entry = self.waiting.popleft()
        self._yielded = deque(other for other in self._yielded if not other.used)
        if len(self._yielded) >= self._depth:
            _drop(self._yielded.popleft())
        self._yielded.append(entry)
        batch, entry.batch = entry.batch, None
        return batch

    def find(self, given: Inputs, call: Arguments) -> Answer | None:
        """The answer for a call on a batch that was yielded; None if it is none of them."""
        found = [entry for entry in self._yielded if entry.inputs.same_as(given)]
        if not found:
            return None
        entry = next((entry for entry in found if not entry.used), found[-1])
        if entry.answer is None or (entry.used and not entry.answer.untouched()):
            entry.answer = self._state.request(call, call.kwargs)
        entry.used = True
        return entry.answer

    def expected(self, given: Inputs, call: Arguments) -> str:
        """A message for a call on something else."""
        if not self._yielded:
            return f"the forward got {summary(call)} in a loop over prefetch that has yielded no batch yet"
        entries = [entry for entry in self._yielded if not entry.used] or [self._yielded[-1]]
        names = " or ".join(f"batch {entry.number}, {summary(entry.call)}," for entry in entries)
        others = any(entry.inputs.same_form_as(given) for entry in entries)
        why = " of other values" if others else ""
        return (
            f"the forward got {summary(call)}{why}, where {names} of the loop over prefetch was expected, which the "
            "teacher was asked for. Forward the batch as it was yielded, or give prefetch inputs=, a function that "
            "makes of a batch what the forward gets. model.eval() or only_student_forward() are for other batches; "
            "the loop's end, or its close(), drops what was asked for"
        )

    def used(self, step: Step) -> None:
        """The loss of a step is being computed."""
        assert step.answer is not None
        waited_s, step.answer.waited_s = step.answer.waited_s, 0.0
        self._progress(waited_s)

    def close(self) -> None:
        """Drop what was asked for; the teacher is told."""
        with contextlib.suppress(ValueError):
            self._state.ahead.remove(self)
        for entry in (*self.waiting, *self._yielded):
            _drop(entry)
        self.waiting.clear()
        self._yielded.clear()


def _drop(entry: _Entry) -> None:
    if entry.answer is not None and not entry.used:
        entry.answer.future.cancel()


def _failed(error: SchoolhouseError) -> Answer:
    future: Future[Any] = Future()
    future.set_exception(error)
    return Answer(future)


class Prefetch:
    """What `DistillationModel.prefetch` returns: each `iter()` begins a pass over the loader.

    `steps` and `waited_s`, in seconds, count the steps so far and how long they waited for the teacher.
    """

    def __init__(
        self,
        state: Distillation,
        loader: Iterable[Any],
        *,
        depth: int,
        inputs: Callable[[Any], Any] | None,
        max_bytes: int,
        progress: Any,
    ) -> None:
        for name, value in (("depth", depth), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of 1 or above")
        if inputs is not None and not callable(inputs):
            raise ConfigError(f"inputs is a {type(inputs).__name__}; it must be a function of a batch, or None")
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ConfigError(f"loader is a {type(loader).__name__}; it must be an iterable of batches")
        self.steps = 0
        self.waited_s = 0.0
        self._state = state
        self._loader = loader
        self._depth = depth
        self._inputs = inputs
        self._max_bytes = max_bytes
        self._show = _shower(progress)
        self._begun: _Pass | None = None

    def __iter__(self) -> "_Pass":
        begun, self._begun = self._begun, None
        return begun or _Pass(
            Ahead(self._state, self._depth, self._max_bytes, self._count), self._state, iter(self._loader), self._call
        )

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = iter(self)
        return next(self._begun)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # whoever asks knows that it has a length

    def _call(self, batch: Any) -> Arguments:
        if self._inputs is not None:
            return call_of(self._inputs(batch))
        return taken_by(self._state.student_forward, batch)

    def _count(self, waited_s: float) -> None:
        self.steps += 1
        self.waited_s += waited_s
        self._show(waited_s)


class _Pass(Iterator[Any]):
    """One pass over a loader. It ends with the loader, by `close()`, or when nobody holds it any more."""

    def __init__(self, ahead: Ahead, state: Distillation, batches: Iterator[Any], call: Callable[[Any], Any]) -> None:
        self._ahead = ahead
        self._state = state
        self._batches: Iterator[Any] | None = batches
        self._call = call
        self._numbers = itertools.count()
        self._error: BaseException | None = None
        state.ahead.append(ahead)

    def __next__(self) -> Any:
        self._look_ahead()
        if self._ahead.waiting:
            return self._ahead.take()
        error, self._error = self._error, None
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def _look_ahead(self) -> None:
        for entry in self._ahead.waiting:
            if entry.answer is None:
                entry.inputs = bound(self._state.student_forward, entry.call)  # as they are now
                self._ahead.ask(entry)
        while self._batches is not None and self._ahead.has_room():
            try:
                entry = self._entry(next(self._batches))
            except StopIteration:
                self._batches = None
            except Exception as err:
                self._batches, self._error = None, err
            else:
                self._ahead.waiting.append(entry)
                self._ahead.ask(entry)

    def _entry(self, batch: Any) -> _Entry:
        call = self._call(batch)
        inputs = bound(self._state.student_forward, call)
        return _Entry(next(self._numbers), batch, call, inputs)

    def close(self) -> None:
        """End the pass: what was asked for is dropped, and forwards ask the teacher themselves again."""
        self._batches = None
        self._ahead.close()

    def __enter__(self) -> "_Pass":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _shower(progress: Any) -> Callable[[float], Any]:
    """What shows how long a step waited."""
    if progress is None:
        return lambda _waited_s: None
    if hasattr(progress, "set_postfix"):
        return lambda waited_s: progress.set_postfix(teacher_wait_ms=f"{waited_s * 1e3:.1f}")
    if callable(progress):
        result: Callable[[float], Any] = progress
        return result
    raise ConfigError(
        f"progress is a {type(progress).__name__}; choices: a function of the seconds waited, a bar with set_postfix, "
        "None"
    )
