"""Whether numbers are finite: a cheap look at all of them, and a close one at those of which it says that some are not.

What is not finite may decide what becomes of the rows beside it, which no comparison of finite numbers shows.
"""

from typing import Any, Literal

import torch
from schoolhouse.taps import is_plain, tensors_of

Kind = Literal["finite", "infinite", "nan"]


def is_finite(value: Any) -> bool:
    """Whether all numbers of a nested value are finite. It waits for their device."""
    return is_finite_total(total(value)) or kind(value) == "finite"


def total(value: Any) -> torch.Tensor | None:
    """The sum of a nested value's floating-point numbers; None if there is none.

    It is not finite where one of them is not; and, rarely, where it is too large itself.
    """
    sums = [_sum(tensor) for tensor in tensors_of(value) if _counts(tensor)]
    if not sums:
        return None
    device = sums[0].device
    return sums[0] if len(sums) == 1 else torch.stack([one.to(device, torch.float64) for one in sums]).sum()


def is_finite_total(found: torch.Tensor | None) -> bool:
    """Whether a `total` is finite. It waits for its device."""
    return found is None or bool(found.isfinite())


def kind(value: Any) -> Kind:
    """What is among a nested value's numbers: a NaN, or else something infinite, or neither. It looks closely."""
    found: Kind = "finite"
    for tensor in map(_real, filter(_counts, tensors_of(value))):
        if bool(tensor.isnan().any()):
            return "nan"
        if bool(tensor.isinf().any()):
            found = "infinite"
    return found


def _counts(tensor: torch.Tensor) -> bool:
    number = tensor.is_floating_point() or tensor.is_complex()
    return number and is_plain(tensor) and tensor.layout is torch.strided


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    real = _real(tensor)
    return real.sum(dtype=torch.float32 if real.itemsize < torch.float32.itemsize else None)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.itemsize == 1 else tensor  # of eight bits they have no sums
