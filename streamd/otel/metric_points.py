"""Metric points: the families of /metrics as OpenTelemetry's data, under the same names.

A collector that writes for Prometheus adds `_total` and units by itself, so counters have no `_total` here: both ways
lead to the same series. All values are cumulative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.metrics.export import Metric as OtelMetric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from streamd import __version__

_CUMULATIVE: Final = AggregationTemporality.CUMULATIVE
# Units by the last part of a name (UCUM).
_UNITS: Final = {"seconds": "s", "bytes": "By", "microseconds": "us"}


def metrics_data(families: Iterable[Metric], resource: Resource, since_ns: int, now_ns: int) -> MetricsData:
    """One export. Times are Unix nanoseconds: since when counts grow, and of the values."""
    scope = InstrumentationScope("streamd", __version__)
    metrics = [made for family in families if (made := _metric(family, since_ns, now_ns)).data.data_points]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, metrics, "")], "")])


def _metric(family: Metric, since_ns: int, now_ns: int) -> OtelMetric:
    data: Sum | Gauge | HistogramData
    if family.type == "histogram":
        data = HistogramData(_histograms(family, since_ns, now_ns), _CUMULATIVE)
    else:
        points = [NumberDataPoint(each.labels, since_ns, now_ns, each.value) for each in family.samples]
        data = Sum(points, _CUMULATIVE, is_monotonic=True) if family.type == "counter" else Gauge(points)
    return OtelMetric(family.name, family.documentation, _UNITS.get(family.name.rpartition("_")[2], "1"), data)


def _histograms(family: Metric, since_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    """A family's samples are, for each set of labels: its buckets, each with those below it, then count and sum."""
    points: list[HistogramDataPoint] = []
    buckets: list[Sample] = []
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            buckets.append(sample)
        elif sample.name.endswith("_sum"):
            labels = {name: value for name, value in buckets[0].labels.items() if name != "le"}
            points.append(_histogram(labels, buckets, sample.value, since_ns, now_ns))
            buckets = []
    return points


def _histogram(
    labels: dict[str, str], buckets: list[Sample], total: float, since_ns: int, now_ns: int
) -> HistogramDataPoint:
    below = [0, *(round(bucket.value) for bucket in buckets)]
    return HistogramDataPoint(
        attributes=labels,
        start_time_unix_nano=since_ns,
        time_unix_nano=now_ns,
        count=below[-1],
        sum=total,
        bucket_counts=[more - less for less, more in itertools.pairwise(below)],
        explicit_bounds=[float(bucket.labels["le"]) for bucket in buckets[:-1]],
        min=None,  # type: ignore[arg-type]  # the encoding leaves out what isn't known
        max=None,  # type: ignore[arg-type]
    )
