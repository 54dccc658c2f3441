"""Logs for machines: one JSON object a line, with the job, session and request that a record is about.

A library does not configure logging, so `serve` does not; the actors of a pool do, with `set_up`. No record holds
inputs, features or messages of a teacher's own code: of its errors only the type and where they were raised. Tokens,
paths and numbers of tensors in a message are left out; files in a stack are named relative to Python's search path.
"""

import json
import logging
import sys
import traceback
from collections import deque
from collections.abc import Mapping, MutableMapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from schoolhouse_wire.errors import ConfigError, TeacherForwardError
from schoolhouse_wire.scrubbing import scrub

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
_LOGGERS = ("schoolhouse", "schoolhouse_server", "schoolhouse_wire")
_ABOUT = ("teacher", "replica", "job", "session", "request")  # fields that a record may have, given as `extra`
_MAX_TEXT = 1000  # characters of an error's text
_MAX_FRAMES = 50


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object on a line.

    It has `time` (ISO 8601, UTC), `level`, `logger` and `message`, and those of `teacher`, `replica`, `job`, `session`
    and `request` that are known; the fields `about` are in every line. With an error it also has `error`, its type;
    `causes`, the types of the errors that caused it; `error_message`, unless it comes from a teacher's code; and
    `stack`, a list of "file:line function".
    """

    def __init__(self, **about: str) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without its end."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        message = scrub(record.getMessage())
        line = {"time": moment, "level": record.levelname, "logger": record.name, "message": message}
        found = line | _about(record, self._about) | _error_of(record)
        return json.dumps(found, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record for people: a line, its fields in brackets, and the stack of an error below."""

    def __init__(self, **about: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, and the lines of the stack."""
        record.message, record.asctime = printable(scrub(record.getMessage())), self.formatTime(record)
        about = " ".join(f"{name}={json.dumps(value)}" for name, value in _about(record, self._about).items())
        line = self.formatMessage(record) + (f" [{about}]" if about else "")
        error = _error_of(record)
        if not error:
            return line
        text = ": ".join(printable(error[key]) for key in ("error", "error_message") if key in error)
        return "\n".join([line, *(f"  at {frame}" for frame in error["stack"]), f"  {text}"])


class SessionLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # at run time generic only from Python 3.11 on
    """A logger whose records carry a session and its job; `request=` adds the request."""

    def __init__(self, logger: logging.Logger, **about: str) -> None:
        super().__init__(logger, about)

    def of(self, **about: str) -> "SessionLog":
        """The same logger with more fields."""
        return SessionLog(self.logger, **{**(self.extra or {}), **about})  # type: ignore[arg-type]  # they are strings

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the fields to the record, where formatters find them."""
        request = kwargs.pop("request", None)
        about = {**(self.extra or {}), **({"request": request} if request is not None else {})}
        return msg, {**kwargs, "extra": about}


class RingHandler(logging.Handler):
    """Keeps the last `capacity` records, as lines of text, for `schoolhouse logs`."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=capacity)
        self.setFormatter(TextFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)

    def lines(self, n: int) -> list[str]:
        """The last `n` lines, the oldest first."""
        kept = list(self._lines)
        return kept[max(len(kept) - n, 0) :]


def formatter(log_format: str, **about: str) -> logging.Formatter:
    """The formatter of that name, which adds the fields `about` to every line.

    Raises:
        ConfigError: there is no such format.
    """
    if log_format not in FORMATS:
        raise ConfigError(f"log_format is {log_format!r}; choices: {', '.join(map(repr, FORMATS))}")
    return JsonFormatter(**about) if log_format == "json" else TextFormatter(**about)


def set_up(log_format: str, *handlers: logging.Handler, **about: str) -> None:
    """Have this process log our own records, from INFO on, to stderr and to `handlers`, and nowhere else.

    Raises:
        ConfigError: there is no such format.
    """
    chosen = formatter(log_format, **about)
    handlers = (logging.StreamHandler(), *handlers)
    for handler in handlers:
        handler.setFormatter(chosen)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = handlers
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _about(record: logging.LogRecord, always: Mapping[str, str]) -> dict[str, Any]:
    own = {name: getattr(record, name) for name in _ABOUT if hasattr(record, name)}
    found = {**always, **own}
    return {name: found[name] for name in _ABOUT if name in found}


def _error_of(record: logging.LogRecord) -> dict[str, Any]:
    if not record.exc_info or record.exc_info[1] is None:
        return {}
    error = record.exc_info[1]
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    found = {
        "error": type(error).__name__,
        "causes": _causes(error),
        "stack": [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames],
    }
    return found if isinstance(error, TeacherForwardError) else found | {"error_message": scrub(str(error))[:_MAX_TEXT]}


def _short(filename: str) -> str:
    """A file's path relative to the folder in which Python found it, or only its name."""
    path = Path(filename)
    known = [Path(folder) for folder in sys.path if folder and path.is_relative_to(folder)]
    return str(path.relative_to(max(known, key=lambda one: len(one.parts)))) if known else path.name


def _causes(error: BaseException) -> list[str]:
    found: list[str] = []
    cause = error.__cause__
    while cause is not None and len(found) < _MAX_FRAMES:
        found.append(type(cause).__name__)
        cause = cause.__cause__
    return found


def printable(text: str) -> str:
    """The text, with characters escaped that would begin another line, or control a terminal."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
