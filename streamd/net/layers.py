"""The layers between a listening socket and a ClientConnection: none, TLS, a PROXY header, or the two in turn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from streamd.core.guard import guarded
from streamd.net.application import Application
from streamd.net.client import ClientConnection
from streamd.net.origin import Entrance
from streamd.net.peers import Passed
from streamd.net.proxied import ProxiedConnection
from streamd.net.runtime import Runtime
from streamd.net.tls import TlsLayer


def protocol_factory(
    application: Application, entrance: Entrance, sock: socket.socket, *, stays: bool = False
) -> Callable[[], asyncio.BaseProtocol]:
    """Makes the protocol of each connection of `sock`. It reads the runtime each time, so a reload takes effect.

    TCP listeners speak TLS if there is a certificate, except for those of operators, who come without a proxy between.
    With several workers a connection may go to another worker at once, unless it `stays`.
    """
    runtime, is_for_operators = entrance.runtime, entrance.listener in ("admin", "metrics")
    over_tcp = sock.family != socket.AF_UNIX

    def make() -> asyncio.BaseProtocol:
        connection = ClientConnection(application, entrance)
        below: ClientConnection | TlsLayer = connection
        if is_for_operators:
            return below
        if runtime.tls is not None and over_tcp:
            below = TlsLayer(runtime.tls, connection)
        if runtime.settings.proxy_protocol:
            return ProxiedConnection(runtime, connection, below)
        return below

    def begin() -> asyncio.BaseProtocol:
        try:
            return make() if stays or is_for_operators or runtime.peers is None else Arriving(entrance, make)
        except Exception as error:  # no memory for a connection: the listener goes on
            runtime.bug("layers.begin", error)
            return Unbegun()

    return begin


class Unbegun(asyncio.Protocol):
    """A connection that can't be begun."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


class Arriving(asyncio.Protocol):
    """A connection that may go to a worker with less to do, before a byte of it is read.

    Why not decided at accept: a turn of the loop accepts several connections, and none of them is counted yet.
    """

    __slots__ = ("_entrance", "_make", "_raw")

    def __init__(self, entrance: Entrance, make: Callable[[], asyncio.BaseProtocol]) -> None:
        self._entrance = entrance
        self._make = make
        self._raw: asyncio.Transport

    @guarded
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raw, entrance = cast(asyncio.Transport, transport), self._entrance
        self._raw = raw
        runtime = entrance.runtime
        peers = runtime.peers
        assert peers is not None
        slot = None if runtime.draining else peers.lighter(runtime.time())
        if slot is not None:
            sock = raw.get_extra_info("socket")
            if peers.pass_on(slot, Passed(sock, entrance.listener, entrance.price_bytes, None, b"", fresh=True)):
                raw.abort()
                return
        step_aside(raw, self._make())

    def crash(self, where: str, error: Exception) -> None:
        """The connection can't be begun: end it. Never raises."""
        self._entrance.runtime.bug(where, error)
        self._raw.abort()


class Adopted(asyncio.Protocol):
    """A connection that another worker passed on. It leaves the count of passed connections as it is counted here."""

    __slots__ = ("_make", "_raw", "_runtime", "_taken")

    def __init__(self, runtime: Runtime, make: Callable[[], asyncio.BaseProtocol], taken: Callable[[], None]) -> None:
        self._runtime = runtime
        self._make = make
        self._taken: Callable[[], None] | None = taken
        self._raw: asyncio.Transport

    @guarded
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self.arrived()
        step_aside(self._raw, self._make())

    def crash(self, where: str, error: Exception) -> None:
        """The connection can't be begun: end it. Never raises."""
        self._runtime.bug(where, error)
        self._raw.abort()

    def arrived(self) -> None:
        """The connection is here, or lost: either way the passing on is over. Acts once."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken()


def step_aside(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
    """Make `protocol` the protocol of a connection, as if from its beginning."""
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
