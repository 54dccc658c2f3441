"""Reduce the losses of a step, by name, to one scalar."""

import abc
import functools
import operator
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

STUDENT_LOSS_KEY = "student_loss"


class DistillationLossBalancer(nn.Module):
    """Interface of a balancer. The keys are `ClassName_i` of the losses and `STUDENT_LOSS_KEY`."""

    def __init__(self) -> None:
        super().__init__()
        self._student_loss_reduction_fn: Callable[[torch.Tensor], torch.Tensor] | None = None

    def set_student_loss_reduction_fn(self, student_loss_reduction_fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reduce the student's own loss with this function before it is balanced."""
        self._student_loss_reduction_fn = student_loss_reduction_fn

    @abc.abstractmethod
    def forward(self, loss: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scalar to call `backward` on."""
        raise NotImplementedError


class StaticLossBalancer(DistillationLossBalancer):
    """Fixed weights: `kd_loss_weight` for the distillation losses in their order, the rest to 1 for the student's.

    Raises:
        ValueError: if the weights' sum is not within [0, 1].
    """

    def __init__(self, kd_loss_weight: float | Sequence[float] = 0.5) -> None:
        super().__init__()
        weights = [kd_loss_weight] if isinstance(kd_loss_weight, float | int) else list(kd_loss_weight)
        if not 0.0 <= sum(weights) <= 1.0:
            raise ValueError(f"kd_loss_weight sums to {sum(weights)}; the sum must be within [0, 1]")
        if sum(weights) < 1.0:
            warnings.warn(
                "kd_loss_weight sums to less than 1: pass student_loss to compute_kd_loss, it gets the rest",
                stacklevel=2,
            )
        self._kd_loss_weight = weights

    def forward(self, loss: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of the scalar losses."""
        losses = dict(loss)
        student = losses.pop(STUDENT_LOSS_KEY, None)
        if len(losses) != len(self._kd_loss_weight):
            raise ValueError(f"{len(losses)} distillation losses came, but kd_loss_weight has {self._kd_loss_weight}")
        weighted = [value * weight for value, weight in zip(losses.values(), self._kd_loss_weight, strict=True)]
        total = functools.reduce(operator.add, weighted)
        if student is None:
            return total
        if self._student_loss_reduction_fn is not None:
            student = self._student_loss_reduction_fn(student)
        return total + (1.0 - sum(self._kd_loss_weight)) * student
