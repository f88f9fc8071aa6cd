"""Whether a connection's socket is read: the single place that pauses and resumes reading, for a set of reasons.

Several parts may want a connection to be silent at the same time, each for a reason of its own. The socket is read
again when the last reason is gone. A pause for a turn lasts a few turns of the loop, and a pause for the pace a second
at most, so the peer's FIN is still seen; a pause for backpressure lasts as long as the other side takes nothing.

SmallReads bounds what a read brings: uvloop hands 256,000 bytes at once to an asyncio.Protocol, and a thousand clients
could have that much waiting here. With a buffer of its own a protocol gets no more than the buffer holds. Upstreams'
connections keep the large reads: on the token's way the buffer costs 4 us (docs/ARCHITECTURE.md, Measured, 6).

Why bits of an int, not a set: an unpaused connection refers to the shared 0, so 10,000 of them cost nothing.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final, Protocol

BACKPRESSURE: Final = 1  # the receiver of these bytes takes nothing for now
TURN: Final = 2  # bytes that were read wait for a turn (net/turns.py)
ABOVE: Final = 4  # the protocol above a TLS layer wants no more bytes
PACE: Final = 8  # the socket was read a moment ago, and its next bytes may wait (net/pacing.py)
FROZEN: Final = 16  # the connection's state is being written down for another process (net/frozen.py)

# A request's head (head_bytes_max), and as much as is kept behind a running answer.
READ_BYTES_MAX: Final = 16 * 1024

# Shared by all connections of the process: a read is copied out of it before the next begins.
_BUFFER: Final = memoryview(bytearray(READ_BYTES_MAX))
# Why not os.read(): it makes an object of READ_BYTES_MAX and shrinks it. Between such objects the small ones of streams
# scatter, and live streams take more memory (make bench-headline SCENARIO=stream-memory).
_BUFFERS: Final = (_BUFFER,)


class SmallReads(asyncio.BufferedProtocol):
    """A protocol whose data_received() gets at most READ_BYTES_MAX at once."""

    __slots__ = ()

    # Why static: uvloop keeps what it finds, and a bound method would cost each connection 64 bytes.
    @staticmethod
    def get_buffer(sizehint: int) -> memoryview:
        """As in asyncio.BufferedProtocol."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """As in asyncio.BufferedProtocol."""
        self.data_received(bytes(_BUFFER[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """As in asyncio.Protocol."""
        raise NotImplementedError


class Readable(Protocol):
    """A connection that may be silenced."""

    pauses: int  # the reasons; 0: the socket is read

    @property
    def transport(self) -> asyncio.Transport:
        """The socket's."""


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


def read_past(transport: asyncio.Transport) -> bytes:
    """At most READ_BYTES_MAX bytes that have come on the socket of a paused TCP transport without TLS.

    b"" if none have, and at the end, which the transport meets as well once it reads. Raises OSError for a loss, which
    the transport doesn't: the kernel tells of it once. A transport that doesn't read has left its socket alone, because
    uvloop takes it out of epoll's set.
    """
    try:
        size = os.readv(transport.get_extra_info("socket").fileno(), _BUFFERS)
    except BlockingIOError:
        return b""
    return bytes(_BUFFER[:size])
