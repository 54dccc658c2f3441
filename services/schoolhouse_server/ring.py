"""The last log records of a process, for `schoolhouse logs`: Ray's dashboard need not run."""

import logging
from collections import deque


class RingHandler(logging.Handler):
    """Keeps the last `capacity` records as text."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=capacity)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)

    def lines(self, n: int) -> list[str]:
        """The last `n`, the oldest first."""
        kept = list(self._lines)
        return kept[max(len(kept) - n, 0) :]
