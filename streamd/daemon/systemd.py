"""systemd's protocols, natively: notifications and passed descriptors. Standard library only, no libsystemd.

The protocols are sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3). Three rules hold here:

- No call blocks or raises: a daemon that serves readers goes on when systemd doesn't listen.
- The datagrams of the daemon's life (READY, RELOADING, STOPPING) must arrive, and in order. If systemd's socket is full
  for the moment, such a datagram is owed: it is sent before the next datagram, and on its own, because systemd takes
  READY and RELOADING in the same datagram for a single state. STATUS, WATCHDOG and EXTEND_TIMEOUT_USEC are worthless
  later and are never owed.
- systemd's variables are for this process alone. They leave the environment when they are read, so that no child acts
  on them (a worker must not feed the parent's watchdog).

Rejected: a connected socket. `systemctl daemon-reexec` may open a new one under the same name; an address finds it.
"""

from __future__ import annotations

import array
import collections
import contextlib
import os
import socket
import stat
from collections.abc import MutableMapping
from typing import NamedTuple

LISTEN_FDS_START = 3  # SD_LISTEN_FDS_START
STATE_FDNAME = "streamd-state"  # the memfd with the streams' logs, told apart from listeners by this name
FDNAME_UNKNOWN = "unknown"  # sd_listen_fds_with_names(3): what a descriptor without a name is called
FDNAME_CHARS_MAX = 255  # FDNAME_MAX in systemd's fd-util.h
# A life has READY, STOPPING and a pair for each reload: with more than two pairs owed, the older say nothing new.
OWED_DATAGRAMS_MAX = 8
STATUS_CHARS_MAX = 512  # one line of `systemctl status`


