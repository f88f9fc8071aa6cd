"""Control messages between the parent and its worker processes, and the facts that a process is launched with.

Each process has a pipe to the parent, a SOCK_SEQPACKET pair, so a message is a datagram: the kind's word and plain
values. The end of the pipe is a message too: it tells the parent that the process has ended, and a worker that it has
to end. Both sides import this module, so it imports nothing of the data path: the parent has to stay small.
"""

from __future__ import annotations

import array
import contextlib
import enum
import json
import pickle
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

from streamd import descriptors

# Environment variables with the Launch of a worker process, and with the StateLaunch of the process that moves saved
# streams. The second underscore keeps the names apart from the settings' variables.
WORKER_VARIABLE = "STREAMD__WORKER"
STATE_VARIABLE = "STREAMD__STATE"

# Size of the buffer that receives a message. The largest message is the settings: 50 KB with a hundred upstreams.
MESSAGE_BYTES_MAX = 192 * 1024

# Exit statuses of the daemon and of its processes: 1 is a failure that a restart may mend (the port is taken), 2 a
# mistake in the settings.
EXIT_FAILED = 1
EXIT_SETTINGS = 2

# Takes the place of a signal's name in a drain that an operator asked for.
ADMIN = "admin"

# Longest window of a drain after Ctrl-C at a terminal, where a person waits for the end.
QUICK_DRAIN_S = 2.0

# The file of saved streams, in the state directory.
STATE_FILE = "streams.state"

# Time limit for saving or restoring streams: 1 GiB of logs, at the 50 MB/s of a slow disk, is 20 s.
STATE_S = 30.0

Kind = TypeVar("Kind", bound=enum.Enum)


class ToWorker(enum.Enum):
    """Parent to worker."""

    SETTINGS = "settings"  # (Settings, names of upstreams by index): the first message, the worker starts with it
    UPSTREAMS = "upstreams"  # [(name, ServerView)]: the daemon's verdicts on servers
    PREPARE = "prepare"  # (number of the reload, Settings, names): read everything that a reload needs, change nothing
    APPLY = "apply"  # the number: use the prepared settings from now on
    DISCARD = "discard"  # the number: another worker has refused these settings
    DRAIN = "drain"  # (quick, whether CLOSE will end its first step, the name of the signal or ADMIN)
    CLOSE = "close"  # the first step of the drain is over: close the listeners
    HURRY = "hurry"  # end the drain now
    TAKE_BACK = "take_back"  # the drain is taken back, or there is none: serve as before
    LOG_LEVEL = "log_level"  # the LogLevels that hold from now on
    BURY = "bury"  # (slot, pid) of a worker that has died: fold its counts into the base row
    RELOADED = "reloaded"  # the values of a Reloaded
    STORED = "stored"  # the answer to STORE: whether systemd's socket took the descriptor


class ToParent(enum.Enum):
    """Worker to parent."""

    READY = "ready"  # the budget's line for the log
    FAILED = "failed"  # (exit status, lines): why the worker can't start
    BEAT = "beat"  # the worker's loop has turned
    STANDING = "standing"  # a Standing
    UPSTREAM = "upstream"  # (name, ServerView): how a server stands in this worker's view
    PREPARED = "prepared"  # (number of the reload, why the settings can't be used or "")
    APPLIED = "applied"  # the number
    DRAIN = "drain"  # an operator asks for a drain of the daemon, on the admin surface
    TAKE_BACK = "take_back"  # an operator takes the drain back. The answer is TAKE_BACK, CLOSE or HURRY
    LOG_LEVEL = "log_level"  # a LevelChange, from the admin surface
    SAVING = "saving"  # the drain is over; the loop stands still while streams are saved
    DRAINED = "drained"  # the values of its Report
    STORE = "store"  # a name, with a descriptor for systemd's store
    REMOVE = "remove"  # a name: systemd shall close the descriptors that it stores under it


class DaemonState(enum.Enum):
    """The stages in the life of the daemon, and of each worker."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(slots=True)
class Report:
    """The numbers in the last log line."""

    finished: int = 0  # generations that ended by themselves during the drain
    sent_away: int = 0  # readers of published streams, told to come back
    cut: int = 0  # readers told at the deadline, before their stream's end


class Reloaded(NamedTuple):
    """The outcome of the last reload."""

    succeeded: bool  # True before the first reload, too
    unix_s: float  # when the settings in use were read, Unix time


class Standing(NamedTuple):
    """A worker's part of the line that `systemctl status` shows."""

    connections: int = 0
    streams: int = 0
    tokens_per_s: float = 0.0
    saturation: float = 0.0


class Launch(NamedTuple):
    """A worker's slot, and the numbers of the descriptors that it inherits. -1 or (): there is none."""

    slot: int
    workers: int
    started_at: float  # of the daemon, on the monotonic clock
    pipe: int
    public: tuple[int, ...]
    public_kept: bool  # systemd holds these listeners too, so a connection in their queues outlives the daemon
    admin: tuple[int, ...]
    admin_kept: bool
    metrics: tuple[int, ...] = ()  # the listener of a scraper
    metrics_kept: bool = False
    # With a single worker, which restores and saves streams by itself:
    stored: tuple[int, ...] = ()  # systemd's descriptors with saved streams
    under_systemd: bool = False  # systemd can store a descriptor, and shows a status
    # With several workers:
    counters: int = -1  # the mapping that all workers share
    # a memfd: at the start the saved streams that this worker restores, after its drain its own streams
    snapshots: int = -1
    inbox: int = -1
    outlets: tuple[int, ...] = ()

    def descriptors(self) -> tuple[int, ...]:
        fds = {
            self.pipe,
            *self.public,
            *self.admin,
            *self.metrics,
            *self.stored,
            self.counters,
            self.snapshots,
            self.inbox,
            *self.outlets,
        }
        return tuple(sorted(fds - {-1}))

    def encode(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def decode(cls, text: str) -> Self:
        return cls(**_with_tuples(json.loads(text)))


class StateLaunch(NamedTuple):
    """The process that moves saved streams between the store and the memfds of several workers."""

    saves: bool  # from the memfds into the store; else from the store into the memfds
    pipe: int
    snapshots: tuple[int, ...]  # by slot
    stored: tuple[int, ...]
    under_systemd: bool
    state_dir: str
    log_level: str
    log_format: str

    def descriptors(self) -> tuple[int, ...]:
        return (self.pipe, *self.snapshots, *self.stored)

    def encode(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def decode(cls, text: str) -> Self:
        return cls(**_with_tuples(json.loads(text)))


def _with_tuples(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


class Received(NamedTuple):
    """A received message: the word of its kind, its values, and a descriptor or -1."""

    kind: str
    facts: Any
    fd: int = -1


def send(pipe: socket.socket, kind: enum.Enum, facts: object = None, fd: int = -1) -> bool:
    """Send a message. False if the other side is gone, or hasn't read for so long that the pipe is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
    with contextlib.suppress(OSError):
        pipe.sendmsg([pickle.dumps((kind.value, facts))], rights)
        return True
    return False


def receive(pipe: socket.socket) -> Received | None:
    """The next message; None at the pipe's end. Raises BlockingIOError or TimeoutError if there is none yet."""
    try:
        data, fds, _ = descriptors.receive(pipe, MESSAGE_BYTES_MAX, 1)
    except (BlockingIOError, TimeoutError):
        raise
    except OSError:
        return None
    # The other side is our own parent or child, so unpickling is safe.
    if not data:
        return None
    kind, facts = pickle.loads(data)
    return Received(kind, facts, fds[0] if fds else -1)
