"""`schoolhouse top`: live tables of replicas and jobs in the terminal, from a directory or a replica."""

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from schoolhouse.remote.handshake import why_not
from schoolhouse_wire.errors import ConfigError, SchoolhouseError, TeacherUnavailableError
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.rpc.security import ClientSecurity
from schoolhouse_wire.v1 import directory_pb2_grpc
from schoolhouse_wire.v1.directory_pb2 import JobLoad, ListTeachersRequest, Load, Replica, ReplicaSet

from schoolhouse_server.common.tables import Column, FittingTable

_TIMEOUT_S = 5.0
_SILENT_S = 10.0  # a replica whose clock has stood still for this long counts as silent
_MAX_JOBS = 40
_MAX_NAME = 80
_REPLICA_COLUMNS = (
    Column("teacher"),
    Column("replica"),
    Column("state"),
    Column("revision", rank=7),
    Column("address", rank=6),
    Column("rows/s", rank=1, number=True),
    Column("busy", rank=1, number=True),
    Column("delay ms", rank=2, number=True),
    Column("rows/forward", rank=5, number=True),
    Column("in flight", rank=4, number=True),
    Column("queued", rank=3, number=True),
    Column("sessions", rank=3, number=True),
    Column("cache", rank=5, number=True),
    Column("errors", rank=2, number=True),
)
_JOB_COLUMNS = (
    Column("teacher"),
    Column("job"),
    Column("weight", rank=4, number=True),
    Column("sessions", rank=4, number=True),
    Column("in flight", rank=3, number=True),
    Column("rows/s", rank=1, number=True),
    Column("share", rank=1, number=True),
    Column("rows", rank=2, number=True),
    Column("waits", rank=3, number=True),
    Column("errors", rank=2, number=True),
)


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


@dataclass(frozen=True)
class Rates:
    """What a replica did between two of its reports, by its own clock."""

    seconds: float
    rows_per_s: float
    busy: float  # the share of time that its device ran forwards
    rows_per_forward: float | None  # None if there was no forward
    job_rows: dict[str, int]

    @classmethod
    def between(cls, before: Load, after: Load) -> "Rates | None":
        """The rates between two reports; None if they are the same, or the replica has restarted."""
        seconds = after.uptime_s - before.uptime_s
        if seconds <= 0:
            return None
        rows, forwards = after.rows - before.rows, after.forwards - before.forwards
        busy_s = after.stage_s.get("forward", 0.0) - before.stage_s.get("forward", 0.0)
        earlier = {job.job: job.rows for job in before.jobs}
        return cls(
            seconds=seconds,
            rows_per_s=rows / seconds,
            busy=min(busy_s / seconds, 1.0),
            rows_per_forward=rows / forwards if forwards else None,
            job_rows={job.job: job.rows - earlier.get(job.job, 0) for job in after.jobs},
        )


@dataclass
class _Known:
    """The last report of a replica."""

    load: Load
    heard_at: float
    rates: Rates | None = None


class Screen:
    """What is shown: the server's last answer, and the rates since the one before it."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._sets: list[ReplicaSet] = []
        self._known: dict[tuple[str, str], _Known] = {}
        self._answered_at: float | None = None
        self._error = ""

    def heard(self, sets: Sequence[ReplicaSet], now: float) -> None:
        """Take an answer of the server."""
        self._sets, self._answered_at, self._error = list(sets), now, ""
        before, self._known = self._known, {}
        for found in sets:
            for replica in found.replicas:
                key = found.teacher, replica.id
                self._known[key] = _after(before.get(key), replica.load, now)

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
            lines += [self._replicas(now), self._jobs(now)]
        return Group(*lines)

    def _replicas(self, now: float) -> FittingTable:
        table = FittingTable(_REPLICA_COLUMNS)
        for found in self._sets:
            for replica in found.replicas:
                known = self._known[found.teacher, replica.id]
                table.rows.append(_replica_cells(found.teacher, replica, known, self._target, now))
            if not found.replicas:
                none = Text(f"none of {found.wanted} serves", style="red")
                table.rows.append([_plain(found.teacher), "-", none, *[""] * (len(_REPLICA_COLUMNS) - 3)])
        return table

    def _jobs(self, now: float) -> FittingTable:
        return FittingTable(_JOB_COLUMNS, [row for found in self._sets for row in self._job_rows(found)[:_MAX_JOBS]])

    def _job_rows(self, found: ReplicaSet) -> list[list[str | Text]]:
        """One row for each job of a teacher, summed over its replicas; the busiest jobs come first."""
        rates = [rates for r in found.replicas if (rates := self._known[found.teacher, r.id].rates) is not None]
        rows: dict[str, float] = {}
        for one in rates:
            for job, n in one.job_rows.items():
                rows[job] = rows.get(job, 0.0) + n / one.seconds
        total = sum(rows.values())
        jobs = _together(job for replica in found.replicas for job in replica.load.jobs)
        jobs.sort(key=lambda job: (-rows.get(job.job, 0.0), -job.rows))
        return [
            [
                _plain(found.teacher),
                _plain(job.job or "-"),
                f"{job.weight:g}",
                str(job.sessions) if job.sessions else "ended",
                str(job.in_flight),
                _number(rows.get(job.job) if rates else None),
                _percent(rows.get(job.job, 0.0) / total if total else None),
                _number(job.rows),
                _number(job.waits),
                _number(job.errors),
            ]
            for job in jobs
        ]


def _after(known: _Known | None, load: Load, now: float) -> _Known:
    if known is None:
        return _Known(load, now)
    if known.load.uptime_s == load.uptime_s:
        return known  # it is the same report
    return _Known(load, now, Rates.between(known.load, load))


def _together(jobs: Iterator[JobLoad]) -> list[JobLoad]:
    found: dict[str, JobLoad] = {}
    for job in jobs:
        one = found.setdefault(job.job, JobLoad(job=job.job))
        one.weight = max(one.weight, job.weight)
        for name in ("sessions", "in_flight", "rows", "waits", "errors"):
            setattr(one, name, getattr(one, name) + getattr(job, name))
    return list(found.values())


def _replica_cells(teacher: str, replica: Replica, known: _Known, target: str, now: float) -> list[str | Text]:
    load, rates = replica.load, known.rates
    silent_s = now - known.heard_at
    state = Text(Replica.State.Name(replica.state).lower(), style="yellow" if replica.state else "green")
    if silent_s >= _SILENT_S:
        state, rates = Text(f"no news for {silent_s:.0f} s", style="red"), None
    limit = f" of {load.batch_limit_rows:g}" if load.batch_limit_rows else ""
    occupancy = rates.rows_per_forward if rates else None
    asked = load.cached + load.missed
    return [
        _plain(teacher),
        _plain(replica.id),
        state,
        _plain(replica.revision[:12] or "-"),
        _plain(replica.address or target),
        _number(rates.rows_per_s if rates else None),
        _percent(rates.busy if rates else None),
        _number(load.queue_delay_s * 1e3),
        _number(occupancy) + limit if occupancy is not None else "-",
        str(load.in_flight),
        str(load.queued),
        str(load.sessions),
        _percent(load.cached / asked if asked else None),
        _number(sum(load.errors.values())),
    ]


def _plain(text: str) -> Text:
    """A name that may come from a client, without characters that control the terminal."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:_MAX_NAME]))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


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
        return list(stub.ListTeachers(ListTeachersRequest(), timeout=_TIMEOUT_S).teachers)
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