class Notifier:
    """Sends notifications to systemd; without an address every call does nothing and returns False.

    Each call returns whether the socket took the datagram, which doesn't mean that systemd has read it.
    """

    __slots__ = ("_address", "_owed", "_socket", "watchdog_interval_s")

    def __init__(self, address: str = "", watchdog_interval_s: float = 0.0) -> None:
        """`address` as in NOTIFY_SOCKET: an absolute path, or `@name` for an abstract socket; else there is none."""
        # process
        self.watchdog_interval_s = watchdog_interval_s  # seconds between two watchdog() calls; 0.0: none are wanted
        self._address = _address_bytes(address)
        self._socket: socket.socket | None = None
        self._owed: collections.deque[bytes] = collections.deque(maxlen=OWED_DATAGRAMS_MAX)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str], pid: int) -> Notifier:
        """Take NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID out of `environ`; `pid` is this process's."""
        address = environ.pop("NOTIFY_SOCKET", "")
        return cls(address, _watchdog_interval_s(environ, pid))

    @property
    def enabled(self) -> bool:
        """Whether there is a systemd to notify."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """Start-up or reload is complete: the daemon listens (again). A `status` is sent along."""
        return self._tell(b"READY=1" + (b"\nSTATUS=" + _status_bytes(status) if status else b""), must_arrive=True)

    def reloading(self, now_monotonic_usec: int) -> bool:
        """A reload begins; ready() ends it. systemd wants `time.monotonic_ns() // 1000`."""
        return self._tell(b"RELOADING=1\nMONOTONIC_USEC=%d" % now_monotonic_usec, must_arrive=True)

    def stopping(self, status: str = "") -> bool:
        """The drain has begun."""
        return self._tell(b"STOPPING=1" + (b"\nSTATUS=" + _status_bytes(status) if status else b""), must_arrive=True)

    def status(self, text: str) -> bool:
        """The line that `systemctl status` shows."""
        return self._tell(b"STATUS=" + _status_bytes(text))

    def extend_timeout(self, usec: int) -> bool:
        """While starting or stopping: ask for `usec` microseconds, counted from now."""
        return self._tell(b"EXTEND_TIMEOUT_USEC=%d" % usec)

    def watchdog(self) -> bool:
        """The daemon is alive. Only the event loop that this vouches for may call it."""
        return self._tell(b"WATCHDOG=1")

    def store_fd(self, name: str, fd: int) -> bool:
        """Give systemd a copy of `fd`, which it passes to the next start under `name`.

        Older descriptors of that name stay in the store: call remove_fd() first.
        """
        return self._tell(b"FDSTORE=1\nFDNAME=" + _fdname_bytes(name), fd=fd)

    def remove_fd(self, name: str) -> bool:
        """Have systemd close every stored descriptor of this name."""
        return self._tell(b"FDSTOREREMOVE=1\nFDNAME=" + _fdname_bytes(name))

    def close(self) -> None:
        """Close the socket; owed datagrams are given up."""
        self._owed.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, datagram: bytes, *, must_arrive: bool = False, fd: int = -1) -> bool:
        if self._address is None:
            return False
        while self._owed:
            if not self._send(self._owed[0]):
                break
            self._owed.popleft()
        sent = not self._owed and self._send(datagram, fd)
        if must_arrive and not sent:
            self._owed.append(datagram)
        return sent

    def _send(self, datagram: bytes, fd: int = -1) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            # Why: not socket.send_fds(), which drops its address argument in CPython 3.11.
            self._socket.sendmsg([datagram], rights, 0, self._address)
        except OSError:  # full, gone, or a bad descriptor: the return value tells
            return False
        return True


class Inherited(NamedTuple):
    """The descriptors that systemd passed at the start, by kind."""

    # (FileDescriptorName of its socket unit, listening socket), in the units' order
    listeners: list[tuple[str, socket.socket]]
    stored: list[int]  # descriptors named STATE_FDNAME that are no sockets; the newest last
    refused: list[str]  # names of all other descriptors; already closed


def inherited(environ: MutableMapping[str, str], pid: int, fd_first: int = LISTEN_FDS_START) -> Inherited:
    """The descriptors passed to this process, close-on-exec from now on. LISTEN_* leave `environ` in any case.

    `fd_first` is the first descriptor's number. The result is empty if LISTEN_PID is another process's, or if the
    numbers make no sense.
    """
    passed = Inherited([], [], [])
    for name, fd in _named_fds(environ, pid, fd_first):
        try:
            os.set_inheritable(fd, False)
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:  # announced, but not open
            passed.refused.append(name)
            continue
        if not is_socket and name == STATE_FDNAME:
            passed.stored.append(fd)
        elif is_socket and (listener := _listener(fd)) is not None:
            passed.listeners.append((name, listener))
        else:
            os.close(fd)
            passed.refused.append(name)
    return passed


def _address_bytes(address: str) -> bytes | None:
    if address.startswith("/"):
        return os.fsencode(address)
    if address.startswith("@") and len(address) > 1:
        return b"\0" + os.fsencode(address[1:])
    return None


def _status_bytes(text: str) -> bytes:
    # A line end would begin another assignment: STATUS=x\nSTOPPING=1.
    return " ".join(text.split())[:STATUS_CHARS_MAX].encode("utf-8", "replace")


def _fdname_bytes(name: str) -> bytes:
    # fdname_is_valid() in systemd: printable ASCII without the colon that separates LISTEN_FDNAMES.
    assert 0 < len(name) <= FDNAME_CHARS_MAX, name
    assert name.isascii() and name.isprintable() and ":" not in name, name
    return name.encode("ascii")


def _watchdog_interval_s(environ: MutableMapping[str, str], pid: int) -> float:
    """Half of the time that systemd allows, as sd_watchdog_enabled(3) recommends: a single late turn is forgiven."""
    usec = _decimal(environ.pop("WATCHDOG_USEC", ""))
    meant_pid = environ.pop("WATCHDOG_PID", str(pid))
    return usec / 2e6 if _decimal(meant_pid) == pid else 0.0


def _named_fds(environ: MutableMapping[str, str], pid: int, fd_first: int) -> list[tuple[str, int]]:
    meant_pid = _decimal(environ.pop("LISTEN_PID", ""))
    count = _decimal(environ.pop("LISTEN_FDS", ""))
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if meant_pid != pid or count > os.sysconf("SC_OPEN_MAX"):
        return []
    names += [FDNAME_UNKNOWN] * (count - len(names))
    return [(names[i] or FDNAME_UNKNOWN, fd_first + i) for i in range(count)]


def _listener(fd: int) -> socket.socket | None:
    """The socket, if it accepts connections; else None, and `fd` stays open."""
    candidate = socket.socket(fileno=fd)
    accepts = 0
    with contextlib.suppress(OSError):
        accepts = candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if accepts and candidate.type == socket.SOCK_STREAM:
        candidate.setblocking(False)
        return candidate
    candidate.detach()
    return None


def _decimal(text: str) -> int:
    """The number in `text`, or 0 if it is no number: an odd variable is no reason not to start."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
