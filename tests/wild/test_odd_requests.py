"""Requests as clients, shells, browsers and proxies in front have been seen to send them: README.md has the reports."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, chunk, event, events_in, get, post, rig, text_of, whole_answer

from streamd.config import UpstreamSettings
from streamd.core.auth import bearer

BOM = b"\xef\xbb\xbf"
OK = whole_answer(b'{"ok": true}', "200 OK", "content-type: application/json")


def head_upstream(r: Any) -> bytes:
    """The head of the request that the upstream got last."""
    return bytes(r.link.sent).partition(b"\r\n\r\n")[0].lower()


def body_upstream(r: Any) -> bytes:
    return bytes(r.link.sent).partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "text/plain"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_byte_order_mark_in_front_of_json_is_the_servers_to_judge(stream: bool, content_type: str) -> None:
    body = BOM + json.dumps({**CHAT, "stream": stream}).encode()
    upstreams = (
        UpstreamSettings(name="other", url="http://other.test:1", models=("other",)),
        UpstreamSettings(name="own", url="http://own.test:2", models=("m",)),
    )
    with rig(upstreams=upstreams) as r:
        client = r.client(post(body, f"Content-Type: {content_type}"))
        assert r.dialled == [2], "the model behind the mark decides"
        assert body_upstream(r) == body
        r.reply(SSE_HEAD + chunk(event("all"), DONE) + LAST if stream else OK)
        assert client.answer.whole and client.answer.status == 200


def test_a_byte_order_mark_stays_where_an_alias_is_replaced() -> None:
    upstream = UpstreamSettings(name="up", url="http://up.test:1", aliases={"small": "long/name-of-it"})
    with rig(upstreams=(upstream,)) as r:
        r.client(post(BOM + b'{"model": "small", "n": 1.0}', "Content-Type: application/json"))
        assert body_upstream(r) == BOM + b'{"model": "long/name-of-it", "n": 1.0}'


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize(
    "fields", [("Connection: upgrade",), ("Connection: upgrade", "Upgrade: "), ("Connection: Upgrade, close",)]
)
def test_a_proxy_that_says_connection_upgrade_to_everything_gets_its_answers(
    fields: tuple[str, ...], method: str
) -> None:
    with rig() as r:
        request = post(WHOLE, *fields) if method == "POST" else get("/v1/files/f", *fields)
        client = r.client(request)
        r.reply(OK)
        assert client.answer.body == b'{"ok": true}'
        assert b"upgrade" not in head_upstream(r)


def test_a_get_with_a_content_type_and_no_body_stays_without_a_body() -> None:
    with rig() as r:
        client = r.client(get("/v1/files/f1", "Content-Type: application/json"))
        head = head_upstream(r)
        assert b"transfer-encoding" not in head and b"content-length" not in head
        r.reply(OK)
        assert client.answer.status == 200


@pytest.mark.parametrize("accepted", ["gzip, deflate, br, zstd", "gzip;q=1.0, identity;q=0.5", "*", ""])
def test_the_codings_that_a_client_takes_arent_asked_of_the_upstream(accepted: str) -> None:
    with rig() as r:
        client = r.client(post(CHAT, f"Accept-Encoding: {accepted}"))
        assert head_upstream(r).count(b"accept-encoding: identity") == 1
        assert head_upstream(r).count(b"accept-encoding") == 1
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == "a"


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_balancers_that_probe_with_head_find_the_daemon_healthy(path: str, version: str) -> None:
    with rig() as r:
        client = r.client(get(path, method="HEAD", version=version))
        assert client.raw.startswith(b"HTTP/1.1 200 ") and client.raw.endswith(b"\r\n\r\n")


def test_a_probe_by_http_10_without_a_host_is_answered() -> None:
    with rig() as r:
        assert r.client(b"GET /healthz HTTP/1.0\r\n\r\n").answer.status == 200


@pytest.mark.parametrize("value", ["Чат", "caf\xe9", "", "a\tb", "日本語"])
def test_header_values_beyond_ascii_arrive_as_they_are(value: str) -> None:
    with rig() as r:
        client = r.client(get("/v1/files/f")[:-2] + f"X-Title: {value}\r\n\r\n".encode())
        assert f"x-title: {value}".encode() in bytes(r.link.sent)
        r.reply(OK)
        assert client.answer.status == 200


@pytest.mark.parametrize(
    ("asks", "granted"),
    [("true", True), (None, False), ("false", False)],
)
@pytest.mark.parametrize("origin", ["https://chat.example", "tauri://localhost"])
def test_a_page_that_may_read_may_do_so_on_the_local_network(origin: str, asks: str | None, granted: bool) -> None:
    fields = [f"Origin: {origin}", "Access-Control-Request-Method: POST"]
    fields += [f"Access-Control-Request-Private-Network: {asks}"] if asks else []
    with rig(cors_origins=("https://chat.example", "tauri://localhost")) as r:
        answer = r.client(get("/v1/chat/completions", *fields, method="OPTIONS")).answer
        assert (answer.status, answer.get("access-control-allow-origin")) == (204, origin)
        assert answer.get("access-control-allow-private-network") == ("true" if granted else None)


def test_a_page_that_may_not_read_gets_no_word_about_the_local_network() -> None:
    fields = ("Access-Control-Request-Method: POST", "Access-Control-Request-Private-Network: true")
    with rig(cors_origins=("https://chat.example",)) as r:
        for origin in ("https://evil.example", "null"):
            answer = r.client(get("/v1/models", f"Origin: {origin}", *fields, method="OPTIONS")).answer
            assert answer.get("access-control-allow-private-network") is None
        # and the upstream's own word about its pages doesn't count
        client = r.client(get("/v1/files/f", "Origin: https://evil.example"))
        r.reply(whole_answer(b"x", "200 OK", "access-control-allow-private-network: true"))
        assert client.answer.get("access-control-allow-private-network") is None


@pytest.mark.parametrize("value", [b"Bearer sk-1", b"bearer sk-1", b"BEARER  sk-1", b" Bearer sk-1 "])
def test_the_word_bearer_is_taken_in_any_case_and_with_any_blanks(value: bytes) -> None:
    assert bearer({b"authorization": value}.get) == b"sk-1"


@pytest.mark.parametrize("value", [b"sk-1", b"Bearersk-1", b"Token sk-1", b"Bearer", b""])
def test_a_credential_of_another_scheme_is_no_bearer(value: bytes) -> None:
    assert not bearer({b"authorization": value}.get)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("6f1e4f9e-9a36-4a8b-8f0a-0d3b2c1a0f11", True),
        ("not-a-uuid/7", True),
        ("with a blank", False),
        ("x" * 129, False),
        ("'; drop table", False),
    ],
)
def test_a_request_id_of_the_clients_is_kept_if_it_is_safe_to_log(given: str, kept: bool) -> None:
    with rig() as r:
        client = r.client(post(WHOLE, f"X-Request-Id: {given}"))
        assert (f"x-request-id: {given}".encode() in bytes(r.link.sent)) is kept
        r.reply(OK)
        assert (client.answer.get("x-request-id") == given) is kept and client.answer.status == 200


def test_an_upload_beyond_the_bound_is_told_so_before_it_is_read() -> None:
    with rig() as r:
        fields = ("Content-Type: multipart/form-data; boundary=x", "Content-Length: 40000000")
        answer = r.client(get("/v1/files", *fields, method="POST")).answer
        assert answer.status == 413 and str(32 * 1024 * 1024) in answer.error["message"] and r.links == []


@pytest.mark.parametrize("path", ["/v1/files", "/v1/chat/completions"])
def test_a_body_that_waits_for_a_100_is_asked_for(path: str) -> None:
    body = json.dumps(WHOLE).encode()
    fields = ("Content-Type: application/json", "Expect: 100-continue", f"Content-Length: {len(body)}")
    with rig() as r:
        client = r.client(get(path, *fields, method="POST"))
        assert client.raw == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert body_upstream(r) == body and b"expect" not in head_upstream(r)
        r.reply(OK)
        assert client.statuses == [200]


def test_a_client_that_half_closes_gets_what_is_complete_and_frees_the_server() -> None:
    with rig() as r:
        healthy = r.client()
        healthy.transport.feed(get("/healthz"))
        healthy.fin()
        assert healthy.statuses == [200]
        leaving = r.client(post(WHOLE))
        leaving.fin()
        assert r.link.closed and leaving.gone, "a FIN can't be told from a reader that left: the generation is paid for"


def test_a_version_that_a_client_wrote_twice_is_the_upstreams_404() -> None:
    with rig() as r:
        client = r.client(post(WHOLE, path="/v1/v1/chat/completions"))
        r.reply(whole_answer(b'{"error": {"message": "not found"}}', "404 Not Found"))
        assert client.answer.status == 404 and client.answer.get("x-upstream") == "up"


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off", ""])
def test_a_word_that_means_no_asks_for_no_stream(word: str) -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post({**CHAT, "stream": word}))
        r.pass_time(2)
        assert client.raw == b"", "nothing is committed"
        r.reply(OK)
        assert client.answer.body == b'{"ok": true}'
