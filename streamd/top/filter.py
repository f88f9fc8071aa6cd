"""The filter of `streamd top`: words, all of which a row must have.

`key=alice` and its like are exact, and the daemon applies them where its table has such a filter, over all its rows;
other words are looked for in the rows that the daemon sent, in upper and lower case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

# Members of rows that a word of the form name=value can name.
NAMES = ("key", "upstream", "model", "stream", "state")


class Filter(NamedTuple):
    """The words of a filter."""

    exact: tuple[tuple[str, str], ...] = ()  # names and values
    words: tuple[str, ...] = ()  # lower case

    @classmethod
    def parse(cls, text: str) -> Self:
        """The filter that a person typed. No text is a mistake: a name that isn't known is a word like any other."""
        exact, words = [], []
        for word in text.split():
            name, equals, value = word.partition("=")
            if equals and value and name in NAMES:
                exact.append((name, value))
            else:
                words.append(word.lower())
        return cls(tuple(exact), tuple(words))

    def query(self, known: Iterable[str]) -> dict[str, str]:
        """The exact words that the daemon's table knows, for its query."""
        allowed = set(known)
        return {name: value for name, value in self.exact if name in allowed}

    def has(self, row: Mapping[str, Any], cells: Iterable[str], asked: Iterable[str]) -> bool:
        """Whether a row passes, by its members and its cells. `asked`: names that the daemon has filtered by."""
        known = set(asked)
        for name, value in self.exact:
            if name not in known and name in row and value not in (str(row[name]), row.get(f"{name}_name")):
                return False
        if not self.words:
            return True
        text = " ".join([*cells, *(str(row.get(member)) for member in _HIDDEN if row.get(member))]).lower()
        return all(word in text for word in self.words)


# Members that a person has from a log line, and that may have no column.
_HIDDEN = ("id", "request", "key", "stream", "peer")
