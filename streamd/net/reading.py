"""Whether a connection's socket is read: the single place that pauses and resumes reading, for a set of reasons.

Several parts may want a connection to be silent at the same time, each for a reason of its own. The socket is read
again when the last reason is gone. A pause for a turn lasts a few turns of the loop, so the peer's FIN is still seen;
a pause for backpressure lasts as long as the other side takes nothing.

Why bits of an int, not a set: an unpaused connection refers to the shared 0, so 10,000 of them cost nothing.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

BACKPRESSURE: Final = 1  # the receiver of these bytes takes nothing for now
TURN: Final = 2  # bytes that were read wait for a turn (net/turns.py)
ABOVE: Final = 4  # the protocol above a TLS layer wants no more bytes


class Readable(Protocol):
    """A connection that may be silenced."""

    transport: asyncio.Transport
    pauses: int  # the reasons; 0: the socket is read


def pause_reading(connection: Readable, reason: int) -> None:
    """Read nothing more while `reason` holds. Pausing twice for a reason is pausing once."""
    if not connection.pauses:
        connection.transport.pause_reading()
    connection.pauses |= reason


def resume_reading(connection: Readable, reason: int) -> None:
    """The reason is gone: read on, unless there is another."""
    pauses = connection.pauses
    if pauses & reason:
        connection.pauses = pauses & ~reason
        if not connection.pauses and not connection.transport.is_closing():
            connection.transport.resume_reading()
