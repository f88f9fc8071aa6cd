"""An answer ends with its terminal event, however the upstream's framing ends: every dialect, every kind of end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import DONE, LAST, SSE_HEAD, chunk, events_in, post, rig

from streamd.net.exchange import TERMINAL_GRACE_S
from streamd.reasons import CloseReason

CHAT_PATH = "/v1/chat/completions"
HEADS = {
    "chunked": SSE_HEAD,
    "until close": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100000\r\n\r\n",
}
ENDS = ("left open", "fin", "reset", "garbage")


def data(body: dict[str, Any], name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(body).encode() + b"\n\n"


def choice(content: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    return data({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def typed(kind: str, **fields: Any) -> bytes:
    return data({"type": kind, **fields}, kind)


# path -> the events of a whole answer, the last of them its terminal
WHOLE: list[tuple[str, list[bytes]]] = [
    (CHAT_PATH, [choice("all"), choice(finish="stop"), DONE]),
    (CHAT_PATH, [choice("all"), DONE]),
    ("/v1/completions", [data({"choices": [{"index": 0, "text": "all", "finish_reason": "stop"}]}), DONE]),
    *[
        ("/v1/responses", [typed("response.output_text.delta", delta="all"), typed(kind, response={"id": "r"})])
        for kind in ("response.completed", "response.incomplete", "response.done")
    ],
    ("/v1/messages", [typed("content_block_delta", delta={"type": "text_delta", "text": "a"}), typed("message_stop")]),
    ("/v1/of/no/known/dialect", [data({"x": 1}), DONE]),
]
# path -> the events of an answer whose last event is the upstream's own error
FAILED: list[tuple[str, list[bytes]]] = [
    (CHAT_PATH, [choice("half"), data({"error": {"message": "slow down", "code": 429}})]),
    (CHAT_PATH, [data({"error": "slow down"})]),
    (CHAT_PATH, [choice("half"), data({"detail": "slow down"})]),
    (CHAT_PATH, [choice("half"), data({"object": "error", "message": "slow down"})]),
    (CHAT_PATH, [choice("half"), data({"error": {"message": "slow down"}}), DONE]),
    ("/v1/completions", [data({"error": {"message": "slow down"}})]),
    ("/v1/responses", [typed("response.created", response={"id": "r"}), typed("error", message="slow down")]),
    ("/v1/responses", [typed("response.failed", response={"id": "r", "error": {"message": "slow down"}})]),
    ("/v1/messages", [typed("message_start", message={}), typed("error", error={"message": "slow down"})]),
]


def wire(framing: str, events: list[bytes], *, together: bool) -> list[bytes]:
    """The reads of an answer: everything in one, or each event in its own."""
    pieces = [chunk(each) if framing == "chunked" else each for each in events]
    return [HEADS[framing] + b"".join(pieces)] if together else [HEADS[framing], *pieces]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("framing", HEADS)
@pytest.mark.parametrize(
    ("path", "events", "reason"),
    [
        *[(path, events, CloseReason.COMPLETE) for path, events in WHOLE],
        *[(path, events, CloseReason.UPSTREAM_ERROR) for path, events in FAILED],
    ],
)
def test_an_answer_with_its_terminal_event_ends_cleanly_whatever_its_framing_does(
    path: str, events: list[bytes], reason: CloseReason, framing: str, how: str, together: bool
) -> None:
    with rig(idle_timeout_s=120.0, stream_timeout_s=0.0) as r:
        client = r.client(post({"model": "m", "stream": True}, path=path))
        for read in wire(framing, events, together=together):
            r.reply(read)
        if how == "garbage":
            r.reply(b"no chunk\r\n" if framing == "chunked" else b"")
        elif how != "left open":
            getattr(r.link, how)()
        r.turn()
        r.pass_time(TERMINAL_GRACE_S + 0.5)
        assert client.answer.whole
        assert [each.data for each in events_in(client.answer.body)] == [
            line.removeprefix(b"data: ") for each in events for line in each.split(b"\n") if line.startswith(b"data: ")
        ]
        stream = next(iter(r.runtime.hub))
        assert stream.reason is reason and r.link.closed
        counted = {counted for _, counted in r.runtime.counters.upstream_failures}
        assert counted == (set() if reason is CloseReason.COMPLETE else {reason})
        upstream = next(iter(r.worker.upstreams))
        assert not upstream.left_out(r.loop.time())


def test_an_end_that_does_not_come_is_awaited_no_longer_than_stream_timeout() -> None:
    with rig(stream_timeout_s=10.0) as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(choice("all")))
        r.pass_time(9.5)
        r.reply(chunk(DONE))
        r.pass_time(0.9)
        assert client.answer.whole and r.link.closed
        assert next(iter(r.runtime.hub)).reason is CloseReason.COMPLETE


def test_blanks_behind_whole_json_hold_its_place_no_longer_than_stream_timeout() -> None:
    with rig(stream_timeout_s=10.0) as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(json.dumps({"choices": [{"index": 0, "message": {"content": "all"}}]}).encode()))
        for _ in range(21):
            if not r.link.closed:
                r.reply(chunk(b" "))
            r.pass_time(0.5)
        assert client.answer.whole and r.link.closed
        assert b"all" in client.answer.body


@pytest.mark.parametrize("late", [choice(None), data({"choices": [], "usage": {"completion_tokens": 3}}), DONE])
def test_events_within_a_second_of_the_terminal_still_pass(late: bytes) -> None:
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(choice("all"), DONE))
        r.pass_time(TERMINAL_GRACE_S / 2)
        r.reply(chunk(late))
        r.pass_time(TERMINAL_GRACE_S)
        assert client.answer.whole and len(events_in(client.answer.body)) == 3


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("finish", ["", "null"])
def test_a_finish_reason_that_says_nothing_makes_no_answer_complete(finish: str, how: str) -> None:
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(choice("half", finish)) + (LAST if how == "fin" else b""))
        getattr(r.link, how)()
        r.turn()
        r.pass_time(1)
        assert not client.answer.whole
        assert events_in(client.answer.body)[-1].json["error"]["code"] == "upstream_truncated"


@pytest.mark.parametrize("framing", ["chunked", "until close"])
def test_a_finish_reason_alone_needs_the_proper_end_of_the_framing(framing: str) -> None:
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}))
        for read in wire(framing, [choice("all"), choice(finish="stop")], together=True):
            r.reply(read)
        r.link.fin()
        r.turn()
        r.pass_time(1)
        assert client.answer.whole is (framing == "until close")


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/messages", "/v1/of/no/known/dialect"])
@pytest.mark.parametrize("body", [b"", b": a comment\n\n", b"event: x\n\n"])
def test_a_stream_without_a_single_event_is_never_complete(path: str, body: bytes) -> None:
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}, path=path))
        r.reply(SSE_HEAD + (chunk(body) if body else b"") + LAST)
        r.pass_time(1)
        assert not client.answer.whole


@pytest.mark.parametrize("failing", [data({"error": {"message": "slow down"}}), None])
def test_a_retry_with_the_key_of_a_failed_stream_is_a_new_attempt(failing: bytes | None) -> None:
    with rig() as r:
        first = r.client(post({"model": "m", "stream": True}, "Idempotency-Key: k"))
        r.reply(SSE_HEAD + chunk(choice("half"), *([failing] if failing else [])))
        r.link.fin()
        r.turn()
        r.pass_time(2)
        failed = first.answer.get("x-stream-id")
        second = r.client(post({"model": "m", "stream": True}, "Idempotency-Key: k"))
        r.reply(SSE_HEAD + chunk(choice("all"), DONE) + LAST)
        again = second.answer.get("x-stream-id")
        assert again != failed and second.answer.whole
        assert r.runtime.hub.get(failed or "") is not None, "by its id the failed stream stays readable"
        third = r.client(post({"model": "m", "stream": True}, "Idempotency-Key: k"))
        assert third.answer.get("x-stream-id") == again
        r.pass_time(59)
        assert r.client(post({"model": "m", "stream": True}, "Idempotency-Key: k")).answer.get("x-stream-id") == again
