"""Listeners' addresses, upstreams' URLs, and the checks of other texts."""

from __future__ import annotations

import pytest

from streamd.addresses import (
    ORIGIN,
    ROUTE_PATH,
    UPSTREAM_NAME,
    Address,
    UpstreamOrigin,
    check_collector,
    check_field_name,
    matching,
    parse_address,
    split_url,
)
from streamd.rows import Refused
from streamd.wire.dialect import APIS


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080, ""), True),
        ("127.9.9.9:0", Address("127.9.9.9", 0, ""), True),
        ("0.0.0.0:80", Address("0.0.0.0", 80, ""), False),
        ("localhost:1", Address("localhost", 1, ""), True),
        ("gpu-1.example:65535", Address("gpu-1.example", 65535, ""), False),
        ("[::1]:8080", Address("::1", 8080, ""), True),
        ("[::]:8080", Address("::", 8080, ""), False),
        ("unix:/run/streamd.sock", Address("", 0, "/run/streamd.sock"), True),
    ],
)
def test_an_address_of_a_listener_is_parsed(text: str, address: Address, loopback: bool) -> None:
    assert parse_address(text) == address
    assert address.is_loopback is loopback
    assert address.is_unix is text.startswith("unix:")


@pytest.mark.parametrize(
    "text",
    [
        "8080",
        ":8080",
        "127.0.0.1",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:٨٠",
        "::1:8080",
        "[127.0.0.1]:80",
        "[::1%lo]:80:",
        "a b:80",
        "-a:80",
        "unix:relative",
        "unix:/" + "x" * 107,
        "unix:",
        "http://127.0.0.1:80",
    ],
)
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "origin", "url"),
    [
        ("http://127.0.0.1:9000", UpstreamOrigin(False, "127.0.0.1", 9000, ""), "http://127.0.0.1:9000"),
        ("http://127.0.0.1:9000/v1", UpstreamOrigin(False, "127.0.0.1", 9000, ""), "http://127.0.0.1:9000"),
        ("http://h/v1/", UpstreamOrigin(False, "h", 80, ""), "http://h"),
        (
            "https://API.example/openai/v1",
            UpstreamOrigin(True, "api.example", 443, "/openai"),
            "https://api.example/openai",
        ),
        ("https://h:8443/a/b/", UpstreamOrigin(True, "h", 8443, "/a/b"), "https://h:8443/a/b"),
        ("http://[::1]:81", UpstreamOrigin(False, "::1", 81, ""), "http://[::1]:81"),
        ("http://h/v1alpha", UpstreamOrigin(False, "h", 80, "/v1alpha", True), "http://h/v1alpha"),
        ("http://h/api/paas/v4/", UpstreamOrigin(False, "h", 80, "/api/paas/v4", True), "http://h/api/paas/v4"),
        ("http://h/v1beta/openai", UpstreamOrigin(False, "h", 80, "/v1beta/openai", True), "http://h/v1beta/openai"),
        ("http://h/api/v3/v1", UpstreamOrigin(False, "h", 80, "/api/v3/v1", True), "http://h/api/v3/v1"),
        (
            "https://h/x?api-version=1",
            UpstreamOrigin(True, "h", 443, "/x", query="api-version=1"),
            "https://h/x?api-version=1",
        ),
        ("http://h?a=b&c=%2F", UpstreamOrigin(False, "h", 80, "", query="a=b&c=%2F"), "http://h?a=b&c=%2F"),
        (
            "unix:/run/vllm.sock",
            UpstreamOrigin(False, "localhost", 80, "", socket="/run/vllm.sock"),
            "unix:/run/vllm.sock",
        ),
        ("unix:///run/a", UpstreamOrigin(False, "localhost", 80, "", socket="/run/a"), "unix:/run/a"),
        ("http+unix://%2Frun%2Fa/v1", UpstreamOrigin(False, "localhost", 80, "", socket="/run/a"), "unix:/run/a"),
        (
            "http+unix://%2Frun%2Fa/api/v3?x=1",
            UpstreamOrigin(False, "localhost", 80, "/api/v3", True, "x=1", "/run/a"),
            "http+unix://%2Frun%2Fa/api/v3?x=1",
        ),
        ("http://h/base/v1beta/", UpstreamOrigin(False, "h", 80, "/base"), "http://h/base"),
        ("http://h/xv1", UpstreamOrigin(False, "h", 80, "/xv1"), "http://h/xv1"),
    ],
)
def test_a_url_of_an_upstream_is_parsed_and_normalized(text: str, origin: UpstreamOrigin, url: str) -> None:
    assert split_url(text) == origin
    assert origin.url == url
    assert split_url(url) == origin


