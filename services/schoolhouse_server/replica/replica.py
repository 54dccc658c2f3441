"""A whole teacher server in one object: engines, gRPC services, health and reflection; it needs no Ray."""

import atexit
import functools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.tracing import tracer
from schoolhouse_wire import framing, memory
from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.limits import MAX_NAME, Limits
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc import forks
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc, teacher_pb2
from torch import nn

from schoolhouse_server.device.watchdog import FORWARD_TIMEOUT_S, checked_timeout_s
from schoolhouse_server.engine.engine import Engine, Trouble
from schoolhouse_server.engine.unsent import Unsent
from schoolhouse_server.merge.settings import MergeSettings
from schoolhouse_server.observe.web import WebServer
from schoolhouse_server.replica.directory import Directory
from schoolhouse_server.replica.rpc_server import RpcServer
from schoolhouse_server.security.auth import Gate
from schoolhouse_server.security.interceptor import SHORT_RPCS
from schoolhouse_server.security.ports import joined
from schoolhouse_server.security.tls import ServerTls, check_exposure
from schoolhouse_server.security.tokens import Tokens
from schoolhouse_server.session.context import ReplicaContext
from schoolhouse_server.session.quotas import Sharing
from schoolhouse_server.session.servicer import TeacherServicer
from schoolhouse_server.session.tappable import TeacherTaps

_MAX_SHARED_BYTES = 1 << 40
_SPARE = 64
_MAX_VALUES = 16_384  # in the structure of a request, nested ones included: reading them takes Python's time
Example: TypeAlias = Callable[[], Any] | Mapping[str, Callable[[], Any]] | None
Patterns: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]] | None


