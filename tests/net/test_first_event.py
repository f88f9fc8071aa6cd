"""On routes of no known dialect a stream whose events have ids of the server's own passes as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import LAST, SSE_HEAD, Client, Rig, chunk, events_in, get, post, rig

from streamd.wire.opening import FIRST_EVENT_BYTES_MAX
from streamd.wire.sse import first_has_id

ASKED = {"a GET": get("/v1/mcp", "Accept: text/event-stream"), "a POST": post({"stream": True}, path="/v1/feed")}

FOREIGN = {
    "id in front": b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n",
    "id behind": b"data: a\nid: 1\n\ndata: b\n\n",
    "CRLF": b"id: 1\r\ndata: a\r\n\r\ndata: b\r\n\r\n",
    "CR": b"id: 1\rdata: a\r\rdata: b\r\r",
    "a BOM": b"\xef\xbb\xbfid: 1\ndata: a\n\n",
    "without data, to begin with": b"id: 0\nretry: 3000\n\nevent: message\ndata: {}\n\n",
    "empty data": b"id: s/0\ndata:\n\nid: s/1\ndata: {}\n\n",
    "comments and retry in front": b": hello\n\nretry: 5\n\nid: 7\nevent: x\ndata: a\ndata: b\n\n",
    "an id without a colon": b"id\ndata: a\n\n",
    "an error of a call": b'id: 1\ndata: {"jsonrpc":"2.0","error":{"code":-1}}\n\n',
}
OWN = {
    "data alone": b"data: a\n\ndata: b\n\n",
    "comments in front": b": hello\n\ndata: a\n\n",
    "an id in the data": b"data: id: 1\n\n",
    "a later id": b"data: a\n\nid: 1\ndata: b\n\n",
    "[DONE]": b"data: [DONE]\n\n",
}
FRAMINGS = ("chunked", "until close")


def pieces(data: bytes, cut: str) -> Iterator[bytes]:
    step = {"whole": len(data), "bytewise": 1, "sevens": 7}[cut]
    return (data[at : at + step] for at in range(0, len(data), step))


def answered(r: Rig, request: bytes, data: bytes, framing: str, cut: str) -> Client:
    client = r.client(request)
    if framing == "chunked":
        r.reply(SSE_HEAD)
        for piece in pieces(data, cut):
            r.reply(chunk(piece))
        r.reply(LAST)
    else:
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for piece in pieces(data, cut):
            r.reply(piece)
        r.link.fin()
        r.turn()
    r.pass_time(1.5)
    return client


@pytest.mark.parametrize("cut", ["whole", "bytewise", "sevens"])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_stream_with_ids_of_its_own_passes_byte_for_byte(kind: str, asked: str, framing: str, cut: str) -> None:
    with rig() as r:
        client = answered(r, ASKED[asked], FOREIGN[kind], framing, cut)
        answer = client.answer
        assert (answer.status, answer.body, answer.whole) == (200, FOREIGN[kind], True)
        assert answer.get("content-type") == "text/event-stream" and answer.get("x-stream-id") is None
        assert len(r.runtime.hub) == 0 and r.runtime.admission._own.held_bytes == 0


@pytest.mark.parametrize("cut", ["whole", "bytewise"])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", OWN)
def test_a_stream_without_ids_gets_streamds(kind: str, asked: str, framing: str, cut: str) -> None:
    with rig() as r:
        client = answered(r, ASKED[asked], OWN[kind], framing, cut)
        stream = next(iter(r.runtime.hub))
        assert client.answer.whole and client.answer.get("x-stream-id") == stream.id
        assert [each.seq for each in events_in(client.answer.body)] == list(range(1, OWN[kind].count(b"data: ") + 1))


def test_a_stream_that_is_silent_gets_its_head_after_commit_after_and_keeps_its_ids() -> None:
    with rig(commit_after_s=10.0) as r:
        client = r.client(ASKED["a GET"])
        r.reply(SSE_HEAD)
        r.pass_time(9)
        assert client.raw == b""
        r.pass_time(2)
        assert client.answer.status == 200 and client.answer.get("x-stream-id") is None
        r.reply(chunk(FOREIGN["id in front"]) + LAST)
        assert client.answer.body == FOREIGN["id in front"] and client.answer.whole


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_stream_with_ids_that_breaks_off_does_not_look_whole(how: str) -> None:
    with rig() as r:
        client = r.client(ASKED["a GET"])
        r.reply(SSE_HEAD + chunk(FOREIGN["id in front"]))
        getattr(r.link, how)()
        r.turn()
        assert client.answer.body == FOREIGN["id in front"] and not client.answer.whole and client.gone


def test_a_reader_that_leaves_before_the_first_event_ends_the_request() -> None:
    with rig() as r:
        client = r.client(ASKED["a GET"])
        r.reply(SSE_HEAD + chunk(b": wait\n\n"))
        client.fin()
        r.turn()
        assert r.link.closed


@pytest.mark.parametrize(("opening", "is_foreign"), [(b"data: ", False), (b"id: 1\ndata: ", True), (b": ", True)])
def test_a_first_event_that_is_too_long_to_wait_for_is_known_by_its_beginning(opening: bytes, is_foreign: bool) -> None:
    data = opening + b"x" * FIRST_EVENT_BYTES_MAX + b"\ndata: y\n\n"
    with rig() as r:
        client = answered(r, ASKED["a GET"], data, "chunked", "sevens")
        assert client.answer.whole and (client.answer.get("x-stream-id") is None) is is_foreign
        assert (client.answer.body == data) is is_foreign and data in client.answer.body


def test_a_known_dialects_ids_are_replaced() -> None:
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(b"id: 1\ndata: {}\n\n", b"data: [DONE]\n\n") + LAST)
        assert [each.seq for each in events_in(client.answer.body)] == [1, 2]


@pytest.mark.parametrize("data", [*FOREIGN.values(), *OWN.values()])
def test_the_first_event_decides_as_soon_as_it_is_whole(data: bytes) -> None:
    verdicts = [first_has_id(data[:size]) for size in range(len(data) + 1)]
    known = [each for each in verdicts if each is not None]
    assert known and set(known) == {data in FOREIGN.values()}
    assert verdicts == [None] * (len(verdicts) - len(known)) + known, "once it is known it stays so"


def test_a_stream_that_ends_before_its_first_event_is_whole_has_the_bound_of_events() -> None:
    with rig(event_bytes_max=5000) as r:
        client = r.client(ASKED["a GET"])
        r.reply(SSE_HEAD + chunk(b"data: " + b"x" * 6000) + LAST)
        r.pass_time(1)
        assert events_in(client.answer.body)[-1].json["error"]["code"] == "event_too_large"
