"""Tensors as memory: their dtypes on the wire, their offsets in a payload, and the order of their dimensions."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch

from schoolhouse_wire.errors import CorruptPayloadError, ProtocolError
from schoolhouse_wire.limits import ALIGNMENT
from schoolhouse_wire.v1 import values_pb2

DimOrder: TypeAlias = tuple[int, ...]
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

DTYPES: dict[torch.dtype, int] = {
    getattr(torch, name.lower()): number
    for name, number in values_pb2.DType.items()
    if number and hasattr(torch, name.lower())
}
DTYPE_OF_NUMBER = {number: dtype for dtype, number in DTYPES.items()}


def tensor_nbytes(header: values_pb2.TensorHeader) -> int:
    """Bytes that a declared tensor takes in the payload."""
    dtype = DTYPE_OF_NUMBER.get(header.dtype)
    if dtype is None:
        raise ProtocolError(f"a tensor of the unknown dtype number {header.dtype} was declared")
    return math.prod(header.shape) * dtype.itemsize


def aligned(offset: int) -> int:
    """`offset` rounded up to the alignment of a tensor."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def offsets(sizes: Iterable[int]) -> Iterator[int]:
    """The offset of each tensor in the payload; the last item is the end of the payload."""
    end = 0
    for size in sizes:
        start = aligned(end)
        yield start
        end = start + size
    yield end


def dim_order(tensor: torch.Tensor) -> DimOrder | None:
    """The dimensions in their order in memory, outermost first; () if it is row-major, None if it has gaps.

    The strides of dimensions of size 1 count too, since kernels choose the layout of their results by them.
    """
    strides, step = tensor.stride(), 1
    for size, stride in zip(reversed(tensor.shape), reversed(strides), strict=True):
        if stride != step:
            break
        step *= max(size, 1)
    else:
        return ()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim] == 1)))
    if tensor.permute(order).is_contiguous():
        return order
    return () if tensor.is_contiguous() else None


def without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the dimensions in the same order in memory; the tensor itself if torch cannot copy its dtype."""
    try:
        return tensor.detach().clone()
    except (NotImplementedError, RuntimeError):
        return tensor


def in_memory_order(tensor: torch.Tensor, order: DimOrder) -> torch.Tensor:
    """The tensor permuted so that its dimensions have their order in memory, outermost first."""
    return tensor.detach().permute(order) if order else tensor


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in plain contiguous memory on CPU; the tensor itself if it already has that."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if plain.is_contiguous():
        return plain
    same_size = _SAME_SIZE.get(plain.dtype.itemsize)
    if same_size is None:
        return plain.contiguous()
    return plain.view(same_size).contiguous().view(plain.dtype)  # as integers, since torch cannot copy every dtype


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor as bytes, without copying."""
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:  # with at most one element, any stride is contiguous
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def view_of(
    payload: Any, start: int, count: int, dtype: torch.dtype, shape: tuple[int, ...], order: DimOrder
) -> torch.Tensor:
    """A tensor over a part of a received payload.

    Raises:
        ProtocolError: if no tensor can have that shape.
        CorruptPayloadError: if a bool is neither 0 nor 1; kernels would count more such values than they then write.
    """
    try:
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        plain = torch.frombuffer(payload, dtype=dtype, count=count, offset=start)
        if dtype is torch.bool and int(plain.view(torch.uint8).amax()) > 1:
            raise CorruptPayloadError("a bool arrived that is neither 0 nor 1")
        if not order:
            return plain.view(shape)
        places = [order.index(dim) for dim in range(len(order))]
        return plain.view([shape[dim] for dim in order]).permute(places)
    except RuntimeError as err:  # a dimension of size 0 with others whose product is too large for torch
        raise ProtocolError(f"a tensor of the impossible shape {shape} was declared") from err
