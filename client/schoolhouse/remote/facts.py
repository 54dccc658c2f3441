"""What a client has learned about one revision of a teacher, against which it checks requests."""

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
    """The description of one revision, and the limits of requests to it."""

    description: TeacherDescription
    limits: Limits
    _modules: dict[str, None] = field(init=False)  # a dict, as it keeps the order and is quick to search
    _known: dict[tuple[TapLike, ...], Wanted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = dict.fromkeys(self.description.modules)

    @property
    def revision(self) -> str:
        """The revision of the teacher's weights."""
        return self.description.revision

    def wanted(
        self,
        taps: Iterable[TapLike],
        encodings: Mapping[TapLike, Encoding | None] | None,
        positions: torch.Tensor | None,
    ) -> Wanted:
        """What a user asks for, checked; raises what `Wanted.of` raises, and `UnknownTapError` for unknown modules."""
        if encodings is None and positions is None:
            return self._plain(tuple(taps))
        wanted = Wanted.of(taps, encodings, positions).with_seeds()
        self._check((*(tap.module for tap in wanted.taps), *wanted.heads().values()))
        return wanted

    def _plain(self, taps: tuple[TapLike, ...]) -> Wanted:
        found = self._known.get(taps)  # a training loop asks for the same taps again and again
        if found is None:
            found = Wanted.of(taps)
            self._check(tap.module for tap in found.taps)
            if len(self._known) < _MAX_KNOWN_TAPS:
                self._known[taps] = found
        return found

    def _check(self, names: Iterable[str]) -> None:
        check_modules(names, self._modules, f"teacher {self.description.name!r}", tappable=True)
