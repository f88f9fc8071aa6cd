"""When a token waits, and for how long at most: pauses between the reads of an upstream's socket."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import uvloop
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    WHOLE,
    Client,
    FakeTransport,
    Rig,
    chunk,
    event,
    events_in,
    get,
    post,
    rig,
    text_of,
    whole_answer,
)

from streamd.config import RouteOverride
from streamd.core.write_interval import WriteInterval
from streamd.net import upstream as net_upstream
from streamd.net.pacing import READ_PAUSE_S_MAX, TICK_S, Pacing
from streamd.net.reading import BACKPRESSURE, PACE, READ_BYTES_MAX, TURN, read_past
from streamd.net.upstream import UpstreamConnection
from streamd.rows import WORD_S

INTERVAL_S = 0.05
SOON_S = 0.01


def began(r: Rig, *fields: str) -> tuple[Client, FakeTransport, UpstreamConnection]:
    """A stream whose upstream was silent for a second, and has begun to send events faster than any interval."""
    client = r.client(post(CHAT, *fields))
    r.reply(SSE_HEAD + chunk(event("one ")))
    r.pass_time(1.0)
    r.reply(chunk(event("two ")))
    r.pass_time(SOON_S)
    link = r.link.protocol
    assert isinstance(link, UpstreamConnection)
    return client, r.link, link


def quicken(r: Rig, *transports: FakeTransport) -> None:
    """Let the events of several streams come faster than any interval, as from now."""
    r.pass_time(1.0)
    for transport in transports:
        transport.feed(chunk(event("and ")))
    r.pass_time(SOON_S)


def busy(r: Rig, share: float, steps: int = 6) -> None:
    """Let the worker find itself that busy, in so many sweeps."""
    since_s = r.loop.time()
    before_s = r.worker._busy_at[0]
    r.worker._busy_s = lambda: before_s + share * (r.loop.time() - since_s)
    r.pass_time(steps * 0.25 + 0.1)


def text(client: Client) -> str:
    return text_of(events_in(client.answer.body))


# -- the pause


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"write_interval_s": INTERVAL_S}, ()),
        ({"write_interval_s": 0.0}, ("X-Stream-Write-Interval: 50ms",)),
        ({"routes": (RouteOverride(path="/v1/chat/completions", write_interval_s=INTERVAL_S),)}, ()),
    ],
)
def test_tokens_that_come_within_the_interval_after_a_read_go_out_in_a_single_write(
    settings: dict[str, Any], fields: tuple[str, ...]
) -> None:
    with rig(**settings) as r:
        client, transport, link = began(r, *fields)
        writes = client.transport.writes
        transport.feed(chunk(event("three ")))
        r.turn()
        assert text(client) == "one two three ", "nothing has waited for it"
        assert link.pauses == PACE and not transport.reading
        for word in ("four ", "five "):
            transport.feed(chunk(event(word)))
        r.pass_time(INTERVAL_S - 2 * TICK_S)
        assert (text(client), client.transport.writes) == ("one two three ", writes + 1)
        r.pass_time(2 * TICK_S)
        assert (text(client), client.transport.writes) == ("one two three four five ", writes + 2)
        r.pass_time(INTERVAL_S)
        assert link.pauses == 0 and transport.reading


def test_without_an_interval_no_read_is_paused() -> None:
    with rig(write_interval_s=0.0) as r:
        client, transport, _ = began(r)
        r.runtime.pacing.adaptive.seconds = 0.5
        r.runtime.pacing.note_load(0.9, 0.0)
        for word in ("three ", "four "):
            transport.feed(chunk(event(word)))
            r.turn()
            assert transport.reading and text(client).endswith(word)


def test_the_adaptive_interval_is_that_of_the_load() -> None:
    with rig(write_interval_s=WORD_S) as r:
        client, transport, _ = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        assert transport.reading, "an idle worker reads on"
        busy(r, 0.9)
        for word, is_read_on in (("four ", True), ("five ", False)):
            transport.feed(chunk(event(word)))
            r.turn()
            assert transport.reading == is_read_on
        transport.feed(chunk(event("six ")))
        r.pass_time(0.1)
        assert text(client) == "one two three four five six "
        busy(r, 0.1)
        transport.feed(chunk(event("seven ")))
        r.turn()
        transport.feed(chunk(event("eight ")))
        r.turn()
        assert transport.reading


@pytest.mark.parametrize(
    ("gap_s", "pauses"), [(INTERVAL_S / 3, True), (1.5 * INTERVAL_S, False), (10 * INTERVAL_S, False)]
)
def test_a_stream_whose_events_come_further_apart_than_its_interval_is_always_read(gap_s: float, pauses: bool) -> None:
    """A pause that gathers nothing is only work."""
    with rig(write_interval_s=INTERVAL_S) as r:
        _client, transport, link = began(r)
        r.pass_time(1.0)
        paused = 0
        for k in range(12):
            transport.feed(chunk(event(f"{k} ")))
            r.turn()
            paused += link.pauses == PACE
            r.pass_time(gap_s)
        assert (paused > 0) == pauses


def test_a_pause_that_gathered_nothing_is_followed_by_none() -> None:
    """A stream that slows down ends its pauses, however long its gaps are."""
    with rig(write_interval_s=INTERVAL_S) as r:
        _client, transport, link = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        assert link.pauses == PACE
        r.pass_time(INTERVAL_S * 1.5)
        transport.feed(chunk(event("four ")))
        r.turn()
        assert link.pauses == 0 and transport.reading


def test_past_its_capacity_a_worker_admits_no_new_stream_and_serves_those_it_has() -> None:
    with rig(write_interval_s=WORD_S) as r:
        client, transport, _ = began(r)
        pacing = r.runtime.pacing
        busy(r, 1.0)
        assert r.client(post(CHAT)).transport.closed is False and len(r.links) == 2
        for _ in range(8):
            pacing._late_s = pacing.adaptive.seconds
            r.pass_time(0.3)
        refused = r.client(post(CHAT)).answer
        assert (refused.status, refused.error["code"]) == (503, "over_capacity")
        assert refused.get("retry-after") is not None and len(r.links) == 2, "no upstream was asked"
        assert r.client(get("/healthz")).answer.status == 200
        transport.feed(chunk(event("three ")))
        r.pass_time(1.0)
        assert text(client) == "one two three "
        busy(r, 0.1, steps=20)
        r.client(post(CHAT))
        assert len(r.links) == 3


def test_the_pause_that_settings_ask_for_is_bounded_and_the_dispatcher_has_the_rest() -> None:
    with rig(write_interval_s=0.5) as r:
        client, transport, link = began(r)
        r.pass_time(1.0)  # the dispatcher has handed out the second event
        writes = client.transport.writes
        transport.feed(chunk(event("three ")))
        r.turn()
        assert client.transport.writes == writes + 1
        transport.feed(chunk(event("four ")))
        r.pass_time(READ_PAUSE_S_MAX)
        assert link.stream is not None and link.stream.events == 4, "it is read, and can be replayed"
        r.pass_time(0.2)
        assert client.transport.writes == writes + 1
        transport.feed(chunk(event("five ")))
        r.pass_time(0.5)
        assert (client.transport.writes, text(client)) == (writes + 2, "one two three four five ")
        transport.feed(chunk(event("six ")))
        r.pass_time(0.05)
        before_s = r.runtime.time()
        transport.feed(chunk(event("seven "), DONE) + LAST)
        r.pass_time(READ_PAUSE_S_MAX)
        assert text(client).endswith("six seven ") and client.answer.whole
        assert r.runtime.time() - before_s <= READ_PAUSE_S_MAX + 1e-9


@pytest.mark.parametrize("wait_s", [0.02, 0.2])
def test_an_end_that_was_read_waits_for_nothing(wait_s: float) -> None:
    """The terminal event comes in the same read as the tokens before it, and the end of the framing behind it."""
    with rig(write_interval_s=wait_s) as r:
        client, transport, _link = began(r)
        transport.feed(chunk(event("three "), DONE))
        r.turn()
        assert b"[DONE]" in client.raw
        assert transport.reading, "the end of the framing is awaited"
        transport.feed(LAST)
        r.turn()
        assert client.answer.whole


def test_a_loss_that_a_pause_hides_comes_after_the_tokens_before_it() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, _link = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        transport.feed(chunk(event("four ")))
        transport.fin()
        r.pass_time(2 * INTERVAL_S)
        r.pass_time(1.0)
        events = events_in(client.answer.body)
        assert text(client) == "one two three four " and b"upstream_truncated" in events[-1].data
        assert client.gone and not client.answer.whole


def test_a_reset_in_a_pause_ends_the_stream() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, _link = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        transport.reset()
        r.turn()
        assert b"upstream_truncated" in client.raw
        r.pass_time(1.0)


def test_a_reader_that_leaves_in_a_pause_ends_the_generation_at_once() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, link = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        assert link.pauses == PACE
        client.fin()
        assert transport.aborted
        r.pass_time(1.0)


def test_a_slow_reader_never_pauses_the_source() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, link = began(r)
        client.transport.capacity = 0
        for k in range(20):
            transport.feed(chunk(event(f"{k} ")))
            r.pass_time(0.1)
        assert transport.reading and not transport.unread
        assert link.stream is not None and link.stream.events == 22
        client.take()
        r.turn()
        assert text(client) == "one two " + "".join(f"{k} " for k in range(20))


def test_a_pause_and_a_turn_are_two_reasons() -> None:
    """A read that waits for its turn isn't paced: the pause follows the read whose bytes are processed."""
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, link = began(r)
        r.runtime.turns.left = 0
        transport.feed(chunk(event("x " * 200) * 3, b": c\n\n"))
        r.loop.call_soon(r.loop.stop)
        r.loop.run_forever()
        assert link.pauses & TURN and not link.pauses & (PACE | BACKPRESSURE)
        r.turn()
        assert not link.pauses & TURN and text(client).count("x ") == 600


