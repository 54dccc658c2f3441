"""What all teachers of one process share: the event loop in which their connections live, and a channel per server."""

import atexit
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from schoolhouse_wire import background
from schoolhouse_wire.executor import DaemonExecutor
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc import channel, forks
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.rpc.security import ClientSecurity

from schoolhouse.errors import UsageError

T = TypeVar("T")

_WAITERS = 4  # threads in which something waits for a head


@dataclass(eq=False)
class _Shared:
    """A channel, and how many use it."""

    channel: grpc.aio.Channel
    users: int = 0


class Connections:
    """The event loop of this process, and the channels of its sessions, watches and short calls, all used in it."""

    def __init__(self) -> None:
        self.loop = Loop("schoolhouse-client")
        self.waiters = DaemonExecutor(_WAITERS, "schoolhouse-waiter")  # for what waits for answers of the loop
        self._channels: dict[tuple[str, ClientSecurity], _Shared] = {}

    def wait(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """The result of a coroutine that runs in the loop; `what` says in words what the caller waits for.

        Raises:
            UsageError: in the loop's own thread, which would wait for itself.
        """
        try:
            self.check_wait(what)
        except UsageError:
            work.close()
            raise
        running = self.loop.run(work)
        try:
            return running.result()
        except BaseException:
            running.cancel()  # for an interrupt by the user; it changes nothing of what has ended
            raise

    def check_wait(self, what: str) -> None:
        """Raise `UsageError` in the loop's own thread, which would wait for itself; `what` says for what."""
        if self.loop.runs_here:
            raise UsageError(
                f"{what}, and a callback of a future cannot wait for it, since it runs in the thread that receives "
                "answers. Submit one such request elsewhere first"
            )

    @contextlib.contextmanager
    def channel(self, address: str, security: ClientSecurity) -> Iterator[grpc.aio.Channel]:
        """The channel to a server, which is closed when its last user leaves.

        If a user leaves with an error and without a connection, the next one gets a new channel: one that was refused
        waits for up to two minutes before it tries again.
        """
        key = address, security
        shared = self._channels.get(key)
        if shared is None:
            shared = self._channels[key] = _Shared(channel.connect_aio(address, security))
        shared.users += 1
        try:
            yield shared.channel
        except BaseException:
            if shared.channel.get_state() is not grpc.ChannelConnectivity.READY:
                self._forget(key, shared)
            raise
        finally:
            shared.users -= 1
            if not shared.users:
                self._forget(key, shared)
                self.loop.task(shared.channel.close(), name="schoolhouse-channel", on_death=background.go_on)

    def _forget(self, key: tuple[str, ClientSecurity], shared: _Shared) -> None:
        if self._channels.get(key) is shared:
            del self._channels[key]


_guard = threading.Lock()
_connections: Connections | None = None


def connections() -> Connections:
    """Those of this process, made at the first call.

    Raises:
        UsageError: in a process that was forked from one that has used gRPC.
    """
    global _connections
    forks.before_grpc()
    with _guard:
        if _connections is None:
            _connections = Connections()
            atexit.register(stop)
        _connections.loop.start()
        return _connections


def busy() -> bool:
    """Whether sessions, watches or channels are open."""
    return _connections is not None and _connections.loop.busy


def stop() -> None:
    """End the loop's thread, at the end of the process."""
    if _connections is not None:
        _connections.loop.stop()
        _connections.waiters.shutdown()
