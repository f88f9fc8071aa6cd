"""An owner's copies in a real Valkey: killed, emptied, evicted, full, cut, failed over; byte for byte in each case."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import in_loop, until
from fakes import event
from real_engine import RealEngine, engines
from sinks import new_hub

from streamd.core.guard import Guard
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine.connection import EngineFault
from streamd.engine.entry import parse
from streamd.engine.facts import facts_of, pack_facts
from streamd.engine.link import Link, LinkOwner, LinkTerms
from streamd.engine.owner import CopyOwner, CopyState, EngineServer
from streamd.engine.reading import CopyReader
from streamd.engine.shards import CopyKeys
from streamd.engine_url import ServerAddress
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

pytestmark = pytest.mark.cluster

STREAMS = 30


class Owning:
    """Streams that grow, their owner, and a link to a real server."""

    def __init__(self, port: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.port = port
        self.bugs: list[Exception] = []
        self.later_s = 0.0
        self.random = random.Random(7)
        guard = Guard(lambda where, error: self.bugs.append(error))
        self.link = Link(
            self.loop,
            lambda: ServerAddress("127.0.0.1", self.port),
            LinkTerms("streamd-test", timeout_s=2.0),
            LinkOwner(lambda: self.owner.server_up(self.server), lambda fault: None, lambda push: None),
            guard,
            self.random,
        )
        self.server = EngineServer(self.link)
        self.keys = CopyKeys("test:")
        self.owner = CopyOwner(
            [self.server],
            lambda stream_id: self.server,
            member="m1",
            keys=self.keys,
            guard=guard,
            time=self.time,
            soon=self.loop.call_soon,
            facts=lambda stream: pack_facts(facts_of(stream, self.time(), 1e9)),
        )
        self.hub = new_hub()
        self.streams = [self.hub.open(Dialect.CHAT, self.time()) for _ in range(STREAMS)]
        self.link.start()

    def time(self) -> float:
        return self.loop.time() + self.later_s

    def grow(self) -> None:
        """A second of the streams' life."""
        for stream in self.streams:
            for _ in range(self.random.randint(0, 20) if stream.reason is None else 0):
                stream.append(event(self.random.choice([" a", " token", "é", '"', "x" * 200])), self.time())
            self.owner.grown(stream)

    def tick(self) -> None:
        self.owner.tick(self.time())
        self.link.tick(self.loop.time())

    async def run(self, seconds: int) -> None:
        """Grow for so many seconds of the streams' life, with the replies of the engine in between."""
        for _ in range(seconds):
            self.grow()
            self.tick()
            for _ in range(20):
                await asyncio.sleep(0)

    async def settle(self, engine: RealEngine) -> None:
        """Until the engine has everything, as fast as it can."""

        def is_settled() -> bool:
            self.later_s += 0.25
            self.tick()
            return not self.server.unsettled and not self.link.pending

        await until(lambda: self.link.is_up)
        await until(is_settled)
        for stream in self.streams:
            self.check(engine, stream)
        assert self.bugs == []

    def check(self, engine: RealEngine, stream: Stream) -> None:
        entries = [parse(entry) for entry in engine.ask("XRANGE", self.keys.log(stream.id), "-", "+")]
        starts = [number for number, entry in enumerate(entries) if entry.starts_over]
        reader = CopyReader(lambda: ReplayLog(bytes_max=1 << 20, events_max=1 << 20))
        for entry in entries[starts[-1] :] if starts else []:
            reader.take(entry)
        if stream.log.seq_next > 1:
            assert reader.log is not None and reader.log.parts() == stream.log.parts()
        assert (reader.end is not None) == (stream.reason is not None)

    def reconnect(self) -> None:
        """So that a loss which no command has met is found."""
        if self.link._connection is not None:
            self.link._connection.close(EngineFault.CLOSED)


@contextlib.asynccontextmanager
async def owning(*options: str) -> AsyncIterator[tuple[RealEngine, Owning]]:
    engine = RealEngine(*options)
    with engines(engine):
        await engine.start()
        own = Owning(engine.port)
        await until(lambda: own.link.is_up)
        try:
            yield engine, own
        finally:
            own.link.stop()


