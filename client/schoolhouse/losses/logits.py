"""Losses between class logits of a student and of a teacher; the maths is in `schoolhouse.functional`."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from schoolhouse_wire.torch_private import Loss
from torch import nn

from schoolhouse import functional
from schoolhouse.functional import _checks
from schoolhouse.losses.shown import Shown
from schoolhouse.sparse import LogitsLike

_COMMON = ("_temperature", "_reduction", "_vocabulary")


class LogitsLoss(Shown, Loss):
    """Base of the losses between logits: settings that all have, and the loss of each example.

    Args:
        temperature: softens both distributions; must be above 0.
        reduction: "batchmean" (over the first dimension), "mean", "sum", or "none". "mean" is over all elements,
            classes included, in `LogitsDistillationLoss` and `MFTLoss`, as in ModelOpt; in the other losses it is over
            the examples.
        vocabulary: "equal" requires equal numbers of classes; "shared" compares the first n classes, n being the
            smaller number of the two, for a vocabulary that one side pads: the first n must be the same classes.
            `schoolhouse.functional.logits` says how that is computed for each form of a teacher's logits.

    Raises:
        ValueError: for an invalid temperature, reduction or vocabulary.
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = _COMMON
    _function: ClassVar[Callable[..., torch.Tensor] | None] = None  # takes the settings as keyword arguments

    def __init__(self, temperature: float, reduction: str, vocabulary: str = "equal") -> None:
        _checks.check_positive("temperature", temperature)
        _checks.check_reduction(reduction)
        _checks.check_vocabulary(vocabulary)
        super().__init__(reduction=reduction)
        self._temperature = temperature
        self._reduction = reduction
        self._vocabulary = vocabulary

    @property
    def vocabulary(self) -> str:
        """Which classes are compared."""
        return self._vocabulary

    def per_example(
        self, logits_s: torch.Tensor, logits_t: LogitsLike, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Losses `[...]` of logits `[..., classes]`, whatever the reduction; labels `[...]` if the loss needs them.

        `CausalLMLoss` takes any subclass that defines this method.
        """
        return self._divergence(logits_s, logits_t, reduction="none")

    def _divergence(self, *outputs: Any, **other: Any) -> torch.Tensor:
        """Call the loss's function with its settings, of which `other` replaces some."""
        if self._function is None:
            raise NotImplementedError(f"{type(self).__name__} must define per_example")
        return self._function(*outputs, **{**self._settings(), **other})


class LogitsDistillationLoss(LogitsLoss):
    """KL divergence of the softened class distributions, times temperature squared (arXiv 1503.02531).

    Args:
        temperature: softens both distributions; must be above 0.
        reduction: "mean" (over all elements, as ModelOpt's), "batchmean", "sum", or "none" (one value per example).
        vocabulary: "equal", or "shared" to compare the first n classes, n being the smaller number of the two.

    Raises:
        ValueError: for an invalid temperature, reduction or vocabulary.
    """

    _function = staticmethod(functional.logits_distillation)

    def __init__(self, temperature: float = 1.0, reduction: str = "mean", *, vocabulary: str = "equal") -> None:
        super().__init__(temperature, reduction, vocabulary)

    def forward(self, logits_s: torch.Tensor, logits_t: LogitsLike) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]` against the teacher's, of the same shape."""
        return self._divergence(logits_s, logits_t)


class ReverseKLLoss(LogitsLoss):
    """KL(student || teacher) of the softened distributions, times temperature squared (arXiv 2306.08543).

    Args:
        temperature: softens both distributions; must be above 0.
        reduction: "batchmean", "mean" (over the examples), "sum", or "none" (one value per example).
        vocabulary: "equal", or "shared" to compare the first n classes, n being the smaller number of the two.

    Raises:
        ValueError: for an invalid temperature, reduction or vocabulary.
    """

    _function = staticmethod(functional.reverse_kl)

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean", *, vocabulary: str = "equal") -> None:
        super().__init__(temperature, reduction, vocabulary)

    def forward(self, logits_s: torch.Tensor, logits_t: LogitsLike) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]` against the teacher's, of the same shape."""
        return self._divergence(logits_s, logits_t)


