"""The quick path for a request's JSON: a small body, whole, read by a parser in C.

json_scan.py asks here first, for a body that came at once. The result is the members that are watched, or None for a
body with anything unusual, which the scan then reads. So this module never refuses a body, and takes none that the scan
refuses or reads in another way: a property test compares both for the same bytes, valid and broken.

Usual is a body with all of these:

    size        at most BODY_BYTES_MAX, so that what is built stays below a megabyte; no more containers than may be in
                each other, and no number with too many digits
    members     an object; what is watched in it are scalars of ordinary size
    names       each watched name, in quotes, at most once in the whole body, and no `\\u` in it: so no member is there
                twice, nor in a spelling that the parser undoes; no other name that a careless parser could take for one
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import orjson

BODY_BYTES_MAX: Final = 16 * 1024
# A watched text of this length takes at most 4,096 bytes, the scan's bound.
_TEXT_CHARS_MAX: Final = 512
_MEMBERS_MAX: Final = 1_000  # as many odd names as the scan decodes
_SCALARS: Final = (bool, int, float, type(None))


class QuickMembers:
    """Reads the watched members of an object in which nothing is watched in members."""

    __slots__ = ("_depth_max", "_digits_max", "_fold", "_folded", "_long_number", "_names", "_quoted")

    def __init__(self, names: Iterable[str], fold: Callable[[str], str], *, depth_max: int, digits_max: int) -> None:
        """`fold`: the most careless reading of a name (json_scan.folded)."""
        self._fold = fold
        self._names = frozenset(names)
        self._folded = frozenset(map(fold, self._names))
        self._quoted = tuple(b'"%b"' % name.encode() for name in self._names)
        self._depth_max = depth_max
        self._digits_max = digits_max
        self._long_number = re.compile(b"[0-9]{%d}" % (digits_max + 1)).search

    def read(self, data: bytes | bytearray) -> dict[str, Any] | None:
        """The watched members of a whole body; None: the scan has to look at it."""
        if len(data) > BODY_BYTES_MAX or b"\\u" in data:
            return None
        if len(data) > self._digits_max and self._long_number(data):
            return None
        if data.count(b"[") + data.count(b"{") > self._depth_max:
            return None
        for quoted in self._quoted:
            at = data.find(quoted)
            if at >= 0 and data.find(quoted, at + 1) >= 0:
                return None
        try:
            members = orjson.loads(data)
        except orjson.JSONDecodeError:
            return None
        if type(members) is not dict or len(members) > _MEMBERS_MAX:
            return None
        found: dict[str, Any] = {}
        names, fold, folded = self._names, self._fold, self._folded
        for name, value in members.items():
            if name in names:
                if type(value) is str:
                    if len(value) > _TEXT_CHARS_MAX:
                        return None
                elif type(value) not in _SCALARS:
                    return None
                found[name] = value
            elif fold(name) in folded:
                return None
        return found
