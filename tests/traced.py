"""Generations of a rig as spans in memory: `spans = traced(r)`, then `spans.get_finished_spans()`."""

from __future__ import annotations

import random
from typing import Any

from fakes import Rig
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamd.addresses import UpstreamOrigin
from streamd.daemon.request_log import without_secrets
from streamd.net.tracing import Tracing
from streamd.otel.spans import SpanWriter

UNIX_S = 1_000_000  # Unix time of the rig's 0


def traced(r: Rig, *, ratio: float = 1.0) -> InMemorySpanExporter:
    """Trace the rig's generations from now on."""

    def origin_of(name: str) -> UpstreamOrigin | None:
        return next((each.settings.origin for each in r.worker.upstreams if each.settings.name == name), None)

    spans = InMemorySpanExporter()
    writer = SpanWriter(
        Resource.create({"service.name": "streamd"}),
        SimpleSpanProcessor(spans),
        origin_of=origin_of,
        unix_s=lambda at: UNIX_S + at,
        shown=without_secrets,
    )
    r.runtime.tracing = Tracing(ratio=ratio, time=r.runtime.time, rng=random.Random(1), write=writer.write)
    return spans


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    """The only span that was written."""
    (span,) = spans.get_finished_spans()
    return span


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def events(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    """The events of a span: names and attributes."""
    return [(each.name, dict(each.attributes or {})) for each in span.events]
