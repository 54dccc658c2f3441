"""The counters of a replica, for each job and in all: requests, rows, waits, bytes and errors."""

import bisect
import itertools
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields

from schoolhouse_wire.errors import SchoolhouseError, TeacherInternalError
from schoolhouse_wire.v1 import directory_pb2

# The upper bounds of the buckets of Load.queue_delay_counts, in seconds; one more bucket has what waited longer.
QUEUE_DELAY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ENDED = "(ended)"  # stands for the jobs that ended longest ago
_MAX_ENDED = 256
_RECENT = 0.1  # the weight of the latest request's wait in the running mean
_DECAY_S = 2.0  # while nothing runs, the mean falls to 1/e in this time


@dataclass(eq=False)
class JobCounters:
    """Sums of one job since the replica's start; `weight` is that of its latest session."""

    job: str
    weight: float = 1.0
    sessions: int = 0
    requests: int = 0
    rows: int = 0
    cost: float = 0.0
    device_s: float = 0.0
    queue_s: float = 0.0
    errors: int = 0
    waits: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0

    def add(self, other: "JobCounters") -> None:
        """Add the counts of another job."""
        for one in fields(self)[3:]:
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Counters:
    """The counters of one teacher on one replica; any thread may use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._unnamed = (f"anonymous-{number}" for number in itertools.count(1))
        self._live: dict[str, JobCounters] = {}
        self._ended: OrderedDict[str, JobCounters] = OrderedDict()
        self._oldest = JobCounters(ENDED)
        self.forwards = self.rows = 0
        self.waited_s = 0.0
        self._delays = [0] * (len(QUEUE_DELAY_BUCKETS_S) + 1)
        self._delay_s, self._delay_at = 0.0, self._began
        self._errors: Counter[str] = Counter()
        self._feature_bytes: Counter[str] = Counter()

    def enter(self, job: str, weight: float) -> JobCounters:
        """Note that a session of a job begins; one without a job's name counts as a job of its own."""
        with self._lock:
            if not job:
                job = next(self._unnamed)  # `Member` refuses such names
            found = self._live.get(job) or self._ended.pop(job, None) or JobCounters(job)
            self._live[job] = found
            found.weight = weight
            found.sessions += 1
            return found

    def leave(self, job: JobCounters) -> None:
        """Note that a session ends; the jobs that ended last are kept, and older ones summed up as one."""
        with self._lock:
            job.sessions -= 1
            if job.sessions:
                return
            self._ended[job.job] = self._live.pop(job.job)
            if len(self._ended) > _MAX_ENDED:
                self._oldest.add(self._ended.popitem(last=False)[1])

    def began(self, job: JobCounters, *, cost: float, waited_s: float) -> None:
        """Count a request that leaves the queue for the device."""
        with self._lock:
            job.cost += cost
            job.queue_s += waited_s
            self.waited_s += waited_s
            self._delays[bisect.bisect_left(QUEUE_DELAY_BUCKETS_S, waited_s)] += 1
            now = time.monotonic()
            mean = self._delay_s
            self._delay_s = mean + _RECENT * (waited_s - mean)
            self._delay_at = now

    def ran(self, job: JobCounters, device_s: float) -> None:
        """Count the device time that a request has taken."""
        with self._lock:
            job.device_s += device_s

    def forward(self, rows: int) -> None:
        """Count a forward that was started, on so many rows."""
        with self._lock:
            self.forwards += 1
            self.rows += rows

    def received(self, job: JobCounters, nbytes: int) -> None:
        """Count the bytes of a request that has been let in."""
        with self._lock:
            job.received_bytes += nbytes

    def waits(self, job: JobCounters) -> None:
        """Count a session that was told to wait."""
        with self._lock:
            job.waits += 1

    def answered(
        self, job: JobCounters, *, rows: int, header_bytes: int = 0, by_encoding: Iterable[tuple[str, int]] = ()
    ) -> None:
        """Count a request that has its features, and their bytes in each encoding."""
        with self._lock:
            job.requests += 1
            job.rows += rows
            job.sent_bytes += header_bytes
            for name, nbytes in by_encoding:
                job.sent_bytes += nbytes
                self._feature_bytes[name] += nbytes

    def failed(self, job: JobCounters | None, error: BaseException) -> None:
        """Count a request that is answered with an error."""
        kind = type(error) if isinstance(error, SchoolhouseError) else TeacherInternalError
        with self._lock:
            self._errors[kind.__name__] += 1
            if job is not None:
                job.errors += 1

    def delay_s(self, oldest: float | None) -> float:
        """How long requests wait for the device at present; `oldest` is when the oldest waiting one was queued.

        It is the running mean of waits, which falls to 0 while no request comes, or the age of the oldest, if longer.
        """
        with self._lock:
            idle_s = time.monotonic() - self._delay_at
            mean = self._delay_s * math.exp(-idle_s / _DECAY_S)
        age = time.perf_counter() - oldest if oldest is not None else 0.0
        return max(mean, age)

    def fill(self, load: directory_pb2.Load, queued: dict[str, int], in_flight: dict[str, int]) -> None:
        """Write all counts into `load`, with how many requests of each job are queued and in flight."""
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
