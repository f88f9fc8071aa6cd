"""What stands between a listening socket and a ClientConnection: nothing, TLS, a PROXY header, or the two in turn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from streamd.net.client import ClientConnection
from streamd.net.proxied import ProxiedConnection
from streamd.net.runtime import Runtime
from streamd.net.tls import TlsLayer


def protocol_factory(
    runtime: Runtime, listener: str, sock: socket.socket, price_bytes: int = 0
) -> Callable[[], asyncio.Protocol]:
    """What makes the protocol of each connection of `sock`. `runtime` is asked anew each time: a reload counts.

    TCP listeners speak TLS where there is a certificate; the admin listener is for this machine and stays plain.
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

    return make