class Replica:
    """Serves frozen modules by name.

    Start it with `start()` or `with`; `close()` ends it.

    `port` is a port, 0 for any free one, or a range from which a free one is taken.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        host: str = "127.0.0.1",
        port: int | range = 0,
        merging: MergeSettings | None = None,
        example: Example = None,
        early_stop: bool = False,
        max_request_bytes: int = 2 << 30,
        cache_bytes: int = 0,
        shared_memory_bytes: int = 1 << 30,
        tune_allocator: bool = True,
        http_port: int | range | None = None,
        tracing: bool = False,
        replica_id: str = "",
        tls: ServerTls | None = None,
        insecure: bool = False,
        tokens: str | Path | None = None,
        allow_head: bool = False,
        taps: Patterns = None,
        forward_timeout_s: float = FORWARD_TIMEOUT_S,
        **sharing: Any,
    ) -> None:
        """The settings are those of `serve`; `sharing` holds those of `Sharing`."""
        if not modules:
            raise ConfigError("there is no teacher to serve; give a module, or a dict of names and modules")
        for name in modules:
            if not 0 < len(name) <= MAX_NAME or "/" in name:
                raise ConfigError(
                    f"{name!r:.80} cannot be a teacher's name; it must have 1 to {MAX_NAME} characters, and no '/'"
                )
        if cache_bytes < 0:
            raise ConfigError(f"cache_bytes is {cache_bytes}; it must be 0, for no cache, or above")
        if not isinstance(shared_memory_bytes, int) or not 0 <= shared_memory_bytes <= _MAX_SHARED_BYTES:
            raise ConfigError(
                f"shared_memory_bytes is {shared_memory_bytes!r}; it must be from 0, which switches shared memory off, "
                f"to {_MAX_SHARED_BYTES}"
            )
        check_exposure(host, tls, insecure=insecure)
        self._tls = tls
        self._shared_memory_bytes, self._tune_allocator = shared_memory_bytes, tune_allocator
        self._modules = dict(modules)
        self._host, self._ports = host, port if isinstance(port, range) else (port,)
        self._port = 0 if isinstance(port, range) else port
        self._early_stop = early_stop
        self._merging = merging or MergeSettings()
        self._examples = _examples(example, self._merging, self._modules)
        self._limits = Limits(max_payload_bytes=max_request_bytes, max_values=_MAX_VALUES)
        self._sharing = Sharing(**sharing)
        self._cache_bytes = cache_bytes
        self._gate = Gate(Tokens.of(tokens))
        self._allow_head = allow_head
        patterns = _patterns(taps, self._modules)
        secured = {"has_tokens": tokens is not None, "allow_head": allow_head}
        self._taps = {n: TeacherTaps(n, one, patterns.get(n), **secured) for n, one in self._modules.items()}
        self._loop = Loop("schoolhouse-replica")
        self._max_watchers = 2 * self._sharing.max_sessions + _SPARE  # those who wait for a session watch, too
        self._directory = Directory(self._loop, self.load, gate=self._gate, max_watchers=self._max_watchers)
        self._tracing, self._id = tracing, replica_id
        self._forward_timeout_s = checked_timeout_s(forward_timeout_s)
        tracer(tracing)  # raises without OpenTelemetry
        self._server: RpcServer | None = None
        self._pid = os.getpid()
        self.web = None
        if http_port is not None:
            context = tls.context() if tls is not None else None
            self.web = WebServer(self._directory.sets, host=host, port=http_port, gate=self._gate, tls=context)
        self.engines: dict[str, Engine] = {}

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def url(self) -> str:
        """The address that clients connect to, if there is one teacher; with several, use `urls`."""
        if len(self._modules) != 1:
            raise ConfigError(f"this server has several teachers; take one of .urls: {sorted(self._modules)}")
        return next(iter(self.urls.values()))

    @property
    def urls(self) -> dict[str, str]:
        """The address of each teacher by its name: `grpc://HOST:PORT/NAME`, or `grpcs://` with TLS."""
        scheme = "grpc" if self._tls is None else "grpcs"
        return {name: f"{scheme}://{joined(self._host, self._port)}/{name}" for name in self._modules}

    def start(self) -> "Replica":
        """Listen; returns when clients can connect."""
        forks.before_grpc()
        self._pid = os.getpid()
        if self._tune_allocator:
            memory.keep_freed_memory()
        self._loop.start()
        self.unsent = Unsent(self._sharing.max_unsent_bytes, self._sharing.max_job_unsent_bytes)
        self.engines = {
            name: Engine(
                LocalTeacher(module, name, early_stop=self._early_stop),
                max_queued=self._sharing.max_queued,
                cache_bytes=self._cache_bytes,
                cost=self._sharing.cost,
                loop=self._loop,
                merge=self._merging,
                example=self._examples.get(name),
                forward_timeout_s=self._forward_timeout_s,
                on_trouble=functools.partial(self._fail, name),
                unsent=self.unsent,
            )
            for name, module in self._modules.items()
        }
        max_rpcs = self._sharing.max_sessions + self._max_watchers + SHORT_RPCS
        server = RpcServer(
            self._loop,
            self._add_services,
            gate=self._gate,
            max_rpcs=max_rpcs,
            host=self._host,
            ports=self._ports,
            tls=self._tls,
        )
        self._port = server.port
        for engine in self.engines.values():
            engine.start()
        for name, engine in self.engines.items():
            own = self._described(name, engine)
            self._directory.publish(directory_pb2.ReplicaSet(teacher=name, replicas=[own], wanted=1))
        if self.web is not None:
            self.web.start()
        self._gate.start()
        server.start()
        self._server = server
        atexit.register(self.close, 0.0)  # a thread still inside torch when the interpreter ends aborts the process
        return self

    def load(self, name: str) -> directory_pb2.Load:
        """The present load of the teacher `name`."""
        engine = self.engines[name]
        load = directory_pb2.Load(
            queued=engine.queued,
            in_flight=engine.running,
            served=engine.served,
            joined=engine.joined,
            cached=engine.cache.hits if engine.cache else 0,
            missed=engine.cache.misses if engine.cache else 0,
            cache_bytes=engine.cache.nbytes if engine.cache else 0,
            stage_s=engine.stage_s(),
            batch_limit_rows=engine.batch_limit_rows,
        )
        engine.fill(load, self._context.admissions[name].in_flight())
        load.sessions = sum(job.sessions for job in load.jobs)
        return load

    def drain(self, timeout_s: float) -> None:
        """Take no new sessions, tell the clients of open ones to go elsewhere, and answer what they have asked for.

        Returns at once. Poll `drained`, which becomes true when no session is left or none has had anything in flight
        for a while, and after `timeout_s` at the latest; then call `close()`.
        """
        for name in self.engines:
            self._publish_draining(name)
        self._context.drain.begin(timeout_s)

    @property
    def draining(self) -> bool:
        """Whether `drain` was called, so that new sessions are refused."""
        return self._context.drain.began

    @property
    def drained(self) -> bool:
        """Whether it may be closed: `drain` was called, and no session is busy any more or the time is up."""
        return self._context.drain.over()

    @property
    def trouble(self) -> Trouble | None:
        """Why one of its teachers has failed for good, so that the replica must be replaced; None while all work."""
        return next((engine.trouble for engine in self.engines.values() if engine.trouble is not None), None)

    def _fail(self, name: str) -> None:
        """Tell health probes, watchers of the directory and the teacher's sessions that it has failed for good."""
        if self._server is not None:
            self._server.report_failed(name)
        self._publish_draining(name)
        self._context.drain.tell(name)

    def _publish_draining(self, name: str) -> None:
        own = self._described(name, self.engines[name], directory_pb2.Replica.DRAINING)
        self._directory.publish(directory_pb2.ReplicaSet(teacher=name, replicas=[own], wanted=1))

    def _described(
        self, name: str, engine: Engine, state: directory_pb2.Replica.State = directory_pb2.Replica.SERVING
    ) -> directory_pb2.Replica:
        host = socket.gethostname()
        return directory_pb2.Replica(id=self._id or name, revision=engine.description.revision, state=state, host=host)

    def close(self, grace_s: float = 0.5) -> None:
        """Stop listening and end all sessions; runs at the process's exit too.

        In a forked child it does nothing.
        """
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            return
        self._directory.close()
        if self.web is not None:
            self.web.close()
        if self._server is not None:
            self._server.stop(grace_s)
        self._gate.close()
        for engine in self.engines.values():
            engine.close()
        self._loop.stop()
        self._server = None

    def __enter__(self) -> "Replica":
        return self if self._server is not None else self.start()

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _add_services(self, server: grpc.aio.Server) -> Sequence[str]:
        self._context = ReplicaContext(
            self.engines,
            self._limits,
            shared_memory_bytes=self._shared_memory_bytes,
            sharing=self._sharing,
            loop=self._loop,
            gate=self._gate,
            allow_head=self._allow_head,
            taps=self._taps,
            tracing=self._tracing,
            tidies_allocator=self._tune_allocator,
        )
        self._context.tidying.start()
        self._context.relief.start()
        servicer = self._servicer = TeacherServicer(self._context)
        session = grpc.stream_stream_rpc_method_handler(
            servicer.session,
            request_deserializer=lambda data: framing.received(teacher_pb2.ClientMessage, data),
            response_serializer=framing.write_message,
        )
        describe = grpc.unary_unary_rpc_method_handler(
            servicer.describe,
            request_deserializer=lambda data: framing.parsed(teacher_pb2.DescribeRequest, data),
            response_serializer=teacher_pb2.DescribeResponse.SerializeToString,
        )
        names = ("schoolhouse.v1.TeacherService", "schoolhouse.v1.DirectoryService")
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Session": session, "Describe": describe}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(names[0], methods),))
        directory_pb2_grpc.add_DirectoryServiceServicer_to_server(self._directory, server)  # type: ignore[no-untyped-call]
        known = self._modules if self._gate.tokens is None else ()  # health needs no token, so it must tell no names
        return (*names, *known)


