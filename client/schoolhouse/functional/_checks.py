"""Checks of the losses' tensors and settings, and the reduction that all losses share."""

import math
from typing import Any

import torch

from schoolhouse.sparse import LogitsLike, SparseForm

REDUCTIONS = ("mean", "batchmean", "sum", "none")
VOCABULARIES = ("equal", "shared")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless `reduction` is one of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choices: {', '.join(map(repr, REDUCTIONS))}")


def check_vocabulary(vocabulary: str) -> None:
    """Raise ValueError unless `vocabulary` is one of `VOCABULARIES`."""
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"vocabulary is {vocabulary!r}; choices: {', '.join(map(repr, VOCABULARIES))}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless the setting is a finite number above 0 (NaN is refused too)."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be above 0 and finite")


def check_weight(name: str, value: float) -> None:
    """Raise ValueError unless the setting is a finite number of 0 or above."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be 0 or above, and finite")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless the setting lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be between 0 and 1")


def check_tensor(whose: str, what: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor; a layer's output may be any object, such as a ModelOutput."""
    if isinstance(value, SparseForm):
        raise TypeError(value.refusal())
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"the {whose}'s {what} came as {type(value).__module__}.{type(value).__qualname__}, but a tensor is "
            'needed; pair layers that return a tensor, such as ("lm_head", "lm_head") for logits, or wrap the loss '
            "in a module that picks the tensor, such as one that reads `.logits`"
        )


def check_tensors(what: str, of_student: object, of_teacher: object) -> None:
    """Raise TypeError unless both are tensors."""
    check_tensor("student", what, of_student)
    check_tensor("teacher", what, of_teacher)


def check_same_shape(what: str, of_student: torch.Tensor, of_teacher: torch.Tensor) -> None:
    """Raise TypeError unless both are tensors, ValueError unless their shapes are equal."""
    check_tensors(what, of_student, of_teacher)
    if of_student.shape != of_teacher.shape:
        raise ValueError(f"{_shapes(what, of_student, of_teacher)}; they must be equal")


def _shapes(what: str, of_student: Any, of_teacher: Any) -> str:
    student, teacher = tuple(of_student.shape), tuple(of_teacher.shape)
    return f"the student's {what} have the shape {student}, the teacher's {teacher}"


def compared_logits(logits_s: Any, logits_t: Any, vocabulary: str = "equal") -> tuple[torch.Tensor, LogitsLike]:
    """Logits `[..., classes]` as a loss compares them; with the vocabulary "shared", cut to the classes that both have.

    A form of `schoolhouse.sparse` is not cut.

    Raises:
        TypeError: if the student's logits are not a tensor, or the teacher's are neither a tensor nor a form.
        ValueError: if the shapes differ, with "shared" apart from the classes; or for an invalid vocabulary.
    """
    check_vocabulary(vocabulary)
    if not isinstance(logits_t, SparseForm):
        check_tensors("logits", logits_s, logits_t)
    check_tensor("student", "logits", logits_s)
    if logits_s.shape == logits_t.shape:
        return logits_s, logits_t
    shapes = _shapes("logits", logits_s, logits_t)
    if logits_s.shape[:-1] != logits_t.shape[:-1] or not logits_s.dim() or len(logits_t.shape) != logits_s.dim():
        raise ValueError(f"{shapes}; they must be equal")
    shared = min(logits_s.shape[-1], logits_t.shape[-1])
    if vocabulary == "equal":
        raise ValueError(
            f"{shapes}; they must be equal. If both have the same tokens, and one pads its vocabulary, give the loss "
            f"vocabulary='shared': it compares the first {shared} classes"
        )
    return logits_s[..., :shared], logits_t if isinstance(logits_t, SparseForm) else logits_t[..., :shared]


def check_labels(labels: torch.Tensor, shape: torch.Size, expected: str) -> None:
    """Raise TypeError unless the labels are a tensor, ValueError unless it has `shape`, which `expected` explains."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels came as {type(labels).__name__}; give a tensor of class indices (int64)")
    if labels.shape != shape:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}; {expected} {tuple(shape)} is needed")


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 if its dtype is narrower, since sums over many classes are too coarse in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduce(per_example: torch.Tensor, reduction: str, *, n_mean: int, batch_size: int) -> torch.Tensor:
    """The values as they are ("none"), or their sum over 1 ("sum"), `batch_size` ("batchmean") or `n_mean` ("mean")."""
    check_reduction(reduction)
    if reduction == "none":
        return per_example
    divisors = {"sum": 1, "batchmean": batch_size, "mean": n_mean}
    return per_example.sum() / divisors[reduction]
