"""Slot: the place of a worker: its present process, the pipe to that process, and the deaths of earlier processes.

A process is started by exec, so that it shares the given descriptors with the parent and nothing else. It starts with
the daemon's signals blocked: Ctrl-C reaches the whole foreground group, and must not end a worker that doesn't ignore
it yet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import streamd
from streamd.daemon import control
from streamd.daemon.control import Report, Standing, ToWorker

# Delay before a dead worker's successor starts; it doubles with each further death within a minute.
RESTART_S_MIN = 0.1
RESTART_S_MAX = 10.0
RESTART_FORGET_S = 60.0

# Time for a process to end after its pipe has ended: it only has to return.
END_S = 0.2
LOOK_S = 0.002

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Signals whose default is to end the process without a word, sent by mistake (`pkill -USR1`, a script for another
# daemon): they cost a log line. SIGQUIT and its like end it with a core, which is what their sender wants.
MEANINGLESS = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
    *(signal.SIGSTKFLT, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)),
)


class Slot:
    """The place of a worker."""

    def __init__(self, number: int) -> None:
        self.number = number
        # the process
        self.pid = 0  # 0: there is none
        self.pipe: socket.socket | None = None
        self.ready = False
        self.heard_at = 0.0
        self.saving = False  # its loop stands still while it writes streams
        self.standing = Standing()
        self.verdicts = -1  # the version of the verdicts on servers that the process was told
        self.report: Report | None = None
        self.error: tuple[int, tuple[str, ...]] | None = None  # exit status and lines of a worker that can't start
        # the place
        self.start_at = 0.0  # when the successor is due; 0: there is nothing to start
        self._deaths = 0  # within RESTART_FORGET_S of each other
        self._died_at = -RESTART_FORGET_S

    def take(self, pid: int, pipe: socket.socket, now: float) -> None:
        """A new process is in the slot."""
        self.pid = pid
        self.pipe = pipe
        self.ready = self.saving = False
        self.heard_at = now
        self.standing = Standing()
        self.verdicts = -1
        self.report = self.error = None
        self.start_at = 0.0

    def tell(self, kind: ToWorker, facts: object = None) -> bool:
        """Send a message. A worker that is dead or stuck misses it, and the parent's tick finds that out."""
        return self.pipe is not None and control.send(self.pipe, kind, facts)

    def kill(self) -> None:
        """End the process at once; the end of its pipe does the rest."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def empty(self) -> int:
        """The pipe has ended: wait for the process, or kill it. Returns its exit status, negative for a signal."""
        assert self.pipe is not None
        self.pipe.close()
        pid, self.pipe, self.pid = self.pid, None, 0
        self.ready = self.saving = False
        self.standing = Standing()
        return ended(pid)

    def plan_successor(self, now: float) -> float:
        """Note a death; returns the delay before the successor starts."""
        self._deaths = self._deaths + 1 if now - self._died_at < RESTART_FORGET_S else 1
        self._died_at = now
        wait_s = min(RESTART_S_MIN * float(1 << min(self._deaths - 1, 16)), RESTART_S_MAX)
        self.start_at = now + wait_s
        return wait_s


def spawn(argv: Sequence[str], variable: str, launch: str, fds: Sequence[int]) -> int:
    """Start a process of streamd with `launch` in its environment and these descriptors open; returns its pid."""
    command = [sys.executable, *_path_flags(), "-m", "streamd.daemon", *argv]
    actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds]  # a dup onto itself stays open over exec (glibc 2.29)
    environ = {**os.environ, variable: launch}
    return os.posix_spawn(sys.executable, command, environ, file_actions=actions, setsigmask=(*SIGNALS, *MEANINGLESS))


def _path_flags() -> list[str]:
    """`-P` keeps `-m` from importing a streamd in the working directory, unless this streamd came from there."""
    root = str(Path(streamd.__file__).parents[1])
    return [] if not sys.flags.safe_path and sys.path[0] == root else ["-P"]


def unblock_signals() -> None:
    """In the new process: ignore the signals that are meant for the parent, then unblock them."""
    for number in (*SIGNALS, *MEANINGLESS):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*SIGNALS, *MEANINGLESS))


def ended(pid: int, wait_s: float = END_S) -> int:
    """Wait for a child, for `wait_s` at most, then kill it; returns its exit status, negative for a signal.

    Takes no descriptor: a child may end because there is none left.
    """
    until = time.monotonic() + wait_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(LOOK_S)
