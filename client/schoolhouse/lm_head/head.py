"""A teacher's head: the frozen function from its hidden states to its logits."""

import json
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.torch_private import version_of
from schoolhouse_wire.values.tensors import on_cpu

from schoolhouse.errors import CorruptPayloadError, FeatureMismatchError, ProtocolError
from schoolhouse.lm_head.operations import KINDS, Operation


class Head:
    """A chain of known operations with their weights. No gradient flows into or through it.

    All weights have one dtype, to which hidden states of another dtype, such as bfloat16 from a float32 teacher, are
    cast first. So the logits have the teacher's dtype, and equal the teacher's up to the rounding of the matmul.

    Args:
        operations: the steps in order; at least one is linear.

    Raises:
        ValueError: if an operation does not fit the one before it, if none is linear, or if dtypes differ.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        self.hidden_size, self.classes = _widths(self.operations)
        self.dtype = _the_dtype(self.operations)
        self._family = _Family()
        self._copies: list[Head] = []  # copies on other devices that this one made
        self._versions = [version_of(weight) for weight in self._weights()]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, on one device."""
        return sum(weight.nbytes for weight in self._weights())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
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
        """The teacher's logits [..., classes] of hidden states [..., hidden_size], on the device of the states.

        Autocast is off, since the student's did not apply to the teacher.

        Raises:
            FeatureMismatchError: if the weights, which may be a module's own, were changed since the head was made.
        """
        if hidden.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"hidden states are {tuple(hidden.shape)}; this head takes [..., {self.hidden_size}]")
        value = hidden.detach().to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for operation in self.to(hidden.device).operations:
                value = operation(value)
        return value

    def to(self, device: torch.device | str) -> "Head":
        """This head with its weights on a device. They are copied once, and stay there as long as this head lives."""
        there = torch.empty(0, device=device).device  # with the index of the current GPU if `device` has none
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
        """The head as dicts, lists, strings, floats and tensors, which can travel."""
        return {
            "digest": self.digest,
            "operations": [
                {"kind": step.kind, "weights": dict(step.weights), "settings": dict(step.settings)}
                for step in self.operations
            ],
        }

    @classmethod
    def from_value(cls, value: Any) -> "Head":
        """The head from the result of `to_value`.

        Raises:
            ProtocolError: for another structure, or an operation that this version does not know.
            CorruptPayloadError: if weights and settings do not make a head, or one with another digest.
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
            raise CorruptPayloadError(f"weights and settings arrived that do not make a head: {err}") from err
        if head.digest != fields["digest"]:
            raise CorruptPayloadError(
                f"a head arrived whose digest is {head.digest}, but {fields['digest'][:80]!r} was declared"
            )
        return head

    def _check_unchanged(self) -> None:
        if any(version_of(weight) != then for weight, then in zip(self._weights(), self._versions, strict=True)):
            raise FeatureMismatchError(
                "the weights of the teacher's head were written into after its hidden states were computed, so that "
                "the logits would be wrong: change a teacher only after the losses of all batches it was asked for"
            )

    def _weights(self) -> list[torch.Tensor]:
        return [weight for operation in self.operations for weight in operation.weights.values()]

    def __repr__(self) -> str:
        steps = " -> ".join(operation.kind for operation in self.operations)
        return f"Head({steps}, {self.hidden_size} to {self.classes}, {self.dtype}, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Head, (self.operations,))


class _Family:
    """What the copies of a head on several devices share. It keeps no copy alive: each head keeps those it made."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.digest = ""
        self.members: weakref.WeakValueDictionary[torch.device, Head] = weakref.WeakValueDictionary()


def _widths(operations: tuple[Operation, ...]) -> tuple[int, int]:
    """The sizes of the last dimension of the hidden states and of the logits."""
    if not any(operation.kind == "linear" for operation in operations):
        kinds = [operation.kind for operation in operations]
        raise ValueError(f"a head needs at least one linear operation; these are {kinds}")
    weights = next(operation.weights for operation in operations if operation.weights)
    first = last = next(iter(weights.values())).shape[-1]
    for operation in operations:
        last = operation.width_after(last)
    return first, last


def _the_dtype(operations: tuple[Operation, ...]) -> torch.dtype:
    dtypes = list(dict.fromkeys(weight.dtype for step in operations for weight in step.weights.values()))
    if len(dtypes) > 1:
        raise ValueError(f"the weights of a head must have one dtype; these have {', '.join(map(str, dtypes))}")
    return dtypes[0]


def _digest(operations: tuple[Operation, ...]) -> str:
    digest = xxhash.xxh3_128()
    for step in operations:
        shapes = [[name, str(weight.dtype), list(weight.shape)] for name, weight in sorted(step.weights.items())]
        digest.update(json.dumps([step.kind, shapes, sorted(step.settings.items())]).encode() + b"\0")
        for _, weight in sorted(step.weights.items()):
            plain = on_cpu(weight)  # held by a name, since memory_of does not keep it alive
            digest.update(memory_of(plain))
    return digest.hexdigest()


def _fields(value: Any, what: str, **types: type) -> dict[str, Any]:
    found = dict(value) if isinstance(value, dict) else {}
    wrong = [name for name, kind in types.items() if not isinstance(found.get(name), kind)]
    if wrong or found.keys() != types.keys():
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
        raise ProtocolError(f"{what} arrived that is not a dict of {expected}")
    return found
