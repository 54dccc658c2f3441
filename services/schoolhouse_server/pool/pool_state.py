"""The desired state of a pool, which must outlive the keeper: every actor of the pool holds the latest one."""

from dataclasses import dataclass, field, replace

from schoolhouse_wire.errors import ConfigError, UnknownTeacherError

from schoolhouse_server.pool.config import Bounds, PoolConfig, TeacherSpec


@dataclass(frozen=True)
class Version:
    """One spec of a teacher; each roll makes a new version.

    Numbers grow, and are unique within a pool.
    """

    number: int
    spec: TeacherSpec
    pool: PoolConfig  # its replicas use the folder and ports of this configuration
    revision: str = ""  # the revision that its first replica had; empty before that
    superseded_at: float = 0.0  # time.time() when a replica of the next version began to serve; 0 before that


@dataclass(frozen=True)
class TeacherState:
    """The desired state of a teacher: its current version, older ones that jobs may still use, and its replicas."""

    current: Version
    bounds: Bounds
    count: int  # how many replicas there should be, within the bounds
    old: tuple[Version, ...] = ()  # the newest last
    failed: str = ""  # why the last roll was taken back

    @property
    def versions(self) -> tuple[Version, ...]:
        """All versions, the newest last."""
        return (*self.old, self.current)

    def version(self, number: int) -> Version | None:
        """The version of that number, or None if it is gone."""
        return next((version for version in self.versions if version.number == number), None)

    def with_version(self, changed: Version) -> "TeacherState":
        """This state with `changed` in place of the version of the same number."""
        if changed.number == self.current.number:
            return replace(self, current=changed)
        return replace(self, old=tuple(changed if v.number == changed.number else v for v in self.old))

    def without(self, number: int) -> "TeacherState":
        """This state without that old version."""
        return replace(self, old=tuple(v for v in self.old if v.number != number))

    def taken_back(self, why: str) -> "TeacherState":
        """This state with the previous version as the current one again, because the new one cannot start."""
        *older, last = self.old
        return replace(self, current=replace(last, superseded_at=0.0), old=tuple(older), failed=why)


@dataclass(frozen=True)
class Desired:
    """The desired state of a pool; of two states, the one of the higher generation is valid."""

    config: PoolConfig  # as `up` or the last `roll` read it
    generation: int = 0
    teachers: dict[str, TeacherState] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PoolConfig) -> "Desired":
        """The state of a new pool."""
        states = {name: _begin(Version(0, spec, config)) for name, spec in config.teachers.items()}
        return cls(config, 0, states)

    def teacher(self, name: str) -> TeacherState:
        """The state of a teacher; raises `UnknownTeacherError`, which lists the teachers that there are."""
        if name not in self.teachers:
            names = sorted(self.teachers)
            raise UnknownTeacherError(f"the pool has no teacher {name!r}; it has: {', '.join(names)}", choices=names)
        return self.teachers[name]

    def with_teacher(self, name: str, state: TeacherState) -> "Desired":
        """This state with another state of that teacher."""
        return replace(self, generation=self.generation + 1, teachers={**self.teachers, name: state})

    def scaled(self, name: str, bounds: Bounds) -> "Desired":
        """This state with other bounds for a teacher."""
        state = self.teacher(name)
        return self.with_teacher(name, replace(state, bounds=bounds, count=bounds.clamp(state.count)))

    def rolled(self, config: PoolConfig, names: list[str]) -> "Desired":
        """This state with new versions of these teachers, as `config` has them; new teachers are added.

        Raises:
            ConfigError: `config` has another host, port, TLS or tokens file, which needs a new pool, or lacks one of
                the teachers.
        """
        if config.host != self.config.host or config.port not in (0, self.config.port):
            raise ConfigError(
                f"the pool listens on {self.config.host}:{self.config.port}, and the file says "
                f"{config.host}:{config.port}; to change that, use `schoolhouse down` and `schoolhouse up`"
            )
        for name in ("tls", "tokens"):
            if getattr(config.security, name) != getattr(self.config.security, name):
                raise ConfigError(
                    f"security.{name} of the file differs from that of the pool; new contents of the same files are "
                    "read without a roll, and anything else needs `schoolhouse down` and `schoolhouse up`"
                )
        config = replace(config, port=self.config.port)
        wrong = [name for name in names if name not in config.teachers]
        if wrong:
            choices = sorted(config.teachers)
            raise ConfigError(f"the pool file has no teacher {wrong[0]!r}; it has: {', '.join(choices)}")
        changed = replace(self, config=config)
        for name in names:
            changed = changed.with_teacher(name, changed._next(name))
        return changed

    def _next(self, name: str) -> TeacherState:
        version = Version(self.generation + 1, self.config.teachers[name], self.config)
        before = self.teachers.get(name)
        if before is None:
            return _begin(version)
        # The bounds set by `schoolhouse scale` stay, unless the file's `replicas` has changed.
        same = version.spec.replicas == before.current.spec.replicas
        bounds = before.bounds if same else version.spec.bounds
        return TeacherState(version, bounds, bounds.clamp(before.count), before.versions)


def _begin(version: Version) -> TeacherState:
    return TeacherState(version, version.spec.bounds, version.spec.bounds.min)
