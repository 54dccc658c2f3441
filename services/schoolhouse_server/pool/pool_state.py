"""What a pool should be: the state that must outlive the keeper. Every actor of the pool holds the latest of it."""

from dataclasses import dataclass, field, replace

from schoolhouse.errors import ConfigError, UnknownTeacherError

from schoolhouse_server.pool.config import Bounds, PoolConfig, TeacherSpec


@dataclass(frozen=True)
class Version:
    """One spec of a teacher. Rolls make new ones; `number` grows, and no two of a pool have the same."""

    number: int
    spec: TeacherSpec
    pool: PoolConfig  # whose folder and ports its replicas use
    revision: str = ""  # that its first replica had
    superseded_at: float = 0.0  # time.time() at which a replica of the next one served; 0: not yet


@dataclass(frozen=True)
class TeacherState:
    """What one teacher should be: the version that jobs get, those that jobs may still hold, and how many replicas."""

    current: Version
    bounds: Bounds
    count: int  # of replicas, within the bounds
    old: tuple[Version, ...] = ()  # the newest last
    failed: str = ""  # why the last roll was taken back

    @property
    def versions(self) -> tuple[Version, ...]:
        """All of them, the newest last."""
        return (*self.old, self.current)

    def version(self, number: int) -> Version | None:
        """The one of that number, or None if it is not there any more."""
        return next((version for version in self.versions if version.number == number), None)

    def with_version(self, changed: Version) -> "TeacherState":
        """With that one in the place of the one of its number."""
        if changed.number == self.current.number:
            return replace(self, current=changed)
        return replace(self, old=tuple(changed if v.number == changed.number else v for v in self.old))

    def without(self, number: int) -> "TeacherState":
        """Without that old version."""
        return replace(self, old=tuple(v for v in self.old if v.number != number))

    def taken_back(self, why: str) -> "TeacherState":
        """With the version before the current one, which cannot start, in its place."""
        *older, last = self.old
        return replace(self, current=replace(last, superseded_at=0.0), old=tuple(older), failed=why)


@dataclass(frozen=True)
class Desired:
    """What a pool should be. Of two, the one of the higher generation holds."""

    config: PoolConfig  # as `up` or the last `roll` read it
    generation: int = 0
    teachers: dict[str, TeacherState] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PoolConfig) -> "Desired":
        """A pool that begins."""
        states = {name: _begin(Version(0, spec, config)) for name, spec in config.teachers.items()}
        return cls(config, 0, states)

    def teacher(self, name: str) -> TeacherState:
        """The state of a teacher; raises `UnknownTeacherError` with those there are."""
        if name not in self.teachers:
            names = sorted(self.teachers)
            raise UnknownTeacherError(f"the pool has no teacher {name!r}; it has: {', '.join(names)}", choices=names)
        return self.teachers[name]

    def with_teacher(self, name: str, state: TeacherState) -> "Desired":
        """With that teacher so."""
        return replace(self, generation=self.generation + 1, teachers={**self.teachers, name: state})

    def scaled(self, name: str, bounds: Bounds) -> "Desired":
        """With other bounds for a teacher."""
        state = self.teacher(name)
        return self.with_teacher(name, replace(state, bounds=bounds, count=bounds.clamp(state.count)))

    def rolled(self, config: PoolConfig, names: list[str]) -> "Desired":
        """With new versions of these teachers, as `config` has them; those that are new to the pool are added.

        Raises:
            ConfigError: host, port, TLS or tokens are others, which takes a new pool; a name that the file does not
                have.
        """
        if config.host != self.config.host or config.port not in (0, self.config.port):
            raise ConfigError(
                f"the pool listens on {self.config.host}:{self.config.port}, and the file says "
                f"{config.host}:{config.port}; that takes `schoolhouse down` and `schoolhouse up`"
            )
        for name in ("tls", "tokens"):
            if getattr(config.security, name) != getattr(self.config.security, name):
                raise ConfigError(
                    f"security.{name} of the file is not that of the pool; new contents of the same files are taken "
                    "without a roll, anything else takes `schoolhouse down` and `schoolhouse up`"
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
        # What `schoolhouse scale` said holds on, unless the file says something new.
        same = version.spec.replicas == before.current.spec.replicas
        bounds = before.bounds if same else version.spec.bounds
        return TeacherState(version, bounds, bounds.clamp(before.count), before.versions)


def _begin(version: Version) -> TeacherState:
    return TeacherState(version, version.spec.bounds, version.spec.bounds.min)
