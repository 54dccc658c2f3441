"""DistillationModel: a student whose forward also asks the teacher, and which computes the losses between them."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from schoolhouse.balancers import STUDENT_LOSS_KEY, DistillationLossBalancer
from schoolhouse.errors import ConfigError, FeatureMismatchError
from schoolhouse.taps import Tap, map_tensors, tensors_of
from schoolhouse.teachers import Features, Teacher


@dataclass(eq=False)
class Step:
    """What one forward produced: the teacher's features to come, and the student's outputs by layer."""

    future: "Future[Features]"
    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Distillation:
    """State of a meta-model, kept outside the module tree so that the student's own state stays as it was."""

    teacher: Teacher
    criterion: Mapping[tuple[str, str], nn.Module]
    balancer: DistillationLossBalancer | None
    student_class: type[nn.Module]
    step: Step | None = None
    recording: bool = False
    only_student: bool = False
    handles: list[Any] = field(default_factory=list)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The teacher's outputs that the losses read."""
        return tuple(dict.fromkeys(Tap(teacher_layer) for _, teacher_layer in self.criterion))

    def drop_step(self) -> None:
        """Forget what the last forward produced; the teacher is told."""
        if self.step is not None:
            self.step.future.cancel()
            self.step = None


class DistillationModel(nn.Module):
    """Mixin of the dynamic subclass that `convert` gives a student."""

    _distillation: Distillation

    @property
    def loss_balancer(self) -> DistillationLossBalancer | None:
        """The balancer, if any."""
        return self._distillation.balancer

    @contextmanager
    def only_student_forward(self, enable: bool = True) -> Iterator[None]:
        """Within it, a forward runs the student alone: for validation."""
        state = self._distillation
        before, state.only_student = state.only_student, enable
        try:
            yield
        finally:
            state.only_student = before

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._distillation
        if state.only_student:
            return state.student_class.forward(self, *args, **kwargs)
        if state.step is not None and self.training:
            warnings.warn(
                "forward was called again without compute_kd_loss; the earlier batch's features are dropped",
                stacklevel=4,
            )
        state.drop_step()
        step = Step(state.teacher.submit(args, kwargs, state.taps))
        state.step, state.recording = step, True
        try:
            output = state.student_class.forward(self, *args, **kwargs)
        except BaseException:
            state.drop_step()
            raise
        finally:
            state.recording = False
        if any(layer == "" for layer, _ in state.criterion):
            step.outputs[""] = output
        return output

    def train(self, mode: bool = True) -> "DistillationModel":
        """As `nn.Module.train`; a change of mode drops what the last forward captured."""
        if mode != self.training:
            self._distillation.drop_step()
        return super().train(mode)

    def compute_kd_loss(
        self,
        student_loss: torch.Tensor | None = None,
        loss_reduction_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        skip_balancer: bool = False,
        **loss_fn_kwargs: Any,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Wait for the features of the last forward's batch, and reduce the losses to a scalar.

        Args:
            student_loss: the student's own loss; needs a balancer.
            loss_reduction_fn: applied to each distillation loss before balancing, such as a masked mean.
            skip_balancer: return the losses by name instead.
            **loss_fn_kwargs: given to each loss.

        Raises:
            FeatureMismatchError: if there was no forward since the last call.
            SchoolhouseError: whatever kept the teacher from answering.
        """
        state = self._distillation
        if student_loss is not None and state.balancer is None:
            raise ConfigError("student_loss needs a loss_balancer; give one to convert, such as StaticLossBalancer()")
        if state.step is None:
            raise FeatureMismatchError("compute_kd_loss needs a forward before it; call model(batch) first")
        step, state.step = state.step, None
        features = _on_device_of(step.outputs, step.future.result())
        losses: dict[str, torch.Tensor] = {} if student_loss is None else {STUDENT_LOSS_KEY: student_loss}
        for i, ((student_layer, teacher_layer), loss_fn) in enumerate(state.criterion.items()):
            if student_layer not in step.outputs:
                raise FeatureMismatchError(f"the student's layer {student_layer!r} did not run in the last forward")
            loss = loss_fn(step.outputs[student_layer], features[Tap(teacher_layer)], **loss_fn_kwargs)
            losses[f"{type(loss_fn).__name__}_{i}"] = loss if loss_reduction_fn is None else loss_reduction_fn(loss)
        if skip_balancer:
            return losses
        if state.balancer is None:
            return next(iter(losses.values()))
        total: torch.Tensor = state.balancer(losses)
        return total


def _on_device_of(outputs: Mapping[str, Any], features: Features) -> dict[Tap, Any]:
    device = next((tensor.device for tensor in tensors_of(outputs)), torch.device("cpu"))
    if all(tensor.device == device for tensor in tensors_of(features)):
        return features
    return {tap: map_tensors(value, lambda tensor: tensor.to(device)) for tap, value in features.items()}
