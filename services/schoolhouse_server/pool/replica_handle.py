"""A replica as the keeper sees it: starts its actor, polls its reports, and ends it, without waiting for answers."""

import contextlib
import itertools
import math
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from schoolhouse_wire.errors import SchoolhouseError
from schoolhouse_wire.v1 import directory_pb2

from schoolhouse_server.pool.actors import NAMESPACE, Report, TeacherActor, Where
from schoolhouse_server.pool.config import TeacherSpec
from schoolhouse_server.pool.planning import Seen
from schoolhouse_server.pool.pool_state import Desired, Version

_HUNG_S = 60.0  # a replica that does not answer for this long is replaced
_PROCESS_TIMEOUT_S = 1800.0  # for a process that Ray has room for to start, and import what it needs
_STOP_TIMEOUT_S = 10.0
_LEAVE_S = 15.0  # how long before its node goes a replica begins to drain, whether or not another one serves
_LAST_S = 2.0  # how long before its node goes a replica must have drained
_MAX_WHY = 600  # characters of what Ray says
_PREFIX = "teacher"
_NODE_ID = "ray.io/node-id"
_UNHEARD = "waits for a node"  # until Ray says what for, which it may never do


class ReplicaFailedError(Exception):
    """A replica is lost; `starting` says that it had not served yet."""

    def __init__(self, why: str, *, starting: bool) -> None:
        super().__init__(why)
        self.starting = starting


