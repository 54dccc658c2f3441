"""Batches that the teacher was asked for ahead of their forwards, and which of them a forward is on."""

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from schoolhouse_wire.values.codec import Arguments

from schoolhouse.distill.batch_identity import Inputs, summary
from schoolhouse.distill.step import Answer, Distillation, Step
from schoolhouse.errors import TeacherBusyError, TeacherTimeoutError, TeacherUnavailableError
from schoolhouse.taps import tensors_of

_PASSING = (TeacherBusyError, TeacherTimeoutError, TeacherUnavailableError)


@dataclass(eq=False)
class Entry:
    """One batch that the teacher was asked for. `answer` is None while its queue was full."""

    number: int
    batch: Any  # until it is yielded
    call: Arguments
    asked: Arguments  # what of it the teacher is asked with
    inputs: Inputs  # that, as the teacher got it
    answer: Answer | None = None
    used: bool = False

    @property
    def unanswered(self) -> bool:
        """Whether the teacher is to be asked, or asked again since its queue was full or it was away."""
        answer = self.answer  # which the garbage collector may drop meanwhile
        return answer is None or answer.lost or isinstance(answer.error(), _PASSING)

    @property
    def stale(self) -> bool:
        """Whether a forward has to ask again."""
        answer = self.answer
        return answer is None or self.unanswered or (self.used and not answer.untouched())

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return max(1, sum(tensor.nbytes for tensor in tensors_of(self.call)))

    def features_nbytes(self) -> int | None:
        """Bytes of the features, once they are here."""
        answer = self.answer
        return None if answer is None or not answer.future.done() or answer.error() is not None else answer.nbytes

    def held_nbytes(self, features_per_byte: float) -> float:
        """Bytes of the inputs and of the features, which have that many a byte of the inputs if they are to come."""
        known = self.features_nbytes()
        return self.nbytes + (self.nbytes * features_per_byte if known is None else known)


