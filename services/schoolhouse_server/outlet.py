"""The way out of a device: features are encoded, brought to the host, declared and handed to those who wait."""

import dataclasses
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from schoolhouse.taps import Tap, tensors_of
from schoolhouse.teachers import LocalTeacher
from schoolhouse_wire.codec import Declared, pack
from schoolhouse_wire.limits import INLINE_BYTES

from schoolhouse_server.cache import FeatureCache
from schoolhouse_server.device import Device, Span
from schoolhouse_server.jobs import Job
from schoolhouse_server.spans import tell_stages
from schoolhouse_server.splitting import unshared

_WAITING = 2  # forwards whose features are on the way out while the device goes on
SENDING_S = 1e-3  # about what it takes to send small features off


@dataclass(eq=False)
class Part:
    """One job's features: as the forward returned them, and then in host memory."""

    job: "Job"
    values: dict[Tap, Any]
    here: dict[Tap, Any] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


@dataclass(eq=False)
class Landing:
    """A forward that was started, and for whom. The inputs are kept until the device is done with them."""

    parts: list[Part]
    inputs: Any
    spans: list[Span]
    settled: bool = False  # the spans are counted

    @property
    def is_small(self) -> bool:
        """Whether sending it off takes less time than handing it to another thread."""
        tensors = (tensor for part in self.parts for tensor in tensors_of(part.values))
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors) <= INLINE_BYTES


class Outlet:
    """Sends off what forwards made; `end` is told each job's features, or the error."""

    def __init__(
        self,
        teacher: LocalTeacher,
        device: Device,
        cache: FeatureCache | None,
        end: Callable[[Job, Declared | BaseException], None],
    ) -> None:
        self._teacher, self._device, self._cache, self._end = teacher, device, cache, end
        self._waiting: queue.Queue[Landing | None] = queue.Queue(_WAITING)

    def put(self, work: Landing) -> None:
        """Hand over a forward; waits while enough others are on their way."""
        self._waiting.put(work)

    def finish(self) -> None:
        """End `run` when what was put before is on its way."""
        self._waiting.put(None)

    def run(self) -> None:
        """Send off what comes, until the end."""
        while (work := self._waiting.get()) is not None:
            self.land(work)
            del work

    def land(self, work: Landing) -> None:
        """Encode and fetch the features of all jobs, and then answer one after another."""
        for part in [part for part in work.parts if self._send_off(part, work.spans[-1])]:
            self._deliver(part, work)

    def _send_off(self, part: Part, computed: Span) -> bool:
        device = self._device
        try:
            encoded, made = device.encode.run(computed, self._teacher.encode, part.values, part.job.wanted)
            part.here, landed = device.d2h.run(made, device.fetch, encoded)
        except BaseException as err:
            self._end(part.job, err)
            return False
        part.spans = [made, landed]
        return True

    def _deliver(self, part: Part, work: Landing) -> None:
        job = part.job
        try:
            self._device.wait(part.spans[-1])
            for span in part.spans if work.settled else (*work.spans, *part.spans):
                span.settle()
            work.settled = True
            tell_stages(job.tickets, job.queued_at, (*work.spans, *part.spans))
            here = unshared(part.here) if len(work.parts) > 1 else part.here
            features = declare([here[tap] for tap in job.wanted.taps])
            if self._cache is not None and job.cache_key is not None:
                self._cache.put(job.cache_key, features)
        except BaseException as err:
            self._end(job, err)
            return
        self._end(job, features)


def declare(features: list[Any]) -> Declared:
    """Features of taps, ready to travel, and how many bytes each takes."""
    declared = pack(features, opaque=True)
    sizes = tuple(sum(tensor.nbytes for tensor in tensors_of(value)) for value in features)
    return dataclasses.replace(declared, item_bytes=sizes)
