"""OpenTelemetry spans of requests, behind the extra `otel`. Nothing of it is imported unless it is asked for.

Spans go to the tracer provider that the program has set, and say in what they are of the same trace as those of the
replica that answers. They hold names and numbers, and never inputs, features or the text of an error.
"""

import time
from concurrent.futures import Future
from typing import Any

from schoolhouse.errors import ConfigError

_PREFIX = "schoolhouse."


def tracer(wanted: bool) -> "Tracer | None":
    """What makes spans, if they are wanted.

    Raises:
        ConfigError: they are, and OpenTelemetry is not installed.
    """
    return Tracer() if wanted else None


class Tracer:
    """Makes spans, and carries their context over the wire in the form of W3C's traceparent."""

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
        """Begin a client's span, within the one that is current in this thread."""
        attributes = {"teacher": teacher, "revision": revision, "job": job, "taps": taps, "sent_bytes": sent_bytes}
        span = self.begin("features", self.api.SpanKind.CLIENT, None, attributes)
        return RequestSpan(self, span)

    def begin(self, name: str, kind: Any, parent: Any, attributes: dict[str, Any], start_ns: int | None = None) -> Any:
        """A span of that name; `parent` is a context, None for the current one."""
        named = {_PREFIX + key: value for key, value in attributes.items()}
        return self._tracer.start_span(_PREFIX + name, parent, kind, named, start_time=start_ns)

    def inject(self, span: Any) -> str:
        """The span's context as a traceparent; empty if there is none."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self.api.set_span_in_context(span))
        return carrier.get("traceparent", "")

    def extract(self, traceparent: str) -> Any:
        """The context of a traceparent; one of a new trace, if it is none."""
        return self._propagator.extract(
            {"traceparent": traceparent}, self.api.set_span_in_context(self.api.INVALID_SPAN)
        )

    def end(self, span: Any, error: BaseException | None, end_ns: int | None = None) -> None:
        """End a span; an error's type is told, and its text is not."""
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(self.api.StatusCode.ERROR, type(error).__name__)
        span.end(end_ns)


class RequestSpan:
    """The span of one request, from `submit` to its features. It refers to nothing of the request."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer, self._span = tracer, span
        self._traceparent = tracer.inject(span)
        self._sent = 0

    def sent(self) -> str:
        """Note that a replica is asked; the context for its call."""
        self._sent += 1
        return self._traceparent

    def received(self, nbytes: int) -> None:
        """Note how much came."""
        self._span.set_attribute(_PREFIX + "received_bytes", nbytes)

    def done(self, future: "Future[Any]") -> None:
        """End with the future, whatever that ended with."""
        self._span.set_attribute(_PREFIX + "retries", max(self._sent - 1, 0))
        if future.cancelled():
            self._span.set_attribute(_PREFIX + "cancelled", True)
            self._tracer.end(self._span, None)
        else:
            self._tracer.end(self._span, future.exception())


class Clock:
    """Moments of `time.perf_counter` in the nanoseconds since 1970 that spans have."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def ns(self, moment_s: float) -> int:
        """One of them."""
        return int(moment_s * 1e9) + self._offset_ns
