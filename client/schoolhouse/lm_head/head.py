"""A teacher's head: the frozen function from its hidden states to its logits."""

import json
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from schoolhouse_wire.memory import memory_of, version_of
from schoolhouse_wire.values.tensors import on_cpu

from schoolhouse.errors import CorruptPayloadError, FeatureMismatchError, ProtocolError
from schoolhouse.lm_head.operations import KINDS, Operation


class Head:
    """A chain of known operations with their weights. No gradient reaches it, and none goes through it.

    All weights have one dtype. Hidden states of another one, such as bfloat16 ones from a float32 teacher, are cast to
    it first; so the logits have the teacher's dtype and are its own to the rounding of the matmul.

    Args:
        operations: in their order; at least one is linear.

    Raises:
        ValueError: if one operation does not take what the one before it gives.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        self.hidden_size, self.classes = _widths(self.operations)
        self.dtype = _the_dtype(self.operations)
        self._family = _Family()
        self._copies: list[Head] = []  # that this one made
        self._versions = [version_of(weight) for weight in self._weights()]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, on one device."""
        return sum(weight.nbytes for weight in self._weights())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weights()[0].device

    @property
    def digest(self) -> str:
        """XXH3-128 over operations and weights, in hexadecimal: equal for equal heads on any device or host."""
        with self._family.lock:
            if not self._family.digest:
                self._family.digest = _digest(self.operations)
            return self._family.digest

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The teacher's logits [..., classes] of hidden states [..., hidden_size], on the device of these.

        Autocast does not change them, since it did not change the teacher's.

        Raises:
            FeatureMismatchError: if the weights, which may be a module's own, were written into since.
        """
        if hidden.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"hidden states are {tuple(hidden.shape)}; this head takes [..., {self.hidden_size}]")
        value = hidden.detach().to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for operation in self.to(hidden.device).operations:
                value = operation(value)
        return value

    def to(self, device: torch.device | str) -> "Head":
        """This head with its weights on a device. They are moved once, and kept there as long as this head is."""
        there = torch.empty(0, device=device).device  # which says the index of the current GPU
        if there == self.device:
            self._check_unchanged()
            return self
        family = self._family
        with family.lock:
            family.members.setdefault(self.device, self)
            found = family.members.get(there)
            if found is None:
                self._check_unchanged()
                found = family.members[there] = Head([operation.to(there) for operation in self.operations])
                found._family = family
                self._copies.append(found)
            return found

    def to_value(self) -> dict[str, Any]:
        """Dicts, lists, strings, floats and tensors, which the codec can carry."""
        return {
            "digest": self.digest,
            "operations": [
                {"kind": step.kind, "weights": dict(step.weights), "settings": dict(step.settings)}
                for step in self.operations
            ],
        }

    @classmethod
    def from_value(cls, value: Any) -> "Head":
        """The head that `to_value` described.

        Raises:
            ProtocolError: for another structure, or an operation that this version does not know.
            CorruptPayloadError: for weights and settings that make no head, or not the one of the digest.
        """
        fields = _fields(value, "a head", digest=str, operations=list)
        steps = [_fields(step, "an operation", kind=str, weights=dict, settings=dict) for step in fields["operations"]]
        for step in steps:
            if step["kind"] not in KINDS:
                raise ProtocolError(
                    f"a head with the operation {step['kind'][:80]!r} arrived; this version knows {', '.join(KINDS)}",
                    choices=tuple(KINDS),
                )
        try:
            head = cls([Operation(**step) for step in steps])
        except ValueError as err:
            raise CorruptPayloadError(f"weights and settings arrived that make no head: {err}") from err
        if head.digest != fields["digest"]:
            raise CorruptPayloadError(
                f"a head arrived whose digest is {head.digest} where {fields['digest'][:80]!r} was declared"
            )
        return head

    def _check_unchanged(self) -> None:
        if any(version_of(weight) != then for weight, then in zip(self._weights(), self._versions, strict=True)):
            raise FeatureMismatchError(
                "the weights of the teacher's head were written into after its hidden states were computed, of which "
                "they would make other logits: change a teacher after the loss of each batch that it was asked for"
            )

    def _weights(self) -> list[torch.Tensor]:
        return [weight for operation in self.operations for weight in operation.weights.values()]

    def __repr__(self) -> str:
        steps = " -> ".join(operation.kind for operation in self.operations)
        return f"Head({steps}, {self.hidden_size} to {self.classes}, {self.dtype}, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Head, (self.operations,))


class _Family:
    """What the copies of a head on several devices share. It keeps none of them: each keeps those that it made."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.digest = ""
        self.members: weakref.WeakValueDictionary[torch.device, Head] = weakref.WeakValueDictionary()


def _widths(operations: tuple[Operation, ...]) -> tuple[int, int]:
    """The sizes of the last dimension of the hidden states and of the logits."""
    if not any(operation.kind == "linear" for operation in operations):
        kinds = [operation.kind for operation in operations]
        raise ValueError(f"a head has at least one linear operation; these are {kinds}")
    weights = next(operation.weights for operation in operations if operation.weights)
    first = last = next(iter(weights.values())).shape[-1]
    for operation in operations:
        last = operation.width_after(last)
    return first, last


def _the_dtype(operations: tuple[Operation, ...]) -> torch.dtype:
    dtypes = list(dict.fromkeys(weight.dtype for step in operations for weight in step.weights.values()))
    if len(dtypes) > 1:
        raise ValueError(f"the weights of a head are of one dtype; these are of {', '.join(map(str, dtypes))}")
    return dtypes[0]


def _digest(operations: tuple[Operation, ...]) -> str:
    digest = xxhash.xxh3_128()
    for step in operations:
        shapes = [[name, str(weight.dtype), list(weight.shape)] for name, weight in sorted(step.weights.items())]
        digest.update(json.dumps([step.kind, shapes, sorted(step.settings.items())]).encode() + b"\0")
        for _, weight in sorted(step.weights.items()):
            plain = on_cpu(weight)  # named, since memory_of does not keep it alive
            digest.update(memory_of(plain))
    return digest.hexdigest()


def _fields(value: Any, what: str, **types: type) -> dict[str, Any]:
    found = dict(value) if isinstance(value, dict) else {}
    wrong = [name for name, kind in types.items() if not isinstance(found.get(name), kind)]
    if wrong or found.keys() != types.keys():
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
        raise ProtocolError(f"{what} arrived that is not a dict of {expected}")
    return found
