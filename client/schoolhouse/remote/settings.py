"""The settings of a connection to a teacher, checked once."""

from dataclasses import dataclass, field
from pathlib import Path

from schoolhouse_wire.limits import MAX_JOB_NAME
from schoolhouse_wire.rpc.security import ClientSecurity

from schoolhouse.errors import ConfigError

_WEIGHTS = (0.01, 100)
_MAX_SETTING = 1e6  # about 12 days in seconds; locks and clocks refuse a much longer wait


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `connect`, which documents them.

    Raises:
        ConfigError: for an invalid setting; the message names it and the choices.
    """

    job: str = ""
    weight: float = 1.0
    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    max_pending: int = 1024
    shared_memory: bool = True
    checksums: bool = False
    tune_allocator: bool = True
    head_folder: str | Path | None = None
    teacher_timeout_s: float | None = None
    attempt_timeout_s: float | None = None
    zone: str = ""
    revision: str = ""
    follow_revisions: bool = False
    tracing: bool = False
    verify_every: int = 0
    verify_tolerance: float = 0.0
    security: ClientSecurity = field(default_factory=ClientSecurity)

    def __post_init__(self) -> None:
        for name in ("job", "zone", "revision"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a string")
        if len(self.job) > MAX_JOB_NAME:
            raise ConfigError(f"job has {len(self.job)} characters; {MAX_JOB_NAME} are allowed")
        if not isinstance(self.weight, int | float) or not _WEIGHTS[0] <= self.weight <= _WEIGHTS[1]:
            raise ConfigError(f"weight is {self.weight!r}; it must be a number from {_WEIGHTS[0]} to {_WEIGHTS[1]}")
        for name in ("shared_memory", "checksums", "tune_allocator", "follow_revisions", "tracing"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choices: True, False")
        if not isinstance(self.security, ClientSecurity):
            raise ConfigError(f"security is of type {type(self.security).__name__}; it must be a ClientSecurity")
        if not isinstance(self.head_folder, str | Path | None):
            raise ConfigError(f"head_folder is {self.head_folder!r}; it must be a path, or None")
        if self.revision and self.follow_revisions:
            raise ConfigError(
                f"revision is {self.revision!r} and follow_revisions is True; choices: give one of the two"
            )
        self._check_verifying()
        for name in ("timeout_s", "connect_timeout_s", "max_pending"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= _MAX_SETTING:
                raise ConfigError(f"{name} is {value!r}; it must be a number above 0 and at most {_MAX_SETTING:.0e}")
        for name in ("teacher_timeout_s", "attempt_timeout_s"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not 0 < value <= _MAX_SETTING):
                raise ConfigError(
                    f"{name} is {value!r}; it must be None, or a number above 0 and at most {_MAX_SETTING:.0e}"
                )

    @property
    def wait_s(self) -> float:
        """How long a request may wait while no replica can take it."""
        return self.timeout_s if self.teacher_timeout_s is None else self.teacher_timeout_s

    @property
    def patience_s(self) -> float:
        """How long a replica that has requests may send nothing before it is left for another one."""
        return self.timeout_s / 3 if self.attempt_timeout_s is None else self.attempt_timeout_s

    def _check_verifying(self) -> None:
        every, tolerance = self.verify_every, self.verify_tolerance
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ConfigError(
                f"verify_every is {every!r}; it must be a whole number: one request in that many is verified, 0: none"
            )
        if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
            raise ConfigError(f"verify_tolerance is {tolerance!r}; it must be a number from 0 to below 1")
        if tolerance and not every:
            raise ConfigError(f"verify_tolerance is {tolerance!r}, but verify_every is 0; give verify_every too")