class JSDLoss(LogitsLoss):
    """Generalized Jensen-Shannon divergence, times temperature squared (GKD, arXiv 2306.13649).

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]; 0 is KL(teacher || student), 1 KL(student || teacher).
        temperature: softens both distributions; must be above 0.
        reduction: "batchmean", "mean" (over the examples), "sum", or "none" (one value per example).
        vocabulary: "equal", or "shared" to compare the first n classes, n being the smaller number of the two.

    Raises:
        ValueError: for an invalid beta, temperature, reduction or vocabulary.
    """

    _SETTINGS = ("_beta", *_COMMON)
    _function = staticmethod(functional.jsd)

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        *,
        vocabulary: str = "equal",
    ) -> None:
        super().__init__(temperature, reduction, vocabulary)
        _checks.check_fraction("beta", beta)
        self._beta = beta

    def forward(self, logits_s: torch.Tensor, logits_t: LogitsLike) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]` against the teacher's, of the same shape."""
        return self._divergence(logits_s, logits_t)


class SkewedKLLoss(LogitsLoss):
    """KL from the teacher to a mixture of both, times temperature squared (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: share of the teacher (with `reverse`, the student) in the mixture, in [0, 1); 0 is the plain divergence.
        temperature: softens both distributions; must be above 0.
        reduction: "batchmean", "mean" (over the examples), "sum", or "none" (one value per example).
        reverse: use instead the KL from the student to the mixture.
        vocabulary: "equal", or "shared" to compare the first n classes, n being the smaller number of the two.

    Raises:
        ValueError: for an invalid alpha, temperature, reduction or vocabulary.
    """

    _SETTINGS = ("_alpha", "_reverse", *_COMMON)
    _function = staticmethod(functional.skewed_kl)

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        reverse: bool = False,
        *,
        vocabulary: str = "equal",
    ) -> None:
        super().__init__(temperature, reduction, vocabulary)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha is {alpha}; it must be 0 or above and below 1, where the loss is always 0")
        self._alpha = alpha
        self._reverse = reverse

    def forward(self, logits_s: torch.Tensor, logits_t: LogitsLike) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]` against the teacher's, of the same shape."""
        return self._divergence(logits_s, logits_t)


