"""Via: the servers that a request has passed (RFC 9110 7.6.3). By its own name in it streamd finds a circle.

An upstream's URL that leads back to streamd, directly or by another server, would make a single request ask for itself
until all connections, streams and descriptors are taken. The field alone shows it, and no state: a request that has
passed a streamd more often than any sound chain of them is refused.
"""

from __future__ import annotations

from typing import Final

OWN: Final = b"1.1 streamd"

# Sound chains have two or three: a region's, a cluster's, a machine's. Doubled and rounded up.
PASSES_MAX: Final = 8

_NAME: Final = OWN.split()[1]


def passes(via: bytes | None) -> int:
    """How often a streamd is among the servers that a request has passed; `via` is the field's value, None if absent.

    A pseudonym's case and the words behind it don't count.
    """
    if via is None:
        return 0
    return sum(element.lower().split()[1:2] == [_NAME] for element in via.split(b","))
