"""A bounded number of places, such as of sessions, that no holder of many can keep others out of."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from schoolhouse_wire.errors import SchoolhouseError, TeacherBusyError, TeacherUnavailableError

IDLE_S = 10.0  # a client that asks for nothing for so long gives its place up if it is wanted
_GONE = "this place was given to a client that waited for one; connect again"


@dataclass(eq=False)
class _Place:
    holder: str
    end: Callable[[SchoolhouseError], None]
    idle_since: Callable[[], float]


class Places:
    """Up to `most` places; all of it happens in the loop's thread.

    If all are taken, whoever has most of them gives one up for a newcomer that would still have fewer: the one that
    has been idle for longest. Otherwise one does that has been idle for `idle_s`, of the newcomer's own holder or
    of one who has more. Without any of these, the newcomer is refused.
    """

    def __init__(self, most: int, full: str, idle_s: float = IDLE_S) -> None:
        """`full` is what a newcomer is told that gets none."""
        self._most, self._full, self._idle_s = most, full, idle_s
        self._taken: dict[_Place, None] = {}  # an ordered set, the oldest first

    def __len__(self) -> int:
        return len(self._taken)

    @contextlib.contextmanager
    def held(
        self,
        holder: str,
        end: Callable[[SchoolhouseError], None],
        idle_since: Callable[[], float] = lambda: float("inf"),
    ) -> Iterator[None]:
        """Hold a place within the `with`; `end(error)` is called if it has to be given up.

        `idle_since()` is a time of time.monotonic's clock, infinite for what is at work.

        Raises:
            TeacherBusyError: all places are taken.
        """
        if len(self._taken) >= self._most:
            self._make_room(holder)
        place = _Place(holder, end, idle_since)
        self._taken[place] = None
        try:
            yield
        finally:
            self._taken.pop(place, None)

    def _make_room(self, holder: str) -> None:
        held = Counter(place.holder for place in self._taken)
        most = max(held.values())
        if most > held[holder] + 1:
            found = [place for place in self._taken if held[place.holder] == most]
        else:
            since = time.monotonic() - self._idle_s
            others = (one for one in self._taken if one.holder == holder or held[one.holder] > held[holder])
            found = [place for place in others if place.idle_since() <= since]
        if not found:
            raise TeacherBusyError(self._full)
        place = min(found, key=lambda one: one.idle_since())  # of those at work, the oldest
        del self._taken[place]
        place.end(TeacherUnavailableError(_GONE))
