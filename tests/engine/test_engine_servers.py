"""The engine as its URLs name it: what they say, and what streamd makes of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import FakeEngine, bulk, fake_engine, in_loop, until
from test_link import Draws
from test_sentinels import Named

from streamd.core.guard import Guard
from streamd.engine.channels import ChannelReceiver
from streamd.engine.link import LinkTerms
from streamd.engine.owner import EngineServer
from streamd.engine.servers import EngineServers
from streamd.engine_url import EngineUrl, ServerAddress, parse_engine_url, parse_engine_urls
from streamd.rows import Refused

URLS = {
    "redis://h": EngineUrl(False, (ServerAddress("h", 6379),), ""),
    "valkey://H.example:7000": EngineUrl(False, (ServerAddress("h.example", 7000),), ""),
    "rediss://10.0.0.1": EngineUrl(True, (ServerAddress("10.0.0.1", 6379),), ""),
    "valkeys://[::1]:6380": EngineUrl(True, (ServerAddress("::1", 6380),), ""),
    "redis://[fe80::1]": EngineUrl(False, (ServerAddress("fe80::1", 6379),), ""),
    "sentinel://a,b:1/streams": EngineUrl(False, (ServerAddress("a", 26379), ServerAddress("b", 1)), "streams"),
    "sentinels://a/s.1_x-y": EngineUrl(True, (ServerAddress("a", 26379),), "s.1_x-y"),
}


@pytest.mark.parametrize("text", URLS)
def test_a_url_says_where_the_engine_is(text: str) -> None:
    assert parse_engine_url(text) == URLS[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h",
        "h:6379",
        "http://h",
        "redis://",
        "redis://a,b",
        "redis://user:secret@h",
        "redis://:secret@h",
        "redis://h/0",
        "redis://h?db=1",
        "redis://h:0",
        "redis://h:99999",
        "redis://h:x",
        "redis://unix:/x",
        "redis://a b",
        "sentinel://a",
        "sentinel://a/",
        "sentinel://a/a b",
        "sentinel:///streams",
        "sentinel://a,,b/streams",
        "sentinel://" + ",".join(["h"] * 17) + "/s",
        "cluster://h",
    ],
)
def test_a_url_that_says_something_else_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_engine_url(text)


def test_shards_are_told_apart_by_names_that_failovers_and_tls_do_not_change() -> None:
    names = [url.name for url in parse_engine_urls(["redis://A", "redis://a:6380", "sentinel://x,y/one"])]
    assert names == ["a:6379", "a:6380", "one"]
    assert parse_engine_url("sentinels://z/one").name == "one"
    for twice in (["redis://a", "valkey://A:6379"], ["sentinel://a/s", "sentinel://b/s"], ["redis://a", "rediss://b"]):
        with pytest.raises(Refused):
            parse_engine_urls(twice)


@contextlib.asynccontextmanager
async def servers(*texts: str) -> AsyncIterator[tuple[EngineServers, list[EngineServer]]]:
    bugs: list[Any] = []
    ups: list[EngineServer] = []
    own = EngineServers(
        asyncio.get_running_loop(),
        parse_engine_urls(texts),
        LinkTerms("streamd-test"),
        Guard(lambda where, error: bugs.append(error)),
        Draws(),
        on_up=ups.append,
    )
    own.start()
    try:
        yield own, ups
    finally:
        own.stop()
        assert bugs == []


def connected(engine: FakeEngine) -> int:
    return engine.names.count(b"HELLO")


@in_loop
async def test_each_stream_has_its_server_and_each_server_two_connections() -> None:
    async with fake_engine() as one, fake_engine() as two:
        urls = (f"redis://127.0.0.1:{one.port}", f"redis://127.0.0.1:{two.port}")
        async with servers(*urls) as (own, ups):
            await until(lambda: all(shard.link.is_up and shard.channels.link.is_up for shard in own.shards))
            assert (connected(one), connected(two)) == (2, 2) and len(ups) == 2
            chosen = [own.shards.index(own.shard_of(f"s_{number}")) for number in range(200)]
            assert 50 < sum(chosen) < 150
            two.cut()
            await until(lambda: len(ups) == 3)
            assert ups[2] is own.shards[1].server and own.shards[0].link.times_lost == 0
            own.tick(asyncio.get_running_loop().time())
            await until(lambda: one.names.count(b"PING") == 2)
        assert not own.shards[0].link.is_up


@in_loop
async def test_behind_sentinels_both_connections_move_to_the_new_primary() -> None:
    async with fake_engine() as first, fake_engine() as second:
        script = Named(b"%d" % first.port)
        script.reply = b"*2\r\n" + bulk("127.0.0.1") + bulk(str(first.port))
        async with (
            fake_engine(script) as sentinel,
            servers(f"sentinel://127.0.0.1:{sentinel.port}/streams") as (own, ups),
        ):
            (shard,) = own.shards
            ready: list[int] = []
            shard.channels.subscribe(b"c", ChannelReceiver(lambda: ready.append(1), lambda text: None))
            await until(lambda: ready and shard.link.is_up)
            assert connected(first) == 2 and connected(second) == 0
            script.reply = b"*2\r\n" + bulk("127.0.0.1") + bulk(str(second.port))
            own.tick(asyncio.get_running_loop().time() + 2.1)
            await until(lambda: len(ready) == 2 and len(ups) == 2)
            assert connected(second) == 2
