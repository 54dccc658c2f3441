"""How long requests take on the device: an estimate for each, learned from those that were like it."""

from collections.abc import Hashable

_MAX_KNOWN = 4096
_NEAR = (-1, 1, -2, 2, -3, 3)  # powers of two between the sizes of requests that one estimate is made from another
_RECENT = 0.3  # the weight of the last request in a running mean
_FIRST_S = 1e-3  # before anything is known


class Costs:
    """Seconds of the device by the kind of a request, as `Sizes.kind_of` tells it, and its size in powers of two.

    Within one power of two the time is assumed to grow in proportion to the inputs. A request of which nothing like it
    is known counts as the mean one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, int], float] = {}  # seconds for each element of the inputs
        self._mean_s = _FIRST_S

    def of(self, kind: Hashable, elements: int) -> float:
        """The seconds that such a request is expected to take; above 0."""
        size = elements.bit_length()
        if (found := self._known.get((kind, size))) is not None:
            return found * elements
        for away in _NEAR:
            if (found := self._known.get((kind, size + away))) is not None:
                return found * elements
        return self._mean_s

    def learn(self, kind: Hashable, elements: int, seconds: float) -> None:
        """Note that such a request took so many seconds."""
        key, seconds = (kind, elements.bit_length()), max(seconds, 1e-9)
        each = seconds / elements
        before = self._known.get(key, each)
        self._known[key] = before + _RECENT * (each - before)
        self._mean_s += _RECENT * (seconds - self._mean_s)
        if len(self._known) > _MAX_KNOWN:
            self._known.pop(next(iter(self._known)), None)  # what was seen first
