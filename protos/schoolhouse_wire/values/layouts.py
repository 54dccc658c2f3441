"""The declarations in a received bundle, checked against the limits: its structure, and where each tensor is."""

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from google.protobuf.message import DecodeError

from schoolhouse_wire.errors import MessageTooLargeError, ProtocolError
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import values_pb2
from schoolhouse_wire.values.tensors import DTYPE_OF_NUMBER, DimOrder, offsets, tensor_nbytes

_CACHED_HEADER_BYTES = 4096
_VALUE_BYTES = 2  # the least that a value takes in a header
_PARSING = threading.Lock()  # held for a large header, which may take 30 times its size until its values are counted


@dataclass(frozen=True)
class Layout:
    """A received declaration, checked: the structure, and where each tensor is in the payload."""

    root: values_pb2.Value
    tensors: tuple[tuple[int, int, torch.dtype, tuple[int, ...], DimOrder], ...]  # start, count, dtype, shape, order
    nbytes: int
    flat: bool  # whether the value is a list or Arguments of all the tensors in order


def read_layout(header: bytes, limits: Limits) -> Layout:
    """Parse a serialized bundle and check what it declares, without taking memory for that.

    Raises:
        MessageTooLargeError: if it declares more than `limits` allow.
        ProtocolError: if it is not a bundle.
    """
    if len(header) > limits.max_header_bytes:
        raise MessageTooLargeError(f"a header of {len(header)} bytes is over the limit of {limits.max_header_bytes}")
    if len(header) <= _CACHED_HEADER_BYTES:
        return _small_layout(header, limits)
    if len(header) <= _VALUE_BYTES * limits.max_values:  # it cannot hold more
        return _layout(header, limits)
    with _PARSING:
        layout = _layout(header, limits)
        _check_count(layout.root, limits.max_values)
        return layout


def _layout(header: bytes, limits: Limits) -> Layout:
    try:
        bundle = values_pb2.Bundle.FromString(header)
    except DecodeError as err:
        raise ProtocolError("a header arrived that cannot be parsed") from err
    if len(bundle.tensors) > limits.max_tensors:
        raise MessageTooLargeError(f"{len(bundle.tensors)} tensors are over the limit of {limits.max_tensors}")
    for declared in bundle.tensors:
        if len(declared.shape) > limits.max_rank:
            raise MessageTooLargeError(f"a tensor of rank {len(declared.shape)} is over the limit of {limits.max_rank}")
        _check_shape(declared, limits)
    sizes = [tensor_nbytes(declared) for declared in bundle.tensors]
    *starts, total = offsets(sizes)
    if total > limits.max_payload_bytes:
        raise MessageTooLargeError(
            f"the tensors take {total} bytes, over the limit of {limits.max_payload_bytes}; "
            "send smaller batches, tap fewer modules, or raise the receiver's limit"
        )
    tensors = tuple(
        (
            start,
            math.prod(declared.shape),
            DTYPE_OF_NUMBER[declared.dtype],
            tuple(declared.shape),
            tuple(declared.dim_order),
        )
        for start, declared in zip(starts, bundle.tensors, strict=True)
    )
    return Layout(bundle.root, tensors, total, _is_flat(bundle))


def _check_shape(declared: values_pb2.TensorHeader, limits: Limits) -> None:
    shape, order = declared.shape, declared.dim_order
    if any(size >= 1 << 63 for size in shape):
        raise MessageTooLargeError("a tensor with a dimension of 2**63 or more was declared")
    if 0 in shape and math.prod(size or 1 for size in shape) > limits.max_empty_elements:
        raise MessageTooLargeError(
            f"an empty tensor's other dimensions are over the limit of {limits.max_empty_elements} elements"
        )
    if order and (len(order) != len(shape) or sorted(order) != list(range(len(shape)))):
        raise ProtocolError(f"a tensor of rank {len(shape)} was declared with the dimension order {list(order)[:80]}")


def _check_count(root: values_pb2.Value, max_values: int) -> None:
    count, found = 1, [root]
    while found:
        for children in _children(found.pop()):
            count += len(children)
            if count > max_values:
                raise MessageTooLargeError(f"a structure of more than {max_values} values arrived")
            found.extend(children)


def _children(node: values_pb2.Value) -> tuple[Any, ...]:
    """The values directly inside one, as lists."""
    kind = node.WhichOneof("kind")
    if kind in ("tuple", "list"):
        return (getattr(node, kind).items,)
    if kind == "dict":
        return node.dict.keys, node.dict.values
    if kind == "record":
        return (node.record.values,)
    if kind == "packed":
        return (node.packed.fields,)
    if kind == "arguments":
        return node.arguments.positional, list(node.arguments.keyword.values())
    return ()


_small_layout = functools.lru_cache(maxsize=512)(_layout)  # a training loop receives the same header every step


def _is_flat(bundle: values_pb2.Bundle) -> bool:
    kind = bundle.root.WhichOneof("kind")
    if kind == "list":
        items = bundle.root.list.items
    elif kind == "arguments" and not bundle.root.arguments.keyword:
        items = bundle.root.arguments.positional
    else:
        return False
    used = [item.tensor if item.WhichOneof("kind") == "tensor" else -1 for item in items]
    return used == list(range(len(bundle.tensors)))
