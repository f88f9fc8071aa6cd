"""Choice: an Enum for dictionary keys.

Members are singletons, so their identity is as good a hash as any. Enum's own hashes the member's name, in Python:
0.25 us for each look-up in a transition table or a table of counters, and closing a connection makes fourteen.
"""

from __future__ import annotations

import enum


class Choice(enum.Enum):
    """A member of a closed list."""

    __hash__ = object.__hash__
