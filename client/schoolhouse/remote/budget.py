"""A budget of retries: a share of the requests that are made, so that many clients do not cause a storm of retries."""

_SHARE = 0.2  # retries allowed for each first send
_PER_S = 10.0  # retries allowed per second in any case
_BURST = 256.0  # most retries at once, for the requests in flight at replicas that are lost together


class RetryBudget:
    """A bucket of tokens, one for each request that is sent again.

    After gRPC's retry throttling (proposal A6) and Finagle's retry budgets.
    """

    def __init__(self, now: float) -> None:
        self._tokens, self._at = _BURST, now

    def allows(self, *, is_retry: bool, now: float) -> bool:
        """Whether a request may be sent now; a first send is always allowed."""
        if is_retry:
            return self.take(now)
        self.made()
        return True

    def made(self) -> None:
        """Count a request that is sent for the first time."""
        self._tokens = min(self._tokens + _SHARE, _BURST)

    def take(self, now: float) -> bool:
        """Take a token for one retry; False if there is none."""
        self._tokens = min(self._tokens + _PER_S * (now - self._at), _BURST)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def next_at(self) -> float:
        """When the next token is there, unless one is taken before."""
        return self._at + max(1 - self._tokens, 0.0) / _PER_S
