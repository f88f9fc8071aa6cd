"""When the last reader leaves, the upstream request is cancelled at once, in every phase and also for many readers that
leave together. And bodies that no client takes are not read from the upstream."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import CHAT, WHOLE, get, post
from loopback import Conn, Daemon, RawUpstream, raw_upstream, run, serving

from streamd.config import UpstreamSettings
from streamd.mockllm import MockOptions
from streamd.reasons import CloseReason

SILENT = MockOptions(interval_s=3600.0, ttft_s=0)  # an event, then silence for longer than a test runs
BEFORE = MockOptions(interval_s=0, ttft_s=3600.0)
MANY = 200


async def gone(d: Daemon, conns: list[Conn], how: str) -> None:
    for conn in conns:
        getattr(conn, how)()
    await d.mock.stats.until(lambda stats: stats.aborted == len(conns))
    await d.until(lambda: not any(d.left().values()))
    assert d.runtime.counters.upstream_cancels == {"mock": len(conns)}
    assert {reason for _, reason in d.ended} == {CloseReason.READER_GONE}


@pytest.mark.parametrize("how", ["fin", "abort"])
@pytest.mark.parametrize("body", [CHAT, WHOLE], ids=["stream", "whole"])
def test_a_reader_that_leaves_before_the_head_cancels(how: str, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(BEFORE) as d:
            conn = await d.connect(post(body))
            await d.mock.stats.until(lambda stats: stats.open == 1)
            await gone(d, [conn], how)

    run(main)


@pytest.mark.parametrize("how", ["fin", "abort"])
def test_a_reader_that_leaves_in_mid_stream_cancels(how: str) -> None:
    async def main() -> None:
        async with serving(SILENT) as d:
            conn = await d.connect(post(CHAT))
            await conn.until(lambda conn: b"data: " in conn.received)
            await gone(d, [conn], how)

    run(main)


@pytest.mark.parametrize("how", ["fin", "abort"])
def test_a_reader_that_leaves_in_a_passed_body_cancels(how: str) -> None:
    async def main() -> None:
        async with serving() as d:
            conn = await d.connect(post(WHOLE, "X-Mock-Fault: stall=1"))
            await conn.until(lambda conn: bool(conn.answers and conn.answers[0].body))
            await gone(d, [conn], how)

    run(main)


def test_a_reader_that_leaves_after_the_commit_cancels() -> None:
    async def main() -> None:
        async with serving(BEFORE, commit_after_s=10.0) as d:
            conn = await d.connect(post(CHAT))
            await d.mock.stats.until(lambda stats: stats.open == 1)
            d.later(11)
            await conn.begun()
            await gone(d, [conn], "fin")

    run(main)


@pytest.mark.parametrize("options", [BEFORE, SILENT], ids=["before the head", "in mid-stream"])
def test_many_readers_that_leave_at_once_cancel_all_requests(options: MockOptions) -> None:
    async def main() -> None:
        async with serving(options) as d:
            conns = [await d.connect(post(CHAT)) for _ in range(MANY)]
            await d.mock.stats.until(lambda stats: stats.open == MANY)
            await gone(d, conns, "abort")

    run(main)


def test_many_readers_that_leave_while_upstreams_connect_cancel_all_requests() -> None:
    async def main() -> None:
        async with serving(BEFORE) as d:
            conns = [await d.connect() for _ in range(MANY)]
            for conn in conns:
                conn._writer.write(post(CHAT))
            for conn in conns[::2]:
                conn.abort()
            await asyncio.sleep(0)
            for conn in conns[1::2]:
                conn.abort()
            await d.until(lambda: not d.runtime.clients and not any(d.left().values()))
            await d.mock.stats.until(lambda stats: stats.connections_open == 0 and stats.open == 0)

    run(main)


def test_a_reader_that_closes_after_done_cancels_nothing() -> None:
    async def main() -> None:
        async with serving() as d:
            conn = await d.connect(post(CHAT))
            await conn.until(lambda conn: b"[DONE]" in conn.received)
            conn.abort()
            await d.until(lambda: d.ended)
            assert d.ended == [("/v1/chat/completions", CloseReason.COMPLETE)]
            await d.mock.stats.until(lambda stats: stats.completed == 1 and stats.aborted == 0)
            assert d.runtime.counters.upstream_cancels == {}

    run(main)


def test_delete_reaches_the_upstream() -> None:
    async def main() -> None:
        async with serving(SILENT) as d:
            conn = await d.connect(post(CHAT))
            await conn.until(lambda conn: b"data: " in conn.received)
            stream_id = conn.answers[0].get("x-stream-id")
            assert (await d.ask(get(f"/v1/streams/{stream_id}", method="DELETE"))).status == 204
            await d.mock.stats.until(lambda stats: stats.aborted == 1)
            await conn.to_the_end()
            assert b'"cancelled"' in conn.received and not conn.answers[0].whole

    run(main)


def test_a_grace_that_runs_out_reaches_the_upstream() -> None:
    async def main() -> None:
        async with serving(SILENT) as d:
            conn = await d.connect(post(CHAT, "X-Stream-Detach-Grace: 60"))
            await conn.until(lambda conn: b"data: " in conn.received)
            conn.abort()
            await d.until(lambda: d.runtime.hub.detached == 1)
            d.sweep_later(59)
            assert d.mock.stats.aborted == 0
            d.sweep_later(61)
            await d.mock.stats.until(lambda stats: stats.aborted == 1)

    run(main)


# -- flow control of passed bodies

BODY_BYTES = 64 * 1024 * 1024


def test_a_large_body_waits_upstream_for_a_reader_that_takes_nothing() -> None:
    """streamd holds a read or two; the rest waits upstream, and arrives whole when the client reads."""
    sent = 0

    async def script(upstream: RawUpstream, reader: Any, writer: Any) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % BODY_BYTES)
        piece = b"x" * 65536
        while sent < BODY_BYTES:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    async def main() -> None:
        async with (
            raw_upstream(script) as upstream,
            serving(upstreams=(UpstreamSettings(name="raw", url=upstream.url),)) as d,
        ):
            conn = await d.connect(get("/v1/files/large"), limit=1024)
            await d.until(lambda: d.runtime.counters.paused and sent > 1_000_000)
            await at_rest(lambda: sent)
            (client,) = d.runtime.clients
            assert client.transport.get_write_buffer_size() < 1_000_000
            assert sent < BODY_BYTES / 2  # at most the kernel's buffers
            total = 0
            while total < BODY_BYTES:
                total += len(await conn._reader.read(1 << 20))
            assert sent == BODY_BYTES

    run(main)


async def at_rest(measure: Any) -> None:
    """Wait until 100 measurements in a row give the same number."""
    last, same = measure(), 0
    while same < 100:
        await asyncio.sleep(0.001)
        now = measure()
        last, same = now, same + 1 if now == last else 0


def test_a_reader_that_leaves_while_the_upstream_is_paused_cancels() -> None:
    async def script(upstream: RawUpstream, reader: Any, writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % BODY_BYTES)
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async def main() -> None:
        async with (
            raw_upstream(script) as upstream,
            serving(upstreams=(UpstreamSettings(name="raw", url=upstream.url),)) as d,
        ):
            conn = await d.connect(get("/v1/files/large"), limit=1024)
            await d.until(lambda: d.runtime.counters.paused)
            conn.abort()
            await d.until(lambda: not upstream.open)
            assert d.runtime.counters.upstream_cancels == {"raw": 1}

    run(main)
