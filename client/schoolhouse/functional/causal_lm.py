"""The causal-LM form of a loss between logits: a position predicts the next token, and some positions don't count."""

from collections.abc import Callable

import torch

from schoolhouse.functional._checks import check_labels, check_same_shape, widen

PerExample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def causal_lm(
    per_example: PerExample,
    logits_s: torch.Tensor,
    logits_t: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean of a loss over the counted tokens of logits `[..., length, classes]` and labels `[..., length]`.

    `per_example(logits_s, logits_t, labels)` gets logits `[..., length - 1, classes]` of all positions but the last,
    in float32 or wider, and labels `[..., length - 1]` of all but the first, or None; it returns `[..., length - 1]`.
    Positions whose label is `ignore_index` reach it as zeros with the label 0, so that what they held, be it NaN, is
    neither in the value nor in the gradient. Without labels every position counts; if none counts the result is 0.

    Raises:
        TypeError: if something else than a tensor came.
        ValueError: if the shapes do not fit.
    """
    check_same_shape("logits", logits_s, logits_t)
    if logits_s.dim() < 2:
        raise ValueError(f"the logits have the shape {tuple(logits_s.shape)}; [..., length, classes] is needed")
    shifted_s, shifted_t = widen(logits_s[..., :-1, :]), widen(logits_t[..., :-1, :])
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
    """Mean of the losses `[..., length - 1]` of positions whose next label of `[..., length]` isn't `ignore_index`.

    Without labels it is the mean of all; if no position counts it is 0. Ignored losses may be inf or NaN.

    Raises:
        ValueError: if the labels have not one position more than the losses.
    """
    if labels is None:
        return per_token.sum() / max(per_token.numel(), 1)
    expected = torch.Size([*per_token.shape[:-1], per_token.shape[-1] + 1])
    check_labels(labels, expected, "one position more than the losses,")
    counted = labels[..., 1:] != ignore_index
    return per_token.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
