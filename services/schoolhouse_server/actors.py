"""The Ray actors: a teacher's replica on its device, the directory, and the keeper that holds a pool at strength."""

import logging
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from schoolhouse_wire import channel
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

from schoolhouse_server.config import PoolConfig, TeacherSpec
from schoolhouse_server.directory import Directory
from schoolhouse_server.executor import DaemonExecutor
from schoolhouse_server.loading import load_example, load_teacher
from schoolhouse_server.replica import Replica
from schoolhouse_server.standard import add_standard_services

NAMESPACE = "schoolhouse"
KEEPER, DIRECTORY = "keeper", "directory"
_LOOP_S = 0.5
_HUNG_S = 60.0  # a replica that answers nothing for this long is replaced
_LOAD_TIMEOUT_S = 1800.0
_MAX_FAILURES = 3  # starts in a row that may fail before a teacher is given up

_log = logging.getLogger(__name__)


def _listen_host(host: str) -> tuple[str, str]:
    """Where a server on this node binds, and the host that clients reach it at."""
    if host in ("127.0.0.1", "localhost"):
        return "127.0.0.1", "127.0.0.1"
    return "0.0.0.0", ray.util.get_node_ip_address()


class TeacherActor:
    """One replica: builds its teacher, serves it, reports its load. It owns the device that Ray gave it."""

    def __init__(self, name: str, spec: TeacherSpec, pool: PoolConfig) -> None:
        self._name, self._spec, self._pool = name, spec, pool
        self._stage = "starting"
        self._replica: Replica | None = None
        self._address = ""

    def start(self) -> dict[str, str]:
        """Build and serve; returns the address and the revision. Raises what keeps it from that."""
        self._stage = "loading weights"
        module = load_teacher(self._spec, self._pool.folder)
        bind, advertised = _listen_host(self._pool.host)
        self._stage = "reading the revision"
        self._replica = Replica(
            {self._name: module},
            host=bind,
            early_stop=self._spec.early_stop,
            cache_bytes=self._spec.cache_bytes,
            shared_memory_bytes=self._spec.shared_memory_bytes,
            cost=self._spec.cost,
            max_in_flight=self._spec.max_in_flight,
            max_job_bytes=self._spec.max_job_bytes,
            max_queued=self._spec.max_queued,
            lease_s=self._spec.lease_s,
            merging=self._spec.merging,
            example=load_example(self._spec, self._pool.folder),
        ).start()
        self._address = f"{advertised}:{self._replica.port}"
        self._stage = "serving"
        return self.info()

    def info(self) -> dict[str, str]:
        """Address and revision; empty before it serves."""
        if self._replica is None:
            return {}
        return {"address": self._address, "revision": self._replica.engines[self._name].description.revision}

    def stage(self) -> str:
        """What it is doing at present."""
        return self._stage

    def load(self) -> bytes:
        """Its load, as a serialized message."""
        return self._replica.load(self._name).SerializeToString() if self._replica is not None else b""

    def stop(self) -> None:
        """End its sessions and stop listening."""
        if self._replica is not None:
            self._replica.close()


class DirectoryActor:
    """The gRPC server that tells students where the replicas are. Its table is published by the keeper."""

    def __init__(self, host: str, port: int) -> None:
        bind, advertised = _listen_host(host)
        self._directory = Directory()
        server = grpc.server(
            DaemonExecutor(256, "schoolhouse-directory"),  # type: ignore[arg-type]  # it uses what every Executor has
            options=channel.SERVER_OPTIONS,
            maximum_concurrent_rpcs=256,
        )
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(self._directory, server)  # type: ignore[no-untyped-call]
        add_standard_services(server, ("schoolhouse.v1.DirectoryService",))
        self._port = server.add_insecure_port(f"{bind}:{port}")
        server.start()
        self._address = f"{advertised}:{self._port}"
        self._server = server

    def address(self) -> str:
        """host:port that students connect to."""
        return self._address

    def publish(self, replica_sets: list[bytes]) -> None:
        """Replace the replica sets of these teachers."""
        for data in replica_sets:
            self._directory.publish(directory_pb2.ReplicaSet.FromString(data))


@dataclass(eq=False)
class Member:
    """A replica as the keeper sees it."""

    id: str
    actor: Any
    pending: Any  # the call whose answer shows that it lives
    asked_at: float
    starting: bool = True
    listed: bool = False  # in the directory
    info: dict[str, str] = field(default_factory=dict)
    load: directory_pb2.Load = field(default_factory=directory_pb2.Load)


