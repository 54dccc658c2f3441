"""What a replica counts, by job: requests, rows, waits, bytes and errors."""

import bisect
import itertools
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields

from schoolhouse.errors import SchoolhouseError, TeacherInternalError
from schoolhouse_wire.v1 import directory_pb2

# Upper bounds of the buckets that Load.queue_delay_counts has, in seconds; one more is for what waited longer.
QUEUE_DELAY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ENDED = "(ended)"  # stands for the jobs that ended longest ago
_MAX_ENDED = 256
_RECENT = 0.1  # weight of the latest request's wait in the mean
_DECAY_S = 2.0  # while nothing runs, the mean falls to 1/e in this time


@dataclass(eq=False)
class JobCounters:
    """Sums of one job since the replica's start. `weight` is what its latest session said."""

    job: str
    weight: float = 1.0
    sessions: int = 0
    requests: int = 0
    rows: int = 0
    cost: float = 0.0
    queue_s: float = 0.0
    errors: int = 0
    waits: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0

    def add(self, other: "JobCounters") -> None:
        """Take over what another job has counted."""
        for one in fields(self)[3:]:
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Counters:
    """Counts of one teacher on one replica. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._unnamed = (f"anonymous-{number}" for number in itertools.count(1))
        self._live: dict[str, JobCounters] = {}
        self._ended: OrderedDict[str, JobCounters] = OrderedDict()
        self._oldest = JobCounters(ENDED)
        self.forwards = self.rows = 0
        self._delays = [0] * (len(QUEUE_DELAY_BUCKETS_S) + 1)
        self._delay_s, self._delay_at = 0.0, self._began
        self._errors: Counter[str] = Counter()
        self._feature_bytes: Counter[str] = Counter()

    def enter(self, job: str, weight: float) -> JobCounters:
        """A session of a job begins. One without a name is a job of its own."""
        with self._lock:
            if not job:
                job = next(name for name in self._unnamed if name not in self._live and name not in self._ended)
            found = self._live.get(job) or self._ended.pop(job, None) or JobCounters(job)
            self._live[job] = found
            found.weight = weight
            found.sessions += 1
            return found

    def leave(self, job: JobCounters) -> None:
        """A session ends. Of jobs that have ended, the last ones are kept."""
        with self._lock:
            job.sessions -= 1
            if job.sessions:
                return
            self._ended[job.job] = self._live.pop(job.job)
            if len(self._ended) > _MAX_ENDED:
                self._oldest.add(self._ended.popitem(last=False)[1])

    def began(self, job: JobCounters, *, cost: float, waited_s: float) -> None:
        """A request leaves the queue for the device."""
        with self._lock:
            job.cost += cost
            job.queue_s += waited_s
            self._delays[bisect.bisect_left(QUEUE_DELAY_BUCKETS_S, waited_s)] += 1
            now = time.monotonic()
            mean = self._delay_s
            self._delay_s = mean + _RECENT * (waited_s - mean)
            self._delay_at = now

    def forward(self, rows: int) -> None:
        """A forward on so many rows was started."""
        with self._lock:
            self.forwards += 1
            self.rows += rows

    def received(self, job: JobCounters, nbytes: int) -> None:
        """A request is here."""
        with self._lock:
            job.received_bytes += nbytes

    def waits(self, job: JobCounters) -> None:
        """A session was told to wait."""
        with self._lock:
            job.waits += 1

    def answered(self, job: JobCounters, *, rows: int) -> None:
        """A request has its features."""
        with self._lock:
            job.requests += 1
            job.rows += rows

    def sent(self, job: JobCounters, header_bytes: int, by_encoding: Iterable[tuple[str, int]]) -> None:
        """Features go to the client, so many bytes in each encoding."""
        with self._lock:
            job.sent_bytes += header_bytes
            for name, nbytes in by_encoding:
                job.sent_bytes += nbytes
                self._feature_bytes[name] += nbytes

    def failed(self, job: JobCounters | None, error: BaseException) -> None:
        """A request is answered with an error."""
        kind = type(error) if isinstance(error, SchoolhouseError) else TeacherInternalError
        with self._lock:
            self._errors[kind.__name__] += 1
            if job is not None:
                job.errors += 1

    def delay_s(self, oldest: float | None) -> float:
        """How long requests wait for the device at present; `oldest` is when the first that waits was queued.

        That is the mean of the latest ones, which falls to 0 while none comes, or the age of the oldest, if longer.
        """
        with self._lock:
            idle_s = time.monotonic() - self._delay_at
            mean = self._delay_s * math.exp(-idle_s / _DECAY_S)
        age = time.perf_counter() - oldest if oldest is not None else 0.0
        return max(mean, age)

    def fill(self, load: directory_pb2.Load, queued: dict[str, int], in_flight: dict[str, int]) -> None:
        """Write all counts into a message, beside the requests of each job that wait and that are in flight."""
        with self._lock:
            load.forwards, load.rows = self.forwards, self.rows
            load.queue_delay_counts.extend(self._delays)
            load.errors.update(self._errors)
            load.feature_bytes.update(self._feature_bytes)
            load.uptime_s = time.monotonic() - self._began
            oldest = [self._oldest] if any([*vars(self._oldest).values()][2:]) else []
            for job in [*self._live.values(), *self._ended.values(), *oldest]:
                counts = directory_pb2.JobLoad(**vars(job))
                counts.queued, counts.in_flight = queued.get(job.job, 0), in_flight.get(job.job, 0)
                load.jobs.append(counts)
