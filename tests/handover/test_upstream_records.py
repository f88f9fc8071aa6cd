"""Connections to upstreams that move at any byte of an answer: the client reads the same, and nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, FakeTransport, Rig, chunk, event, post, rig, whole_answer

from streamd.handover.record import pack, unpack
from streamd.handover.upstreams import UPSTREAM
from streamd.net.upstream import UpstreamConnection, UpstreamState
from streamd.net.upstream_place import UpstreamPlace, go_on_at, place_of
from streamd.wire.chunked import LengthState
from streamd.wire.http1 import HeadState
from streamd.wire.sse import Edge, SplitterState

EVENTS = SSE_HEAD + chunk(event("one ")) + chunk(event("two "), b": hb\n\n") + chunk(event("three"), DONE) + LAST
LINES = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"


def move(r: Rig, transport: FakeTransport) -> UpstreamConnection:
    """Another connection takes the place of the transport's, from its record alone."""
    before: Any = transport.protocol
    state = unpack(UPSTREAM, pack(UPSTREAM, place_of(before)))
    assert state == place_of(before)
    link = UpstreamConnection(r.runtime, before.upstream)
    link.connection_made(transport)
    asker, stream, is_pooled = before._asker, before.stream, before.at is UpstreamState.IDLE
    if is_pooled:
        before.upstream.forget(before)
    for exchange in r.exchanges:
        attempt: Any = exchange._attempt
        if attempt is not None and attempt.link is before:
            attempt.link = link
    r.runtime.admission.charge_held(-before._held_bytes)
    before._leave_stream()
    transport.set_protocol(link)
    go_on_at(link, state, asker, stream)
    if is_pooled:
        before.upstream.keep(link, r.runtime.time())
    r.turn()
    return link


@pytest.mark.parametrize(
    ("asked", "answer"), [(CHAT, EVENTS), (CHAT, INTERIM + EVENTS), (WHOLE, whole_answer(b'{"id":"a"}')), (CHAT, LINES)]
)
@pytest.mark.parametrize("is_moved", [True, False])
def test_an_answer_goes_on_at_any_byte(asked: Any, answer: bytes, is_moved: bool) -> None:
    with rig() as r:
        expected = exchanged(r, asked, answer, [])
        for at in range(1, len(answer), 1 if len(answer) < 200 else 7):
            assert exchanged(r, asked, answer, [at] if is_moved else []) == expected, at
        (upstream,) = r.worker.upstreams
        assert upstream.in_flight == 0


def exchanged(r: Rig, asked: Any, answer: bytes, moves: list[int]) -> object:
    """The client's view of a request whose upstream's connection moves at these bytes of the answer."""
    client = Client(r)
    client.send(post(asked))
    start = 0
    for at in [*moves, len(answer)]:
        r.link.feed(answer[start:at])
        r.turn()
        start = at
        if at in moves:
            move(r, r.link)
    got = client.answer
    client.fin()
    return got.status, got.body.replace(_id_in(got.body), b"")


def _id_in(body: bytes) -> bytes:
    return body.partition(b"id: ")[2].partition(b":")[0] or b"\0"


def test_the_short_way_of_a_token_goes_on_at_once() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        assert move(r, r.link)._fast_path
        r.reply(chunk(event("two "), b"data: ha"))
        assert not move(r, r.link)._fast_path
        r.reply(chunk(b"lf\n\n", DONE) + LAST)
        assert b"two" in client.raw and b"data: half" in client.raw and b"[DONE]" in client.raw


def test_a_pooled_connection_is_asked_again() -> None:
    with rig() as r:
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        link = move(r, r.link)
        assert (link.at, link.answers) == (UpstreamState.IDLE, 1)
        second = r.client(post(WHOLE))
        r.reply(whole_answer(b'{"id":"b"}'))
        assert second.answer.body == b'{"id":"b"}' and len(r.links) == 1


def test_a_connection_that_is_over_can_not_be_told() -> None:
    with rig() as r:
        r.client(post(CHAT))
        link: Any = r.link.protocol
        r.reply(SSE_HEAD + chunk(event("one ")))
        r.link.fin()
        r.turn()
        with pytest.raises(ValueError, match="over"):
            place_of(link)


def test_a_connection_whose_request_has_not_left_can_not_be_told() -> None:
    with rig() as r:
        r.client(post(CHAT))
        link: Any = r.link.protocol
        r.link.held += b"the request's rest"
        with pytest.raises(ValueError, match="not left yet"):
            place_of(link)
        r.link.held.clear()
        assert place_of(link).at is UpstreamState.HEAD


IDLE = UpstreamPlace(UpstreamState.IDLE, "GET", None, None, None, None, True, False, 1, 0, 5.0, 5.0, 5.0)
BODY = IDLE._replace(at=UpstreamState.BODY, decoder=LengthState(5))


@pytest.mark.parametrize(
    ("state", "has_asker", "has_stream"),
    [
        (IDLE, True, False),
        (IDLE._replace(read=b"x"), False, False),
        (IDLE._replace(decoder=LengthState(5)), False, False),
        (IDLE._replace(at=UpstreamState.CLOSED), False, False),
        (IDLE._replace(at=UpstreamState.HEAD), False, False),
        (IDLE._replace(at=UpstreamState.HEAD, head=HeadState(b"GET", 0)), True, False),
        (BODY, False, False),
        (BODY, True, True),
        (BODY._replace(decoder=None), True, False),
        (BODY._replace(decoder=LengthState(0)), True, False),
        (BODY._replace(head=HeadState(b"HTTP", 0)), True, False),
        (BODY._replace(splitter=SplitterState(b"", Edge.PLAIN)), True, False),
        (BODY._replace(at=UpstreamState.EVENTS), True, True),
        (BODY._replace(at=UpstreamState.EVENTS, splitter=SplitterState(b"", Edge.PLAIN)), True, False),
        (BODY._replace(at=UpstreamState.EVENTS, splitter=SplitterState(b"\n", Edge.PLAIN)), True, True),
    ],
)
def test_a_state_that_no_connection_has_is_refused(state: UpstreamPlace, has_asker: bool, has_stream: bool) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        asked: Any = r.link.protocol
        link = UpstreamConnection(r.runtime, asked.upstream)
        link.connection_made(FakeTransport(r.loop, link))
        with pytest.raises(ValueError, match="connection|head|block"):
            go_on_at(link, state, asked._asker if has_asker else None, asked.stream if has_stream else None)
        client.fin()
