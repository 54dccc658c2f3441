"""Objects with named fields: named tuples, dataclasses, Hugging Face's ModelOutput, and stand-ins for them."""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from schoolhouse_wire.errors import CorruptPayloadError
from schoolhouse_wire.v1 import values_pb2

Kind = values_pb2.Record.Kind
NAMED_TUPLE, DATACLASS, MODEL_OUTPUT = (
    values_pb2.Record.NAMED_TUPLE,
    values_pb2.Record.DATACLASS,
    values_pb2.Record.MODEL_OUTPUT,
)


@dataclass(frozen=True)
class Record:
    """The kind, type name and fields of an object, as they travel."""

    kind: Kind
    type_name: str
    fields: dict[str, Any]


class RecordView(Mapping[str, Any]):
    """Stand-in for an object whose type is not loaded here, with its fields as attributes, by key and by position."""

    def __init__(self, type_name: str, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self._type_name = type_name
        self._fields = fields  # all of them; keys and positions skip those that are None, as in a ModelOutput
        self._given = {name: value for name, value in fields.items() if value is not None}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._given[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are not None, in order."""
        return tuple(self._given.values())

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self._fields.items())
        return f"RecordView of {self._type_name}({inner})"


def record_of(value: Any) -> Record | None:
    """The record that `value` travels as, or None if it is not an object with named fields."""
    kind = _kind_of(type(value))  # type: ignore[arg-type]  # types are hashable
    if isinstance(value, RecordView):
        return Record(DATACLASS, value._type_name, dict(value._fields))
    if kind == MODEL_OUTPUT:
        return Record(
            kind, _name(type(value)), {field.name: value.get(field.name) for field in dataclasses.fields(value)}
        )
    if kind == NAMED_TUPLE:
        return Record(kind, _name(type(value)), dict(zip(value._fields, value, strict=True)))
    if kind == DATACLASS:
        names = [field.name for field in dataclasses.fields(value)]
        return Record(kind, _name(type(value)), {name: getattr(value, name) for name in names if hasattr(value, name)})
    return None


def build_record(kind: Kind, type_name: str, fields: dict[str, Any]) -> Any:
    """An object of the named type if a type of that name, kind and fields is loaded here; otherwise a stand-in.

    The fields of a dataclass or named tuple are set without its constructor, so a peer cannot make that run.

    Raises:
        CorruptPayloadError: if the type does not accept the fields.
    """
    found = _loaded(type_name)
    if found is None or _kind_of(found) != kind:
        return RecordView(type_name, fields)
    names = found._fields if kind == NAMED_TUPLE else [field.name for field in dataclasses.fields(found)]
    if set(names) != fields.keys():
        return RecordView(type_name, fields)
    try:
        return _instance(found, kind, fields)
    except Exception as err:  # such as an abstract class, or fields that a ModelOutput's own code refuses
        raise CorruptPayloadError(f"a {type_name} arrived with fields that it does not accept") from err


def with_fields(value: Any, record: Record, fields: dict[str, Any]) -> Any:
    """A copy of `value`, whose record is `record`, with other values of its fields."""
    if isinstance(value, RecordView):
        return RecordView(record.type_name, fields)
    return _instance(type(value), record.kind, fields)


def _instance(found: Any, kind: Kind, fields: dict[str, Any]) -> Any:
    if kind == MODEL_OUTPUT:
        return found(**fields)
    if kind == NAMED_TUPLE:
        return tuple.__new__(found, [fields[name] for name in found._fields])
    instance = object.__new__(found)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance


@functools.lru_cache(maxsize=1024)
def _kind_of(kind: type) -> Kind | None:
    if any(_name(base) == "transformers.utils.generic.ModelOutput" for base in kind.__mro__[1:]):
        return MODEL_OUTPUT if dataclasses.is_dataclass(kind) else None
    if issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
        return NAMED_TUPLE
    if dataclasses.is_dataclass(kind) and not issubclass(kind, Mapping):
        return DATACLASS
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _loaded(type_name: str) -> Any:
    """The class of that name in the loaded modules, or None; nothing is imported."""
    module_name, _, name = type_name.rpartition(".")
    while module_name and module_name not in sys.modules:  # nested classes: module.Outer.Inner
        module_name, _, outer = module_name.rpartition(".")
        name = f"{outer}.{name}"
    found: Any = sys.modules.get(module_name)
    for part in name.split("."):
        found = vars(found).get(part) if found is not None and hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None
