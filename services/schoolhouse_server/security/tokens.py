"""The tokens file: what each token allows; it holds only digests of tokens, and is read again when it changes."""

import functools
import hashlib
import hmac
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from schoolhouse_wire import background
from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.limits import MAX_JOB_NAME

from schoolhouse_server.common.yaml_files import read_bytes
from schoolhouse_server.security.tap_patterns import check_patterns

PREFIX = "sht_"  # lets scanners find a token that leaked into a log or a repository
_BYTES = 32  # random bytes in a token
_WHAT = "tokens file"
_MAX_TOKENS = 4096
_MAX_TOKEN_LENGTH = 4096  # characters; longer tokens are refused unseen
_LOOK_S = 0.5  # between two looks at the file; a change is taken once two looks in a row found the same
_WEIGHTS = (0.01, 100.0)
_ANY = "*"
_STRICT = ConfigDict(extra="forbid", hide_input_in_errors=True)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Grant:
    """What the holder of one token may do.

    `sha256` is the token's digest. With a `job`, all its requests belong to that job, whatever the client says, and
    tokens without that job cannot take its name. Only with a `job` may it have a `weight` (without one, the client's
    own counts, up to 1), and `max_in_flight` and `max_job_bytes`, which bound the job on each replica in addition to
    the teacher's own bounds; a request that alone has more bytes is refused. `teachers` are those that it may use
    and see; `"*"` stands for all. An `admin` sees all teachers, the loads of all jobs, and the HTTP port. `taps` are
    patterns, as those of a teacher, of what it may tap of its teachers, within what each teacher's own allow.
    """

    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    job: Annotated[str, Field(min_length=1, max_length=MAX_JOB_NAME)] | None = None
    teachers: tuple[str, ...]
    weight: Annotated[float, Field(ge=_WEIGHTS[0], le=_WEIGHTS[1])] | None = None
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    max_job_bytes: Annotated[int, Field(ge=1)] | None = None
    admin: bool = False
    taps: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _quota_of_a_job(self) -> "Grant":
        given = [name for name in ("weight", "max_in_flight", "max_job_bytes") if getattr(self, name) is not None]
        if given and self.job is None:
            raise ValueError(f"{given[0]} needs job: a token that may name any job would get that quota for each")
        return self

    @model_validator(mode="after")
    def _patterns(self) -> "Grant":
        check_patterns(self.taps)
        return self

    def allows(self, teacher: str) -> bool:
        """Whether the token may use that teacher."""
        return _ANY in self.teachers or teacher in self.teachers

    def sees(self, teacher: str) -> bool:
        """Whether the token may know of that teacher."""
        return self.admin or self.allows(teacher)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _File:
    tokens: Annotated[tuple[Grant, ...], Field(max_length=_MAX_TOKENS)]

    @model_validator(mode="after")
    def _distinct(self) -> "_File":
        seen: dict[str, int] = {}
        for number, one in enumerate(self.tokens):
            first = seen.setdefault(one.sha256.lower(), number)
            if first != number:
                raise ValueError(f"tokens {first} and {number} have the same sha256; leave one out")
        return self


def new_token() -> str:
    """A new random token."""
    return PREFIX + secrets.token_urlsafe(_BYTES)


def digest_of(token: str) -> str:
    """The digest of a token that stands in a tokens file."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The grants of a tokens file; it follows changes of the file from `start` to `close`."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: the file cannot be read, or is wrong; one sentence says where.
        """
        self._path = path
        self._data = self._refused = read_bytes(path, _WHAT)
        self._grants = _parse(self._data, path)
        self._changed: list[Callable[[], None]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, path: str | Path | None) -> "Tokens | None":
        """The tokens of a file; None without a path.

        Raises as the constructor does.
        """
        return cls(Path(path)) if path is not None else None

    def grant(self, token: str) -> Grant | None:
        """What a token may do; None for an unknown token.

        The time it takes depends only on the token's length.
        """
        if len(token) > _MAX_TOKEN_LENGTH:
            return None
        return self._find(digest_of(token))

    def now(self, grant: Grant) -> Grant | None:
        """What the file now allows the token that had this grant; None if the token is gone."""
        return self._find(grant.sha256.lower())

    def _find(self, digest: str) -> Grant | None:
        found = None
        for one in self._grants:  # all of them, so that the time taken does not tell which one matched
            if hmac.compare_digest(one.sha256.lower(), digest):
                found = one
        return found

    def is_bound(self, job: str) -> bool:
        """Whether a token is bound to this job's name."""
        return any(one.job == job for one in self._grants)

    def on_change(self, call: Callable[[], None]) -> None:
        """Call `call`, in the thread that follows the file, each time a changed file was taken."""
        self._changed.append(call)

    def start(self) -> None:
        """Begin to follow changes of the file."""
        self._stop.clear()
        self._thread = background.thread(self._follow, name="schoolhouse-tokens", on_death=background.go_on)
        self._thread.start()

    def close(self) -> None:
        """Stop following changes of the file."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _LOOK_S)

    def _follow(self) -> None:
        before = self._data
        while not self._stop.wait(_LOOK_S):
            look = functools.partial(self._look, before)
            before = background.run(look, "following the tokens file", lambda _error: b"")

    def _look(self, before: bytes) -> bytes:
        """What the file holds; new contents are taken once they equal `before`, as then nobody is writing them."""
        try:
            found = read_bytes(self._path, _WHAT)
            if found == before and found not in (self._data, self._refused):
                self._take(found)
        except ConfigError as err:
            found = b""
            self._refuse(found, err)
        return found

    def _take(self, data: bytes) -> None:
        try:
            grants = _parse(data, self._path)
        except ConfigError as err:
            self._refuse(data, err)
            return
        self._data = self._refused = data
        self._grants = grants  # replaced as a whole, so that a request meanwhile sees the old grants or the new ones
        _log.info("the tokens file was read again; it has %d tokens", len(grants))
        for call in self._changed:
            call()

    def _refuse(self, data: bytes, err: ConfigError) -> None:
        """Keep the grants known so far, and log that once."""
        if data != self._refused:
            self._refused = data
            _log.warning("the changed tokens file is not used; the tokens known so far are kept: %s", err.message)


def _parse(data: bytes, path: Path) -> tuple[Grant, ...]:
    """The grants in a file's data; errors quote nothing from the file, as any word of it may be a token."""
    try:
        given = yaml.safe_load(data)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise ConfigError(f"the tokens file {path} is not YAML{where}") from None
    except Exception as err:  # YAML's dates and numbers raise exceptions of other kinds
        raise ConfigError(f"the tokens file {path} is not YAML: it raised {type(err).__name__}") from None
    if not isinstance(given, dict) or not isinstance(given.get("tokens"), list):
        raise ConfigError(f"the tokens file {path} must hold a mapping with the key 'tokens' and a list under it")
    try:
        return TypeAdapter(_File).validate_python(given).tokens
    except ValidationError as err:
        raise ConfigError(f"the tokens file {path} is wrong: " + "; ".join(map(_sentence, err.errors()))) from None


def _sentence(error: object) -> str:
    """Where a mistake is, and what it is; unknown keys are not quoted, as they may be a token."""
    assert isinstance(error, dict)
    known = {"tokens", *Grant.__dataclass_fields__}
    where = ".".join(str(part) if isinstance(part, int) or part in known else "?" for part in error["loc"])
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: expected the 64 hexadecimal digits that `schoolhouse token` prints"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: there is no such key; choices: {', '.join(Grant.__dataclass_fields__)}"
    return f"{where or 'file'}: {error['msg']}"
