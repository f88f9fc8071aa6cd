"""The fields of a request that are read before it goes upstream, and the requests that never go there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, chunk, event, events_in, get, post, rig, text_of, whole_answer

from streamd.config import RouteOverride, UpstreamSettings
from streamd.wire.dialect import APIS, Dialect

CHAT_PATH = "/v1/chat/completions"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/..",
        "/v1/../metrics",
        "/v1/./x",
        "/v1/a/..",
        "/v1/%2e%2e/x",
        "/v1/%2E./x",
        "/v1/a%2fb",
        "/v1/models/a%2f..%2f..%2fb",
        "/v1/a%5cb",
        "/v0/chat",
        "/v1",
        "/admin",
    ],
)
def test_no_path_climbs_out_of_the_upstreams_base(path: str) -> None:
    with rig() as r:
        assert r.client(get(path)).answer.status == 404
        assert r.links == []


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "BREW"])
def test_every_other_path_and_method_goes_upstream(method: str) -> None:
    with rig() as r:
        client = r.client(get("/v1/files/f1?purpose=x&y", method=method))
        assert bytes(r.link.sent).startswith(f"{method} /v1/files/f1?purpose=x&y HTTP/1.1\r\n".encode())
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok"


TWO = (
    UpstreamSettings(name="chat", url="http://c.test:1", models=("chat",)),
    UpstreamSettings(name="hear", url="http://h.test:2", models=("org/hear",), aliases={"ears": "org/hear"}),
)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("path", "port", "target"),
    [
        ("/v1/models/chat", 1, "/v1/models/chat"),
        ("/v1/models/org/hear", 2, "/v1/models/org/hear"),
        ("/v1/models/org%2Fhear", 2, "/v1/models/org%2Fhear"),
        ("/v1/models/org%2fhear/", 2, "/v1/models/org%2Fhear/"),
        ("/v1/models/ears", 2, "/v1/models/org%2Fhear"),
        ("/v1/engines/ears/completions", 2, "/v1/engines/org%2Fhear/completions"),
        ("/v1/models/of-nobody", 1, "/v1/models/of-nobody"),
        ("/v1/models/org%2Fhear/unheard-of", 1, "/v1/models/org%2Fhear/unheard-of"),
    ],
)
def test_a_model_in_the_path_is_asked_of_its_own_upstream(method: str, path: str, port: int, target: str) -> None:
    with rig(upstreams=TWO) as r:
        r.client(get(path, method=method))
        assert r.dialled == [port] and bytes(r.link.sent).startswith(f"{method} {target} HTTP/1.1".encode())


FORM = b"".join(
    b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % field
    for field in ((b"file", b'; filename="a.wav"', b"RIFF" * 20_000), (b"model", b"", b"ears"), (b"x", b"", b"1.0"))
)


@pytest.mark.parametrize("piece_bytes", [1_000, 1 << 20])
def test_a_model_in_a_form_is_asked_of_its_own_upstream(piece_bytes: int) -> None:
    body = FORM + b"--B--\r\n"
    with rig(upstreams=TWO) as r:
        client = r.client()
        wire = post(body, "Content-Type: multipart/form-data; boundary=B", path="/v1/audio/transcriptions")
        for start in range(0, len(wire), piece_bytes):
            client.send(wire[start : start + piece_bytes])
        assert r.dialled == [2] and bytes(r.link.sent).endswith(body.replace(b"ears", b"org/hear"))
        unknown = post(
            body.replace(b"ears", b"eyes"), "Content-Type: multipart/form-data; boundary=B", path="/v1/files"
        )
        assert r.client(unknown).answer.error["code"] == "model_not_found"
        r.client(post(b"--B--", "Content-Type: multipart/form-data; boundary=B", path="/v1/files"))
        assert r.dialled == [2, 1]


PAGE = "https://chat.example"


@pytest.mark.parametrize(
    ("origins", "origin", "goes_up"),
    [
        ((PAGE,), PAGE, False),
        ((PAGE,), "https://other.example", True),
        ((), PAGE, True),
    ],
)
def test_an_upstream_judges_no_page_that_streamd_lets_in(origins: tuple[str, ...], origin: str, goes_up: bool) -> None:
    with rig(cors_origins=origins) as r:
        r.client(post(WHOLE, f"Origin: {origin}"))
        assert (b"origin: " + origin.encode() in r.link.sent) is goes_up


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "GZIP", "gzip, br"])
def test_an_encoded_body_passes_unread_or_its_encoding_is_named(coding: str) -> None:
    body = b'{"model": "ears"}{'  # no JSON
    with rig() as r:
        r.client(post(body, "Content-Type: application/json", f"Content-Encoding: {coding}"))
        assert bytes(r.link.sent).endswith(b"\r\n\r\n" + body)
        assert f"content-encoding: {coding}".encode() in r.link.sent
    with rig(upstreams=TWO) as r:  # an alias in the body couldn't be replaced
        answer = r.client(post(body, "Content-Type: application/json", f"Content-Encoding: {coding}")).answer
        assert (answer.status, answer.error["code"]) == (415, "unsupported_encoding")
        assert coding.lower() in answer.error["message"] and answer.get("accept-encoding") == "identity"
        assert r.links == []


@pytest.mark.parametrize("number", ["1e400", "1.0", "-0", "12345678901234567890", "0.1000", "1E5"])
def test_numbers_beside_a_name_that_is_replaced_keep_their_digits(number: str) -> None:
    body = f'{{"seed": {number}, "model": "ears", "nested": [{number}, {{"a": {number}}}]}}'
    with rig(upstreams=TWO) as r:
        r.client(post(body.encode(), "Content-Type: application/json"))
        assert bytes(r.link.sent).endswith(body.replace("ears", "org/hear").encode())


def test_bad_json_is_refused_with_its_line_and_column() -> None:
    with rig() as r:
        answer = r.client(post(b'{"model": m}', "Content-Type: application/json")).answer
        assert answer.status == 400 and answer.error["code"] == "bad_json"
        assert "line 1, column" in answer.error["message"] and r.links == []


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"[1, 2]", "application/json"), (b"", "application/json"), (b"\x00\xff", "application/octet-stream")],
)
def test_bodies_without_a_model_pass(body: bytes, content_type: str) -> None:
    with rig() as r:
        r.client(post(body, f"Content-Type: {content_type}", path="/v1/audio/transcriptions"))
        assert bytes(r.link.sent).endswith(b"\r\n\r\n" + body)


@pytest.mark.parametrize(("stream", "asked"), [(True, True), (1, True), ("true", True), (False, False), (None, False)])
def test_only_a_request_for_a_stream_gets_its_head_after_commit_after(stream: object, asked: bool) -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post({**CHAT, "stream": stream}))
        r.pass_time(1.5)
        assert bool(client.raw) is asked


def test_a_route_has_its_own_policy_grace_and_heartbeat() -> None:
    override = RouteOverride(path="/v1/completions", policy="drop_oldest", detach_grace_s=20.0, heartbeat_s=5.0)
    with rig(routes=(override,)) as r:
        client = r.client(post({"model": "m", "stream": True, "prompt": "x"}, path="/v1/completions"))
        r.reply(SSE_HEAD)
        (stream,) = r.runtime.hub
        assert stream.terms.policy.value == "drop_oldest" and stream.terms.detach_grace_s == 20.0
        r.pass_time(6)
        assert client.raw.endswith(b": hb\n\r\n")
        client.fin()
        assert r.runtime.hub.detached == 1


def test_respond_async_starts_without_reading() -> None:
    with rig() as r:
        client = r.client(post(CHAT, "Prefer: respond-async") + get())
        started, health = client.answers
        assert (started.status, health.status) == (202, 200)
        assert started.get("preference-applied") == "respond-async"
        stream_id = json.loads(started.body)["id"]
        assert started.get("location") == f"/v1/streams/{stream_id}"
        r.reply(SSE_HEAD + chunk(event("a")))
        client.fin()
        reader = r.client(get(started.get("location") or ""))
        r.reply(chunk(DONE) + LAST)
        assert text_of(events_in(reader.answer.body)) == "a" and reader.answer.whole


def test_a_retry_joins_an_answer_that_turned_out_to_be_a_stream() -> None:
    with rig() as r:
        first = r.client(post(CHAT, "Idempotency-Key: k", path="/v1/of-another-kind"))
        early = r.client(post(CHAT, "Idempotency-Key: k", path="/v1/of-another-kind"))
        assert (early.answer.status, json.loads(early.answer.body)["error"]["code"]) == (409, "request_in_progress")
        r.reply(SSE_HEAD + chunk(b'data: {"delta":"a"}\n\n'))
        running = r.client(post(CHAT, "Idempotency-Key: k", path="/v1/of-another-kind"))
        r.reply(chunk(b'data: {"delta":"b"}\n\n') + LAST)
        late = r.client(post(CHAT, "Idempotency-Key: k", path="/v1/of-another-kind"))
        assert len(r.links) == 1
        assert {client.answer.get("x-stream-id") for client in (first, running, late)} == {
            late.answer.get("x-stream-id")
        }
        events = [[each.data for each in events_in(client.answer.body)] for client in (first, running)]
        assert events == [[b'{"delta":"a"}', b'{"delta":"b"}']] * 2
        assert late.answer.whole


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/chat/completions", 200),
        ("/v1/ch%61t/completions", 200),  # the same path
        ("/v1/chat/completions?a=1", 422),
        ("/v1/chat/completions?last_event_id=", 200),  # streamd's own parameter doesn't go upstream
        ("/v1/completions", 422),
        ("/v1/messages", 422),
    ],
)
def test_an_idempotency_key_joins_the_same_request_only(path: str, status: int) -> None:
    with rig() as r:
        r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(SSE_HEAD + chunk(event("a")))
        again = r.client(post(CHAT, "Idempotency-Key: k", path=path))
        assert again.answer.status == status
        r.reply(chunk(DONE) + LAST)


ASKING = {
    "plainly": post(CHAT),
    "with 1": post({**CHAT, "stream": 1}),
    "with a word": post({**CHAT, "stream": "true"}),
    "in an encoded path": post(CHAT, path="/v1/%63hat/c%6Fmpletions"),
    "with a slash at the end": post(CHAT, path="/v1/chat/completions/"),
    "with doubled slashes": post(CHAT, path="//v1///chat//completions"),
    "as text": post(json.dumps(CHAT).encode(), "Content-Type: text/plain"),
    "as another JSON": post(json.dumps(CHAT).encode(), "Content-Type: application/vnd.x+json"),
    "without a type": post(b" \r\n" + json.dumps(CHAT).encode(), "X-Y: z"),
    "in an absolute target": post(CHAT, path="http://x/v1/chat/completions"),
}


@pytest.mark.parametrize("way", ASKING)
def test_a_request_for_a_stream_is_a_stream_from_the_start_however_it_is_put(way: str) -> None:
    with rig() as r:
        client = r.client(ASKING[way])
        assert len(tuple(r.runtime.hub)) == 1, "before the upstream has answered"
        assert bytes(r.link.sent).startswith(b"POST /v1/chat/completions")
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert client.answer.get("x-stream-id") and text_of(events_in(client.answer.body)) == "a"


MADE = b'{"choices":[{"message":{"content":"all"},"finish_reason":"stop"}],"usage":{"completion_tokens":7}}'
# Answers to requests for no stream: no byte of them is streamd's to change.
BODIES = {
    "events": event("a") + DONE,
    "events with ids, CRLF and a BOM": b"\xef\xbb\xbfid: 1\r\nretry: 5\r\ndata: x\r\n\r\n",
    "JSON and [DONE]": MADE + b"\n\n" + DONE,
    "JSON": MADE,
    "an error": b'{"error":{"message":"slow down"}}\n',
    "no byte": b"",
}
UNASKED = {
    "absent": (CHAT_PATH, {"model": "m"}),
    "false": (CHAT_PATH, {"model": "m", "stream": False}),
    "null": (CHAT_PATH, {"model": "m", "stream": None}),
    "completions": ("/v1/completions/", {"model": "m"}),
    "messages": ("/v1/messages", {"model": "m"}),
    "responses": ("/v1//responses", {"model": "m"}),
    "gemini": ("/v1beta/models/m:generateContent", {}),
    "gemini's array": ("/v1beta/models/m:streamGenerateContent", {}),
    "OpenAI's API of Google's": ("/v1beta/openai/chat/completions", {"model": "m"}),
    "of no known dialect": ("/v1/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}),
}
WHOLES = {
    "chunked": lambda body: b"transfer-encoding: chunked\r\n\r\n" + (chunk(body) if body else b"") + LAST,
    "length": lambda body: b"content-length: %d\r\n\r\n%b" % (len(body), body),
    "until close": lambda body: b"\r\n" + body,
}


@pytest.mark.parametrize("framing", WHOLES)
@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("asked", UNASKED)
def test_a_request_for_no_stream_gets_its_answers_bytes_whatever_type_they_say(
    asked: str, kind: str, framing: str
) -> None:
    path, body = UNASKED[asked]
    with rig() as r:
        client = r.client(post(body, path=path))
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + WHOLES[framing](BODIES[kind]))
        if framing == "until close":
            r.link.fin()
            r.turn()
        assert client.answer.whole and client.answer.body == BODIES[kind]
        assert client.answer.get("content-type") == "text/event-stream" and client.answer.get("x-stream-id") is None
        assert not tuple(r.runtime.hub)


GEMINIS = "/v1{}/models/m:streamGenerateContent"


@pytest.mark.parametrize("spelling", ["{}/", "{}//", "/{}"])
@pytest.mark.parametrize(
    "path",
    [*(path for api in APIS for path in api.paths), GEMINIS.format("beta"), GEMINIS.format("")],
)
def test_slashes_too_many_do_not_change_the_dialect(path: str, spelling: str) -> None:
    """An answer without its end is truncated in every dialect but the unknown, where the framing decides."""
    query = "?alt=sse" if path.endswith("Content") else ""
    with rig() as r:
        client = r.client(post(CHAT, path=spelling.format(path) + query))
        (stream,) = r.runtime.hub
        r.reply(SSE_HEAD + chunk(b'data: {"x": 1}\n\n') + LAST)
        r.pass_time(1)
        assert not client.answer.whole and stream.dialect is not Dialect.UNKNOWN


ASKED_OTHERWISE = {
    "by a path": post({}, path="/v1beta/models/m:streamGenerateContent/?alt=sse"),
    "by a word that a server takes for yes": post({"model": "m", "stream": "on"}),
    "by a word that pydantic takes for no": post({"model": "m", "stream": "off"}),
    "by a number": post({"model": "m", "stream": 0}),
    "in Google's OpenAI API": post({"model": "m", "stream": True}, path="/v1beta/openai/chat/completions"),
    "in a form": post(b"--x", "Content-Type: multipart/form-data; boundary=x", path="/v1/audio/transcriptions"),
    "by a GET": get("/v1/of/events"),
}


@pytest.mark.parametrize("way", ASKED_OTHERWISE)
def test_a_request_that_may_ask_for_a_stream_gets_one(way: str) -> None:
    with rig() as r:
        client = r.client(ASKED_OTHERWISE[way])
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert client.answer.get("x-stream-id")


@pytest.mark.parametrize(
    "body", [b"{", b"{not json}", b'{"stream": true} and more', b"\xef\xbb\xbf{}", b"[{}]", b"--x"]
)
def test_a_body_of_another_type_that_is_no_object_passes_as_it_is(body: bytes) -> None:
    with rig() as r:
        r.client(post(body, "Content-Type: text/plain"))
        assert bytes(r.link.sent).endswith(b"\r\n\r\n" + body)
        r.reply(whole_answer(b"ok"))


def test_a_key_of_an_answer_that_is_no_stream_is_free_again_when_it_is_over() -> None:
    with rig() as r:
        r.client(post(WHOLE, "Idempotency-Key: k"))
        r.reply(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        again = r.client(post(WHOLE, "Idempotency-Key: k"))
        r.reply(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        assert again.answer.body == b"{}"


def test_respond_async_needs_a_stream() -> None:
    with rig() as r:
        client = r.client(post(WHOLE, "Prefer: respond-async"))
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok"


def test_respond_async_without_a_reader_ends_after_its_grace() -> None:
    with rig(detach_grace_max_s=20.0) as r:
        r.client(post(CHAT, "Prefer: respond-async"))
        r.reply(SSE_HEAD)
        r.pass_time(21)
        assert r.link.aborted and r.runtime.hub.detached == 0


def test_the_reader_of_a_respond_async_stream_gets_the_upstreams_error() -> None:
    with rig() as r:
        r.refusing.add(1)
        client = r.client(post(CHAT, "Prefer: respond-async"))
        reader = r.client(get(client.answer.get("location") or ""))
        assert events_in(reader.answer.body)[-1].json["error"]["code"] == "upstream_unreachable"


# -- the state of streams


def test_the_state_of_a_stream_is_served_as_json() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), event("b")))
        stream_id = client.answer.get("x-stream-id")
        slow = r.client(get(f"/v1/streams/{stream_id}"))
        slow.transport.capacity = 0
        r.reply(chunk(event("c")))
        r.reply(chunk(event("d")))
        state = json.loads(r.client(get(f"/v1/streams/{stream_id}", "Accept: application/json")).answer.body)
        assert state["id"] == stream_id and state["state"] == "live" and state["reason"] is None
        assert (state["first_seq"], state["last_seq"], state["subscribers"]) == (1, 4, 2)
        assert state["lag_max"] == 1 and state["text_events"] == 4 and state["upstream"] == "up"
        r.reply(chunk(DONE) + LAST)
        slow.take()
        state = json.loads(r.client(get(f"/v1/streams/{stream_id}", "Accept: application/json")).answer.body)
        assert (state["state"], state["reason"], state["subscribers"]) == ("sealed", "complete", 0)


def test_the_list_on_the_admin_surface_is_paged() -> None:
    with rig() as r:
        for n in range(5):
            client = r.client(post(CHAT))
            r.reply(SSE_HEAD)
            if n % 2:
                r.reply(chunk(event("a"), DONE) + LAST)
            client.send(b"")  # still there

        def listed(query: str) -> tuple[list[str], bool]:
            answer = r.client(get(f"/v1/streams{query}"), listener="admin").answer
            assert answer.status == 200
            body = json.loads(answer.body)
            return [stream["id"] for stream in body["data"]], body["has_more"]

        everything, more = listed("")
        assert len(everything) == 5 and not more
        first, more = listed("?limit=2")
        assert first == everything[:2] and more
        rest, more = listed(f"?limit=3&after={first[-1]}")
        assert rest == everything[2:] and not more
        assert len(listed("?state=live")[0]) == 3 and len(listed("?state=sealed")[0]) == 2
        for query in ("?state=x", "?limit=0", "?limit=x", "?limit=1001", "?after=nothing"):
            assert r.client(get(f"/v1/streams{query}"), listener="admin").answer.status == 400


# -- waiting for a name


def test_a_waiting_reader_reads_the_name_once_it_is_opened() -> None:
    with rig() as r:
        waiting = [r.client(get("/v1/streams/talk?wait=30")) for _ in range(2)]
        r.pass_time(10)
        assert all(client.raw == b"" for client in waiting)
        opened = r.client(get("/v1/streams/talk", method="PUT"))
        assert opened.answer.status in (200, 201)
        for client in waiting:
            assert client.answer.status == 200 and client.answer.get("x-stream-id") == "talk"
        r.client(get("/v1/streams/talk", method="DELETE"))


def test_a_reader_whose_name_is_not_opened_gets_404() -> None:
    with rig() as r:
        client, gone = r.client(get("/v1/streams/talk?wait=30")), r.client(get("/v1/streams/talk?wait=30"))
        gone.fin()
        r.pass_time(31)
        assert client.answer.status == 404
        assert r.client(get("/v1/streams/talk")).answer.status == 404
        assert r.client(get("/v1/streams/talk?wait=x")).answer.error["code"] == "bad_wait"


@pytest.mark.parametrize(
    "path", sorted({path for api in APIS for path in (*api.paths, *(f"{at}x" for at in api.below))})
)
def test_the_paths_of_every_api_go_upstream(path: str) -> None:
    with rig() as r:
        r.client(post({"model": "m"}, path=path))
        assert len(r.links) == 1


# -- JSON

ALIASED = UpstreamSettings(name="up", url="http://up.test:1", aliases={"public": "own"})
JSON_ROUTES = [
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/embeddings",
    "/v1beta/models/m:countTokens",
]


def deep(depth: int, opening: bytes = b"[", inner: bytes = b"", closing: bytes = b"]") -> bytes:
    return b'{"model": "public", "stream": true, "x": ' + opening * depth + inner + closing * depth + b"}"


@pytest.mark.parametrize("path", JSON_ROUTES)
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (deep(128), "json_too_deep"),
        (deep(254, b'{"a":', b"1", b"}"), "json_too_deep"),
        (deep(1020), "json_too_deep"),
        (deep(100_000), "json_too_deep"),
        (deep(1, inner=b"[]," * 50_000 + b"1"), "json_too_large"),
        (deep(1, inner=b"1," * 500_000 + b"1"), "json_too_large"),
        (deep(1, inner=b"[1,]"), "bad_json"),
        (b'{"model": ' + b"1" * 4001 + b"}", "bad_json"),
        (b'{"model": "' + b"m" * 5000 + b'"}', "bad_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_that_is_not_taken_is_a_400_and_leaves_nothing_behind(path: str, body: bytes, code: str) -> None:
    with rig(upstreams=(ALIASED,), commit_after_s=0.1) as r:
        client = r.client(post(body, "Content-Type: application/json; charset=utf-8", path=path))
        assert client.answer.status == 400
        assert code.encode() in client.answer.body or path == "/v1/messages"  # whose errors have no codes
        assert r.links == [] and r.runtime.bodies_bytes == 0


def test_a_body_is_refused_as_soon_as_it_is_too_deep() -> None:
    with rig() as r:
        head = get("/v1/x", "Content-Type: application/json", "Content-Length: 1000000", method="POST")
        client = r.client(head + b"[" * 70_000)
        assert client.answer.status == 400


@pytest.mark.parametrize("depth", [1, 60, 125])
def test_a_deep_body_for_a_model_with_an_alias_goes_upstream(depth: int) -> None:
    with rig(upstreams=(ALIASED,)) as r:
        r.client(post(deep(depth), "Content-Type: application/json"))
        assert bytes(r.link.sent).endswith(deep(depth).replace(b"public", b"own"))


@pytest.mark.parametrize(
    "members",
    [
        b'"seed":123456789012345678901234567890',
        b'"x":1e2,"y":-0.0,"z":1E+400,"x":2',
        b'"text":"\\ud83d \\u2028\\/ \xff\x01"',
        b' "a" :\t[1 , {"model":"public"}]\n,"b":{"model":"public","model":1}',
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_a_body_goes_upstream_as_it_came_but_for_the_name_of_its_model(members: bytes, step: int) -> None:
    body = b'{%b, "model" : "pub\\u006cic" ,"messages":[]}' % members
    with rig(upstreams=(ALIASED,)) as r:
        request = post(body, "Content-Type: application/vnd.x+json")
        client = r.client()
        for start in range(0, len(request), step):
            client.send(request[start : start + step])
        assert bytes(r.link.sent).endswith(b"\r\n\r\n" + body.replace(b'"pub\\u006cic"', b'"own"'))


def test_a_model_is_replaced_wherever_the_api_names_it() -> None:
    body = b'{"requests":[{"model":%b,"x":1},{"model":%b},{"model":"other"}], "x":{"model":"public"}}'
    with rig(upstreams=(ALIASED,)) as r:
        request = body % (b'"models/public"', b'"public"')
        r.client(post(request, "Content-Type: application/json", path="/v1beta/models/public:batchEmbedContents"))
        head, _, sent = bytes(r.link.sent).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1beta/models/own:batchEmbedContents ")
        assert sent == body % (b'"models/own"', b'"models/own"')


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "x/y"])
def test_json_is_read_whatever_it_says_it_is(content_type: str) -> None:
    with rig(upstreams=(ALIASED,), commit_after_s=1.0) as r:
        client = r.client(post(b'{"model":"public","stream":true}', f"Content-Type: {content_type}"))
        assert bytes(r.link.sent).endswith(b'{"model":"own","stream":true}')
        r.pass_time(1.5)
        assert client.raw.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "body", [deep(300), b'{"model":"a","Model":"b"}', b"{", b'{"model":"\\ud83d"}', b"a=b&c=d", b"--x"]
)
def test_what_does_not_say_that_it_is_json_passes_whatever_it_is(body: bytes) -> None:
    with rig(upstreams=(ALIASED,)) as r:
        r.client(post(body, "Content-Type: text/plain"))
        assert bytes(r.link.sent).endswith(b"\r\n\r\n" + body)


class Unprepared(Exception):
    """A request can't be prepared: a mistake of streamd's."""


def unprepared(*args: Any) -> bytes:
    raise Unprepared


@pytest.mark.parametrize("body", [CHAT, WHOLE])
def test_a_request_that_cannot_be_prepared_ends_and_gives_back_what_it_took(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig() as r:
        monkeypatch.setattr("streamd.net.attempt.encode_request_head", unprepared)
        assert r.client(post(body, "Idempotency-Key: k")).answer.status == 500
        assert len(r.bugs) == 1 and not tuple(r.runtime.hub) and r.links == []
        monkeypatch.undo()
        assert r.client(post(body, "Idempotency-Key: k")).raw == b"" and len(r.links) == 1
        r.bugs.clear()
        r.runtime.counters.bugs = 0


@pytest.mark.parametrize("body", [CHAT, WHOLE])
def test_a_second_try_that_cannot_be_prepared_ends_the_request(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = tuple(UpstreamSettings(name=name, url=f"http://{name}.test:1") for name in ("a", "b"))
    with rig(upstreams=two) as r:
        client = r.client(post(body))
        monkeypatch.setattr("streamd.net.attempt.encode_request_head", unprepared)
        r.reply(whole_answer(b"", "503 Busy"))
        assert client.answer.status == 500 and len(r.bugs) == 1 and not tuple(r.runtime.hub)
        r.bugs.clear()
        r.runtime.counters.bugs = 0


@pytest.mark.parametrize(("error", "status"), [(MemoryError, 503), (Unprepared, 500)])
@pytest.mark.parametrize(
    "place",
    [
        "streamd.net.intake.Intake._keep",
        "streamd.wire.json_scan.JsonScan.feed",
        "streamd.wire.json_scan.JsonScan.fields",
        "streamd.api.relay.ask_of",
        "streamd.api.relayed_request.RelayedRequest.open",
        "streamd.net.attempt.encode_request_head",
        "streamd.net.upstream.Upstream.take_idle",
        "streamd.net.upstream.UpstreamConnection.send",
    ],
)
@pytest.mark.parametrize("is_pooled", [False, True])
def test_whatever_raises_on_the_way_of_a_request_ends_it_and_nothing_else(
    place: str, error: type[Exception], status: int, is_pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **more: Any) -> None:
        raise error

    with rig() as r:
        if is_pooled:
            r.client(post(WHOLE))
            r.reply(whole_answer(b"{}"))
        monkeypatch.setattr(place, broken)
        client = r.client(post(CHAT, "Idempotency-Key: k"))
        assert client.answer.status == status
        counters = r.runtime.counters
        assert len(r.bugs) == 1 and (counters.bugs, counters.no_memory) == ((1, 0) if status == 500 else (0, 1))
        assert not tuple(r.runtime.hub) and r.runtime.bodies_bytes == 0
        monkeypatch.undo()
        again = r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert again.answer.status == 200
        r.bugs.clear()
        r.runtime.counters.bugs = 0
