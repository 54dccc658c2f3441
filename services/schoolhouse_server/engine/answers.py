"""The way from an engine's threads back to the loop: what became of each job, many with one wake-up."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from schoolhouse_wire.errors import SchoolhouseError, TeacherForwardError, TeacherMemoryError
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.values.codec import Declared

from schoolhouse_server.device.device import Device, lacks_memory
from schoolhouse_server.engine.fair_queue import FairQueue
from schoolhouse_server.engine.jobs import Job, Ticket


@dataclass(frozen=True, eq=False)
class BrokenDevice:
    """A job failed with `error`, and the device works no more."""

    error: BaseException


class Answers:
    """The engine's threads put each job here with its features or its error; the loop passes them to `end`.

    `settle` is called first, in the thread that puts.
    """

    def __init__(
        self,
        loop: Loop,
        device: Device,
        settle: Callable[[Job], None],
        end: Callable[[Job, Declared | BaseException | BrokenDevice], None],
    ) -> None:
        self._loop, self._device, self._settle, self._end = loop, device, settle, end
        self._arrived: deque[tuple[Job, Declared | BaseException | BrokenDevice]] = deque()
        self._awaited = False  # whether the loop waits here, so that it needs no wake-up

    def put(self, job: Job, result: Declared | BaseException) -> None:
        """Give back a job, from any thread."""
        self._settle(job)
        told = self._told(result) if isinstance(result, BaseException) else result
        self._arrived.append((job, told))
        if not self._awaited:
            self._loop.call(self.deliver)

    def _told(self, error: BaseException) -> BaseException | BrokenDevice:
        """The error that those who wait for a job are told."""
        if isinstance(error, SchoolhouseError) and not isinstance(error, TeacherForwardError):
            return error
        if lacks_memory(error):
            return TeacherMemoryError("the teacher has no room for these features; ask for fewer rows or taps at once")
        return BrokenDevice(error) if self._device.is_broken() else error

    def deliver(self) -> None:
        """Pass on what has arrived; in the loop."""
        while self._arrived:
            self._end(*self._arrived.popleft())

    def wait(self, queue: FairQueue[Ticket], at_most_s: float) -> None:
        """Let the engine's threads have the interpreter until nothing waits in the queue or runs; then deliver.

        A forward of few kernels gives the interpreter up at each of them, and takes it back from the loop. That costs
        more than the forward itself.
        """
        self._awaited = True
        queue.idle.wait(at_most_s)
        self._awaited = False
        self.deliver()
