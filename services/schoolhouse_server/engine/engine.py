"""One teacher on one device: requests come in, wait, run alone or merged, and their features go out."""

import dataclasses
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse_wire import background
from schoolhouse_wire.errors import (
    SchoolhouseError,
    TeacherForwardError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)
from schoolhouse_wire.loop import Alarm, Loop
from schoolhouse_wire.v1 import directory_pb2
from schoolhouse_wire.values.codec import Declared
from schoolhouse_wire.values.tensors import bytes_of
from schoolhouse_wire.values.tree import tensors_of

from schoolhouse_server.common.rows import UNITS, rows_of
from schoolhouse_server.device.device import Device
from schoolhouse_server.device.watchdog import FORWARD_TIMEOUT_S, Watchdog, checked_timeout_s
from schoolhouse_server.engine.answers import Answers, BrokenDevice
from schoolhouse_server.engine.cache import FeatureCache
from schoolhouse_server.engine.costs import Costs
from schoolhouse_server.engine.fair_queue import FairQueue
from schoolhouse_server.engine.jobs import Answer, Job, Ticket
from schoolhouse_server.engine.reply_pipeline import CLOSED, Outlet
from schoolhouse_server.engine.runner import LATE, TURN_S, NobodyWaitsError, Runner
from schoolhouse_server.engine.shares import Shares, Sizes
from schoolhouse_server.engine.unsent import Unsent
from schoolhouse_server.merge import self_check
from schoolhouse_server.merge.merging import Merger
from schoolhouse_server.merge.settings import MergeSettings
from schoolhouse_server.observe.counters import Counters

_LATE_BY_S = 0.05  # what waits is looked through for late requests no more often than this
_AT_ONCE_BYTES = 1 << 20  # inputs up to this are prepared faster than they are handed to another thread
_log = logging.getLogger(__name__)
STAGES = ("receive", "queue", "h2d", "forward", "encode", "d2h", "send")


@dataclass(frozen=True)
class Trouble:
    """Why an engine has failed for good: a forward that does not return, or a broken device."""

    stage: Literal["stuck", "broken"]
    why: str


