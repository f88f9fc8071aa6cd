"""The lines above the tables."""

from __future__ import annotations

from typing import Any

import pytest

from streamd.top.head import TokenRate, alarms, facts, wrapped

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "state": "serving",
    "uptime_s": 3723.0,
    "streams": {"live": 12, "detached": 3, "sealed": 40},
    "subscribers": 31,
    "admission": {
        "saturation": {"memory": 0.25, "streams": 0.5},
        "budget": {"memory_limit_bytes": 4 << 30},
        "resident_bytes": 1 << 30,
        "loop_lag_s": 0.0042,
    },
    "upstreams": {"gpu1": {"state": "up"}, "gpu2": {"state": "out"}},
    "drain": None,
    "workers": [{}, {}],
}


def test_the_facts_of_a_daemon() -> None:
    assert facts(STATUS, 812.4) == [
        "streamd 0.1.0",
        "serving, up 1h02m",
        "workers 2",
        "streams 12 (3 without a reader)",
        "readers 31",
        "tokens/s 812",
        "memory 1.0G of 4.0G (25%)",
        "saturation 0.50 (streams)",
        "loop lag 4.2ms",
    ]
    alone = {name: value for name, value in STATUS.items() if name != "workers"}
    assert facts(alone, None)[2] == "workers 1" and "tokens/s -" in facts(alone, None)


def test_a_drain_and_servers_that_are_out_are_alarms() -> None:
    drain = {"since_s": 3.0, "deadline_s": 27.0, "by": "admin", "left": 4, "finished": 2, "sent_away": 1, "cut": 0}
    lines = alarms({**STATUS, "drain": drain})
    assert lines[0].startswith("draining for 3.0s (by admin)") and lines[1] == "1 of 2 upstreams out: gpu2 (out)"
    assert alarms({**STATUS, "upstreams": {"gpu1": {"state": "failing"}}}) == []


def test_facts_are_wrapped_and_the_first_remain_where_there_are_few_lines() -> None:
    assert wrapped(["aaa", "bbb", "ccc"], 9, 2) == ["aaa   bbb", "ccc"]
    assert wrapped(["aaa", "bbb", "ccc"], 9, 1) == ["aaa   bbb"]
    assert wrapped(["a-very-long-fact", "b"], 5, 3) == ["a-very-long-fact", "b"]


def test_the_rate_is_a_mean_over_seconds_and_begins_anew_with_the_daemon() -> None:
    rate = TokenRate()
    assert rate.add(10.0, None) is None and rate.add(10.0, 1000) is None
    assert rate.add(11.0, 1100) == pytest.approx(100)
    assert [rate.add(11.0 + k, 1100 + 200 * k) for k in range(1, 8)][-1] == pytest.approx(200), "five seconds count"
    assert rate.add(19.0, 7) is None, "the daemon was started again"
    assert rate.add(20.0, 57) == pytest.approx(50)
