"""Health: which failures leave a server out, for whom, for how long, and who probes it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core.health import (
    ERRORS_IN_A_ROW,
    LEFT_OUT_S_MAX,
    LEFT_OUT_S_MIN,
    PRINCIPALS_MAX,
    STANDS_S,
    Health,
)
from streamd.server_state import ERROR_CHARS_MAX, ServerState, ServerView

RNG = random.Random(5)


@dataclass(eq=False)
class Request:
    """A request under way."""

    asked_at: float = 0.0


def asked(health: Health, principal: str, now: float, *, at: float = 0.0) -> Request:
    request = Request(at)
    health.begin(request, principal, now)
    return request


def fails(health: Health, principal: str, now: float, *, is_error: bool = False) -> None:
    """A request of the principal fails at once."""
    request = asked(health, principal, now)
    health.failed(principal, now, now, RNG, is_error=is_error)
    health.end(request, principal)


def test_a_server_without_failures_takes_every_request() -> None:
    health = Health()
    assert all(health.takes(each, 0.0) for each in "abc")
    assert health.failed_at("a") == 0.0 and health.is_reachable()


def test_the_time_out_doubles_to_its_bound_with_jitter() -> None:
    health, now = Health(), 100.0
    for k in range(40):
        health.unreachable(now, now, RNG)
        nominal = min(LEFT_OUT_S_MIN * 2**k, LEFT_OUT_S_MAX)
        wait = health.all.out_until - now
        assert 0.75 * nominal <= wait <= 1.25 * nominal
        assert not health.takes("a", now) and health.takes("a", now + wait)
        now += wait + 1.0
    health.answered("a", 0.0)
    assert health.takes("a", now) and health.all.out_until == 0.0


@given(st.integers(2, 500))
def test_requests_of_the_same_outage_double_nothing(count: int) -> None:
    health = Health()
    for n in range(count):  # all began before the first of them failed
        health.unreachable(100.0, 105.0 + n / 1000, RNG)
    assert health.all.out_until <= 105.0 + 1.25 * LEFT_OUT_S_MIN


def test_a_single_request_probes_a_server_whose_time_is_over() -> None:
    health = Health()
    health.unreachable(0.0, 0.0, RNG)
    probe = asked(health, "a", 10.0)
    assert not any(health.takes(each, 12.0) for each in "ab")
    health.unreachable(10.0, 15.0, RNG)
    health.end(probe, "a")
    assert not health.takes("b", 15.0) and health.takes("b", 30.0)
    probe = asked(health, "b", 30.0)
    assert not health.takes("a", 30.0)
    health.answered("b", 0.0)
    assert health.takes("a", 30.0)


def test_a_probe_that_ends_without_a_verdict_is_followed_by_another() -> None:
    health = Health()
    health.unreachable(0.0, 0.0, RNG)
    probe = asked(health, "a", 10.0)
    assert not health.takes("b", 10.0)
    health.end(probe, "a")
    assert health.takes("b", 10.0)


def test_a_probe_whose_connection_stands_lets_others_in_before_its_answer() -> None:
    health = Health()
    health.unreachable(0.0, 0.0, RNG)
    probe = asked(health, "a", 10.0)
    probe.asked_at = 10.0
    assert not health.takes("b", 10.0 + STANDS_S / 2)
    assert health.takes("b", 10.0 + STANDS_S)
    asked(health, "b", 10.0 + STANDS_S)
    assert health.takes("c", 10.0 + STANDS_S)


def test_a_silent_probe_of_a_server_that_failed_to_answer_proves_nothing() -> None:
    health = Health()
    fails(health, "a", 0.0)
    probe = asked(health, "a", 10.0)
    probe.asked_at = 10.0
    assert not health.takes("a", 100.0)


def test_no_request_probes_a_server_whose_checks_find_out() -> None:
    health = Health()
    health.is_checked = True
    health.unreachable(0.0, 0.0, RNG)
    assert not health.takes("a", 1000.0)
    health.all.let_in()
    assert health.takes("a", 1000.0)
    fails(health, "a", 1000.0)
    assert health.takes("a", 2000.0), "its answers failed, and of these a check says nothing"


# -- whose failure it is


def test_the_failures_of_a_principal_that_asks_alone_leave_the_server_out_for_all() -> None:
    health = Health()
    fails(health, "a", 0.0)
    assert not health.takes("a", 0.0) and not health.takes("b", 0.0)


@pytest.mark.parametrize("is_error", [False, True])
def test_the_failures_of_one_principal_of_several_are_its_own(is_error: bool) -> None:
    health = Health()
    health.end(asked(health, "b", 0.0), "b")
    now = 1.0
    for _ in range(20):
        fails(health, "a", now, is_error=is_error)
        now += 0.001
    assert not health.takes("a", now) and health.takes("b", now)
    assert health.failed_at("a") > 0 and health.failed_at("b") == 0.0
    health.answered("b", 0.0)
    assert not health.takes("a", now), "the answer to another principal proves nothing for this"


def test_the_failures_of_two_principals_leave_the_server_out_for_all() -> None:
    health = Health()
    fails(health, "a", 0.0)
    health.answered("b", 0.0)
    asked(health, "b", 0.1)
    fails(health, "a", 1.0)
    assert health.takes("c", 1.0)
    fails(health, "b", 2.0)
    assert not health.takes("c", 2.0)


def test_an_answer_between_them_separates_the_failures_of_two_principals() -> None:
    health = Health()
    asked(health, "a", 0.0)
    asked(health, "b", 0.0)
    for now in range(1, 40, 2):
        fails(health, "a", float(now))
        health.answered("c", 0.0)
        fails(health, "b", now + 1.0)
        health.answered("c", 0.0)
        assert health.takes("c", now + 1.0)


def test_a_connection_that_can_not_be_established_counts_for_all() -> None:
    health = Health()
    asked(health, "a", 0.0)
    asked(health, "b", 0.0)
    health.unreachable(0.0, 5.0, RNG)
    assert not any(health.takes(each, 5.0) for each in "abc") and not health.is_reachable()


# -- 500


@pytest.mark.parametrize("principals", ["aaaaa", "ababa", "abcde"])
def test_errors_count_only_in_a_row(principals: str) -> None:
    health = Health()
    for n, principal in enumerate(principals):
        assert health.takes(principal, 1.0 + n) or n >= ERRORS_IN_A_ROW
        fails(health, principal, 1.0 + n, is_error=True)
    assert not health.takes(principals[-1], 1.0 + n)
    health.answered(principals[-1], 0.0)
    for n in range(20):
        fails(health, principals[-1], 100.0 + n, is_error=True)
        fails(health, principals[-1], 100.0 + n, is_error=True)
        health.answered(principals[-1], 0.0)
        assert health.takes(principals[-1], 100.0 + n)


def test_a_probe_that_gets_another_error_leaves_the_server_out_for_longer() -> None:
    health = Health()
    for _ in range(ERRORS_IN_A_ROW):
        fails(health, "a", 0.0, is_error=True)
    first = health.all.out_until
    fails(health, "a", 10.0, is_error=True)
    assert health.all.out_until - 10.0 > 1.1 * first


def test_an_error_that_is_not_counted_still_puts_the_server_last() -> None:
    health = Health()
    fails(health, "a", 7.0, is_error=True)
    assert health.takes("a", 7.0) and health.failed_at("a") == 7.0
    health.answered("a", 0.0)
    assert health.failed_at("a") == 7.0


# -- bounds


def test_the_table_of_principals_is_bounded() -> None:
    health = Health()
    asked(health, "z", 0.0)
    for n in range(3 * PRINCIPALS_MAX):
        fails(health, f"p{n}", 1.0)
        health.answered("z", 0.0)
    assert len(health._of) == PRINCIPALS_MAX and len(health._blamed) <= 2
    for n in range(PRINCIPALS_MAX):
        fails(health, f"q{n}", 2.0)
    assert len(health._blamed) <= 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ok", "500", "502", "refused", "left"]))))
def test_whatever_happens_a_due_server_is_probed_by_exactly_one_request(steps: list[tuple[str, str]]) -> None:
    health, now = Health(), 0.0
    for principal, outcome in steps:
        now += 100.0
        assert health.takes(principal, now), "every time out is over"
        probe = asked(health, principal, now)
        if not health.all.is_in:
            assert not any(health.takes(each, now) for each in "abc")
        if outcome == "ok":
            health.answered(principal, now)
        elif outcome == "refused":
            health.unreachable(now, now, RNG)
        elif outcome != "left":
            health.failed(principal, now, now, RNG, is_error=outcome == "500")
        health.end(probe, principal)
        assert health.all.probe is None


# -- the view for people


def states(health: Health, *times: float) -> list[str]:
    return [health.view(now).state.value for now in times]


def test_a_server_that_can_not_be_reached_is_out_then_probed_then_up() -> None:
    health = Health()
    assert health.view(1.0) == ServerView()
    health.unreachable(5.0, 6.0, RNG, error="Connection refused")
    out = health.view(6.0)
    assert out == ServerView(ServerState.OUT, 6.0, 6.0, 1, "upstream_connect", "Connection refused")
    assert states(health, 6.0, 8.0) == ["out", "probing"]
    probe = asked(health, "a", 8.0)
    assert states(health, 8.0) == ["probing"]
    health.unreachable(8.0, 8.5, RNG, error="No route to host")
    health.end(probe, "a")
    assert health.view(8.5)[:6] == (ServerState.OUT, 8.5, 6.0, 2, "upstream_connect", "No route to host")
    health.answered("a", 20.0)
    up = health.view(21.0)
    assert up[:4] == (ServerState.UP, 20.0, 20.0, 0) and up.error == "No route to host", "people ask why it was out"
    health.answered("a", 30.0)
    assert health.view(30.0).since == 20.0, "it came up once"


def test_failures_that_leave_a_server_in_are_failing() -> None:
    health = Health()
    for n in range(1, ERRORS_IN_A_ROW):
        fails(health, "a", float(n), is_error=True)
        assert health.view(float(n))[:4] == (ServerState.FAILING, float(n), 1.0, n)
    fails(health, "a", 9.0, is_error=True)
    assert health.view(9.0)[:4] == (ServerState.OUT, 9.0, 9.0, ERRORS_IN_A_ROW)


def test_a_principals_own_failures_are_failing_and_those_of_two_are_out() -> None:
    health = Health()
    health.answered("b", 0.0)
    asked(health, "b", 0.0)
    fails(health, "a", 1.0)
    assert states(health, 1.0) == ["failing"]
    fails(health, "b", 2.0)
    assert states(health, 2.0) == ["out"]


def test_a_probe_that_stands_is_up_before_its_answer() -> None:
    health = Health()
    health.unreachable(0.0, 0.0, RNG, error="refused")
    asked(health, "a", 10.0, at=10.0)
    assert states(health, 10.0, 10.0 + STANDS_S) == ["probing", "up"]
    assert health.view(20.0)[:4] == (ServerState.UP, 10.0 + STANDS_S, 10.0 + STANDS_S, 0)


def test_a_check_lets_in_a_server_that_could_not_be_reached_and_no_other() -> None:
    health = Health()
    health.unreachable(0.0, 0.0, RNG, error="refused")
    health.passed_check(1.0)
    assert health.view(1.0)[:4] == (ServerState.UP, 1.0, 1.0, 0)
    for principal in "ab":
        fails(health, principal, 2.0)
    health.passed_check(3.0)
    assert states(health, 2.1) == ["out"]


def test_a_servers_text_is_bounded() -> None:
    health = Health()
    health.unreachable(0.0, 0.0, RNG, error="x" * 10_000)
    assert len(health.view(0.0).error) == ERROR_CHARS_MAX
