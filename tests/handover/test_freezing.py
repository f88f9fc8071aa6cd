"""Frozen units: nothing touches them, whatever happens around them, and thawed they go on as if nothing had been."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, get, post, rig, whole_answer

from streamd.handover.freezing import Freezer, FrozenUnit
from streamd.handover.unit import Unit, unit_of_client, unit_of_stream
from streamd.net.frozen import NotNow
from streamd.reasons import CloseReason

HEALTH = get("/healthz")
LONG_S = 5000.0  # longer than every time limit
MORE = chunk(event("more "))
ANSWER = b'{"id":"a","choices":[]}'
LINES = "POST /v1/streams/a/events HTTP/1.1\r\nhost: a\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n"


# Drawn anew in each run.
_drawn = re.compile(rb"req_[0-9a-f]+|s_[\w-]+|retry: \d+|date: [^\r]+|epoch\W+\w+")


def idle(r: Rig) -> Client:
    return r.client(HEALTH)


def in_head(r: Rig) -> Client:
    return r.client(HEALTH[:9])


def in_body(r: Rig) -> Client:
    return r.client(post(WHOLE)[:-5])


def asked(r: Rig) -> Client:
    return r.client(post(CHAT))


def proxied(r: Rig) -> Client:
    client = r.client(post(WHOLE))
    r.reply(whole_answer(ANSWER)[:-5])
    return client


def streaming(r: Rig) -> Client:
    client = r.client(post(CHAT))
    r.reply(SSE_HEAD + chunk(event("one ")) + MORE[:1])
    return client


def full(r: Rig) -> Client:
    client = r.client(post(CHAT), capacity=400)
    r.reply(SSE_HEAD + chunk(event("one ")) + chunk(event("two ")) + MORE[:1])
    assert client.connection.paused
    return client


def waiting(r: Rig) -> Client:
    return r.client(get("/v1/streams/later?wait=9"))


def reading_published(r: Rig) -> Client:
    r.client(get("/v1/streams/a", "Content-Length: 0", method="PUT"))
    return r.client(get("/v1/streams/a"))


def publishing(r: Rig) -> Client:
    reading_published(r)
    return r.client(LINES.format("application/x-ndjson").encode() + b'3\r\n{"a\r\n')


STATES = (idle, in_head, in_body, asked, proxied, streaming, full, waiting, reading_published, publishing)


def go_on(r: Rig, state: Callable[[Rig], Client], client: Client) -> None:
    """Bring the state's request to its end."""
    if state in (idle, in_head):
        client.send(HEALTH if state is idle else HEALTH[9:])
    elif state is in_body:
        client.send(post(WHOLE)[-5:])
        r.reply(whole_answer(ANSWER))
    elif state is proxied:
        r.link.feed(whole_answer(ANSWER)[-5:])
    elif state is asked:
        r.link.feed(SSE_HEAD + chunk(event("one "), DONE) + LAST)
    elif state in (streaming, full):
        r.link.feed((MORE + chunk(DONE) + LAST)[1:])
        client.take()
    elif state is publishing:
        client.send(b'6\r\n":1}\r\n\r\n0\r\n\r\n')
    else:
        r.client(get("/v1/streams/later", "Content-Length: 0", method="PUT"))
        client.fin()
    for name in ("a", "later"):
        r.client(get(f"/v1/streams/{name}", method="DELETE"))
    r.turn()


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_thawed_unit_goes_on_as_if_nothing_had_been(state: Callable[[Rig], Client]) -> None:
    answers = []
    for freezes in (True, False):
        with rig(commit_after_s=3600.0) as r:
            client = state(r)
            if freezes:
                freezer = Freezer(r.runtime)
                freezer.freeze(unit_of_client(r.runtime, client.connection))
                r.turn()
                freezer.end()
                r.turn()
            go_on(r, state, client)
            answers.append((_drawn.sub(b"", client.raw), r.ended))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_no_deadline_and_no_byte_touches_a_frozen_unit(state: Callable[[Rig], Client]) -> None:
    with rig() as r:
        client = state(r)
        before, unit = client.raw, unit_of_client(r.runtime, client.connection)
        frozen = FrozenUnit(r.runtime, unit)  # and the sweep goes on
        client.transport.feed(HEALTH)
        for link in r.links:
            link.feed(b"x")
        r.pass_quietly(LONG_S)
        assert client.raw == before and not client.transport.closed and not client.transport.reading
        assert client.connection not in r.runtime.clients and not any(link.closed for link in r.links if unit.link)
        assert unit.stream is None or unit.stream not in list(r.runtime.hub)
        frozen.thaw(r.runtime)
        client.reset()


def test_requests_that_come_meanwhile_are_answered_after_it_and_tokens_go_on() -> None:
    with rig() as r:
        other, frozen = streaming(r), r.links[-1]
        client = streaming(r)
        stream = client.connection.reader.stream  # type: ignore[union-attr]
        freezer = Freezer(r.runtime)
        freezer.freeze(unit_of_stream(r.runtime, stream))
        late = r.client(get(f"/v1/streams/{stream.id}"))
        health = r.client(HEALTH)
        before = len(other.raw)
        frozen.feed(MORE[1:])
        r.turn()
        assert not late.raw and not health.raw and len(other.raw) == before, "bytes that are no whole chunk wait"
        freezer.end()
        r.turn()
        assert b"one " in late.raw and health.answer.status == 200 and b"more " in other.raw
        freezer = Freezer(r.runtime)
        frozen.feed(chunk(event("next ")))
        r.turn()
        assert b"next " in other.raw, "a token has a way of its own"
        freezer.end()
        for each in (other, client, late):
            each.fin()


