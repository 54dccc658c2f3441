"""Losses between hidden states, feature maps and embeddings of a student and of a teacher.

Except for `mgd` they are computed in float32 or wider, return the dtype of the student's tensor, and send no gradient
to the teacher.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from schoolhouse.functional._checks import check_reduction, check_same_shape, check_tensors, widen
from schoolhouse.sparse import PositionedFeatures, SparseForm, check_positions


def mgd(
    features_s: torch.Tensor,
    features_t: torch.Tensor,
    generation: Callable[[torch.Tensor], torch.Tensor],
    *,
    alpha_mgd: float = 1.0,
    lambda_mgd: float = 0.65,
) -> torch.Tensor:
    """Mean squared error between the teacher's map and `generation` of the masked student's map (arXiv 2205.01529).

    Both maps are `[batch, channels, height, width]`. `lambda_mgd` is the share of positions that are masked, drawn from
    the default random generator of the student's device; `alpha_mgd` multiplies the loss, a scalar.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if the shapes differ, or are not those of maps.
    """
    check_same_shape("maps", features_s, features_t)
    _check_maps(features_t)
    batch, _, height, width = features_t.shape
    kept = torch.rand((batch, 1, height, width), device=features_s.device) <= 1 - lambda_mgd
    return F.mse_loss(generation(features_s * kept), features_t) * alpha_mgd


def hidden_mse(
    hidden_s: torch.Tensor,
    hidden_t: torch.Tensor | SparseForm,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Mean squared difference of hidden states `[..., width]` over the width, for each token (arXiv 1909.10351).

    Tokens where the bool or 0/1 `mask` `[...]` is false contribute nothing, whatever they hold. With reduction "none"
    the result has the shape `[...]`; "mean" divides by the number of counted tokens (and is 0 if there is none),
    "batchmean" by the size of the first dimension. For the teacher's `PositionedFeatures`, the tokens at its positions
    count, or those of the mask, which must be among them.

    Raises:
        TypeError: if an argument is not a tensor, or is another form.
        ValueError: if the shapes do not fit, or for an invalid reduction.
    """
    hidden_t, mask = spread_positions(hidden_t, mask)
    wide_s, wide_t = _counted_hidden(hidden_s, hidden_t, mask)
    return _reduce_tokens((wide_s - wide_t).square().mean(dim=-1), mask, reduction).to(hidden_s.dtype)


