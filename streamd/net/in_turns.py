"""Work in slices, a slice a turn of the loop: ten thousand keys take a second to parse, and no token waits for it.

`in_turns` does the slices of a single work, such as a reload. `SlowWork` does those of many works that clients cause,
such as the tables of the admin surface: a single slice a turn, whatever their number.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from typing import Final, TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]
"""Work that yields between two slices, and returns its result."""


def at_once(steps: Steps[T]) -> T:
    """Do all of the work now; for a start, when nobody is served yet."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def in_turns(
    loop: asyncio.AbstractEventLoop, steps: Steps[T], done: Callable[[T], None], failed: Callable[[Exception], None]
) -> None:
    """Do a slice of the work in each turn of the loop. Then either `done` or `failed` is called, once."""

    def turn() -> None:
        try:
            next(steps)
        except StopIteration as end:
            done(end.value)
        except Exception as error:
            failed(error)
        else:
            loop.call_soon(turn)

    loop.call_soon(turn)


# Works under way at once: as many as a worker asks questions (net/inquiry.py). A work holds the connections or streams
# that it looks at, a pointer each.
WORKS_MAX: Final = 64


class SlowWork:
    """Works that clients cause, dealt round robin: a slice of a single work in each turn of the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_bug: Callable[[str, Exception], None],
        postpones: Callable[[Callable[[], None]], bool] = lambda turn: False,
    ) -> None:
        """`postpones`: whether a turn has to wait, because streams are frozen; then it is called later."""
        self._loop = loop
        self._on_bug = on_bug
        self._postpones = postpones
        self._works: deque[Callable[[], bool]] = deque()  # each does its next slice; True: there are more
        self._is_due = False

    def __len__(self) -> int:
        return len(self._works)

    def do(self, steps: Steps[T], done: Callable[[T], None], failed: Callable[[Exception], None]) -> bool:
        """Begin a work. Either `done` or `failed` is called once, in a later turn. False: there are WORKS_MAX already,
        and neither is called.
        """
        if len(self._works) >= WORKS_MAX:
            return False

        def next_slice() -> bool:
            try:
                next(steps)
            except StopIteration as end:
                done(end.value)
                return False
            except Exception as error:
                failed(error)
                return False
            return True

        self._works.append(next_slice)
        self._call_soon()
        return True

    def _call_soon(self) -> None:
        if self._works and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._postpones(self._turn):
            return
        self._is_due = False
        work = self._works.popleft()
        try:
            if work():
                self._works.append(work)
        except Exception as error:  # from `done` or `failed`: the other works go on
            self._on_bug("slow_work", error)
        self._call_soon()
