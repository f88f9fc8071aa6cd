"""How the members of neighbouring text deltas merge: a table for each API, and the judgement of an event by it.

Events of a stream are merged for readers that catch up. What an SDK accumulates must not change by it, and SDKs do
three things with a member that they don't know: they concatenate strings and lists, add numbers up, or keep the last
value. So an event merges only if *every* member is known to be safe. A member that is null adds nothing to any SDK's
state, and neither does an empty string, list or object of a member that is in the table.

A table lists the members that servers send, by their path; `[]` stands for the elements of a list. Members that aren't
in it are APART.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from streamd.choice import Choice
from streamd.wire.dialects.members import Json


class Merge(Choice):
    """What becomes of a member when its event is merged with its neighbour."""

    TEXT = "concatenated"
    EQUAL = "equal, or not merged"
    FIRST = "the first value stands"
    LAST = "the last value stands"
    COUNT = "the last value stands, if both have it"
    REPEATED = "not merged; may repeat unchanged"  # such events fit a template of the log
    VARIED = "not merged; may vary"  # such events fit a template with holes in this member
    APART = "not merged"
    INSIDE = "by its own members"


Rules = Mapping[str, Merge]

# A value of these prevents nothing; EQUAL is compared later. COUNT and the texts are looked at by their users.
_SAFE: Final = frozenset((Merge.TEXT, Merge.EQUAL, Merge.FIRST, Merge.LAST, Merge.COUNT, Merge.INSIDE))


class Merging:
    """The table of an API, taken apart into the rules of each level."""

    __slots__ = ("_levels", "compared_not", "counted", "last", "table", "top", "varied")

    def __init__(self, table: Rules, *, listed: str = "") -> None:
        """`listed`: the list of choices, which are compared each by itself."""
        self.table = table
        self._levels: dict[str, dict[str, Merge]] = {"": {}}
        for path, rule in table.items():
            self._set(path, rule)
        self.top = self._levels[""]
        self.counted = tuple(name for name, rule in self.top.items() if rule is Merge.COUNT)
        self.last = (*self.counted, *(name for name, rule in self.top.items() if rule is Merge.LAST))
        self.varied = tuple(path for path, rule in table.items() if rule is Merge.VARIED)
        changing = (name for name, rule in self.top.items() if rule in (Merge.FIRST, Merge.LAST))
        self.compared_not = frozenset((*changing, listed))

    def _set(self, path: str, rule: Merge) -> None:
        level, _, name = path.rpartition(".")
        self._levels.setdefault(level, {})[name] = rule
        if level:
            holder, _, container = level.removesuffix("[]").rpartition(".")
            if container not in self._levels.get(holder, {}):
                self._set(level.removesuffix("[]"), Merge.INSIDE)

    def at(self, level: str) -> Rules:
        """The rules of a level, by name."""
        return self._levels[level]


def merges(members: Json, rules: Rules) -> bool | None:
    """Whether these members let their event be merged. None: nor may the event repeat."""
    may = True
    for name, value in members.items():
        if value is None:
            continue
        rule = rules.get(name)
        if rule in _SAFE:
            continue
        if rule is None:
            return None
        if not value and isinstance(value, (str, list, dict)):
            continue
        if rule is Merge.APART:
            return None
        may = False
    return may
