"""One teacher on one device: a bounded queue of requests, and a thread that runs them one after another."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schoolhouse.errors import RevisionChangedError, TeacherBusyError, TeacherTimeoutError, TeacherUnavailableError
from schoolhouse.taps import Tap
from schoolhouse.teachers import Features, LocalTeacher
from schoolhouse_wire.memory import version_of
from schoolhouse_wire.nested import map_tensors


@dataclass(eq=False)
class Job:
    """One request to the teacher; `done` is called once, from the engine's thread, unless it was cancelled."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    taps: tuple[Tap, ...]
    deadline: float
    done: Callable[[Features | BaseException], None]
    cancelled: bool = False


class Engine:
    """Runs one LocalTeacher. `submit` refuses beyond `max_queued` requests."""

    def __init__(self, teacher: LocalTeacher, *, max_queued: int) -> None:
        self.description = teacher.describe()
        self.served = 0
        self.running = 0
        self._teacher = teacher
        self._device = self.description.device
        self._weights = [(parameter, version_of(parameter)) for parameter in teacher.module.parameters()]
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._max_queued = max_queued
        self._thread = threading.Thread(target=self._run, name="schoolhouse-engine", daemon=True)
        self._closed = False

    @property
    def queued(self) -> int:
        """Requests that wait for the device."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin to work on what is queued."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a request; raises `TeacherBusyError` when the queue is full."""
        if self._closed:
            raise TeacherUnavailableError("the teacher is shutting down")
        if self._queue.qsize() >= self._max_queued:
            raise TeacherBusyError(f"{self._max_queued} requests are queued, as many as this teacher takes")
        self._queue.put(job)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the present request; those that wait fail with `TeacherUnavailableError`."""
        self._closed = True
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.done(TeacherUnavailableError("the teacher is shutting down"))
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.cancelled:
                continue
            self.running = 1
            job.done(self._answer(job))
            self.running = 0
            self.served += 1

    def _answer(self, job: Job) -> Features | BaseException:
        if time.monotonic() > job.deadline:
            return TeacherTimeoutError("the request's deadline passed while it waited for the teacher")
        try:
            self._check_weights()
            args, kwargs = self._to_device(job.args), self._to_device(job.kwargs)
            return self._teacher.compute(args, kwargs, job.taps)
        except Exception as err:
            return err

    def _check_weights(self) -> None:
        if any(version_of(parameter) != version for parameter, version in self._weights):
            raise RevisionChangedError(
                f"the teacher's weights were changed in place after it was served as {self.description.revision}; "
                "serve it again"
            )

    def _to_device(self, value: Any) -> Any:
        return value if self._device == "cpu" else map_tensors(value, lambda tensor: tensor.to(self._device))
