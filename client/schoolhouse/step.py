"""One batch on its way through teacher and student, and the state of a meta-model that steps through batches."""

import copy
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.memory import version_of
from schoolhouse_wire.nested import map_tensors
from schoolhouse_wire.tensors import bytes_of
from torch import nn

from schoolhouse.errors import FeatureMismatchError
from schoolhouse.taps import Tap, is_plain, signature_of, tensors_of
from schoolhouse.teachers import Features, LocalTeacher, Teacher

_INNER = tuple(str(Path(file).parent) for file in (torch.__file__, __file__))


@dataclass(eq=False)
class Step:
    """What one batch has produced: the teacher's features to come, and the student's outputs by layer."""

    future: "Future[Features] | None" = None
    outputs: dict[str, Any] = field(default_factory=dict)
    student_ran: bool = False
    gradients: bool = field(default_factory=torch.is_grad_enabled)
    inputs: "Inputs | None" = None  # kept where teacher and student run in separate calls
    injected: dict[str, Any] = field(default_factory=dict)  # layerwise: what layers of the student were given
    ran_twice: set[str] = field(default_factory=set)  # layerwise: layers that ran again, on inputs of the student's own
    thread: int = field(default_factory=threading.get_ident)
    versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # of features that are here

    def __post_init__(self) -> None:
        if self.future is not None and self.future.done() and self.future.exception() is None:
            outputs = [value for tap, value in self.future.result().items() if tap.side == "output"]
            self.versions = [(tensor, version_of(tensor)) for tensor in tensors_of(outputs)]

    def features(self) -> Features:
        """Wait for the teacher's answer."""
        assert self.future is not None
        features = self.future.result()
        if any(version_of(tensor) != version for tensor, version in self.versions):
            raise FeatureMismatchError(
                "the teacher's features were written into after its forward, and are no longer those of this batch: "
                "have its modules return a clone of memory that they use again"
            )
        return features


class Inputs:
    """A batch, remembered by its values to tell whether another one is the same, whatever is written into it later.

    An object that is not known, such as a nested tensor, is the same only if it is itself.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        given = Arguments(args, kwargs)
        self._tensors = [tensor.detach().clone() for tensor in tensors_of(given) if is_plain(tensor)]
        self._objects: list[Any] = []  # kept, so that their ids stay theirs
        self._rest = signature_of(given, self._told)

    def _told(self, value: Any) -> Hashable:
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            return (type(value), value.shape, value.dtype.str, value.tobytes())
        self._objects.append(value)
        return (id(value), version_of(value) if isinstance(value, torch.Tensor) else 0)

    def same_as(self, other: "Inputs") -> bool:
        """Whether both hold the same values in the same places."""
        return self._rest == other._rest and all(map(_same, self._tensors, other._tensors))


def _same(kept: torch.Tensor, given: torch.Tensor) -> bool:
    kept, given = (tensor if tensor.layout is torch.strided else tensor.to_dense() for tensor in (kept, given))
    return torch.equal(bytes_of(kept.contiguous()), bytes_of(given.contiguous()))  # a NaN equals itself


@dataclass(eq=False, kw_only=True)
class Distillation:
    """State of a meta-model, beside its module tree."""

    teacher: Teacher
    owns_teacher: bool
    criterion: Mapping[tuple[str, str], nn.Module]
    original_cls: type[nn.Module]
    minimal_state_dict: bool
    own_forward: Callable[..., Any] | None  # a forward that was set on the student itself
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

    def __getstate__(self) -> dict[str, Any]:
        transient = dict.fromkeys(("step", "alone", "recording", "ended", "recomputing", "running"))
        return {name: value for name, value in {**self.__dict__, **transient, "depth": 0}.items() if name != "lock"}

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
        if self.step is not None and self.step.future is not None:
            self.step.future.cancel()
        self.step = self.alone = self.recording = self.ended = self.recomputing = None

    def enter(self) -> bool:
        """Begin a forward; until `leave`, no other thread may. False for one within another, which is a part of it."""
        if self.running not in (None, threading.get_ident()):
            raise FeatureMismatchError(
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

    def ask(self, args: Any, kwargs: Any, training: bool) -> Step:
        """Begin a step: the teacher gets the batch."""
        if self.step is not None and self.step.student_ran and training:
            warnings.warn(
                "forward was called again without compute_kd_loss; the earlier batch's features are dropped",
                stacklevel=_to_caller(),
            )
        self.drop_step()
        self.step = Step(self.teacher.submit(args, kwargs, self.taps))
        return self.step

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
                stacklevel=_to_caller(),
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
        future = self.teacher.submit(args, kwargs, tuple(dict.fromkeys((*self.taps, whole))))
        features = future.result()
        before = self.alone
        self.drop_step()
        self.step = Step(future, inputs=inputs)
        if before is not None and before.student_ran and before.inputs is not None and before.inputs.same_as(inputs):
            self.step.outputs, self.step.gradients, self.step.student_ran = before.outputs, before.gradients, True
        return features[whole]

    def complete_step(self) -> Step:
        """The step whose loss can be computed.

        Raises:
            FeatureMismatchError: if there is none, or if it is another thread's.
        """
        step = self.step
        if step is None and self.alone is not None:
            raise FeatureMismatchError(
                "the teacher was not asked for the last batch: only_student_forward was on; forward it without, or "
                "within only_teacher_forward"
            )
        if step is None:
            raise FeatureMismatchError("compute_kd_loss needs a forward before it; call model(batch) first")
        if not step.student_ran:
            raise FeatureMismatchError(
                "the student did not run, or failed, on the batch that the teacher got; forward that batch again"
            )
        if step.thread != threading.get_ident():
            raise FeatureMismatchError(
                "the last forward ran in another thread; give each thread a copy.deepcopy of the model"
            )
        return step


def _to_caller() -> int:
    """The `stacklevel` that a warning of the calling function needs to name who called the model."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    return level


def eager(function: Any) -> Any:
    """Keep `function` out of torch.compile, as `torch.compiler.disable`, which takes a second to import, does."""
    disabled = vars(torch)["_disable_dynamo"](function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return disabled(*args) if torch.compiler.is_compiling() else function(*args)

    return call


def on_device_of(outputs: Any, features: Mapping[Tap, Any]) -> Mapping[Tap, Any]:
    """Features on the device of the first tensor of `outputs`."""
    device = next((tensor.device for tensor in tensors_of(outputs)), torch.device("cpu"))
    if all(tensor.device == device for tensor in tensors_of(features)):
        return features
    return {tap: map_tensors(value, lambda tensor: tensor.to(device)) for tap, value in features.items()}
