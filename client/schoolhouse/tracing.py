"""OpenTelemetry spans of requests, behind the extra `otel`, which is imported only where tracing is asked for.

Spans go to the tracer provider that the program has set, and belong to the same trace as the spans of the replica that
answers. They hold names and numbers, and never inputs, features or the text of an error.
"""

import time
from concurrent.futures import Future
from typing import Any

from schoolhouse.errors import ConfigError

_PREFIX = "schoolhouse."


def tracer(wanted: bool) -> "Tracer | None":
    """A tracer if spans are wanted, otherwise None.

    Raises:
        ConfigError: if spans are wanted and OpenTelemetry is not installed.
    """
    return Tracer() if wanted else None


class Tracer:
    """Makes spans, and turns their context into a W3C traceparent, which crosses the wire, and back."""

    def __init__(self) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as err:
            raise ConfigError("tracing needs the extra 'otel': pip install 'schoolhouse[otel]'") from err
        self.api: Any = trace
        self._propagator: Any = TraceContextTextMapPropagator()
        self._tracer: Any = trace.get_tracer("schoolhouse")

    def request(self, *, teacher: str, revision: str, job: str, taps: list[str], sent_bytes: int) -> "RequestSpan":
        """Begin a client's span as a child of the span that is current in this thread."""
        attributes = {"teacher": teacher, "revision": revision, "job": job, "taps": taps, "sent_bytes": sent_bytes}
        span = self.begin("features", self.api.SpanKind.CLIENT, None, attributes)
        return RequestSpan(self, span)

    def begin(self, name: str, kind: Any, parent: Any, attributes: dict[str, Any], start_ns: int | None = None) -> Any:
        """Begin a span; `parent` is a context, or None for the current one."""
        named = {_PREFIX + key: value for key, value in attributes.items()}
        return self._tracer.start_span(_PREFIX + name, parent, kind, named, start_time=start_ns)

    def inject(self, span: Any) -> str:
        """The span's context as a traceparent; empty if the span has no context."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self.api.set_span_in_context(span))
        return carrier.get("traceparent", "")

    def extract(self, traceparent: str) -> Any:
        """The context of a traceparent; that of a new trace if the traceparent is not valid."""
        return self._propagator.extract(
            {"traceparent": traceparent}, self.api.set_span_in_context(self.api.INVALID_SPAN)
        )

    def end(self, span: Any, error: BaseException | None, end_ns: int | None = None) -> None:
        """End a span. It records the type of an error, and not its text."""
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(self.api.StatusCode.ERROR, type(error).__name__)
        span.end(end_ns)


class RequestSpan:
    """The span of one request, from `submit` to its features. It holds no reference to the request."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer, self._span = tracer, span
        self._traceparent = tracer.inject(span)
        self._sent = 0

    def sent(self) -> str:
        """Count one more replica that is asked, and return the traceparent for that call."""
        self._sent += 1
        return self._traceparent

    def received(self, nbytes: int) -> None:
        """Record the size of the reply."""
        self._span.set_attribute(_PREFIX + "received_bytes", nbytes)

    def done(self, future: "Future[Any]") -> None:
        """End the span with the outcome of the future, which is done."""
        self._span.set_attribute(_PREFIX + "retries", max(self._sent - 1, 0))
        if future.cancelled():
            self._span.set_attribute(_PREFIX + "cancelled", True)
            self._tracer.end(self._span, None)
        else:
            self._tracer.end(self._span, future.exception())


class Clock:
    """Converts moments of `time.perf_counter` to nanoseconds since 1970, which spans need."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def ns(self, moment_s: float) -> int:
        """A moment of `time.perf_counter` in nanoseconds since 1970."""
        return int(moment_s * 1e9) + self._offset_ns
