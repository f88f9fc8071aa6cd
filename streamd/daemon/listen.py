"""Listening sockets: bound here or inherited from systemd, with the options that accepted sockets inherit."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat

from streamd.addresses import Address
from streamd.config import Settings
from streamd.keepalive import set_keepalive

# Descriptors per listening socket that accept connections. uvloop 0.23 accepts a single connection per listener and
# loop turn: with 5 ms of work per turn that is 197 a second, and 2,906 through 16 dups of the same socket
# (docs/PROTOCOL.md, section 8).
DUPS = 16

# Connections that may wait in the kernel while a worker restarts or is late: a second at 4,096/s. The kernel caps it at
# net.core.somaxconn (4,096 since Linux 5.4).
BACKLOG = 4096

# Mode of the admin socket's file: connecting takes the right to write. Its owner and root may do everything there.
# Why not the group as well, as in systemd's unit: a process started by hand has the group of its user, which may be
# everybody's.
ADMIN_MODE = 0o600

DEFAULTS = Settings()


def bind(
    address: Address, settings: Settings = DEFAULTS, *, mode: int | None = None, listens: bool = True
) -> socket.socket:
    """A bound and listening socket with its options. Raises OSError with the address in its text.

    `mode`: of the file of a Unix socket; None: as the process's umask has it. Without `listens` a TCP socket only holds
    its port: connections are refused until a worker listens on it. A Unix socket always listens, or another daemon
    would take its file for one that was left behind.
    """
    try:
        return _bind_unix(address.path, mode) if address.is_unix else _bind_tcp(address, settings, listens)
    except OSError as error:
        where = f"unix:{address.path}" if address.is_unix else f"{address.host}:{address.port}"
        raise OSError(error.errno, f"{where}: {error.strerror or error}") from None


def _bind_tcp(address: Address, settings: Settings, listens: bool) -> socket.socket:
    family, kind, proto, _, name = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        # Before listen(): the kernel completes connections from then on, and each keeps the options of that moment.
        set_options(sock, settings)
        if listens:
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _bind_unix(path: str, mode: int | None) -> socket.socket:
    """Bind after removing a socket file that an earlier process left behind, unless a process listens on it.

    With a mode, the umask allows nothing while the file is made: no connection comes before the mode is right.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind_with_mode(sock, path, mode)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _bind_with_mode(sock: socket.socket, path: str, mode: int | None) -> None:
    if mode is None:
        sock.bind(path)
        return
    before = os.umask(0o777)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    os.chmod(path, mode)


def _answers(path: str) -> bool:
    """Whether a process listens on the socket. A full accept queue says so too, and is not waited for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def set_options(sock: socket.socket, settings: Settings) -> None:
    """Options that accepted TCP sockets inherit.

    TCP_NOTSENT_LOWAT makes a slow reader visible: with the defaults the kernel swallowed 2.6 to 3.7 MB for a single
    stalled reader before the first EAGAIN. TCP_USER_TIMEOUT also ends a reader with a zero window, so it has to be
    longer than stall_timeout, and is off when stall_timeout is off.
    """
    if sock.family == socket.AF_UNIX:
        return
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(tcp, socket.TCP_NOTSENT_LOWAT, settings.notsent_lowat_bytes)
    set_keepalive(sock)
    # 0 is written too: an inherited socket may carry the time of the process before.
    user_timeout_s = settings.stall_timeout_s + 30 if settings.stall_timeout_s else 0
    sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, round(user_timeout_s * 1000))


def shown(sock: socket.socket) -> str:
    """The address as a person writes it."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    if sock.family == socket.AF_UNIX:
        return True
    host = sock.getsockname()[0]
    return bool(host == "::1" or host.startswith("127."))


def connection_waits(sock: socket.socket) -> bool:
    """Whether a connection is in the accept queue."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def close(sock: socket.socket, *, remove: bool) -> None:
    """Close a listening socket; with `remove`, also remove the file of a Unix socket."""
    if remove and sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            os.unlink(sock.getsockname())
    sock.close()
