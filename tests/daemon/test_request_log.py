"""The line of a request: no secrets, and few lines for refused strangers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from fakes import get, rig

from streamd.daemon import logs
from streamd.daemon.request_log import STRANGERS_LINES_PER_S_MAX, without_secrets

KEY = "sk-app-a172cedcae47474d8f0e"
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJhdWQiOiJzIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"/v1/{KEY}/chat/completions", "/v1/sk-***/chat/completions"),
        (f"/{KEY}", "/sk-***"),
        (KEY, "sk-***"),
        (f"/v1/streams/room%3Faccess_token={TOKEN}", "/v1/streams/room%3Faccess_token=eyJ***"),
        (f"/v1/streams/room%3Faccess_token%3D{TOKEN}", "/v1/streams/room%3Faccess_token%3DeyJ***"),
        (f"/x%3D{KEY}", "/x%3Dsk-***"),
        (f"/x%2F{KEY.replace('-', '%2D')}/y", "/x%2Fsk-***/y"),
        (f"/%73k-{KEY[3:]}", "/sk-***"),
        (f"/%2573%256b%252d{KEY[3:]}", "/sk-***"),
        (f"/%65yJ{TOKEN[3:]}", "/eyJ***"),
        ("/AIzaSyD-abcdefg", "/sk-***"),
        (f"/v1/{KEY}/{TOKEN}", "/v1/sk-***/eyJ***"),
        (f"/v1/streams/token_{TOKEN}", "/v1/streams/token_eyJ***"),
        (f"/v1/streams/xx{TOKEN.replace('.', '%2E')}", "/v1/streams/xxeyJ***"),
        ("/v1/streams/s_AaMKjJuYxweyJt1nN5L725DrvH0A", "/v1/streams/s_AaMKjJuYxweyJt1nN5L725DrvH0A"),
        ("/v1/streams/task-4711", "/v1/streams/task-4711"),
        ("/v1/desk-top/disk-1", "/v1/desk-top/disk-1"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("GET", "GET"),
    ],
)
def test_keys_and_tokens_are_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_the_lines_of_refused_strangers_are_limited_and_the_rest_is_counted() -> None:
    lines: list[dict[str, Any]] = []

    def noted(level: int, name: str, /, **fields: Any) -> None:
        if name == "request":
            lines.append(fields)

    with rig() as r, mock.patch.object(logs, "event", noted):
        client = r.client()
        for _ in range(STRANGERS_LINES_PER_S_MAX + 30):
            client.send(get("/v1/streams/none"))
        assert len(lines) == STRANGERS_LINES_PER_S_MAX and all(line["left_out"] is None for line in lines)
        client.send(get("/healthz"))
        client.send(get("/healthz"))
        assert [line["left_out"] for line in lines[-2:]] == [30, None]
        r.pass_time(1.1)
        client.send(get("/v1/streams/none"))
        assert lines[-1]["status"] == 404 and lines[-1]["left_out"] is None


def test_a_key_in_the_path_or_as_the_method_is_not_in_the_line() -> None:
    lines: list[dict[str, Any]] = []
    with rig() as r, mock.patch.object(logs, "event", lambda level, name, /, **fields: lines.append(fields)):
        r.client(get(f"/{KEY}/models", f"X-Request-Id: {KEY}"))
        r.client(get("/none", method=KEY))
        assert len(lines) == 2 and KEY not in repr(lines)


def test_a_token_as_a_streams_name_is_in_no_line() -> None:
    lines: list[dict[str, Any]] = []
    name = TOKEN[:100]
    with rig(retention_s=1.0) as r, mock.patch.object(logs, "event", lambda level, name, /, **f: lines.append(f)):
        assert r.client(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT")).answer.status == 201
        reader = r.client(get(f"/v1/streams/{name}"))
        assert r.client(get(f"/v1/streams/{name}", method="DELETE")).answer.status < 300
        assert reader.answer.status == 200
        assert len(lines) >= 3 and name[3:] not in repr(lines)
