"""The gRPC server of a replica or of a directory, in an event loop of its own."""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc import channel, forks

from schoolhouse_server.replica.health_services import add_standard_services
from schoolhouse_server.security.auth import Gate
from schoolhouse_server.security.interceptor import Doorkeeper
from schoolhouse_server.security.ports import listen
from schoolhouse_server.security.tls import ServerTls

_CONNECTIONS = "grpc.max_allowed_incoming_connections"
_FILES_EACH = 5  # descriptors of an RPC: one in three is a session, with its connection, memory and pipes
_FILES = 512  # those of everything else
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class RpcServer:
    """Listens from its making on, and answers once it is started; `port` is where."""

    def __init__(
        self,
        loop: Loop,
        add_services: Callable[[grpc.aio.Server], Sequence[str]],
        *,
        gate: Gate,
        max_rpcs: int,
        host: str,
        ports: Sequence[int],
        tls: ServerTls | None = None,
    ) -> None:
        """`add_services(server)` returns the names of what health reports on; the other settings are `listen`'s."""
        forks.before_grpc()
        self._loop = loop
        _allow_files(_FILES_EACH * max_rpcs + _FILES)
        options = dict(channel.SERVER_OPTIONS)
        if max_rpcs > channel.MAX_CONNECTIONS:
            options[_CONNECTIONS] = max_rpcs

        async def make() -> int:
            self._server = grpc.aio.server(
                interceptors=[Doorkeeper(gate)],
                options=[*options.items()],
                maximum_concurrent_rpcs=max_rpcs,
            )
            names = add_services(self._server)
            self._fail = await add_standard_services(self._server, names)
            return listen(self._server, host, ports, tls)

        self.port = loop.run(make()).result(_START_TIMEOUT_S)

    def start(self) -> None:
        """Begin to answer."""
        self._loop.run(_awaited(self._server.start())).result(_START_TIMEOUT_S)

    def report_failed(self, name: str) -> None:
        """Report a service or teacher, and with it the server, as no longer serving; any thread may call this."""
        self._loop.call(lambda: self._loop.run(_awaited(self._fail(name))))

    def stop(self, grace_s: float) -> None:
        """Listen no more, and end all RPCs that last longer than `grace_s`."""
        try:
            self._loop.run(_awaited(self._server.stop(grace_s))).result(grace_s + _STOP_TIMEOUT_S)
        except TimeoutError:
            _log.warning("RPCs have not ended within %g s, and are left", grace_s + _STOP_TIMEOUT_S)


def _allow_files(wanted: int) -> None:
    """Let this process open so many files, as far as the system allows: the usual limit is 1,024."""
    with contextlib.suppress(ImportError):  # not every system has limits
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY != soft < wanted:
            allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            if allowed < wanted:
                _log.warning(
                    "this process may open %d files, and as many sessions as max_sessions may need %d: raise the hard "
                    "limit (ulimit -Hn)",
                    allowed,
                    wanted,
                )


async def _awaited(work: Awaitable[Any]) -> None:
    await work
