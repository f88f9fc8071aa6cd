"""A connection from a proxy that speaks the PROXY protocol: a header first, then the client's bytes.

Only peers among trusted_proxies are asked for a header, and they have to send it on each connection: a peer that may
leave it out may also forge it. Any other peer is a client like the rest, and the header's bytes are no valid request.

The connection exists from accept on, so its head_timeout, which is absolute, bounds the header too.
"""

from __future__ import annotations

import asyncio
from typing import cast

from streamd.core.guard import guarded
from streamd.net.client import ClientConnection
from streamd.net.origin import UNNAMED
from streamd.net.runtime import Runtime
from streamd.net.tls import TlsLayer
from streamd.reasons import CloseReason
from streamd.wire.proxy_v2 import ProxyHeaderError, parse_proxy_v2


class ProxiedConnection(asyncio.Protocol):
    """Reads the header, then makes `below` (TLS, or the connection itself) the socket's protocol."""

    __slots__ = ("_below", "_connection", "_held", "_runtime", "_transport")

    def __init__(self, runtime: Runtime, connection: ClientConnection, below: ClientConnection | TlsLayer) -> None:
        self._runtime = runtime
        self._connection = connection
        self._below = below
        self._held = b""  # at most a header of the largest size: the parser refuses a larger header
        self._transport: asyncio.Transport

    @guarded
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if self._runtime.gates.proxies.trusts(peer[0] if isinstance(peer, tuple) else None):
            self._connection.origin.await_remote()
        else:
            self._transport.set_protocol(self._below)
        self._below.connection_made(transport)

    @guarded
    def data_received(self, data: bytes) -> None:
        self._held += data
        try:
            header = parse_proxy_v2(self._held)
        except ProxyHeaderError:
            self._connection.abort(CloseReason.PROXY_HEADER)
            return
        if header is None:
            return
        rest = self._held[header.bytes_read :]
        self._held = b""
        self._transport.set_protocol(self._below)
        remote = (header.address, header.port) if header.address else UNNAMED if header.unnamed else None
        self._connection.arrived(remote)
        if rest and not self._transport.is_closing():
            self._below.data_received(rest)

    def eof_received(self) -> bool:
        self._below.eof_received()
        return True

    def pause_writing(self) -> None:
        self._below.pause_writing()

    def resume_writing(self) -> None:
        self._below.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._below.connection_lost(exc)

    def crash(self, where: str, error: Exception) -> None:
        """The header could not be read, or the layer below not begin: end this connection. Never raises."""
        self._runtime.bug(where, error)
        self._transport.abort()
