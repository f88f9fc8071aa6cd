"""The first bytes of a body tell its kind, however they are cut."""

from __future__ import annotations

import pytest

from streamd.wire.opening import FIRST_EVENT_BYTES_MAX, OPENING_BYTES_MAX, BodyKind, has_own_ids, kind_of

KINDS = [
    (b"data: {}\n\n", BodyKind.EVENTS),
    (b"data:{}\n\n", BodyKind.EVENTS),
    (b"data\n\n", BodyKind.EVENTS),
    (b"event: a\ndata: b\n\n", BodyKind.EVENTS),
    (b"id: 1\ndata: b\n\n", BodyKind.EVENTS),
    (b"retry: 1\n\n", BodyKind.EVENTS),
    (b": hello\n\n", BodyKind.EVENTS),
    (b"\xef\xbb\xbfdata: {}\n\n", BodyKind.EVENTS),
    (b"\r\n\r\ndata: {}\r\n\r\n", BodyKind.EVENTS),
    (b'{"a": 1}', BodyKind.JSON),
    (b"[1]", BodyKind.JSON),
    (b' \n\t\r\n{"a": 1}', BodyKind.JSON),
    (b'\xef\xbb\xbf{"a": 1}', BodyKind.JSON),
    (b"<html>", BodyKind.BYTES),
    (b"database", BodyKind.BYTES),
    (b"identity", BodyKind.BYTES),
    (b"\xff\xf3\x00", BodyKind.BYTES),
    (b"\xef\xbb", BodyKind.BYTES),
    (b"DATA: {}", BodyKind.BYTES),
    (b"", BodyKind.BYTES),
    (b"\n \n", BodyKind.BYTES),
    (b"dat", BodyKind.BYTES),
]


@pytest.mark.parametrize(("data", "kind"), KINDS)
def test_the_kind_is_the_same_however_the_bytes_are_cut(data: bytes, kind: BodyKind) -> None:
    seen = [kind_of(data[:size], is_typed=False) for size in range(len(data) + 1)]
    decided = [found for found in seen if found is not None]
    assert set(decided) <= {kind}
    assert kind_of(data, is_typed=False, at_end=True) is kind
    assert decided or kind is BodyKind.BYTES


@pytest.mark.parametrize(("data", "kind"), KINDS)
def test_under_the_type_of_a_stream_only_json_is_none(data: bytes, kind: BodyKind) -> None:
    expected = BodyKind.JSON if kind is BodyKind.JSON else BodyKind.EVENTS
    seen = {kind_of(data[:size], is_typed=True) for size in range(len(data) + 1)} - {None}
    assert seen <= {expected} and kind_of(data, is_typed=True, at_end=True) is expected


def test_blank_bytes_are_awaited_for_a_bounded_length() -> None:
    assert kind_of(b" " * OPENING_BYTES_MAX, is_typed=False) is None
    assert kind_of(b" " * (OPENING_BYTES_MAX + 1), is_typed=False) is BodyKind.BYTES
    assert kind_of(b"\n" * (OPENING_BYTES_MAX + 1), is_typed=True) is None


@pytest.mark.parametrize(
    ("opening", "at_end", "is_late", "answer"),
    [
        (b"id: 1\ndata: {}\n\n", False, False, True),
        (b"data: {}\nid: 1\n\n", False, False, True),
        (b"data: {}\n\nid: 1\n\n", False, False, False),
        (b"data: {}\n", False, False, None),
        (b"data: {}\n", True, False, False),
        (b"data: {}\nid: 1", True, False, True),
        (b"", True, False, False),
        (b"", False, True, True),
        (b"data: {}\n", False, True, True),
    ],
)
def test_a_stream_has_ids_of_its_own_if_its_first_event_has(
    opening: bytes, at_end: bool, is_late: bool, answer: bool | None
) -> None:
    assert has_own_ids(opening, at_end=at_end, is_late=is_late) is answer


@pytest.mark.parametrize(
    ("lines", "answer"),
    [(b"id: 7\ndata: ", True), (b"event: long\ndata: ", False), (b"event: long\nx: ", True)],
    ids=["an id in front of the data", "data and no id so far", "neither so far"],
)
def test_a_first_event_without_an_end_is_judged_by_its_first_bytes(lines: bytes, answer: bool) -> None:
    assert has_own_ids(lines.ljust(FIRST_EVENT_BYTES_MAX - 1, b"x")) is None
    assert has_own_ids(lines.ljust(FIRST_EVENT_BYTES_MAX, b"x")) is answer
