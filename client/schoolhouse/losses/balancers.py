"""Loss balancers, which reduce the losses of a step to one scalar."""

import abc
import functools
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from schoolhouse.callers import to_caller
from schoolhouse.losses.shown import Shown

STUDENT_LOSS_KEY = "student_loss"

Weights: TypeAlias = float | Sequence[float]
Losses: TypeAlias = dict[str, torch.Tensor]

# Weights that sum to 1 on paper may not in floating point: 0.2 + 0.4 + 0.3 + 0.1 is 1.0000000000000002.
_ROUNDING = 1e-9


class DistillationLossBalancer(Shown):
    """Interface of a balancer, which gets the losses by name: `ClassName_i`, and `STUDENT_LOSS_KEY`.

    A balancer must not have parameters, which would not be trained. Its buffers are in the meta-model's state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._student_loss_reduction_fn: Callable[[torch.Tensor], torch.Tensor] | None = None

    def set_student_loss_reduction_fn(self, student_loss_reduction_fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reduce the student's own loss with this function before it is balanced."""
        self._student_loss_reduction_fn = student_loss_reduction_fn

    @abc.abstractmethod
    def forward(self, loss: Losses) -> torch.Tensor:
        """The scalar to call `backward` on."""
        raise NotImplementedError

    def split(self, loss: Losses) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The student's own loss, reduced, or None; and the distillation losses in the order of the criterion."""
        losses = dict(loss)
        student = losses.pop(STUDENT_LOSS_KEY, None)
        if student is not None and self._student_loss_reduction_fn is not None:
            student = self._student_loss_reduction_fn(student)
        return student, list(losses.values())


class StaticLossBalancer(DistillationLossBalancer):
    """Fixed weights: `kd_loss_weight` for the distillation losses in their order, and the rest to 1 for the student's.

    The sum may exceed 1 by 1e-9 of rounding; the rest is then 0. A step without a loss of the student's own warns if
    the weights sum to less than 1.

    Raises:
        ValueError: if a weight is not a finite number, or the sum of the weights is not within [0, 1].
    """

    _SETTINGS = ("_kd_loss_weight",)

    def __init__(self, kd_loss_weight: float | list[float] = 0.5) -> None:
        super().__init__()
        self._kd_loss_weight = _checked(kd_loss_weight, "kd_loss_weight")

    def forward(self, loss: Losses) -> torch.Tensor:
        """Weighted sum of the scalar losses."""
        student, losses = self.split(loss)
        return _weighted(student, losses, self._kd_loss_weight)


