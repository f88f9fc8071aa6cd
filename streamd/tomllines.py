"""Lines of the keys of a TOML file: key path to line number.

tomllib gives values without lines, and a refusal without its line sends people searching. This walk runs over a text
that tomllib has already accepted, so it may be simple: it finds the ends of values and never judges them. A path leads
to the value in tomllib's result: ("upstream", 1, "url") is the key `url` of the second `[[upstream]]`; the elements of
an array have paths too. A table has the line of its first header or key.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\s#]+(?: [0-9:.+Zz-]+)?")  # numbers, booleans; a date may hold a space before its time
_STRINGS = (
    re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}', re.S),
    re.compile(r"'''.*?'{3,5}", re.S),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)


def lines_of(text: str) -> dict[KeyPath, int]:
    """Map every key path of a valid TOML document to its line, counted from 1."""
    return _Walk(text).document()


class _Walk:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._found: dict[KeyPath, int] = {}
        self._arrays: dict[KeyPath, int] = {}  # array of tables -> index of its last table

    def document(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self._peek():
            table = self._header() if self._text[self._at] == "[" else self._pair(table)
        return self._found

    def _peek(self) -> str:
        """The next character that is neither blank nor comment, "" at the end."""
        found = _BLANK.match(self._text, self._at)
        assert found is not None  # Why: the pattern matches the empty string
        self._at = found.end()
        return self._text[self._at : self._at + 1]

    def _note(self, path: KeyPath, at: int) -> None:
        self._found.setdefault(path, self._text.count("\n", 0, at) + 1)

    def _header(self) -> KeyPath:
        """Read `[a.b]` or `[[a.b]]`; return the path of the table whose keys follow."""
        start = self._at
        brackets = 2 if self._text.startswith("[[", start) else 1
        self._at += brackets
        names = self._key()
        self._peek()
        self._at += brackets
        path: KeyPath = ()
        for depth, name in enumerate(names):
            path = (*path, name)
            self._note(path, start)
            if brackets == 2 and depth == len(names) - 1:
                self._arrays[path] = self._arrays.get(path, -1) + 1
            if path in self._arrays:
                path = (*path, self._arrays[path])
                self._note(path, start)
        return path

    def _pair(self, table: KeyPath) -> KeyPath:
        """Read `a.b = value` inside `table`; return `table`, which stays current."""
        self._peek()
        start, path = self._at, table
        for name in self._key():
            path = (*path, name)
            self._note(path, start)
        self._peek()
        self._at += 1  # the equals sign
        self._value(path)
        return table

    def _key(self) -> list[str]:
        """Read a dotted key."""
        names: list[str] = []
        while True:
            self._peek()
            bare = _BARE_KEY.match(self._text, self._at)
            if bare is not None:
                names.append(bare[0])
                self._at = bare.end()
            else:
                names.append(tomllib.loads(f"k = {self._string()}")["k"])
            if self._peek() != ".":
                return names
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        first = self._peek()
        if first == "[":
            self._enclosed(path, "]")
        elif first == "{":
            self._enclosed(path, "}")
        elif first in "\"'":
            self._string()
        else:
            found = _SCALAR.match(self._text, self._at)
            assert found is not None  # Why: tomllib has accepted the text, so a value stands here
            self._at = found.end()

    def _enclosed(self, path: KeyPath, end: str) -> None:
        """Read an array or an inline table, and note the lines of its elements or keys."""
        self._at += 1
        index = 0
        while (first := self._peek()) != end:
            if first == ",":
                self._at += 1
                index += 1
            elif end == "]":
                self._note((*path, index), self._at)
                self._value((*path, index))
            else:
                self._pair(path)
        self._at += 1

    def _string(self) -> str:
        """Read a string with its quotes; long kinds come first, or their quotes would read as an empty short string."""
        for pattern in _STRINGS:
            found = pattern.match(self._text, self._at)
            if found is not None:
                self._at = found.end()
                return found[0]
        raise AssertionError("tomllib accepted a text that has no string here")
