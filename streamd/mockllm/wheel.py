"""A timing wheel: wakes ten thousand streams once a second each, with a single timer.

An entry lies in the slot of its due time. An entry that is due later than a full round lies in the same slot, and is
put back when the hand passes. Entries are never removed: the caller of turn() drops those that have died meanwhile.
Order within a slot is the order of arrival. Invariant: every entry lies in a slot that the hand has yet to reach.
"""

from __future__ import annotations

from typing import Final, Generic, Protocol, TypeVar

# A quarter of the shortest interval that models have (about 20 ms), and 200 wake-ups a second at most.
SLOT_S: Final = 0.005
SLOTS: Final = 1024  # 5.12 s a round, so an interval of a second, usual under load, never takes a second round


class HasDue(Protocol):
    """An object with the time at which it wants to be woken (seconds, monotonic)."""

    due: float


Entry = TypeVar("Entry", bound=HasDue)


class Wheel(Generic[Entry]):
    """Entries by due time, in slots of `slot_s` seconds."""

    __slots__ = ("_count", "_hand", "_slot_s", "_slots")

    def __init__(self, now: float, slot_s: float = SLOT_S, slots: int = SLOTS) -> None:
        self._slot_s = slot_s
        self._slots: list[list[Entry]] = [[] for _ in range(slots)]
        self._hand = self._slot_of(now)  # the last slot that was emptied
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _slot_of(self, when: float) -> int:
        return int(when / self._slot_s)

    def add(self, entry: Entry) -> None:
        """Wake `entry` at `entry.due`, or at the hand's next turn if that time has passed."""
        slot = max(self._slot_of(entry.due), self._hand + 1)
        self._slots[slot % len(self._slots)].append(entry)
        self._count += 1

    def turn(self, now: float) -> list[Entry]:
        """All entries that are due. Call it at least once per `next_turn`; a late call catches up."""
        goal = self._slot_of(now)
        due: list[Entry] = []
        # Why: a hand that is more than a round late empties each slot once, not once per missed round.
        for slot in range(max(self._hand + 1, goal - len(self._slots) + 1), goal + 1):
            self._hand = slot
            due += self._empty(slot, goal)
        self._hand = max(self._hand, goal)
        return due

    def _empty(self, slot: int, goal: int) -> list[Entry]:
        entries = self._slots[slot % len(self._slots)]
        if not entries:
            return entries
        self._slots[slot % len(self._slots)] = []
        self._count -= len(entries)
        due = [entry for entry in entries if self._slot_of(entry.due) <= goal]
        if len(due) < len(entries):
            for entry in entries:
                if self._slot_of(entry.due) > goal:
                    self.add(entry)
        return due

    def next_turn(self) -> float:
        """When the hand's next slot begins (seconds, monotonic)."""
        return (self._hand + 1) * self._slot_s
