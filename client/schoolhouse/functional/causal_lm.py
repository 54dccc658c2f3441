"""A loss between logits as a causal LM loss: each position predicts the next token, and some positions don't count."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from schoolhouse.functional._checks import check_labels, compared_logits, widen
from schoolhouse.functional._forms import over_chunks
from schoolhouse.sparse import (
    HiddenLogits,
    LogitsLike,
    PositionedFeatures,
    SparseForm,
    SparseLogits,
    pick_rows,
    true_index,
)

PerExample = Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]


def causal_lm(
    per_example: PerExample,
    logits_s: torch.Tensor,
    logits_t: LogitsLike,
    labels: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    vocabulary: str = "equal",
) -> torch.Tensor:
    """Mean of a loss over the counted tokens of logits `[..., length, classes]` and labels `[..., length]`.

    `per_example(logits_s, logits_t, labels)` gets logits `[..., length - 1, classes]` of all positions but the last,
    in float32 or wider, and labels `[..., length - 1]` of all but the first, or None; it returns `[..., length - 1]`.
    Positions whose label is `ignore_index` are passed as zeros with the label 0, so that their content, even NaN,
    affects neither value nor gradient. Without labels every position counts; if none counts, the result is 0.

    If the teacher's logits are a form of `schoolhouse.sparse`, `per_example` gets only the counted rows: logits `[n,
    classes]`, labels `[n]`, and the teacher's `TopKLogits` or `SampledLogits` of these rows. `PositionedFeatures` must
    hold all positions that the labels count; without labels, the positions that they hold count.

    With the vocabulary "shared" the numbers of classes may differ: see `schoolhouse.functional.logits`. `per_example`
    must use the same vocabulary, since forms are passed to it uncut.

    Raises:
        TypeError: if the logits are neither tensors nor forms.
        ValueError: if the shapes do not fit, or if positions that count did not travel.
    """
    logits_s, values = compared_logits(logits_s, logits_t, vocabulary)
    if logits_s.dim() < 2:
        raise ValueError(f"the logits have the shape {tuple(logits_s.shape)}; [..., length, classes] is needed")
    if isinstance(values, SparseForm):
        return _causal_lm_of_form(per_example, logits_s, values, labels, ignore_index)
    shifted_s, shifted_t = widen(logits_s[..., :-1, :]), widen(values[..., :-1, :])
    if labels is None:
        return causal_lm_mean(per_example(shifted_s, shifted_t, None))
    check_labels(labels, logits_s.shape[:-1], "one index for each token,")
    ignored = labels[..., 1:] == ignore_index
    shifted_s, shifted_t = (logits.masked_fill(ignored.unsqueeze(-1), 0.0) for logits in (shifted_s, shifted_t))
    per_token = per_example(shifted_s, shifted_t, labels[..., 1:].masked_fill(ignored, 0))
    return causal_lm_mean(per_token, labels, ignore_index=ignore_index)


def causal_lm_mean(
    per_token: torch.Tensor, labels: torch.Tensor | None = None, *, ignore_index: int = -100
) -> torch.Tensor:
    """Mean of losses `[..., length - 1]` over the positions whose next label, of `[..., length]`, isn't `ignore_index`.

    Without labels it is the mean of all; if no position counts it is 0. Ignored losses may be inf or NaN.

    Raises:
        ValueError: unless the labels have exactly one position more than the losses.
    """
    if labels is None:
        return per_token.sum() / max(per_token.numel(), 1)
    expected = torch.Size([*per_token.shape[:-1], per_token.shape[-1] + 1])
    check_labels(labels, expected, "one position more than the losses,")
    counted = labels[..., 1:] != ignore_index
    return per_token.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def causal_positions(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Bool mask `[..., length]` of the positions whose logits a causal loss with labels `[..., length]` reads.

    A position counts if its next label is not `ignore_index`; the last never does.
    """
    return F.pad(labels[..., 1:] != ignore_index, (0, 1))


def _causal_lm_of_form(
    per_example: PerExample,
    logits_s: torch.Tensor,
    teacher: SparseForm,
    labels: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    tokens = logits_s.shape[:-1]
    if labels is not None:
        check_labels(labels, tokens, "one index for each token,")
        counted = causal_positions(labels, ignore_index)
    else:
        counted = torch.ones(tokens, dtype=torch.bool, device=logits_s.device)
        counted[..., -1:] = False
    rows_t = _counted_rows(teacher, counted, labelled=labels is not None)
    if isinstance(teacher, PositionedFeatures):
        counted = counted & teacher.mask
    index = true_index(counted)
    rows_s = pick_rows(logits_s, index)
    next_labels = None if labels is None else labels.roll(-1, dims=-1).flatten().index_select(0, index)
    return causal_lm_mean(_rows_losses(per_example, rows_s, rows_t, next_labels))


def _counted_rows(teacher: SparseForm, counted: torch.Tensor, *, labelled: bool) -> torch.Tensor | SparseLogits:
    """The teacher's rows `[n, classes]` where `counted`; unless `labelled`, only those that travelled."""
    if isinstance(teacher, PositionedFeatures):
        if teacher.mask.shape != counted.shape:
            raise ValueError(
                f"the mask of the teacher's positions has the shape {tuple(teacher.mask.shape)}; one value for each "
                f"token, {tuple(counted.shape)}, is needed"
            )
        return teacher.at(counted if labelled else counted & teacher.mask)
    assert isinstance(teacher, SparseLogits)
    return teacher.rows(true_index(counted))


def _rows_losses(
    per_example: PerExample, rows_s: torch.Tensor, rows_t: torch.Tensor | SparseLogits, labels: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(rows_t, HiddenLogits):
        if labels is None:
            return over_chunks(lambda s, t: per_example(s, t, None), rows_s, rows_t)
        return over_chunks(per_example, rows_s, rows_t, labels)
    return per_example(widen(rows_s), widen(rows_t) if isinstance(rows_t, torch.Tensor) else rows_t, labels)
