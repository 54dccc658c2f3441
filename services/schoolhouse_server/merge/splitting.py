"""Splits the features of a merged forward by request, by rules that are learned from single forwards and checked."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import xxhash
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.values.tensors import bytes_of, on_cpu
from schoolhouse_wire.values.tree import is_plain, map_tensors, structure_of, tensors_of

from schoolhouse_server.merge.batching import Layout

# How far a merged number may be from that of a single forward, relative to the number itself or to what is usual beside
# it: other shapes use other kernels, which sum in another order. A larger difference means that rows were mixed, that
# numbers were drawn at random, or that the rest of the batch had a say. Numbers are compared one by one, as LLMs have a
# few that are a thousand times the others.
TOLERANCES = {torch.float64: 6e-9, torch.float32: 6e-4, torch.bfloat16: 0.12, torch.float16: 3e-2}
TOLERANCES |= {torch.complex128: 6e-9, torch.complex64: 6e-4}
_TF32_TOLERANCE = 3e-2
_CUT = -1


class UnmergeableError(Exception):
    """Requests cannot be answered from one forward; the message says why.

    Never leaves the server.
    """


class VaryingError(UnmergeableError):
    """Sizes of a feature depend on the values of the inputs, so that equal sizes are a coincidence."""


@dataclass(frozen=True)
class Rows:
    """The rule for a tensor with `times` rows for each row of the inputs; other sizes may be the inputs' length."""

    times: int
    sizes: tuple[int, ...]  # of the dimensions after the first; _CUT for the inputs' length
    dtype: torch.dtype
    doubtful: bool = field(default=False, compare=False)  # whether its rows may be as many by chance

    def check(self, tensor: torch.Tensor, layout: Layout) -> None:
        """Raise VaryingError for a tensor of other sizes."""
        sizes = tuple(layout.length if size == _CUT else size for size in self.sizes)
        if tensor.shape != (self.times * layout.total, *sizes) or tensor.dtype != self.dtype:
            raise VaryingError(f"a feature has the shape {tuple(tensor.shape)}, and other sizes than it had before")

    def part(self, tensor: torch.Tensor, layout: Layout, i: int) -> torch.Tensor:
        """The part of request `i`, as a view."""
        found = tensor.narrow(0, self.times * layout.starts[i], self.times * layout.rows[i])
        for dim, size in enumerate(self.sizes, 1):
            if size == _CUT:
                found = found.narrow(dim, 0, layout.lengths[i])
        return found

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of all rows, from the tensors of some rows each."""
        return torch.cat([*parts])


@dataclass(frozen=True)
class Constant:
    """The rule for a tensor that is the same for all inputs."""

    digest: bytes
    doubtful = False

    def check(self, tensor: torch.Tensor, _layout: Layout) -> None:
        """Raise UnmergeableError for another tensor."""
        if _digest(tensor) != self.digest:
            raise UnmergeableError("a feature that did not depend on the inputs has changed")

    def part(self, tensor: torch.Tensor, _layout: Layout, _i: int) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The first of the equal parts."""
        return parts[0]


Rule: TypeAlias = Rows | Constant


@dataclass(frozen=True)
class Rules:
    """How the features of one tap are split."""

    structure: Hashable
    leaves: tuple[Rule, ...]

    @property
    def doubtful(self) -> bool:
        """Whether one or two batches are too few to tell whether sizes are equal by chance."""
        return any(rule.doubtful for rule in self.leaves)

    def agree(self, before: "Rules") -> None:
        """Raise VaryingError if tensors have other sizes than such batches gave before."""
        pairs = zip(self.leaves, before.leaves, strict=True) if self.structure == before.structure else ()
        for rule, old in pairs:
            if rule != old and not (isinstance(rule, Constant) and isinstance(old, Constant)):
                raise VaryingError("a feature does not have the sizes, by rows, that it had before")

    def check(self, value: Any, layout: Layout) -> None:
        """Raise UnmergeableError if a merged feature differs in kind from when these rules were learned."""
        if _structure(value) != self.structure:
            raise UnmergeableError("a feature has another structure than before")
        for rule, tensor in zip(self.leaves, tensors_of(value), strict=True):
            rule.check(tensor, layout)

    def part(self, value: Any, layout: Layout, i: int, seen: dict[int, torch.Tensor]) -> Any:
        """The feature of request `i`, as views; `seen` holds the request's views so far, by the id of the tensor."""
        rules = iter(self.leaves)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            made = next(rules).part(tensor, layout, i)
            return seen.setdefault(id(tensor), made)

        return map_tensors(value, cut)


def learn(merged: Any, singles: Sequence[Any], layout: Layout) -> Rules:
    """Learn how to split a merged feature so that each request gets what a single forward gives it.

    Raises:
        UnmergeableError: if it cannot be split, or the numbers differ.
    """
    structure = _structure(merged)
    if any(_structure(single) != structure for single in singles):
        raise UnmergeableError("a merged forward returns another structure than a single one")
    leaves = zip(tensors_of(merged), *map(tensors_of, singles), strict=True)
    return Rules(structure, tuple(_rule(leaf[0], leaf[1:], layout) for leaf in leaves))


