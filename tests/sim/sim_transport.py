"""A connection between the code under test and a peer of the simulation, with uvloop's behaviour.

write() hands over as many bytes as the peer's side has room for; the rest stays here, and pause_writing() is called at
once, inside write(), when the rest exceeds the high-water mark. Resuming, losing and closing happen at the same points
as in uvloop: abort() and an error call connection_lost() in the next turn; close() calls it only when all bytes were
taken, so never with a stalled peer.

It is stricter than uvloop in one respect: writing after one's own close(), abort() or write_eof() is always an error.
After the *peer's* reset a write is silent until connection_lost(), since the writer can't know of the reset yet.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from sim_loop import Violation, VirtualLoop

from streamd.net.frozen import StandIn
from streamd.net.reading import READ_BYTES_MAX

UNHEARD_S = 0.02  # after which a reset that would go unnoticed is tried again


class Peer(Protocol):
    """The other side of a connection."""

    def took(self, data: bytes) -> None:
        """Bytes arrived."""

    def ended(self, how: str) -> None:
        """No further bytes arrive: "fin" after everything written, "abort" when the rest was thrown away."""

    def delivers(self, length: int) -> None:
        """This number of sent bytes is about to be read."""


def connection_of(transport: Transport) -> Any:
    """The connection of streamd's on this transport, also while it is frozen."""
    protocol = transport.protocol
    return protocol._connection if isinstance(protocol, StandIn) else protocol


