"""Encodings: how the features of a tap travel from the teacher to the student.

Without an encoding they travel as computed, without error. An encoding applies to floating-point tensors; everything
else in a feature travels as computed. Where an encoding does not give a whole tensor, losses receive one of the forms
of `schoolhouse.sparse`.
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
"""2 bytes per element; relative error at most 2**-8, or absolute 2**-134 for numbers below 2**-126. Arrives in the
dtype that the teacher computed."""

fp16: Encoding = Cast(dtype=torch.float16)
"""2 bytes per element; relative error at most 2**-11, or absolute 2**-25 for numbers below 2**-14. The teacher refuses
numbers beyond 65504 (`UnsupportedValueError`). Arrives in the dtype that the teacher computed."""

int8: Encoding = PerRow(dtype=torch.int8)
"""1 byte per element and 4 per row, which is the last dimension; absolute error at most 1/254 of the row's largest
magnitude, or 2**-127 in rows of numbers below 2**-119. The values are then rounded to the dtype that the teacher
computed, in which they arrive. The teacher refuses rows with NaN or inf (`UnsupportedValueError`)."""

fp8: Encoding = PerRow(dtype=torch.float8_e4m3fn)
"""1 byte per element and 4 per row, which is the last dimension; relative error at most 2**-4, or, for small numbers,
absolute error at most 2**-18 of the row's largest magnitude, or 2**-136 in rows of numbers below 2**-117. Otherwise
like `int8`."""


def _config_error(make: Callable[_P, _E], *args: _P.args, **kwargs: _P.kwargs) -> _E:
    try:
        return make(*args, **kwargs)
    except ValueError as err:
        raise ConfigError(str(err)) from err


def topk(k: int, temperature: float = 1.0) -> Encoding:
    """For logits: send the k largest of each row and the exact log-sum-exp of all the others.

    About 6 bytes for each of the k. A loss is computed over k + 1 classes, the last of which stands for all the others
    together. Its KL divergence is a true one, and a lower bound of the divergence over all classes: what is lost is how
    the others differ among themselves. The k values are exact. Give the temperature of the loss: logits that are cut
    off cannot be re-tempered.

    Raises:
        ConfigError: if k is below 1, or the temperature is not a finite number above 0.
    """
    return _config_error(TopK, k=k, temperature=temperature)


def sampled(n: int, temperature: float = 1.0, seed: int | None = None) -> Encoding:
    """For logits: send n draws with replacement from the teacher's distribution (arXiv 2503.16870).

    A loss is a mean over the draws: value and gradient are unbiased, with a standard error that falls as 1/sqrt(n).
    About 7 bytes for each distinct class.

    Args:
        n: draws per row, 1 to 65535.
        temperature: softens the distribution before the draws; give the temperature of the loss.
        seed: the same seed on the same logits gives the same draws; None takes a new one for each request.

    Raises:
        ConfigError: for an invalid n, temperature or seed.
    """
    return _config_error(Sampled, n=n, temperature=temperature, seed=seed)


def hidden(head: str = "lm_head", encoding: Encoding | None = None) -> Encoding:
    """For logits: send instead the hidden states from which the submodule `head` computes them.

    A row then takes as many numbers as the states are wide, not as there are classes. The client fetches the head once,
    which the server must allow (`serve(allow_head=True)`; in a pool file, `security: {allow_head: true}`), and computes
    the logits itself, a chunk of rows at a time. They are the teacher's own, up to the rounding of the device, if the
    states travel as computed. `encoding` may be `bf16`, `fp16`, `int8` or `fp8` for the states; their error then passes
    through the head.

    Where nothing else is asked for, the teacher does not run the head. By asking for this encoding you state that the
    values of a batch do not decide whether the head runs a second time. At the 1st, 2nd, 4th, 8th, ... request of one
    form of inputs the head runs all the same, and is compared with the teacher's own logits; a head that runs twice in
    one of these is not skipped any more.

    Raises:
        ConfigError: for an empty `head`, or an `encoding` that is not one of these.
    """
    return _config_error(Hidden, head=head, encoding=encoding)


def at_positions(encoding: Encoding | None = None) -> Encoding:
    """Send only the rows that a loss will read, in `encoding`: those where the batch's mask of positions is true.

    A loss that reads any other row raises an error. `functional.causal_positions` makes the mask that `CausalLMLoss`
    needs.

    Raises:
        ConfigError: if `encoding` is not an encoding.
    """
    if encoding is None:
        return Encoding(positions=True)
    if not isinstance(encoding, Encoding):
        raise ConfigError(
            f"encoding is {encoding!r}; choices: None (as computed), bf16, fp16, int8, fp8, topk(k), sampled(n), "
            "hidden(head)"
        )
    return dataclasses.replace(encoding, positions=True)
