"""TCP keepalive, for connections to clients and to upstreams alike.

NATs forget a connection that is silent for minutes (AWS after 350 s, Google Cloud after 120 s unless told otherwise),
and a model that thinks is silent for minutes. The kernel's own first probe comes after two hours. A dead peer on a
quiet connection is found after 60 + 5 x 10 s; streams have heartbeats and TCP_USER_TIMEOUT besides.
"""

from __future__ import annotations

import socket

IDLE_S = 60
INTERVAL_S = 10
PROBES = 5


def set_keepalive(sock: socket.socket) -> None:
    """Probe a TCP connection that is silent; sockets that a listener accepts inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
