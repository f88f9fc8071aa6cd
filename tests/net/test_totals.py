"""Totals: what workers count, through a row of numbers and back; sums, deaths."""

from __future__ import annotations

import random

from fakes import CHAT, SSE_HEAD, WHOLE, chunk, event, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.core.admission import Gate, Slot
from streamd.counters import Counters, bump
from streamd.net import totals
from streamd.net.totals import BEAT_AT, COUNTS_AT, GAUGES, GAUGES_AT, ROW_LEN, UPSTREAMS_MAX, Totals
from streamd.reasons import CloseReason

NAMES = ["one", "two"]


def counted(seed: int) -> Totals:
    """Every counter of a worker with a number of its own in it."""
    draw = random.Random(seed).randrange
    counters = Counters()
    for name in totals.SCALARS:
        setattr(counters, name, draw(1, 10**12))
    for table in totals.BY_REASON:
        for reason in CloseReason:
            getattr(counters, table)[reason] = draw(1, 10**6)
    for status in (101, 200, 204, 404, 503, 599):
        counters.responses[status] = draw(1, 10**6)
    for name in totals.HISTOGRAMS:
        histogram = getattr(counters, name)
        histogram.counts = [draw(10**6) for _ in histogram.counts]
        histogram.sum = draw(10**9) / 1000
    for name in NAMES:
        for table in totals.BY_UPSTREAM:
            getattr(counters, table)[name] = draw(1, 10**6)
        for reason in CloseReason:
            counters.upstream_failures[name, reason] = draw(1, 10**6)
    gauges = {gauge: draw(10**9) for gauge in GAUGES}
    upstreams = {name: {"in_flight": draw(100), "idle": draw(100), "left_out": draw(2)} for name in NAMES}
    return Totals(counters, {gate.value: draw(1, 1000) for gate in Gate}, {}, gauges, upstreams)


def row_of(each: Totals, names: list[str] = NAMES) -> list[int]:
    row = [0] * ROW_LEN
    totals.write(row, each, names)
    return row


def same(one: Counters, other: Counters) -> bool:
    histograms = [
        (getattr(each, name).counts, getattr(each, name).sum) for each in (one, other) for name in totals.HISTOGRAMS
    ]
    half = len(totals.HISTOGRAMS)
    plain = [
        {key: value for key, value in vars(each).items() if key not in (*totals.HISTOGRAMS, "loop_lag_last_s")}
        for each in (one, other)
    ]
    return plain[0] == plain[1] and histograms[:half] == histograms[half:]


def test_every_counter_comes_back() -> None:
    of_worker = counted(1)
    back = totals.add_up([row_of(of_worker)], NAMES)
    assert same(back.counters, of_worker.counters)
    assert back.gauges == of_worker.gauges and back.upstreams == of_worker.upstreams
    assert back.refused_by_gate == of_worker.refused_by_gate


def test_the_rows_of_all_workers_are_added() -> None:
    one, two = counted(1), counted(2)
    both = totals.add_up([row_of(one), row_of(two)], NAMES)
    assert both.counters.requests == one.counters.requests + two.counters.requests
    assert both.counters.responses[404] == one.counters.responses[404] + two.counters.responses[404]
    reason = ("two", CloseReason.UPSTREAM_RESET)
    assert both.counters.upstream_failures[reason] == sum(
        each.counters.upstream_failures[reason] for each in (one, two)
    )
    assert both.gauges["log_bytes"] == one.gauges["log_bytes"] + two.gauges["log_bytes"]
    assert both.upstreams["one"]["in_flight"] == sum(each.upstreams["one"]["in_flight"] for each in (one, two))
    assert both.refused_by_gate["memory"] == sum(each.refused_by_gate["memory"] for each in (one, two))
    # What is each process's own isn't added: the fullest counts.
    fullest = max(each.gauges["descriptors_ppm"] for each in (one, two))
    assert both.saturation["descriptors"] == fullest / 1e6


def test_a_death_leaves_the_counts_and_ends_the_gauges() -> None:
    one, two = counted(1), counted(2)
    base, dead, alive = [0] * ROW_LEN, row_of(one), row_of(two)
    dead[Slot.CONNECTIONS] = 7
    before = totals.add_up([base, dead, alive], NAMES)
    totals.fold(base, dead)
    after = totals.add_up([base, dead, alive], NAMES)
    assert same(before.counters, after.counters) and before.refused_by_gate == after.refused_by_gate
    assert after.gauges == two.gauges and after.upstreams == two.upstreams
    assert not any(dead) and not any(base[:COUNTS_AT])


def test_a_worker_that_writes_again_replaces_what_it_wrote() -> None:
    row = row_of(counted(1))
    row[BEAT_AT] = 5
    again = counted(2)
    del again.gauges["beat_ms"]  # written as the loop turns
    totals.write(row, again, NAMES)
    assert row[BEAT_AT] == 5
    row[BEAT_AT] = 0
    again.gauges["beat_ms"] = 0
    assert row == row_of(again)


def test_upstreams_beyond_the_last_place_share_it() -> None:
    names = [f"up-{k}" for k in range(UPSTREAMS_MAX + 3)]
    counters = Counters()
    for name in names:
        counters.upstream_requests[name] = 1
        bump(counters.upstream_failures, (name, CloseReason.UPSTREAM_CONNECT))
    back = totals.add_up([row_of(Totals(counters), names)], names)
    assert len(back.upstreams) == UPSTREAMS_MAX
    assert back.counters.upstream_requests["up-0"] == 1
    assert back.counters.upstream_requests[names[UPSTREAMS_MAX - 1]] == 4
    assert sum(back.counters.upstream_failures.values()) == len(names)


def test_an_upstream_that_came_later_than_the_list_counts_with_the_last() -> None:
    counters = Counters()
    counters.upstream_requests["unheard-of"] = 3
    row = row_of(Totals(counters))
    assert sum(totals.add_up([row], NAMES).counters.upstream_requests.values()) == 0  # it has no name to be shown by
    names = [f"up-{k}" for k in range(UPSTREAMS_MAX)]
    assert totals.add_up([row], names).counters.upstream_requests == {names[-1]: 3}


def test_what_a_worker_is_doing() -> None:
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
        assert found.upstreams == {"one": {"in_flight": 1, "idle": 1, "left_out": 0}}
        assert totals.add_up([row_of(found, ["one"])], ["one"]).gauges["streams_live"] == 1
        assert [gauge for gauge in GAUGES if gauge not in gauges] == ["pid", "beat_ms"]
        assert len(Slot) == GAUGES_AT
