"""ClientConnection over a transport with a capacity that the test sets: requests, answers, and every way to end."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
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
    Client,
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

from streamd import keepalive
from streamd.core.admission import Admission, Gate
from streamd.core.stream import DIRECT_READERS_MAX
from streamd.net.answer import Answer
from streamd.net.client import TRANSITIONS, ClientConnection, ClientState
from streamd.net.http_error import HttpError
from streamd.net.origin import Entrance
from streamd.net.request import Request
from streamd.reasons import CloseReason


def reading(r: Rig, *fields: str, capacity: int = 1 << 60, version: str = "1.1") -> Client:
    """A reader of a stream that has begun."""
    client = r.client(post(CHAT, *fields, version=version), capacity=capacity)
    r.reply(SSE_HEAD)
    return client


# -- heads


def test_every_state_of_the_client_table_has_a_way_out() -> None:
    assert set(TRANSITIONS) == set(ClientState)
    for at, steps in TRANSITIONS.items():
        assert at is ClientState.LOST or ClientState.LOST in steps.values()


def test_a_request_head_is_read_in_any_cut() -> None:
    wire = get("/healthz", "X-Request-Id: one")
    for size in (1, 7, len(wire)):
        with rig() as r:
            client = r.client()
            for start in range(0, len(wire), size):
                client.send(wire[start : start + size])
            assert client.answer.status == 200
            assert client.answer.get("x-request-id") == "one"
            assert not client.gone


def test_a_bad_request_id_is_replaced() -> None:
    with rig() as r:
        assert (r.client(get("/healthz", "X-Request-Id: a b")).answer.get("x-request-id") or "").startswith("req_")


def test_pipelined_requests_are_answered_in_order() -> None:
    with rig() as r:
        client = r.client(
            post(WHOLE, "X-Request-Id: a") + get("/nothing", "X-Request-Id: b") + get("/healthz", "X-Request-Id: c")
        )
        assert client.answers == []
        r.reply(whole_answer(b"slow"))
        assert [(each.get("x-request-id"), each.status) for each in client.answers] == [
            ("a", 200),
            ("b", 404),
            ("c", 200),
        ]
        assert not client.gone


def test_later_bytes_do_not_overtake_a_request_that_waits_for_an_answer() -> None:
    with rig() as r:
        client = r.client(post(WHOLE, "X-Request-Id: a") + get("/healthz", "X-Request-Id: b"))
        r.link.feed(whole_answer(b"slow"))  # and in the same turn of the loop:
        client.transport.feed(get("/healthz", "X-Request-Id: c"))
        r.turn()
        assert [each.get("x-request-id") for each in client.answers] == ["a", "b", "c"]


def test_a_request_in_two_halves_around_the_end_of_an_answer_is_answered() -> None:
    with rig() as r:
        second = get("/healthz", "X-Request-Id: b")
        client = r.client(post(WHOLE) + second[:20])
        r.reply(whole_answer(b"slow"))
        client.send(second[20:])
        assert client.statuses == [200, 200]


@pytest.mark.parametrize("field", ["", "%41", "a=%ff", "+", "access_token="])
def test_a_query_of_too_many_fields_is_refused_and_the_connection_stays(field: str) -> None:
    with rig() as r:
        client = r.client(get("/v1/streams/room?" + "&".join([field] * 300)) + get())
        assert client.statuses == [400, 200] and client.answers[0].error["code"] == "too_many_query_fields"


def test_a_client_that_pipelines_too_much_is_cut_off() -> None:
    with rig(pipeline_bytes_max=1024) as r:
        client = r.client(post(WHOLE))
        client.send(b"GET /" + b"a" * 1000)
        assert not client.gone
        client.send(b"a" * 100)
        assert client.gone and client.transport.aborted
        assert r.closed == {CloseReason.PIPELINE_FULL: 1}
        assert r.link.closed  # no client waits for that answer any more


def test_no_request_is_begun_for_a_client_that_does_not_read_its_answers() -> None:
    with rig() as r:
        client = r.client(capacity=100)
        for _ in range(40):
            client.send(get())
        held = len(client.transport.held)
        assert held < 1000  # a single answer, not forty
        client.take()
        assert client.statuses == [200] * 40
        assert not client.gone


def test_a_client_that_only_sends_is_cut_off() -> None:
    with rig(pipeline_bytes_max=1024) as r:
        client = r.client(capacity=100)
        for _ in range(40):
            client.send(get())
        assert client.gone and r.closed == {CloseReason.PIPELINE_FULL: 1}


def test_a_connection_is_closed_after_the_answer_to_connection_close() -> None:
    with rig() as r:
        client = r.client(get("/healthz", "Connection: close"))
        assert client.answer.get("connection") == "close"
        assert client.gone and r.closed == {CloseReason.COMPLETE: 1}


def test_an_http_10_connection_is_closed_after_the_answer() -> None:
    with rig() as r:
        client = r.client(get("/healthz", version="1.0"))
        assert client.answer.status == 200 and client.answer.get("content-length") == "15"
        assert client.gone


def test_draining_closes_after_the_answer() -> None:
    with rig() as r:
        r.runtime.draining = True
        client = r.client(get())
        assert client.answer.get("connection") == "close" and client.gone


def test_an_answer_to_head_has_the_length_and_no_body() -> None:
    with rig() as r:
        client = r.client(get(method="HEAD") + get())
        client.methods = ("HEAD", "GET")
        first, second = client.answers
        assert first.get("content-length") == second.get("content-length") == "15"
        assert first.body == b"" and second.body != b""


@pytest.mark.parametrize(
    ("wire", "status", "allow"),
    [
        (get("/nothing"), 404, None),
        (get("/v1/../status"), 404, None),
        (get("/v1/%2e%2e/status"), 404, None),
        (get(method="POST"), 405, "GET, HEAD"),
        (get("/v1/streams/x", method="PATCH"), 405, "GET, DELETE, PUT, HEAD"),
        (get("/v1/chat/completions", method="TRACE"), 501, None),
    ],
)
def test_a_request_refused_by_its_head_keeps_the_connection(wire: bytes, status: int, allow: str | None) -> None:
    with rig() as r:
        client = r.client(wire + get())
        refused, health = client.answers
        assert (refused.status, health.status) == (status, 200)
        assert sorted((refused.get("allow") or "").split(", ")) == sorted((allow or "").split(", "))
        assert set(refused.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "fields", [("Connection: upgrade", "Upgrade: websocket"), ("Connection: upgrade", "Upgrade: h2c, websocket")]
)
def test_another_protocol_is_refused_and_its_bytes_are_not_read(fields: tuple[str, ...]) -> None:
    with rig() as r:
        client = r.client(get("/v1/realtime", *fields) + b"\x81\x05hello" + get())
        assert client.answer.status == 426 and client.answer.get("upgrade") == "HTTP/1.1"
        assert client.answer.get("connection") == "Upgrade, close"
        client.fin()
        assert client.gone


@pytest.mark.parametrize(
    ("wire", "status", "code"),
    [
        (b"GET /\n\n", 400, "bare_lf"),
        (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505, "bad_version"),
        (b"GET /" + b"a" * 20_000, 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000, 431, "head_too_large"),
        (get("/", *[f"X-{n}: a" for n in range(101)]), 431, "too_many_headers"),
        (b"\x16\x03\x01\x02\x00", 400, "bad_request_line"),
        (post(b"", "Transfer-Encoding: gzip"), 400, None),
    ],
)
def test_a_malformed_request_is_refused_and_the_close_lingers(wire: bytes, status: int, code: str | None) -> None:
    with rig() as r:
        client = r.client(wire)
        assert client.answer.status == status
        if code is not None:
            assert client.answer.error["code"] == code
        assert client.transport.eof_sent and not client.gone
        client.send(get() * 3)  # thrown away
        assert len(client.answers) == 1
        client.fin()
        assert client.gone and r.closed == {CloseReason.BAD_REQUEST: 1}


def test_a_peer_that_never_closes_is_aborted() -> None:
    with rig(close_timeout_s=2.0) as r:
        client = r.client(b"GET /\n\n")
        r.pass_time(1.5)
        assert not client.gone
        r.pass_time(1.0)
        assert client.gone and client.transport.aborted
        assert r.closed == {CloseReason.BAD_REQUEST: 1}


# -- slow heads


def test_a_connection_without_a_head_is_closed_at_its_deadline() -> None:
    with rig(head_timeout_s=10.0) as r:
        client = r.client()
        r.pass_time(9.5)
        assert client.raw == b""
        r.pass_time(1.0)
        assert client.answer.status == 408 and client.answer.error["code"] == "head_timeout"
        assert client.transport.eof_sent


def test_a_head_byte_by_byte_has_an_absolute_deadline() -> None:
    with rig(head_timeout_s=10.0) as r:
        client = r.client()
        for byte in get("/healthz", "X: " + "a" * 100)[:100]:
            if client.raw:
                break
            client.send(bytes([byte]))
            r.pass_time(0.3)
        assert client.answer.status == 408
        assert 10 <= r.loop.time() - 1000 < 11
        client.fin()
        assert r.closed == {CloseReason.HEAD_TIMEOUT: 1}


def test_a_later_head_has_its_time_from_its_first_byte() -> None:
    with rig(head_timeout_s=10.0, keepalive_timeout_s=60.0) as r:
        client = r.client(get())
        r.pass_time(50)
        for _ in range(11):
            client.send(b"G" if client.connection._heads is None else b"E")
            r.pass_time(1.0)
        assert client.statuses == [200, 408]


def test_a_kept_alive_connection_that_is_idle_is_closed_silently() -> None:
    with rig(keepalive_timeout_s=60.0) as r:
        client = r.client(get())
        r.pass_time(59)
        assert not client.gone
        r.pass_time(2)
        assert client.gone and client.statuses == [200]
        assert r.closed == {CloseReason.IDLE: 1}


# -- bodies


def test_a_request_body_is_read_in_any_cut() -> None:
    for size in (1, 11, 10_000):
        for fields, body in (
            (("Content-Length: 5",), b"hello"),
            (("Transfer-Encoding: chunked",), b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: x\r\n\r\n"),
        ):
            with rig() as r:
                wire = get("/v1/embeddings", *fields, method="POST") + body + get()
                client = r.client()
                for start in range(0, len(wire), size):
                    client.send(wire[start : start + size])
                assert bytes(r.link.sent).endswith(b"content-length: 5\r\n\r\nhello")
                r.reply(whole_answer(b"{}"))
                assert client.statuses == [200, 200]


def test_expect_100_is_answered_with_continue() -> None:
    with rig() as r:
        head = get("/v1/embeddings", "Expect: 100-continue", "Content-Length: 5", method="POST")
        client = r.client(head)
        assert client.raw == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"hello")
        r.reply(whole_answer(b"{}"))
        assert client.statuses == [200]


def test_expect_100_is_not_answered_if_the_body_is_here_or_refused() -> None:
    with rig(body_bytes_max=10) as r:
        here = r.client(get("/v1/embeddings", "Expect: 100-continue", "Content-Length: 2", method="POST") + b"hi")
        assert here.raw == b""
        large = r.client(get("/v1/embeddings", "Expect: 100-continue", "Content-Length: 11", method="POST"))
        assert large.answer.status == 413
        none = r.client(get("/v1/embeddings", "Expect: 100-continue", method="POST"))
        assert none.raw == b""
        other = r.client(get("/v1/embeddings", "Expect: 200-ok", method="POST"))
        assert other.answer.status == 417


def test_a_length_over_the_limit_is_refused_before_the_body_is_read() -> None:
    with rig(body_bytes_max=1000) as r:
        client = r.client(get("/v1/embeddings", "Content-Length: 1001", method="POST"))
        assert client.answer.status == 413 and client.answer.error["code"] == "body_too_large"
        client.send(b"a" * 1001)
        client.fin()
        assert client.gone and len(client.answers) == 1
        assert r.closed == {CloseReason.BODY_TOO_LARGE: 1}


def test_a_refused_body_may_come_to_its_end_as_long_as_it_comes() -> None:
    """A reset in its middle would take the answer with it."""
    with rig(body_bytes_max=10_000, body_bytes_per_s_min=100, close_timeout_s=1.0) as r:
        head = get("/v1/embeddings", "Content-Length: 10001", method="POST")
        slow, silent, endless = r.client(head), r.client(head), r.client(head)
        for _ in range(8):
            slow.send(b"a" * 150)
            endless.send(b"a" * 1500)
            r.pass_time(1.0)
            assert not slow.gone
        assert silent.gone and endless.gone and r.runtime.bodies_bytes == 0
        slow.fin()
        assert slow.gone and len(slow.answers) == 1


def test_a_chunked_body_over_the_limit_is_refused() -> None:
    with rig(body_bytes_max=1000) as r:
        client = r.client(get("/v1/embeddings", "Transfer-Encoding: chunked", method="POST"))
        client.send(chunk(b"a" * 600))
        assert r.runtime.bodies_bytes == 600 and client.raw == b""
        client.send(chunk(b"a" * 600))
        assert client.answer.status == 413
        assert r.runtime.bodies_bytes == 0


def test_a_bad_chunk_in_a_body_is_refused() -> None:
    with rig() as r:
        client = r.client(get("/v1/embeddings", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n")
        assert client.answer.status == 400 and client.transport.eof_sent


def test_all_bodies_together_are_bounded_and_accounted() -> None:
    with rig(bodies_bytes_max=1500, body_bytes_max=1000) as r:
        one = r.client(get("/v1/embeddings", "Content-Length: 1000", method="POST") + b"a" * 900)
        two = r.client(get("/v1/embeddings", "Content-Length: 1000", method="POST") + b"a" * 900)
        assert two.answer.status == 503 and two.answer.error["code"] == "bodies_over_budget"
        assert int(two.answer.get("retry-after") or 0) >= 1
        assert r.runtime.bodies_bytes == 900
        one.send(b"a" * 100)
        assert r.runtime.bodies_bytes == 1000  # held for a second try until the answer begins
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        assert r.runtime.bodies_bytes == 0


@pytest.mark.parametrize("leave", ["fin", "reset"])
@pytest.mark.parametrize("body_bytes", [400, 1000])
def test_a_client_that_leaves_frees_its_body(leave: str, body_bytes: int) -> None:
    with rig() as r:
        client = r.client(get("/v1/embeddings", "Content-Length: 1000", method="POST") + b"a" * body_bytes)
        assert r.runtime.bodies_bytes == body_bytes
        getattr(client, leave)()
        assert client.gone and r.runtime.bodies_bytes == 0
        assert r.closed == {CloseReason.READER_GONE: 1}


def test_the_request_body_of_a_stream_is_freed_with_its_first_byte() -> None:
    with rig() as r:
        r.client(post(CHAT))
        assert r.runtime.bodies_bytes > 0
        r.reply(SSE_HEAD)
        assert r.runtime.bodies_bytes == 0


def test_a_body_below_the_minimum_rate_is_refused() -> None:
    with rig(body_grace_s=10.0, body_bytes_per_s_min=1000) as r:
        good = r.client(get("/v1/embeddings", "Content-Length: 30000", method="POST"))
        slow = r.client(get("/v1/embeddings", "Content-Length: 30000", method="POST"))
        for _ in range(21):
            good.send(b"a" * 1200)
            if not slow.raw:
                slow.send(b"a" * 100)
            r.pass_time(1.0)
        assert slow.answer.status == 408 and slow.answer.error["code"] == "body_timeout"
        assert good.raw == b"" and r.runtime.bodies_bytes == 25_200
        good.send(b"a" * 4800)
        r.reply(whole_answer(b"{}"))
        assert good.statuses == [200]


@pytest.mark.parametrize("trickle", [0, 1])
@pytest.mark.parametrize(
    "head",
    [
        get("/v1/embeddings", "Content-Length: 1000000", method="POST"),
        get("/v1/embeddings", "Transfer-Encoding: chunked", method="POST") + b"ff000\r\n",
        get("/healthz", "Content-Length: 1000000"),
        get("/v1/streams/s/events", "Content-Length: 1000000", method="POST"),
    ],
)
def test_bytes_that_came_quickly_buy_no_time_for_the_rest(head: bytes, trickle: int) -> None:
    with rig(body_grace_s=1.0, body_bytes_per_s_min=1000) as r:
        opened = r.client(get("/v1/streams", "Content-Length: 0", method="POST")).answer
        client = r.client(head.replace(b"/s/", f"/{json.loads(opened.body)['id']}/".encode()) + b" " * 900_000)
        for _ in range(8):
            assert r.runtime.bodies_bytes or b"healthz" in head or client.raw
            client.send(b" " * trickle)
            r.pass_time(1.0)
        assert client.answer.status == 408 and client.answer.error["code"] == "body_timeout"
        assert r.runtime.bodies_bytes == 0
        for stream in tuple(r.runtime.hub):
            stream.source.cancel(CloseReason.CANCELLED)
            r.runtime.hub.remove(stream)


NO_BODY = [
    get("/healthz"),
    get("/readyz"),
    get("/v1/streams"),
    get("/v1/streams/room"),
    get("/v1/streams/room", method="DELETE"),
    get("/v1/stream?conv_id=c", method="DELETE"),
    get("/v1/chat/completions", "Origin: https://a.test", "Access-Control-Request-Method: POST", method="OPTIONS"),
]


@pytest.mark.parametrize("wire", NO_BODY)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_nobody_wants_is_thrown_away_as_it_comes(wire: bytes, chunked: bool) -> None:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 3000"
    with rig(cors_origins=("https://a.test",), body_bytes_max=4000) as r:
        client = r.client(wire[:-2] + framing + b"\r\n\r\n")
        for _ in range(3):
            client.send(chunk(b"x" * 1000) if chunked else b"x" * 1000)
            assert r.runtime.bodies_bytes == 0
        client.send((LAST if chunked else b"") + get())
        assert len(client.answers) == 2 and client.answers[1].status == 200
        large = r.client(wire[:-2] + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            large.send(chunk(b"x" * 1000))
        assert large.statuses == [413]


# -- ends


@pytest.mark.parametrize(
    ("sent", "reason"),
    [(b"", CloseReason.IDLE), (b"GET /hea", CloseReason.READER_GONE), (get(), CloseReason.IDLE)],
)
def test_a_fin_between_or_within_heads_closes_the_connection(sent: bytes, reason: CloseReason) -> None:
    with rig() as r:
        client = r.client(sent)
        client.fin()
        assert client.gone and r.closed == {reason: 1}


def test_a_fin_while_an_answer_is_awaited_means_that_the_reader_is_gone() -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        client.fin()
        assert client.gone and r.link.closed
        assert r.ended == [("POST /v1/chat/completions", CloseReason.READER_GONE, 0)]


def test_a_fin_in_mid_stream_cancels_the_generation() -> None:
    with rig() as r:
        client = reading(r)
        r.reply(chunk(event("a")))
        client.fin()
        assert client.gone and r.link.closed
        (stream,) = r.runtime.hub
        assert stream.reason is CloseReason.READER_GONE


def test_a_client_that_sends_a_fin_after_the_end_still_gets_the_rest() -> None:
    with rig() as r:
        client = reading(r)
        client.transport.capacity = 50
        r.reply(chunk(event("a"), DONE) + LAST)
        client.fin()
        assert not client.gone
        client.take()
        assert client.answer.whole and client.gone
        assert r.ended[-1][1] is CloseReason.COMPLETE


def test_a_client_that_stalls_after_its_fin_is_closed() -> None:
    with rig(stall_timeout_s=60.0) as r:
        client = reading(r)
        client.transport.capacity = 50
        r.reply(chunk(event("a"), DONE) + LAST)
        client.fin()
        r.pass_time(61)
        assert client.gone and r.ended[-1][1] is CloseReason.STALLED


def test_a_reader_that_closes_after_done_counts_as_complete() -> None:
    with rig() as r:
        client = reading(r)
        r.reply(chunk(event("a"), DONE))  # the last chunk has not come yet
        client.reset()
        assert r.ended[-1][1] is CloseReason.COMPLETE
        (stream,) = r.runtime.hub
        assert stream.reason is None
        r.reply(LAST)
        assert stream.reason is CloseReason.COMPLETE and r.runtime.hub.detached == 0


def test_a_reader_that_closes_before_done_does_not_count_as_complete() -> None:
    with rig() as r:
        client = reading(r)
        client.transport.capacity = 50
        r.reply(chunk(event("a"), DONE))
        client.reset()
        assert r.ended[-1][1] is CloseReason.READER_GONE


@pytest.mark.parametrize("sealed", [False, True])
def test_a_reader_that_closes_during_its_catch_up_does_not_count_as_complete(sealed: bool) -> None:
    with rig(catchup_bytes_max=2000) as r:
        first = reading(r)
        for n in range(20):
            r.reply(chunk(event(f"{n} " + "a" * 1000)))
        r.reply(chunk(DONE) + (LAST if sealed else b""))
        (stream,) = r.runtime.hub
        assert stream.progress.terminal and (stream.reason is not None) is sealed
        late = r.client()
        late.transport.feed(get(f"/v1/streams/{stream.id}"))
        r.loop.run_until_complete(asyncio.sleep(0))  # the first piece leaves at the turn's end, and others follow
        assert late.raw and not late.connection.paused
        late.reset()
        assert DONE not in late.raw
        assert r.ended[-1][1] is CloseReason.READER_GONE
        if not sealed:
            r.reply(LAST)
        assert first.answer.whole


def test_a_reader_that_closes_before_a_pass_brings_the_end_does_not_count_as_complete() -> None:
    with rig() as r:
        first = reading(r)
        (stream,) = r.runtime.hub
        readers = [r.client(get(f"/v1/streams/{stream.id}")) for _ in range(DIRECT_READERS_MAX)]
        r.reply(chunk(event("a")))
        r.link.feed(chunk(event("b"), DONE))  # and in the same turn of the loop:
        readers[0].reset()
        assert DONE not in readers[0].raw and DONE in first.raw
        assert r.ended[-1][1] is CloseReason.READER_GONE
        readers[1].reset()
        assert r.ended[-1][1] is CloseReason.COMPLETE
        r.reply(LAST)
        assert first.answer.whole


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionResetError(errno.ECONNRESET, ""), CloseReason.READER_GONE),
        (BrokenPipeError(errno.EPIPE, ""), CloseReason.READER_GONE),
        (TimeoutError(errno.ETIMEDOUT, ""), CloseReason.NETWORK_LOST),
        (OSError(errno.EHOSTUNREACH, ""), CloseReason.NETWORK_LOST),
    ],
)
def test_the_error_of_a_lost_connection_decides_whether_the_stream_gets_a_grace(
    error: OSError, reason: CloseReason
) -> None:
    with rig(resume_grace_s=30.0) as r:
        client = reading(r)
        client.reset(error)
        assert r.closed == {reason: 1}
        (stream,) = r.runtime.hub
        assert (stream.reason is None) is (reason is CloseReason.NETWORK_LOST)
        r.pass_time(31)
        assert stream.reason is not None


def test_a_close_with_a_peer_that_takes_nothing_is_aborted() -> None:
    with rig(close_timeout_s=2.0) as r:
        client = r.client(get("/healthz", "Connection: close"), capacity=10)
        assert not client.gone
        r.pass_time(4.5)
        assert client.gone and client.transport.aborted


def test_a_close_waits_for_a_peer_that_goes_on_taking() -> None:
    with rig(close_timeout_s=2.0, stall_timeout_s=60.0) as r:
        client = r.client(get("/healthz", "Connection: close"), capacity=10)
        for _ in range(10):
            r.pass_time(1.5)
            client.take(5)
        assert not client.gone
        client.take()
        assert client.gone and not client.transport.aborted and client.answer.status == 200


def test_a_second_close_or_abort_does_nothing() -> None:
    with rig() as r:
        client = r.client(get(), capacity=10)
        client.connection.close(CloseReason.DRAINING)
        client.connection.close(CloseReason.STALLED)
        client.connection.abort(CloseReason.STALLED)
        r.turn()
        client.connection.abort(CloseReason.STALLED)
        client.connection.connection_lost(None)
        assert r.closed == {CloseReason.DRAINING: 1}


# -- streams


def test_a_stream_has_ids_and_is_written_once_per_read() -> None:
    with rig() as r:
        client = reading(r)
        r.reply(chunk(event("a")) + chunk(event("b")))
        writes = client.transport.writes
        r.reply(chunk(event("c")) + chunk(event("d")) + chunk(DONE))
        assert client.transport.writes == writes + 1  # several events of one read are one write
        r.reply(LAST)
        answer = client.answer
        assert answer.get("content-type") == "text/event-stream"
        assert answer.get("cache-control") == "no-store, no-transform"
        assert answer.get("x-accel-buffering") == "no"
        assert answer.get("x-upstream") == "up"
        stream_id = answer.get("x-stream-id")
        events = events_in(answer.body)
        assert [each.id for each in events] == [f"{stream_id}:{seq}" for seq in range(1, 6)]
        assert text_of(events) == "abcd"
        assert answer.body.startswith(b"retry: ")
        assert answer.whole and not client.gone
        client.send(get())
        assert client.statuses == [200, 200]


def test_a_stream_for_http_10_ends_with_the_connection() -> None:
    with rig() as r:
        client = reading(r, version="1.0")
        r.reply(chunk(event("a")) + chunk(event("b")) + chunk(DONE) + LAST)
        answer = client.answer
        assert answer.get("transfer-encoding") is None and client.gone
        assert text_of(events_in(answer.body)) == "ab"


def test_the_last_chunk_may_fill_the_transport() -> None:
    with rig() as r:
        client = reading(r)
        r.reply(chunk(event("a")))
        client.transport.capacity = len(chunk(b"id: s_" + b"x" * 27 + b":2\n" + DONE))
        r.reply(chunk(DONE) + LAST)
        assert bytes(client.transport.held) == LAST
        client.take()
        assert client.answer.whole
        client.send(get())
        assert client.statuses == [200, 200]


def retry_of(client: Client) -> int:
    return int(client.answer.body.split(b"\n")[0].removeprefix(b"retry: "))


def test_a_single_reader_is_back_at_once_and_many_are_spread() -> None:
    with rig() as r:
        client = reading(r)
        assert retry_of(client) == 100 and r.runtime.readers == 1
        client.fin()
        assert r.runtime.readers == 0
        r.runtime.readers = 4000  # as if so many were here
        waits = {retry_of(reading(r)) for _ in range(20)}
        assert len(waits) > 15 and min(waits) >= 100 and 1000 < max(waits) <= 3320
        r.runtime.readers -= 4000


def test_heartbeats_are_sent_only_in_silence() -> None:
    with rig(heartbeat_s=15.0) as r:
        client = reading(r)
        r.pass_time(14)
        assert b": hb" not in client.raw
        r.pass_time(1.5)
        assert client.raw.endswith(chunk(b": hb\n"))
        r.reply(chunk(event("a")))
        r.pass_time(14)
        assert client.raw.count(b": hb\n") == 1
        r.pass_time(1.5)
        assert client.raw.count(b": hb\n") == 2
        r.pass_time(30)
        assert client.raw.count(b": hb\n") == 4
        r.reply(chunk(DONE) + LAST)
        assert [each.data for each in events_in(client.answer.body)][1:] == [b"[DONE]"]


def test_without_heartbeats_a_silent_stream_stays_silent() -> None:
    with rig(heartbeat_s=0.0) as r:
        client = reading(r)
        r.pass_time(100)
        assert b": hb" not in client.raw and not client.gone


def test_comments_of_an_upstream_pass_and_count_as_life() -> None:
    with rig(heartbeat_s=15.0) as r:
        client = reading(r)
        r.pass_time(10)
        r.reply(chunk(b": still thinking\n\n"))
        assert client.raw.endswith(chunk(b": still thinking\n"))
        r.pass_time(10)
        assert b": hb" not in client.raw


def test_a_stalled_reader_is_closed_and_a_slow_reader_is_not() -> None:
    with rig(stall_timeout_s=60.0, resume_grace_s=30.0) as r:
        stalled, slow = reading(r, capacity=600), None
        links = [r.link]
        slow = reading(r, capacity=600)
        links.append(r.link)
        for link in links:
            link.feed(chunk(event("a" * 1000)))
        for _ in range(59):
            slow.take(1)
            r.pass_time(1.0)
        assert not stalled.gone and not slow.gone
        for _ in range(20):
            slow.take(1)
            r.pass_time(1.0)
        assert stalled.gone and not slow.gone
        assert r.closed == {CloseReason.STALLED: 1}
        assert r.runtime.hub.detached == 1  # streamd closed it: the stream has its grace
        slow.take()
        assert text_of(events_in(slow.answer.body)) == "a" * 1000


def test_without_a_stall_limit_a_stalled_reader_stays() -> None:
    with rig(stall_timeout_s=0.0) as r:
        client = reading(r, capacity=600)
        r.reply(chunk(event("a" * 1000)))
        r.pass_time(500 - keepalive.IDLE_S)
        assert client.connection.paused and not client.gone


@pytest.mark.parametrize("pause", ["none", "for 5 s", "to the end"])
@pytest.mark.parametrize("stall_timeout_s", [0.0, 60.0, 400.0])
@pytest.mark.parametrize("heartbeat_s", [0.0, 15.0, 300.0])
def test_the_right_to_read_ends_in_time_in_every_state_of_the_reader(
    pause: str, stall_timeout_s: float, heartbeat_s: float
) -> None:
    """The next deadline of a reader, paused or not, is never later than its expiry."""
    soon = {"retention_s": 1.0, "detach_grace_max_s": 1.0, "resume_grace_s": 1.0}
    with rig(stall_timeout_s=stall_timeout_s, heartbeat_s=heartbeat_s, **soon) as r:
        client = r.client(post(CHAT), capacity=PLENTY if pause == "none" else 600)
        assert client.connection.answer is not None
        client.connection.answer.request.expires_at = r.loop.time() + 40.0
        r.reply(SSE_HEAD)
        r.reply(chunk(event("a" * 1000)))
        assert client.connection.paused is (pause != "none")
        r.pass_time(5.0)
        if pause == "for 5 s":
            client.take()
        r.pass_time(34.5)
        assert r.ended == []
        r.pass_time(1.0)
        assert [reason for _, reason, _ in r.ended] == [CloseReason.TOKEN_EXPIRED]
        client.take()
        assert "expired" in events_in(client.answer.body)[-1].json["error"]["message"]
        assert not client.answer.whole and client.gone


def test_policy_close_ends_the_slow_reader_and_the_others_miss_no_event() -> None:
    with rig(ring_slots=32) as r:
        slow = reading(r, "X-Stream-Policy: close")
        stream_id = slow.answer.get("x-stream-id")
        others = [r.client(get(f"/v1/streams/{stream_id}")) for _ in range(3)]
        slow.transport.capacity = 0
        for n in range(100):
            r.reply(chunk(event(f"{n} ")))
        assert slow.gone and r.closed == {CloseReason.SLOW_CONSUMER: 1}
        r.reply(chunk(DONE) + LAST)
        for other in others:
            assert [each.seq for each in events_in(other.answer.body)] == list(range(1, 102))
            assert text_of(events_in(other.answer.body)) == "".join(f"{n} " for n in range(100))


def test_policy_close_ends_a_slow_reader_that_is_alone() -> None:
    with rig(ring_slots=32, resume_grace_s=30.0) as r:
        slow = reading(r, "X-Stream-Policy: close")
        slow.transport.capacity = 0
        for n in range(40):
            r.reply(chunk(event(f"{n} ")))
        assert slow.gone and r.runtime.hub.detached == 1 and not r.link.closed
        (stream,) = r.runtime.hub
        back = r.client(get(f"/v1/streams/{stream.id}", f"Last-Event-ID: {stream.id}:0"))
        r.reply(chunk(DONE) + LAST)
        assert text_of(events_in(back.answer.body)) == "".join(f"{n} " for n in range(40))


def test_a_head_request_for_a_stream_gets_its_head_alone() -> None:
    with rig() as r:
        client = reading(r)
        stream_id = client.answer.get("x-stream-id")
        other = r.client(get(f"/v1/streams/{stream_id}", method="HEAD") + get())
        other.methods = ("HEAD",)
        assert other.statuses == [200, 200]
        assert other.answers[0].get("x-stream-id") == stream_id
        (stream,) = r.runtime.hub
        assert len(stream.readers) == 1


@pytest.mark.parametrize(("status", "limit"), [(503, "no_upstream_available"), (429, "rate_limited")])
def test_an_event_source_that_is_refused_for_now_gets_a_retry_line(status: int, limit: str) -> None:
    from streamd.net.http_error import HttpError

    with rig() as r:
        reason = CloseReason.OVER_BUDGET if status == 503 else CloseReason.RATE_LIMITED

        def refuse(answer: Answer) -> None:
            raise HttpError(status, "Not now.", code=limit, reason=reason, retry_after_s=3)

        r.worker.application.plan = refuse  # type: ignore[assignment]
        source = r.client(get("/v1/streams/x", "Accept: text/event-stream"))
        answer = source.answer
        assert answer.status == 200 and answer.get("content-type") == "text/event-stream"
        assert answer.get("cache-control") == "no-store"
        assert not answer.whole and events_in(answer.body) == []
        retry, comment, _ = answer.body.split(b"\n", 2)
        assert int(retry.removeprefix(b"retry: ")) >= 3000
        assert comment.startswith(b": %b %d" % (limit.encode(), status))
        assert source.gone and r.runtime.counters.refused[reason] == 1
        old = r.client(get("/v1/streams/x", "Accept: text/event-stream", version="1.0"))
        assert old.answer.body.startswith(b"retry: ")
        other = r.client(get("/v1/streams/x"))
        assert other.answer.status == status and other.answer.get("retry-after") == "3"


# -- bodies that pass


def test_an_upstreams_body_passes_with_its_status_and_headers() -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(
            b"HTTP/1.1 201 Made\r\ncontent-length: 5\r\nx-a: b\r\nconnection: x-hop\r\nx-hop: c\r\nkeep-alive: 1\r\n"
            b"x-request-id: theirs\r\n\r\nhello"
        )
        answer = client.answer
        assert (answer.status, answer.head.reason, answer.body) == (201, b"Made", b"hello")
        assert answer.get("x-a") == "b" and answer.get("x-upstream") == "up"
        assert answer.get("x-hop") is answer.get("keep-alive") is answer.get("connection") is None
        assert (answer.get("x-request-id") or "").startswith("req_")
        assert not client.gone and not r.link.closed


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    "wire",
    [
        whole_answer(b"hello"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"he", b"llo") + LAST,
        b"HTTP/1.0 200 OK\r\n\r\nhello",
    ],
)
def test_every_framing_of_an_upstream_reaches_every_http_version(wire: bytes, version: str) -> None:
    with rig() as r:
        client = r.client(post(WHOLE, version=version))
        r.reply(wire)
        r.link.fin()
        r.turn()
        assert client.answer.body == b"hello" and client.answer.whole
        assert client.gone is (version == "1.0")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_an_answer_without_a_body_passes_and_keeps_the_connection(status: str) -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(f"HTTP/1.1 {status}\r\nx-a: b\r\n\r\n".encode())
        assert client.answer.body == b"" and client.answer.get("transfer-encoding") is None
        client.send(get())
        assert client.statuses == [int(status[:3]), 200]


def test_a_head_request_passes_with_the_length_of_the_body() -> None:
    with rig() as r:
        client = r.client(get("/v1/files/x", method="HEAD"))
        client.methods = ("HEAD",)
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        assert client.answer.get("content-length") == "5"
        client.send(get())
        assert client.statuses == [200, 200]


def test_a_slow_reader_of_a_passed_body_pauses_the_upstream() -> None:
    with rig() as r:
        client = r.client(post(WHOLE), capacity=1000)
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 4000\r\n\r\n" + b"a" * 1000)
        assert not r.link.reading
        client.take(2000)
        assert r.link.reading
        r.reply(b"a" * 2500)
        assert not r.link.reading and len(client.transport.held) <= 2500
        client.take(2500)
        client.transport.capacity = 100
        r.reply(b"a" * 500)  # paused by the last bytes
        client.take()
        assert client.answer.body == b"a" * 4000
        assert r.link.reading and not r.link.closed  # pooled, and able to read
        again = r.client(post(WHOLE))
        assert len(r.links) == 1
        r.reply(whole_answer(b"ok"))
        assert again.answer.body == b"ok"


def test_a_reader_paused_before_its_answer_begins_gets_the_whole_answer() -> None:
    with rig() as r:
        client = r.client(get("/v1/files/x", "Expect: 100-continue", "Content-Length: 2", method="POST"), capacity=3)
        assert client.connection.paused  # by the interim answer
        client.send(b"hi")
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 4000\r\n\r\n" + b"a" * 1000)
        assert not r.link.reading
        client.take()
        assert r.link.reading
        r.reply(b"a" * 3000)
        assert client.answer.body == b"a" * 4000


def test_a_stalled_reader_of_a_passed_body_is_closed() -> None:
    with rig(stall_timeout_s=60.0, idle_timeout_s=20.0) as r:
        client = r.client(post(WHOLE), capacity=100)
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 4000\r\n\r\n" + b"a" * 1000)
        r.pass_time(59)
        assert not client.gone
        r.pass_time(2)
        assert client.gone and r.link.closed and r.ended[-1][1] is CloseReason.STALLED


# -- bugs


def test_a_bug_is_reported_and_costs_only_its_connection() -> None:
    with rig() as r:
        bugs: list[str] = []
        r.runtime.on_bug = lambda where, error: bugs.append(where)

        def broken(answer: Answer) -> None:
            raise ZeroDivisionError

        application = r.worker.application
        plan, application.plan = application.plan, broken  # type: ignore[assignment]
        client = r.client(get())
        assert client.answer.status == 500 and client.answer.error["code"] == "internal"
        assert bugs == ["client.work"] and r.runtime.counters.bugs == 1
        application.plan = plan
        assert r.client(get()).statuses == [200]
        r.runtime.counters.bugs = 0


def test_a_bug_in_mid_stream_ends_the_connection() -> None:
    with rig() as r:
        client = reading(r)
        client.connection.crash("test", ZeroDivisionError())
        r.turn()
        assert client.gone and r.closed == {CloseReason.INTERNAL: 1}
        assert len(r.bugs) == r.runtime.counters.bugs == 1
        r.bugs.clear()
        r.runtime.counters.bugs = 0


def test_a_problem_between_requests_ends_the_connection() -> None:
    from streamd.net.http_error import not_found

    with rig() as r:
        client = r.client()
        client.connection.give_up(not_found("/"))
        r.turn()
        assert client.gone and r.closed == {CloseReason.NOT_FOUND: 1}


@pytest.mark.parametrize("framing", ["length", "chunked", "until close"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_drain_never_makes_an_unfinished_proxied_answer_look_whole(version: str, framing: str) -> None:
    with rig() as r:
        client = r.client(post(WHOLE, version=version))
        fields = {"length": b"content-length: 100", "chunked": b"transfer-encoding: chunked", "until close": b"x: y"}
        r.reply(
            b"HTTP/1.1 200 OK\r\n" + fields[framing] + b"\r\n\r\n" + (chunk(b"ha") if framing == "chunked" else b"ha")
        )
        client.connection.give_up(HttpError(503, "too late", code="draining"))
        r.turn()
        assert client.gone
        ended_by_close = version == "1.0" and framing != "length"
        assert client.transport.aborted or not (ended_by_close or client.answer.whole)


def test_the_log_names_the_peers_address_or_unix() -> None:
    with rig() as r:
        client = r.client()
        request = Request.unparsed(now=0.0, route=r.runtime.settings.route(""))
        assert client.connection.origin.peer(request) == "192.0.2.1:40000"

        class Unix(FakeTransport):
            def get_extra_info(self, name: str, default: object = None) -> object:
                return "" if name == "peername" else default

        client.connection.origin._transport = Unix(r.loop, client.connection)
        assert client.connection.origin.peer(request) == "unix"


def test_a_connection_has_no_dict() -> None:
    assert not hasattr(ClientConnection, "__dict__") or "__dict__" not in dir(ClientConnection(None, Entrance(None)))  # type: ignore[arg-type]
    assert dataclasses.is_dataclass(ClientConnection) is False


def test_a_connection_beyond_the_reserve_takes_and_frees_no_place_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        admission = r.runtime.admission
        monkeypatch.setattr(Admission, "admit_connection", lambda self, price: self._refuse(Gate.CONNECTIONS))
        room = admission._budget.demands.reserve_connections
        reserve = [r.client() for _ in range(room)]
        for _ in range(2):
            late = r.client()
            assert late.answer.status == 503 and admission.reserved == room
            assert late.answer.get("cache-control") == "no-store"
            late.fin()
            assert late.gone and admission.reserved == room
        reserve.pop().fin()
        assert admission.reserved == room - 1
        assert r.client(get()).answer.status == 200
        for client in reserve:
            client.fin()


class NoMemory(bytearray):
    """A body that finds no memory to grow, or to be copied."""

    def __iadd__(self, piece: object) -> NoMemory:  # type: ignore[override, misc]
        raise MemoryError


def test_a_body_without_memory_is_503_and_gives_back_what_was_counted() -> None:
    with rig() as r:
        wire = post(CHAT)
        client, other = r.client(wire[:-40]), r.client(wire[:-40])
        intake = client.connection._intake
        assert intake is not None and intake.held is not None
        held = r.runtime.bodies_bytes // 2
        intake.held = NoMemory(intake.held)
        client.send(wire[-40:-20])
        assert client.answer.status == 503 and client.answer.error["code"] == "no_memory"
        assert client.answer.get("retry-after") is not None
        assert r.runtime.bodies_bytes == held, "the other's"
        other.send(wire[-40:])
        assert r.links, "the other's request goes on"
        assert r.runtime.counters.no_memory == 1 and r.runtime.counters.bugs == 0
        r.bugs.clear()


# -- large heads


def held_beside_prices(r: Rig, client: Client) -> int:
    """Bytes charged beside the prices of the connections that are there."""
    in_use: Any = r.runtime.admission.status()["in_use"]
    return int(in_use["memory"]) - in_use["connections"] * client.connection.origin.entrance.price_bytes


@pytest.mark.parametrize("end", ["an answer", "a fin", "the deadline"])
def test_a_head_beyond_the_connections_price_is_charged_until_its_answer_ends(end: str) -> None:
    fields = [f"X-{k}: {'v' * 140}" for k in range(95)]
    with rig(wait_max_s=60.0) as r:
        client = r.client(get("/v1/streams/n?wait=60", *fields))
        request = client.connection.answer.request if client.connection.answer else None
        assert request is not None and request.head is not None
        excess = request.head.held_bytes - r.runtime.admission.prices.held_bytes
        assert held_beside_prices(r, client) == excess > 5_000
        if end == "an answer":
            opener = r.client(b"PUT /v1/streams/n HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert opener.answer.status == 201 and client.answer.status == 200
            r.client(b"DELETE /v1/streams/n HTTP/1.1\r\nHost: x\r\n\r\n")
        elif end == "a fin":
            client.fin()
        else:
            r.pass_time(61.0)
            assert client.answer.status == 404
        r.turn()
        r.pass_time(1.0)
        in_use: Any = r.runtime.admission.status()["in_use"]
        assert held_beside_prices(r, client) - r.runtime.hub.log_bytes == 0, in_use


def test_an_ordinary_head_is_a_part_of_the_connections_price() -> None:
    with rig(wait_max_s=60.0) as r:
        client = r.client(get("/v1/streams/n?wait=60", *[f"X-{k}: {'v' * 60}" for k in range(30)]))
        assert client.connection.answer is not None and held_beside_prices(r, client) == 0
