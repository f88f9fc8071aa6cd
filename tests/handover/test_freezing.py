"""Frozen units: nothing touches them, whatever happens around them, and thawed they go on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, get, post, rig, whole_answer
from states import ANSWER, HEALTH, MORE, STATES, asked, full, go_on, seen, streaming

from streamd.handover.freezing import Freezer, FrozenUnit
from streamd.handover.unit import Unit, unit_of_client, unit_of_stream
from streamd.net.frozen import NotNow
from streamd.reasons import CloseReason

LONG_S = 5000.0  # longer than every time limit of a connection


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
            answers.append(seen(client, r))
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


def test_an_upstream_whose_bytes_wait_is_judged_a_second_later() -> None:
    """Turns may be held for a moment; but bytes of an upstream that floods wait at all times."""
    with rig(ttft_timeout_s=5.0, commit_after_s=3600.0) as r:
        for late_s in (5.9, 6.1):
            client = asked(r)
            r.runtime.turns.hold()
            r.link.feed(SSE_HEAD + chunk(event("one ")))
            (exchange,) = r.exchanges
            exchange.on_due(r.loop.time() + late_s)
            r.runtime.turns.release()
            r.turn()
            assert (b"one " in client.raw) is (late_s < 6.0), late_s
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
