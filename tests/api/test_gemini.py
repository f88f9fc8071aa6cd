"""Google's Gemini API through the whole of streamd but its sockets: keys, models, lists, and what a reader gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import LAST, SSE_HEAD, Client, Rig, chunk, events_in, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.core.keys import SALT_BYTES, Key, digest, encode

KEY = "sk-alice-alicealicealicealice"
SALT = bytes(SALT_BYTES)
STREAM = "/v1beta/models/m:streamGenerateContent?alt=sse"
WHOLE = "/v1beta/models/m:generateContent"
ASK: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "x"}]}]}
GOOGLE = UpstreamSettings(name="up", url="http://up.test:1/v1beta", key="AIza-up", aliases={"fast": "gemini-flash"})


def said(text: str, finish: str = "", made: int = 1) -> bytes:
    candidate: dict[str, Any] = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}
    usage = {"promptTokenCount": 8, "candidatesTokenCount": made, "totalTokenCount": made + 8}
    payload = {"candidates": [candidate | ({"finishReason": finish} if finish else {})], "usageMetadata": usage}
    return b"data: " + json.dumps(payload).encode() + b"\r\n\r\n"


def lf(event: bytes) -> bytes:
    return event.replace(b"\r\n", b"\n")


def keys_file(folder: Path, **rights: Any) -> str:
    path = folder / "keys"
    path.write_bytes(encode(Key("alice", "alice", SALT, digest(SALT, KEY.encode()), **rights)) + b"\n")
    path.chmod(0o600)
    return str(path)


def sent_of(r: Rig) -> tuple[str, list[str], bytes]:
    """Target, header fields and body of what went upstream last."""
    head, _, body = bytes(r.link.sent).partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    return first.split(" ")[1], fields, body


def streaming(r: Rig, *fields: str, path: str = STREAM) -> Client:
    client = r.client(post(ASK, *fields, path=path))
    r.reply(SSE_HEAD)
    return client


@pytest.mark.parametrize("version", ["v1beta", "v1"])
def test_a_stream_passes_as_data_lines_alone_and_ends_with_its_reason(version: str) -> None:
    with rig() as r:
        client = streaming(r, path=f"/{version}/models/m:streamGenerateContent?alt=sse")
        events = [said("a"), said("b", made=2), said("", "STOP", made=2)]
        for each in events:
            r.reply(chunk(each))
        r.pass_time(60)  # no heartbeat
        r.reply(LAST)
        assert client.answer.whole and client.answer.body == b"".join(map(lf, events))
        assert client.answer.get("x-stream-id")


@pytest.mark.parametrize("form", ["event-stream", "later", "HTTP/1.0"])
def test_ids_come_with_accept_and_to_readers_of_the_stream(form: str) -> None:
    with rig() as r:
        first = streaming(r, *(["Accept: application/json, text/event-stream"] if form == "event-stream" else []))
        r.reply(chunk(said("a"), said("b", made=2)))
        if form == "event-stream":
            assert [each.seq for each in events_in(first.answer.body)] == [1, 2]
            return
        stream_id = first.answer.get("x-stream-id")
        version = "1.0" if form == "HTTP/1.0" else "1.1"
        other = r.client(get(f"/v1/streams/{stream_id}", version=version))
        (merged,) = events_in(other.answer.body)
        assert merged.seq == 2 and merged.json["usageMetadata"]["candidatesTokenCount"] == 2
        assert merged.json["candidates"][0]["content"]["parts"] == [{"text": "ab"}]
        assert other.answer.body.startswith(b"retry: ")


def test_a_data_only_reader_over_http_1_0_gets_the_events_bare() -> None:
    with rig() as r:
        client = r.client(post(ASK, path=STREAM, version="1.0"))
        r.reply(SSE_HEAD + chunk(said("a", "STOP")) + LAST)
        assert client.answer.body == lf(said("a", "STOP"))


def test_the_same_post_resumes_behind_the_last_event_and_asks_nothing() -> None:
    with rig() as r:
        client = streaming(r, "X-Stream-Detach-Grace: 60")
        r.reply(chunk(said("a"), said("b", made=2)))
        stream_id = client.answer.get("x-stream-id")
        client.fin()
        again = r.client(post(ASK, f"Last-Event-ID: {stream_id}:1", path=STREAM))
        r.reply(chunk(said("", "STOP")) + LAST)
        assert again.answer.body == lf(said("b", made=2)) + lf(said("", "STOP"))
        assert len(r.links) == 1


def test_an_idempotency_key_joins_the_same_models_stream_and_no_other() -> None:
    with rig() as r:
        first = streaming(r, "Idempotency-Key: k")
        again = r.client(post(ASK, "Idempotency-Key: k", path=STREAM))
        assert again.answer.get("x-stream-id") == first.answer.get("x-stream-id") and len(r.links) == 1
        other = r.client(post(ASK, "Idempotency-Key: k", path=STREAM.replace("/m:", "/other:")))
        assert other.answer.status == 422 and other.answer.error["details"][0]["reason"] == "idempotency_key_reused"
        assert len(r.links) == 1


def test_a_break_is_told_in_googles_words_as_the_logs_last_event() -> None:
    with rig() as r:
        client = streaming(r)
        r.reply(chunk(said("a")))
        r.link.close()
        r.turn()
        first, last, rest = client.answer.body.split(b"\n\n")
        assert first + b"\n\n" == lf(said("a")) and rest == b"" and not client.answer.whole
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert (error["code"], error["status"]) == (503, "UNAVAILABLE")
        assert error["details"][0]["reason"] == "upstream_truncated"


def test_an_end_without_a_reason_is_a_truncation_and_a_blocked_prompt_is_none() -> None:
    for event, whole in ((said("a"), False), (b'data: {"promptFeedback": {"blockReason": "OTHER"}}\n\n', True)):
        with rig() as r:
            client = streaming(r)
            r.reply(chunk(event) + LAST)
            assert client.answer.whole is whole


def test_an_array_and_a_whole_answer_pass_as_they_are() -> None:
    for path in ("/v1beta/models/m:streamGenerateContent", WHOLE, "/v1beta/models/m:countTokens"):
        with rig() as r:
            client = r.client(post(ASK, path=path))
            r.reply(whole_answer(b'[{"a": 1}\n,\r\n{"b": 2}]'))
            assert client.answer.body == b'[{"a": 1}\n,\r\n{"b": 2}]' and client.answer.get("x-stream-id") is None


# -- keys


@pytest.mark.parametrize("where", ["header", "query", "odd query", "bearer"])
def test_a_key_opens_and_never_goes_upstream(tmp_path: Path, where: str) -> None:
    fields = {"header": [f"X-Goog-Api-Key: {KEY}"], "bearer": [f"Authorization: Bearer {KEY}"]}.get(where, [])
    path = STREAM + {"query": f"&key={KEY}", "odd query": f"&k%65y={KEY}&x=1"}.get(where, "")
    with rig(keys_file=keys_file(tmp_path)) as r:
        assert streaming(r, *fields, path=path).answer.status == 200
        target, sent, _ = sent_of(r)
        assert target == STREAM + ("&x=1" if where == "odd query" else "")
        assert not any("sk-" in field for field in sent)


def test_the_query_is_no_place_for_a_key_of_other_apis(tmp_path: Path) -> None:
    with rig(keys_file=keys_file(tmp_path)) as r:
        assert r.client(post({"model": "m"}, path=f"/v1/chat/completions?key={KEY}")).answer.status == 401
        assert r.client(get(f"/v1/files?key={KEY}")).answer.status == 401
        assert r.client(get("/v1/streams", f"X-Goog-Api-Key: {KEY}")).answer.status == 200


def test_without_a_key_the_refusal_has_googles_shape(tmp_path: Path) -> None:
    with rig(keys_file=keys_file(tmp_path)) as r:
        answer = r.client(post(ASK, path=WHOLE)).answer
        assert answer.status == 401 and answer.error["status"] == "UNAUTHENTICATED" and answer.error["code"] == 401
        assert answer.error["details"][0]["reason"] == "api_key_required"


def test_without_a_key_file_the_key_says_whose_stream_it_is() -> None:
    with rig() as r:
        streaming(r, path=STREAM + "&key=AIza-one")
        (stream,) = r.runtime.hub
        assert stream.terms.owner.startswith("h-")
        listed = r.client(get("/v1/streams", "X-Goog-Api-Key: AIza-one")).answer
        assert [each["id"] for each in json.loads(listed.body)["data"]] == [stream.id]


def test_an_upstreams_own_key_goes_where_google_looks_for_it() -> None:
    with rig(upstreams=(GOOGLE,)) as r:
        streaming(r, "X-Goog-Api-Key: AIza-mine")
        target, fields, _ = sent_of(r)
        assert target == STREAM
        assert "x-goog-api-key: AIza-up" in fields
        assert not any("AIza-mine" in field or field.startswith("authorization") for field in fields)


@pytest.mark.parametrize("path", [WHOLE, WHOLE + "?key=AIza-mine"])
def test_a_clients_key_passes_only_where_it_may_and_never_in_the_target(path: str) -> None:
    upstream = UpstreamSettings(name="up", url="http://up.test:1", pass_client_key=True)
    with rig(upstreams=(upstream,)) as r:
        r.client(post(ASK, *([] if "?" in path else ["X-Goog-Api-Key: AIza-mine"]), path=path))
        target, fields, _ = sent_of(r)
        assert target == WHOLE and "x-goog-api-key: AIza-mine" in fields


# -- models


@pytest.mark.parametrize(
    ("path", "body", "there", "body_there"),
    [
        ("/v1beta/models/fast:generateContent", ASK, "/v1beta/models/gemini-flash:generateContent", ASK),
        ("/v1/models/f%61st%3AgenerateContent", ASK, "/v1/models/gemini-flash:generateContent", ASK),
        (
            "/v1beta/models/fast:embedContent",
            {"model": "models/fast", "content": 1},
            "/v1beta/models/gemini-flash:embedContent",
            {"model": "models/gemini-flash", "content": 1},
        ),
        (
            "/v1beta/models/fast:batchEmbedContents",
            {"requests": [{"model": "models/fast", "content": 1}, {"content": 2}, 3]},
            "/v1beta/models/gemini-flash:batchEmbedContents",
            {"requests": [{"model": "models/gemini-flash", "content": 1}, {"content": 2}, 3]},
        ),
        (
            "/v1beta/models/fast:countTokens",
            {"generateContentRequest": {"model": "models/fast", **ASK}},
            "/v1beta/models/gemini-flash:countTokens",
            {"generateContentRequest": {"model": "models/gemini-flash", **ASK}},
        ),
        ("/v1beta/tunedModels/fast:generateContent", ASK, "/v1beta/tunedModels/fast:generateContent", ASK),
    ],
)
def test_an_alias_is_rewritten_wherever_the_model_stands(path: str, body: Any, there: str, body_there: Any) -> None:
    with rig(upstreams=(GOOGLE,)) as r:
        r.client(post(body, path=path))
        target, _, sent = sent_of(r)
        assert (target, json.loads(sent)) == (there, body_there)


def test_the_path_chooses_the_upstream() -> None:
    others = UpstreamSettings(name="other", url="http://o.test:2", models=("gemini-x", "tunedModels/t"))
    local = UpstreamSettings(name="local", url="http://l.test:1", models=("m",))
    with rig(upstreams=(local, others)) as r:
        for path, port in (
            (WHOLE, 1),
            ("/v1beta/models/gemini-x:generateContent", 2),
            ("/v1beta/tunedModels/t:generateContent", 2),
        ):
            r.client(post(ASK, path=path))
            assert r.dialled[-1] == port
        r.client(get("/v1beta/models/gemini-x"))
        assert r.dialled[-1] == 2
        answer = r.client(post(ASK, path="/v1beta/models/none:generateContent")).answer
        assert answer.status == 404 and answer.error["status"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("path", "body", "may"),
    [
        (WHOLE, ASK, True),
        ("/v1beta/models/other:generateContent", ASK, False),
        ("/v1beta/models/other%3AgenerateContent", ASK | {"model": "m"}, False),
        ("/v1beta/models/oth%65r:generateContent", ASK | {"model": "m"}, False),
        ("/v1beta/models/m:embedContent", {"model": "models/other", "content": 1}, False),
        ("/v1beta/models/m:embedContent", {"model": "models/m", "content": 1}, True),
        ("/v1beta/models/m:batchEmbedContents", {"requests": [{"model": "models/other"}]}, False),
        ("/v1beta/models/m:countTokens", {"generateContentRequest": {"model": "models/other"}}, False),
        ("/v1beta/tunedModels/m:generateContent", ASK, False),
        ("/v1beta/cachedContents", {"model": "models/other"}, False),
        ("/v1beta/cachedContents", {"contents": []}, False),
    ],
)
def test_a_key_limited_to_some_models_names_no_other_anywhere(tmp_path: Path, path: str, body: Any, may: bool) -> None:
    with rig(keys_file=keys_file(tmp_path, models=("m",))) as r:
        client = r.client(post(body, f"X-Goog-Api-Key: {KEY}", path=path))
        if may:
            assert len(r.links) == 1
        else:
            assert client.answer.status == 403 and client.answer.error["status"] == "PERMISSION_DENIED"
            assert r.links == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1beta/models?pageSize=1&pageToken=x", []),
        ("/v1/models?pageSize=1", ["X-Goog-Api-Key: AIza-mine"]),
        ("/v1/models", ["X-Goog-Api-Client: google-genai-sdk/3.6.0"]),
        ("/v1/models?key=AIza-mine", []),
    ],
)
def test_the_list_of_models_is_merged_on_one_page(path: str, fields: list[str]) -> None:
    limited = UpstreamSettings(name="b", url="http://b.test:2", models=("b-1",))
    with rig(upstreams=(GOOGLE, limited)) as r:
        client = r.client(get(path, *fields))
        assert sent_of(r)[0] == f"{path.partition('?')[0]}?pageSize=1000"
        lists = (
            [{"name": "models/gemini-flash", "inputTokenLimit": 7}, {"x": 1}],
            [{"name": "models/b-1"}, {"name": "c"}],
        )
        for link, models in zip(r.links, lists, strict=True):
            link.feed(whole_answer(json.dumps({"models": models, "nextPageToken": "y"}).encode()))
        r.turn()
        flash = {"name": "models/gemini-flash", "inputTokenLimit": 7}
        assert json.loads(client.answer.body) == {
            "models": [flash, flash | {"name": "models/fast"}, {"name": "models/b-1"}]
        }


def test_a_model_below_v1_is_looked_up_where_it_is_for_googles_clients() -> None:
    local = UpstreamSettings(name="local", url="http://l.test:2", models=("m",))
    with rig(upstreams=(local, GOOGLE)) as r:
        r.client(get("/v1/models/fast?key=AIza-mine"))
        target, fields, _ = sent_of(r)
        assert r.dialled == [1] and target == "/v1/models/gemini-flash" and "x-goog-api-key: AIza-up" in fields


@pytest.mark.parametrize("path", ["/v1beta", "/v1beta/../x", "/v1beta/models%2f..%2fx", "/v1betax/y"])
def test_no_path_climbs_out_of_the_upstreams_base(path: str) -> None:
    with rig() as r:
        assert r.client(get(path)).answer.status == 404 and r.links == []


def test_tokens_of_a_whole_answer_are_charged_with_its_thoughts(tmp_path: Path) -> None:
    with rig(keys_file=keys_file(tmp_path, tokens_per_minute=100)) as r:
        r.client(post(ASK, f"X-Goog-Api-Key: {KEY}", path=WHOLE))
        usage = {"usageMetadata": {"candidatesTokenCount": 60, "thoughtsTokenCount": 60}}
        r.reply(whole_answer(json.dumps(usage).encode()))
        answer = r.client(post(ASK, f"X-Goog-Api-Key: {KEY}", path=WHOLE)).answer
        assert answer.status == 429 and answer.error["status"] == "RESOURCE_EXHAUSTED"