@pytest.mark.parametrize("path", sorted(path for api in APIS for path in (*api.paths, *api.below)))
def test_the_version_at_the_end_of_a_url_is_that_of_its_paths(path: str) -> None:
    """Every API's documentation gives its base URL with the version, which the path of a request has already."""
    version = path.split("/")[1]
    assert split_url(f"http://h/base/{version}").base == "/base"


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:9000",
        "ftp://h",
        "http://",
        "http://user:pw@h",
        "http://h?",
        "http://h?x=1?#",
        "http://h?a b",
        "http://h?a=\u00e9",
        "http://h?" + "a" * 1001,
        "unix:run/a",
        "unix:/" + "a" * 107,
        "unix:",
        "http+unix://run/a",
        "http+unix://%2Frun/a//b",
        "http+unix:///run/a",
        "http://h#x",
        "http://h:0",
        "http://h:99999",
        "http://h:x",
        "http://h/a/../b",
        "http://h/.",
        "http://h/a//b",
        "http://h/a%2fb",
        "http://h/%2E%2E/",
        "http://h/a b",
        "http://h\\@evil",
        "http://h/é",
        "http://[::1",
        "http://h\r\nX: y",
    ],
)
def test_a_text_that_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        split_url(text)


@pytest.mark.parametrize("name", ["X-Api-Version", "api-key"])
def test_a_field_name_for_an_upstream_is_accepted(name: str) -> None:
    check_field_name(name)


@pytest.mark.parametrize("name", ["Host", "CONTENT-LENGTH", "Authorization", "a b", "a:", "", "é", "a\n"])
def test_a_reserved_or_malformed_field_name_is_refused(name: str) -> None:
    with pytest.raises(Refused):
        check_field_name(name)


@pytest.mark.parametrize(
    ("pattern", "text", "taken"),
    [
        (ORIGIN, "https://chat.example", True),
        (ORIGIN, "http://localhost:3000", True),
        (ORIGIN, "http://[::1]:3000", True),
        (ORIGIN, "*", False),
        (ORIGIN, "null", False),
        (ORIGIN, "https://chat.example/", False),
        (ORIGIN, "https://*.example", False),
        (ROUTE_PATH, "/v1/responses", True),
        (ROUTE_PATH, "/v1/*", True),
        (ROUTE_PATH, "/*", True),
        (ROUTE_PATH, "/v1/*/x", False),
        (ROUTE_PATH, "v1", False),
        (ROUTE_PATH, "/a b", False),
    ],
)
def test_a_text_is_checked_against_its_pattern(pattern: object, text: str, taken: bool) -> None:
    check = matching(pattern)  # type: ignore[arg-type]
    if taken:
        check(text)
    else:
        with pytest.raises(Refused):
            check(text)


VERSIONS = [
    "/v1",
    "/api/paas/v4",
    "/api/v3",
    "/v1beta/openai",
    "/openai/v1",
    "/compatible-mode/v1",
    "/v1/openai",
    "/x/v2beta1",
]


@pytest.mark.parametrize("base", VERSIONS)
def test_a_base_with_a_version_stands_for_the_version_of_requests(base: str) -> None:
    origin = split_url(f"https://h{base}/")
    assert origin.target(b"/v1/chat/completions?x=1") == f"{base}/chat/completions?x=1".encode()
    assert split_url(origin.url) == origin


