"""What copies in an engine cost: memory there, CPU of owner, engine and follower, and the time to read many copies.

    python loadtest/engine_cost.py [--rounds 5] [--json]

All in one process, without HTTP; loadtest/engine_bench.py measures whole daemons. A token is a chat chunk of some 230
bytes; streams make 10 tokens a second. The rows of a round are measured in turn, so that a busy machine hurts all of
them alike; medians over the rounds. Ratios count, times belong to this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import uvloop
from engine_rig import EngineProcess, engine

from streamd.core.guard import BARE
from streamd.core.hub import Hub
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine.channels import Channels
from streamd.engine.connection import packed
from streamd.engine.facts import StreamFacts, facts_of, pack_facts
from streamd.engine.follow import CopyPlace, Follow, FollowCounts, FollowOwner, FollowState
from streamd.engine.link import Link, LinkOwner, LinkTerms
from streamd.engine.owner import CopyOwner, EngineServer
from streamd.engine.shards import CopyKeys
from streamd.engine_url import ServerAddress
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

TOKENS_S = 10
TICKS_PER_S = 33  # pushes of followed streams


def chunk(text: str) -> bytes:
    return (
        b'data: {"id":"chatcmpl-123","object":"chat.completion.chunk","created":1700000000,"model":"llama-3.3-70b",'
        b'"system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null,'
        b'"finish_reason":null}]}\n\n' % text.encode()
    )


WORDS = [chunk(word) for word in (" the", " token", " of", " a", " model", ",", " stream", "ing", " answer", ".")]


class Member:
    """A process's part: a link, channels, an owner, streams."""

    def __init__(self, port: int) -> None:
        self.loop = asyncio.get_running_loop()
        address = lambda: ServerAddress("127.0.0.1", port)  # noqa: E731
        terms, rng = LinkTerms("streamd-bench"), random.Random(1)
        owner = LinkOwner(lambda: self.owner.server_up(self.server), lambda fault: None, lambda push: None)
        self.link = Link(self.loop, address, terms, owner, BARE, rng)
        self.channels = Channels(self.loop, address, terms, BARE, rng)
        self.server = EngineServer(self.link)
        self.keys = CopyKeys("bench:")
        self.owner = CopyOwner(
            [self.server],
            lambda stream_id: self.server,
            member="m1",
            keys=self.keys,
            guard=BARE,
            time=self.loop.time,
            soon=self.loop.call_soon,
            facts=lambda stream: pack_facts(facts_of(stream, self.loop.time(), 1e9)),
        )
        self.hub = Hub(
            log_bytes_max=1 << 40, stream_log_bytes_max=1 << 20, stream_log_events_max=1 << 20, detached_max=1
        )
        self.link.start()
        self.channels.link.start()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.0005)

    async def ready(self) -> None:
        await self.until(lambda: self.link.is_up and self.channels.link.is_up)

    async def asked(self, *command: str | int | bytes) -> object:
        reply: asyncio.Future[object] = self.loop.create_future()
        self.link.ask(packed(*command), reply.set_result)
        return await reply

    async def memory(self) -> int:
        text = await self.asked("INFO", "memory")
        assert isinstance(text, bytes)
        return int(text.partition(b"used_memory:")[2].split()[0])

    def close(self) -> None:
        self.link.stop()
        self.channels.link.stop()


async def raw_memory(member: Member, streams: int) -> float:
    """Bytes in the engine of a 500-token stream, an entry for each event."""
    before = await member.memory()
    for number in range(streams):
        for seq in range(500):
            member.link.ask(packed("XADD", f"raw:{number}", "*", "e", WORDS[seq % 10]), lambda reply: None)
        await member.until(lambda: member.link.pending == 0)
    return (await member.memory() - before) / streams


async def copy_memory(member: Member, streams: int) -> float:
    """The same of a copy, written once in ten tokens."""
    before = await member.memory()
    for _ in range(streams):
        stream = member.hub.open(Dialect.CHAT, 0.0)
        for _ in range(50):
            for word in WORDS:
                stream.append(word, 0.0)
            member.owner.grown(stream)
            await member.until(lambda: member.link.pending == 0)
    return (await member.memory() - before) / streams


