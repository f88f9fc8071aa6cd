"""Every answer of streamd's own says what a cache may do, on every route and for every refusal."""

from __future__ import annotations

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Answer, Rig, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings

PAGE = "https://chat.example"
WHOLE = {"model": "m"}
JSON = "Accept: application/json"
EVENTS = "Accept: text/event-stream"

# request -> status: everything that streamd answers by itself. `{}` is a finished stream of two events.
OWN: list[tuple[bytes, int]] = [
    # operators
    *[(get(path), 200) for path in ("/", "/healthz", "/health", "/readyz")],
    (get("/", method="HEAD"), 200),
    (get("*", method="OPTIONS"), 204),
    (get("/v1/x", f"Origin: {PAGE}", "Access-Control-Request-Method: POST", method="OPTIONS"), 204),
    # streams
    (get("/v1/streams"), 200),
    (get("/v1/streams/{}", JSON), 200),
    (get("/v1/streams/{}", "Last-Event-ID: {}:2"), 204),
    (get("/v1/streams/{}", "Last-Event-ID: x"), 400),
    (get("/v1/streams/none"), 404),
    (get("/v1/streams/none", JSON), 404),
    (get("/v1/streams/s_A0000" + "x" * 22), 410),
    (get("/v1/streams/{}", method="DELETE"), 204),
    (get("/v1/streams/{}", method="PATCH"), 405),
    (post(b"", path="/v1/streams"), 201),
    (post(b"x", path="/v1/streams/none/events"), 404),
    # other APIs' ways to resume
    (get("/v1/stream?conv_id=c"), 204),
    (get("/v1/stream?conv_id=c&from=0"), 404),
    (get("/v1/stream?conv_id=c", method="DELETE"), 204),
    (post({"conversation_ids": ["c"]}, path="/v1/streams/lookup"), 200),
    # refusals before the upstream
    (get("/elsewhere"), 404),
    (get("/v1/x", "Upgrade: websocket", "Connection: Upgrade"), 426),
    (get("/v1/x", "Expect: miracles"), 417),
    (post(b"{", "Content-Type: application/json"), 400),
    (post(WHOLE, "Last-Event-ID: x"), 400),
    (post(WHOLE, f"Last-Event-ID: s_A0000{'x' * 22}:1"), 410),
    (post(b"{}", "Content-Type: application/json; charset=utf-16"), 415),
    (get("/v1/x?" + "a&" * 300), 400),
    (b"GET /v1/x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"POST /v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
    (get("/v1/" + "x" * 9000), 414),
    (get("/v1/x", "A: " + "x" * 17000), 431),
    (b"CONNECT /v1/x HTTP/1.1\r\nHost: streamd.localhost\r\n\r\n", 501),
    (get("/v1/x", method="TRACE"), 501),
]


def finished(r: Rig) -> str:
    client = r.client(post(CHAT))
    r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
    return client.answer.get("x-stream-id") or ""


def asked(r: Rig, data: bytes, stream_id: str = "") -> Answer:
    return r.client(data.replace(b"{}", stream_id.encode())).answers[0]


@pytest.mark.parametrize(("data", "status"), OWN, ids=lambda value: str(value)[2:50])
def test_an_answer_of_streamds_own_is_kept_by_no_cache(data: bytes, status: int) -> None:
    with rig(cors_origins=(PAGE,)) as r:
        answer = asked(r, data, finished(r))
        assert answer.status == status
        assert answer.get("cache-control") == "no-store"
        for stream in r.runtime.hub:
            r.client(get(f"/v1/streams/{stream.id}", method="DELETE"))


@pytest.mark.parametrize("path", ["/metrics", "/status", "/streams", "/healthz", "/readyz", "/nothing"])
def test_an_answer_of_the_admin_listener_is_kept_by_no_cache(path: str) -> None:
    with rig() as r:
        assert r.client(get(path), listener="admin").answer.get("cache-control") == "no-store"


@pytest.mark.parametrize(
    ("upstream", "status"),
    [(b"HTTP/1.1 200 OK\r\nbad", 502), (b"", 502), (None, 504)],
    ids=["malformed", "gone", "late"],
)
def test_an_error_about_the_upstream_is_kept_by_no_cache(upstream: bytes | None, status: int) -> None:
    with rig(ttft_timeout_s=5.0) as r:
        client = r.client(post(WHOLE))
        if upstream is None:
            r.pass_time(6)
        else:
            r.reply(upstream)
            r.link.fin()
            r.turn()
        assert (client.answer.status, client.answer.get("cache-control")) == (status, "no-store")


def test_an_upstream_that_is_not_there_is_remembered_by_no_cache() -> None:
    with rig(upstreams=(UpstreamSettings(name="one", url="http://one", models=("other",)),)) as r:
        answer = asked(r, post(WHOLE))
        assert answer.status >= 400 and answer.get("cache-control") == "no-store"


def test_an_upstreams_own_word_about_caches_passes() -> None:
    with rig() as r:
        client = r.client(get("/v1/files/f1"))
        r.reply(whole_answer(b"ok", "200 OK", "Cache-Control: max-age=60", "Vary: Accept-Encoding"))
        assert (client.answer.get("cache-control"), client.answer.get("vary")) == ("max-age=60", "Accept-Encoding")


def test_a_stream_is_not_kept_either() -> None:
    with rig() as r:
        answer = asked(r, get("/v1/streams/{}"), finished(r))
        assert answer.get("cache-control") == "no-store, no-transform"


VARYING = [
    ("/v1/streams/{}", "Accept"),
    ("/v1/streams/none", "Accept"),
    ("/v1/stream?conv_id=c", "Accept"),
    ("/v1/responses/r?stream=true", "Accept, Last-Event-ID"),
    ("/v1beta/models/m:streamGenerateContent?alt=sse", "Accept"),
    ("/v1/models", "x-goog-api-key, x-goog-api-client"),
    ("/healthz", None),
    ("/elsewhere", None),
]


@pytest.mark.parametrize(("path", "expected"), VARYING)
@pytest.mark.parametrize("is_crossing", [False, True])
def test_vary_names_the_fields_that_choose_an_answer(path: str, expected: str | None, is_crossing: bool) -> None:
    with rig(cors_origins=(PAGE,) if is_crossing else ()) as r:
        stream_id = finished(r)
        client = r.client(get(path.replace("{}", stream_id), f"Origin: {PAGE}"))
        if not client.answers:
            r.reply(whole_answer(b"{}"))
        named = ", ".join(filter(None, ["Origin" if is_crossing else None, expected]))
        assert client.answer.get("vary") == (named or None)


def test_the_state_and_the_events_of_a_stream_differ_by_accept_alone() -> None:
    with rig() as r:
        stream_id = finished(r)
        state, events = asked(r, get("/v1/streams/{}", JSON), stream_id), asked(r, get("/v1/streams/{}"), stream_id)
        assert state.get("content-type") == "application/json"
        assert (events.get("content-type") or "").startswith("text/event-stream")
        assert state.get("vary") == events.get("vary") == "Accept"
