"""The forms in which a loss receives a teacher's features that did not travel as whole tensors.

The losses of this package take these forms. They are records: moving one to a device moves its tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import torch
from schoolhouse_wire.values.packed import PACKED, CastTensor, PositionedRows, SampledRows, ScaledRows, TopKRows
from schoolhouse_wire.values.tree import map_where

from schoolhouse.errors import ProtocolError
from schoolhouse.taps import Tap

_CHUNK_ELEMENTS = 4 << 20  # logits in a chunk: 16 MiB of float32, enough for a matmul at full speed


class Head(Protocol):
    """Computes a teacher's logits from its hidden states."""

    @property
    def classes(self) -> int:
        """Number of classes, that is of logits per row."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., classes]` of hidden states `[..., width]`."""


class SparseForm:
    """Base of the forms. Every torch function refuses one, since it would read numbers that did not travel."""

    _instead = ""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that this form stands for."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        raise NotImplementedError

    @classmethod
    def refusal(cls) -> str:
        """A message that says why this form is not a tensor, and what to do."""
        return f"the teacher's features came as {cls.__name__}, which is not a tensor: {cls._instead}"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        form = next(kind for kind in types if issubclass(kind, SparseForm))
        raise TypeError(f"{getattr(function, '__name__', function)} cannot take this: {form.refusal()}")

    def _no_operator(self, other: object) -> NoReturn:
        raise TypeError(self.refusal())

    # A tensor's own operators swallow the error of __torch_function__ and try the other operand's operator.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_operator
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = _no_operator

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"there is no {name!r}: {self.refusal()}")


_L = TypeVar("_L", bound="SparseLogits")


class SparseLogits(SparseForm):
    """Base of the forms of logits `[..., classes]`."""

    def rows(self: _L, index: torch.Tensor) -> _L:
        """The rows at the int64 `index` `[n]`, in the same form, as if flattened to `[rows, classes]`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TopKLogits(SparseLogits):
    """The k largest logits of each row, divided by the temperature.

    `values` and `indices` are `[..., k]`; `tail` `[...]` is the log-sum-exp of all the others, -inf if there are none.
    """

    values: torch.Tensor
    indices: torch.Tensor
    tail: torch.Tensor
    classes: int
    temperature: float

    _instead = (
        "of all classes but the k largest only the joint mass is known. LogitsDistillationLoss, SkewedKLLoss, JSDLoss "
        "with beta below 1, and CausalLMLoss of these take it; for another loss ask for the encoding hidden, int8 or "
        "bf16, or for none"
    )

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.indices.shape[:-1], self.classes])

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def logsumexp(self) -> torch.Tensor:
        """Log-sum-exp of all classes, `[...]`."""
        return torch.logaddexp(self.values.to(self.tail.dtype).logsumexp(dim=-1), self.tail)

    @property
    def log_tail_mass(self) -> torch.Tensor:
        """Log-probability of all classes but the k together, `[...]`."""
        return self.tail - self.logsumexp

    def rows(self, index: torch.Tensor) -> "TopKLogits":
        values, indices = pick_rows(self.values, index), pick_rows(self.indices, index)
        return TopKLogits(values, indices, self.tail.flatten().index_select(0, index), self.classes, self.temperature)


@dataclass(frozen=True, eq=False)
class SampledLogits(SparseLogits):
    """The distinct classes that `n` draws of each row gave.

    `indices`, `counts` and `log_probs`, the teacher's log-probabilities, are `[..., width]`. A row with fewer distinct
    classes is padded with the count 0.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    n: int
    log_probs: torch.Tensor
    classes: int
    temperature: float

    _instead = (
        "only the classes drawn are known. LogitsDistillationLoss, SkewedKLLoss and CausalLMLoss of these take it; "
        "for another loss ask for the encoding hidden, int8 or bf16, or for none"
    )

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.indices.shape[:-1], self.classes])

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def rows(self, index: torch.Tensor) -> "SampledLogits":
        indices, counts, log_probs = (pick_rows(x, index) for x in (self.indices, self.counts, self.log_probs))
        return SampledLogits(indices, counts, self.n, log_probs, self.classes, self.temperature)


