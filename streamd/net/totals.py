"""Totals: the counts of a worker, as unsigned 64-bit numbers in a row of a mapping that all workers share, and their
sum.

A worker writes only its own row, every sweep and before it is asked. The worker that renders /metrics or /status
combines all rows, so any worker answers for the daemon. When a worker dies its counts, which only grow, are folded into
a base row; its gauges end with it.

    row:  admission's slots | gauges | gauges of each upstream
          | counts | counts of each upstream | counts of each pair of upstream and model

The place of each measure in a row derives from the table in streamd/counters.py, and so does the way in which the
values of several workers are combined. This module names no counter, except for those that `of_worker` copies.

Upstreams have an index that the parent gives out once for a name; from the 64th on they share the last index. Pairs of
an upstream and a model have an index in a list of their own (net/served.py); only places of pairs in the list are
written and read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from streamd.core.admission import Gate, SharedNumber
from streamd.core.stream import Stream
from streamd.counters import GAUGES, Counters
from streamd.measure import Combine, Histogram, Label, Measure, MeasureKind, measures_of
from streamd.net.runtime import Runtime
from streamd.net.served import PAIRS_MAX, Served
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason

UPSTREAMS_MAX = 64

# Events that a stream may have while it waits for its first token: Responses announce the answer, an item and its
# content, and some servers send pings. A stream with more events has begun, though with no text that is known as such.
PREAMBLE_EVENTS_MAX = 8

# Gauges of which the worker knows the values (daemon/worker.py).
WORKERS_GAUGES = (
    "descriptors_max",
    "rss_bytes",
    "virtual_bytes",
    "started_ms",
    "reload_succeeded",
    "reloaded_ms",
    "certificate_s",
)

# The keys of each label. An upstream is no key here: it selects a copy of the measure's place.
KEYS: dict[Label, tuple[Any, ...]] = {
    Label.REASON: tuple(CloseReason),
    Label.STATUS: tuple(range(100, 600)),
    Label.GATE: tuple(gate.value for gate in Gate),
    # Words of streamd.engine, which isn't imported without an engine; tests/engine/test_cluster.py compares them.
    Label.KIND: ("delta", "start", "end"),
    Label.FOUND: ("current", "behind", "gone", "older", "superseded", "broken"),
    Label.WHY: ("full", "order", "gone", "other"),
}
_OFFSETS = {label: {key: k for k, key in enumerate(keys)} for label, keys in KEYS.items()}
_HISTOGRAM_LEN = len(Histogram().counts) + 1  # the buckets, and the sum in microseconds


class CounterRow(Protocol):
    """ROW_LEN numbers: a list, or a slice of the shared mapping."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> int: ...

    def __setitem__(self, k: int, number: int, /) -> None: ...

    def __iter__(self) -> Iterator[int]: ...


@dataclass(slots=True)
class Totals:
    """Counters and gauges of the daemon, or of a worker."""

    counters: Counters
    saturation: dict[str, float] = field(default_factory=dict)  # by part, 0 to 1
    gauges: dict[str, int] = field(default_factory=dict)
    upstreams: dict[str, dict[str, int]] = field(default_factory=dict)
    models: tuple[Served, ...] = ()  # that the settings or lists name, with their upstreams, as this worker knows them


# The gauges of an engine, while there is none.
NO_ENGINE = dict.fromkeys(
    (
        *("engine_servers", "engine_down", "engine_lag_ms", "engine_round_trip_us", "engine_pending"),
        *("engine_copies", "engine_unsettled", "engine_pushed", "engine_follows", "engine_remote", "engine_members"),
    ),
    0,
)
# The gauges of a drain, while there is none.
NO_DRAIN = dict.fromkeys(
    ("draining", "drain_deadline_s", "drain_left", "drain_finished", "drain_sent_away", "drain_cut"), 0
)
NO_FACTS: Mapping[str, int] = {**NO_DRAIN, **NO_ENGINE, **dict.fromkeys(WORKERS_GAUGES, 0)}


