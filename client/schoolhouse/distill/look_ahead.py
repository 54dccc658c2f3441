"""Batches that the teacher was asked for ahead of their forwards, and which of them a forward is on."""

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import tensors_of

from schoolhouse.distill.answer import Answer
from schoolhouse.distill.batch_identity import Inputs, summary
from schoolhouse.errors import (
    FeatureMismatchError,
    TeacherBusyError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)

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
        loops: "Loops",
        request: Callable[[Arguments, Arguments], Answer],
        question: Callable[[Arguments], Arguments],
        bound: Callable[[Arguments], Inputs],
        *,
        depth: int,
        max_bytes: int,
        progress: Callable[[float], Any],
    ) -> None:
        """`request` asks the teacher with a question, which `question` makes of a call; `bound` makes inputs of one."""
        self.question = question
        self.bound = bound
        self.waiting: deque[Entry] = deque()
        self.closed = False
        self._yielded: deque[Entry] = deque()
        self._loops = loops
        self._request = request
        self._depth = depth
        self._max_bytes = max_bytes
        self._progress = progress
        self._dropped = 0  # since the last loss, batches whose forward did not come in time
        self._interrupted_by: int | None = None  # as the loop last went on

    def go_on(self) -> None:
        """The loop takes its next batch, and is the one whose batches are expected."""
        self._interrupted_by = _last_error()
        if not self.closed and self not in self._loops.open:
            self._loops.open.append(self)

    def has_room(self) -> bool:
        """Whether the teacher may be asked for one more batch."""
        if not self.waiting:
            return True
        self._learn()
        per_byte = self._loops.features_per_byte
        if per_byte is None or len(self.waiting) > self._depth or any(entry.unanswered for entry in self.waiting):
            return False
        held = sum(entry.held_nbytes(per_byte) for entry in (*self.waiting, *self._yielded))
        return held + self.waiting[-1].nbytes * (1 + per_byte) <= self._max_bytes

    def _learn(self) -> None:
        """See how large features are beside their inputs; until that is known one batch alone is asked for."""
        for entry in (*self.waiting, *self._yielded):
            if (nbytes := entry.features_nbytes()) is not None:
                self._loops.features_per_byte = max(self._loops.features_per_byte or 0.0, nbytes / entry.nbytes)

    def drop_used(self) -> None:
        """Free the batches whose forward has come."""
        self._learn()
        self._yielded = deque(entry for entry in self._yielded if not entry.used)

    def ask(self, entry: Entry) -> None:
        """Ask the teacher for a batch; what it raises is kept for the step; with a full queue it is asked later."""
        try:
            entry.answer = self._request(entry.asked, entry.call)
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
        self._loops.expecting = self
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
            answer = entry.answer = self._request(self.question(call), whole)
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

    def given(self, call: Arguments) -> Inputs:
        """What of a call the teacher was asked with."""
        return self.bound(self.question(call))

    def expected(self, given: Inputs, call: Arguments) -> str:
        """A message for a question on something else, while a forward is expected."""
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

    def used(self, answer: Answer) -> None:
        """The loss of a step is being computed."""
        self._dropped = 0
        waited_s, answer.waited_s = answer.waited_s, 0.0
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
            self._loops.open.remove(self)
        if self._loops.expecting is self:
            self._loops.expecting = None
        for entry in (*self.waiting, *self._yielded):
            _drop(entry)
        self._yielded = deque()

    def close(self) -> None:
        """Rest, and ask for nothing more."""
        self.closed = True
        self.rest()


@dataclass(eq=False)
class Match:
    """The batch that a forward is on, of those that were asked for ahead.

    It is a guess where the values that the forward got are on their way from a device: `given` holds them then, as each
    loop's teacher was asked with them, the innermost loop's first. `confirm` or `drop` sees whether it was right.
    """

    ahead: Ahead
    entry: Entry
    answer: Answer
    call: Arguments
    given: Mapping[Ahead, Inputs] | None = None
    among_others: bool = False  # of its form

    def confirm(self, *, final: bool) -> Answer:
        """The answer for the batch that the forward was on. With `final` it cannot be another one any more.

        Raises:
            FeatureMismatchError: if it was on none of those that were asked for, or on another one and that is final.
        """
        given = self._wrong()
        if given is None:
            return self.answer
        for ahead, inputs in given.items():
            entry = ahead.find(inputs)
            if entry is not None and not entry.stale and not final:
                self.ahead, self.entry, self.answer = ahead, entry, ahead.answer(entry, self.call)
                return self.answer
        raise FeatureMismatchError(self.ahead.expected(given[self.ahead], self.ahead.question(self.call)))

    def drop(self) -> None:
        """The forward has no loss."""
        self._wrong()

    def _wrong(self) -> Mapping[Ahead, Inputs] | None:
        """What the forward got if the guess was wrong; the batch that it named waits for its own forward again."""
        given, self.given = self.given, None
        if given is None or self.entry.inputs.same_as(given[self.ahead]):
            return None
        self.ahead.put_back(self.entry)
        return given


class Loops:
    """The loops over `prefetch` that a model is in."""

    def __init__(self) -> None:
        self.open: list[Ahead] = []  # the innermost last
        self.expecting: Ahead | None = None  # that of them which yielded last
        self.features_per_byte: float | None = None  # bytes of features a byte of inputs, the most so far

    def match(self, call: Arguments, *, training: bool) -> Match | None:
        """The batch that a call is on, if it was asked for ahead.

        In training it is taken for the next batch of its form while its values are on their way from a device, so that
        nobody waits for them here; `Match.confirm` holds it against that batch before a loss is computed.

        Raises:
            FeatureMismatchError: in training, if batches were asked for ahead, and this is none of them.
        """
        for ahead in [*self.open]:
            ahead.rest_if_interrupted()
        given = {ahead: ahead.given(call) for ahead in [*self.open][::-1]}
        if training and (guess := _guessed(given, call)) is not None:
            return guess
        for ahead, inputs in given.items():
            if (entry := ahead.find(inputs)) is not None:
                return Match(ahead, entry, ahead.answer(entry, call), call)
        last = self.expecting
        if training and last is not None and last.expects_a_forward():
            raise FeatureMismatchError(last.expected(last.given(call), last.question(call)))
        return None


def _guessed(given: Mapping[Ahead, Inputs], call: Arguments) -> Match | None:
    """The next batch that a call may be on; None where its values are here, or none waits for it.

    None, too, where one of those that wait is to be asked for again: its own call alone has its values.
    """
    loops = [(ahead, inputs) for ahead, inputs in given.items() if inputs.on_their_way]
    alike = [(ahead, entry) for ahead, inputs in loops for entry in ahead.alike(inputs)]
    waiting = [(ahead, entry) for ahead, entry in alike if not entry.used]
    if not waiting or any(entry.stale for _, entry in waiting):
        return None
    ahead, entry = waiting[0]
    return Match(ahead, entry, ahead.answer(entry, call), call, given, len(alike) > 1)


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
