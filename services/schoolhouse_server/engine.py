"""One teacher on one device: requests come in, wait, run by themselves or merged, and their features go out."""

import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from schoolhouse.errors import (
    RevisionChangedError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse.taps import Tap, tensors_of
from schoolhouse.teachers import LocalTeacher
from schoolhouse.wanted import Wanted
from schoolhouse_wire.codec import Arguments, Declared
from schoolhouse_wire.tensors import bytes_of
from schoolhouse_wire.v1 import directory_pb2

from schoolhouse_server import self_check
from schoolhouse_server.batching import MergeSettings
from schoolhouse_server.cache import FeatureCache
from schoolhouse_server.counters import Counters
from schoolhouse_server.device import Device, Span
from schoolhouse_server.jobs import Answer, Job, Ticket
from schoolhouse_server.merging import Joint, Merger
from schoolhouse_server.outlet import SENDING_S, Landing, Outlet, Part
from schoolhouse_server.queueing import FairQueue
from schoolhouse_server.sharing import COSTS, rows_of
from schoolhouse_server.splitting import UnmergeableError
from schoolhouse_server.timer import Timer

_CLOSED = "the teacher is shutting down"
_LATE = "the request's deadline passed while it waited for the teacher"
_AHEAD = 4
_log = logging.getLogger(__name__)
T = TypeVar("T")
STAGES = ("receive", "queue", "h2d", "forward", "encode", "d2h", "send")


class Engine:
    """Runs one LocalTeacher. `submit` refuses beyond `max_queued` requests.

    Two threads: one brings inputs to the device and starts forwards, one encodes features and brings them to the host.
    Receiving and sending happen in the threads of the sessions. So the next forward follows the last one at once.

    Raises:
        ConfigError: for a module whose requests cannot be merged as `merge` says.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        *,
        max_queued: int,
        cache_bytes: int = 0,
        cost: str = "rows",
        timer: Timer | None = None,
        merge: MergeSettings | None = None,
        example: Callable[[], Any] | None = None,
    ) -> None:
        merge = merge or MergeSettings()
        self.description = dataclasses.replace(teacher.describe(), merge=merge.mode)
        self.teacher = teacher
        self.served = self.running = self.joined = 0
        self.cache = FeatureCache(cache_bytes) if cache_bytes else None
        self.device = Device(self.description.device)
        # Torch counts no changes of inference tensors. There may be thousands, and each request looks at all of them.
        self._weights = [weight for weight in teacher.module.parameters() if not weight.is_inference()]
        self._versions = [weight._version for weight in self._weights]
        self.counters = Counters()
        self._cost_of = COSTS[cost]
        self._owns_timer = timer is None
        self._timer = timer or Timer()
        self.merger: Merger[Job] | None = None
        if merge.mode != "never":
            self_check.check_modules(teacher.module, self.description, merge)
            self.merger = Merger(merge, self.description, lambda: self.device.forward.recent_s)
            self_check.check_example(teacher, self.device, self.merger.former, example)
        self._queue: FairQueue[Job] = FairQueue(max_queued)
        self._ahead: deque[Span] = deque(maxlen=_AHEAD)  # forwards that the device may be at still
        self._outlet = Outlet(teacher, self.device, self.cache, self._end)
        self._in_flight: dict[Hashable, Job] = {}
        self._lock = threading.Lock()
        self._outside_s = dict.fromkeys(("receive", "queue", "send"), 0.0)
        self._threads = [
            threading.Thread(target=target, name=f"schoolhouse-engine-{name}", daemon=True)
            for name, target in (("in", self._run), ("out", self._outlet.run))
        ]
        self._closed = False

    @property
    def batch_limit_rows(self) -> int:
        """Rows that a merged forward may hold; 0 if nothing is merged."""
        return self.merger.settings.max_batch_rows if self.merger is not None else 0

    @property
    def queued(self) -> int:
        """Requests that wait for the device."""
        return len(self._queue)

    def fill(self, load: directory_pb2.Load, in_flight: dict[str, int]) -> None:
        """Write what is counted by job, and how long requests wait, into a message."""
        self.counters.fill(load, self._queue.queued(), in_flight)
        load.queue_delay_s = self.counters.delay_s(self._queue.oldest())

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
        job.rows, job.cost = rows_of(job.inputs), float(self._cost_of(job.inputs))
        if self.merger is not None and not job.alone:
            self.merger.prepare(job)
        if self.cache is not None and not job.alone:
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
            for ticket in job.tickets:
                ticket.job = job
            if job.deadline < math.inf:
                job.alarm = self._timer.at(job.deadline, functools.partial(self._expire, job))

    def cancel(self, ticket: Ticket) -> None:
        """Forget who waits for a job; it leaves the queue at once, if nobody else does."""
        with self._lock:
            ticket.cancelled = True
            job, ticket.job = ticket.job, None
            if job is not None and job.cancelled and self._queue.remove(job):
                self._forget(job)

    def _expire(self, job: Job) -> None:
        """At its deadline, a request that still waits for the device fails."""
        with self._lock:
            if time.monotonic() < job.deadline:  # another one joined
                job.alarm = self._timer.at(job.deadline, functools.partial(self._expire, job))
                return
            if not self._queue.remove(job):
                return
        self._begin(job, charged=False)
        self._end(job, TeacherTimeoutError(_LATE))

    def _forget(self, job: Job) -> None:
        """Nobody joins any more, and no deadline matters. The lock is held."""
        if self._in_flight.get(job.key) is job:
            del self._in_flight[job.key]
        if job.alarm is not None:
            self._timer.cancel(job.alarm)

    def _join(self, job: Job) -> bool:
        """Have a job in flight on the same inputs answer this one; equal digests alone are not trusted."""
        other = self._in_flight.get(job.key)
        if other is None or other.cancelled or time.monotonic() > other.deadline:  # it may be about to fail
            return False
        if not _equal(other.content, job.content):
            return False
        other.tickets += job.tickets
        for ticket in job.tickets:
            ticket.job = other
        other.deadline = max(other.deadline, job.deadline)
        self.joined += 1
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the present request; those that wait fail with `TeacherUnavailableError`."""
        with self._lock:  # nothing is queued from here on
            self._closed = True
        for job in self._queue.close():
            self._begin(job, charged=False)
            self._end(job, TeacherUnavailableError(_CLOSED))
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(end - time.monotonic(), 0.0))
        if self._owns_timer:
            self._timer.close()

    def _run(self) -> None:
        while jobs := self._take():
            self._compute(jobs)
            del jobs
        self._outlet.finish()

    def _take(self) -> list[Job]:
        if self.merger is None:
            return self._queue.take()
        with contextlib.suppress(Exception):  # a forward that failed on its device tells its own jobs
            while len(self._ahead) > 1:  # the longer others may come, the fewer forwards there are
                self.device.wait(self._ahead.popleft())
        ask = functools.partial
        jobs = self._queue.take(ask(_else, False, self.merger.fits), ask(_else, 0.0, self.merger.linger))
        self.merger.waiting.ended(jobs)
        return jobs

    def _compute(self, jobs: list[Job]) -> None:
        ready = [job for job in jobs if self._admit(job)]
        while ready and self.merger is not None and (plan := _else(None, self.merger.plan, ready)) is not None:
            joint, checked = plan
            if checked is None:
                self._together(self.merger, joint)
                return
            self._compared(self.merger, checked)
            ready = ready[len(checked.jobs) :]
        for job in ready:
            self._alone(job)

    def _admit(self, job: Job) -> bool:
        self._begin(job)
        try:
            self._check(job)
        except Exception as err:
            self._end(job, err)
            return False
        return True

    def _alone(self, job: Job) -> bool:
        """Run a job by itself; False if it failed, and was told so."""
        try:
            work = self._forward(job, job.wanted)
            at_once = self._at_once(work)
        except BaseException as err:  # a module may raise anything, and others wait for this thread
            self._end(job, err)
            return False
        self._hand_over(work, at_once)
        return True

    def _forward(self, job: Job, wanted: Wanted) -> Landing:
        inputs, loaded = self.device.h2d.run(None, self.device.load, job.inputs)
        values, computed = self.device.forward.run(loaded, self.teacher.forward, inputs, wanted)
        self._ran(job.rows, computed)
        return Landing([Part(job, values)], inputs, [loaded, computed])

    def _ran(self, rows: int, computed: Span) -> None:
        self.counters.forward(rows)
        self._ahead.append(computed)

    def _at_once(self, work: Landing) -> bool:
        """Whether this thread sends it off, as that is faster, unless others wait for a device that is slower."""
        others_wait = len(self._queue) > 0 and self.device.forward.recent_s > SENDING_S
        return self.device.is_host and work.is_small and not others_wait

    def _hand_over(self, work: Landing, at_once: bool) -> None:
        if at_once:
            self._outlet.land(work)
        else:
            self._outlet.put(work)

    def _together(self, merger: Merger[Job], joint: Joint[Job]) -> None:
        """Run jobs as one forward; by themselves if it fails, so that only those fail that are to blame."""
        work: Landing | None = None
        raised, at_once = True, False
        try:
            inputs, values, spans = self._merged(joint)
            parts = zip(joint.jobs, merger.split(joint, values), strict=True)
            work = Landing([Part(job, part) for job, part in parts], inputs, spans)
            at_once = self._at_once(work)
        except UnmergeableError as err:
            raised = False
            _log.info("a merged forward was run again as single ones: %s", err)
        except BaseException as err:  # nothing of it is kept: it holds all of the forward
            _log.info("a merged forward raised %s; its requests are run by themselves", type(err).__name__)
        if work is not None:
            self._hand_over(work, at_once)
            return
        answered = [self._alone(job) for job in joint.jobs]
        if raised and all(answered):
            merger.too_large(joint)

    def _compared(self, merger: Merger[Job], joint: Joint[Job]) -> None:
        """Answer jobs from single forwards, and see whether a merged one is the same."""
        before = self_check.traces(self.teacher.module, self.device)

        def run(job: Job) -> tuple[Landing, tuple[bool, bool]]:
            return self._forward(job, joint.wanted), before.changes()  # all taps, also those that only others want

        works: tuple[Landing, ...] = ()
        try:
            made, changes = zip(*map(run, joint.jobs), strict=True)
            why = self_check.why_not(changes, lambda: run(joint.jobs[0])[1])
            works = made
        except BaseException as err:  # nothing of it is kept: it holds all of a forward
            _log.info("a forward raised %s while merging was checked", type(err).__name__)
        if not works:
            for job in joint.jobs:
                self._alone(job)
            return
        singles = [work.parts[0].values for work in works]
        for job, work in zip(joint.jobs, works, strict=True):
            work.parts[0].values = {tap: work.parts[0].values[tap] for tap in job.wanted.taps}
            self._hand_over(work, self._at_once(work))
        if why:
            merger.refuse(joint, why)
        else:
            self._learn(merger, joint, singles)

    def _learn(self, merger: Merger[Job], joint: Joint[Job], singles: list[dict[Tap, Any]]) -> None:
        try:
            _, merged, _ = self._merged(joint)
            self.device.forward.run(None, merger.learn, joint, merged, singles)
        except BaseException as err:
            _log.info("a merged forward raised %s, and single ones did not", type(err).__name__)
            merger.too_large(joint)

    def _merged(self, joint: Joint[Job]) -> tuple[Arguments, dict[Tap, Any], list[Span]]:
        device = self.device
        inputs, loaded = device.h2d.run(None, self._load, joint)
        values, computed = device.forward.run(loaded, self.teacher.forward, inputs, joint.wanted, joint.like)
        self._ran(joint.batch.layout.total, computed)
        return inputs, values, [loaded, computed]

    def _load(self, joint: Joint[Job]) -> Arguments:
        merged: Arguments = self.device.kept(joint.batch.inputs([self.device.load(job.inputs) for job in joint.jobs]))
        return merged

    def _begin(self, job: Job, charged: bool = True) -> None:
        """A job has left the queue."""
        waited_s = time.perf_counter() - job.queued_at
        with self._lock:
            self.running += 1
            self._outside_s["queue"] += waited_s
            if job.alarm is not None:
                self._timer.cancel(job.alarm)
        self.counters.began(job.tickets[0].account, cost=job.cost if charged else 0.0, waited_s=waited_s)

    def _check(self, job: Job) -> None:
        """Raise what keeps a job from the device."""
        if job.cancelled:
            raise TeacherUnavailableError("nobody waits for the features any more")
        if time.monotonic() > job.deadline:
            raise TeacherTimeoutError(_LATE)
        if [weight._version for weight in self._weights] != self._versions:
            raise RevisionChangedError(
                f"the teacher's weights were changed in place after it was served as {self.description.revision}; "
                "serve it again"
            )

    def _end(self, job: Job, result: Declared | BaseException) -> None:
        """Answer all who wait for a job."""
        answer = Answer(result, self.description.revision) if isinstance(result, Declared) else result
        with self._lock:
            self._forget(job)
            self.running -= 1
            self.served += len(job.tickets)
            for ticket in job.tickets:
                ticket.job = None
        for ticket in job.tickets:
            if not ticket.cancelled:
                ticket.done(answer)


def _else(default: T, ask: Callable[..., T], *args: Any) -> T:
    """What is asked, or, if that fails, the default: requests that were taken already must not end with the thread."""
    try:
        return ask(*args)
    except Exception:
        _log.exception("whether requests may be merged could not be told; they run by themselves")
        return default


def _equal(a: Any, b: Any) -> bool:
    """Whether values of equal structure hold equal bytes."""
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(torch.equal(bytes_of(one.contiguous()), bytes_of(other.contiguous())) for one, other in pairs)
