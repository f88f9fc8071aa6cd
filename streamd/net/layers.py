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

    if stays or listener == "admin":
        return make
    return lambda: make() if runtime.peers is None else Arriving(runtime, listener, price_bytes, make)


class Arriving(asyncio.Protocol):
    """A connection that may go to a worker with less to do, before a byte of it is read.

    Why not decided as it is accepted: several are in one turn of the loop, and none of them is counted yet.
    """

    __slots__ = ("_listener", "_make", "_price_bytes", "_runtime")

    def __init__(self, runtime: Runtime, listener: str, price_bytes: int, make: Callable[[], asyncio.Protocol]) -> None:
        self._runtime = runtime
        self._listener = listener
        self._price_bytes = price_bytes
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raw, runtime = cast(asyncio.Transport, transport), self._runtime
        peers = runtime.peers
        assert peers is not None
        slot = None if runtime.draining else peers.lighter(runtime.time())
        if slot is not None:
            sock = raw.get_extra_info("socket")
            if peers.pass_on(slot, Passed(sock, self._listener, self._price_bytes, None, b"", fresh=True)):
                raw.abort()
                return
        step_aside(raw, self._make())


class Adopted(asyncio.Protocol):
    """A connection that another worker passed on: no longer under way, in the same moment in which it is counted."""

    __slots__ = ("_make", "_taken")

    def __init__(self, make: Callable[[], asyncio.Protocol], taken: Callable[[], None]) -> None:
        self._make = make
        self._taken: Callable[[], None] | None = taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.arrived()
        step_aside(cast(asyncio.Transport, transport), self._make())

    def arrived(self) -> None:
        """It is here, or lost: either way it is no longer under way. Once."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken()


def step_aside(transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
    """Let another protocol have a connection from its beginning."""
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