@pytest.mark.parametrize("base", ["", "/llm", "/openai/deployments/gpt-4", "/vX", "/v", "/version1", "/av1/b", "/v1x"])
def test_a_base_without_a_version_gets_the_whole_path_behind_it(base: str) -> None:
    origin = split_url(f"https://h{base}")
    assert origin.target(b"/v1/models") == f"{base}/v1/models".encode()
    assert origin.target(b"/v1beta/models/m:generateContent") == f"{base}/v1beta/models/m:generateContent".encode()


@pytest.mark.parametrize(
    ("url", "path", "asked", "target"),
    [
        ("https://api.perplexity.ai", "replace", "/v1/chat/completions", "/chat/completions"),
        ("https://h/inference", "replace", "/v1/models", "/inference/models"),
        ("https://h/v1", "replace", "/v1/models", "/v1/models"),
        ("https://h/v1", "replace", "/v1beta/models/m", "/v1/models/m"),
        (
            "https://h/google/v2",
            "auto",
            "/v1beta/models/m:streamGenerateContent?alt=sse",
            "/google/v2/models/m:streamGenerateContent?alt=sse",
        ),
        ("https://h/v1beta", "auto", "/v1beta/models/m:countTokens", "/v1beta/models/m:countTokens"),
        ("https://h/v1", "auto", "/v1beta/models/m:countTokens", "/v1beta/models/m:countTokens"),
        ("https://h/api/v3", "append", "/v1/models", "/api/v3/v1/models"),
        ("https://h/v1", "append", "/v1/models", "/v1/v1/models"),
        ("https://h", "replace", "/v1", "/"),
        ("https://h/api/v3", "auto", "/v1", "/api/v3"),
        ("https://h/api/v3", "auto", "/health", "/api/v3/health"),
        ("https://h/api/v3", "auto", "/v1x/y", "/api/v3/v1x/y"),
        ("https://h/api/v3", "auto", "/v1/models/a%2Fb", "/api/v3/models/a%2Fb"),
    ],
)
def test_the_path_setting_decides_where_a_path_goes(url: str, path: str, asked: str, target: str) -> None:
    assert split_url(url, path).target(asked.encode()) == target.encode()


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ("/v1/x", "/v1/x?api-version=2024-10-21"),
        ("/v1/x?a=1&b", "/v1/x?a=1&b&api-version=2024-10-21"),
        ("/v1/x?", "/v1/x?api-version=2024-10-21"),
        ("/v1/x?api-version=old&a=1", "/v1/x?a=1&api-version=2024-10-21"),
        ("/v1/x?%61pi-version=old", "/v1/x?api-version=2024-10-21"),
        ("/v1/x?api-versions=1", "/v1/x?api-versions=1&api-version=2024-10-21"),
    ],
)
def test_the_query_of_a_url_goes_with_each_request_beside_its_own(asked: str, target: str) -> None:
    assert split_url("https://h?api-version=2024-10-21").target(asked.encode()) == target.encode()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://h", "h:80"),
        ("https://[::1]/v1", "[::1]:443"),
        ("unix:/run/vllm/a.sock", "unix:run-vllm-a.sock"),
        ("unix:/" + "long/" * 20 + "s", "unix:" + ("long-" * 20 + "s")[-100:]),
        ("unix:/tmp/a b@", "unix:tmp-a-b-"),
    ],
)
def test_an_upstreams_own_name_can_stand_in_logs_and_fields(url: str, name: str) -> None:
    assert split_url(url).name == name
    matching(UPSTREAM_NAME)(name)


@pytest.mark.parametrize(
    "url", ["http://c", "https://c.example:4318/", "http://[::1]:4318/base", "http://127.0.0.1:65535", "HTTP://c"]
)
def test_a_collectors_base_url_is_accepted(url: str) -> None:
    check_collector(url)


@pytest.mark.parametrize(
    "url",
    [
        *("c:4318", "ftp://c", "http://", "http://:4318", "http://c:0", "http://c:65536", "http://c:x", "http://a b"),
        *(
            "http://u:p@c",
            "http://c?x=1",
            "http://c?",
            "http://c#f",
            "http://é",
            "http://[::1",
            "http://c/" + "x" * 2048,
        ),
    ],
)
def test_any_other_text_is_no_collector(url: str) -> None:
    with pytest.raises(Refused):
        check_collector(url)