def of_worker(
    runtime: Runtime, upstreams: Upstreams, resident_bytes: int = 0, facts: Mapping[str, int] = NO_FACTS
) -> Totals:
    """This worker's totals at this moment. `resident_bytes` is the last measurement of its memory, `facts` has the
    gauges that only the worker knows (WORKERS_GAUGES).
    """
    hub, counters = runtime.hub, runtime.counters
    streams = tuple(hub)
    for stream in streams:
        hub.charge(stream)
    counters.events, counters.event_bytes = hub.events_total, hub.event_bytes_total
    counters.text_events = hub.text_events_total
    counters.refused_by_gate = runtime.admission.refused()
    paused = [client.reader for client in runtime.clients if client.paused and client.reader is not None]
    live = sum(stream.reason is None for stream in streams)
    admission = runtime.admission
    saturation = admission.saturation()
    gauges = {
        "connections": len(runtime.clients),
        "streams_live": live,
        "streams_detached": hub.detached,
        "streams_sealed": len(streams) - live,
        "subscribers": sum(len(stream.readers) for stream in streams),
        "subscribers_paused": len(paused),
        "lag_events": max((reader.stream.log.seq_next - reader.position for reader in paused), default=0),
        "log_bytes": hub.log_bytes,
        "bodies_bytes": runtime.bodies_bytes,
        "lag_us": round(admission.lag_s * 1e6),
        "write_interval_us": round(runtime.pacing.adaptive.seconds * 1e6),
        "bytes_resident": resident_bytes,
        "descriptors": admission.descriptors,
        "reserved": admission.reserved,
        "descriptors_ppm": round(saturation[Gate.DESCRIPTORS.value] * 1e6),
        "loop_lag_ppm": round(saturation[Gate.LOOP_LAG.value] * 1e6),
        **facts,
    }
    now = runtime.time()
    waits = _first_token_waits(streams, now)
    of_upstreams = {
        upstream.settings.name: {
            "in_flight": upstream.in_flight,
            "idle": upstream.idle,
            "left_out": int(upstream.left_out(now)),
            "up": int(upstream.is_up),
            "first_token_wait_ms": round(waits.get(upstream.settings.name, 0.0) * 1000),
            "client_certificate_s": upstream.certificate_until,
        }
        for upstream in upstreams
    }
    return Totals(counters, saturation, gauges, of_upstreams, upstreams.named_models())


def _first_token_waits(streams: Iterable[Stream], now: float) -> dict[str, float]:
    """For each upstream: since when the oldest of its streams without a token has been waiting, in seconds."""
    waits: dict[str, float] = {}
    for stream in streams:
        if stream.ledger.first_token_at or stream.reason is not None or stream.terms.published:
            continue
        if stream.events < PREAMBLE_EVENTS_MAX and not stream.text_events:
            waits[stream.upstream] = max(now - stream.opened_at, waits.get(stream.upstream, 0.0))
    return waits


class MeasurePlace(NamedTuple):
    """The numbers of a measure in a row: the first (by upstream, or by pair: those of the first), and the count."""

    measure: Measure
    at: int
    length: int
    stride: int  # distance to the numbers of the next upstream, or pair
    copies: int  # the number of upstreams, or pairs; 1 for any other measure


