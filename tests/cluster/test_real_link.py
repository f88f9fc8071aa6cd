"""The link to a real Valkey: its greeting, its faults, its pub/sub, and a failover by a real sentinel."""

from __future__ import annotations

import asyncio
import signal

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import in_loop, until
from real_engine import RealEngine, RealSentinel, asked, engines, real_engine

from streamd.core.guard import Guard
from streamd.engine.channels import ChannelReceiver, Channels
from streamd.engine.connection import EngineError, EngineFault, EngineLost, packed
from streamd.engine.link import Link, LinkOwner, LinkState, LinkTerms
from streamd.engine.sentinels import Sentinels
from streamd.engine_url import ServerAddress

pytestmark = pytest.mark.cluster


class Up:
    """A link to a real server; `heard` has the ups and downs."""

    def __init__(self, port: int, **terms: str) -> None:
        import random

        self.heard: list[EngineFault | str] = []
        self.bugs: list[Exception] = []
        self.port = port
        self.loop = asyncio.get_running_loop()
        self.guard = Guard(lambda where, error: self.bugs.append(error))
        self.rng = random.Random(1)
        self.terms = LinkTerms("streamd-test", **terms)  # type: ignore[arg-type]
        owner = LinkOwner(lambda: self.heard.append("up"), self.heard.append, lambda push: None)
        self.link = Link(
            self.loop, lambda: ServerAddress("127.0.0.1", self.port), self.terms, owner, self.guard, self.rng
        )
        self.link.start()

    def tick(self, later_s: float = 0.0) -> None:
        self.link.tick(self.loop.time() + later_s)


@in_loop
async def test_an_entry_of_a_higher_fence_shuts_the_lower_out() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        await until(lambda: own.link.is_up)
        assert await asked(own, "XADD", "k", "NOMKSTREAM", "1-5", "d", b"\0\1") is None
        assert await asked(own, "XADD", "k", "1-5", "d", b"\0\1 a\n") == b"1-5"
        for late in ("1-5", "1-4", "0-9"):
            refused = await asked(own, "XADD", "k", "NOMKSTREAM", late, "d", "")
            assert isinstance(refused, EngineError) and "equal or smaller" in str(refused)
        assert await asked(own, "XADD", "k", "NOMKSTREAM", "2-0", "w", "m1") == b"2-0"
        assert isinstance(await asked(own, "XADD", "k", "NOMKSTREAM", "2-0", "w", "m2"), EngineError)
        assert await asked(own, "XRANGE", "k", "-", "+") == [
            [b"1-5", [b"d", b"\0\1 a\n"]],
            [b"2-0", [b"w", b"m1"]],
        ]
        own.link.stop()
        assert own.bugs == []


@in_loop
async def test_ten_thousand_commands_keep_their_replies() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        await until(lambda: own.link.is_up)
        replies: list[bytes] = []
        for start in range(0, 10_000, 500):
            for number in range(start, start + 500):
                own.link.ask(packed("ECHO", number), replies.append)
            await until(lambda: own.link.pending == 0)
        assert replies == [b"%d" % number for number in range(10_000)]
        own.link.stop()


@in_loop
async def test_a_stopped_server_is_slow_and_goes_on_without_a_loss() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        await until(lambda: own.link.is_up)
        engine.signal(signal.SIGSTOP)
        replies: list[object] = []
        own.link.ask(packed("INCR", "n"), replies.append)
        own.tick()
        own.tick(1.5)
        assert own.link.state is LinkState.SLOW
        engine.signal(signal.SIGCONT)
        await until(lambda: replies)
        await until(lambda: own.link.pending == 0)
        own.tick(1.6)
        assert own.link.state is LinkState.UP and replies == [1] and own.heard == ["up"]
        own.link.stop()


@in_loop
async def test_a_server_that_stays_stopped_is_given_up_and_taken_again() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        await until(lambda: own.link.is_up)
        engine.signal(signal.SIGSTOP)
        replies: list[object] = []
        own.link.ask(packed("INCR", "n"), replies.append)
        own.tick()
        own.tick(5.5)
        assert own.heard == ["up", EngineFault.TIMEOUT]
        await until(lambda: replies)
        assert isinstance(replies[0], EngineLost)
        engine.signal(signal.SIGCONT)
        await until(lambda: own.link.is_up)
        assert await asked(own, "GET", "n") in (None, b"1"), "it may have been carried out"
        own.link.stop()


@in_loop
async def test_a_killed_server_that_starts_again_is_empty_and_up() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        await until(lambda: own.link.is_up)
        await asked(own, "SET", "a", 1)
        engine.kill()
        await until(lambda: len(own.heard) == 2)
        await engine.start()
        await until(lambda: own.link.is_up)
        assert own.heard[:2] == ["up", EngineFault.CLOSED] and await asked(own, "GET", "a") is None
        own.link.stop()


@in_loop
async def test_cut_connections_are_made_anew() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        for times in range(1, 7):
            await until(lambda times=times: own.link.is_up and own.link.times_up == times)
            engine.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until(lambda times=times: own.link.times_lost == times)
        await until(lambda: own.link.is_up)
        own.link.stop()


