"""A YAML file -> bytes, or plain values, or one sentence that says what is wrong with it."""

from pathlib import Path
from typing import Any

import yaml
from schoolhouse.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000  # those that stand for an alias counted wherever they are
_MAX_TEXT = 300  # characters of what a parser says


def read_yaml(path: Path, what: str) -> Any:
    """What a file holds; `what` it is stands in messages, as in "pool file".

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds too much.
    """
    value = _parsed(path, read_bytes(path, what))
    if _count(value) > _MAX_VALUES:
        raise ConfigError(f"the {what} {path} holds more than {_MAX_VALUES} values, aliases counted at each use")
    return value


def read_bytes(path: Path, what: str) -> bytes:
    """All of a file that has no more than a settings file may have; raises `ConfigError` as `read_yaml` does."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as err:
        raise ConfigError(f"cannot read the {what} {path}: {err.strerror}") from err
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"the {what} {path} has more than {_MAX_BYTES} bytes; is it the right one?")
    return data


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return yaml.safe_load(data.decode())
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not YAML: byte {err.start} is no UTF-8") from err
    except RecursionError as err:
        raise ConfigError(f"{path} is not YAML that can be read: it is nested too deeply") from err
    except Exception as err:  # besides YAMLError, the parser lets through what its conversions raise
        raise ConfigError(f"{path} is not YAML: {' '.join(str(err).split())[:_MAX_TEXT]}") from err


def _count(value: Any) -> int:
    count, found = 0, [value]
    while found and count <= _MAX_VALUES:
        one = found.pop()
        count += 1
        if isinstance(one, dict):
            found.extend(one.values())
        elif isinstance(one, list | tuple | set):
            found.extend(one)
        if len(found) > _MAX_VALUES:
            return len(found)
    return count
