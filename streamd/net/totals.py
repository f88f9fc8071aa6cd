"""Totals: what one worker counts, as unsigned 64-bit numbers in a row of a mapping that all workers share, and their
sum.

A worker writes its own row and nobody else's, every sweep and before it is asked; whoever renders /metrics or /status
adds all rows up, so any worker answers for the daemon. When a worker dies its counts, which only grow, are folded
into a base row; its gauges end with it.

    row:  admission's slots | gauges | gauges of each upstream | counts | counts of each upstream

Upstreams have an index that the supervisor gives out once for a name; from the 64th on they share the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from streamd.core.admission import Gate, Slot
from streamd.counters import Counters, Histogram
from streamd.net.runtime import Runtime
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason

UPSTREAMS_MAX = 64
STATUS_FIRST, STATUS_LAST = 100, 599

GAUGES = (
    "connections",
    "streams_live",
    "streams_detached",
    "streams_sealed",
    "subscribers",
    "subscribers_paused",
    "log_bytes",
    "bodies_bytes",
    "pid",
    "bytes_resident",
    "lag_us",
    "descriptors",
    "reserved",
    "descriptors_ppm",
    "loop_lag_ppm",
    "beat_ms",
)
UPSTREAM_GAUGES = ("in_flight", "idle", "left_out")
SCALARS = (
    "connections_accepted",
    "requests",
    "streams_opened",
    "events",
    "event_bytes",
    "text_events",
    "subscriptions",
    "resumes",
    "delivered_events",
    "delivered_bytes",
    "paused",
    "dropped_events",
    "moved",
    "bugs",
)
BY_REASON = ("connections_closed", "requests_ended", "refused", "streams_sealed")
HISTOGRAMS = (
    "first_event_s",
    "added_s",
    "upstream_connect_s",
    "upstream_first_byte_s",
    "request_s",
    "loop_lag_s",
)
BY_UPSTREAM = ("upstream_requests", "upstream_connects", "upstream_cancels")

REASONS = tuple(CloseReason)
_STATUSES = STATUS_LAST - STATUS_FIRST + 1
_HISTOGRAM_LEN = len(Histogram().counts) + 1  # and the sum, in microseconds

GAUGES_AT = len(Slot)
BEAT_AT = GAUGES_AT + GAUGES.index("beat_ms")  # written as the loop turns, not with the others
RESIDENT_AT = GAUGES_AT + GAUGES.index("bytes_resident")
UPSTREAM_GAUGES_AT = GAUGES_AT + len(GAUGES)
COUNTS_AT = UPSTREAM_GAUGES_AT + UPSTREAMS_MAX * len(UPSTREAM_GAUGES)
_COUNTS = len(SCALARS) + len(Gate) + len(BY_REASON) * len(REASONS) + _STATUSES + len(HISTOGRAMS) * _HISTOGRAM_LEN
_UPSTREAM_COUNTS = len(BY_UPSTREAM) + len(REASONS)
ROW_LEN = COUNTS_AT + _COUNTS + UPSTREAMS_MAX * _UPSTREAM_COUNTS


class Row(Protocol):
    """ROW_LEN numbers: a list, or a slice of the shared mapping."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> int: ...

    def __setitem__(self, k: int, number: int, /) -> None: ...

    def __iter__(self) -> Iterator[int]: ...


@dataclass(slots=True)
class Totals:
    """Counters and gauges of the daemon, or of one worker."""

    counters: Counters
    refused_by_gate: dict[str, int] = field(default_factory=dict)
    saturation: dict[str, float] = field(default_factory=dict)  # by part, 0 to 1
    gauges: dict[str, int] = field(default_factory=dict)
    upstreams: dict[str, dict[str, int]] = field(default_factory=dict)


def of_worker(runtime: Runtime, upstreams: Upstreams, resident_bytes: int = 0) -> Totals:
    """This worker's, at this moment; its memory as it was measured last."""
    hub, counters = runtime.hub, runtime.counters
    streams = tuple(hub)
    for stream in streams:
        hub.charge(stream)
    counters.events, counters.event_bytes = hub.events_total, hub.event_bytes_total
    counters.text_events = hub.text_events_total
    live = sum(stream.reason is None for stream in streams)
    admission = runtime.admission
    saturation = admission.saturation()
    gauges = {
        "connections": len(runtime.clients),
        "streams_live": live,
        "streams_detached": hub.detached,
        "streams_sealed": len(streams) - live,
        "subscribers": sum(len(stream.readers) for stream in streams),
        "subscribers_paused": sum(client.paused and client.reader is not None for client in runtime.clients),
        "log_bytes": hub.log_bytes,
        "bodies_bytes": runtime.bodies_bytes,
        "lag_us": round(admission.lag_s * 1e6),
        "bytes_resident": resident_bytes,
        "descriptors": admission.descriptors,
        "reserved": admission.reserved,
        "descriptors_ppm": round(saturation[Gate.DESCRIPTORS.value] * 1e6),
        "loop_lag_ppm": round(saturation[Gate.LOOP_LAG.value] * 1e6),
    }
    now = runtime.time()
    of_upstreams = {
        upstream.settings.name: {
            "in_flight": upstream.in_flight,
            "idle": upstream.idle,
            "left_out": int(upstream.left_out(now)),
        }
        for upstream in upstreams
    }
    return Totals(counters, admission.refused(), saturation, gauges, of_upstreams)


