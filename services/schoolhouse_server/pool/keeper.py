"""The keeper: holds every teacher of a pool at its replicas, scales and rolls it, and tells the directory."""

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
from schoolhouse.errors import TeacherTimeoutError, TeacherUnavailableError
from schoolhouse_wire import background
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
_DIRECTORY_TIMEOUT_S = 120.0  # until it has started, which is little more than its imports
_SCALE_S = 2.0  # between two looks at how long requests wait
_ADOPT_TIMEOUT_S = 10.0
_HOLD_TIMEOUT_S = 5.0
_MAX_FAILURES = 3  # starts in a row that may fail before a teacher counts as failed
_MAX_BACKOFF_S = 300.0

_log = logging.getLogger(__name__)


@dataclass
class Teacher:
    """What the keeper knows of one teacher's replicas, beside what they should be."""

    members: list[Member] = field(default_factory=list)
    failures: int = 0  # starts in a row
    error: str = ""
    lost: str = ""  # which replica was gone last, when and why
    not_before: float = 0.0  # of the next start, after failures
    used_at: dict[int, float] = field(default_factory=dict)  # by version, on time.time()'s clock
    scaler: Scaler = field(default_factory=Scaler)
    meter: Meter = field(default_factory=Meter)
    measured_at: float = 0.0


@dataclass(frozen=True)
class Entrance:
    """Where people come in: the directory as HOST:PORT and as a URL, and the page with charts, if there is one."""

    address: str
    url: str
    page: str


