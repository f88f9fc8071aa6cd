"""State process: moves saved streams between the store and the memfds of several workers, and ends.

It runs before the workers start and after they have ended, because it takes the code of the data path, which the parent
doesn't import.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from streamd.daemon import logs
from streamd.daemon.control import STATE_VARIABLE, StateLaunch
from streamd.daemon.slot import unblock_signals
from streamd.daemon.state_store import StateStore, collect, distribute
from streamd.daemon.store_relay import StoreRelay
from streamd.net.peers import owner_of


def run(environ: MutableMapping[str, str] = os.environ) -> int:
    """Run the process that STREAMD__STATE describes; returns its exit status."""
    unblock_signals()
    launch = StateLaunch.decode(environ.pop(STATE_VARIABLE))
    logs.setup(launch.log_level, launch.log_format, journal_stream=environ.get("JOURNAL_STREAM"))
    pipe = socket.socket(fileno=launch.pipe)
    try:
        store = StateStore(StoreRelay(pipe, launch.under_systemd), launch.state_dir, launch.stored)
        if launch.saves:
            collect(store, launch.snapshots)
        else:
            distribute(store, launch.snapshots, lambda stream_id: owner_of(stream_id, len(launch.snapshots)))
    finally:
        logs.finish()
        pipe.detach()  # the pipe's end says that the process has ended, so it stays open until then
    return 0
