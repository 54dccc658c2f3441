"""pool.yaml -> frozen dataclasses, validated once."""

import ipaddress
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from schoolhouse.errors import ConfigError
from schoolhouse_wire.rpc.security import is_loopback

from schoolhouse_server.common.logs import LogFormat
from schoolhouse_server.common.yaml_files import read_yaml
from schoolhouse_server.device.watchdog import FORWARD_TIMEOUT_S, MAX_FORWARD_TIMEOUT_S
from schoolhouse_server.merge.batching import MergeSettings, Padding
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
_MAX_WRONG = 10  # things that a message lists
_NODE_ID = "ray.io/node-id"
Placement = Literal["DEFAULT", "SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"]
_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Resources:
    """What one replica takes of its node. `custom` are Ray's own resource names."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    custom: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PadSpec:
    """Arguments that may be padded along dimension 1, with the value for each, and the name of their mask."""

    values: Annotated[dict[str, float], Field(min_length=1)]
    mask: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Bounds:
    """How many replicas a teacher may have at once: between `min` and `max`, whichever its load asks for."""

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
            ConfigError: it is something else.
        """
        low, dash, high = text.partition("-")
        try:
            return cls(min=int(low), max=int(high) if dash else int(low))
        except ValueError as err:
            raise ConfigError(
                f"{text!r} is no number of replicas; give one from 1 to {_MAX_REPLICAS}, or MIN-MAX, as in 2-5"
            ) from err

    def clamp(self, count: int) -> int:
        """The nearest number that is allowed."""
        return min(max(count, self.min), self.max)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Autoscale:
    """When a teacher gets more replicas, and when fewer; `scaling.Scaler` follows it.

    More, at most twice as many, as requests have waited longer than `target_delay_s` for `up_after_s` on end. One
    fewer, as they have waited less than a quarter of that for `down_after_s`, and the replicas that stay would be busy
    for no more than `max_busy` of the time.
    """

    target_delay_s: Annotated[float, Field(gt=0, le=600)] = 0.1
    up_after_s: Annotated[float, Field(ge=0, le=3600)] = 3.0
    down_after_s: Annotated[float, Field(ge=0, le=86400)] = 120.0
    max_busy: Annotated[float, Field(gt=0, le=1)] = 0.7


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherSpec:
    """How to build one teacher, how many replicas of it to keep alive, and where.

    Exactly one of `build` (`module:callable`, called with `kwargs`) and `transformers` (a checkpoint folder) is given.
    `weights` is a safetensors file loaded into the model afterwards. `threads` are torch's intra-op threads.
    A replica that takes longer than `load_timeout_s` to load counts as failed; waiting for a node is no part of that.
    `early_stop` is that of `schoolhouse.LocalTeacher`, and `shared_memory_bytes` that of `serve`; `cache_bytes` of host
    memory keep features of each replica. `cost` to `pad` are those of `serve` too; so is `example`, as
    `module:callable`.

    `replicas` is a number, or bounds, `{min: 1, max: 4}`, between which `autoscale` chooses. `placement` says on which
    nodes they run: Ray's own choice (DEFAULT); spread where possible (SPREAD) or no two on a node (STRICT_SPREAD); on
    as few nodes as possible (PACK) or all on one (STRICT_PACK). `labels` are those that a node must have, in the form
    of Ray's label selectors, as in `{accelerator-type: "in(H100,H200)"}`.
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
    max_sessions: Annotated[int, Field(ge=1, le=MOST_SESSIONS)] = MAX_SESSIONS
    forward_timeout_s: Annotated[float, Field(ge=0, le=MAX_FORWARD_TIMEOUT_S)] = FORWARD_TIMEOUT_S
    merge: Literal["never", "same-shape", "pad"] = "never"
    max_batch_rows: Annotated[int, Field(ge=1)] = 256
    max_batch_tokens: Annotated[int, Field(ge=1)] = 65_536
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0
    pad: PadSpec | None = None
    example: str | None = None
    resources: Resources = Field(default_factory=Resources)

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherSpec":
        if (self.build is None) == (self.transformers is None):
            raise ValueError("give either 'build: module:callable' or 'transformers: folder'")
        if self.build is not None and self.build.count(":") != 1:
            raise ValueError(f"build is {self.build!r}; expected 'module:callable'")
        if self.example is not None and self.example.count(":") != 1:
            raise ValueError(f"example is {self.example!r}; expected 'module:callable'")
        if (self.merge == "pad") != (self.pad is not None):
            raise ValueError("merge: pad goes together with pad: {values: {argument: number}, mask: argument}")
        if self.transformers is not None and self.kwargs:
            raise ValueError("kwargs go with build, not with transformers")
        if self.device.startswith("cuda") and self.resources.num_gpus <= 0:
            raise ValueError("device is cuda, so resources.num_gpus must be above 0")
        if _NODE_ID in self.labels:
            raise ValueError(f"labels: {_NODE_ID} is what placement works with; give a label of your own")
        return self

    @property
    def merging(self) -> MergeSettings:
        """How its requests are merged."""
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
    """The PEM files of `ServerTls`, which every node has at these paths."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SecuritySpec:
    """Who can read and write along the way: nobody, with `tls`; `insecure` says that others may, in plaintext.

    With `tokens`, a file that every node has at this path, only who has one of its tokens is answered; see
    `tokens.Grant`. `allow_head` gives the weights of teachers' heads to who asks, as `encodings.hidden` does.
    """

    tls: TlsSpec | None = None
    insecure: bool = False
    tokens: Path | None = None
    allow_head: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> "SecuritySpec":
        if self.tls is not None and self.insecure:
            raise ValueError("tls and insecure are given; insecure: true says that there is no TLS, so leave it out")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PoolConfig:
    """A pool: its teachers by name, and where its directory listens (port 0: any free one).

    Replicas listen on a free port of the range `ports` (`"7100-7199"`; without it, on any). `host` is where all servers
    of the pool listen, those of HTTP included: 127.0.0.1 serves this machine alone; an address, or a name of one, is
    for a pool whose nodes all have it, as a pool on one node; of a network, as 10.0.0.0/24, each node listens on its
    own address; 0.0.0.0 and :: are all interfaces, and then a server is known by the address that Ray gives its node.
    Behind NAT or a load balancer `advertise` says what students connect to in place of these: one name for all, or a
    mapping from a node's address to the one outside. A replica's zone is its node's label `zone_label`.

    Beyond loopback the pool needs `security: {tls: {cert: server.pem, key: server.key}}`, or
    `insecure: true` there: then what goes to and fro is plaintext. With `client_ca` beside them students need a
    certificate of it. Of each server the certificate must hold the name, or the address, that students connect to.

    A replica that must go answers what it has for up to `drain_timeout_s`. Replicas of a revision that was rolled over
    stay until the jobs that began with it have ended, `linger_s` at most.

    With an `http_port` (0: any free one) the directory has a page with charts of the whole pool, and Prometheus metrics
    at `/metrics`; with `metrics_ports`, a range, each replica has its own, for a Prometheus that asks each by itself.
    With `security: {tokens: FILE}` they want an admin's token, unless `host` is loopback.
    `log_format` is that of the actors, on stderr and in `schoolhouse logs`: "text", or "json", one object a line.
    `tracing` makes OpenTelemetry spans, for the tracer provider that the teacher's module sets as it is imported.
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
            raise ValueError(f"host is {self.host!r}; expected an address, a name or a network, as in 10.0.0.0/24")
        if "/" in self.host:
            ipaddress.ip_network(self.host, strict=False)  # raises ValueError
        return self

    @model_validator(mode="after")
    def _not_in_plaintext(self) -> "PoolConfig":
        if not self.only_here and self.security.tls is None and not self.security.insecure:
            raise ValueError(
                f"host is {self.host!r}, so other machines can connect, and traffic would be plaintext: give security: "
                "{tls: {cert: FILE, key: FILE}}, for which `schoolhouse certs` makes the files, or say security: "
                "{insecure: true}"
            )
        return self

    @property
    def only_here(self) -> bool:
        """Whether its servers listen on loopback alone."""
        return is_loopback(self.host)

    @property
    def tls(self) -> ServerTls | None:
        """The certificate of its servers, from this node's files; None without one.

        Raises:
            ConfigError: a file is not what it should be.
        """
        given = self.security.tls
        if given is None:
            return None
        client_ca = self.folder / given.client_ca if given.client_ca is not None else None
        return ServerTls(cert=self.folder / given.cert, key=self.folder / given.key, client_ca=client_ca)

    @property
    def tokens(self) -> Path | None:
        """The tokens file, on this node; None without one."""
        return self.folder / self.security.tokens if self.security.tokens is not None else None

    def check_files(self, names: Collection[str]) -> None:
        """Look for the checkpoints and the weights of these teachers on this machine.

        Raises:
            ConfigError: there are some that are not there; names them.
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
        """Where replicas may listen; just 0, for any free port, without `ports`."""
        return range(1) if self.ports is None else parse_ports(str(self.ports))

    @property
    def metrics_port_range(self) -> range | None:
        """Where replicas may serve their metrics; None: they don't."""
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
    """Read a pool file. Relative paths in it, and modules beside it, are found from its own folder.

    Raises:
        ConfigError: one sentence for each thing that is wrong, with its place in the file.
    """
    given = read_yaml(path, "pool file")
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must hold a mapping with the key 'teachers'")
    if "folder" in given:
        raise ConfigError(f"{path} is wrong: folder: it is the file's own folder and cannot be set")
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
    """What is wrong and where, in one line."""
    found = error.errors()
    lines = [f"{'.'.join(str(key)[:80] for key in e['loc']) or 'pool'}: {e['msg'][:300]}" for e in found]
    more = f"; and {len(found) - _MAX_WRONG} more" if len(found) > _MAX_WRONG else ""
    return " ".join("; ".join(lines[:_MAX_WRONG]).split()) + more
