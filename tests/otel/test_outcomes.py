"""Outcomes of exports, and the metric sender's thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client.core import GaugeMetricFamily

from streamd.counters import Counters
from streamd.otel.metric_sender import MetricSender
from streamd.otel.outcomes import ExportError, ExportOutcome, Outcomes, ToldExporter


class Lines:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def out(self, error: str) -> None:
        self.told.append(("out", error))

    def back(self, out_s: float, spans_lost: int) -> None:
        self.told.append(("back", spans_lost))


class Scripted(SpanExporter):
    """Gives or raises the results of the script, in turn."""

    def __init__(self, *script: SpanExportResult | Exception) -> None:
        self.script = list(script)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self.script.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def test_an_outage_has_two_lines_however_many_exports_fail_in_it() -> None:
    loop, counters, lines = asyncio.new_event_loop(), Counters(), Lines()
    outcomes = Outcomes(loop, counters, lines)
    for outcome in (
        ExportOutcome(3, ""),
        ExportOutcome(2, "refused"),
        ExportOutcome(0, "refused"),
        ExportOutcome(5, "reset"),
        ExportOutcome(1, ""),
    ):
        outcomes.tell(outcome)
    assert lines.told == [] and counters.otlp_spans == 0, "nothing happens outside of the loop"
    outcomes.lose(4)
    loop.run_until_complete(asyncio.sleep(0))
    assert lines.told == [("out", "refused"), ("back", 11)]
    assert (counters.otlp_spans, counters.otlp_spans_lost, counters.otlp_export_failures) == (4, 11, 3)
    outcomes.tell(ExportOutcome(1, "again"))
    loop.run_until_complete(asyncio.sleep(0))
    assert lines.told[2:] == [("out", "again")]
    loop.close()
    outcomes.tell(ExportOutcome(1, ""))  # a thread that outlives the loop


def test_an_exporter_tells_how_each_export_ended_and_never_raises() -> None:
    told: list[ExportOutcome] = []
    error = ExportError()
    results = (SpanExportResult.SUCCESS, SpanExportResult.FAILURE, ValueError("odd"), SpanExportResult.FAILURE)
    exporter = ToldExporter(Scripted(*results), told.append, error)
    spans = [ReadableSpan("a"), ReadableSpan("b")]
    error.emit(logging.makeLogRecord({"msg": "of a try before a success"}))
    assert exporter.export(spans) is SpanExportResult.SUCCESS
    assert exporter.export(spans) is SpanExportResult.FAILURE
    exporter.export(spans)
    error.emit(logging.makeLogRecord({"msg": "refused %s", "args": ("by c",)}))
    error.emit(logging.makeLogRecord({"msg": "gave up"}))
    exporter.export(spans)
    assert [outcome.error for outcome in told] == ["", "the export failed", "ValueError: odd", "refused by c"]
    assert {outcome.spans for outcome in told} == {2} and exporter.taken == 8


def test_lines_of_the_sdk_are_kept_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    error = ExportError()
    loggers = [logging.getLogger(name) for name in error.NAMES]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    try:
        error.install()
        logging.getLogger("opentelemetry.exporter.otlp").error("bad %d", "no number")
        assert error.take() == "bad %d" and error.take() == "" and caplog.records == []
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate


class HeldExporter:
    """Exports once the test lets it."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.results: list[MetricExportResult | Exception] = []
        self.exports = 0

    def export(self, metrics_data: Any) -> MetricExportResult:
        self.may_go_on.wait()
        self.exports += 1
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def test_metrics_are_sent_one_export_at_a_time_and_failures_are_told() -> None:
    told: list[ExportOutcome] = []
    exporter = HeldExporter()
    sender = MetricSender(exporter, Resource({}), 1, told.append, ExportError())
    family = GaugeMetricFamily("x", "X.", value=1)
    exporter.results = [MetricExportResult.SUCCESS, MetricExportResult.FAILURE, OSError("gone")]
    sender.send([family], 2)
    assert sender.is_busy
    sender.send([family], 3)  # left out
    exporter.may_go_on.set()
    sender.wait()
    for _ in range(2):
        sender.send([family], 4)
        sender.wait()
    assert exporter.exports == 3 and not sender.is_busy
    assert told == [ExportOutcome(0, ""), ExportOutcome(0, "the export failed"), ExportOutcome(0, "OSError: gone")]
