"""Totals: the counts of workers through a row of numbers and back; sums; deaths."""

from __future__ import annotations

import random
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, WHOLE, chunk, event, post, rig, whole_answer

import streamd
from streamd.config import UpstreamSettings
from streamd.core.admission import SharedNumber
from streamd.counters import GAUGES, Counters, bump
from streamd.measure import Combine, Histogram, Label, Measure, MeasureKind, counter, gauge, measures_of
from streamd.metrics import StreamdCollector
from streamd.net import totals
from streamd.net.served import Served
from streamd.net.totals import BEAT_AT, KEYS, LAYOUT, UPSTREAMS_MAX, Layout, Totals
from streamd.reasons import CloseReason

NAMES = ["one", "two"]
PAIRS = [Served("one", "big"), Served("two", "big"), Served("two", "other")]
MEASURES = (*GAUGES, *measures_of(Counters))


def keys_of(measure: Measure) -> list[Any]:
    """Every key that a labelled counter can have."""
    if measure.by_served:
        return PAIRS
    inner = list(KEYS[measure.inner]) if measure.inner else []
    if measure.labels == (Label.UPSTREAM,):
        return list(NAMES)
    return [(name, key) for name in NAMES for key in inner] if measure.by_upstream else inner


def histogram_of(draw: Any) -> Histogram:
    histogram = Histogram()
    histogram.counts = [draw(10**6) for _ in histogram.counts]
    histogram.sum = draw(10**9) / 1000
    return histogram


def counted(seed: int) -> Totals:
    """The totals of a worker in which each measure has a different number."""
    draw = random.Random(seed).randrange
    counters = Counters()
    for measure in measures_of(Counters):
        if measure.kind is MeasureKind.HISTOGRAM:
            made = {key: histogram_of(draw) for key in keys_of(measure)} if measure.labels else histogram_of(draw)
            setattr(counters, measure.name, made)
        elif measure.labels:
            setattr(counters, measure.name, {key: draw(1, 10**6) for key in keys_of(measure)})
        else:
            setattr(counters, measure.name, draw(1, 10**12))
    gauges = {measure.name: draw(10**9) for measure in GAUGES if not measure.by_upstream}
    upstreams = {name: {measure.name: draw(100) for measure in GAUGES if measure.by_upstream} for name in NAMES}
    return Totals(counters, {}, gauges, upstreams)


def row_of(each: Totals, names: list[str] = NAMES) -> list[int]:
    row = [0] * LAYOUT.row_len
    totals.write(row, each, names, PAIRS)
    return row


def values(counters: Counters) -> dict[str, Any]:
    """The values of the counters, in a comparable form."""
    found = {measure.name: getattr(counters, measure.name) for measure in measures_of(type(counters))}
    return {
        name: {key: comparable(each) for key, each in value.items()} if isinstance(value, dict) else comparable(value)
        for name, value in found.items()
    }


def comparable(value: Any) -> Any:
    return (value.counts, value.sum) if isinstance(value, Histogram) else value


def test_every_counter_comes_back_from_its_row() -> None:
    of_worker = counted(1)
    back = totals.add_up([row_of(of_worker)], NAMES, PAIRS)
    assert values(back.counters) == values(of_worker.counters)
    assert back.gauges == of_worker.gauges and back.upstreams == of_worker.upstreams


def test_the_rows_of_all_workers_are_added() -> None:
    one, two = counted(1), counted(2)
    both = totals.add_up([row_of(one), row_of(two)], NAMES, PAIRS)
    assert both.counters.requests == one.counters.requests + two.counters.requests
    assert both.counters.responses[404] == one.counters.responses[404] + two.counters.responses[404]
    reason = ("two", CloseReason.UPSTREAM_RESET)
    assert both.counters.upstream_failures[reason] == sum(
        each.counters.upstream_failures[reason] for each in (one, two)
    )
    assert both.gauges["log_bytes"] == one.gauges["log_bytes"] + two.gauges["log_bytes"]
    assert both.upstreams["one"]["in_flight"] == sum(each.upstreams["one"]["in_flight"] for each in (one, two))
    assert both.counters.refused_by_gate["memory"] == sum(
        each.counters.refused_by_gate["memory"] for each in (one, two)
    )
    # Limits of each process aren't added: the fullest process counts.
    fullest = max(each.gauges["descriptors_ppm"] for each in (one, two))
    assert both.saturation["descriptors"] == fullest / 1e6