class Ahead:
    """The batches of one loop: those asked for ahead, and those yielded whose forward may still come."""

    def __init__(
        self,
        state: Distillation,
        depth: int,
        max_bytes: int,
        progress: Callable[[float], Any],
        question: Callable[[Arguments], Arguments],
    ) -> None:
        self.question = question  # what of a call the teacher is asked with
        self.waiting: deque[Entry] = deque()
        self.closed = False
        self._yielded: deque[Entry] = deque()
        self._state = state
        self._depth = depth
        self._max_bytes = max_bytes
        self._progress = progress
        self._dropped = 0  # since the last loss, batches whose forward did not come in time
        self._interrupted_by: int | None = None  # as the loop last went on

    def go_on(self) -> None:
        """The loop takes its next batch, and is the one whose batches are expected."""
        self._interrupted_by = _last_error()
        if not self.closed and self not in self._state.ahead:
            self._state.ahead.append(self)

    def has_room(self) -> bool:
        """Whether the teacher may be asked for one more batch."""
        if not self.waiting:
            return True
        self._learn()
        per_byte = self._state.features_per_byte
        if per_byte is None or len(self.waiting) > self._depth or any(entry.unanswered for entry in self.waiting):
            return False
        held = sum(entry.held_nbytes(per_byte) for entry in (*self.waiting, *self._yielded))
        return held + self.waiting[-1].nbytes * (1 + per_byte) <= self._max_bytes

    def _learn(self) -> None:
        """See how large features are beside their inputs; until that is known one batch alone is asked for."""
        for entry in (*self.waiting, *self._yielded):
            if (nbytes := entry.features_nbytes()) is not None:
                self._state.features_per_byte = max(self._state.features_per_byte or 0.0, nbytes / entry.nbytes)

    def drop_used(self) -> None:
        """Free the batches whose forward has come."""
        self._learn()
        self._yielded = deque(entry for entry in self._yielded if not entry.used)

    def ask(self, entry: Entry) -> None:
        """Ask the teacher for a batch; what it raises is kept for the step; with a full queue it is asked later."""
        try:
            entry.answer = self._state.request(entry.asked, entry.call)
        except TeacherBusyError:
            pass
        except Exception as err:
            entry.answer = _failed(err)

    def take(self) -> Any:
        """The next batch; its forward may come from now on."""
        entry = self.waiting.popleft()
        if len(self._yielded) >= self._depth:
            late = self._yielded.popleft()
            self._dropped += not late.used
            _drop(late)
        self._yielded.append(entry)
        self._state.expecting = self
        batch, entry.batch = entry.batch, None
        return batch

    def alike(self, given: Inputs) -> list[Entry]:
        """The yielded batches of the form of a call: those whose forward may still come, in order, and then others."""
        alike = [entry for entry in self._yielded if entry.inputs.same_form_as(given)]
        return [*(entry for entry in alike if not entry.used), *(entry for entry in reversed(alike) if entry.used)]

    def find(self, given: Inputs) -> Entry | None:
        """The batch that a call is on, of those that were yielded; it may wait for a device."""
        return next((entry for entry in self.alike(given) if entry.inputs.same_as(given)), None)

    def answer(self, entry: Entry, call: Arguments) -> Answer:
        """The answer for a forward, which has come; the teacher is asked again where there is none."""
        answer = entry.answer
        if answer is None or entry.stale:
            left_out = entry.call.kwargs.keys() - entry.asked.kwargs.keys()
            whole = Arguments(call, {**{name: entry.call.kwargs[name] for name in left_out}, **call.kwargs})
            answer = entry.answer = self._state.request(self.question(call), whole)
        entry.used = True
        return answer

    def put_back(self, entry: Entry) -> None:
        """The forward that had its answer was on another batch: its own may still come."""
        entry.used = False
        if entry.answer is not None and entry not in self._yielded:  # the loop went on meanwhile
            self._yielded.appendleft(entry)

    def expects_a_forward(self) -> bool:
        """Whether a batch that was yielded waits for its forward."""
        return any(not entry.used for entry in self._yielded)

    def expected(self, given: Inputs, call: Arguments) -> str:
        """A message for a call on something else, while a forward is expected."""
        entries = [entry for entry in self._yielded if not entry.used]
        if self._dropped:
            taken = len(entries) + self._dropped
            return (
                f"{taken} batches of the loop over prefetch were taken before their forwards, and it keeps depth="
                f"{self._depth} of them, so that features of the first {self._dropped} were dropped; the forward got "
                f"{summary(call)}, which is none of the others. Where batches are taken together, as for gradient "
                f"accumulation, give prefetch their number: depth={taken} or above"
            )
        names = " or ".join(f"batch {entry.number}, {summary(entry.asked)}," for entry in entries) or "another batch"
        others = any(entry.inputs.same_form_as(given) for entry in entries)
        why = " of other values" if others else ""
        return (
            f"the forward got {summary(call)}{why}, where {names} of the loop over prefetch was expected, which the "
            "teacher was asked for. Forward the batch as it was yielded, or give prefetch inputs=, a function that "
            "makes of a batch what the forward gets. model.eval() or only_student_forward() are for other batches; the "
            "loop's end, or its close(), drops what was asked for"
        )

    def used(self, step: Step) -> None:
        """The loss of a step is being computed."""
        assert step.answer is not None
        self._dropped = 0
        waited_s, step.answer.waited_s = step.answer.waited_s, 0.0
        self._progress(waited_s)

    def rest_if_interrupted(self) -> None:
        """Rest, if an error has ended the loop and an interactive session keeps it, with the frames of that error.

        Such a session remembers the last error that came to its prompt, where no loop was left running.
        """
        if self._interrupted_by != _last_error():
            self.rest()

    def rest(self) -> None:
        """Drop what was asked for; the teacher is told. Batches that wait stay, for a loop that goes on after all.

        The garbage collector may call this at any time, also while a method of this object runs.
        """
        with contextlib.suppress(ValueError):
            self._state.ahead.remove(self)
        if self._state.expecting is self:
            self._state.expecting = None
        for entry in (*self.waiting, *self._yielded):
            _drop(entry)
        self._yielded = deque()

    def close(self) -> None:
        """Rest, and ask for nothing more."""
        self.closed = True
        self.rest()


def _last_error() -> int:
    return id(getattr(sys, "last_traceback", None))


def _drop(entry: Entry) -> None:
    if entry.answer is not None and not entry.used and not entry.answer.lost:
        entry.answer.future.cancel()
    entry.answer = None


def _failed(error: Exception) -> Answer:
    future: Future[Any] = Future()
    future.set_exception(error)
    return Answer(future)
