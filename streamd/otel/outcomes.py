"""Outcomes: what became of each export, told to the worker's loop; and the collector's outages, told to people once.

Exports run in threads of their own. Nothing in the loop waits for them, and all that is counted is counted in the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from streamd.counters import Counters


class ExportOutcome(NamedTuple):
    """The end of an export. `spans` is 0 for metrics; `error` is empty if the collector took it."""

    spans: int
    error: str


class CollectorLines(Protocol):
    """Writes the lines about the collector."""

    def out(self, error: str) -> None:
        """The collector doesn't take exports any more."""

    def back(self, out_s: float, spans_lost: int) -> None:
        """It takes them again."""


class ExportError(logging.Handler):
    """Keeps the first line that the SDK logs about an export, as the reason of its failure: it logs several."""

    # Loggers of the exporter, and of the client that it sends with.
    NAMES = ("opentelemetry", "urllib3", "requests")

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if self.text:
            return
        try:
            self.text = record.getMessage()
        except Exception:  # Why: any argument's __str__ may raise anything
            self.text = str(record.msg)

    def take(self) -> str:
        """The line, once; "" if there was none."""
        text, self.text = self.text, ""
        return text

    def install(self) -> None:
        """Keep these loggers' lines out of the log from now on."""
        for name in self.NAMES:
            logger = logging.getLogger(name)
            logger.handlers[:] = [self]
            logger.propagate = False


class Outcomes:
    """The loop's side: counts, and the collector's state."""

    def __init__(self, loop: asyncio.AbstractEventLoop, counters: Counters, lines: CollectorLines) -> None:
        self._loop = loop
        self._counters = counters
        self._lines = lines
        self._out_since: float | None = None  # None: the last export was taken, or there was none
        self._spans_lost = 0  # in this outage

    def tell(self, outcome: ExportOutcome) -> None:
        """Called in any thread."""
        try:
            self._loop.call_soon_threadsafe(self.hear, outcome)
        except RuntimeError:  # the loop is closed, the process ends
            return

    def hear(self, outcome: ExportOutcome) -> None:
        """Called in the loop."""
        counters, now = self._counters, self._loop.time()
        if outcome.error:
            counters.otlp_export_failures += 1
            self.lose(outcome.spans)
            if self._out_since is None:
                self._out_since = now
                self._lines.out(outcome.error)
            return
        counters.otlp_spans += outcome.spans
        if self._out_since is not None:
            self._lines.back(now - self._out_since, self._spans_lost)
            self._out_since, self._spans_lost = None, 0

    def lose(self, spans: int) -> None:
        """These spans never reach the collector."""
        self._counters.otlp_spans_lost += spans
        self._spans_lost += spans


class ToldExporter(SpanExporter):
    """Tells the outcome of each export, and counts the spans that it has taken from their queue."""

    def __init__(
        self, exporter: SpanExporter, tell: Callable[[ExportOutcome], None], export_error: ExportError
    ) -> None:
        self._exporter = exporter
        self._tell = tell
        self._error = export_error
        self.taken = 0  # written in the SDK's thread, read in the loop

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        result, error = SpanExportResult.FAILURE, ""
        try:
            result = self._exporter.export(spans)
        except Exception as raised:  # Why: the thread has to go on, and the spans are lost either way
            error = f"{type(raised).__name__}: {raised}"
        logged = self._error.take()
        is_sent = result is SpanExportResult.SUCCESS
        self._tell(ExportOutcome(len(spans), "" if is_sent else error or logged or "the export failed"))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)
