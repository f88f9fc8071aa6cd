"""The bytes that still have to leave through a socket, and the time that a closing connection has for them."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Final

from streamd.config import Settings
from streamd.net.sweep import NEVER

# Unix sockets inherit nothing, and TCP_NOTSENT_LOWAT has no meaning there: 16 KiB are 7.8 KB of small frames before
# EAGAIN, against 50 KB with the default (docs/PROTOCOL.md, section 8).
UNIX_SNDBUF_BYTES: Final = 16 * 1024

# As much as TCP_NOTSENT_LOWAT lets the kernel hold of a reader, and as a catching-up reader is written in a turn.
LARGE_PIECE_BYTES: Final = 16 * 1024

# The writes of an answer in a turn of the loop leave together up to this size: a head, the first events and the end of
# a short answer are 1 to 2 KB, and larger bytes fill packets by themselves.
TOGETHER_BYTES_MAX: Final = 16 * 1024

UNKNOWN: Final = -1  # bytes outstanding before the first look

# Looks at a paused connection's send queue (TIOCOUTQ) per stall_timeout.
STALL_SAMPLES: Final = 4


def outstanding(transport: asyncio.Transport) -> int:
    """Bytes written that the peer's kernel has not acknowledged yet."""
    sock = transport.get_extra_info("socket")
    queued = 0
    if sock is not None:
        packed = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        queued = int(struct.unpack("i", packed)[0])
    return transport.get_write_buffer_size() + queued


class HeldWrites:
    """The writes of an answer in a turn of the loop, which leave together."""

    __slots__ = ("_full", "_pieces", "_size_bytes")

    def __init__(self, full: Callable[[], None]) -> None:
        """`full` is called once more than TOGETHER_BYTES_MAX are held: they wait no longer."""
        self._full = full
        self._pieces: list[bytes] = []
        self._size_bytes = 0

    def add(self, data: bytes) -> None:
        """Hold these bytes, too."""
        self._pieces.append(data)
        self._size_bytes += len(data)
        if self._size_bytes > TOGETHER_BYTES_MAX:
            self._full()

    def joined(self) -> bytes:
        """All of them."""
        return b"".join(self._pieces)


class LargeWrite:
    """Bytes that leave in pieces: the next piece is written when the peer has taken all before it.

    So at most a piece is copied, by the kernel's or the TLS layer's buffer; the rest is a view of bytes that many
    connections may share.
    """

    __slots__ = ("_at", "_parts")

    def __init__(self, parts: list[bytes | memoryview]) -> None:
        self._parts: deque[memoryview] = deque(memoryview(part) for part in parts)
        self._at = 0  # in the first part

    def next_piece(self) -> bytes:
        """The next bytes, at most LARGE_PIECE_BYTES; empty at the end."""
        pieces: list[memoryview] = []
        room = LARGE_PIECE_BYTES
        while self._parts and room:
            part = self._parts[0]
            piece = part[self._at : self._at + room]
            pieces.append(piece)
            room -= len(piece)
            self._at += len(piece)
            if self._at == len(part):
                self._parts.popleft()
                self._at = 0
        return b"".join(pieces)

    @property
    def is_over(self) -> bool:
        """Whether all pieces were given."""
        return not self._parts


class Stall:
    """A pause of a connection. It is stalled if the kernel took no outstanding byte for stall_timeout."""

    __slots__ = ("_left", "_looked_at", "progress_at", "since")

    def __init__(self, now: float) -> None:
        self._left = UNKNOWN
        self.since = self._looked_at = self.progress_at = now

    def is_over(self, transport: asyncio.Transport, now: float, settings: Settings) -> bool:
        """Check whether the peer takes bytes; True if it has taken none for stall_timeout."""
        if not settings.stall_timeout_s:
            return False
        left = outstanding(transport)
        if left != self._left:
            if self._left != UNKNOWN:
                self.progress_at = now
            self._left = left
        self._looked_at = now
        return now - self.progress_at >= settings.stall_timeout_s

    def next_look(self, settings: Settings) -> float:
        """The time of the next look."""
        limit_s = settings.stall_timeout_s
        return min(self._looked_at + limit_s / STALL_SAMPLES, self.progress_at + limit_s) if limit_s else NEVER


# Longest time for which a refused body is read to its end: 32 MiB take 30 s at 9 Mbit/s. A client that goes on sending
# forever would hold its place forever.
LINGER_S_MAX = 30.0


class LastBytes:
    """The last bytes of a closing connection: the peer has time for them while it takes bytes, at most stall_timeout.

    A look every close_timeout checks this. A body that was refused may come to its end meanwhile: a close in the
    middle is a reset, and the client would never see the answer.
    """

    __slots__ = ("_left", "_since", "came_bytes", "unread_bytes_max")

    def __init__(self, now: float, unread_bytes_max: int = 0) -> None:
        self._since = now
        self._left = UNKNOWN
        self.unread_bytes_max = unread_bytes_max  # further bytes of a refused body that are waited for
        self.came_bytes = 0  # since the last look

    def still_come(self, now: float, settings: Settings) -> bool:
        """Whether the refused body came at its least rate since the last look, and isn't too long by now."""
        came, self.came_bytes = self.came_bytes, 0
        self.unread_bytes_max -= came
        is_coming = came >= settings.body_bytes_per_s_min * settings.close_timeout_s
        return is_coming and self.unread_bytes_max > 0 and now - self._since < LINGER_S_MAX

    def may_go_on(self, transport: asyncio.Transport, now: float, settings: Settings) -> bool:
        """Whether the peer has taken bytes since the last look, and there is time left for the rest."""
        left = outstanding(transport)
        is_moving = self._left == UNKNOWN or left < self._left
        self._left = left
        return left > 0 and is_moving and now - self._since < settings.stall_timeout_s
