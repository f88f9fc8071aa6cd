"""Access rights through all of streamd except its sockets: keys, limits, tokens, pages of other origins, proxies."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    Answer,
    Client,
    Rig,
    chunk,
    event,
    events_in,
    get,
    post,
    rig,
    whole_answer,
)

from streamd.config import ConfigError, UpstreamSettings
from streamd.core import keys as core_keys
from streamd.core.keys import SALT_BYTES, Key, digest, encode, format_expiry
from streamd.daemon import credential_files, logs
from streamd.reasons import CloseReason

SECRET = "0123456789abcdef0123456789abcdef"
TIMEOUT_SALT = bytes(SALT_BYTES)


def key(name: str) -> str:
    """The API key of that name."""
    return f"sk-{name}-{name * 8:0<20.20}"


def line(name: str, **rights: Any) -> bytes:
    """The line of this key in the key file."""
    presented = key(name).encode()
    return encode(Key(name, name, TIMEOUT_SALT, digest(TIMEOUT_SALT, presented), **rights)) + b"\n"


def bearer(name: str) -> str:
    return f"Authorization: Bearer {key(name)}"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    write(path, line("alice"), line("bob"))
    return path


def write(path: Path, *lines: bytes) -> None:
    """Replace a file as programs do: write a new file beside it, then rename it."""
    beside = path.with_name("beside")
    beside.write_bytes(b"".join(lines))
    beside.chmod(0o600)
    beside.rename(path)


def finish(r: Rig) -> None:
    """The upstream ends its stream."""
    r.reply(chunk(event("a"), DONE) + LAST)


def streaming(r: Rig, *fields: str, answer: bytes = SSE_HEAD) -> Client:
    client = r.client(post(CHAT, *fields))
    if client.raw == b"" and answer:
        r.reply(answer)
    return client


def token(**claims: Any) -> str:
    claims = {"aud": "rooms", "exp": int(time.time()) + 60, **claims}
    return jwt.encode(claims, SECRET, "HS256")


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Any]:
    """Settings under which streams are read with tokens."""
    path = tmp_path / "secret"
    write(path, SECRET.encode())
    return {"streams_auth": "token", "token_secret_file": str(path), "token_audience": "rooms", "token_leeway_s": 0.0}


@contextlib.contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The fields of every line that is logged."""
    lines: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(logs, "event", lambda level, name, **fields: lines.append({"name": name, **fields}))
        yield lines


# -- keys


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ((), 401, "api_key_required"),
        ((f"Authorization: Bearer {key('mallory')}",), 401, "invalid_api_key"),
        ((f"Authorization: Bearer {key('alice')}x",), 401, "invalid_api_key"),
        (("Authorization: Basic c2stYWxpY2U=",), 401, "api_key_required"),
        (("Authorization: Bearer eyJhbGciOiJub25lIn0.e30.",), 401, "api_key_required"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/models"])
def test_a_request_that_goes_upstream_needs_a_key(
    keys_file: Path, path: str, fields: tuple[str, ...], status: int, code: str
) -> None:
    with rig(keys_file=str(keys_file)) as r:
        wire = get(path, *fields) if path == "/v1/models" else post(CHAT, *fields, path=path)
        answer = r.client(wire).answer
        assert (answer.status, answer.error["code"]) == (status, code)
        assert (answer.get("www-authenticate") or "").startswith('Bearer realm="streamd"')
        assert r.dialled == []


KEY_PLACES = (
    "Authorization: Bearer {}",
    "x-api-key: {}",
    "x-goog-api-key: {}",
    "api-key: {}",
    "authorization: bEARER {}",
)


@pytest.mark.parametrize("field", [place.format(key("alice")) for place in KEY_PLACES])
def test_a_key_opens_and_never_goes_upstream(keys_file: Path, field: str) -> None:
    with rig(keys_file=str(keys_file)) as r:
        client = streaming(r, field, "Cookie: streamd_token=sk-cookie")
        assert client.answer.status == 200
        assert b"sk-" not in r.link.sent
        finish(r)


@pytest.mark.parametrize("valid", KEY_PLACES[:4])
@pytest.mark.parametrize("other", ["sk-ant-api03-of-the-provider", key("mallory"), "eyJhbGciOiJub25lIn0.e30.", ""])
def test_the_valid_key_of_several_opens_and_none_goes_upstream(keys_file: Path, valid: str, other: str) -> None:
    fields = [place.format(key("alice") if place == valid else other) for place in KEY_PLACES[:4]]
    with rig(keys_file=str(keys_file)) as r:
        assert streaming(r, *fields).answer.status == 200
        (stream,) = r.runtime.hub
        assert stream.terms.owner == "alice"
        assert b"sk-" not in r.link.sent and b"eyJ" not in r.link.sent
        finish(r)


def test_of_several_valid_keys_the_first_counts_and_an_expired_key_is_told(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("alice"), line("bob"), line("old", expires_unix=1.0))
    with rig(keys_file=str(path)) as r:
        streaming(r, f"x-api-key: {key('bob')}", bearer("alice"))
        (stream,) = r.runtime.hub
        assert stream.terms.owner == "alice"
        finish(r)
        both = r.client(post(CHAT, f"x-api-key: {key('old')}", bearer("mallory"))).answer
        assert (both.status, both.error["code"]) == (401, "expired_api_key")


def test_a_key_in_the_query_of_any_path_stays_here(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        target = f"/v1/files?key={key('alice')}&a=1&key=plain&x=1;k%65y={key('alice')}"
        r.client(get(target, bearer("alice")))
        assert bytes(r.link.sent).startswith(b"GET /v1/files?a=1&key=plain HTTP/1.1")


def test_a_key_goes_upstream_with_pass_client_key(keys_file: Path) -> None:
    upstream = UpstreamSettings(name="up", url="http://up.test:1", pass_client_key=True)
    with rig(keys_file=str(keys_file), upstreams=(upstream,)) as r:
        streaming(r, bearer("alice"))
        assert f"authorization: Bearer {key('alice')}".encode() in bytes(r.link.sent)
        finish(r)


def test_a_key_opens_only_its_routes_and_models(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("alice", routes=("/v1/chat/*", "/v1/streams/*"), models=("m", "llama-*")))
    with rig(keys_file=str(path)) as r:

        def refused(wire: bytes) -> tuple[int, str]:
            answer = r.client(wire).answer
            return answer.status, answer.error["code"]

        assert refused(post(CHAT, bearer("alice"), path="/v1/completions")) == (403, "route_not_allowed")
        assert refused(post(CHAT | {"model": "gpt"}, bearer("alice"))) == (403, "model_not_allowed")
        assert refused(post(b"model=m", bearer("alice"))) == (403, "model_not_allowed")
        assert refused(get("/v1/models", bearer("alice"))) == (403, "route_not_allowed")
        assert refused(post(b"", bearer("alice"), path="/v1/chat%2Fx")) == (404, "not_found")
        assert r.dialled == []
        streaming(r, bearer("alice"))
        finish(r)


@pytest.mark.parametrize(
    ("rights", "passes"),
    [
        ({"models": ("m",)}, False),
        ({"streams_max": 1}, False),
        ({"tokens_per_minute": 1000}, False),
        ({"requests_per_minute": 1000}, True),
        ({"routes": ("/v1/*",)}, True),
        ({}, True),
    ],
)
def test_an_encoded_body_passes_only_where_no_right_depends_on_it(
    tmp_path: Path, rights: dict[str, Any], passes: bool
) -> None:
    path = tmp_path / "keys"
    write(path, line("alice", **rights))
    with rig(keys_file=str(path)) as r:
        client = r.client(post(b"\x1f\x8b", bearer("alice"), "Content-Encoding: gzip"))
        assert bool(r.links) is passes
        if not passes:
            assert (client.answer.status, client.answer.error["param"]) == (415, "content-encoding")


@pytest.mark.parametrize(
    ("form", "passes"),
    [
        (b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--B--\r\n', True),
        (b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt\r\n--B--\r\n', False),
        (2 * b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n' + b"--B--\r\n", False),
        (b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nm\r\n--B--\r\n', False),
        (b'{"model": "m"}', False),
    ],
)
def test_a_plain_form_with_a_model_of_the_key_passes(tmp_path: Path, form: bytes, passes: bool) -> None:
    path = tmp_path / "keys"
    write(path, line("alice", models=("m",)))
    with rig(keys_file=str(path)) as r:
        client = r.client(post(form, bearer("alice"), "Content-Type: multipart/form-data; boundary=B"))
        assert bool(r.links) is passes
        assert passes or client.answer.error["code"] == "model_not_allowed"


@pytest.mark.parametrize("member", ["models", "fallbacks", "model_list"])
def test_models_beside_the_model_are_held_to_the_key(tmp_path: Path, member: str) -> None:
    path = tmp_path / "keys"
    write(path, line("alice", models=("m", "llama-*")), line("bob"))
    with rig(keys_file=str(path)) as r:
        for name, value, passes in (
            ("alice", ["m", {"model": "llama-3"}], True),
            ("alice", ["m", "gpt"], False),
            ("alice", {"m": ["m"]}, False),
            ("bob", {"m": ["gpt"]}, True),
        ):
            asked = len(r.links)
            client = r.client(post({"model": "m", member: value}, bearer(name)))
            assert (len(r.links) > asked) is passes
            if not passes:
                assert client.answer.status == 403 and member in client.answer.error["message"]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/v1beta/models/m:countTokens"]
)
@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "forbidden", "stream": true, "model": "m"}',
        b'{"model": "m", "Model": "forbidden"}',
        b'{"MODEL": "forbidden"}',
        b'{"model": "m", "mod\\u0065l": "forbidden"}',
        b'{"model": "m", "model\\u0000": "forbidden"}',
    ],
)
def test_a_body_that_could_name_two_models_is_refused(tmp_path: Path, path: str, body: bytes) -> None:
    keys = tmp_path / "keys"
    write(keys, line("alice", models=("m",)), line("bob"))
    with rig(keys_file=str(keys)) as r:
        for name in ("alice", "bob"):
            answer = r.client(post(body, bearer(name), "Content-Type: application/json", path=path)).answer
            assert answer.status == 400 and (b"could be taken" in answer.body or b"is there twice" in answer.body)
            undeclared = r.client(post(body, bearer("alice"), "Content-Type: text/plain", path=path)).answer
            assert undeclared.status == 403
        assert r.links == []


@pytest.mark.parametrize("fields", [(), (f"Authorization: Bearer {key('mallory')}",), ("Authorization: Bearer a.b.c",)])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/messages"),
        ("PUT", "/v1/anything"),
        ("GET", "/v1/models"),
        ("POST", "/v1/streams"),
        ("PUT", "/v1/streams/room"),
        ("POST", "/v1/streams/lookup"),
        ("POST", "/v1beta/models/m:generateContent"),
        ("POST", "/v1/nothing%2f"),
        ("POST", "/healthz"),
        ("POST", "/nothing"),
    ],
)
def test_who_has_no_right_is_refused_before_the_body(
    keys_file: Path, method: str, path: str, fields: tuple[str, ...]
) -> None:
    with rig(keys_file=str(keys_file)) as r:
        client = r.client(get(path, "Content-Length: 1000", *fields, method=method))
        assert client.answer.status in (401, 404, 405)
        client.send(b" " * 999)
        assert r.runtime.bodies_bytes == 0


