"""Which taps of a teacher a client may ask for, by the operator's patterns, its token's, and what is kept back."""

import functools
import logging
from collections.abc import Iterator, Sequence

from schoolhouse.taps import HEAD, Tap, check_modules, module_names
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.errors import ConfigError, PermissionDeniedError
from torch import nn

from schoolhouse_server.security.lookups import lookups
from schoolhouse_server.security.tap_patterns import SIDES, check_patterns, matching

_log = logging.getLogger(__name__)
_MAX_LISTS = 64  # of tokens, whose taps are kept
_MAX_NAMED = 5  # taps in a message
_KEPT_BACK = "all but embeddings and what shares weights with them or with a withheld head"


class TeacherTaps:
    """What may be tapped of one teacher, and of that, what a token with patterns of its own may tap."""

    def __init__(
        self,
        teacher: str,
        module: nn.Module,
        patterns: Sequence[str] | None = None,
        *,
        has_tokens: bool = False,
        allow_head: bool = True,
    ) -> None:
        """Without `patterns` it is everything, or, where there are tokens, everything but the teacher's lookups.

        Raises:
            ConfigError: for an invalid pattern, and for one that matches no module.
        """
        self._teacher = teacher
        self._names = module_names(module)
        self._own = self._of(patterns) if patterns is not None else None
        self._patterns = tuple(patterns) if patterns is not None else None
        self.within = functools.lru_cache(_MAX_LISTS)(self._within)
        if patterns is None and has_tokens and (kept := lookups(module, heads_withheld=not allow_head)):
            self._own = frozenset(Tap(name, side) for name in self._names if name not in kept for side in SIDES)

    def _of(self, patterns: Sequence[str]) -> frozenset[Tap]:
        try:
            check_patterns(patterns)
        except ValueError as err:
            raise ConfigError(f"teacher {self._teacher!r}: {err}") from err
        found = {pattern: matching(pattern, self._names) for pattern in patterns}
        if wrong := [pattern for pattern, taps in found.items() if not taps]:
            some = ", ".join(map(repr, self._names[1:21]))
            raise ConfigError(f"taps has {wrong[0]!r}, which no module of {self._teacher!r} matches; some are: {some}")
        return frozenset(Tap(*tap) for taps in found.values() for tap in taps)

    def _within(self, patterns: tuple[str, ...] | None) -> "Tappable":
        """What a client may tap whose token has these patterns; None for a client whose token has none."""
        if patterns is None:
            said = ", ".join(self._patterns) if self._patterns is not None else _KEPT_BACK
            return Tappable(self._teacher, self._names, self._own, said, self._patterns or (), "the teacher's taps")
        found = {pattern: matching(pattern, self._names) for pattern in patterns}
        for pattern in (pattern for pattern, taps in found.items() if not taps):
            _log.warning("taps of a token has %r, which no module of the teacher %r matches", pattern, self._teacher)
        taps = frozenset(Tap(*tap) for taps in found.values() for tap in taps)
        said = ", ".join(patterns)
        if self._own is not None:
            taps &= self._own
            said += f", and of that {', '.join(self._patterns) if self._patterns is not None else _KEPT_BACK}"
        return Tappable(self._teacher, self._names, taps, said, patterns, "the token's taps, within the teacher's")


class Tappable:
    """The taps of one teacher that a client may ask for; None stands for all of them."""

    def __init__(
        self,
        teacher: str,
        names: Sequence[str],
        taps: frozenset[Tap] | None,
        said: str,
        choices: Sequence[str],
        setting: str,
    ) -> None:
        self._teacher = teacher
        self._names = frozenset(names)
        self._taps = taps
        self._said, self._choices, self._setting = said, choices, setting
        allowed = {tap.module for tap in taps} if taps is not None else self._names
        self.modules = tuple(name for name in names if name in allowed)

    def check(self, wanted: Wanted) -> None:
        """Check what a call asks for; hidden states are the input of the head that makes their logits.

        Raises:
            PermissionDeniedError: for a tap that the client may not ask for.
            UnknownTapError: for a module that there is not; the message names some that may be tapped.
        """
        if self._taps is None or (wanted.as_computed and self._taps.issuperset(wanted.taps)):
            return
        refused = [tap for tap in _read_by(wanted) if tap not in self._taps]
        if not refused:
            return
        check_modules(
            (tap.module for tap in refused if tap.module not in self._names),
            self.modules,
            f"teacher {self._teacher!r}",
            tappable=True,
        )
        named = ", ".join(f"{tap.module}:{tap.side}" for tap in refused[:_MAX_NAMED])
        raise PermissionDeniedError(
            f"{named} of the teacher {self._teacher!r} may not be tapped by this client; it may tap {self._said}. Tap "
            f"one of these, or ask whoever runs the server for {named} in {self._setting}",
            choices=self._choices,
        )


def _read_by(wanted: Wanted) -> Iterator[Tap]:
    """The taps whose values a call brings, or by which a head is asked for."""
    for tap in wanted.taps:
        yield Tap(tap.module) if tap.side == HEAD else tap
    for name in wanted.heads().values():
        yield Tap(name, "input")
