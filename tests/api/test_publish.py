"""Publishing through all of streamd except its sockets: names, bodies, endings, exact retries, readers."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    Answer,
    Client,
    Read,
    Rig,
    chunk,
    event,
    events_in,
    get,
    post,
    rig,
    text_of,
)

from streamd.core.hub import Hub
from streamd.core.keys import SALT_BYTES, Key, digest, encode
from streamd.core.stream import Policy, Stream
from streamd.core.write_interval import WriteInterval
from streamd.reasons import CloseReason

LINES = "Content-Type: application/x-ndjson"
EVENTS = "Content-Type: text/event-stream"
TEXT = "Content-Type: text/plain"
CHUNKED = "Transfer-Encoding: chunked"
IDLE_S = 30.0
RETENTION_S = 8.0
SALT = bytes(SALT_BYTES)


@contextmanager
def publishing(**settings: Any) -> Iterator[Rig]:
    """A rig with an idle time and a retention so short that every stream is gone at its end."""
    short = {"publisher_idle_timeout_s": IDLE_S, "retention_s": RETENTION_S, "detach_grace_max_s": 35.0}
    with rig(**{**short, **settings}) as r:
        yield r


def ask(r: Rig, data: bytes, listener: str = "loopback") -> Answer:
    return r.client(data, listener=listener).answer


def put(name: str, options: dict[str, Any] | None = None, *fields: str) -> bytes:
    body = b"" if options is None else json.dumps(options).encode()
    return get(f"/v1/streams/{name}", *fields, f"Content-Length: {len(body)}", method="PUT") + body


def opened(r: Rig, name: str = "n", **options: Any) -> Stream:
    answer = ask(r, put(name, options))
    assert answer.status == 201, answer.body
    found = r.runtime.hub.get(name)
    assert found is not None
    return found


def send(body: bytes, *fields: str, name: str = "n", query: str = "") -> bytes:
    """A request that sends events in a body with Content-Length."""
    path = f"/v1/streams/{name}/events{query}"
    return get(path, *fields, f"Content-Length: {len(body)}", method="POST") + body


def begin(*fields: str, name: str = "n", query: str = "", method: str = "POST") -> bytes:
    """The head of a request with a chunked body."""
    return get(f"/v1/streams/{name}/events{query}", *fields, CHUNKED, method=method)


def last_seq(answer: Answer) -> int:
    found: int = json.loads(answer.body)["last_seq"]
    return found


def held(stream: Stream) -> list[Read]:
    """All events that the stream has."""
    log = stream.log
    return events_in(b"".join(each for _, each in log.read(log.seek(log.seq_first), bytes_max=1 << 30)))


def data_of(stream: Stream) -> list[bytes]:
    return [each.data for each in held(stream)]


# -- opening


def test_opening_a_name_returns_its_location_and_epoch() -> None:
    with publishing() as r:
        answer = ask(r, put("room.1"))
        body = json.loads(answer.body)
        assert (answer.status, answer.get("location"), answer.get("x-stream-id")) == (
            201,
            "/v1/streams/room.1",
            "room.1",
        )
        assert (body["id"], body["last_seq"]) == ("room.1", 0)
        assert len(body["epoch"]) == 6


def test_without_a_name_streamd_makes_an_id() -> None:
    with publishing() as r:
        answer = ask(r, get("/v1/streams", "Content-Length: 0", method="POST"))
        body = json.loads(answer.body)
        assert (answer.status, body["epoch"]) == (201, None)
        assert body["id"].startswith("s_")
        assert answer.get("location") == f"/v1/streams/{body['id']}"
        assert last_seq(ask(r, send(b"1\n", LINES, name=body["id"]))) == 1


@pytest.mark.parametrize("name", ["s_mine", ".", "..", "a%2Fb", "a%20b", "x" * 129, "%C3%A9", "a%0Ab", "a:b", "a%3F"])
def test_a_bad_name_is_refused(name: str) -> None:
    with publishing() as r:
        answer = ask(r, put(name))
        assert (answer.status, answer.error["code"]) == (400, "bad_name")
        assert not tuple(r.runtime.hub)


@pytest.mark.parametrize("name", ["x" * 128, "a.b_c~d-e", "S_mine", "events", "lookup", "%61bc"])
def test_a_name_of_allowed_characters_is_opened(name: str) -> None:
    with publishing() as r:
        assert ask(r, put(name)).status == 201
        assert ask(r, send(b"1\n", LINES, name=name)).status == 200
        assert ask(r, get(f"/v1/streams/{name}", "Accept: application/json")).status == 200


def test_a_live_name_cannot_be_opened_again() -> None:
    with publishing() as r:
        opened(r)
        again = ask(r, put("n"))
        assert (again.status, again.error["code"]) == (409, "stream_exists")


def test_a_sealed_name_can_be_opened_again_with_another_epoch() -> None:
    with publishing() as r:
        first = opened(r)
        ask(r, send(b"1\n", LINES, query="?seal=finished"))
        second = opened(r)
        assert second is not first
        assert second.epoch != first.epoch
        assert second.events == 0


def test_a_sealed_name_with_a_reader_cannot_be_opened_again() -> None:
    with publishing() as r:
        opened(r)
        slow = r.client(get("/v1/streams/n"), capacity=300)
        ask(r, send(b'"x"\n' * 200, LINES, query="?seal=finished"))
        assert ask(r, put("n")).error["code"] == "stream_exists"
        slow.take()
        assert ask(r, put("n")).status == 201


def test_every_option_of_a_name_takes_effect() -> None:
    with publishing() as r:
        options = {
            "retention": "5m",
            "policy": "drop_oldest",
            "log_bytes_max": "64KiB",
            "log_events_max": 500,
            "write_interval": "50ms",
            "public": True,
        }
        stream = opened(r, **options)
        assert (stream.terms.retention_s, stream.terms.policy, stream.terms.name_public) == (
            300.0,
            Policy.DROP_OLDEST,
            True,
        )
        assert (stream.log.bytes_max, stream.log.events_max) == (65536, 500)
        assert stream.terms.write_interval == WriteInterval(0.05, adaptive=True)
        ask(r, get("/v1/streams/n", method="DELETE"))
        r.pass_time(301)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"retentoin": "5m"}, "retentoin"),
        ({"retention": "soon"}, "retention"),
        ({"retention": "25h"}, "retention"),
        ({"retention": -1}, "retention"),
        ({"retention": None}, "retention"),
        ({"policy": "wait"}, "policy"),
        ({"policy": ["coalesce"]}, "policy"),
        ({"log_bytes_max": "1KiB"}, "log_bytes_max"),
        ({"log_bytes_max": "1TiB"}, "log_bytes_max"),
        ({"log_bytes_max": True}, "log_bytes_max"),
        ({"log_events_max": 0}, "log_events_max"),
        ({"log_events_max": 1.5}, "log_events_max"),
        ({"log_events_max": True}, "log_events_max"),
        ({"write_interval": "2s"}, "write_interval"),
        ({"write_interval": "soon"}, "write_interval"),
        ({"flush_interval": "2s"}, "flush_interval"),
        ({"public": "yes"}, "public"),
        ({"x\n" * 100: 1}, None),
    ],
)
def test_a_refused_option_is_named_and_changes_nothing(options: dict[str, Any], param: str | None) -> None:
    with publishing() as r:
        before = opened(r)
        ask(r, send(b"1\n", LINES, query="?seal=finished"))
        answer = ask(r, put("n", options))
        assert (answer.status, answer.error["code"]) == (400, "bad_option")
        assert param is None or answer.error["param"] == param
        assert r.runtime.hub.get("n") is before


@pytest.mark.parametrize(("body", "code"), [(b"{", "bad_json"), (b"[]", "bad_json"), (b"5", "bad_json")])
def test_options_that_are_no_object_are_refused(body: bytes, code: str) -> None:
    with publishing() as r:
        data = get("/v1/streams/n", f"Content-Length: {len(body)}", method="PUT") + body
        assert ask(r, data).error["code"] == code
        assert ask(r, get("/v1/streams/n", "Content-Length: 99999", method="PUT")).status == 413


DEEP_LIST = b"[" * 1000 + b"]" * 1000


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (b'{"log_events_max":%b}' % DEEP_LIST, "json_too_deep"),
        (b'{"policy":%b}' % DEEP_LIST, "json_too_deep"),
        (b'{"public":false,"public":true}', "ambiguous_member"),
        (b'{"Public":true}', "ambiguous_member"),
        (b'{"x":NaN}', "bad_json"),
        (b'{"x":"\\ud83d"}', "bad_json"),
    ],
)
def test_odd_options_are_refused(options: bytes, code: str) -> None:
    with publishing() as r:
        wire = get("/v1/streams/n", f"Content-Length: {len(options)}", method="PUT") + options
        answer = ask(r, wire)
        assert (answer.status, answer.error["code"]) == (400, code)
        assert r.runtime.hub.get("n") is None


def test_without_options_a_name_gets_the_settings() -> None:
    with publishing(write_interval_s=0.05, retention_s=7.0) as r:
        stream = opened(r)
        assert stream.terms.retention_s == 7.0
        assert stream.terms.write_interval == WriteInterval(0.05)


@pytest.mark.parametrize(
    ("asked", "header", "lower", "granted"),
    [
        ("20ms", "", False, (0.05, False)),
        ("200ms", "", False, (0.2, False)),
        (0.2, "", False, (0.2, False)),
        ("adaptive", "", False, (0.05, True)),
        ("20ms", "", True, (0.02, False)),
        (None, "100ms", False, (0.1, False)),
        ("200ms", "100ms", False, (0.2, False)),
    ],
)
@pytest.mark.parametrize("option", ["write_interval", "flush_interval"])
def test_a_publisher_may_raise_the_write_interval_and_lower_it_where_the_route_allows(
    asked: object, header: str, lower: bool, granted: tuple[float, bool], option: str
) -> None:
    with publishing(write_interval_s=0.05, write_interval_lower=lower) as r:
        options = {option: asked} if asked is not None else {}
        extra = [f"X-Stream-Write-Interval: {header}"] if header else []
        assert ask(r, put("n", options, *extra)).status == 201
        stream = r.runtime.hub.get("n")
        assert stream is not None and stream.terms.write_interval == granted


def test_events_of_a_publisher_wait_for_each_other_in_the_dispatcher_and_a_seal_ends_the_wait() -> None:
    with publishing(write_interval_s=0.2) as r:
        opened(r)
        reader = r.client(get("/v1/streams/n"))
        writes = reader.transport.writes
        ask(r, send(b"1\n", LINES))
        assert reader.transport.writes == writes + 1, "the first event goes at once"
        ask(r, send(b"2\n", LINES))
        ask(r, send(b"3\n", LINES))
        assert reader.transport.writes == writes + 1
        r.pass_time(0.25)
        assert reader.transport.writes == writes + 2
        before = r.runtime.time()
        ask(r, send(b"4\n", LINES))
        ask(r, send(b"5\n", LINES, query="?seal=finished"))
        assert (reader.answer.body.count(b"id: "), reader.answer.whole) == (5, True)
        assert r.runtime.time() == before
        counters = r.runtime.counters
        assert (counters.event_writes, counters.held_s.counts.count(0)) == (3, len(counters.held_s.counts) - 1)


def test_events_wait_while_the_load_asks_for_it_and_go_at_once_again_afterwards() -> None:
    with publishing() as r:
        stream = opened(r)
        reader = r.client(get("/v1/streams/n"))
        ask(r, send(b"1\n", LINES))
        assert stream.direct
        r.runtime.pacing.adaptive.seconds = 0.05
        ask(r, send(b"2\n", LINES))
        ask(r, send(b"3\n", LINES))
        assert not stream.direct
        r.runtime.pacing.adaptive.seconds = 0.0
        r.pass_time(0.1)
        assert stream.direct
        assert reader.answer.body.count(b"id: ") == 3
        ask(r, send(b"4\n", LINES, query="?seal=finished"))


# -- a key's streams at once


def key_of(name: str) -> str:
    return f"sk-{name}-{name * 8:0<20.20}"


def as_key(name: str) -> str:
    return f"Authorization: Bearer {key_of(name)}"


def key_line(name: str, **limits: int) -> bytes:
    """The line of this key in the key file."""
    return encode(Key(name, name, SALT, digest(SALT, key_of(name).encode()), **limits)) + b"\n"


@contextmanager
def draining(r: Rig) -> Iterator[None]:
    r.runtime.draining = True
    yield
    r.runtime.draining = False


@contextmanager
def full(r: Rig) -> Iterator[None]:
    """Bob's streams take all the room of the process, and each has a reader: none of them gives way."""
    bob = (as_key("bob"),) if r.runtime.settings.keys_file else ()
    while (opened := ask(r, get("/v1/streams", *bob, "Content-Length: 0", method="POST"))).status == 201:
        r.client(get(opened.get("location") or ""))
    yield
    for stream in tuple(r.runtime.hub):
        assert ask(r, get(f"/v1/streams/{stream.id}", *bob, method="DELETE")).status == 204


