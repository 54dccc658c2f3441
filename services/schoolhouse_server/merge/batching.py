"""Which requests may run as one forward, and the merged inputs of those that do."""

import hashlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tensors import bytes_of, dim_order
from schoolhouse_wire.values.tree import is_plain, map_tensors, structure_of, tensors_of

from schoolhouse_server.common.rows import rows_of, tokens_of
from schoolhouse_server.merge.settings import Padding


@dataclass(frozen=True)
class Form:
    """The form of a request's inputs; requests with equal keys may run together."""

    key: Hashable
    rows: int
    length: int  # of a row, in tokens
    padded: bool = False  # whether the length may differ from that of others
    mask: torch.dtype | None = None  # the dtype of the request's mask, if it may be padded and has one

    @property
    def tokens(self) -> int:
        """How many tokens the inputs have."""
        return self.rows * self.length


class Former:
    """Finds the form of requests to a module whose forward takes `parameters`."""

    def __init__(self, parameters: Sequence[str], pad: Padding | None) -> None:
        self._parameters = parameters
        self._pad = pad

    def form(self, inputs: Arguments) -> Form | None:
        """The form of inputs, whose keywords are in order; None if they cannot be merged with anything."""
        rows = rows_of(inputs)
        tensors = [*tensors_of(inputs)]
        if rows < 1 or not any(tensor.dim() for tensor in tensors):
            return None
        if not all(is_plain(tensor) and tensor.layout is torch.strided for tensor in tensors):
            return None
        length = self._padded_length(inputs, rows)
        if length is None:
            return Form(_structure(inputs, rows), rows, tokens_of(inputs) // rows)
        mask = self.mask_of(inputs)
        key = self._structure_without_length(inputs, rows)
        return Form(key, rows, length, True, mask.dtype if mask is not None else None)

    def mask_of(self, inputs: Arguments) -> Any:
        """The request's mask; None if it has none."""
        assert self._pad is not None
        return dict(self._named(inputs)).get(self._pad.mask)

    def with_mask(self, inputs: Arguments, form: Form, dtype: torch.dtype) -> Arguments:
        """The inputs, with a mask of ones if they have none."""
        assert self._pad is not None
        if form.mask is not None:
            return inputs
        device = tensors_of(inputs)[0].device
        ones = torch.ones(form.rows, form.length, dtype=dtype, device=device)
        return in_order(Arguments(inputs, {**inputs.kwargs, self._pad.mask: ones}))

    def without_empty_mask(self, inputs: Arguments) -> Arguments:
        """The inputs, without the mask if it is a keyword that is None."""
        assert self._pad is not None
        left = {name: v for name, v in inputs.kwargs.items() if name != self._pad.mask or v is not None}
        return Arguments(inputs, left)

    def leaves(self, inputs: Arguments) -> Iterator[tuple[torch.Tensor, float | None]]:
        """The tensors of inputs, in the order of `map_tensors`, each with its padding value, or None if not padded."""
        fills = {**self._pad.values, self._pad.mask: 0} if self._pad is not None else {}
        for name, item in self._named(inputs):
            for tensor in tensors_of(item):
                yield tensor, fills.get(name) if tensor is item else None

    def _named(self, inputs: Arguments) -> Iterator[tuple[str, Any]]:
        names = itertools.chain(self._parameters, itertools.repeat(""))
        yield from zip(names, inputs, strict=False)
        yield from inputs.kwargs.items()

    def _padded_length(self, inputs: Arguments, rows: int) -> int | None:
        """The length of the arguments that may be padded; None if they do not fit, so that only equal lengths merge."""
        if self._pad is None:
            return None
        named = dict(self._named(inputs))
        found = [named[name] for name in self._pad.values if name in named]
        mask = named.get(self._pad.mask)
        if not found or not all(isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[0] == rows for t in found):
            return None
        lengths = {tensor.shape[1] for tensor in found}
        if len(lengths) > 1 or 0 in lengths:
            return None
        [length] = lengths
        if mask is None:
            positional = self._pad.mask in self._parameters[: len(inputs)]
            return None if positional else length
        return length if isinstance(mask, torch.Tensor) and mask.shape == (rows, length) else None

    def _structure_without_length(self, inputs: Arguments, rows: int) -> Hashable:
        """As `_structure`, without the lengths of what may be padded, and without a mask that is a keyword."""
        assert self._pad is not None
        rest = {name: item for name, item in inputs.kwargs.items() if name != self._pad.mask}
        padded = {id(tensor) for tensor, fill in self.leaves(inputs) if fill is not None}
        return ("padded", _structure(Arguments(inputs, rest), rows, padded))


def in_order(inputs: Arguments) -> Arguments:
    """The same inputs, with the keywords in the order of their names."""
    return Arguments(inputs, dict(sorted(inputs.kwargs.items())))


def _structure(inputs: Arguments, rows: int, padded: Iterable[int] = ()) -> Hashable:
    """Equal for inputs that differ only in their rows, and in the lengths of the tensors whose ids are in `padded`."""

    def plain(tensor: torch.Tensor) -> Hashable:
        kept = (tensor.dtype, dim_order(tensor))
        if id(tensor) in padded:
            return ("padded", tensor.dtype, tensor.shape[2:])
        if tensor.dim() and tensor.shape[0] == rows:
            return ("rows", *kept, tensor.shape[1:])
        return ("table", *kept, tensor.shape, _digest(tensor))

    return structure_of(inputs, plain, lambda _value: object())  # an unknown value equals no other


def _digest(tensor: torch.Tensor) -> bytes:
    """A cryptographic digest of a tensor, so that no job can forge a table that stands for another job's."""
    plain = bytes_of(tensor.contiguous())
    return hashlib.blake2b(memory_of(plain), digest_size=32).digest()


@dataclass(frozen=True)
class Layout:
    """Where the rows of each request are in a merged batch."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    starts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", (0, *itertools.accumulate(self.rows))[:-1])

    @property
    def total(self) -> int:
        """How many rows the batch has."""
        return sum(self.rows)

    @property
    def length(self) -> int:
        """How many tokens each of its rows has."""
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        """Whether some rows are padded."""
        return len(set(self.lengths)) > 1


class Batch:
    """The inputs of several requests with equal keys, as the inputs of one forward."""

    def __init__(self, former: Former, inputs: Sequence[Arguments], forms: Sequence[Form]) -> None:
        self.layout = Layout(tuple(form.rows for form in forms), tuple(form.length for form in forms))
        self.key = forms[0].key
        self._former, self._forms = former, forms
        self._padded = forms[0].padded
        given = {form.mask for form in forms}
        self._mask = next((dtype for dtype in given if dtype is not None), torch.int64)
        self._needs_mask = self._padded and (self.layout.ragged or given != {None})
        self.ragged = self._padded and self.layout.ragged
        # Batches are alike, so that what was learned from one holds for another, if their variants are equal. Where all
        # requests have one length, it is part of the variant, as it cannot be told which sizes of a feature depend on
        # it. A table that is taken for rows does no harm while it is the same in all requests, nor does one row that
        # is used for all while all rows are the same: so `_alike` is part of it too. And so is whether
        # masks were made or given.
        length = -1 if self.ragged else self.layout.length
        self.variant: Hashable = (length, self._needs_mask, None in given, _alike(inputs))

    def inputs(self, loaded: Sequence[Arguments]) -> Arguments:
        """The merged inputs, in memory of their own, from the requests' inputs on the device."""
        if self._needs_mask:
            pairs = zip(map(self._former.without_empty_mask, loaded), self._forms, strict=True)
            loaded = [self._former.with_mask(one, form, self._mask) for one, form in pairs]
        leaves = zip(*map(self._former.leaves, loaded), strict=True)
        merged = iter([self._together([t for t, _ in leaf], leaf[0][1]) for leaf in leaves])
        return map_tensors(loaded[0], lambda _tensor: next(merged))  # type: ignore[no-any-return]

    def _together(self, tensors: Sequence[torch.Tensor], fill: float | None) -> torch.Tensor:
        if tuple(t.shape[0] if t.dim() else -1 for t in tensors) != self.layout.rows:
            return tensors[0].clone()  # a table, which is the same in all requests
        if fill is None or not self.ragged:
            return torch.cat(list(tensors))
        shape = (self.layout.total, self.layout.length, *tensors[0].shape[2:])
        merged = tensors[0].new_full(shape, fill)
        for tensor, start in zip(tensors, self.layout.starts, strict=True):
            merged[start : start + len(tensor), : tensor.shape[1]] = tensor
        return merged


def _alike(inputs: Sequence[Arguments]) -> tuple[tuple[int, str], ...]:
    """Which tensors are the same in all requests, and which have the same rows throughout."""
    if len({sum(1 for _ in tensors_of(one)) for one in inputs}) > 1:  # only some have a mask
        return ()
    found = enumerate(map(_likeness, zip(*map(tensors_of, inputs), strict=True)))
    return tuple((i, likeness) for i, likeness in found if likeness)


def _likeness(leaf: Sequence[torch.Tensor]) -> str:
    first = leaf[0]
    if first.dim() and all(t.shape[1:] == first.shape[1:] and len(t) for t in leaf):
        if not all(_same_bytes(first[0], t[0]) for t in leaf[1:]):
            return ""  # the common case
        if all(_same_bytes(t[1:], t[:1].expand(len(t) - 1, *t.shape[1:])) for t in leaf):
            return "rows"
    return "requests" if all(is_same(first, other) for other in leaf[1:]) else ""


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors of one dtype are equal to the bit, NaNs included."""
    return a.shape == b.shape and _same_bytes(a, b)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bytes_of(a.contiguous()), bytes_of(b.contiguous()))
