"""Walking through nested values: tuples, lists, mappings, and objects with named fields keep their structure."""

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.records import record_of, with_fields

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A nested value of the same structure with each tensor changed; other leaves stay the same objects."""
    return map_where(value, torch.Tensor, change)


def map_where(value: Any, kinds: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """A nested value of the same structure with each part of one of `kinds` changed as a whole."""
    if isinstance(value, kinds):
        return change(value)
    if type(value) is dict:
        return {key: map_where(item, kinds, change) for key, item in value.items()}
    if isinstance(value, Arguments):
        items = [map_where(item, kinds, change) for item in value]  # before kwargs, since `change` may count
        return Arguments(items, value.kwargs and map_where(value.kwargs, kinds, change))
    if (record := record_of(value)) is not None:
        fields = {name: map_where(item, kinds, change) for name, item in record.fields.items()}
        return with_fields(value, record, fields)
    if isinstance(value, tuple | list):
        return type(value)(map_where(item, kinds, change) for item in value)
    if isinstance(value, Mapping):
        return _like(value, {key: map_where(item, kinds, change) for key, item in value.items()})
    return value


def _like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the type of `value` with other items; a plain dict if that type is immutable."""
    try:
        made: Any = copy.copy(value)
        for key, item in items.items():
            made[key] = item
    except TypeError:
        return items
    return made


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested value."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif kind is list or kind is tuple:  # the common ones first, as each request is looked through several times
        for item in value:
            _collect(item, found)
    elif kind is Arguments:
        for item in value:
            _collect(item, found)
        if value.kwargs:
            _collect(value.kwargs, found)
    elif kind is dict:
        for item in value.values():
            _collect(item, found)
    elif (record := record_of(value)) is not None:
        _collect([*record.fields.values()], found)
    elif isinstance(value, tuple | list):
        _collect([*value], found)
    elif isinstance(value, Mapping):
        _collect([*value.values()], found)


def signature_of(value: Any, other: Callable[[Any], Hashable] = lambda _value: object()) -> Hashable:
    """A key that is equal for nested values of equal structure, shapes, dtypes and plain values; contents don't count.

    `other` makes the part of the key for an object of any other type; the default part is equal to nothing else.
    """
    return structure_of(value, lambda tensor: (tensor.shape, tensor.dtype), other)


def structure_of(value: Any, plain: Callable[[torch.Tensor], Hashable], other: Callable[[Any], Hashable]) -> Hashable:
    """As `signature_of`, with `plain` to make the part of the key for a plain tensor."""
    if isinstance(value, torch.Tensor):
        return plain(value) if is_plain(value) else other(value)
    if isinstance(value, float | complex):
        return (type(value), repr(value))  # so that 0.0 and -0.0 differ, and NaN equals NaN
    if value is None or isinstance(value, _PLAIN):
        return (type(value), value)
    if (record := record_of(value)) is not None:
        return (type(value), structure_of(record.fields, plain, other))
    if isinstance(value, Arguments):
        return (structure_of(tuple(value), plain, other), structure_of(value.kwargs, plain, other))
    if isinstance(value, tuple | list):
        return (type(value), *(structure_of(item, plain, other) for item in value))
    if isinstance(value, Mapping):
        return (type(value), *((key, structure_of(item, plain, other)) for key, item in value.items()))
    return other(value)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and values of its own; a nested one, a DTensor and one on `meta` do not."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_nested and not tensor.is_meta


def storages_of(value: Any) -> set[int]:
    """Addresses of the memory of the dense tensors in a nested value."""
    dense = (tensor for tensor in tensors_of(value) if is_plain(tensor) and tensor.layout is torch.strided)
    return {tensor.untyped_storage().data_ptr() for tensor in dense} - {0}  # 0 for empty ones


def apart_from(value: Any, storages: set[int]) -> Any:
    """The nested value with copies of those tensors whose memory is one of `storages`."""
    if not storages & storages_of(value):
        return value
    return map_tensors(value, lambda tensor: tensor.clone() if storages_of(tensor) & storages else tensor)
