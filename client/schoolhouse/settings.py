"""Settings of a connection, checked once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schoolhouse.errors import ConfigError

_MAX_SETTING = 1e6  # about 12 days, in seconds; beyond what clocks and locks take, a wait fails at once


def check(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what `connect` cannot take."""
    if not isinstance(settings["job"], str):
        raise ConfigError(f"job is {settings['job']!r}; it must be a string")
    if not isinstance(settings["shared_memory"], bool):
        raise ConfigError(f"shared_memory is {settings['shared_memory']!r}; choices: True, False")
    if not isinstance(settings["head_folder"], str | Path | None):
        raise ConfigError(f"head_folder is {settings['head_folder']!r}; it must be a path, or None")
    for name in ("timeout_s", "connect_timeout_s", "max_pending"):
        value = settings[name]
        if not isinstance(value, int | float) or not 0 < value <= _MAX_SETTING:
            raise ConfigError(f"{name} is {value!r}; it must be a number above 0 and at most {_MAX_SETTING:.0e}")
