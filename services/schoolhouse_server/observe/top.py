"""`schoolhouse top`: live tables of replicas and jobs in the terminal, from a directory or a replica."""

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from schoolhouse.remote.handshake import why_not
from schoolhouse_wire.errors import ConfigError, SchoolhouseError, TeacherUnavailableError
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1 import directory_pb2_grpc
from schoolhouse_wire.v1.directory_pb2 import ListTeachersRequest, ReplicaSet

from schoolhouse_server.observe.watched import Watched

_TIMEOUT_S = 5.0


def target_of(url: str) -> str:
    """The HOST:PORT in `HOST:PORT`, or in a `grpc://` or `grpcs://` URL with or without a teacher's name.

    Raises:
        ConfigError: for any other text.
    """
    rest = url.removeprefix("grpc://").removeprefix("grpcs://")
    target = rest.split("/")[0]
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "://" in rest:
        raise ConfigError(f"{url!r} is not a server's address; expected HOST:PORT, grpc://HOST:PORT/NAME or grpcs://")
    return target


class Screen:
    """What is shown: the server's last answer, and the rates since earlier ones."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._watched = Watched(target)
        self._answered_at: float | None = None
        self._error = ""

    def heard(self, sets: Sequence[ReplicaSet], now: float) -> None:
        """Take an answer of the server."""
        self._watched.heard(sets, now)
        self._answered_at, self._error = now, ""

    def failed(self, error: SchoolhouseError) -> None:
        """Note that the server gave no answer."""
        self._error = str(error)

    def render(self, now: float) -> RenderableType:
        """The tables, with what is wrong above them."""
        lines: list[RenderableType] = [Text(f"schoolhouse top  {self._target}", style="bold")]
        if self._error:
            since = f" for {now - self._answered_at:.0f} s" if self._answered_at is not None else ""
            lines.append(Text(f"no answer{since}: {self._error}", style="bold red"))
        if self._answered_at is not None:
            lines += [self._watched.replicas(now), self._watched.jobs(now)]
        return Group(*lines)


def watch(
    target: str,
    console: Console,
    *,
    interval_s: float,
    once: bool,
    security: ClientSecurity = ClientSecurity(),
) -> None:
    """Show the tables of the server at `target` every `interval_s` seconds, until 'q' or Ctrl-C, or only `once`.

    Raises:
        ConfigError: the output is not a terminal, without `once`.
        SchoolhouseError: the server does not answer, with `once`.
    """
    if not once and not console.is_terminal:
        raise ConfigError("a live view needs a terminal; print one table with --once")
    screen = Screen(target)
    with channel.connect(target, security) as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)  # type: ignore[no-untyped-call]

        def ask() -> None:
            screen.heard(_listed(stub, target, security), time.monotonic())

        if once:
            _ask_twice(ask, interval_s)
            console.print(screen.render(time.monotonic()))
            return
        _go_on(screen, ask, console, interval_s)


def _ask_twice(ask: Callable[[], None], interval_s: float) -> None:
    """Ask twice, as rates are differences between two answers."""
    ask()
    time.sleep(interval_s)
    ask()


def _go_on(screen: Screen, ask: Callable[[], None], console: Console, interval_s: float) -> None:
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, Live(console=console, screen=True) as live:
        while True:
            try:
                ask()
            except SchoolhouseError as err:
                screen.failed(err)
            live.update(screen.render(time.monotonic()), refresh=True)
            if pressed(interval_s) == "q":
                return


def _listed(
    stub: directory_pb2_grpc.DirectoryServiceStub, target: str, security: ClientSecurity
) -> Sequence[ReplicaSet]:
    try:
        told = channel.metadata(security)
        return list(stub.ListTeachers(ListTeachersRequest(), timeout=_TIMEOUT_S, metadata=told).teachers)
    except grpc.RpcError as err:
        error = status.from_rpc_error(err, target)
        if isinstance(error, TeacherUnavailableError):
            error = why_not(target, security) or error
        raise error from err


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yields a function that waits for a key, for so many seconds; without a terminal it only waits."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""  # type: ignore[func-returns-value]
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield lambda seconds: sys.stdin.read(1) if select.select([sys.stdin], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
