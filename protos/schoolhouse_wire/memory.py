"""Memory for frames and payloads: an allocator that keeps what it frees, and receive buffers that are used again."""

import contextlib
import ctypes
import functools
import mmap
import weakref
from collections import deque
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_FROM_BYTES = 4 << 20  # below, the allocator does as well
_HUGE_PAGE_BYTES = 2 << 20
_KEPT_BYTES = 512 << 20
_MMAP_BYTES = 32 << 20  # the most that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep up to 512 MiB of freed memory for this process; False where the C library is another.

    Without it every frame is mapped, faulted in and unmapped again, which costs more than sending it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place; always 0 for an inference tensor, which torch doesn't count."""
    return 0 if tensor.is_inference() else tensor._version


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying. It does not keep the tensor alive: the caller must."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class ReceiveBuffers:
    """Memory for large payloads, used again once no tensor views it any more.

    Mapping, faulting in and unmapping 64 MiB takes longer than receiving it. Idle memory is bounded.
    """

    def __init__(self, max_idle_bytes: int = 512 << 20) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: deque[mmap.mmap] = deque()  # its operations are atomic: a lock could be taken twice by one thread,
        # since the garbage collector gives memory back whenever it runs

    def take(self, nbytes: int) -> Any:
        """A writable buffer of at least that size, with undefined contents."""
        if nbytes < _MAPPED_FROM_BYTES:
            return bytearray(nbytes)
        pages = self._find(nbytes) or _map(nbytes)
        owner = (ctypes.c_char * len(pages)).from_buffer(pages)  # torch keeps it while any view of the memory lives
        weakref.finalize(owner, self._give, pages).atexit = False
        return owner

    def _find(self, nbytes: int) -> mmap.mmap | None:
        for _ in range(len(self._idle)):
            try:
                pages = self._idle.popleft()
            except IndexError:
                return None
            if nbytes <= len(pages) <= 2 * nbytes:
                return pages
            self._idle.append(pages)
        return None

    def _give(self, pages: mmap.mmap) -> None:
        self._idle.append(pages)
        with contextlib.suppress(IndexError):
            while sum(map(len, list(self._idle))) > self._max_idle_bytes:
                self._idle.popleft()


def _map(nbytes: int) -> mmap.mmap:
    """Fresh private memory, in huge pages where the system has them."""
    size = -(-nbytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


RECEIVE_BUFFERS = ReceiveBuffers()
