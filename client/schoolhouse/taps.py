"""Capture what named submodules receive and return during one forward, and stop it after the last one."""

import collections
import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from schoolhouse_wire.codec import Arguments
from schoolhouse_wire.memory import version_of
from schoolhouse_wire.nested import map_tensors
from schoolhouse_wire.records import record_of
from schoolhouse_wire.v1 import teacher_pb2
from torch import nn

from schoolhouse.errors import ConfigError, UnknownTapError


class Tap(NamedTuple):
    """A place in a model: what submodule `module` ("" is the model) receives ("input") or returns ("output").

    As with a plain forward hook, a module that runs more than once is tapped at its last call, and what later modules
    write into a tapped tensor in place is seen.
    """

    module: str
    side: str = "output"


TapLike: TypeAlias = Tap | tuple[str, str] | str
_WHOLE = Tap("", "output")
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_MAX_COMPARED = 1024  # names, with one that is not known
_NUMBERS = re.compile(r"\d+")
_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")


def as_tap(tap: TapLike) -> Tap:
    """`"fc"` means the output of `fc`; a pair names the side."""
    if not isinstance(tap, str | tuple | list) or (not isinstance(tap, str) and len(tap) != 2):
        raise ConfigError(f"tap {tap!r:.80} is no tap; choices: a layer's name, or (name, 'input' or 'output')")
    found = Tap(tap) if isinstance(tap, str) else Tap(*tap)
    if found.side not in ("input", "output"):
        raise ConfigError(f"tap {tap!r}: the side is {found.side!r}; choices: 'input', 'output'")
    return found


HEAD = "head"  # a side that no user asks for: the module whose logits are wanted, as a function of hidden states
_SIDES = {"input": teacher_pb2.Tap.INPUT, "output": teacher_pb2.Tap.OUTPUT, HEAD: teacher_pb2.Tap.HEAD}
_FROM_SIDE = {number: side for side, number in _SIDES.items()}


@functools.lru_cache(maxsize=256)
def taps_to_wire(taps: tuple[Tap, ...]) -> tuple[teacher_pb2.Tap, ...]:
    """Taps as messages."""
    return tuple(teacher_pb2.Tap(module=tap.module, side=_SIDES[tap.side]) for tap in taps)


def taps_from_wire(taps: Iterable[teacher_pb2.Tap]) -> tuple[Tap, ...]:
    """Taps from messages; a side that this version does not know becomes ""."""
    return tuple(Tap(tap.module, _FROM_SIDE.get(tap.side, "")) for tap in taps)


def as_taps(taps: Iterable[TapLike]) -> tuple[Tap, ...]:
    """Taps without repetition, in their order."""
    found = tuple(dict.fromkeys(as_tap(tap) for tap in taps))
    if not found:
        raise ConfigError("no taps were asked for; ask for at least one, such as ('', 'output')")
    return found


