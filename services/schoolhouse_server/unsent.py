"""Features that are not sent yet: how many bytes of them a replica, and each of its jobs, may have at once.

A request has its share from before its forward until its reply is sent, or nobody wants it. How large it is tells the
last request of its kind; of a kind that is new, its job has nothing else until the features are there.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from schoolhouse.errors import MessageTooLargeError
from schoolhouse.taps import tensors_of
from schoolhouse.wanted import Wanted
from schoolhouse_wire.encodings import Sampled

_MAX_KINDS = 4096
Full: TypeAlias = Literal["job", "replica"]


@dataclass(eq=False)
class Share:
    """One reply's part of the bounds."""

    among: "Unsent"
    job: str
    nbytes: int
    ended: bool = False

    def resize(self, nbytes: int) -> None:
        """By now it is known how large the reply is."""
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
        self._followers: list[Callable[[], None]] = []
        self.nbytes = 0

    def follow(self, freed: Callable[[], None]) -> None:
        """Call `freed` from here on."""
        self._followers.append(freed)

    def take(self, job: str, nbytes: int | None) -> Share | Full:
        """A share for a reply, None for one of unknown size; or whose bytes there are too few of.

        One larger than a job's bound counts as that: whether it is so large shows only its features, in `check`.
        """
        nbytes = self.max_job_bytes if nbytes is None else min(nbytes, self.max_job_bytes)
        with self._lock:
            if self._jobs.get(job, 0) + nbytes > self.max_job_bytes:
                return "job"
            if self.nbytes + nbytes > self._max_bytes:
                return "replica"
            self._count(job, nbytes)
        return Share(self, job, nbytes)

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
            more, share.ended = nbytes - share.nbytes, ended
            self._count(share.job, more)
            share.nbytes = nbytes
        if more < 0:
            for freed in self._followers:
                freed()

    def _count(self, job: str, more: int) -> None:
        self.nbytes += more
        self._jobs[job] = self._jobs.get(job, 0) + more
        if not self._jobs[job]:
            del self._jobs[job]


class Sizes:
    """What replies take, by the kind of request: by what is wanted, and how many dimensions the inputs have.

    They are taken to grow with the inputs, as they do with the rows, and the tokens.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, float] = OrderedDict()  # bytes for each element of the inputs
        self._lock = threading.Lock()

    @staticmethod
    def kind_of(inputs: Any, wanted: Wanted) -> tuple[Hashable, int]:
        """A request's kind, and the elements of its inputs."""
        tensors = [*tensors_of(inputs)]
        kinds = (dataclasses.replace(e, seed=None) if isinstance(e, Sampled) else e for e in wanted.encodings)
        dims = tuple(tensor.dim() for tensor in tensors)
        return (wanted.taps, *kinds, dims), max(sum(tensor.numel() for tensor in tensors), 1)

    def of(self, kind: Hashable, elements: int) -> int | None:
        """Bytes of the features of such a request; None if that is not known."""
        found = self._known.get(kind)
        return None if found is None else round(found * elements)

    def learn(self, kind: Hashable, elements: int, nbytes: int) -> None:
        """The features of such a request took so many bytes."""
        with self._lock:
            self._known[kind] = nbytes / elements
            self._known.move_to_end(kind)
            if len(self._known) > _MAX_KINDS:
                self._known.popitem(last=False)
