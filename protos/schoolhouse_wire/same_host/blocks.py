"""An allocator of blocks in a region of memory, which it knows by their offsets."""

import bisect
import threading

PAGE_BYTES = 4096  # blocks start and end at multiples of this


class Blocks:
    """Keeps track of which parts of [start, end) are taken.

    Any thread may call, but a finalizer must not, since it may run in a thread that holds the lock. The lowest part
    that fits is taken, so that memory which the system has already provided is reused.
    """

    def __init__(self, start: int, end: int) -> None:
        self._lock = threading.Lock()
        self._end = end
        self._free = [(start, end)] if start < end else []  # (start, end), sorted; adjacent parts are merged
        self._taken: dict[int, int] = {}  # end by start

    def take(self, nbytes: int) -> int | None:
        """Take a block of that size and return its offset; None if there is no room."""
        size = whole_pages(nbytes)
        with self._lock:
            for i, (start, end) in enumerate(self._free):
                if end - start >= size:
                    self._cut(i, start, start + size)
                    return start
        return None

    def claim(self, offset: int, nbytes: int) -> bool:
        """Take the block that a peer chose; False unless all of it was free."""
        wanted = offset + whole_pages(nbytes)
        with self._lock:
            i = bisect.bisect_right(self._free, offset, key=lambda part: part[0]) - 1
            if nbytes < 1 or i < 0 or wanted > self._free[i][1]:
                return False
            self._cut(i, offset, wanted)
            return True

    def end_of(self, offset: int) -> int:
        """The end of the block that starts at `offset`; 0 if none does."""
        return self._taken.get(offset, 0)

    def free(self, offset: int) -> bool:
        """Free the block that starts at `offset`; False if none does."""
        with self._lock:
            start, end = offset, self._taken.pop(offset, None)
            if end is None:
                return False
            i = bisect.bisect_right(self._free, (start, end))
            if i < len(self._free) and self._free[i][0] == end:
                end = self._free.pop(i)[1]
            if i > 0 and self._free[i - 1][1] == start:
                i -= 1
                start = self._free.pop(i)[0]
            self._free.insert(i, (start, end))
            return True

    def top(self) -> int:
        """The end of the last block that is taken; the start of the region if none is."""
        with self._lock:
            if not self._free or self._free[-1][1] < self._end:
                return self._end
            return self._free[-1][0]

    def free_parts(self) -> list[tuple[int, int]]:
        """(start, end) of the free parts, in order."""
        with self._lock:
            return list(self._free)

    def _cut(self, i: int, start: int, end: int) -> None:
        left, right = self._free[i]
        self._free[i : i + 1] = [part for part in ((left, start), (end, right)) if part[0] < part[1]]
        self._taken[start] = end


def whole_pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