def write(row: Row, totals: Totals, names: Sequence[str]) -> None:
    """A worker's own row; admission's slots in it are written as they change."""
    index = {name: min(k, UPSTREAMS_MAX - 1) for k, name in enumerate(names)}
    for k, gauge in enumerate(GAUGES):
        if gauge in totals.gauges:
            row[GAUGES_AT + k] = totals.gauges[gauge]
    for name, values in totals.upstreams.items():
        at = UPSTREAM_GAUGES_AT + index.get(name, UPSTREAMS_MAX - 1) * len(UPSTREAM_GAUGES)
        for k, gauge in enumerate(UPSTREAM_GAUGES):
            row[at + k] = values[gauge]
    for k, count in enumerate(_counts(totals, index)):
        row[COUNTS_AT + k] = count


def _counts(totals: Totals, index: dict[str, int]) -> list[int]:
    counters = totals.counters
    counts = [int(getattr(counters, name)) for name in SCALARS]
    counts += [totals.refused_by_gate.get(gate.value, 0) for gate in Gate]
    for table in BY_REASON:
        counts += [getattr(counters, table)[reason] for reason in REASONS]
    counts += [counters.responses.get(status, 0) for status in range(STATUS_FIRST, STATUS_LAST + 1)]
    for name in HISTOGRAMS:
        histogram: Histogram = getattr(counters, name)
        counts += [*histogram.counts, round(histogram.sum * 1e6)]
    of_upstreams = [0] * (UPSTREAMS_MAX * _UPSTREAM_COUNTS)
    for k, table in enumerate(BY_UPSTREAM):
        for name, count in getattr(counters, table).items():
            of_upstreams[index.get(name, UPSTREAMS_MAX - 1) * _UPSTREAM_COUNTS + k] += count
    for (name, reason), count in counters.upstream_failures.items():
        at = index.get(name, UPSTREAMS_MAX - 1) * _UPSTREAM_COUNTS + len(BY_UPSTREAM)
        of_upstreams[at + REASONS.index(reason)] += count
    return counts + of_upstreams


def fold(base: Row, row: Row) -> None:
    """A worker died: its counts stay, its gauges and its share of the budget end."""
    for k in range(COUNTS_AT, ROW_LEN):
        base[k] += row[k]
    for k in range(ROW_LEN):
        row[k] = 0


def add_up(rows: Iterable[Row], names: Sequence[str]) -> Totals:
    """The daemon's totals from all rows, the base row among them. Saturation has those parts that each process has."""
    rows = tuple(rows)
    summed = [sum(column) for column in zip(*rows, strict=True)]
    gauges = {gauge: summed[GAUGES_AT + k] for k, gauge in enumerate(GAUGES)}
    saturation = {
        part: max(row[GAUGES_AT + GAUGES.index(f"{part}_ppm")] for row in rows) / 1e6
        for part in (Gate.DESCRIPTORS.value, Gate.LOOP_LAG.value)
    }
    upstreams = {}
    for k, name in enumerate(names[:UPSTREAMS_MAX]):
        at = UPSTREAM_GAUGES_AT + k * len(UPSTREAM_GAUGES)
        upstreams[name] = {gauge: summed[at + j] for j, gauge in enumerate(UPSTREAM_GAUGES)}
    counts = summed[COUNTS_AT:]
    refused = {gate.value: counts.pop(len(SCALARS)) for gate in Gate}
    return Totals(_counters(counts, names), refused, saturation, gauges, upstreams)


def _counters(counts: list[int], names: Sequence[str]) -> Counters:
    """_counts() undone, refusals by gate taken out."""
    counters = Counters()
    values = iter(counts)
    for name in SCALARS:
        setattr(counters, name, next(values))
    for table in BY_REASON:
        setattr(counters, table, {reason: next(values) for reason in REASONS})
    for status in range(STATUS_FIRST, STATUS_LAST + 1):
        if count := next(values):
            counters.responses[status] = count
    for name in HISTOGRAMS:
        histogram: Histogram = getattr(counters, name)
        histogram.counts = [next(values) for _ in histogram.counts]
        histogram.sum = next(values) / 1e6
    for name in names[:UPSTREAMS_MAX]:
        for table in BY_UPSTREAM:
            if count := next(values):
                getattr(counters, table)[name] = count
        for reason in REASONS:
            if count := next(values):
                counters.upstream_failures[(name, reason)] = count
    return counters
