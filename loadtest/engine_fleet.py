"""What a server of the engine spends on 100 nodes: their command streams, scaled, against a real Valkey.

    python loadtest/engine_fleet.py [--seconds 20] [--push-ms 30] [--json]

The whole is 100 nodes with 10,000 streams of 20 tokens/s each, answers of 30 s, a tenth of them followed at one other
node, 200 keys with limits in use. A server of SHARDS has its share of the streams; a tenth of that share runs here,
with the owners and links of streamd itself: 100 members, each with two connections and 67 streams. A second of the
fleet has a turn for each engine_push (33 at 30 ms); in a turn each member sends what it has, and all wait for the
replies. So batches are as large as those of a worker of eight in a node, and the engine's CPU for a second counts,
however long it took. Reads and writes of sockets are the larger part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import uvloop
from engine_cost import WORDS, Member
from engine_rig import EngineProcess, engine

from streamd.core.stream import Stream
from streamd.engine.channels import ChannelReceiver
from streamd.engine.connection import packed
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

NODES = 100
SHARDS = 15
SCALE = 10  # of a shard's load, a tenth runs here
STREAMS_EACH = round(10_000 / SHARDS / SCALE)
FOLLOWED_EACH = round(STREAMS_EACH / 10)
TOKENS_S = 20
ANSWER_S = 30
TICKS_S = 4
LIMITED_KEYS = 200  # of a node, over all shards
FIELD = orjson.dumps([1234, 567890, 12, 123456789, 41.5, 10234.25])


class Unit(NamedTuple):
    """A command, as the engine counted it: calls in a second of the fleet, and its microseconds for each."""

    calls_s: float
    us: float


class FleetNode:
    """A member with its share of the streams, and the channels that it listens to."""

    def __init__(self, member: Member, number: int) -> None:
        self.member = member
        self.number = number
        self.streams: list[Stream] = []
        self.heard = 0

    def open(self) -> Stream:
        return self.member.hub.open(Dialect.CHAT, 0.0)

    def listen(self, stream: Stream) -> None:
        """Follow another node's stream, as far as the engine is concerned."""
        channel = self.member.keys.channel(stream.id)
        self.member.channels.subscribe(channel, ChannelReceiver(lambda: None, self._text))

    def leave(self, stream: Stream) -> None:
        self.member.channels.unsubscribe(self.member.keys.channel(stream.id))

    def _text(self, text: bytes) -> None:
        self.heard += 1


