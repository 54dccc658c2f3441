"""Pinned memory of the host, which a device copies from and to by itself while the host goes on.

Torch keeps such memory for later use, and gives none of it out again before the copies that it was used for are done.
"""

import functools
from typing import Any

import torch

_PINNING = ("cuda", "xpu")
_MAX_CAUSES = 16
# Torch has an exception for a device that has no room in its own allocator; of the rest there is nothing but the text.
_NO_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "HIP out of memory")


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error is, or comes from one, that says that the memory of the device or of the host ran out."""
    for _ in range(_MAX_CAUSES):
        if error is None:
            return False
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def pins(device: torch.device) -> bool:
    """Whether a device copies from and to such memory by itself."""
    return device.type in _PINNING


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the host in pinned memory; itself, which the host will copy, where there is no room for that."""
    try:
        return tensor.pin_memory()
    except (RuntimeError, MemoryError) as err:
        if not lacks_memory(err):
            raise
        return tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; it may be on its way, and comes before what the device is given next."""
    if tensor.device == device:
        return tensor
    through = pinned(tensor) if tensor.device.type == "cpu" and pins(device) else tensor
    return through.to(device, non_blocking=pins(device))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a device in host memory; it may be on its way, on the current stream."""
    plain = tensor.resolve_conj().resolve_neg()  # else torch does that here, before the bytes have come
    return _host_memory(plain).copy_(plain, non_blocking=pins(tensor.device))


def _host_memory(tensor: torch.Tensor) -> torch.Tensor:
    pin = pins(tensor.device)
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=pin)
    except (RuntimeError, MemoryError) as err:
        if not pin or not lacks_memory(err):
            raise
    return torch.empty_like(tensor, device="cpu")  # there is less that can be pinned


class Fetched:
    """The values that a tensor of a device has now, on their way to the host beside what the device is given next."""

    def __init__(self, tensor: torch.Tensor) -> None:
        kit: Any = torch.get_device_module(tensor.device)
        stream = _stream(tensor.device)
        copy = tensor.detach().clone()  # what comes next may write into the tensor
        stream.wait_stream(kit.current_stream(tensor.device))
        with kit.stream(stream):
            self._host = to_host(copy)
            self._event = kit.Event()
            self._event.record(stream)
        copy.record_stream(stream)  # its memory is not used again before it was read there

    def wait(self) -> torch.Tensor:
        """The values, once the device has come so far."""
        self._event.synchronize()
        return self._host


@functools.cache
def _stream(device: torch.device) -> Any:
    """A stream of a device beside the one that it computes on."""
    return torch.get_device_module(device).Stream(device=device)
