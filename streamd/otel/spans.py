"""Spans: a finished generation becomes a span of OpenTelemetry's SDK, with the ids that its upstream was told.

The span is made at its end, because a live span of the SDK is a lock and several containers for each generation. The
ids were drawn when the request went upstream, so the SDK is handed them by its generator of ids.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.trace.status import StatusCode

from streamd import __version__
from streamd.addresses import UpstreamOrigin
from streamd.net.request import Request
from streamd.net.trace import Trace
from streamd.otel.span_attributes import attributes_of, error_of


class GivenIds(IdGenerator):
    """Gives the SDK the ids of the next span."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_span_id(self) -> int:
        return self.span_id

    def generate_trace_id(self) -> int:
        return self.trace_id


class SpanWriter:
    """Writes a span for each finished generation."""

    def __init__(
        self,
        resource: Resource,
        processor: SpanProcessor,
        *,
        origin_of: Callable[[str], UpstreamOrigin | None],
        unix_s: Callable[[float], float],
        shown: Callable[[str], str],
    ) -> None:
        """`origin_of`: an upstream's place by its name. `unix_s`: Unix time of a monotonic time. `shown`: a client's
        text without secrets.
        """
        self._ids = GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("streamd", __version__)
        self._origin_of = origin_of
        self._unix_s = unix_s
        self._shown = shown

    def write(self, trace: Trace, request: Request) -> None:
        """Make the span of a generation, whole, and hand it to the processor."""
        model = self._shown(request.model)
        self._ids.trace_id, self._ids.span_id = trace.own.trace_id, trace.own.span_id
        span = self._tracer.start_span(
            f"{trace.operation} {model}" if model else trace.operation,
            context=_context_of(trace),
            kind=SpanKind.CLIENT,
            attributes=attributes_of(trace, request, self._origin_of(request.upstream), model),
            start_time=self._ns(request.started_at),
        )
        for at, name, facts in trace.events:
            span.add_event(name, {f"streamd.{key}": value for key, value in facts.items()}, self._ns(at))
        if error_of(trace, request):
            span.set_status(StatusCode.ERROR)
        span.end(self._ns(max(trace.ended_at, request.started_at)))

    def _ns(self, at: float) -> int:
        return round(self._unix_s(at) * 1e9)


def _context_of(trace: Trace) -> Context:
    parent = trace.parent
    if parent is None:
        return Context()
    flags = TraceFlags(parent.flags)
    remote = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(remote), Context())
