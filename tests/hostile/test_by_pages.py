"""Attacks of web pages in the browser of a user of streamd: they send, with that browser's cookies.

Each docstring says what is tried, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Answer, Rig, chunk, event, get, post, rig, whole_answer

ORIGIN = "https://chat.example"
SECRET = "0123456789abcdef0123456789abcdef"

NEAR_ORIGINS = [
    "https://chat.example.evil.test",
    "https://evil-chat.example",
    "https://chat.example:8443",
    "http://chat.example",
    "https://CHAT.example",
    "https://chat.example.",
    "https://chat.example/",
    "https://chat.example@evil.test",
    "https://sub.chat.example",
    "https://chat.example, https://chat.example",
    "null",
    "file://",
    "",
    "*",
    "https://chat.exampl\u0435".encode().decode("latin-1"),  # a Cyrillic letter, as its bytes
    "chrome-extension://chat.example",
]


def allows(answer: Answer) -> bool:
    return any(name.startswith(b"access-control-allow") for name, _ in answer.head.headers)


@pytest.mark.parametrize("origin", NEAR_ORIGINS)
def test_an_origin_that_looks_like_the_configured_one_reads_nothing(origin: str) -> None:
    """Origins that a comparison by prefix, suffix, host, pattern or case takes for the configured origin.

    Attacker: a page of that origin. Expected: no CORS header at all, on preflights, answers, errors and streams.
    Source: James Kettle, Exploiting CORS misconfigurations (2016).
    """
    preflight = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
    with rig(cors_origins=(ORIGIN,), cors_credentials=True) as r:
        field = f"Origin: {origin}"
        assert not allows(r.client(get("/v1/chat/completions", field, *preflight, method="OPTIONS")).answer)
        assert not allows(r.client(get("/v1/streams/none", field)).answer)
        assert not allows(r.client(get("/healthz", field)).answer)
        stream = r.client(post(CHAT, field))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert stream.answer.status == 200 and not allows(stream.answer)
        two = r.client(get("/healthz", f"Origin: {ORIGIN}", field))
        assert not two.statuses or not allows(two.answer)


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/chat/completions", "/healthz"])
@pytest.mark.parametrize("origins", [(), (ORIGIN,)])
@pytest.mark.parametrize("origin", [ORIGIN, "https://evil.test", *NEAR_ORIGINS])
def test_a_preflight_opens_the_private_network_to_a_configured_origin_alone(
    origin: str, origins: tuple[str, ...], path: str
) -> None:
    """Browsers ask before a public page may reach a private address; a server that echoes all it is asked says yes.

    Attacker: a page anywhere, where streamd runs on loopback or in a company's network. Expected: allowed to an origin
    that `cors_origins` names exactly, if its preflight asks with `true`, and never to any other or on another answer.
    Source: Private Network Access (WICG); "0.0.0.0 day" (Oligo, 2024).
    """
    is_named = origin in origins
    asking = (f"Origin: {origin}", "Access-Control-Request-Method: GET")
    with rig(cors_origins=origins) as r:
        for name, value, may in (
            ("Private-Network", "true", is_named),
            ("Private-Network", "false", False),
            ("Private-Network", "TRUE, true", False),
            ("Local-Network", "true", False),
            ("X", "true", False),
        ):
            field = f"Access-Control-Request-{name}: {value}"
            answer = r.client(get(path, *asking, field, method="OPTIONS")).answer
            assert answer.status == 204
            allowed = {key for key, _ in answer.head.headers if key.endswith(b"-network")}
            assert allowed == ({b"access-control-allow-private-network"} if may else set())
        plain = r.client(get("/healthz", *asking, "Access-Control-Request-Private-Network: true")).answer
        assert plain.get("access-control-allow-private-network") is None


@pytest.fixture
def with_tokens(tmp_path: Path) -> dict[str, Any]:
    """Settings under which streams are read with tokens, and everything else takes a key."""
    secret, keys = tmp_path / "secret", tmp_path / "keys"
    for path, content in ((secret, SECRET), (keys, "")):
        path.write_text(content)
        path.chmod(0o600)
    return {
        "streams_auth": "token",
        "token_secret_file": str(secret),
        "token_audience": "rooms",
        "keys_file": str(keys),
    }


def token(**claims: Any) -> str:
    return jwt.encode({"aud": "rooms", "exp": int(time.time()) + 3600, **claims}, SECRET, "HS256")


EVERYTHING = {"streams": ["*"], "publish": ["*"]}
FORMS = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"]


def opened(r: Rig) -> None:
    fields = (f"Authorization: Bearer {token(**EVERYTHING)}",)
    assert r.client(post({}, *fields, path="/v1/streams/room").replace(b"POST", b"PUT", 1)).answer.status == 201


@pytest.mark.parametrize("media_type", FORMS)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/streams/room/events"),
        ("POST", "/v1/streams/room/events?seal=finished"),
        ("POST", "/v1/streams"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/streams/room?_method=DELETE"),
        ("DELETE", "/v1/streams/room"),
        ("PUT", "/v1/streams/room2"),
        ("POST", "/v1/stream?conv_id=x"),
    ],
)
def test_a_form_of_a_foreign_page_does_nothing(method: str, path: str, media_type: str, with_tokens: Any) -> None:
    """A form is sent without a preflight and with the reader's cookie, a token that may publish everything.

    Attacker: any page that the reader opens. Expected: refused; the stream as it was, nothing opened or asked upstream.
    """
    cookie = f"Cookie: streamd_token={token(**EVERYTHING)}"
    with rig(**with_tokens) as r:
        opened(r)
        fields = (f"Content-Type: {media_type}", "Origin: https://evil.test", "Sec-Fetch-Site: cross-site", cookie)
        client = r.client(get(path, *fields, "Content-Length: 2", method=method) + b"{}")
        assert 400 <= client.answer.status < 500
        (stream,) = r.runtime.hub
        assert stream.reason is None and stream.events == 0 and r.dialled == []
        r.client(get("/v1/streams/room", f"Authorization: Bearer {token(**EVERYTHING)}", method="DELETE"))


@pytest.mark.parametrize(
    "cookies",
    [
        "streamd_token=; streamd_token={}",
        "streamd_token={}; streamd_token=x",
        "streamd_token={}; streamd_token={}",
        "streamd_token",
        "streamd_token=",
        "=streamd_token; {}",
        "STREAMD_TOKEN={}",
        "__Host-streamd_token={}",
        "streamd_token ={}x",
        '$Version=1; streamd_token="{}; streamd_token={}"',
    ],
)
def test_cookies_that_somebody_else_has_set_are_no_guess(cookies: str, with_tokens: Any) -> None:
    """A sibling's page sets a second cookie of the same name, or a cookie that parsers cut elsewhere (cookie tossing).

    Attacker: a page of another host below the same domain. Expected: 401, so that no reader reads with another's token;
    the reader's own cookie alone is good. Source: "cookie tossing" (GitHub, 2013) and quoted cookies in Tomcat and
    Jetty.
    """
    good = token(streams=["room"])
    with rig(**with_tokens) as r:
        opened(r)
        assert r.client(get("/v1/streams/room", "Cookie: " + cookies.replace("{}", good))).answer.status == 401
        own = r.client(get("/v1/streams/room", f"Cookie: a=b; streamd_token={good}"))
        assert own.answer.status == 200
        r.client(get("/v1/streams/room", f"Authorization: Bearer {token(**EVERYTHING)}", method="DELETE"))


def test_no_cache_gives_a_pages_answer_to_another_page() -> None:
    """A cache between keeps the answer that was made for an origin, and gives it to a page of another.

    Attacker: a page, by asking first. Expected: `Vary: Origin` on every kind of answer, also on errors, and beside the
    upstream's own Vary.
    """
    with rig(cors_origins=(ORIGIN,)) as r:
        for fields in ((), (f"Origin: {ORIGIN}",), ("Origin: https://evil.test",)):
            clients = [
                r.client(get("/healthz", *fields)),
                r.client(get("/nowhere", *fields)),
                r.client(get("/v1/streams/none", *fields)),
                r.client(get("/v1/streams", *fields)),
                r.client(get("/healthz", *fields, method="POST")),
                r.client(post(b"{", *fields, "Content-Type: application/json")),
            ]
            relayed = r.client(post(WHOLE, *fields))
            r.reply(whole_answer(b"{}", "200 OK", "Vary: Accept", "Access-Control-Allow-Origin: *"))
            stream = r.client(post(CHAT, *fields))
            r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
            for client in (*clients, relayed, stream):
                varies = ",".join(
                    value.decode().lower() for name, value in client.answer.head.headers if name == b"vary"
                )
                assert "origin" in varies, client.raw
                assert client.answer.get("access-control-allow-origin") == (ORIGIN if ORIGIN in str(fields) else None)


@pytest.mark.parametrize("name", ["profile.css", "room.js", "a.png"])
def test_what_is_private_is_stored_in_no_cache(name: str) -> None:
    """A stream's name may end in `.css`, which some caches keep by the name alone; its state and its texts are private.

    Attacker: a page that makes its reader open the address once. Expected: every answer about a stream says no-cache or
    no-store. Source: Omer Gil, Web Cache Deception (2017); ChatGPT account takeover by the same (2023).
    """
    with rig() as r:
        assert r.client(post({}, path=f"/v1/streams/{name}").replace(b"POST", b"PUT", 1)).answer.status == 201
        answers = [
            r.client(get(f"/v1/streams/{name}", "Accept: application/json")).answer,
            r.client(get(f"/v1/streams/{name}")).answer,
            r.client(get("/v1/streams")).answer,
        ]
        for answer in answers:
            assert answer.status == 200
            assert "no-store" in (held := answer.get("cache-control") or "") or "no-cache" in held
        r.client(get(f"/v1/streams/{name}", method="DELETE"))


@pytest.mark.parametrize(
    "fields",
    [
        ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        ("Upgrade: websocket, h2c", "Connection: keep-alive, Upgrade"),
        ("Upgrade: WebTransport", "Connection: upgrade"),
    ],
)
def test_a_socket_of_a_foreign_page_opens_nothing(fields: tuple[str, ...]) -> None:
    """WebSockets know no CORS and bring the cookies along; a relay that passes the upgrade on opens its upstream.

    Attacker: any page. Expected: 426 or 501, closed, no upstream asked. Source: cross-site WebSocket hijacking (2013).
    """
    with rig() as r:
        for path in ("/v1/realtime", "/v1/chat/completions", "/v1/streams/room"):
            client = r.client(get(path, "Origin: https://evil.test", *fields))
            r.pass_time(5)
            assert client.answer.status in (426, 501) and client.gone
        assert r.dialled == []


@pytest.mark.parametrize("path", ["/v1/streams?callback=alert", "/healthz?jsonp=alert&callback=alert", "/status?cb=x"])
def test_no_answer_is_a_script(path: str) -> None:
    """`<script src>` knows no CORS either: an answer that calls a function of the page's, or is an array, is read.

    Attacker: any page. Expected: JSON objects, by their type, for every query.
    """
    with rig() as r:
        answer = r.client(get(path, "Sec-Fetch-Dest: script", "Accept: */*")).answer
        if answer.status == 200:
            assert (answer.get("content-type") or "").startswith("application/json")
            assert isinstance(json.loads(answer.body), dict)