@pytest.mark.parametrize("refusing", [draining, full])
@pytest.mark.parametrize("named", [True, False])
def test_a_refused_publisher_keeps_its_keys_streams(tmp_path: Path, refusing: Any, named: bool) -> None:
    """A stream that admission refuses doesn't count for the key: it can still open streams up to its limit."""
    path = tmp_path / "keys"
    path.write_bytes(key_line("alice", streams_max=2) + key_line("bob"))
    path.chmod(0o600)
    with publishing(keys_file=str(path), streams_max=3) as r:

        def open_one(k: int) -> Answer:
            any_name = get("/v1/streams", as_key("alice"), "Content-Length: 0", method="POST")
            return ask(r, put(f"n{k}", None, as_key("alice")) if named else any_name)

        with refusing(r):
            assert [open_one(k).status for k in range(3)] == [503] * 3
        first, second, third = (open_one(k) for k in range(3))
        assert (first.status, second.status, third.status) == (201, 201, 429)
        for answer in (first, second):
            name = json.loads(answer.body)["id"]
            assert ask(r, get(f"/v1/streams/{name}", as_key("alice"), method="DELETE")).status == 204


@pytest.mark.parametrize("refusing", [draining, full])
def test_a_publisher_without_a_key_that_is_refused_holds_no_place(refusing: Any) -> None:
    with publishing(streams_max=1) as r:
        with refusing(r):
            assert ask(r, put("n")).status == 503
        assert ask(r, put("n")).status == 201


