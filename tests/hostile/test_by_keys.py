"""Attacks of a holder of a key, the cheapest that there is: all that the key allows, and the rest.

Each docstring says what is tried, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Rig, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.core.keys import SALT_BYTES, Key, digest, encode
from streamd.daemon import logs


def key(name: str) -> str:
    """The API key of that name."""
    return f"sk-{name}-{name * 8:0<20.20}"


def bearer(name: str = "alice") -> str:
    return f"Authorization: Bearer {key(name)}"


@contextmanager
def keyed(folder: Path, settings: dict[str, Any] | None = None, **rights: Any) -> Iterator[Rig]:
    """A rig with alice's key, of these rights, and bob's, of all."""
    salt, path = bytes(SALT_BYTES), folder / "keys"
    rows = [("alice", rights), ("bob", {})]
    path.write_bytes(b"".join(encode(Key(n, n, salt, digest(salt, key(n).encode()), **own)) + b"\n" for n, own in rows))
    path.chmod(0o600)
    with rig(keys_file=str(path), **(settings or {})) as r:
        yield r


def asked(r: Rig) -> list[bytes]:
    """The requests that went upstream, each on a connection of its own."""
    return [bytes(link.sent) for link in r.links if link.sent]


def answer_all(r: Rig) -> None:
    for link in r.links:
        if link.sent and not link.closed:
            link.feed(whole_answer(b"{}"))
            r.turn()


# -- rights


def body_in(charset: str) -> bytes:
    """JSON that names the allowed model in UTF-8, and another model in that charset."""
    if charset == "utf-7":
        return b'{"model": "allowed", "+AG0AbwBkAGUAbA-": "forbidden"}'
    return json.dumps({"model": "allowed"}).encode()


@pytest.mark.parametrize("charset", ["utf-7", "UTF-7", '"utf-7"', "x-user-defined", "utf-16", "ibm037"])
def test_a_body_is_read_in_the_same_charset_on_both_sides(charset: str, tmp_path: Path) -> None:
    """JSON with `charset=utf-7`: streamd reads UTF-8 and sees one model, a server that obeys the charset sees two.

    Attacker: a key that is limited to some models. Expected: refused, or the charset isn't passed on.
    Source: charsets as a way around web application firewalls; aiohttp's request.json() obeys the charset.
    """
    with keyed(tmp_path, models=("allowed",)) as r:
        named = f"Content-Type: application/json; charset={charset}"
        client = r.client(post(body_in(charset.strip('"').lower()), bearer(), named))
        answer_all(r)
        assert not [head for head in asked(r) if b"charset=" in head.lower()]
        assert asked(r) or client.answer.status in (400, 415)


@pytest.mark.parametrize("query", ["model=forbidden", "x=1&model=forbidden", "mode%6c=forbidden", "MODEL=forbidden"])
def test_a_model_in_the_query_is_no_way_around_a_keys_models(query: str, tmp_path: Path) -> None:
    """The allowed model stands in the body, another model in the query, which some gateways prefer.

    Attacker: a key that is limited to some models. Expected: refused, or the parameter doesn't go upstream.
    Source: https://github.com/BerriAI/litellm/issues/41810
    """
    with keyed(tmp_path, models=("allowed",)) as r:
        client = r.client(post(WHOLE | {"model": "allowed"}, bearer(), path=f"/v1/chat/completions?{query}"))
        answer_all(r)
        assert not [head for head in asked(r) if b"forbidden" in head]
        assert asked(r) or client.answer.status in (400, 403)


OTHER_MODELS: list[dict[str, Any]] = [
    {"models": ["forbidden"]},  # OpenRouter
    {"fallbacks": ["forbidden"]},  # LiteLLM
    {"fallbacks": [{"model": "forbidden"}]},
    {"model_list": [{"model_name": "allowed", "litellm_params": {"model": "forbidden"}}]},
    {"router_settings_override": {"fallbacks": [{"allowed": ["forbidden"]}]}},
]


@pytest.mark.parametrize("more", OTHER_MODELS, ids=lambda more: "-".join(more))
def test_fallbacks_in_a_body_are_no_way_around_a_keys_models(more: dict[str, Any], tmp_path: Path) -> None:
    """The allowed model stands in `model`; a member beside it names the models to take if that fails.

    Attacker: a key that is limited to some models, where the upstream is a gateway. Expected: refused, or the
    member doesn't go upstream. Source: https://github.com/BerriAI/litellm/pull/26968 and /30585; OpenRouter's `models`.
    """
    with keyed(tmp_path, models=("allowed",)) as r:
        client = r.client(post(WHOLE | {"model": "allowed"} | more, bearer()))
        answer_all(r)
        assert not [head for head in asked(r) if b"forbidden" in head]
        assert asked(r) or client.answer.status in (400, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/projects/p/locations/l/publishers/google/models/forbidden:generateContent",
        "/v1beta1/projects/p/locations/l/publishers/google/models/forbidden:predict",
        "/v1beta/openai/models/forbidden",
        "/v1/engines/forbidden/completions",
        "/v1/openai/deployments/forbidden/chat/completions",
        "/v1/model/forbidden/invoke",
    ],
)
def test_no_shape_of_path_names_a_model_that_the_key_has_not(path: str, tmp_path: Path) -> None:
    """Vertex AI, Azure, Bedrock and the first OpenAI API name the model in the path, and the body may name another.

    Attacker: a key that is limited to some models. Expected: 403, or 404 for a path that isn't relayed.
    Source: https://github.com/BerriAI/litellm/issues/41295 (the same on pass-through routes).
    """
    with keyed(tmp_path, models=("allowed",)) as r:
        for body in ({"model": "allowed"}, {"model": "allowed", "contents": []}):
            client = r.client(post(body, bearer(), path=path))
            answer_all(r)
            assert client.answer.status in (403, 404)
        assert asked(r) == []


UNDERSCORED = ["X_Forwarded_For", "X-Forwarded_For", "X_Api_Key", "X_Request_Id", "Content_Length"]


@pytest.mark.parametrize("name", UNDERSCORED)
def test_a_field_with_underscores_is_the_field_with_hyphens(name: str, tmp_path: Path) -> None:
    """WSGI, CGI, PHP and nginx read `X_Forwarded_For` as `X-Forwarded-For`, which streamd takes off.

    Attacker: any key. Expected: a field that isn't passed on in its first spelling isn't in any other.
    Source: CVE-2015-0219 (Django); https://doc.traefik.io/traefik/v2.11/security/header-underscores/
    """
    with keyed(tmp_path) as r:
        r.client(post(WHOLE, bearer(), f"{name}: smuggled"))
        answer_all(r)
        assert b"smuggled" not in asked(r)[0]


@pytest.mark.parametrize("name", ["X-Team", "x-team", "X_Team", "x_TEAM"])
def test_a_field_that_the_operator_sets_has_no_second_value(name: str, tmp_path: Path) -> None:
    """The operator's `headers` name the tenant to the upstream; the client sends the same field, in any spelling.

    Attacker: any key. Expected: the operator's value alone arrives. Source: as above.
    """
    upstream = UpstreamSettings(name="up", url="http://up.test:1", headers={"X-Team": "ours"})
    with keyed(tmp_path, {"upstreams": (upstream,)}) as r:
        r.client(post(WHOLE, bearer(), f"{name}: theirs"))
        answer_all(r)
        assert b"ours" in asked(r)[0] and b"theirs" not in asked(r)[0]


@pytest.mark.parametrize(
    "field",
    [
        "X-HTTP-Method-Override: DELETE",
        "X-HTTP-Method: DELETE",
        "X-Method-Override: DELETE",
        "X-Original-URL: /v1/files",
        "X-Rewrite-URL: /v1/files",
    ],
)
def test_no_field_moves_a_request_to_another_route_upstream(field: str, tmp_path: Path) -> None:
    """A key may use the chat alone; a framework behind obeys fields that replace the path or the method.

    Attacker: a key with `routes`. Expected: such a field doesn't go upstream, or the request is refused.
    Source: CVE-2018-14773 (Symfony, Zend: X-Original-URL and X-Rewrite-URL).
    """
    with keyed(tmp_path, routes=("/v1/chat/*",)) as r:
        r.client(post(WHOLE, bearer(), field))
        answer_all(r)
        name = field.partition(":")[0].lower().encode()
        assert not [head for head in asked(r) if name in head]


@pytest.mark.parametrize(
    "named", ["x-team", "X-Team, x-request-id", "accept-encoding", "x-team,keep-alive,traceparent", "x-forwarded-for"]
)
def test_connection_takes_no_field_of_ours_off_a_request(named: str, tmp_path: Path) -> None:
    """Fields named in Connection are for one hop, so a client may name the field by which the next server knows it.

    Attacker: any key. Expected: the fields that streamd and its operator add are there. Source: CVE-2022-1388 (F5
    BIG-IP), CVE-2021-33197 (Go's ReverseProxy).
    """
    upstream = UpstreamSettings(name="up", url="http://up.test:1", headers={"X-Team": "ours"}, key="sk-upstream")
    with keyed(tmp_path, {"upstreams": (upstream,)}) as r:
        r.client(post(WHOLE, bearer(), f"Connection: {named}"))
        answer_all(r)
        head = asked(r)[0].partition(b"\r\n\r\n")[0].lower()
        for field in (b"x-team: ours", b"x-request-id: ", b"accept-encoding: identity", b"authorization: bearer sk-up"):
            assert field in head


@pytest.mark.parametrize("first", ["alice", "mallory"])
def test_two_credentials_are_no_credential(first: str, tmp_path: Path) -> None:
    """Two Authorization fields, the second or the first valid: the checker reads this, the server behind that.

    Attacker: any key. Expected: 401, and nothing goes upstream, also where clients' keys are passed on.
    """
    upstream = UpstreamSettings(name="up", url="http://up.test:1", pass_client_key=True)
    second = "mallory" if first == "alice" else "alice"
    with keyed(tmp_path, {"upstreams": (upstream,)}) as r:
        client = r.client(post(CHAT, bearer(first), bearer(second)))
        assert client.answer.status in (400, 401)
        assert asked(r) == []


SECRET_QUERIES = [
    "access_token=SECRET",
    "access%5Ftoken=SECRET",
    "%61ccess_token=SECRET",
    "a=b;access_token=SECRET",
    "a=b&access%5ftoken=SECRET;c=d",
    "access_token=SECRET&access_token=SECRET",
    "key=SECRET",
    "k%65y=SECRET",
    "a;key=SECRET",
]


@pytest.mark.parametrize("query", SECRET_QUERIES)
def test_no_spelling_of_a_secret_in_a_query_goes_upstream(query: str, tmp_path: Path) -> None:
    """A token in the query is for streamd; another spelling of its name passes a filter that compares text.

    Cause: a mistake; the upstream's log has the token then. Expected: it never leaves (SECURITY.md, Tokens).
    """
    with keyed(tmp_path) as r:
        is_google = "key" in query.replace("%65", "e")
        path = "/v1beta/models/m:generateContent" if is_google else "/v1/embeddings"
        client = r.client(post({"model": "m"}, bearer(), path=f"{path}?{query}&z=1"))
        answer_all(r)
        assert client.statuses and not [head for head in asked(r) if b"SECRET" in head]


@pytest.mark.parametrize(
    "more",
    [
        {"api_base": "http://127.0.0.1:9/"},
        {"base_url": "http://169.254.169.254/latest/meta-data"},
        {"model": "http://127.0.0.1:9/m"},
        {"upstream": "other", "user": "x"},
        {"extra_headers": {"Host": "127.0.0.1:9"}},
    ],
)
def test_nothing_in_a_body_says_where_streamd_connects(more: dict[str, Any], tmp_path: Path) -> None:
    """Gateways that take the server's address from the request fetch what the client can't reach itself.

    Attacker: any key. Expected: streamd dials its configured upstream alone. Source: CVE-2024-6587 (LiteLLM).
    """
    with keyed(tmp_path) as r:
        r.client(post(WHOLE | more, bearer()))
        answer_all(r)
        assert r.dialled == [1]
        assert asked(r)[0].count(b"\r\nhost: up.test:1\r\n") == 1


# -- shared places


def test_a_hail_of_posts_in_a_conversation_leaves_one_generation(tmp_path: Path) -> None:
    """60 POSTs of one conversation, each of which takes the place of the one before.

    Attacker: any key, by a client that tries again and again. Expected: never more than a single upstream request is
    under way for it, and each of the earlier answers ends.
    """
    with keyed(tmp_path) as r:
        clients = []
        for _ in range(60):
            clients.append(r.client(post(CHAT, bearer(), "X-Conversation-Id: c")))
            r.reply(SSE_HEAD + chunk(event("a")))
            r.pass_time(0.3)
            assert sum(upstream.in_flight for upstream in r.worker.upstreams) == 1
        assert all(client.gone for client in clients[:-1]) and not clients[-1].gone
        r.reply(chunk(DONE) + LAST)


def test_a_reader_that_leaves_in_the_middle_frees_its_idempotency_key(tmp_path: Path) -> None:
    """The same Idempotency-Key again and again, left at every stage: before the head, in a whole answer, in a stream.

    Attacker: any key. Expected: the next request with it is asked anew or joins, never 409 for good.
    """
    stages = (b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", SSE_HEAD, SSE_HEAD + chunk(event("a")))
    with keyed(tmp_path, {"resume_grace_s": 0.0, "retention_s": 1.0}) as r:
        for stage in stages:
            for leave in ("fin", "reset"):
                client = r.client(post(CHAT, bearer(), "Idempotency-Key: k"))
                if stage:
                    r.reply(stage)
                getattr(client, leave)()
                r.pass_time(3)
                again = r.client(post(CHAT, bearer(), "Idempotency-Key: k"))
                r.reply(whole_answer(b"{}"))
                assert again.answer.status == 200


def test_the_names_that_clients_give_their_streams_are_counted() -> None:
    """Each finished generation keeps the longest Idempotency-Key and the longest conversation that there may be.

    Attacker: any key, with thousands of short generations. Expected: memory grows by at most half more than streamd
    counts (`log_bytes`), so that the bound of all logs bounds the names too.
    """

    def generation(r: Rig, k: int) -> None:
        named = (f"Idempotency-Key: {k:0>255}", f"X-Conversation-Id: {k:0>512}", "Connection: close")
        r.client(post(CHAT, *named))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)

    with rig() as r:
        for k in range(50):
            generation(r, k)
        gc.collect()
        tracemalloc.start()
        try:
            before, counted = tracemalloc.get_traced_memory()[0], r.runtime.hub.log_bytes
            for k in range(50, 200):
                generation(r, k)
            for link in r.links:
                link.sent.clear()
            r.ended.clear()
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        counted = r.runtime.hub.log_bytes - counted
        assert len(r.runtime.hub) == 200 and grown <= 1.5 * counted, (grown / 150, counted / 150)


@pytest.mark.parametrize(
    "position",
    [
        "0",
        "-1",
        "1",
        "2",
        "00",
        "9007199254740991",
        "9007199254740993",
        "18446744073709551616",
        "1e3",
        "٣",
        "",
        " 1",
        "1 ",
    ],
)
def test_no_position_is_a_mistake_of_streamds(position: str, tmp_path: Path) -> None:
    """Every odd place to resume at, by every way to say it.

    Attacker: any key. Expected: the stream, 204 or a 4xx that names the mistake.
    """
    with keyed(tmp_path) as r:
        client = r.client(post(CHAT, bearer()))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        name = client.answer.get("x-stream-id")
        quoted = "".join(f"%{byte:02x}" for byte in position.encode())
        for wire in (
            get(f"/v1/streams/{name}?from={quoted}", bearer()),
            get(f"/v1/streams/{name}?last_event_id={name}:{quoted}", bearer()),
            get(f"/v1/streams/{name}", bearer(), f"Last-Event-ID: {name}:{position}".encode().decode("latin-1")),
            get(f"/v1/stream?conv_id=c&from={quoted}", bearer()),
            get(f"/v1/responses/none?stream=true&starting_after={quoted}", bearer(), method="HEAD"),
        ):
            asker = r.client(wire)
            answer_all(r)
            assert asker.answers[0].status in (200, 204, 400, 404)


# -- the log


PLACES = ["X-Request-Id: {}", "traceparent: 00-{}-b7ad6b7169203331-01", "User-Agent: {}", "X-Conversation-Id: {}"]


@pytest.mark.parametrize("place", [*PLACES, "model", "idempotency", "name", "header", "cookie", "query"])
def test_no_key_at_a_wrong_place_is_logged(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's key stands where another word belongs: as the request's id, as the model, as a stream's name.

    Cause: a mistake of a client; every reader of the logs has the key. Expected: no line holds it (SECURITY.md, promise
    4).
    """
    lines: list[str] = []
    monkeypatch.setattr(logs, "event", lambda level, name, **fields: lines.append(f"{name} {fields}"))
    secret = key("bob")
    fields = [place.format(secret)] if "{}" in place else []
    fields += {
        "idempotency": [f"Idempotency-Key: {secret}"],
        "header": [f"x-api-key: {secret}"],
        "cookie": [f"Cookie: {secret}={secret}"],
    }.get(place, [])
    path = f"/v1/chat/completions?{secret}={secret}" if place == "query" else "/v1/chat/completions"
    with keyed(tmp_path) as r:
        logs._sink.level = logs.DEBUG
        body = CHAT | {"model": secret} if place == "model" else CHAT
        r.client(post(body, bearer("alice"), *fields, path=path))
        r.reply(SSE_HEAD + chunk(event(secret), DONE) + LAST)
        if place == "name":
            r.client(get(f"/v1/streams/{secret}", bearer()))
            r.client(get("/v1/streams", bearer(), f"Last-Event-ID: {secret}:1"))
        r.pass_time(1)
    assert lines and not [line for line in lines if secret in line]
