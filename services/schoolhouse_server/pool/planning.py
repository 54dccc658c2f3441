"""Which replicas of a teacher to start and which to drain: a pure function of its desired state and its replicas."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from schoolhouse_server.pool.pool_state import TeacherState, Version

ROOM_S = 10.0  # a replica without a node for this long counts as finding no room
QUIET_S = 5.0  # a revision without a session for this long counts as used by no job


@dataclass(frozen=True)
class Seen:
    """A replica as the keeper sees it."""

    id: str
    version: int
    phase: Literal["starting", "serving", "draining"]
    revision: str = ""  # empty until it serves
    placed: bool = True  # whether it has a node, or Ray has one for it
    age_s: float = 0.0
    sessions: int = 0
    leaving: bool = False  # whether its node is about to go
    due: bool = False  # whether its node goes so soon that it must drain before another replica serves


@dataclass(frozen=True)
class Plan:
    """What to do: one replica to start for each entry of `start`, and the ids of replicas to drain."""

    start: tuple[Version, ...] = ()
    drain: tuple[str, ...] = ()


def plan(state: TeacherState, replicas: Sequence[Seen], used_at: dict[int, float], now: float) -> Plan:
    """What to do next.

    `used_at` says when each version was last seen with a session, on the clock of `now` and `Version.superseded_at`.

    A roll starts one replica at a time beyond the wanted number, and drains an old one for each new one that serves.
    Where there is no room for one more, an old one is drained first, unless it is the last that serves. One replica of
    each old revision stays as long as a job has sessions with it, for at most `linger_s`.

    All replicas whose node is about to go are replaced at once. Each goes on serving until another one of its version
    serves in its place, or until it is due.
    """
    staying = [r for r in replicas if r.phase != "draining" and not r.leaving]
    current = [r for r in staying if r.version == state.current.number]
    old = [r for r in staying if r.version != state.current.number]
    ready = [r for r in current if r.phase == "serving"]
    kept = _kept(state, old, ready, used_at, now)
    room = state.count + bool(old) - min(len(old), state.count)
    missing = min(state.count, room) - len(current) if old else state.count - len(current)
    lost = [v for v in state.old if v.number in kept and not any(r.version == v.number for r in old)]
    start = (*[state.current] * missing, *lost)
    drain = [*_surplus(current, len(current) - state.count), *_retired(state, current, old, kept, replicas)]
    leaving = [r for r in replicas if r.phase != "draining" and r.leaving]
    return Plan(start, tuple(r.id for r in [*drain, *_replaced(state, leaving, staying, kept)]))


def _kept(
    state: TeacherState, old: Sequence[Seen], ready: Sequence[Seen], used_at: dict[int, float], now: float
) -> set[int]:
    """The old versions of which one replica must stay, by their numbers."""
    kept = set()
    for version in state.old:
        if any(r.revision == version.revision for r in ready):
            continue  # a new replica with the same revision can take its jobs
        expired = version.superseded_at and now >= version.superseded_at + state.current.pool.linger_s
        restarting = any(r.version == version.number and r.phase == "starting" for r in old)
        used = now - used_at.get(version.number, 0.0) < QUIET_S
        if version.revision and not expired and (used or restarting):
            kept.add(version.number)
    return kept


def _surplus(replicas: Sequence[Seen], count: int) -> list[Seen]:
    """The `count` replicas that are missed least: those that do not serve yet, then those with the fewest sessions."""
    return sorted(replicas, key=lambda r: (r.phase == "serving", r.sessions))[: max(count, 0)]


def _retired(
    state: TeacherState, current: Sequence[Seen], old: Sequence[Seen], kept: set[int], replicas: Sequence[Seen]
) -> list[Seen]:
    """The replicas of old versions that may go: surplus ones that serve, and unneeded ones that do not serve yet."""
    serving = [r for r in old if r.phase == "serving"]
    needed = kept - {r.version for r in serving}
    late = [r for r in old if r.phase == "starting" and r.version not in needed]
    ready = sum(r.phase == "serving" for r in current)
    spare = ready + len(serving) - state.count
    if (
        spare <= 0
        and ready + len(serving) > 1
        and _no_room(current)
        and not any(r.phase == "draining" for r in replicas)
    ):
        spare = 1
    return [*late, *_spare(serving, kept, spare)]


def _spare(serving: Sequence[Seen], kept: set[int], count: int) -> list[Seen]:
    chosen: list[Seen] = []
    left = [r.version for r in serving]
    for replica in sorted(serving, key=lambda r: (r.version, r.sessions)):
        if len(chosen) < count and (replica.version not in kept or left.count(replica.version) > 1):
            chosen.append(replica)
            left.remove(replica.version)
    return chosen


def _replaced(state: TeacherState, leaving: Sequence[Seen], staying: Sequence[Seen], kept: set[int]) -> list[Seen]:
    """The replicas on leaving nodes that may drain: enough others serve, or there is no time left to wait for that."""
    current, gone = state.current.number, []
    serving = Counter(r.version for r in staying if r.phase == "serving")
    for r in leaving:
        needed = state.count if r.version == current else max(r.version in kept, state.count - serving[current])
        if r.due or r.phase == "starting" or serving[r.version] >= needed:
            gone.append(r)
        else:
            serving[r.version] += 1  # it stays, and serves, for now
    return gone


def _no_room(current: Iterable[Seen]) -> bool:
    return any(r.phase == "starting" and not r.placed and r.age_s > ROOM_S for r in current)
