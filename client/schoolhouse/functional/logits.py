"""Losses between class logits of a student and of a teacher.

All of them multiply by temperature squared, so that gradients keep their size when the temperature changes
(arXiv 1503.02531), and none sends a gradient to the teacher. The reduction "batchmean" divides by the size of the first
dimension, and "mean" by the number of examples, that is by all dimensions but the classes. In the two that are
ModelOpt's, `logits_distillation` and `mft`, "mean" is that of `torch.nn.KLDivLoss`: it divides by the number of all
elements of the logits, classes included. A class with the logit -inf in both distributions contributes nothing to value
or gradient.

With `vocabulary="shared"` student and teacher may have different numbers of classes, as long as the first n are the
same, n being the smaller number: for example a vocabulary of 49,152 tokens and one that is padded to 49,280. The loss
is that of the logits `[..., :n]`, so both distributions are normalised over these n classes: p'(c) = p(c) / (1 - U),
where U is the mass of the classes from n on.

The teacher's logits may be a form of `schoolhouse.sparse`. Then the loss is computed in float32 or wider over the rows
that travelled, and no tensor of all the teacher's logits is made. `HiddenLogits` and `PositionedFeatures` work with
every loss. For `TopKLogits` the loss is the divergence over k + 1 classes, for `SampledLogits` the mean over the draws;
both must have the loss's temperature, and a loss that needs more of the teacher than they hold raises TypeError.

With "shared", if the teacher is the one with more classes:

- For `TopKLogits`, those of the k classes that are n or above are left out, and the rest, including the tail, is
  renormalised: p'(c) = p(c) / (1 - u), u being the mass left out. This is exact if no class of the tail is n or above;
  within the tail classes cannot be told apart, and all count as the student's, unless all of these are among the k.
- For `SampledLogits`, the loss is the mean over the m of n draws that fell on shared classes, which are draws from p',
  with log p'(c) = log p(c) - log(m / n). Value and gradient tend to those of p' as n grows, the gradient of
  `logits_distillation` is unbiased if m is 1 or more, and an example without such a draw counts as 0.
"""

import functools
import math

import torch
from torch.nn import functional as F

from schoolhouse.functional._checks import check_labels, compared_logits, reduce, widen
from schoolhouse.functional._forms import Rules, loss_of_form
from schoolhouse.sparse import LogitsLike, SparseForm


def logits_distillation(
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    vocabulary: str = "equal",
) -> torch.Tensor:
    """KL(teacher || student) of logits `[..., classes]` at `temperature`, times temperature squared (arXiv 1503.02531).

    With reduction "none" the result has the shape `[...]`; otherwise it is a scalar. "mean" divides by the number of
    all elements, as ModelOpt's does. Computed in the dtype of the logits.

    Raises:
        TypeError: if an argument is neither a tensor nor a form that this loss takes.
        ValueError: if the shapes differ, or for an invalid reduction or vocabulary.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    if isinstance(values, SparseForm):
        dense = functools.partial(logits_distillation, reduction="none", vocabulary=vocabulary)
        rules = Rules(
            "logits_distillation",
            dense,
            temperature,
            topk=True,
            draws=torch.sub,
            mean_of_elements=True,
            vocabulary=vocabulary,
        )
        return loss_of_form(rules, logits_s, values, reduction)
    log_student = F.log_softmax(_softened(logits_s, temperature), dim=-1)
    teacher = F.softmax(_softened(values, temperature), dim=-1).detach()
    loss = _kl_to_target(log_student, teacher, reduction)
    if reduction == "none":
        loss = loss.sum(dim=-1)
    return _scaled(loss, temperature)


def mft(
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    threshold: float = 0.2,
    reduction: str = "batchmean",
    vocabulary: str = "equal",
) -> torch.Tensor:
    """KL(teacher || student), with the teacher's distribution corrected towards the labels (arXiv 2506.15702).

    The correction puts the label's class ahead of the teacher's strongest other class by `threshold`. Logits
    `[..., classes]` are flattened to `[n, classes]`; labels are class indices, `[n]` or `[...]`. With reduction "none"
    the result is elementwise, `[n, classes]`, and "batchmean" divides by n. Computed in the dtype of the logits.

    Raises:
        TypeError: if an argument is neither a tensor nor a form that this loss takes.
        ValueError: if the shapes of the logits differ, or if the labels are not one index per example.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    if isinstance(labels, torch.Tensor) and labels.shape == logits_s.shape[:-1]:
        labels = labels.reshape(-1)
    check_labels(labels, torch.Size([logits_s.shape[:-1].numel()]), "one index for each example, flattened to")
    if isinstance(values, SparseForm):
        dense = functools.partial(mft, threshold=threshold, reduction="none", vocabulary=vocabulary)
        rules = Rules("mft", dense, temperature, elementwise=True, mean_of_elements=True, vocabulary=vocabulary)
        return loss_of_form(rules, logits_s, values, reduction, labels.reshape(logits_s.shape[:-1]))
    n_classes = logits_s.shape[-1]
    log_student = F.log_softmax(_softened(logits_s, temperature), dim=-1).reshape(-1, n_classes)
    teacher = F.softmax(_softened(values, temperature).reshape(-1, n_classes), dim=-1).detach()
    loss = _kl_to_target(log_student, _corrected(teacher, labels, threshold), reduction)
    return _scaled(loss, temperature)


