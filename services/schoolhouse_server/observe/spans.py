"""OpenTelemetry spans of what a replica does for a request, from queue to send, within the client's trace."""

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from schoolhouse.tracing import Clock, Tracer
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.device.device import Span

_ON_DEVICE = ("h2d", "forward", "encode", "d2h")


class _Ticket(Protocol):
    trace: "AnswerSpan | None"
    queued_at: float


class AnswerSpan:
    """The span of an answer, a child of the client's span; the answer's stages are its children."""

    def __init__(self, tracer: Tracer, parent: Any, attributes: dict[str, Any]) -> None:
        self._tracer, self._clock = tracer, Clock()
        self._began = time.perf_counter()
        start_ns = self._clock.ns(self._began)
        self._span = tracer.begin("answer", tracer.api.SpanKind.SERVER, parent, attributes, start_ns)
        self._context = tracer.api.set_span_in_context(self._span)

    def stage(self, name: str, began: float, ended: float) -> None:
        """Add the span of a stage, on time.perf_counter's clock; the part before this request came is cut off."""
        began = max(began, self._began)
        if ended >= began:
            kind = self._tracer.api.SpanKind.INTERNAL
            span = self._tracer.begin(name, kind, self._context, {}, self._clock.ns(began))
            span.end(self._clock.ns(ended))

    def end(self, error: BaseException | None = None, *, cancelled: bool = False) -> None:
        """End the span."""
        if cancelled:
            self._span.set_attribute("schoolhouse.cancelled", True)
        self._tracer.end(self._span, error, self._clock.ns(time.perf_counter()))


class SessionSpans:
    """The open spans of one session, by request; without a tracer it does nothing."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer
        self._open: dict[int, AnswerSpan] = {}

    def begin(self, call: teacher_pb2.Call, teacher: str, job: str) -> None:
        """Begin the span of a call that has come."""
        if self._tracer is not None:
            attributes = {"teacher": teacher, "job": job, "request": call.request_id}
            self._open[call.request_id] = AnswerSpan(self._tracer, self._tracer.extract(call.traceparent), attributes)

    def of(self, request_id: int) -> AnswerSpan | None:
        """The span of a request that is in flight."""
        return self._open.get(request_id)

    def sent(self, request_id: int, began: float) -> None:
        """End the span of an answer that is sent; `began` is when its first message was made."""
        span = self._open.pop(request_id, None)
        if span is not None:
            span.stage("send", began, time.perf_counter())
            span.end()

    def failed(self, request_id: int, error: BaseException) -> None:
        """End the span of a request that was answered with an error."""
        span = self._open.pop(request_id, None)
        if span is not None:
            span.end(error)

    def dropped(self, request_id: int | None = None) -> None:
        """End the span of a cancelled request; without `request_id` all spans, as the client is gone."""
        for one in list(self._open) if request_id is None else [request_id]:
            span = self._open.pop(one, None)
            if span is not None:
                span.end(cancelled=True)


def tell_stages(tickets: Iterable[_Ticket], spans: Sequence[Span]) -> None:
    """Add the spans of a forward's stages to the traces of its tickets; `spans` are h2d, forward, encode and d2h.

    A device's clock is not the host's, so its stages are placed backwards from now, as the last one has just ended.
    """
    traced = [(ticket.trace, ticket.queued_at) for ticket in tickets if ticket.trace is not None]
    if not traced:
        return
    now = time.perf_counter()
    starts = [now - span.seconds_to(spans[-1]) for span in spans]
    for trace, queued_at in traced:
        trace.stage("queue", queued_at, starts[0])
        for name, start, span in zip(_ON_DEVICE, starts, spans, strict=True):
            trace.stage(name, start, start + span.seconds_to(span))
