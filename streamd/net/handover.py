"""Hands a live connection to the worker that owns its request: its descriptor, or for TLS a tunnel."""

from __future__ import annotations

from streamd.core.refusal import Refusal
from streamd.net.application import Leaving
from streamd.net.peers import Passed
from streamd.net.problem import Problem
from streamd.net.runtime import WORKER_BUSY, Runtime
from streamd.net.splice import open_splice


def hand_over(runtime: Runtime, owner: int, leaving: Leaving) -> None:
    """Afterwards the transport is closed here or belongs to the tunnel. After Problem 503 it is unchanged."""
    if leaving.transport.get_extra_info("ssl_object"):
        _tunnel(runtime, owner, leaving)
        return
    sock = leaving.transport.get_extra_info("socket")
    _send(runtime, owner, Passed(sock, leaving.listener, leaving.price_bytes, leaving.remote, leaving.data))
    leaving.transport.abort()


def _tunnel(runtime: Runtime, owner: int, leaving: Leaving) -> None:
    """Open a tunnel: the keys of TLS are in this process, so the bytes go through here."""
    splice = open_splice(runtime, leaving.price_bytes)
    if isinstance(splice, Refusal):
        raise runtime.refused(splice)
    passed = Passed(splice.far, leaving.listener, splice.pair_bytes, leaving.remote, leaving.data, spliced=True)
    try:
        _send(runtime, owner, passed)
    except Problem:
        splice.give_up()
        raise
    splice.begin(leaving.transport)


def _send(runtime: Runtime, owner: int, passed: Passed) -> None:
    peers = runtime.peers
    assert peers is not None
    if not peers.pass_on(owner, passed):
        raise runtime.refused(WORKER_BUSY)
