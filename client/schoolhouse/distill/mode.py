"""What a mode of distillation sets up in a student: hooks, and the modules that `convert` adds."""

import warnings
from typing import Any

import torch
from schoolhouse_wire.torch_private import children_of
from torch import nn

from schoolhouse.distill.step import Distillation, Step, eager
from schoolhouse.losses.balancers import DistillationLossBalancer
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher

# Names in the module tree, which are those of ModelOpt.
TEACHER, LOSSES, BALANCER = "_teacher_model", "_loss_modules", "_loss_balancer"
EXTRAS = (LOSSES, BALANCER, TEACHER)


class KDMode:
    """What the mode "kd_loss" does to a student; the mode "layerwise_kd" overrides some of these methods."""

    needs_inputs = False  # whether the student's forward needs the inputs of the teacher's layers

    def attach(self, model: nn.Module, state: Distillation, balancer: DistillationLossBalancer | None) -> None:
        """Set hooks, and register the modules that a converted student has in addition to its own."""
        state.taps = self.taps(state)
        for layer in dict.fromkeys(layer for layer, _ in state.criterion):
            self.hook(state, layer, model.get_submodule(layer))
        stateful = [loss for loss in state.criterion.values() if [*loss.parameters(), *loss.buffers()]]
        model.add_module(LOSSES, nn.ModuleList(dict.fromkeys(stateful)))
        model.add_module(BALANCER, balancer)
        if isinstance(state.teacher, LocalTeacher):
            model.add_module(TEACHER, state.teacher.module)
        state.handles.append(model.register_load_state_dict_post_hook(_forgive_extras))  # type: ignore[no-untyped-call]

    def taps(self, state: Distillation) -> tuple[Tap, ...]:
        """The taps of the teacher whose features a step needs."""
        return tuple(dict.fromkeys(Tap(layer) for _, layer in state.criterion))

    def hook(self, state: Distillation, layer: str, module: nn.Module) -> None:
        """Set a hook that captures what a layer of the student returns; "" is the student itself."""
        capture = _Capture(state, layer) if layer else _CaptureWhole(state)
        state.handles.append(module.register_forward_hook(capture))

    def mark(self, state: Distillation, step: Step, losses: dict[str, torch.Tensor]) -> None:
        """Called with the losses of a step before they are reduced; does nothing in this mode."""


class _Capture:
    """Forward hook that keeps a layer's output while the student's forward runs; a class, so that it can be pickled."""

    def __init__(self, state: Distillation, layer: str) -> None:
        self._state = state
        self._layer = layer

    @eager
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        step = self._state.recording
        if step is None:
            return
        step.outputs[self._layer] = output
        if step.gradients and not torch.is_grad_enabled():
            warnings.warn(
                f"the layer {self._layer!r} runs without gradients, so its loss trains nothing: under no_grad, or in "
                "activation checkpointing with use_reentrant=True, where use_reentrant=False works",
                stacklevel=2,
            )


class _CaptureWhole:
    """Forward hook of the student itself, which keeps what a call of the student returns.

    That may differ from what its forward returned: forward hooks that were registered before may change it, and so may
    a wrapper that was put around `forward` after `convert`, as by accelerate.
    """

    def __init__(self, state: Distillation) -> None:
        self._state = state

    @eager
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._state.returned(output)


def _forgive_extras(model: nn.Module, incompatible: Any) -> None:
    """Post hook of load_state_dict that does not count parts as missing of which the checkpoint has nothing.

    It serves a model inside another one, such as DistributedDataParallel.
    """
    for name in EXTRAS:
        part = children_of(model).get(name)
        absent = [key for key in incompatible.missing_keys if f".{name}." in f".{key}"]
        if part is not None and len(absent) == len(part.state_dict()):
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in absent]
