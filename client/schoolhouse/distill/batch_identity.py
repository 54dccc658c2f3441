"""Batches: which part of one a forward takes, and whether a forward got the same batch as the teacher."""

import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import xxhash
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.pinned import Fetched, pins
from schoolhouse_wire.torch_private import version_of
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.records import record_of
from schoolhouse_wire.values.tensors import bytes_of, on_cpu
from schoolhouse_wire.values.tree import is_plain, signature_of, tensors_of

from schoolhouse.errors import ConfigError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_GIVE_INPUTS = "give prefetch inputs=, a function that makes the arguments of the forward from a batch"


class Inputs:
    """The values of a batch as they are now, remembered as digests to tell later whether another batch has the same.

    Equal tensors on different devices count as the same; only a comparison waits for a device. An object of an unknown
    type, such as a nested tensor, is the same only if it is the same object, and later writes into it go unnoticed.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        given = Arguments(args, kwargs)
        self._values = [_Value(tensor) for tensor in tensors_of(given) if is_plain(tensor)]
        self._objects: list[Any] = []  # kept alive, so that no other object gets their ids
        self._rest = signature_of(given, self._told)

    @property
    def unknown(self) -> type | None:
        """The type of an object in the batch whose values are not known; None if there is none."""
        return type(self._objects[0]) if self._objects else None

    def _told(self, value: Any) -> Hashable:
        if isinstance(value, torch.Tensor) and _is_dense_subclass(value):
            self._values.append(_Value(value.as_subclass(torch.Tensor)))
            return (type(value), value.shape, value.dtype)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return (type(value), value.shape, value.dtype.str, value.tobytes())
        self._objects.append(value)
        return (id(value), version_of(value) if isinstance(value, torch.Tensor) else 0)

    def same_as(self, other: "Inputs") -> bool:
        """Whether both hold the same values in the same places."""
        return self.same_form_as(other) and all(
            one.digest == another.digest for one, another in zip(self._values, other._values, strict=True)
        )

    @property
    def on_their_way(self) -> bool:
        """Whether values are still being copied from a device, so that a comparison would wait for it."""
        return any(value.is_fetched for value in self._values)

    def same_form_as(self, other: "Inputs") -> bool:
        """Whether both have the same structure, shapes, dtypes and plain values."""
        return self._rest == other._rest


def _is_dense_subclass(tensor: torch.Tensor) -> bool:
    """Whether its type only adds to torch.Tensor, like torchvision's images, so that its memory holds its values."""
    adds = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return adds and not tensor.is_nested and tensor.device.type != "meta"


class _Value:
    """A digest of the values that a tensor has now, computed once they are on the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
        self.is_fetched = pins(dense.device)
        self._source = Fetched(dense) if self.is_fetched else None
        self._digest = b"" if self.is_fetched else _digest(dense)

    @property
    def digest(self) -> bytes:
        """The digest, equal for equal bytes on any device; it waits for the copy from a device."""
        if self._source is not None:
            self._digest, self._source = _digest(self._source.wait()), None
        return self._digest


def _digest(tensor: torch.Tensor) -> bytes:
    plain = bytes_of(on_cpu(tensor))  # by bytes, so that a NaN equals itself; named, as memory_of keeps no reference
    return xxhash.xxh3_128_digest(memory_of(plain))


def bound(signature: inspect.Signature, call: Arguments) -> Inputs:
    """The values of a call by the names of the function's parameters, so that `f(x)` and `f(x=x)` are the same."""
    try:
        arguments = signature.bind(*call, **dict(sorted(call.kwargs.items()))).arguments
    except TypeError:  # the call itself will raise it
        return Inputs(call, call.kwargs)
    return Inputs((), dict(sorted(arguments.items())))


def summary(call: Arguments) -> str:
    """A call in words: dtypes and shapes."""
    parts = [_word(value) for value in call] + [f"{name}={_word(value)}" for name, value in call.kwargs.items()]
    return f"({', '.join(parts)})"


def _word(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{value!r:.40}" if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def call_of(made: Any) -> Arguments:
    """The call that the result of a user's `inputs` stands for.

    The result is `(args, kwargs)`, a tuple of positional arguments, a dict of keyword arguments, or one argument.
    """
    if isinstance(made, Arguments):
        return made
    if isinstance(made, Mapping):
        return Arguments((), {str(name): value for name, value in made.items()})
    if type(made) is tuple and len(made) == 2 and isinstance(made[0], tuple | list) and isinstance(made[1], Mapping):
        return Arguments(*made)
    return Arguments(made if type(made) is tuple else (made,))


def taken_by(signature: inspect.Signature, batch: Any) -> Arguments:
    """The part of a batch that the student's forward takes: by parameter names, or as many leading items as it needs.

    A tensor is the first argument. From a mapping or a record, such as a named tuple, each parameter takes the entry of
    its name. From a tuple or list, the parameters without a default take the leading items; if all have a default, the
    first parameter takes the first item.

    Raises:
        ConfigError: if it is unclear what the forward takes.
    """
    parameters = list(signature.parameters.values())
    record = record_of(batch)
    fields = batch if isinstance(batch, Mapping) else record.fields if record is not None else None
    if fields is not None:
        taken = _by_name(parameters, fields)
        if taken is not None:
            return taken
        if not isinstance(batch, tuple):
            raise ConfigError(
                f"the student's forward takes {[p.name for p in parameters]}, and the batch has "
                f"{[str(key) for key in fields]}: {_GIVE_INPUTS}"
            )
    if isinstance(batch, tuple | list):
        return _leading(parameters, batch)
    return Arguments((batch,))


def _by_name(parameters: list[inspect.Parameter], fields: Mapping[Any, Any]) -> Arguments | None:
    """The fields with the names of parameters; None if they are not enough for a call."""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters) and all(isinstance(k, str) for k in fields):
        taken = dict(fields)
    else:
        taken = {p.name: fields[p.name] for p in parameters if p.kind in _NAMED and p.name in fields}
    needed = [p for p in parameters if p.default is p.empty and p.kind in (*_POSITIONAL, *_NAMED)]
    missing = [p for p in needed if p.name not in taken]
    return Arguments((), taken) if taken and not missing else None


def _leading(parameters: list[inspect.Parameter], batch: tuple[Any, ...] | list[Any]) -> Arguments:
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    needed = [p for p in positional if p.default is p.empty]
    count = len(needed) or (1 if positional or len(batch) == 1 else 0)
    if not 0 < count <= len(batch):
        raise ConfigError(
            f"the student's forward takes {[str(p) for p in parameters]}, and the batch is a {type(batch).__name__} of "
            f"{len(batch)}: {_GIVE_INPUTS}"
        )
    return Arguments(batch[:count])
