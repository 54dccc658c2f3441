"""Encode a feature, on the device where it was computed."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from schoolhouse_wire.encodings import Cast, Encoding, Hidden, PerRow, Sampled, TopK
from schoolhouse_wire.errors import UnsupportedValueError
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.packed import CastTensor, PositionedRows, SampledRows, ScaledRows, TopKRows
from schoolhouse_wire.values.records import record_of
from schoolhouse_wire.values.tensors import DTYPES
from schoolhouse_wire.values.tree import map_tensors

_DEVICE_ELEMENTS = 16 << 20  # classes and draws that an accelerator processes at a time: 128 MiB of float64
_HOST_ELEMENTS = 1 << 20  # the same of the host, whose memory requests share; small enough for its caches, too
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def encode(value: Any, encoding: Encoding | None, mask: torch.Tensor | None = None) -> Any:
    """A feature as it travels: the structure of `value`, with its tensors packed as `encoding` says.

    A tensor that is not floating-point, has no element, or would not become smaller stays as computed. For `TopK` and
    `Sampled`, `value` is logits `[..., classes]`, or has them as its field `logits` beside fields that stay as
    computed. For `Hidden`, `value` is what the head was called with. `mask` `[...]` is the mask of the positions.

    Raises:
        UnsupportedValueError: if there are no logits, if the mask does not fit the feature, or if the encoding cannot
            hold the numbers.
    """
    if encoding is None:
        return value
    if isinstance(encoding, Hidden):
        inner = encoding.encoding or Encoding()
        states = hidden_states(value, encoding.head)
        return encode(states, dataclasses.replace(inner, positions=encoding.positions), mask)
    logits = logits_of(value) if isinstance(encoding, TopK | Sampled) else None
    packer = _Packer(encoding, logits, _needed(mask) if encoding.positions else None)
    packed = map_tensors(value, packer.pack)
    packer.finish()
    return packed


class _Packer:
    """Packs tensors one by one. Their numbers are checked at the end, to wait for the device only once."""

    def __init__(self, encoding: Encoding, logits: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        self._encoding = encoding
        self._logits = logits  # the one tensor to encode; None for all of them
        self._mask = mask
        self._packed: dict[int, tuple[torch.Tensor, Any]] = {}  # by id: a tensor that occurs twice is encoded once
        self._fitted = False
        self._doubts: list[_Doubt] = []

    def pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self._packed:
            encoded = self._logits is None or tensor is self._logits
            self._packed[id(tensor)] = (tensor, self._pack(tensor, encoded))
        return self._packed[id(tensor)][1]

    def _pack(self, tensor: torch.Tensor, encoded: bool) -> Any:
        mask = self._mask
        if mask is None or tensor.dim() <= mask.dim() or tensor.shape[: mask.dim()] != mask.shape:
            return self._encoded(tensor) if encoded else tensor
        self._fitted |= encoded
        index = mask.flatten().nonzero().squeeze(1).to(tensor.device)
        rows = tensor.flatten(0, mask.dim() - 1).index_select(0, index)
        return PositionedRows(mask, self._encoded(rows) if encoded else rows)

    def _encoded(self, tensor: torch.Tensor) -> Any:
        encoding = self._encoding
        if isinstance(encoding, TopK):
            return _top_k(tensor, encoding)
        if isinstance(encoding, Sampled):
            return _sampled(tensor, encoding)
        if isinstance(encoding, Cast) and tensor.numel() and encoding.dtype.itemsize < tensor.dtype.itemsize:
            return _cast(tensor, encoding.dtype, self._doubts)
        if isinstance(encoding, PerRow) and tensor.numel() and tensor.dim() and tensor.dtype.itemsize > 1:
            return _scaled_rows(tensor, encoding.dtype, self._doubts)
        return tensor

    def finish(self) -> None:
        """Raise UnsupportedValueError for the first tensor that the encoding could not hold."""
        if self._mask is not None and not self._fitted:
            raise UnsupportedValueError(
                f"positions were asked for with a mask of the shape {tuple(self._mask.shape)}, but the feature has no "
                "floating-point tensor with that leading shape and more dimensions; give a mask of the tokens' shape, "
                "[batch, length], or ask for this tap without positions"
            )
        if self._doubts:
            device = self._doubts[0].raised.device
            raised = torch.stack([doubt.raised.to(device) for doubt in self._doubts]).tolist()
            for doubt in itertools.compress(self._doubts, raised):
                if doubt.holds():
                    raise UnsupportedValueError(doubt.message)


@dataclass(frozen=True)
class _Doubt:
    """A cheap check of a tensor's numbers: if `raised`, a bool on its device, is true, `holds` checks them closely."""

    raised: torch.Tensor
    holds: Callable[[], bool]
    message: str


