"""Nested values, part by part: tuples, lists, mappings, and objects with named fields keep their structure."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.records import record_of, with_fields


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A nested value of the same structure with each tensor changed; what holds no tensor stays itself."""
    return map_where(value, torch.Tensor, change)


def map_where(value: Any, kinds: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """A nested value of the same structure with each part of one of `kinds` changed, and not looked into."""
    if isinstance(value, kinds):
        return change(value)
    if type(value) is dict:
        return {key: map_where(item, kinds, change) for key, item in value.items()}
    if isinstance(value, Arguments):
        items = [map_where(item, kinds, change) for item in value]  # first, as `change` may count
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
    """A mapping of the type of `value` with other items; a plain dict if it takes none."""
    try:
        made: Any = copy.copy(value)
        for key, item in items.items():
            made[key] = item
    except TypeError:
        return items
    return made
