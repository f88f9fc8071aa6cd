"""TLS in process: a layer between the socket's transport and a ClientConnection. It is a protocol to the transport, and
a transport to the connection.

Why not the loop's own: uvloop's TLS transport keeps the socket's default 64 KiB in front of pause_writing(), with no
way to lower it; it flaps with a high-water mark of 0; it has no half-close; and it has a read buffer of 256 KiB for
every connection. Here pause_writing() and resume_writing() are the socket's own, so a slow reader is noticed at the
byte at which the kernel took less than all, with or without TLS; write_eof() sends close_notify and a FIN, so lingering
works; and the PROXY header can come first.

A write never raises: OpenSSL refuses it after some of what a peer may send (half of a KeyUpdate), and this ends the
connection, in a later turn of the loop.

Bounds: OpenSSL's memory BIOs grow to the largest piece that passes through them and never shrink, so every piece is at
most PIECE_BYTES_MAX. A handshake has no deadline of its own: the connection exists from accept on, and its head_timeout
is absolute. Renegotiation and compression are off.

Input is bounded like any other (net/turns.py). The steps of a handshake wait for their share of a turn
(net/handshakes.py), and OpenSSL sees a hello only after wire/client_hello.py has. Records count by the bytes that they
take beside their data, so key updates and records without data cost as much as those with data. While the peer takes
nothing, OpenSSL is given nothing: it would answer each key update, into a buffer without a bound. Bytes of such a peer
are still read, up to HELD_BYTES_MAX, so that its FIN is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any, Final

from streamd.core.guard import guarded
from streamd.net.client import ClientConnection
from streamd.net.reading import ABOVE, BACKPRESSURE, TURN, SmallReads, pause_reading, resume_reading
from streamd.net.runtime import Runtime
from streamd.net.tls_files import load_pair
from streamd.net.turns import CONNECTION_PIECES_MAX, TakesTurns, pieces_of
from streamd.reasons import CloseReason
from streamd.wire.client_hello import ClientHelloCheck, HelloRefused

# A quarter of a TLS record (RFC 8446 5.1): twenty tokens in a piece, and 12 KB less for each BIO that ever saw a body.
PIECE_BYTES_MAX: Final = 4 * 1024

# The least that a record takes beside its data: head, type and tag (RFC 8446 5.2). TLS 1.2 takes more.
RECORD_BYTES_MIN: Final = 5 + 1 + 16

# Bytes kept of a peer that takes nothing: a request's head, as behind a running answer (pipeline_bytes_max).
HELD_BYTES_MAX: Final = 16 * 1024

# A fatal alert, handshake_failure (RFC 8446 6.2), in the clear.
_HANDSHAKE_FAILURE: Final = b"\x15\x03\x03\x00\x02\x02\x28"

_GONE: Final = asyncio.Protocol()  # replaces a protocol that was told of the loss: no cycle remains for the collector


def load_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context of two PEM files. Raises TlsFilesError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    load_pair(context, cert, key)
    return context


class TlsLayer(TakesTurns, asyncio.Transport, SmallReads):
    """The TLS of a connection."""

    __slots__ = (
        "_connection",
        "_ended",
        "_fin_waits",
        "_held",
        "_hello",
        "_incoming",
        "_open",
        "_outgoing",
        "_protocol",
        "_raw",
        "_runtime",
        "_tls",
        "pauses",
    )

    _runtime: Runtime

    def __init__(self, context: ssl.SSLContext, connection: ClientConnection) -> None:
        super().__init__()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._protocol: ClientConnection | asyncio.Protocol = connection
        self._connection: ClientConnection | None = connection
        self._raw: asyncio.Transport
        self._open = False  # whether the handshake is done
        self._ended = False  # close_notify is out: no more reads or writes
        self._runtime = connection.origin.entrance.runtime
        self.pauses = 0
        self._held = b""  # bytes that were read, and that OpenSSL hasn't seen
        self._hello: ClientHelloCheck | None = ClientHelloCheck()  # None: the handshake is done
        self._fin_waits = False  # the peer has ended, and the connection will be told when it has taken all before

    # -- protocol of the socket's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = transport  # type: ignore[assignment]  # uvloop's has another base
        self._protocol.connection_made(self)

    @guarded
    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._held += data
        if self.pauses & TURN:
            return
        if not self._open:
            pause_reading(self, TURN)
            self._runtime.handshakes.wait(self, self._address)
        elif self._is_held_back:
            if len(self._held) > HELD_BYTES_MAX:
                pause_reading(self, BACKPRESSURE)
        else:
            self.work_or_wait()

    @guarded
    def eof_received(self) -> bool:
        if self.pauses & (TURN | ABOVE):
            self._fin_waits = True
        else:
            self._protocol.eof_received()
        return True

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    @guarded
    def resume_writing(self) -> None:
        self._protocol.resume_writing()
        self._go_on(BACKPRESSURE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._held = b""
        self._fin_waits = False
        self._protocol.connection_lost(exc)
        self._protocol = _GONE
        self._connection = None

    # -- input

    @property
    def transport(self) -> asyncio.Transport:  # type: ignore[override]  # of TakesTurns
        """The socket's."""
        return self._raw

    @property
    def share(self) -> str:
        return self._connection.share if self._connection is not None else f"address {self._address}"

    @property
    def _address(self) -> str:
        return (self._connection is not None and self._connection.origin.address) or ""

    @property
    def _is_held_back(self) -> bool:
        """Whether the peer takes nothing, or the connection above wants nothing."""
        return bool(self.pauses & ABOVE) or self._raw.get_write_buffer_size() > 0

    @guarded
    def shake(self) -> None:
        """It is this handshake's turn: take all of its bytes that have come."""
        hello = self._hello
        try:
            while self._held and hello is not None:
                piece, self._held = self._held[:PIECE_BYTES_MAX], self._held[PIECE_BYTES_MAX:]
                hello.feed(piece)
                self._incoming.write(piece)
                if self._shake():
                    hello = self._hello = None
        except (HelloRefused, ssl.SSLError) as error:
            self._refuse(error)
            return
        self._flush()
        if self._open:
            self._runtime.turns.wait(self)  # to read the bytes behind the handshake
        else:
            resume_reading(self, TURN)
            self._tell_fin()

    @guarded
    def give_up(self) -> None:
        """Too many handshakes wait."""
        self._abort(CloseReason.OVER_BUDGET)

    def _refuse(self, error: HelloRefused | ssl.SSLError) -> None:
        if isinstance(error, HelloRefused) and not self._raw.is_closing():
            self._raw.write(_HANDSHAKE_FAILURE)
        self._flush()  # OpenSSL's alert
        self._abort(CloseReason.TLS_FAILED)

    def _abort(self, reason: CloseReason) -> None:
        self._held = b""
        if self._connection is not None:
            self._connection.abort(reason)
        else:
            self.abort()

    @guarded
    def work(self) -> bool:
        """Decrypt a turn's share of the bytes that were read, and hand it on. True: more wait for the next turn."""
        left = CONNECTION_PIECES_MAX
        pieces: list[bytes] = []
        is_open = not self._ended
        try:
            while is_open and left > 0 and not self._is_held_back:
                piece, self._held = self._held[:PIECE_BYTES_MAX], self._held[PIECE_BYTES_MAX:]
                before = len(pieces)
                self._incoming.write(piece)
                is_open = self._read(pieces)
                data_bytes = sum(map(len, pieces[before:]))
                left -= pieces_of(len(piece)) + max(0, len(piece) - data_bytes) // RECORD_BYTES_MIN
                self._flush()  # key updates; may be more than the peer takes
                if not self._held:
                    break
        except ssl.SSLError as error:
            self._refuse(error)
            return False
        self._runtime.turns.spend(CONNECTION_PIECES_MAX - left)
        if pieces:
            self._protocol.data_received(b"".join(pieces))
        if not is_open:
            self._held = b""
            self._fin_waits = not self._ended
        if self.pauses & ABOVE:
            resume_reading(self, TURN)  # the connection goes on with it
            return False
        if left <= 0 or (self._held and not self._is_held_back):
            return True
        resume_reading(self, TURN)
        self._tell_fin()
        return False

    def _tell_fin(self) -> None:
        if self._fin_waits:
            self._fin_waits = False
            if not self._raw.is_closing():
                self._protocol.eof_received()

    def _go_on(self, reason: int) -> None:
        """A reason to hold bytes back is gone."""
        resume_reading(self, reason)
        if self.pauses & (TURN | ABOVE) or self._raw.is_closing():
            return
        if self._open and (self._held or self._incoming.pending):
            self.wait_for_turn()
        else:
            self._tell_fin()

    def _shake(self) -> bool:
        """Whether the handshake is done. Raises ssl.SSLError if it fails."""
        if not self._open:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
            self._open = True
        return True

    def _read(self, pieces: list[bytes]) -> bool:
        """Read all decrypted bytes; False after close_notify. Raises ssl.SSLError for an invalid record."""
        try:
            while piece := self._tls.read(PIECE_BYTES_MAX):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            return True
        return False

    def _flush(self) -> None:
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    # -- transport of the connection

    def write(self, data: Any) -> None:
        """Encrypt and send; never raises. Before the handshake is done no bytes can be sent, so `data` is dropped."""
        if not self._open or self._ended:
            return
        try:
            if len(data) <= PIECE_BYTES_MAX:
                self._tls.write(data)
                self._raw.write(self._outgoing.read())
                return
            records = []
            for start in range(0, len(data), PIECE_BYTES_MAX):
                self._tls.write(data[start : start + PIECE_BYTES_MAX])
                records.append(self._outgoing.read())
            self._raw.write(b"".join(records))
        except Exception as error:
            self.crash("tls.write", error)

    def crash(self, where: str, error: Exception) -> None:
        """OpenSSL, memory or the socket refused: the connection ends in a later turn, because this one may be within
        the hand-out of an event. Never raises.
        """
        self._ended = True
        if self._connection is not None:
            self._connection.refused(where, error)
        else:
            self._raw.abort()

    def can_write_eof(self) -> bool:
        return True

    @guarded
    def write_eof(self) -> None:
        self._notify_close()
        self._raw.write_eof()

    @guarded
    def close(self) -> None:
        self._notify_close()
        self._raw.close()

    def _notify_close(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._open:
            with contextlib.suppress(ssl.SSLError):  # the peer's close_notify hasn't come, and isn't waited for
                self._tls.unwrap()
            self._flush()

    def abort(self) -> None:
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def is_reading(self) -> bool:
        return self._raw.is_reading()

    def pause_reading(self) -> None:
        pause_reading(self, ABOVE)

    def resume_reading(self) -> None:
        if self.pauses & ABOVE:
            self._go_on(ABOVE)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]
        self._connection = None

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        return self._raw.get_extra_info(name, default)
