"""Attacks of inference servers, and of machines between them and streamd: any bytes at any time, or none.

Each docstring says what is tried, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

import gzip
import itertools
import json
from typing import Any

import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    PLENTY,
    SSE_HEAD,
    WHOLE,
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

from streamd.config import UpstreamSettings
from streamd.net.turns import CONNECTION_PIECES_MAX, STEP_LINES_MAX
from streamd.net.upstream import STRAY_PIECES, UpstreamConnection

JSON = "Content-Type: application/json"


def deep(levels: int) -> bytes:
    """A list in a list in a list …"""
    return b"[" * levels + b"]" * levels


def unchunked(body: bytes, *fields: str) -> bytes:
    """An event stream that ends with the connection."""
    return "\r\n".join(("HTTP/1.1 200 OK", "content-type: text/event-stream", *fields, "", "")).encode() + body


def data(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


# -- JSON


@pytest.mark.parametrize("levels", [10, 200, 260, 500, 1000, 5000])
@pytest.mark.parametrize("path", ["/v1/models", "/v1beta/models"])
def test_a_deep_entry_in_a_list_of_models_spoils_nobodys_list(path: str, levels: int) -> None:
    """An entry has a member that is nested too deep to be written again; the list is merged for all clients.

    Attacker: an upstream among several. Expected: 200 with the other upstream's models at least, no mistake of
    streamd's.
    """
    two = tuple(UpstreamSettings(name=name, url=f"http://{name}.test:1") for name in ("good", "bad"))
    own, bad = (b'"models":[{"name":"models/%b"', b"bad") if "beta" in path else (b'"data":[{"id":"%b"', b"bad")
    with rig(upstreams=two) as r:
        client = r.client(get(path))
        for link in r.links:
            is_good = b"good.test" in bytes(link.sent)
            more = b"" if is_good else b',"x":' + deep(levels)
            body = b"{" + own % (b"fine" if is_good else bad) + more + b"}]}"
            link.feed(whole_answer(body, "200 OK", JSON))
            r.turn()
        assert client.answer.status == 200 and b"fine" in client.answer.body


ODD_LISTS = [
    b"null",
    b"[]",
    b'{"data":{}}',
    b'{"data":[null,1,"x",[],{}]}',
    b'{"data":[{"id":1},{"id":null},{"id":["a"]},{"id":{}}]}',
    b'{"data":[{"id":"' + b"x" * 100_000 + b'"}]}',
    b'{"data":[{"id":"a\\u0000\\u2028\\ud83d\\ude00"}]}',
    b'{"data":[' + b",".join(b'{"id":"m%d"}' % k for k in range(5000)) + b"]}",
    b'{"data":[{"id":"m","created":18446744073709551616}]}',
    b'{"data":[{"id":"m","created":1e999}]}',
    b"\xff\xfe{}",
    b"",
]


@pytest.mark.parametrize("body", ODD_LISTS, ids=range(len(ODD_LISTS)))
def test_no_list_of_models_is_a_mistake_of_streamds(body: bytes) -> None:
    """Lists with parts of every wrong type, and of sizes beyond reason.

    Attacker: an upstream. Expected: 200 with the parts that are right, or 502.
    """
    with rig() as r:
        for path in ("/v1/models", "/v1beta/models"):
            client = r.client(get(path))
            r.reply(whole_answer(body, "200 OK", JSON))
            assert client.answer.status in (200, 502)
            json.loads(client.answer.body)


ERROR_TEXTS = [
    deep(5),
    deep(900),
    deep(1000),
    b'{"message":' + deep(950) + b"}",
    b'{"message":{"a":1}}',
    b"null",
    b"1e400",
    b'"\\u0000\\u2028\\n\\ndata: x\\n\\n"',
    b'"' + b"x" * 15_000 + b'"',
    b'{"message":"\\ud800"}',
]


@pytest.mark.parametrize("text", ERROR_TEXTS, ids=range(len(ERROR_TEXTS)))
def test_every_error_text_ends_the_stream_that_it_comes_too_late_for(text: bytes) -> None:
    """After commit_after the reader has its 200, and the error's text becomes an event: any bytes at all.

    Attacker: an upstream. Expected: an error event, the connection closed, no mistake of streamd's, nothing left.
    """
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(2)
        assert client.answer.status == 200
        r.reply(whole_answer(b'{"error":' + text + b"}", "500 Internal Server Error", JSON))
        r.pass_time(2)
        assert client.gone
        (last,) = events_in(client.answer.body)
        assert "error" in last.json and not client.answer.whole


# -- numbers and names of the upstream's own


def test_a_name_that_changes_with_each_event_is_kept_once() -> None:
    """3,000 `response.created` events, each with another id, in the same stream.

    Attacker: an upstream. Expected: a single name at most is remembered for the stream, and none after it.
    """
    with rig() as r:
        r.client(post(CHAT, path="/v1/responses"))
        created = [data({"type": "response.created", "response": {"id": f"r{k}"}}) for k in range(3000)]
        r.reply(SSE_HEAD + chunk(*created))
        assert len(r.runtime.hub._by_response) <= 1
        r.reply(chunk(data({"type": "response.completed"})) + LAST)


NUMBERS: list[Any] = [0, -1, 2**53, 2**63, 2**64 - 1, 1.5, True, None, "1", [], 1e300]


@pytest.mark.parametrize("start", NUMBERS, ids=str)
def test_no_numbering_of_an_upstreams_is_a_mistake_of_streamds(start: Any) -> None:
    """Events with a `sequence_number` that falls, repeats, has no end, or is no number; then a client resumes by it.

    Attacker: an upstream. Expected: the stream whole for its reader; the resume gets a stream or a 400.
    """
    numbers = [start, 5, start, 3, 3, start]
    with rig() as r:
        client = r.client(post(CHAT, path="/v1/responses"))
        first = data({"type": "response.created", "response": {"id": "r"}, "sequence_number": start})
        delta = {"type": "response.output_text.delta", "delta": "a"}
        rest = [data(delta | {"sequence_number": number}) for number in numbers]
        r.reply(SSE_HEAD + chunk(first, *rest, data({"type": "response.completed"})) + LAST)
        assert client.answer.whole and len(events_in(client.answer.body)) == 8
        for after in ("0", "3", "4", "9007199254740992", "999999999999999"):
            resumed = r.client(get(f"/v1/responses/r?stream=true&starting_after={after}"))
            assert resumed.answer.status in (200, 400)


@pytest.mark.parametrize("index", [-1, 10**6, 2**63, 1.5, True, None, "0", [], {}], ids=str)
def test_choices_with_odd_indexes_cost_nothing(index: Any) -> None:
    """3,000 choices with indexes that are negative, huge, no numbers, or all different: each may become a bit of a
    number.

    Attacker: an upstream. Expected: passed on, the stream complete with `[DONE]`, and no state that grows with the
    index.
    """
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        for k in range(0, 3000, 100):
            indexes = [index + k + j if type(index) is int else index for j in range(100)]
            choices = [{"index": each, "delta": {"content": "a"}} for each in indexes]
            r.reply(chunk(data({"id": "c", "object": "chat.completion.chunk", "choices": choices})))
        (stream,) = r.runtime.hub
        for name in type(stream.progress).__slots__:
            value = getattr(stream.progress, name, None)
            assert not isinstance(value, int) or value.bit_length() <= 1024, name
            assert not isinstance(value, set | dict | list) or len(value) <= 1024, name
        r.reply(chunk(DONE) + LAST)
        assert client.answer.whole


# -- fields


@pytest.mark.parametrize(
    "field",
    [
        "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT",
        "Retry-After: 86400.5",
        "Retry-After: +86400",
        "Retry-After: 86400, 86400",
        "Retry-After-Ms: 86400000",
    ],
)
def test_no_upstream_sends_clients_away_for_a_day(field: str) -> None:
    """Retry-After is bounded where it is digits alone; clients obey a date, a decimal and `retry-after-ms` as well.

    Attacker: an upstream. Expected: at most upstream_retry_after_max (60 s), or no such field (docs/HTTP.md, Relay).
    Source: the OpenAI SDKs read `retry-after-ms` first, then seconds with decimals, then a date.
    """
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"{}", "429 Too Many Requests", field))
        answer = client.answer
        assert answer.status == 429
        for name in ("retry-after", "retry-after-ms"):
            given = answer.get(name)
            assert given is None or (given.isdigit() and int(given) <= (60 if name == "retry-after" else 60_000))


STREAMDS_FIELDS = [
    "X-Stream-Id",
    "X-Upstream",
    "X-Request-Id",
    "Connection",
    "Transfer-Encoding",
    "Keep-Alive",
    "Trailer",
]


@pytest.mark.parametrize("streams", [False, True])
def test_no_upstream_answers_in_streamds_name(streams: bool) -> None:
    """The answer carries fields that streamd writes itself: another stream's id, another server's name.

    Attacker: an upstream. Expected: each stands there once, with streamd's value, on a stream and on a whole answer.
    """
    fields = [f"{name}: forged" for name in STREAMDS_FIELDS if name not in ("Transfer-Encoding", "Connection")]
    with rig() as r:
        client = r.client(post(CHAT if streams else WHOLE, "X-Request-Id: mine"))
        r.reply(unchunked(event("a") + DONE, *fields) if streams else whole_answer(b"{}", "200 OK", *fields))
        if streams:
            r.link.fin()
            r.turn()
        head = client.raw.partition(b"\r\n\r\n")[0].lower()
        own = b"\r\nx-upstream-request-id: forged"  # the server's name for the request, under a name that says so
        assert head.count(own) == 1 and b"forged" not in head.replace(own, b"")
        assert head.count(b"\r\nx-request-id: mine") == 1 and head.count(b"\r\nx-upstream: up") == 1
        assert head.count(b"\r\nx-stream-id: s_") == int(streams)


@pytest.mark.parametrize("media_type", ["text/html", "image/svg+xml", "application/xhtml+xml", "text/xml", ""])
def test_an_upstreams_page_runs_in_no_readers_browser_as_streamds(media_type: str) -> None:
    """The server answers a GET with a page, and its script reads the reader's streams: it is of streamd's own origin.

    Attacker: a hostile upstream, or an upstream that serves uploads of its users (`/v1/files/{id}/content`). Expected:
    such an answer comes with `Content-Security-Policy: sandbox`, or as a download, and no type is guessed (nosniff).
    Source: https://github.com/open-webui/open-webui/pull/24372 (uploaded pages run on the origin of the model server).
    """
    with rig() as r:
        client = r.client(get("/v1/files/f/content"))
        named = (f"Content-Type: {media_type}",) if media_type else ()
        r.reply(whole_answer(b"<script>fetch('/v1/streams')</script>", "200 OK", *named))
        answer = client.answer
        assert answer.status == 200
        is_held = "sandbox" in (answer.get("content-security-policy") or "")
        is_held = is_held or (answer.get("content-disposition") or "").startswith("attachment")
        assert is_held if media_type else is_held or answer.get("x-content-type-options") == "nosniff"


# -- memory


def test_a_request_that_its_upstream_doesnt_read_is_counted() -> None:
    """The server sends its head at once and reads nothing: the body stays in the transport, and isn't counted.

    Attacker: an upstream, or a network behind it that stalls; with any key. Expected: the kept part of 8 bodies of 1
    MiB is counted against bodies_bytes_max for as long as it is kept, or let go.
    """
    with rig(bodies_bytes_max=64 * 1024 * 1024) as r:

        def deaf(host: str, port: int, protocol: UpstreamConnection) -> FakeTransport:
            transport = FakeTransport(r.loop, protocol, capacity=0)
            r.links.append(transport)
            return transport

        r.loop.dial = deaf
        body = json.dumps(CHAT | {"user": "x" * 1024 * 1024}).encode()
        clients = []
        for _ in range(8):
            clients.append(r.client(post(body, JSON)))
            r.reply(SSE_HEAD + chunk(event("a")))
        kept = sum(len(link.held) for link in r.links if not link.closed)
        assert kept > 8 * 1024 * 1024 and r.runtime.bodies_bytes >= kept - 64 * 1024
        for link in r.links:
            link.take(1024 * 1024 // 2)
        r.pass_time(2)
        assert r.runtime.bodies_bytes == sum(len(link.held) for link in r.links) < kept / 1.9
        r.links[0].reset()
        r.pass_time(1)
        assert r.runtime.bodies_bytes == sum(len(link.held) for link in r.links[1:])
        for link in r.links[1:]:
            link.take(PLENTY)
        r.pass_time(2)
        assert r.runtime.bodies_bytes == 0
        for link in r.links[1:]:
            link.feed(chunk(DONE) + LAST)
        r.turn()


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_endless_answer_to_a_reader_that_takes_nothing_waits_upstream(framing: str) -> None:
    """A whole answer without end, as fast as it is taken, for a client that takes nothing.

    Attacker: an upstream together with a client. Expected: the upstream isn't read while the client takes nothing; in
    user space lie no more than two reads.
    """
    fields = {"length": "content-length: 100000000", "chunked": "transfer-encoding: chunked", "close": "x: y"}
    with rig() as r:
        client = r.client(post(WHOLE), capacity=1000)
        r.reply(f"HTTP/1.1 200 OK\r\n{fields[framing]}\r\n\r\n".encode())
        piece, fed = b"x" * 65536, 0
        while r.link.reading and fed < 100:
            r.link.feed(chunk(piece) if framing == "chunked" else piece)
            r.turn()
            fed += 1
        assert fed <= 2 and len(client.transport.held) <= 2 * 65536 + 1000
        client.reset()


def test_a_compressed_bomb_passes_as_it_is() -> None:
    """10 KB that unpack to 10 MB.

    Attacker: an upstream. Expected: nothing is unpacked, neither to count tokens nor to look for an error.
    """
    bomb = gzip.compress(bytes(10_000_000))
    with rig() as r:
        for status in ("200 OK", "500 Internal Server Error"):
            client = r.client(post(WHOLE))
            r.reply(whole_answer(bomb, status, "Content-Encoding: gzip", JSON))
            assert client.answer.body == bomb and client.answer.get("content-encoding") == "gzip"


# -- ends


CUT_WIRE = SSE_HEAD + chunk(event("one"), event("two"), DONE) + LAST
# The last: in front of the last bracket of [DONE]. A whole [DONE] ends an answer, though its blank line is missing.
CUT_POINTS = [*range(0, CUT_WIRE.index(DONE), 11), CUT_WIRE.index(DONE) + DONE.index(b"]")]


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_an_answer_that_is_cut_at_any_byte_never_looks_whole(end: str) -> None:
    """The connection breaks after every eleventh byte of an answer, and inside its last event.

    Attacker: an upstream that crashes, or a network. Expected: an error status, or an error event and no proper end.
    """
    with rig() as r:
        for size in CUT_POINTS:
            client = r.client(post(CHAT))
            r.link.feed(CUT_WIRE[:size])
            r.turn()
            getattr(r.link, end)()
            r.turn()
            answer = client.answer
            assert not answer.whole if answer.status == 200 else answer.status == 502
            if answer.status == 200:
                assert "error" in events_in(answer.body)[-1].json
            client.reset()
            for upstream in r.worker.upstreams:
                upstream.health.answered("anonymous", 0.0)  # else it is left out for a while


def test_each_of_many_failing_upstreams_is_asked_once() -> None:
    """Eight servers, all of them busy (503), full (429) or closing at once: the request goes round.

    Attacker: upstreams under load. Expected: each is asked once at most, and then the client has its answer.
    """
    many = tuple(UpstreamSettings(name=f"u{k}", url=f"http://u{k}.test:{k + 1}") for k in range(8))
    with rig(upstreams=many) as r:
        client = r.client(post(WHOLE))
        for k in range(50):
            open_links = [link for link in r.links if not link.closed and link.sent]
            if client.statuses or not open_links:
                break
            status = "503 Service Unavailable" if k % 2 else "429 Too Many Requests"
            open_links[-1].feed(whole_answer(b"{}", status))
            r.turn()
        assert client.answer.status in (429, 503)
        assert len(r.dialled) == len(set(r.dialled)) <= 8


@pytest.mark.parametrize("odd", [b"\0", b"\xff\xfe", b"\x1b[2J", b"\xed\xa0\x80", b"\x0b", b"\xf4\x90\x80\x80"])
def test_bytes_that_are_no_text_pass_or_end_the_stream_and_stop_nobody(odd: bytes) -> None:
    """Events with NUL, broken UTF-8, half a surrogate pair or terminal commands, where readers are late and slow.

    Attacker: an upstream. Expected: all readers get the same bytes, the late and the slow one too, and the end.
    """
    odd_event = event("SEAM").replace(b"SEAM", odd)
    with rig() as r:
        client, slow_from = r.client(post(CHAT)), None
        r.reply(SSE_HEAD + chunk(event("a")))
        name = client.answer.get("x-stream-id")
        slow_from = r.client(get(f"/v1/streams/{name}"), capacity=900)
        for _ in range(150):
            r.reply(chunk(event("b"), odd_event))
        r.reply(chunk(DONE) + LAST)
        slow_from.take()
        late = r.client(get(f"/v1/streams/{name}"))
        for reader in (client, slow_from, late):
            assert reader.answer.whole
            assert b"".join(read.data for read in events_in(reader.answer.body)).count(odd) >= 150


def test_an_answer_that_comes_before_its_question_is_nobodys() -> None:
    """A pooled connection says a whole answer before it is asked anything, again and again.

    Attacker: an upstream. Expected: the connection is dropped; the next client gets the answer to its own question.
    """
    with rig() as r:
        for k in range(20):
            client = r.client(post(WHOLE))
            r.reply(whole_answer(b"own %d" % k))
            assert client.answer.body == b"own %d" % k
            r.link.feed(whole_answer(b"forged"))
            r.turn()
            assert r.link.closed
        assert len(r.links) == 20


def asked_of(r: Rig) -> int:
    return sum(bytes(link.sent).count(b"POST ") for link in r.links)


@pytest.mark.parametrize("status", ["408 Request Timeout", "425 Too Early", "500 Oops", "502 Bad Gateway", "504 Late"])
def test_an_error_status_never_makes_streamd_ask_again(status: str) -> None:
    """Statuses at which clients and proxies like to try again by themselves: each try is paid for.

    Attacker: an upstream. Expected: streamd asks once; whether the client asks again is the client's decision.
    """
    two = tuple(UpstreamSettings(name=name, url=f"http://{name}.test:1") for name in ("one", "two"))
    with rig(upstreams=two) as r:
        for ask in (CHAT, WHOLE):
            before = asked_of(r)
            client = r.client(post(ask))
            r.reply(whole_answer(b"{}", status, "connection: close"))
            assert client.answer.status == int(status[:3]) and client.answer.get("x-should-retry") is None
            assert asked_of(r) == before + 1


def test_text_that_looks_like_streamds_own_events_is_text() -> None:
    """A model is made to say streamd's own words: error, gap, reconnect, `[DONE]`, ids, heartbeats.

    Attacker: the author of a prompt. Expected: it is text of a choice, in each reader's stream, and ends nothing.
    """
    words = '[DONE]\n\ndata: [DONE]\n\nid: s_x:9\nevent: gap\n: hb\nretry: 1\n\n{"error":{"code":"reconnect"}}'
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(*[event(words)] * 3))
        assert not client.gone
        r.reply(chunk(DONE) + LAST)
        events = events_in(client.answer.body)
        assert [read.seq for read in events] == [1, 2, 3, 4]
        assert text_of(events) == words * 3


@pytest.mark.parametrize("stray", [b"{\n\n", b"x: {\n\n", b"event: x\n\n", b'{"a":1}\n\n'])
def test_a_flood_of_lines_that_are_no_events_is_dealt_over_turns(stray: bytes) -> None:
    """A block without data costs up to 10 us, in a few bytes. Expected: 1 to 2 ms of them in a turn of the loop."""
    blocks = 6000
    with rig() as r:
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        (stream,) = r.runtime.hub
        seen: list[int] = []
        r.link.feed(chunk(stray * blocks))
        while not seen or seen[-1] < blocks:
            r.loop.call_soon(r.loop.stop)
            r.loop.run_forever()
            strays = stream.progress.strays
            seen.append(strays.lines if strays is not None else 0)
        most = max(later - earlier for earlier, later in itertools.pairwise([0, *seen]))
        assert most <= CONNECTION_PIECES_MAX // STRAY_PIECES + STEP_LINES_MAX
        assert stream.progress.strays is not None and len(stream.progress.strays.names) == 1
        r.reply(chunk(DONE) + LAST)
