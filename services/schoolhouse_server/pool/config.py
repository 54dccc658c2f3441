"""The pool file (pool.yaml) as frozen dataclasses, validated once as it is read."""

import ipaddress
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.rpc.security import is_loopback

from schoolhouse_server.common.logs import LogFormat
from schoolhouse_server.common.yaml_files import read_yaml
from schoolhouse_server.device.watchdog import FORWARD_TIMEOUT_S, MAX_FORWARD_TIMEOUT_S
from schoolhouse_server.merge.settings import MergeSettings, Padding
from schoolhouse_server.security.tap_patterns import check_patterns
from schoolhouse_server.security.tls import ServerTls
from schoolhouse_server.security.tokens import Tokens
from schoolhouse_server.session.quotas import (
    LEASE_S,
    MAX_IN_FLIGHT,
    MAX_JOB_BYTES,
    MAX_JOB_UNSENT_BYTES,
    MAX_LEASE_S,
    MAX_QUEUED,
    MAX_SESSIONS,
    MAX_UNSENT_BYTES,
    MOST_SESSIONS,
)

_MAX_REPLICAS = 1024
_MAX_WRONG = 10  # mistakes listed in one message
_NODE_ID = "ray.io/node-id"
Placement = Literal["DEFAULT", "SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"]
_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Resources:
    """What one replica takes of its node; `custom` holds amounts of Ray's custom resources, by their names."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    custom: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PadSpec:
    """The arguments that may be padded along dimension 1, each with its padding value, and the name of the mask."""

    values: Annotated[dict[str, float], Field(min_length=1)]
    mask: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Bounds:
    """How many replicas a teacher may have at once: at least `min` and at most `max`, as its load asks for."""

    min: Annotated[int, Field(ge=1, le=_MAX_REPLICAS)] = 1
    max: Annotated[int, Field(ge=1, le=_MAX_REPLICAS)] = 1

    @model_validator(mode="after")
    def _in_order(self) -> "Bounds":
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min must not be above max")
        return self

    @classmethod
    def parse(cls, text: str) -> "Bounds":
        """`3`, or `2-5` for min and max.

        Raises:
            ConfigError: for any other text.
        """
        low, dash, high = text.partition("-")
        try:
            return cls(min=int(low), max=int(high) if dash else int(low))
        except ValueError as err:
            raise ConfigError(
                f"{text!r} is not a number of replicas; give one from 1 to {_MAX_REPLICAS}, or MIN-MAX, as in 2-5"
            ) from err

    def clamp(self, count: int) -> int:
        """The number within the bounds that is nearest to `count`."""
        return min(max(count, self.min), self.max)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Autoscale:
    """When a teacher gets more replicas, and when fewer; `scaling.Scaler` applies it.

    It gets more, up to twice as many, once requests have waited longer than `target_delay_s` for `up_after_s` on end.
    It gets one fewer once requests have waited less than a quarter of `target_delay_s` for `down_after_s`, if the
    remaining replicas would be busy for at most `max_busy` of the time.
    """

    target_delay_s: Annotated[float, Field(gt=0, le=600)] = 0.1
    up_after_s: Annotated[float, Field(ge=0, le=3600)] = 3.0
    down_after_s: Annotated[float, Field(ge=0, le=86400)] = 120.0
    max_busy: Annotated[float, Field(gt=0, le=1)] = 0.7


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherSpec:
    """How to build one teacher, how many replicas of it to keep alive, and where.

    Give exactly one of `build` (`module:callable`, called with `kwargs`) and `transformers` (a checkpoint folder).
    `weights` is a safetensors file that is loaded into the model afterwards. `threads` is the number of torch's
    intra-op threads. A replica that takes longer than `load_timeout_s` to load counts as failed; time spent waiting for
    a node does not count. `early_stop` and the settings from `cache_bytes` to `pad` are those of `serve`, for each
    replica; so are `example`, written as `module:callable`, and `taps`, the patterns of what may be tapped.

    `replicas` is a number, or bounds such as `{min: 1, max: 4}`, between which `autoscale` chooses. `placement` says on
    which nodes they run: Ray's own choice (DEFAULT), spread where possible (SPREAD), no two on a node (STRICT_SPREAD),
    on as few nodes as possible (PACK), or all on one node (STRICT_PACK). A node must have all `labels`, which are
    written as Ray's label selectors, as in `{accelerator-type: "in(H100,H200)"}`.
    """

    build: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    transformers: Path | None = None
    weights: Path | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    replicas: Annotated[int, Field(ge=1, le=_MAX_REPLICAS)] | Bounds = 1
    autoscale: Autoscale = Field(default_factory=Autoscale)
    placement: Placement = "DEFAULT"
    labels: dict[str, str] = Field(default_factory=dict)
    threads: Annotated[int, Field(ge=1)] | None = None
    load_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 1800.0
    early_stop: bool = False
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    shared_memory_bytes: Annotated[int, Field(ge=0, le=1 << 40)] = 1 << 30
    cost: Literal["rows", "tokens"] = "rows"
    max_in_flight: Annotated[int, Field(ge=1)] = MAX_IN_FLIGHT
    max_job_bytes: Annotated[int, Field(ge=1)] = MAX_JOB_BYTES
    max_queued: Annotated[int, Field(ge=1)] = MAX_QUEUED
    max_unsent_bytes: Annotated[int, Field(ge=1)] = MAX_UNSENT_BYTES
    max_job_unsent_bytes: Annotated[int, Field(ge=1)] = MAX_JOB_UNSENT_BYTES
    lease_s: Annotated[float, Field(ge=0, le=MAX_LEASE_S)] = LEASE_S
    cache_scope: Literal["auto", "job", "teacher"] = "auto"
    max_request_tokens: Annotated[int, Field(ge=1)] | None = None
    max_sessions: Annotated[int, Field(ge=1, le=MOST_SESSIONS)] = MAX_SESSIONS
    forward_timeout_s: Annotated[float, Field(ge=0, le=MAX_FORWARD_TIMEOUT_S)] = FORWARD_TIMEOUT_S
    merge: Literal["never", "same-shape", "pad"] = "never"
    max_batch_rows: Annotated[int, Field(ge=1)] = 256
    max_batch_tokens: Annotated[int, Field(ge=1)] = 65_536
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0
    pad: PadSpec | None = None
    example: str | None = None
    taps: tuple[str, ...] | None = None
    resources: Resources = Field(default_factory=Resources)

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherSpec":
        if (self.build is None) == (self.transformers is None):
            raise ValueError("give exactly one of 'build: module:callable' and 'transformers: folder'")
        if self.build is not None and self.build.count(":") != 1:
            raise ValueError(f"build is {self.build!r}; expected 'module:callable'")
        if self.example is not None and self.example.count(":") != 1:
            raise ValueError(f"example is {self.example!r}; expected 'module:callable'")
        if (self.merge == "pad") != (self.pad is not None):
            raise ValueError("merge: pad needs pad: {values: {argument: number}, mask: argument}, and only it does")
        check_patterns(self.taps)
        if self.transformers is not None and self.kwargs:
            raise ValueError("kwargs go with build, not with transformers")
        if self.device.startswith("cuda") and self.resources.num_gpus <= 0:
            raise ValueError("device is cuda, so resources.num_gpus must be above 0")
        if _NODE_ID in self.labels:
            raise ValueError(f"labels: {_NODE_ID} is reserved for placement; give a label of your own")
        return self

    @property
    def merging(self) -> MergeSettings:
        """How requests to this teacher are merged."""
        return MergeSettings(
            mode=self.merge,
            max_batch_rows=self.max_batch_rows,
            max_batch_tokens=self.max_batch_tokens,
            max_wait_ms=self.max_wait_ms,
            pad=Padding(values=self.pad.values, mask=self.pad.mask) if self.pad is not None else None,
        )

    @property
    def bounds(self) -> Bounds:
        """The least and the most replicas; equal where `replicas` is a number."""
        if isinstance(self.replicas, Bounds):
            return self.replicas
        return Bounds(min=self.replicas, max=self.replicas)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TlsSpec:
    """The PEM files of `ServerTls`; every node must have them at these paths."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SecuritySpec:
    """TLS, tokens, and what clients may fetch; with `insecure` traffic beyond loopback is allowed in plaintext.

    With `tokens`, a file that every node must have at this path, only clients with one of its tokens are answered; see
    `tokens.Grant`. `allow_head` lets clients fetch the weights of teachers' heads, which `encodings.hidden` needs.
    """

    tls: TlsSpec | None = None
    insecure: bool = False
    tokens: Path | None = None
    allow_head: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> "SecuritySpec":
        if self.tls is not None and self.insecure:
            raise ValueError("tls and insecure: true are both given; insecure means plaintext, so leave it out")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PoolConfig:
    """A pool: its teachers by name, and the port that its directory listens on (0: any free one).

    Each replica listens on a free port of the range `ports`, such as `"7100-7199"`; without it, on any free port.
    `host` is where all servers of the pool listen, HTTP included. 127.0.0.1 serves this machine only. An address, or a
    name that resolves to one, suits a pool on one node, as every node must have it. With a network, such as
    10.0.0.0/24, each node listens on its own address in it. 0.0.0.0 and :: mean all interfaces, and students are then
    given the address that Ray has for the node. Behind NAT or a load balancer, `advertise` says what students connect
    to instead: one name for all nodes, or a mapping from a node's address to its address outside. A replica's zone is
    the value of the label `zone_label` of its node.

    Beyond loopback the pool needs `security: {tls: {cert: server.pem, key: server.key}}`, or `security: {insecure:
    true}`, which allows plaintext. With `client_ca` in `tls`, students need a certificate of that authority. Each
    server's certificate must hold the name or address that students connect to.

    A replica that is stopped first answers what it has, for up to `drain_timeout_s`. After a roll, replicas of the old
    revision stay until the jobs that began with it have ended, for at most `linger_s`.

    With an `http_port` (0: any free one) the directory serves a page with charts of the whole pool, and Prometheus
    metrics at `/metrics`. With `metrics_ports`, a range, each replica serves its own, for a Prometheus that scrapes
    each replica. With `security: {tokens: FILE}` they want an admin's token, unless `host` is loopback. `log_format` is
    the format of the actors' logs, on stderr and in `schoolhouse logs`: "text", or "json" with one object a line.
    `tracing` makes OpenTelemetry spans, for the tracer provider that the teacher's module sets when it is imported.
    """

    teachers: Annotated[dict[Annotated[str, Field(pattern=r"^[^/\s]+$")], TeacherSpec], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 7070
    ports: int | str | None = None
    advertise: str | dict[str, str] | None = None
    zone_label: str = "ray.io/availability-zone"
    drain_timeout_s: Annotated[float, Field(ge=0, le=86400)] = 120.0
    linger_s: Annotated[float, Field(ge=0)] = 86400.0
    http_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_ports: int | str | None = None
    log_format: LogFormat = "text"
    tracing: bool = False
    security: SecuritySpec = Field(default_factory=SecuritySpec)
    folder: Path = Path()

    @model_validator(mode="after")
    def _port_range(self) -> "PoolConfig":
        for given in (self.ports, self.metrics_ports):
            if given is not None:
                parse_ports(str(given))
        return self

    @model_validator(mode="after")
    def _host(self) -> "PoolConfig":
        if not self.host or any(c.isspace() for c in self.host):
            raise ValueError(f"host is {self.host!r}; expected an address, a name or a network such as 10.0.0.0/24")
        if "/" in self.host:
            ipaddress.ip_network(self.host, strict=False)  # raises ValueError
        return self

    @model_validator(mode="after")
    def _not_in_plaintext(self) -> "PoolConfig":
        if not self.only_here and self.security.tls is None and not self.security.insecure:
            raise ValueError(
                f"host is {self.host!r}, so other machines can connect, and traffic would be plaintext: give security: "
                "{tls: {cert: FILE, key: FILE}}, for which `schoolhouse certs` makes the files, or allow plaintext: "
                "security: {insecure: true}"
            )
        return self

    @property
    def only_here(self) -> bool:
        """Whether all servers of the pool listen on loopback only."""
        return is_loopback(self.host)

    @property
    def tls(self) -> ServerTls | None:
        """The certificate of the pool's servers, from this node's files; None without TLS.

        Raises:
            ConfigError: for a file that is missing or invalid.
        """
        given = self.security.tls
        if given is None:
            return None
        client_ca = self.folder / given.client_ca if given.client_ca is not None else None
        return ServerTls(cert=self.folder / given.cert, key=self.folder / given.key, client_ca=client_ca)

    @property
    def tokens(self) -> Path | None:
        """The path of the tokens file on this node; None without one."""
        return self.folder / self.security.tokens if self.security.tokens is not None else None

    def check_files(self, names: Collection[str]) -> None:
        """Check that the checkpoints and weights of these teachers are on this machine.

        Raises:
            ConfigError: names the files that are missing.
        """
        missing = [
            f"teachers.{n}.{text}" for n in names if n in self.teachers for text in self._missing(self.teachers[n])
        ]
        if missing:
            raise ConfigError("; ".join(missing))

    def _missing(self, spec: TeacherSpec) -> Iterator[str]:
        if spec.transformers is not None and not (self.folder / spec.transformers / "config.json").is_file():
            yield f"transformers: there is no checkpoint (config.json) in {self.folder / spec.transformers}"
        if spec.weights is not None and not (self.folder / spec.weights).is_file():
            yield f"weights: there is no file {self.folder / spec.weights}"

    @property
    def replica_ports(self) -> range:
        """The ports that replicas may listen on; only 0, which means any free port, without `ports`."""
        return range(1) if self.ports is None else parse_ports(str(self.ports))

    @property
    def metrics_port_range(self) -> range | None:
        """The ports on which replicas may serve metrics; None if they serve none."""
        return None if self.metrics_ports is None else parse_ports(str(self.metrics_ports))


def parse_ports(text: str) -> range:
    """`7100-7199`, or one port, as a range; raises `ValueError` for anything else."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.strip().isdecimal() and last.strip().isdecimal()):
        raise ValueError(f"ports is {text!r}; expected FIRST-LAST, as in 7100-7199, or one port")
    found = range(int(first), int(last) + 1)
    if not found or found[0] < 1 or found[-1] > 65535:
        raise ValueError(f"ports is {text!r}; expected two ports from 1 to 65535, the smaller one first")
    return found


def load_pool(path: Path) -> PoolConfig:
    """Read a pool file; relative paths start at the file's own folder, and modules there can be imported.

    Raises:
        ConfigError: has one sentence for each mistake, with its place in the file.
    """
    given = read_yaml(path, "pool file")
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must hold a mapping with the key 'teachers'")
    if "folder" in given:
        raise ConfigError(f"{path} is wrong: folder: it is always the file's own folder, and cannot be set")
    try:
        config = TypeAdapter(PoolConfig).validate_python({**given, "folder": path.resolve().parent})
    except ValidationError as err:
        raise ConfigError(f"{path} is wrong: {_wrong(err)}") from err
    try:
        _ = config.tls
    except ConfigError as err:
        raise ConfigError(f"{path} is wrong: security.tls: {err}") from err
    try:
        _ = Tokens.of(config.tokens)
    except ConfigError as err:
        raise ConfigError(f"{path} is wrong: security.tokens: {err}") from err
    return config


def _wrong(error: ValidationError) -> str:
    """The mistakes and their places, in one line."""
    found = error.errors()
    lines = [f"{'.'.join(str(key)[:80] for key in e['loc']) or 'pool'}: {e['msg'][:300]}" for e in found]
    more = f"; and {len(found) - _MAX_WRONG} more" if len(found) > _MAX_WRONG else ""
    return " ".join("; ".join(lines[:_MAX_WRONG]).split()) + more
