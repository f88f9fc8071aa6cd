"""Streams followed through a real Valkey: under faults of the engine, each reader gets all of them, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import in_loop, until
from real_engine import RealEngine
from sinks import Loop, Reader, new_hub
from test_real_owner import FAULTS, Owning, owning

from streamd.core.guard import Guard
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine.channels import Channels
from streamd.engine.entry import End
from streamd.engine.facts import StreamFacts
from streamd.engine.follow import CopyPlace, Follow, FollowCounts, FollowOwner, FollowState
from streamd.engine.link import Link, LinkOwner, LinkTerms
from streamd.engine_url import ServerAddress
from streamd.reasons import CloseReason

pytestmark = pytest.mark.cluster


class Following:
    """A member that follows all streams of an owner, over links of its own."""

    def __init__(self, own: Owning) -> None:
        self.own = own
        self.loop = asyncio.get_running_loop()
        self.turns = Loop()
        self.bugs: list[Exception] = []
        self.heard: list[str | End] = []
        self.hub = new_hub(self.turns)
        self.counts = FollowCounts()
        self.streams: dict[str, Stream] = {}
        self.readers: dict[str, Reader] = {}
        guard = Guard(lambda where, error: self.bugs.append(error))
        terms = LinkTerms("streamd-follower", timeout_s=2.0)
        address = lambda: ServerAddress("127.0.0.1", own.port)  # noqa: E731
        rng = random.Random(3)
        self.link = Link(
            self.loop, address, terms, LinkOwner(lambda: None, lambda fault: None, lambda push: None), guard, rng
        )
        self.channels = Channels(self.loop, address, terms, guard, rng)
        self.follows: dict[str, Follow] = {}
        self.link.start()
        self.channels.link.start()

    def follow(self, stream: Stream) -> None:
        keys = self.own.keys
        follow = self.follows[stream.id] = Follow(
            CopyPlace(keys.log(stream.id), keys.channel(stream.id), self.link, self.channels),
            FollowOwner(
                lambda facts, log: self.built(facts, log),
                lambda: self.heard.append(f"absent {stream.id}"),
                lambda: self.heard.append("stale"),
                self.heard.append,
            ),
            self.counts,
            new_log=lambda: ReplayLog(bytes_max=1 << 20, events_max=1 << 20),
            time=self.own.time,
        )
        follow.start()

    def built(self, facts: StreamFacts, log: ReplayLog) -> Stream:
        stream = self.hub.restore(facts.id, log, facts.dialect, 0.0, kind=Stream, terms=facts.terms(16384))
        assert stream is not None
        stream.source = self.follows[facts.id]
        stream.look_into_log(0.0)
        self.streams[facts.id] = stream
        self.readers[facts.id] = Reader(stream, self.turns)
        return stream

    def tick(self) -> None:
        for follow in self.follows.values():
            follow.tick(self.own.time())
        self.link.tick(self.loop.time())
        self.channels.link.tick(self.loop.time())
        self.turns.rest()

    def stop(self) -> None:
        self.link.stop()
        self.channels.link.stop()


@contextlib.asynccontextmanager
async def followed() -> AsyncIterator[tuple[RealEngine, Owning, Following]]:
    async with owning() as (engine, own):
        member = Following(own)
        await until(lambda: member.link.is_up and member.channels.link.is_up)
        try:
            yield engine, own, member
        finally:
            member.stop()


async def run(own: Owning, member: Following, seconds: int) -> None:
    """Streams grow for so many seconds of their life, each in three parts, of which two are pushed."""
    for _ in range(seconds):
        own.grow()
        for _ in range(3):
            own.owner.push()
            own.tick()
            member.tick()
            for _ in range(8):
                await asyncio.sleep(0)
        own.later_s += 1.0


async def finish(own: Owning, member: Following, engine: RealEngine) -> None:
    """Seal all streams, and wait until every reader has its end."""
    await until(lambda: own.link.is_up)
    for stream in own.streams:
        if stream.reason is None:
            stream.seal(CloseReason.COMPLETE, own.time(), clean=True)
        own.owner.grown(stream)
    own.reconnect()  # so that a loss which no command has met is found
    await until(lambda: own.link.is_up and member.link.is_up and member.channels.link.is_up)

    def is_over() -> bool:
        own.later_s += 0.25
        own.tick()
        member.tick()
        return all(follow.state is FollowState.ENDED for follow in member.follows.values())

    await until(is_over)
    for stream in own.streams:
        here = member.streams[stream.id].log
        assert here.read(here.seek(1), bytes_max=1 << 30) == stream.log.read(stream.log.seek(1), bytes_max=1 << 30)
        reader = member.readers[stream.id]
        assert reader.ended is True and reader.gaps == [] and reader.seqs == sorted(set(reader.seqs))
        assert reader.seqs[-1] == stream.log.seq_next - 1
    assert own.bugs == [] and member.bugs == []


async def started(own: Owning, member: Following) -> None:
    """Every stream has a copy, and is followed."""
    while any(stream.log.seq_next == 1 for stream in own.streams):
        own.grow()
    await until(lambda: own.link.pending == 0)
    for stream in own.streams:
        member.follow(stream)
    await until(lambda: len(member.streams) == len(own.streams))


@in_loop
async def test_followed_streams_are_pushed_and_come_to_their_end() -> None:
    async with followed() as (engine, own, member):
        await started(own, member)
        await run(own, member, 30)
        assert member.counts.pushes > 100 and member.counts.rebuilds == 0
        await finish(own, member, engine)
        assert member.heard == []


@pytest.mark.parametrize("name", [*FAULTS, "pubsub", "kill", "stop"])
def test_a_fault_of_the_engine_costs_no_reader_an_event(name: str) -> None:
    @in_loop
    async def main() -> None:
        async with followed() as (engine, own, member):
            await started(own, member)
            for _ in range(3):
                await run(own, member, 4)
                match name:
                    case "pubsub":
                        engine.ask("CLIENT", "KILL", "TYPE", "pubsub")
                    case "kill":
                        engine.kill()
                        await run(own, member, 3)
                        await engine.start()
                    case "stop":
                        engine.signal(signal.SIGSTOP)
                        await run(own, member, 3)
                        engine.signal(signal.SIGCONT)
                    case _:
                        FAULTS[name](engine)
            await run(own, member, 4)
            await finish(own, member, engine)

    main()


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_costs_no_reader_an_event(seed: int) -> None:
    @in_loop
    async def main() -> None:
        rng = random.Random(seed)
        async with followed() as (engine, own, member):
            await started(own, member)
            for _ in range(10):
                await run(own, member, rng.randint(1, 5))
                match rng.choice(["flush", "cut", "pubsub", "kill", "stop", "some"]):
                    case "kill":
                        engine.kill()
                        await run(own, member, rng.randint(0, 4))
                        await engine.start()
                    case "stop":
                        engine.signal(signal.SIGSTOP)
                        await run(own, member, rng.randint(0, 4))
                        engine.signal(signal.SIGCONT)
                    case "pubsub":
                        engine.ask("CLIENT", "KILL", "TYPE", "pubsub")
                    case "some":
                        if engine.ask("DBSIZE"):
                            FAULTS["half of the keys are gone"](engine)
                    case other:
                        FAULTS[{"flush": "flushall", "cut": "cut"}[other]](engine)
            await finish(own, member, engine)

    main()


@in_loop
async def test_two_thousand_finished_streams_are_read_at_another_member() -> None:
    async with followed() as (engine, own, member):
        own.streams = [own.hub.open(own.streams[0].dialect, own.time()) for _ in range(2000)]
        for _ in range(4):
            own.grow()
            await until(lambda: own.link.pending == 0)
        for stream in own.streams:
            stream.seal(CloseReason.COMPLETE, own.time(), clean=True)
            own.owner.grown(stream)
            if not own.link.has_room:
                await until(lambda: own.link.pending == 0)
        await own.settle(engine)
        for stream in own.streams:
            if stream.log.seq_next > 1:
                member.follow(stream)
        own.streams = [stream for stream in own.streams if stream.log.seq_next > 1]
        await finish(own, member, engine)
        assert len(member.readers) > 1900
