"""Work in slices, a slice a turn of the loop: ten thousand keys take a second to parse, and no token waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import TypeVar

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
