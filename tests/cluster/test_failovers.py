"""Failovers by a real sentinel between real daemons: orderly, after a kill, and to a replica that is behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Nodes, nodes, start_engine
from real_engine import RealEngine, RealSentinel, engines
from test_scenes import FLAGS, Fault, play

pytestmark = pytest.mark.cluster


class Guarded(NamedTuple):
    """Nodes with an engine that is a primary with a replica, as a sentinel names them."""

    nodes: Nodes
    primary: RealEngine
    replica: RealEngine
    sentinel: RealSentinel

    def until_moved(self) -> None:
        """Until the sentinel names the replica as the primary."""
        port = str(self.replica.port).encode()
        ask = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "streams")
        self.nodes.until(lambda: self.sentinel.ask(*ask)[1] == port, "failover")


@contextlib.contextmanager
def guarded() -> Iterator[Guarded]:
    primary, replica = (RealEngine("--repl-diskless-sync-delay", "0") for _ in range(2))
    sentinel = RealSentinel(primary)
    with engines(primary, replica, sentinel):
        for engine in (primary, replica):
            start_engine(engine)
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        start_engine(sentinel)
        with nodes(*FLAGS, counted=True, engine=primary, url=f"sentinel://127.0.0.1:{sentinel.port}/streams") as n:
            n.until(lambda: sentinel.ask("SENTINEL", "REPLICAS", "streams"), "replica")
            n.until(lambda: b"master_link_status:up" in replica.ask("INFO", "replication"), "replication")
            yield Guarded(n, primary, replica, sentinel)


def orderly(g: Guarded) -> None:
    """The old primary goes on acknowledging for seconds what the new one never gets."""
    # Until the sentinel has looked at the replica: it refuses to fail over to one that it doesn't know well.
    g.nodes.until(lambda: _is_taken(g.sentinel.ask("SENTINEL", "FAILOVER", "streams")), "replica to fail over to")
    g.until_moved()


def _is_taken(reply: object) -> bool:
    return reply == b"OK"


def kill(g: Guarded) -> None:
    g.primary.kill()
    g.until_moved()


def kill_with_lag(g: Guarded) -> None:
    """What the primary acknowledged in its last two seconds is nowhere else."""
    g.replica.ask("REPLICAOF", "NO", "ONE")
    time.sleep(2.0)
    kill(g)


@pytest.mark.parametrize("failover", [orderly, kill, kill_with_lag])
def test_no_failover_costs_a_reader_an_event(failover: object) -> None:
    with guarded() as g:
        fault: Fault = lambda n: failover(g)  # type: ignore[operator]  # noqa: E731
        play(g.nodes, fault)