class Engine:
    """Runs one LocalTeacher; `submit` refuses requests beyond `max_queued`.

    A request goes one way: the loop submits it to the queue, one thread takes it from there and runs its forward, that
    thread or another one encodes the features and brings them to the host, and `Answers` bring it back to the loop,
    where all that the engine knows of requests is kept. So one forward follows another at once. While forwards are
    short, the loop waits for those that it has submitted, which is faster than taking turns.

    If one of the two threads spends `forward_timeout_s` on one piece of work, or the device is broken, all requests
    fail with `TeacherUnavailableError`, so that other replicas answer them, no more are taken, and `on_trouble` is
    called. Those that were running are told that it `broke` under them, which clients count: no request gets many
    replicas stuck. One that was the only one on the device when it broke is to blame, and fails with its own error.

    Jobs are charged the device time that their requests take; `cost` says whether their `cost` counts rows or tokens.

    `submit` and `cancel` are called in the loop's thread, and so are the tickets' `done`. Without a `loop` it has one
    of its own.

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
        loop: Loop | None = None,
        merge: MergeSettings | None = None,
        example: Callable[[], Any] | None = None,
        forward_timeout_s: float = FORWARD_TIMEOUT_S,
        on_trouble: Callable[[], None] = lambda: None,
        unsent: Unsent | None = None,
    ) -> None:
        timeout_s = checked_timeout_s(forward_timeout_s)
        merge = merge or MergeSettings()
        self.description = dataclasses.replace(teacher.describe(), merge=merge.mode)
        self.teacher = teacher
        self.served = self.joined = 0
        self.cache = FeatureCache(cache_bytes) if cache_bytes else None
        self.device = Device(self.description.device)
        self.counters = Counters()
        self._units_of = UNITS[cost]
        self._costs = Costs()
        self._owns_loop = loop is None
        self.loop = loop or Loop("schoolhouse-replica")
        self.merger: Merger[Job] | None = None
        if merge.mode != "never":
            self_check.check_modules(teacher.module, self.description, merge)
            self.merger = Merger(merge, self.description, lambda: self.device.forward.recent_s)
            self_check.check_example(teacher, self.device, self.merger.former, example)
        self._shares = Shares(unsent, self.description.name)
        self._queue: FairQueue[Ticket] = FairQueue(max_queued, self._shares.reserve)
        if unsent is not None:
            unsent.follow(self._room_is_free)
        self._answers = Answers(self.loop, self.device, self._settle, self._end)
        self._outlet = Outlet(teacher, self.device, self.cache, self.merger, self._shares, self._queue, self._answers)
        self.runner = Runner(teacher, self.device, self.merger, self._queue, self._outlet, self.counters, self._answers)
        self._in_flight: dict[Hashable, Job] = {}  # those that others may join
        self._jobs: set[Job] = set()  # all that are queued, or have begun and are not answered yet
        self._rings_at = math.inf  # when the requests that wait are next looked through for late ones
        self._alarm: Alarm | None = None
        self._gives_way = False  # whether the loop is about to wait for forwards
        self._outside_s = dict.fromkeys(("receive", "send"), 0.0)
        self._threads = [
            background.thread(self.runner.run, name="schoolhouse-engine-in", on_death=self._in_failed),
            background.thread(self._outlet.run, name="schoolhouse-engine-out", on_death=self._out_failed),
        ]
        pulses = (self.runner.pulse, self._outlet.pulse)
        self._watchdog = Watchdog(self.loop, timeout_s, pulses, functools.partial(self._stuck, timeout_s))
        self._on_trouble = on_trouble
        self.trouble: Trouble | None = None
        self._closed = self._ended = False

    @property
    def batch_limit_rows(self) -> int:
        """How many rows a merged forward may hold; 0 if nothing is merged."""
        return self.merger.settings.max_batch_rows if self.merger is not None else 0

    @property
    def running(self) -> int:
        """How many requests have left the queue and are not answered yet."""
        return max(len(self._jobs) - len(self._queue), 0)

    @property
    def starves(self) -> bool:
        """Whether requests wait since the features that are not sent yet take all memory that they may."""
        return self._queue.starves and len(self._queue) > 0

    @property
    def queued(self) -> int:
        """How many requests wait for the device."""
        return len(self._queue)

    @property
    def shares(self) -> Shares:
        """The shares in the bytes that may be unsent."""
        return self._shares

    def fill(self, load: directory_pb2.Load, in_flight: dict[str, int]) -> None:
        """Write the counters of jobs, and how long requests wait, into `load`; any thread may call this."""
        waiting = [job for job in list(self._jobs) if not job.begun_at]
        queued = Counter(ticket.account.job for job in waiting for ticket in list(job.tickets))
        self.counters.fill(load, queued, in_flight)
        load.queue_delay_s = self.counters.delay_s(self._queue.oldest())

    def stage_s(self) -> dict[str, float]:
        """Seconds spent in each stage so far, summed over requests; stages that overlap all count."""
        on_device = {name: getattr(self.device, name).seconds for name in ("h2d", "forward", "encode", "d2h")}
        waited = {"queue": self.counters.waited_s}
        return {name: (self._outside_s | waited | on_device)[name] for name in STAGES}

    def count(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage that runs in the loop."""
        self._outside_s[stage] += seconds

    def start(self) -> None:
        """Begin to work on queued requests."""
        self.loop.start()
        for thread in self._threads:
            thread.start()
        self._watchdog.start()

    def check(self) -> None:
        """Raise TeacherUnavailableError if no requests are taken any more."""
        if self.trouble is not None:
            raise TeacherUnavailableError(self.trouble.why)
        if self._closed:
            raise TeacherUnavailableError(CLOSED)

    async def prepare(self, job: Job, nbytes: int) -> None:
        """Do what must be done with all bytes of a request's inputs before `submit`; for many, in another thread."""
        if nbytes > _AT_ONCE_BYTES and (self.device.pins or self.cache is not None or self.merger is not None):
            await self.loop.elsewhere(self._prepare, job)
        else:
            self._prepare(job)

    def _prepare(self, job: Job) -> None:
        if self.merger is not None and not job.alone:
            self.merger.prepare(job)
        if self.cache is not None and not job.alone:
            job.cache_key = self.cache.key(job.content, job.key)
        job.inputs = self.device.pin(job.inputs)

    def submit(self, job: Job) -> None:
        """Queue a prepared request, or have it answered by an identical one in flight or from the cache.

        Raises:
            TeacherBusyError: the queue is full.
            TeacherUnavailableError: the engine is closed, or has failed.
        """
        self.check()
        job.rows = job.rows or rows_of(job.inputs)
        job.units = max(float(job.rows if self._units_of is rows_of else self._units_of(job.inputs)), 1.0)
        job.kind, job.elements = Sizes.kind_of(job.inputs, job.wanted)
        job.cost = self._costs.of(job.kind, job.elements)
        if self.cache is not None and job.cache_key is not None:
            found = self.cache.get(job.cache_key)
            if found is not None and self._shares.take(job.tickets[0], found.nbytes) == "taken":
                self.served += 1
                self._tell(job.tickets[0], Answer(found, self.description.revision))
                return
        if not self._join(job):
            self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        self.check()
        self._take_in(job, job.tickets[0])
        self._jobs.add(job)
        self._in_flight[job.key] = job
        for ticket in job.tickets[1:]:
            self._take_in(job, ticket, beside=job.tickets[0])

    def _take_in(self, job: Job, ticket: Ticket, beside: Ticket | None = None) -> None:
        """Queue a ticket of a job, unless that has left the queue with `beside`."""
        ticket.job, ticket.queued_at = job, time.perf_counter()
        gives_way = self.runner.short
        try:
            if not self._queue.put(ticket, wake=not gives_way, beside=beside):
                return
        except SchoolhouseError:
            ticket.job = None
            raise
        if ticket.deadline < self._rings_at:
            self._ring_at(ticket.deadline)
        if gives_way:
            self._give_way_soon()

    def _room_is_free(self) -> None:
        if self._queue.wake() and self.loop.runs_here:
            self._give_way_soon()

    def _give_way_soon(self) -> None:
        if not self._gives_way:
            self._gives_way = True
            self.loop.call(self._give_way)

    def _give_way(self) -> None:
        """Wait for the forwards of all that has been submitted up to this turn of the loop, if they are short."""
        self._gives_way = False
        self._queue.go()
        if time.monotonic() - self.runner.pulse.since < TURN_S:  # not if a forward takes longer than others did
            self._answers.wait(self._queue, TURN_S)
            if not self._queue.idle.is_set() and self.runner.short:
                self._give_way_soon()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a ticket; its place in the queue is free at once, and others who wait for the same keep theirs."""
        ticket.cancelled = True
        if ticket.job is None:
            ticket.drop()
        elif self._queue.remove(ticket):
            self._leave(ticket.job, ticket)
            ticket.drop()
        # else the features are computed all the same, and the share ends with them

    def _leave(self, job: Job, ticket: Ticket) -> None:
        """Let a job go on without a ticket that was removed from the queue."""
        job.tickets.remove(ticket)
        ticket.job = None
        if not job.tickets:
            self._forget(job)

    def _ring_at(self, when: float) -> None:
        """Have `_expire` called at this time, instead of later."""
        if self._alarm is not None:
            self.loop.cancel(self._alarm)
        self._rings_at, self._alarm = when, self.loop.at(when, self._expire) if when < math.inf else None

    def _expire(self) -> None:
        """Fail the requests whose deadlines have come while they waited for the device."""
        now = time.monotonic()
        late = [(job, ticket) for job in self._jobs for ticket in job.tickets if ticket.deadline <= now]
        for job, ticket in late:
            if self._queue.remove(ticket):
                self.counters.began(ticket.account, cost=0.0, waited_s=time.perf_counter() - ticket.queued_at)
                self._leave(job, ticket)
                self.served += 1
                self._tell(ticket, TeacherTimeoutError(LATE))
        waiting = (job.deadline for job in self._jobs if not job.begun_at)
        self._ring_at(max(min(waiting, default=math.inf), now + _LATE_BY_S))

    def _forget(self, job: Job) -> None:
        """Let nobody join a job any more."""
        self._jobs.discard(job)
        if self._in_flight.get(job.key) is job:
            del self._in_flight[job.key]

    def _join(self, job: Job) -> bool:
        """Let a job in flight on the same inputs answer this one; inputs are compared, as equal digests may collide."""
        other, [ticket] = self._in_flight.get(job.key), job.tickets
        if other is None or other.cancelled or not _equal(other.content, job.content):
            return False
        beside = other.tickets[0]
        other.tickets.append(ticket)  # first, so that whoever takes the other one takes this one too
        self._take_in(other, ticket, beside)
        self.joined += 1
        return True

    def _queue_again(self, job: Job, tickets: list[Ticket]) -> None:
        """Queue a job again for those of its tickets that it has not answered, to wait for their own turns."""
        left = dataclasses.replace(job, tickets=tickets, turn=None, again=0, begun_at=0.0, spent_s=None)
        try:
            self._enqueue(left)
        except SchoolhouseError as err:
            for ticket in tickets:
                self._tell(ticket, err)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the request that is running; those that wait fail with `TeacherUnavailableError`.

        So does the running one after `timeout_s`. Not to be called in the loop's thread.
        """
        if self._ended:
            return
        self._ended = True
        self.loop.ask(self._close)
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive() and self.trouble is None:
                thread.join(max(end - time.monotonic(), 0.0))
        self.loop.ask(self._drop_all)
        if self._owns_loop:
            self.loop.stop()

    def _close(self) -> None:
        self._closed = True  # nothing is queued from here on
        self._watchdog.end()
        self._ring_at(math.inf)
        self._drop([ticket.job for ticket in self._queue.close() if ticket.job is not None], CLOSED)

    def _drop_all(self) -> None:
        self._answers.deliver()
        self._drop(self._jobs.copy(), CLOSED)

    def _drop(self, jobs: Iterable[Job], why: str) -> None:
        """Fail jobs that were not answered."""
        for job in jobs:
            error = TeacherUnavailableError(why)
            error.broke = self.trouble is not None and bool(job.begun_at)
            self._end(job, error)

    def _in_failed(self, _error: BaseException) -> None:
        self.loop.call(self._failed)
        self._outlet.finish()

    def _out_failed(self, _error: BaseException) -> None:
        self.loop.call(self._failed)
        self._outlet.discard()

    def _failed(self) -> None:
        """Fail all requests after one of the threads has died, so that nobody waits for it."""
        why = f"the engine of teacher {self.description.name!r} failed; its log says more; ask another replica"
        self._break_down(Trouble("broken", why))

    def _stuck(self, timeout_s: float) -> None:
        name = self.description.name
        self._break_down(
            Trouble("stuck", f"a forward of teacher {name!r} has not returned for {timeout_s:g} s; ask another replica")
        )

    def _break_down(self, trouble: Trouble, apart_from: Job | None = None) -> None:
        """Fail all requests apart from one that is about to be told, and take no more."""
        first = not self._closed and self.trouble is None
        if first:
            self.trouble = trouble
        self._queue.close()
        self._drop(self._jobs - {apart_from}, trouble.why)
        if first:
            _log.error("the replica must be replaced: %s", trouble.why)
            background.run(self._on_trouble, "telling of the trouble", background.go_on)

    def _broke(self, job: Job, error: BaseException) -> BaseException:
        """Take no more requests, as the device is broken; returns what those who wait for this one are told."""
        alone = all(other is job or not other.begun_at for other in self._jobs)
        why = f"the device of teacher {self.description.name!r} no longer works; ask another replica"
        self._break_down(Trouble("broken", why), job)
        if not alone:
            unavailable = TeacherUnavailableError(why)
            unavailable.broke = True
            return unavailable
        return TeacherForwardError(f"the forward on this input broke the teacher's device: {error}")

    def _end(self, job: Job, result: Declared | BaseException | BrokenDevice) -> None:
        """Answer all who wait for a job, unless it was answered when the engine broke down."""
        if job not in self._jobs:
            return
        answer: Answer | BaseException
        left: list[Ticket] = []  # those that it does not answer
        if isinstance(result, Declared):
            answer = Answer(result, self.description.revision)
            left = self._shares.lacking(job, sum(result.item_bytes))
        elif isinstance(result, NobodyWaitsError):
            answer, now = TeacherTimeoutError(LATE), time.monotonic()
            left = [ticket for ticket in job.tickets if not ticket.cancelled and now <= ticket.deadline]
        else:
            answer = self._broke(job, result.error) if isinstance(result, BrokenDevice) else result
        self._forget(job)
        tickets, job.tickets = job.tickets, []
        for ticket in tickets:
            ticket.job = None
            if ticket not in left:
                self.served += 1
                self._tell(ticket, answer)
        if left:
            self._queue_again(job, left)

    def _settle(self, job: Job) -> None:
        """Charge what a job has taken of the device; what is not known of one that failed is as it was expected."""
        if (turn := job.turn) is not None:
            spent_s = (job.cost if job.spent_s is None else job.spent_s) + job.parse_s
            self._queue.settle(turn, spent_s)
            self.counters.ran(turn.account, spent_s)
            if job.spent_s:  # not what nobody waited for any more
                self._costs.learn(job.kind, job.elements, spent_s)

    def _tell(self, ticket: Ticket, answer: Answer | BaseException) -> None:
        """Answer a ticket, unless it was cancelled."""
        if isinstance(answer, BaseException) or ticket.cancelled:
            ticket.drop()
        if not ticket.cancelled:
            try:
                ticket.done(answer)
            except BaseException as err:
                background.failed(err, "telling of an answer", background.go_on)


def _equal(a: Any, b: Any) -> bool:
    """Whether values of equal structure hold equal bytes."""
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(torch.equal(bytes_of(one.contiguous()), bytes_of(other.contiguous())) for one, other in pairs)
