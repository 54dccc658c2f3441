"""Whether numbers are finite: a cheap check of all of them by their sum, and a close one if that is not finite.

A number that is not finite may change the rows beside it in a batch, which no comparison of finite numbers shows.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import is_plain, tensors_of

_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128}
_DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
Kind = Literal["finite", "infinite", "nan"]


def is_finite(value: Any) -> bool:
    """Whether all numbers of a nested value are finite; waits for their device."""
    return all(math.isfinite(_sum(tensor).item()) for tensor in _numbers(value)) or kind(value) == "finite"


def total(value: Any) -> torch.Tensor | None:
    """The sum of a nested value's floating-point numbers; None if it has none.

    The sum is not finite if one of them is not, or, rarely, if the sum itself is too large.
    """
    sums = [_sum(tensor) for tensor in _numbers(value)]
    if not sums:
        return None
    if len(sums) == 1:
        return sums[0]
    return torch.stack([one.to(sums[0].device, torch.float32) for one in sums]).sum()


def is_finite_total(found: torch.Tensor | None) -> bool:
    """Whether a sum that `total` returned is finite; waits for its device."""
    return found is None or math.isfinite(found.item())


def kind(value: Any) -> Kind:
    """Whether a nested value has a NaN, or else an infinity, or neither; looks at each number."""
    found: Kind = "finite"
    for tensor in map(_real, _numbers(value)):
        if bool(tensor.isnan().any()):
            return "nan"
        if bool(tensor.isinf().any()):
            found = "infinite"
    return found


def _numbers(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that may hold numbers that are not finite; the common case, a flat value, needs no recursive walk."""
    items: Iterable[Any] = (value,)
    if type(value) is dict:
        items = value.values()
    elif isinstance(value, Arguments):
        items = (*value, *value.kwargs.values())
    for item in items:
        yield from filter(_counts, (item,) if isinstance(item, torch.Tensor) else tensors_of(item))


def _counts(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _DTYPES and is_plain(tensor) and tensor.layout is torch.strided


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor; for float16 in float32, as float16 overflows early."""
    real = _real(tensor)
    return real.sum(dtype=torch.float32) if real.dtype is torch.float16 else real.sum()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats have no sums