def reverse_kl(
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    vocabulary: str = "equal",
) -> torch.Tensor:
    """KL(student || teacher) of logits `[..., classes]`, times temperature squared (arXiv 2306.08543).

    With reduction "none" the result has the shape `[...]`; otherwise it is a scalar. Computed in float32 or wider,
    returned in the dtype of the student's logits.

    Raises:
        TypeError: if an argument is neither a tensor nor a form that this loss takes.
        ValueError: if the shapes differ, or for an invalid reduction or vocabulary.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    if isinstance(values, SparseForm):
        dense = functools.partial(reverse_kl, reduction="none", vocabulary=vocabulary)
        rules = Rules("reverse_kl", dense, temperature, vocabulary=vocabulary)
        return loss_of_form(rules, logits_s, values, reduction)
    log_s, log_t = _log_distributions(logits_s, values, temperature)
    return _finish(_kl(log_s, log_t), logits_s, temperature, reduction)


def jsd(
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    vocabulary: str = "equal",
) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of logits `[..., classes]`, times temperature squared (arXiv 2306.13649).

    `beta * KL(t || m) + (1 - beta) * KL(s || m)` with `m = beta * t + (1 - beta) * s`; it is KL(t || s) for beta 0 and
    KL(s || t) for beta 1, as in TRL's GKD trainer, which leaves out the factor temperature squared. With reduction
    "none" the result has the shape `[...]`; otherwise it is a scalar. Computed in float32 or wider, returned in the
    dtype of the student's logits.

    Raises:
        TypeError: if an argument is neither a tensor nor a form that this loss takes.
        ValueError: if the shapes differ, or for an invalid reduction or vocabulary.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    if isinstance(values, SparseForm):
        dense = functools.partial(jsd, beta=beta, reduction="none", vocabulary=vocabulary)
        rules = Rules("jsd", dense, temperature, topk=beta < 1, vocabulary=vocabulary)
        return loss_of_form(rules, logits_s, values, reduction)
    log_s, log_t = _log_distributions(logits_s, values, temperature)
    if beta == 0:
        loss = _kl(log_t, log_s)
    elif beta == 1:
        loss = _kl(log_s, log_t)
    else:
        log_m = _log_mixture(log_t, log_s, beta)
        loss = beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)
    return _finish(loss, logits_s, temperature, reduction)


def skewed_kl(
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    reverse: bool = False,
    vocabulary: str = "equal",
) -> torch.Tensor:
    """Skew KL divergence of logits `[..., classes]`, times temperature squared (DistiLLM, arXiv 2402.03898).

    `KL(t || alpha * t + (1 - alpha) * s)`, or `KL(s || alpha * s + (1 - alpha) * t)` if `reverse`; alpha 0 is the plain
    divergence. With reduction "none" the result has the shape `[...]`; otherwise it is a scalar. Computed in float32
    or wider, returned in the dtype of the student's logits.

    Raises:
        TypeError: if an argument is neither a tensor nor a form that this loss takes.
        ValueError: if the shapes differ, or for an invalid reduction or vocabulary.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    if isinstance(values, SparseForm):
        dense = functools.partial(skewed_kl, alpha=alpha, reverse=reverse, reduction="none", vocabulary=vocabulary)
        draws = None if reverse else functools.partial(_log_ratio, alpha=alpha)
        rules = Rules("skewed_kl", dense, temperature, topk=not reverse, draws=draws, vocabulary=vocabulary)
        return loss_of_form(rules, logits_s, values, reduction)
    log_s, log_t = _log_distributions(logits_s, values, temperature)
    log_p, log_q = (log_s, log_t) if reverse else (log_t, log_s)
    return _finish(_kl(log_p, _log_skewed(log_p, log_q, alpha)), logits_s, temperature, reduction)