def test_a_spent_limit_is_refused_before_the_body_is_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write(keys, line("alice", requests_per_minute=1))
    with rig(keys_file=str(keys)) as r:
        streaming(r, bearer("alice"), "Idempotency-Key: k")
        length = "Content-Length: 1000000"
        ask = lambda *fields: r.client(get("/v1/embeddings", bearer("alice"), length, *fields, method="POST"))  # noqa: E731
        assert ask().answer.status == 429
        assert ask("Idempotency-Key: another").answer.status == 429
        assert r.runtime.bodies_bytes == 0
        [stream] = r.runtime.hub
        joined = r.client(post(CHAT, bearer("alice"), "Idempotency-Key: k"))
        resumed = r.client(post(CHAT, bearer("alice"), f"Last-Event-ID: {stream.id}:0"))
        assert joined.raw.startswith(b"HTTP/1.1 200") and resumed.raw.startswith(b"HTTP/1.1 200")
        finish(r)


def test_a_refused_request_uses_no_limit_up(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write(keys, line("alice", requests_per_minute=1, models=("m",)))
    with rig(keys_file=str(keys)) as r:
        assert r.client(post({"model": "forbidden"}, bearer("alice"))).answer.status == 403
        assert r.client(post(b"{", bearer("alice"), "Content-Type: application/json")).answer.status == 400
        streaming(r, bearer("alice"))
        finish(r)


def test_an_expired_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("alice", expires_unix=1_000_000_000.0))
    assert format_expiry(1_000_000_000.0).startswith("2001")
    with rig(keys_file=str(path)) as r:
        assert r.client(post(CHAT, bearer("alice"))).answer.error["code"] == "expired_api_key"


# -- the key file


def test_a_revoked_key_is_refused_within_a_second(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        reader = streaming(r, bearer("alice"))
        write(keys_file, line("bob"))
        r.pass_time(credential_files.LOOK_EVERY_S + 0.5)
        assert r.client(post(CHAT, bearer("alice"))).answer.status == 401
        r.reply(chunk(event("a")))
        assert events_in(reader.answer.body)[0].seq == 1, "who is being served goes on"
        finish(r)
        streaming(r, bearer("bob"))
        finish(r)


def test_a_bad_key_file_changes_nothing_and_is_logged_once(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(keys_file=str(keys_file)) as r, logged(monkeypatch) as lines:
        write(keys_file, line("bob"), b"{oops\n")
        r.pass_time(5)
        told = [each for each in lines if "refused" in each["name"]]
        assert [each["error"].partition(": ")[2][:6] for each in told] == ["line 2"]
        assert r.client(post(CHAT, bearer("mallory"))).answer.status == 401
        streaming(r, bearer("alice"))
        finish(r)
        keys_file.unlink()
        r.pass_time(5)
        assert len([each for each in lines if "refused" in each["name"]]) == 2
        streaming(r, bearer("alice"))
        finish(r)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602])
def test_a_key_file_with_access_for_other_users_is_refused_at_start(keys_file: Path, mode: int) -> None:
    keys_file.chmod(mode)
    with pytest.raises(ConfigError, match="keys_file: .* has mode 06"), rig(keys_file=str(keys_file)):
        pass


def test_a_reload_takes_all_files_or_none(keys_file: Path, tmp_path: Path) -> None:
    import dataclasses

    with rig(keys_file=str(keys_file)) as r:
        worker, settings = r.worker, r.worker.settings
        secret = tmp_path / "short"
        write(secret, b"short")
        other = tmp_path / "other"
        write(other, line("carol"))
        wrong = dataclasses.replace(
            settings,
            keys_file=str(other),
            token_secret_file=str(secret),
            token_audience="a",
            head_timeout_s=1.0,
            upstreams=(UpstreamSettings(name="new", url="http://new.test:1"),),
        )
        upstreams = list(worker.upstreams)
        with pytest.raises(ConfigError, match="the secret has 5 bytes"):
            worker.reload(wrong)
        assert worker.settings is settings and list(worker.upstreams) == upstreams
        assert r.client(post(CHAT, bearer("carol"))).answer.status == 401
        worker.reload(dataclasses.replace(settings, keys_file=str(other)))
        streaming(r, bearer("carol"))
        finish(r)
        assert r.client(post(CHAT, bearer("alice"))).answer.status == 401
        worker.reload(dataclasses.replace(settings, keys_file=""))
        streaming(r)
        finish(r)


# -- limits


def limited(path: Path, **limits: int) -> dict[str, Any]:
    write(path, line("alice", **limits), line("bob"))
    return {"keys_file": str(path)}


def check_told_to_wait(answer: Answer) -> int:
    assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
    assert answer.error["type"] == "rate_limit_error"
    return int(answer.get("retry-after") or 0)


def test_requests_above_the_rate_of_a_key_are_told_how_long_to_wait(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", requests_per_minute=2)) as r:
        for _ in range(2):
            streaming(r, bearer("alice"))
            finish(r)
        wait_s = check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer)
        assert wait_s == 30
        streaming(r, bearer("bob"))
        finish(r)
        r.pass_time(wait_s)
        streaming(r, bearer("alice"))
        finish(r)


def test_the_upstreams_own_count_of_tokens_is_charged_to_the_key(tmp_path: Path) -> None:
    usage = b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":240,"total_tokens":241}}'
    with rig(**limited(tmp_path / "keys", tokens_per_minute=120)) as r:
        streaming(r, bearer("alice"))
        r.reply(chunk(event("a"), b"data: " + usage + b"\n\n", DONE) + LAST)
        r.pass_time(0.5)
        assert check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer) == 60
        r.pass_time(61)
        streaming(r, bearer("alice"))
        finish(r)


def test_tokens_of_an_answer_without_a_stream_are_charged_too(tmp_path: Path) -> None:
    answer = whole_answer(
        b'{"choices":[],"usage":{"completion_tokens":240}}', "200 OK", "Content-Type: application/json"
    )
    ask = post({"model": "m", "messages": []}, bearer("alice"))
    with rig(**limited(tmp_path / "keys", tokens_per_minute=120)) as r:
        client = r.client(ask)
        r.reply(answer)
        assert client.answer.status == 200
        assert check_told_to_wait(r.client(ask).answer) == 60


def ends_well(r: Rig, client: Client) -> None:
    r.reply(SSE_HEAD)
    finish(r)


def reader_leaves(r: Rig, client: Client) -> None:
    r.reply(SSE_HEAD)
    client.fin()


