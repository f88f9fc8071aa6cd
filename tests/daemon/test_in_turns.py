"""Work in slices: the loop runs between them, and the end is told once."""

from __future__ import annotations

import pytest
from fakes import FakeLoop

from streamd.daemon.in_turns import Steps, at_once, in_turns


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
