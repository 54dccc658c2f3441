"""Pinned host memory, from and to which a device copies asynchronously.

Torch keeps freed pinned memory for later use, and does not reuse it before the copies that used it are done.
"""

import functools
from typing import Any

import torch

_PINNING = ("cuda", "xpu")
_MAX_CAUSES = 16
# Torch has an exception class for its own device allocator; the other cases can only be told by their text.
_NO_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "HIP out of memory")


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the memory of the device or of the host ran out."""
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
    """Whether a device copies from and to pinned memory asynchronously."""
    return device.type in _PINNING


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor in pinned memory; if there is no room, the tensor itself, which is then copied synchronously."""
    try:
        return tensor.pin_memory()
    except (RuntimeError, MemoryError) as err:
        if not lacks_memory(err):
            raise
        return tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. The copy may still run, but is done before what the device is given next."""
    if tensor.device == device:
        return tensor
    through = pinned(tensor) if tensor.device.type == "cpu" and pins(device) else tensor
    return through.to(device, non_blocking=pins(device))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A device tensor in host memory. The copy may still run, on the current stream."""
    plain = tensor.resolve_conj().resolve_neg()  # or torch would do it on the host, before the copy is done
    return _host_memory(plain).copy_(plain, non_blocking=pins(tensor.device))


def _host_memory(tensor: torch.Tensor) -> torch.Tensor:
    pin = pins(tensor.device)
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=pin)
    except (RuntimeError, MemoryError) as err:
        if not pin or not lacks_memory(err):
            raise
    return torch.empty_like(tensor, device="cpu")  # pageable, since less memory can be pinned


class Fetched:
    """A copy to the host of the values that a device tensor has now, concurrent with the device's next work."""

    def __init__(self, tensor: torch.Tensor) -> None:
        kit: Any = torch.get_device_module(tensor.device)
        stream = _stream(tensor.device)
        copy = tensor.detach().clone()  # since the next work may write into the tensor
        stream.wait_stream(kit.current_stream(tensor.device))
        with kit.stream(stream):
            self._host = to_host(copy)
            self._event = kit.Event()
            self._event.record(stream)
        copy.record_stream(stream)  # so that its memory is not reused before this stream has read it

    def wait(self) -> torch.Tensor:
        """Wait until the copy is done, and return the values."""
        self._event.synchronize()
        return self._host


@functools.cache
def _stream(device: torch.device) -> Any:
    """A stream of the device for these copies, apart from the one that computes."""
    return torch.get_device_module(device).Stream(device=device)
