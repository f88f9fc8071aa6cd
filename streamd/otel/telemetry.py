"""Telemetry: a worker's spans and the daemon's metrics on their way to a collector.

    a generation ends ── Tracing ── SpanWriter, in slices ── the SDK's queue ── the SDK's thread ── POST /v1/traces
    each interval, one worker ── the totals of all workers ── a thread of streamd's ── POST /v1/metrics

Each worker sends the spans of its own generations. The metrics are the daemon's totals, which any worker can add up
(net/totals.py), so a single worker sends them: that in slot 0, or its successor.

Bounds: SPANS_MAX generations and spans wait, and later ones are lost and counted; an export under way holds a batch; at
the end of the process the spans that wait have FINISH_S_MAX to leave. A generation never waits for the collector: it
holds its stream's log, which the hub has let go perhaps, so it is made into a span within the next turns, or lost.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client.metrics_core import Metric

from streamd import __version__
from streamd.addresses import UpstreamOrigin
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.trace import Trace
from streamd.net.tracing import Tracing
from streamd.otel.metric_sender import MetricSender
from streamd.otel.outcomes import CollectorLines, ExportError, Outcomes, ToldExporter
from streamd.otel.spans import SpanWriter

# Spans that wait for the collector: the SDK's own default, four batches. A span takes 4 KiB.
SPANS_MAX: Final = 2048

# Spans that are made in a turn of the loop, 0.1 ms each: thousands of readers may leave at once.
SPANS_SLICE_MAX: Final = 16

# Time for the last spans and metrics at the end of a drain: a collector in reach answers in milliseconds, and a process
# must not wait at its end for a collector out of reach.
FINISH_S_MAX: Final = 2.0


class Identity(NamedTuple):
    """The daemon, as a collector tells it from others."""

    instance_id: str  # the same for all workers
    counts_since: float  # monotonic seconds


class Telemetry:
    """One per worker. Raises ValueError for variables OTEL_… that the SDK doesn't take."""

    def __init__(
        self,
        runtime: Runtime,
        identity: Identity,
        *,
        origin_of: Callable[[str], UpstreamOrigin | None],
        shown: Callable[[str], str],
        lines: CollectorLines,
        families: Callable[[], Iterable[Metric]] | None,
    ) -> None:
        """`families`: the daemon's metrics at this moment; None: another worker sends them. Else as in SpanWriter."""
        settings = runtime.settings
        self._runtime = runtime
        self._families = families
        self._interval_s = settings.otlp_metrics_interval_s
        self._next_at = 0.0
        resource = resource_of(identity.instance_id)
        base = settings.otlp_endpoint.rstrip("/")
        export_error = ExportError()
        self._outcomes = Outcomes(runtime.loop, runtime.counters, lines)
        self._exporter = ToldExporter(OTLPSpanExporter(endpoint=f"{base}/v1/traces"), self._outcomes.tell, export_error)
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=SPANS_MAX)
        self._given = 0  # spans, to the processor
        self._unmade: deque[tuple[Trace, Request]] = deque()  # bounded by SPANS_MAX
        self._spans = SpanWriter(resource, self._processor, origin_of=origin_of, unix_s=self._unix_s, shown=shown)
        metric_exporter = OTLPMetricExporter(endpoint=f"{base}/v1/metrics")
        since_ns = round(self._unix_s(identity.counts_since) * 1e9)
        self._sender = MetricSender(metric_exporter, resource, since_ns, self._outcomes.tell, export_error)
        self.tracing = Tracing(ratio=settings.otlp_sample_ratio, time=runtime.time, rng=runtime.rng, write=self._write)
        export_error.install()

    def _unix_s(self, at: float) -> float:
        return at + self._runtime.unix_time() - self._runtime.time()

    def _write(self, trace: Trace, request: Request) -> None:
        """A generation is over: its span is made in one of the next turns."""
        if self._waiting >= SPANS_MAX:
            self._outcomes.lose(1)
            return
        if not self._unmade:
            self._runtime.loop.call_soon(self._make_spans)
        self._unmade.append((trace, request))

    @property
    def _waiting(self) -> int:
        """Generations and spans that the exporter has not taken yet."""
        return len(self._unmade) + self._given - self._exporter.taken

    def _make_spans(self, count: int = SPANS_SLICE_MAX) -> None:
        for _ in range(min(count, len(self._unmade))):
            trace, request = self._unmade.popleft()
            is_made = False
            with self._runtime.guard:
                self._spans.write(trace, request)
                is_made = True
            if is_made:
                self._given += 1
            else:
                self._outcomes.lose(1)
        if self._unmade:
            self._runtime.loop.call_soon(self._make_spans)

    def tick(self, now: float, lag_s: float) -> None:
        """Send metrics, if it is time."""
        if self._families is not None and self._interval_s and now >= self._next_at:
            self._next_at = now + self._interval_s
            self._send_metrics(self._families)

    def _send_metrics(self, families: Callable[[], Iterable[Metric]]) -> None:
        if not self._sender.is_busy:
            self._sender.send(families(), round(self._runtime.unix_time() * 1e9))

    async def finish(self) -> None:
        """The process ends: send what waits, for FINISH_S_MAX at most. Spans that don't leave in time are lost."""
        self._make_spans(SPANS_MAX)
        if self._families is not None and self._interval_s:
            self._send_metrics(self._families)
        loop, done = self._runtime.loop, asyncio.Event()

        def flush() -> None:
            self._processor.force_flush()
            self._sender.wait()
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # nobody waits any longer, and the loop is closed
                return

        threading.Thread(target=flush, name="otlp-flush", daemon=True).start()
        try:
            async with asyncio.timeout(FINISH_S_MAX):
                await done.wait()
        except TimeoutError:
            self._outcomes.lose(self._waiting)


def resource_of(instance_id: str) -> Resource:
    """The process as its spans name it. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over streamd's own words."""
    own = {"service.name": "streamd", "service.version": __version__, "service.instance.id": instance_id}
    given = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in own.items() if name not in given})