def test_bodies_that_are_no_streams_are_read_without_pauses() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        client = r.client(post(WHOLE))
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
        for byte in (b"a", b"b", b"c", b"d"):
            r.reply(byte)
            assert r.link.reading
        assert client.answer.body == b"abcd"


def test_the_next_answer_of_a_connection_is_read_at_once() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        _client, transport, _link = began(r)
        transport.feed(chunk(event("three "), DONE) + LAST)
        r.turn()
        other = r.client(post(WHOLE))
        assert r.link is transport
        r.reply(whole_answer(b"{}"))
        assert other.answer.status == 200 and transport.reading and not r.runtime.pacing.answers


def test_bytes_that_a_pause_hides_are_no_silence_of_the_upstream() -> None:
    with rig(write_interval_s=WORD_S, idle_timeout_s=0.3) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        r.runtime.pacing.adaptive.seconds = 1.0
        for word in ("two ", "three "):
            r.reply(chunk(event(word)))
        assert not r.link.reading
        r.link.feed(chunk(event("four ")))
        r.pass_time(0.9)
        assert b"idle" not in client.raw
        r.pass_time(0.2)
        assert text(client) == "one two three four "
        r.reply(chunk(DONE) + LAST)


def test_the_silence_of_an_upstream_is_counted_from_the_end_of_a_pause() -> None:
    with rig(write_interval_s=WORD_S, idle_timeout_s=0.6) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        r.runtime.pacing.adaptive.seconds = 1.0
        for word in ("two ", "three "):
            r.reply(chunk(event(word)))
        r.pass_time(1.0 + TICK_S)
        assert r.link.reading, "nothing came during the pause"
        r.pass_time(0.5)
        r.reply(chunk(event("four "), DONE) + LAST)
        r.pass_time(1.1)
        assert client.answer.whole and text(client) == "one two three four "