def without_compiler(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, where `model` is what it returned."""
    kind = type(model)  # by name, since importing it takes seconds
    return model._orig_mod if (kind.__module__, kind.__name__) == _COMPILED else model  # type: ignore[return-value]


def module_names(model: nn.Module) -> tuple[str, ...]:
    """What may be tapped, in the order of registration; a module that stands twice has both names."""
    return tuple(name for name, _ in without_compiler(model).named_modules(remove_duplicate=False))


def check_modules(names: Iterable[str], known: Collection[str], whose: str) -> None:
    """Raise `UnknownTapError`, with close matches, for the first name that is not among `known`."""
    for name in names:
        if name not in known:
            close = _close_to(name, known) or list(known)[:20]
            raise UnknownTapError(
                f"{whose} has no submodule {name!r}; close to it are: {', '.join(map(repr, close))}", choices=close
            )


def _close_to(name: str, known: Collection[str]) -> list[str]:
    """The names most like one. Of very many, as experts have, one stands for all that differ in nothing but numbers."""
    if len(known) <= _MAX_COMPARED:
        return difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    kinds: dict[str, str] = {}
    for one in known:
        kinds.setdefault(_NUMBERS.sub("0", one), one)
    asked = _NUMBERS.findall(name)
    found = difflib.get_close_matches(_NUMBERS.sub("0", name), list(kinds)[:_MAX_COMPARED], n=5, cutoff=0.5)
    return [one if (one := _with_numbers(kind, asked)) in known else kinds[kind] for kind in found]


def _with_numbers(kind: str, numbers: Sequence[str]) -> str:
    left = iter(numbers)
    return _NUMBERS.sub(lambda match: next(left, match.group()), kind)


class _Stopped(BaseException):
    """Ends a forward from within a hook; not an Exception, so that no model's `except Exception` swallows it."""


class _Recorder:
    def __init__(self, taps: Sequence[Tap], stop: bool) -> None:
        self.features: dict[Tap, Any] = {}
        self.calls = dict.fromkeys(taps, 0)
        self._versions: dict[Tap, list[tuple[torch.Tensor, int]]] = {}
        self._stop = stop

    @property
    def complete(self) -> bool:
        """Each tap has a feature."""
        return len(self.features) == len(self.calls)

    def record(self, tap: Tap, value: Any) -> None:
        self.calls[tap] += 1
        self.features[tap] = value
        if self._stop:
            if self.complete:
                raise _Stopped
        else:
            self._versions[tap] = [(tensor, version_of(tensor)) for tensor in tensors_of(value)]

    def settled(self) -> bool:
        """After a whole forward: each tap's last value was its first, and nothing changed it later."""
        return all(count == 1 for count in self.calls.values()) and not any(
            tensor.is_inference() or version_of(tensor) != version
            for versions in self._versions.values()
            for tensor, version in versions
        )


def run_with_taps(
    model: nn.Module, inputs: Arguments, taps: tuple[Tap, ...], *, stop: bool
) -> tuple[dict[Tap, Any], bool | None]:
    """Run `model` and capture `taps` as plain hooks would: the last call of each module, as it stands in the end.

    Returns the features, in the order of `taps`, and whether a forward with `stop`, which ends right after the first
    value of the last tap, will have the same: no tapped module runs twice, and no later one writes into a feature. None
    if this forward did not run to its end, so that it cannot tell.
    """
    recorder = _Recorder(taps, stop and _WHOLE not in taps)
    finished = False
    with _hooks(model, taps, recorder):
        try:
            if Tap("", "input") in taps:
                recorder.record(Tap("", "input"), inputs)
            output = model(*inputs, **inputs.kwargs)
            if _WHOLE in taps:
                recorder.record(_WHOLE, output)
            finished = True
        except _Stopped:
            pass
        except Exception:
            if not recorder.complete:  # with all of them, nobody asked for what failed
                raise
    missing = [tap.module for tap in taps if tap not in recorder.features]
    if missing:
        raise UnknownTapError(f"the submodules {missing} did not run in this forward, so they have no features")
    return {tap: recorder.features[tap] for tap in taps}, recorder.settled() if finished else None


@contextmanager
def _hooks(model: nn.Module, taps: Sequence[Tap], recorder: _Recorder) -> Iterator[None]:
    handles = []
    try:
        for tap in taps:
            if tap.module != "":
                module = model.get_submodule(tap.module)
                if tap.side == "input":
                    handles.append(module.register_forward_pre_hook(_on_input(tap, recorder), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_on_output(tap, recorder)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(tap: Tap, recorder: _Recorder) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _module, args, kwargs: recorder.record(tap, Arguments(args, kwargs))


def _on_output(tap: Tap, recorder: _Recorder) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _module, _args, output: recorder.record(tap, output)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nested value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif (record := record_of(value)) is not None:
        yield from tensors_of(list(record.fields.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
        if isinstance(value, Arguments):
            yield from tensors_of(value.kwargs)
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))


def signature_of(
    value: Any,
    other: Callable[[Any], Hashable] = lambda _value: object(),
    layout: Callable[[torch.Tensor], Hashable] = lambda _tensor: None,
) -> Hashable:
    """Equal for nested values of equal structure, shapes, dtypes and plain values, whatever stands in their tensors.

    `other` stands for an object that may hold anything; the default is equal to nothing else. `layout` adds what else
    counts of a tensor.
    """
    return structure_of(value, lambda tensor: (tensor.shape, tensor.dtype, layout(tensor)), other)


def structure_of(value: Any, plain: Callable[[torch.Tensor], Hashable], other: Callable[[Any], Hashable]) -> Hashable:
    """As `signature_of`, with `plain` for what counts of a plain tensor."""
    if isinstance(value, torch.Tensor):
        return plain(value) if is_plain(value) else other(value)
    if isinstance(value, float | complex):
        return (type(value), repr(value))  # 0.0 is not -0.0, and NaN is NaN
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


def layout_of(tensor: torch.Tensor) -> Hashable:
    """By what a kernel, or a module, decides whether it returns a view or a copy."""
    return tensor.device, tensor.stride() if tensor.layout is torch.strided else tensor.layout


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and values of its own; a nested one, a DTensor and one on `meta` do not."""
    known = type(tensor) in (torch.Tensor, nn.Parameter)
    return known and not tensor.is_nested and tensor.device.type != "meta"


def storages_of(value: Any) -> set[int]:
    """Addresses of the memory that the dense tensors of a nested value stand in."""
    dense = (tensor for tensor in tensors_of(value) if is_plain(tensor) and tensor.layout is torch.strided)
    return {tensor.untyped_storage().data_ptr() for tensor in dense} - {0}  # of empty ones


def apart_from(value: Any, storages: set[int]) -> Any:
    """A nested value whose tensors do not stand in any of `storages`: those that do are copied."""
    if not storages & storages_of(value):
        return value
    return map_tensors(value, lambda tensor: tensor.clone() if storages_of(tensor) & storages else tensor)


def owned(values: list[Any]) -> Any:
    """The one item of `values`, taken out, with tensors that stand in memory which nothing else refers to.

    What somebody still holds, such as the module or whoever has the batch, is copied, and so is any tensor of which
    that cannot be told. So nobody writes into it beside one who reads: that would be unseen, since torch counts a
    change only once it is done.
    """
    aliases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # and the originals, so that their ids stay theirs
    value = map_tensors(values.pop(), lambda tensor: _alias(tensor, aliases))
    mine = {key: alias for key, (_, alias) in aliases.items()}
    aliases.clear()
    holders = collections.Counter(alias.untyped_storage()._cdata for alias in mine.values())
    copies = {id(alias): alias.clone() for alias in mine.values() if not _is_free(alias, holders)}
    return map_tensors(value, lambda tensor: copies.get(id(tensor), tensor)) if copies else value


def _alias(tensor: torch.Tensor, aliases: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    if not is_plain(tensor) or tensor.layout is not torch.strided:
        return tensor.detach().clone()
    return aliases.setdefault(id(tensor), (tensor, tensor.detach()))[1]


def _is_free(alias: torch.Tensor, holders: Mapping[int, int]) -> bool:
    """Whether only our aliases hold the storage of one, and torch itself has made it."""
    storage = alias.untyped_storage()  # python's own object, of which the storage itself counts one holder at most
    alone = torch._C._storage_Use_Count(storage._cdata) <= holders[storage._cdata] + 1
    return alone and storage.resizable() and sys.getrefcount(storage) == _REFERENCES


def _references() -> int:
    """What python counts for the storage of a tensor that nobody has asked for it."""
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_REFERENCES = _references()