class KeeperActor(PoolActor):
    """Keeps a pool as it should be. Restarted, it takes over the replicas and the newest desired state that is held.

    It is the one actor that `up` makes, and makes the others: there is no pool, or one that becomes whole by itself.

    What must survive is held by all the pool's actors, which are named and detached: keeper, directory and replicas may
    die in any order, as long as one lives on. The cluster's own memory of which actors there are is that of Ray's GCS;
    where the head node may be lost, give Ray an external Redis (GCS fault tolerance).
    """

    def __init__(self, pool: PoolConfig) -> None:
        super().__init__(pool.log_format)
        self._pool = pool
        self._directory: Any = None
        self._now = Desired.of(pool)
        self._teachers: dict[str, Teacher] = {name: Teacher() for name in self._now.teachers}
        self._seen_at = 0.0  # when the nodes were looked at
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._adopted = threading.Event()
        # If the thread ends by an error, so does the process: Ray restarts a keeper whose process has ended, and would
        # take this one for well.
        self._thread = background.thread(self._keep, name="schoolhouse-keeper", on_death=lambda _error: os._exit(1))
        self._thread.start()

    def is_of(self, config: PoolConfig) -> bool:
        """Whether it is the pool of this file; of a port 0 any port."""
        with self._locked():
            now = self._now.config
        ports = {name: getattr(now, name) for name in ("port", "http_port") if getattr(config, name) == 0}
        return replace(config, **ports) == now

    def entrance(self) -> Entrance:
        """Where students and operators find the pool; waits until the directory has started.

        Raises:
            TeacherTimeoutError: it does not start in time.
            TeacherUnavailableError: it cannot listen there.
        """
        with self._locked():
            directory = self._directory
        calls = [directory.address.remote(), directory.url.remote(), directory.page.remote()]
        try:
            return Entrance(*ray.get(calls, timeout=_DIRECTORY_TIMEOUT_S))
        except GetTimeoutError as err:
            raise TeacherTimeoutError(
                f"the directory's actor did not start within {_DIRECTORY_TIMEOUT_S:g} s; has the head node room?"
            ) from err
        except RayError as err:
            raise TeacherUnavailableError(f"the directory cannot start: {members.why(err)}") from err

    def status(self) -> list[dict[str, Any]]:
        """A row for each replica."""
        with self._locked():
            found = [(name, list(teacher.members)) for name, teacher in self._teachers.items()]
        return [status_rows.replica(name, self._now.teachers[name], member) for name, ones in found for member in ones]

    def jobs(self) -> list[dict[str, Any]]:
        """A row for each job of each teacher and revision."""
        with self._locked():
            return status_rows.jobs({name: teacher.members for name, teacher in self._teachers.items()})

    def teachers(self) -> dict[str, dict[str, Any]]:
        """By teacher: its bounds, wanted and serving replicas, revision, whether it is all there, and what failed."""
        with self._locked():
            return {
                name: status_rows.teacher(self._now.teachers[name], teacher.members, teacher.error, teacher.lost)
                for name, teacher in self._teachers.items()
            }

    def scale(self, name: str, bounds: Bounds) -> None:
        """Give a teacher other bounds."""
        with self._locked():
            self._change(self._now.scaled(name, bounds))
            self._teachers[name].not_before = 0.0

    def roll(self, config: PoolConfig, names: list[str]) -> None:
        """Begin to replace these teachers' replicas by those of new specs."""
        with self._locked():
            self._change(self._now.rolled(config, names))
            for name in names:
                teacher = self._teachers.setdefault(name, Teacher())
                teacher.failures, teacher.error, teacher.not_before = 0, "", 0.0

    def take_back(self, name: str, why: str) -> bool:
        """End a roll of which no replica serves yet; False if one does."""
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
        """The lock, once what another keeper left has been taken over.

        Raises:
            TeacherUnavailableError: that is not so yet.
        """
        if not self._adopted.wait(2 * _ADOPT_TIMEOUT_S):
            raise TeacherUnavailableError("the pool's keeper has not found out yet what is there; ask again")
        return self._lock

    def _change(self, desired: Desired) -> None:
        """What should be from now on. Returns once someone else holds it, too."""
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
        with contextlib.suppress(ValueError):  # one that is made now holds nothing, and is not waited for
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
        """The directory's actor, made where there is none."""
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
                _log.exception("the keeper goes on")
            self._stopping.wait(_LOOP_S)

    def _publish(self, serving: list[Member], table: list[bytes]) -> None:
        try:
            ray.get(self._directory.publish.remote(table), timeout=_PUBLISH_TIMEOUT_S)
        except (RayError, GetTimeoutError):
            _log.warning("the directory is away", exc_info=True)
            self._directory = self._find_directory()  # another one only where it was killed for good
            return
        for member in serving:
            member.listed = True

    def _see_nodes(self) -> None:
        """Hear from Ray which nodes are about to go, and why replicas have none."""
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
        except Exception:  # the other teachers are kept all the same
            _log.exception("%s: the keeper goes on", name)

    def _look_at(self, name: str, teacher: Teacher, member: Member) -> None:
        """Hear what a replica says, and take those out that are at their end."""
        was = member.phase
        try:
            member.poll()
            if was == "starting" and member.phase == "serving":
                self._has_started(name, teacher, member)
        except ReplicaFailedError as err:
            self._remove(teacher, member)
            if not member.stopping:
                _log.warning("%s/%s is gone: %s", name, member.id, err)
                teacher.lost = f"{member.id} was gone at {time.strftime('%H:%M:%S')}: {err}"
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
        """Check that it is what the others of its version are, and note that it serves."""
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
        whole = len(serving) == len(current) == state.count  # else there are no more before all of these serve
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
            for member in unplaced:  # the next turn knows where they went, or what they wait for instead
                if member.waits and member.labels != members.placement(version.spec, others).get("label_selector", {}):
                    self._remove(teacher, member)
            return
        teacher.members.append(members.start(name, version, others, self._now))

    def _table(self) -> tuple[list[Member], list[bytes]]:
        """The members that the directory is told of, and what it is told."""
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
    """What a job that begins now gets: the newest that serves; that of a roll as soon as one of its replicas does."""
    serving = {r.revision for r in replicas if r.state == directory_pb2.Replica.SERVING}
    return next((v.revision for v in reversed(state.versions) if v.revision in serving), "")


def _answers(calls: list[Any]) -> Iterator[Any]:
    """What the calls that have ended by now returned; those that failed are left out."""
    for call in calls:
        try:
            yield ray.get(call, timeout=0)
        except (RayError, GetTimeoutError):
            continue
