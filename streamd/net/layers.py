"""What stands between a listening socket and a ClientConnection: nothing, TLS, a PROXY header, or the two in turn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from streamd.net.client import ClientConnection
from streamd.net.peers import Passed
from streamd.net.proxied import ProxiedConnection
from streamd.net.runtime import Runtime
from streamd.net.tls import TlsLayer


def protocol_factory(
    runtime: Runtime, listener: str, sock: socket.socket, price_bytes: int = 0, *, stays: bool = False
) -> Callable[[], asyncio.Protocol]:
    """What makes the protocol of each connection of `sock`. `runtime` is asked anew each time: a reload counts.

    TCP listeners speak TLS where there is a certificate; the admin listener is for this machine and stays plain. With
    several workers a connection may go to another one at once, unless it `stays`.
    """
    over_tcp = sock.family != socket.AF_UNIX

    def make() -> asyncio.Protocol:
        connection = ClientConnection(runtime, listener, price_bytes)
        below: asyncio.Protocol = connection
        if listener == "admin":
            return below
        if runtime.tls is not None and over_tcp:
            below = TlsLayer(runtime.tls, connection)
        if runtime.settings.proxy_protocol:
            return ProxiedConnection(runtime, connection, below)
        return below

    def make_or_move() -> asyncio.Protocol:
        peers = runtime.peers
        slot = peers.lighter(runtime.time()) if peers is not None and not runtime.draining else None
        return make() if slot is None else Moving(runtime, slot, listener, price_bytes, make)

    return make if stays or listener == "admin" else make_or_move


class Moving(asyncio.Protocol):
    """A connection that goes to a worker with less to do before a byte of it is read."""

    def __init__(
        self, runtime: Runtime, slot: int, listener: str, price_bytes: int, make: Callable[[], asyncio.Protocol]
    ) -> None:
        self._runtime = runtime
        self._slot = slot
        self._listener = listener
        self._price_bytes = price_bytes
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raw, peers = cast(asyncio.Transport, transport), self._runtime.peers
        assert peers is not None
        sock = raw.get_extra_info("socket")
        if peers.pass_on(self._slot, Passed(sock, self._listener, self._price_bytes, None, b"", fresh=True)):
            raw.abort()
            return
        stays = self._make()
        raw.set_protocol(stays)
        stays.connection_made(raw)