@in_loop
async def test_streams_that_grow_are_in_the_engine_to_their_end() -> None:
    async with owning() as (engine, own):
        await own.run(30)
        for stream in own.streams[::2]:
            stream.seal(CloseReason.COMPLETE, own.time(), clean=True)
            own.owner.grown(stream)
        await own.settle(engine)
        states = {own.server.copies[stream.id].state for stream in own.streams[::2]}
        assert states == {CopyState.DONE}
        key = own.keys.log(own.streams[0].id)
        assert 0 < engine.ask("PTTL", key) <= 10_000 < engine.ask("PTTL", own.keys.log(own.streams[1].id))


FAULTS: dict[str, Any] = {
    "flushall": lambda engine: engine.ask("FLUSHALL"),
    "cut": lambda engine: engine.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
    "half of the keys are gone": lambda engine: engine.ask("DEL", *engine.ask("KEYS", "*")[::2]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_nothing_behind(name: str) -> None:
    @in_loop
    async def main() -> None:
        async with owning() as (engine, own):
            for _ in range(4):
                await own.run(5)
                FAULTS[name](engine)
            await own.run(5)
            await own.settle(engine)

    main()


@in_loop
async def test_a_killed_engine_that_comes_back_empty_gets_every_log() -> None:
    async with owning() as (engine, own):
        await own.run(10)
        engine.kill()
        await own.run(10)
        await engine.start()
        await own.run(5)
        await own.settle(engine)
        assert own.link.times_up >= 2


@in_loop
async def test_an_engine_that_stands_still_gets_what_it_missed() -> None:
    async with owning() as (engine, own):
        await own.run(10)
        engine.signal(signal.SIGSTOP)
        await own.run(20)
        assert own.link.pending <= STREAMS + 30, "no write is queued behind another of its stream"
        engine.signal(signal.SIGCONT)
        await own.settle(engine)


@in_loop
async def test_a_full_engine_gets_everything_once_it_has_room() -> None:
    async with owning("--maxmemory-policy", "noeviction") as (engine, own):
        await own.run(10)
        engine.ask("CONFIG", "SET", "maxmemory", "1")
        await own.run(20)
        assert own.owner.counts.refused_full > 0
        engine.ask("CONFIG", "SET", "maxmemory", "0")
        own.later_s += 2
        await own.settle(engine)


@in_loop
async def test_a_failover_to_a_replica_that_is_behind_is_made_good() -> None:
    replica = RealEngine("--repl-diskless-sync-delay", "0")
    async with owning() as (engine, own):
        with engines(replica):
            await replica.start()
            replica.ask("REPLICAOF", "127.0.0.1", engine.port)
            await until(lambda: b"master_link_status:up" in replica.ask("INFO", "replication"))
            await own.run(10)
            replica.ask("REPLICAOF", "NO", "ONE")  # from here on it gets nothing of what the primary acknowledges
            await own.run(10)
            await until(lambda: own.link.pending == 0)
            own.port = replica.port
            own.link.moved()
            await own.run(5)
            await own.settle(replica)


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_faults_loses_nothing(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        async with owning() as (engine, own):
            for _ in range(12):
                await own.run(rng.randint(1, 6))
                fault = rng.choice(["flush", "cut", "kill", "stop", "some"])
                if fault == "kill":
                    engine.kill()
                    await own.run(rng.randint(0, 5))
                    await engine.start()
                elif fault == "stop":
                    engine.signal(signal.SIGSTOP)
                    await own.run(rng.randint(0, 5))
                    engine.signal(signal.SIGCONT)
                else:
                    name = {"flush": "flushall", "cut": "cut", "some": "half of the keys are gone"}[fault]
                    with contextlib.suppress(Exception):
                        FAULTS[name](engine)
                if rng.random() < 0.3:
                    live = [stream for stream in own.streams if stream.reason is None]
                    stream = rng.choice(live)
                    stream.seal(CloseReason.COMPLETE, own.time(), clean=True)
                    own.owner.grown(stream)
            await until(lambda: own.link.is_up)
            own.reconnect()
            await until(lambda: own.link.is_up and own.link.times_up > 1)
            await own.settle(engine)

    in_loop(main)()
