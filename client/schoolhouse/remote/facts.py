"""What a client learned about one revision of a teacher, and requests checked against that."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.limits import Limits

from schoolhouse.taps import TapLike, check_modules
from schoolhouse.teachers.protocol import TeacherDescription
from schoolhouse.teachers.query import Wanted

_MAX_KNOWN_TAPS = 256


@dataclass(eq=False)
class Facts:
    """One revision, and the bounds of its requests."""

    description: TeacherDescription
    limits: Limits
    _modules: dict[str, None] = field(init=False)  # ordered, and quick to search
    _known: dict[tuple[TapLike, ...], Wanted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = dict.fromkeys(self.description.modules)

    @property
    def revision(self) -> str:
        """That of the weights."""
        return self.description.revision

    def wanted(
        self,
        taps: Iterable[TapLike],
        encodings: Mapping[TapLike, Encoding | None] | None,
        positions: torch.Tensor | None,
    ) -> Wanted:
        """What a user asks for, in its usual form and known to exist; raises as `Wanted.of`, and `UnknownTapError`."""
        if encodings is None and positions is None:
            return self._plain(tuple(taps))
        wanted = Wanted.of(taps, encodings, positions).with_seeds()
        self._check((*(tap.module for tap in wanted.taps), *wanted.heads().values()))
        return wanted

    def _plain(self, taps: tuple[TapLike, ...]) -> Wanted:
        found = self._known.get(taps)  # a loop asks for the same ones again and again
        if found is None:
            found = Wanted.of(taps)
            self._check(tap.module for tap in found.taps)
            if len(self._known) < _MAX_KNOWN_TAPS:
                self._known[taps] = found
        return found

    def _check(self, names: Iterable[str]) -> None:
        check_modules(names, self._modules, f"teacher {self.description.name!r}")
