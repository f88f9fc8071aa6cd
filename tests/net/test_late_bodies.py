"""Answers that come behind a stream's head in a form of their own: as lines of JSON, or in a content coding."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from fakes import CHAT, Client, Rig, chunk, event, events_in, post, rig
from test_wrong_types import COMMIT_S, FRAMINGS, PATHS, SSE, WHOLE, ask, datas, expected, reply, wire

from streamd.net.client import BROKEN_END_S
from streamd.net.upstream import UpstreamConnection
from streamd.reasons import CloseReason
from streamd.wire.inflate import STATE_BYTES


def choice(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def plain(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def typed(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": kind, **members}


def google(text: str, **more: str) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": [{"text": text}]}, "index": 0, **more}]}


CALL = {"candidates": [{"content": {"parts": [{"functionCall": {"name": "f"}}]}, "index": 0}]}  # never merged
DELTA = {"type": "text_delta", "text": "Grüße"}
# An answer of each API in lines; the last ends it.
LINES: dict[str, list[dict[str, Any]]] = {
    "chat": [choice("Grü"), choice("ße"), choice("", "stop")],
    "completions": [plain("Grü"), plain("ße"), plain("", "stop")],
    "messages": [
        typed("message_start", message={"content": [], "usage": {}}),
        typed("content_block_delta", index=0, delta=DELTA),
        typed("message_stop"),
    ],
    "responses": [
        typed("response.created", response={"id": "r"}, sequence_number=0),
        typed("response.output_text.delta", delta="Grüße", sequence_number=1),
        typed("response.completed", response={"id": "r"}, sequence_number=2),
    ],
    "gemini": [google("Grü"), CALL, google("ße", finishReason="STOP")],
}
NDJSON = "application/x-ndjson"
ends = pytest.mark.parametrize("framing", FRAMINGS)


def lines_of(word: str, end: str = "\n") -> list[bytes]:
    return [(json.dumps(each) + end).encode() for each in LINES[word]]


def with_end(word: str) -> list[bytes]:
    return [line.strip() for line in lines_of(word)] + ([b"[DONE]"] if word in ("chat", "completions") else [])


@pytest.mark.parametrize("word", LINES)
def test_lines_behind_a_streams_head_arrive_as_they_come(word: str) -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        r.reply(wire(b"", "chunked", NDJSON)[0].removesuffix(b"0\r\n\r\n"))
        for count, line in enumerate(lines_of(word), 1):
            r.reply(chunk(line[:9]))
            assert len(datas(client)) == count - 1
            r.reply(chunk(line[9:]))
            assert datas(client) == with_end(word)[:count]
            if count < 3:
                r.pass_time(3)  # a pause of the model is no end
                assert not client.answer.whole
        r.reply(b"0\r\n\r\n")
        r.pass_time(1)
        assert datas(client) == with_end(word) and client.answer.whole
        assert r.runtime.counters.streams_ended[CloseReason.COMPLETE] == 1
        if word in ("messages", "responses"):
            assert [each.name for each in events_in(client.answer.body)] == [each["type"] for each in LINES[word]]


@pytest.mark.parametrize("pieces", [1, 2, 40])
@pytest.mark.parametrize(("framing", "end"), zip(FRAMINGS, ["\n", "\r\n", "\n\n"], strict=True))
@pytest.mark.parametrize("word", LINES)
def test_lines_in_any_framing_and_cut_are_the_same_events(word: str, framing: str, end: str, pieces: int) -> None:
    body = b"".join(lines_of(word, end)).rstrip(b"\r\n" if pieces == 2 else b"")
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        reply(r, wire(body, framing, NDJSON, pieces=pieces), framing)
        r.pass_time(1.5)
        assert datas(client) == with_end(word) and client.answer.whole


@pytest.mark.parametrize("how", ["fin", "reset", "end", "silence"])
@pytest.mark.parametrize("word", LINES)
def test_lines_that_break_off_never_end_cleanly(word: str, how: str) -> None:
    with rig(commit_after_s=COMMIT_S, idle_timeout_s=20.0) as r:
        client = ask(r, PATHS[word], committed=True)
        first, second, _ = lines_of(word)
        r.reply(wire(first + second, "chunked", NDJSON)[0].removesuffix(b"" if how == "end" else b"0\r\n\r\n"))
        if how in ("fin", "reset"):
            getattr(r.link, how)()
        r.turn()
        r.pass_time(25 if how == "silence" else BROKEN_END_S)
        *told, last = (each.data for each in events_in(client.answer.body) if each.name not in ("ping", "keepalive"))
        assert told == with_end(word)[:2] and b'"error"' in last and not client.answer.whole


@pytest.mark.parametrize("kind", [NDJSON, SSE, "application/json", ""])
def test_an_error_among_lines_is_the_upstreams_own(kind: str) -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        body = lines_of("chat")[0] + b'{"error": {"message": "slow down", "type": "busy"}}\n'
        reply(r, wire(body, "chunked", kind, pieces=3), "chunked")
        r.pass_time(2)
        assert [b"slow down" in each for each in datas(client)] == [False, True] and client.answer.whole
        assert r.runtime.counters.streams_ended[CloseReason.UPSTREAM_ERROR] == 1


def test_a_line_is_bounded_and_the_answer_is_not() -> None:
    with rig(commit_after_s=COMMIT_S, event_bytes_max=5000) as r:
        client = ask(r, PATHS["chat"], committed=True)
        r.reply(wire(b"", "chunked", NDJSON)[0].removesuffix(b"0\r\n\r\n"))
        for _ in range(200):
            r.reply(chunk(lines_of("chat")[0]))
        assert len(datas(client)) == 200
        r.reply(chunk(b'{"x": "' + b"y" * 6000))
        r.pass_time(BROKEN_END_S)
        assert json.loads(datas(client)[-1])["error"]["code"] == "event_too_large"


# Content codings

ENCODED = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}
STREAM = event("Grüße") + event("b") + b"data: [DONE]\n\n"


@pytest.mark.parametrize("pieces", [1, 40])
@ends
@pytest.mark.parametrize("coding", ENCODED)
def test_a_stream_in_a_coding_is_undone_behind_the_commit(coding: str, framing: str, pieces: int) -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        body = ENCODED[coding](STREAM)
        reply(r, wire(body, framing, SSE, f"content-encoding: {coding}", pieces=pieces), framing)
        r.pass_time(1.5)
        assert b"".join(b"data: " + each + b"\n\n" for each in datas(client)) == STREAM and client.answer.whole
        assert client.answer.get("content-encoding") is None


def test_events_that_are_flushed_one_by_one_arrive_one_by_one() -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        made = zlib.compressobj(wbits=31)
        r.reply(wire(b"", "chunked", SSE, "content-encoding: gzip")[0].removesuffix(b"0\r\n\r\n"))
        held = r.runtime.admission.status()["in_use"]["memory"]
        for count in range(1, 5):
            r.reply(chunk(made.compress(event(f"{count}")) + made.flush(zlib.Z_SYNC_FLUSH)))
            assert len(datas(client)) == count
        assert isinstance(held, int) and held >= STATE_BYTES
        r.reply(chunk(made.compress(b"data: [DONE]\n\n") + made.flush()) + b"0\r\n\r\n")
        assert client.answer.whole and len(datas(client)) == 5


@pytest.mark.parametrize("coding", ENCODED)
@pytest.mark.parametrize("word", PATHS)
def test_a_whole_answer_and_an_error_in_a_coding_are_read(word: str, coding: str) -> None:
    body = json.dumps(WHOLE[word]).encode()
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS[word], committed=True)
        r.reply(wire(ENCODED[coding](body), "length", "application/json", f"content-encoding: {coding}")[0])
        r.pass_time(1.5)
        assert client.answer.whole and datas(client) == expected(word, body)
        client = ask(r, PATHS[word], committed=True)
        error = ENCODED[coding](b'{"error": {"message": "slow down"}}')
        head = f"content-encoding: {coding}"
        r.reply(wire(error, "chunked", "application/json", head, status="429 Too Many Requests")[0])
        r.pass_time(BROKEN_END_S)
        assert json.loads(datas(client)[-1])["error"]["message"] == "slow down"


@pytest.mark.parametrize("how", ["end", "fin", "garbage"])
def test_a_stream_that_is_cut_in_its_coding_never_ends_cleanly(how: str) -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        body = gzip.compress(event("a") * 50 + event("b") * 50)[:-30]
        body += b"nonsense" * 9 if how == "garbage" else b""
        r.reply(
            wire(body, "chunked", SSE, "content-encoding: gzip")[0].removesuffix(b"0\r\n\r\n" if how == "fin" else b"")
        )
        if how == "fin":
            r.link.fin()
        r.pass_time(BROKEN_END_S)
        assert not client.answer.whole and b'"error"' in datas(client)[-1]


def bomb(r: Rig, body: bytes) -> Client:
    client = ask(r, PATHS["chat"], committed=True)
    r.reply(wire(gzip.compress(body), "length", SSE, "content-encoding: gzip")[0])
    r.pass_time(BROKEN_END_S)
    return client


def test_a_bomb_holds_no_more_than_an_event_and_no_turn_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[int] = []
    take = UpstreamConnection._take
    monkeypatch.setattr(UpstreamConnection, "_take", lambda link, data: spent.append(work := take(link, data)) or work)
    with rig(commit_after_s=COMMIT_S, event_bytes_max=100_000) as r:
        client = bomb(r, b"data: " + bytes(10_000_000).replace(b"\0", b"x"))
        assert json.loads(datas(client)[-1])["error"]["code"] == "event_too_large"
        assert max(spent) <= 64
        spent.clear()
        client = bomb(r, b"data\n\n" * 20_000 + STREAM)
        assert len(datas(client)) > 20_000 and max(spent) <= 2 * 4096 / 6 + 64


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_before_the_commit_an_encoded_answer_passes_as_its_bytes(coding: str) -> None:
    body = gzip.compress(STREAM)
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(wire(body, "length", SSE, f"content-encoding: {coding}")[0])
        assert (client.answer.body, client.answer.get("content-encoding")) == (body, coding)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("coding", ["utf-8", "UTF8", "binary", "identity, us-ascii"])
def test_a_charset_in_place_of_a_coding_leaves_a_stream_a_stream(coding: str, committed: bool) -> None:
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=committed)
        r.reply(wire(STREAM, "length", SSE, f"content-encoding: {coding}")[0])
        r.pass_time(1.5)
        assert client.answer.whole and client.answer.get("x-stream-id") and len(datas(client)) == 3


def test_a_stream_that_is_only_said_to_be_gzip_is_a_stream_behind_the_commit() -> None:
    for pieces in (1, 40):
        with rig(commit_after_s=COMMIT_S) as r:
            client = ask(r, PATHS["chat"], committed=True)
            reply(r, wire(STREAM, "chunked", SSE, "content-encoding: gzip", pieces=pieces), "chunked")
            r.pass_time(1.5)
            assert client.answer.whole and len(datas(client)) == 3


# An answer's last block, without its blank line or even its line end, and whether its connection may break behind it.
LAST_BLOCKS = {
    "chat": (b"data: [DONE]", True),
    "completions": (b"data:[DONE]\n", True),
    "messages": (b'event: message_stop\ndata: {"type": "message_stop"}', True),
    "responses": (b'data: {"type": "response.completed", "response": {"id": "r"}}\n', True),
    "gemini": (b'data: {"candidates": [{"index": 0, "finishReason": "STOP"}]}', False),
}


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("word", LAST_BLOCKS)
def test_a_last_event_that_is_whole_counts_though_its_end_is_missing(word: str, how: str) -> None:
    block, ends_it = LAST_BLOCKS[word]
    with rig() as r:
        client = ask(r, PATHS[word], committed=False)
        first = b"data: " + lines_of(word)[0] + b"\n"
        r.reply(wire(first + block, "chunked", SSE)[0].removesuffix(b"0\r\n\r\n"))
        getattr(r.link, how)()
        r.turn()
        r.pass_time(1.5)
        told = datas(client)
        assert told[1] == block.rpartition(b"data:")[2].strip()
        assert client.answer.whole is ends_it and len(told) == (2 if ends_it else 3)


@pytest.mark.parametrize(
    "block", [b"data: [DONE", b'data: {"choices": [', b"data: text", b"event: x\ndata", b"data: 5"]
)
def test_a_last_event_that_may_have_been_cut_is_dropped(block: bytes) -> None:
    with rig() as r:
        client = ask(r, PATHS["chat"], committed=False)
        r.reply(wire(event("a") + block, "chunked", SSE)[0].removesuffix(b"0\r\n\r\n"))
        r.link.fin()
        r.pass_time(1.5)
        assert [b'"error"' in each for each in datas(client)] == [False, True] and not client.answer.whole


def test_each_line_of_another_api_is_shown_and_an_error_follows() -> None:
    native = [{"message": {"content": "a"}, "done": False}, {"message": {"content": "b"}, "done": True}]
    with rig(commit_after_s=COMMIT_S) as r:
        client = ask(r, PATHS["chat"], committed=True)
        r.reply(wire(b"".join(json.dumps(each).encode() + b"\n" for each in native), "chunked", NDJSON)[0])
        r.pass_time(BROKEN_END_S)
        assert [json.loads(each) for each in datas(client)[:-1]] == native
        assert json.loads(datas(client)[-1])["error"]["code"] == "upstream_refused" and not client.answer.whole