def reader_leaves_before(r: Rig, client: Client) -> None:
    client.reset()


def upstream_refuses(r: Rig, client: Client) -> None:
    r.reply(whole_answer(b"{}", "400 Bad Request"))


def upstream_is_no_stream(r: Rig, client: Client) -> None:
    r.reply(whole_answer(b"{}"))


def upstream_breaks_off(r: Rig, client: Client) -> None:
    r.reply(SSE_HEAD + chunk(event("a")))
    r.link.fin()
    r.turn()


def upstream_says_nothing(r: Rig, client: Client) -> None:
    r.link.fin()
    r.turn()


def times_out(r: Rig, client: Client) -> None:
    r.pass_time(r.runtime.settings.ttft_timeout_s + 1)


def is_deleted(r: Rig, client: Client) -> None:
    (stream,) = r.runtime.hub
    assert r.client(get(f"/v1/streams/{stream.id}", bearer("alice"), method="DELETE")).answer.status == 204


ENDS = [
    ends_well,
    reader_leaves,
    reader_leaves_before,
    upstream_refuses,
    upstream_is_no_stream,
    upstream_breaks_off,
    upstream_says_nothing,
    times_out,
    is_deleted,
]


@pytest.mark.parametrize("end", ENDS)
def test_any_end_of_a_stream_frees_its_place_among_the_keys_streams(tmp_path: Path, end: Any) -> None:
    with rig(**limited(tmp_path / "keys", streams_max=1)) as r:
        client = r.client(post(CHAT, bearer("alice")))
        check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer)
        end(r, client)
        assert r.worker.rights._accounts.of(r.worker.rights.keys._by_id["alice"]).streams_now == 0
        again = r.client(post(CHAT, bearer("alice")))
        assert again.raw == b"", "it was asked"
        ends_well(r, again)


def test_a_request_that_reached_no_upstream_frees_its_place_among_the_keys_streams(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", streams_max=1)) as r:
        r.refusing.add(1)
        for _ in range(3):
            assert r.client(post(CHAT, bearer("alice"))).answer.status == 502


def test_published_streams_count_among_the_streams_of_a_key(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", streams_max=1)) as r:
        assert r.client(get("/v1/streams/one", bearer("alice"), method="PUT")).answer.status == 201
        check_told_to_wait(r.client(get("/v1/streams/two", bearer("alice"), method="PUT")).answer)
        check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer)
        bad = r.client(post(b'{"log_bytes_max": 1}', bearer("bob"), path="/v1/streams"))
        assert bad.answer.status == 400
        end = post(b"", bearer("alice"), path="/v1/streams/one/events?seal=finished")
        assert r.client(end).answer.status == 200
        assert r.client(get("/v1/streams/two", bearer("alice"), method="PUT")).answer.status == 201
        r.client(get("/v1/streams/two", bearer("alice"), method="DELETE"))
        assert r.runtime.admission.status()["in_use"]["streams"] == 0


def test_an_answer_that_turns_out_to_be_a_stream_counts_among_the_keys_streams(tmp_path: Path) -> None:
    speech = post({"model": "m"}, bearer("alice"), path="/v1/audio/speech")
    with rig(**limited(tmp_path / "keys", streams_max=1)) as r:
        r.client(speech)
        r.reply(SSE_HEAD)
        first = r.link
        check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer)
        first.feed(chunk(event("a"), DONE) + LAST)
        r.turn()
        streaming(r, bearer("alice"))
        finish(r)


