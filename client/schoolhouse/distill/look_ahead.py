"""Prefetched batches: those that the teacher was asked for ahead of their forwards, and which one a forward is on."""

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

_PASSING = (TeacherBusyError, TeacherTimeoutError, TeacherUnavailableError)  # errors after which asking again may help


@dataclass(eq=False)
class Entry:
    """One prefetched batch. `answer` is None as long as the teacher could not be asked, since its queue was full."""

    number: int
    batch: Any  # None once it was yielded
    call: Arguments
    asked: Arguments  # the part of `call` that is sent to the teacher
    inputs: Inputs  # the values of `asked` when the teacher was asked
    answer: Answer | None = None
    used: bool = False

    @property
    def unanswered(self) -> bool:
        """Whether the teacher must be asked, for the first time or again, since it was busy, late or away."""
        answer = self.answer  # read once: a garbage collection may set it to None meanwhile
        return answer is None or answer.lost or isinstance(answer.error(), _PASSING)

    @property
    def stale(self) -> bool:
        """Whether a forward on this batch must ask the teacher again."""
        answer = self.answer
        return answer is None or self.unanswered or (self.used and not answer.untouched())

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return max(1, sum(tensor.nbytes for tensor in tensors_of(self.call)))

    def features_nbytes(self) -> int | None:
        """Bytes of the features; None if they have not arrived."""
        answer = self.answer
        return None if answer is None or not answer.future.done() or answer.error() is not None else answer.nbytes

    def held_nbytes(self, features_per_byte: float) -> float:
        """Bytes of inputs and features; features that have not arrived count `features_per_byte` per byte of inputs."""
        known = self.features_nbytes()
        return self.nbytes + (self.nbytes * features_per_byte if known is None else known)