# -- reads past the transport


def test_a_stream_that_goes_on_rests_without_its_transport_reading() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, link = began(r)
        words = [f"{k} " for k in range(10)]
        transport.feed(chunk(event("three ")))
        r.turn()
        for word in words:
            transport.feed(chunk(event(word)))
            r.pass_time(INTERVAL_S)
            assert link.pauses == PACE and not transport.reading
        assert text(client) == "one two three " + "".join(words)
        r.pass_time(2 * INTERVAL_S)
        assert transport.reading, "nothing came: an end may come now"


@pytest.mark.parametrize("ending", [DONE, event("x " * 100)])
def test_what_ends_a_rest_is_read_by_the_transport_again(ending: bytes) -> None:
    """The terminal event, behind which the end of the framing is awaited; and more than a read past it takes."""
    with rig(write_interval_s=INTERVAL_S) as r:
        client, transport, _link = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        count = 1 if ending is DONE else READ_BYTES_MAX // len(ending) + 1
        transport.feed(chunk(*[ending] * count))
        r.pass_time(INTERVAL_S + TICK_S)
        assert transport.reading or ending is not DONE
        r.pass_time(INTERVAL_S)
        assert text(client).count("x ") == (0 if ending is DONE else 100 * count)


def test_a_connection_with_tls_is_read_by_its_transport_alone() -> None:
    """The socket's bytes are ciphertext."""
    with rig(write_interval_s=INTERVAL_S) as r, mock.patch.object(net_upstream, "read_past", side_effect=OSError):
        client, transport, link = began(r)
        settings = link.upstream.settings
        link.upstream.settings = replace(settings, url="https://127.0.0.1:1")
        transport.feed(chunk(event("three ")))
        r.turn()
        assert link.pauses == PACE
        transport.feed(chunk(event("four ")))
        r.pass_time(INTERVAL_S + TICK_S)
        assert text(client) == "one two three four "
        link.upstream.settings = settings


