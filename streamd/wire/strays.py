"""Strays: lines of an upstream's body that no parser of events takes, counted for the log without a word of their text.

JSON under the type of a stream is such a line, and so is `error: {…}`. A line may hold a prompt or an answer, so that
only the name of its field is kept, and of JSON and of free text not even a part.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Names kept of a stream: servers that stray send the same line again and again.
NAMES_MAX: Final = 8
# The fields of the standard and of servers' own have a word; longer text in front of a colon is a sentence.
_name = re.compile(rb"([A-Za-z][A-Za-z0-9_-]{0,31}):").match
_JSON: Final = (b"{", b"}", b"[", b"]", b'"')


class StraysState(NamedTuple):
    """The counts of Strays."""

    lines: int
    bytes: int
    names: tuple[str, ...]


class Strays:
    """The lines that were dropped of a stream."""

    __slots__ = ("bytes", "lines", "names")

    def __init__(self) -> None:
        self.lines = 0
        self.bytes = 0
        self.names: tuple[str, ...] = ()

    def state(self) -> StraysState:
        """What go_on_from() takes."""
        return StraysState(self.lines, self.bytes, self.names)

    def go_on_from(self, state: StraysState) -> None:
        """Take the counts of others. Raises ValueError for counts that can't be."""
        if not 0 <= state.lines <= state.bytes or len(state.names) > NAMES_MAX:
            raise ValueError("dropped lines that can't be counted so")
        self.lines, self.bytes, self.names = state

    def add(self, lines: bytes) -> None:
        """Count lines, each with its LF."""
        self.lines += lines.count(b"\n")
        self.bytes += len(lines)
        if len(self.names) < NAMES_MAX:
            found = (_field_of(line) for line in lines.splitlines()[:NAMES_MAX])
            self.names = tuple(dict.fromkeys((*self.names, *found)))[:NAMES_MAX]

    def told(self) -> str:
        """The lines in words, for the reader that doesn't get them."""
        lines = "1 line that is no event" if self.lines == 1 else f"{self.lines} lines that are no events"
        return f"{lines} ({', '.join(self.names)})"


def _field_of(line: bytes) -> str:
    if line.startswith(_JSON):
        return "(JSON)"
    named = _name(line)
    return named[1].decode() if named else "(text)"
