"""Makers: which upstream made an object that it keeps (a response, a conversation), and for which principal.

A later request names the object by its id alone, and only its maker knows it. Ids may be guessable, so each belongs to
the principals that it was made for: another principal is told that there is no such object.

Bounded by OBJECTS_MAX. Over it an object of the principal that has most of them is forgotten (core/shares.py), the
oldest first; a forgotten object is one of unknown makers again.
"""

from __future__ import annotations

from collections.abc import Iterator
from sys import intern
from typing import Final, NamedTuple

from streamd.core.shares import Shares

# A day of a busy team (100 people, 200 turns each), at 350 B: 7 MB.
OBJECTS_MAX: Final = 20_000
# Servers that count their responses from 1 give the same id to many; the latest count.
MAKERS_MAX: Final = 8
# OpenAI's ids have 55 characters.
ID_CHARS_MAX: Final = 256


class Made(NamedTuple):
    """A principal and the upstream, by name, that made the object for it."""

    principal: str
    upstream: str


class Makers:
    """The makers of all objects that a worker has heard of."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Made, ...]] = {}  # by the object's id, the oldest first
        self._shares: Shares[str] = Shares()

    def __len__(self) -> int:
        return self._shares.total

    def __iter__(self) -> Iterator[tuple[str, Made]]:
        return ((object_id, each) for object_id, made in tuple(self._made.items()) for each in made)

    def of(self, object_id: str) -> tuple[Made, ...]:
        """Who made the object, for each principal; empty if that isn't known."""
        return self._made.get(object_id, ())

    def learn(self, object_id: str, principal: str, upstream: str) -> None:
        """The upstream has made the object for the principal. No effect for an id that no server gives."""
        if not 0 < len(object_id) <= ID_CHARS_MAX:
            return
        self._forget(object_id, principal)
        if len(self) >= OBJECTS_MAX:
            self._make_room(principal)
        for oldest in self.of(object_id)[: 1 - MAKERS_MAX]:
            self._forget(object_id, oldest.principal)
        self._made[object_id] = (*self._made.pop(object_id, ()), Made(intern(principal), intern(upstream)))
        self._shares.add(principal, object_id)

    def _make_room(self, principal: str) -> None:
        """Forget an object: of the principal that has most, else of the principal itself, else the oldest of all."""
        yielding = self._shares.yielding(principal, lambda object_id: True)
        if yielding is None:
            yielding = next(self._shares.held_by(principal), None) or next(iter(self._made))
        for made in self.of(yielding):
            self._forget(yielding, made.principal)

    def _forget(self, object_id: str, principal: str) -> None:
        rest = tuple(each for each in self.of(object_id) if each.principal != principal)
        self._shares.discard(principal, object_id)
        if rest:
            self._made[object_id] = rest
        else:
            self._made.pop(object_id, None)
