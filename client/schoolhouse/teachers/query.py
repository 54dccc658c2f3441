"""What a request asks of a teacher: taps, the encoding of each, and which positions."""

import dataclasses
import functools
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from schoolhouse_wire.encodings import Encoding, Hidden, encoding_from_wire, encoding_to_wire, seeded
from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse.errors import ConfigError
from schoolhouse.taps import Tap, TapLike, as_tap, as_taps, taps_from_wire, taps_to_wire


def encodings_of(taps: tuple[Tap, ...], encodings: Mapping[Any, Encoding | None]) -> tuple[Encoding | None, ...]:
    """The encoding of each tap; raises `ConfigError` for other taps, and for values that are not encodings."""
    asked = {as_tap(tap): encoding for tap, encoding in encodings.items()}
    for tap, encoding in asked.items():
        if tap not in taps:
            raise ConfigError(
                f"encodings has {_named(tap)!r}, which is not among the taps; choices: {[*map(_named, taps)]}"
            )
        if not isinstance(encoding, Encoding | None):
            raise ConfigError(
                f"encodings[{tap.module!r}] is {encoding!r:.80}; choices: None, or an encoding of schoolhouse.encodings"
            )
    return tuple(asked.get(tap) for tap in taps)


def _named(tap: Tap) -> str | tuple[str, str]:
    """The tap as a user would write it."""
    return tap.module if tap.side == "output" else (tap.module, tap.side)


@dataclass(frozen=True, eq=False)
class Wanted:
    """Taps, the encoding of each, and the bool mask `[batch, length]` of the positions if an encoding needs it."""

    taps: tuple[Tap, ...]
    encodings: tuple[Encoding | None, ...]
    mask: torch.Tensor | None = None

    @functools.cached_property
    def as_computed(self) -> bool:
        """Whether no tap has an encoding."""
        return not any(self.encodings)

    @functools.cached_property
    def wire(self) -> list[teacher_pb2.Tap]:
        """What `to_wire` returns, made once; it must not be changed."""
        return list(self.to_wire())

    @classmethod
    def of(
        cls, taps: Iterable[TapLike], encodings: Mapping[Any, Encoding | None] | None = None, positions: Any = None
    ) -> "Wanted":
        """Check what a user asks for.

        Raises:
            ConfigError: for no taps, for encodings of other taps, or if `positions` are missing, invalid, or given
                without an encoding that reads them.
        """
        found = as_taps(taps)
        if not encodings and positions is None:
            return _as_computed(found)
        wanted = cls(found, encodings_of(found, encodings or {}))
        return dataclasses.replace(wanted, mask=wanted._mask(positions))

    def _mask(self, positions: Any) -> torch.Tensor | None:
        needed = any(encoding is not None and encoding.positions for encoding in self.encodings)
        if positions is None and not needed:
            return None
        if not needed:
            raise ConfigError("positions are given, but no encoding reads them; wrap one in encodings.at_positions")
        if not isinstance(positions, torch.Tensor) or not positions.dim() or positions.is_floating_point():
            came = (
                f"a {positions.dtype} of {positions.dim()} dimensions"
                if isinstance(positions, torch.Tensor)
                else positions
            )
            raise ConfigError(f"positions is {came!r:.80}; a bool or 0/1 mask [batch, length] is needed")
        mask = positions.detach().cpu()
        if mask.dtype is not torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ConfigError(
                f"positions is a {mask.dtype} with numbers other than 0 and 1; a mask [batch, length] is needed, such "
                "as functional.causal_positions(labels) returns"
            )
        return mask.bool()

    def with_seeds(self) -> "Wanted":
        """The same, with new random seeds for the encodings that draw and have none."""
        if self.as_computed:
            return self
        return dataclasses.replace(self, encodings=tuple(seeded(e, secrets.randbits(64)) for e in self.encodings))

    def heads(self) -> dict[Tap, str]:
        """The name of the head whose input travels instead of logits, by the tap of the logits."""
        if self.as_computed:
            return {}
        pairs = zip(self.taps, self.encodings, strict=True)
        return {tap: encoding.head for tap, encoding in pairs if isinstance(encoding, Hidden)}

    def to_wire(self) -> tuple[teacher_pb2.Tap, ...]:
        """Taps as messages; the mask travels with the inputs."""
        if self.as_computed:
            return taps_to_wire(self.taps)
        made = [teacher_pb2.Tap.FromString(tap.SerializeToString()) for tap in taps_to_wire(self.taps)]
        for message, encoding in zip(made, self.encodings, strict=True):
            if (wire := encoding_to_wire(encoding)) is not None:
                message.encoding.CopyFrom(wire)
        return tuple(made)

    @classmethod
    def from_wire(cls, taps: Iterable[teacher_pb2.Tap], mask: torch.Tensor | None) -> "Wanted":
        """Read what a call asks for.

        Raises:
            ProtocolError: for no taps, a tap twice, or a side or an encoding that this version does not know.
        """
        given = tuple(taps)
        found = taps_from_wire(given)
        if not found or len(set(found)) < len(found) or any(tap.side == "" for tap in found):
            raise ProtocolError("a call's taps must be at least one, distinct, and of a known side")
        encodings = tuple(encoding_from_wire(tap.encoding) if tap.HasField("encoding") else None for tap in given)
        return cls(found, encodings, mask)


@functools.lru_cache(maxsize=256)
def _as_computed(taps: tuple[Tap, ...]) -> Wanted:
    """A request without encodings; cached, since a training loop makes the same one at every step."""
    return Wanted(taps, (None,) * len(taps))