class Ahead:
    """The batches of one loop: those asked for and not yielded yet, and those yielded whose forward may still come."""

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
        """`question` reduces a call to what the teacher is asked with, `bound` remembers its values.

        `request` asks the teacher with such a question; its second argument is the whole call.
        """
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
        self._dropped = 0  # batches dropped since the last loss, as their forward did not come in time
        self._interrupted_by: int | None = None  # the session's last error when the loop last took a batch

    def go_on(self) -> None:
        """Note that the loop takes its next batch, so that it is open, if it was not."""
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
        """Learn how large features are relative to their inputs; until then only one batch is asked for ahead."""
        for entry in (*self.waiting, *self._yielded):
            if (nbytes := entry.features_nbytes()) is not None:
                self._loops.features_per_byte = max(self._loops.features_per_byte or 0.0, nbytes / entry.nbytes)

    def drop_used(self) -> None:
        """Free the batches whose forward has run."""
        self._learn()
        self._yielded = deque(entry for entry in self._yielded if not entry.used)

    def ask(self, entry: Entry) -> None:
        """Ask the teacher for a batch. An error is kept for the batch's step; a full queue means to ask later."""
        try:
            entry.answer = self._request(entry.asked, entry.call)
        except TeacherBusyError:
            pass
        except Exception as err:
            entry.answer = _failed(err)

    def take(self) -> Any:
        """Yield the next batch, whose forward may come from now on."""
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
        """The yielded batches with the shapes of a call: first, in order, those whose forward has not run yet."""
        alike = [entry for entry in self._yielded if entry.inputs.same_form_as(given)]
        return [*(entry for entry in alike if not entry.used), *(entry for entry in reversed(alike) if entry.used)]

    def find(self, given: Inputs) -> Entry | None:
        """The yielded batch that has the values of a call; the comparison may wait for a device."""
        return next((entry for entry in self.alike(given) if entry.inputs.same_as(given)), None)

    def answer(self, entry: Entry, call: Arguments) -> Answer:
        """The answer for the forward that now runs on this batch; asks the teacher again if the entry has none."""
        answer = entry.answer
        if answer is None or entry.stale:
            left_out = entry.call.kwargs.keys() - entry.asked.kwargs.keys()
            whole = Arguments(call, {**{name: entry.call.kwargs[name] for name in left_out}, **call.kwargs})
            answer = entry.answer = self._request(self.question(call), whole)
        entry.used = True
        return answer

    def put_back(self, entry: Entry) -> None:
        """Make a batch wait for its forward again, after a forward was taken for its own by mistake."""
        entry.used = False
        if entry.answer is not None and entry not in self._yielded:  # dropped there, as the loop went on meanwhile
            self._yielded.appendleft(entry)

    def expects_a_forward(self) -> bool:
        """Whether a yielded batch is waiting for its forward."""
        return any(not entry.used for entry in self._yielded)

    def given(self, call: Arguments) -> Inputs:
        """The values of a call, as the teacher would be asked with them."""
        return self.bound(self.question(call))

    def expected(self, given: Inputs, call: Arguments) -> str:
        """The error message for a forward on another batch than the expected ones."""
        entries = [entry for entry in self._yielded if not entry.used]
        if self._dropped:
            taken = len(entries) + self._dropped
            return (
                f"{taken} batches of the loop over prefetch were taken before their forwards, and prefetch keeps "
                f"depth={self._depth} of them, so that features of the first {self._dropped} were dropped; the forward "
                f"got {summary(call)}, which is none of the others. Where several batches are taken at once, as for "
                f"gradient accumulation, give prefetch their number: depth={taken} or above"
            )
        names = " or ".join(f"batch {entry.number}, {summary(entry.asked)}," for entry in entries) or "another batch"
        others = any(entry.inputs.same_form_as(given) for entry in entries)
        why = " with other values" if others else ""
        return (
            f"the forward got {summary(call)}{why}, where {names} of the loop over prefetch was expected, for which "
            "the teacher was asked. Forward the batch as it was yielded, or give prefetch inputs=, a function that "
            "makes the arguments of the forward from a batch. Run other batches under model.eval() or "
            "only_student_forward(), or after the loop has ended or was closed with close()"
        )

    def used(self, answer: Answer) -> None:
        """Report how long the step whose loss is now computed waited for the teacher."""
        self._dropped = 0
        waited_s, answer.waited_s = answer.waited_s, 0.0
        self._progress(waited_s)

    def rest_if_interrupted(self) -> None:
        """Rest, if an error has ended the loop without closing it, as in an interactive session.

        Such a session keeps the last error that reached its prompt, and with its frames the loop. So a new last error
        means that no loop from before it is running any more.
        """
        if self._interrupted_by != _last_error():
            self.rest()

    def rest(self) -> None:
        """Cancel what was asked for. Batches not yielded yet stay, in case the loop goes on after all.

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
        """Rest, and never ask again."""
        self.closed = True
        self.rest()


@dataclass(eq=False)
class Match:
    """The prefetched batch that a forward is on.

    While the values of the forward's arguments are still being copied from a device, it is a guess, and `given` holds
    these values as each open loop would ask with them, the innermost loop first. `confirm` or `drop` checks the guess.
    """

    ahead: Ahead
    entry: Entry
    answer: Answer
    call: Arguments
    given: Mapping[Ahead, Inputs] | None = None
    among_others: bool = False  # several batches have the same shapes, so the guess may be wrong

    def confirm(self, *, final: bool) -> Answer:
        """The answer for the batch that the forward was really on. With `final` a wrong guess cannot be corrected.

        Raises:
            FeatureMismatchError: if the forward was on no prefetched batch, or, with `final`, on another than guessed.
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
        """Check the guess of a forward whose loss is not computed."""
        self._wrong()

    def _wrong(self) -> Mapping[Ahead, Inputs] | None:
        """The forward's values if the guess was wrong, otherwise None; the guessed batch then waits again."""
        given, self.given = self.given, None
        if given is None or self.entry.inputs.same_as(given[self.ahead]):
            return None
        self.ahead.put_back(self.entry)
        return given


class Loops:
    """The open loops over `prefetch` of a model."""

    def __init__(self) -> None:
        self.open: list[Ahead] = []  # the innermost is last
        self.expecting: Ahead | None = None  # the loop that yielded last
        self.features_per_byte: float | None = None  # largest ratio so far of feature bytes to input bytes

    def match(self, call: Arguments, *, training: bool) -> Match | None:
        """The prefetched batch that a call is on, or None.

        In training, while the values of the call are still being copied from a device, it is taken for the next batch
        with its shapes, so that the forward does not wait for them; `Match.confirm` checks that before the loss.

        Raises:
            FeatureMismatchError: in training, if prefetched batches wait for their forward, and this is none of them.
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
    """A guess at the batch that a call is on; None if the call's values are known, or no batch of its shapes waits.

    Also None if a waiting batch must be asked for again, since only the call on that very batch has its values.
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
