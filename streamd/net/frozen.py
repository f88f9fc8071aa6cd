"""Frozen connections: nothing touches them while their state is written down for another process.

A frozen connection is in no registry that acts by itself (handover/freezing.py), its socket isn't read (FROZEN in
net/reading.py), and a stand-in is the protocol of its transport. The stand-in remembers what the transport has told.
If the connection goes on here after all, thaw() tells it, and nothing shows that it was frozen.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from streamd.net.reading import FROZEN, pause_reading, resume_reading


class NotNow(ValueError):
    """The object is in the middle of something that ends in a few turns of the loop; then it can be frozen or told."""


class Freezable(Protocol):
    """A connection, as the protocol of its transport."""

    pauses: int

    @property
    def transport(self) -> asyncio.Transport:
        """The socket's."""

    def pause_writing(self) -> None:
        """As in asyncio.Protocol."""

    def resume_writing(self) -> None:
        """As in asyncio.Protocol."""

    def connection_lost(self, exc: Exception | None) -> None:
        """As in asyncio.Protocol."""


class StandIn(asyncio.Protocol):
    """The protocol of a frozen connection's transport."""

    __slots__ = ("_connection", "_is_full", "_lost", "_was_full")

    def __init__(self, connection: Freezable, *, is_full: bool) -> None:
        """Freezes the connection. `is_full`: its transport takes nothing more for now, as far as it knows."""
        self._connection = connection
        self._is_full = self._was_full = is_full
        self._lost: tuple[Exception | None] | None = None
        pause_reading(connection, FROZEN)
        connection.transport.set_protocol(self)

    def thaw(self) -> None:
        """The connection goes on here."""
        connection = self._connection
        if self._lost is not None:  # a lost transport has no protocol any more: the two would keep each other
            connection.connection_lost(*self._lost)
            return
        connection.transport.set_protocol(connection)  # type: ignore[arg-type]  # a protocol in all but its base
        resume_reading(connection, FROZEN)
        if self._is_full and not self._was_full:
            connection.pause_writing()
        elif self._was_full and not self._is_full:
            connection.resume_writing()

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended meanwhile."""
        return self._lost is not None

    # -- transport callbacks. A socket that isn't read shows neither bytes nor a FIN.

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = (exc,)
