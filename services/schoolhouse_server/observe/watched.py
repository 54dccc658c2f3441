"""What replicas reported lately, as tiles, charts and tables of panels, for the web page and `schoolhouse top`."""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text
from schoolhouse_wire.v1.directory_pb2 import JobLoad, Load, Replica, ReplicaSet

from schoolhouse_server.common.tables import Column, FittingTable
from schoolhouse_server.observe import panels
from schoolhouse_server.observe.panels import Panel, Reading

_SILENT_S = 10.0  # a replica whose clock has stood still for this long counts as silent
_WINDOW_S = 30.0  # the time over which rates of jobs are computed
_MAX_ROWS = 100
_MAX_NAME = 100
_STYLES = {"serving": "green", "draining": "yellow"}
_Reports = deque[tuple[float, Load]]  # with when they were heard, the latest last


class Watched:
    """The last answer of a source, and the reports of its replicas in the last 30 s, from which rates come."""

    def __init__(self, here: str) -> None:
        """`here` stands for the address of a replica that names none."""
        self._here = here
        self._sets: list[ReplicaSet] = []
        self._reports: dict[tuple[str, str], _Reports] = {}
        self._heard_at = 0.0

    def heard(self, sets: Iterable[ReplicaSet], now: float) -> None:
        """Take an answer that came at `now`, in seconds of any clock that only goes on."""
        before = self._reports if now - self._heard_at < _WINDOW_S else {}
        self._sets, self._heard_at, self._reports = list(sets), now, {}
        for found in self._sets:
            for replica in found.replicas:
                key = found.teacher, replica.id
                self._reports[key] = _with(before.get(key, deque()), replica.load, now)

    def replicas(self, now: float, teacher: str = "") -> FittingTable:
        """A row for each replica, of one teacher or of all."""
        rows: list[Sequence[str | Text]] = []
        for found in self._of(teacher):
            for one in found.replicas:
                state = Replica.State.Name(one.state).lower()
                silent_s = now - self._reports[found.teacher, one.id][-1][0]
                silent = Text(f"no news for {silent_s:.0f} s", "red") if silent_s >= _SILENT_S else None
                what = silent or Text(state, _STYLES[state]), one.revision[:12] or "-", one.address or self._here
                reading = [self._reading(found.teacher, one, now)]
                rows.append([*map(_plain, (found.teacher, one.id)), *what, *(p.text(reading) for p in panels.REPLICAS)])
            if not found.replicas:
                none = Text(f"none of {found.wanted} serves", "red")
                rows.append([_plain(found.teacher), "-", none, *[""] * (2 + len(panels.REPLICAS))])
        more = Column("revision", rank=7), Column("address", rank=6)
        return _table(("teacher", "replica", "state"), (*more, *map(_column, panels.REPLICAS)), rows, "no teacher yet")

    def jobs(self, now: float, teacher: str = "") -> FittingTable:
        """A row for each job of a teacher, summed over its replicas; the busiest jobs come first."""
        rows: list[Sequence[str | Text]] = []
        for found in self._of(teacher):
            jobs = self._jobs(found, now)
            among = [reading for readings in jobs.values() for reading in readings]
            first = panels.JOB_THROUGHPUT, panels.JOB_SESSIONS
            for job, own in sorted(jobs.items(), key=lambda job: [-(panel.read(job[1]) or 0.0) for panel in first]):
                names = map(_plain, (found.teacher, job or "-"))
                rows.append([*names, *(panel.text(own, among) for panel in panels.JOBS)])
        return _table(("teacher", "job"), map(_column, panels.JOBS), rows, "no job yet")

    def page_json(self, now: float, teacher: str) -> bytes:
        """What the web page draws, of one teacher or of all: texts, and for the charts the values of all teachers."""
        sets = self._of(teacher)
        readings = {
            (found.teacher, one.id): self._reading(found.teacher, one, now)
            for found in self._sets
            for one in found.replicas
        }
        chosen = [one for (name, _), one in readings.items() if teacher in ("", name)]
        wanted = f"of {sum(found.wanted for found in sets)} wanted"
        idle = [one.teacher for one in sets if not any(replica.state == Replica.SERVING for replica in one.replicas)]
        charts = [panel for panel in panels.REPLICA_CHARTS if panel.value]
        tables = {"replicas": self.replicas(now, teacher), "jobs": self.jobs(now, teacher), "errors": _errors(sets)}
        page = {
            "teachers": sorted(found.teacher for found in self._sets),
            "tiles": [
                (
                    tile.title,
                    panels.shown(tile.read(chosen), tile.unit),
                    tile.unit.word.replace("of wanted", wanted),
                    tile.help,
                )
                for tile in panels.TILES
                if tile.value
            ],
            "charts": [(one.title, one.unit.word, one.unit.most, one.mean, one.help) for one in charts],
            "series": [
                (*names, str(one.replica.load.uptime_s), [panel.read([one], scaled=True) for panel in charts])
                for names, one in readings.items()
                if one.before is not None
            ],
            "tables": {name: _as_json(table) for name, table in tables.items()},
            "busy": not chosen or any(panel.read(chosen) for panel in (panels.WAITING, panels.ANSWERED)),
            "notices": [f"No replica of {name} serves." for name in idle] if sets else ["There are no teachers yet."],
        }
        return json.dumps(page, allow_nan=False).encode()

    def _of(self, teacher: str) -> list[ReplicaSet]:
        return [found for found in self._sets if teacher in ("", found.teacher)]

    def _reading(self, teacher: str, replica: Replica, now: float, *, of_window: bool = False) -> Reading:
        """The last report with the one before it, or the first of the last 30 s, unless the replica is silent."""
        reports = self._reports[teacher, replica.id]
        if len(reports) < 2 or now - reports[-1][0] >= _SILENT_S:
            return Reading(replica, replica.load)
        before = reports[0 if of_window else -2][1]
        return Reading(replica, replica.load, before, replica.load.uptime_s - before.uptime_s)

    def _jobs(self, found: ReplicaSet, now: float) -> dict[str, list[Reading]]:
        """The readings of each job of a teacher, one for each replica that knows it."""
        jobs: dict[str, list[Reading]] = {}
        for replica in found.replicas:
            of = self._reading(found.teacher, replica, now, of_window=True)
            earlier = {job.job: job for job in of.before.jobs} if isinstance(of.before, Load) else None
            for job in replica.load.jobs:
                before = earlier.get(job.job, JobLoad()) if earlier is not None else None
                jobs.setdefault(job.job, []).append(Reading(replica, job, before, of.seconds))
        return jobs


