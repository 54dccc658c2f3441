"""Capture what named submodules receive and return during one forward, and stop it early where that is asked for."""

import difflib
import functools
import itertools
import logging
import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from schoolhouse_wire.memory import version_of
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.records import record_of
from schoolhouse_wire.values.tree import map_tensors
from torch import nn

from schoolhouse.errors import ConfigError, TeacherForwardError, UnknownTapError

_log = logging.getLogger(__name__)


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
_UNSETTLED = (
    "the teacher's module %r ran again, or its feature was written into, for the first time; forwards that ended "
    "before that could happen gave other features than whole ones. From now on those with this tap run whole"
)


def as_tap(tap: TapLike) -> Tap:
    """`"fc"` means the output of `fc`; a pair names the side."""
    if type(tap) is Tap and tap.side in ("input", "output"):
        return tap
    if not isinstance(tap, str | tuple | list) or (not isinstance(tap, str) and len(tap) != 2):
        raise ConfigError(f"tap {tap!r:.80} is no tap; choices: a layer's name, or (name, 'input' or 'output')")
    found = Tap(tap) if isinstance(tap, str) else Tap(*tap)
    if found.side not in ("input", "output"):
        raise ConfigError(f"tap {tap!r}: the side is {found.side!r}; choices: 'input', 'output'")
    return found


HEAD = "head"  # a side that no user asks for: the module whose logits are wanted, as a function of hidden states
STATE = "state"  # another one, which does not travel: what a head is called with, as it is then
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
    found = tuple(dict.fromkeys(map(as_tap, taps)))
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
    """The last value of each tap."""

    def __init__(self) -> None:
        self.features: dict[Tap, Any] = {}

    def record(self, tap: Tap, value: Any) -> None:
        self.features[tap] = value


class _Watching(_Recorder):
    """It also tells whether a value is the first one and stays what it is; with `ends`, it ends a forward that has all.

    A value of the side STATE is kept as it is then.
    """

    def __init__(self, taps: Sequence[Tap], *, ends: bool, allowed: bool) -> None:
        super().__init__()
        self._calls = dict.fromkeys(taps, 0)
        self._versions: dict[Tap, list[tuple[torch.Tensor, int]]] = {}
        self._ends, self._allowed = ends, allowed

    def record(self, tap: Tap, value: Any) -> None:
        self._calls[tap] += 1
        super().record(tap, map_tensors(value, torch.clone) if tap.side == STATE else value)
        if self._ends and len(self.features) == len(self._calls):
            raise _Stopped
        if self._allowed:
            self._versions[tap] = [(tensor, version_of(tensor)) for tensor in tensors_of(self.features[tap])]

    def settled(self, tap: Tap) -> bool:
        """After a whole forward: the tap's last value was its first, and nothing changed it later."""
        return self._calls[tap] == 1 and not any(
            tensor.is_inference() or version_of(tensor) != version for tensor, version in self._versions.get(tap, ())
        )


class EarlyStop:
    """When a forward may end right after the first value of its last tap.

    That is for taps of which a whole forward has shown that the rest of it makes no difference to them: their module
    did not run again, and no later one wrote into their value. What one forward shows need not hold for the next one,
    whose inputs have other values, so it takes a user who says that it does, and so has `allowed` it. Asking for the
    hidden states of a head, in place of its logits, says it of the head.
    """

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self._settled: dict[Tap, bool] = {}

    def recorder(self, taps: Sequence[Tap]) -> _Recorder:
        """What takes these taps' values, and may end the forward."""
        if not self.allowed and all(tap.side != STATE for tap in taps):
            return _Recorder()
        ends = _WHOLE not in taps and all(self._settled.get(tap, False) for tap in taps)
        return _Watching(taps, ends=ends, allowed=self.allowed)

    def learn(self, recorder: _Recorder) -> None:
        """See what a whole forward shows."""
        if not isinstance(recorder, _Watching):
            return
        for tap in recorder.features:
            if self.allowed or tap.side == STATE:
                before, now = self._settled.get(tap), recorder.settled(tap)
                self._settled[tap] = now and before is not False
                if before and not now:
                    _log.warning(_UNSETTLED, tap.module)


