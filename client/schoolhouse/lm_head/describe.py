"""Describe a submodule of a model as a head, and check that the head computes the model's own logits."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from schoolhouse_wire.torch_private import original_of
from torch import nn

from schoolhouse.errors import UnsupportedValueError
from schoolhouse.lm_head.head import Head
from schoolhouse.lm_head.operations import (
    ACTIVATIONS,
    CASTS,
    DTYPES,
    Operation,
    activation,
    divide,
    layer_norm,
    linear,
    rms_norm,
    scale,
    softcap,
)
from schoolhouse.taps import check_modules, module_names

_TOLERANCES = dict(zip(DTYPES, (1e-9, 1e-4, 2e-2, 5e-3), strict=True))  # as fractions of the largest logit
_MAX_CHECKED_ROWS = 64
_CHUNK_ROWS = 16
_PROBE_ROWS = 8
_DESCRIBABLE = (
    "Linear",
    "LayerNorm and RMSNorm over the last dimension",
    *(f"{name} as a module" for name in ACTIVATIONS),
    "Dropout",
    "Identity",
    "modules that call these, and nothing else, in the order of their registration",
)


# What the model does.


@torch.no_grad()
def head_of(model: nn.Module, name: str, tap_module: str) -> Head:
    """The head of a model in eval mode: its submodule `name`, and what is done to the logits until `tap_module`.

    What is done to the logits is known for Hugging Face's models, whose config holds the scale and the soft-capping.
    The head refers to the model's own weights, which must not change while it is used. The submodule runs on a few
    random rows to check its description; what the model does outside it, `check_head` must check.

    Raises:
        UnknownTapError: if there is no such submodule.
        UnsupportedValueError: if the submodule is not a chain of known operations, or not within `tap_module`.
    """
    plain = original_of(model)
    check_modules((name, tap_module), module_names(plain), "the teacher")
    module, tapped = plain.get_submodule(name), plain.get_submodule(tap_module)
    if module is tapped:
        return _head_of(module, name)
    if tap_module and not name.startswith(f"{tap_module}."):
        raise UnsupportedValueError(
            f"the head {name!r} is not within {tap_module!r}, whose logits were asked for; tap {name!r}, or the whole "
            "model"
        )
    head = _head_of(module, name)
    return Head([*head.operations, *_afterwards(_config_of(plain, name, tap_module))])


def _head_of(module: nn.Module, name: str) -> Head:
    head = _described(module, name)
    hidden = _probe(_PROBE_ROWS, head.hidden_size).to(head.device, head.dtype)
    try:
        with torch.autocast(head.device.type, enabled=False):
            expected = module(hidden)
    except Exception as err:  # a module that expects other inputs may raise anything
        raise _refusal(module, name, f"it raised {type(err).__name__} on [rows, {head.hidden_size}]: {err}") from err
    if not isinstance(expected, torch.Tensor):
        raise _refusal(module, name, f"it returns a {type(expected).__name__}, not a tensor")
    head = _described(module, name)  # again: torch.nn.utils.weight_norm replaces the weight when the module runs
    if expected.shape != (_PROBE_ROWS, head.classes) or not _close(head.logits(hidden), expected):
        raise _refusal(module, name, f"it computes something else than its parts in their order, {head}")
    return head


def _described(module: nn.Module, name: str) -> Head:
    try:
        return Head(_operations_of(module, name))
    except ValueError as err:
        raise _refusal(module, name, str(err)) from err


def _refusal(module: nn.Module, name: str, why: str) -> UnsupportedValueError:
    linears = [
        f"{name}.{inner}" if name else inner
        for inner, child in module.named_modules()
        if inner and isinstance(child, nn.Linear)
    ]
    instead = f". Name the last linear layer within it as the head: {', '.join(linears)}" if linears else ""
    return UnsupportedValueError(
        f"{name!r}, a {type(module).__name__}, cannot be sent as a head: {why}. A head may consist of: "
        f"{', '.join(_DESCRIBABLE)}{instead}",
        choices=linears or _DESCRIBABLE,
    )


def _operations_of(module: nn.Module, name: str) -> list[Operation]:
    if isinstance(module, nn.Identity | nn.Dropout):
        return []
    if isinstance(module, nn.Linear):
        return [linear(module.weight, module.bias)]
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1:
        raise ValueError(f"{name!r} is over {len(module.normalized_shape)} dimensions")
    if isinstance(module, nn.LayerNorm):
        return [layer_norm(module.weight, module.bias, module.eps)]
    if children := dict(module.named_children()):
        return [step for inner, child in children.items() for step in _operations_of(child, f"{name}.{inner}")]
    tensors = [*module.parameters(), *module.buffers()]
    found = _rms_norm_of(module, tensors[0]) if len(tensors) == 1 else None if tensors else _activation_of(module)
    if found is None:
        raise ValueError(f"{name!r} is a {type(module).__name__}")
    return [found]


def _activation_of(module: nn.Module) -> Operation | None:
    """The activation that this module without weights computes, recognised by its results."""
    x = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    return _alike(module, map(activation, ACTIVATIONS), x)


def _rms_norm_of(module: nn.Module, weight: torch.Tensor) -> Operation | None:
    """The RMS norm that this module with one weight computes, recognised by its results.

    Libraries have hundreds of such classes, which differ in two things: whether 1 is added to the weight, and whether
    the result is rounded before it is multiplied.
    """
    found = [getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)]
    if found == [None] and isinstance(module, nn.RMSNorm):  # its default, which differs between kernels
        found = [torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32)]
    if weight.dim() != 1 or not found or not all(isinstance(eps, float) for eps in found):
        return None
    casts = ("torch",) if isinstance(module, nn.RMSNorm) else CASTS
    kinds = [rms_norm(weight, eps, offset=offset, cast=cast) for eps, cast, offset in product(found, casts, (0, 1))]
    return _alike(module, kinds, _probe(_PROBE_ROWS, len(weight)).to(weight))


def _alike(module: nn.Module, operations: Any, x: torch.Tensor) -> Operation | None:
    """The operation whose results on `x` are nearest to the module's, if they are equal up to rounding."""
    try:
        expected = module(x)
    except Exception:  # a module that expects other inputs may raise anything
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    nearest: Operation = min(operations, key=lambda operation: _difference(operation(x), expected))
    return nearest if _close(nearest(x), expected) else None


