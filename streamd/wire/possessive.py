"""Possessive groups, as `(?:ab?c)*+`, that mean the same on each Python from 3.11 on.

Before 3.11.5 (CPython gh-100061) such a group keeps the place where its last repetition failed, so `(?:ab?c)*+` takes
the "a" of "abca" as well; Debian 12 has 3.11.2. A last alternative that never matches goes back to where the repetition
began. Later versions get the pattern as it is.

Rejected: atomic groups, `(?>(?:ab?c)*)`, are right on all versions, but keep a record of each repetition: of a body
with 500,000 values that is more memory than the body.
"""

from __future__ import annotations

import re
import sys
from typing import AnyStr, Final

# The end of a possessive group; escapes and sets of characters are stepped over.
_ENDS: Final = re.compile(rb"\\.|\[\^?\]?(?:\\.|[^\\\]])*\]|(\))(?=(?:[*+?]|\{[0-9,]+\})\+)", re.DOTALL)
_IS_NEEDED: Final = sys.version_info < (3, 11, 5)


def guarded(pattern: AnyStr) -> AnyStr:
    """The pattern, with an alternative that never matches in each possessive group."""
    if isinstance(pattern, str):
        return guarded(pattern.encode()).decode()
    return _ENDS.sub(lambda end: b"|(?!))" if end[1] else end[0], pattern)


def compiled(pattern: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """re.compile() of a pattern with possessive groups."""
    return re.compile(guarded(pattern) if _IS_NEEDED else pattern, flags)