class Transport(asyncio.Transport):
    """The side of a connection that the code under test holds."""

    __slots__ = (
        "_high",
        "_incoming",
        "_incoming_eof",
        "_loop",
        "_reading",
        "_touched",
        "aborted",
        "buffer",
        "closed_at",
        "closing",
        "eof_received",
        "eof_written",
        "gone",
        "kernel",
        "lost",
        "name",
        "opened_at",
        "owner",
        "peer",
        "protocol",
        "resumed_at",
        "room",
        "taken_at",
        "timed_out",
        "told_paused",
        "written_at",
    )

    def __init__(self, loop: VirtualLoop, peer: Peer, name: tuple[str, int], touched: list[Transport]) -> None:
        self._loop = loop
        self._touched = touched
        self.peer: Peer | None = peer
        self.owner = peer  # also once it is lost: bytes that came before may be read later
        self.name = name
        self.protocol: Any = None
        self.room = 1 << 60  # bytes that the peer's side still takes
        self.buffer = bytearray()
        self.kernel = bytearray()  # taken by the kernel of a process before, though the peer had no room
        self._high = 64 * 1024
        self.told_paused = False
        self._reading = True
        self._incoming: list[bytes] = []  # arrived while reading was paused
        self._incoming_eof = False
        self.eof_written = False
        self.closing = False  # close() or abort() was called
        self.aborted = False
        self.gone = False  # the peer reset it: connection_lost() is on its way
        self.lost = False  # connection_lost() was called
        # the history, with times
        self.eof_received = False  # the protocol was told of the peer's FIN
        self.timed_out = False  # gone, because the network gave up
        # taken_at: the peer took bytes, or the buffer filled
        self.opened_at = self.resumed_at = self.written_at = self.taken_at = loop.time()
        self.closed_at = 0.0

    # -- called by the code under test

    def write(self, data: Any) -> None:
        self._touched.append(self)
        self.written_at = self._loop.now
        if self.closing or self.lost or self.eof_written:
            raise RuntimeError("write() after the end")
        if self.gone or not data:
            return
        if self.buffer or self.kernel:
            self.buffer += data
            self._pause_if_full()
            return
        length = len(data)
        if length <= self.room:
            self.room -= length
            self._hand_over(bytes(data))
            return
        taken = self.room
        self.room = 0
        if taken:
            self._hand_over(bytes(data[:taken]))
        self.buffer += data[taken:]
        self._pause_if_full()

    def _pause_if_full(self) -> None:
        if len(self.buffer) > self._high and not self.told_paused:
            self.told_paused = True
            self.taken_at = self._loop.now
            self._loop.steps += 1
            self.protocol.pause_writing()

    def _hand_over(self, data: bytes) -> None:
        """Give bytes to the peer. Its violations are not for the code under test to catch."""
        assert self.peer is not None
        try:
            self.peer.took(data)
        except Violation as violation:
            self._loop.failed.append(violation)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.name if name == "peername" else default

    def is_closing(self) -> bool:
        return self.closing or self.gone

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.closing and not self.eof_written
        self.eof_written = True
        self._send_the_rest()
        if not self.buffer and not self.gone and self.peer is not None:
            self.peer.ended("fin")

    def pause_reading(self) -> None:
        if self.closing or self.gone or not self._reading:
            return
        self._reading = False

    def resume_reading(self) -> None:
        if self.closing or self.gone or self._reading:
            return
        self._reading = True
        self.resumed_at = self._loop.now
        if self._incoming or self._incoming_eof:
            self._loop.io(0.0, self._deliver)

    @property
    def reading(self) -> bool:
        return self._reading

    def is_reading(self) -> bool:
        return self._reading and not self.closing

    def close(self) -> None:
        if self.closing or self.lost:
            return
        self._touched.append(self)
        self.closing = True
        self.closed_at = self._loop.now
        if not self.buffer and not self.gone:
            self._lose_soon(None)

    def abort(self) -> None:
        if self.aborted or self.lost or self.gone:
            self.closing = True
            return
        self._touched.append(self)
        flushed = self.closing and not self.buffer
        self.closing = self.aborted = True
        self.buffer.clear()
        if not flushed:
            self._lose_soon(None)

    def _lose_soon(self, exc: Exception | None) -> None:
        self._loop.call_soon(self._lose, exc)

    def _lose(self, exc: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        self._touched.append(self)
        self.buffer.clear()
        self._incoming.clear()
        protocol, self.protocol = self.protocol, None
        protocol.connection_lost(exc)
        waits = getattr(protocol, "_ended_by", None) is not None  # for a turn, behind bytes that came before the end
        # A connection to the engine has no state of this kind.
        at = None if isinstance(protocol, StandIn) else getattr(protocol, "at", None)
        if at is not None and at.value not in ("lost", "closed") and not waits:
            self._loop.failed.append(Violation(f"lost, but {protocol.at}"))
        self._send_the_rest()
        peer, self.peer = self.peer, None
        if peer is not None and not self.gone:
            peer.ended("abort" if self.aborted else "fin")

    # -- called by the network

    def grant(self, length: int) -> None:
        """The peer reads: there is room for this number of further bytes."""
        if self.lost or self.aborted or self.gone:
            return
        self.room += length
        self._drain_kernel()
        if not self.buffer or self.kernel:
            return
        taken = min(self.room, len(self.buffer))
        if taken:
            self.taken_at = self._loop.now
        piece = bytes(self.buffer[:taken])
        del self.buffer[:taken]
        self.room -= taken
        self._touched.append(self)
        if piece:
            self._hand_over(piece)
        if self.buffer:
            return
        if self.told_paused:
            self.told_paused = False
            self._loop.steps += 1
            self.protocol.resume_writing()
        if self.buffer:
            return
        if self.closing:
            self._lose_soon(None)
        elif self.eof_written and self.peer is not None:
            self.peer.ended("fin")

    def _drain_kernel(self) -> None:
        taken = min(self.room, len(self.kernel))
        if taken:
            self.taken_at = self._loop.now
            self.room -= taken
            piece = bytes(self.kernel[:taken])
            del self.kernel[:taken]
            self._touched.append(self)
            self._hand_over(piece)

    def _send_the_rest(self) -> None:
        """The kernel goes on sending what it has taken, whatever becomes of the socket."""
        if self.kernel and not self.gone:
            self._hand_over(bytes(self.kernel))
        self.kernel.clear()

    def heir(self) -> Transport:
        """The same socket as another process has it. Bytes that were still to be sent have gone to the kernel, which
        has room for them if it has to, and then takes no more until the peer has read them.
        """
        assert self.peer is not None and not (self.closing or self.lost or self.gone)
        heir = Transport(self._loop, self.peer, self.name, self._touched)
        for name in ("room", "opened_at", "resumed_at", "written_at", "taken_at"):
            setattr(heir, name, getattr(self, name))
        heir.kernel = self.kernel + self.buffer
        heir._incoming, heir._incoming_eof = self._incoming, self._incoming_eof or self.eof_received
        self.lost, self.peer, self.protocol = True, None, None
        return heir

    def receive(self, data: bytes) -> None:
        """The peer's bytes arrive."""
        if self.closing or self.lost or self.gone:
            return
        self._incoming.append(data)
        self._deliver()

    def read_past(self) -> bytes:
        """What has come while the code under test doesn't read. A model of net/reading.py's read_past()."""
        if self._reading or not self._incoming or self.closing or self.lost or self.gone:
            return b""
        come = b"".join(self._incoming)
        data, left = come[:READ_BYTES_MAX], come[READ_BYTES_MAX:]
        self._incoming[:] = [left] if left else []
        self._touched.append(self)
        if self.peer is not None:
            self.peer.delivers(len(data))
        self._loop.steps += 1
        return data

    def receive_eof(self) -> None:
        """The peer's FIN arrives."""
        self._incoming_eof = True
        self._deliver()

    def _deliver(self) -> None:
        while self._incoming and self._reading and not self.closing and not self.lost and not self.gone:
            data = self._incoming.pop(0)
            self._touched.append(self)
            if self.peer is not None:
                self.peer.delivers(len(data))
            self._loop.steps += 1
            self.protocol.data_received(data)
        if self._incoming_eof and self._reading and not (self._incoming or self.closing or self.lost or self.gone):
            self._incoming_eof = False
            self._reading = False  # no bytes can come any more
            self.eof_received = True
            self._touched.append(self)
            self._loop.steps += 1
            if not self.protocol.eof_received():
                self.close()

    @property
    def hears_nothing(self) -> bool:
        """Whether a reset would go unnoticed for now: bytes that came before it lie unread, and none are to be sent."""
        is_open = not (self.closing or self.lost or self.gone or self.eof_received)
        return is_open and not self._reading and not self.buffer

    def receive_reset(self, exc: Exception) -> None:
        """The peer's RST arrives, or the network gives up. The peer waits while `hears_nothing`."""
        if self.lost or self.gone or self.aborted:
            return
        if self.closing and not self.buffer:
            return
        self.gone = True
        self.timed_out = isinstance(exc, TimeoutError)
        self.buffer.clear()
        self._lose_soon(exc)
