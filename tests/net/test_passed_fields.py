"""Header fields of an upstream's answer arrive on a stream as on a whole answer, while the head is still open."""

from __future__ import annotations

import pytest
from fakes import CHAT, DONE, LAST, WHOLE, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings

FIELDS = (
    "x-ratelimit-remaining-requests: 3",
    "anthropic-ratelimit-unified-status: allowed",
    "request-id: req_up",
    "openai-processing-ms: 12",
)
HOSTILE = ("set-cookie: a=b", "x-accel-redirect: /x", "alt-svc: clear", "connection: x-hop", "x-hop: 1")


def stream_head(*fields: str, kind: str = "text/event-stream") -> bytes:
    lines = ("HTTP/1.1 200 OK", f"content-type: {kind}", "transfer-encoding: chunked", *fields, "", "")
    return "\r\n".join(lines).encode()


EVENTS = chunk(event("all"), DONE) + LAST


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/of/no/known/dialect"])
@pytest.mark.parametrize("streamed", [True, False])
def test_end_to_end_fields_arrive(streamed: bool, path: str) -> None:
    with rig() as r:
        client = r.client(post(CHAT if streamed else WHOLE, path=path))
        r.reply(
            stream_head(*FIELDS, *HOSTILE) + EVENTS if streamed else whole_answer(b"{}", "200 OK", *FIELDS, *HOSTILE)
        )
        r.pass_time(2.0)
        got = {name.decode(): value.decode() for name, value in client.answers[0].head.headers}
        assert {field.partition(": ")[0]: field.partition(": ")[2] for field in FIELDS}.items() <= got.items()
        assert not got.keys() & {"set-cookie", "x-accel-redirect", "alt-svc", "x-hop"}
        assert got["x-upstream"] == "up"


def test_an_http_1_0_reader_gets_them_too() -> None:
    with rig() as r:
        client = r.client(post(CHAT, version="1.0"))
        r.reply(stream_head(*FIELDS) + EVENTS)
        assert client.answer.get("openai-processing-ms") == "12"


def test_a_reader_that_comes_back_gets_none_of_them() -> None:
    with rig() as r:
        first = r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(stream_head(*FIELDS, kind="text/event-stream; charset=utf-8") + EVENTS)
        path = f"/v1/streams/{first.answer.get('x-stream-id')}"
        for client in (r.client(get(path)), r.client(post(CHAT, "Idempotency-Key: k"))):
            assert client.answer.get("openai-processing-ms") is None
            assert client.answer.get("content-type") == "text/event-stream"


def test_after_the_commit_the_upstreams_request_id_is_in_the_log_alone() -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(2.0)
        link = client.connection
        assert link.answer is not None
        request = link.answer.request
        r.reply(stream_head(*FIELDS) + EVENTS)
        assert client.answer.get("request-id") is None and request.upstream_id == "req_up"


@pytest.mark.parametrize("streamed", [True, False])
def test_an_upstreams_x_request_id_stands_beside_streamds(streamed: bool) -> None:
    with rig() as r:
        for theirs, shown in (("up-1", "up-1"), ("mine", None)):
            client = r.client(post(CHAT if streamed else WHOLE, "X-Request-Id: mine"))
            field = f"x-request-id: {theirs}"
            r.reply(stream_head(field) + EVENTS if streamed else whole_answer(b"{}", "200 OK", field))
            assert client.answer.get("x-request-id") == "mine"
            assert client.answer.get("x-upstream-request-id") == shown


def test_pass_fields_holds_for_streams() -> None:
    settings = UpstreamSettings(name="up", url="http://up.test:1", pass_fields=("Set-Cookie",))
    with rig(upstreams=(settings,)) as r:
        client = r.client(post(CHAT))
        r.reply(stream_head(*HOSTILE) + EVENTS)
        assert client.answer.get("set-cookie") == "a=b" and client.answer.get("alt-svc") is None


def test_a_location_at_the_upstream_is_relative() -> None:
    settings = UpstreamSettings(name="up", url="http://up.test:1/base")
    with rig(upstreams=(settings,)) as r:
        for theirs, seen in (
            ("http://up.test:1/base/v1/files/1", "/v1/files/1"),
            ("/base/v1/files/1", "/v1/files/1"),
            ("https://cdn.test/1", "https://cdn.test/1"),
        ):
            client = r.client(post(WHOLE))
            r.reply(whole_answer(b"", "307 Temporary Redirect", f"location: {theirs}"))
            assert client.answer.get("location") == seen
