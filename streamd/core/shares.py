"""Shares: things of a bounded kind by the principals that hold them, to find the thing that gives way at the bound.

A bound for all is no bound for a single principal. So when the places run out, a thing gives way that belongs to the
principal with the most of them, provided that this principal still has no fewer than the asking principal afterwards.
A principal that has the most itself is refused. That makes the shares equal where they are contended, leaves an
uncontended place to anybody, and costs nothing until the bound is reached: then a look over the holders.

Rejected: a fixed share for each principal (idle places, or a share of nothing among ten thousand keys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Shares(Generic[T]):
    """The things that each principal holds, oldest first. Bounded by the things themselves."""

    __slots__ = ("_held", "total")

    def __init__(self) -> None:
        self._held: dict[str, dict[T, None]] = {}
        self.total = 0

    def add(self, owner: str, thing: T) -> None:
        """The principal holds the thing from now on."""
        held = self._held.setdefault(owner, {})
        self.total += thing not in held
        held[thing] = None

    def discard(self, owner: str, thing: T) -> None:
        """The principal holds the thing no more. No effect if it didn't."""
        held = self._held.get(owner)
        if held is not None and thing in held:
            del held[thing]
            self.total -= 1
            if not held:
                del self._held[owner]

    def count(self, owner: str) -> int:
        """The number of things that the principal holds."""
        return len(self._held.get(owner, ()))

    def held_by(self, owner: str) -> Iterator[T]:
        """The things that the principal holds, oldest first."""
        return iter(self._held.get(owner, ()))

    def yielding(self, owner: str, may_yield: Callable[[T], bool]) -> T | None:
        """The thing that gives way to another of `owner`: the oldest that may, of the principal that holds most.

        None: no principal with so many that it keeps at least as many as `owner` has then has a thing that may.
        """
        least = self.count(owner) + 2
        larger = [held for held in self._held.values() if len(held) >= least]
        for held in sorted(larger, key=len, reverse=True):
            found = next(filter(may_yield, held), None)
            if found is not None:
                return found
        return None
