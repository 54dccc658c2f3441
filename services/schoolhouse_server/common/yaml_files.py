"""Reads a YAML file as bytes or plain values; an error is one sentence that says what is wrong with it."""

from pathlib import Path
from typing import Any

import yaml
from schoolhouse_wire.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000  # values behind an alias count at each use
_MAX_TEXT = 300  # characters quoted of a parser's message


def read_yaml(path: Path, what: str) -> Any:
    """The values in a file; `what` names the kind of file in messages, as in "pool file".

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds too much.
    """
    value = _parsed(path, read_bytes(path, what))
    if _count(value) > _MAX_VALUES:
        raise ConfigError(f"the {what} {path} holds more than {_MAX_VALUES} values, aliases counted at each use")
    return value


def read_bytes(path: Path, what: str) -> bytes:
    """The bytes of a file, up to the size allowed for settings; raises `ConfigError` if it is larger or unreadable."""
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
        raise ConfigError(f"{path} is not YAML: byte {err.start} is not UTF-8") from err
    except RecursionError as err:
        raise ConfigError(f"{path} is not YAML that can be read: it is nested too deeply") from err
    except Exception as err:  # a YAMLError, or whatever the parser's conversions raise
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