def _with(reports: _Reports, load: Load, now: float) -> _Reports:
    last_s = reports[-1][1].uptime_s if reports else None
    if last_s == load.uptime_s:
        return reports  # it is the same report
    if last_s is not None and last_s > load.uptime_s:
        reports.clear()  # the replica has restarted
    reports.append((now, load))
    while len(reports) > 2 and reports[1][0] <= now - _WINDOW_S:
        reports.popleft()
    return reports


def _errors(sets: Iterable[ReplicaSet]) -> FittingTable:
    """A row for each error of each replica."""
    loads = [(found.teacher, one.id, one.load.errors) for found in sets for one in found.replicas]
    rows = [
        [*map(_plain, names), error, panels.shown(n, panels.REQUESTS)]
        for *names, errors in loads
        for error, n in sorted(errors.items())
    ]
    return _table(("teacher", "replica", "error"), [Column("requests", number=True)], rows, "no request has failed")


def _column(panel: Panel) -> Column:
    return Column(panel.column, panel.rank, number=True, help=panel.help)


def _table(
    names: Iterable[str], more: Iterable[Column], rows: Sequence[Sequence[str | Text]], nothing: str
) -> FittingTable:
    note = f"and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else "" if rows else nothing
    return FittingTable((*map(Column, names), *more), list(rows[:_MAX_ROWS]), note)


def _as_json(table: FittingTable) -> dict[str, Any]:
    rows = [[(str(cell), cell.style if isinstance(cell, Text) else "") for cell in row] for row in table.rows]
    return {"columns": [vars(column) for column in table.columns], "rows": rows, "note": table.note}


def _plain(text: str) -> str:
    """A name that may come from a client, without characters that control the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:_MAX_NAME])
