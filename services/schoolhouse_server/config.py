"""pool.yaml -> frozen dataclasses, validated once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from schoolhouse.errors import ConfigError

from schoolhouse_server.batching import MergeSettings, Padding
from schoolhouse_server.sharing import LEASE_S, MAX_IN_FLIGHT, MAX_JOB_BYTES, MAX_LEASE_S, MAX_QUEUED

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
class TeacherSpec:
    """How to build one teacher, and how many replicas of it to keep alive.

    Exactly one of `build` (`module:callable`, called with `kwargs`) and `transformers` (a checkpoint folder) is given.
    `weights` is a safetensors file loaded into the model afterwards. `threads` are torch's intra-op threads.
    `early_stop` is that of `schoolhouse.LocalTeacher`, and `shared_memory_bytes` that of `serve`; `cache_bytes` of host
    memory keep features of each replica. `cost` to `pad` are those of `serve` too; so is `example`, as
    `module:callable`.
    """

    build: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    transformers: Path | None = None
    weights: Path | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    early_stop: bool = True
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    shared_memory_bytes: Annotated[int, Field(ge=0, le=1 << 40)] = 1 << 30
    cost: Literal["rows", "tokens"] = "rows"
    max_in_flight: Annotated[int, Field(ge=1)] = MAX_IN_FLIGHT
    max_job_bytes: Annotated[int, Field(ge=1)] = MAX_JOB_BYTES
    max_queued: Annotated[int, Field(ge=1)] = MAX_QUEUED
    lease_s: Annotated[float, Field(ge=0, le=MAX_LEASE_S)] = LEASE_S
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


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PoolConfig:
    """A pool: its teachers by name, and where its directory listens (port 0: any free one)."""

    teachers: Annotated[dict[Annotated[str, Field(pattern=r"^[^/\s]+$")], TeacherSpec], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 7070
    folder: Path = Path()


def load_pool(path: Path) -> PoolConfig:
    """Read a pool file. Relative paths in it, and modules beside it, are found from its own folder.

    Raises:
        ConfigError: one sentence for each thing that is wrong, with its place in the file.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except OSError as err:
        raise ConfigError(f"cannot read the pool file {path}: {err.strerror}") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must hold a mapping with the key 'teachers'")
    if "folder" in given:
        raise ConfigError(f"{path} is wrong: folder: it is the file's own folder and cannot be set")
    try:
        return TypeAdapter(PoolConfig).validate_python({**given, "folder": path.resolve().parent})
    except ValidationError as err:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'pool'}: {e['msg']}" for e in err.errors()]
        raise ConfigError(f"{path} is wrong: " + "; ".join(lines)) from err