def hidden_cosine(
    hidden_s: torch.Tensor,
    hidden_t: torch.Tensor | SparseForm,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """1 - cosine of the angle between hidden states `[..., width]`, for each token (arXiv 1910.01108).

    Tokens where the bool or 0/1 `mask` `[...]` is false contribute nothing, whatever they hold; a vector of zeros has
    the loss 1. With reduction "none" the result has the shape `[...]`; "mean" divides by the number of counted tokens
    (and is 0 if there is none), "batchmean" by the size of the first dimension. For the teacher's `PositionedFeatures`,
    the tokens at its positions count, or those of the mask, which must be among them.

    Raises:
        TypeError: if an argument is not a tensor, or is another form.
        ValueError: if the shapes do not fit, or for an invalid reduction.
    """
    hidden_t, mask = spread_positions(hidden_t, mask)
    wide_s, wide_t = _counted_hidden(hidden_s, hidden_t, mask)
    return _reduce_tokens(1 - F.cosine_similarity(wide_s, wide_t, dim=-1), mask, reduction).to(hidden_s.dtype)


def zero_uncounted(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states `[..., width]` with zeros at the tokens that the `mask` `[...]` does not count.

    Raises:
        ValueError: if the mask does not have the shape of the tokens.
    """
    if mask is None:
        return hidden
    _check_mask(mask, hidden.shape[:-1])
    return hidden.masked_fill(~mask.bool().unsqueeze(-1), 0.0)


def spread_positions(
    hidden_t: torch.Tensor | SparseForm, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A teacher's hidden states as a tensor `[..., width]`, with zeros where none travelled, and the mask to count by.

    Raises:
        TypeError: for another form than `PositionedFeatures` of a tensor.
        ValueError: if tokens that the mask counts did not travel.
    """
    if not isinstance(hidden_t, SparseForm):
        return hidden_t, mask
    if not isinstance(hidden_t, PositionedFeatures) or isinstance(hidden_t.values, SparseForm):
        raise TypeError(hidden_t.refusal())
    if mask is not None:
        _check_mask(mask, hidden_t.mask.shape)
        check_positions(hidden_t, mask.bool())
    spread = hidden_t.values.new_zeros(hidden_t.shape)
    spread[hidden_t.mask] = hidden_t.values
    return spread, hidden_t.mask if mask is None else mask


def attention_transfer(
    maps_s: torch.Tensor, maps_t: torch.Tensor, *, p: float = 2.0, reduction: str = "mean"
) -> torch.Tensor:
    """Squared difference of the normalised attention of maps `[batch, channels, height, width]` (arXiv 1612.03928).

    The attention of a position is the sum over channels of `|value| ** p`; the attention of each example is flattened
    and divided by its L2 norm. The squared difference is averaged over positions: `[batch]` with reduction "none";
    "mean" and "batchmean" are both the mean over the batch. The numbers of channels may differ.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if the batches, heights or widths differ, if these are not maps, or for an invalid reduction.
    """
    check_tensors("maps", maps_s, maps_t)
    _check_maps(maps_s)
    _check_maps(maps_t)
    if maps_s.shape[0] != maps_t.shape[0] or maps_s.shape[2:] != maps_t.shape[2:]:
        raise ValueError(
            f"the student's maps have the shape {tuple(maps_s.shape)}, the teacher's {tuple(maps_t.shape)}; all but "
            "the channels, the second dimension, must be equal"
        )
    difference = _attention(widen(maps_s), p) - _attention(widen(maps_t.detach()), p)
    return _reduce_tokens(difference.square().mean(dim=1), None, reduction).to(maps_s.dtype)


def rkd_distance(embeddings_s: torch.Tensor, embeddings_t: torch.Tensor) -> torch.Tensor:
    """Smooth L1 difference of distances between examples, divided by each side's mean distance (arXiv 1904.05068).

    Embeddings are `[batch, width]`; widths may differ. The mean distance is taken over pairs of different examples; the
    result, a scalar, is the mean over all batch ** 2 entries, as in the authors' code. Pairs at distance 0 get no
    gradient.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if the batches differ, or unless there are two dimensions.
    """
    _check_embeddings(embeddings_s, embeddings_t)
    distances_s = _relative_distances(widen(embeddings_s))
    distances_t = _relative_distances(widen(embeddings_t.detach()))
    return _smooth_l1(distances_s, distances_t).to(embeddings_s.dtype)


def rkd_angle(embeddings_s: torch.Tensor, embeddings_t: torch.Tensor) -> torch.Tensor:
    """Smooth L1 difference of the cosines of the angles that triples of examples form (arXiv 1904.05068).

    Embeddings are `[batch, width]`; widths may differ. The result, a scalar, is the mean over all batch ** 3 entries,
    as in the authors' code, and takes memory for as many. An angle between equal examples counts as cosine 0.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if the batches differ, or unless there are two dimensions.
    """
    _check_embeddings(embeddings_s, embeddings_t)
    angles_s, angles_t = _angles(widen(embeddings_s)), _angles(widen(embeddings_t.detach()))
    return _smooth_l1(angles_s, angles_t).to(embeddings_s.dtype)


def _check_mask(mask: torch.Tensor, tokens: torch.Size) -> None:
    if mask.shape != tokens:
        raise ValueError(
            f"the mask has the shape {tuple(mask.shape)}; one value for each token, {tuple(tokens)}, is needed"
        )


def _counted_hidden(
    hidden_s: torch.Tensor, hidden_t: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_same_shape("hidden states", hidden_s, hidden_t)
    # The teacher's states need no zeros: an uncounted token's loss is masked, and its gradient ends at the student's.
    return zero_uncounted(widen(hidden_s), mask), widen(hidden_t.detach())


def _reduce_tokens(per_token: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """Mask uncounted per-token losses `[...]`, and reduce them; "mean" divides by the number of counted tokens."""
    check_reduction(reduction)
    if mask is not None:
        per_token = per_token.masked_fill(~mask.bool(), 0.0)
    if reduction == "none":
        return per_token
    if reduction == "sum":
        return per_token.sum()
    if reduction == "batchmean":
        return per_token.sum() / per_token.shape[0]
    return per_token.sum() / (max(per_token.numel(), 1) if mask is None else mask.bool().sum().clamp(min=1))


def _attention(maps: torch.Tensor, p: float) -> torch.Tensor:
    """Normalised attention `[batch, height * width]` of maps `[batch, channels, height, width]`."""
    return F.normalize(maps.abs().pow(p).sum(dim=1).flatten(1), dim=1)


def _relative_distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Distances `[batch, batch]` divided by their mean; zeros if all examples are equal."""
    # From differences: dot products lose small distances, and need a clamp before the square root. The gradient of
    # vector_norm at 0 is 0.
    distances: torch.Tensor = torch.linalg.vector_norm(embeddings[:, None] - embeddings[None, :], dim=-1)
    batch = len(embeddings)
    mean = distances.sum() / max(batch * (batch - 1), 1)
    return distances / torch.where(mean == 0, 1.0, mean)


def _angles(embeddings: torch.Tensor) -> torch.Tensor:
    """Cosines `[batch, batch, batch]`: entry (i, j, k) is that of the angle at i between j and k."""
    differences = embeddings[None, :] - embeddings[:, None]
    norms: torch.Tensor = torch.linalg.vector_norm(differences, dim=-1, keepdim=True)
    # Divided by a small constant instead, a difference of 0 would get a gradient as large as the constant's inverse.
    units = differences / norms.masked_fill(norms == 0, 1.0)
    return units @ units.transpose(1, 2)


def _smooth_l1(of_student: torch.Tensor, of_teacher: torch.Tensor) -> torch.Tensor:
    # Not a mean, which would be NaN without entries, where this is 0.
    return F.smooth_l1_loss(of_student, of_teacher, reduction="sum") / max(of_student.numel(), 1)


def _check_maps(maps: torch.Tensor) -> None:
    if maps.dim() != 4:
        raise ValueError(f"the maps have the shape {tuple(maps.shape)}; [batch, channels, height, width] is needed")


def _check_embeddings(embeddings_s: torch.Tensor, embeddings_t: torch.Tensor) -> None:
    check_tensors("embeddings", embeddings_s, embeddings_t)
    if embeddings_s.dim() != 2 or embeddings_t.dim() != 2 or len(embeddings_s) != len(embeddings_t):
        raise ValueError(
            f"the student's embeddings have the shape {tuple(embeddings_s.shape)}, the teacher's "
            f"{tuple(embeddings_t.shape)}; [batch, width] with the same batch is needed"
        )