def _cast(tensor: torch.Tensor, dtype: torch.dtype, doubts: list[_Doubt]) -> CastTensor:
    values = tensor.to(dtype)
    lowest, highest = values.aminmax()
    choices = "as computed" if dtype == torch.bfloat16 else "bf16, or as computed"
    doubts.append(
        _Doubt(
            ~(lowest.isfinite() & highest.isfinite()),
            lambda: bool((values.isinf() & tensor.isfinite()).any()),
            f"a tensor of the shape {tuple(tensor.shape)} has numbers beyond {torch.finfo(dtype).max:g}, which {dtype} "
            f"cannot hold; choices: {choices}",
        )
    )
    return CastTensor(values, DTYPES[tensor.dtype])


def _scaled_rows(tensor: torch.Tensor, dtype: torch.dtype, doubts: list[_Doubt]) -> ScaledRows:
    wide = _widen(tensor)
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # A scale below the smallest normal number would have few digits or be 0; rows that small lose digits instead.
    scales = (wide.abs().amax(dim=-1, keepdim=True) / limit).float().clamp(min=_TINY)
    doubts.append(
        _Doubt(
            ~scales.isfinite().all(),
            lambda: True,
            f"a tensor of the shape {tuple(tensor.shape)} has a row with NaN, inf, or numbers that float32 cannot "
            "hold, for which there is no scale; choices: bf16, as computed, or, for logits, topk",
        )
    )
    scaled = wide / scales
    return ScaledRows((scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scales, DTYPES[tensor.dtype])


def _top_k(logits: torch.Tensor, encoding: TopK) -> TopKRows:
    """The k largest of logits `[..., classes]`."""
    classes = logits.shape[-1]
    shape = (*logits.shape[:-1], min(encoding.k, classes))
    dtype = torch.promote_types(logits.dtype, torch.float32) if encoding.temperature != 1 else logits.dtype
    rows = logits.reshape(-1, classes)
    values, indices = rows.new_empty(shape, dtype=dtype), rows.new_empty(shape, dtype=_index_dtype(classes))
    tail = rows.new_empty(shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32))
    into = (values.view(-1, shape[-1]), indices.view(-1, shape[-1]), tail.view(-1))
    at = 0
    for part in _parts(rows, classes) if rows.device.type == "cpu" else (rows,):
        scaled = _scaled(part, encoding.temperature)
        top, chosen = scaled.topk(shape[-1], dim=-1)
        others = scaled.scatter(-1, chosen, -torch.inf).logsumexp(dim=-1)
        for whole, found in zip(into, (top, chosen, others), strict=True):
            whole[at : at + len(part)] = found
        at += len(part)
    return TopKRows(values, indices, tail, classes, float(encoding.temperature))


def _sampled(logits: torch.Tensor, encoding: Sampled) -> SampledRows:
    """Draws from logits `[..., classes]`: the distinct classes of each row, their counts and log-probabilities."""
    if encoding.seed is None:
        raise ValueError("an encoding that draws has no seed; give one by seeded(encoding, seed)")
    classes, n = logits.shape[-1], encoding.n
    rows = logits.reshape(-1, classes)
    generator = torch.Generator(logits.device).manual_seed(encoding.seed)
    found = _Joined(len(rows))
    for part in _parts(rows, classes + n):
        found.add(_drawn(part, encoding, generator))
    indices, counts, log_probs = found.whole()
    shape = (*logits.shape[:-1], indices.shape[1])
    return SampledRows(
        indices.reshape(shape),
        counts.reshape(shape),
        log_probs.reshape(shape),
        n,
        classes,
        float(encoding.temperature),
    )


