"""The operations that a head may consist of. They travel by name, so that no code of a teacher does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from schoolhouse_wire.values.tree import is_plain
from torch.nn import functional as F

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
CASTS = ("before", "after", "torch")


@dataclass(frozen=True, eq=False)
class Operation:
    """One step from hidden states to logits, made by one of the functions below.

    Raises:
        ValueError: for an unknown kind, or for missing, unknown or invalid weights and settings.
    """

    kind: str
    weights: Mapping[str, torch.Tensor]
    settings: Mapping[str, float | str]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not an operation of a head; choices: {', '.join(KINDS)}")
        kind = KINDS[self.kind]
        _check_names(self.kind, "weights", self.weights, kind.weights, kind.required)
        _check_names(self.kind, "settings", self.settings, kind.settings, tuple(kind.settings))
        for name, weight in self.weights.items():
            _check_weight(f"{self.kind}'s {name}", weight, kind.weights[name])
        for name, value in self.settings.items():
            kind.settings[name](f"{self.kind}'s {name}", value)
        if len({weight.shape[0] for weight in self.weights.values()}) > 1:
            sizes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
            raise ValueError(f"{self.kind}'s weights do not fit together: {sizes}")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return KINDS[self.kind].run(x, **self.weights, **self.settings)

    def width_after(self, width: int) -> int:
        """The size of the last dimension of the result, given that of the input."""
        if not self.weights:
            return width
        shape = next(iter(self.weights.values())).shape
        if shape[-1] != width:
            raise ValueError(f"{self.kind} takes {shape[-1]} values where {width} arrive")
        return shape[0]

    def to(self, device: torch.device) -> "Operation":
        """The same operation with its weights on a device."""
        return Operation(self.kind, {name: w.to(device) for name, w in self.weights.items()}, self.settings)


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Operation:
    """`x @ weight.T + bias`; weight [out, in], bias [out]."""
    return Operation("linear", _given(weight=weight, bias=bias), {})


def layer_norm(weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Operation:
    """Layer norm over the last dimension; weight [d], bias [d]."""
    return Operation("layer_norm", _given(weight=weight, bias=bias), {"eps": float(eps)})


def rms_norm(weight: torch.Tensor, eps: float, *, offset: float = 0.0, cast: str = "before") -> Operation:
    """RMS norm over the last dimension, in float32, times `offset + weight`; weight [d].

    `cast` says when the result is cast back to the input's dtype: "before" the product with the weight, as in Llama, or
    "after" it, as in Gemma, where the offset is 1. "torch" is `torch.nn.functional.rms_norm`.
    """
    return Operation("rms_norm", _given(weight=weight), {"eps": float(eps), "offset": float(offset), "cast": cast})


def scale(factor: float) -> Operation:
    """`x * factor`."""
    return Operation("scale", {}, {"factor": float(factor)})


def divide(divisor: float) -> Operation:
    """`x / divisor`, which differs in rounding from the product with the reciprocal."""
    return Operation("divide", {}, {"divisor": float(divisor)})


def softcap(cap: float) -> Operation:
    """`cap * tanh(x / cap)` (Gemma 2, arXiv 2408.00118)."""
    return Operation("softcap", {}, {"cap": float(cap)})


def activation(name: str) -> Operation:
    """The activation of that name in `ACTIVATIONS`."""
    return Operation("activation", {}, {"name": name})


def _given(**weights: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in weights.items() if weight is not None}


# How they compute.


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, *, eps: float
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float, cast: str) -> torch.Tensor:
    if cast == "torch":
        return F.rms_norm(x, x.shape[-1:], weight + offset if offset else weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "after":
        return (normed * (offset + weight.float() if offset else weight.float())).type_as(x)
    return (offset + weight if offset else weight) * normed.to(x.dtype)


def _scale(x: torch.Tensor, *, factor: float) -> torch.Tensor:
    return x * factor


def _divide(x: torch.Tensor, *, divisor: float) -> torch.Tensor:
    return x / divisor


def _softcap(x: torch.Tensor, *, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


def _activation(x: torch.Tensor, *, name: str) -> torch.Tensor:
    return ACTIVATIONS[name](x)


# What they take.


def _check_names(
    kind: str, what: str, given: Mapping[str, Any], known: Mapping[str, Any], required: tuple[str, ...]
) -> None:
    if not isinstance(given, Mapping) or not set(required) <= set(given) <= set(known):
        names = list(given) if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise ValueError(f"{kind} takes the {what} {list(known)}, and {list(required)} are required; got {names}")


def _check_weight(what: str, weight: Any, rank: int) -> None:
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{what} is a {type(weight).__name__}, not a tensor")
    if not is_plain(weight) or weight.layout is not torch.strided or weight.dtype not in DTYPES:
        raise ValueError(
            f"{what} is a {type(weight).__name__} of {weight.dtype} on {weight.device}; "
            f"only plain tensors with values can be part of a head, of the dtypes {', '.join(map(str, DTYPES))}"
        )
    if weight.dim() != rank or not weight.numel():
        raise ValueError(f"{what} has the shape {tuple(weight.shape)}; expected {rank} dimensions, none of them 0")


def _check_number(what: str, value: Any) -> None:
    if type(value) is not float or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}; expected a finite float")


def _check_not_zero(what: str, value: Any) -> None:
    _check_number(what, value)
    if value == 0:
        raise ValueError(f"{what} is 0; expected another number")


def _check_positive(what: str, value: Any) -> None:
    _check_number(what, value)
    if value <= 0:
        raise ValueError(f"{what} is {value}; expected more than 0")


def _check_eps(what: str, value: Any) -> None:
    _check_number(what, value)
    if value < 0:
        raise ValueError(f"{what} is {value}; expected 0 or more")


def _one_of(*choices: str) -> Callable[[str, Any], None]:
    def check(what: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{what} is {value!r}; choices: {', '.join(choices)}")

    return check


class _Kind(NamedTuple):
    run: Callable[..., torch.Tensor]
    weights: Mapping[str, int]  # the rank of each
    required: tuple[str, ...]
    settings: Mapping[str, Callable[[str, Any], None]]


KINDS: Mapping[str, _Kind] = {
    "linear": _Kind(F.linear, {"weight": 2, "bias": 1}, ("weight",), {}),
    "layer_norm": _Kind(_layer_norm, {"weight": 1, "bias": 1}, (), {"eps": _check_eps}),
    "rms_norm": _Kind(
        _rms_norm, {"weight": 1}, ("weight",), {"eps": _check_eps, "offset": _check_number, "cast": _one_of(*CASTS)}
    ),
    "scale": _Kind(_scale, {}, (), {"factor": _check_number}),
    "divide": _Kind(_divide, {}, (), {"divisor": _check_not_zero}),
    "softcap": _Kind(_softcap, {}, (), {"cap": _check_positive}),
    "activation": _Kind(_activation, {}, (), {"name": _one_of(*ACTIVATIONS)}),
}
