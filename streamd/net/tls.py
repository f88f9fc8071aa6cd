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
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any, Final, NoReturn

from streamd.core.guard import guarded
from streamd.net.client import ClientConnection
from streamd.reasons import CloseReason

# A quarter of a TLS record (RFC 8446 5.1): twenty tokens in a piece, and 12 KB less for each BIO that ever saw a body.
PIECE_BYTES_MAX: Final = 4 * 1024

_GONE: Final = asyncio.Protocol()  # replaces a protocol that was told of the loss: no cycle remains for the collector


class TlsFilesError(ValueError):
    """A certificate and a key that can't be used; the text names the file and the reason."""


def load_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context of two PEM files. Raises TlsFilesError."""

    def no_password() -> NoReturn:
        """OpenSSL's question for the password of an encrypted key."""
        raise TlsFilesError(
            f"{key}: the key is encrypted; streamd reads unencrypted keys only (openssl pkey -in … -out …)"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        raise TlsFilesError(f"{cert} and {key}: {error.reason or error}") from None
    except OSError as error:
        raise TlsFilesError(f"{error.filename or cert}: {error.strerror}") from None
    return context


class TlsLayer(asyncio.Transport, asyncio.Protocol):
    """The TLS of a connection."""

    __slots__ = ("_connection", "_ended", "_incoming", "_open", "_outgoing", "_protocol", "_raw", "_tls")

    def __init__(self, context: ssl.SSLContext, connection: ClientConnection) -> None:
        super().__init__()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._protocol: asyncio.Protocol = connection
        self._connection: ClientConnection | None = connection
        self._raw: asyncio.Transport
        self._open = False  # whether the handshake is done
        self._ended = False  # close_notify is out: no more reads or writes

    # -- protocol of the socket's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = transport  # type: ignore[assignment]  # uvloop's has another base
        self._protocol.connection_made(self)

    @guarded
    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        pieces: list[bytes] = []
        open_ = True
        try:
            for start in range(0, len(data), PIECE_BYTES_MAX):
                self._incoming.write(data[start : start + PIECE_BYTES_MAX])
                open_ = self._shake() and self._read(pieces)
        except ssl.SSLError:
            self._flush()  # the alert
            if self._connection is not None:
                self._connection.abort(CloseReason.TLS_FAILED)
            else:
                self.abort()
            return
        self._flush()  # handshake, key updates
        if pieces:
            self._protocol.data_received(b"".join(pieces))
        if self._open and not open_ and not self._raw.is_closing():
            self._protocol.eof_received()

    def eof_received(self) -> bool:
        self._protocol.eof_received()
        return True

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
        self._protocol = _GONE
        self._connection = None

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
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._raw.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]
        self._connection = None

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        return self._raw.get_extra_info(name, default)
