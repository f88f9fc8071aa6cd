"""Fields of an upstream's answer on their way to the client: whole answers, streams, addresses, request ids."""

from __future__ import annotations

import pytest

from streamd.wire.answer_fields import Whereabouts, is_event_stream, of_answer, of_stream, relative, request_id_of

HERE = Whereabouts(b"up", b"")
NONE: frozenset[bytes] = frozenset()

END_TO_END = (
    (b"x-ratelimit-remaining-requests", b"3"),
    (b"anthropic-ratelimit-unified-status", b"allowed"),
    (b"request-id", b"req_up"),
    (b"openai-processing-ms", b"12"),
    (b"retry-after", b"7"),
    (b"link", b"<a>; rel=next"),
    (b"link", b"<b>; rel=last"),
    (b"x-cache", b"MISS"),
    (b"vary", b"accept"),
    (b"date", b"Mon, 01 Jan 2024 00:00:00 GMT"),
)
NOT_PASSED = (
    (b"connection", b"keep-alive, x-hop"),
    (b"keep-alive", b"timeout=5"),
    (b"x-hop", b"named by Connection"),
    (b"transfer-encoding", b"chunked"),
    (b"trailer", b"x-sum"),
    (b"upgrade", b"h2c"),
    (b"proxy-authenticate", b"Basic"),
    (b"content-length", b"9"),
    (b"set-cookie", b"a=b"),
    (b"set_cookie", b"a=b"),
    (b"strict-transport-security", b"max-age=1"),
    (b"x-accel-redirect", b"/etc/passwd"),
    (b"access-control-allow-origin", b"*"),
    (b"x-request-id", b"theirs"),
    (b"x-stream-id", b"s_theirs"),
    (b"x-upstream", b"theirs"),
)
ABOUT_BYTES = (
    (b"cache-control", b"max-age=60"),
    (b"etag", b'"1"'),
    (b"content-encoding", b"identity"),
    (b"digest", b"sha-256=0"),
    (b"expires", b"0"),
    (b"accept-ranges", b"bytes"),
)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_stream_has_the_end_to_end_fields_that_a_whole_answer_has(backwards: bool) -> None:
    headers = (*END_TO_END, *NOT_PASSED, *ABOUT_BYTES)
    headers = headers[::-1] if backwards else headers
    whole, streamed = of_answer(headers, NONE, HERE), of_stream(headers, NONE, HERE)
    assert sorted(whole) == sorted((*END_TO_END, *ABOUT_BYTES))
    assert sorted(streamed[1:]) == sorted(END_TO_END)
    assert [field for field in whole if field in END_TO_END] == streamed[1:]  # in the upstream's order


@pytest.mark.parametrize("of", [of_answer, of_stream])
def test_a_foreign_field_passes_where_a_setting_names_it(of: type) -> None:
    assert (b"set-cookie", b"a=b") in of(NOT_PASSED, frozenset((b"set-cookie",)), HERE)
    # streamd's own field stands on each stream, and not twice
    named = of(((b"x-accel-buffering", b"yes"),), frozenset((b"x-accel-buffering",)), HERE)
    assert ((b"x-accel-buffering", b"yes") in named) is (of is of_answer)


@pytest.mark.parametrize(
    "given",
    [
        b"text/event-stream",
        b"text/event-stream; charset=utf-8",
        b"text/event-stream;charset=UTF-8",
        b"Text/Event-Stream",
    ],
)
def test_a_streams_type_is_the_upstreams(given: bytes) -> None:
    assert of_stream(((b"content-type", given),), NONE, HERE) == [(b"content-type", given)]
    assert is_event_stream(given)


@pytest.mark.parametrize("given", [b"application/json", b"text/event-streams", b"text/plain; a=text/event-stream", b""])
def test_a_stream_under_another_type_is_sent_as_a_stream(given: bytes) -> None:
    assert of_stream(((b"content-type", given),), NONE, HERE) == [(b"content-type", b"text/event-stream")]
    assert not is_event_stream(given)


