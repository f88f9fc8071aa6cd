"""The counters as Prometheus text and as the dict of /status; rendered only on request.

Names and units follow Prometheus's conventions: base units (seconds, bytes), `_total` on counters, labels from enums
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streamd import __version__
from streamd.counters import GAUGES
from streamd.measure import Histogram, Measure, measures_of
from streamd.net.totals import Totals
from streamd.reasons import CloseReason


class StreamdCollector(Collector):
    """Turns the daemon's totals into metric families, a family for each measure. `saturation` is by part, 0 to 1."""

    def __init__(self, totals: Callable[[], Totals], saturation: Callable[[], dict[str, float]]) -> None:
        self._totals = totals
        self._saturation = saturation

    def collect(self) -> Iterable[Metric]:
        totals = self._totals()
        for measure in GAUGES:
            if measure.metric:
                yield _gauge(measure, totals)
        for measure in measures_of(type(totals.counters)):
            if measure.metric:
                value = getattr(totals.counters, measure.name)
                yield _histogram(measure, value) if isinstance(value, Histogram) else _counter(measure, value)
        yield from self._derived(totals)

    def _derived(self, totals: Totals) -> Iterator[Metric]:
        """Metrics made of several measures, or of none."""
        gauges = totals.gauges
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
        info = GaugeMetricFamily("streamd_build_info", "Always 1.", labels=["version"])
        info.add_metric([__version__], 1)
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
    return {**shown, "admission": admission, "upstreams": totals.upstreams}


def _gauge(measure: Measure, totals: Totals) -> Metric:
    if not measure.by_upstream:
        return GaugeMetricFamily(measure.metric, measure.help, value=totals.gauges[measure.name])
    family = GaugeMetricFamily(measure.metric, measure.help, labels=_label_names(measure))
    for upstream, values in totals.upstreams.items():
        family.add_metric([upstream], values[measure.name])
    return family


def _counter(measure: Measure, value: Any) -> Metric:
    if not measure.labels:
        return CounterMetricFamily(measure.metric, measure.help, value=value)
    family = CounterMetricFamily(measure.metric, measure.help, labels=_label_names(measure))
    for words, count in sorted((_label_values(key), count) for key, count in value.items()):
        family.add_metric(words, count)
    return family


def _label_values(key: Any) -> list[str]:
    parts = key if isinstance(key, tuple) else (key,)
    return [part.word if isinstance(part, CloseReason) else str(part) for part in parts]


def _label_names(measure: Measure) -> list[str]:
    return [label.value for label in measure.labels]


def _histogram(measure: Measure, histogram: Histogram) -> Metric:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*histogram.buckets, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return HistogramMetricFamily(measure.metric, measure.help, buckets=buckets, sum_value=histogram.sum)
