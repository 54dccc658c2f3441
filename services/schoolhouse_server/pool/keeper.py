"""The keeper: keeps the wanted replicas of each teacher running, scales and rolls them, and tells the directory."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from schoolhouse_wire import background
from schoolhouse_wire.errors import TeacherTimeoutError, TeacherUnavailableError
from schoolhouse_wire.v1 import directory_pb2

from schoolhouse_server.pool import nodes, status_rows
from schoolhouse_server.pool import replica_handle as members
from schoolhouse_server.pool.actors import DIRECTORY, NAMESPACE, DirectoryActor, PoolActor, on_the_head
from schoolhouse_server.pool.config import Bounds, PoolConfig
from schoolhouse_server.pool.planning import plan
from schoolhouse_server.pool.pool_state import Desired, TeacherState, Version
from schoolhouse_server.pool.replica_handle import Member, ReplicaFailedError
from schoolhouse_server.pool.scaling import Meter, Scaler

_LOOP_S = 0.5
_NODES_S = 1.0  # between two looks at what Ray knows of its nodes
_PUBLISH_TIMEOUT_S = 10.0
_DIRECTORY_TIMEOUT_S = 120.0  # for the directory to start, which is little more than its imports
_SCALE_S = 2.0  # between two looks at how long requests wait
_ADOPT_TIMEOUT_S = 10.0
_HOLD_TIMEOUT_S = 5.0
_MAX_FAILURES = 3  # starts in a row that may fail before a teacher counts as failed
_MAX_BACKOFF_S = 300.0

_log = logging.getLogger(__name__)


@dataclass
class Teacher:
    """What the keeper knows of one teacher's replicas; what they should be is in `TeacherState`."""

    members: list[Member] = field(default_factory=list)
    failures: int = 0  # starts in a row that failed
    error: str = ""  # why it cannot be started
    lost: str = ""  # which replica was lost last, when and why
    not_before: float = 0.0  # when the next start may be tried, after failures
    used_at: dict[int, float] = field(default_factory=dict)  # when each version last had a session, by time.time()
    scaler: Scaler = field(default_factory=Scaler)
    meter: Meter = field(default_factory=Meter)
    measured_at: float = 0.0


@dataclass(frozen=True)
class Entrance:
    """What people connect to: the directory as HOST:PORT and as a URL, and the page with charts, if there is one."""

    address: str
    url: str
    page: str


