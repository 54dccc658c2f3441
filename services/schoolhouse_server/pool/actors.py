"""The Ray actors that serve students: a teacher's replica on its device, and the directory."""

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import ray
from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc

from schoolhouse_server.common.logs import RingHandler, set_up
from schoolhouse_server.observe.web import WebServer
from schoolhouse_server.pool.config import PoolConfig, TeacherSpec
from schoolhouse_server.pool.pool_state import Desired
from schoolhouse_server.replica.directory import MAX_WATCHERS, Directory
from schoolhouse_server.replica.rpc_server import RpcServer
from schoolhouse_server.security.auth import Gate
from schoolhouse_server.security.interceptor import SHORT_RPCS
from schoolhouse_server.security.ports import EVERYWHERE, joined, own_address
from schoolhouse_server.security.tokens import Tokens

if TYPE_CHECKING:
    from torch import nn

    from schoolhouse_server.replica.replica import Replica

NAMESPACE = "schoolhouse"
KEEPER, DIRECTORY = "keeper", "directory"
_HEAD_NODE = {"node:__internal_head__": 0.001}  # keeps the directory at its address when it is restarted
_LOG_LINES = 2000
_DIRECTORY_RPCS = MAX_WATCHERS + SHORT_RPCS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Where:
    """The node that an actor runs on."""

    node_id: str
    host: str
    zone: str  # empty if not known
    since_s: float = 0.0  # how long the actor has been there


@dataclass(frozen=True)
class Report:
    """A replica's report on itself."""

    stage: str
    version: int
    address: str = ""
    revision: str = ""
    load: bytes = b""  # a serialized `directory_pb2.Load`
    draining: bool = False
    drained: bool = False  # whether it may be stopped
    trouble: str = ""  # why it must be replaced at once; empty if it need not be


class PoolActor:
    """What every actor of a pool keeps: its last log records, and a copy of the desired state, so that it survives."""

    def __init__(self, log_format: str, **about: str) -> None:
        """Log in that format, with the fields `about` in each record."""
        self._desired: Desired | None = None
        self._ring = RingHandler(_LOG_LINES)
        set_up(log_format, self._ring, **about)
        logging.getLogger().addHandler(self._ring)  # so that it keeps the log records of a teacher's code too

    def hold(self, desired: Desired) -> None:
        """Keep the desired state, if it is newer than the one kept so far."""
        if self._desired is None or desired.generation > self._desired.generation:
            self._desired = desired

    def held(self) -> Desired | None:
        """The newest desired state that `hold` was given."""
        return self._desired

    def logs(self, lines: int) -> list[str]:
        """The last log records, the oldest first."""
        return self._ring.lines(lines)


class TeacherActor(PoolActor):
    """One replica: builds its teacher, serves it, and reports its load; it owns the device that Ray gave it."""

    def __init__(self, name: str, spec: TeacherSpec, pool: PoolConfig, version: int = 0) -> None:
        self._began = time.monotonic()
        self._id = (ray.get_runtime_context().get_actor_name() or name).rpartition("/")[2]
        super().__init__(pool.log_format, teacher=name, replica=self._id)
        self._name, self._spec, self._pool, self._version = name, spec, pool, version
        self._stage = "starting"
        self._replica: Replica | None = None
        self._starting = threading.Lock()
        self._address = ""

    def where(self) -> Where:
        """The node that it runs on."""
        context = ray.get_runtime_context()
        zone = (context.get_node_labels() or {}).get(self._pool.zone_label, "")
        return Where(context.get_node_id(), socket.gethostname(), zone, time.monotonic() - self._began)

    def start(self) -> Report:
        """Build the teacher and serve it; raises whatever prevents that."""
        with self._starting:  # a restarted keeper calls it again
            if self._replica is None:
                self._serve()
        return self.report()

    def _serve(self) -> None:
        host = advertised(self._pool)  # first, as it may raise, and loading takes long
        self._stage = "loading weights"
        _log.info("%s: %s", self._name, self._stage)
        # Late, here and below: those who start replicas, and the directory, need no torch, whose import takes seconds.
        from schoolhouse_server.pool.loading import load_teacher

        module = load_teacher(self._spec, self._pool.folder)
        self._stage = "reading the revision"
        replica = self._make(module).start()
        self._address = joined(host, replica.port)
        self._replica = replica
        self._stage = "serving"
        _log.info("%s: serving at %s", self._name, self._address)

    def report(self) -> Report:
        """What this replica is doing at present."""
        if self._replica is None:
            return Report(self._stage, self._version)
        trouble = self._replica.trouble
        stage = "draining" if self._replica.draining else self._stage
        return Report(
            stage=trouble.stage if trouble is not None else stage,
            version=self._version,
            address=self._address,
            revision=self._replica.engines[self._name].description.revision,
            load=self._replica.load(self._name).SerializeToString(),
            draining=self._replica.draining,
            drained=self._replica.drained,
            trouble=trouble.why if trouble is not None else "",
        )

    def drain(self, timeout_s: float) -> None:
        """Take no new sessions; `report` says when it may be stopped."""
        if self._replica is not None:
            _log.info("%s: draining, for %g s at most", self._name, timeout_s)
            self._replica.drain(timeout_s)

    def stop(self) -> None:
        """End its sessions and stop listening."""
        if self._replica is not None:
            self._replica.close()

    def _make(self, module: "nn.Module") -> "Replica":
        from schoolhouse_server.pool.loading import load_example
        from schoolhouse_server.replica.replica import Replica

        return Replica(
            {self._name: module},
            host=own_address(self._pool.host),
            port=self._pool.replica_ports,
            early_stop=self._spec.early_stop,
            cache_bytes=self._spec.cache_bytes,
            shared_memory_bytes=self._spec.shared_memory_bytes,
            cost=self._spec.cost,
            max_in_flight=self._spec.max_in_flight,
            max_job_bytes=self._spec.max_job_bytes,
            max_queued=self._spec.max_queued,
            max_unsent_bytes=self._spec.max_unsent_bytes,
            max_job_unsent_bytes=self._spec.max_job_unsent_bytes,
            lease_s=self._spec.lease_s,
            cache_scope=self._spec.cache_scope,
            max_request_tokens=self._spec.max_request_tokens,
            max_sessions=self._spec.max_sessions,
            forward_timeout_s=self._spec.forward_timeout_s,
            merging=self._spec.merging,
            example=load_example(self._spec, self._pool.folder),
            http_port=self._pool.metrics_port_range,
            tracing=self._pool.tracing,
            replica_id=self._id,
            tls=self._pool.tls,
            insecure=self._pool.security.insecure,
            tokens=self._pool.tokens,
            allow_head=self._pool.security.allow_head,
            taps=self._spec.taps,
        )


