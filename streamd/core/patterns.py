"""Patterns for names: `*` stands for any run of characters, the empty one too; every other character stands for itself.

No `?`, no classes, no escapes, no regular expressions: a pattern comes from a key file or from a token, so it must be
readable at a glance and can't be made slow. A match is a walk of `str.find` from left to right, which is enough
because taking the leftmost place for a literal part never makes the parts after it harder to find.
"""

from __future__ import annotations

from collections.abc import Iterable


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole of `name`, case and all."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == name
    *middle, last = rest
    end = len(name) - len(last)
    at = len(first)
    if at > end or not name.startswith(first) or not name.endswith(last):
        return False
    for part in middle:
        at = name.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether any of `patterns` matches the whole of `name`; an empty list matches nothing."""
    return any(matches(pattern, name) for pattern in patterns)
