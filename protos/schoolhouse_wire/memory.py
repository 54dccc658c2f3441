"""The process's allocator, told to keep memory that frames free and take again."""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 512 << 20
_MMAP_BYTES = 32 << 20  # the most that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep up to 512 MiB of freed memory for this process; False where the C library is another.

    Without it every 1 MiB frame is mapped, faulted in and unmapped again, which costs more than sending it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
