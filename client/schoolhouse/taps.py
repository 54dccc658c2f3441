"""Taps: names of what submodules of a model receive and return."""

import difflib
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from schoolhouse_wire.torch_private import original_of
from schoolhouse_wire.v1 import teacher_pb2
from torch import nn

from schoolhouse.errors import ConfigError, UnknownTapError


class Tap(NamedTuple):
    """A place in a model: what submodule `module` ("" is the model) receives ("input") or returns ("output").

    As with a plain forward hook, a module that runs more than once is tapped at its last call, and a tapped tensor
    shows what later modules write into it in place.
    """

    module: str
    side: str = "output"


TapLike: TypeAlias = Tap | tuple[str, str] | str
_MAX_COMPARED = 1024  # known names among which close matches of an unknown one are sought
_NUMBERS = re.compile(r"\d+")


def as_tap(tap: TapLike) -> Tap:
    """The tap that a user wrote: `"fc"` means the output of `fc`, and a pair names the side."""
    if type(tap) is Tap and tap.side in ("input", "output"):
        return tap
    if not isinstance(tap, str | tuple | list) or (not isinstance(tap, str) and len(tap) != 2):
        raise ConfigError(f"{tap!r:.80} is not a tap; choices: a layer's name, or (name, 'input' or 'output')")
    found = Tap(tap) if isinstance(tap, str) else Tap(*tap)
    if found.side not in ("input", "output"):
        raise ConfigError(f"tap {tap!r}: the side is {found.side!r}; choices: 'input', 'output'")
    return found


HEAD = "head"  # an internal side: the module itself, as a function from hidden states to its logits
STATE = "state"  # an internal side, which does not travel: what a head is called with, copied at that moment
_SIDES = {"input": teacher_pb2.Tap.INPUT, "output": teacher_pb2.Tap.OUTPUT, HEAD: teacher_pb2.Tap.HEAD}
_FROM_SIDE = {number: side for side, number in _SIDES.items()}


@functools.lru_cache(maxsize=256)
def taps_to_wire(taps: tuple[Tap, ...]) -> tuple[teacher_pb2.Tap, ...]:
    """Taps as messages."""
    return tuple(teacher_pb2.Tap(module=tap.module, side=_SIDES[tap.side]) for tap in taps)


def taps_from_wire(taps: Iterable[teacher_pb2.Tap]) -> tuple[Tap, ...]:
    """Taps from messages; a side that this version does not know becomes "" (no side)."""
    return tuple(Tap(tap.module, _FROM_SIDE.get(tap.side, "")) for tap in taps)


def as_taps(taps: Iterable[TapLike]) -> tuple[Tap, ...]:
    """Taps without duplicates, in the given order."""
    found = tuple(dict.fromkeys(map(as_tap, taps)))
    if not found:
        raise ConfigError("no taps were asked for; ask for at least one, such as ('', 'output')")
    return found


def module_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that may be tapped, in the order of registration; one that stands twice has both names."""
    return tuple(name for name, _ in original_of(model).named_modules(remove_duplicate=False))


def check_modules(names: Iterable[str], known: Collection[str], whose: str, *, tappable: bool = False) -> None:
    """Raise `UnknownTapError`, with close matches, for the first name that is not among `known`.

    Where `known` are those that the server lets this client tap, there may be more, and `tappable` says so.
    """
    which = " that you may tap" if tappable else ""
    for name in names:
        if name not in known:
            close = _close_to(name, known) or list(known)[:20]
            raise UnknownTapError(
                f"{whose} has no submodule {name!r}{which}; close to it are: {', '.join(map(repr, close))}",
                choices=close,
            )


def _close_to(name: str, known: Collection[str]) -> list[str]:
    """The known names that are most like `name`.

    Where there are very many, as in a mixture of experts, names that differ only in numbers are compared as one.
    """
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
