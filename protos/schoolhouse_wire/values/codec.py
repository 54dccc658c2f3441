"""The codec of nested values: the structure as a protobuf message, the tensors as slices of one payload.

`pack` declares a value and lists the memory of its tensors, without copying tensors that are dense on CPU; `unpack`
rebuilds the value over one received buffer, without copying. Records keep their field names; code never travels.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from schoolhouse_wire.errors import (
    CorruptPayloadError,
    MessageTooLargeError,
    ProtocolError,
    UnsupportedValueError,
)
from schoolhouse_wire.limits import MAX_INTEGER_BYTES, MAX_ODD_KEYS, MAX_TYPE_NAME, Limits
from schoolhouse_wire.v1 import values_pb2
from schoolhouse_wire.values.layouts import Layout
from schoolhouse_wire.values.layouts import read_layout as read_layout
from schoolhouse_wire.values.packed import FORMS, fields_of, packed_of
from schoolhouse_wire.values.records import build_record, record_of
from schoolhouse_wire.values.tensors import (
    DTYPES,
    DimOrder,
    dim_order,
    in_memory_order,
    offsets,
    on_cpu,
    tensor_nbytes,
    view_of,
    without_gaps,
)

_INT64 = range(-(1 << 63), 1 << 63)


class Arguments(tuple[Any, ...]):
    """The arguments of a module's call: a tuple of the positional arguments, with the keyword arguments as `kwargs`.

    The feature of an `"input"` tap has this type; as a tuple it equals what a forward hook receives as `args`.
    """

    kwargs: dict[str, Any]

    def __new__(cls, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None) -> "Arguments":
        self = super().__new__(cls, args)
        self.kwargs = dict(kwargs or {})
        return self

    def __repr__(self) -> str:
        return f"Arguments({tuple(self)!r}, {self.kwargs!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Arguments, (tuple(self), self.kwargs))


@dataclass(frozen=True)
class Opaque:
    """Stands in a reply for an object that cannot travel, such as a key-value cache; using it raises an error."""

    type_name: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedValueError(
            f"the teacher's {self.type_name} stayed with the teacher, since such objects cannot travel; "
            f"its {name!r} cannot be read here"
        )


@dataclass(frozen=True)
class Declared:
    """A value ready to travel: its serialized bundle, the size of its payload, and the memory of its tensors."""

    header: bytes
    nbytes: int
    tensors: list[torch.Tensor]  # contiguous in memory order, on CPU, in the order of their declarations
    item_bytes: tuple[int, ...] = ()  # bytes of each item of a list, as `pack` was given them


def pack(value: Any, *, opaque: bool = False, item_bytes: tuple[int, ...] = ()) -> Declared:
    """Declare `value` and list the memory of its tensors, without copying those that are dense on CPU.

    With `opaque`, an object of a type that cannot travel becomes an `Opaque` at the receiver.

    Raises:
        UnsupportedValueError: for a type that cannot travel; the message says where in the value it is.
        MessageTooLargeError: for a value nested deeper than `Limits.max_nesting`.
    """
    flat = _flat_spec(value)
    if flat is not None:
        tensors = [in_memory_order(tensor, order) for tensor, (_, _, order) in zip(value, flat, strict=True)]
        return Declared(*_flat_header(type(value) is list, flat), tensors, item_bytes)
    packer = _Packer(opaque)
    packer.put(packer.bundle.root, value, "value", 0)
    *_, nbytes = offsets(tensor_nbytes(header) for header in packer.bundle.tensors)
    return Declared(packer.bundle.SerializeToString(), nbytes, packer.tensors, item_bytes)


_Spec: TypeAlias = tuple[tuple[torch.dtype, torch.Size, DimOrder], ...]


def _flat_spec(value: Any) -> _Spec | None:
    """The declarations of a list or Arguments of nothing but plain tensors, by far the usual case; otherwise None."""
    if type(value) is not list and not (type(value) is Arguments and not value.kwargs):
        return None
    for tensor in value:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or not tensor.is_cpu:
            return None
        if tensor.is_neg() or tensor.is_conj() or tensor.is_nested or tensor.dtype not in DTYPES:
            return None
    if len({id(tensor) for tensor in value}) != len(value):
        return None
    orders = [dim_order(tensor) for tensor in value]
    if None in orders:
        return None
    return tuple((tensor.dtype, tensor.shape, order or ()) for tensor, order in zip(value, orders, strict=True))


@functools.lru_cache(maxsize=512)
def _flat_header(is_list: bool, spec: _Spec) -> tuple[bytes, int]:
    """The serialized bundle of a flat value, and the size of its payload; cached, as training repeats it every step."""
    bundle = values_pb2.Bundle()
    container: Any = bundle.root.list if is_list else bundle.root.arguments
    container.SetInParent()
    items = container.items if is_list else container.positional
    for i, (dtype, shape, order) in enumerate(spec):
        items.add().tensor = i
        bundle.tensors.add(dtype=DTYPES[dtype], shape=shape, dim_order=order)
    *_, nbytes = offsets(tensor_nbytes(header) for header in bundle.tensors)
    return bundle.SerializeToString(), nbytes


class _Packer:
    def __init__(self, opaque: bool) -> None:
        self.bundle = values_pb2.Bundle()
        self._opaque = opaque
        self.tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}
        self._keep: list[torch.Tensor] = []  # keeps tensors alive, so that their ids stay unique

    def put(self, node: values_pb2.Value, value: Any, where: str, depth: int) -> None:
        if depth > Limits.max_nesting:
            raise MessageTooLargeError(f"{where[:80]}… is nested deeper than {Limits.max_nesting} levels")
        if value is None:
            node.none.SetInParent()
        elif isinstance(value, torch.Tensor):
            node.tensor = self._tensor(value, where)
        elif isinstance(value, bool | int | float | complex | str | bytes):
            _put_scalar(node, value, where)
        elif (form := FORMS.get(type(value))) is not None:
            node.packed.form = form
            self._items(node.packed.fields, fields_of(value), where, depth)
        elif (record := record_of(value)) is not None:
            node.record.kind, node.record.type_name = record.kind, record.type_name
            for name, item in record.fields.items():
                node.record.names.append(name)
                self.put(node.record.values.add(), item, f"{where}.{name}", depth + 1)
        elif isinstance(value, Arguments):
            node.arguments.SetInParent()
            self._items(node.arguments.positional, value, where, depth)
            for name, item in value.kwargs.items():
                self.put(node.arguments.keyword[name], item, f"{where}[{name!r}]", depth + 1)
        elif isinstance(value, tuple):
            node.tuple.SetInParent()
            self._items(node.tuple.items, value, where, depth)
        elif isinstance(value, list):
            node.list.SetInParent()
            self._items(node.list.items, value, where, depth)
        elif isinstance(value, Mapping):
            node.dict.SetInParent()
            for key, item in value.items():
                self._key(node.dict.keys.add(), key, where)
                self.put(node.dict.values.add(), item, f"{where}[{key!r}]", depth + 1)
        elif self._opaque or isinstance(value, Opaque):
            node.opaque = value.type_name if isinstance(value, Opaque) else _type_name(type(value))
        else:
            raise UnsupportedValueError(
                f"{where} is a {_type_name(type(value))}, which cannot travel; use tensors, numbers, strings, bytes, "
                "None, and tuples, lists, dicts, named tuples, dataclasses or ModelOutputs of these"
            )

    def _items(self, nodes: Any, values: Iterable[Any], where: str, depth: int) -> None:
        for i, item in enumerate(values):
            self.put(nodes.add(), item, f"{where}[{i}]", depth + 1)

    def _key(self, node: values_pb2.Value, key: Any, where: str) -> None:
        if isinstance(key, tuple) and record_of(key) is None:
            node.tuple.SetInParent()
            for part in key:
                self._key(node.tuple.items.add(), part, where)
        elif key is None:
            node.none.SetInParent()
        elif isinstance(key, bool | int | float | complex | str | bytes):
            _put_scalar(node, key, f"a key of {where}")
        else:
            raise UnsupportedValueError(
                f"a key of {where} is a {_type_name(type(key))}; keys must be scalars or tuples"
            )

    def _tensor(self, tensor: torch.Tensor, where: str) -> int:
        known = self._index.get(id(tensor))
        if known is not None:
            return known
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise UnsupportedValueError(
                f"{where} is a {kind} tensor of {tensor.dtype} on {tensor.device}, which cannot travel; "
                "only plain dense tensors can: use .to_dense(), .to_padded_tensor(0), .dequantize()"
            )
        self._keep.append(tensor)
        self._index[id(tensor)] = index = len(self.tensors)
        header = self.bundle.tensors.add(dtype=dtype)
        header.shape.extend(tensor.shape)
        order = dim_order(tensor)
        if order is None:
            tensor = without_gaps(tensor)
            order = dim_order(tensor) or ()
        header.dim_order.extend(order)
        self.tensors.append(on_cpu(in_memory_order(tensor, order)))
        return index


def _put_scalar(node: values_pb2.Value, value: Any, where: str) -> None:
    if isinstance(value, bool):
        node.boolean = value
    elif isinstance(value, int):
        if value in _INT64:
            node.integer = value
        elif value.bit_length() < 8 * MAX_INTEGER_BYTES:
            node.big_integer = int(value).to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        else:
            raise UnsupportedValueError(f"{where} is an integer of over {MAX_INTEGER_BYTES} bytes; send it as bytes")
    elif isinstance(value, float):
        node.real = value
    elif isinstance(value, complex):
        node.complex.real, node.complex.imaginary = value.real, value.imag
    elif isinstance(value, bytes):
        node.raw = value
    else:
        try:
            node.text = str(value) if type(value) is str else str.__str__(value)
        except (UnicodeEncodeError, ValueError) as err:
            raise UnsupportedValueError(f"{where} is a string that UTF-8 cannot encode: {err}") from err


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def unpack(layout: Layout, payload: Any, limits: Limits) -> Any:
    """Rebuild the value that `layout` declares over `payload`, a writable buffer; each tensor keeps it alive.

    Raises:
        CorruptPayloadError: if the structure and the declarations do not fit together.
        MessageTooLargeError: if the structure is nested deeper than `limits` allow.
    """
    tensors = [view_of(payload, *slot) for slot in layout.tensors]
    if layout.flat:
        return tensors if layout.root.HasField("list") else Arguments(tensors)
    return _Unpacker(tensors, limits.max_nesting).get(layout.root, 0)


class _Unpacker:
    def __init__(self, tensors: list[torch.Tensor], max_nesting: int) -> None:
        self._tensors = tensors
        self._max_nesting = max_nesting

    def get(self, node: values_pb2.Value, depth: int) -> Any:
        if depth > self._max_nesting:
            raise MessageTooLargeError(f"a value is nested deeper than {self._max_nesting} levels")
        kind = node.WhichOneof("kind")
        if kind == "tensor":
            if node.tensor >= len(self._tensors):
                raise CorruptPayloadError(f"tensor {node.tensor} is used, but only {len(self._tensors)} are declared")
            return self._tensors[node.tensor]
        if kind == "none":
            return None
        if kind in ("boolean", "integer", "real", "text", "raw"):
            return getattr(node, kind)
        if kind == "big_integer":
            if len(node.big_integer) > MAX_INTEGER_BYTES:
                raise MessageTooLargeError(f"an integer of more than {MAX_INTEGER_BYTES} bytes arrived")
            return int.from_bytes(node.big_integer, "little", signed=True)
        if kind == "complex":
            return complex(node.complex.real, node.complex.imaginary)
        if kind == "list":
            return self._items(node.list.items, depth)
        if kind == "tuple":
            return tuple(self._items(node.tuple.items, depth))
        if kind == "dict":
            return self._dict(node.dict, depth)
        if kind == "arguments":
            keyword = {name: self.get(item, depth + 1) for name, item in node.arguments.keyword.items()}
            return Arguments(self._items(node.arguments.positional, depth), keyword)
        if kind == "opaque":
            return Opaque(node.opaque)
        if kind == "packed":
            return packed_of(node.packed.form, self._items(node.packed.fields, depth))
        if kind == "record":
            if len(node.record.names) != len(node.record.values):
                raise CorruptPayloadError("a record has different numbers of names and values")
            if len(node.record.type_name) > MAX_TYPE_NAME:
                raise MessageTooLargeError(f"a record's type has a name of more than {MAX_TYPE_NAME} characters")
            fields = dict(zip(node.record.names, self._items(node.record.values, depth), strict=True))
            return build_record(node.record.kind, node.record.type_name, fields)
        raise ProtocolError("a value of a kind that this version does not know arrived")

    def _items(self, nodes: Iterable[values_pb2.Value], depth: int) -> list[Any]:
        return [self.get(item, depth + 1) for item in nodes]

    def _dict(self, node: values_pb2.Mapping, depth: int) -> dict[Any, Any]:
        if len(node.keys) != len(node.values):
            raise CorruptPayloadError("a dict has different numbers of keys and values")
        keys = self._items(node.keys, depth)
        if not all(type(key) is str for key in keys):
            if not all(map(_is_key, keys)):
                raise CorruptPayloadError("a dict has a key that is neither a scalar nor a tuple of scalars")
            if len(keys) > MAX_ODD_KEYS:
                raise MessageTooLargeError(f"a dict of more than {MAX_ODD_KEYS} keys that are not strings arrived")
        return dict(zip(keys, self._items(node.values, depth), strict=True))


def _is_key(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_key, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)