def _parts(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """The rows in parts that are processed one after another, with `width` numbers for each row.

    On the host the numbers are those of all rows at once: its generator draws one after another, and its kernels sum
    each row alone, but for a single row, which several threads sum. So no part has one row unless there is but one. An
    accelerator draws as many at a time as it always has, since its draws depend on that.
    """
    if rows.device.type != "cpu":
        return torch.split(rows, max(1, _DEVICE_ELEMENTS // width))
    count = -(-len(rows) // max(1, _HOST_ELEMENTS // width))
    return torch.tensor_split(rows, max(1, min(count, len(rows) // 2)))


def _drawn(
    logits: torch.Tensor, encoding: Sampled, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The classes, counts and log-probabilities of a part of the rows, `[rows, width]`, as they travel."""
    draws, norms = _draws(logits, encoding, generator)
    if not bool(norms.isfinite().all()):
        raise UnsupportedValueError(
            "a row of the logits holds NaN or inf, or nothing above -inf, so that nothing can be drawn from it; "
            "choices: topk, bf16, as computed, or at_positions, with a mask that leaves such rows out"
        )
    indices, counts = _distinct(draws)
    log_probs = (_scaled(logits.gather(1, indices.long()), encoding.temperature) - norms).masked_fill(counts == 0, 0.0)
    counted = torch.uint8 if encoding.n <= 255 else torch.uint16
    return indices.to(_index_dtype(logits.shape[1])), counts.to(counted), log_probs


class _Joined:
    """Tensors `[rows, width]` that come in parts of different widths, as one each, padded with 0.

    No part is kept: small ones between the temporary tensors would keep the allocator from giving those back.
    """

    def __init__(self, rows: int) -> None:
        self._rows, self._at, self._width = rows, 0, 0
        self._whole: list[torch.Tensor] = []

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Append the rows of each part to its tensor."""
        self._width = max(self._width, parts[0].shape[1])
        if not self._whole or self._whole[0].shape[1] < self._width:
            self._widen(parts)
        end = self._at + len(parts[0])
        for whole, part in zip(self._whole, parts, strict=True):
            whole[self._at : end, : part.shape[1]] = part
        self._at = end

    def _widen(self, parts: Sequence[torch.Tensor]) -> None:
        before, width = self._whole, self._width
        if before:
            width += width // 16  # so that it happens seldom
        self._whole = [part.new_zeros(self._rows, width) for part in parts]
        for whole, old in zip(self._whole, before, strict=False):
            whole[: self._at, : old.shape[1]] = old[: self._at]

    def whole(self) -> list[torch.Tensor]:
        """The tensors, each as wide as its widest part."""
        return [whole[:, : self._width].contiguous() for whole in self._whole]


def _draws(logits: torch.Tensor, encoding: Sampled, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes `[rows, n]` drawn from logits `[rows, classes]`, and the log-sum-exp `[rows, 1]`.

    In float64, and not by torch.multinomial, which sums in the dtype of the probabilities: in float32 a class with a
    probability below 3e-8, of which a vocabulary has many, adds nothing to a sum near 1 and would never be drawn.
    """
    scaled = _scaled(logits, encoding.temperature)
    norm = scaled.logsumexp(dim=-1, keepdim=True)
    cumulative = (scaled - norm).double().exp_().cumsum_(dim=1)
    shape = (len(logits), encoding.n)
    places = torch.rand(shape, dtype=torch.float64, device=logits.device, generator=generator)
    return torch.searchsorted(cumulative, places.mul_(cumulative[:, -1:]), right=True, out_int32=True), norm


def _distinct(draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct classes in each row of draws `[rows, n]`, and the count of each; both padded with 0."""
    ordered = draws.sort(dim=1).values
    starts = torch.ones_like(ordered)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = starts.cumsum(dim=1) - 1
    width = int(place.max()) + 1 if len(draws) else 0
    empty = ordered.new_zeros(len(draws), width)
    return empty.scatter(1, place, ordered), empty.scatter_add(1, place, torch.ones_like(ordered))


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = _widen(logits)
    return wide if temperature == 1 else wide / temperature


def _index_dtype(classes: int) -> torch.dtype:
    return torch.uint16 if classes <= 1 << 16 else torch.int32


def _needed(mask: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool or not mask.dim():
        came = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedValueError(f"the mask of the positions is {came}; a bool tensor [batch, length] is needed")
    return mask


def logits_of(value: Any) -> torch.Tensor:
    """The logits `[..., classes]` of a feature: the feature itself, or its field `logits`.

    Raises:
        UnsupportedValueError: if it has no logits.
    """
    record = record_of(value)
    logits = value if record is None else record.fields.get("logits")
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or not logits.dim():
        raise UnsupportedValueError(
            f"an encoding of logits was asked for, but the feature is a {type(value).__qualname__}, and neither it nor "
            "its `.logits` is a floating-point tensor [..., classes]; choices: tap the layer that returns the logits, "
            "such as 'lm_head', or ask for another encoding, such as bf16 or int8"
        )
    if not logits.shape[-1]:
        raise UnsupportedValueError(f"the logits have the shape {tuple(logits.shape)}, which has no classes")
    return logits


def hidden_states(value: Any, head: str) -> torch.Tensor:
    """The one floating-point tensor that the head was called with.

    Raises:
        UnsupportedValueError: if it was called with none, or with several.
    """
    given = [*value, *value.kwargs.values()] if isinstance(value, Arguments) else [value]
    states = [item for item in given if isinstance(item, torch.Tensor) and item.is_floating_point()]
    if len(states) != 1:
        raise UnsupportedValueError(
            f"the head {head!r} was called with {len(states)} floating-point tensors, but hidden states are a single "
            "tensor; choices: another head, or another encoding, such as topk, bf16 or int8"
        )
    return states[0]
