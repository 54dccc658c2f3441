"""How jobs share a teacher: what a request costs, how much may be in flight, and how long silence is taken for life."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from schoolhouse.errors import ConfigError
from schoolhouse.taps import tensors_of

MAX_IN_FLIGHT, MAX_JOB_BYTES, MAX_QUEUED, LEASE_S = 64, 2 << 30, 4096, 30.0
MAX_UNSENT_BYTES, MAX_JOB_UNSENT_BYTES = 16 << 30, 4 << 30  # a reply has 2 GiB at most
MAX_LEASE_S = 86_400.0
MAX_SESSIONS, MOST_SESSIONS = 128, 1024  # unless said, and at most: each has threads of its own


def rows_of(inputs: Any) -> int:
    """The first dimension of the first tensor; 1 if it has none."""
    first = _first(inputs, 1)
    return max(first.shape[0], 1) if first is not None else 1


def tokens_of(inputs: Any) -> int:
    """Batch times length of the first tensor that has both; rows where none has."""
    first = _first(inputs, 2)
    return max(first.shape[0] * first.shape[1], 1) if first is not None else rows_of(inputs)


def _first(inputs: Any, dims: int) -> torch.Tensor | None:
    """The first tensor that has as many dimensions; in the usual case, without a walk through all of them."""
    if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].dim() >= dims:
        return inputs[0]
    return next((tensor for tensor in tensors_of(inputs) if tensor.dim() >= dims), None)


COSTS: dict[str, Callable[[Any], int]] = {"rows": rows_of, "tokens": tokens_of}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Settings; see `serve`.

    Raises:
        ConfigError: for what is none; the message names it and the choices.
    """

    cost: str = "rows"
    max_in_flight: int = MAX_IN_FLIGHT
    max_job_bytes: int = MAX_JOB_BYTES
    max_queued: int = MAX_QUEUED
    max_unsent_bytes: int = MAX_UNSENT_BYTES
    max_job_unsent_bytes: int = MAX_JOB_UNSENT_BYTES
    lease_s: float = LEASE_S
    max_sessions: int = MAX_SESSIONS

    def within(self, max_in_flight: int | None, max_job_bytes: int | None) -> "Sharing":
        """The same with these bounds of a job, where they are lower."""
        return replace(
            self,
            max_in_flight=min(self.max_in_flight, max_in_flight or self.max_in_flight),
            max_job_bytes=min(self.max_job_bytes, max_job_bytes or self.max_job_bytes),
        )

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise ConfigError(f"cost is {self.cost!r}; choices: {', '.join(map(repr, COSTS))}")
        counts = ("max_in_flight", "max_job_bytes", "max_queued", "max_sessions")
        for name in (*counts, "max_unsent_bytes", "max_job_unsent_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        if self.max_sessions > MOST_SESSIONS:
            raise ConfigError(f"max_sessions is {self.max_sessions}; it must be at most {MOST_SESSIONS}")
        if not isinstance(self.lease_s, int | float) or not 0 <= self.lease_s <= MAX_LEASE_S:
            raise ConfigError(
                f"lease_s is {self.lease_s!r}; it must be seconds up to {MAX_LEASE_S:.0f}, or 0 for a lease without end"
            )