def test_a_death_leaves_the_counts_and_ends_the_gauges() -> None:
    one, two = counted(1), counted(2)
    base, dead, alive = [0] * LAYOUT.row_len, row_of(one), row_of(two)
    dead[SharedNumber.CONNECTIONS] = 7
    before = totals.add_up([base, dead, alive], NAMES, PAIRS)
    totals.fold(base, dead)
    after = totals.add_up([base, dead, alive], NAMES, PAIRS)
    assert values(before.counters) == values(after.counters)
    assert after.gauges == two.gauges and after.upstreams == two.upstreams
    assert not any(dead) and not any(base[: LAYOUT.counts_at])


def test_a_row_that_is_written_again_replaces_the_earlier_values() -> None:
    row = row_of(counted(1))
    row[BEAT_AT] = 5
    again = counted(2)
    del again.gauges["beat_ms"]  # written as the loop turns
    totals.write(row, again, NAMES, PAIRS)
    assert row[BEAT_AT] == 5
    row[BEAT_AT] = 0
    again.gauges["beat_ms"] = 0
    assert row == row_of(again)


def test_upstreams_beyond_the_last_place_share_that_place() -> None:
    names = [f"up-{k}" for k in range(UPSTREAMS_MAX + 3)]
    counters = Counters()
    for name in names:
        counters.upstream_requests[name] = 1
        bump(counters.upstream_failures, (name, CloseReason.UPSTREAM_CONNECT))
    back = totals.add_up([row_of(Totals(counters), names)], names, PAIRS)
    assert len(back.upstreams) == UPSTREAMS_MAX
    assert back.counters.upstream_requests["up-0"] == 1
    assert back.counters.upstream_requests[names[UPSTREAMS_MAX - 1]] == 4
    assert sum(back.counters.upstream_failures.values()) == len(names)


def test_an_upstream_missing_in_the_list_counts_with_the_last() -> None:
    counters = Counters()
    counters.upstream_requests["unheard-of"] = 3
    row = row_of(Totals(counters))
    assert (
        sum(totals.add_up([row], NAMES, PAIRS).counters.upstream_requests.values()) == 0
    )  # it has no name under which it could be shown
    names = [f"up-{k}" for k in range(UPSTREAMS_MAX)]
    assert totals.add_up([row], names, PAIRS).counters.upstream_requests == {names[-1]: 3}


def test_the_totals_of_a_worker_count_its_connections_streams_and_upstreams() -> None:
    with rig(upstreams=(UpstreamSettings(name="one", url="http://up.test:1"),)) as r:
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), event("b")))
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        found = totals.of_worker(r.runtime, r.worker.upstreams, 123)
        gauges = found.gauges
        assert (gauges["connections"], gauges["streams_live"], gauges["subscribers"]) == (2, 1, 1)
        assert gauges["bytes_resident"] == 123 and gauges["log_bytes"] > 0
        assert found.counters.text_events == 2
        assert found.upstreams == {
            "one": {
                "in_flight": 1,
                "idle": 1,
                "left_out": 0,
                "first_token_wait_ms": 0,
                "client_certificate_s": 0,
                "up": 1,
            }
        }
        assert totals.add_up([row_of(found, ["one"])], ["one"], PAIRS).gauges["streams_live"] == 1
        own = [measure.name for measure in GAUGES if not measure.by_upstream]
        assert [name for name in own if name not in gauges] == [
            "pid",
            "beat_ms",
        ]  # the mapping's own (daemon/shared.py)
        by_upstream = {measure.name for measure in GAUGES if measure.by_upstream}
        assert by_upstream - found.upstreams["one"].keys() == {"warned"}  # daemon/request_log.py's


# -- the table


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_every_measure_has_a_help_text_and_a_way_to_combine(measure: Measure) -> None:
    assert measure.help.endswith(".") and measure.help[0] == measure.help[0].upper()
    assert measure.combine in Combine
    assert bool(measure.metric) == measure.metric.startswith(("streamd_", "process_"))


def test_no_two_measures_share_a_name() -> None:
    names = [measure.name for measure in MEASURES]
    shown = [measure.metric for measure in MEASURES if measure.metric]
    assert len(set(names)) == len(names) and len(set(shown)) == len(shown)


def test_every_way_of_combining_is_in_use() -> None:
    assert {measure.combine for measure in MEASURES} == set(Combine)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_no_number_of_a_row_belongs_to_two_measures(measure: Measure) -> None:
    """A row with a single measure in it comes back with that measure alone."""
    full, only = counted(3), Totals(Counters())
    if measure.kind is not MeasureKind.GAUGE:
        setattr(only.counters, measure.name, getattr(full.counters, measure.name))
    elif measure.by_upstream:
        zeros = {each.name: 0 for each in GAUGES if each.by_upstream}
        only.upstreams = {name: {**zeros, measure.name: full.upstreams[name][measure.name]} for name in NAMES}
    else:
        only.gauges = {measure.name: full.gauges[measure.name]}
    back = totals.add_up([row_of(only)], NAMES, PAIRS)
    assert values(back.counters) == values(only.counters)
    assert {name: value for name, value in back.gauges.items() if value} == only.gauges
    if only.upstreams:
        assert back.upstreams == only.upstreams


