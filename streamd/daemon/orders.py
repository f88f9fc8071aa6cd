"""What passes between the supervisor and its workers: how one is launched, what it is told, what it says."""

from __future__ import annotations

import base64
import enum
import pickle
from typing import NamedTuple

# In a worker's environment: its Launch. Its name keeps it apart from the settings' variables.
WORKER_VARIABLE = "STREAMD__WORKER"


class Order(enum.Enum):
    """Supervisor to worker."""

    SETTINGS = "settings"  # (Settings, upstreams' names by index): the first one starts it, each further one reloads
    DRAIN = "drain"  # quick: bool
    HURRY = "hurry"
    LOG_LEVEL = "log_level"  # the word


class Say(enum.Enum):
    """Worker to supervisor."""

    READY = "ready"
    BEAT = "beat"  # the loop turns
    DRAIN = "drain"  # somebody asked for it on the admin surface
    LOG_LEVEL = "log_level"
    DRAINED = "drained"  # its Report


class Launch(NamedTuple):
    """A worker's slot, and the numbers of the descriptors that it inherits."""

    slot: int
    workers: int
    pipe: int
    counters: int
    public: tuple[int, ...]
    admin: tuple[int, ...]
    kept_open: bool  # the listeners are systemd's, too: what waits to be accepted at our end isn't lost
    kept: int  # a memfd: streams of the process before, and those that are left for the next one
    inbox: int
    outlets: tuple[int, ...]

    def descriptors(self) -> tuple[int, ...]:
        return tuple({self.pipe, self.counters, *self.public, *self.admin, self.kept, self.inbox, *self.outlets})

    def encode(self) -> str:
        return base64.b64encode(pickle.dumps(tuple(self))).decode()

    @classmethod
    def decode(cls, text: str) -> Launch:
        return cls(*pickle.loads(base64.b64decode(text)))