@dataclass(eq=False)
class Member:
    """One replica's actor, and its last report."""

    id: str
    version: int
    actor: Any
    pending: Any  # the call that is under way; its answer, a Report, shows that the replica lives
    pending_where: Any
    load_timeout_s: float = math.inf
    labels: dict[str, str] | None = None  # the label selector given to Ray; None if a former keeper started it
    began: float = field(default_factory=time.monotonic)
    placed_at: float = field(default_factory=time.monotonic)  # since when Ray has room for it, or its process runs
    waits: str = ""  # why no node has room for it
    goes_at: float | None = None  # when its node goes, on time.time()'s clock; None if it stays
    asked_at: float = field(default_factory=time.monotonic)
    phase: Literal["starting", "serving", "draining"] = "starting"
    listed: bool = False  # whether the directory lists it
    where: Where | None = None
    report: Report = field(default_factory=lambda: Report("starting", 0))
    load: directory_pb2.Load = field(default_factory=directory_pb2.Load)
    _stopping: Any = None
    _stop_by: float = 0.0

    @property
    def stopping(self) -> bool:
        """Whether it has been told to stop."""
        return self._stopping is not None

    @property
    def going(self) -> bool:
        """Whether it drains, or its node is about to go."""
        return self.phase == "draining" or self.goes_at is not None

    def seen(self) -> Seen:
        """The facts of this replica that planning uses."""
        return Seen(
            id=self.id,
            version=self.version,
            phase=self.phase,
            revision=self.report.revision,
            placed=not self.waits,
            age_s=time.monotonic() - self.began,
            sessions=self.load.sessions,
            leaving=self.goes_at is not None,
            due=self.goes_at is not None and self.goes_at - time.time() < _LEAVE_S,
        )

    def described(self) -> directory_pb2.Replica:
        """The directory's entry for this replica."""
        state = directory_pb2.Replica.DRAINING if self.phase == "draining" else directory_pb2.Replica.SERVING
        where = self.where or Where("", "", "")
        return directory_pb2.Replica(
            id=self.id,
            address=self.report.address,
            revision=self.report.revision,
            load=self.load,
            state=state,
            host=where.host,
            zone=where.zone,
        )

    def poll(self) -> None:
        """Take its report if there is one, and ask again; raises `ReplicaFailedError` if it is lost or hangs."""
        try:
            self._take_where()
            ready, _ = ray.wait([self.pending], timeout=0)
            if ready:
                self._take(ray.get(self.pending))
            else:
                self._check_time()
        except ActorUnavailableError:
            self._check_time()
            self._ask(again=True)  # the network may come back; `asked_at` is not reset
        except RayError as err:  # start() raised, its process or node died, or it was killed for its memory use
            raise ReplicaFailedError(why(err), starting=self.phase == "starting") from err

    def _check_time(self) -> None:
        """Raises `ReplicaFailedError` if it has been starting, or has not answered, for too long."""
        now, starting = time.monotonic(), self.phase == "starting"
        if not starting and now - self.asked_at > _HUNG_S:
            raise ReplicaFailedError(f"it did not answer for {_HUNG_S:g} s", starting=False)
        if starting and self.where is None and now - self.placed_at > _PROCESS_TIMEOUT_S:
            raise ReplicaFailedError(f"its process did not start within {_PROCESS_TIMEOUT_S:g} s", starting=True)
        if starting and self.where is not None and now - self.placed_at > self.load_timeout_s:
            text = f"it was not loaded within {self.load_timeout_s:g} s, its load_timeout_s"
            raise ReplicaFailedError(text, starting=True)

    def hears(self, waits: str) -> None:
        """Note why no node has room for it; empty if one has."""
        self.waits = waits if self.where is None else ""
        if self.waits:
            self.placed_at = time.monotonic()

    def stage(self) -> str:
        """What it is doing, in words for an operator."""
        if self.phase != "starting":
            stage = self.phase if self.listed else "registering"
            return f"{stage}, its node is about to go" if self.goes_at is not None else stage
        if self.where is None:
            return self.waits or "starting"
        try:
            return str(ray.get(self.actor.report.remote(), timeout=0.2).stage)
        except (RayError, GetTimeoutError):
            return self.report.stage

    def drain(self, timeout_s: float) -> None:
        """Have it finish its requests, as long as its node is there; if it does not serve yet, stop it."""
        if self.phase == "starting":
            self.stop()
        else:
            left_s = math.inf if self.goes_at is None else max(self.goes_at - time.time() - _LAST_S, 0.0)
            self.actor.drain.remote(min(timeout_s, left_s))
        self.phase = "draining"

    def stop(self) -> None:
        """Tell it to stop; `ended` says when it may be killed."""
        if self._stopping is None:
            self._stopping = self.actor.stop.remote()
            self._stop_by = time.monotonic() + (_STOP_TIMEOUT_S if self.phase != "starting" else 0.0)

    def ended(self) -> bool:
        """Whether it has stopped, or its time to stop is over."""
        return self._stopping is not None and (
            time.monotonic() >= self._stop_by or bool(ray.wait([self._stopping], timeout=0)[0])
        )

    def kill(self) -> None:
        """End its process, even on a node that cannot be reached at present."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.actor)

    def _take_where(self) -> None:
        if self.where is None and ray.wait([self.pending_where], timeout=0)[0]:
            try:
                self.where = ray.get(self.pending_where)
                self.waits, self.placed_at = "", time.monotonic() - self.where.since_s
            except ActorUnavailableError:
                self.pending_where = self.actor.where.remote()

    def _take(self, report: Report) -> None:
        if report.trouble:
            raise ReplicaFailedError(report.trouble, starting=False)
        self.report = report
        self.load = directory_pb2.Load.FromString(report.load)
        if self.phase != "draining" and report.address:
            self.phase = "draining" if report.draining else "serving"
        self._ask(again=False)

    def _ask(self, *, again: bool) -> None:
        if not again:
            self.asked_at = time.monotonic()
        starting = self.phase == "starting"  # another start() just waits for the one that is under way
        self.pending = self.actor.start.remote() if starting else self.actor.report.remote()


def start(teacher: str, version: Version, others: Iterable[Member], desired: Desired) -> Member:
    """Start a replica of a version, placed as its spec says with respect to the `others` of that version."""
    member_id = uuid.uuid4().hex[:8]
    spec, options = version.spec, placement(version.spec, others)
    actor = (
        ray.remote(TeacherActor)
        .options(
            name=f"{_PREFIX}/{teacher}/{version.number}/{member_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            max_concurrency=8,
            num_cpus=spec.resources.num_cpus,
            num_gpus=spec.resources.num_gpus,
            resources=spec.resources.custom or None,
            **options,
        )
        .remote(teacher, spec, version.pool, version.number)
    )
    actor.hold.remote(desired)
    return Member(
        member_id,
        version.number,
        actor,
        pending=actor.start.remote(),
        pending_where=actor.where.remote(),
        load_timeout_s=spec.load_timeout_s,
        waits=_UNHEARD,
        labels=options.get("label_selector", {}),
    )


def needs(spec: TeacherSpec) -> dict[str, float]:
    """What a replica takes of its node, by the names of Ray's resources."""
    return {"CPU": spec.resources.num_cpus, "GPU": spec.resources.num_gpus, **spec.resources.custom}


