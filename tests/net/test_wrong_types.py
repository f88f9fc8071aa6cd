"""Content-Type is wrong, and the bytes decide: every dialect, framing, cut and type, before and after the commit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, Client, Rig, chunk, event, events_in, post, rig, text_of

from streamd.net.client import BROKEN_END_S
from streamd.net.collected import ERROR_BYTES_MAX
from streamd.net.exchange import TERMINAL_GRACE_S, ExchangeState
from streamd.reasons import CloseReason
from streamd.wire.dialect import dialect_named, whole_events
from streamd.wire.opening import OPENING_BYTES_MAX

sys.path.insert(0, str(Path(__file__).parent.parent / "wire"))

from test_whole_events import WHOLE

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "gemini": "/v1beta/models/m:streamGenerateContent?alt=sse",
}
TYPES = ("application/json", "text/plain; charset=utf-8", "text/html", "application/x-ndjson", "")
SSE = "text/event-stream"
FRAMINGS = ("chunked", "length", "until close")
COMMIT_S = 1.0


def wire(body: bytes, framing: str, kind: str, *fields: str, status: str = "200 OK", pieces: int = 1) -> list[bytes]:
    """The reads of an answer: its head, then the body in that many pieces."""
    types = (f"content-type: {kind}",) if kind else ()
    framed = {
        "chunked": ("transfer-encoding: chunked",),
        "length": (f"content-length: {len(body)}",),
        "until close": (),
    }
    head = "\r\n".join((f"HTTP/1.1 {status}", *types, *framed[framing], *fields, "", "")).encode()
    size = -(-len(body) // pieces) or 1
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    if framing == "chunked":
        parts = [*map(chunk, parts), LAST]
    return [head, *parts] if pieces > 1 else [head + b"".join(parts)]


def ask(r: Rig, path: str, *, committed: bool) -> Client:
    client = r.client(post(CHAT, path=path))
    if committed:
        r.pass_time(COMMIT_S + 0.5)
        assert client.answers[0].status == 200
    return client


def reply(r: Rig, reads: list[bytes], framing: str) -> None:
    for read in reads:
        r.reply(read)
    if framing == "until close":
        r.link.fin()
        r.turn()


def datas(client: Client) -> list[bytes]:
    return [each.data for each in events_in(client.answer.body)]


def expected(word: str, body: bytes) -> list[bytes]:
    events = whole_events(dialect_named(word), body)
    return [each.data for each in events_in(b"".join(events))]


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("kind", ["application/json", "", SSE])
@pytest.mark.parametrize("word", PATHS)
def test_after_the_commit_a_whole_answer_is_delivered_as_events(
    word: str, kind: str, framing: str, pieces: int
) -> None:
    body = json.dumps(WHOLE[word], indent=1 if pieces == 1 else None).encode()
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        reply(r, wire(body, framing, kind, pieces=pieces), framing)
        assert client.answer.whole and datas(client) == expected(word, body)
        assert r.runtime.counters.streams_ended[CloseReason.COMPLETE] == 1
        assert "Grüße" in client.answer.body.decode()


@pytest.mark.parametrize("word", PATHS)
def test_json_under_the_type_of_a_stream_is_delivered_as_events_before_the_commit_too(word: str) -> None:
    body = json.dumps(WHOLE[word]).encode()
    with rig() as r:
        client = ask(r, PATHS[word], committed=False)
        reply(r, wire(body + b"\n\ndata: [DONE]\n\n", "chunked", SSE, "x-ratelimit-limit: 3"), "chunked")
        assert client.answer.whole and datas(client) == expected(word, body)
        assert client.answer.get("x-ratelimit-limit") == "3"


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("kind", TYPES)
def test_before_the_commit_json_passes_as_it_is(kind: str, pieces: int) -> None:
    body = b"\n " + json.dumps(WHOLE["chat"]).encode()
    with rig() as r:
        client = ask(r, PATHS["chat"], committed=False)
        reply(r, wire(body, "length", kind, "x-ratelimit-limit: 3", pieces=pieces), "length")
        answer = client.answer
        assert (answer.body, answer.whole, answer.get("x-stream-id")) == (body, True, None)
        assert (answer.get("content-type") or "") == kind and answer.get("x-ratelimit-limit") == "3"
        assert not tuple(r.runtime.hub)


FRONTS = (b"", b": ping\n\n", b"\xef\xbb\xbf", b"\r\n\r\n", b"event: message\n", b"id: 7\n", b"retry: 9\n\n")


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize(
    ("kind", "framing", "front"),
    [
        *[(kind, "chunked", FRONTS[0]) for kind in TYPES],
        *[("application/json", framing, front) for framing in FRAMINGS for front in FRONTS],
    ],
)
def test_events_under_any_type_are_a_stream(kind: str, framing: str, front: bytes, committed: bool) -> None:
    body = front + event("a") + event("b") + DONE
    for pieces in (1, 5, 60):
        with rig(commit_after_s=COMMIT_S) as r:
            client = ask(r, PATHS["chat"], committed=committed)
            reads = wire(body, framing, kind, "x-ratelimit-limit: 3", pieces=pieces)
            for read in reads[:-1]:
                r.link.feed(read)
            reply(r, reads[-1:], framing)
            answer = client.answer
            assert answer.whole and text_of(events_in(answer.body)) == "ab"
            assert answer.get("content-type") == SSE and answer.get("x-stream-id")
            assert (answer.get("x-ratelimit-limit") is None) is committed


def test_events_under_another_type_arrive_as_they_come() -> None:
    with rig() as r:
        client = ask(r, PATHS["chat"], committed=False)
        head, first, *_ = wire(event("a") * 2, "chunked", "application/json", pieces=2)
        r.reply(head)
        assert client.raw == b""
        r.reply(first)
        assert text_of(events_in(client.answer.body)) == "a" and not client.answer.whole
        (exchange,) = r.exchanges
        assert exchange.state is ExchangeState.STREAMING
        r.reply(chunk(event("b"), DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == "ab" and client.answer.whole


def test_the_commit_comes_while_the_first_bytes_are_awaited() -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=False)
        head, *parts = wire(json.dumps(WHOLE["chat"]).encode(), "chunked", "application/json", "x-a: b", pieces=2)
        r.reply(head)
        assert client.raw == b""
        r.pass_time(COMMIT_S + 0.5)
        assert client.answer.status == 200 and client.answer.get("x-a") == "b"
        reply(r, parts, "chunked")
        assert client.answer.whole and "Grüße" in client.answer.body.decode()


@pytest.mark.parametrize("committed", [False, True])
def test_bytes_of_neither_kind_pass_or_are_named(committed: bool) -> None:
    page = b"<html><title>Sign in</title>"
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=committed)
        reply(r, wire(page, "length", "text/html"), "length")
        if not committed:
            assert (client.answer.body, client.answer.get("content-type")) == (page, "text/html")
            return
        r.pass_time(BROKEN_END_S)
        assert not client.answer.whole and "200: Sign in" in json.loads(datas(client)[-1])["error"]["message"]


def test_blank_bytes_in_front_are_held_for_a_bounded_length() -> None:
    with rig() as r:
        client = ask(r, PATHS["chat"], committed=False)
        r.reply(wire(b"", "chunked", "application/json")[0].removesuffix(LAST) + chunk(b"\n" * OPENING_BYTES_MAX))
        assert client.raw == b""
        r.reply(chunk(b"\n"))
        r.reply(chunk(b"{}") + LAST)
        assert client.answer.body == b"\n" * (OPENING_BYTES_MAX + 1) + b"{}"


def test_blank_bytes_behind_a_streams_head_are_not_held() -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        r.reply(wire(b"", "chunked", "application/json")[0].removesuffix(LAST))
        for _ in range(5):
            r.reply(chunk(b"\n" * OPENING_BYTES_MAX))
            (exchange,) = r.exchanges
            assert exchange._collected is not None and not exchange._collected.body
        r.reply(chunk(json.dumps(WHOLE["chat"]).encode()) + LAST)
        assert client.answer.whole and "Grüße" in client.answer.body.decode()


@pytest.mark.parametrize("how", ["left open", "fin", "reset", "garbage"])
@pytest.mark.parametrize("word", PATHS)
def test_jsons_own_end_is_enough_whatever_the_framing_does(word: str, how: str) -> None:
    body = json.dumps(WHOLE[word]).encode()
    with rig(commit_after_s=COMMIT_S, idle_timeout_s=120.0) as r:
        client = ask(r, PATHS[word], committed=True)
        r.reply(wire(body, "chunked", "application/json")[0].removesuffix(LAST))
        if how == "garbage":
            r.reply(b"no chunk\r\n")
        elif how != "left open":
            getattr(r.link, how)()
        r.turn()
        r.pass_time(TERMINAL_GRACE_S + 0.5)
        assert client.answer.whole and datas(client) == expected(word, body)
        assert r.runtime.counters.streams_ended[CloseReason.COMPLETE] == 1


@pytest.mark.parametrize("how", ["fin", "reset", "end"])
@pytest.mark.parametrize("word", PATHS)
def test_half_an_answer_never_ends_cleanly(word: str, how: str) -> None:
    body = json.dumps(WHOLE[word]).encode()
    with rig(commit_after_s=COMMIT_S) as r:
        for cut in range(1, len(body), len(body) // 5):
            client = ask(r, PATHS[word], committed=True)
            r.reply(wire(body[:cut], "chunked", "application/json")[0].removesuffix(b"" if how == "end" else LAST))
            if how != "end":
                getattr(r.link, how)()
                r.turn()
            r.pass_time(BROKEN_END_S)
            assert not client.answer.whole and client.gone and b'"error"' in datas(client)[-1]


def test_an_object_that_only_seems_whole_is_awaited() -> None:
    body = json.dumps(WHOLE["chat"]).encode()
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        cut = body.index(b"}") + 1  # an inner end
        r.reply(wire(body[:cut], "chunked", "application/json")[0].removesuffix(LAST))
        r.pass_time(3 * TERMINAL_GRACE_S)
        assert datas(client) == []
        r.reply(chunk(body[cut:]))
        r.pass_time(TERMINAL_GRACE_S + 0.5)
        assert client.answer.whole and datas(client) == expected("chat", body)


def test_a_whole_answer_is_bounded_and_counted_while_it_is_held() -> None:
    with rig(commit_after_s=COMMIT_S, event_bytes_max=100_000) as r:
        client = ask(r, PATHS["chat"], committed=True)
        before = r.runtime.admission.status()["in_use"]["memory"]
        r.reply(wire(b"{" + b" " * 60_000, "chunked", "application/json")[0].removesuffix(LAST))
        assert r.runtime.admission.status()["in_use"]["memory"] - before == 60_001
        r.reply(chunk(b" " * 60_000))
        r.pass_time(BROKEN_END_S)
        assert json.loads(datas(client)[-1])["error"]["code"] == "event_too_large"


@pytest.mark.parametrize("framing", ["chunked", "length", "until close"])
def test_a_whole_answer_above_the_bound_of_an_event_is_refused_even_if_it_comes_at_once(framing: str) -> None:
    body = json.dumps(WHOLE["chat"] | {"padding": "x" * 60_000}).encode()
    with rig(commit_after_s=COMMIT_S, event_bytes_max=50_000) as r:
        client = ask(r, PATHS["chat"], committed=True)
        (answer,) = wire(body, framing, "application/json")
        r.reply(answer)
        if framing == "until close":
            r.link.fin()
        r.pass_time(BROKEN_END_S)
        assert json.loads(datas(client)[-1])["error"]["code"] == "event_too_large"
        assert b"padding" not in client.raw


def test_a_reader_that_resumes_gets_the_same_events() -> None:
    body = json.dumps(WHOLE["chat"]).encode()
    with rig(commit_after_s=COMMIT_S) as r:
        client = r.client(post(CHAT, "Idempotency-Key: k"))
        r.pass_time(COMMIT_S + 0.5)
        reply(r, wire(body, "length", "application/json"), "length")
        again = r.client(post(CHAT, "Idempotency-Key: k"))
        assert datas(again) == datas(client) == expected("chat", body) and len(r.links) == 1


ERROR: dict[str, Any] = {"message": "slow down", "type": "rate_limit_error", "param": None, "code": "rate_limit"}


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("form", ["json", "events"])
@pytest.mark.parametrize("word", PATHS)
@pytest.mark.parametrize(
    "status", ["400 Bad Request", "429 Too Many Requests", "500 Internal Server Error", "529 Overloaded"]
)
def test_after_the_commit_an_error_status_keeps_type_code_and_text(
    status: str, word: str, form: str, framing: str
) -> None:
    text = json.dumps({"error": ERROR}).encode()
    body, kind = (b"data: " + text + b"\n\n", SSE) if form == "events" else (text, "application/json")
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        reply(r, wire(body, framing, kind, status=status), framing)
        r.pass_time(BROKEN_END_S)
        assert not client.answer.whole
        (told,) = [json.loads(each) for each in datas(client)]
        error = told["error"]
        assert (error["message"], error["type"]) == ("slow down", "rate_limit_error")
        if word == "gemini":
            assert error["code"] == int(status[:3]) and error["details"][0]["reason"] == "rate_limit"
        elif word == "messages":
            assert told["type"] == "error"
        else:
            assert error["code"] == "rate_limit"
        if word == "responses":
            assert (told["type"], told["code"], told["message"], told["sequence_number"]) == (
                *("error", "rate_limit", "slow down", 0),
            )


@pytest.mark.parametrize("field", ["retry-after: 7", "retry-after-ms: 6500", "retry-after: 7\r\nx-should-retry: true"])
@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("word", PATHS)
def test_after_the_commit_the_wait_of_an_error_stands_in_its_object(word: str, form: str, field: str) -> None:
    body = json.dumps({"error": ERROR}).encode() if form == "json" else b"slow down"
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        r.reply(wire(body, "length", "application/json", field, status="429 Too Many Requests")[0])
        r.pass_time(BROKEN_END_S)
        error = json.loads(datas(client)[-1])["error"]
        if word == "gemini":
            wait = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}
            assert error["details"][-1] == wait
        else:
            assert error["retry_after"] == 7
        assert "slow down" in error["message"]


@pytest.mark.parametrize("word", ["chat", "gemini"])
def test_a_wait_that_the_error_itself_tells_stays(word: str) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3.5s"}
    told = {"retry_after": "soon", "details": [info]}
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        body = json.dumps({"error": ERROR | told}).encode()
        r.reply(wire(body, "length", "application/json", "retry-after: 7", status="429 Too Many Requests")[0])
        r.pass_time(BROKEN_END_S)
        error = json.loads(datas(client)[-1])["error"]
        assert {name: error[name] for name in told} == told


def test_before_the_commit_an_error_status_passes_as_it_is() -> None:
    for kind in ("application/json", SSE):
        with rig() as r:
            client = ask(r, PATHS["chat"], committed=False)
            reply(r, wire(b"data: no", "chunked", kind, status="500 Oops"), "chunked")
            assert (client.answer.status, client.answer.body) == (500, b"data: no")


@pytest.mark.parametrize("coding", ["gzip, br", "br", "zstd"])
@pytest.mark.parametrize("kind", [SSE, "application/json"])
@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_after_the_commit_a_coding_that_cant_be_undone_is_named(status: str, kind: str, coding: str) -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        reply(r, wire(b"\x1f\x8b\x08" * 9, "length", kind, f"content-encoding: {coding}", status=status), "length")
        r.pass_time(BROKEN_END_S)
        message = json.loads(datas(client)[-1])["error"]["message"]
        assert not client.answer.whole and repr(coding) in message and status[:3] in message


def test_an_error_text_is_bounded() -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        r.reply(wire(b"a" * ERROR_BYTES_MAX, "chunked", "text/plain", status="500 Oops")[0].removesuffix(LAST))
        r.pass_time(BROKEN_END_S)
        assert r.link.closed and len(json.loads(datas(client)[-1])["error"]["message"]) < 1100


def test_201_is_a_stream_behind_the_commit() -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        reply(r, wire(event("a") + DONE, "chunked", SSE, status="201 Created"), "chunked")
        assert client.answer.whole and text_of(events_in(client.answer.body)) == "a"
