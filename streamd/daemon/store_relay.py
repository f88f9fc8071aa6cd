"""systemd's descriptor store, reached through the parent: systemd listens to the main process alone."""

from __future__ import annotations

import contextlib
import socket

from streamd.daemon import control
from streamd.daemon.control import ToParent, ToWorker

# Time limit for the parent's answer, which comes from its loop: late only on a slow machine, or if it is stopped.
ANSWER_S_MAX = 5.0


class StoreRelay:
    """The part of systemd.Notifier that the state store needs."""

    def __init__(self, pipe: socket.socket, enabled: bool) -> None:
        self._pipe = pipe
        self.enabled = enabled

    def remove_fd(self, name: str) -> bool:
        return control.send(self._pipe, ToParent.REMOVE, name)

    def store_fd(self, name: str, fd: int) -> bool:
        """Send the descriptor and wait for the parent's answer. Other messages before it come too late to matter."""
        if not control.send(self._pipe, ToParent.STORE, name, fd):
            return False
        self._pipe.settimeout(ANSWER_S_MAX)
        with contextlib.suppress(TimeoutError):
            while message := control.receive(self._pipe, ToWorker):
                if message.kind is ToWorker.STORED:
                    return bool(message.facts)
        return False