def dkd(
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    labels: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: str = "batchmean",
    vocabulary: str = "equal",
) -> torch.Tensor:
    """Decoupled knowledge distillation, `alpha * TCKD + beta * NCKD`, times temperature squared (arXiv 2203.08679).

    TCKD is the KL(t || s) between the two masses "label" and "not label"; NCKD is the KL(t || s) over all classes but
    the label, renormalised. Logits are `[..., classes]`, labels `[...]` class indices. With reduction "none" the result
    has the shape `[...]`; otherwise it is a scalar. Computed in log space in float32 or wider, returned in the dtype of
    the student's logits.

    Raises:
        TypeError: if an argument is neither a tensor nor a form that this loss takes.
        ValueError: if the shapes do not fit, if there is only one class, or for an invalid reduction.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    check_labels(labels, logits_s.shape[:-1], "one index for each example,")
    if logits_s.shape[-1] < 2:
        raise ValueError(f"the logits have the shape {tuple(logits_s.shape)}; DKD needs 2 classes or more")
    if isinstance(values, SparseForm):
        dense = functools.partial(dkd, alpha=alpha, beta=beta, reduction="none", vocabulary=vocabulary)
        rules = Rules("dkd", dense, temperature, vocabulary=vocabulary)
        return loss_of_form(rules, logits_s, values, reduction, labels)
    masses_s, others_s = _decoupled(_softened(widen(logits_s), temperature), labels)
    masses_t, others_t = _decoupled(_softened(widen(values.detach()), temperature), labels)
    loss = alpha * _kl(masses_t, masses_s) + beta * _kl(others_t, others_s)
    return _finish(loss, logits_s, temperature, reduction)


def _softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits divided by the temperature; at 1, the usual one, the logits themselves, without a copy."""
    return logits if temperature == 1 else logits / temperature


def _scaled(loss: torch.Tensor, temperature: float) -> torch.Tensor:
    return loss if temperature == 1 else loss * temperature**2


def _kl_to_target(log_student: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
    """KL(target || student) of probabilities `[..., classes]`, elementwise or reduced, in the dtype of both."""
    # The kernel multiplies a probability of 0 by the student's log-probability, which is NaN where that is -inf.
    elementwise = F.kl_div(log_student.masked_fill(target == 0, 0.0), target, reduction="none")
    # Not kl_div's own "mean", which warns that it will become "batchmean", and not a sum over n: it rounds otherwise.
    if reduction == "mean":
        return elementwise.mean()
    return reduce(elementwise, reduction, n_mean=target.numel(), batch_size=target.shape[0] if target.dim() else 1)


def _corrected(teacher: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """Probabilities `[n, classes]` with mass moved to the labels `[n]`; the order of operations affects the rounding.

    If the teacher is wrong, the label's class ends at least `threshold` above its strongest class; if it is right, the
    label's class gains `threshold`, up to a probability of 1.
    """
    top = teacher.argmax(dim=-1)
    p_top, p_label = teacher.gather(1, torch.stack([top, labels], dim=1)).unbind(dim=1)
    share_if_wrong = (p_top - p_label + threshold) / (1 + p_top - p_label + 1e-7)
    wanted = torch.where(p_label > 1 - threshold, 1, p_label + threshold)
    share_if_right = (wanted - p_top) / (1 - p_top + 1e-7)
    # Rounding may put a share just above 1, and the other classes below 0, whose logarithm would be NaN.
    share = torch.where(top != labels, share_if_wrong, share_if_right).clamp(max=1)[:, None]
    return (teacher * (1 - share)).scatter_add(1, labels[:, None], share)


def _log_distributions(
    logits_s: torch.Tensor, logits_t: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of student and teacher at `temperature`, in float32 or wider."""
    log_s = F.log_softmax(_softened(widen(logits_s), temperature), dim=-1)
    log_t = F.log_softmax(_softened(widen(logits_t.detach()), temperature), dim=-1)
    return log_s, log_t


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities `[..., classes]`, shape `[...]`; a class with p = 0 counts 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(dim=-1)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight * p + (1 - weight) * q); for classes that neither p nor q has, a finite number without meaning."""
    # logaddexp of -inf and -inf has the gradient NaN, so those classes are taken out before it.
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _log_skewed(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    return log_q if alpha == 0 else _log_mixture(log_p, log_q, alpha)


def _log_ratio(log_p: torch.Tensor, log_q: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """log of p divided by the skewed q; its expectation under p is the skew KL."""
    return log_p - _log_skewed(log_p, log_q, alpha)


def _decoupled(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-masses (label, not label) `[..., 2]`, and log-probabilities of the classes but the label `[..., classes]`."""
    index = labels.unsqueeze(-1)
    # The lowest finite number, not -inf, which would give NaN if every other class is masked.
    others = logits.scatter(-1, index, torch.finfo(logits.dtype).min)
    masses = torch.cat([logits.gather(-1, index), others.logsumexp(dim=-1, keepdim=True)], dim=-1)
    return F.log_softmax(masses, dim=-1), F.log_softmax(others, dim=-1)


def _finish(loss: torch.Tensor, logits: torch.Tensor, temperature: float, reduction: str) -> torch.Tensor:
    """The per-example losses `[...]` of `logits`, scaled, reduced and in the dtype of the logits."""
    reduced = reduce(loss, reduction, n_mean=loss.numel(), batch_size=logits.shape[0])
    return _scaled(reduced, temperature).to(logits.dtype)
