"""Metric sender: sends the daemon's metrics from a thread, one export at a time.

The values are read in the loop, where the objects are that have them, as for /metrics. The thread gets finished
families, so that encoding and waiting hold nobody up. While an export is still under way the next is left out: values
are cumulative, so nothing is lost but a point in time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from prometheus_client.metrics_core import Metric

from streamd.otel.metric_points import metrics_data
from streamd.otel.outcomes import ExportError, ExportOutcome


class TakesMetrics(Protocol):
    """The SDK's exporter, as far as it is used."""

    def export(self, metrics_data: MetricsData) -> MetricExportResult:
        """Send, and wait for the answer."""


class MetricSender:
    """The thread, from the first `send` on. It ends with the process."""

    def __init__(
        self,
        exporter: TakesMetrics,
        resource: Resource,
        since_ns: int,
        tell: Callable[[ExportOutcome], None],
        export_error: ExportError,
    ) -> None:
        self._exporter = exporter
        self._resource = resource
        self._since_ns = since_ns
        self._tell = tell
        self._export_error = export_error
        self._waiting: queue.Queue[tuple[list[Metric], int]] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an export is under way."""
        return self._waiting.unfinished_tasks > 0

    def send(self, families: Iterable[Metric], now_ns: int) -> None:
        """Send these in the thread, unless it is busy."""
        if self.is_busy:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
            self._thread.start()
        self._waiting.put_nowait((list(families), now_ns))

    def wait(self) -> None:
        """Wait until nothing is under way. Not for the loop."""
        self._waiting.join()

    def _run(self) -> None:
        while True:
            families, now_ns = self._waiting.get()
            error = ""
            try:
                data = metrics_data(families, self._resource, self._since_ns, now_ns)
                is_sent = self._exporter.export(data) is MetricExportResult.SUCCESS
                logged = self._export_error.take()
                error = "" if is_sent else logged or "the export failed"
            except Exception as raised:  # Why: the thread has to go on
                error = f"{type(raised).__name__}: {raised}"
            self._tell(ExportOutcome(0, error))
            self._waiting.task_done()