WORDS = dict.fromkeys((Label.GATE, Label.KIND, Label.FOUND, Label.WHY, Label.UPSTREAM, Label.MODEL), str)
KEY_TYPES = {Label.REASON: CloseReason, Label.STATUS: int, **WORDS}


@pytest.mark.parametrize("measure", measures_of(Counters), ids=lambda measure: measure.name)
def test_a_counters_type_has_the_keys_of_its_labels(measure: Measure) -> None:
    keys = tuple(KEY_TYPES[label] for label in measure.labels)
    wanted: Any = Histogram if measure.kind is MeasureKind.HISTOGRAM else int
    if keys:
        wanted = dict[keys[0] if len(keys) == 1 else tuple[keys], wanted]  # type: ignore[misc, valid-type]
    assert typing.get_type_hints(Counters)[measure.name] == wanted


@pytest.mark.parametrize("name", [measure.name for measure in measures_of(Counters)])
def test_every_counter_is_counted_somewhere(name: str) -> None:
    """A row that no code bumps would be 0 for ever in /metrics."""
    package = Path(streamd.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "counters.py"]
    assert any(re.search(rf"counters\.{name}\b", path.read_text(encoding="utf-8")) for path in files)


def test_a_count_that_would_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="is a sum"):
        Measure(MeasureKind.COUNTER, "Help.", name="highest", combine=Combine.MAX)


# -- a new measure only has to be declared


@dataclass(slots=True, eq=False)
class MoreCounters(Counters):
    """The table with an additional counter."""

    upstream_retries: dict[str, int] = counter("streamd_upstream_retries", "Requests sent again.", Label.UPSTREAM)


MORE_GAUGES = (
    *GAUGES,
    gauge("added", "A sum.", "streamd_added", Label.UPSTREAM),
    gauge("highest", "The highest.", "streamd_highest", Label.UPSTREAM, combine=Combine.MAX),
    gauge("latest", "Of the last worker.", "streamd_latest", Label.UPSTREAM, combine=Combine.LAST),
)


@pytest.fixture
def more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "LAYOUT", Layout(MoreCounters, MORE_GAUGES))
    monkeypatch.setattr("streamd.metrics.GAUGES", MORE_GAUGES)


def more_of(retries: int, beat_ms: int, **gauges: int) -> list[int]:
    """The row of a worker with only these values, all of the upstream `two`."""
    counters = MoreCounters()
    counters.upstream_retries["two"] = retries
    zeros = {measure.name: 0 for measure in MORE_GAUGES if measure.by_upstream}
    row = [0] * totals.LAYOUT.row_len
    of_worker = Totals(counters, gauges={"beat_ms": beat_ms}, upstreams={"two": {**zeros, **gauges}})
    totals.write(row, of_worker, NAMES)
    return row


def shown(rows: list[list[int]]) -> dict[str, float]:
    """The samples of /metrics about `two`."""
    summed = totals.add_up(rows, NAMES)
    families = StreamdCollector(lambda: summed, lambda: {"memory": 0.5}).collect()
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("upstream") == "two" and "reason" not in sample.labels
    }


@pytest.mark.usefixtures("more")
def test_a_counter_per_upstream_works_with_two_workers_once_it_is_declared() -> None:
    found = shown([[0] * totals.LAYOUT.row_len, more_of(3, 1), more_of(4, 2)])
    assert found["streamd_upstream_retries_total"] == 7


@pytest.mark.usefixtures("more")
def test_gauges_of_two_workers_are_a_sum_the_highest_or_the_latest() -> None:
    one = more_of(0, 2000, added=3, highest=3, latest=3, left_out=1)
    two = more_of(0, 1000, added=4, highest=4, latest=4, left_out=1)
    base = [0] * totals.LAYOUT.row_len
    found = shown([base, one, two])
    assert (found["streamd_added"], found["streamd_highest"], found["streamd_latest"]) == (7, 4, 3)
    assert found["streamd_upstream_left_out"] == 1


@pytest.mark.usefixtures("more")
def test_a_death_keeps_the_counts_and_leaves_gauges_to_the_living() -> None:
    one = more_of(3, 2000, added=3, highest=4, latest=3)
    two = more_of(4, 1000, added=4, highest=1, latest=1)
    base = [0] * totals.LAYOUT.row_len
    totals.fold(base, one)
    found = shown([base, one, two])
    assert found["streamd_upstream_retries_total"] == 7
    assert (found["streamd_added"], found["streamd_highest"], found["streamd_latest"]) == (4, 1, 1)
