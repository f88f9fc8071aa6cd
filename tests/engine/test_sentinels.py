"""Sentinels name the primary: asked, listened to, and replaced by the next when they are gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import Command, FakeEngine, bulk, fake_engine, hello, in_loop, push, until
from test_link import Draws

from streamd.core.guard import Guard
from streamd.engine.connection import EngineFault
from streamd.engine.link import LinkTerms
from streamd.engine.sentinels import Sentinels
from streamd.engine_url import ServerAddress


class Named:
    """A sentinel's script: it names `primary`."""

    def __init__(self, port: bytes) -> None:
        self.reply = b"*2\r\n" + bulk("10.0.0.1") + bulk(port)

    def __call__(self, command: Command) -> bytes | None:
        if command[0] == b"HELLO":
            return hello(mode="sentinel", role="sentinel")
        return self.reply if command[0] == b"SENTINEL" else None


@contextlib.asynccontextmanager
async def asked(*ports: int) -> AsyncIterator[tuple[Sentinels, list[ServerAddress | None]]]:
    moves: list[ServerAddress | None] = []
    own = Sentinels(
        asyncio.get_running_loop(),
        [ServerAddress("127.0.0.1", port) for port in ports],
        "streams",
        LinkTerms("streamd-test"),
        Guard(lambda where, error: moves.append(None)),
        Draws(),
        on_moved=lambda: moves.append(own.primary),
    )
    own.start()
    try:
        yield own, moves
    finally:
        own.stop()


FIRST, SECOND = ServerAddress("10.0.0.1", 6379), ServerAddress("10.0.0.2", 6380)


def switched(name: bytes, port: bytes = b"6380") -> bytes:
    return push(b"message", b"+switch-master", name + b" 10.0.0.1 6379 10.0.0.2 " + port)


async def settle(engine: FakeEngine, own: Sentinels) -> None:
    """Until the sentinel's words so far are heard."""
    asks = engine.names.count(b"SENTINEL")
    own._ask_at = 0.0
    own.tick(asyncio.get_running_loop().time())
    await until(lambda: engine.names.count(b"SENTINEL") > asks and own.link.pending == 0)


@in_loop
async def test_a_sentinel_is_asked_and_listened_to() -> None:
    async with fake_engine(Named(b"6379")) as engine, asked(engine.port) as (own, moves):
        await until(lambda: own.primary)
        assert (own.primary, moves) == (FIRST, [FIRST])
        assert (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", b"streams") in engine.commands
        engine.say(switched(b"other") + switched(b"streams"))
        await until(lambda: len(moves) > 1)
        assert moves == [FIRST, SECOND]


@in_loop
async def test_a_lost_message_is_made_good_by_asking_again() -> None:
    script = Named(b"6379")
    async with fake_engine(script) as engine, asked(engine.port) as (own, moves):
        await until(lambda: own.primary)
        script.reply = b"*2\r\n" + bulk("10.0.0.2") + bulk("6380")
        own.tick(asyncio.get_running_loop().time() + 2.1)
        await until(lambda: len(moves) > 1)
        assert moves == [FIRST, SECOND]


@in_loop
async def test_the_next_sentinel_is_asked_when_one_is_gone() -> None:
    async with fake_engine(Named(b"6379")) as engine:
        gone = engine.port
    async with (
        fake_engine(Named(b"6379")) as one,
        fake_engine(Named(b"6380")) as other,
        asked(gone, one.port, other.port) as (own, moves),
    ):
        await until(lambda: moves)
        one.cut()
        await until(lambda: len(moves) > 1)
        assert [move.port for move in moves if move] == [6379, 6380]
        assert own.primary == ServerAddress("10.0.0.1", 6380)


@in_loop
async def test_nonsense_moves_nobody() -> None:
    async with fake_engine(Named(b"6379")) as engine, asked(engine.port) as (own, moves):
        await until(lambda: own.primary)
        for port in (b"x", b"0", b"65536"):
            engine.say(switched(b"streams", port))
        engine.say(push(b"message", b"+switch-master", b"streams 10.0.0.2"))
        await settle(engine, own)
        assert moves == [FIRST]


@pytest.mark.parametrize("reply", [b"_\r\n", b"-ERR No such master with that name\r\n", b"*1\r\n+x\r\n"])
def test_a_sentinel_without_the_name_names_nobody(reply: bytes) -> None:
    @in_loop
    async def main() -> None:
        script = Named(b"6379")
        script.reply = reply
        async with fake_engine(script) as engine, asked(engine.port) as (own, moves):
            await until(lambda: own.link.is_up)
            await settle(engine, own)
            assert own.primary is None and moves == [] and own.link.is_up

    main()


@in_loop
async def test_a_server_that_is_no_sentinel_is_not_asked() -> None:
    async with fake_engine() as engine, asked(engine.port) as (own, moves):
        await until(lambda: own.link.fault is EngineFault.READ_ONLY)
        assert moves == [] and b"SENTINEL" not in engine.names
