"""Features that are not sent yet: how many bytes of them a replica, and each of its jobs, may have at once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from schoolhouse.errors import MessageTooLargeError

Full: TypeAlias = Literal["job", "replica"]


@dataclass(eq=False)
class Share:
    """One reply's part of the bounds: its bytes, 0 as long as nobody knows them."""

    among: "Unsent"
    job: str
    nbytes: int
    known: bool = True
    ended: bool = False

    def resize(self, nbytes: int) -> None:
        """By now it is known how large the reply is."""
        if nbytes != self.nbytes or not self.known:
            self.among.change(self, nbytes)

    def beside(self) -> "Share":
        """One more, for another reply of the job with the same features."""
        return self.among.add(self.job, self.nbytes)

    def end(self) -> None:
        """The reply is sent, or nobody wants it. Any number of times."""
        self.among.change(self, 0, ended=True)


class Unsent:
    """The bytes of a replica, of all its teachers. `freed()` is called, of those who follow, where some become free."""

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
        """Call `freed` from here on."""
        self._followers.append(freed)

    def take(self, job: str, nbytes: int | None) -> Share | Full:
        """A share for a reply, None for one of unknown size; or whose bytes there are too few of.

        A job has one of unknown size at a time, as soon as there is any room: it may exceed the bounds by that one, but
        does not wait for a client that does not read. One that is likely to be larger than a job's bound counts as the
        bound: only its features tell, in `check`.
        """
        least = 1 if nbytes is None else min(nbytes, self.max_job_bytes)
        with self._lock:
            if self._jobs.get(job, 0) + least > self.max_job_bytes or (nbytes is None and job in self._unknown):
                return "job"
            if self.nbytes + least > self._max_bytes:
                return "replica"
            if nbytes is None:
                self._unknown.add(job)
                return Share(self, job, 0, known=False)
            self._count(job, least)
        return Share(self, job, least)

    def add(self, job: str, nbytes: int) -> Share:
        """A share whether or not there is room."""
        with self._lock:
            self._count(job, nbytes)
        return Share(self, job, nbytes)

    def check(self, nbytes: int) -> None:
        """Raises `MessageTooLargeError` for features that no job may have."""
        if nbytes > self.max_job_bytes:
            raise MessageTooLargeError(
                f"the features of this request take {nbytes} bytes, and {self._bound} of the teacher is "
                f"{self.max_job_bytes}; ask for fewer rows or taps at once or for an encoding that is smaller, or have "
                "the teacher served with more"
            )

    def change(self, share: Share, nbytes: int, *, ended: bool = False) -> None:
        """What `Share` does."""
        with self._lock:
            if share.ended:
                return
            frees = nbytes < share.nbytes or not share.known
            if not share.known:
                self._unknown.remove(share.job)
            self._count(share.job, nbytes - share.nbytes)
            share.nbytes, share.known, share.ended = nbytes, True, ended
        if frees:
            for freed in self._followers:
                freed()

    def _count(self, job: str, more: int) -> None:
        self.nbytes += more
        left = self._jobs[job] = self._jobs.get(job, 0) + more
        if not left:
            del self._jobs[job]