@pytest.mark.parametrize(
    ("reference", "authority", "base", "seen"),
    [
        ("http://up:8000/v1/files/1", "up:8000", "", "/v1/files/1"),
        ("http://up:8000/v1/models?a=b#c", "up:8000", "", "/v1/models?a=b#c"),
        ("https://UP:8000/v1/x", "up:8000", "", "/v1/x"),  # the server doesn't know of the TLS in front of it
        ("http://up/v1/x", "up", "", "/v1/x"),
        ("http://up:80/v1/x", "up", "", "/v1/x"),
        ("https://up:443/v1/x", "up", "", "/v1/x"),
        ("//up:8000/v1/x", "up:8000", "", "/v1/x"),
        ("http://up:8000", "up:8000", "", "/"),
        ("http://up:8000?a", "up:8000", "", "/?a"),
        ("http://[::1]:8000/v1/x", "[::1]:8000", "", "/v1/x"),
        ("http://localhost:8000/v1/x", "127.0.0.1:8000", "", "/v1/x"),
        ("http://0.0.0.0:8000/v1/x", "localhost:8000", "", "/v1/x"),
        ("http://localhost.evil.test:8000/v1/x", "127.0.0.1:8000", "", "http://localhost.evil.test:8000/v1/x"),
        ("http://up/base/v1/x", "up", "/base", "/v1/x"),
        ("/base/v1/x?a=b", "up", "/base", "/v1/x?a=b"),
        ("/base", "up", "/base", "/"),
        ("/basement/x", "up", "/base", "/basement/x"),
        ("/v1/x", "up", "", "/v1/x"),
        ("x/y", "up", "/base", "x/y"),
        ("", "up", "", ""),
        # other hosts stay
        ("http://up:8001/v1/x", "up:8000", "", "http://up:8001/v1/x"),
        ("https://cdn.test/file", "up", "", "https://cdn.test/file"),
        ("//cdn.test/file", "up", "", "//cdn.test/file"),
        ("http://user@up/v1/x", "up", "", "http://user@up/v1/x"),
        ("http://up.evil.test/v1", "up", "", "http://up.evil.test/v1"),
        ("ftp://up/v1/x", "up", "", "ftp://up/v1/x"),
    ],
)
def test_an_address_at_the_upstream_becomes_relative(reference: str, authority: str, base: str, seen: str) -> None:
    assert relative(reference.encode(), Whereabouts(authority.encode(), base.encode())) == seen.encode()


@pytest.mark.parametrize("path", ["//evil.test/", "/\\evil.test/", "///evil.test", "/\\/evil.test"])
@pytest.mark.parametrize("base", ["", "/base"])
@pytest.mark.parametrize("front", ["http://up", ""])
def test_a_relative_address_never_leads_to_another_host(front: str, base: str, path: str) -> None:
    if not front and not base and path.startswith("//"):
        return  # that is another host's address, as the upstream gave it
    seen = relative((front + base + path).encode(), Whereabouts(b"up", base.encode()))
    assert seen.startswith(b"/evil.test")


@pytest.mark.parametrize("name", ["location", "content-location", "operation-location"])
def test_every_field_with_an_address_is_made_relative(name: str) -> None:
    headers = ((name.encode(), b"http://up/v1/x"),)
    assert of_answer(headers, NONE, HERE) == [(name.encode(), b"/v1/x")]


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([("x-request-id", "req_1")], "req_1"),
        ([("request-id", "req_1")], "req_1"),
        ([("cf-ray", "8f-FRA"), ("x-request-id", "req_1")], "req_1"),
        ([("x-request-id", "own"), ("cf-ray", "8f-FRA")], "8f-FRA"),
        ([("x-request-id", "own")], ""),
        ([("x-request-id", "a b\x7f"), ("apim-request-id", "b-2")], "b-2"),
        ([("x-request-id", "a" * 129)], ""),
        ([("x-other", "1")], ""),
        ([], ""),
    ],
)
def test_the_upstreams_name_of_a_request_is_found(headers: list[tuple[str, str]], found: str) -> None:
    assert request_id_of(tuple((name.encode(), value.encode()) for name, value in headers), b"own") == found


@pytest.mark.parametrize(
    ("base", "reference", "seen"),
    [
        ("/api/v3", "http://up/api/v3/files/x?y", "/v1/files/x?y"),
        ("/api/v3", "/api/v3", "/v1/"),
        ("/api/v3", "/elsewhere/x", "/elsewhere/x"),
        ("", "/files/x", "/v1/files/x"),
        ("", "http://other/files/x", "http://other/files/x"),
        ("/api/v3", "/api/v3//evil", "/v1/evil"),
    ],
)
def test_an_address_below_a_base_that_replaces_the_version_has_it_again(base: str, reference: str, seen: str) -> None:
    assert relative(reference.encode(), Whereabouts(b"up", base.encode(), b"/v1")) == seen.encode()
