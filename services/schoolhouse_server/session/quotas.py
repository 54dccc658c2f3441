"""How jobs share a teacher: how much each may have in flight, and how long a client may be silent."""

from dataclasses import dataclass, replace

from schoolhouse_wire.errors import ConfigError

COSTS = ("rows", "tokens")  # `common/rows.py` counts them
CACHE_SCOPES = ("auto", "job", "teacher")
MAX_IN_FLIGHT, MAX_JOB_BYTES, MAX_QUEUED, LEASE_S = 64, 2 << 30, 4096, 30.0
MAX_UNSENT_BYTES, MAX_JOB_UNSENT_BYTES = 16 << 30, 4 << 30  # a reply has 2 GiB at most
MAX_LEASE_S = 86_400.0
MAX_REQUEST_TOKENS = 262_144  # where there are tokens
MAX_SESSIONS, MOST_SESSIONS = 1000, 65_536  # the default, and the largest allowed


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The settings of sharing; `serve` documents them.

    Raises:
        ConfigError: for an invalid setting; the message names it and the choices.
    """

    cost: str = "rows"
    max_in_flight: int = MAX_IN_FLIGHT
    max_job_bytes: int = MAX_JOB_BYTES
    max_queued: int = MAX_QUEUED
    max_unsent_bytes: int = MAX_UNSENT_BYTES
    max_job_unsent_bytes: int = MAX_JOB_UNSENT_BYTES
    lease_s: float = LEASE_S
    max_sessions: int = MAX_SESSIONS
    cache_scope: str = "auto"
    max_request_tokens: int | None = None

    def within(self, max_in_flight: int | None, max_job_bytes: int | None) -> "Sharing":
        """These settings, with a job's bounds lowered to the given ones; None leaves a bound as it is."""
        return replace(
            self,
            max_in_flight=min(self.max_in_flight, max_in_flight or self.max_in_flight),
            max_job_bytes=min(self.max_job_bytes, max_job_bytes or self.max_job_bytes),
        )

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise ConfigError(f"cost is {self.cost!r}; choices: {', '.join(map(repr, COSTS))}")
        if self.cache_scope not in CACHE_SCOPES:
            raise ConfigError(f"cache_scope is {self.cache_scope!r}; choices: {', '.join(map(repr, CACHE_SCOPES))}")
        counts = ("max_in_flight", "max_job_bytes", "max_queued", "max_sessions")
        for name in (*counts, "max_unsent_bytes", "max_job_unsent_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        most = self.max_request_tokens
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ConfigError(f"max_request_tokens is {most!r}; it must be a whole number from 1, or None")
        if self.max_sessions > MOST_SESSIONS:
            raise ConfigError(f"max_sessions is {self.max_sessions}; it must be at most {MOST_SESSIONS}")
        if not isinstance(self.lease_s, int | float) or not 0 <= self.lease_s <= MAX_LEASE_S:
            raise ConfigError(
                f"lease_s is {self.lease_s!r}; it must be seconds up to {MAX_LEASE_S:.0f}, or 0 for no limit"
            )
