"""Work in slices: the loop runs between them, and the end is told once."""

from __future__ import annotations

import asyncio

import pytest
from fakes import FakeLoop

from streamd.net.in_turns import WORKS_MAX, SlowWork, Steps, at_once, in_turns


def counting(slices: int, error: Exception | None = None) -> Steps[str]:
    for _ in range(slices):
        yield
    if error is not None:
        raise error
    return "done"


@pytest.mark.parametrize("slices", [0, 1, 5])
@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
def test_a_slice_is_done_in_each_turn(slices: int, error: Exception | None) -> None:
    loop = FakeLoop()
    told: list[object] = []
    in_turns(loop, counting(slices, error), told.append, told.append)
    turns = 0
    while not told:
        loop.call_soon(loop.stop)
        loop.run_forever()
        turns += 1
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert told == [error or "done"] and turns == slices + 1


def test_a_start_does_all_of_it_at_once() -> None:
    assert at_once(counting(5)) == "done"
    with pytest.raises(ZeroDivisionError):
        at_once(counting(5, ZeroDivisionError()))


def test_of_many_slow_works_a_single_slice_is_done_in_a_turn() -> None:
    loop, done, bugs = FakeLoop(), [], []
    slow = SlowWork(loop, lambda where, error: bugs.append(error))
    for k in range(3):
        assert slow.do(counting(2), lambda _, k=k: done.append(k), bugs.append)
    turns = 0
    while len(slow):
        loop.call_soon(loop.stop)
        loop.run_forever()
        turns += 1
    loop.close()
    assert done == [0, 1, 2] and turns == 9 and bugs == []


def test_slow_works_are_bounded_and_a_failure_ends_its_own_alone() -> None:
    loop, told, bugs = FakeLoop(), [], []
    slow = SlowWork(loop, lambda where, error: bugs.append(error))

    def raise_on(_: object) -> None:
        raise KeyError

    error = ZeroDivisionError()
    assert slow.do(counting(1, error), told.append, told.append)
    assert slow.do(counting(1), raise_on, told.append)
    assert slow.do(counting(0), lambda _: slow.do(counting(0), told.append, told.append), told.append)
    for _ in range(WORKS_MAX - 3):
        assert slow.do(counting(1), told.append, told.append)
    assert not slow.do(counting(1), told.append, told.append)
    loop.run_until_complete(asyncio.sleep(1))
    loop.close()
    assert len(slow) == 0 and told.count("done") == WORKS_MAX - 2 and error in told
    assert [type(each) for each in bugs] == [KeyError]
