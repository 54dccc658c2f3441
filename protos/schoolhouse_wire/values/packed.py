"""The forms in which encoded tensors travel: small records of tensors, which the receiver checks before using them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from schoolhouse_wire.errors import CorruptPayloadError, ProtocolError
from schoolhouse_wire.v1 import values_pb2
from schoolhouse_wire.values.tensors import DTYPE_OF_NUMBER

MAX_DRAWS = 65_535
MAX_CLASSES = (1 << 31) - 1  # indices of classes are int32
_INDICES = (torch.uint16, torch.int32)
_COUNTS = (torch.uint8, torch.uint16)
_SPARSE_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class CastTensor:
    """A tensor cast to a narrower floating-point dtype; `dtype` is the wire's number of the dtype that it had."""

    values: torch.Tensor
    dtype: int

    def dense(self) -> torch.Tensor:
        """The tensor in the dtype that it had.

        Raises:
            CorruptPayloadError: if the fields do not fit together.
        """
        _check(_is(self.values, torch.float16, torch.bfloat16), "a cast tensor's values are not fp16 or bf16", self)
        return self.values.to(_wider_dtype(self.dtype, self.values))


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """A tensor of one byte per element, and the float32 scale `[..., 1]` of each row, which is the last dimension.

    `dtype` is the wire's number of the dtype that it had.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: int

    def dense(self) -> torch.Tensor:
        """The tensor in the dtype that it had.

        Raises:
            CorruptPayloadError: if the fields do not fit together.
        """
        _check(_is(self.values, torch.int8, torch.float8_e4m3fn), "scaled rows are not int8 or float8_e4m3fn", self)
        _check(self.values.dim() > 0, "scaled rows are a 0-d tensor", self)
        _check(_is(self.scales, torch.float32), "the scales of rows are not float32", self)
        _check(self.scales.shape == (*self.values.shape[:-1], 1), "there is not one scale for each row", self)
        _check(bool((self.scales.isfinite() & (self.scales > 0)).all()), "a row's scale is not above 0", self)
        dtype = _wider_dtype(self.dtype, self.values)
        wide = torch.promote_types(dtype, torch.float32)
        # The product may round to just above the largest number of the dtype.
        limit = torch.finfo(dtype).max
        return (self.values.to(wide) * self.scales).clamp(-limit, limit).to(dtype)


@dataclass(frozen=True, eq=False)
class TopKRows:
    """The k largest logits of each row, divided by the temperature, their classes, and the others' log-sum-exp."""

    values: torch.Tensor
    indices: torch.Tensor
    tail: torch.Tensor
    classes: int
    temperature: float

    def check(self) -> None:
        """Raise CorruptPayloadError unless the fields fit together."""
        _check_classes(self, self.classes, self.temperature)
        _check(_is(self.values, *_SPARSE_FLOATS), "the values are not floating-point", self)
        _check(_is(self.tail, *_SPARSE_FLOATS), "the tail is not floating-point", self)
        _check(_is(self.indices, *_INDICES), "the indices are not uint16 or int32", self)
        _check(self.values.dim() > 0 and 1 <= self.values.shape[-1] <= self.classes, "k is not in 1..classes", self)
        _check(self.indices.shape == self.values.shape, "there is not one index for each value", self)
        _check(self.tail.shape == self.values.shape[:-1], "there is not one tail for each row", self)
        _check_range(self, self.indices, self.classes)


