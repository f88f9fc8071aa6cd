"""Counters: plain integers, bumped where things happen and rendered for Prometheus on demand.

What happens per token isn't counted here at all: a stream's own seq and byte positions say it, and the sweep folds the
differences in once a second. Histograms are lists of bucket counts.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TypeVar

from streamd.reasons import CloseReason

K = TypeVar("K")

# From a tenth of a millisecond (what streamd adds) to five minutes (a long prefill), about three to a decade.
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
    """Counts of observations per bucket, the last one without a bound, and their sum."""

    __slots__ = ("buckets", "counts", "sum")

    def __init__(self, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value


class Counters:
    """One worker's counters since its start. All only grow but for those marked as gauges."""

    def __init__(self) -> None:
        # connections
        self.connections_accepted = 0
        self.moved = 0  # handed to another worker, requests and fresh connections
        self.connections_closed: dict[CloseReason, int] = dict.fromkeys(CloseReason, 0)
        # requests
        self.requests = 0
        self.responses: dict[int, int] = {}  # by status
        self.requests_ended: dict[CloseReason, int] = dict.fromkeys(CloseReason, 0)
        self.refused: dict[CloseReason, int] = dict.fromkeys(CloseReason, 0)
        # streams
        self.streams_opened = 0
        self.events = 0  # these three are the hub's; copied here when somebody asks
        self.event_bytes = 0
        self.text_events = 0
        self.streams_sealed: dict[CloseReason, int] = dict.fromkeys(CloseReason, 0)
        # readers
        self.subscriptions = 0
        self.resumes = 0
        self.delivered_events = 0
        self.delivered_bytes = 0
        self.paused = 0
        self.dropped_events = 0
        # upstream
        self.upstream_requests: dict[str, int] = {}
        self.upstream_failures: dict[tuple[str, CloseReason], int] = {}
        self.upstream_connects: dict[str, int] = {}
        self.upstream_cancels: dict[str, int] = {}
        # times
        self.first_event_s = Histogram()  # request head to first event written
        self.added_s = Histogram()  # of that, not spent waiting for the upstream
        self.upstream_connect_s = Histogram()
        self.upstream_first_byte_s = Histogram()
        self.request_s = Histogram()
        # process
        self.loop_lag_s = Histogram()
        self.loop_lag_last_s = 0.0  # gauge
        self.bugs = 0


def bump(table: dict[K, int], key: K) -> None:
    """Count one more of that key."""
    table[key] = table.get(key, 0) + 1
