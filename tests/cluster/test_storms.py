"""Storms over three real daemons and a real Valkey: random faults, in a random order, and readers that go on anywhere.

A storm takes some 30 s. Three run with make test-cluster; ARGS='--storms 50 -k storm' runs fifty. Its faults are those
of the engine (kill, stall, FLUSHALL, cut connections), of the way to it (hole, reset, no connection, delay), and the
death of a node.

Every reader ends in one of these ways: it has each event exactly once, as the upstream made it, and the end; or its
stream's node was killed, and it was told where the stream ends (`node_lost`, the same place for all of its readers).
A reader of a node that lived and was taken for lost goes on behind that place.
"""

from __future__ import annotations

import random
import signal
import time

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from nodes import Nodes, nodes, start_engine
from patient import Ending, PatientReader
from served import WAIT_S

pytestmark = pytest.mark.cluster

STEPS = 12
NAMES = "abc"


class Storm:
    """Random faults, and readers beside them."""

    def __init__(self, n: Nodes, seed: int) -> None:
        self.n = n
        self.rng = random.Random(seed)
        self.readers: list[PatientReader] = []
        self.homes: dict[str, str] = {}  # the owner of each stream
        self.killed: set[str] = set()  # of owners that were killed
        self.log: list[str] = []  # for the report of a failure

    def begin(self) -> None:
        home = self.rng.choice(NAMES)
        others = self.rng.sample(NAMES, 3)
        reader = self.n.begin(home, *others)
        self.homes[reader.stream_id] = home
        self.readers.append(reader)

    def join(self) -> None:
        """A reader more, at one node or at all in turn."""
        first = self.rng.choice(self.readers)
        homes = self.rng.sample(NAMES, self.rng.choice([1, 3]))
        self.readers.append(self.n.also(first, *homes))

    def step(self) -> None:
        rng, n = self.rng, self.n
        name, lasts_s = rng.choice(NAMES), rng.uniform(0.1, 3.0)
        fault = rng.choice(
            [
                "kill",
                "empty",
                "empty",
                "stall",
                "flush",
                "flush",
                "cut",
                "pubsub",
                "hole",
                "mute",
                "reset",
                "shut",
                "slow",
            ]
        )
        self.log.append(f"{fault} {name} {lasts_s:.1f}")
        way = n.ways[name]
        match fault:
            case "kill":
                self.killed |= {stream_id for stream_id, home in self.homes.items() if home == name}
                n.restart(name)
                n.until_up(name)
            case "empty":
                n.engine.kill()
                time.sleep(rng.choice([0.0, lasts_s]))
                start_engine(n.engine)
            case "stall":
                n.engine.signal(signal.SIGSTOP)
                time.sleep(lasts_s)
                n.engine.signal(signal.SIGCONT)
            case "flush":
                n.engine.ask("FLUSHALL")
            case "cut" | "pubsub":
                kind = {"cut": "normal", "pubsub": "pubsub"}[fault]
                n.engine.ask("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            case "reset":
                way.reset()
            case "slow":
                way.delay_s = 0.1
                time.sleep(lasts_s)
                way.delay_s = 0.0
            case _:
                {"hole": way.hole, "mute": way.mute, "shut": way.shut}[fault]()
                time.sleep(lasts_s)
                way.open()

    def run(self) -> None:
        for _ in range(4):
            self.begin()
        for _ in range(STEPS):
            self.step()
            self.rng.choice([self.begin, self.join, self.join, lambda: None])()
            time.sleep(self.rng.choice([0.0, 0.3, 1.5]))
        self.n.until_up()

    def finish(self) -> None:
        """All generations end, and each reader has what it should."""
        living = [reader for reader in self.readers if reader.stream_id not in self.killed]
        self.n.until_read(living)
        for reader in self.readers:
            reader.generation.end()
        for reader in self.readers:
            reader.join(WAIT_S)
            told = (reader.wrong, reader.ending, reader.seq, reader.statuses[-8:], self.log, self.n.lines())
            assert not reader.wrong and reader.ending is not None, told
            is_killed = reader.stream_id in self.killed
            assert reader.ending in ((Ending.NODE_LOST, Ending.GONE, Ending.DONE) if is_killed else _LIVING), told
            if not is_killed:
                self.check_whole(reader if reader.ending is Ending.DONE else self.n.goes_on(reader))
        for stream_id in self.killed:
            places = {reader.lost_at for reader in self.readers if reader.stream_id == stream_id} - {None}
            assert len(places) <= 1, (places, self.log)

    def check_whole(self, reader: PatientReader) -> None:
        reader.join(WAIT_S)
        assert not reader.wrong and reader.ending is Ending.DONE, (reader.wrong, reader.ending, self.log)
        assert reader.seq == reader.generation.made + 2


# A node that was cut off for as long as its lease counts as lost, and takes its streams back.
_LIVING = (Ending.DONE, Ending.NODE_LOST)


def test_a_storm_costs_no_reader_an_event(storm_seed: int) -> None:
    with nodes("--engine-timeout", "2s", "--engine-patience", "15s", names=NAMES, counted=True) as n:
        storm = Storm(n, storm_seed)
        storm.run()
        storm.finish()
        for daemon in n.daemons.values():
            assert not [line for line in daemon.lines if "Traceback" in line]
