"""A device as stages of work, each with its own stream, and with the time that its work took there.

The same code runs on a CPU, for which torch has streams and events too; there a stage's work is done when its call
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
_RECENT = 0.2  # the weight of the last piece of work in the running mean of its time


@dataclass(slots=True)
class Span:
    """A piece of work on a stream; its begin and end are events, or seconds of the host's clock."""

    stage: "Stage"
    begin: Any
    end: Any

    def settle(self) -> None:
        """Count how long it took; the device must have finished it."""
        self.stage.count(self.seconds_to(self))

    def seconds_to(self, other: "Span") -> float:
        """Seconds from its begin to the end of `other`, which may be itself."""
        end = other.end
        return float(end - self.begin if isinstance(end, float) else self.begin.elapsed_time(end) / 1e3)


class Stage:
    """One kind of work on a device; its pieces run in order, and concurrently with those of other stages."""

    def __init__(self, device: "Device") -> None:
        self.seconds = 0.0  # the sum over the pieces that were settled
        self.recent_s = 0.0  # a running mean of the time of a piece
        self._device = device
        self.stream = device.new_stream()
        self._lock = threading.Lock()

    def count(self, took_s: float) -> None:
        """Add the time of a piece of work."""
        with self._lock:
            self.seconds += took_s
            self.recent_s += (took_s - self.recent_s) * (_RECENT if self.recent_s else 1.0)

    def run(self, after: Span | None, work: Callable[..., T], reads: Any, *args: Any) -> tuple[T, Span]:
        """Call `work(reads, *args)`; its kernels run on this stage's stream, once those of `after` are done.

        `reads`, a nested value, must hold all memory of other stages that the kernels read. Whoever drops it, and even
        if `work` raises half-way, that memory is reused only once this stream is done with it.
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
    """The device that a teacher runs on, with its four stages; `pins` if it copies from pinned host memory."""

    def __init__(self, name: str) -> None:
        self.name = torch.device(name)
        found = torch.get_device_module(self.name)
        self.is_host = self.name.type == "cpu"
        self.pins = pins(self.name)
        self.kit: Any = found if self.pins else torch.cpu  # other devices have no streams
        self.h2d, self.forward, self.encode, self.d2h = (Stage(self) for _ in range(4))

    def new_stream(self) -> Any:
        """A new stream on this device."""
        return self.kit.Stream(device=self.name) if self.pins else self.kit.Stream()

    def mark(self, stream: Any) -> Any:
        """An event, or a time, that marks the end of the work that a stream has so far."""
        if not self.pins:
            return time.perf_counter()
        event = self.kit.Event(enable_timing=True)
        event.record(stream)
        return event

    def pin(self, value: Any) -> Any:
        """Inputs in pinned host memory, from which the device copies without the CPU."""
        return map_tensors(value, pinned) if self.pins else value

    def load(self, value: Any) -> Any:
        """Inputs on the device; the copy may still be under way."""
        return value if self.is_host else map_tensors(value, self._load)

    def _load(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.name, non_blocking=self.pins)

    def lend(self, value: Any, stream: Any) -> None:
        """Tell the allocator that `stream` is about to read memory of the device.

        Otherwise freed memory would be reused at once by the stream that made it. With this, it is reused only after
        the work that `stream` has at the time of freeing. That costs memory only if the host drops a value that the
        device still reads. For pinned host memory torch itself does the same with each copy.
        """
        for tensor in tensors_of(value) if self.pins else ():
            if tensor.device == self.name and tensor.layout is torch.strided and not tensor.is_nested:
                self.record(tensor, stream)

    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        """Do the same for one dense tensor on the device."""
        tensor.record_stream(stream)

    def fetch(self, value: Any) -> Any:
        """Features in host memory; the copy may still be under way."""
        return value if self.is_host else map_tensors(value, self._fetch)

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        if tensor.device != self.name:  # of a part of the teacher on another device, whose streams nothing waits for
            return tensor.cpu()
        return to_host(tensor)

    def wait(self, span: Span) -> None:
        """Wait until the device has done a piece of work."""
        if not isinstance(span.end, float):
            span.end.synchronize()

    def free(self) -> None:
        """Free memory that the allocator has cached, so that it can be allocated in other sizes."""
        if self.pins:
            self.kit.empty_cache()

    def is_broken(self) -> bool:
        """Whether the device is unusable in this process, as after a failed assertion in a kernel; waits for it."""
        if not self.pins:
            return False
        try:
            self.kit.synchronize(self.name)
        except Exception:
            return True
        return False