def _examples(
    example: Example, merging: MergeSettings, modules: Mapping[str, nn.Module]
) -> Mapping[str, Callable[[], Any]]:
    """The callable that makes a teacher's example inputs, for each teacher that has one."""
    if example is None:
        return {}
    if merging.mode == "never":
        raise ConfigError("example is for merging, and merge is 'never'; leave one of them out")
    given = {next(iter(modules)): example} if callable(example) and len(modules) == 1 else example
    if not isinstance(given, Mapping) or not given.keys() <= modules.keys() or not all(map(callable, given.values())):
        raise ConfigError(
            f"example is {example!r:.80}; expected a callable that returns what forward takes, or, with several "
            f"teachers, a dict of such callables by the teachers' names: {sorted(modules)}"
        )
    return given


def _patterns(taps: Patterns, modules: Mapping[str, nn.Module]) -> Mapping[str, Any]:
    """The patterns of taps of each teacher that has some."""
    if taps is None:
        return {}
    given = {next(iter(modules)): taps} if isinstance(taps, list | tuple) and len(modules) == 1 else taps
    if not isinstance(given, Mapping) or not given.keys() <= modules.keys():
        raise ConfigError(
            f"taps is {taps!r:.80}; expected a list of patterns such as ['layer*:output'], or, with several teachers, "
            f"a dict of such lists by the teachers' names: {sorted(modules)}"
        )
    return given
