"""Calls whose payload is still coming: frames go in, whole calls come out, and calls that come too slowly fail."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from schoolhouse_wire import framing
from schoolhouse_wire.errors import ProtocolError, TeacherTimeoutError
from schoolhouse_wire.loop import Alarm, Loop
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.session.calls import Asked

SLOWEST_BYTES_S = 64 << 10  # the least rate at which a call's payload must come, after a grace period


@dataclass(frozen=True, eq=False)
class Partial:
    """A call whose payload is still coming."""

    call: teacher_pb2.Call
    asked: Asked
    incoming: framing.Incoming
    began: float  # on time.perf_counter's clock


class Receiving:
    """The partial calls of one session; `fail(request_id, error)` is called for one that comes too slowly."""

    def __init__(self, loop: Loop, grace_s: float, fail: Callable[[int, Exception], None]) -> None:
        self._loop = loop
        self._grace_s = grace_s
        self._fail = fail
        self._partial: dict[int, tuple[Partial, Alarm]] = {}

    def begin(self, partial: Partial) -> None:
        """Expect the payload of a call, within a time that depends on its size."""
        allowed_s = self._grace_s + partial.incoming.nbytes / SLOWEST_BYTES_S
        alarm = self._loop.at(time.monotonic() + allowed_s, lambda: self._expire(partial, allowed_s))
        self._partial[partial.call.request_id] = partial, alarm

    def add(self, frame: framing.Frame) -> Partial | None:
        """Take a frame; returns the whole call if that was its last one.

        Frames of unknown calls are ignored.

        Raises as `Incoming.add` does; the call is dropped then.
        """
        partial, _ = self._partial.get(frame.request_id, (None, None))
        if partial is None:
            return None
        try:
            partial.incoming.add(frame.offset, frame.data, frame.digest)
        except Exception:
            self.drop(frame.request_id)
            raise
        return partial if partial.incoming.complete and self.drop(frame.request_id) else None

    def drop(self, request_id: int) -> bool:
        """Forget a call; returns whether it was here."""
        partial, alarm = self._partial.pop(request_id, (None, None))
        if alarm is not None:
            self._loop.cancel(alarm)
        return partial is not None

    def give_up(self) -> None:
        """Fail all partial calls, as nothing more will come."""
        for request_id in list(self._partial):
            if self.drop(request_id):
                self._fail(request_id, ProtocolError("the stream of requests ended within this call's payload"))

    def clear(self) -> None:
        """Forget all partial calls."""
        for request_id in list(self._partial):
            self.drop(request_id)

    def _expire(self, partial: Partial, allowed_s: float) -> None:
        request_id = partial.call.request_id
        del self._partial[request_id]
        text = f"the call's {partial.incoming.nbytes} bytes have not come within {allowed_s:.1f} s, so it was dropped"
        self._fail(request_id, TeacherTimeoutError(text))
