"""Slow and hostile clients over real sockets: bounded, counted, closed, and a reader beside them loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import CHAT, events_in, get, post, text_of
from loopback import FAST, Conn, Daemon, run, serving

from streamd.net import intake
from streamd.reasons import CloseReason

# Why a second: on a busy machine the loop may be late by more than less, before it handles the bytes it has.
QUICK: dict[str, Any] = {
    "head_timeout_s": 1.0,
    "body_grace_s": 1.0,
    "keepalive_timeout_s": 1.0,
    "stall_timeout_s": 1.0,
    "close_timeout_s": 1.0,
}
CROWD = 30
SLOW = dataclasses.replace(FAST, tokens=40, interval_s=0.015)  # for a reader that stays during the whole test


async def never_sends(daemon: Daemon) -> Conn:
    return await daemon.connect()


async def half_a_head(daemon: Daemon) -> Conn:
    return await daemon.connect(b"GET / HTTP/1.1\r\nHo")


async def byte_by_byte(daemon: Daemon) -> Conn:
    """Send byte after byte: a deadline that each byte renewed would never come."""
    conn = await daemon.connect()

    async def drip() -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            for byte in get("/" + "x" * 2000):
                await conn.send(bytes((byte,)))
                await asyncio.sleep(0.02)

    conn.dripping = asyncio.ensure_future(drip())  # type: ignore[attr-defined]
    return conn


async def half_a_body(daemon: Daemon) -> Conn:
    return await daemon.connect(post(CHAT)[:-5])


async def half_a_chunk(daemon: Daemon) -> Conn:
    head = get("/v1/embeddings", "Transfer-Encoding: chunked", method="POST")
    return await daemon.connect(head + b"ff\r\nxx")


async def idles(daemon: Daemon) -> Conn:
    conn = await daemon.connect(get())
    await conn.answer()
    return conn


async def never_reads(daemon: Daemon) -> Conn:
    return await daemon.connect(post(CHAT | {"max_tokens": 2000}), receive_bytes=4096, limit=1)


async def floods_behind(daemon: Daemon) -> Conn:
    conn = await daemon.connect(post(CHAT))
    with contextlib.suppress(ConnectionError):
        await conn.send(get() * 1000)
    return conn


async def half_closes(daemon: Daemon) -> Conn:
    conn = await daemon.connect(post(CHAT))
    conn.fin()
    return conn


async def half_closes_early(daemon: Daemon) -> Conn:
    conn = await daemon.connect(post(CHAT)[:-5])
    conn.fin()
    return conn


async def resets(daemon: Daemon) -> Conn:
    conn = await daemon.connect(post(CHAT))
    conn.abort()
    return conn


async def resets_at_once(daemon: Daemon) -> Conn:
    conn = await daemon.connect()
    conn.abort()
    return conn


async def garbage(daemon: Daemon) -> Conn:
    conn = await daemon.connect()
    with contextlib.suppress(ConnectionError):
        await conn.send(os.urandom(4096))
    return conn


Kind = Callable[[Daemon], Awaitable[Conn]]
KINDS: list[tuple[Kind, set[CloseReason]]] = [
    (never_sends, {CloseReason.HEAD_TIMEOUT}),
    (half_a_head, {CloseReason.HEAD_TIMEOUT}),
    (byte_by_byte, {CloseReason.HEAD_TIMEOUT}),
    (half_a_body, {CloseReason.BODY_TIMEOUT}),
    (half_a_chunk, {CloseReason.BODY_TIMEOUT}),
    (idles, {CloseReason.IDLE}),
    (floods_behind, {CloseReason.PIPELINE_FULL}),
    (half_closes, {CloseReason.READER_GONE}),
    (half_closes_early, {CloseReason.READER_GONE}),
    (resets, {CloseReason.READER_GONE}),
    (resets_at_once, {CloseReason.READER_GONE, CloseReason.IDLE}),
    (garbage, {CloseReason.BAD_REQUEST, CloseReason.READER_GONE}),
]


def ends(daemon: Daemon) -> dict[CloseReason, int]:
    """Closed connections by reason, without the complete connections."""
    counts = daemon.runtime.counters.connections_closed
    return {reason: count for reason, count in counts.items() if count and reason is not CloseReason.COMPLETE}


@pytest.mark.parametrize(("kind", "reasons"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_a_crowd_of_hostile_clients_is_closed_and_a_reader_loses_nothing(
    kind: Kind, reasons: set[CloseReason], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "WINDOW_S_MIN", 1.0)

    async def main() -> None:
        async with serving(SLOW, **QUICK) as daemon:
            reader = await daemon.connect(post(CHAT, "Connection: close"))
            await reader.begun()
            crowd = [await kind(daemon) for _ in range(CROWD)]
            await daemon.until(lambda: sum(ends(daemon).values()) == CROWD)
            assert set(ends(daemon)) <= reasons
            answer = await reader.answer()
            events = events_in(answer.body)
            assert answer.whole and len(text_of(events)) > 80
            seqs = [each.seq for each in events]
            assert seqs == list(range(1, len(seqs) + 1))
            for conn in crowd:
                if hasattr(conn, "dripping"):
                    conn.dripping.cancel()
            assert (await daemon.ask(get())).status == 200

    run(main)


def test_readers_that_never_read_hold_at_most_the_promised_bytes() -> None:
    """Each reader holds at most its ring and a frame in user space, and is closed after stall_timeout."""
    endless = dataclasses.replace(FAST, tokens=20_000)

    async def main() -> None:
        async with serving(endless, **QUICK) as daemon:
            for _ in range(CROWD):
                await never_reads(daemon)
            runtime = daemon.runtime
            await daemon.until(lambda: sum(client.paused for client in runtime.clients) >= CROWD - ended(daemon))
            for client in runtime.clients:
                if client.reader is not None:
                    assert client.transport.get_write_buffer_size() <= runtime.settings.catchup_bytes_max * 3
            await daemon.until(lambda: ended(daemon) == CROWD)
            assert set(ends(daemon)) == {CloseReason.STALLED}

    run(main)


def ended(daemon: Daemon) -> int:
    return sum(ends(daemon).values())


def test_a_storm_leaves_no_descriptor_behind() -> None:
    """All kinds at once, several times: afterwards there are as many descriptors and connections as before."""

    async def main() -> None:
        async with serving(**QUICK) as daemon:
            assert (await daemon.ask(get())).status == 200
            await daemon.until(lambda: not daemon.runtime.clients)
            storm = [resets_at_once, resets, garbage, half_closes, half_closes_early, floods_behind]
            counts = []
            for _ in range(3):
                conns = [await kind(daemon) for kind in storm for _ in range(10)]
                await daemon.until(lambda: not daemon.runtime.clients)
                for conn in conns:
                    conn.close()
                await daemon.until(lambda: not any(daemon.left().values()))
                daemon.sweep_later(10_000)
                for upstream in daemon.worker.upstreams:
                    upstream.close_idle()
                await daemon.mock.stats.until(lambda stats: stats.connections_open == 0)
                await asyncio.sleep(0)
                counts.append((len(os.listdir("/proc/self/fd")), len(daemon.runtime.sweep), len(daemon.streams)))
            assert counts[1] == counts[2]
            assert counts[2][2] == 0

    run(main)


def test_idle_connections_cost_no_more_than_their_price() -> None:
    """Silent connections hold no state of a request, and a single sweep closes all of them."""

    async def main() -> None:
        async with serving(head_timeout_s=60.0, close_timeout_s=1.0) as daemon:
            conns = [await daemon.connect() for _ in range(400)]
            await daemon.until(lambda: len(daemon.runtime.clients) == len(conns))
            assert all(client.answer is None for client in daemon.runtime.clients)
            assert daemon.runtime.bodies_bytes == 0
            for client in tuple(daemon.runtime.clients):
                client.due_at = client.on_due(daemon.loop.time() + 61)  # as the sweep does a minute later
            await daemon.until(lambda: ends(daemon).get(CloseReason.HEAD_TIMEOUT) == len(conns))

    run(main)
