"""A way through a forward proxy: a socket that the proxy connects to a server (CONNECT, RFC 9110 9.3.6).

The proxy's answer is bounded, and read to the end of its head and no further: a byte behind it would be a byte of the
proxy's in the place of the server's. The whole has connect_timeout, as any connection to an upstream.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from typing import Final

from streamd.forward_proxy import ForwardProxy
from streamd.wire.http1 import HEAD_LIMITS, RESPONSE_OPENING, HeadReader, RemoteProtocolError

READ_BYTES: Final = 4 * 1024
# Heads of at most 16 KiB each (HEAD_LIMITS). A proxy may send a 1xx or two in front of its answer.
HEADS_MAX: Final = 4

_status = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]").match


async def open_tunnel(
    loop: asyncio.AbstractEventLoop, address: str, proxy: ForwardProxy, host: str, port: int
) -> socket.socket:
    """A socket to a server, through the proxy at one of its addresses.

    Raises OSError; then, or when cancelled, none is left.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await _connect(loop, sock, address, proxy)
    except BaseException:
        sock.close()
        raise
    try:
        await loop.sock_sendall(sock, _request(proxy, host, port))
        status = await _answer(loop, sock)
    except BaseException:
        sock.close()
        raise
    if 200 <= status < 300:
        return sock
    sock.close()
    if status == 407:
        raise _refused("it asks for a user and a password, or for others (407)")
    raise _refused(f"it answered {status}")


async def _connect(loop: asyncio.AbstractEventLoop, sock: socket.socket, address: str, proxy: ForwardProxy) -> None:
    try:
        await loop.sock_connect(sock, (address, proxy.port))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # the loop's own text names the address
        raise OSError(error.errno, f"the proxy: {why}") from None


def _request(proxy: ForwardProxy, host: str, port: int) -> bytes:
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    credentials = f"Proxy-Authorization: {proxy.credentials}\r\n" if proxy.credentials else ""
    return f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{credentials}\r\n".encode()


async def _answer(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> int:
    """The status of the proxy's final answer."""
    heads, status, rest = HeadReader(HEAD_LIMITS, opening=RESPONSE_OPENING), 100, b""
    for _ in range(HEADS_MAX):
        status, rest = await _next_status(loop, sock, heads, rest)
        if status >= 200:
            break
    if status < 200:
        raise _refused("its answer doesn't come to an end")
    if rest and status < 300:
        raise _refused("it sent bytes behind its answer")
    return status


async def _next_status(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, heads: HeadReader, begun: bytes
) -> tuple[int, bytes]:
    """The status of the next head, and the bytes behind it."""
    try:
        found = heads.feed(begun) if begun else None
        while found is None:
            data = await loop.sock_recv(sock, READ_BYTES)
            if not data:
                raise _refused("it closed the connection")
            found = heads.feed(data)
    except RemoteProtocolError as error:
        raise _refused(f"its answer is malformed: {error}") from None
    status = _status(found[0])
    if status is None:
        raise _refused("its answer is malformed")
    return int(status[1]), found[1]


def _refused(why: str) -> OSError:
    return OSError(errno.ECONNREFUSED, f"the proxy: {why}")
