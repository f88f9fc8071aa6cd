from __future__ import annotations

import pytest

from streamd.wire.foreign_fields import is_foreign

FOREIGN = [
    "set-cookie",
    "clear-site-data",
    "strict-transport-security",
    "alt-svc",
    "nel",
    "report-to",
    "reporting-endpoints",
    "public-key-pins",
    "service-worker-allowed",
    "refresh",
    "access-control-allow-origin",
    "access-control-allow-private-network",
    "x-accel-redirect",
    "x-accel-buffering",
    "x-accel-expires",
    "x-sendfile",
    "x-sendfile-type",
    "surrogate-control",
    "surrogate-key",
    "x-lighttpd-send-file",
    "x-litespeed-cache-control",
    "cdn-cache-control",
    "cloudflare-cdn-cache-control",
    "x-reproxy-url",
    "x_accel_redirect",
    "set_cookie",
]
OWN = [
    "content-type",
    "content-encoding",
    "cache-control",
    "etag",
    "retry-after",
    "location",
    "link",
    "x-ratelimit-remaining",
    "openai-version",
    "x-request-id",
    "server-timing",
    "www-authenticate",
    "x-access-control",
    "vary",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_fields_about_the_origin_and_for_proxies_are_foreign(name: str) -> None:
    assert is_foreign(name.encode())


@pytest.mark.parametrize("name", OWN)
def test_fields_that_describe_the_answer_are_not(name: str) -> None:
    assert not is_foreign(name.encode())
