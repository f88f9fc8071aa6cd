"""Splice: the bytes of a TLS connection, carried to the worker that owns its stream and back.

The owner sees one end of a socket pair as if it were the client. Flow control is both ends' own: what one can't take,
the other doesn't read. A FIN or a loss on one side ends the other.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast


class Spliced(asyncio.Protocol):
    """One side of it: what it reads goes to `other`."""

    __slots__ = ("other", "transport")

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Spliced | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.take(cast(asyncio.Transport, transport))

    def take(self, transport: asyncio.Transport) -> None:
        """Carry on a transport that another protocol had so far."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        other = self.other
        if other is not None and other.transport is not None and not other.transport.is_closing():
            other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        self._end_other()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end_other()

    def _end_other(self) -> None:
        other, self.other = self.other, None
        if other is not None and other.transport is not None:
            other.transport.close()


def splice_off(loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> socket.socket:
    """Carry `transport` on to one end of a new pair; the other end is returned, for the worker that goes on with it."""
    near, far = socket.socketpair()
    near.setblocking(False)
    outside, inside = Spliced(), Spliced()
    outside.other, inside.other = inside, outside
    transport.pause_reading()
    transport.set_protocol(outside)
    outside.take(transport)
    loop.create_task(_connect(loop, near, inside, transport))
    return far


async def _connect(
    loop: asyncio.AbstractEventLoop, near: socket.socket, inside: Spliced, transport: asyncio.Transport
) -> None:
    await loop.connect_accepted_socket(lambda: inside, near)
    if inside.other is not None:
        transport.resume_reading()
    elif inside.transport is not None:
        inside.transport.close()
