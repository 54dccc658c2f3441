"""A step, which is one batch on its way through teacher and student, and the state of the meta-model that takes it."""

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
    """What one batch has produced so far: the teacher's answer, and the student's outputs by layer."""

    answer: Answer | None = None
    later: Callable[[], Answer] | None = None  # asks the teacher once the features are needed
    match: Match | None = None  # the prefetched batch that the forward was on
    outputs: dict[str, Any] = field(default_factory=dict)
    student_ran: bool = False
    gradients: bool = field(default_factory=torch.is_grad_enabled)
    inputs: Inputs | None = None  # the batch, if teacher and student run in separate calls
    injected: dict[str, Any] = field(default_factory=dict)  # layerwise: inputs given to each layer of the student
    ran_twice: set[str] = field(default_factory=set)  # layerwise: layers that ran again, on the student's own inputs
    thread: int = field(default_factory=threading.get_ident)

    def confirm(self) -> None:
        """Check a guess about which prefetched batch the forward was on, and take the right answer if it was wrong.

        Raises:
            FeatureMismatchError: if the forward was on no prefetched batch, or if layers of the student were already
                given features of the wrong one.
        """
        if self.match is not None:
            self.answer = self.match.confirm(final=bool(self.injected))

    def features(self) -> Features:
        """Wait for the teacher's features; asks the teacher first if that was put off."""
        if self.answer is None:
            assert self.later is not None
            self.answer, self.later = self.later(), None
        return self.answer.features()


@dataclass(eq=False, kw_only=True)
class Distillation:
    """State of a meta-model that is not in its module tree."""

    teacher: Teacher
    owns_teacher: bool
    criterion: Mapping[tuple[str, str], nn.Module]
    loss_arguments: LossArguments
    unseen: Unseen
    original_cls: type[nn.Module]
    minimal_state_dict: bool
    own_forward: Callable[..., Any] | None  # a forward that was set on the student object, not on its class
    encodings: Mapping[Tap, Encoding] = field(default_factory=dict)
    positions: Callable[..., Any] | None = None
    asks_at_once: bool = False  # ask the teacher at each forward, even without gradients
    taps: tuple[Tap, ...] = ()
    step: Step | None = None  # the step waiting for its loss
    alone: Step | None = None  # a forward of the student alone, on a batch that the teacher may get later
    recording: Step | None = None  # the step whose student forward is running
    ended: Step | None = None  # the step whose student forward has ended, but whose call has not returned yet
    recomputing: Step | None = None  # the step whose backward is running
    only_student: bool = False
    only_teacher: bool = False
    handles: list[Any] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)  # held during a forward, and while the state dict is accessed
    running: int | None = None  # the thread whose forward is running
    depth: int = 0  # how many forwards are nested
    known_signature: inspect.Signature | None = None
    loops: Loops = field(default_factory=Loops)  # the open loops over `prefetch`

    @property
    def signature(self) -> inspect.Signature:
        """Signature of the student's own forward; if it has none, one that takes any arguments."""
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
        """Copy the state. A remote teacher is copied only if the model owns it: then `export` of the copy closes it."""
        if not isinstance(self.teacher, LocalTeacher) and not self.owns_teacher:
            memo[id(self.teacher)] = self.teacher
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def drop_step(self) -> None:
        """Drop the open step, and cancel its request to the teacher."""
        if self.step is not None:
            if self.step.match is not None:
                self.step.match.drop()
            elif self.step.answer is not None:
                self.step.answer.future.cancel()
        self.step = self.alone = self.recording = self.ended = self.recomputing = None

    def enter(self) -> bool:
        """Begin a forward; no other thread may begin one until `leave`. False if it is nested in another forward."""
        if self.running not in (None, threading.get_ident()):
            raise UsageError(
                "the model is running in another thread, and the two forwards would mix their batches: give each "
                "thread a copy.deepcopy of the model, or take turns"
            )
        self.lock.acquire()  # waits for a thread that is saving the state
        self.running = threading.get_ident()
        self.depth += 1
        return self.depth == 1

    def leave(self) -> None:
        """End a forward, also one that has failed."""
        self.depth -= 1
        if self.depth == 0:
            self.recording = self.running = None
        self.lock.release()

    def ask(self, args: Any, kwargs: Any, training: bool) -> Step | None:
        """Begin a step: ask the teacher at once if the student trains, otherwise when its features are needed.

        None if the teacher cannot be asked: outside training, for a forward that continues from the student's own
        key-value cache.
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
        """A function that asks for the features of the batch as it is now; None if the batch cannot be copied."""
        copied = copy_of(call)
        return None if copied is None else functools.partial(self._request_as_then, copied, autocast_as_now())

    def _request_as_then(self, call: Arguments, autocast: Callable[[], Any]) -> Answer:
        with autocast():
            return self.request(call)

    def request(self, call: Arguments, whole: Arguments | None = None, taps: tuple[Tap, ...] = ()) -> Answer:
        """Ask the teacher for the features of the arguments `call`, which may be a part of the `whole` call."""
        self.unseen.tell(call.kwargs)
        if not self.encodings:
            return Answer(self.teacher.submit(call, call.kwargs, taps or self.taps))
        whole = call if whole is None else whole
        mask = None if self.positions is None else self.positions(*whole, **whole.kwargs)
        submit: Any = self.teacher.submit  # `convert` checked that it takes encodings
        return Answer(submit(call, call.kwargs, taps or self.taps, encodings=self.encodings, positions=mask))

    def begin(self, args: Any, kwargs: Any, training: bool) -> None:
        """Begin the student's forward, and ask the teacher unless that is switched off."""
        self.ended = None
        self.recording = (
            self._student_step(args, kwargs, training) if self.only_student else self.ask(args, kwargs, training)
        )

    def _student_step(self, args: Any, kwargs: Any, training: bool) -> Step | None:
        """The step that takes the outputs of a forward of the student alone; None if a step is waiting for its loss."""
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
        """The student's forward has ended; forward hooks may still change what its call returns."""
        if self.recording is not None:
            self.recording.student_ran = True
            if any(layer == "" for layer, _ in self.criterion):
                self.recording.outputs[""] = output
                self.ended = self.recording

    def returned(self, output: Any) -> None:
        """The student's call returns `output`. It is not called if the user called `forward` directly."""
        if self.ended is not None:
            self.ended.outputs[""] = output
        self.ended = None

    def ask_alone(self, args: Any, kwargs: Any) -> Any:
        """Run the teacher alone; the student's forward on the same batch, before or after, completes the step."""
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
        """The step, after a check that its loss can be computed.

        Raises:
            UsageError: if there is no step, or if its forward ran in another thread.
            FeatureMismatchError: if the student did not run on the batch that the teacher got.
        """
        step = self.step
        if step is None and self.alone is not None:
            raise UsageError(
                "the teacher was not asked for the last batch, since only_student_forward was on; run the forward "
                "without it, or run the teacher on the batch within only_teacher_forward"
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
    """Keep `function` out of torch.compile, like `torch.compiler.disable`, but without its import of about a second."""
    disabled = vars(torch)["_disable_dynamo"](function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return disabled(*args) if torch.compiler.is_compiling() else function(*args)

    return call


def on_device_of(outputs: Any, value: Any) -> Any:
    """A nested value with its tensors on the device of the first tensor in `outputs`; the copies may still run."""
    first = next(iter(tensors_of(outputs)), None)
    device = torch.device("cpu") if first is None else first.device
    return map_tensors(value, lambda tensor: to_device(tensor, device))
