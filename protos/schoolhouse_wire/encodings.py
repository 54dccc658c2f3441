"""The encodings that a client may ask for, and how they travel in a request."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from google.protobuf.unknown_fields import UnknownFieldSet

from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.packed import MAX_CLASSES, MAX_DRAWS
from schoolhouse_wire.values.tensors import DTYPE_OF_NUMBER, DTYPES

CAST_DTYPES = (torch.bfloat16, torch.float16)
ROW_DTYPES = (torch.int8, torch.float8_e4m3fn)
_SEEDS = 1 << 64
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """As computed. With `positions`, also in every subclass, only the rows where the call's mask is true travel."""

    positions: bool = False


@dataclass(frozen=True, kw_only=True)
class Cast(Encoding):
    """Floating-point tensors cast to `dtype` if that is narrower."""

    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_dtype(self.dtype, CAST_DTYPES)


@dataclass(frozen=True, kw_only=True)
class PerRow(Encoding):
    """Floating-point tensors in a `dtype` of one byte, with a float32 scale for each row (the last dimension)."""

    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_dtype(self.dtype, ROW_DTYPES)


@dataclass(frozen=True, kw_only=True)
class TopK(Encoding):
    """For logits: the `k` largest of each row, divided by the temperature, and the log-sum-exp of all the others."""

    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_int("k", self.k, 1, MAX_CLASSES)
        _check_temperature(self.temperature)


@dataclass(frozen=True, kw_only=True)
class Sampled(Encoding):
    """For logits: `n` draws with replacement from each row's distribution at the temperature (arXiv 2503.16870).

    The same seed gives the same draws. If there is none, `seeded` must set it before the encoding travels or is used.
    """

    n: int
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_DRAWS)
        _check_temperature(self.temperature)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, _SEEDS - 1)


@dataclass(frozen=True, kw_only=True)
class Hidden(Encoding):
    """For logits: instead the hidden states from which the submodule `head` computes them, encoded by `encoding`."""

    head: str
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.head, str) or not self.head:
            raise ValueError(f"head is {self.head!r}; give the name of the submodule that computes the logits")
        if type(self.encoding) not in (type(None), Cast, PerRow) or (self.encoding and self.encoding.positions):
            raise ValueError(
                f"the encoding of hidden states is {self.encoding!r}; choices: None, bf16, fp16, int8, fp8, without "
                "positions, which belong around hidden itself"
            )


def seeded(encoding: Encoding | None, seed: int) -> Encoding | None:
    """The encoding with `seed` for its draws if it draws and has no seed; otherwise the encoding itself."""
    if isinstance(encoding, Sampled) and encoding.seed is None:
        return dataclasses.replace(encoding, seed=seed)
    return encoding


def name_of(encoding: Encoding | None) -> str:
    """Its short name: "none", "bf16", "fp16", "int8", "fp8", "topk", "sampled" or "hidden"."""
    if isinstance(encoding, Cast | PerRow):
        return _DTYPE_NAMES[encoding.dtype]
    return {TopK: "topk", Sampled: "sampled", Hidden: "hidden"}.get(type(encoding), "none")


def encoding_to_wire(encoding: Encoding | None) -> teacher_pb2.Encoding | None:
    """An encoding as a message; None if every row travels as computed.

    Raises:
        ValueError: for draws without a seed, since a request that is sent again must draw the same.
    """
    if encoding is None or encoding == Encoding():
        return None
    message = teacher_pb2.Encoding(positions=encoding.positions)
    if isinstance(encoding, Cast):
        message.cast = DTYPES[encoding.dtype]  # type: ignore[assignment]
    elif isinstance(encoding, PerRow):
        message.per_row = DTYPES[encoding.dtype]  # type: ignore[assignment]
    elif isinstance(encoding, TopK):
        message.topk.k, message.topk.temperature = encoding.k, encoding.temperature
    elif isinstance(encoding, Sampled):
        if encoding.seed is None:
            raise ValueError("an encoding that draws has no seed; set one with seeded(encoding, seed)")
        message.sampled.n, message.sampled.temperature = encoding.n, encoding.temperature
        message.sampled.seed = encoding.seed
    elif isinstance(encoding, Hidden):
        message.hidden.head = encoding.head
        if (inner := encoding_to_wire(encoding.encoding)) is not None:
            message.hidden.encoding.CopyFrom(inner)
    return message


def encoding_from_wire(message: teacher_pb2.Encoding) -> Encoding | None:
    """The encoding of a message; None if every row travels as computed.

    Raises:
        ProtocolError: for a kind that this version does not know, or an invalid setting.
    """
    parts = (message, message.topk, message.sampled, message.hidden)
    if any(len(UnknownFieldSet(part)) for part in parts):  # ignored, it would be answered in another encoding
        raise ProtocolError("an encoding was asked for that this version does not know", choices=_KINDS)
    try:
        encoding = _from_wire(message)
    except ValueError as err:
        raise ProtocolError(f"an invalid encoding was asked for: {err}") from err
    return None if encoding == Encoding() else encoding


_KINDS = ("cast", "per_row", "topk", "sampled", "hidden")


def _from_wire(message: teacher_pb2.Encoding) -> Encoding:
    kind, positions = message.WhichOneof("kind"), message.positions
    if kind == "cast":
        return Cast(dtype=_dtype(message.cast), positions=positions)
    if kind == "per_row":
        return PerRow(dtype=_dtype(message.per_row), positions=positions)
    if kind == "topk":
        return TopK(k=message.topk.k, temperature=message.topk.temperature, positions=positions)
    if kind == "sampled":
        asked = message.sampled
        return Sampled(n=asked.n, temperature=asked.temperature, seed=asked.seed, positions=positions)
    if kind == "hidden":
        inner = encoding_from_wire(message.hidden.encoding)
        return Hidden(head=message.hidden.head, encoding=inner, positions=positions)
    return Encoding(positions=positions)


def _dtype(number: int) -> torch.dtype:
    if number not in DTYPE_OF_NUMBER:
        raise ValueError(f"the dtype number {number} is unknown")
    return DTYPE_OF_NUMBER[number]


def _check_dtype(dtype: object, choices: Sequence[torch.dtype]) -> None:
    if dtype not in choices:
        raise ValueError(f"dtype is {dtype}; choices: {', '.join(map(str, choices))}")


def _check_int(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {value!r}; it must be an integer in {lowest}..{highest}")


def _check_temperature(value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"temperature is {value!r}; it must be above 0 and finite")