@dataclass(frozen=True, eq=False)
class HiddenLogits(SparseLogits):
    """Hidden states `[..., width]` and the teacher's head; losses compute logits of `chunk_rows` rows at a time.

    With 0 it is as many rows as make 16 MiB of float32 logits, and at least one.
    """

    hidden: torch.Tensor
    head: Head
    chunk_rows: int = 0

    _instead = "all losses between logits of this package take it; .dense() is a tensor of all the logits"

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.head.classes])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def chunk(self) -> int:
        """Number of rows whose logits are computed at a time."""
        return self.chunk_rows or max(1, _CHUNK_ELEMENTS // self.head.classes)

    def rows(self, index: torch.Tensor) -> "HiddenLogits":
        return HiddenLogits(pick_rows(self.hidden, index), self.head, self.chunk_rows)

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """The logits `[..., classes]`, all at once."""
        with torch.autocast(self.device.type, enabled=False):  # the teacher did not run under the student's
            return self.head.logits(self.hidden)


@dataclass(frozen=True, eq=False)
class PositionedFeatures(SparseForm):
    """The rows of a feature where the bool `mask` is true: `values` is a tensor `[n, ...]`, or a form of n rows."""

    mask: torch.Tensor
    values: "torch.Tensor | SparseLogits"

    _instead = (
        "only the rows at its .mask are here, as .values. The losses between logits or hidden states of this package "
        "take it; for another loss ask for the encoding without at_positions"
    )

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.mask.shape, *self.values.shape[1:]])

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def at(self, counted: torch.Tensor) -> "torch.Tensor | SparseLogits":
        """The values of the rows where the bool `counted`, which has the mask's shape, is true, in their order.

        Raises:
            ValueError: if some of them did not travel; the message says how many.
        """
        check_positions(self, counted)
        index = true_index(counted.flatten()[true_index(self.mask)])
        return self.values.index_select(0, index) if isinstance(self.values, torch.Tensor) else self.values.rows(index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows `[n, ...]` where the mask is true, of another tensor whose leading shape is the mask's."""
        return tensor.flatten(0, self.mask.dim() - 1).index_select(0, true_index(self.mask))


LogitsLike: TypeAlias = torch.Tensor | SparseForm


def pick_rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows `[n, size]` at `index` of a tensor `[..., size]`, counted as if flattened to `[rows, size]`."""
    return tensor.reshape(-1, tensor.shape[-1]).index_select(0, index)


def true_index(mask: torch.Tensor) -> torch.Tensor:
    """The indices where the flattened mask is true."""
    return mask.flatten().nonzero().squeeze(1)


def check_positions(teacher: PositionedFeatures, counted: torch.Tensor) -> None:
    """Raise ValueError if rows that the loss counts did not travel."""
    missing = int((counted & ~teacher.mask).sum())
    if missing:
        raise ValueError(
            f"{missing} of the {int(counted.sum())} positions that the loss counts are not among the "
            f"{int(teacher.mask.sum())} that were asked for; ask for positions that include them, such as "
            "functional.causal_positions(labels) for a causal loss"
        )


def with_head(states: Any, head: Head, chunk_rows: int = 0) -> "HiddenLogits | PositionedFeatures":
    """Make logits, not computed yet, of decoded hidden states: a tensor, or PositionedFeatures of one."""
    if isinstance(states, PositionedFeatures):
        return PositionedFeatures(states.mask, with_head(states.values, head, chunk_rows))  # type: ignore[arg-type]
    if not isinstance(states, torch.Tensor) or not states.is_floating_point() or not states.dim():
        raise ProtocolError(f"hidden states were asked for, and a {type(states).__name__} arrived")
    return HiddenLogits(states, head, chunk_rows)


def decoded(values: Mapping[Tap, Any], heads: Mapping[Tap, Head]) -> dict[Tap, Any]:
    """Decode features, by tap, that have arrived; those of a tap in `heads` are hidden states, and become logits."""
    found = {tap: decode(value) for tap, value in values.items()}
    return {tap: with_head(value, heads[tap]) if tap in heads else value for tap, value in found.items()}


def decode(value: Any) -> Any:
    """Unpack a feature that has arrived: into tensors of the teacher's dtype, or into forms of this module.

    Raises:
        CorruptPayloadError: if the parts of a packed tensor do not fit together.
        ProtocolError: if it is not packed as the contract says.
    """
    return map_where(value, (*PACKED, SparseForm), _decoded)


def _decoded(packed: Any) -> Any:
    if isinstance(packed, CastTensor | ScaledRows):
        return packed.dense()
    if isinstance(packed, PositionedRows):
        packed.check()
        return PositionedFeatures(packed.mask, decode(packed.values))
    if isinstance(packed, TopKRows):
        packed.check()
        indices = packed.indices.long()
        return TopKLogits(packed.values, indices, packed.tail, packed.classes, float(packed.temperature))
    if isinstance(packed, SampledRows):
        packed.check()
        indices, counts, temperature = packed.indices.long(), packed.counts.long(), float(packed.temperature)
        return SampledLogits(indices, counts, packed.n, packed.log_probs, packed.classes, temperature)
    raise ProtocolError(f"a {type(packed).__name__} arrived, which is not a form in which features travel")
