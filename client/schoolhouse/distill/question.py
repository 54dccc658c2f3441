"""The arguments with which the teacher is asked, taken from the student's call, and a copy of them for asking later."""

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

_LEGACY_CACHE = "past_key_values"  # the argument that older models fill with tuples of tensors, not with an object
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def without_cache(call: Arguments) -> Arguments:
    """The call without the student's key-value cache, which must be empty, since the teacher cannot use it.

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
    """Raise the error for a student that continues from its own cache, where the teacher cannot follow."""
    raise UnsupportedValueError(
        "the student was called with a key-value cache that holds its own states of earlier tokens, which the teacher "
        "does not have: generate and decode within only_student_forward(), or call the student with all tokens and no "
        "cache"
    )


def holds_tokens(call: Arguments) -> bool:
    """Whether the call holds a key-value cache with earlier tokens in it."""
    return any(map(_is_used, _caches(call)))


def _caches(call: Arguments) -> list[Any]:
    named = [value for name, value in call.kwargs.items() if _is_cache(name, value)]
    return [*named, *(value for value in call if _is_cache("", value))]


def _is_cache(name: str, value: Any) -> bool:
    known = _is_cache_class(type(value))  # type: ignore[arg-type]  # types are hashable
    return known or (name == _LEGACY_CACHE and value is not None)


@functools.lru_cache(maxsize=1024)
def _is_cache_class(kind: type) -> bool:
    """Whether a class is a cache of transformers, told by name, since importing transformers takes seconds."""
    return any(base.__module__.startswith("transformers.") and base.__name__.endswith("Cache") for base in kind.__mro__)


def _is_used(cache: Any) -> bool:
    if not hasattr(cache, "get_seq_length"):
        return bool(tensors_of(cache)) or not isinstance(cache, tuple | list)
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # a recurrent model's cache, which has states and no length
        return bool(cache.has_previous_state())


def without_labels(signature: inspect.Signature, call: Arguments) -> Arguments:
    """The call without `labels`, from which most models compute nothing but a loss.

    They stay if the forward needs them: if they have no default, or if the decoder's inputs are made from them.
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
    """A copy of the call as it is now; None if it holds an object that cannot be copied."""
    unknown: list[Any] = []
    structure_of(call, lambda _tensor: None, unknown.append)
    if not all(isinstance(value, torch.Tensor) for value in unknown):
        return None
    copied: Arguments = map_tensors(call, lambda tensor: tensor.detach().clone())
    return copied


def autocast_as_now() -> Callable[[], AbstractContextManager[None]]:
    """A function that makes, later, a context with the autocast settings of now."""
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