def test_an_upstream_whose_bytes_wait_is_not_judged_by_the_clock() -> None:
    with rig(ttft_timeout_s=5.0, commit_after_s=3600.0) as r:
        client = asked(r)
        r.runtime.turns.hold()
        r.link.feed(SSE_HEAD + chunk(event("one ")))
        (exchange,) = r.exchanges
        exchange.on_due(r.loop.time() + LONG_S)
        r.runtime.turns.release()
        r.turn()
        assert b"one " in client.raw
        client.fin()


def test_what_is_scheduled_for_a_later_turn_has_to_be_over() -> None:
    with rig() as r:
        client = Client(r)
        client.transport.feed(post(CHAT))
        freezer = Freezer(r.runtime)
        with pytest.raises(NotNow, match="no connection is there yet"):
            freezer.freeze(unit_of_client(r.runtime, client.connection))
        freezer.end()
        r.turn()
        r.link.feed(SSE_HEAD + chunk(event("one ")))
        r.turn()
        r.link.feed(chunk(event("two ")))
        unit = unit_of_client(r.runtime, client.connection)
        freezer = Freezer(r.runtime)
        with pytest.raises(NotNow, match="wait for this turn's end"):
            freezer.freeze(unit)
        r.turn()
        freezer.freeze(unit)
        freezer.end()
        client.reset()


def test_a_pass_over_the_readers_has_to_be_over_and_is_hurried() -> None:
    with rig(write_interval_s=0.9) as r:
        client = streaming(r)
        r.reply(MORE[1:])
        r.reply(chunk(event("three ")))
        unit = unit_of_client(r.runtime, client.connection)
        assert unit.stream is not None and unit.stream.fanout is not None
        freezer = Freezer(r.runtime)
        if unit.stream.fanout.running:
            with pytest.raises(NotNow, match="a pass over"):
                freezer.freeze(unit)
            r.turn()
        freezer.freeze(unit)
        assert b"three " in client.raw, "held tokens go out before the freeze"
        freezer.end()
        client.reset()


def test_connections_that_are_lost_meanwhile_end_when_they_are_thawed() -> None:
    with rig() as r:
        client = streaming(r)
        freezer = Freezer(r.runtime)
        frozen = freezer.freeze(unit_of_client(r.runtime, client.connection))
        assert frozen.is_whole
        client.reset()
        r.link.reset()
        r.turn()
        assert not frozen.is_whole and not r.ended
        freezer.end()
        r.turn()
        assert [reason for _, reason, _ in r.ended] == [CloseReason.READER_GONE] and not r.exchanges


def test_a_client_that_took_bytes_meanwhile_gets_the_rest_when_it_is_thawed() -> None:
    with rig() as r:
        client = full(r)
        freezer = Freezer(r.runtime)
        assert freezer.freeze(unit_of_client(r.runtime, client.connection)).unsent
        client.take()
        before = client.raw
        freezer.end()
        r.turn()
        assert client.raw == before and not client.connection.paused, "nothing was held in the ring"
        r.reply(MORE[1:])
        assert b"more " in client.raw
        client.reset()


def test_an_idle_upstream_connection_is_asked_again_only_after_the_thaw() -> None:
    with rig() as r:
        r.client(post(WHOLE))
        r.reply(whole_answer(ANSWER))
        (upstream,) = r.worker.upstreams
        (link,) = upstream._idle
        freezer = Freezer(r.runtime)
        freezer.freeze(Unit(link=link))
        assert upstream.take_idle(r.loop.time()) is None
        freezer.end()
        assert upstream.take_idle(r.loop.time()) is link
        link.close()


def test_a_resting_upstream_is_read_again_after_the_thaw_alone() -> None:
    with rig(write_interval_s=0.05) as r:
        client = streaming(r)
        r.reply(MORE[1:])
        for _ in range(3):
            r.reply(chunk(event("more ")))
        unit = unit_of_client(r.runtime, client.connection)
        assert unit.link is not None
        freezer = Freezer(r.runtime)
        freezer.freeze(unit)
        assert not any(unit.link in resting for resting in r.runtime.pacing._due.values())
        r.link.feed(chunk(event("last "), DONE) + LAST)
        r.pass_time(1.0)
        assert b"last " not in client.raw and not r.link.reading
        freezer.end()
        r.pass_time(1.0)
        assert b"last " in client.raw


def test_streams_end_and_memory_is_freed_without_the_frozen() -> None:
    with rig(detached_max=2, resume_grace_s=50.0, detach_grace_s=50.0) as r:
        streams = []
        for _ in range(2):
            client = streaming(r)
            streams.append(client.connection.reader.stream)  # type: ignore[union-attr]
            client.reset(TimeoutError(110, "Connection timed out"))
        freezer = Freezer(r.runtime)
        for stream in streams:
            freezer.freeze(unit_of_stream(r.runtime, stream))
        hub: Any = r.runtime.hub
        assert not hub.make_room_for_grace("another", r.loop.time()) and streams[0].reason is None
        hub.log_bytes_max = 0
        hub.free_log_memory()
        assert all(stream.log.seq_next > stream.log.seq_first for stream in streams)
        freezer.end()
        assert hub.make_room_for_grace("another", r.loop.time()) and streams[0].reason is CloseReason.ABANDONED
