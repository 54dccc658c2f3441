"""One teacher on one device: requests come in, wait, run one after another, and their features go out."""

import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from schoolhouse.errors import (
    RevisionChangedError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse.taps import Tap, tensors_of
from schoolhouse.teachers import LocalTeacher
from schoolhouse.wanted import Wanted
from schoolhouse_wire.codec import Arguments, Declared, pack
from schoolhouse_wire.limits import INLINE_BYTES, Limits
from schoolhouse_wire.tensors import bytes_of

from schoolhouse_server.cache import FeatureCache
from schoolhouse_server.device import Device, Span
from schoolhouse_server.queueing import FairQueue
from schoolhouse_server.spans import AnswerSpan, tell_stages

_CLOSED = "the teacher is shutting down"
_REPLY_LIMITS = Limits()
_LANDING = 2  # requests whose features are on the way out while the device goes on
STAGES = ("receive", "queue", "h2d", "forward", "encode", "d2h", "send")


@dataclass(frozen=True)
class Answer:
    """A list of features, one of each tap that was wanted, in host memory and declared as they will be sent."""

    features: Declared
    revision: str
    limits: Limits = _REPLY_LIMITS


@dataclass(eq=False)
class Ticket:
    """One client's share in a job; `done` is called once, from a thread of the engine's, unless it was cancelled."""

    done: Callable[[Answer | BaseException], None]
    cancelled: bool = False
    trace: AnswerSpan | None = None


@dataclass(eq=False)
class Job:
    """One forward, and who waits for it: several, if they asked for the same while it was in flight."""

    inputs: Arguments
    wanted: Wanted
    key: Hashable  # equal for requests of equal structure, digest and wishes
    deadline: float
    tickets: list[Ticket] = field(default_factory=list)
    queued_at: float = 0.0
    cache_key: bytes | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """What the key has only a digest of."""
        return (self.inputs, self.wanted.mask)

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return all(ticket.cancelled for ticket in self.tickets)


@dataclass(eq=False)
class _Landing:
    """A job whose forward was started. The inputs are kept until the device is done with them."""

    job: Job
    inputs: Any
    values: dict[Tap, Any]
    spans: list[Span]


class Engine:
    """Runs one LocalTeacher. `submit` refuses beyond `max_queued` requests.

    Two threads: one brings inputs to the device and starts forwards, one encodes features and brings them to the host.
    Receiving and sending happen in the threads of the sessions. So the next forward follows the last one at once.
    """

    def __init__(self, teacher: LocalTeacher, *, max_queued: int, cache_bytes: int = 0) -> None:
        self.description = teacher.describe()
        self.teacher = teacher
        self.served = self.running = self.joined = 0
        self.cache = FeatureCache(cache_bytes) if cache_bytes else None
        self.device = Device(self.description.device)
        # Torch counts no changes of inference tensors. There may be thousands, and each request looks at all of them.
        self._weights = [weight for weight in teacher.module.parameters() if not weight.is_inference()]
        self._versions = [weight._version for weight in self._weights]
        self._queue: FairQueue[Job] = FairQueue(max_queued)
        self._landing: queue.Queue[_Landing | None] = queue.Queue(_LANDING)
        self._in_flight: dict[Hashable, Job] = {}
        self._lock = threading.Lock()
        self._outside_s = dict.fromkeys(("receive", "queue", "send"), 0.0)
        self._threads = [
            threading.Thread(target=target, name=f"schoolhouse-engine-{name}", daemon=True)
            for name, target in (("in", self._run), ("out", self._run_out))
        ]
        self._closed = False

    @property
    def queued(self) -> int:
        """Requests that wait for the device."""
        return len(self._queue)

    def stage_s(self) -> dict[str, float]:
        """Seconds spent so far, by stage; summed over requests, so that stages that overlap count each."""
        on_device = {name: getattr(self.device, name).seconds for name in ("h2d", "forward", "encode", "d2h")}
        return {name: (self._outside_s | on_device)[name] for name in STAGES}

    def count(self, stage: str, seconds: float) -> None:
        """Add to a stage that runs in the threads of sessions."""
        with self._lock:
            self._outside_s[stage] += seconds

    def start(self) -> None:
        """Begin to work on what is queued."""
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a request, or have an identical one in flight, or the cache, answer it too.

        Raises:
            TeacherBusyError: when the queue is full.
            TeacherUnavailableError: when it was closed.
        """
        if self.cache is not None:
            job.cache_key = self.cache.key(job.content, job.key)
            found = self.cache.get(job.cache_key)
            if found is not None:
                with self._lock:
                    self.served += 1
                job.tickets[0].done(Answer(found, self.description.revision))
                return
        job.inputs = self.device.pin(job.inputs)  # may fail, so before others join
        with self._lock:
            if self._closed:
                raise TeacherUnavailableError(_CLOSED)
            if self._join(job):
                return
            job.queued_at = time.perf_counter()
            self._queue.put(job)
            self._in_flight[job.key] = job

    def _join(self, job: Job) -> bool:
        """Have a job in flight on the same inputs answer this one; equal digests alone are not trusted."""
        other = self._in_flight.get(job.key)
        if other is None or other.cancelled or time.monotonic() > other.deadline:  # it may be about to fail
            return False
        if not _equal(other.content, job.content):
            return False
        other.tickets += job.tickets
        other.deadline = max(other.deadline, job.deadline)
        self.joined += 1
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the present request; those that wait fail with `TeacherUnavailableError`."""
        with self._lock:  # nothing is queued from here on
            self._closed = True
        for job in self._queue.close():
            self._begin(job)
            self._end(job, TeacherUnavailableError(_CLOSED))
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(end - time.monotonic(), 0.0))

    def _run(self) -> None:
        while jobs := self._queue.take(lambda _taken, _other: False):
            for job in jobs:
                self._compute(job)
            del jobs, job
        self._landing.put(None)

    def _run_out(self) -> None:
        while (work := self._landing.get()) is not None:
            self._land(work)
            del work

    def _compute(self, job: Job) -> None:
        device = self.device
        self._begin(job)
        try:
            self._check(job)
            inputs, loaded = device.h2d.run(None, device.load, job.inputs)
            values, computed = device.forward.run(loaded, self.teacher.forward, inputs, job.wanted)
            work = _Landing(job, inputs, values, [loaded, computed])
            at_once = device.is_host and _is_small(values)  # takes less time than handing it over
        except BaseException as err:  # a module may raise anything, and others wait for this thread
            self._end(job, err)
            return
        if at_once:
            self._land(work)
        else:
            self._landing.put(work)

    def _land(self, work: _Landing) -> None:
        device, job = self.device, work.job
        try:
            encoded, made = device.encode.run(work.spans[-1], self.teacher.encode, work.values, job.wanted)
            here, landed = device.d2h.run(made, device.fetch, encoded)
            device.wait(landed)
            for span in (*work.spans, made, landed):
                span.settle()
            tell_stages(job.tickets, job.queued_at, (*work.spans, made, landed))
            features = pack([here[tap] for tap in job.wanted.taps], opaque=True)
            if self.cache is not None and job.cache_key is not None:
                self.cache.put(job.cache_key, features)
        except BaseException as err:
            self._end(job, err)
            return
        self._end(job, Answer(features, self.description.revision))

    def _begin(self, job: Job) -> None:
        with self._lock:
            self.running += 1
            self._outside_s["queue"] += time.perf_counter() - job.queued_at

    def _check(self, job: Job) -> None:
        """Raise what keeps a job from the device."""
        if job.cancelled:
            raise TeacherUnavailableError("nobody waits for the features any more")
        if time.monotonic() > job.deadline:
            raise TeacherTimeoutError("the request's deadline passed while it waited for the teacher")
        if [weight._version for weight in self._weights] != self._versions:
            raise RevisionChangedError(
                f"the teacher's weights were changed in place after it was served as {self.description.revision}; "
                "serve it again"
            )

    def _end(self, job: Job, result: Answer | BaseException) -> None:
        """Answer all who wait for a job."""
        with self._lock:
            if self._in_flight.get(job.key) is job:
                del self._in_flight[job.key]  # nobody joins any more
            self.running -= 1
            self.served += len(job.tickets)
        for ticket in job.tickets:
            if not ticket.cancelled:
                ticket.done(result)


def _is_small(values: Any) -> bool:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors_of(values)) <= INLINE_BYTES


def _equal(a: Any, b: Any) -> bool:
    """Whether values of equal structure hold equal bytes."""
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(torch.equal(bytes_of(one.contiguous()), bytes_of(other.contiguous())) for one, other in pairs)
