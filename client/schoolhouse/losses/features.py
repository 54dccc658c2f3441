"""Losses between features of a student and of a teacher; the maths is in `schoolhouse.functional`."""

import torch
from schoolhouse_wire.torch_private import Loss
from torch import nn

from schoolhouse import functional
from schoolhouse.functional import _checks
from schoolhouse.functional.features import spread_positions, zero_uncounted
from schoolhouse.losses.shown import Shown
from schoolhouse.sparse import SparseForm


class MGDLoss(Shown, Loss):
    """Masked generative distillation of feature maps (arXiv 2205.01529); has trainable parameters.

    Args:
        num_student_channels: channels of the student's map.
        num_teacher_channels: channels of the teacher's map.
        alpha_mgd: multiplies the loss; 0 or above.
        lambda_mgd: share of positions that are masked, in [0, 1].

    Raises:
        ValueError: for invalid numbers of channels, alpha_mgd or lambda_mgd.
    """

    _SETTINGS = ("_alpha_mgd", "_lambda_mgd")

    def __init__(
        self,
        num_student_channels: int,
        num_teacher_channels: int,
        alpha_mgd: float = 1.0,
        lambda_mgd: float = 0.65,
    ) -> None:
        super().__init__()
        _checks.check_positive("num_student_channels", num_student_channels)
        _checks.check_positive("num_teacher_channels", num_teacher_channels)
        _checks.check_weight("alpha_mgd", alpha_mgd)
        _checks.check_fraction("lambda_mgd", lambda_mgd)
        self._alpha_mgd = alpha_mgd
        self._lambda_mgd = lambda_mgd
        same = num_student_channels == num_teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(num_student_channels, num_teacher_channels, kernel_size=1)
        self.generation = nn.Sequential(
            nn.Conv2d(num_teacher_channels, num_teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_teacher_channels, num_teacher_channels, kernel_size=3, padding=1),
        )

    def forward(self, out_s: torch.Tensor, out_t: torch.Tensor) -> torch.Tensor:
        """Loss, a scalar, of maps `[batch, channels, height, width]` whose numbers of channels may differ."""
        _checks.check_tensors("maps", out_s, out_t)
        return functional.mgd(
            self.align(out_s), out_t, self.generation, alpha_mgd=self._alpha_mgd, lambda_mgd=self._lambda_mgd
        )


class _HiddenLoss(Shown, Loss):
    """Base of the losses between hidden states, which projects the student's to the teacher's width if needed."""

    _SETTINGS = ("_student_width", "_teacher_width", "_reduction")

    def __init__(self, student_width: int, teacher_width: int, reduction: str = "mean") -> None:
        _checks.check_positive("student_width", student_width)
        _checks.check_positive("teacher_width", teacher_width)
        _checks.check_reduction(reduction)
        super().__init__(reduction=reduction)
        same = student_width == teacher_width
        self.projection = nn.Identity() if same else nn.Linear(student_width, teacher_width, bias=False)
        self._student_width, self._teacher_width = student_width, teacher_width
        self._reduction = reduction

    def _project(self, hidden_s: torch.Tensor, hidden_t: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        _checks.check_tensors("hidden states", hidden_s, hidden_t)
        if hidden_s.shape[-1] != self._student_width:
            raise ValueError(
                f"the student's hidden states have the shape {tuple(hidden_s.shape)}; "
                f"[..., {self._student_width}] is needed, by student_width"
            )
        # Zeroed before the projection, or garbage in uncounted tokens would enter the gradient of its weight.
        projected: torch.Tensor = self.projection(zero_uncounted(hidden_s, mask))
        return projected


class HiddenMSELoss(_HiddenLoss):
    """Mean squared difference of hidden states; trainable where the widths differ (arXiv 1909.10351).

    Args:
        student_width: width of the student's hidden states.
        teacher_width: width of the teacher's; a different one adds a learned projection without bias.
        reduction: "mean" (over the counted tokens), "batchmean", "sum", or "none" (one value per token).

    Raises:
        ValueError: for invalid widths or an invalid reduction.
    """

    def forward(
        self, hidden_s: torch.Tensor, hidden_t: torch.Tensor | SparseForm, *, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of hidden states `[..., width]` over the tokens that the `mask` `[...]` counts; all, without one."""
        hidden_t, mask = spread_positions(hidden_t, mask)
        projected = self._project(hidden_s, hidden_t, mask)
        return functional.hidden_mse(projected, hidden_t, mask=mask, reduction=self._reduction)


class HiddenCosineLoss(_HiddenLoss):
    """1 - cosine between hidden states; trainable where the widths differ (arXiv 1910.01108).

    Args:
        student_width: width of the student's hidden states.
        teacher_width: width of the teacher's; a different one adds a learned projection without bias.
        reduction: "mean" (over the counted tokens), "batchmean", "sum", or "none" (one value per token).

    Raises:
        ValueError: for invalid widths or an invalid reduction.
    """

    def forward(
        self, hidden_s: torch.Tensor, hidden_t: torch.Tensor | SparseForm, *, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of hidden states `[..., width]` over the tokens that the `mask` `[...]` counts; all, without one."""
        hidden_t, mask = spread_positions(hidden_t, mask)
        projected = self._project(hidden_s, hidden_t, mask)
        return functional.hidden_cosine(projected, hidden_t, mask=mask, reduction=self._reduction)


class AttentionTransferLoss(Shown, Loss):
    """Squared difference of normalised attention maps (arXiv 1612.03928).

    Args:
        p: power of the activations' magnitude, 1 or above.
        reduction: "mean" or "batchmean" (both over the batch), "sum", or "none" (one value per example).

    Raises:
        ValueError: for an invalid p or reduction.
    """

    _SETTINGS = ("_p", "_reduction")

    def __init__(self, p: float = 2.0, reduction: str = "mean") -> None:
        _checks.check_reduction(reduction)
        super().__init__(reduction=reduction)
        _checks.check_positive("p", p)
        if p < 1:
            raise ValueError(f"p is {p}; it must be 1 or above: below, the gradient at an activation of 0 is infinite")
        self._p = p
        self._reduction = reduction

    def forward(self, maps_s: torch.Tensor, maps_t: torch.Tensor) -> torch.Tensor:
        """Loss of maps `[batch, channels, height, width]` whose numbers of channels may differ."""
        return functional.attention_transfer(maps_s, maps_t, p=self._p, reduction=self._reduction)


class RKDLoss(Shown, Loss):
    """Relational knowledge distillation, by distances and angles between a batch's examples (arXiv 1904.05068).

    Args:
        distance_weight: weight of the distance-wise loss, 0 or above.
        angle_weight: weight of the angle-wise loss, 0 or above.

    Raises:
        ValueError: for invalid weights.
    """

    _SETTINGS = ("_distance_weight", "_angle_weight")

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        _checks.check_weight("distance_weight", distance_weight)
        _checks.check_weight("angle_weight", angle_weight)
        self._distance_weight = distance_weight
        self._angle_weight = angle_weight

    def forward(self, embeddings_s: torch.Tensor, embeddings_t: torch.Tensor) -> torch.Tensor:
        """Loss, a scalar, of embeddings `[batch, width]`; widths may differ."""
        distance = functional.rkd_distance(embeddings_s, embeddings_t)
        return self._distance_weight * distance + self._angle_weight * functional.rkd_angle(embeddings_s, embeddings_t)