class KeeperActor:
    """Keeps every teacher of a pool at its number of replicas, and the directory up to date."""

    def __init__(self, pool: PoolConfig, directory: Any) -> None:
        self._pool = pool
        self._directory = directory
        self._members: dict[str, list[Member]] = {name: [] for name in pool.teachers}
        self._failures: dict[str, int] = dict.fromkeys(pool.teachers, 0)
        self._errors: dict[str, str] = {}
        self._stopping = threading.Event()
        self._adopt()
        self._thread = threading.Thread(target=self._keep, name="schoolhouse-keeper", daemon=True)
        self._thread.start()

    def status(self) -> list[dict[str, Any]]:
        """A row for each replica, and one for each teacher that was given up."""
        rows: list[dict[str, Any]] = []
        for name, members in list(self._members.items()):
            for member in list(members):
                rows.append(
                    {
                        "teacher": name,
                        "wanted": self._pool.teachers[name].replicas,
                        "id": member.id,
                        "stage": self._stage(member),
                        "address": member.info.get("address", ""),
                        "revision": member.info.get("revision", ""),
                        "queued": member.load.queued,
                        "in_flight": member.load.in_flight,
                        "served": member.load.served,
                        "sessions": member.load.sessions,
                        "joined": member.load.joined,
                        "cached": member.load.cached,
                        "missed": member.load.missed,
                    }
                )
        return rows

    def errors(self) -> dict[str, str]:
        """Teachers that could not be started, and why."""
        return dict(self._errors)

    def ready(self) -> bool:
        """Whether every teacher has all its replicas, and the directory lists them."""
        return all(
            sum(member.listed for member in self._members[name]) >= spec.replicas
            for name, spec in self._pool.teachers.items()
        )

    def stop(self) -> None:
        """Stop all replicas of the pool."""
        self._stopping.set()
        self._thread.join()
        members = [member for group in self._members.values() for member in group]
        stops = [member.actor.stop.remote() for member in members if not member.starting]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=10)
        for member in members:
            ray.kill(member.actor)

    def _stage(self, member: Member) -> str:
        if member.listed:
            return "serving"
        try:
            stage = str(ray.get(member.actor.stage.remote(), timeout=0.2))
            return "registering" if stage == "serving" else stage
        except (RayError, GetTimeoutError):
            return "waiting for resources"

    def _adopt(self) -> None:
        """Take over the replicas of a keeper that died."""
        for name in ray.util.list_named_actors():
            kind, _, rest = name.partition("/")
            teacher, _, member_id = rest.rpartition("/")
            if kind == "teacher" and teacher in self._members:
                actor = ray.get_actor(name)
                self._members[teacher].append(Member(member_id, actor, actor.info.remote(), time.monotonic()))

    def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                for name in self._pool.teachers:
                    self._keep_teacher(name)
                serving = [m for members in self._members.values() for m in members if not m.starting]
                ray.get(self._directory.publish.remote(self._replica_sets()), timeout=10)
                for member in serving:
                    member.listed = True
            except (RayError, GetTimeoutError):
                _log.exception("the keeper goes on")  # the directory restarts by itself
            self._stopping.wait(_LOOP_S)

    def _keep_teacher(self, name: str) -> None:
        members = self._members[name]
        for member in list(members):
            if not self._lives(name, member):
                members.remove(member)
        while len(members) < self._pool.teachers[name].replicas and name not in self._errors:
            members.append(self._start(name))

    def _start(self, name: str) -> Member:
        spec = self._pool.teachers[name]
        member_id = uuid.uuid4().hex[:8]
        actor = (
            ray.remote(TeacherActor)
            .options(
                name=f"teacher/{name}/{member_id}",
                namespace=NAMESPACE,
                lifetime="detached",
                max_concurrency=4,
                num_cpus=spec.resources.num_cpus,
                num_gpus=spec.resources.num_gpus,
                resources=spec.resources.custom or None,
            )
            .remote(name, spec, self._pool)
        )
        return Member(member_id, actor, actor.start.remote(), time.monotonic())

    def _lives(self, name: str, member: Member) -> bool:
        """Whether the replica should be kept; takes its answer if there is one, and asks again."""
        limit = _LOAD_TIMEOUT_S if member.starting else _HUNG_S
        try:
            ready, _ = ray.wait([member.pending], timeout=0)
            if not ready:
                return self._kill_if(member, time.monotonic() - member.asked_at > limit)
            answer = ray.get(member.pending)
        except RayActorError:
            if member.starting:
                self._failed(name, "its process died while it was starting")
            return False
        except RayError as err:  # start() raised
            self._failed(name, str(getattr(err, "cause", err)))
            self._kill_if(member, True)
            return False
        if member.starting:
            if not answer:  # adopted before it was ready
                member.pending = member.actor.start.remote()
                return True
            member.info, member.starting = answer, False
            self._failures[name] = 0
        else:
            member.load = directory_pb2.Load.FromString(answer)
        member.pending, member.asked_at = member.actor.load.remote(), time.monotonic()
        return True

    def _kill_if(self, member: Member, hung: bool) -> bool:
        if hung:
            ray.kill(member.actor)
        return not hung

    def _failed(self, name: str, why: str) -> None:
        self._failures[name] += 1
        if self._failures[name] >= _MAX_FAILURES:
            self._errors[name] = why

    def _replica_sets(self) -> list[bytes]:
        sets = []
        for name, members in self._members.items():
            replicas = [
                directory_pb2.Replica(
                    id=member.id,
                    address=member.info["address"],
                    revision=member.info["revision"],
                    load=member.load,
                )
                for member in members
                if not member.starting
            ]
            wanted = self._pool.teachers[name].replicas
            sets.append(directory_pb2.ReplicaSet(teacher=name, replicas=replicas, wanted=wanted).SerializeToString())
        return sets