@dataclass(frozen=True, eq=False)
class SampledRows:
    """The distinct classes `[..., width]` that `n` draws of each row gave, their counts, and their log-probabilities.

    A row with fewer distinct classes is padded with the count 0.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    log_probs: torch.Tensor
    n: int
    classes: int
    temperature: float

    def check(self) -> None:
        """Raise CorruptPayloadError unless the fields fit together."""
        _check_classes(self, self.classes, self.temperature)
        _check(_is_count(self.n) and 1 <= self.n <= MAX_DRAWS, f"n is not in 1..{MAX_DRAWS}", self)
        _check(_is(self.indices, *_INDICES), "the indices are not uint16 or int32", self)
        _check(_is(self.counts, *_COUNTS), "the counts are not uint8 or uint16", self)
        _check(_is(self.log_probs, *_SPARSE_FLOATS), "the log-probabilities are not floating-point", self)
        _check(self.indices.dim() > 0 and self.indices.shape[-1] <= self.n, "there are more classes than draws", self)
        _check(
            self.counts.shape == self.indices.shape == self.log_probs.shape,
            "indices, counts and log-probabilities have different shapes",
            self,
        )
        _check(bool((self.counts.long().sum(dim=-1) == self.n).all()), "the counts of a row do not sum to n", self)
        _check_range(self, self.indices, self.classes)


@dataclass(frozen=True, eq=False)
class PositionedRows:
    """The rows of a tensor where the bool `mask` of its leading shape is true: a tensor `[n, ...]`, or packed rows."""

    mask: torch.Tensor
    values: Any

    def check(self) -> None:
        """Raise CorruptPayloadError unless there are as many rows as true positions in the mask.

        Packed rows check themselves.
        """
        _check(_is(self.mask, torch.bool) and self.mask.dim() > 0, "the positions are not a bool mask", self)
        rows = self.values.indices if isinstance(self.values, TopKRows | SampledRows) else self.values
        rows = rows.values if isinstance(rows, CastTensor | ScaledRows) else rows
        _check(isinstance(rows, torch.Tensor) and rows.dim() > 0, "the rows at positions are not a tensor", self)
        _check(rows.shape[0] == int(self.mask.sum()), "there is not one row for each position", self)


Packed: TypeAlias = CastTensor | ScaledRows | TopKRows | SampledRows | PositionedRows
FORMS: dict[type[Packed], values_pb2.Packed.Form] = {
    CastTensor: values_pb2.Packed.CAST_TENSOR,
    ScaledRows: values_pb2.Packed.SCALED_ROWS,
    TopKRows: values_pb2.Packed.TOP_K_ROWS,
    SampledRows: values_pb2.Packed.SAMPLED_ROWS,
    PositionedRows: values_pb2.Packed.POSITIONED_ROWS,
}
PACKED = tuple(FORMS)
_TYPES = {number: form for form, number in FORMS.items()}


def fields_of(packed: Packed) -> list[Any]:
    """The fields in the order of their declarations, which is that of the contract."""
    return [getattr(packed, field.name) for field in dataclasses.fields(packed)]


def packed_of(form: int, fields: list[Any]) -> Packed:
    """A packed tensor as it arrived; `dense` and `check` check whether its fields fit together.

    Raises:
        CorruptPayloadError: for a wrong number of fields.
        ProtocolError: for a form that this version does not know.
    """
    found: Any = _TYPES.get(form)  # type: ignore[call-overload]
    if found is None:
        raise ProtocolError(f"a tensor packed in form {form} arrived, which this version does not know")
    if len(fields) != len(dataclasses.fields(found)):
        raise CorruptPayloadError(f"a {found.__name__} arrived with {len(fields)} fields")
    return found(*fields)  # type: ignore[no-any-return]


def _check(fits: bool, what: str, packed: Packed) -> None:
    if not fits:
        raise CorruptPayloadError(f"an invalid {type(packed).__name__} arrived: {what}")


def _is(value: object, *dtypes: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in dtypes


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_classes(packed: Packed, classes: object, temperature: object) -> None:
    counted = _is_count(classes) and 1 <= classes <= MAX_CLASSES  # type: ignore[operator]
    _check(counted, f"the number of classes is not in 1..{MAX_CLASSES}", packed)
    fits = isinstance(temperature, float) and 0 < temperature < math.inf
    _check(fits, "the temperature is not above 0 and finite", packed)


def _check_range(packed: Packed, indices: torch.Tensor, classes: int) -> None:
    if indices.numel():
        lowest, highest = indices.long().aminmax()
        _check(int(lowest) >= 0 and int(highest) < classes, f"an index is not in 0..{classes - 1}", packed)


def _wider_dtype(number: object, values: torch.Tensor) -> torch.dtype:
    """The floating-point dtype of a wire number, which must take more bytes per element than `values`."""
    dtype = DTYPE_OF_NUMBER.get(number) if isinstance(number, int) else None
    if dtype is None or not dtype.is_floating_point or dtype.itemsize <= values.dtype.itemsize:
        raise CorruptPayloadError(f"a tensor of {values.dtype} arrived as an encoding of the dtype number {number!r}")
    return dtype
