"""How much shared memory a replica's sessions have together, and those of each job."""

import threading
from collections import Counter


class SharedBytes:
    """Counts the bytes of segments that the system has provided; any thread may call.

    Where there is no room for more, replies go over the stream, so nobody waits for what others hold.
    """

    def __init__(self, max_bytes: int, max_job_bytes: int) -> None:
        self.nbytes = 0
        self._max_bytes, self._max_job_bytes = max_bytes, min(max_bytes, max_job_bytes)
        self._payers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def account(self, payer: str) -> "Account":
        """What one session has of it."""
        return Account(self, payer)

    def is_full(self, payer: str) -> bool:
        """Whether there is no room at all for the sessions of a payer."""
        return not self.take(payer, 1, keep=False)

    def take(self, payer: str, nbytes: int, *, keep: bool = True) -> bool:
        """Whether there is room; if there is, count the bytes, unless they are not to be kept."""
        with self._lock:
            room = min(self._max_bytes - self.nbytes, self._max_job_bytes - self._payers[payer])
            if fits := nbytes <= room:
                self._count(payer, nbytes if keep else 0)
            return fits

    def add(self, payer: str, nbytes: int) -> None:
        """Count more bytes, or fewer."""
        with self._lock:
            self._count(payer, nbytes)

    def _count(self, payer: str, nbytes: int) -> None:
        self.nbytes += nbytes
        self._payers[payer] += nbytes
        if not self._payers[payer]:
            del self._payers[payer]


class Account:
    """The bytes of one session's segment."""

    def __init__(self, among: SharedBytes, payer: str) -> None:
        self.payer = payer
        self._among = among
        self._lock = threading.Lock()
        self._nbytes = 0
        self._closed = False

    @property
    def is_full(self) -> bool:
        """Whether there is no room for a first byte."""
        return self._among.is_full(self.payer)

    def take(self, nbytes: int) -> bool:
        """Count more bytes, if there is room for them."""
        with self._lock:
            if self._closed or not self._among.take(self.payer, nbytes):
                return False
            self._nbytes += nbytes
            return True

    def add(self, nbytes: int) -> None:
        """Count more bytes, also where there is no room; fewer if negative."""
        with self._lock:
            if not self._closed:
                self._among.add(self.payer, nbytes)
                self._nbytes += nbytes

    def close(self) -> None:
        """Give all back, as the segment is let go; may be called more than once."""
        with self._lock:
            self._closed = True
            self._among.add(self.payer, -self._nbytes)
            self._nbytes = 0
