"""One batch on its way through teacher and student, and the state of a meta-model that steps through batches."""

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.pinned import to_device
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import map_tensors, tensors_of
from torch import nn

from schoolhouse.callers import to_caller
from schoolhouse.distill.answer import Answer
from schoolhouse.distill.batch_identity import Inputs
from schoolhouse.distill.look_ahead import Loops, Match
from schoolhouse.distill.loss_arguments import LossArguments
from schoolhouse.distill.question import autocast_as_now, copy_of, holds_tokens, refuse_cache, without_cache
from schoolhouse.distill.unseen import Unseen
from schoolhouse.errors import FeatureMismatchError, UsageError
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.protocol import Features, Teacher


@dataclass(eq=False)
class Step:
    """What one batch has produced: the teacher's features to come, and the student's outputs by layer."""

    answer: Answer | None = None
    later: Callable[[], Answer] | None = None  # asks the teacher once somebody needs the features
    match: Match | None = None  # with a batch that was asked for ahead
    outputs: dict[str, Any] = field(default_factory=dict)
    student_ran: bool = False
    gradients: bool = field(default_factory=torch.is_grad_enabled)
    inputs: Inputs | None = None  # kept where teacher and student run in separate calls
    injected: dict[str, Any] = field(default_factory=dict)  # layerwise: what layers of the student were given
    ran_twice: set[str] = field(default_factory=set)  # layerwise: layers that ran again, on inputs of the student's own
    thread: int = field(default_factory=threading.get_ident)

    def confirm(self) -> None:
        """See whether the forward was on the batch that it was taken for; if it was on another one, it gets that.

        Raises:
            FeatureMismatchError: if it was on none of those that were asked for, or if layers of the student were given
                features of the wrong one.
        """
        if self.match is not None:
            self.answer = self.match.confirm(final=bool(self.injected))

    def features(self) -> Features:
        """Wait for the teacher's answer; a teacher that was not asked yet is asked."""
        if self.answer is None:
            assert self.later is not None
            self.answer, self.later = self.later(), None
        return self.answer.features()


