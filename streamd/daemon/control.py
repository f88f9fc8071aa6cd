"""Control messages between the parent and its worker processes, and the facts that a process is launched with.

Each process has a pipe to the parent, a SOCK_SEQPACKET pair, so a message is a datagram of JSON: the version of the
messages, the kind's word, and its facts, whose type FORMS has (daemon/typed_json.py). The sides may be of
neighbouring versions: a kind that a side doesn't know says nothing to it. The end of the pipe is a message too: it
tells the parent that the process has ended, and a worker that it has to end. Both sides import this module, so it
imports nothing of the data path: the parent has to stay small.
"""

from __future__ import annotations

import array
import contextlib
import enum
import json
import os
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar, cast

from streamd import descriptors
from streamd.config import Settings
from streamd.daemon.typed_json import FormError, read, written
from streamd.log_levels import LevelChange, LogLevels
from streamd.server_state import ServerView

# Environment variables with the Launch of a worker process, and with the StateLaunch of the process that moves saved
# streams. The second underscore keeps the names apart from the settings' variables.
WORKER_VARIABLE = "STREAMD__WORKER"
STATE_VARIABLE = "STREAMD__STATE"

# The version of the messages. A side takes messages of its own version and of the versions beside it.
MESSAGES_VERSION = 1

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

Kind = TypeVar("Kind", "ToWorker", "ToParent")


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


# The type of each kind's facts. Both directions share words: DRAIN, TAKE_BACK and LOG_LEVEL.
FORMS: dict[ToWorker | ToParent, Any] = {
    ToWorker.SETTINGS: tuple[Settings, tuple[str, ...]],
    ToWorker.UPSTREAMS: tuple[tuple[str, ServerView], ...],
    ToWorker.PREPARE: tuple[int, Settings, tuple[str, ...]],
    ToWorker.APPLY: int,
    ToWorker.DISCARD: int,
    ToWorker.DRAIN: tuple[bool, bool, str],
    ToWorker.CLOSE: None,
    ToWorker.HURRY: None,
    ToWorker.TAKE_BACK: None,
    ToWorker.LOG_LEVEL: LogLevels,
    ToWorker.BURY: tuple[int, int],
    ToWorker.RELOADED: Reloaded,
    ToWorker.STORED: bool,
    ToParent.READY: str,
    ToParent.FAILED: tuple[int, tuple[str, ...]],
    ToParent.BEAT: None,
    ToParent.STANDING: Standing,
    ToParent.UPSTREAM: tuple[str, ServerView],
    ToParent.PREPARED: tuple[int, str],
    ToParent.APPLIED: int,
    ToParent.DRAIN: None,
    ToParent.TAKE_BACK: None,
    ToParent.LOG_LEVEL: LevelChange,
    ToParent.SAVING: None,
    ToParent.DRAINED: Report,
    ToParent.STORE: str,
    ToParent.REMOVE: str,
}


class Received(NamedTuple):
    """A received message: its kind, its facts, and a descriptor or -1."""

    kind: ToWorker | ToParent
    facts: Any
    fd: int = -1


def send(pipe: socket.socket, kind: ToWorker | ToParent, facts: object = None, fd: int = -1) -> bool:
    """Send a message. False if the other side is gone, or hasn't read for so long that the pipe is full.

    Raises FormError for facts that aren't of the kind's type.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
    text = json.dumps([MESSAGES_VERSION, kind.value, written(facts, FORMS[kind])], separators=(",", ":"))
    with contextlib.suppress(OSError):
        pipe.sendmsg([text.encode()], rights)
        return True
    return False


def receive(pipe: socket.socket, kinds: type[Kind]) -> Received | None:
    """The next message of a known kind; None at the pipe's end. Raises BlockingIOError or TimeoutError if there is none
    yet, and FormError for a message that isn't of this version or one beside it.
    """
    while True:
        try:
            data, fds, _ = descriptors.receive(pipe, MESSAGE_BYTES_MAX, 1)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:
            return None
        if not data:
            return None
        fd = fds[0] if fds else -1
        try:
            message = _taken(data, kinds, fd)
        except FormError:
            _close(fd)
            raise
        if message is not None:
            return message
        _close(fd)


def _taken(data: bytes, kinds: type[Kind], fd: int) -> Received | None:
    """A datagram as a message; None if its kind isn't known. Raises FormError."""
    try:
        version, word, facts = json.loads(data)
    except ValueError as error:
        raise FormError("a message that is no JSON of a version, a kind and facts") from error
    if type(version) is not int or abs(version - MESSAGES_VERSION) > 1:
        raise FormError(f"a message of version {version!r:.20}, where {MESSAGES_VERSION} is spoken")
    if word not in {kind.value for kind in kinds}:
        return None
    kind = cast("ToWorker | ToParent", kinds(word))
    return Received(kind, read(facts, FORMS[kind]), fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
