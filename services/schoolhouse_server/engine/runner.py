"""The thread that runs forwards: of one request, of several merged, or again if the first try failed."""

import contextlib
import functools
import gc
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.errors import (
    RevisionChangedError,
    TeacherForwardError,
    TeacherTimeoutError,
)
from schoolhouse_wire.torch_private import versions_of
from schoolhouse_wire.values.codec import Arguments

from schoolhouse_server.device import nonfinite
from schoolhouse_server.device.device import Device, Span, lacks_memory
from schoolhouse_server.device.watchdog import Pulse
from schoolhouse_server.engine.answers import Answers
from schoolhouse_server.engine.fair_queue import FairQueue
from schoolhouse_server.engine.jobs import Job, Ticket, charge
from schoolhouse_server.engine.reply_pipeline import SENDING_S, Landing, Outlet, Part
from schoolhouse_server.engine.split_on_oom import RowParts
from schoolhouse_server.merge import self_check
from schoolhouse_server.merge.merging import Joint, Merger
from schoolhouse_server.merge.splitting import UnmergeableError
from schoolhouse_server.observe.counters import Counters

_AHEAD = 4
_ON_DEVICE_TRIES = 2  # for a request whose features had no room on the device; then they are encoded on the host
SHORT_S = 1e-3  # while forwards take no longer than this, the loop waits for them
TURN_S = 5e-3  # for so long at most, before it has a turn of its own
_LOOK_EVERY = 8  # forwards: to read a thread's CPU time is a system call
_RECENT = 0.2  # the weight of the last requests in the running mean of their time
LATE = "the request's deadline passed while it waited for the teacher"
_log = logging.getLogger(__name__)
T = TypeVar("T")


class NobodyWaitsError(TeacherTimeoutError):
    """Nobody waited for a job any more, as its turn came; those who have joined it since still do."""


