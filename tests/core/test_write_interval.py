"""Write intervals: the terms of a stream, and the interval that follows a worker's load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core.write_interval import (
    BUSY_SHARE,
    FULL_INTERVAL_S,
    FULL_SHARE,
    IDLE_SHARE,
    INTERVAL_S_MAX,
    RELIEVED_SHARE,
    AdaptiveInterval,
    WriteInterval,
)
from streamd.rows import WORD_S, Refused

LATE_S = 10.0
BETWEEN = (BUSY_SHARE + IDLE_SHARE) / 2


def after(steps: int, share: float, late_s: float = 0.0, *, start_s: float = 0.0) -> float:
    interval = AdaptiveInterval()
    interval.seconds = start_s
    for _ in range(steps):
        interval.note(share, late_s)
    return interval.seconds


# -- terms


@pytest.mark.parametrize(
    ("raw", "least_s", "adaptive"),
    [("0", 0.0, False), ("50ms", 0.05, False), ("1s", 1.0, False), (0.25, 0.25, False), ("adaptive", 0.0, True)],
)
def test_a_request_asks_for_a_duration_or_adaptive(raw: object, least_s: float, adaptive: bool) -> None:
    assert WriteInterval.parse(raw) == (least_s, adaptive)


@pytest.mark.parametrize("raw", ["1001ms", "2s", "soon", "", "-1", -1, None, True, [], "Adaptive", "nan", float("nan")])
def test_any_other_value_is_refused(raw: object) -> None:
    with pytest.raises(Refused):
        WriteInterval.parse(raw)


@pytest.mark.parametrize(
    ("own", "asked", "granted"),
    [
        ((0.0, False), (0.05, False), (0.05, False)),
        ((0.1, False), (0.05, False), (0.1, False)),
        ((0.0, True), (0.05, False), (0.05, True)),
        ((0.0, True), (0.0, False), (0.0, True)),
        ((0.05, False), (0.0, True), (0.05, True)),
    ],
)
def test_a_request_can_only_raise(
    own: tuple[float, bool], asked: tuple[float, bool], granted: tuple[float, bool]
) -> None:
    assert WriteInterval(*own).raised_to(WriteInterval(*asked)) == granted


def test_a_settings_word_is_adaptive() -> None:
    assert WriteInterval.of_setting(WORD_S) == (0.0, True)
    assert WriteInterval.of_setting(0.05) == (0.05, False)


# -- the load


def test_an_idle_worker_has_no_interval() -> None:
    assert after(100, BUSY_SHARE - 0.01, LATE_S) == 0.0


def test_a_worker_that_fills_up_and_keeps_up_goes_to_its_full_interval_and_no_further() -> None:
    grown = [after(steps, BUSY_SHARE) for steps in range(10)]
    assert grown == sorted(grown) and grown[1] == 0.01
    assert grown[-1] == FULL_INTERVAL_S
    assert after(100, 1.0, FULL_INTERVAL_S / 5) == FULL_INTERVAL_S, "busy but on time"
    assert after(100, FULL_SHARE - 0.01, LATE_S) == FULL_INTERVAL_S, "late but not full"


def test_past_its_capacity_the_interval_goes_on_to_a_second_within_four() -> None:
    assert after(16, 1.0, LATE_S) == INTERVAL_S_MAX


def test_it_comes_back_step_by_step() -> None:
    relieved = [after(steps, RELIEVED_SHARE - 0.01, start_s=INTERVAL_S_MAX) for steps in range(30)]
    assert relieved == sorted(relieved, reverse=True) and relieved[-1] == FULL_INTERVAL_S
    idle = [after(steps, IDLE_SHARE - 0.01, start_s=FULL_INTERVAL_S) for steps in range(6)]
    assert idle == sorted(idle, reverse=True) and idle[-1] == 0.0


@pytest.mark.parametrize("start_s", [0.0, 0.015, FULL_INTERVAL_S])
def test_between_its_thresholds_it_stays(start_s: float) -> None:
    assert after(100, BETWEEN, LATE_S, start_s=start_s) == start_s


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), max_size=60))
def test_it_is_never_beyond_its_bounds(loads: list[tuple[float, float]]) -> None:
    interval = AdaptiveInterval()
    for share, late_s in loads:
        interval.note(share, late_s)
        assert interval.seconds == 0.0 or 0.005 <= interval.seconds <= INTERVAL_S_MAX


@given(st.floats(0.3, 1.0))
def test_a_steady_load_whose_cost_halves_with_the_interval_comes_to_rest(load: float) -> None:
    interval = AdaptiveInterval()
    seen = []
    for _ in range(60):
        saved = 0.5 * min(1.0, interval.seconds / FULL_INTERVAL_S)
        interval.note(load * (1 - saved), 0.0)
        seen.append(interval.seconds)
    assert len(set(seen[20:])) == 1