@dataclass(eq=False, kw_only=True)
class Distillation:
    """State of a meta-model, beside its module tree."""

    teacher: Teacher
    owns_teacher: bool
    criterion: Mapping[tuple[str, str], nn.Module]
    loss_arguments: LossArguments
    unseen: Unseen
    original_cls: type[nn.Module]
    minimal_state_dict: bool
    own_forward: Callable[..., Any] | None  # a forward that was set on the student itself
    encodings: Mapping[Tap, Encoding] = field(default_factory=dict)
    positions: Callable[..., Any] | None = None
    asks_at_once: bool = False  # also where no gradients are wanted
    taps: tuple[Tap, ...] = ()
    step: Step | None = None  # that the teacher was asked for
    alone: Step | None = None  # of the student, whose batch the teacher may get later
    recording: Step | None = None  # while the student's forward runs
    ended: Step | None = None  # from there until the call of the student returns
    recomputing: Step | None = None  # whose backward runs
    only_student: bool = False
    only_teacher: bool = False
    handles: list[Any] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)  # held while a forward runs, or the state is read or loaded
    running: int | None = None  # the thread whose forward runs
    depth: int = 0  # of forwards within one another
    known_signature: inspect.Signature | None = None
    loops: Loops = field(default_factory=Loops)  # over `prefetch`

    @property
    def signature(self) -> inspect.Signature:
        """Of the student's own forward; one that does not say takes anything."""
        if self.known_signature is None:
            forward = self.own_forward or functools.partial(self.original_cls.forward, None)
            try:
                self.known_signature = inspect.signature(forward)
            except (TypeError, ValueError):
                self.known_signature = inspect.signature(lambda *args, **kwargs: None)
        return self.known_signature

    def __getstate__(self) -> dict[str, Any]:
        names = ("step", "alone", "recording", "ended", "recomputing", "running", "known_signature")
        transient = dict.fromkeys(names)
        now = {**self.__dict__, **transient, "depth": 0, "loops": Loops()}
        return {name: value for name, value in now.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        """A copy has a connection of its own only where it can be closed with it: by `export`."""
        if not isinstance(self.teacher, LocalTeacher) and not self.owns_teacher:
            memo[id(self.teacher)] = self.teacher
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def drop_step(self) -> None:
        """Forget what the last forward produced; the teacher is told."""
        if self.step is not None:
            if self.step.match is not None:
                self.step.match.drop()
            elif self.step.answer is not None:
                self.step.answer.future.cancel()
        self.step = self.alone = self.recording = self.ended = self.recomputing = None

    def enter(self) -> bool:
        """Begin a forward; until `leave`, no other thread may. False for one within another, which is a part of it."""
        if self.running not in (None, threading.get_ident()):
            raise UsageError(
                "the model runs in another thread, and the two forwards would mix their batches: give each thread a "
                "copy.deepcopy of the model, or take turns"
            )
        self.lock.acquire()  # another thread may be saving the state
        self.running = threading.get_ident()
        self.depth += 1
        return self.depth == 1

    def leave(self) -> None:
        """End a forward, whether it came to its end or not."""
        self.depth -= 1
        if self.depth == 0:
            self.recording = self.running = None
        self.lock.release()

    def ask(self, args: Any, kwargs: Any, training: bool) -> Step | None:
        """Begin a step: the teacher gets the batch, at once if the student trains, and else when features are needed.

        None for a forward whose features nobody can need: one that goes on from a key-value cache of the student's.
        """
        if training and self.step is not None and self.step.student_ran and self.step.answer is not None:
            warnings.warn(
                "forward was called again without compute_kd_loss; the earlier batch's features are dropped",
                stacklevel=to_caller(),
            )
        self.drop_step()
        call = Arguments(args, kwargs)
        trains = training and torch.is_grad_enabled()
        if not trains and not self.asks_at_once and holds_tokens(call):
            self.step = Step(later=refuse_cache, student_ran=True)
            return None
        call = without_cache(call)
        match = self.loops.match(call, training=trains)
        if match is not None:
            self.step = Step(match.answer, match=match)
        else:
            later = None if trains or self.asks_at_once else self._later(call)
            self.step = Step(self.request(call) if later is None else None, later)
        return self.step

    def _later(self, call: Arguments) -> Callable[[], Answer] | None:
        """What asks for the features of a batch as it is now; None if no copy of it can be kept."""
        copied = copy_of(call)
        return None if copied is None else functools.partial(self._request_as_then, copied, autocast_as_now())

    def _request_as_then(self, call: Arguments, autocast: Callable[[], Any]) -> Answer:
        with autocast():
            return self.request(call)

    def request(self, call: Arguments, whole: Arguments | None = None, taps: tuple[Tap, ...] = ()) -> Answer:
        """Ask the teacher for the features of a batch, with `call`, which may be a part of the `whole` call."""
        self.unseen.tell(call.kwargs)
        if not self.encodings:
            return Answer(self.teacher.submit(call, call.kwargs, taps or self.taps))
        whole = call if whole is None else whole
        mask = None if self.positions is None else self.positions(*whole, **whole.kwargs)
        submit: Any = self.teacher.submit  # one that can encode
        return Answer(submit(call, call.kwargs, taps or self.taps, encodings=self.encodings, positions=mask))

    def begin(self, args: Any, kwargs: Any, training: bool) -> None:
        """Begin the student's forward, and the teacher's unless it is switched off."""
        self.ended = None
        self.recording = (
            self._student_step(args, kwargs, training) if self.only_student else self.ask(args, kwargs, training)
        )

    def _student_step(self, args: Any, kwargs: Any, training: bool) -> Step | None:
        """Where a forward of the student alone leaves its outputs: nowhere, if a step waits for its loss already."""
        if self.step is not None and self.step.student_ran:
            return None
        inputs = Inputs(args, kwargs)
        if self.step is not None and self.step.inputs is not None and self.step.inputs.same_as(inputs):
            return self.step
        if self.alone is not None and self.alone.student_ran and training:
            warnings.warn(
                "the student ran again without compute_kd_loss; its earlier outputs are dropped",
                stacklevel=to_caller(),
            )
        self.alone = Step(inputs=inputs)
        return self.alone

    def end(self, output: Any) -> None:
        """The student's forward is over; hooks that follow may still change what its call returns."""
        if self.recording is not None:
            self.recording.student_ran = True
            if any(layer == "" for layer, _ in self.criterion):
                self.recording.outputs[""] = output
                self.ended = self.recording

    def returned(self, output: Any) -> None:
        """The student's call returns `output`. A forward that was not called as a module never comes here."""
        if self.ended is not None:
            self.ended.outputs[""] = output
        self.ended = None

    def ask_alone(self, args: Any, kwargs: Any) -> Any:
        """Run the teacher alone; a student that ran on the same batch before, or runs on it next, is paired with it."""
        self.ended = None
        inputs = Inputs(args, kwargs)
        whole = Tap("")
        call = without_cache(Arguments(args, kwargs))
        answer = self.request(call, taps=tuple(dict.fromkeys((*self.taps, whole))))
        features = answer.features()
        before = self.alone
        self.drop_step()
        self.step = Step(answer, inputs=inputs)
        if before is not None and before.student_ran and before.inputs is not None and before.inputs.same_as(inputs):
            self.step.outputs, self.step.gradients, self.step.student_ran = before.outputs, before.gradients, True
        return features[whole]

    def complete_step(self) -> Step:
        """The step whose loss can be computed.

        Raises:
            UsageError: if there is none, or if it is another thread's.
            FeatureMismatchError: if the student did not run on the batch that the teacher got.
        """
        step = self.step
        if step is None and self.alone is not None:
            raise UsageError(
                "the teacher was not asked for the last batch: only_student_forward was on; forward it without, or "
                "within only_teacher_forward"
            )
        if step is None:
            raise UsageError("compute_kd_loss needs a forward before it; call model(batch) first")
        if not step.student_ran:
            raise FeatureMismatchError(
                "the student did not run, or failed, on the batch that the teacher got; forward that batch again"
            )
        if step.thread != threading.get_ident():
            raise UsageError("the last forward ran in another thread; give each thread a copy.deepcopy of the model")
        return step


def eager(function: Any) -> Any:
    """Keep `function` out of torch.compile, as `torch.compiler.disable`, which takes a second to import, does."""
    disabled = vars(torch)["_disable_dynamo"](function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return disabled(*args) if torch.compiler.is_compiling() else function(*args)

    return call


def on_device_of(outputs: Any, value: Any) -> Any:
    """A nested value with its tensors on the device of the first one of `outputs`; they may be on their way."""
    first = next(tensors_of(outputs), None)
    device = torch.device("cpu") if first is None else first.device
    return map_tensors(value, lambda tensor: to_device(tensor, device))