@pytest.mark.parametrize("broken", ["open", "Publisher"])
@pytest.mark.parametrize("has_key", [True, False])
def test_a_bug_while_a_name_is_opened_leaves_no_stream_and_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, has_key: bool
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(key_line("alice", streams_max=1))
    path.chmod(0o600)
    fields = (as_key("alice"),) if has_key else ()
    with publishing(streams_max=1, **{"keys_file": str(path)} if has_key else {}) as r:
        with monkeypatch.context() as patch:
            if broken == "open":
                patch.setattr(Hub, "open", failing)
            else:
                patch.setattr("streamd.api.publish.Publisher", failing)
            assert ask(r, put("n", None, *fields)).status == 500
        forgive(r)
        assert r.runtime.hub.get("n") is None
        assert ask(r, put("n", None, *fields)).status == 201


def failing(*arguments: object, **named: object) -> None:
    raise ZeroDivisionError


def forgive(r: Rig) -> None:
    """The bug was wanted."""
    assert r.runtime.counters.bugs == len(r.bugs) == 1
    r.bugs.clear()
    r.runtime.counters.bugs = 0


# -- bodies


@pytest.mark.parametrize(
    ("fields", "body", "events"),
    [
        ((LINES,), b'{"a": 1}\n[2]\n', [b'{"a": 1}', b"[2]"]),
        ((LINES + "; charset=utf-8",), b"1\n", [b"1"]),
        ((EVENTS,), b"id: 9\nevent: x\ndata: 1\n\n: c\n\ndata: 2\n\n", [b"1", b"2"]),
        ((TEXT,), b"Hello", [b'{"delta":"Hello"}']),
        ((), b"Hello", [b'{"delta":"Hello"}']),  # curl -T names no type
    ],
)
def test_lines_events_and_text_are_the_types_of_body(fields: tuple[str, ...], body: bytes, events: list[bytes]) -> None:
    with publishing() as r:
        stream = opened(r)
        answer = ask(r, send(body, *fields))
        assert (answer.status, last_seq(answer)) == (200, len(events))
        assert data_of(stream) == events


@pytest.mark.parametrize("media_type", ["application/json", "application/octet-stream", "text/html", "x"])
def test_other_types_are_refused_before_the_body_is_sent(media_type: str) -> None:
    with publishing() as r:
        opened(r)
        client = r.client(begin(f"Content-Type: {media_type}", "Expect: 100-continue"))
        assert b"100 Continue" not in client.raw
        assert (client.answer.status, client.answer.error["code"]) == (415, "bad_content_type")


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd, gzip", "identity, deflate"])
@pytest.mark.parametrize("media_type", ["text/plain", "application/x-ndjson", "text/event-stream"])
def test_an_encoded_publication_is_refused_before_it_is_sent_and_its_coding_named(media_type: str, coding: str) -> None:
    with publishing() as r:
        opened(r)
        fields = (f"Content-Type: {media_type}", f"Content-Encoding: {coding}", "Expect: 100-continue")
        client = r.client(begin(*fields))
        assert b"100 Continue" not in client.raw
        assert (client.answer.status, client.answer.error["code"]) == (415, "unsupported_encoding")
        assert coding in client.answer.error["message"] and client.answer.get("accept-encoding") == "identity"


@pytest.mark.parametrize("coding", ["identity", "none", "Identity, none"])
def test_a_coding_that_names_no_coding_is_published(coding: str) -> None:
    with publishing() as r:
        stream = opened(r)
        assert ask(r, send(b"1\n", LINES, f"Content-Encoding: {coding}")).status == 200
        assert data_of(stream) == [b"1"]


@pytest.mark.parametrize("path", ["/v1/streams/other", "/v1/streams", "/v1/streams/lookup"])
def test_an_encoded_body_that_streamd_reads_itself_is_refused_with_its_coding(path: str) -> None:
    method = "PUT" if path.endswith("other") else "POST"
    with publishing() as r:
        request = get(path, "Content-Length: 2", "Content-Encoding: gzip", method=method) + b"\x1f\x8b"
        answer = r.client(request).answer
        assert (answer.status, answer.error["code"]) == (415, "unsupported_encoding")