def _probe(rows: int, width: int) -> torch.Tensor:
    """The same random numbers each time, from a generator of its own."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


# What Hugging Face's models do after their head.


def _config_of(model: nn.Module, name: str, tap_module: str) -> Any:
    """The config of the innermost module that has one, from the tapped module down to the head's parent."""
    config: Any = None
    inner = tap_module
    for step in name.removeprefix(tap_module).strip(".").split("."):
        config = getattr(model.get_submodule(inner), "config", config)
        inner = f"{inner}.{step}".strip(".")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _afterwards(config: Any) -> Iterator[Operation]:
    multiplies = str(getattr(config, "model_type", "")).startswith("hyperclovax")  # other models divide
    settings: list[tuple[str, Callable[[float], Operation]]] = [
        ("logit_scale", scale),  # Cohere
        ("logits_scaling", scale if multiplies else divide),  # Granite
        ("final_logit_softcapping", softcap),  # Gemma
        ("logits_soft_cap", softcap),  # RecurrentGemma
    ]
    for name, operation in settings:
        value = getattr(config, name, None)
        if isinstance(value, float | int) and value:
            yield operation(value)


# Whether the head computes the model's logits.


@torch.no_grad()
def check_head(head: Head, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that the head computes the model's own `logits` [..., classes] from `hidden` [..., d].

    It compares at most 64 rows, evenly spread. Where the model's logits are NaN or infinite, the head's must be too.

    Raises:
        UnsupportedValueError: if they differ by more than rounding.
    """
    expected = (*hidden.shape[:-1], head.classes)
    if hidden.shape[-1:] != (head.hidden_size,) or logits.shape != expected or logits.dtype != head.dtype:
        raise UnsupportedValueError(
            f"the head takes [..., {head.hidden_size}] and gives [..., {head.classes}] of {head.dtype}; it received "
            f"{tuple(hidden.shape)}, and the model's logits are {tuple(logits.shape)} of {logits.dtype}. The model may "
            "slice the positions (logits_to_keep), or cast its logits; tap the head itself instead. Under autocast, "
            "load the teacher in the dtype of the autocast"
        )
    if not logits.numel():
        return
    rows = _some_rows(hidden.numel() // head.hidden_size).to(hidden.device)
    some_hidden, some_logits = hidden.reshape(-1, head.hidden_size)[rows], logits.reshape(-1, head.classes)[rows]
    pairs = zip(torch.split(some_hidden, _CHUNK_ROWS), torch.split(some_logits, _CHUNK_ROWS), strict=True)
    difference = max(_difference(head.logits(mine), own) for mine, own in pairs)
    largest, tolerance = _magnitude(some_logits), _TOLERANCES[logits.dtype]
    if difference > tolerance * largest:
        raise UnsupportedValueError(
            f"{head} does not compute this teacher's logits: the largest difference is {difference:.3g}, logits are up "
            f"to {largest:.3g}, and {tolerance:g} of that is allowed for rounding. The model may apply soft-capping, a "
            "scale, a bias or a mask after its head, or slice the positions (logits_to_keep); tap the head itself "
            "instead, or ask for another encoding. Under autocast, load the teacher in the dtype of the autocast"
        )


def _some_rows(count: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, _MAX_CHECKED_ROWS), dtype=torch.float64).round().long()


def _close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = _TOLERANCES.get(expected.dtype, 0.0)
    return values.dtype == expected.dtype and _difference(values, expected) <= tolerance * _magnitude(expected)


def _difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference; infinity if somewhere only one of the two is NaN or infinite."""
    mine, own = values.double(), expected.double()
    same = (mine == own) | (mine.isnan() & own.isnan())
    return (mine - own).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf).amax().item()


def _magnitude(values: torch.Tensor) -> float:
    """The largest finite absolute value."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax().item()