def _rule(merged: torch.Tensor, singles: Sequence[torch.Tensor], layout: Layout) -> Rule:
    if not all(is_plain(t) and t.layout is torch.strided for t in (merged, *singles)):
        raise UnmergeableError("a feature holds a tensor that is not dense")
    if any(t.dtype != merged.dtype or t.dim() != merged.dim() for t in singles):
        raise UnmergeableError("a merged forward returns another dtype, or number of dimensions, than a single one")
    times = merged.shape[0] // layout.total if merged.dim() else 0
    sizes = [times * rows for rows in layout.rows]
    if times and merged.shape[0] == times * layout.total and sizes == [single.shape[0] for single in singles]:
        dims = range(1, merged.dim())
        after = tuple(_size(merged, singles, dim, layout) for dim in dims)
        rule = Rows(times, after, merged.dtype, _is_doubtful(merged, times, layout))
        _compare(rule, merged, singles, layout)
        return rule
    digest = _digest(merged)
    if any(single.shape != merged.shape or _digest(single) != digest for single in singles):
        shapes = [tuple(t.shape) for t in (merged, *singles)]
        raise UnmergeableError(f"a feature has no rows of its own for each request; merged, and single: {shapes}")
    return Constant(digest)


def _is_doubtful(merged: torch.Tensor, times: int, layout: Layout) -> bool:
    """Whether what are taken for rows of the requests may be tokens or boxes, of which there are as many by chance."""
    return times > 1 or max(layout.rows) == 1 or (merged.dim() < 3 and layout.length > 1)


def _size(merged: torch.Tensor, singles: Sequence[torch.Tensor], dim: int, layout: Layout) -> int:
    sizes = tuple(single.shape[dim] for single in singles)
    if set(sizes) == {merged.shape[dim]}:
        return merged.shape[dim]
    if layout.ragged and sizes == layout.lengths and merged.shape[dim] == layout.length:
        return _CUT
    raise UnmergeableError(f"dimension {dim} has the size {merged.shape[dim]}, and in single forwards {sizes}")


def _compare(rule: Rows, merged: torch.Tensor, singles: Sequence[torch.Tensor], layout: Layout) -> None:
    """Raise UnmergeableError if a request's part differs from its single forward by more than rounding."""
    for i, single in enumerate(singles):
        _check_close(rule.part(merged, layout, i), single, _tolerance(merged))


def _tolerance(tensor: torch.Tensor) -> float:
    """The relative difference that rounding may cause; 0 for what is not floating point, which must be equal."""
    tf32 = tensor.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    if tensor.dtype in (torch.float32, torch.complex64) and tf32:
        return _TF32_TOLERANCE
    return TOLERANCES.get(tensor.dtype, 0.0)


def _check_close(part: torch.Tensor, single: torch.Tensor, tolerance: float) -> None:
    if single.is_complex():
        part, single = torch.view_as_real(part.resolve_conj()), torch.view_as_real(single.resolve_conj())
    if not single.is_floating_point():
        if not torch.equal(part, single):
            raise UnmergeableError("a merged feature differs from the single one, although it holds whole numbers")
        return
    if not single.numel():
        return
    wide = torch.promote_types(single.dtype, torch.float32)
    mine, own = part.to(wide), single.to(wide)
    same = (mine == own) | (mine.isnan() & own.isnan())
    difference = (mine - own).abs_().masked_fill_(same, 0.0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    size = own.abs().nan_to_num_(nan=0.0, posinf=0.0)
    for dims in {(single.dim() - 1,), tuple(range(single.dim() - 1)), tuple(range(single.dim()))}:
        size = torch.maximum(size, _usual(own, dims))
    excess = difference - tolerance * size
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        by, number, usual = (tensor.flatten()[worst].item() for tensor in (difference, own, size))
        raise UnmergeableError(
            f"a merged feature differs from the single one by {by:.3g}, at a number of {number:.3g} where {usual:.3g} "
            f"is usual; rounding may explain {tolerance:g} of that"
        )


def _usual(own: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The usual size of numbers other than 0 over these dimensions, by a mean in which a few large ones weigh little.

    For example, of 64 numbers of which one is a thousand times the others, it is less than twice that of the others.
    """
    size = own.abs().nan_to_num_(nan=0.0, posinf=0.0)
    count = (size > 0).sum(dims, keepdim=True).clamp_(min=1)
    return size.sqrt_().sum(dims, keepdim=True).div_(count).square_()


def _structure(value: Any) -> Hashable:
    """Equal for values that differ only in their tensors, and in other objects of one type."""
    return structure_of(value, lambda _tensor: "tensor", type)


def _digest(tensor: torch.Tensor) -> bytes:
    plain = on_cpu(tensor)
    digest = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    raw = bytes_of(plain)  # named, since memory_of does not keep it alive
    digest.update(memory_of(raw))
    return digest.digest()


def unshared(value: Any) -> Any:
    """A nested value whose tensors own their memory, so that one request keeps no other's features alive."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the originals, so that ids stay unique
    return map_tensors(value, lambda tensor: copies.setdefault(id(tensor), (tensor, _own(tensor)))[1])


def _own(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()