def test_each_piece_of_a_chunked_body_goes_out_as_it_comes() -> None:
    with publishing() as r:
        stream = opened(r)
        reader = r.client(get("/v1/streams/n"))
        publisher = r.client(begin(LINES))
        for k in range(3):
            publisher.send(chunk(b'{"n":%d}\n' % k))
            assert [each.json["n"] for each in events_in(reader.answer.body)] == list(range(k + 1))
        publisher.send(chunk(b'{"n":3') + chunk(b"}\n"))
        publisher.send(LAST)
        assert last_seq(publisher.answer) == stream.events == 4


def test_text_is_seen_as_it_is_typed() -> None:
    with publishing() as r:
        stream = opened(r)
        publisher = r.client(begin(method="PUT"))
        for piece in ("Hé".encode(), b"l", b"lo\n"):
            publisher.send(chunk(piece))
        assert data_of(stream) == ['{"delta":"Hé"}'.encode(), b'{"delta":"l"}', b'{"delta":"lo\\n"}']
        publisher.send(chunk("é".encode()[:1]))
        assert stream.events == 3
        publisher.send(chunk("é".encode()[1:]) + LAST)
        assert last_seq(publisher.answer) == 4


def test_curl_asks_first_and_is_told_to_go_on() -> None:
    with publishing() as r:
        stream = opened(r)
        curl = r.client(begin("Expect: 100-continue", "User-Agent: curl/7.88.1", method="PUT"))
        assert curl.raw == b"HTTP/1.1 100 Continue\r\n\r\n"
        curl.send(chunk(b"Hello") + LAST)
        assert curl.answer.status == 200
        assert stream.events == 1


def test_a_body_with_a_length_is_all_or_nothing() -> None:
    with publishing() as r:
        stream = opened(r)
        refused = ask(r, send(b"1\n2\n{\n3\n", LINES))
        assert (refused.status, refused.error["code"], last_seq(refused)) == (400, "bad_json", 0)
        assert "Line 3" in refused.error["message"]
        broken = r.client(send(b"1\n2\n3\n", LINES)[:-2])
        assert stream.events == 0
        broken.fin()
        assert stream.events == 0


def test_the_events_before_a_bad_line_of_a_chunked_body_stay() -> None:
    with publishing() as r:
        stream = opened(r)
        publisher = r.client(begin(LINES))
        publisher.send(chunk(b"1\n2\nno\n3\n"))
        answer = publisher.answer
        assert (answer.status, answer.error["code"], last_seq(answer)) == (400, "bad_json", 2)
        assert "Line 3" in answer.error["message"]
        assert data_of(stream) == [b"1", b"2"]
        cut = r.client(begin(LINES))
        cut.send(chunk(b"3\n4"))
        cut.reset()
        assert data_of(stream) == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("fields", "body", "status", "code", "where"),
    [
        ((LINES,), b'1\n"' + b"x" * 300 + b'"\n', 413, "event_too_large", "Line 2"),
        ((EVENTS,), b"data: 1\n\ndata: " + b"x" * 300 + b"\n\n", 413, "event_too_large", "Event 2"),
        ((EVENTS,), b"data: 1\n\ndata: \x00\n\n", 400, "bad_event", "Event 2"),
        ((TEXT,), b"ab\xff", 400, "bad_utf8", "byte 2"),
        ((LINES,), b'"a\rb"\n', 400, "bad_line", "Line 1"),
        ((LINES,), b"[DONE]\n1\n", 400, "after_done", "Line 2"),
    ],
)
def test_a_refusal_of_a_body_says_where_the_fault_is(
    fields: tuple[str, ...], body: bytes, status: int, code: str, where: str
) -> None:
    with publishing(event_bytes_max=200) as r:
        stream = opened(r)
        answer = ask(r, send(body, *fields))
        assert (answer.status, answer.error["code"]) == (status, code)
        assert where in answer.error["message"]
        assert stream.events == 0


def test_a_body_whose_length_is_above_the_limit_is_refused() -> None:
    with publishing(body_bytes_max=100) as r:
        stream = opened(r)
        answer = ask(r, get("/v1/streams/n/events", LINES, "Content-Length: 101", method="POST"))
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        publisher = r.client(begin(LINES) + chunk(*[b"1234567\n"] * 100) + LAST)
        assert publisher.answer.status == 200
        assert stream.events == 100


def test_whole_bodies_are_counted_while_they_are_held() -> None:
    with publishing(bodies_bytes_max=50) as r:
        stream = opened(r)
        slow = r.client(send(b"12345678\n" * 4, LINES)[:-1])
        assert r.runtime.bodies_bytes == 35 + 8  # what checks the body holds the line that has begun once more
        refused = ask(r, send(b"12345678\n" * 4, LINES))
        assert (refused.status, refused.error["code"]) == (503, "bodies_over_budget")
        slow.send(b"\n")
        assert (last_seq(slow.answer), r.runtime.bodies_bytes) == (4, 0)
        assert stream.events == 4


def test_a_large_body_does_not_pile_up_in_front_of_a_stalled_reader() -> None:
    with publishing() as r:
        opened(r)
        stalled = r.client(get("/v1/streams/n"), capacity=10_000)
        for k in range(20):
            line = json.dumps({"k": k, "text": "x" * 10_000}).encode() + b"\n"
            ask(r, send(line * 4, LINES))
        assert len(stalled.transport.held) <= 64 * 1024
        stalled.take()
        assert len(events_in(stalled.answer.body)) == 80


