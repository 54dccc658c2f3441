"""The way out of a device: features are encoded, brought to the host, declared, and handed to those who wait."""

import logging
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse_wire.errors import TeacherUnavailableError
from schoolhouse_wire.limits import INLINE_BYTES
from schoolhouse_wire.values.codec import Declared, pack
from schoolhouse_wire.values.tree import tensors_of

from schoolhouse_server.device import nonfinite
from schoolhouse_server.device.device import Device, Span, lacks_memory
from schoolhouse_server.device.watchdog import Pulse
from schoolhouse_server.engine.answers import Answers
from schoolhouse_server.engine.cache import FeatureCache
from schoolhouse_server.engine.fair_queue import FairQueue
from schoolhouse_server.engine.jobs import Job, Ticket, charge
from schoolhouse_server.engine.shares import Shares
from schoolhouse_server.merge.merging import Joint, Merger
from schoolhouse_server.merge.splitting import unshared
from schoolhouse_server.observe.spans import tell_stages

_log = logging.getLogger(__name__)
CLOSED = "the teacher is shutting down"
_MAX_AGAIN = 2
_WAITING = 2  # forwards whose features may wait to be sent off while the device goes on
SENDING_S = 1e-3  # roughly the time that it takes to send small features off


@dataclass(eq=False)
class Part:
    """One job's features, as the forward returned them and, once fetched, in host memory."""

    job: "Job"
    values: dict[Tap, Any]
    here: dict[Tap, Any] = field(default_factory=dict)
    item_bytes: tuple[int, ...] = ()  # of each tap's feature, as encoded
    spans: list[Span] = field(default_factory=list)


@dataclass(eq=False)
class Landing:
    """A forward that was started, and its jobs; the inputs are kept until the device is done with them."""

    parts: list[Part]
    inputs: Any
    spans: list[Span]
    settled: bool = False  # whether the spans are counted
    joint: Joint[Job] | None = None  # the batch, of a merged forward
    total: torch.Tensor | None = None  # the sum of a merged forward's numbers; see `nonfinite.total`

    @property
    def seconds(self) -> float:
        """How long the forward has taken, inputs included; the device must have finished it."""
        return sum([span.seconds_to(span) for span in self.spans])

    @property
    def is_small(self) -> bool:
        """Whether sending its features off takes less time than handing them to another thread."""
        return sum(_nbytes(part.values) for part in self.parts) <= INLINE_BYTES


class Outlet:
    """Sends off the features of forwards, to `answers`.

    Jobs go to the queue again if their features had no room, or if they were merged and their numbers may stem from
    other requests.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        device: Device,
        cache: FeatureCache | None,
        merger: Merger[Job] | None,
        shares: Shares,
        queue_of_jobs: FairQueue[Ticket],
        answers: Answers,
    ) -> None:
        self._teacher, self._device, self._cache = teacher, device, cache
        self._merger, self._shares, self._queue, self._answers = merger, shares, queue_of_jobs, answers
        self._waiting: queue.Queue[Landing | None] = queue.Queue(_WAITING)
        self.pulse = Pulse()

    def put(self, work: Landing) -> None:
        """Hand over a forward; blocks while as many as may wait do so."""
        self._waiting.put(work)

    def settle(self) -> None:
        """Wait until all that was put is sent off; for the thread that puts."""
        self._waiting.join()

    def finish(self) -> None:
        """End `run`, once all that was put before is sent off."""
        self._waiting.put(None)

    def run(self) -> None:
        """Send off each forward that is put, until `finish`."""
        while (work := self._waiting.get()) is not None:
            try:
                with self.pulse:
                    self.land(work)
            finally:
                del work
                self._waiting.task_done()

    def discard(self) -> None:
        """Drop each forward that is put, until `finish`, so that the thread that puts never blocks."""
        while self._waiting.get() is not None:
            self._waiting.task_done()

    def land(self, work: Landing) -> None:
        """Encode and fetch the features of all jobs of a forward, then answer one job after another."""
        sent = [part for part in work.parts if self._send_off(part, work.spans[-1])]
        if sent and work.joint is not None and work.total is not None and self._is_strange(work.joint, work):
            charge(work.joint.jobs, work.seconds)
            self._run_again([part.job for part in sent])
            return
        for part in sent:
            self._deliver(part, work)

    def _is_strange(self, joint: Joint[Job], work: Landing) -> bool:
        """Whether a merged forward must be compared with single ones before anybody gets its features."""
        try:
            self._device.wait(work.spans[-1])
            if nonfinite.is_finite_total(work.total):
                return False
            return self._merger is not None and self._merger.is_doubtful(
                joint, [nonfinite.kind(part.values) for part in work.parts]
            )
        except BaseException:  # the device failed, which is told to those who wait when the features are fetched
            return False

    def _run_again(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.again += 1
        if not self._queue.again([job.turn for job in jobs if job.turn is not None]):
            for job in jobs:
                self._answers.put(job, TeacherUnavailableError(CLOSED))

    def _failed(self, job: Job, error: BaseException) -> None:
        """Fail a job; if there was no room for its features, run it again first, at most twice."""
        if lacks_memory(error) and job.again < _MAX_AGAIN:
            self._run_again([job])
        else:
            self._answers.put(job, error)

    def _send_off(self, part: Part, computed: Span) -> bool:
        device = self._device
        try:
            encoded, made = device.encode.run(computed, self._teacher.encode, part.values, part.job.wanted)
            part.item_bytes = tuple(_nbytes(encoded[tap]) for tap in part.job.wanted.taps)
            self._shares.measured(part.job, sum(part.item_bytes))
            part.here, landed = device.d2h.run(made, device.fetch, encoded)
        except BaseException as err:
            self._failed(part.job, err)
            return False
        part.spans = [made, landed]
        return True

    def _deliver(self, part: Part, work: Landing) -> None:
        job = part.job
        try:
            self._device.wait(part.spans[-1])
            for span in part.spans if work.settled else (*work.spans, *part.spans):
                span.settle()
            if not work.settled:
                charge([one.job for one in work.parts], work.seconds)
            work.settled = True
            tell_stages(job.tickets, (*work.spans, *part.spans))
            packs = time.perf_counter()
            here = unshared(part.here) if len(work.parts) > 1 else part.here
            features = pack([here[tap] for tap in job.wanted.taps], opaque=True, item_bytes=part.item_bytes)
            self._keep(job, features)
            charge([job], sum([span.seconds_to(span) for span in part.spans], time.perf_counter() - packs))
        except BaseException as err:
            self._failed(job, err)
            return
        self._answers.put(job, features)

    def _keep(self, job: Job, features: Declared) -> None:
        """Put features into the cache, unless there is no memory for them."""
        if self._cache is None or job.cache_key is None:
            return
        try:
            self._cache.put(job.cache_key, features)
        except (RuntimeError, MemoryError) as err:
            if not lacks_memory(err):
                raise
            _log.warning("there is no memory to cache features: %s", err)


def _nbytes(value: Any) -> int:
    """The bytes that the tensors of a nested value take when they travel."""
    nbytes = 0
    for tensor in tensors_of(value):
        nbytes += tensor.numel() * tensor.itemsize
    return nbytes
