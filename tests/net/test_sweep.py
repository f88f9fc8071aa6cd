"""Sweep: a pass every 250 ms, in slices, over all members with deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from fakes import FakeLoop

from streamd.net.sweep import INTERVAL_S, LATE_S, NEVER, SLICE_MAX, Sweep


class Member:
    """A member that notes the times of its calls and is due `again` seconds later."""

    def __init__(self, due_at: float, again: float = NEVER) -> None:
        self.due_at = due_at
        self.again = again
        self.asked: list[float] = []
        self.crashed: list[str] = []

    def on_due(self, now: float) -> float:
        self.asked.append(now)
        return now + self.again

    def crash(self, where: str, error: Exception) -> None:
        self.crashed.append(where)


class Broken(Member):
    def on_due(self, now: float) -> float:
        super().on_due(now)
        raise ZeroDivisionError


class Swept:
    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.bugs: list[str] = []
        self.sweep = Sweep(self.loop, lambda where, error: self.bugs.append(where))
        self.sweep.start()

    def run(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def close(self) -> None:
        self.sweep.stop()
        self.loop.close()


@pytest.fixture
def swept() -> object:
    made = Swept()
    yield made
    made.close()


def test_a_member_is_called_when_it_is_due_and_not_before(swept: Swept) -> None:
    start = swept.loop.time()
    member, never = Member(start + 1.1, again=2.0), Member(NEVER)
    swept.sweep.add(member)
    swept.sweep.add(never)
    swept.run(1.0)
    assert member.asked == []
    swept.run(9.0)
    assert never.asked == []
    assert [round(at - start, 2) for at in member.asked] == [1.25, 3.25, 5.25, 7.25, 9.25]


def test_a_discarded_member_is_not_called_even_in_the_same_pass(swept: Swept) -> None:
    one = Member(swept.loop.time())
    two = Member(swept.loop.time())
    one.on_due = two.on_due = lambda now: (
        swept.sweep.discard(one),
        swept.sweep.discard(two),
        asked.append(now),
        NEVER,
    )[-1]  # type: ignore[method-assign, func-returns-value]
    asked: list[float] = []
    swept.sweep.add(one)
    swept.sweep.add(two)
    swept.run(1.0)
    assert len(asked) == 1 and len(swept.sweep) == 0


def test_a_member_that_leaves_with_its_deadline_is_not_called_in_the_same_pass(swept: Swept) -> None:
    """As a frozen member does, whose deadline is told to another process."""
    members = [Member(0.0), Member(0.0)]

    def leave(now: float) -> float:
        asked.append(now)
        for member in members:
            swept.sweep.discard(member)
            member.due_at = 0.0
        return 0.0

    asked: list[float] = []
    for member in members:
        member.on_due = leave  # type: ignore[method-assign]
        swept.sweep.add(member)
    swept.run(1.0)
    assert len(asked) == 1


def test_steps_wait_while_input_is_held(swept: Swept) -> None:
    held: list[Callable[[], None]] = []

    def postpones(step: Callable[[], None]) -> bool:
        held.append(step)
        return is_held

    is_held = True
    sweep = Sweep(swept.loop, lambda where, error: None, postpones)
    member = Member(0.0)
    sweep.add(member)
    sweep.start()
    swept.run(2 * INTERVAL_S)
    assert member.asked == [] and len(held) == 1
    is_held = False
    held[0]()
    swept.run(INTERVAL_S / 2)
    assert len(member.asked) == 1
    sweep.stop()
    held[0]()
    swept.run(2 * INTERVAL_S)
    assert len(member.asked) == 1, "a step that was held does not start what was stopped"


def test_a_pass_runs_in_slices_with_loop_turns_between_them(swept: Swept) -> None:
    members = [Member(0.0) for _ in range(2 * SLICE_MAX + 1)]
    for member in members:
        swept.sweep.add(member)
    counts: list[int] = []

    def count() -> None:
        counts.append(sum(len(member.asked) for member in members))
        if counts[-1] < len(members):
            swept.loop.call_soon(count)

    swept.loop.call_later(INTERVAL_S, count)
    swept.run(2 * INTERVAL_S)
    assert {SLICE_MAX, 2 * SLICE_MAX, 2 * SLICE_MAX + 1} >= set(counts) - {0} and len(set(counts)) >= 2
    assert all(len(member.asked) == 1 for member in members)


def test_a_tick_comes_once_a_pass_with_its_lag(swept: Swept) -> None:
    ticks: list[tuple[float, float]] = []
    swept.sweep.on_tick.append(lambda now, lag_s: ticks.append((now, lag_s)))
    swept.run(1.1)
    assert len(ticks) == 4 and all(lag_s == 0 for _, lag_s in ticks)
    swept.loop._jumping.now += LATE_S / 2
    swept.run(0.01)
    assert ticks[-1][1] == pytest.approx(LATE_S / 2, abs=INTERVAL_S)
    swept.loop._jumping.now += 3.0
    swept.run(INTERVAL_S + 0.01)
    assert ticks[-1][1] == pytest.approx(3.0, abs=2 * INTERVAL_S)


def test_after_a_long_stop_deadlines_wait_for_an_interval_and_no_longer(swept: Swept) -> None:
    ticks: list[float] = []
    swept.sweep.on_tick.append(lambda now, lag_s: ticks.append(now))
    silent, busy = (Member(swept.loop.time() + 100.0) for _ in range(2))
    swept.sweep.add(silent)
    swept.sweep.add(busy)
    swept.run(1.1)
    swept.loop._jumping.now += 200.0
    swept.run(0.01)
    assert silent.asked == busy.asked == []
    busy.due_at = NEVER  # it has read what came meanwhile
    for _ in range(3):  # late again and again: nobody's deadline waits for ever
        swept.loop._jumping.now += 2.0
        swept.run(0.01)
    assert len(silent.asked) == 1 and busy.asked == []
    before = len(ticks)
    swept.run(1.1)
    assert len(ticks) >= before + 3, "the usual rhythm"


def test_a_member_that_raises_does_not_stop_the_other_deadlines(swept: Swept) -> None:
    def broken_tick(now: float, lag_s: float) -> None:
        if not swept.bugs:
            raise ZeroDivisionError

    swept.sweep.on_tick.append(broken_tick)
    broken, good = Broken(0.0), Member(0.0, again=0.5)
    swept.sweep.add(broken)
    swept.sweep.add(good)
    swept.run(3.0)
    assert len(broken.asked) == 1 and len(good.asked) >= 5
    assert swept.bugs == ["sweep.on_tick"] and broken.crashed == ["sweep.on_due"] and good.crashed == []


def test_a_stopped_sweep_calls_no_member_until_it_is_started(swept: Swept) -> None:
    member = Member(0.0, again=0.0)
    swept.sweep.add(member)
    swept.sweep.stop()
    swept.sweep.stop()
    swept.run(2.0)
    assert member.asked == []
    swept.sweep.start()
    swept.run(1.0)
    assert len(member.asked) >= 3


def test_a_stop_between_two_slices_ends_the_pass(swept: Swept) -> None:
    members = [Member(0.0) for _ in range(3 * SLICE_MAX)]
    for member in members:
        swept.sweep.add(member)
    asked = []

    def stop() -> None:
        asked.append(sum(len(member.asked) for member in members))
        if asked[-1]:
            swept.sweep.stop()
        else:
            swept.loop.call_soon(stop)

    swept.loop.call_later(INTERVAL_S, stop)
    swept.run(3 * INTERVAL_S)
    assert 0 < asked[-1] < len(members), "the stop came in mid-pass"
    assert sum(len(member.asked) for member in members) == asked[-1]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_member_that_stops_the_sweep_is_the_last_that_is_called(swept: Swept, restarts: bool) -> None:
    asked: list[float] = []

    def stop(now: float) -> float:
        asked.append(now)
        swept.sweep.stop()
        if restarts and len(asked) == 1:
            swept.sweep.start()
        return now

    for _ in range(3):
        member = Member(0.0)
        member.on_due = stop  # type: ignore[method-assign]
        swept.sweep.add(member)
    swept.run(8 * INTERVAL_S)
    assert len(asked) == 1 + restarts, "a call, and a second after the start"


@pytest.mark.parametrize("restarts", [False, True])
def test_a_tick_that_stops_the_sweep_begins_no_pass(swept: Swept, restarts: bool) -> None:
    ticks: list[str] = []
    member = Member(0.0, again=0.0)
    swept.sweep.add(member)

    def stop(now: float, lag_s: float) -> None:
        ticks.append("first")
        if len(ticks) == 1:
            swept.sweep.stop()
            if restarts:
                swept.sweep.start()

    swept.sweep.on_tick += [stop, lambda now, lag_s: ticks.append("second")]
    swept.run(1.1)
    assert ticks == (["first", *["first", "second"] * 3] if restarts else ["first"])
    assert len(member.asked) == (3 if restarts else 0), "a pass for each whole tick, in a single rhythm"
