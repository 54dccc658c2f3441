"""Bounds on features that are not sent yet: how many bytes a replica, and each of its jobs, may have at once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from schoolhouse_wire.errors import MessageTooLargeError

Full: TypeAlias = Literal["job", "replica"]


@dataclass(eq=False)
class _Counted:
    """Bytes that count against the bounds; 0 as long as they are not known."""

    job: str
    nbytes: int
    known: bool
    users: int = 1  # how many replies they are for
    of_all: bool = True  # whether they count against the replica's bound, too


@dataclass(eq=False)
class Share:
    """A reply's part in the bytes that count against the bounds, which replies with the same features have together."""

    among: "Unsent"
    counted: _Counted
    ended: bool = False

    @property
    def nbytes(self) -> int:
        """How many bytes they are; 0 as long as they are not known."""
        return self.counted.nbytes

    def resize(self, nbytes: int) -> None:
        """Set the reply's size, once it is known."""
        if nbytes != self.counted.nbytes or not self.counted.known:
            self.among.change(self, nbytes)

    def beside(self) -> "Share":
        """A share for another reply to the same job with the same features, which are in memory once."""
        return self.among.beside(self)

    def end(self) -> None:
        """Give the bytes back with the last reply that is sent or not wanted; may be called more than once."""
        self.among.change(self, 0, ended=True)


class Unsent:
    """Counts the unsent bytes of a replica, over all its teachers; followers are called when some become free."""

    def __init__(self, max_bytes: int, max_job_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.max_job_bytes = min(max_bytes, max_job_bytes)
        self._bound = "max_unsent_bytes" if max_bytes < max_job_bytes else "max_job_unsent_bytes"
        self._lock = threading.Lock()
        self._jobs: dict[str, int] = {}
        self._unknown: set[str] = set()  # jobs that have a reply of unknown size
        self._followers: list[Callable[[], None]] = []
        self.nbytes = 0

    def follow(self, freed: Callable[[], None]) -> None:
        """Call `freed` whenever bytes become free."""
        self._followers.append(freed)

    def take(self, job: str, nbytes: int | None) -> Share | Full:
        """A share for a reply of `nbytes` (None if unknown), or whose bound is full.

        A job may have one reply of unknown size at a time, for which any room at all is enough: so it may exceed the
        bounds by that one, but does not wait for other clients that do not read. A reply that is estimated to be larger
        than a job's bound counts as the bound: whether it is too large is decided by its features, in `check`.
        """
        least = 1 if nbytes is None else min(nbytes, self.max_job_bytes)
        with self._lock:
            if self._jobs.get(job, 0) + least > self.max_job_bytes or (nbytes is None and job in self._unknown):
                return "job"
            if self.nbytes + least > self._max_bytes:
                return "replica"
            if nbytes is None:
                self._unknown.add(job)
                return Share(self, _Counted(job, 0, known=False))
            counted = _Counted(job, least, known=True)
            self._count(counted, least)
        return Share(self, counted)

    def add(self, job: str, nbytes: int) -> Share:
        """A share for what is there already, also where the job's bound is full; it keeps no other job from its own."""
        counted = _Counted(job, nbytes, known=True, of_all=False)
        with self._lock:
            self._count(counted, nbytes)
        return Share(self, counted)

    def beside(self, share: Share) -> Share:
        """One more share of the same bytes; `Share` calls this."""
        with self._lock:
            assert not share.ended
            share.counted.users += 1
        return Share(self, share.counted)

    def check(self, nbytes: int) -> None:
        """Raises `MessageTooLargeError` for features that are larger than a job's bound."""
        if nbytes > self.max_job_bytes:
            raise MessageTooLargeError(
                f"the features of this request take {nbytes} bytes, and {self._bound} of the teacher is "
                f"{self.max_job_bytes}; ask for fewer rows or taps at once or for a smaller encoding, or have the "
                "teacher served with a larger bound"
            )

    def change(self, share: Share, nbytes: int, *, ended: bool = False) -> None:
        """Change a share's size, or end it; `Share` calls this."""
        with self._lock:
            if share.ended:
                return
            counted, share.ended = share.counted, ended
            counted.users -= ended
            if ended and counted.users:
                return
            frees = nbytes < counted.nbytes or not counted.known
            if not counted.known:
                self._unknown.remove(counted.job)
            self._count(counted, nbytes - counted.nbytes)
            counted.nbytes, counted.known = nbytes, True
        if frees:
            for freed in self._followers:
                freed()

    def _count(self, counted: _Counted, more: int) -> None:
        self.nbytes += more if counted.of_all else 0
        left = self._jobs[counted.job] = self._jobs.get(counted.job, 0) + more
        if not left:
            del self._jobs[counted.job]
