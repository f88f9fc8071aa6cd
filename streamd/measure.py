"""Measure: a number that streamd counts, as data: its name, kind, labels, help, and how workers' values combine.

`streamd.counters` has the table. The attributes of `Counters`, a worker's numbers in the shared mapping
(net/totals.py), /metrics and /status derive from it, so that a new measure is declared once and works with several
workers.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from typing import Any

from streamd.choice import Choice
from streamd.reasons import CloseReason

# From a tenth of a millisecond (the delay that streamd adds) to five minutes (a long prefill), about three to a decade.
SECONDS_BUCKETS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)


class Histogram:
    """Counts of observations per bucket, the last bucket without a bound, and the sum of the observed values."""

    __slots__ = ("buckets", "counts", "sum")

    def __init__(self, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.buckets, value)] += times
        self.sum += value * times


class MeasureKind(Choice):
    """The kind of a measure's value."""

    COUNTER = "counter"  # only grows: an int, or a dict of ints by label
    GAUGE = "gauge"  # the state at this moment: an int
    HISTOGRAM = "histogram"  # only grows


class Combine(Choice):
    """How the values of several workers become the daemon's."""

    SUM = "sum"
    MAX = "max"
    LAST = "last"  # the value of the worker whose loop turned last


class Label(Choice):
    """A label that tells a measure's values apart; net/totals.py has the possible keys of each."""

    REASON = "reason"  # a CloseReason
    STATUS = "status"  # of HTTP, an int
    GATE = "gate"  # a word of core/admission.py's Gate
    KIND = "kind"  # of a write to the engine (engine/cluster.py)
    FOUND = "found"  # a word of engine/owner.py's CopyFound
    WHY = "why"  # the engine's reason to refuse a write
    UPSTREAM = "upstream"  # a name; comes first of two labels
    MODEL = "model"  # a name, beside an upstream's alone: net/served.py has the pairs


SERVED = (Label.UPSTREAM, Label.MODEL)
"""The labels of a measure by upstream and model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """One row of the table. Raises ValueError for a row that can't work."""

    kind: MeasureKind
    help: str  # a sentence; /metrics shows it
    name: str = ""  # in the code and in /status
    metric: str = ""  # in /metrics, without `_total`; empty: /metrics has no metric of this name
    labels: tuple[Label, ...] = ()
    combine: Combine = Combine.SUM
    status: str = ""  # the member of /status that shows a gauge, `streams.live` for one of a table
    unit: int = 1  # as many in the code are 1 in /metrics: 1,000 for a number of milliseconds under `_seconds`
    hides_zero: bool = False  # whether 0 means that there is nothing to show

    def __post_init__(self) -> None:
        if self.kind is not MeasureKind.GAUGE and self.combine is not Combine.SUM:
            raise ValueError(f"{self.name}: a measure that only grows is a sum, or it would fall when a worker dies")
        if Label.UPSTREAM in self.labels[1:] or len(set(self.labels) - {Label.UPSTREAM}) < len(self.labels) - 1:
            raise ValueError(f"{self.name}: labels are an upstream, or one other, or the upstream and one other")
        if Label.MODEL in self.labels and self.labels != SERVED:
            raise ValueError(f"{self.name}: a model is counted beside its upstream")

    @property
    def by_served(self) -> bool:
        """Whether there is a value for each pair of an upstream and a model."""
        return Label.MODEL in self.labels

    @property
    def by_upstream(self) -> bool:
        """Whether there is a value, or a set of values, for each upstream."""
        return Label.UPSTREAM in self.labels and not self.by_served

    @property
    def inner(self) -> Label | None:
        """The label beside the upstream, if it isn't the model."""
        return next((label for label in self.labels if label not in SERVED), None)


# These put a measure on its field of Counters. They return Any because dataclasses.field() stands for a value of the
# field's own type.


def counter(metric: str, text: str, *labels: Label, unit: int = 1) -> Any:
    """A count; with labels, a dict from label to count."""
    measure = Measure(MeasureKind.COUNTER, text, metric=metric, labels=labels, unit=unit)
    if labels == (Label.REASON,):  # an end that hasn't happened yet is shown as 0
        return _on_field(measure, default_factory=lambda: dict.fromkeys(CloseReason, 0))
    return _on_field(measure, default_factory=dict) if labels else _on_field(measure, default=0)


def histogram(metric: str, text: str, *labels: Label) -> Any:
    """A distribution of seconds; with labels, which can be SERVED alone, a dict from label to distribution."""
    measure = Measure(MeasureKind.HISTOGRAM, text, metric=metric, labels=labels)
    return _on_field(measure, default_factory=dict if labels else Histogram)


def _on_field(measure: Measure, **default: Any) -> Any:
    return dataclasses.field(metadata={"measure": measure}, **default)


def measures_of(cls: type) -> tuple[Measure, ...]:
    """The measures on a dataclass's fields, with the fields' names."""
    fields = dataclasses.fields(cls)
    return tuple(dataclasses.replace(field.metadata["measure"], name=field.name) for field in fields)


def gauge(
    name: str,
    text: str,
    metric: str = "",
    *labels: Label,
    combine: Combine = Combine.SUM,
    status: str = "",
    unit: int = 1,
    hides_zero: bool = False,
) -> Measure:
    """A state, read on demand from the object that has it: gauges have no attributes."""
    return Measure(MeasureKind.GAUGE, text, name, metric, labels, combine, status, unit, hides_zero)