class Layout:
    """The form of a row, derived from the measures: the place of each, and how rows are combined."""

    def __init__(self, counters: type[Counters], gauges: Sequence[Measure]) -> None:
        self.counters = counters
        self._end = len(SharedNumber)
        own, of_upstreams, _ = _split(gauges)
        self.gauges = self._places(own, 1)
        self.upstream_gauges = self._places(of_upstreams, UPSTREAMS_MAX)
        self.counts_at = self._end
        own, of_upstreams, of_served = _split(measures_of(counters))
        self.counts = self._places(own, 1) + self._places(of_upstreams, UPSTREAMS_MAX)
        self._served_at, self._served_len = self._end, sum(map(_length, of_served))
        self.served_counts = self._places(of_served, PAIRS_MAX)
        self.row_len = self._end
        places = (*self.gauges, *self.upstream_gauges, *self.counts, *self.served_counts)
        self._by_name = {place.measure.name: place for place in places}
        self._not_sums = [
            (place.measure.combine, k)
            for place in self._by_name.values()
            if place.measure.combine is not Combine.SUM
            for k in _numbers_of(place)
        ]

    def _places(self, measures: Sequence[Measure], copies: int) -> list[MeasurePlace]:
        lengths = [_length(measure) for measure in measures]
        stride, at, places = sum(lengths), self._end, []
        for measure, length in zip(measures, lengths, strict=True):
            places.append(MeasurePlace(measure, at, length, stride, copies))
            at += length
        self._end += copies * stride
        return places

    def used_len(self, pairs: int) -> int:
        """The numbers of a row in which as many pairs of upstream and model count."""
        return self._served_at + pairs * self._served_len

    def at(self, name: str, upstream: int = 0) -> int:
        """Where the numbers of a measure begin."""
        place = self._by_name[name]
        return place.at + upstream * place.stride

    def combine(self, rows: Sequence[CounterRow], pairs: int) -> list[int]:
        """Combine the rows of all workers and the base row, as far as that number of pairs counts there."""
        columns = itertools.islice(zip(*rows, strict=True), self.used_len(pairs))
        combined = [sum(column) for column in columns]
        beat = self.at("beat_ms")
        last = max(rows, key=lambda row: row[beat])
        for how, k in self._not_sums:
            combined[k] = last[k] if how is Combine.LAST else max(row[k] for row in rows)
        return combined


def _split(measures: Sequence[Measure]) -> tuple[list[Measure], list[Measure], list[Measure]]:
    """The measures without an upstream, the measures by upstream, and those by upstream and model."""
    by_upstream = [measure for measure in measures if measure.by_upstream]
    by_served = [measure for measure in measures if measure.by_served]
    return [measure for measure in measures if Label.UPSTREAM not in measure.labels], by_upstream, by_served


def _length(measure: Measure) -> int:
    if measure.kind is MeasureKind.HISTOGRAM:
        return _HISTOGRAM_LEN
    return len(KEYS[measure.inner]) if measure.inner else 1


def _numbers_of(place: MeasurePlace) -> Iterator[int]:
    for copy in range(place.copies):
        at = place.at + copy * place.stride
        yield from range(at, at + place.length)


LAYOUT = Layout(Counters, GAUGES)
BEAT_AT = LAYOUT.at("beat_ms")  # written as the loop turns, not by write()
RESIDENT_AT = LAYOUT.at("bytes_resident")


def index_of(names: Sequence[str]) -> Callable[[str], int]:
    """Index of an upstream by name. Names beyond the last place, or not in the list yet, share the last index."""
    known = {name: min(k, UPSTREAMS_MAX - 1) for k, name in enumerate(names)}
    return lambda name: known.get(name, UPSTREAMS_MAX - 1)


def write(row: CounterRow, totals: Totals, names: Sequence[str], pairs: Sequence[Served] = ()) -> None:
    """Write a worker's own row, except for admission's slots, which are written as they change."""
    index = index_of(names)
    for place in LAYOUT.gauges:
        if place.measure.name in totals.gauges:
            row[place.at] = totals.gauges[place.measure.name]
    for name, values in totals.upstreams.items():
        for place in LAYOUT.upstream_gauges:
            if place.measure.name in values:
                row[place.at + index(name) * place.stride] = values[place.measure.name]
    counts = [0] * (LAYOUT.used_len(len(pairs)) - LAYOUT.counts_at)
    for place in LAYOUT.counts:
        _encode(counts, place, getattr(totals.counters, place.measure.name), index)
    for place in LAYOUT.served_counts:
        _encode_served(counts, place, getattr(totals.counters, place.measure.name), pairs)
    for k, count in enumerate(counts, LAYOUT.counts_at):
        row[k] = count


