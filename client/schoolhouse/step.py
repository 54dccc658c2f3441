"""One batch on its way through teacher and student, and the state of a meta-model that steps through batches."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from schoolhouse_wire.memory import version_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from schoolhouse.errors import ConfigError, FeatureMismatchError
from schoolhouse.taps import Tap, map_tensors, tensors_of
from schoolhouse.teachers import Features, Teacher


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

    def features(self) -> Features:
        """Wait for the teacher's answer."""
        if self.future is None:
            raise FeatureMismatchError(
                "the teacher was not asked for the last batch: only_student_forward was on; forward it without, or "
                "within only_teacher_forward"
            )
        return self.future.result()


class Inputs:
    """A batch, remembered to tell whether another one is the same."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        given = [list(args), dict(kwargs)]
        self._tensors = [(tensor, version_of(tensor)) for tensor in tensors_of(given)]
        self._rest = map_tensors(given, lambda tensor: (tensor.shape, tensor.dtype))

    def same_as(self, other: "Inputs") -> bool:
        """Whether both hold the same values in the same places."""
        return bool(self._rest == other._rest) and all(
            _same(*pair) for pair in zip(self._tensors, other._tensors, strict=True)
        )


def _same(kept: tuple[torch.Tensor, int], given: tuple[torch.Tensor, int]) -> bool:
    if version_of(kept[0]) != kept[1]:
        return False  # written into since, so what it held is gone
    return kept[0] is given[0] or (kept[0].device == given[0].device and torch.equal(kept[0], given[0]))


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
    step: Step | None = None
    recording: Step | None = None  # while the student's forward runs
    ended: Step | None = None  # from there until the call of the student returns
    recomputing: Step | None = None  # whose backward runs
    only_student: bool = False
    only_teacher: bool = False
    handles: list[Any] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        transient = ("step", "recording", "ended", "recomputing")
        return {**self.__dict__, **dict.fromkeys(transient)}

    def drop_step(self) -> None:
        """Forget what the last forward produced; the teacher is told."""
        if self.step is not None and self.step.future is not None:
            self.step.future.cancel()
        self.step = self.recording = self.ended = self.recomputing = None

    def ask(self, args: Any, kwargs: Any, training: bool) -> Step:
        """Begin a step: the teacher gets the batch."""
        if self.step is not None and self.step.student_ran and self.step.future is not None and training:
            warnings.warn(
                "forward was called again without compute_kd_loss; the earlier batch's features are dropped",
                stacklevel=6,
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
        """Where a forward of the student alone leaves its outputs: nowhere, if a batch is under way already."""
        inputs = Inputs(args, kwargs)
        step = self.step
        if step is not None and step.future is not None:
            waits = not step.student_ran and step.inputs is not None and step.inputs.same_as(inputs)
            return step if waits else None
        if step is not None and step.student_ran and training:
            warnings.warn(
                "the student ran again without compute_kd_loss; its earlier outputs are dropped", stacklevel=6
            )
        self.step = Step(inputs=inputs)
        return self.step

    def end(self, output: Any) -> None:
        """The student's forward is over; hooks that follow may still change what its call returns."""
        if self.recording is not None:
            self.recording.student_ran = True
            if any(layer == "" for layer, _ in self.criterion):
                self.recording.outputs[""] = output
                self.ended = self.recording
        self.recording = None

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
        before = self.step
        if before is not None and before.future is None and before.inputs is not None and before.inputs.same_as(inputs):
            before.future = future
        else:
            self.drop_step()
            self.step = Step(future, inputs=inputs)
        return features[whole]


def check_data_parallel(model: nn.Module, trainable_losses: bool) -> None:
    """Refuse settings of DistributedDataParallel under which gradients of a loss at inner layers go wrong.

    It expects gradients to come from the outputs that its own forward returned: with `static_graph` the first ones are
    not averaged, and with `find_unused_parameters` those of a loss's own parameters raise far from here.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None or wrapper.module is not model:
        return
    settings = {"static_graph": wrapper.static_graph}
    settings["find_unused_parameters"] = wrapper.find_unused_parameters and trainable_losses
    wrong = [name for name, on in settings.items() if on]
    if wrong:
        raise ConfigError(
            f"DistributedDataParallel({wrong[0]}=True) does not see the gradients that a distillation loss sends into "
            "layers and into its own parameters; leave that setting out"
        )


def _fsdp_class() -> Any:
    """The class that `fully_shard` adds to a module, if it can have been called: importing it takes long."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def check_loss_sharding(model: nn.Module, losses: Iterable[nn.Module]) -> None:
    """Refuse losses whose gradients FSDP2 would not average, since it holds parts of the student only."""
    kind = _fsdp_class()
    alone = [
        type(loss).__name__
        for loss in losses
        if any(p.requires_grad for p in loss.parameters()) and not any(isinstance(m, kind) for m in loss.modules())
    ]
    if alone and not isinstance(model, kind) and any(isinstance(module, kind) for module in model.modules()):
        raise ConfigError(
            f"parts of the student are sharded and the trainable losses ({', '.join(alone)}) are not, so that no one "
            "would average their gradients over ranks: fully_shard the converted model as a whole too, or each loss"
        )


def as_forward(model: nn.Module, layers: Iterable[str], compute: Callable[[], Any]) -> Any:
    """`compute()`, as a part of the forward of what FSDP2 shards: the model, or else parts of it around the layers.

    So the parameters of losses are whole while it runs, and a backward from its results reaches FSDP, also where the
    sharded module's own output has no part in them.
    """
    outermost = [[model]] if isinstance(model, _fsdp_class()) else [_sharded_around(model, layer) for layer in layers]
    for module in dict.fromkeys(around[0] for around in outermost if around):
        compute = functools.partial(_within, module, compute)
    return compute()


def _within(module: nn.Module, compute: Callable[[], Any]) -> Any:
    object.__setattr__(module, "_as_forward", compute)
    try:
        sys.modules["torch.distributed.fsdp"].register_fsdp_forward_method(module, "_as_forward")
        return module._as_forward()  # type: ignore[operator]
    finally:
        object.__delattr__(module, "_as_forward")


def _sharded_around(model: nn.Module, layer: str) -> list[Any]:
    """The parts of the model that hold `layer`, itself among them, and are sharded on their own; outermost first."""
    kind, names = _fsdp_class(), layer.split(".")
    around = (model.get_submodule(".".join(names[:end])) for end in range(1, len(names) + 1)) if kind and layer else ()
    return [module for module in around if isinstance(module, kind)]


def unshard_in_backward(model: nn.Module, layer: str, output: Any) -> None:
    """Let FSDP2 gather the parts around `layer` when a backward enters at its output, and not at theirs."""
    sharded = _sharded_around(model, layer)
    for tensor in tensors_of(output) if sharded else ():
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(_unshard, sharded))  # type: ignore[no-untyped-call]


def _unshard(sharded: Iterable[Any], _gradient: torch.Tensor) -> None:
    for module in sharded:
        module.unshard()


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
