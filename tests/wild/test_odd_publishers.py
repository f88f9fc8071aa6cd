"""Bodies that are published as shells, editors and languages write them (README.md has the reports)."""

from __future__ import annotations

import pytest
from fakes import Answer, Rig, events_in, get, post, rig

BOM = b"\xef\xbb\xbf"
EVENTS = "/v1/streams/room/events"


def publish(r: Rig, body: bytes, media_type: str) -> Answer:
    r.client(get("/v1/streams/room", "Content-Length: 0", method="PUT"))
    return r.client(post(body, f"Content-Type: {media_type}", path=f"{EVENTS}?seal=finished")).answer


def read(r: Rig) -> list[bytes]:
    return [each.data for each in events_in(r.client(get("/v1/streams/room")).answer.body)]


@pytest.mark.parametrize(
    "media_type",
    [
        "application/jsonl",
        "application/x-jsonl; charset=utf-8",
        "application/jsonlines",
        "application/x-jsonlines",
        "application/json-lines",
        "application/NDJSON",
    ],
)
def test_lines_of_json_are_published_under_each_of_their_names(media_type: str) -> None:
    with rig() as r:
        assert publish(r, b'{"a": 1}\n{"b": 2}', media_type).status == 200
        assert read(r) == [b'{"a": 1}', b'{"b": 2}']


@pytest.mark.parametrize("media_type", ["application/json", "application/octet-stream", "application/x-json"])
def test_a_type_that_isnt_published_is_told_the_three_that_are(media_type: str) -> None:
    with rig() as r:
        answer = publish(r, b"{}", media_type)
        assert answer.status == 415 and media_type in answer.error["message"]
        assert "text/plain, application/x-ndjson, text/event-stream" in answer.error["message"]
        r.client(get("/v1/streams/room", method="DELETE"))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("filler", [b"", b"x" * 20_000])
def test_byte_order_marks_in_front_of_lines_are_left_out(line_end: bytes, filler: bytes) -> None:
    lines = [b'{"a": "%b"}' % filler, b'{"b": 2}', b"", b"[DONE]"]
    with rig() as r:
        body = line_end.join(BOM + line for line in lines)
        assert publish(r, body, "application/x-ndjson").status == 200
        assert read(r) == [lines[0], lines[1], b"[DONE]"]


def test_a_byte_order_mark_in_front_of_events_is_left_out() -> None:
    with rig() as r:
        assert publish(r, BOM + b'data: {"a": 1}\n\n', "text/event-stream").status == 200
        assert read(r) == [b'{"a": 1}']


@pytest.mark.parametrize("line", [b'{"a": \xef\xbb\xbf1}', b'{"a": 1}\xef\xbb\xbf', BOM + BOM + b"{}"])
def test_a_byte_order_mark_elsewhere_is_no_json(line: bytes) -> None:
    with rig() as r:
        answer = publish(r, line + b"\n", "application/x-ndjson")
        assert answer.status == 400 and answer.error["code"] == "bad_json"
        r.client(get("/v1/streams/room", method="DELETE"))


@pytest.mark.parametrize("name", ["Last-Event-ID:", "Last-Event-ID: "])
def test_an_empty_last_event_id_is_none(name: str) -> None:
    with rig() as r:
        publish(r, b"a\n", "text/plain")
        assert [each.seq for each in events_in(r.client(get("/v1/streams/room", name)).answer.body)] == [1]
