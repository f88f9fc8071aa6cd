"""The families of /metrics as OpenTelemetry's data."""

from __future__ import annotations

import math

from opentelemetry.sdk.metrics.export import Gauge, Histogram, Sum
from opentelemetry.sdk.resources import Resource
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from streamd.otel.metric_points import metrics_data

RESOURCE = Resource({"service.name": "streamd"})


def converted(family: Metric) -> object:
    (resource,) = metrics_data([family], RESOURCE, 10, 20).resource_metrics
    assert resource.resource is RESOURCE
    (scope,) = resource.scope_metrics
    (metric,) = scope.metrics
    return metric


def test_a_counter_is_a_growing_sum_since_the_start_without_total_in_its_name() -> None:
    family = CounterMetricFamily("streamd_things", "Things.", labels=["reason"])
    family.add_metric(["a"], 3)
    metric = converted(family)
    assert (metric.name, metric.description, metric.unit) == ("streamd_things", "Things.", "1")  # type: ignore[attr-defined]
    data = metric.data  # type: ignore[attr-defined]
    assert isinstance(data, Sum) and data.is_monotonic and data.aggregation_temporality.name == "CUMULATIVE"
    (point,) = data.data_points
    assert (point.attributes, point.value) == ({"reason": "a"}, 3)
    assert (point.start_time_unix_nano, point.time_unix_nano) == (10, 20)


def test_a_gauge_keeps_its_unit() -> None:
    metric = converted(GaugeMetricFamily("streamd_log_bytes", "Bytes.", value=5))
    assert isinstance(metric.data, Gauge) and metric.unit == "By"  # type: ignore[attr-defined]
    assert converted(GaugeMetricFamily("x_seconds", "S.", value=5)).unit == "s"  # type: ignore[attr-defined]


def test_each_set_of_labels_of_a_histogram_is_a_point_with_its_own_counts() -> None:
    family = HistogramMetricFamily("streamd_x_seconds", "X.", labels=["model"])
    family.add_metric(["a"], [("0.1", 1.0), ("1.0", 1.0), ("+Inf", 4.0)], 12.5)
    family.add_metric(["b"], [("0.1", 0.0), ("1.0", 2.0), ("+Inf", 2.0)], 0.5)
    data = converted(family).data  # type: ignore[attr-defined]
    assert isinstance(data, Histogram)
    a, b = data.data_points
    assert (a.attributes, a.count, a.sum, a.bucket_counts) == ({"model": "a"}, 4, 12.5, [1, 0, 3])
    assert (b.attributes, b.count, b.sum, b.bucket_counts) == ({"model": "b"}, 2, 0.5, [0, 2, 0])
    assert a.explicit_bounds == [0.1, 1.0] and not any(map(math.isinf, a.explicit_bounds))


def test_a_family_without_values_is_left_out() -> None:
    (resource,) = metrics_data([CounterMetricFamily("x", "X.", labels=["a"])], RESOURCE, 1, 2).resource_metrics
    assert resource.scope_metrics[0].metrics == []
