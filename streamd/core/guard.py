"""Guard: the place where everything ends that a callback raises.

A callback of a transport, a timer, the sweep or the loop belongs to a single connection, stream or exchange. If it
raises, that owner ends and gives back what it held, and the others notice nothing. Three tools do this:

    with guard:     a step that has to be tried although an earlier step failed, as in the release of everything that a
                    request held. What the block raises is counted and reported, and goes no further
    @guarded        a callback: what it raises goes to its owner's crash(), which ends the owner and never raises
    guard.caught    for a loop over many owners, where a block for each would cost as much as the work: `try` costs
                    nothing in CPython 3.11 until something is raised

`caught` counts an error by its fault (net/runtime.py): a mistake of streamd, no memory, a peer's TLS, a peer's
transport. What gives back is arithmetic on plain integers, and is taken to work.

BaseException passes: SystemExit, KeyboardInterrupt and a task's cancellation are nobody's mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

Caught = Callable[[str, Exception], None]


class Guard:
    """Ends what the block raises. `caught` gets the place and the error."""

    __slots__ = ("caught",)

    def __init__(self, caught: Caught) -> None:
        self.caught = caught

    def __enter__(self) -> None:
        """Nothing to prepare: the same guard may be entered again within its own block."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.caught(at.tb_frame.f_code.co_qualname if at is not None else "guard", error)
        return True


def _raise(where: str, error: Exception) -> None:
    raise error


BARE = Guard(_raise)
"""Ends nothing: for a core without a runtime around it."""


class Guarded(Protocol):
    """A connection, a stream or an exchange with callbacks."""

    def crash(self, where: str, error: Exception) -> None:
        """A callback raised: count it, end this owner alone, and give back what it held. Never raises."""


O = TypeVar("O", bound=Guarded)  # noqa: E741
P = ParamSpec("P")
R = TypeVar("R")


def guarded(callback: Callable[Concatenate[O, P], R]) -> Callable[Concatenate[O, P], R]:
    """Make a method never raise: its owner's crash() gets the error, and the method returns None.

    A result of None has to be harmless for the caller: false for a question, no protocol for a factory.
    """

    @functools.wraps(callback)
    def run(self: O, *args: P.args, **named: P.kwargs) -> R:
        try:
            return callback(self, *args, **named)
        except Exception as error:
            self.crash(callback.__qualname__, error)
            return None  # type: ignore[return-value]  # as the docstring says

    return run  # type: ignore[return-value]  # mypy names the first argument