def _encode(counts: list[int], place: MeasurePlace, value: Any, index: Callable[[str], int]) -> None:
    at, measure = place.at - LAYOUT.counts_at, place.measure
    if isinstance(value, Histogram):
        counts[at : at + place.length] = _flat(value)
    elif not measure.labels:
        counts[at] = value
    else:
        offsets = _OFFSETS[measure.inner] if measure.inner else {None: 0}
        for label, count in value.items():
            upstream, key = _parted(measure, label)
            start = at + (index(upstream) * place.stride if upstream is not None else 0)
            if key in offsets:
                counts[start + offsets[key]] += count


def _encode_served(counts: list[int], place: MeasurePlace, value: Any, pairs: Sequence[Served]) -> None:
    for k, pair in enumerate(pairs):
        found = value.get(pair)
        if found is not None:
            at = place.at - LAYOUT.counts_at + k * place.stride
            counts[at : at + place.length] = _flat(found) if isinstance(found, Histogram) else [found]


def _flat(histogram: Histogram) -> list[int]:
    return [*histogram.counts, round(histogram.sum * 1e6)]


def _parted(measure: Measure, label: Any) -> tuple[str | None, Any]:
    """A key of a counter's dict as (upstream, other key)."""
    if not measure.by_upstream:
        return None, label
    return label if measure.inner else (label, None)


def fold(base: CounterRow, row: CounterRow) -> None:
    """A worker died: add its counts to the base row, and clear its row, since its gauges and its budget share end."""
    for k in range(LAYOUT.counts_at, LAYOUT.row_len):
        base[k] += row[k]
    for k in range(LAYOUT.row_len):
        row[k] = 0


def add_up(rows: Iterable[CounterRow], names: Sequence[str], pairs: Sequence[Served] = ()) -> Totals:
    """The daemon's totals from all rows, with the base row. Saturation covers the resources that each process has."""
    row = LAYOUT.combine(tuple(rows), len(pairs))
    gauges = {place.measure.name: row[place.at] for place in LAYOUT.gauges}
    saturation = {part.value: gauges[f"{part.value}_ppm"] / 1e6 for part in (Gate.DESCRIPTORS, Gate.LOOP_LAG)}
    upstreams = {
        name: {place.measure.name: row[place.at + k * place.stride] for place in LAYOUT.upstream_gauges}
        for k, name in enumerate(names[:UPSTREAMS_MAX])
    }
    counters = LAYOUT.counters()
    for place in LAYOUT.counts:
        _decode(counters, place, row, names[:UPSTREAMS_MAX])
    for place in LAYOUT.served_counts:
        for k, pair in enumerate(pairs):
            at = place.at + k * place.stride
            numbers = row[at : at + place.length]
            if any(numbers):
                is_histogram = place.measure.kind is MeasureKind.HISTOGRAM
                getattr(counters, place.measure.name)[pair] = _histogram(numbers) if is_histogram else numbers[0]
    return Totals(counters, saturation, gauges, upstreams)


def _decode(counters: Counters, place: MeasurePlace, row: Sequence[int], names: Sequence[str]) -> None:
    measure, numbers = place.measure, row[place.at : place.at + place.length]
    if measure.kind is MeasureKind.HISTOGRAM:
        setattr(counters, measure.name, _histogram(numbers))
    elif not measure.labels:
        setattr(counters, measure.name, numbers[0])
    else:
        table = getattr(counters, measure.name)
        for key, k in _keys(place, names):
            if count := row[k]:
                table[key] = count


def _histogram(numbers: Sequence[int]) -> Histogram:
    histogram = Histogram()
    histogram.counts, histogram.sum = list(numbers[:-1]), numbers[-1] / 1e6
    return histogram


def _keys(place: MeasurePlace, names: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """Each key of a labelled counter's dict, with the place of its number."""
    measure = place.measure
    inner = KEYS[measure.inner] if measure.inner else ()
    if not measure.by_upstream:
        yield from ((key, place.at + k) for k, key in enumerate(inner))
        return
    for k, name in enumerate(names):
        at = place.at + k * place.stride
        yield from (((name, key), at + j) for j, key in enumerate(inner)) if measure.inner else [(name, at)]
