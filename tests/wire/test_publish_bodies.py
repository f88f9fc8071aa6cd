"""The bodies of publishers as events: whole, byte by byte, and cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.publish import DONE_EVENT, PUBLICATIONS, Publication, PublishError
from streamd.wire.sse import parse_event

EVENT_BYTES_MAX = 200
TEXT, LINES, EVENTS = "text/plain", "application/x-ndjson", "text/event-stream"


def publication(kind: str) -> Publication:
    return PUBLICATIONS[kind](EVENT_BYTES_MAX)


def cuts(body: bytes) -> Iterator[list[bytes]]:
    """The body whole, byte by byte, and in every pair of pieces."""
    yield [body]
    yield [body[k : k + 1] for k in range(len(body))]
    for k in range(1, len(body)):
        yield [body[:k], body[k:]]


def run(kind: str, pieces: list[bytes]) -> tuple[list[bytes], PublishError | None]:
    """The events, and the refusal, if any."""
    taken, out = publication(kind), list[bytes]()
    try:
        for piece in pieces:
            out += taken.feed(piece)
        out += taken.finish()
    except PublishError as error:
        return out + error.before, error
    return out, None


def each_cut(kind: str, body: bytes) -> tuple[list[bytes], PublishError | None]:
    """The outcome of the body, which must be the same in every cut."""
    ran = [run(kind, pieces) for pieces in cuts(body)]
    outs = {tuple(out) for out, _ in ran}
    errors = {(str(error), error.code, error.status) if error else None for _, error in ran}
    assert len(outs) == len(errors) == 1, (outs, errors)
    return ran[0]


# -- lines


def test_a_line_without_an_end_is_refused_as_soon_as_it_is_too_long() -> None:
    taken = publication(LINES)
    with pytest.raises(PublishError, match="Line 1 is larger than 200 bytes"):
        for _ in range(300):
            taken.feed(b"1")
    assert taken.held_bytes == EVENT_BYTES_MAX + 1


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b'{"a":1}\n', [b'{"a":1}']),
        (b'{"a":1}\n[2]\n"three"\n4\n', [b'{"a":1}', b"[2]", b'"three"', b"4"]),
        (b'{"a":1}', [b'{"a":1}']),  # no line end after the last
        (b'{"a":1}\r\n\r\n  \n\t\n{"b":2}\r\n', [b'{"a":1}', b'{"b":2}']),
        (b' {"a": 1}\t\n', [b'{"a": 1}']),
        (b'"\xc3\xa9"\n', [b'"\xc3\xa9"']),
        (b"[DONE]\n", [b"[DONE]"]),
        (b"1\n[DONE] \n\n \n", [b"1", b"[DONE]"]),
        (b"", []),
        (b"\n", []),
    ],
)
def test_a_line_is_the_data_of_an_event(body: bytes, events: list[bytes]) -> None:
    out, error = each_cut(LINES, body)
    assert error is None
    assert [parse_event(each)[1] for each in out] == events
    assert all(each.startswith(b"data: ") and each.endswith(b"\n\n") and each.count(b"\n") == 2 for each in out)


@pytest.mark.parametrize(
    ("body", "good", "code", "text"),
    [
        (b'1\n{"a":\n2\n', 1, "bad_json", "Line 2 is not JSON"),
        (b"1\n\n\nnull x\n", 1, "bad_json", "Line 4 is not JSON"),
        (b'"\xff"\n', 0, "bad_json", "Line 1"),
        (b'"\x00"\n', 0, "bad_json", "Line 1"),
        (b'"a\rb"\n', 0, "bad_line", "Line 1 has a CR"),
        (b"1\n[DONE]\n2\n", 2, "after_done", "Line 3 comes after"),
        (b"1\n[DONE]\n2", 2, "after_done", "Line 3 comes after"),
        (b"1\n[1,2", 1, "bad_json", "Line 2"),
        (b"1\n[done]\n", 1, "bad_json", "Line 2"),
    ],
)
def test_a_bad_line_is_refused_after_the_good_lines(body: bytes, good: int, code: str, text: str) -> None:
    out, error = each_cut(LINES, body)
    assert error is not None
    assert (error.code, error.status, len(out)) == (code, 400, good)
    assert text in str(error)


@pytest.mark.parametrize("depth", [100, 1000, 1024, 1025, 5000])
def test_a_line_may_be_nested_as_deep_as_it_likes(depth: int) -> None:
    line = b'{"delta":"a","x":' + b"[" * depth + b"]" * depth + b"}"
    assert PUBLICATIONS[LINES](20_000).feed(line + b"\n") == [b"data: " + line + b"\n\n"]
    with pytest.raises(PublishError, match="not JSON"):
        PUBLICATIONS[LINES](20_000).feed(line[:-2] + b"}\n")


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_above_the_bound_is_refused(end: bytes) -> None:
    fits = b'"' + b"x" * (EVENT_BYTES_MAX - 10) + b'"'
    out, error = each_cut(LINES, b"1\n" + fits + b"\n")
    assert (error, len(out[1])) == (None, EVENT_BYTES_MAX)
    for pieces in ([b"1\n" + b"x" * EVENT_BYTES_MAX + end], [b"1\n", *[b"x"] * EVENT_BYTES_MAX, b"x", end]):
        out, error = run(LINES, pieces)
        assert error is not None
        assert (error.code, error.status, str(error)) == ("event_too_large", 413, "Line 2 is larger than 200 bytes.")
        assert out == [b"data: 1\n\n"]


def test_a_line_done_ends_the_stream() -> None:
    taken = publication(LINES)
    assert not taken.done
    assert taken.feed(b"[DONE]\n") == [DONE_EVENT]
    assert taken.done


# -- events


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: 1\n\n", [b"data: 1\n\n"]),
        (b"id: 7\nevent: x\ndata: 1\n\n", [b"event: x\ndata: 1\n\n"]),
        (b"data: 1\r\n\r\ndata: 2\r\rdata: 3\n\n", [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]),
        (b"data: 1\ndata: 2\n\n", [b"data: 1\ndata: 2\n\n"]),
        (b"\xef\xbb\xbfdata: 1\n\n", [b"data: 1\n\n"]),
        (b"data: 1", [b"data: 1\n\n"]),  # without the blank line, in a body that ended properly
        (b": hello\n\ndata: 1\n\n", [b": hello\n", b"data: 1\n\n"]),
        (b"retry: 10\n\n", []),
        (b"retry: 10\ndata: 1\nretry\n\n", [b"data: 1\n\n"]),
        (b": c\nretry: 10\n\n", [b": c\n"]),
        (b"event: gaps\ndata: retry: 10\n\n", [b"event: gaps\ndata: retry: 10\n\n"]),
        (b"data: 1\n\ndata: [DONE]\n\n", [b"data: 1\n\n", DONE_EVENT]),
        (b"data: [DONE]\n\n: bye\n\n", [DONE_EVENT, b": bye\n"]),
        (b"", []),
    ],
)
def test_events_pass_unchanged(body: bytes, events: list[bytes]) -> None:
    assert each_cut(EVENTS, body) == (events, None)


@pytest.mark.parametrize(
    ("body", "good", "code", "text"),
    [
        (b"data: 1\n\ndata: \x00\n\n", 1, "bad_event", "Event 2 has a NUL"),
        (b"data: 1\n\n: \x00\n\n", 1, "bad_event", "What follows event 1 has a NUL"),
        (b"data: 1\n\ndata: ab\xff\n\n", 1, "bad_utf8", "Event 2 is not UTF-8 at its byte 8"),
        (b"data: 1\n\nevent: gap\ndata: 2\n\n", 1, "bad_event", "Event 2 is of a type of streamd's own"),
        (b"retry: 1\ndata: 1\n\nevent:reconnect\ndata: 2\n\n", 1, "bad_event", "Event 2 is of a type"),
        (b"data: 1\n\ndata: 2\nevent: x\nevent: gap\n\n", 1, "bad_event", "Event 2 is of a type"),
        (b"data: 1\r\rid: 4\revent: gap\rdata: 2\r\r", 1, "bad_event", "Event 2 is of a type"),
        (b"data: [DONE]\n\ndata: 1\n\n", 1, "after_done", "Event 2 comes after"),
        (b"data: [DONE]\n\ndata: 1", 1, "after_done", "Event 2 comes after"),
        (b"data: 1\n\ndata: " + b"x" * EVENT_BYTES_MAX + b"\n\n", 1, "event_too_large", "Event 2 is larger than 200"),
    ],
)
def test_a_bad_event_is_refused_after_the_good_events(body: bytes, good: int, code: str, text: str) -> None:
    out, error = each_cut(EVENTS, body)
    assert error is not None
    assert (error.code, len(out)) == (code, good)
    assert error.status == (413 if code == "event_too_large" else 400)
    assert text in str(error)


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        (b"data:[DONE]\n\n", True),
        (b"event: end\ndata: [DONE]\n\n", True),
        (b"data: [DONE]x\n\n", False),
        (b'data: "[DONE]"\n\n', False),
        (b": [DONE]\ndata: 1\n\n", False),
    ],
)
def test_the_last_event_of_a_dialect_ends_the_stream(event: bytes, ends: bool) -> None:
    taken = publication(EVENTS)
    assert taken.feed(event) == [event]
    assert taken.done is ends


# -- text


def said(events: list[bytes]) -> str:
    return "".join(json.loads(parse_event(each)[1])["delta"] for each in events)


def test_the_text_of_one_read_is_one_event() -> None:
    taken = publication(TEXT)
    assert taken.feed(b"Hello, ") == [b'data: {"delta":"Hello, "}\n\n']
    assert taken.feed(b'"world"\n') == [b'data: {"delta":"\\"world\\"\\n"}\n\n']
    assert taken.finish() == []
    assert not taken.done


def test_a_character_is_never_cut() -> None:
    taken = publication(TEXT)
    out = [taken.feed(bytes([byte])) for byte in "aé🙂".encode()]
    assert [len(each) for each in out] == [1, 0, 1, 0, 0, 0, 1]
    assert said([event for each in out for event in each]) == "aé🙂"


def test_text_cannot_end_the_stream() -> None:
    taken = publication(TEXT)
    assert said(taken.feed(b"[DONE]\n")) == "[DONE]\n"
    assert not taken.done


@pytest.mark.parametrize(
    ("body", "place"), [(b"ab\xffcd", 2), (b"\xe9", 0), (b"a\xc3\xa9\xc3", 3), (b"\xf0\x9f\x99", 0)]
)
def test_text_that_is_not_utf8_is_refused_with_its_place(body: bytes, place: int) -> None:
    for pieces in cuts(body):
        out, error = run(TEXT, pieces)
        assert error is not None
        assert (str(error), error.code) == (f"The text is not UTF-8 at byte {place}.", "bad_utf8")
        assert said(out).encode() == body[:place]


@given(st.text(), st.lists(st.integers(0, 200)))
def test_text_comes_out_unchanged(text: str, places: list[int]) -> None:
    body = text.encode("utf-8", "ignore")
    ends = sorted({min(place, len(body)) for place in places} | {0, len(body)})
    out, error = run(TEXT, [body[start:end] for start, end in pairwise(ends)])
    assert (error, said(out)) == (None, body.decode())
    assert all(len(each) <= EVENT_BYTES_MAX for each in out)


@pytest.mark.parametrize("character", ["\0", "x", "é", "🙂", '"'])
def test_a_large_read_becomes_events_of_the_allowed_size(character: str) -> None:
    out, error = run(TEXT, [(character * 1000).encode()])
    assert (error, said(out)) == (None, character * 1000)
    assert all(len(each) <= EVENT_BYTES_MAX for each in out)
    assert len(out) > 1


# -- any body


@given(st.sampled_from(list(PUBLICATIONS)), st.lists(st.binary(max_size=30), max_size=10))
def test_any_body_becomes_events_or_is_refused(kind: str, pieces: list[bytes]) -> None:
    out, _ = run(kind, pieces)
    for each in out:
        assert each.endswith(b"\n")
        assert b"\r" not in each
        assert b"\0" not in each
        each.decode()
        if each.endswith(b"\n\n") and kind == LINES and each != DONE_EVENT:
            orjson.loads(parse_event(each)[1])


# -- lines that are scanned as they come

LONG = 200_000
LONG_LINES = {
    "text": b'{"delta":"' + b"so, then " * (LONG // 9) + b'"}',
    "numbers": b"[" + b"0, " * (LONG // 3) + b"0]",
    "lists": b'{"a":[' + b"[[0]]," * (LONG // 10) + b"0]}",
    "escapes": b'["' + b'\\"\\u4e2d' * (LONG // 8) + b'"]',
    "deep": b"[" * 20_000 + b"]" * 20_000 + b" " * LONG,
}


@pytest.mark.parametrize("step", [1000, 4096, 65_536])
@pytest.mark.parametrize("line", LONG_LINES.values(), ids=LONG_LINES)
def test_a_long_line_is_an_event_however_it_comes(line: bytes, step: int) -> None:
    publication = PUBLICATIONS[LINES](2 * LONG)
    body = line + b"\r\n" + b'{"delta":"a"}\n'
    events = [event for at in range(0, len(body), step) for event in publication.feed(body[at : at + step])]
    assert events == [b"data: " + line.strip() + b"\n\n", b'data: {"delta":"a"}\n\n']
    assert publication.finish() == []


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a":"' + b"x" * LONG + b'"}}', "bad_json"),
        (b'{"a":' + b" " * LONG + b"nul}", "bad_json"),
        (b'{"a":"' + b"x" * LONG + b"\xff" + b'"}', "bad_utf8"),
        (b'{"a":"' + b"x" * LONG, "bad_json"),
        (b"[" + b"[[]]," * 40_000 + b"0]", "json_too_large"),
    ],
)
def test_a_long_line_that_is_no_json_is_refused(line: bytes, code: str) -> None:
    publication = PUBLICATIONS[LINES](2 * LONG)
    body = line + b"\n"
    with pytest.raises(PublishError, match="^Line 1 ") as caught:
        for at in range(0, len(body), 16_384):
            publication.feed(body[at : at + 16_384])
    assert caught.value.code == code


def test_a_long_line_is_refused_at_its_first_mistake() -> None:
    publication = PUBLICATIONS[LINES](2 * LONG)
    with pytest.raises(PublishError, match="^Line 1 is not JSON at column 3"):
        publication.feed(b"[0}" + b" " * 5_000)


def test_the_containers_of_a_long_line_count_as_work() -> None:
    publication = PUBLICATIONS[LINES](2 * LONG)
    publication.feed(b"[" + b"[[0]]," * 5_000)
    assert publication.containers == 10_001