class KeeperActor(PoolActor):
    """Keeps a pool as it should be; after a restart it takes over the replicas and the newest desired state.

    It is the only actor that `up` makes, and it makes the others: so either there is no pool, or one that completes
    itself.

    All actors of the pool hold the desired state, and all are named and detached: keeper, directory and replicas may
    die in any order, as long as one of them lives on. Which actors exist is known by Ray's GCS; where the head node may
    be lost, give Ray an external Redis (GCS fault tolerance).
    """

    def __init__(self, pool: PoolConfig) -> None:
        super().__init__(pool.log_format)
        self._pool = pool
        self._directory: Any = None
        self._now = Desired.of(pool)
        self._teachers: dict[str, Teacher] = {name: Teacher() for name in self._now.teachers}
        self._seen_at = 0.0  # when Ray was last asked about its nodes
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._adopted = threading.Event()
        # If an error ends the thread, it ends the process too: Ray restarts a keeper only when its process has ended.
        self._thread = background.thread(self._keep, name="schoolhouse-keeper", on_death=lambda _error: os._exit(1))
        self._thread.start()

    def is_of(self, config: PoolConfig) -> bool:
        """Whether the pool has this configuration; a port 0 in it matches any port."""
        with self._locked():
            now = self._now.config
        ports = {name: getattr(now, name) for name in ("port", "http_port") if getattr(config, name) == 0}
        return replace(config, **ports) == now

    def entrance(self) -> Entrance:
        """Where students and operators find the pool; waits until the directory has started.

        Raises:
            TeacherTimeoutError: the directory does not start in time.
            TeacherUnavailableError: the directory cannot start, for example because its port is taken.
        """
        with self._locked():
            directory = self._directory
        calls = [directory.address.remote(), directory.url.remote(), directory.page.remote()]
        try:
            return Entrance(*ray.get(calls, timeout=_DIRECTORY_TIMEOUT_S))
        except GetTimeoutError as err:
            raise TeacherTimeoutError(
                f"the directory's actor did not start within {_DIRECTORY_TIMEOUT_S:g} s; does the head node have room?"
            ) from err
        except RayError as err:
            raise TeacherUnavailableError(f"the directory cannot start: {members.why(err)}") from err

    def status(self) -> list[dict[str, Any]]:
        """One row for each replica."""
        with self._locked():
            found = [(name, list(teacher.members)) for name, teacher in self._teachers.items()]
        return [status_rows.replica(name, self._now.teachers[name], member) for name, ones in found for member in ones]

    def jobs(self) -> list[dict[str, Any]]:
        """One row for each job of each teacher and revision."""
        with self._locked():
            return status_rows.jobs({name: teacher.members for name, teacher in self._teachers.items()})

    def teachers(self) -> dict[str, dict[str, Any]]:
        """For each teacher: bounds, wanted and serving replicas, revision, whether it is ready, and what failed."""
        with self._locked():
            return {
                name: status_rows.teacher(self._now.teachers[name], teacher.members, teacher.error, teacher.lost)
                for name, teacher in self._teachers.items()
            }

    def scale(self, name: str, bounds: Bounds) -> None:
        """Change how many replicas a teacher may have."""
        with self._locked():
            self._change(self._now.scaled(name, bounds))
            self._teachers[name].not_before = 0.0

    def roll(self, config: PoolConfig, names: list[str]) -> None:
        """Begin to replace the replicas of these teachers by replicas of their specs in `config`."""
        with self._locked():
            self._change(self._now.rolled(config, names))
            for name in names:
                teacher = self._teachers.setdefault(name, Teacher())
                teacher.failures, teacher.error, teacher.not_before = 0, "", 0.0

    def take_back(self, name: str, why: str) -> bool:
        """End a roll while none of its replicas serves yet; False if one does."""
        with self._locked():
            state = self._now.teacher(name)
            if state.current.revision or not state.old:
                return False
            self._change(self._now.with_teacher(name, state.taken_back(why)))
            return True

    def stop(self) -> None:
        """Stop all replicas of the pool."""
        self._stopping.set()
        self._thread.join()
        everyone = [member for teacher in self._teachers.values() for member in teacher.members]
        stops = [member.actor.stop.remote() for member in everyone if member.phase != "starting"]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=10)
        for member in everyone:
            member.kill()

    def _locked(self) -> threading.RLock:
        """The lock, once this keeper has taken over what an earlier one left.

        Raises:
            TeacherUnavailableError: it has not done so in time.
        """
        if not self._adopted.wait(2 * _ADOPT_TIMEOUT_S):
            raise TeacherUnavailableError("the pool's keeper has just started and is still looking for replicas; retry")
        return self._lock

    def _change(self, desired: Desired) -> None:
        """Make this the desired state; returns once another actor holds it too, or after a few seconds."""
        self._now = desired
        self.hold(desired)
        holders = [self._directory, *(m.actor for t in self._teachers.values() for m in t.members)]
        calls = [holder.hold.remote(desired) for holder in holders]
        ready, _ = ray.wait(calls, num_returns=1, timeout=_HOLD_TIMEOUT_S)
        if not ready:
            _log.warning("no other actor holds the pool's new state yet")

    def _adopt(self) -> None:
        """Take over the directory, the replicas and the desired state of a keeper that died."""
        found = members.adopt()
        holders = [member.actor for ones in found.values() for member in ones]
        with contextlib.suppress(ValueError):  # a directory that is made only now holds no state
            holders.append(ray.get_actor(DIRECTORY, namespace=NAMESPACE))
        self._directory = self._find_directory()
        calls = [holder.held.remote() for holder in holders]
        ray.wait(calls, num_returns=len(calls), timeout=_ADOPT_TIMEOUT_S)
        for state in _answers(calls):
            if state is not None and state.generation > self._now.generation:
                self._now = state
        self.hold(self._now)
        for name, state in self._now.teachers.items():
            ones = found.get(name, [])
            for member in ones:
                member.load_timeout_s = (state.version(member.version) or state.current).spec.load_timeout_s
            self._teachers[name] = Teacher(ones, used_at=dict.fromkeys((m.version for m in ones), time.time()))
        self._adopted.set()

    def _find_directory(self) -> Any:
        """The directory's actor, which is made if there is none."""
        return on_the_head(DirectoryActor, DIRECTORY, self._pool, max_concurrency=4, get_if_exists=True)

    def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                if not self._adopted.is_set():
                    self._adopt()
                self._see_nodes()
                with self._lock:
                    for name in self._now.teachers:
                        self._keep_teacher(name, self._teachers[name])
                    serving, table = self._table()
                self._publish(serving, table)
            except Exception:
                _log.exception("a round of the keeper failed; it goes on")
            self._stopping.wait(_LOOP_S)

    def _publish(self, serving: list[Member], table: list[bytes]) -> None:
        try:
            ray.get(self._directory.publish.remote(table), timeout=_PUBLISH_TIMEOUT_S)
        except (RayError, GetTimeoutError):
            _log.warning("the directory does not answer", exc_info=True)
            self._directory = self._find_directory()  # a new one only if the old one was killed for good
            return
        for member in serving:
            member.listed = True

    def _see_nodes(self) -> None:
        """Ask Ray which nodes are about to go, and why replicas without a node have none."""
        if time.monotonic() - self._seen_at < _NODES_S:
            return
        self._seen_at = time.monotonic()
        with self._lock:
            everyone = [(name, member) for name, teacher in self._teachers.items() for member in teacher.members]
        going = nodes.leaving()
        demand = nodes.Demand.now(going) if any(member.where is None for _, member in everyone) else None
        for name, member in everyone:
            if member.where is None and demand is not None:
                state = self._now.teachers[name]
                spec = (state.version(member.version) or state.current).spec
                member.hears(demand.why(members.needs(spec), members.rule(spec)))
            elif member.where is not None and member.where.node_id in going:
                if member.goes_at is None:
                    _log.info("%s/%s: its node %s is about to go", name, member.id, member.where.host)
                member.goes_at = going[member.where.node_id]

    def _keep_teacher(self, name: str, teacher: Teacher) -> None:
        try:
            for member in list(teacher.members):
                self._look_at(name, teacher, member)
            self._scale_by_load(name, teacher)
            self._follow_plan(name, teacher)
        except Exception:  # so that the other teachers are kept all the same
            _log.exception("%s: a round of the keeper failed; it goes on", name)

    def _look_at(self, name: str, teacher: Teacher, member: Member) -> None:
        """Take a replica's report, and remove the replica if it has failed or stopped."""
        was = member.phase
        try:
            member.poll()
            if was == "starting" and member.phase == "serving":
                self._has_started(name, teacher, member)
        except ReplicaFailedError as err:
            self._remove(teacher, member)
            if not member.stopping:
                _log.warning("%s/%s is gone: %s", name, member.id, err)
                teacher.lost = f"{member.id} was lost at {time.strftime('%H:%M:%S')}: {err}"
                if err.starting:
                    self._start_failed(name, teacher, member, str(err))
            return
        if member.load.sessions:
            teacher.used_at[member.version] = time.time()
        if member.phase == "draining" and member.report.drained:
            member.stop()
        if member.ended():
            _log.info("%s/%s has stopped", name, member.id)
            self._remove(teacher, member)

    def _remove(self, teacher: Teacher, member: Member) -> None:
        member.kill()
        teacher.members.remove(member)

    def _has_started(self, name: str, teacher: Teacher, member: Member) -> None:
        """Check that a new replica has the revision of the others of its version, and note that it serves."""
        state, found = self._now.teachers[name], member.report.revision
        version = state.version(member.version)
        if version is None:
            return
        others = any(m.phase == "serving" and m.version == member.version and m is not member for m in teacher.members)
        if version.revision and version.revision != found and (others or version is not state.current):
            raise ReplicaFailedError(
                f"it has revision {found}, and others of the same spec have {version.revision}: the replicas of a "
                "teacher must be equal. Give it weights or a seed; `schoolhouse roll` takes over changed weights",
                starting=True,
            )
        teacher.used_at[member.version] = time.time()
        if version.revision != found:
            state = state.with_version(replace(version, revision=found))
        if version.number == state.current.number:
            teacher.failures, teacher.error, teacher.not_before = 0, "", 0.0
            state = replace(state, old=tuple(_superseded(old) for old in state.old))
        if state != self._now.teachers[name]:
            self._change(self._now.with_teacher(name, state))

    def _start_failed(self, name: str, teacher: Teacher, member: Member, why: str) -> None:
        state = self._now.teachers[name]
        if member.version != state.current.number:
            self._change(self._now.with_teacher(name, state.without(member.version)))
            return
        teacher.failures += 1
        if teacher.failures < _MAX_FAILURES:
            return
        if state.old and not state.current.revision:
            _log.error("%s: the roll is taken back: %s", name, why)
            self._change(self._now.with_teacher(name, state.taken_back(why)))
            teacher.failures = 0
        else:
            teacher.error = why
            backoff_s = min(10.0 * 2 ** (teacher.failures - _MAX_FAILURES), _MAX_BACKOFF_S)
            teacher.not_before = time.monotonic() + backoff_s

    def _scale_by_load(self, name: str, teacher: Teacher) -> None:
        state, now = self._now.teachers[name], time.monotonic()
        current = [m for m in teacher.members if m.version == state.current.number and m.phase != "draining"]
        serving = [m for m in current if m.phase == "serving"]
        if state.bounds.min == state.bounds.max or not serving or now - teacher.measured_at < _SCALE_S:
            return
        teacher.measured_at = now
        pressure = teacher.meter.read([(member.id, member.load) for member in serving], now)
        whole = len(serving) == len(current) == state.count  # if not, it does not grow before all of these serve
        bounds = state.bounds if whole else Bounds(min=state.bounds.min, max=state.count)
        count = teacher.scaler.decide(state.current.spec.autoscale, bounds, state.count, pressure, now)
        if count != state.count:
            _log.info("%s: %d -> %d replicas, %s", name, state.count, count, pressure)
            self._change(self._now.with_teacher(name, replace(state, count=count)))

    def _follow_plan(self, name: str, teacher: Teacher) -> None:
        state = self._now.teachers[name]
        planned = plan(state, [m.seen() for m in teacher.members], teacher.used_at, time.time())
        for version in planned.start:
            if time.monotonic() >= teacher.not_before or version != state.current:
                self._start(name, teacher, version)
        for member in teacher.members:
            if member.id in planned.drain:
                _log.info("%s/%s drains", name, member.id)
                member.drain(state.current.pool.drain_timeout_s)
        left = {m.version for m in teacher.members} | {v.number for v in planned.start}
        for version in state.old:
            if version.superseded_at and version.number not in left:
                self._change(self._now.with_teacher(name, self._now.teachers[name].without(version.number)))

    def _start(self, name: str, teacher: Teacher, version: Version) -> None:
        others = [m for m in teacher.members if m.version == version.number and not m.going]
        unplaced = [m for m in others if m.where is None]
        if members.one_at_a_time(version.spec) and unplaced:
            for member in unplaced:  # those that wait for a node that no longer suits are started again next round
                if member.waits and member.labels != members.placement(version.spec, others).get("label_selector", {}):
                    self._remove(teacher, member)
            return
        teacher.members.append(members.start(name, version, others, self._now))

    def _table(self) -> tuple[list[Member], list[bytes]]:
        """The members that the directory lists, and its whole table, as serialized replica sets."""
        listed, table = [], []
        for name, state in self._now.teachers.items():
            serving = [m for m in self._teachers[name].members if m.phase != "starting" and not m.stopping]
            serving = [m for m in serving if m.report.address]
            listed += serving
            replicas = [member.described() for member in serving]
            revision = _revision_of(state, replicas)
            found = directory_pb2.ReplicaSet(teacher=name, replicas=replicas, wanted=state.count, revision=revision)
            table.append(found.SerializeToString())
        return listed, table


def _superseded(version: Version) -> Version:
    return version if version.superseded_at else replace(version, superseded_at=time.time())


def _revision_of(state: TeacherState, replicas: list[directory_pb2.Replica]) -> str:
    """The revision for jobs that begin now: the newest of which a replica serves."""
    serving = {r.revision for r in replicas if r.state == directory_pb2.Replica.SERVING}
    return next((v.revision for v in reversed(state.versions) if v.revision in serving), "")


def _answers(calls: list[Any]) -> Iterator[Any]:
    """The results of the calls that have returned by now; failed and pending ones are left out."""
    for call in calls:
        try:
            yield ray.get(call, timeout=0)
        except (RayError, GetTimeoutError):
            continue
