"""Hands a live connection to the worker that owns its request: its descriptor, or for TLS a tunnel."""

from __future__ import annotations

from streamd.core.refusal import Refusal
from streamd.net.application import Leaving
from streamd.net.http_error import HttpError
from streamd.net.peers import Passed
from streamd.net.runtime import WORKER_BUSY, Runtime
from streamd.net.tunnel import open_tunnel


def hand_over(runtime: Runtime, owner: int, leaving: Leaving) -> None:
    """Afterwards the transport is closed here or belongs to the tunnel. After HttpError 503 it is unchanged."""
    if leaving.transport.get_extra_info("ssl_object"):
        _tunnel(runtime, owner, leaving)
        return
    sock = leaving.transport.get_extra_info("socket")
    _send(runtime, owner, Passed(sock, leaving.listener, leaving.price_bytes, leaving.remote, leaving.data))
    leaving.transport.abort()


def _tunnel(runtime: Runtime, owner: int, leaving: Leaving) -> None:
    """Open a tunnel: the keys of TLS are in this process, so the bytes go through here."""
    tunnel = open_tunnel(runtime, leaving.price_bytes)
    if isinstance(tunnel, Refusal):
        raise runtime.refused(tunnel)
    passed = Passed(tunnel.far, leaving.listener, tunnel.pair_bytes, leaving.remote, leaving.data, tunnelled=True)
    try:
        _send(runtime, owner, passed)
    except HttpError:
        tunnel.give_up()
        raise
    tunnel.begin(leaving.transport)


def _send(runtime: Runtime, owner: int, passed: Passed) -> None:
    peers = runtime.peers
    assert peers is not None
    if not peers.pass_on(owner, passed):
        raise runtime.refused(WORKER_BUSY)
