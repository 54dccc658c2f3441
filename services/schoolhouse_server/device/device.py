"""A device as stages of work: each has a stream of its own, and tells how long its work took there.

The same code runs on a CPU, whose streams and events torch provides too: there each stage's work is done when its call
returns.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from schoolhouse_wire.pinned import lacks_memory as lacks_memory
from schoolhouse_wire.pinned import pinned, pins, to_host
from schoolhouse_wire.values.tree import map_tensors, tensors_of

T = TypeVar("T")
_RECENT = 0.2  # how much the last piece of work counts


@dataclass(frozen=True)
class Span:
    """A piece of work on a stream: events, or seconds of the host's clock."""

    stage: "Stage"
    begin: Any
    end: Any

    def settle(self) -> None:
        """Count how long it took; the device has finished it."""
        self.stage.count(self.seconds_to(self))

    def seconds_to(self, other: "Span") -> float:
        """From its begin to the end of another, or of its own."""
        end = other.end
        return float(end - self.begin if isinstance(end, float) else self.begin.elapsed_time(end) / 1e3)


class Stage:
    """One kind of work on a device. Pieces of it run in order, beside those of other stages."""

    def __init__(self, device: "Device") -> None:
        self.seconds = 0.0  # of the pieces that were settled
        self.recent_s = 0.0  # that one took lately
        self._device = device
        self.stream = device.new_stream()
        self._lock = threading.Lock()

    def count(self, took_s: float) -> None:
        """Add the time of a piece of work."""
        with self._lock:
            self.seconds += took_s
            self.recent_s += (took_s - self.recent_s) * (_RECENT if self.recent_s else 1.0)

    def run(self, after: Span | None, work: Callable[..., T], reads: Any, *args: Any) -> tuple[T, Span]:
        """Call `work(reads, *args)` with its kernels on this stage's stream, once those of `after` are done.

        `reads`, a nested value, is all that they read of other stages' memory: whoever drops it, and also where `work`
        raises half-way, it is used again only once this stream is done with it.
        """
        device = self._device
        with device.kit.stream(self.stream):
            if after is not None and not isinstance(after.end, float):
                self.stream.wait_event(after.end)
            device.lend(reads, self.stream)
            begin = device.mark(self.stream)
            result = work(reads, *args)
            return result, Span(self, begin, device.mark(self.stream))


class Device:
    """Where a teacher runs."""

    def __init__(self, name: str) -> None:
        self.name = torch.device(name)
        found = torch.get_device_module(self.name)
        self.is_host = self.name.type == "cpu"
        self._pins = pins(self.name)
        self.kit: Any = found if self._pins else torch.cpu  # others have no streams
        self.h2d, self.forward, self.encode, self.d2h = (Stage(self) for _ in range(4))

    def new_stream(self) -> Any:
        """A stream on this device."""
        return self.kit.Stream(device=self.name) if self._pins else self.kit.Stream()

    def mark(self, stream: Any) -> Any:
        """The present end of a stream's work."""
        if not self._pins:
            return time.perf_counter()
        event = self.kit.Event(enable_timing=True)
        event.record(stream)
        return event

    def pin(self, value: Any) -> Any:
        """Inputs in memory that the device copies from by itself."""
        return map_tensors(value, pinned) if self._pins else value

    def load(self, value: Any) -> Any:
        """Inputs on the device; they may be on their way still."""
        return value if self.is_host else map_tensors(value, self._load)

    def _load(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.name, non_blocking=self._pins)

    def lend(self, value: Any, stream: Any) -> None:
        """Have the allocator know that `stream` is about to read memory of the device.

        Without that it gives what is freed back to the stream that made it, at once; so, only once what `stream` had to
        do by then is done. It costs room only where the host drops a value that the device still reads. Of pinned
        memory of the host, torch itself keeps account with each copy.
        """
        for tensor in tensors_of(value) if self._pins else ():
            if tensor.device == self.name and tensor.layout is torch.strided and not tensor.is_nested:
                self.record(tensor, stream)

    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        """The same of one tensor, which is on the device, and dense."""
        tensor.record_stream(stream)

    def fetch(self, value: Any) -> Any:
        """Features in host memory; they may be on their way still."""
        return value if self.is_host else map_tensors(value, self._fetch)

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        if tensor.device != self.name:  # a part of the teacher is elsewhere, and nothing waits for streams there
            return tensor.cpu()
        return to_host(tensor)

    def wait(self, span: Span) -> None:
        """Return when the device has done a piece of work."""
        if not isinstance(span.end, float):
            span.end.synchronize()

    def free(self) -> None:
        """Give back memory that is kept for later use, so that it can be taken in other sizes."""
        if self._pins:
            self.kit.empty_cache()

    def is_broken(self) -> bool:
        """Whether it does nothing any more, as after a kernel's failed assertion, until the process ends. It waits."""
        if not self._pins:
            return False
        try:
            self.kit.synchronize(self.name)
        except Exception:
            return True
        return False