def run_with_taps(model: nn.Module, inputs: Arguments, taps: tuple[Tap, ...], early: EarlyStop) -> dict[Tap, Any]:
    """Run `model` and capture `taps` as plain hooks would: the last call of each module, as it stands in the end.

    They come in the order of `taps`. Where `early` lets it, the forward ends as soon as each tap has a value.

    Raises:
        UnknownTapError: for a submodule that did not run.
        TeacherForwardError: if the forward fails after its last tap, unless it may end there.
    """
    recorder = early.recorder(taps)
    handles: list[Any] = []
    try:
        for tap in taps:
            if tap.module != "":
                handles.append(_hook(model.get_submodule(tap.module), tap, recorder))
            elif tap.side != "output":
                recorder.record(tap, inputs)
        output = model(*inputs, **inputs.kwargs)
        if _WHOLE in taps:
            recorder.record(_WHOLE, output)
    except _Stopped:
        pass
    except Exception as err:
        if len(recorder.features) < len(taps):
            raise
        if not early.allowed:
            raise TeacherForwardError(
                f"the teacher's forward raised {type(err).__name__} after its last tap: {err}. With "
                "early_stop=True it would end there"
            ) from err
    else:
        early.learn(recorder)
    finally:
        for handle in handles:
            handle.remove()
    if len(recorder.features) < len(taps):
        missing = [tap.module for tap in taps if tap not in recorder.features]
        raise UnknownTapError(f"the submodules {missing} did not run in this forward, so they have no features")
    return {tap: recorder.features[tap] for tap in taps}


def _hook(module: nn.Module, tap: Tap, recorder: _Recorder) -> Any:
    if tap.side == "output":
        return module.register_forward_hook(lambda _module, _args, output: recorder.record(tap, output))
    return module.register_forward_pre_hook(
        lambda _module, args, kwargs: recorder.record(tap, Arguments(args, kwargs)), with_kwargs=True
    )


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


def signature_of(value: Any, other: Callable[[Any], Hashable] = lambda _value: object()) -> Hashable:
    """Equal for nested values of equal structure, shapes, dtypes and plain values, whatever stands in their tensors.

    `other` stands for an object that may hold anything; the default is equal to nothing else.
    """
    return structure_of(value, lambda tensor: (tensor.shape, tensor.dtype), other)


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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and values of its own; a nested one, a DTensor and one on `meta` do not."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_nested and not tensor.is_meta


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
    mine = [alias for _, alias in aliases.values()]
    aliases.clear()
    storages = [alias.untyped_storage()._cdata for alias in mine]
    shared = [not _is_free(alias, storages.count(at)) for alias, at in zip(mine, storages, strict=True)]
    copies = {id(alias): alias.clone() for alias in itertools.compress(mine, shared)}
    return map_tensors(value, lambda tensor: copies.get(id(tensor), tensor)) if copies else value


def _alias(tensor: torch.Tensor, aliases: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    if not is_plain(tensor) or tensor.layout is not torch.strided:
        return tensor.detach().clone()
    return aliases.setdefault(id(tensor), (tensor, tensor.detach()))[1]


def _is_free(alias: torch.Tensor, aliases: int) -> bool:
    """Whether only so many of our aliases hold the storage of one, and torch itself has made it."""
    storage = alias.untyped_storage()  # python's own object, of which the storage itself counts one holder at most
    alone = torch._C._storage_Use_Count(storage._cdata) <= aliases + 1
    return alone and storage.resizable() and sys.getrefcount(storage) == _REFERENCES


def _references() -> int:
    """What python counts for the storage of a tensor that nobody has asked for it."""
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_REFERENCES = _references()
