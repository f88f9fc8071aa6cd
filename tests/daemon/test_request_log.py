"""The line of a request: no secrets, and few lines for refused strangers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, chunk, event, get, post, rig

from streamd.config import UpstreamSettings
from streamd.daemon import logs
from streamd.daemon.request_log import (
    FAULT_LINES_PER_MINUTE_MAX,
    MINUTE_S,
    STRANGERS_LINES_PER_S_MAX,
    FaultWarnings,
    is_at_fault,
    without_secrets,
)
from streamd.daemon.shared import Shared, create
from streamd.reasons import CloseReason

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


@pytest.mark.parametrize(
    ("listener", "data", "expected"),
    [
        ("admin", get("/status"), logs.DEBUG),
        ("admin", get("/readers"), logs.DEBUG),
        ("metrics", get("/metrics", method="HEAD"), logs.DEBUG),
        ("admin", get("/readers?sort=beauty"), logs.INFO),
        ("admin", get("/readers/r_none", method="DELETE"), logs.INFO),
        ("admin", post(CHAT), logs.INFO),
        ("public", get("/healthz"), logs.INFO),
    ],
)
def test_a_look_at_the_daemon_is_a_line_at_debug_alone(listener: str, data: bytes, expected: int) -> None:
    levels: list[int] = []

    def noted(level: int, name: str, /, **fields: Any) -> None:
        if name == "request":
            levels.append(level)

    with rig() as r, mock.patch.object(logs, "event", noted):
        client = r.client(data, listener=listener)
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST) if b"POST" in data else None
        client.fin()
        assert levels == [expected]


def test_a_look_takes_no_count_of_refused_strangers_with_it() -> None:
    lines: list[dict[str, Any]] = []

    def noted(level: int, name: str, /, **fields: Any) -> None:
        if name == "request" and level >= logs.INFO:
            lines.append(fields)

    with rig() as r, mock.patch.object(logs, "event", noted):
        stranger, operator = r.client(), r.client(listener="admin")
        for _ in range(STRANGERS_LINES_PER_S_MAX + 5):
            stranger.send(get("/v1/streams/none"))
        operator.send(get("/status"))
        stranger.send(get("/healthz"))
        assert lines[-1]["left_out"] == 5


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


# -- requests that a server is at fault for


@pytest.mark.parametrize(
    ("reason", "status", "upstream", "expected"),
    [
        (CloseReason.UPSTREAM_CONNECT, 502, "gpu", True),
        (CloseReason.UPSTREAM_TRUNCATED, 200, "gpu", True),
        (CloseReason.UPSTREAM_IDLE_TIMEOUT, 200, "gpu", True),
        (CloseReason.EVENT_TOO_LARGE, 200, "gpu", True),
        (CloseReason.COMPLETE, 500, "gpu", True),  # the server's own error, passed on
        (CloseReason.COMPLETE, 529, "gpu", True),
        (CloseReason.NO_UPSTREAM, 503, "", True),
        (CloseReason.COMPLETE, 200, "gpu", False),
        (CloseReason.COMPLETE, 429, "gpu", False),  # the client's
        (CloseReason.COMPLETE, 404, "gpu", False),
        (CloseReason.READER_GONE, 200, "gpu", False),
        (CloseReason.UPSTREAM_STREAM_TIMEOUT, 200, "gpu", False),  # streamd's own limit
        (CloseReason.EVENT_TOO_LARGE, 413, "", False),  # a publisher's
        (CloseReason.PUBLISHER_GONE, 200, "", False),
        (CloseReason.COMPLETE, 500, "", False),
    ],
)
def test_the_fault_is_a_servers_or_not(reason: CloseReason, status: int, upstream: str, expected: bool) -> None:
    assert is_at_fault(reason, status, upstream) is expected


class Lines:
    """The lines of requests, as (level, count of the lines left out)."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, dict[str, Any]]] = []

    def note(self, level: int, name: str, /, **fields: Any) -> None:
        if name == "request":
            self.kept.append((level, fields))

    @property
    def warnings(self) -> list[dict[str, Any]]:
        return [fields for level, fields in self.kept if level == logs.WARNING]


def test_a_dead_servers_requests_are_warnings_six_a_minute_and_the_next_counts_the_others() -> None:
    lines, most = Lines(), FAULT_LINES_PER_MINUTE_MAX
    with rig() as r, mock.patch.object(logs, "event", lines.note):
        r.refusing.add(1)
        r.pass_time(MINUTE_S - r.loop.time() % MINUTE_S)
        for _ in range(most + 10):
            r.client(post(CHAT))
        assert len(lines.kept) == most + 10, "every request has its line"
        assert [line["more"] for line in lines.warnings] == [None] * most
        assert all(line["upstream"] == "up" and line["status"] == 502 for line in lines.warnings)
        r.pass_time(MINUTE_S)
        r.client(post(CHAT))
        r.client(post(CHAT))
        assert [line["more"] for line in lines.warnings[most:]] == [10, None]


def test_each_server_has_warnings_of_its_own_and_a_good_answer_is_none() -> None:
    lines = Lines()
    two = tuple(UpstreamSettings(name=name, url=f"http://{name}:1", models=(name,)) for name in "ab")
    with rig(upstreams=two) as r, mock.patch.object(logs, "event", lines.note):
        for name, status in (("a", b"500 No"), ("b", b"503 No"), ("a", b"200 OK"), ("b", b"429 No")):
            r.client(post(WHOLE | {"model": name}))
            r.reply(b"HTTP/1.1 %b\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}" % status)
        assert [(level, line["upstream"]) for level, line in lines.kept] == [
            (logs.WARNING, "a"),
            (logs.WARNING, "b"),
            (logs.INFO, "a"),
            (logs.INFO, "b"),
        ]


def test_several_workers_share_the_warnings_of_a_server() -> None:
    fd = create(3)
    workers = [FaultWarnings() for _ in range(3)]
    for slot, each in enumerate(workers):
        each.board = Shared(fd, 3, ["up"], slot)
    for minute in (5, 6):
        found = [each.more("up", minute * MINUTE_S + 1) for _ in range(10) for each in workers]
        assert sum(more is not None for more in found) == FAULT_LINES_PER_MINUTE_MAX
        assert [each.more("down", minute * MINUTE_S + 2) is not None for each in workers] == [True] * 3
    assert sum(more or 0 for more in found) == 30 - FAULT_LINES_PER_MINUTE_MAX, "the first warnings tell of the rest"
