"""Heartbeats to readers in each dialect's form, and the signs of life that put off an upstream's time limits."""

from __future__ import annotations

import json

import pytest
from fakes import DONE, LAST, SSE_HEAD, chunk, event, events_in, get, post, rig

from streamd.wire.dialect import Dialect

ASK = {"model": "m", "stream": True}


def typed(kind: str, **members: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode()


PING = b'event: ping\ndata: {"type":"ping"}\n\n'
KEEPALIVE = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'

# path -> the heartbeat there, an event, and the terminal
PATHS = {
    "/v1/chat/completions": (b": hb\n", event("a"), DONE),
    "/v1/completions": (b": hb\n", event("a"), DONE),
    "/v1/messages": (PING, typed("message_start", message={}), typed("message_stop")),
    "/v1/responses": (KEEPALIVE, typed("response.created", response={"id": "r"}), typed("response.completed")),
}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("path", PATHS)
def test_a_heartbeat_has_the_dialects_form_and_no_place_in_the_log(path: str, version: str) -> None:
    heartbeat, first, terminal = PATHS[path]
    with rig(commit_after_s=1.0, heartbeat_s=15.0, ttft_timeout_s=200.0, keepalive_timeout_s=300.0) as r:
        client = r.client(post(ASK, path=path, version=version))
        r.pass_time(34)
        assert client.answer.body.count(heartbeat) == 2, "before the upstream's head"
        r.reply(SSE_HEAD + chunk(first))
        r.pass_time(31)
        assert client.answer.body.count(heartbeat) == 4, "between two events"
        r.reply(chunk(terminal) + LAST)
        stream = next(iter(r.runtime.hub))
        seen = [each for each in events_in(client.answer.body) if each.id]
        assert [each.seq for each in seen] == [1, 2] and stream.log.seq_next == 3
        late = r.client(get(f"/v1/streams/{stream.id}"))
        assert heartbeat not in late.answer.body


def test_only_comments_and_events_that_sdks_ignore_are_heartbeats() -> None:
    own = {dialect for dialect in Dialect if dialect.api.heartbeat != b": hb\n"}
    assert own == {Dialect.MESSAGES, Dialect.RESPONSES}
    for dialect in own:
        lines = dialect.api.heartbeat.split(b"\n")
        assert not any(line.startswith((b"id", b"retry", b":")) for line in lines)
        assert b"sequence_number" not in dialect.api.heartbeat and b"seq" not in dialect.api.heartbeat


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_comments_take_no_heartbeats_place_where_clients_count_events(path: str) -> None:
    heartbeat, first, terminal = PATHS[path]
    with rig(heartbeat_s=15.0) as r:
        client = r.client(post(ASK, path=path))
        r.reply(SSE_HEAD + chunk(first))
        for _ in range(4):
            r.pass_time(10)
            r.reply(chunk(b": processing\n\n"))
        assert client.answer.body.count(heartbeat) == 2
        r.reply(chunk(terminal) + LAST)


# Signs of an upstream that has no event yet, and things that are none.
ALIVE = {
    "a block of comments": b": keep-alive\n\n",
    "a comment alone, as streamd's own heartbeat": b": hb\n",
    "a comment with CRLF": b":\r\n\r\n",
    "a blank line": b"\n",
    "a retry": b"retry: 1000\n\n",
}
SILENT = {"a byte of an event": b"d", "nothing": b""}


@pytest.mark.parametrize("framing", ["chunked", "until close"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("sign", ALIVE)
def test_comments_before_the_first_event_put_off_the_time_limit(sign: str, path: str, framing: str) -> None:
    with rig(ttft_timeout_s=20.0, queue_timeout_s=1000.0, idle_timeout_s=20.0) as r:
        client = r.client(post(ASK, path=path))
        is_chunked = framing == "chunked"
        r.reply(SSE_HEAD if is_chunked else b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for _ in range(6):
            r.pass_time(15)
            r.reply(chunk(ALIVE[sign]) if is_chunked else ALIVE[sign])
        assert client.answer.status == 200 and not client.gone
        events = PATHS[path][1] + PATHS[path][2]
        r.reply(b"" if is_chunked else events)
        r.reply(chunk(events) + LAST if is_chunked else b"")
        r.pass_time(1.5)
        assert client.answer.whole


@pytest.mark.parametrize("sign", SILENT)
def test_half_an_event_is_no_sign_of_life(sign: str) -> None:
    with rig(ttft_timeout_s=20.0, queue_timeout_s=1000.0) as r:
        client = r.client(post(ASK))
        r.reply(SSE_HEAD)
        for _ in range(6):
            r.pass_time(4)
            if not r.link.closed and SILENT[sign]:
                r.reply(chunk(SILENT[sign]))
        assert events_in(client.answer.body)[-1].json["error"]["code"] == "upstream_ttft_timeout"


@pytest.mark.parametrize("sign", ALIVE)
def test_comments_put_off_the_first_event_up_to_a_bound_of_their_own(sign: str) -> None:
    with rig(ttft_timeout_s=20.0, queue_timeout_s=100.0) as r:
        client = r.client(post(ASK))
        r.reply(SSE_HEAD)
        for _ in range(19):
            r.pass_time(5)
            r.reply(chunk(ALIVE[sign]))
        assert not r.link.closed
        r.pass_time(6)
        assert events_in(client.answer.body)[-1].json["error"]["code"] == "upstream_ttft_timeout"


@pytest.mark.parametrize(("queue_s", "gone_after_s"), [(10.0, 20), (0.0, None)])
def test_the_bound_is_never_below_ttft_timeout_and_can_be_off(queue_s: float, gone_after_s: int | None) -> None:
    with rig(ttft_timeout_s=20.0, queue_timeout_s=queue_s) as r:
        r.client(post(ASK))
        r.reply(SSE_HEAD)
        for seconds in range(1, 60):
            r.pass_time(1)
            if r.link.closed:
                assert gone_after_s is not None and seconds >= gone_after_s
                return
            r.reply(chunk(b": queued\n\n"))
        assert gone_after_s is None


def test_comments_between_events_are_life_in_every_form() -> None:
    with rig(idle_timeout_s=20.0) as r:
        client = r.client(post(ASK, path="/v1/messages"))
        r.reply(SSE_HEAD + chunk(PATHS["/v1/messages"][1]))
        for sign in (*ALIVE.values(), *ALIVE.values()):
            r.pass_time(15)
            r.reply(chunk(sign))
        assert not r.link.closed
        r.pass_time(21)
        assert r.link.closed and not client.answer.whole