class Runner:
    """Takes requests from the queue and starts their forwards; those that failed go to `answers`.

    Forwards are `short` while what it takes from the queue at once takes its thread little CPU time, by a running mean,
    and does not sleep, as an emulated device may: then the loop waits for them. By the clock alone they would not stay
    short beside other work.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        device: Device,
        merger: Merger[Job] | None,
        queue: FairQueue[Ticket],
        outlet: Outlet,
        counters: Counters,
        answers: Answers,
    ) -> None:
        self.pulse = Pulse()
        self._cpu_s = self._clock_s = math.inf  # of what was taken at once: a running mean, and about the median
        self._teacher, self._device, self._merger = teacher, device, merger
        self._queue, self._outlet, self._counters = queue, outlet, counters
        self._answers = answers
        # Without inference tensors, whose changes torch does not count. Listed once, as each request checks them all.
        self._weights = [weight for weight in teacher.module.parameters() if not weight.is_inference()]
        self._versions = versions_of(self._weights)
        self._ahead: deque[Span] = deque(maxlen=_AHEAD)  # forwards that the device may not have finished
        knows = merger.knows if merger is not None else None
        self._parts = RowParts(teacher, device, self._by_way_of_host, knows)

    def run(self) -> None:
        """Run queued requests, until the queue is closed."""
        # Torch applies its number of threads to a new thread only when that is asked for, or with the first parallel
        # kernel of its own. MKL's kernels may run before that, and sum in another order: the bits would differ.
        torch.get_num_threads()
        for turn in itertools.count():
            if (jobs := self._take()) is None:
                break
            looks = turn % _LOOK_EVERY == 0
            began = (time.thread_time(), time.perf_counter()) if looks else (0.0, 0.0)
            if jobs:
                self.compute(jobs)
            del jobs
            if looks:
                self._took(time.thread_time() - began[0], time.perf_counter() - began[1])
        self._outlet.finish()

    @property
    def short(self) -> bool:
        """Whether forwards lately took so little time that the loop does better to wait for them."""
        return self._cpu_s <= SHORT_S and self._clock_s <= TURN_S

    def _took(self, cpu_s: float, clock_s: float) -> None:
        if self._cpu_s == math.inf:
            self._cpu_s, self._clock_s = cpu_s, clock_s
        self._cpu_s += _RECENT * (cpu_s - self._cpu_s)
        self._clock_s *= 1 + _RECENT if clock_s > self._clock_s else 1 / (1 + _RECENT)

    def _take(self) -> list[Job] | None:
        """What is to run next, without what was answered meanwhile; None once the queue is closed."""
        if self._merger is None:
            return _jobs_of(self._queue.take())
        with contextlib.suppress(Exception), self.pulse:  # the jobs of a forward that failed on the device are told so
            while len(self._ahead) > 1:  # the longer requests can gather, the fewer forwards are needed
                self._device.wait(self._ahead.popleft())
        ask = functools.partial
        jobs = _jobs_of(self._queue.take(ask(_else, False, self._fits), ask(_else, 0.0, self._linger)))
        self._merger.waiting.ended(jobs or [])
        return jobs

    def _fits(self, taken: list[Ticket], other: Ticket) -> bool:
        jobs = _jobs_of(taken)
        if not jobs or self._merger is None or other.job is None:
            return False
        return self._merger.fits(jobs, other.job)

    def _linger(self, taken: list[Ticket]) -> float:
        jobs = _jobs_of(taken)
        return self._merger.linger(jobs) if jobs and self._merger else 0.0

    def compute(self, jobs: list[Job]) -> None:
        """Run requests that were taken together, and hand over their features."""
        if not jobs[0].again:
            self._run_ready([job for job in jobs if self._admit(job)])
        elif self._merger is not None and len(jobs) > 1:
            self._compared(self._merger, self._merger.join(jobs))
        else:
            self._in_need(jobs[0])

    def _admit(self, job: Job) -> bool:
        """Whether a request that has left the queue is still to run; if not, its clients are told why."""
        job.begun_at, turn = time.perf_counter(), job.turn
        if turn is not None:
            self._counters.began(turn.account, cost=job.units, waited_s=job.begun_at - turn.queued_at)
        try:
            self._check(job)
        except Exception as err:
            charge([job], 0.0)
            self._answers.put(job, err)
            return False
        return True

    def _check(self, job: Job) -> None:
        """Raise the error that keeps a job from running, if there is one."""
        now = time.monotonic()
        if not [ticket for ticket in job.tickets if not ticket.cancelled and now <= ticket.deadline]:
            raise NobodyWaitsError(LATE)
        if versions_of(self._weights) != self._versions:
            revision = self._teacher.describe().revision
            raise RevisionChangedError(
                f"the teacher's weights were changed in place after it was served as {revision}; serve it again"
            )

    def _run_ready(self, ready: list[Job]) -> None:
        while ready and self._merger is not None and (plan := _else(None, self._merger.plan, ready)) is not None:
            joint, checked = plan
            if checked is None:
                self._together(self._merger, joint)
                return
            self._compared(self._merger, checked)
            ready = ready[len(checked.jobs) :]
        self._apart(ready)

    def _alone(self, job: Job) -> bool:
        """Run a job alone; False if it failed, and was told so."""
        try:
            work = self._forward(job, job.wanted)
            at_once = self._at_once(work)
        except BaseException as err:  # a module may raise anything, and this thread must go on
            if not lacks_memory(err):
                self._answers.put(job, _as_forward_error(err))
                return False
        else:
            self._hand_over(work, at_once)
            return True
        return self._in_need(job)  # outside of `except`, so that nothing keeps the memory of the failed forward

    def _in_need(self, job: Job) -> bool:
        """Run a job that had no room when the device is otherwise idle; if that fails too, in parts of its rows."""
        self._make_room()
        work = None
        try:
            if job.again < _ON_DEVICE_TRIES:
                work = self._forward(job, job.wanted)
        except BaseException as err:
            if not lacks_memory(err):
                self._answers.put(job, _as_forward_error(err))
                return False
        if work is None:
            self._device.free()
            work = self._in_parts(job)
        if work is None:
            return False
        self._hand_over(work, self._at_once(work))
        return True

    def _in_parts(self, job: Job) -> Landing | None:
        whole = job.again >= _ON_DEVICE_TRIES
        try:
            with _charged(job):
                _, loaded = self._device.h2d.run(None, lambda _: None, ())
                values, computed = self._device.forward.run(loaded, lambda _: self._parts.run(job, whole), ())
        except BaseException as err:
            self._answers.put(job, _as_forward_error(err))
            return None
        return Landing([Part(job, values)], None, [loaded, computed])

    def _make_room(self) -> None:
        """Wait until all features are sent off, and free what memory the device keeps without need."""
        with self.pulse:
            self._outlet.settle()
        self._ahead.clear()
        gc.collect()  # frees what a failed forward left in reference cycles
        self._device.free()

    def _by_way_of_host(self, inputs: Arguments, wanted: Wanted) -> dict[Tap, Any]:
        """Run a forward, and return its features in host memory."""
        device = self._device
        with self.pulse:
            loaded, arrived = device.h2d.run(None, device.load, inputs)
            values, computed = device.forward.run(arrived, self._teacher.forward, loaded, wanted)
            fetched, landed = device.d2h.run(computed, device.fetch, values)
            device.wait(landed)
        here: dict[Tap, Any] = fetched
        return here

    def _forward(self, job: Job, wanted: Wanted) -> Landing:
        with self.pulse, _charged(job):
            inputs, loaded = self._device.h2d.run(None, self._device.load, job.inputs)
            values, computed = self._device.forward.run(loaded, self._teacher.forward, inputs, wanted)
        self._ran(job.rows, computed)
        return Landing([Part(job, values)], inputs, [loaded, computed])

    def _ran(self, rows: int, computed: Span) -> None:
        self._counters.forward(rows)
        self._ahead.append(computed)

    def _at_once(self, work: Landing) -> bool:
        """Whether this thread sends off a forward's features itself, which is faster for small ones on a CPU.

        Not if others wait and a forward takes longer than sending, which the other thread then does meanwhile.
        """
        others_wait = len(self._queue) > 0 and self._device.forward.recent_s > SENDING_S
        return self._device.is_host and work.is_small and not others_wait

    def _hand_over(self, work: Landing, at_once: bool) -> None:
        if at_once:
            with self.pulse:
                self._outlet.land(work)
        else:
            self._outlet.put(work)

    def _together(self, merger: Merger[Job], joint: Joint[Job]) -> None:
        """Run jobs as one forward; if it fails, run them alone, so that only those that are to blame fail."""
        work: Landing | None = None
        raised, short, at_once = True, False, False
        try:
            inputs, values, total, spans = self._merged(joint)
            with self.pulse:  # splitting may wait for the device, to look at the features
                parts, _ = self._device.forward.run(None, lambda made: merger.split(joint, made), values)
            pairs = zip(joint.jobs, parts, strict=True)
            work = Landing([Part(job, part) for job, part in pairs], inputs, spans, joint=joint, total=total)
            at_once = self._at_once(work)
        except UnmergeableError as err:
            raised = False
            _log.info("a merged forward was run again as single ones: %s", err)
        except BaseException as err:  # not kept, as its traceback holds all of the forward
            short = lacks_memory(err)
            _log.info("a merged forward raised %s; its requests are run alone", type(err).__name__)
        if work is not None:
            self._hand_over(work, at_once)
        elif short:
            self._halved(merger, joint)
        elif self._apart(joint.jobs) and raised:
            merger.too_large(joint)

    def _apart(self, jobs: Sequence[Job]) -> bool:
        """Run jobs one by one; returns whether none failed."""
        answered = [self._alone(job) for job in jobs]
        return all(answered)

    def _halved(self, merger: Merger[Job], joint: Joint[Job]) -> None:
        """Run a batch that did not fit into the device's memory in two halves."""
        merger.too_large(joint)
        self._make_room()
        middle = len(joint.jobs) // 2
        for half in (joint.jobs[:middle], joint.jobs[middle:]):
            self._run_ready([*half])

    def _compared(self, merger: Merger[Job], joint: Joint[Job]) -> None:
        """Answer jobs from single forwards, and check whether a merged forward gives the same."""
        before = self_check.traces(self._teacher.module, self._device)

        def run(job: Job) -> tuple[Landing, tuple[bool, bool]]:
            return self._forward(job, joint.wanted), before.changes()  # with the taps of all of them

        works: tuple[Landing, ...] = ()
        try:
            made, changes = zip(*map(run, joint.jobs), strict=True)
            why = self_check.why_not(changes, lambda: run(joint.jobs[0])[1])
            works = made
        except BaseException as err:  # not kept, as its traceback holds all of a forward
            _log.info("a forward raised %s while merging was checked", type(err).__name__)
        if not works:
            self._apart(joint.jobs)
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
            _, merged, _, _ = self._merged(joint)
            with self.pulse:  # comparing waits for the device
                self._device.forward.run(None, lambda made: merger.learn(joint, *made), (merged, singles))
        except BaseException as err:
            _log.info("a merged forward raised %s, and single ones did not", type(err).__name__)
            merger.too_large(joint)

    def _merged(self, joint: Joint[Job]) -> tuple[Arguments, dict[Tap, Any], torch.Tensor | None, list[Span]]:
        device = self._device

        def forward(inputs: Arguments) -> tuple[dict[Tap, Any], torch.Tensor | None]:
            values = self._teacher.forward(inputs, joint.wanted, joint.like)
            return values, nonfinite.total(values)

        with self.pulse, _charged(*joint.jobs):
            inputs, loaded = device.h2d.run(None, self._load, [job.inputs for job in joint.jobs], joint)
            (values, total), computed = device.forward.run(loaded, forward, inputs)
        self._ran(joint.batch.layout.total, computed)
        return inputs, values, total, [loaded, computed]

    def _load(self, inputs: list[Arguments], joint: Joint[Job]) -> Arguments:
        return joint.batch.inputs([self._device.load(one) for one in inputs])


def _jobs_of(taken: list[Ticket]) -> list[Job] | None:
    """The jobs that take their turns, without those that were answered meanwhile; None for no tickets."""
    jobs = []
    for ticket in taken:
        if (job := ticket.job) is not None:
            job.turn = ticket
            jobs.append(job)
    return jobs if taken else None


class _charged:  # noqa: N801  # used as a function
    """Charge jobs the time of what raises, by the host's clock; how long the rest takes is known once it is done."""

    def __init__(self, *jobs: Job) -> None:
        self._jobs, self._began = jobs, time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: object) -> None:
        if kind is not None:
            charge(self._jobs, time.perf_counter() - self._began)


def _as_forward_error(error: BaseException) -> BaseException:
    """The error to answer with: a `SystemExit` or the like that a module raised becomes a `TeacherForwardError`."""
    if isinstance(error, Exception):
        return error
    return TeacherForwardError(f"the teacher's forward raised {type(error).__name__}: {error}")


def _else(default: T, ask: Callable[..., T], *args: Any) -> T:
    """The result of `ask`, or the default if it raises: the thread must not die with requests that it has taken."""
    try:
        return ask(*args)
    except Exception:
        _log.exception("it could not be found out whether requests may be merged; they run alone")
        return default
