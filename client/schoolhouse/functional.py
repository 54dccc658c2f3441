"""The maths of the losses as pure functions of tensors."""

import torch
from torch.nn import functional as F


def logits_distillation(
    logits_s: torch.Tensor, logits_t: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> torch.Tensor:
    """KL(teacher || student) of logits `[..., classes]` at `temperature`, times temperature squared (arXiv 1503.02531).

    With reduction "none" the result has the shape `[...]`; otherwise it is a scalar. "mean" divides by the number of
    all elements, "batchmean" by the size of the first dimension.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits_s.shape != logits_t.shape:
        raise ValueError(
            f"the student's logits have the shape {tuple(logits_s.shape)}, the teacher's {tuple(logits_t.shape)}; "
            "they must be equal"
        )
    log_student = F.log_softmax(logits_s / temperature, dim=-1)
    teacher = F.softmax(logits_t / temperature, dim=-1).detach()
    loss = F.kl_div(log_student, teacher, reduction=reduction)
    if reduction == "none":
        loss = loss.sum(dim=-1)
    return loss * temperature**2
