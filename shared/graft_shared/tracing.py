"""Traces from POST to settle, where the operator names a collector; elsewhere we import nothing of OpenTelemetry.

A job's row keeps the W3C `traceparent` of the request that made it; every run of it goes on from there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

from graft_shared.logs import log_event

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"  # OpenTelemetry's own variables, this and all others

_traceparent: ContextVar[str | None] = ContextVar("graft_traceparent", default=None)
logger = logging.getLogger(__name__)


def open_tracing(service: str) -> Tracing | None:
    """What sends this process' spans to the operator's collector; None where none is named."""
    if not os.environ.get(ENDPOINT):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        reason = f"{error}; {ENDPOINT} is set, and graft-shared[otel] is not installed"
        log_event(logger, "traces_not_sent", level=logging.WARNING, reason=reason)
        return None
    return Tracing(service, BatchSpanProcessor(OTLPSpanExporter()))


def current_trace() -> str | None:
    """The `traceparent` of the request that is answered now, if it is traced."""
    return _traceparent.get()


class Tracing:
    """Makes spans. They are sent from a thread of the processor's own; what its queue cannot hold is dropped."""

    def __init__(self, service: str, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        named = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or service})
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)

    def begin(self, name: str, *, parent: str | None, at: datetime | None = None, **attributes: Any) -> Span:
        """Begin a span below a `traceparent`, or a trace of its own; `at` is for what has begun before."""
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        above = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {}, context=Context())
        begun = int(at.timestamp() * 1e9) if at is not None else None
        tracer = self._provider.get_tracer("graft")
        return Span(tracer.start_span(name, context=above, start_time=begun, attributes=_dotted(attributes)))

    @contextmanager
    def request(self, parent: str | None, **attributes: Any) -> Iterator[Span]:
        """A span around a request; meanwhile `current_trace` is its own."""
        span = self.begin("request", parent=parent, **attributes)
        token = _traceparent.set(span.traceparent)
        try:
            yield span
        finally:
            _traceparent.reset(token)
            span.end()

    def close(self) -> None:
        """Send what is left, and stop."""
        self._provider.shutdown()


class Span:
    """One piece of work that takes its time."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """How another process names this span."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def tell(self, name: str | None = None, **attributes: Any) -> None:
        """Say more of it, or name it better."""
        if name is not None:
            self._span.update_name(name)
        self._span.set_attributes(_dotted(attributes))

    def note(self, what: str, **attributes: Any) -> None:
        """Something happened within it at this moment."""
        self._span.add_event(what, _dotted(attributes))

    def end(self, *, failure: str | None = None, at: datetime | None = None) -> None:
        """It is over."""
        if failure is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end(int(at.timestamp() * 1e9) if at is not None else None)


def _dotted(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes under OpenTelemetry's names: `http__route` is `http.route`."""
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}
