"""Faults of the engine and of the way to it, between real daemons and a real Valkey: no reader loses an event.

A scene runs on daemons that have lived through the scenes before it. Each has counted generations at both nodes, with
readers at the owner, at the other node and at both in turn, and some with readers at their owner alone; then its fault;
then readers that come late. All of them have every event, exactly once and as the upstream made it, and the end.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Nodes, nodes, start_engine
from patient import PatientReader

pytestmark = pytest.mark.cluster

# Long enough for every fault here: a reader that is sent away may come back to a node that doesn't know yet.
FLAGS = ("--engine-timeout", "2s", "--engine-patience", "15s")

Fault = Callable[[Nodes], None]


@pytest.fixture(scope="module")
def pair() -> Iterator[Nodes]:
    with nodes(*FLAGS, counted=True) as n:
        yield n


def play(n: Nodes, fault: Fault) -> list[PatientReader]:
    """A scene with this fault; its readers."""
    unfollowed = [n.begin(home) for home in "ab"]
    readers = list(unfollowed)
    for home, away in (("a", "b"), ("b", "a")):
        for _ in range(2):
            first = n.begin(home)
            n.until_read([first], 5)
            readers += (first, n.also(first, away), n.also(first, away, home))
    n.until_read(readers, 10)
    fault(n)
    readers += [n.also(reader, away) for reader, away in zip(readers[2::3], "bbaa", strict=True)]
    readers += [n.also(reader, away) for reader, away in zip(unfollowed, "ba", strict=True)]
    n.until_read(readers, 10)
    n.finish(readers)
    n.until_up()
    n.until(lambda: all(n.status(name)["lag_s"] == 0 for name in n.daemons), "copies")
    n.finish([n.also(reader, away) for reader, away in zip(unfollowed, "ba", strict=True)])
    for name, daemon in n.daemons.items():
        assert not [line for line in daemon.lines if "bug" in line or "Traceback" in line], name
    return readers


def for_s(seconds: float, change: Fault, back: Fault) -> Fault:
    """A fault that lasts: its length is what the scene is about."""

    def fault(n: Nodes) -> None:
        change(n)
        time.sleep(seconds)
        back(n)

    return fault


def of_way(name: str, node: str = "b") -> Fault:
    """A method of a node's way to the engine."""
    return lambda n: getattr(n.ways[node], name)()


def both(*faults: Fault) -> Fault:
    def fault(n: Nodes) -> None:
        for each in faults:
            each(n)

    return fault


def kill(n: Nodes) -> None:
    n.engine.kill()


def stop(n: Nodes) -> None:
    n.engine.signal(signal.SIGSTOP)


def go_on(n: Nodes) -> None:
    n.engine.signal(signal.SIGCONT)


def start(n: Nodes) -> None:
    start_engine(n.engine)


def slow(n: Nodes) -> None:
    """150 ms each way, for the next two seconds."""
    for way in n.ways.values():
        way.delay_s = 0.15
    time.sleep(2.0)
    for way in n.ways.values():
        way.delay_s = 0.0


def fill(n: Nodes, policy: str) -> None:
    """The engine is full, and under most policies gives keys up, as long as streams grow."""
    used = int(
        next(line for line in n.engine.ask("INFO", "memory").splitlines() if line.startswith(b"used_memory:"))[12:]
    )
    n.engine.ask("CONFIG", "SET", "maxmemory-policy", policy)
    n.engine.ask("CONFIG", "SET", "maxmemory", used + 20_000)
    deadline = time.monotonic() + 2.0
    number = 0
    while time.monotonic() < deadline:
        number += 1
        n.engine.ask("SET", f"filler:{number}", "x" * 500, "PX", 3_600_000)
        time.sleep(0.005)


def evict(policy: str) -> Fault:
    """A full engine, and then one with room."""

    def fault(n: Nodes) -> None:
        fill(n, policy)
        n.engine.ask("CONFIG", "SET", "maxmemory", 0)
        n.engine.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")

    return fault


def cut(kind: str, times: int) -> Fault:
    def fault(n: Nodes) -> None:
        for _ in range(times):
            n.engine.ask("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            n.until_up()

    return fault


SCENES: dict[str, Fault] = {
    "kill -9, and empty again after 1.5 s": for_s(1.5, kill, start),
    "kill -9, and empty again at once": both(kill, start),
    "SIGSTOP for 1 s": for_s(1.0, stop, go_on),
    "SIGSTOP for 5 s": for_s(5.0, stop, go_on),
    "FLUSHALL": lambda n: n.engine.ask("FLUSHALL"),
    "FLUSHALL twice": for_s(1.2, lambda n: n.engine.ask("FLUSHALL"), lambda n: n.engine.ask("FLUSHALL")),
    "all connections cut three times": cut("normal", 3),
    "connections for pushes cut three times": cut("pubsub", 3),
    "a slow network": slow,
    "a hole in front of the owner for 1.5 s": for_s(1.5, of_way("hole", "a"), of_way("open", "a")),
    "a hole in front of both for 4 s": for_s(
        4.0, both(of_way("hole", "a"), of_way("hole")), both(of_way("open", "a"), of_way("open"))
    ),
    "a member hears nothing for 4 s": for_s(4.0, of_way("half_open"), of_way("open")),
    "the engine hears nothing of a member for 4 s": for_s(4.0, of_way("mute"), of_way("open")),
    "resets": both(of_way("reset", "a"), of_way("reset"), of_way("reset", "a")),
    "no connection for 2 s": for_s(2.0, of_way("shut"), of_way("open")),
    "a full engine": evict("noeviction"),
    **{
        f"evictions, {policy}": evict(policy)
        for policy in ("volatile-ttl", "volatile-lru", "allkeys-lru", "allkeys-random")
    },
}


@pytest.mark.parametrize("name", SCENES)
def test_no_fault_of_the_engine_costs_a_reader_an_event(pair: Nodes, name: str) -> None:
    readers = play(pair, SCENES[name])
    assert all(reader.exact > 10 for reader in readers[:14] if len(reader.statuses) < 2), "most come as they were made"