def rule(spec: TeacherSpec) -> str:
    """Which nodes a replica may run on, as the end of a sentence about what it needs; empty for any node."""
    labels = ", ".join(f"{name}: {value}" for name, value in spec.labels.items())
    strict = f" with placement {spec.placement}" if spec.placement.startswith("STRICT") else ""
    return (f" on a node of {{{labels}}}" if labels else "") + strict


def why(err: RayError) -> str:
    """What Ray, or the teacher's own code, says of an error, in one line without details of processes and stacks."""
    cause, lines = getattr(err, "cause", None), str(err).splitlines()
    if isinstance(cause, Exception) and not isinstance(cause, RayError):
        return _line(str(cause) if isinstance(cause, SchoolhouseError) else f"{type(cause).__name__}: {cause}")
    if isinstance(err, RayActorError) and not err.actor_init_failed:  # details of the actor, then what happened
        rest = list(itertools.dropwhile(lambda line: line.startswith("\t"), lines[1:]))
    else:  # a stack perhaps, then what was raised
        rest = lines[max((number for number, line in enumerate(lines) if line.startswith("  ")), default=-1) + 1 :]
    said = _line(" ".join(rest or lines[:1]))
    return f"its node was preempted: {said}" if getattr(err, "preempted", False) else said


def _line(text: str) -> str:
    return " ".join(text.split())[:_MAX_WHY]


def one_at_a_time(spec: TeacherSpec) -> bool:
    """Whether where the next replica may go depends on where the one before it went."""
    return spec.placement in ("STRICT_SPREAD", "PACK", "STRICT_PACK")


def is_replica(name: str) -> bool:
    """Whether an actor of that name is a replica of a teacher."""
    return name.startswith(f"{_PREFIX}/")


def adopt() -> dict[str, list[Member]]:
    """The replicas that an earlier keeper has started and left behind, by teacher."""
    found: dict[str, list[Member]] = {}
    for name in ray.util.list_named_actors():
        kind, _, rest = name.partition("/")
        teacher, _, numbers = rest.partition("/")
        version, _, member_id = numbers.partition("/")
        if kind == _PREFIX and member_id:
            with contextlib.suppress(ValueError):  # the actor has died meanwhile
                actor = ray.get_actor(name, namespace=NAMESPACE)
                member = Member(member_id, int(version), actor, actor.report.remote(), actor.where.remote())
                found.setdefault(teacher, []).append(member)
    return found


def actors(teacher: str = "", member_id: str = "") -> dict[str, Any]:
    """The actors of replicas by TEACHER/ID: all of them, those of one teacher, or one replica's."""
    found = {}
    for name in ray.util.list_named_actors():
        kind, *rest = name.split("/")
        if kind == _PREFIX and rest[0] == (teacher or rest[0]) and rest[-1] == (member_id or rest[-1]):
            with contextlib.suppress(ValueError):
                found[f"{rest[0]}/{rest[-1]}"] = ray.get_actor(name, namespace=NAMESPACE)
    return found


def placement(spec: TeacherSpec, others: Iterable[Member]) -> dict[str, Any]:
    """Ray's scheduling options for a replica, given the others; with a label selector Ray waits for a fitting node."""
    nodes = [member.where.node_id for member in others if member.where is not None]
    labels = dict(spec.labels)
    options: dict[str, Any] = {}
    if spec.placement == "SPREAD":
        options["scheduling_strategy"] = "SPREAD"
    elif spec.placement == "STRICT_SPREAD" and nodes:
        labels[_NODE_ID] = f"!in({','.join(sorted(set(nodes)))})"
    elif spec.placement == "STRICT_PACK" and nodes:
        labels[_NODE_ID] = nodes[0]
    elif spec.placement == "PACK" and nodes and not labels:
        fullest = max(nodes, key=nodes.count)
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(fullest, soft=True, _spill_on_unavailable=True)
    if labels:
        options["label_selector"] = labels
    return options
