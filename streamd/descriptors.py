"""A datagram with descriptors, received from another of the daemon's processes.

`socket.recv_fds()` would do, but CPython 3.11 drops the flags that it is given, and without MSG_CMSG_CLOEXEC a
descriptor stays open in each program that this process starts afterwards.
"""

from __future__ import annotations

import array
import socket


def receive(sock: socket.socket, bytes_max: int, fds_max: int) -> tuple[bytes, list[int], int]:
    """The next datagram (b"" at the end of the pair), its descriptors, close-on-exec, and recvmsg's flags (MSG_TRUNC,
    MSG_CTRUNC). Raises OSError as recvmsg does.
    """
    fds = array.array("i")
    data, rights, flags, _ = sock.recvmsg(bytes_max, socket.CMSG_SPACE(fds_max * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, raw in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return data, list(fds), flags
