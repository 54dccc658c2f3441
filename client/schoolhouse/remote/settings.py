"""The settings of a connection to a teacher, in groups, each checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from schoolhouse_wire.limits import MAX_JOB_NAME
from schoolhouse_wire.rpc.security import ClientSecurity

from schoolhouse.errors import ConfigError

_WEIGHTS = (0.01, 100)
_MAX_SETTING = 1e6  # about 12 days in seconds; locks and clocks refuse a much longer wait
_MOVED = {  # names that `connect` had, by what is written now
    "timeouts=Timeouts({})": {
        "timeout_s": "request_s",
        "connect_timeout_s": "connect_s",
        "teacher_timeout_s": "teacher_s",
        "attempt_timeout_s": "attempt_s",
    },
    "sharing=Sharing({})": {name: name for name in ("weight", "max_pending")},
    "security=Security({})": {name: name for name in ("ca", "cert", "key", "token", "insecure")},
    "transport=Transport({})": {name: name for name in ("shared_memory", "checksums", "tune_allocator")},
    "VerifiedTeacher(connect(...), {})": {"verify_every": "every", "verify_tolerance": "tolerance"},
}


def _check_positive(group: object, *names: str, optional: bool = False) -> None:
    expected = f"{'None, or ' if optional else ''}a number above 0 and at most {_MAX_SETTING:.0e}"
    for name in names:
        value = getattr(group, name)
        if not (optional and value is None) and not (isinstance(value, int | float) and 0 < value <= _MAX_SETTING):
            raise ConfigError(f"{name} is {value!r}; it must be {expected}")


def _check_switches(group: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(group, name), bool):
            raise ConfigError(f"{name} is {getattr(group, name)!r}; choices: True, False")


def _check_type(group: object, kind: Any, expected: str, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(group, name), kind):
            raise ConfigError(f"{name} is {getattr(group, name)!r}; it must be {expected}")


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long a client waits, in seconds.

    Args:
        request_s: deadline of each request, including all retries. Time in which no replica can take the request does
            not count.
        connect_s: how long to wait for a server.
        teacher_s: how long a request may wait in total while no replica of the teacher can take it. Its `request_s`
            stands still meanwhile, and the log says that the student waits. After that it fails with
            `TeacherUnavailableError`, and the batch may be forwarded again. None means as long as `request_s`.
        attempt_s: leave a replica that has requests but has sent nothing for this long, and for twice as long as the
            slowest answer took, if there is another replica; each request is moved at most once in this way. None means
            a third of `request_s`.

    Raises:
        ConfigError: for an invalid value; so do the other groups.
    """

    request_s: float = 60.0
    connect_s: float = 10.0
    teacher_s: float | None = None
    attempt_s: float | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "request_s", "connect_s")
        _check_positive(self, "teacher_s", "attempt_s", optional=True)

    @property
    def wait_s(self) -> float:
        """How long a request may wait while no replica can take it."""
        return self.request_s if self.teacher_s is None else self.teacher_s

    @property
    def patience_s(self) -> float:
        """How long a replica that has requests may send nothing before it is left for another one."""
        return self.request_s / 3 if self.attempt_s is None else self.attempt_s


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What this client asks for of a teacher that others use, too.

    Args:
        weight: the job's share of a busy teacher relative to other jobs, from 0.01 to 100. If clients of one job give
            different weights, the last one counts.
        max_pending: how many requests may be without an answer before `submit` raises `TeacherBusyError`.
        max_replicas: with how many replicas this client keeps sessions at the same time; None means with all. Each
            client chooses its own ones, so that many clients use all replicas evenly without each of them holding a
            session with each replica. It goes beyond them while they are gone, fail or refuse, and exchanges one if all
            are busier than others. A job of few processes that is to use more replicas at once raises it.
    """

    weight: float = 1.0
    max_pending: int = 1024
    max_replicas: int | None = 4

    def __post_init__(self) -> None:
        if not isinstance(self.weight, int | float) or not _WEIGHTS[0] <= self.weight <= _WEIGHTS[1]:
            raise ConfigError(f"weight is {self.weight!r}; it must be a number from {_WEIGHTS[0]} to {_WEIGHTS[1]}")
        _check_positive(self, "max_pending")
        most = self.max_replicas
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ConfigError(f"max_replicas is {most!r}; it must be None, or a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class Security:
    """How a client knows its servers, and they it. The files are read here, and not again later.

    Pickling it, or a teacher that was connected with it, also pickles the token and the contents of the files.

    Args:
        ca: PEM file of the certificate authorities to trust for the servers' certificates; None means those of the
            public web that gRPC knows.
        cert: PEM file of this client's own certificate, with the intermediate ones, for servers that require one.
        key: PEM file of the private key of `cert`, without a password.
        token: the token that the pool's operator gave to this job. It is sent with each RPC.
        insecure: allow `grpc://` to other machines, although anyone on the network path can then read and change
            everything, and steal the token.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    token: str | None = field(default=None, repr=False)
    insecure: bool = False
    contents: ClientSecurity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        object.__setattr__(self, "contents", ClientSecurity.read(**given))


