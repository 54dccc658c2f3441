"""Memory for frames and payloads: an allocator that keeps freed memory, and receive buffers that are reused."""

import contextlib
import ctypes
import functools
import mmap
import weakref
from collections import deque
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_FROM_BYTES = 4 << 20  # below this size the allocator is as fast
_HUGE_PAGE_BYTES = 2 << 20
_KEPT_BYTES = 512 << 20
_MMAP_BYTES = 32 << 20  # the most that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep up to 512 MiB of freed memory in this process; False if the C library is not glibc.

    Without it the memory of every frame is mapped, faulted in and unmapped again, which costs more than sending it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def give_back_freed() -> None:
    """Give back to the system what glibc keeps, and what idle receive buffers hold."""
    RECEIVE_BUFFERS.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying. It does not keep the tensor alive; the caller must."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class ReceiveBuffers:
    """Memory for large payloads, reused once no tensor views it any more.

    Mapping, faulting in and unmapping 64 MiB takes longer than receiving 64 MiB. Idle memory is bounded.
    """

    def __init__(self, max_idle_bytes: int = 512 << 20) -> None:
        self._max_idle_bytes = max_idle_bytes
        # A deque, whose operations are atomic, and no lock: the garbage collector, which gives memory back, may run in
        # a thread that holds the lock.
        self._idle: deque[mmap.mmap] = deque()

    def take(self, nbytes: int) -> Any:
        """A writable buffer of at least that size, with undefined contents."""
        if nbytes < _MAPPED_FROM_BYTES:
            return bytearray(nbytes)
        pages = self._find(nbytes) or _map(nbytes)
        owner = (ctypes.c_char * len(pages)).from_buffer(pages)  # kept alive by torch as long as a tensor views it
        weakref.finalize(owner, self._give, pages).atexit = False
        return owner

    def clear(self) -> None:
        """Free what is idle."""
        self._idle.clear()

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
    """Fresh private memory, in huge pages if the system has them."""
    size = -(-nbytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


RECEIVE_BUFFERS = ReceiveBuffers()