class Fleet:
    """All members, turn by turn."""

    def __init__(self, nodes: list[FleetNode], turns_s: int) -> None:
        self.nodes = nodes
        self.turns_s = turns_s
        self.turn_number = 0
        for node in nodes:
            for place in range(STREAMS_EACH):
                stream = node.open()
                node.streams.append(stream)
                self._follow(node, place, stream)

    def _follower(self, node: FleetNode) -> FleetNode:
        return self.nodes[(node.number + 1) % len(self.nodes)]

    def _follow(self, node: FleetNode, place: int, stream: Stream) -> None:
        if place < FOLLOWED_EACH:
            self._follower(node).listen(stream)

    def _turn(self, node: FleetNode) -> None:
        """A member's turn: tokens come, streams are swept, followed ones pushed."""
        number, turns_s, owner, now = self.turn_number, self.turns_s, node.member.owner, node.member.loop.time()
        for place, stream in enumerate(node.streams):
            # 20 tokens a second, spread over its turns; a stream that nobody follows is written with those of a second
            for _ in range(TOKENS_S * (number + 1) // turns_s - TOKENS_S * number // turns_s):
                stream.append(WORDS[number % len(WORDS)], now)
            if place % turns_s == number % turns_s:
                age_s = number // turns_s + place
                if age_s % ANSWER_S == ANSWER_S - 1:
                    self._replace(node, place, now)
                else:
                    owner.grown(stream)
        owner.push()
        if number % (turns_s // TICKS_S) == node.number % (turns_s // TICKS_S):
            owner.tick(now)

    def _replace(self, node: FleetNode, place: int, now: float) -> None:
        """A stream ends, and another begins."""
        old, new = node.streams[place], node.open()
        old.seal(CloseReason.COMPLETE, now, clean=True)
        node.member.owner.grown(old)
        if place < FOLLOWED_EACH:
            self._follower(node).leave(old)
        node.streams[place] = new
        self._follow(node, place, new)

    def _beat(self, node: FleetNode) -> None:
        """Each second: half a sign of life, and the node's keys with limits that belong to this server."""
        link, second = node.member.link, self.turn_number // self.turns_s
        if (second + node.number) % 2:
            link.ask(packed("HSET", "bench:m", str(node.number), b"x" * 60), _ignore)
        keys = round(LIMITED_KEYS / SHARDS)  # of which a tenth has its turn
        for key in range(keys):
            if (key + second + node.number) % SCALE == 0:
                link.ask(packed("HSET", f"bench:k:{key}", str(node.number), FIELD), _ignore)
                link.ask(packed("HGETALL", f"bench:k:{key}"), _ignore)

    async def second(self) -> None:
        """A second of all members."""
        for _ in range(self.turns_s):
            for node in self.nodes:
                self._turn(node)
                if self.turn_number % self.turns_s == node.number % self.turns_s:
                    self._beat(node)
            self.turn_number += 1
            await self.nodes[0].member.until(lambda: not any(node.member.link.pending for node in self.nodes))


def _ignore(reply: Any) -> None:
    """The reply to a command that needs none."""


async def commands(member: Member) -> dict[str, tuple[int, float]]:
    """Calls and microseconds of each command since the engine's start."""
    text = await member.asked("INFO", "commandstats")
    assert isinstance(text, bytes)
    found = {}
    for line in text.decode().splitlines():
        name, _, facts = line.removeprefix("cmdstat_").partition(":")
        fields = dict(each.split("=") for each in facts.split(",") if "=" in each)
        if "calls" in fields:
            found[name] = (int(fields["calls"]), float(fields["usec"]))
    return found


async def measured(server: EngineProcess, seconds: int, push_ms: int) -> dict[str, Any]:
    """Seconds of the fleet, after as many as an answer takes."""
    members = [Member(server.port) for _ in range(NODES)]
    for member in members:
        await member.ready()
    fleet = Fleet([FleetNode(member, number) for number, member in enumerate(members)], round(1000 / push_ms))
    for _ in range(3):
        await fleet.second()
    before, cpu_s = await commands(members[0]), server.cpu_s()
    heard = sum(node.heard for node in fleet.nodes)
    for _ in range(seconds):
        await fleet.second()
    used_s, after = server.cpu_s() - cpu_s, await commands(members[0])
    heard = sum(node.heard for node in fleet.nodes) - heard
    units = {}
    for name, (calls, us) in after.items():
        was = before.get(name, (0, 0.0))
        if calls - was[0] > seconds:
            units[name] = Unit((calls - was[0]) / seconds, (us - was[1]) / (calls - was[0]))
    refused = sum(node.member.owner.counts.refused_order for node in fleet.nodes)
    for member in members:
        member.close()
    inside_s = sum(unit.calls_s * unit.us for unit in units.values()) / 1e6
    a_second = used_s / seconds
    return {
        "seconds": seconds,
        "push_ms": push_ms,
        "units": {name: unit._asdict() for name, unit in sorted(units.items(), key=lambda item: -item[1].calls_s)},
        "delivered_s": heard / seconds,
        "refused": refused,
        "cpu_s": round(a_second, 4),
        "in_commands_s": round(inside_s, 4),
        "cores_of_a_shard": round(a_second * SCALE, 2),
        "cores_in_all": round(a_second * SCALE * SHARDS, 1),
    }


def shown(found: dict[str, Any]) -> str:
    """The figures as lines."""
    lines = [f"{'command':<18}{'calls/s':>9}{'us each':>9}{'of all nodes, calls/s':>24}"]
    for name, unit in found["units"].items():
        lines.append(f"{name:<18}{unit['calls_s']:>9.0f}{unit['us']:>9.2f}{unit['calls_s'] * SCALE * SHARDS:>24,.0f}")
    cpu, inside = found["cpu_s"], found["in_commands_s"]
    lines += [
        f"delivered to followers: {found['delivered_s']:.0f}/s; refused for their order: {found['refused']}",
        f"the engine's CPU for a second: {cpu:.3f} s, of it {inside:.3f} s in commands and the rest around them",
        f"for all nodes: {found['cores_in_all']} cores; a shard of {SHARDS}: {found['cores_of_a_shard']} cores",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=20, help="seconds of the fleet (default 20)")
    parser.add_argument("--push-ms", type=int, default=30, help="engine_push (default 30)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, engine(Path(folder)) as server:
        found = uvloop.run(measured(server, given.seconds, given.push_ms))
    text: Callable[[dict[str, Any]], str] = (lambda row: json.dumps(row, indent=1)) if given.json else shown
    print(text(found))
    return 1 if found["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
