"""Channels of the engine: ready once confirmed, again after each connection, and silent once unsubscribed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import FakeEngine, Script, fake_engine, in_loop, push, until
from test_link import Draws

from streamd.core.guard import Guard
from streamd.engine.channels import CHANNELS_TURN_MAX, ChannelReceiver, Channels
from streamd.engine.connection import EngineFault
from streamd.engine.link import LinkState, LinkTerms
from streamd.engine_url import ServerAddress


class Heard:
    """Receivers that note everything they hear, by channel."""

    def __init__(self) -> None:
        self.all: list[tuple[bytes, bytes]] = []  # b"": ready

    def receiver(self, channel: bytes) -> ChannelReceiver:
        return ChannelReceiver(lambda: self.all.append((channel, b"")), lambda text: self.all.append((channel, text)))

    @property
    def ready(self) -> list[bytes]:
        return [channel for channel, text in self.all if not text]


@contextlib.asynccontextmanager
async def listening(script: Script | None = None) -> AsyncIterator[tuple[FakeEngine, Channels, Heard]]:
    bugs: list[Any] = []
    async with fake_engine(script) as engine:
        address = ServerAddress("127.0.0.1", engine.port)
        own = Channels(
            asyncio.get_running_loop(),
            lambda: address,
            LinkTerms("streamd-test"),
            Guard(lambda where, error: bugs.append(error)),
            Draws(),
        )
        own.link.start()
        try:
            yield engine, own, Heard()
        finally:
            own.link.stop()
            assert bugs == []


@in_loop
async def test_a_channel_is_ready_when_the_engine_confirms_it() -> None:
    async with listening(lambda command: b"" if command[0] == b"SUBSCRIBE" else None) as (engine, own, heard):
        own.subscribe(b"c", heard.receiver(b"c"))
        await until(lambda: b"SUBSCRIBE" in engine.names)
        assert heard.all == []
        engine.say(push(b"subscribe", b"c", b"1") + push(b"message", b"c", b"text"))
        await until(lambda: len(heard.all) == 2)
        assert heard.all == [(b"c", b""), (b"c", b"text")]


@in_loop
async def test_the_channels_of_a_turn_are_subscribed_with_one_command() -> None:
    async with listening() as (engine, own, heard):
        await until(lambda: own.link.is_up)
        for channel in (b"a", b"b", b"c"):
            own.subscribe(channel, heard.receiver(channel))
        await until(lambda: len(heard.all) == 3)
        assert engine.commands[1:] == [(b"SUBSCRIBE", b"a", b"b", b"c")]


@in_loop
async def test_after_a_cut_all_channels_are_subscribed_anew_in_batches() -> None:
    async with listening() as (engine, own, heard):
        channels = [b"%d" % number for number in range(2 * CHANNELS_TURN_MAX + 7)]
        for channel in channels:
            own.subscribe(channel, heard.receiver(channel))
        await until(lambda: len(heard.all) == len(channels))
        engine.commands.clear()
        engine.cut()
        await until(lambda: len(heard.all) == 2 * len(channels))
        sizes = [len(command) - 1 for command in engine.commands if command[0] == b"SUBSCRIBE"]
        assert sizes == [CHANNELS_TURN_MAX, CHANNELS_TURN_MAX, 7]
        assert heard.ready == channels * 2 and own.link.times_up == 2


@in_loop
async def test_an_unsubscribed_channel_is_silent() -> None:
    async with listening() as (engine, own, heard):
        for channel in (b"a", b"b"):
            own.subscribe(channel, heard.receiver(channel))
        await until(lambda: len(heard.all) == 2)
        own.unsubscribe(b"a")
        own.unsubscribe(b"never")
        await until(lambda: engine.names[-1] == b"UNSUBSCRIBE")
        engine.say(push(b"message", b"a", b"late") + push(b"message", b"b", b"text") + push(b"odd"))
        await until(lambda: len(heard.all) == 3)
        assert heard.all[-1] == (b"b", b"text") and len(own) == 1


@in_loop
async def test_a_channel_given_up_before_it_was_asked_for_is_not_asked_for() -> None:
    async with listening() as (engine, own, heard):
        await until(lambda: own.link.is_up)
        own.subscribe(b"a", heard.receiver(b"a"))
        own.subscribe(b"b", heard.receiver(b"b"))
        own.unsubscribe(b"a")
        await until(lambda: heard.all)
        assert heard.ready == [b"b"] and engine.commands[1:] == [(b"SUBSCRIBE", b"b")]


@in_loop
async def test_a_user_without_the_right_to_listen_is_named_as_the_fault() -> None:
    noperm = b"-NOPERM this user has no permissions to access one of the channels used as arguments\r\n"
    async with listening(lambda command: noperm if command[0] == b"SUBSCRIBE" else None) as (_, own, heard):
        own.subscribe(b"a", heard.receiver(b"a"))
        await until(lambda: own.link.times_lost >= 2)
        own.link.stop()
        assert heard.all == [] and own.link.state is LinkState.STOPPED


@in_loop
async def test_the_refusal_of_a_channel_is_no_reply_to_a_ping() -> None:
    faults: list[EngineFault] = []
    noperm = b"-NOPERM this user has no permissions to access one of the channels used as arguments\r\n"
    async with listening(lambda command: b"" if command[0] == b"PING" else None) as (engine, own, _):
        await until(lambda: own.link.is_up)
        own.link._owner = own.link._owner._replace(on_down=faults.append)
        own.link.tick(asyncio.get_running_loop().time())
        await until(lambda: b"PING" in engine.names)
        engine.say(noperm)
        await until(lambda: faults)
        assert faults == [EngineFault.RIGHTS]