@dataclass(frozen=True)
class LinearSchedule:
    """A weight that goes in a straight line from `start` at step 0 to `end` at step `steps`, and then stays."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """The weight at `step`."""
        return self.end if step >= self.steps else self.start + (self.end - self.start) * (step / self.steps)


@dataclass(frozen=True)
class CosineSchedule:
    """A weight that goes along half a cosine from `start` at step 0 to `end` at step `steps`, and then stays."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """The weight at `step`."""
        if step >= self.steps:
            return self.end
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * step / self.steps)) / 2


class ScheduledLossBalancer(DistillationLossBalancer):
    """As `StaticLossBalancer`, with weights that `schedule` gives for each step.

    Calls in training mode with gradients on are counted. The count is a buffer, so that a resumed run continues at the
    step of its checkpoint.

    Args:
        schedule: a function from the step, counted from 0, to one weight or a list of them: `LinearSchedule`,
            `CosineSchedule`, or any other.
        accumulation_steps: number of calls that make one step.

    Raises:
        ValueError: for accumulation_steps below 1; in a call, if the sum of the weights is not within [0, 1].
    """

    _SETTINGS = ("schedule", "_accumulation_steps")
    forwards: torch.Tensor

    def __init__(self, schedule: Callable[[int], Weights], accumulation_steps: int = 1) -> None:
        super().__init__()
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps is {accumulation_steps}; it must be 1 or more")
        self.schedule = schedule
        self._accumulation_steps = accumulation_steps
        self._count = 0  # equals the buffer, which may be on a device, so that reading it would wait
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    @property
    def step(self) -> int:
        """The step to which the next call belongs."""
        return self._count // self._accumulation_steps

    def forward(self, loss: Losses) -> torch.Tensor:
        """Weighted sum of the scalar losses."""
        student, losses = self.split(loss)
        weights = _checked(self.schedule(self.step), f"the schedule's weight of step {self.step}")
        total = _weighted(student, losses, weights)
        if self.training and torch.is_grad_enabled():
            self._count += 1
            self.forwards.fill_(self._count)
        return total

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = int(self.forwards)


class ScaleBalancer(DistillationLossBalancer):
    """Base of balancers that bring the losses to one scale: `sum_i w_i * (a / m_i) * loss_i`.

    The weights `w` are `kd_loss_weight` and, for the student's own loss, the rest to 1. `m_i` is a running average,
    without gradient, of what `magnitudes` measures for loss i; `a` is that of the anchor, which is the student's own
    loss or, without one, the first loss. So loss i contributes `w_i * a`, and the total keeps the anchor's size. The
    average is exponential, with bias correction as in Adam (arXiv 1412.6980); its buffers stay float32 and int64 when
    the model is cast.

    The average is updated in training mode with gradients on. A magnitude that is 0 or not finite is left out, and a
    loss that had no other so far has the factor 1. If torch.distributed is initialised, ranks average their magnitudes,
    so that their factors are equal.

    Args:
        kd_loss_weight: as in `StaticLossBalancer`.
        decay: share of the old average that an update keeps, in [0, 1).
        max_factor: upper bound of `a / m_i`, whose lower bound is the inverse; the largest number of the loss's dtype
            is a bound, too.

    Raises:
        ValueError: if the sum of the weights is not within [0, 1], or for an invalid decay or max_factor.
    """

    _SETTINGS = ("_kd_loss_weight", "_decay", "_max_factor")
    average: torch.Tensor
    updates: torch.Tensor

    def __init__(self, kd_loss_weight: Weights = 0.5, *, decay: float = 0.99, max_factor: float = 1e4) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be 0 or above and below 1")
        if not 1 <= max_factor < math.inf:
            raise ValueError(f"max_factor is {max_factor}; it must be 1 or above, and finite")
        self._kd_loss_weight = _checked(kd_loss_weight, "kd_loss_weight")
        self._decay = decay
        self._max_factor = min(max_factor, torch.finfo(torch.float32).max)
        slots = len(self._kd_loss_weight) + 1  # the first is the student's
        self.register_buffer("average", torch.zeros(slots, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(slots, dtype=torch.int64))

    @abc.abstractmethod
    def magnitudes(self, losses: list[torch.Tensor]) -> list[torch.Tensor]:
        """The magnitude of each loss: a scalar of 0 or above."""
        raise NotImplementedError

    def forward(self, loss: Losses) -> torch.Tensor:
        """Weighted sum of the scalar losses, each brought to the anchor's scale."""
        student, losses = self.split(loss)
        _check_count(losses, self._kd_loss_weight)
        slots = slice(0 if student is not None else 1, None)
        present = losses if student is None else [student, *losses]
        if self.training and torch.is_grad_enabled():
            self._update(slots, present)
        factors = self._factors(slots).to(present[0].device)
        if student is not None:
            factors = factors[1:]  # the anchor's own is 1
        scaled = [value * _finite(factor, value) for value, factor in zip(losses, factors, strict=True)]
        return _weighted(student, scaled, self._kd_loss_weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ScaleBalancer":
        """As `nn.Module._apply`, but buffers keep their dtype: in half precision small updates would round away."""
        before = {"average": self.average, "updates": self.updates}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.average = self.average.float()  # with `assign=True` it has the checkpoint's dtype, which may be narrower

    @torch.no_grad()
    def _update(self, slots: slice, losses: list[torch.Tensor]) -> None:
        with torch.enable_grad():
            measured = self.magnitudes(losses)
        found = torch.stack([value.detach().float() for value in measured]).to(self.average.device)
        good = torch.isfinite(found) & (found > 0)
        found, counted = torch.where(good, found, 0.0), good.float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            both = torch.stack([found, counted])
            torch.distributed.all_reduce(both)
            found, counted = both
        mean = found / counted.clamp(min=1)
        average = torch.lerp(self.average[slots], mean, 1 - self._decay)  # a decay near 1 would be 1 in float32
        self.average[slots] = torch.where(counted > 0, average, self.average[slots])
        self.updates[slots] += counted > 0

    def _factors(self, slots: slice) -> torch.Tensor:
        average, updates = self.average[slots], self.updates[slots].clamp(min=1)
        log_decay = math.log(self._decay) if self._decay else -math.inf
        corrected = average / -torch.expm1(updates.float() * log_decay)  # 1 - decay**updates would round to 0
        known = (average > 0) & (average[0] > 0)
        factors = corrected[0] / torch.where(known, corrected, 1.0)
        return torch.where(known, factors.clamp(1 / self._max_factor, self._max_factor), 1.0)


class LossScaleBalancer(ScaleBalancer):
    """Brings the losses to the same absolute value on average, times their weights; see `ScaleBalancer`."""

    def magnitudes(self, losses: list[torch.Tensor]) -> list[torch.Tensor]:
        """The absolute values."""
        return [loss.detach().abs() for loss in losses]


class GradientScaleBalancer(ScaleBalancer):
    """Brings the losses' gradients to the same norm on average, times their weights; see `ScaleBalancer`.

    The norm is that of the gradient with respect to `parameters()`, taken as one vector, as in GradNorm (arXiv
    1711.02257) with fixed weights. Each loss costs a backward down to these: choose the last layer that all losses
    share.

    Args:
        parameters: a function that returns the tensors at which gradients are compared, such as the bound method
            `student.layer3.parameters`; in a deep copy of the model a bound method refers to the copy, unlike a lambda.
            Under FSDP the gradient of a single loss does not reach the sharded parameters; give an activation instead.
        kd_loss_weight: as in `ScaleBalancer`.
        decay: as in `ScaleBalancer`.
        max_factor: as in `ScaleBalancer`.

    Raises:
        ValueError: in a call, if a loss has no gradient at any of the tensors.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[torch.Tensor]],
        kd_loss_weight: Weights = 0.5,
        *,
        decay: float = 0.99,
        max_factor: float = 1e4,
    ) -> None:
        super().__init__(kd_loss_weight, decay=decay, max_factor=max_factor)
        self._at = parameters

    def magnitudes(self, losses: list[torch.Tensor]) -> list[torch.Tensor]:
        """L2 norms of the gradients."""
        tensors = [tensor for tensor in self._at() if tensor.requires_grad]
        return [self._norm(i, loss, tensors) for i, loss in enumerate(losses)]

    def _norm(self, i: int, loss: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        found: tuple[torch.Tensor | None, ...] = ()
        if tensors and loss.requires_grad:
            found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(gradient.float()) for gradient in found if gradient is not None]
        if not norms:
            raise ValueError(
                f"loss {i} of this step has no gradient at the tensors that `parameters` returns; choose a layer that "
                "comes before all the layers of the criterion"
            )
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


def _finite(factor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    dtype = torch.result_type(loss, 1.0)  # the loss's own, unless it is an integer constant, such as tensor(0)
    return factor.to(dtype).clamp(max=torch.finfo(dtype).max)


def _checked(given: Weights, what: str) -> list[float]:
    weights = _listed(given)
    real = all(isinstance(weight, numbers.Real) for weight in weights)
    if not real or not all(abs(weight) < math.inf for weight in weights):
        raise ValueError(
            f"{what} is {given!r}; choices: a finite number, or a list of finite numbers, one for each distillation "
            "loss, whose sum is within [0, 1]"
        )
    if not 0.0 <= sum(weights) <= 1.0 + _ROUNDING:
        raise ValueError(f"{what} sums to {sum(weights)}; it is {given!r}, and the sum must be within [0, 1]")
    return weights


def _listed(given: Any) -> list[Any]:
    if isinstance(given, str | bytes):
        return [given]
    try:
        return list(given)
    except TypeError:  # a single number, or no weight at all
        return [given]


def _check_count(losses: list[torch.Tensor], weights: list[float]) -> None:
    if len(losses) != len(weights):
        raise ValueError(
            f"there are {len(losses)} distillation losses, but kd_loss_weight is {weights}: give one weight for each"
        )


def _weighted(student: torch.Tensor | None, losses: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    _check_count(losses, weights)
    # Any real number may be a weight, such as a Fraction, but tensors can be multiplied by few types of numbers.
    weighted = [value * float(weight) for value, weight in zip(losses, weights, strict=True)]
    total = functools.reduce(operator.add, weighted)
    if student is not None:
        return total + float(max(0.0, 1.0 - sum(weights))) * student
    if sum(weights) < 1.0 - _ROUNDING:
        warnings.warn(
            "kd_loss_weight sums to less than 1, and the rest is the weight of the student's own loss, which is "
            "missing: pass student_loss to compute_kd_loss, or give weights that sum to 1",
            stacklevel=to_caller(),
        )
    return total
