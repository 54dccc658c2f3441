"""Losses for the forms of a teacher's logits that are not tensors: the one place that reduces them to tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from schoolhouse.functional._checks import compared_logits, reduce, widen
from schoolhouse.sparse import (
    Head,
    HiddenLogits,
    LogitsLike,
    PositionedFeatures,
    SampledLogits,
    SparseForm,
    TopKLogits,
)


@dataclass(frozen=True)
class Rules:
    """How a loss is computed for each form of a teacher's logits.

    Args:
        name: name of the loss in messages.
        dense: the loss for tensors: `dense(logits_s, logits_t, *labels, temperature=...)` returns one value per row.
        temperature: temperature of the loss.
        topk: whether `dense` is valid for the k + 1 classes of a `TopKLogits`.
        draws: a function of the teacher's and the student's log-probabilities whose expectation under the teacher is
            the loss; None if there is none.
        elementwise: whether `dense` flattens the rows and returns one value per element.
        mean_of_elements: whether the reduction "mean" divides by the number of elements of the logits, not of rows.
        vocabulary: vocabulary of the loss, which `dense` has too.
    """

    name: str
    dense: Callable[..., torch.Tensor]
    temperature: float
    topk: bool = False
    draws: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    elementwise: bool = False
    mean_of_elements: bool = False
    vocabulary: str = "equal"


def loss_of_form(
    rules: Rules, logits_s: torch.Tensor, teacher: SparseForm, reduction: str, *labels: torch.Tensor
) -> torch.Tensor:
    """The loss of a student's logits `[..., classes]`, computed in float32 or wider, returned in their dtype.

    For `PositionedFeatures` it is the loss over the n rows at the positions: `[n]` with reduction "none", and otherwise
    0 if n is 0.

    Raises:
        TypeError: if the student's logits are not a tensor, or if the loss cannot be computed for this form.
        ValueError: if the shapes or the temperatures differ, or for an invalid reduction.
    """
    logits_s, values = compared_logits(logits_s, teacher, rules.vocabulary)
    if isinstance(teacher, PositionedFeatures):
        logits_s, values = teacher.of(logits_s), teacher.values
        labels = tuple(map(teacher.of, labels))
    if rules.elementwise:
        logits_s, labels = logits_s.reshape(-1, logits_s.shape[-1]), tuple(map(torch.flatten, labels))
        values = values.reshape(-1, values.shape[-1]) if isinstance(values, torch.Tensor) else values
    losses = _losses(rules, logits_s, values, labels, summed=reduction != "none")
    n_mean = logits_s.numel() if rules.mean_of_elements else logits_s.shape[:-1].numel()
    batch_size = max(logits_s.shape[0], 1)
    return reduce(losses, reduction, n_mean=max(n_mean, 1), batch_size=batch_size).to(logits_s.dtype)


def over_chunks(
    dense: Callable[..., torch.Tensor], logits_s: torch.Tensor, teacher: HiddenLogits, *labels: torch.Tensor
) -> torch.Tensor:
    """Losses `[...]` of logits `[..., classes]`, with the teacher's logits of at most `teacher.chunk` rows at a time.

    The backward computes each chunk again, since keeping its results would take as much memory as all the logits.
    """
    # torch.split joins the gradients of its pieces, whereas each slice would make a gradient of the full size.
    rows = (each.reshape(-1, each.shape[-1]) for each in (logits_s, teacher.hidden))
    pieces = (torch.split(each, teacher.chunk) for each in (*rows, *map(torch.flatten, labels)))
    losses = torch.cat(
        [checkpoint(_of_chunk, dense, teacher.head, *chunk, use_reentrant=False) for chunk in zip(*pieces, strict=True)]
    )
    return losses.reshape([*logits_s.shape[:-1], *losses.shape[1:]])


def _of_chunk(
    dense: Callable[..., torch.Tensor], head: Head, logits_s: torch.Tensor, hidden: torch.Tensor, *labels: torch.Tensor
) -> torch.Tensor:
    return dense(widen(logits_s), widen(HiddenLogits(hidden, head).dense()), *labels)


def _losses(
    rules: Rules, logits_s: torch.Tensor, teacher: LogitsLike, labels: tuple[torch.Tensor, ...], *, summed: bool
) -> torch.Tensor:
    """Losses `[...]`, times temperature squared; `[..., classes]` for an elementwise loss that must not be summed."""

    def dense(*tensors: torch.Tensor) -> torch.Tensor:
        losses = rules.dense(*tensors, temperature=rules.temperature)
        return losses.sum(dim=-1) if rules.elementwise and summed else losses

    if isinstance(teacher, torch.Tensor):
        return dense(widen(logits_s), widen(teacher), *labels)
    if isinstance(teacher, HiddenLogits):
        return over_chunks(dense, logits_s, teacher, *labels)
    if isinstance(teacher, TopKLogits) and rules.topk:
        _check_temperature(teacher, f"topk({teacher.values.shape[-1]}", rules)
        return rules.dense(*_with_tail(logits_s, teacher), temperature=1.0) * rules.temperature**2
    if isinstance(teacher, SampledLogits) and rules.draws:
        _check_temperature(teacher, f"sampled({teacher.n}", rules)
        return _mean_over_draws(rules.draws, logits_s, teacher) * rules.temperature**2
    raise TypeError(
        f"{rules.name} can't be computed from {type(teacher).__name__}: it needs the teacher's logits of classes that "
        "did not travel. Choices: the encoding hidden, int8 or bf16, or none"
    )


def _check_temperature(teacher: TopKLogits | SampledLogits, asked: str, rules: Rules) -> None:
    if teacher.temperature != rules.temperature:
        raise ValueError(
            f"{rules.name} has the temperature {rules.temperature}, but the teacher's logits came at "
            f"{teacher.temperature}; logits that are not whole can't be re-tempered, so ask for "
            f"{asked}, temperature={rules.temperature})"
        )


def _with_tail(logits_s: torch.Tensor, teacher: TopKLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[..., k + 1]` of student and teacher at the temperature; the last stands for all other classes.

    Classes that the student does not have get no mass in either.
    """
    scaled = widen(logits_s) / teacher.temperature
    # The lowest finite number, not -inf, with which the gradient would be NaN if there are no other classes.
    nothing, classes = torch.finfo(scaled.dtype).min, scaled.shape[-1]
    values, indices, tail = teacher.values.to(teacher.tail.dtype), teacher.indices, teacher.tail.unsqueeze(-1)
    if teacher.classes > classes:
        beyond = indices >= classes
        scaled = F.pad(scaled, (0, 1), value=nothing)  # one class for all that the student does not have
        values, indices = values.masked_fill(beyond, -math.inf), indices.clamp(max=classes)
        tail = tail.masked_fill((~beyond).sum(dim=-1, keepdim=True) == classes, -math.inf)  # all of its are among the k
    # Summed over the others alone: the total minus the k would be rounding noise if the k have nearly all the mass.
    tail_s = scaled.scatter(-1, indices, nothing).logsumexp(dim=-1, keepdim=True)
    of_student = torch.cat([scaled.gather(-1, indices), tail_s], dim=-1)
    return of_student, widen(torch.cat([values, tail], dim=-1))


def _mean_over_draws(
    draws: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits_s: torch.Tensor, teacher: SampledLogits
) -> torch.Tensor:
    """Mean over the draws of classes that the student has; the teacher's log-probabilities are renormalised to them."""
    scaled = widen(logits_s) / teacher.temperature
    classes, indices, counts, log_t = scaled.shape[-1], teacher.indices, teacher.counts, widen(teacher.log_probs)
    shares = (counts / teacher.n).to(scaled.dtype)
    if teacher.classes > classes:
        counts, indices = counts.masked_fill(indices >= classes, 0), indices.clamp(max=classes - 1)
        drawn = counts.sum(dim=-1, keepdim=True).clamp(min=1)
        shares = (counts / drawn).to(scaled.dtype)
        log_t = log_t - (drawn / teacher.n).to(scaled.dtype).log()
    log_s = scaled.gather(-1, indices) - scaled.logsumexp(dim=-1, keepdim=True)
    padding = counts == 0
    of_each = draws(log_t, log_s.masked_fill(padding, 0.0))
    return (of_each.masked_fill(padding, 0.0) * shares).sum(dim=-1)
