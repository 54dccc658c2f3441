"""Losses between a student's and a teacher's outputs; the maths stands in `schoolhouse.functional`."""

import torch
from torch.nn.modules.loss import _Loss

from schoolhouse import functional

_REDUCTIONS = ("mean", "batchmean", "sum", "none")


class LogitsDistillationLoss(_Loss):
    """KL divergence of the softened class distributions, times temperature squared (arXiv 1503.02531).

    Args:
        temperature: softens both distributions; must be above 0.
        reduction: "mean" (over all elements), "batchmean", "sum", or "none" (one value an example).

    Raises:
        ValueError: for another temperature or reduction.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; choices: {', '.join(map(repr, _REDUCTIONS))}")
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]` against the teacher's, of the same shape."""
        return functional.logits_distillation(
            logits_s, logits_t, temperature=self._temperature, reduction=self._reduction
        )