class DirectoryActor(PoolActor):
    """The gRPC server that tells students where the replicas are; its table is published by the keeper."""

    def __init__(self, pool: PoolConfig) -> None:
        super().__init__(pool.log_format)
        self._gate = Gate(Tokens.of(pool.tokens))
        loop = Loop("schoolhouse-directory")
        self._directory = Directory(loop, ready=False, gate=self._gate)
        bound, host, tls = own_address(pool.host), advertised(pool), pool.tls
        server = RpcServer(
            loop,
            self._add_service,
            gate=self._gate,
            max_rpcs=_DIRECTORY_RPCS,
            host=bound,
            ports=(pool.port,),
            tls=tls,
        )
        port = server.port
        self._gate.start()
        server.start()
        self._address = joined(host, port)
        self._server = server
        self._url = f"{'grpc' if tls is None else 'grpcs'}://{self._address}"
        self._page = ""
        if pool.http_port is not None:
            context = tls.context() if tls is not None else None
            web = WebServer(self._directory.sets, host=bound, port=pool.http_port, gate=self._gate, tls=context)
            web.start()
            self._page = f"{'http' if tls is None else 'https'}://{joined(host, web.port)}"

    def _add_service(self, server: grpc.aio.Server) -> Sequence[str]:
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(self._directory, server)  # type: ignore[no-untyped-call]
        return ("schoolhouse.v1.DirectoryService",)

    def address(self) -> str:
        """The HOST:PORT that students connect to."""
        return self._address

    def url(self) -> str:
        """The address as a URL, without a teacher's name."""
        return self._url

    def page(self) -> str:
        """The URL of the page with charts; empty if there is none."""
        return self._page

    def publish(self, table: list[bytes]) -> None:
        """Replace the replica sets of all teachers."""
        self._directory.publish_all([directory_pb2.ReplicaSet.FromString(data) for data in table])


def on_the_head(kind: type, name: str, *args: Any, max_concurrency: int, get_if_exists: bool) -> Any:
    """Make an actor of the pool on the head node; Ray restarts it whenever its process ends.

    Raises:
        ValueError: an actor of that name exists, and `get_if_exists` is False.
    """
    options = {"lifetime": "detached", "max_restarts": -1, "num_cpus": 0, "resources": _HEAD_NODE}
    made = ray.remote(kind).options(
        name=name, namespace=NAMESPACE, max_concurrency=max_concurrency, get_if_exists=get_if_exists, **options
    )
    return made.remote(*args)


def advertised(pool: PoolConfig) -> str:
    """The host under which students reach a server on this node.

    Raises:
        ConfigError: `host` is no address of this node, or `advertise` is a mapping without this node's address.
    """
    own = own_address(pool.host)
    if own in EVERYWHERE:
        own = str(ray.util.get_node_ip_address())
    if not isinstance(pool.advertise, dict):
        return pool.advertise or own
    if own not in pool.advertise:
        raise ConfigError(f"advertise has no entry for the node {own}; it has: {', '.join(sorted(pool.advertise))}")
    return pool.advertise[own]
