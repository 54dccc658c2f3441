"""Settings of a connection, checked once."""

from dataclasses import dataclass
from pathlib import Path

from schoolhouse.errors import ConfigError

_MAX_SETTING = 1e6  # about 12 days, in seconds; beyond what clocks and locks take, a wait fails at once


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `connect` says of them.

    Raises:
        ConfigError: for what is none; the message names it and the choices.
    """

    job: str = ""
    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    max_pending: int = 1024
    shared_memory: bool = True
    checksums: bool = False
    head_folder: str | Path | None = None
    tracing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.job, str):
            raise ConfigError(f"job is {self.job!r}; it must be a string")
        for name in ("shared_memory", "checksums", "tracing"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choices: True, False")
        if not isinstance(self.head_folder, str | Path | None):
            raise ConfigError(f"head_folder is {self.head_folder!r}; it must be a path, or None")
        for name in ("timeout_s", "connect_timeout_s", "max_pending"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= _MAX_SETTING:
                raise ConfigError(f"{name} is {value!r}; it must be a number above 0 and at most {_MAX_SETTING:.0e}")
