"""How the features of a tap travel: what a user asks for. Without one they travel as computed, with no error.

Encodings apply to floating-point tensors; what else there is in a feature travels as computed. Losses get the forms of
`schoolhouse.sparse` where a form is not dense.
"""

import dataclasses
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from schoolhouse_wire.encodings import Cast, Encoding, Hidden, PerRow, Sampled, TopK

from schoolhouse.errors import ConfigError

__all__ = ["Encoding", "at_positions", "bf16", "fp8", "fp16", "hidden", "int8", "sampled", "topk"]

_P = ParamSpec("_P")
_E = TypeVar("_E", bound=Encoding)

bf16: Encoding = Cast(dtype=torch.bfloat16)
"""2 bytes an element; relative error at most 2**-8, or absolute 2**-134 for numbers below 2**-126. Arrives in the dtype
that the teacher computed."""

fp16: Encoding = Cast(dtype=torch.float16)
"""2 bytes an element; relative error at most 2**-11, or absolute 2**-25 for numbers below 2**-14. The teacher refuses
numbers beyond 65504 (`UnsupportedValueError`). Arrives in the dtype that the teacher computed."""

int8: Encoding = PerRow(dtype=torch.int8)
"""1 byte an element and 4 a row, the last dimension; absolute error at most 1/254 of the row's largest size, or 2**-127
in rows of numbers below 2**-119, before it is rounded to the dtype that the teacher computed, in which it arrives. The
teacher refuses rows with NaN or inf."""

fp8: Encoding = PerRow(dtype=torch.float8_e4m3fn)
"""1 byte an element and 4 a row, the last dimension; relative error at most 2**-4, or absolute 2**-18 of the row's
largest size for small numbers, or 2**-136 in rows of numbers below 2**-117. Otherwise like `int8`."""


def _config_error(make: Callable[_P, _E], *args: _P.args, **kwargs: _P.kwargs) -> _E:
    try:
        return make(*args, **kwargs)
    except ValueError as err:
        raise ConfigError(str(err)) from err


def topk(k: int, temperature: float = 1.0) -> Encoding:
    """Of logits: the k largest of each row and the exact log-sum-exp of all the others, about 6 bytes a class.

    A loss is computed over k + 1 classes, the last being all the others together. That KL divergence is a true one, and
    a lower bound of the one over all classes: what is lost is how the others differ among themselves. The numbers of
    the k are exact. The temperature is that of the loss: what is cut off can't be re-tempered.

    Raises:
        ConfigError: unless k is 1 or more, and the temperature above 0 and finite.
    """
    return _config_error(TopK, k=k, temperature=temperature)


def sampled(n: int, temperature: float = 1.0, seed: int | None = None) -> Encoding:
    """Of logits: n draws with replacement from the teacher's distribution at the temperature (arXiv 2503.16870).

    A loss is a mean over the draws: value and gradient are unbiased, with a standard error that falls as 1/sqrt(n).
    About 7 bytes for each distinct class. The temperature is that of the loss.

    Args:
        n: draws a row, 1 to 65535.
        temperature: softens the distribution that is drawn from.
        seed: the same seed on the same logits gives the same draws; None takes another one for each request.

    Raises:
        ConfigError: for other settings.
    """
    return _config_error(Sampled, n=n, temperature=temperature, seed=seed)


def hidden(head: str = "lm_head", encoding: Encoding | None = None) -> Encoding:
    """In place of logits, the hidden states that the submodule `head` makes them of: width, not classes, numbers a row.

    The client fetches the head once, which its server must allow (`serve(allow_head=True)`, in a pool's file `security:
    {allow_head: true}`), and computes the logits itself, a chunk of rows at a time: those of the teacher, up to the
    rounding of the device, if the states travel as computed. `encoding` is `bf16`, `fp16`, `int8` or `fp8` for
    the states; their error then passes through the head.

    Where nothing else is asked for, the teacher leaves the head out. Asking for this says that the values of a batch do
    not decide whether the head runs a second time. At the 1st, 2nd, 4th, 8th, ... request of one form of inputs it runs
    all the same, and is held against the teacher's own logits; one that runs twice then is not left out any more.

    Raises:
        ConfigError: for no head, or another encoding.
    """
    return _config_error(Hidden, head=head, encoding=encoding)


def at_positions(encoding: Encoding | None = None) -> Encoding:
    """Only the rows travel that the batch's mask of positions counts, in `encoding`: those that a loss will read.

    They are exactly those rows; a loss that counts others is refused. `functional.causal_positions` makes the mask
    that `CausalLMLoss` needs.

    Raises:
        ConfigError: for what is no encoding.
    """
    if encoding is None:
        return Encoding(positions=True)
    if not isinstance(encoding, Encoding):
        raise ConfigError(
            f"encoding is {encoding!r}; choices: None (as computed), bf16, fp16, int8, fp8, topk(k), sampled(n), "
            "hidden(head)"
        )
    return dataclasses.replace(encoding, positions=True)