@dataclass(frozen=True, kw_only=True)
class Transport:
    """How features reach this process.

    Args:
        shared_memory: receive features from replicas of the same machine and user through shared memory, on Linux;
            `describe()` says whether it is used, or why not. A process that is forked from this one must clone the
            features that it keeps.
        checksums: check every byte that arrives through shared memory, which is slower; otherwise the first KiB of each
            64 KiB is checked. Bytes that arrive over the stream are always checked.
        tune_allocator: make glibc's allocator in this process keep up to 512 MiB of freed memory (`mallopt`), from the
            first session on. Without that, receiving features costs about half as much again.
    """

    shared_memory: bool = True
    checksums: bool = False
    tune_allocator: bool = True

    def __post_init__(self) -> None:
        _check_switches(self, "shared_memory", "checksums", "tune_allocator")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `connect`, which documents them.

    Raises:
        ConfigError: for an invalid setting; the message names it and the choices.
    """

    job: str = ""
    sharing: Sharing = Sharing()
    timeouts: Timeouts = Timeouts()
    security: Security = Security()
    transport: Transport = Transport()
    zone: str = ""
    revision: str = ""
    follow_revisions: bool = False
    head_folder: str | Path | None = None
    tracing: bool = False

    def __post_init__(self) -> None:
        for kind in (Sharing, Timeouts, Security, Transport):
            given = getattr(self, kind.__name__.lower())
            if not isinstance(given, kind):  # the message must not show a token
                raise ConfigError(f"{kind.__name__.lower()} is a {type(given).__name__}; choices: {kind.__name__}(...)")
        _check_type(self, str, "a string", "job", "zone", "revision")
        if len(self.job) > MAX_JOB_NAME:
            raise ConfigError(f"job has {len(self.job)} characters; {MAX_JOB_NAME} are allowed")
        _check_type(self, str | Path | None, "a path, or None", "head_folder")
        _check_switches(self, "follow_revisions", "tracing")
        if self.revision and self.follow_revisions:
            raise ConfigError(
                f"revision is {self.revision!r} and follow_revisions is True; choices: give one of the two"
            )


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings that were given by name.

    Raises:
        TypeError: for other names; the message says how to write what once had such a name.
    """
    choices = [one.name for one in fields(Settings)]
    wrong = [name for name in given if name not in choices]
    if not wrong:
        return Settings(**given)
    moved = {way: [f"{now}=..." for before, now in names.items() if before in wrong] for way, names in _MOVED.items()}
    ways = [way.format(", ".join(names)) for way, names in moved.items() if names]
    raise TypeError(
        f"connect() has no {' and no '.join(wrong)}; "
        + (f"write {' and '.join(ways)}" if ways else f"choices: {', '.join(choices)}")
    )
