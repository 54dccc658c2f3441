"""What an operator sees of a pool: rows of plain values, and the tables of them that the command line prints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from schoolhouse_server.common.tables import Column, FittingTable

if TYPE_CHECKING:  # these import Ray and torch, which takes seconds
    from schoolhouse_server.pool.pool_state import TeacherState
    from schoolhouse_server.pool.replica_handle import Member

_REPLICA_COLUMNS = {
    "teacher": Column("teacher"),
    "id": Column("replica"),
    "stage": Column("state"),
    "revision": Column("revision", rank=4),
    "address": Column("address", rank=3),
    "sessions": Column("sessions", rank=1, number=True),
    "waiting": Column("waiting", rank=1, number=True),
    "served": Column("served", rank=2, number=True),
    "joined": Column("merged", rank=5, number=True),
    "cache": Column("from cache", rank=5, number=True),
}
_JOB_COLUMNS = {
    "teacher": Column("teacher"),
    "job": Column("job"),
    "weight": Column("weight", rank=3, number=True),
    "sessions": Column("sessions", rank=1, number=True),
    "in_flight": Column("in flight", rank=2, number=True),
    "requests": Column("requests", rank=1, number=True),
    "rows": Column("rows", rank=1, number=True),
    "waits": Column("waits", rank=3, number=True),
    "errors": Column("errors", rank=2, number=True),
    "revision": Column("revision", rank=4),
}
_SUMMED = ("sessions", "queued", "in_flight", "requests", "rows", "waits", "errors")


def replica(name: str, state: "TeacherState", member: "Member") -> dict[str, Any]:
    """The row of one replica in `schoolhouse status`."""
    load = member.load
    return {
        "teacher": name,
        "wanted": state.count,
        "id": member.id,
        "stage": member.stage(),
        "address": member.report.address,
        "revision": member.report.revision,
        "host": member.where.host if member.where is not None else "",
        "queued": load.queued,
        "in_flight": load.in_flight,
        "served": load.served,
        "sessions": load.sessions,
        "joined": load.joined,
        "cached": load.cached,
        "missed": load.missed,
    }


def teacher(state: "TeacherState", members: Sequence["Member"], error: str, lost: str) -> dict[str, Any]:
    """Whether all replicas of a teacher serve, and what failed."""
    current = [m for m in members if m.version == state.current.number and m.phase == "serving" and m.listed]
    return {
        "min": state.bounds.min,
        "max": state.bounds.max,
        "wanted": state.count,
        "serving": len(current),
        "revision": state.current.revision,
        "old": sum(m.version != state.current.number for m in members),
        "ready": len(current) >= state.count,
        "version": state.current.number,
        "error": error,
        "lost": lost,
        "failed_roll": state.failed,
    }


def jobs(teachers: Mapping[str, Sequence["Member"]]) -> list[dict[str, Any]]:
    """The rows of `schoolhouse jobs`: what each job has on the replicas of one revision, summed."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, members in teachers.items():
        for member in members:
            for job in member.load.jobs:
                key = (name, job.job, member.report.revision)
                row = found.setdefault(key, {"teacher": name, "job": job.job, "revision": key[2], "weight": 0.0})
                row["weight"] = max(row["weight"], job.weight)
                for field in _SUMMED:
                    row[field] = row.get(field, 0) + getattr(job, field)
    return [found[key] for key in sorted(found)]


def replica_table(rows: Sequence[Mapping[str, Any]]) -> FittingTable:
    """The table of `schoolhouse status`, from rows that `replica` made."""
    table = FittingTable(tuple(_REPLICA_COLUMNS.values()))
    for row in rows:
        asked = row["cached"] + row["missed"]
        cache = f"{row['cached'] / asked:.0%}" if asked else "-"
        cells = {**row, "waiting": row["queued"] + row["in_flight"], "cache": cache}
        table.rows.append([str(cells[name]) for name in _REPLICA_COLUMNS])
    return table


def job_table(rows: Sequence[Mapping[str, Any]]) -> FittingTable:
    """The table of `schoolhouse jobs`, from rows that `jobs` made."""
    rows = [{**row, "weight": f"{row['weight']:g}"} for row in rows]
    return FittingTable(tuple(_JOB_COLUMNS.values()), [[str(row[name]) for name in _JOB_COLUMNS] for row in rows])