def test_a_loss_that_a_read_past_the_transport_meets_ends_the_stream() -> None:
    """The kernel tells of it once, so the transport would take the connection for ended in order."""
    lost = ConnectionResetError(104, "Connection reset by peer")
    with rig(write_interval_s=INTERVAL_S) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD.replace(b"transfer-encoding: chunked\r\n", b"") + event("one "))
        for word in ("two ", "three "):
            r.reply(event(word))
        assert not r.link.reading, "the answer lasts until the close"
        with mock.patch.object(net_upstream, "read_past", side_effect=lost):
            r.pass_time(2 * INTERVAL_S)
        assert text(client) == "one two three " and b"upstream_truncated" in client.raw


@pytest.mark.parametrize("ending", ["nothing", "fin", "reset"])
def test_read_past_takes_what_has_come_and_leaves_the_end_to_the_transport(ending: str) -> None:
    told: list[object] = []
    heard = asyncio.Event()

    class Reader(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            told.append(data)
            heard.set()

        def eof_received(self) -> None:
            told.append("fin")
            heard.set()

    async def run() -> list[bytes]:
        loop = asyncio.get_running_loop()
        ours, theirs = tcp_pair()
        transport, _ = await loop.create_connection(Reader, sock=ours)
        transport.pause_reading()
        theirs.sendall(b"one")
        theirs.sendall(b"two")
        found = [read_past(transport), read_past(transport)]
        if ending == "nothing":
            theirs.sendall(b"three")
        elif ending == "fin":
            theirs.close()
            found.append(read_past(transport))
        else:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            with pytest.raises(ConnectionResetError):
                read_past(transport)
            heard.set()
        transport.resume_reading()
        await heard.wait()
        transport.abort()
        theirs.close()
        return found

    loop = uvloop.new_event_loop()
    try:
        found = loop.run_until_complete(run())
    finally:
        loop.close()
    assert found[:2] == [b"onetwo", b""] and not any(found[2:])
    assert told == {"nothing": [b"three"], "fin": ["fin"], "reset": []}[ending]


# -- requests


@pytest.mark.parametrize("value", ["2s", "soon", "-1", "", "1001ms"])
def test_a_header_that_is_no_interval_is_refused_before_an_upstream_is_asked(value: str) -> None:
    with rig() as r:
        answer = r.client(post(CHAT, f"X-Stream-Write-Interval: {value}")).answer
        assert (answer.status, answer.error["code"]) == (400, "bad_write_interval")
        assert answer.error["param"] == "x-stream-write-interval"
        assert not r.links


@pytest.mark.parametrize(
    ("own_s", "lower", "asked", "granted"),
    [
        (WORD_S, False, "0", (0.0, True)),
        (WORD_S, False, "100ms", (0.1, True)),
        (WORD_S, True, "0", (0.0, False)),
        (0.05, False, "10ms", (0.05, False)),
        (0.05, True, "10ms", (0.01, False)),
        (0.05, False, "adaptive", (0.05, True)),
        (0.0, False, "0.2", (0.2, False)),
    ],
)
def test_a_request_may_raise_the_interval_and_lower_it_where_its_route_allows(
    own_s: float, lower: bool, asked: str, granted: tuple[float, bool]
) -> None:
    with rig(write_interval_s=own_s, write_interval_lower=lower) as r:
        client = r.client(post(CHAT, f"X-Stream-Write-Interval: {asked}"))
        (stream,) = r.runtime.hub
        assert stream.terms.write_interval == granted
        assert b"write-interval" not in r.link.sent.lower(), "the upstream isn't told"
        r.reply(SSE_HEAD + chunk(event("one "), DONE) + LAST)
        assert client.answer.whole


def test_a_repeated_request_joins_its_stream_with_the_interval_that_it_has() -> None:
    with rig(write_interval_s=0.0) as r:
        r.client(post(CHAT, "Idempotency-Key: k", "X-Stream-Write-Interval: 50ms"))
        r.reply(SSE_HEAD + chunk(event("one ")))
        again = r.client(post(CHAT, "Idempotency-Key: k"))
        (stream,) = r.runtime.hub
        assert stream.terms.write_interval == WriteInterval(0.05) and len(stream.readers) == 2
        r.pass_time(0.1)
        r.reply(chunk(DONE) + LAST)
        assert again.answer.whole


# -- the timer


def test_pauses_that_end_together_have_one_timer() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        found = [began(r) for _ in range(5)]
        quicken(r, *(transport for _, transport, _ in found))
        timers = len(_timers(r))
        for _, transport, _ in found:
            transport.feed(chunk(event("three ")))
        r.turn()
        assert len(_timers(r)) == timers + 1 and not any(transport.reading for _, transport, _ in found)
        r.pass_time(INTERVAL_S)
        assert all(transport.reading for _, transport, _ in found)
        held = r.runtime.counters.held_s
        assert (sum(held.counts), held.sum) == (5, pytest.approx(5 * INTERVAL_S))


def test_a_timer_that_comes_early_ends_its_pauses() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        _, transport, _ = began(r)
        transport.feed(chunk(event("three ")))
        r.turn()
        pacing: Pacing = r.runtime.pacing
        r.loop._jumping.now = pacing._armed_tick * TICK_S - 1e-6
        pacing._wake()
        assert transport.reading and not pacing._due


def test_a_shorter_pause_is_not_held_up_by_a_longer() -> None:
    with rig(write_interval_s=0.0, write_interval_lower=True) as r:
        long = began(r, "X-Stream-Write-Interval: 90ms")
        short = began(r, "X-Stream-Write-Interval: 20ms")
        quicken(r, long[1], short[1])
        for _, transport, _ in (long, short):
            transport.feed(chunk(event("three ")))
        r.turn()
        r.pass_time(0.02)
        assert (long[1].reading, short[1].reading) == (False, True)
        r.pass_time(0.08)
        assert long[1].reading


def test_a_connection_that_raises_in_its_resume_ends_alone() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        (broken, bad, _), (client, good, _) = began(r), began(r)
        quicken(r, bad, good)
        for transport in (bad, good):
            transport.feed(chunk(event("three ")))
        r.turn()

        def refuses() -> None:
            raise OSError(9, "Bad file descriptor")

        bad.resume_reading = refuses  # type: ignore[method-assign]
        good.feed(chunk(event("four ")))
        r.pass_time(2 * INTERVAL_S)
        assert text(client) == "one two and three four " and bad.aborted
        r.pass_time(1.0)
        assert broken.gone
        r.bugs.clear()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs


def _timers(r: Rig) -> list[Any]:
    return [timer for timer in r.loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


# -- figures


def test_events_per_write_can_be_told_from_the_counters() -> None:
    with rig(write_interval_s=INTERVAL_S) as r:
        _client, transport, link = began(r)
        counters = r.runtime.counters
        before = counters.event_writes
        transport.feed(chunk(event("three ")))
        r.turn()
        transport.feed(chunk(*map(event, ("four ", "five ", "six "))))
        r.pass_time(INTERVAL_S)
        assert counters.event_writes == before + 2
        assert link.stream is not None and link.stream.events == 6


def test_the_late_end_of_a_pause_is_told_with_the_load() -> None:
    with rig(write_interval_s=WORD_S) as r:
        pacing: Pacing = r.runtime.pacing
        _, transport, _ = began(r)
        pacing.adaptive.seconds = INTERVAL_S
        pacing.note_load(1.0, 0.0)
        for word in ("three ", "four "):
            transport.feed(chunk(event(word)))
            r.turn()
        assert not transport.reading
        r.loop._jumping.now += 0.2  # another callback holds the loop meanwhile
        r.pass_time(0.0)
        r.pass_time(0.001)
        assert transport.reading
        pacing.note_load(1.0, 0.0)
        assert pacing.adaptive.seconds > INTERVAL_S
        pacing.note_load(1.0, 0.0)
        assert pacing.adaptive.seconds == pytest.approx(1.5 * INTERVAL_S), "a lateness counts once"
        pacing.adaptive.seconds = 0.0