def test_a_list_of_models_costs_a_request_unless_it_is_known(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", requests_per_minute=2)) as r:
        for k in range(2):
            first, waiting = r.client(get("/v1/models", bearer("alice"))), r.client(get("/v1/models", bearer("alice")))
            r.reply(whole_answer(b'{"data": [{"id": "m"}]}'))
            known = r.client(get("/v1/models", bearer("alice")))
            assert [client.answer.status for client in (first, waiting, known)] == [200] * 3, k
            r.pass_time(4)
        check_told_to_wait(r.client(get("/v1/models", bearer("alice"))).answer)
        other = r.client(get("/v1/models", bearer("bob")))
        r.reply(whole_answer(b"{}", "500 Oops"))
        assert other.answer.status == 500
        r.pass_time(60)


REFUSED = {
    "too many streams": (429, post(CHAT, bearer("alice"))),
    "a wrong option": (400, post(CHAT, bearer("alice"), "X-Stream-Detach-Grace: soon")),
    "a wrong policy": (400, post(CHAT, bearer("alice"), "X-Stream-Policy: none")),
    "no such model": (404, post({**CHAT, "model": "none"}, bearer("alice"))),
    "another body": (422, post({**CHAT, "n": 2}, bearer("alice"), "Idempotency-Key: k")),
    "no upstream": (502, post({**CHAT, "stream": False, "model": "away"}, bearer("alice"))),
    "draining": (503, post({"model": "m"}, bearer("alice"))),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_a_refused_request_uses_up_no_limit(tmp_path: Path, cause: str) -> None:
    status, refused = REFUSED[cause]
    ups = (
        UpstreamSettings(name="up", url="http://up.test:1", models=("m",)),
        UpstreamSettings(name="away", url="http://away.test:2", models=("away",)),
    )
    with rig(**limited(tmp_path / "keys", streams_max=1, requests_per_minute=3), upstreams=ups) as r:
        r.refusing.add(2)
        running = r.client(post(CHAT, bearer("alice"), "Idempotency-Key: k"))
        r.reply(SSE_HEAD)
        up = r.link
        r.runtime.draining = cause == "draining"
        assert [r.client(refused).answer.status for _ in range(5)] == [status] * 5
        r.runtime.draining = False
        for _ in range(2):
            plain = r.client(post({"model": "m"}, bearer("alice")))
            r.reply(whole_answer(b"{}"))
            assert plain.answer.status == 200
        check_told_to_wait(r.client(post({"model": "m"}, bearer("alice"))).answer)
        up.feed(chunk(event("a"), DONE) + LAST)
        r.turn()
        assert running.answer.whole


@pytest.mark.parametrize("body", [{"model": "m"}, {"model": "m", "stream": 0}])
@pytest.mark.parametrize("is_rated", [True, False])
def test_a_stream_that_shows_itself_in_its_answer_is_refused_above_the_limit(
    tmp_path: Path, is_rated: bool, body: dict[str, Any]
) -> None:
    """The last line: whatever hid that a request asks for a stream, no key has more of them than its line says."""
    limits = {"streams_max": 1, **({"tokens_per_minute": 100} if is_rated else {})}
    speech = post(body, bearer("alice"), path="/v1/audio/speech")
    with rig(**limited(tmp_path / "keys", **limits)) as r:
        r.client(speech)
        r.reply(SSE_HEAD + chunk(event("a")))
        first = r.link
        second = r.client(speech)
        r.reply(SSE_HEAD + chunk(event("a")))
        check_told_to_wait(second.answer)
        assert second.answer.get("x-should-retry") == "false"
        assert r.link.closed and not first.closed
        first.feed(chunk(event("a"), DONE) + LAST)
        r.turn()


def test_an_answer_that_comes_too_late_and_is_no_stream_costs_its_tokens(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", tokens_per_minute=100), commit_after_s=1.0) as r:
        client = r.client(post(CHAT, bearer("alice")))
        r.pass_time(1.5)
        r.reply(whole_answer(b'{"usage":{"completion_tokens":240}}'))
        assert client.answer.status == 200
        check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer)


@pytest.mark.parametrize("usage", [b'data: {"choices":[],"usage":{"completion_tokens":240}}\n\n', event("a") * 240])
def test_events_for_a_request_that_asked_for_no_stream_cost_their_tokens(tmp_path: Path, usage: bytes) -> None:
    with rig(**limited(tmp_path / "keys", tokens_per_minute=100)) as r:
        client = r.client(post({"model": "m"}, bearer("alice")))
        r.reply(SSE_HEAD + chunk(event("a"), usage, DONE) + LAST)
        assert client.answer.body == event("a") + usage + DONE
        check_told_to_wait(r.client(post({"model": "m"}, bearer("alice"))).answer)


def answered_with_usage(r: Rig, ask: bytes) -> int:
    client = r.client(ask)
    if not client.raw:
        r.reply(whole_answer(b'{"usage":{"output_tokens":240,"completion_tokens":240}}'))
    return client.answer.status


@pytest.mark.parametrize(
    ("ask", "statuses"),
    [
        (get("/v1/responses/r1", bearer("alice")), [200, 200, 200]),
        (get("/v1/responses/r1", bearer("alice"), method="DELETE"), [200, 200, 200]),
        (post(b"", bearer("alice"), path="/v1/responses/r1/cancel"), [200, 200, 200]),
        (get("/v1/chat/completions/c1", bearer("alice")), [404, 404, 404]),
        (post({"metadata": {}}, bearer("alice"), path="/v1/chat/completions/c1"), [404, 404, 404]),
        (post({"model": "m"}, bearer("alice"), path="/v1/responses"), [200, 429, 429]),
        (post({"model": "m"}, bearer("alice"), path="/v1/other"), [200, 429, 429]),
    ],
)
def test_a_stored_answer_is_paid_for_once(tmp_path: Path, ask: bytes, statuses: list[int]) -> None:
    with rig(**limited(tmp_path / "keys", tokens_per_minute=100)) as r:
        r.worker.kept.makers.learn("r1", "alice", "up")
        assert [answered_with_usage(r, ask) for _ in range(3)] == statuses


def test_a_stored_stream_that_is_read_again_costs_no_tokens_and_is_a_stream(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", tokens_per_minute=2, streams_max=1)) as r:
        r.worker.kept.makers.learn("r1", "alice", "up")
        for _ in range(3):
            client = r.client(get("/v1/responses/r1?stream=true", bearer("alice")))
            r.reply(SSE_HEAD + chunk(*(event(f"{k}") for k in range(50))))
            check_told_to_wait(r.client(post(CHAT, bearer("alice"))).answer)
            r.reply(
                chunk(b'data: {"usage":{"output_tokens":900}}\n\n', b"event: response.completed\ndata: {}\n\n") + LAST
            )
            assert client.answer.whole


def test_a_conversation_takes_the_place_of_its_own_earlier_generation(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", streams_max=1)) as r:
        first = r.client(post(CHAT, bearer("alice"), "X-Conversation-Id: c"))
        r.reply(SSE_HEAD)
        check_told_to_wait(r.client(post(CHAT, bearer("alice"), "X-Conversation-Id: d")).answer)
        again = r.client(post(CHAT, bearer("alice"), "X-Conversation-Id: c"))
        assert again.raw == b"", "it was asked"
        ends_well(r, again)
        assert first.answer.status == 200 and r.runtime.counters.streams_ended[CloseReason.CANCELLED] == 1


# -- the streams of a key


def test_a_list_shows_only_the_askers_streams(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        for name in ("alice", "bob"):
            r.client(get(f"/v1/streams/of-{name}", bearer(name), method="PUT"))

        def shown(*fields: str, listener: str = "loopback") -> list[str]:
            answer = r.client(get("/v1/streams", *fields), listener=listener).answer
            return [stream["id"] for stream in json.loads(answer.body)["data"]]

        assert shown(bearer("alice")) == ["of-alice"]
        assert shown(bearer("bob")) == ["of-bob"]
        assert shown() == []
        assert shown(listener="admin") == ["of-alice", "of-bob"]
        for name in ("alice", "bob"):
            r.client(get(f"/v1/streams/of-{name}", bearer(name), method="DELETE"))


def test_each_principal_has_its_own_idempotency_keys(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        streaming(r, bearer("alice"), "Idempotency-Key: 1")
        alices = r.link
        other = r.client(post(CHAT | {"model": "other"}, bearer("bob"), "Idempotency-Key: 1"))
        assert other.raw == b"" and r.link is not alices, "neither joined nor told of another body"
        r.reply(SSE_HEAD)
        finish(r)
        alices.feed(chunk(DONE) + LAST)
        r.turn()


@pytest.mark.parametrize(
    ("fields", "listener", "status"),
    [
        ((), "loopback", 401),
        ((bearer("bob"),), "loopback", 403),
        ((bearer("alice"),), "loopback", 204),
        ((), "admin", 204),
    ],
)
def test_only_the_opener_and_the_admin_surface_may_stop_a_stream(
    keys_file: Path, fields: tuple[str, ...], listener: str, status: int
) -> None:
    with rig(keys_file=str(keys_file)) as r:
        streaming(r, bearer("alice"))
        (stream,) = r.runtime.hub
        found = r.client(get(f"/v1/streams/{stream.id}", *fields, method="DELETE"), listener=listener)
        assert found.answer.status == status
        assert (stream.reason is CloseReason.CANCELLED) is (status == 204)
        if status != 204:
            finish(r)


def test_a_private_stream_needs_a_key_and_a_public_stream_needs_none(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        r.client(get("/v1/streams/secret", bearer("alice"), method="PUT"))
        r.client(post({"public": True}, bearer("alice"), path="/v1/streams/open").replace(b"POST", b"PUT", 1))
        streaming(r, bearer("alice"))
        ours = next(stream.id for stream in r.runtime.hub if stream.id.startswith("s_"))

        def status(name: str, *fields: str) -> int:
            client = r.client(get(f"/v1/streams/{name}", "Accept: application/json", *fields))
            return client.answer.status

        assert [status("secret"), status("secret", bearer("bob"))] == [401, 200]
        assert [status("open"), status(ours)] == [200, 200], "public, and known by an id that nobody can guess"
        for name in ("secret", "open", ours):
            r.client(get(f"/v1/streams/{name}", bearer("alice"), method="DELETE"))


def test_a_key_reads_names_only_on_its_routes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("alice"), line("bob", routes=("/v1/chat/*",)))
    with rig(keys_file=str(path)) as r:
        r.client(get("/v1/streams/room", bearer("alice"), method="PUT"))
        assert r.client(get("/v1/streams/room", bearer("bob"))).answer.error["code"] == "route_not_allowed"
        assert r.client(get("/v1/streams/other", bearer("bob"), method="PUT")).answer.status == 403
        r.client(get("/v1/streams/room", bearer("alice"), method="DELETE"))


# -- tokens


def reading(r: Rig, path: str, *fields: str) -> Client:
    return r.client(get(path, *fields))


def opened(r: Rig, name: str) -> None:
    assert r.client(get(f"/v1/streams/{name}", method="PUT"), listener="admin").answer.status == 201
    assert r.client(post(b"hello", path=f"/v1/streams/{name}/events"), listener="admin").answer.status == 200


def stopped(r: Rig, name: str) -> None:
    for _ in range(2):
        r.client(get(f"/v1/streams/{name}", method="DELETE"), listener="admin")


@pytest.mark.parametrize("where", ["header", "cookie", "query"])
def test_a_token_reads_what_it_covers(tokens: dict[str, Any], where: str) -> None:
    with rig(**tokens) as r:
        opened(r, "room-1")

        def read(given: str) -> Client:
            if where == "query":
                return reading(r, f"/v1/streams/room-1?access_token={given}")
            field = f"Authorization: Bearer {given}" if where == "header" else f"Cookie: a=b; streamd_token={given}"
            return reading(r, "/v1/streams/room-1", field)

        reader = read(token(streams=["room-*"]))
        assert reader.answer.status == 200
        assert events_in(reader.answer.body)[0].data == b'{"delta": "hello"}' or b"hello" in reader.answer.body
        other = read(token(streams=["hall-*"])).answer
        assert (other.status, other.error["code"]) == (403, "wrong_token")
        assert read(token(publish=["room-*"])).answer.status == 403
        assert read(token(streams=["room-*"], aud="other")).answer.status == 401
        assert read(token(streams=["room-*"], exp=1)).answer.status == 401
        assert read(token(streams=["room-*"])[:-4] + "AAAA").answer.status == 401
        stopped(r, "room-1")


def test_without_a_token_only_the_owner_reads(tokens: dict[str, Any], keys_file: Path) -> None:
    with rig(**tokens, keys_file=str(keys_file)) as r:
        streaming(r, bearer("alice"))
        (stream,) = r.runtime.hub
        path = f"/v1/streams/{stream.id}"
        assert reading(r, path).answer.error["code"] == "token_required"
        assert reading(r, path, bearer("bob")).answer.status == 401
        assert reading(r, path, bearer("alice")).answer.status == 200
        finish(r)


def test_an_anonymous_request_owns_no_stream(tokens: dict[str, Any]) -> None:
    """Without a key file all requests without a credential are `anonymous`: none may pass as the owner of another's."""
    with rig(**tokens) as r:
        streaming(r)
        (stream,) = r.runtime.hub
        assert reading(r, f"/v1/streams/{stream.id}").answer.status == 401
        assert r.client(post(CHAT, f"Last-Event-ID: {stream.id}:0")).answer.status == 401
        finish(r)


def test_expiry_ends_the_reader_and_not_the_stream(tokens: dict[str, Any]) -> None:
    with rig(**tokens) as r:
        r.runtime.unix_time = lambda: 1_700_000_000.0 + r.loop.time()
        opened(r, "room")
        stays = token(streams=["room"], exp=int(r.runtime.unix_time()) + 100)
        goes = token(streams=["room"], exp=int(r.runtime.unix_time()) + 5)
        reader = reading(r, f"/v1/streams/room?access_token={goes}")
        other = reading(r, f"/v1/streams/room?access_token={stays}")
        r.pass_time(4)
        assert not reader.gone
        r.pass_time(2)
        assert reader.gone and not other.gone
        last = events_in(reader.answer.body)[-1]
        assert last.name == "reconnect" and "expired" in last.json["error"]["message"]
        assert last.json["last_id"].endswith(":1")
        assert r.closed[CloseReason.TOKEN_EXPIRED] == 1
        assert r.client(post(b"more", path="/v1/streams/room/events"), listener="admin").answer.status == 200
        assert b"more" in other.answer.body
        stopped(r, "room")
        refused = reading(r, f"/v1/streams/room?access_token={goes}").answer
        assert refused.status in (401, 404)


def test_expiry_ends_a_reader_that_was_stuck_when_it_came(tokens: dict[str, Any]) -> None:
    with rig(**tokens, stall_timeout_s=0.0) as r:
        r.runtime.unix_time = lambda: 1_700_000_000.0 + r.loop.time()
        opened(r, "room")
        given = token(streams=["room"], exp=int(r.runtime.unix_time()) + 30)
        reader = r.client(get(f"/v1/streams/room?access_token={given}"), capacity=300)
        r.client(post(b"x" * 2000, path="/v1/streams/room/events"), listener="admin")
        r.pass_time(60)
        reader.take()
        r.pass_time(1)
        assert r.closed[CloseReason.TOKEN_EXPIRED] == 1
        stopped(r, "room")


def test_a_publish_token_opens_feeds_and_stops_only_the_names_that_it_covers(
    tokens: dict[str, Any], keys_file: Path
) -> None:
    with rig(**tokens, keys_file=str(keys_file)) as r:
        given = token(publish=["room-*"], streams=["room-*"])
        as_bearer = f"Authorization: Bearer {given}"
        assert r.client(get("/v1/streams/hall", as_bearer, method="PUT")).answer.status == 403
        assert r.client(get("/v1/streams/room-1", method="PUT")).answer.status == 401
        cookie = f"Cookie: streamd_token={given}"
        assert r.client(get("/v1/streams/room-1", cookie, method="PUT")).answer.status == 401, "any page can send one"
        assert r.client(get("/v1/streams/room-1", as_bearer, method="PUT")).answer.status == 201
        events = "/v1/streams/room-1/events"
        only_reads = f"Authorization: Bearer {token(streams=['room-*'])}"
        assert r.client(post(b"a", only_reads, path=events)).answer.status == 403
        others = r.client(post(b"a", bearer("alice"), path=events)).answer
        assert others.status == 404, "another key's, and a key alone reads nothing: it isn't told that the name is open"
        assert r.client(post(b"a", as_bearer, path=events)).answer.status == 200
        assert r.client(get("/v1/streams/room-1", only_reads, method="DELETE")).answer.status == 403
        assert r.client(get("/v1/streams/room-1", as_bearer, method="DELETE")).answer.status == 204


def test_a_query_token_is_in_no_log_and_goes_nowhere(tokens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = token(streams=["*"])
    with rig(**tokens) as r, logged(monkeypatch) as lines:
        opened(r, "room")
        reading(r, f"/v1/streams/room?access_token={given}").fin()
        for name in ("access_token", "access%5Ftoken", "a=b&access_token", "a;access_token"):
            r.client(get(f"/v1/embeddings?{name}={given}&c=d"))
            r.reply(whole_answer(b"{}"))
        assert all(given.encode() not in link.sent for link in r.links)
        assert any(b"c=d" in link.sent for link in r.links)
        assert (
            len(lines) >= 6
            and given not in repr(lines)
            and "access" not in repr([each["path"] for each in lines if "path" in each])
        )
        stopped(r, "room")


def test_a_token_key_file_is_read_again(tokens: dict[str, Any]) -> None:
    with rig(**tokens) as r:
        opened(r, "room")
        given = token(streams=["room"])
        path = Path(tokens["token_secret_file"])
        write(path, b"another secret of thirty-two bytes!")
        r.pass_time(2)
        assert reading(r, f"/v1/streams/room?access_token={given}").answer.status == 401
        write(path, b"short")
        r.pass_time(2)
        write(path, SECRET.encode())
        r.pass_time(2)
        assert reading(r, f"/v1/streams/room?access_token={given}").answer.status == 200
        stopped(r, "room")


# -- pages of other origins

PAGE = "https://chat.example"
ORIGIN = f"Origin: {PAGE}"
CORS = {"cors_origins": (PAGE,)}
ASKS = (ORIGIN, "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: last-event-id, x-stainless-os")


def allowed(answer: Answer) -> str | None:
    return answer.get("access-control-allow-origin")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/streams/x", "/nothing/here", "/healthz"])
def test_a_preflight_is_answered_before_any_key_is_asked_for(keys_file: Path, path: str) -> None:
    with rig(**CORS, keys_file=str(keys_file)) as r:
        answer = r.client(get(path, *ASKS, method="OPTIONS")).answer
        assert (answer.status, allowed(answer)) == (204, PAGE)
        assert answer.get("access-control-allow-headers") == "last-event-id, x-stainless-os"
        assert answer.get("access-control-allow-methods") == "GET, POST, PUT, DELETE, HEAD"
        assert answer.get("access-control-max-age") == "7200"
        assert answer.get("access-control-allow-credentials") is None
        other = r.client(get(path, "Origin: https://evil.example", *ASKS[1:], method="OPTIONS")).answer
        assert (other.status, allowed(other)) == (204, None)
        assert r.dialled == []


@pytest.mark.parametrize(
    "origin", ["null", "https://chat.example.evil", "http://chat.example", "https://chat.example:444"]
)
def test_a_page_of_another_origin_gets_no_cors_header(origin: str) -> None:
    with rig(**CORS, cors_credentials=True) as r:
        answer = r.client(get("/healthz", f"Origin: {origin}")).answer
        assert (allowed(answer), answer.get("vary")) == (None, "Origin")
        assert answer.get("access-control-allow-credentials") is None


def test_every_answer_and_every_error_carries_the_cors_headers(keys_file: Path) -> None:
    with rig(**CORS, cors_credentials=True, keys_file=str(keys_file)) as r:
        reader = streaming(r, bearer("alice"), ORIGIN)
        refused = [
            r.client(post(CHAT, ORIGIN)),
            r.client(get("/nothing", ORIGIN)),
            r.client(get("/healthz", ORIGIN, method="BREW")),
            r.client(get("/v1/streams/none", ORIGIN)),
            r.client(get("/v1/x", ORIGIN, "Connection: Upgrade", "Upgrade: websocket")),
        ]
        assert [each.answer.status for each in refused] == [401, 404, 405, 401, 426]
        for client in (reader, *refused):
            answer = client.answer
            assert (allowed(answer), answer.get("access-control-allow-credentials")) == (PAGE, "true")
            assert (answer.get("vary") or "").startswith("Origin")
            assert answer.get("access-control-expose-headers") == "X-Stream-Id, X-Request-Id, X-Upstream, Retry-After"
        finish(r)


@pytest.mark.parametrize("settings", [CORS, {}])
def test_cors_headers_of_an_upstream_are_not_passed_on(settings: dict[str, Any]) -> None:
    with rig(**settings) as r:
        client = r.client(get("/v1/embeddings", ORIGIN))
        theirs = ("Access-Control-Allow-Origin: *", "Access-Control-Expose-Headers: x-secret", "X-Other: kept")
        r.reply(whole_answer(b"{}", "200 OK", *theirs))
        answer = client.answer
        assert allowed(answer) == (PAGE if settings else None)
        assert "x-secret" not in (answer.get("access-control-expose-headers") or "")
        assert answer.get("x-other") == "kept"


FOREIGN = (
    "Set-Cookie: streamd_token=evil; Path=/",
    "Strict-Transport-Security: max-age=1",
    "X-Accel-Redirect: /etc/passwd",
    "Access-Control-Allow-Private-Network: true",
)


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "302 Found", "204 No Content"])
@pytest.mark.parametrize("passed", [(), ("Set-Cookie", "x-accel-redirect")])
def test_an_upstreams_word_about_the_origin_goes_no_further_unless_it_is_named(
    status: str, passed: tuple[str, ...]
) -> None:
    upstream = UpstreamSettings(name="up", url="http://up.test:1", pass_fields=passed)
    with rig(upstreams=(upstream,)) as r:
        client = r.client(get("/v1/files"))
        head = "\r\n".join((f"HTTP/1.1 {status}", *FOREIGN, "X-Other: kept", "Content-Length: 0", "", ""))
        r.reply(head.encode() if "204" not in status else head.replace("Content-Length: 0\r\n", "").encode())
        names = {
            field.partition(":")[0].lower() for field in FOREIGN if client.answer.get(field.partition(":")[0].lower())
        }
        assert names == {name.lower() for name in passed}
        assert client.answer.get("x-other") == "kept"


def test_no_word_of_a_client_about_proxies_goes_upstream() -> None:
    names = ("For", "Host", "Proto", "Port", "Prefix", "User", "Client-Cert", "Anything")
    fields = [f"X-Forwarded-{name}: evil" for name in names] + [
        "X_Forwarded_User: evil",
        "Forwarded: evil",
        "Cookie: evil",
    ]
    with rig() as r:
        r.client(post({"model": "m"}, *fields, "X-Else: kept"))
        assert b"evil" not in r.link.sent and b"kept" in r.link.sent
        r.reply(whole_answer(b"{}"))


def test_without_cors_origins_no_answer_has_a_cors_header() -> None:
    with rig() as r:
        for wire in (get("/healthz", ORIGIN), get("/v1/x", *ASKS, method="OPTIONS")):
            answer = r.client(wire).answer
            assert (allowed(answer), answer.get("vary")) == (None, None)


# -- proxies and addresses; the transports' peer is 192.0.2.1

BEHIND = {"trusted_proxies": ("192.0.2.0/24", "10.0.0.0/8")}


@pytest.mark.parametrize(
    ("settings", "fields", "peer"),
    [
        ({}, ("X-Forwarded-For: 198.51.100.7",), "192.0.2.1:40000"),
        (BEHIND, (), "192.0.2.1"),
        (BEHIND, ("X-Forwarded-For: 198.51.100.7",), "198.51.100.7"),
        (BEHIND, ("X-Forwarded-For: 6.6.6.6, 198.51.100.7, 10.1.1.1",), "198.51.100.7"),
        (BEHIND, ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 198.51.100.7"), "198.51.100.7"),
        (BEHIND, ("Forwarded: for=198.51.100.7",), "192.0.2.1"),
        (BEHIND | {"forwarded_header": "forwarded"}, ('Forwarded: for="[2001:db8::7]:1"',), "2001:db8::7"),
        (BEHIND | {"forwarded_header": "forwarded"}, ("X-Forwarded-For: 6.6.6.6",), "192.0.2.1"),
    ],
)
def test_the_log_names_the_client_that_a_trusted_proxy_reports(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fields: tuple[str, ...], peer: str
) -> None:
    with rig(**settings) as r, logged(monkeypatch) as lines:
        r.client(get("/healthz", *fields))
        assert [each["peer"] for each in lines] == [peer]


def test_a_request_through_a_proxy_on_this_machine_is_not_local() -> None:
    with rig(**BEHIND) as r:
        assert r.client(get("/status")).answer.status == 200
        assert r.client(get("/status", "X-Forwarded-For: 198.51.100.7")).answer.status == 404


@pytest.mark.parametrize("path", ["/status", "/metrics"])
@pytest.mark.parametrize("value", ["unknown", "_hidden", "", "198.51.100.7, unknown"])
@pytest.mark.parametrize(("peer", "trusted"), [("192.0.2.1", "192.0.2.0/24"), ("127.0.0.1", "127.0.0.1"), ("", "unix")])
def test_a_client_that_its_proxy_hides_is_not_local(path: str, value: str, peer: str, trusted: str) -> None:
    with rig(trusted_proxies=(trusted,)) as r:
        client = Client(r)
        client.transport.peer = (peer, 4) if peer else ""
        client.send(get(path) + get(path, f"X-Forwarded-For: {value}"))
        assert client.statuses == [200, 404], "the proxy itself, and a client of its"


def test_a_client_behind_the_proxy_protocol_without_an_address_is_not_local() -> None:
    from streamd.net.origin import UNNAMED

    with rig(trusted_proxies=("127.0.0.1",), proxy_protocol=True) as r:
        for remote, status in ((None, 200), (UNNAMED, 404), (("198.51.100.7", 5), 404)):
            client = Client(r)
            client.transport.peer = ("127.0.0.1", 4)
            client.connection.arrived(remote)
            client.send(get("/status"))
            assert client.answer.status == status


def test_connections_above_the_limit_of_an_address_are_refused() -> None:
    with rig(conns_per_address_max=2) as r:
        first, second = r.client(), r.client()
        third = r.client()
        answer = third.answer
        assert (answer.status, answer.error["code"]) == (429, "too_many_connections")
        assert 2 <= int(answer.get("retry-after") or 0) <= 12
        second.reset()
        fourth = r.client(get())
        assert fourth.answer.status == 200 and first.raw == b""
        for client in (first, third, fourth):
            client.reset()
        assert len(r.runtime.admission.addresses) == 0
        assert r.runtime.admission.refused()["address"] == 1


def test_connections_of_an_address_without_a_request_have_a_limit_of_their_own() -> None:
    with rig(conns_opening_per_address_max=2) as r:
        slow = r.client(b"GET / HT")
        quick = [r.client(get()) for _ in range(5)]
        assert [client.answer.status for client in quick] == [200] * 5
        body = r.client(post(b"x" * 10)[:-1])
        assert r.client(get()).answer.status == 429, "a head alone is no request"
        body.send(b"x")
        r.reply(whole_answer(b"{}"))
        assert r.client(get()).answer.status == 200
        slow.reset()
        for client in quick:
            client.reset()
        r.turn()
        assert len(r.runtime.gates._opening) == 0


def test_behind_a_proxy_requests_count_by_the_client_that_it_names() -> None:
    with rig(**BEHIND, conns_per_address_max=1) as r:
        field = "X-Forwarded-For: 198.51.100.7"
        reader = streaming(r, field)
        assert r.client(get("/healthz", field)).answer.status == 429
        assert r.client(get("/healthz", "X-Forwarded-For: 198.51.100.8")).answer.status == 200
        assert r.client(get()).answer.status == 200, "the proxy itself"
        finish(r)
        assert r.client(get("/healthz", field)).answer.status == 200
        assert not reader.gone
        assert len(r.runtime.admission.addresses) == 0


def test_limits_may_change_while_connections_are_open() -> None:
    import dataclasses

    with rig() as r:
        uncounted = r.client()
        r.runtime.reload(dataclasses.replace(r.runtime.settings, conns_per_address_max=1))
        counted = r.client()
        assert r.client().answer.status == 429
        r.runtime.reload(dataclasses.replace(r.runtime.settings, conns_per_address_max=0))
        assert r.client(get()).answer.status == 200
        for client in (uncounted, counted):
            client.reset()
        assert len(r.runtime.admission.addresses) == 0


# -- streams of another principal


def test_a_sealed_name_can_be_opened_again_only_by_its_opener(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        put = "/v1/streams/room"
        assert r.client(get(put, bearer("alice"), method="PUT")).answer.status == 201
        assert r.client(post(b"", bearer("alice"), path=f"{put}/events?seal=finished")).answer.status == 200
        taken = r.client(get(put, bearer("bob"), method="PUT")).answer
        assert (taken.status, taken.error["code"]) == (403, "not_the_owner")
        assert r.client(get(put, bearer("alice"), method="PUT")).answer.status == 201
        r.client(get(put, bearer("alice"), method="DELETE"))


def test_a_post_that_resumes_needs_the_right_to_read_the_stream(tokens: dict[str, Any], keys_file: Path) -> None:
    with rig(**tokens, keys_file=str(keys_file)) as r:
        streaming(r, bearer("alice"))
        (stream,) = r.runtime.hub
        resume = f"Last-Event-ID: {stream.id}:0"
        refused = r.client(post(CHAT, bearer("bob"), resume)).answer
        assert (refused.status, refused.error["code"]) == (401, "token_required")
        again = r.client(post(CHAT, bearer("alice"), resume))
        finish(r)
        assert again.answer.status == 200 and again.answer.whole


def test_a_stream_above_the_limit_of_its_key_takes_nothing_from_admission(tmp_path: Path) -> None:
    with rig(**limited(tmp_path / "keys", streams_max=1)) as r:
        running = r.client(post(CHAT, bearer("alice")))
        before = r.runtime.admission.status()["in_use"]
        refused = r.client(post(CHAT, bearer("alice"), "Connection: close"))
        check_told_to_wait(refused.answer)
        refused.fin()
        assert r.runtime.admission.status()["in_use"] == before
        ends_well(r, running)


# -- names that are nobody else's business

UNLIKE = ("date", "x-request-id")  # fields that differ between two answers to the same request


def shown(client: Client) -> list[tuple[int, tuple[tuple[bytes, bytes], ...], bytes]]:
    """All that a client sees of its answers."""
    kept = [tuple(field for field in each.head.headers if field[0].decode() not in UNLIKE) for each in client.answers]
    return [(each.status, fields, each.body) for each, fields in zip(client.answers, kept, strict=True)]


@pytest.fixture
def strangers(tmp_path: Path) -> dict[str, Any]:
    """A key file with an owner and keys that may not read its streams, and a secret for tokens."""
    keys, secret = tmp_path / "strangers", tmp_path / "secret"
    write(
        keys,
        line("owner"),
        line("chatter", routes=("/v1/chat/*",)),
        line("writer", routes=("/v1/streams/*/events",)),
        line("late", expires_unix=1_000_000_000.0),
    )
    write(secret, SECRET.encode())
    return {"keys_file": str(keys), "token_secret_file": str(secret), "token_audience": "rooms", "token_leeway_s": 0.0}


CREDENTIALS: dict[str, tuple[str, ...]] = {
    "none": (),
    "a wrong key": (f"Authorization: Bearer {key('mallory')}",),
    "an expired key": (bearer("late"),),
    "a key without the route": (bearer("chatter"),),
    "a key with a route to write alone": (bearer("writer"),),
    "a wrong token": ("Authorization: Bearer e30.e30.AAAA",),
    "an expired token": (f"Authorization: Bearer {token(streams=['*'], publish=['*'], exp=1_000_000_000)}",),
    "a token for other names": (f"Authorization: Bearer {token(streams=['hall'], publish=['hall'])}",),
    "a token for other names in a cookie": (f"Cookie: streamd_token={token(streams=['hall'])}",),
}
ASKED: list[tuple[str, str, tuple[str, ...]]] = [
    ("GET", "/v1/streams/{}", ()),
    ("HEAD", "/v1/streams/{}", ()),
    ("GET", "/v1/streams/{}", ("Accept: application/json",)),
    ("GET", "/v1/streams/{}", ("Accept: text/event-stream",)),
    ("GET", "/v1/streams/{}?from=7", ()),
    ("GET", "/v1/streams/{}?from=oops", ()),
    ("GET", "/v1/streams/{}?wait=oops", ()),
    ("GET", "/v1/streams/{}", ("Last-Event-ID: room:abcdef:1",)),
    ("GET", "/v1/streams/{}?last_event_id=room:abcdef:1", ()),
    ("DELETE", "/v1/streams/{}", ()),
    ("POST", "/v1/streams/{}/events", ("Content-Length: 0",)),
    ("PUT", "/v1/streams/{}/events?seal=finished", ("Content-Length: 0",)),
    ("POST", "/v1/streams/{}/events", ("Content-Length: 0", "Expected-Seq: 7")),
    ("POST", "/v1/streams/{}/events", ("Content-Length: 0", "Content-Type: image/png")),
    ("POST", "/v1/chat/completions", ("Content-Length: 0", "Last-Event-ID: {}:abcdef:1")),
    ("POST", "/v1/chat/completions?last_event_id={}:abcdef:1", ("Content-Length: 0",)),
]


def asked(r: Rig, name: str, method: str, path: str, fields: tuple[str, ...]) -> Client:
    client = r.client()
    client.methods = (method,)
    client.send(get(path.format(name), *(field.replace("{}", name) for field in fields), method=method))
    return client


@pytest.mark.parametrize("auth", ["key", "token"])
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_a_name_that_is_open_looks_like_any_other_to_a_client_without_the_right(
    strangers: dict[str, Any], auth: str, credential: str
) -> None:
    with rig(**strangers, streams_auth=auth) as r:
        assert r.client(get("/v1/streams/room", bearer("owner"), method="PUT")).answer.status == 201
        assert r.client(post(b"secret", bearer("owner"), path="/v1/streams/room/events")).answer.status == 200
        for method, path, fields in ASKED:
            there, not_there = (
                asked(r, name, method, path, (*CREDENTIALS[credential], *fields)) for name in ("room", "moor")
            )
            assert shown(there) == shown(not_there), (method, path, fields)
            assert there.answers and b"secret" not in there.raw, (method, path, fields)
        r.client(get("/v1/streams/room", bearer("owner"), method="DELETE"))


@pytest.mark.parametrize("credential", ["none", "a wrong token", "an expired token", "a token for other names"])
def test_a_reader_without_the_right_waits_for_a_name_that_is_open_as_for_any_other(
    strangers: dict[str, Any], credential: str
) -> None:
    with rig(**strangers) as r:
        r.client(get("/v1/streams/room", bearer("owner"), method="PUT"))
        waiting = [
            r.client(get(f"/v1/streams/{name}?wait=5", *CREDENTIALS[credential])) for name in ("room", "moor", "later")
        ]
        r.pass_time(2)
        r.client(get("/v1/streams/later", bearer("owner"), method="PUT"))
        assert [client.raw for client in waiting] == [b""] * 3, "it is told when a name is opened"
        r.pass_time(2.5)
        assert [client.raw for client in waiting] == [b""] * 3
        r.pass_time(1)
        first, *others = map(shown, waiting)
        assert first[0][0] in (401, 403) and others == [first] * 2
        for name in ("room", "later"):
            r.client(get(f"/v1/streams/{name}", bearer("owner"), method="DELETE"))


def test_a_reader_without_a_key_that_waits_gets_the_stream_when_it_is_opened_as_public(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        waiting = r.client(get("/v1/streams/room?wait=5"))
        body = post({"public": True}, bearer("alice"), path="/v1/streams/room")
        assert r.client(body.replace(b"POST", b"PUT", 1)).answer.status == 201
        assert waiting.answers[0].status == 200
        r.client(get("/v1/streams/room", bearer("alice"), method="DELETE"))


def test_the_routes_of_a_key_hold_however_a_stream_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("owner"), line("chatter", routes=("/v1/chat/*",)))
    with rig(keys_file=str(path)) as r:
        r.client(get("/v1/streams/room", bearer("owner"), method="PUT"))
        (stream,) = r.runtime.hub
        position = f"room:{stream.epoch}:0"
        for wire in (
            get("/v1/streams/room", bearer("chatter")),
            get("/v1/streams/%72oom", bearer("chatter")),
            post(CHAT, bearer("chatter"), f"Last-Event-ID: {position}"),
            post(CHAT, bearer("chatter"), path=f"/v1/chat/completions?last_event_id={position}"),
        ):
            answer = r.client(wire).answer
            assert (answer.status, answer.error["code"]) == (403, "route_not_allowed")
        assert r.dialled == []
        r.client(get("/v1/streams/room", bearer("owner"), method="DELETE"))


# -- rights that end while a body comes


def chunked(path: str, *fields: str) -> bytes:
    return get(path, *fields, "Content-Type: application/x-ndjson", "Transfer-Encoding: chunked", method="POST")


@pytest.mark.parametrize("credential", ["token", "key"])
def test_an_open_body_publishes_no_more_once_its_token_or_key_has_expired(
    tmp_path: Path, tokens: dict[str, Any], credential: str
) -> None:
    path = tmp_path / "keys"
    write(path, line("late", expires_unix=1_700_001_010.0))
    with rig(**tokens | {"streams_auth": "key", "keys_file": str(path)}) as r:
        r.runtime.unix_time = lambda: 1_700_000_000.0 + r.loop.time()  # the rig's clock begins at 1000
        given = token(publish=["room"], streams=["room"], exp=1_700_001_010)
        field = bearer("late") if credential == "key" else f"Authorization: Bearer {given}"
        code = "expired_api_key" if credential == "key" else "token_expired"
        assert r.client(get("/v1/streams/room", field, method="PUT")).answer.status == 201
        (stream,) = r.runtime.hub
        silent = r.client(chunked("/v1/streams/room/events", field) + chunk(b'{"n":1}\n'))
        speaking = r.client(chunked("/v1/streams/room/events", field) + chunk(b'{"n":2}\n'))
        whole = r.client(post(b"x" * 10, field, path="/v1/streams/room/events")[:-1])
        r.loop._jumping.now = 1010.0
        speaking.transport.feed(chunk(b'{"n":3}\n'))  # before any sweep
        whole.transport.feed(b"x")
        assert stream.events == 2
        r.pass_time(0.6)
        for client in (silent, speaking, whole):
            assert (client.answer.status, client.answer.error["code"]) == (401, code)
        assert stream.events == 2
        r.client(get("/v1/streams/room", method="DELETE"), listener="admin")


def test_a_revoked_key_publishes_no_more_of_an_open_body(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        r.client(get("/v1/streams/room", bearer("alice"), method="PUT"))
        (stream,) = r.runtime.hub
        sender = r.client(chunked("/v1/streams/room/events", bearer("alice")) + chunk(b'{"n":1}\n'))
        write(keys_file, line("bob"))
        r.pass_time(credential_files.LOOK_EVERY_S + 0.5)
        sender.send(chunk(b'{"n":2}\n'))
        assert (sender.answer.status, sender.answer.error["code"], stream.events) == (401, "invalid_api_key", 1)
        r.client(get("/v1/streams/room", method="DELETE"), listener="admin")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/streams/lookup", "/v1/streams"])
def test_a_key_that_expires_while_its_body_comes_opens_nothing(tmp_path: Path, path: str) -> None:
    keys = tmp_path / "keys"
    write(keys, line("late", expires_unix=1_700_001_005.0))
    with rig(keys_file=str(keys)) as r:
        r.runtime.unix_time = lambda: 1_700_000_000.0 + r.loop.time()
        wire = post(b"{}", bearer("late"), "Content-Type: application/json", path=path)
        client = r.client(wire[:-1])
        r.pass_time(6)
        client.send(wire[-1:])
        assert (client.answer.status, client.answer.error["code"]) == (401, "expired_api_key")
        assert r.dialled == []


# -- models that a path or a query names


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/{}"),
        ("HEAD", "/v1/models/{}"),
        ("DELETE", "/v1/models/{}"),
        ("POST", "/v1/models/{}/unload"),
        ("POST", "/v1/engines/{}/completions"),
        ("POST", "/v1/Engines/{}/chat/completions"),
        ("GET", "/v1/%6dodels/{}"),
        ("GET", "/v1beta/models/{}"),
        ("POST", "/v1beta/models/{}:generateContent"),
        ("GET", "/v1/realtime?model={}"),
        ("GET", "/v1/models/allowed?model={}"),
    ],
)
def test_a_model_in_the_path_is_checked_as_in_a_body(tmp_path: Path, method: str, path: str) -> None:
    keys = tmp_path / "keys"
    write(keys, line("alice", models=("allowed",)))
    with rig(keys_file=str(keys)) as r:

        def asked(model: str) -> Client:
            target = path.format(model)
            client = r.client()
            client.methods = (method,)
            if method == "POST":
                client.send(post({"model": "allowed"}, bearer("alice"), path=target))
            else:
                client.send(get(target, bearer("alice"), method=method))
            return client

        assert asked("forbidden").answer.status == 403
        assert asked("%66orbidden").answer.status == 403
        assert r.dialled == []
        allowed = asked("allowed")
        r.reply(whole_answer(b"{}"))
        assert allowed.answer.status == 200


# -- pages in a browser on this machine


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/drain"), ("GET", "/streams"), ("GET", "/status"), ("POST", "/v1/chat/completions")]
)
@pytest.mark.parametrize("peer", [("127.0.0.1", 40000), ""])
@pytest.mark.parametrize(
    "fields",
    [
        ("Origin: https://evil.example",),
        ("Origin: null",),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site", "Origin: http://streamd.localhost"),
    ],
)
def test_the_admin_surface_does_nothing_for_a_page_of_another_origin(
    method: str, path: str, peer: Any, fields: tuple[str, ...]
) -> None:
    with rig() as r:
        client = Client(r, listener="admin")
        client.transport.peer = peer
        client.send(get(path, *fields, "Content-Length: 0", method=method))
        assert (client.answer.status, client.answer.error["code"]) == (403, "cross_origin")
        assert r.worker.draining is None and r.dialled == []


@pytest.mark.parametrize(
    "fields",
    [(), ("Sec-Fetch-Site: none",), ("Sec-Fetch-Site: same-origin", "Origin: http://streamd.localhost")],
)
def test_the_admin_surfaces_own_page_and_programs_are_served(fields: tuple[str, ...]) -> None:
    with rig() as r:
        assert r.client(get("/status", *fields), listener="admin").answer.status == 200


HERE = ("127.0.0.1", 40000)
HOSTS: list[tuple[str, Any, str, dict[str, Any], int]] = [
    ("loopback", HERE, "localhost:8080", {}, 200),
    ("loopback", HERE, "127.0.0.1", {}, 200),
    ("loopback", HERE, "[::1]:8080", {}, 200),
    ("loopback", HERE, "evil.example:8080", {}, 421),
    ("loopback", HERE, "streamd", {}, 421),
    ("loopback", ("::1", 4), "evil.example", {}, 421),
    ("loopback", HERE, "llm.home.example", {"hosts": ("LLM.home.example",)}, 200),
    ("loopback", HERE, "evil.example", {"hosts": ("llm.home.example",)}, 421),
    ("loopback", HERE, "evil.example", {"insecure_public": True}, 200),
    ("loopback", HERE, "evil.example", {"trusted_proxies": ("127.0.0.1",)}, 200),
    ("loopback", "", "evil.example", {}, 200),  # a Unix socket
    ("public", HERE, "evil.example", {}, 200),
    ("admin", HERE, "localhost", {}, 200),
    ("admin", HERE, "evil.example", {}, 421),
    ("admin", HERE, "evil.example", {"insecure_public": True}, 421),
    ("admin", HERE, "evil.example", {"trusted_proxies": ("127.0.0.1",)}, 421),
    ("admin", HERE, "llm.home.example", {"hosts": ("llm.home.example",)}, 200),
    ("metrics", HERE, "127.0.0.1:9464", {}, 200),
    ("metrics", HERE, "evil.example", {}, 421),
    ("metrics", HERE, "evil.example", {"insecure_public": True}, 421),
    ("metrics", HERE, "evil.example", {"trusted_proxies": ("127.0.0.1",)}, 421),
    ("metrics", HERE, "llm.home.example", {"hosts": ("llm.home.example",)}, 200),
    ("metrics", ("192.0.2.1", 4), "llm.home.example", {"metrics_public": True}, 200),
    ("admin", "", "streamd", {}, 200),
    ("admin", "", "evil.example", {}, 421),
    ("admin", "", "llm.home.example", {"hosts": ("llm.home.example",)}, 200),
]


@pytest.mark.parametrize(("listener", "peer", "host", "settings", "status"), HOSTS)
def test_a_name_that_may_lead_here_from_anywhere_is_not_served_without_keys(
    listener: str, peer: Any, host: str, settings: dict[str, Any], status: int
) -> None:
    with rig(**settings) as r:
        for path in ("/healthz", "/metrics" if listener == "metrics" else "/v1/streams"):
            client = Client(r, listener=listener)
            client.transport.peer = peer
            client.send(get(path).replace(b"streamd.localhost", host.encode()))
            assert client.answer.status == status
            assert status == 200 or "`hosts`" in client.answer.error["message"]


def test_with_keys_any_name_is_served_but_not_where_no_key_is_asked_for(keys_file: Path) -> None:
    with rig(keys_file=str(keys_file)) as r:
        for listener, status in (("loopback", 200), ("metrics", 421)):
            client = Client(r, listener=listener)
            client.transport.peer = HERE
            client.send(get().replace(b"streamd.localhost", b"llm.example"))
            assert client.answer.status == status


# -- key sets


@pytest.mark.parametrize(("mode", "fits"), [(0o644, True), (0o444, True), (0o664, False), (0o646, False)])
def test_a_key_set_that_others_may_write_is_refused(tmp_path: Path, mode: int, fits: bool) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(Ed25519PrivateKey.generate().public_key()))
    path = tmp_path / "jwks"
    path.write_text(json.dumps({"keys": [public]}))
    path.chmod(mode)
    settings = {"token_jwks_file": str(path), "token_audience": "rooms"}
    if fits:
        with rig(**settings):
            pass
    else:
        with pytest.raises(ConfigError, match="token_jwks_file: .* others may write it"), rig(**settings):
            pass


@pytest.mark.parametrize("what", ["rotten", "pipe", "missing", "folder"])
def test_a_reload_whose_upstream_can_not_be_built_changes_nothing(keys_file: Path, tmp_path: Path, what: str) -> None:
    import dataclasses

    with rig(keys_file=str(keys_file)) as r:
        worker, settings = r.worker, r.worker.settings
        upstreams, keys, limits = list(worker.upstreams), worker.rights.keys, r.runtime.limits
        ca_file, other = tmp_path / "ca.pem", tmp_path / "other"
        write(other, line("carol"))
        if what == "rotten":
            ca_file.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        elif what == "pipe":
            os.mkfifo(ca_file)
        elif what == "folder":
            ca_file.mkdir()
        wrong = dataclasses.replace(
            settings,
            keys_file=str(other),
            head_bytes_max=8192,
            upstreams=(UpstreamSettings(name="b", url="https://127.0.0.1:1", ca_file=str(ca_file)),),
        )
        with pytest.raises(OSError, match=r"ca\.pem"):
            worker.reload(wrong)
        assert worker.settings is settings is r.runtime.settings and r.runtime.limits is limits
        assert list(worker.upstreams) == upstreams and worker.rights.keys is keys
        assert r.client(post(CHAT, bearer("carol"))).answer.status == 401
        streaming(r, bearer("alice"))
        finish(r)


def test_keys_are_read_again_in_slices_and_the_loop_goes_on_meanwhile(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_keys, "SLICE_LINES", 2)
    with rig(keys_file=str(keys_file)) as r:
        turns: list[bool] = []
        taken = r.worker.rights.take_keys
        write(keys_file, *(line(f"k{k}") for k in range(40)), line("zed"))

        def count() -> None:
            turns.append(r.worker.rights.keys is not None and "zed" in r.worker.rights.keys)
            if not turns[-1]:
                r.loop.call_soon(count)

        (group,) = (each for each in r.worker.credential_files._groups if each.paths)
        assert group.take == taken
        r.worker.credential_files._read_again(group)
        r.loop.call_soon(count)
        r.turn()
        assert turns.count(False) >= 20 and turns[-1]
        assert r.client(post(CHAT, bearer("alice"))).answer.status == 401
        streaming(r, bearer("zed"))
        finish(r)
