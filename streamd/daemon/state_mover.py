"""State mover: brings saved streams from the store to several workers, and from them to the store.

A separate process does it (daemon/state_process.py), before the workers start and after they have ended, because
reading and writing streams takes the code of the data path. The parent waits for it, feeds systemd's watchdog, and
passes descriptors on between that process and systemd, which listens to the main process alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence

from streamd.daemon import control, logs, slot, systemd
from streamd.daemon.control import STATE_S, Received, StateLaunch, ToParent, ToWorker

# Interval at which the watchdog is fed while the process works.
LOOK_EVERY_S = 0.25


def move_streams(
    launch: StateLaunch, argv: Sequence[str], notifier: systemd.Notifier, alive: Callable[[], None]
) -> None:
    """Run the process to its end, or kill it after STATE_S. This function fills in `launch.pipe`."""
    notifier.extend_timeout(round(STATE_S * 1_000_000))
    own_end, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launch = launch._replace(pipe=other_end.fileno())
    pid = slot.spawn(argv, control.STATE_VARIABLE, launch.encode(), launch.descriptors())
    other_end.close()
    with own_end:
        own_end.settimeout(LOOK_EVERY_S)
        until = time.monotonic() + STATE_S
        while time.monotonic() < until:
            alive()
            with contextlib.suppress(TimeoutError):
                message = control.receive(own_end, ToParent)
                if message is None:
                    break
                relay_to_store(notifier, own_end, message)
    if status := slot.ended(pid):
        logs.event(logs.ERROR, "saved streams are lost", saves=launch.saves, status=status)


def relay_to_store(notifier: systemd.Notifier, pipe: socket.socket, message: Received) -> None:
    """The parent's side of StoreRelay: passes a request on to systemd, and answers it."""
    if message.kind is ToParent.REMOVE:
        notifier.remove_fd(message.facts)
    elif message.kind is ToParent.STORE:
        control.send(pipe, ToWorker.STORED, notifier.store_fd(message.facts, message.fd))
        os.close(message.fd)