@in_loop
async def test_a_full_engine_refuses_writes_and_stays_up() -> None:
    async with real_engine("--maxmemory", "1", "--maxmemory-policy", "noeviction") as engine:
        own = Up(engine.port)
        await until(lambda: own.link.is_up)
        refused = await asked(own, "XADD", "k", "1-1", "d", "x")
        assert isinstance(refused, EngineError) and refused.word == "OOM"
        assert await asked(own, "PUBLISH", "c", "x") == 0
        assert own.heard == ["up"]
        own.link.stop()


ACL = (
    "on",
    ">secret",
    "resetkeys",
    "~sd:*",
    "resetchannels",
    "&sd:*",
    "-@all",
    "+hello",
    "+ping",
    "+xadd",
    "+subscribe",
)


@in_loop
async def test_a_user_has_the_rights_that_its_acl_gives() -> None:
    async with real_engine() as engine:
        engine.ask("ACL", "SETUSER", "streamd", *ACL, "+client|setname")
        own, wrong = Up(engine.port, user="streamd", password="secret"), Up(engine.port, user="streamd", password="x")
        await until(lambda: own.link.is_up and wrong.link.fault is EngineFault.RIGHTS)
        wrong.link.stop()
        assert await asked(own, "XADD", "sd:k", "1-1", "d", "x") == b"1-1"
        for command in (("XADD", "other", "1-1", "d", "x"), ("FLUSHALL",)):
            refused = await asked(own, *command)
            assert isinstance(refused, EngineError) and refused.word == "NOPERM"
        own.link.tell(packed("SUBSCRIBE", "other"))
        await until(lambda: len(own.heard) == 2)
        assert own.heard == ["up", EngineFault.RIGHTS]
        own.link.stop()


@in_loop
async def test_a_replica_is_no_server_to_write_to() -> None:
    primary, replica = RealEngine(), RealEngine()
    with engines(primary, replica):
        await primary.start()
        await replica.start()
        own = Up(replica.port)
        await until(lambda: own.link.is_up)
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        await until(lambda: b"master_link_status:up" in replica.ask("INFO", "replication"))
        own.link.ask(packed("XADD", "k", "1-1", "d", ""), lambda reply: None)
        await until(lambda: len(own.heard) > 1)
        assert own.heard[1] in (EngineFault.READ_ONLY, EngineFault.CLOSED)
        await until(lambda: own.link.fault is EngineFault.READ_ONLY)
        own.link.stop()


@in_loop
async def test_messages_reach_their_channel_before_and_after_a_cut() -> None:
    async with real_engine() as engine:
        own = Up(engine.port)
        channels = Channels(own.loop, lambda: ServerAddress("127.0.0.1", engine.port), own.terms, own.guard, own.rng)
        ready: list[bytes] = []
        texts: list[bytes] = []
        for name in (b"a", b"b"):
            channels.subscribe(name, ChannelReceiver(lambda name=name: ready.append(name), texts.append))
        channels.link.start()
        await until(lambda: len(ready) == 2 and own.link.is_up)
        assert await asked(own, "PUBLISH", "a", "1") == 1
        await until(lambda: texts)
        engine.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: len(ready) == 4)
        assert await asked(own, "PUBLISH", "b", "2") == 1
        await until(lambda: len(texts) == 2)
        channels.unsubscribe(b"b")
        await until(lambda: engine.ask("PUBLISH", "b", "3") == 0)
        assert texts == [b"1", b"2"] and own.bugs == []
        own.link.stop()
        channels.link.stop()


def replicas(sentinel: RealSentinel) -> list[int]:
    """The ports of the replicas that the sentinel knows."""
    return [int(row[row.index(b"port") + 1]) for row in sentinel.ask("SENTINEL", "REPLICAS", "streams")]


@in_loop
async def test_a_failover_by_a_sentinel_moves_the_link() -> None:
    primary, replica = RealEngine("--repl-diskless-sync-delay", "0"), RealEngine("--repl-diskless-sync-delay", "0")
    sentinel = RealSentinel(primary)
    with engines(primary, replica, sentinel):
        await primary.start()
        await replica.start()
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        await until(lambda: b"master_link_status:up" in replica.ask("INFO", "replication"))
        await sentinel.start()
        await until(lambda: b"num-slaves" in sentinel.ask("SENTINEL", "MASTER", "streams"))
        own = Up(0)
        own.link.stop()
        moves: list[ServerAddress | None] = []
        named = Sentinels(
            own.loop,
            [ServerAddress("127.0.0.1", 1), ServerAddress("127.0.0.1", sentinel.port)],
            "streams",
            own.terms,
            own.guard,
            own.rng,
            on_moved=lambda: (moves.append(named.primary), link.moved()),  # type: ignore[func-returns-value]
        )
        heard: list[EngineFault | str] = []
        owner = LinkOwner(lambda: heard.append("up"), heard.append, lambda push: None)
        link = Link(own.loop, lambda: named.primary, own.terms, owner, own.guard, own.rng)
        named.start()
        link.start()
        await until(lambda: link.is_up)
        assert moves == [ServerAddress("127.0.0.1", primary.port)]
        await until(lambda: replica.port in replicas(sentinel))
        primary.kill()
        await until(lambda: len(moves) == 2 and link.is_up)
        assert moves[1] == ServerAddress("127.0.0.1", replica.port)
        written: list[object] = []
        link.ask(packed("XADD", "k", "1-1", "d", "x"), written.append)
        await until(lambda: written)
        assert written == [b"1-1"] and own.bugs == []
        named.stop()
        link.stop()
