"""What of a student's call the teacher is asked with, and a copy of that for a teacher that is asked later."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import map_tensors, structure_of, tensors_of

from schoolhouse.errors import UnsupportedValueError

_LEGACY_CACHE = "past_key_values"  # where it is a tuple of tensors and not an object
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def without_cache(call: Arguments) -> Arguments:
    """A call without the student's key-value cache, as long as nothing is in it: the teacher would need its own.

    Raises:
        UnsupportedValueError: for a cache that holds earlier tokens.
    """
    if not _caches(call):
        return call
    if holds_tokens(call):
        refuse_cache()
    kwargs = {name: value for name, value in call.kwargs.items() if not _is_cache(name, value)}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return Arguments([None if _is_cache("", value) else value for value in call], kwargs)


def refuse_cache() -> NoReturn:
    """Say that the teacher cannot follow a student which goes on from its own cache."""
    raise UnsupportedValueError(
        "the student was called with a key-value cache that holds earlier tokens, which are the student's own, and the "
        "teacher cannot follow them: generate and decode within only_student_forward(), or call the student with all "
        "tokens and no cache"
    )


def holds_tokens(call: Arguments) -> bool:
    """Whether there is a key-value cache in a call, with earlier tokens in it."""
    return any(map(_is_used, _caches(call)))


def _caches(call: Arguments) -> list[Any]:
    named = [value for name, value in call.kwargs.items() if _is_cache(name, value)]
    return [*named, *(value for value in call if _is_cache("", value))]


def _is_cache(name: str, value: Any) -> bool:
    known = _is_cache_class(type(value))  # type: ignore[arg-type]  # types are hashable
    return known or (name == _LEGACY_CACHE and value is not None)


@functools.lru_cache(maxsize=1024)
def _is_cache_class(kind: type) -> bool:
    """By name, since importing transformers takes seconds."""
    return any(base.__module__.startswith("transformers.") and base.__name__.endswith("Cache") for base in kind.__mro__)


def _is_used(cache: Any) -> bool:
    if not hasattr(cache, "get_seq_length"):
        return next(tensors_of(cache), None) is not None or not isinstance(cache, tuple | list)
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # it has states in place of tokens
        return bool(cache.has_previous_state())


def without_labels(signature: inspect.Signature, call: Arguments) -> Arguments:
    """A call without its `labels`, of which most models make no more than a loss.

    They stay where the forward needs them: where they have no default, or where it makes the decoder's inputs of them.
    """
    if "labels" not in call.kwargs:
        return call
    parameters = signature.parameters
    needed = "labels" in parameters and parameters["labels"].default is inspect.Parameter.empty
    given = any(call.kwargs.get(name) is not None for name in _DECODER_INPUTS)
    if needed or (_DECODER_INPUTS[0] in parameters and not given):
        return call
    return Arguments(call, {name: value for name, value in call.kwargs.items() if name != "labels"})


def copy_of(call: Arguments) -> Arguments | None:
    """A call with the values that it has now; None if it holds an object of which no copy can be made."""
    unknown: list[Any] = []
    structure_of(call, lambda _tensor: None, unknown.append)
    if not all(isinstance(value, torch.Tensor) for value in unknown):
        return None
    copied: Arguments = map_tensors(call, lambda tensor: tensor.detach().clone())
    return copied


def autocast_as_now() -> Callable[[], AbstractContextManager[None]]:
    """What makes, later, a context with the autocast of now."""
    return functools.partial(_autocast, _autocast_state())


def _autocast_state() -> list[tuple[str, bool, torch.dtype]]:
    kinds = ("cpu", "cuda")
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@contextlib.contextmanager
def _autocast(then: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for (kind, enabled, dtype), now in zip(then, _autocast_state(), strict=True):
            if (kind, enabled, dtype) != now:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield
