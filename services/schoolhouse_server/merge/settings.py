"""How requests are merged, as an operator asks for it. It needs no torch, and so the pool's keeper needs none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schoolhouse_wire.errors import ConfigError

MODES = ("never", "same-shape", "pad")


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The arguments that may be padded along dimension 1, each with its padding value, and the name of the mask.

    The mask `[rows, length]` is 1 where a token counts. A request without a mask gets one if others are padded.
    """

    values: Mapping[str, float]
    mask: str

    @classmethod
    def of(cls, given: Any) -> "Padding":
        """The padding that a mapping describes, in the form that a pool file has.

        Raises:
            ConfigError: for anything else than `{values: {name: value}, mask: name}`.
        """
        if isinstance(given, Padding):
            return given
        fits = isinstance(given, Mapping) and given.keys() == {"values", "mask"} and isinstance(given["mask"], str)
        values = given["values"] if fits else None
        if not isinstance(values, Mapping) or not values or not all(map(_is_number, values.values())):
            raise ConfigError(
                f"pad is {given!r:.80}; expected {{'values': {{name: number}}, 'mask': name}}, such as "
                "{'values': {'input_ids': 0}, 'mask': 'attention_mask'}"
            )
        if given["mask"] in values:
            raise ConfigError(f"pad: the mask {given['mask']!r} is among the values; leave it out, it is padded with 0")
        return cls(values=dict(values), mask=given["mask"])


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How requests are merged; a request beyond `max_batch_rows` or `max_batch_tokens` runs alone.

    `max_wait_ms` bounds how long an idle device waits for more requests.
    """

    mode: str = "never"
    max_batch_rows: int = 256
    max_batch_tokens: int = 65_536
    max_wait_ms: float = 2.0
    pad: Padding | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"merge is {self.mode!r}; choices: {', '.join(map(repr, MODES))}")
        for name in ("max_batch_rows", "max_batch_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a whole number from 1")
        if not _is_number(self.max_wait_ms) or not 0 <= self.max_wait_ms <= 1000:
            raise ConfigError(f"max_wait_ms is {self.max_wait_ms!r}; it must be from 0, which never waits, to 1000")
        if (self.mode == "pad") != (self.pad is not None):
            raise ConfigError("merge='pad' and pad={'values': ..., 'mask': ...} go together; only one of them is given")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
