"""streamd behind streamd: the inner daemon's own events are understood by the outer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fakes import DONE, LAST, Client, Rig, chunk, event, events_in, post, rig, whole_answer

from streamd.core.stream import Stream
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect, Progress, gap_event, reconnect_event
from streamd.wire.sse import HEARTBEAT, frame

INNER = "s_" + "x" * 27
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nx-stream-id: %b\r\n\r\n"


def typed(kind: str, **members: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode()


TEXT = typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"})
ANSWERS = {
    Dialect.CHAT: ("/v1/chat/completions", [event("a"), event("b"), DONE]),
    Dialect.COMPLETIONS: ("/v1/completions", [b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'] * 2 + [DONE]),
    Dialect.RESPONSES: (
        "/v1/responses",
        [
            typed("response.created", sequence_number=0, response={"id": "r"}),
            typed("response.output_text.delta", sequence_number=1, delta="a", item_id="i"),
            typed("response.completed", sequence_number=2, response={"id": "r"}),
        ],
    ),
    Dialect.MESSAGES: ("/v1/messages", [TEXT, TEXT, typed("message_stop")]),
    Dialect.UNKNOWN: ("/v1/of/no/known/dialect", [b"data: a\n\n", b"data: b\n\n", DONE]),
}
dialects = pytest.mark.parametrize("dialect", ANSWERS, ids=lambda dialect: dialect.value)
PIECEWISE = 0  # a chunk for each piece, as a daemon writes them
cuts = pytest.mark.parametrize("size", [1, 7, 10_000, PIECEWISE])


def framed(seq: int, data: bytes) -> bytes:
    return frame(f"id: {INNER}:".encode(), seq, data, chunked=False)


def answered(r: Rig, dialect: Dialect, pieces: list[bytes], size: int, *, is_whole: bool = True) -> Client:
    client = r.client(post({"model": "m", "stream": 1}, path=ANSWERS[dialect][0]))
    r.reply(HEAD % INNER.encode())
    whole = b"retry: 1234\n" + b"".join(pieces)
    cut = [whole[at : at + size] for at in range(0, len(whole), size)] if size else [b"retry: 1234\n", *pieces]
    for each in cut:
        if not r.link.closed:
            r.reply(chunk(each))
    if is_whole:
        r.reply(LAST)
    r.pass_time(2)
    return client


def shown(client: Client) -> Iterator[tuple[int, bytes]]:
    return ((each.seq, each.data) for each in events_in(client.answer.body))


@dialects
@cuts
def test_inner_heartbeats_go_no_further(dialect: Dialect, size: int) -> None:
    first, second, last = ANSWERS[dialect][1]
    heartbeat = dialect.api.heartbeat
    with rig() as r:
        client = answered(r, dialect, [framed(1, first), heartbeat, framed(2, second), framed(3, last)], size)
        assert client.answer.whole and client.answer.get("x-stream-id") != INNER
        assert [seq for seq, _ in shown(client)] == [1, 2, 3]
        assert INNER.encode() not in client.answer.body and b'"ping"' not in client.answer.body
        assert b"1234" not in client.answer.body and b"keepalive" not in client.answer.body
        assert HEARTBEAT not in client.answer.body


@dialects
@cuts
def test_an_inner_gap_stays_a_gap_with_a_place_in_the_outer_stream(dialect: Dialect, size: int) -> None:
    first, _, last = ANSWERS[dialect][1]
    gap = gap_event(dialect, Progress(dialect.api), 500, 900)
    with rig() as r:
        comment = b": no event, so it has no place\n\n"
        client = answered(r, dialect, [framed(499, first), comment, framed(900, gap), framed(901, last)], size)
        seqs = dict(shown(client))
        assert client.answer.whole and sorted(seqs) == [1, 2, 3]
        assert json.loads(seqs[2])["gap"] == {"from": 2, "to": 2}


@dialects
@cuts
def test_an_inner_farewell_is_a_truncation_that_names_no_inner_id(dialect: Dialect, size: int) -> None:
    first = ANSWERS[dialect][1][0]
    farewell = reconnect_event(dialect, message="streamd is restarting", last_id=f"{INNER}:1", retry_ms=77)
    with rig() as r:
        client = answered(r, dialect, [framed(1, first), farewell], size, is_whole=False)
        assert not client.answer.whole and client.gone
        body = client.answer.body
        assert INNER.encode() not in body and b"retry_ms" not in body
        stream: Stream = next(iter(r.runtime.hub))
        assert stream.reason is not None and stream.reason.word == "upstream_truncated" and stream.events == 2
        assert b"another streamd" in body


def test_an_upstream_that_is_no_streamd_may_have_any_members() -> None:
    odd = b'data: {"choices":[],"gap":{"from":5,"to":6},"last_id":"x","retry_ms":1,"object":"c"}\n\n'
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}))
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        r.reply(head + chunk(odd, DONE) + LAST)
        assert client.answer.whole and odd in client.answer.body


@dialects
@pytest.mark.parametrize("framing", ["length", "until close"])
def test_an_inner_answer_in_a_single_read_is_understood_however_it_is_framed(dialect: Dialect, framing: str) -> None:
    first, _, last = ANSWERS[dialect][1]
    gap = gap_event(dialect, Progress(dialect.api), 500, 900)
    body = b"".join([framed(499, first), dialect.api.heartbeat, framed(900, gap), framed(901, last)]).rstrip(b"\n")
    fields = (f"X-Stream-Id: {INNER}", "Content-Type: text/event-stream")
    with rig() as r:
        client = r.client(post({"model": "m", "stream": 1}, path=ANSWERS[dialect][0]))
        answer = whole_answer(body, "200 OK", *fields)
        r.reply(answer if framing == "length" else answer.replace(b"content-length", b"x-length"))
        if framing == "until close":
            r.link.fin()
        r.pass_time(2)
        seqs = dict(shown(client))
        assert client.answer.whole and json.loads(seqs[2])["gap"] == {"from": 2, "to": 2}
        assert INNER.encode() not in client.answer.body and b"keepalive" not in client.answer.body


@dialects
@pytest.mark.parametrize("size", [100, 100_000])
def test_inner_events_in_front_of_one_that_is_too_large_are_understood(dialect: Dialect, size: int) -> None:
    first = ANSWERS[dialect][1][0]
    gap = gap_event(dialect, Progress(dialect.api), 500, 900)
    large = b"data: " + b"x" * 6000 + b"\n\n"
    with rig(event_bytes_max=5000) as r:
        pieces = [framed(499, first), dialect.api.heartbeat, framed(900, gap), framed(901, large)]
        client = answered(r, dialect, pieces, size, is_whole=False)
        seqs = dict(shown(client))
        assert json.loads(seqs[2])["gap"] == {"from": 2, "to": 2} and not client.answer.whole
        stream: Stream = next(iter(r.runtime.hub))
        assert stream.reason is CloseReason.EVENT_TOO_LARGE and stream.events == 3
        assert b"keepalive" not in client.answer.body


@dialects
@pytest.mark.parametrize("end", ["end", "fin"])
def test_an_inner_farewell_without_its_blank_line_is_a_truncation(dialect: Dialect, end: str) -> None:
    first = ANSWERS[dialect][1][0]
    farewell = reconnect_event(dialect, message="streamd is restarting", last_id=f"{INNER}:1", retry_ms=77)
    with rig() as r:
        client = answered(r, dialect, [framed(1, first), farewell.rstrip(b"\n")], 10_000, is_whole=end == "end")
        if end == "fin":
            r.link.fin()
        r.pass_time(2)
        assert not client.answer.whole and INNER.encode() not in client.answer.body
        stream: Stream = next(iter(r.runtime.hub))
        assert stream.reason is not None and stream.reason.word == "upstream_truncated"