async def writing(
    engine: EngineProcess, member: Member, streams: list[Stream], *, copies: bool, raw: bool
) -> list[float]:
    """Thirty seconds of the streams' life, as fast as it goes: CPU of this process and of the engine, us a token."""
    seconds = 30
    own, theirs = time.process_time(), engine.cpu_s()
    for _ in range(seconds):
        for part in range(TOKENS_S):
            for number, stream in enumerate(streams):
                stream.append(WORDS[part], 0.0)
                if raw:
                    member.link.ask(packed("XADD", f"raw:{stream.id}", "*", "e", WORDS[part]), lambda reply: None)
                elif copies and number % TOKENS_S == part:
                    member.owner.grown(stream)
                if not member.link.has_room:
                    await member.until(lambda: member.link.pending < 100)
            for _ in range(TICKS_PER_S // TOKENS_S):
                member.owner.push()
                await asyncio.sleep(0)
    await member.until(lambda: member.link.pending == 0)
    tokens = seconds * TOKENS_S * len(streams)
    return [(time.process_time() - own) * 1e6 / tokens, (engine.cpu_s() - theirs) * 1e6 / tokens]


async def owned_memory(member: Member, streams: list[Stream]) -> float:
    """The bytes that a copy takes in its owner's process."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for stream in streams:
        member.owner.grown(stream)
        if not member.link.has_room:
            await member.until(lambda: member.link.pending == 0)
    await member.until(lambda: member.link.pending == 0)
    member.server.written.clear()
    gc.collect()
    held = (tracemalloc.get_traced_memory()[0] - before) / len(streams)
    tracemalloc.stop()
    return held


async def reading(engine: EngineProcess, owner: Member, streams: list[Stream]) -> float:
    """The time in which another member reads finished streams to their end, in seconds."""
    for stream in streams:
        stream.seal(CloseReason.COMPLETE, 0.0, clean=True)
        owner.owner.grown(stream)
        if not owner.link.has_room:
            await owner.until(lambda: owner.link.pending == 0)
    while any(copy.is_behind for copy in owner.server.copies.values()):
        owner.owner.tick(owner.loop.time())
        await asyncio.sleep(0.001)
    member = Member(engine.port)
    await member.ready()
    follows: list[Follow] = []
    began = time.perf_counter()

    def built(facts: StreamFacts, log: ReplayLog) -> Stream:
        stream = member.hub.restore(facts.id, log, facts.dialect, 0.0, kind=Stream, terms=facts.terms(16384))
        assert stream is not None
        return stream

    for stream in streams:
        keys = member.keys
        place = CopyPlace(keys.log(stream.id), keys.channel(stream.id), member.link, member.channels)
        calls = FollowOwner(built, lambda: None, lambda: None, lambda end: None)
        new_log = lambda: ReplayLog(bytes_max=1 << 20, events_max=1 << 20)  # noqa: E731
        follow = Follow(place, calls, FollowCounts(), new_log=new_log, time=member.loop.time)
        follow.start()
        follows.append(follow)
    ended_at = began
    while any(follow.state is not FollowState.ENDED for follow in follows):
        await asyncio.sleep(0.001)
        for follow in follows:
            follow.tick(member.loop.time())
        ended_at = time.perf_counter()
    member.close()
    return ended_at - began


async def measure(engine: EngineProcess, rounds: int) -> dict[str, float]:
    """Measure all, and print it; the figures by name."""
    member = Member(engine.port)
    await member.ready()
    raw, copy = await raw_memory(member, 100), await copy_memory(member, 100)
    print(f"engine memory of a 500-token stream: raw events {raw:,.0f} B, copy {copy:,.0f} B (1/{raw / copy:.0f})")
    await member.asked("FLUSHALL")
    member.server.copies.clear()
    member.server.unsettled.clear()

    gc.collect()
    kinds = {"nothing": (False, False), "copies": (True, False), "an XADD a token": (False, True)}
    rows: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (copies, is_raw) in kinds.items():
            streams = [member.hub.open(Dialect.CHAT, 0.0) for _ in range(200)]
            rows[kind].append(await writing(engine, member, streams, copies=copies, raw=is_raw))
        await member.asked("FLUSHALL")
    engine_us: dict[str, float] = {}
    for kind, measured in rows.items():
        owner_us, engine_us[kind] = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{kind:16} owner {owner_us:6.2f} us a token, engine {engine_us[kind]:5.2f}")
    member.server.copies.clear()
    member.server.unsettled.clear()

    streams = [member.hub.open(Dialect.CHAT, 0.0) for _ in range(2000)]
    for stream in streams:
        for _ in range(20):
            for word in WORDS:
                stream.append(word, 0.0)
    owned = await owned_memory(member, streams)
    print(f"owner's memory of a copy: {owned:,.0f} B")
    seconds = await reading(engine, member, streams)
    print(f"2,000 finished streams of 200 tokens are read at another member in {seconds:.2f} s")
    member.close()
    return {
        "raw_bytes": raw,
        "copy_bytes": copy,
        "owned_bytes": owned,
        "engine_ratio": engine_us["copies"] / engine_us["an XADD a token"],
        "read_s": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="the figures as a last line of JSON")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="streamd-engine-") as folder,
        engine(Path(folder)) as running,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        figures = runner.run(measure(running, args.rounds))
    if args.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
