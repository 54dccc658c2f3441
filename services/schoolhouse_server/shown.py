"""What an operator is shown of a pool: rows of plain values, for the command line."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from schoolhouse_server.desired import TeacherState

if TYPE_CHECKING:  # it knows Ray
    from schoolhouse_server.members import Member

_SUMMED = ("sessions", "queued", "in_flight", "requests", "rows", "waits", "errors")


def replica(name: str, state: TeacherState, member: "Member") -> dict[str, Any]:
    """A row of `schoolhouse status`."""
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


def teacher(state: TeacherState, members: Sequence["Member"], error: str, lost: str) -> dict[str, Any]:
    """Whether a teacher is all there, and what failed."""
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
    """Rows of `schoolhouse jobs`: each job's parts on the replicas of one revision, summed."""
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
