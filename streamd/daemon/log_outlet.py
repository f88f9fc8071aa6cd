"""Log outlet: writes lines to standard error without ever waiting for the process that reads them.

A pipe to a collector, a container's log driver or a busy journal may stall, and a write(2) into a full pipe stalls with
it, together with every connection of the process. Its flags can't be changed: standard error is shared with other
workers, and with the shell that started us. So each kind has its own way:

    socket          send(2) with MSG_DONTWAIT (the journal)
    pipe, terminal  the same file, opened once more with O_NONBLOCK, which is a flag of this opening alone. Where that
                    isn't allowed (a pipe of another user): poll(2), then at most PIPE_BUF bytes. Several workers may
                    find the same room there and one of them wait for the reader
    file            write(2): a disk has no reader to wait for

A line that finds no room waits in at most WAITING_BYTES_MAX, and leaves before the next line or at the next flush().
Lines beyond that are lost. The loss is counted, and told in a line of its own as soon as there is room. Lines that wait
leave several at once, as far as a pipe takes them in one piece; so do those of a loop's turn, which the outlet holds
while it is `corked`.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable
from typing import Final

# Lines that wait while the reader is busy: a thousand requests of 250 B that end in the same turn.
WAITING_BYTES_MAX: Final = 256 * 1024

# A pipe takes a piece of this size whole or not at all (pipe(7)).
PIECE_BYTES_MAX: Final = select.PIPE_BUF

# Time for the last lines at the end of the process, while their reader takes them.
FINISH_S_MAX: Final = 0.5

Send = Callable[[bytes], int]


class LogOutlet:
    """The way out for the lines of a process. `lost_line` makes the line that tells of lost lines. Never raises."""

    def __init__(self, fd: int, lost_line: Callable[[int], bytes]) -> None:
        self._send = _send_to(fd)
        self._lost_line = lost_line
        self._waiting: deque[bytes] = deque()  # bounded by WAITING_BYTES_MAX
        self._waiting_bytes = 0
        self.lost = 0  # lines, since the start
        self._untold = 0  # of these
        self.corked = False  # lines wait for the next flush(), as far as there is room for them

    def write(self, line: bytes) -> None:
        """Send the line, or keep it until there is room, or lose it."""
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        if self.corked and self._waiting_bytes <= WAITING_BYTES_MAX:
            return
        if not self.flush() and self._waiting_bytes > WAITING_BYTES_MAX:
            last = self._waiting.pop()
            self._waiting_bytes -= len(last)
            self.lose(last.count(b"\n"))

    def lose(self, count: int = 1) -> None:
        """Count lines that are lost."""
        self.lost += count
        self._untold += count

    def flush(self) -> bool:
        """Send the lines that wait, as far as there is room; False if some still wait."""
        while self._waiting or self._untold:
            if not self._waiting:
                told, self._untold = self._untold, 0
                line = self._lost_line(told)
                if not self._put(line):
                    self._untold += told
                    return True
                continue
            lines = self._next_piece()
            try:
                sent = self._send(lines)
            except BlockingIOError:
                sent = 0
            except OSError:  # a pipe without a reader, a full disk, a closed descriptor
                self.lose(lines.count(b"\n"))
                return not self._waiting
            if sent < len(lines):
                self._waiting.appendleft(lines[sent:])
                self._waiting_bytes += len(lines) - sent
                return False
        return True

    def _next_piece(self) -> bytes:
        """Take the first lines that wait, as many as a pipe takes in one piece."""
        waiting = self._waiting
        lines = [waiting.popleft()]
        size = len(lines[0])
        while waiting and size + len(waiting[0]) <= PIECE_BYTES_MAX:
            size += len(waiting[0])
            lines.append(waiting.popleft())
        self._waiting_bytes -= size
        return b"".join(lines) if len(lines) > 1 else lines[0]

    def _put(self, line: bytes) -> bool:
        """Whether a line was sent whole; its rest, if any, waits."""
        try:
            sent = self._send(line)
        except OSError:
            return False
        if sent < len(line):
            self._waiting.append(line[sent:])
            self._waiting_bytes += len(line) - sent
        return True

    def finish(self) -> None:
        """The process ends: give the last lines a moment, while their reader takes them."""
        until = time.monotonic() + FINISH_S_MAX
        while not self.flush() and time.monotonic() < until:
            time.sleep(0.01)  # no connection is served any more


def _send_to(fd: int) -> Send:
    """A send for this descriptor that doesn't wait. It raises BlockingIOError if there is no room, and OSError."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:  # closed: each write says so
        return lambda line: os.write(fd, line)
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda line: sock.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if stat.S_ISREG(mode):
        return lambda line: os.write(fd, line)
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return lambda line: _write_if_room(fd, line)
    return lambda line: os.write(own, line)


def _write_if_room(fd: int, line: bytes) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(fd, line[:PIECE_BYTES_MAX])


def open_standard_streams() -> None:
    """Before anything else is opened: a closed descriptor 0, 1 or 2 would go to a connection, and the log into it.

    Lines to /dev/full are lost, and counted as lost.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open("/dev/full" if fd else "/dev/null", os.O_RDWR)
            os.set_inheritable(opened, True)  # it is the lowest that was free: this one