# -- the end


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ((LINES,), b"1\n[DONE]\n"),
        ((EVENTS,), b"data: 1\n\ndata: [DONE]\n\n"),
        ((EVENTS,), b"data: 1\n\ndata:[DONE]\n\n"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_done_seals_the_stream(fields: tuple[str, ...], body: bytes, whole: bool) -> None:
    with publishing() as r:
        stream = opened(r)
        reader = r.client(get("/v1/streams/n"))
        answer = ask(r, send(body, *fields) if whole else begin(*fields) + chunk(body) + LAST)
        assert (answer.status, last_seq(answer)) == (200, 2)
        assert (stream.reason, stream.ended_clean) == (CloseReason.SEALED, True)
        assert (reader.answer.whole, events_in(reader.answer.body)[-1].data) == (True, b"[DONE]")
        late = ask(r, send(b"2\n", LINES))
        assert (late.status, late.error["code"], last_seq(late)) == (409, "stream_sealed", 2)


def test_done_seals_the_stream_before_the_body_ends() -> None:
    with publishing() as r:
        stream = opened(r)
        publisher = r.client(begin(LINES) + chunk(b"[DONE]\n"))
        assert stream.reason is CloseReason.SEALED
        publisher.send(chunk(b"\n"))
        publisher.send(chunk(b"1\n"))
        assert publisher.answer.error["code"] == "after_done"


def test_the_query_seals_a_stream_as_finished_or_failed() -> None:
    with publishing() as r:
        finished, failed = opened(r, "a"), opened(r, "b")
        readers = [r.client(get(f"/v1/streams/{name}")) for name in "ab"]
        assert last_seq(ask(r, send(b"1\n", LINES, name="a", query="?seal=finished"))) == 1
        assert last_seq(ask(r, send(b"1\n", LINES, name="b", query="?seal=failed"))) == 2
        assert [finished.reason, failed.reason] == [CloseReason.SEALED, CloseReason.FAILED]
        assert [reader.answer.whole for reader in readers] == [True, False]
        assert events_in(readers[1].answer.body)[-1].json["error"]["code"] == "failed"


def test_an_empty_body_can_seal_the_stream() -> None:
    with publishing() as r:
        stream = opened(r)
        assert last_seq(ask(r, send(b"", query="?seal=finished"))) == 0
        assert stream.reason is CloseReason.SEALED


def test_an_unknown_word_for_the_end_is_refused() -> None:
    with publishing() as r:
        stream = opened(r)
        assert ask(r, send(b"1\n", LINES, query="?seal=done")).error["code"] == "bad_seal"
        assert (stream.reason, stream.events) == (None, 0)


def test_a_refused_body_does_not_seal_the_stream() -> None:
    with publishing() as r:
        stream = opened(r)
        ask(r, send(b"1\nno\n", LINES, query="?seal=finished"))
        assert stream.reason is None


# -- exact retries


def test_an_expected_seq_that_is_not_the_last_seq_is_refused() -> None:
    with publishing() as r:
        stream = opened(r)
        assert last_seq(ask(r, send(b"1\n2\n", LINES, "Expected-Seq: 0"))) == 2
        for wrong in (0, 1, 3):
            again = ask(r, send(b"1\n2\n", LINES, f"Expected-Seq: {wrong}"))
            assert (again.status, again.error["code"], last_seq(again)) == (409, "unexpected_seq", 2)
        assert last_seq(ask(r, send(b"3\n", LINES, "Expected-Seq: 2"))) == 3
        assert data_of(stream) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("value", ["-1", "1.5", "x", "01", ""])
def test_an_expected_seq_that_is_no_number_is_refused(value: str) -> None:
    with publishing() as r:
        opened(r)
        assert ask(r, send(b"1\n", LINES, f"Expected-Seq: {value}")).error["code"] == "bad_expected_seq"


def test_a_publisher_that_was_cut_goes_on_exactly() -> None:
    """The publisher sends 1..9, is cut again and again, and asks for the stream's last seq."""
    with publishing() as r:
        stream = opened(r)
        sent = 0
        for cut_after in (4, 9, 3, 20):
            publisher = r.client(begin(LINES, f"Expected-Seq: {sent}"))
            rest = b"".join(b'"line %d"\n' % k for k in range(sent + 1, 10))
            publisher.send(chunk(rest[:cut_after]))
            publisher.reset()
            sent = json.loads(ask(r, get("/v1/streams/n", "Accept: application/json")).body)["last_seq"]
        rest = b"".join(b'"line %d"\n' % k for k in range(sent + 1, 10))
        assert last_seq(ask(r, send(rest, LINES, f"Expected-Seq: {sent}"))) == 9
        assert data_of(stream) == [b'"line %d"' % k for k in range(1, 10)]


def test_the_expected_seq_of_a_whole_body_is_compared_when_it_is_appended() -> None:
    with publishing() as r:
        stream = opened(r)
        body = send(b"1\n2\n", LINES, "Expected-Seq: 0")
        slow = r.client(body[:-1])
        assert last_seq(ask(r, send(b"0\n", LINES))) == 1
        slow.send(body[-1:])
        assert (slow.answer.status, slow.answer.error["code"], last_seq(slow.answer)) == (409, "unexpected_seq", 1)
        assert data_of(stream) == [b"0"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_retry_supersedes_the_connection_that_its_publisher_gave_up(whole: bool) -> None:
    with publishing() as r:
        stream = opened(r)
        lost = r.client(send(b"1\n2\n3\n", LINES, "Expected-Seq: 0")[:-2] if whole else begin(LINES) + chunk(b"1\n"))
        known = stream.events
        retried = ask(r, send(b"2\n3\n" if known else b"1\n2\n3\n", LINES, f"Expected-Seq: {known}"))
        assert last_seq(retried) == 3
        lost.send(b"3\n" if whole else chunk(b"2\n"))  # bytes that were still in the network
        assert (lost.answer.status, lost.answer.error["code"], last_seq(lost.answer)) == (409, "superseded", 3)
        assert data_of(stream) == [b"1", b"2", b"3"]


def test_two_publishers_without_an_expected_seq_may_publish_at_once() -> None:
    with publishing() as r:
        stream = opened(r)
        both = [r.client(begin(LINES)) for _ in range(2)]
        for k in range(4):
            both[k % 2].send(chunk(b"%d\n" % k))
        for publisher in both:
            publisher.send(LAST)
        assert data_of(stream) == [b"0", b"1", b"2", b"3"]


# -- publishers that leave


def test_a_publisher_that_breaks_off_has_a_grace_to_come_back() -> None:
    with publishing(publisher_grace_s=20.0) as r:
        stream = opened(r)
        reader = r.client(get("/v1/streams/n"))
        for _ in range(2):
            publisher = r.client(begin(LINES) + chunk(b"1\n"))
            publisher.reset()
            r.pass_time(19)
            assert stream.reason is None
        r.pass_time(2)
        assert (stream.reason, stream.ended_clean) == (CloseReason.PUBLISHER_GONE, False)
        assert not reader.answer.whole
        assert events_in(reader.answer.body)[-1].json["error"]["code"] == "publisher_gone"


def test_a_bug_in_the_deadline_of_a_publisher_ends_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with publishing() as r:
        stream = opened(r)
        fail, calls = Stream.fail, []

        def failing_once(self: Stream, *arguments: Any, **named: Any) -> None:
            calls.append(arguments)
            if len(calls) == 1:
                raise ZeroDivisionError
            fail(self, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Stream, "fail", failing_once)
            r.pass_time(IDLE_S + 1)
        forgive(r)
        assert stream.reason is CloseReason.INTERNAL


def test_a_body_whose_key_expires_ends_with_what_came_until_then(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(key_line("alice", expires_unix=1_700_001_010))
    path.chmod(0o600)
    with publishing(keys_file=str(path)) as r:
        r.runtime.unix_time = lambda: 1_700_000_000.0 + r.loop.time()  # the rig's clock begins at 1000
        assert ask(r, put("n", None, as_key("alice"))).status == 201
        stream = r.runtime.hub.get("n")
        assert stream is not None
        sender = r.client(begin(LINES, as_key("alice")) + chunk(b"1\n2\n"))
        r.pass_time(11)
        assert (sender.answer.status, sender.answer.error["code"]) == (401, "expired_api_key")
        assert data_of(stream) == [b"1", b"2"]
        r.pass_time(publisher_grace_s(r) + 1)
        assert stream.reason is CloseReason.PUBLISHER_GONE


def publisher_grace_s(r: Rig) -> float:
    return r.runtime.settings.publisher_grace_s


def test_a_bug_in_the_deadline_of_a_body_keeps_the_events_that_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(key_line("alice", expires_unix=1_700_001_010))
    path.chmod(0o600)
    with publishing(keys_file=str(path)) as r:
        r.runtime.unix_time = lambda: 1_700_000_000.0 + r.loop.time()
        assert ask(r, put("n", None, as_key("alice"))).status == 201
        stream = r.runtime.hub.get("n")
        assert stream is not None
        sender = r.client(begin(LINES, as_key("alice")) + chunk(b"1\n2\n"))
        with monkeypatch.context() as patch:
            patch.setattr("streamd.api.rights.Rights.expired", failing)
            r.pass_time(11)
        forgive(r)
        assert sender.answer.status == 500 and data_of(stream) == [b"1", b"2"]
        r.pass_time(publisher_grace_s(r) + 1)
        assert stream.reason is CloseReason.PUBLISHER_GONE


MANY = b"".join(b"%d\n" % k for k in range(2000))  # several turns' work


def test_a_whole_body_goes_out_in_several_turns_and_a_later_body_waits_for_its_end() -> None:
    with publishing() as r:
        stream = opened(r)
        later = send(b'"later"\n', LINES)
        first, second = r.client(), r.client(later[:-1])
        first.transport.feed(send(MANY, LINES))
        while not stream.events:
            r.loop.run_until_complete(asyncio.sleep(0))
        assert stream.events < 2000, "a turn's share"
        second.send(later[-1:])
        assert data_of(stream) == [*MANY.split(), b'"later"']
        assert (last_seq(first.answer), last_seq(second.answer)) == (2000, 2001)
        ask(r, get("/v1/streams/n", method="DELETE"))


def test_a_bug_while_a_whole_body_goes_out_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with publishing() as r:
        stream = opened(r)
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "append_pieces", failing)
            sender = r.client(send(b"1\n", LINES))
        forgive(r)
        assert sender.answer.status == 500
        assert last_seq(ask(r, send(b"2\n", LINES))) == 1
        assert data_of(stream) == [b"2"]
        ask(r, get("/v1/streams/n", method="DELETE"))


@pytest.mark.parametrize("refused", [b"no\n", b"1\n\xff"])
def test_a_publisher_that_is_refused_in_its_body_has_the_same_grace(refused: bytes) -> None:
    with publishing(publisher_grace_s=10.0) as r:
        stream = opened(r)
        r.client(begin(LINES) + chunk(refused) + LAST)
        r.client(begin(TEXT) + chunk(b"\xc3") + LAST)  # refused at its end
        r.pass_time(11)
        assert stream.reason is CloseReason.PUBLISHER_GONE


def test_a_connected_publisher_may_be_silent_beyond_the_idle_time() -> None:
    with publishing(publisher_grace_s=1.0) as r:
        stream = opened(r)
        publisher = r.client(begin(LINES) + chunk(b"1\n"))
        r.pass_time(3 * IDLE_S)
        assert stream.reason is None
        publisher.send(chunk(b"2\n") + LAST)
        assert last_seq(publisher.answer) == 2


def test_a_stream_without_a_publisher_fails_after_the_idle_time() -> None:
    with publishing() as r:
        stream = opened(r)
        r.pass_time(IDLE_S - 1)
        ask(r, send(b"1\n", LINES))
        r.pass_time(IDLE_S - 1)
        assert stream.reason is None
        r.pass_time(2)
        assert stream.reason is CloseReason.PUBLISHER_GONE


def test_without_an_idle_time_a_stream_waits_for_its_publisher_forever() -> None:
    with publishing(publisher_idle_timeout_s=0.0) as r:
        stream = opened(r)
        ask(r, send(b"1\n", LINES))
        r.pass_time(10 * IDLE_S)
        assert stream.reason is None
        assert ask(r, get("/v1/streams/n", method="DELETE")).status == 204


def test_readers_never_slow_a_publisher_and_their_leaving_ends_nothing() -> None:
    with publishing() as r:
        stream = opened(r)
        readers = [r.client(get("/v1/streams/n"), capacity=400) for _ in range(3)]
        for _ in range(10):
            assert ask(r, send(b'"0123456789"\n' * 50, LINES)).status == 200
        readers[0].reset()
        readers[1].fin()
        readers[2].reset(TimeoutError("timed out"))
        assert not stream.readers
        r.pass_time(IDLE_S - 5)
        assert (stream.reason, stream.events) == (None, 500)
        assert r.runtime.hub.detached == 0
        again = r.client(get("/v1/streams/n?from=500"))
        assert len(events_in(again.answer.body)) == 1


# -- reading


def test_a_reader_of_an_earlier_epoch_gets_a_reset() -> None:
    with publishing() as r:
        first = opened(r)
        ask(r, send(b"1\n2\n", LINES, query="?seal=finished"))
        last_id = first.event_id(2)
        second = opened(r)
        ask(r, send(b"3\n", LINES))
        events = events_in(r.client(get("/v1/streams/n", f"Last-Event-ID: {last_id}")).answer.body)
        assert events[0].json["gap"] == {"from": 0, "to": 0, "reset": True}
        assert [(each.id, each.data) for each in events[1:]] == [(second.event_id(1), b"3")]
        own = r.client(get("/v1/streams/n", f"Last-Event-ID: {second.event_id(1)}"))
        assert events_in(own.answer.body) == []


def test_a_reader_may_wait_for_a_name() -> None:
    with publishing() as r:
        waiting = [r.client(get("/v1/streams/n?wait=30")) for _ in range(2)]
        r.pass_time(10)
        assert [client.raw for client in waiting] == [b"", b""]
        opened(r)
        ask(r, send(b"1\n", LINES))
        assert [[each.data for each in events_in(client.answer.body)] for client in waiting] == [[b"1"], [b"1"]]


def test_a_reader_of_an_earlier_epoch_may_wait_for_the_next() -> None:
    with publishing() as r:
        first = opened(r)
        ask(r, send(b"1\n", LINES, query="?seal=finished"))
        r.pass_time(RETENTION_S + 1)
        waiting = r.client(get("/v1/streams/n?wait=30", f"Last-Event-ID: {first.event_id(1)}"))
        opened(r)
        assert events_in(waiting.answer.body)[0].json["gap"]["reset"] is True


def test_waiting_for_a_name_ends_with_404() -> None:
    with publishing() as r:
        late, gone = r.client(get("/v1/streams/n?wait=5")), r.client(get("/v1/streams/n?wait=5"))
        gone.fin()
        r.pass_time(6)
        assert (late.answer.status, late.answer.error["code"]) == (404, "stream_not_found")
        assert gone.raw == b""
        assert ask(r, get("/v1/streams/n?wait=x")).error["code"] == "bad_wait"
        opened(r)


@pytest.mark.parametrize("leave", [Client.fin, Client.reset, lambda client: client.connection.abort(CloseReason.IDLE)])
def test_a_waiting_reader_that_leaves_is_freed(leave: Any) -> None:
    with publishing() as r:
        stays, gone = r.client(get("/v1/streams/n?wait=30")), r.client(get("/v1/streams/n?wait=30"))
        alone = r.client(get("/v1/streams/other?wait=30"))
        seen = [weakref.ref(client.connection) for client in (gone, alone)]
        for client in (gone, alone):
            leave(client)
        r.turn()
        del gone, alone, client
        gc.collect()
        assert [ref() for ref in seen] == [None, None]
        opened(r)
        opened(r, "other")
        ask(r, send(b"1\n", LINES))
        assert [each.data for each in events_in(stays.answer.body)] == [b"1"]


@pytest.mark.parametrize("comes", [False, True])
def test_a_reader_whose_wait_is_over_is_freed(comes: bool) -> None:
    with publishing() as r:
        waiting = r.client(get("/v1/streams/n?wait=5"))
        seen = weakref.ref(waiting.connection)
        if comes:
            opened(r)
        r.pass_time(6)
        assert waiting.answer.status == (200 if comes else 404)
        waiting.fin()
        del waiting
        gc.collect()
        assert seen() is None


def test_the_state_of_a_stream_has_the_lag_of_its_readers() -> None:
    with publishing() as r:
        opened(r, policy="drop_oldest")
        r.client(get("/v1/streams/n"))
        stalled = r.client(get("/v1/streams/n"), capacity=500)
        for _ in range(200):
            ask(r, send(b'"0123456789"\n', LINES))
        state = json.loads(ask(r, get("/v1/streams/n", "Accept: application/json")).body)
        assert (state["state"], state["last_seq"], state["first_seq"], state["subscribers"]) == ("live", 200, 1, 2)
        assert state["lag_max"] == 64
        assert state["lag_median"] == 32
        assert state["dropped_events"] > 100
        stalled.reset()
        after = json.loads(ask(r, get("/v1/streams/n", "Accept: application/json")).body)
        assert (after["subscribers"], after["dropped_events"]) == (1, state["dropped_events"])


def test_head_does_not_subscribe() -> None:
    with publishing() as r:
        stream = opened(r)
        client = r.client(method := get("/v1/streams/n", method="HEAD"))
        assert client.raw.startswith(b"HTTP/1.1 200 ")
        assert b"content-type: text/event-stream" in client.raw.lower()
        assert client.raw.endswith(b"\r\n\r\n")
        assert not stream.readers
        assert method.startswith(b"HEAD")


def test_deleting_a_stream_ends_its_readers_and_publishers() -> None:
    with publishing() as r:
        stream = opened(r)
        reader = r.client(get("/v1/streams/n"))
        publisher = r.client(begin(LINES) + chunk(b"1\n"))
        assert ask(r, get("/v1/streams/n", method="DELETE")).status == 204
        assert stream.reason is CloseReason.CANCELLED
        assert not reader.answer.whole
        publisher.send(chunk(b"2\n"))
        assert (publisher.answer.status, publisher.answer.error["code"]) == (409, "stream_sealed")
        r.pass_time(1)  # the broken end's delay
        assert ask(r, get("/v1/streams/n", method="DELETE")).status == 204
        assert ask(r, get("/v1/streams/n", method="DELETE")).status == 404


# -- listing


def named(answer: Answer) -> list[str]:
    return [each["id"] for each in json.loads(answer.body)["data"]]


def test_a_list_shows_the_askers_streams_and_to_the_admin_surface_all() -> None:
    with publishing() as r:
        for name, who in (("a", "x"), ("b", "y"), ("c", "x")):
            assert ask(r, put(name, None, f"Authorization: Bearer {who}")).status == 201
        ask(r, send(b"", "Authorization: Bearer x", name="c", query="?seal=finished"))
        mine = "Authorization: Bearer x"
        assert named(ask(r, get("/v1/streams", mine))) == ["a", "c"]
        assert named(ask(r, get("/v1/streams?state=live", mine))) == ["a"]
        assert named(ask(r, get("/v1/streams?state=sealed", mine))) == ["c"]
        assert named(ask(r, get("/v1/streams"))) == []
        assert named(ask(r, get("/v1/streams"), listener="admin")) == ["a", "b", "c"]


def test_a_list_comes_in_pages() -> None:
    with publishing() as r:
        names = [f"n{k}" for k in range(7)]
        for name in names:
            opened(r, name)
        seen: list[str] = []
        query, more = "?limit=3", True
        while more:
            body = json.loads(ask(r, get(f"/v1/streams{query}")).body)
            seen += [each["id"] for each in body["data"]]
            more = body["has_more"]
            query = f"?limit=3&after={body['last_id']}"
        assert seen == names
        for wrong in ("limit=0", "limit=1001", "limit=x", "state=dead", "after=nobody"):
            assert ask(r, get(f"/v1/streams?{wrong}")).status == 400


# -- relayed streams


def relayed(r: Rig, *fields: str) -> tuple[Client, str]:
    """A generation with one event, and its reader."""
    reader = r.client(post(CHAT, *fields))
    r.reply(SSE_HEAD + chunk(event("a")))
    stream_id = reader.answer.get("x-stream-id")
    assert stream_id is not None
    return reader, stream_id


def test_a_relayed_stream_takes_no_events() -> None:
    with publishing() as r:
        _, name = relayed(r)
        answer = ask(r, send(b"1\n", LINES, name=name))
        assert (answer.status, answer.error["code"]) == (409, "not_published")
        r.reply(chunk(DONE) + LAST)


def test_a_relayed_stream_takes_further_readers_and_the_grace_counts_from_the_last() -> None:
    with publishing() as r:
        asker, name = relayed(r, "X-Stream-Detach-Grace: 10")
        phone, colleague = (r.client(get(f"/v1/streams/{name}")) for _ in range(2))
        asker.fin()
        r.pass_time(20)
        r.reply(chunk(event("b")))
        colleague.fin()
        r.pass_time(20)
        r.reply(chunk(event("c")))
        assert text_of(events_in(phone.answer.body)) == "abc"
        phone.fin()
        r.pass_time(9)
        assert not r.link.closed
        r.pass_time(2)
        assert r.link.closed


def test_a_second_reader_that_leaves_before_the_first_byte_ends_nothing() -> None:
    with publishing() as r:
        asker = r.client(post(CHAT, "Idempotency-Key: k"))
        other = r.client(post(CHAT, "Idempotency-Key: k"))
        other.fin()
        assert not r.link.closed
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert text_of(events_in(asker.answer.body)) == "a"


def test_respond_async_answers_202_with_the_streams_location() -> None:
    with publishing() as r:
        asker = r.client(post(CHAT, "Prefer: respond-async"))
        answer = asker.answer
        assert (answer.status, answer.get("preference-applied")) == (202, "respond-async")
        location = answer.get("location")
        assert location == f"/v1/streams/{answer.get('x-stream-id')}"
        asker.fin()
        r.reply(SSE_HEAD + chunk(event("a")))
        reader = r.client(get(location))
        r.reply(chunk(event("b"), DONE) + LAST)
        assert text_of(events_in(reader.answer.body)) == "ab"
        assert reader.answer.whole


def test_a_generation_that_is_never_read_is_cancelled_after_its_grace() -> None:
    with publishing(detach_grace_max_s=50.0) as r:
        r.client(post(CHAT, "Prefer: respond-async"))
        r.reply(SSE_HEAD + chunk(event("a")))
        r.pass_time(49)
        assert not r.link.closed
        r.pass_time(2)
        assert r.link.closed


def test_a_stream_lives_as_long_as_one_of_its_publishers() -> None:
    with publishing(publisher_grace_s=1.0) as r:
        stream = opened(r)
        staying, leaving = r.client(begin(LINES)), r.client(begin(LINES) + chunk(b"1\n"))
        leaving.reset()
        r.pass_time(2 * IDLE_S)
        assert stream.reason is None
        staying.send(chunk(b"2\n") + LAST)
        assert last_seq(staying.answer) == 2


# -- the body in the books


@pytest.mark.parametrize(
    ("media_type", "begun", "rest"),
    [
        ("application/x-ndjson", b'{"a":"' + b"x" * 5000, b'"}\n'),
        ("text/event-stream", b"data: " + b"x" * 5000, b"\n\n"),
        ("text/plain", b"\xe2\x82", b"\xac"),
    ],
)
def test_an_event_that_has_begun_is_charged_until_it_is_whole(media_type: str, begun: bytes, rest: bytes) -> None:
    with publishing() as r:
        opened(r)
        head = get("/v1/streams/n/events", f"Content-Type: {media_type}", "Transfer-Encoding: chunked", method="POST")
        client, left = r.client(head), r.client(head)
        for each in (client, left):
            each.send(chunk(begun))
        assert r.runtime.bodies_bytes == 2 * len(begun)
        client.send(chunk(rest))
        assert r.runtime.bodies_bytes == len(begun)
        left.reset()
        assert r.runtime.bodies_bytes == 0
        client.send(LAST)
        assert client.answer.status == 200


def test_an_event_that_a_whole_body_has_begun_is_charged_as_often_as_it_is_held() -> None:
    with publishing() as r:
        opened(r)
        whole, begun = b'{"a": 1}\n', b'{"a":"' + b"x" * 5000
        client = r.client(send(whole + begun + b'"}\n', LINES)[: -len(b'"}\n')])
        assert r.runtime.bodies_bytes == len(whole) + 2 * len(begun)
        client.send(b'"}\n')
        assert (last_seq(client.answer), r.runtime.bodies_bytes) == (2, 0)
