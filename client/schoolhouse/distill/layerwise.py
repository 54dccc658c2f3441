"""LayerwiseDistillationModel: layers of the student get the inputs of the teacher's, and learn to give its outputs."""

import warnings
from typing import Any

import torch
from schoolhouse_wire.torch_private import children_of, in_backward
from schoolhouse_wire.values.tree import apart_from, storages_of, tensors_of
from torch import nn

from schoolhouse.distill.mode import KDMode
from schoolhouse.distill.model import DistillationModel
from schoolhouse.distill.step import Distillation, Step, eager, on_device_of
from schoolhouse.errors import FeatureMismatchError
from schoolhouse.taps import Tap


class LayerwiseMode(KDMode):
    """What the mode "layerwise_kd" does to a student."""

    needs_inputs = True

    def attach(self, model: nn.Module, state: Distillation, balancer: Any) -> None:
        """Also freeze all layers that are not in the criterion."""
        super().attach(model, state, balancer)
        model.requires_grad_(False)
        for layer, _ in state.criterion:
            model.get_submodule(layer).requires_grad_(True)
        head = children_of(model).get("lm_head")
        if head is not None and not any(f"{layer}.".startswith("lm_head.") for layer, _ in state.criterion):
            state.undo.append(_Skip(head))

    def taps(self, state: Distillation) -> tuple[Tap, ...]:
        """The outputs and also the inputs of the teacher's layers."""
        layers = dict.fromkeys(layer for _, layer in state.criterion)
        return tuple(Tap(layer, side) for layer in layers for side in ("input", "output"))

    def hook(self, state: Distillation, layer: str, module: nn.Module) -> None:
        """Also set a hook that gives the layer the inputs of the teacher's layer in its pair."""
        paired = next(teacher_layer for student_layer, teacher_layer in state.criterion if student_layer == layer)
        inject = _Inject(state, layer, Tap(paired, "input"))
        state.handles.append(module.register_forward_pre_hook(inject, with_kwargs=True))
        super().hook(state, layer, module)

    def mark(self, state: Distillation, step: Step, losses: dict[str, torch.Tensor]) -> None:
        """Remember in a backward which step it belongs to, as activation checkpointing runs layers of it again."""
        for loss in losses.values():
            if loss.requires_grad:
                loss.register_hook(_Recomputes(state, step))  # type: ignore[no-untyped-call]


class LayerwiseDistillationModel(DistillationModel):
    """Mixin of a student whose layers in the criterion replace layers of the teacher.

    Each of these layers gets the inputs of the teacher's layer: its positional arguments, or, if the teacher's layer
    was called with keyword arguments alone, those that hold tensors. Everything else in the student is frozen, and so
    are the parameters of the losses; `model.loss_modules.requires_grad_()` makes those trainable. The student's layer
    `lm_head`, unless it is in the criterion, returns its input. `export` leaves `requires_grad` as it is.
    """

    _schoolhouse_mode = LayerwiseMode()

    def _get_name(self) -> str:
        return f"Layerwise{super()._get_name()}"


class _Skip:
    """Makes a module return its input; calling the object undoes this. The module's parameters stay where they are."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own_forward = module.__dict__.get("forward")
        module.forward = _pass_on

    def __call__(self) -> None:
        del self._module.forward
        if self._own_forward is not None:
            self._module.forward = self._own_forward


def _pass_on(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


class _Recomputes:
    """Gradient hook of a step's loss: what activation checkpointing runs again from here on belongs to this step."""

    def __init__(self, state: Distillation, step: Step) -> None:
        self._state, self._step = state, step

    def __call__(self, _gradient: torch.Tensor) -> None:
        self._state.recomputing = self._step


class _Inject:
    """Forward pre-hook that gives a layer the inputs of the teacher's layer."""

    def __init__(self, state: Distillation, layer: str, tap: Tap) -> None:
        self._state, self._layer, self._tap = state, layer, tap

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        step = self._state.recording
        if step is None:
            return self._again(args, kwargs) if in_backward() else None
        if step.answer is None:
            return None  # the teacher was not asked: the student runs alone
        if self._layer in step.injected:
            step.ran_twice.add(self._layer)
            warnings.warn(
                f"the layer {self._layer!r} runs again in one forward, now on the student's own inputs", stacklevel=2
            )
            return None
        if step.match is not None and step.match.among_others:
            step.confirm()
        device = [*module.parameters(), *tensors_of(args), *tensors_of(kwargs)][:1]
        features = step.features()
        learned = storages_of([value for tap, value in features.items() if tap.side == "output"])
        given = on_device_of(device, apart_from(features[self._tap], learned))
        step.injected[self._layer] = given
        return _replaced(given, args, kwargs)

    def _again(self, args: Any, kwargs: dict[str, Any]) -> Any:
        step = self._state.recomputing
        if step is None:
            raise FeatureMismatchError(
                f"activation checkpointing runs the layer {self._layer!r} again, in a backward that did not start at "
                "a loss of compute_kd_loss, so the inputs that it had are not known"
            )
        if self._layer in step.ran_twice:
            raise FeatureMismatchError(
                f"the layer {self._layer!r} runs several times in a forward, so under activation checkpointing it is "
                "not known which inputs each run had; leave the layer out of the checkpointed part"
            )
        given = step.injected.get(self._layer)
        return None if given is None else _replaced(given, args, kwargs)


def _replaced(given: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if len(given):
        return tuple(given), kwargs
    theirs = {name: given.kwargs[name] for name in kwargs if [*tensors_of(given.kwargs.get(name))]}
    return args, {**kwargs, **theirs}
