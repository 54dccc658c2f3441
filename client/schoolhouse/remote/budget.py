"""How often requests may be sent again: a part of those that are made, so that many clients make no storm."""

from schoolhouse.remote.request import Request

_SHARE = 0.2  # of the requests that are made
_PER_S = 10.0  # and so many a second anyway
_BURST = 256.0  # as many as were in flight at replicas that are lost at once


class RetryBudget:
    """A bucket of tokens, one for each request that is sent again. The caller holds a lock.

    After gRPC's retry throttling (proposal A6) and Finagle's retry budgets.
    """

    def __init__(self, now: float) -> None:
        self._tokens, self._at = _BURST, now

    def allows(self, request: Request, now: float) -> bool:
        """Whether the request may be sent now: always, the first time."""
        if not request.is_retry:
            self.made()
            return True
        request.is_retry = not self.take(now)
        return not request.is_retry

    def made(self) -> None:
        """A request is sent for the first time."""
        self._tokens = min(self._tokens + _SHARE, _BURST)

    def take(self, now: float) -> bool:
        """Whether one more may be sent again."""
        self._tokens = min(self._tokens + _PER_S * (now - self._at), _BURST)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def next_at(self) -> float:
        """When there is a token, if nothing is taken before."""
        return self._at + max(1 - self._tokens, 0.0) / _PER_S
