"""The counters as Prometheus text and as the dict of /status; rendered only on request.

Names and units follow Prometheus's conventions: base units (seconds, bytes), `_total` on counters, `process_` for what
every process has. Labels come from enums and bounded lists of names. A help text says how the values of several workers
become one, unless they are added.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streamd import __version__
from streamd.counters import GAUGES
from streamd.measure import SERVED, Combine, Histogram, Measure, MeasureKind, measures_of
from streamd.net.totals import Totals
from streamd.reasons import CloseReason

# Metrics that are shown only with an engine.
ENGINE = "streamd_engine_"


class StreamdCollector(Collector):
    """Turns the daemon's totals into metric families, a family for each measure. `saturation` is by part, 0 to 1."""

    def __init__(self, totals: Callable[[], Totals], saturation: Callable[[], dict[str, float]]) -> None:
        self._totals = totals
        self._saturation = saturation

    def collect(self) -> Iterable[Metric]:
        totals = self._totals()
        has_engine = bool(totals.gauges["engine_servers"])
        for measure in GAUGES:
            if measure.metric and (has_engine or not measure.metric.startswith(ENGINE)):
                yield _gauge(measure, totals)
        for measure in measures_of(type(totals.counters)):
            if measure.metric and (has_engine or not measure.metric.startswith(ENGINE)):
                value = getattr(totals.counters, measure.name)
                is_histogram = measure.kind is MeasureKind.HISTOGRAM
                yield _histogram(measure, value) if is_histogram else _counter(measure, value)
        yield from self._derived(totals)

    def _derived(self, totals: Totals) -> Iterator[Metric]:
        """Metrics made of several measures, or of none."""
        gauges = totals.gauges
        if gauges["engine_servers"]:
            yield GaugeMetricFamily(
                "streamd_engine_up",
                "1 while all workers have links to all servers of the engine.",
                value=int(not gauges["engine_down"]),
            )
        streams = GaugeMetricFamily("streamd_streams", "Streams held now, by state.", labels=["state"])
        streams.add_metric(["live"], gauges["streams_live"] - gauges["streams_detached"])
        streams.add_metric(["detached"], gauges["streams_detached"])
        streams.add_metric(["sealed"], gauges["streams_sealed"])
        yield streams
        saturation = GaugeMetricFamily(
            "streamd_saturation", "How full, 0 to 1, by part; the highest is the autoscaler's.", labels=["part"]
        )
        parts = self._saturation()
        for part, value in {**parts, "highest": max(parts.values())}.items():
            saturation.add_metric([part], value)
        yield saturation
        labels = [label.value for label in SERVED]
        models = GaugeMetricFamily(
            "streamd_upstream_model_info",
            "Always 1: the models that settings or a list name, by upstream.",
            labels=labels,
        )
        for pair in totals.models:
            models.add_metric(pair, 1)
        yield models
        info = GaugeMetricFamily("streamd_build_info", "Always 1.", labels=["version", "python"])
        info.add_metric([__version__, platform.python_version()], 1)
        yield info


class Metrics:
    """The answer to GET /metrics."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)

    def render(self) -> tuple[bytes, bytes]:
        """(content type, text)."""
        return exposition.CONTENT_TYPE_LATEST.encode(), exposition.generate_latest(self._registry)


def status(totals: Totals, *, state: str, uptime_s: float, admission: dict[str, object]) -> dict[str, Any]:
    """The state for people, as /status shows it."""
    shown: dict[str, Any] = {"version": __version__, "state": state, "uptime_s": round(uptime_s, 1)}
    for measure in GAUGES:
        if measure.status:
            table, _, member = measure.status.rpartition(".")
            (shown.setdefault(table, {}) if table else shown)[member] = totals.gauges[measure.name]
    shown["tokens_total"] = totals.counters.text_events
    return {**shown, "admission": admission, "upstreams": totals.upstreams}


_COMBINED = {
    Combine.SUM: "",
    Combine.MAX: " Of several workers' values the highest.",
    Combine.LAST: " Of several workers' values the latest.",
}


def _gauge(measure: Measure, totals: Totals) -> Metric:
    family = GaugeMetricFamily(measure.metric, measure.help + _COMBINED[measure.combine], labels=_label_names(measure))
    for labels, values in totals.upstreams.items() if measure.by_upstream else [("", totals.gauges)]:
        value = values[measure.name]
        if value or not measure.hides_zero:
            family.add_metric([labels] if labels else [], _in_unit(measure, value))
    return family


def _in_unit(measure: Measure, value: int) -> float:
    return value if measure.unit == 1 else value / measure.unit


def _counter(measure: Measure, value: Any) -> Metric:
    if not measure.labels:
        return CounterMetricFamily(measure.metric, measure.help, value=_in_unit(measure, value))
    family = CounterMetricFamily(measure.metric, measure.help, labels=_label_names(measure))
    for words, count in sorted((_label_values(key), count) for key, count in value.items()):
        family.add_metric(words, count)
    return family


def _label_values(key: Any) -> list[str]:
    parts = key if isinstance(key, tuple) else (key,)
    return [part.word if isinstance(part, CloseReason) else str(part) for part in parts]


def _label_names(measure: Measure) -> list[str]:
    return [label.value for label in measure.labels]


def _histogram(measure: Measure, value: Histogram | dict[Any, Histogram]) -> Metric:
    family = HistogramMetricFamily(measure.metric, measure.help, labels=_label_names(measure))
    for labels, histogram in sorted(value.items()) if isinstance(value, dict) else [((), value)]:
        family.add_metric(labels, *_buckets(histogram))
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """The buckets, each with those below it, and the sum."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*histogram.buckets, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets, histogram.sum