class MFTLoss(LogitsLoss):
    """KL from the teacher, corrected towards the labels, to the student, times temperature squared (arXiv 2506.15702).

    Args:
        temperature: softens both distributions; must be above 0.
        threshold: lead that the label's class gets over the teacher's strongest other class, in [0, 1].
        reduction: "batchmean", "mean" (over all elements, as ModelOpt's), "sum", or "none" (elementwise, `[n,
            classes]`).
        vocabulary: "equal", or "shared" to compare the first n classes, n being the smaller number of the two.

    Raises:
        ValueError: for an invalid temperature, threshold, reduction or vocabulary.
    """

    _SETTINGS = ("_threshold", *_COMMON)
    _function = staticmethod(functional.mft)

    def __init__(
        self,
        temperature: float = 1.0,
        threshold: float = 0.2,
        reduction: str = "batchmean",
        *,
        vocabulary: str = "equal",
    ) -> None:
        super().__init__(temperature, reduction, vocabulary)
        _checks.check_fraction("threshold", threshold)
        self._threshold = threshold

    def forward(self, logits_s: torch.Tensor, logits_t: LogitsLike, labels: torch.Tensor) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]`, flattened to `[n, classes]`; labels are `[n]` or `[...]`."""
        return self._divergence(logits_s, logits_t, labels)

    def per_example(
        self, logits_s: torch.Tensor, logits_t: LogitsLike, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Losses `[...]` of logits `[..., classes]` and labels `[...]`, which are needed."""
        labels = _needed(labels, self)
        losses = self._divergence(logits_s, logits_t, labels.reshape(-1), reduction="none")
        return losses.sum(dim=-1).reshape(labels.shape)


class DKDLoss(LogitsLoss):
    """Decoupled knowledge distillation, times temperature squared (arXiv 2203.08679).

    Args:
        alpha: weight of the divergence between the masses "label" and "not label", 0 or above.
        beta: weight of the divergence among the other classes, 0 or above.
        temperature: softens both distributions; must be above 0. The defaults are the paper's for CIFAR-100.
        reduction: "batchmean", "mean" (over the examples), "sum", or "none" (one value per example).
        vocabulary: "equal", or "shared" to compare the first n classes, n being the smaller number of the two.

    Raises:
        ValueError: for an invalid alpha, beta, temperature, reduction or vocabulary.
    """

    _SETTINGS = ("_alpha", "_beta", *_COMMON)
    _function = staticmethod(functional.dkd)

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        reduction: str = "batchmean",
        *,
        vocabulary: str = "equal",
    ) -> None:
        super().__init__(temperature, reduction, vocabulary)
        _checks.check_weight("alpha", alpha)
        _checks.check_weight("beta", beta)
        self._alpha = alpha
        self._beta = beta

    def forward(self, logits_s: torch.Tensor, logits_t: LogitsLike, labels: torch.Tensor) -> torch.Tensor:
        """Loss of the student's logits `[..., classes]` against the teacher's, for the labels `[...]`."""
        return self._divergence(logits_s, logits_t, labels)

    def per_example(
        self, logits_s: torch.Tensor, logits_t: LogitsLike, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Losses `[...]` of logits `[..., classes]` and labels `[...]`, which are needed."""
        return self._divergence(logits_s, logits_t, _needed(labels, self), reduction="none")


class CausalLMLoss(Shown, Loss):
    """Mean of a loss between logits over the tokens of a causal language model that count.

    The logits of each position, in float32, go with the label of the next position; positions whose next label is
    `ignore_index` contribute nothing, even if their logits are NaN.

    Args:
        loss: any loss between logits of this package; its own reduction is not used.
        ignore_index: label of the tokens that don't count.

    Raises:
        TypeError: if `loss` is not a `LogitsLoss`.
    """

    _SETTINGS = ("_ignore_index",)

    def __init__(self, loss: LogitsLoss, ignore_index: int = -100) -> None:
        super().__init__()
        if not isinstance(loss, LogitsLoss):
            raise TypeError(f"loss is a {type(loss).__name__}; choices: {_CAUSAL_LM_CHOICES}")
        self.loss = loss
        self._ignore_index = ignore_index

    def forward(self, out_s: Any, out_t: Any, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Mean, a scalar, over the counted tokens of logits `[..., length, classes]` and labels `[..., length]`.

        Args:
            out_s: the student's logits, or an object that has them as `.logits`.
            out_t: the teacher's logits, of the same shape, or a form of `schoolhouse.sparse`.
            labels: not shifted, as for the model itself; None counts every position that travelled.

        Raises:
            TypeError: if an output holds no logits, or if the loss cannot be computed for their form.
            ValueError: if the shapes do not fit, if the loss needs labels and there are none, or if positions that the
                labels count did not travel.
        """
        return functional.causal_lm(
            self.loss.per_example,
            _logits_of(out_s),
            _logits_of(out_t),
            labels,
            ignore_index=self._ignore_index,
            vocabulary=self.loss.vocabulary,
        )


_CAUSAL_LM_CHOICES = (
    "LogitsDistillationLoss, ReverseKLLoss, JSDLoss, SkewedKLLoss, MFTLoss, DKDLoss, "
    "or a subclass of LogitsLoss that defines per_example"
)


def _needed(labels: torch.Tensor | None, loss: nn.Module) -> torch.Tensor:
    if labels is None:
        raise ValueError(f"{type(loss).__name__} needs labels, but got None; pass labels=")
    return labels


def _logits_of(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else getattr(output, "logits", output)
