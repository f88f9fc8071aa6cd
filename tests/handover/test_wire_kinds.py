"""Parsers that go on in another process at any byte: the same pieces as without the move, and no state does harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.handover.record import pack, unpack
from streamd.handover.wire_kinds import DECODER, HEAD, PROGRESS, SPLITTER
from streamd.wire.chunked import (
    TRAILERS_MAX,
    ChunkedDecoder,
    ChunkedState,
    ChunkPart,
    LengthDecoder,
    LengthState,
    UntilCloseDecoder,
    decoder_of,
)
from streamd.wire.dialect import Dialect
from streamd.wire.dialects.api import CHOICE_INDEX_MAX, Progress, ProgressState
from streamd.wire.http1 import LEADING_LINES_MAX, RESPONSE_OPENING, HeadReader, HeadState
from streamd.wire.inflate import InflatingDecoder
from streamd.wire.inner import InnerSplitter, InnerState
from streamd.wire.json_lines import JsonLines, LinesState
from streamd.wire.sse import BOM, Edge, EventSplitter, SplitterState
from streamd.wire.strays import StraysState

BYTES_MAX = 4096


def moved(kind: Any, state: Any) -> Any:
    """The state, as another process reads it."""
    again = unpack(kind, pack(kind, state))
    assert again == state
    return again


# -- bodies

CHUNKED = b'5\r\nhello\r\n0a;a="b"\r\n0123456789\r\n1 \r\n!\r\n0\r\nx-a: b\r\ny: \r\n\r\n'


@pytest.mark.parametrize("at", range(len(CHUNKED)))
def test_a_chunked_body_goes_on_at_any_byte(at: int) -> None:
    first = ChunkedDecoder(loose=True)
    pieces = first.feed(CHUNKED[:at]) if at else []
    then = decoder_of(moved(DECODER, first.state()))
    assert isinstance(then, ChunkedDecoder) and then.at_boundary == first.at_boundary
    pieces += then.feed(CHUNKED[at:] + b"rest")
    assert b"".join(pieces) == b"hello0123456789!" and then.done and then.rest == b"rest"


def test_other_bodies_go_on_as_well() -> None:
    length = LengthDecoder(5)
    length.feed(b"he")
    then = decoder_of(moved(DECODER, length.state()))
    assert then.feed(b"lloX") == [b"llo"] and then.done and then.rest == b"X"
    assert decoder_of(moved(DECODER, LengthDecoder(0).state())).done
    endless = decoder_of(moved(DECODER, UntilCloseDecoder().state()))
    assert endless.feed(b"a") == [b"a"] and not endless.done and endless.eof()


def test_the_trailers_that_came_count_after_the_move_too() -> None:
    first = ChunkedDecoder()
    first.feed(b"0\r\n" + b"a: b\r\n" * TRAILERS_MAX)
    then = decoder_of(moved(DECODER, first.state()))
    with pytest.raises(Exception, match="trailers"):
        then.feed(b"a: b\r\n")


def test_an_encoded_body_can_not_be_told() -> None:
    assert not hasattr(InflatingDecoder(LengthDecoder(5), b"gzip"), "state")


@pytest.mark.parametrize(
    "state",
    [
        ChunkedState(False, ChunkPart.END, 0, b"", 0, 0),
        ChunkedState(False, ChunkPart.DATA, 0, b"", 0, 0),
        ChunkedState(False, ChunkPart.DATA, 3, b"x", 0, 0),
        ChunkedState(False, ChunkPart.SIZE, 3, b"", 0, 0),
        ChunkedState(False, ChunkPart.SIZE, 0, b"5\r\n", 0, 0),
        ChunkedState(False, ChunkPart.SIZE, 0, b"x", 0, 0),
        ChunkedState(False, ChunkPart.SIZE, 0, b"5 ", 0, 0),
        ChunkedState(False, ChunkPart.SIZE, 0, b"", 1, 5),
        ChunkedState(False, ChunkPart.DATA_END, 0, b"\r\n", 0, 0),
        ChunkedState(False, ChunkPart.DATA_END, 0, b"x", 0, 0),
        ChunkedState(False, ChunkPart.TRAILER, 0, b"a: b\r\n", 0, 0),
        ChunkedState(False, ChunkPart.TRAILER, 0, b"\r\n", 0, 0),
        ChunkedState(False, ChunkPart.TRAILER, 0, b"", TRAILERS_MAX + 1, 0),
        LengthState(-1),
    ],
)
def test_a_body_that_can_not_have_come_so_far_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="body"):
        decoder_of(state)


# -- event streams

EVENTS = BOM + b": hb\n\rdata: a\r\n\r\ndata: b\r\rid: 4\nevent: x\ndata: c\ndata: d\n\n\nerror: no\n\ndata: e"


class Taker:
    """Takes strays as a stream does: an event stands for each."""

    def take_strays(self, lines: bytes, before: list[bytes], *, dropped: bool) -> list[bytes]:
        return [b"event: error\ndata: %b\n\n" % lines.strip().replace(b"\n", b" ")]


@pytest.mark.parametrize("at", range(len(EVENTS) + 1))
def test_an_event_stream_goes_on_at_any_byte(at: int) -> None:
    whole = EventSplitter(event_bytes_max=BYTES_MAX, strays=Taker())
    expected = whole.feed(EVENTS) + whole.finish()
    first, then = (EventSplitter(event_bytes_max=BYTES_MAX, strays=Taker()) for _ in range(2))
    pieces = first.feed(EVENTS[:at])
    then.go_on_from(moved(SPLITTER, first.state()))
    assert (then.pending, then.at_rest, then.in_comment) == (first.pending, first.at_rest, first.in_comment)
    assert pieces + then.feed(EVENTS[at:]) + then.finish() == expected


@given(st.lists(st.sampled_from([b"data: x", b"\r", b"\n", b"\r\n", b": c", b"\xef\xbb\xbf", b"id", b"a"])), st.data())
def test_any_event_stream_goes_on_at_any_byte(parts: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(parts)
    at = data.draw(st.integers(0, len(wire)))
    whole, first, then = (EventSplitter(event_bytes_max=BYTES_MAX) for _ in range(3))
    pieces = first.feed(wire[:at])
    then.go_on_from(moved(SPLITTER, first.state()))
    assert pieces + then.feed(wire[at:]) + then.finish() == whole.feed(wire) + whole.finish()


def test_the_events_of_another_streamd_and_lines_of_json_go_on_as_well() -> None:
    wire = b'data: a\n\ndata: {"gap":{"from":7,"to":9}}\n\ndata: b\n\n'
    for at in range(len(wire)):
        first, then = (InnerSplitter(b": hb\n", event_bytes_max=BYTES_MAX, strays=Taker()) for _ in range(2))
        pieces = first.feed(wire[:at])
        then.go_on_from_inner(moved(SPLITTER, first.inner_state))
        pieces += then.feed(wire[at:])
        assert pieces == [b"data: a\n\n", b'data: {"gap":{"from":2,"to":2}}\n\n', b"data: b\n\n"]
    lines, api = b'{"choices":[]}\nerror: x\n[DONE]\n', Dialect.CHAT.api
    for at in range(len(lines)):
        one, two = (JsonLines(api, event_bytes_max=BYTES_MAX, strays=Taker()) for _ in range(2))
        pieces = one.feed(lines[:at])
        two.go_on_from_lines(moved(SPLITTER, one.lines_state))
        assert two.pending == one.pending
        pieces += two.feed(lines[at:])
        assert pieces == [b'data: {"choices":[]}\n\n', b"event: error\ndata: error: x\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("held", "edge"),
    [
        (b"\n", Edge.PLAIN),
        (b"data: a\n\n", Edge.PLAIN),
        (b"data: a\r", Edge.PLAIN),
        (b"data: a", Edge.AFTER_CR),
        (b"data", Edge.AT_START),
        (BOM, Edge.AT_START),
        (b"d" * (BYTES_MAX + 1), Edge.PLAIN),
    ],
)
def test_a_block_that_can_not_have_begun_so_is_refused(held: bytes, edge: Edge) -> None:
    state = SplitterState(held, edge)
    inner = InnerSplitter(b"", event_bytes_max=BYTES_MAX, strays=Taker())
    lines = JsonLines(Dialect.CHAT.api, event_bytes_max=BYTES_MAX, strays=Taker())
    for go_on in (
        lambda: EventSplitter(event_bytes_max=BYTES_MAX).go_on_from(state),
        lambda: inner.go_on_from_inner(InnerState(state, 1)),
        lambda: inner.go_on_from_inner(InnerState(SplitterState(b"", Edge.PLAIN), 0)),
        lambda: lines.go_on_from_lines(LinesState(state, b"")),
        lambda: lines.go_on_from_lines(LinesState(SplitterState(b"", Edge.PLAIN), b"{}\n")),
    ):
        with pytest.raises(ValueError, match="begun|whole|first"):
            go_on()


# -- heads

REQUEST = b"\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\nx: y\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"


@pytest.mark.parametrize(("wire", "opening"), [(REQUEST, b""), (ANSWER, RESPONSE_OPENING)])
def test_a_head_goes_on_at_any_byte(wire: bytes, opening: bytes) -> None:
    for at in range(len(wire)):
        first, then = HeadReader(opening=opening), HeadReader(opening=opening)
        assert first.feed(wire[:at]) is None
        then.go_on_from(moved(HEAD, first.state()))
        assert then.bytes_held == first.bytes_held
        assert then.feed(wire[at:] + b"rest") == (wire.lstrip(b"\r\n"), b"rest")


@pytest.mark.parametrize(
    "state",
    [
        HeadState(b"GET / HTTP/1.1\r\n\r\n", 0),
        HeadState(b"GET / HTTP/1.1\nx", 0),
        HeadState(b"\r\nGET", 0),
        HeadState(b"\0", 0),
        HeadState(b"x" * 70_000, 0),
        HeadState(b"", LEADING_LINES_MAX + 1),
        HeadState(b"", -1),
    ],
)
def test_a_head_that_can_not_have_begun_so_is_refused(state: HeadState) -> None:
    with pytest.raises(ValueError, match="head"):
        HeadReader().go_on_from(state)


# -- progress

CHAT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":%d,"delta":{"content":"a"},"finish_reason":%b}],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
)


def test_an_answer_is_complete_when_the_choices_of_both_processes_have_their_ends() -> None:
    first, then = Progress(Dialect.CHAT.api), Progress(Dialect.CHAT.api)
    for event in (CHAT % (0, b"null"), CHAT % (CHOICE_INDEX_MAX, b"null"), CHAT % (0, b'"stop"')):
        first.see(event)
    then.go_on_from(moved(PROGRESS, first.state()))
    assert not then.complete and then.usage == (3, 4) and then.chunk_head == first.chunk_head != b""
    then.see(CHAT % (CHOICE_INDEX_MAX, b'"stop"'))
    assert then.complete and then.state() == _seen(first, CHAT % (CHOICE_INDEX_MAX, b'"stop"'))


def _seen(progress: Progress, event: bytes) -> ProgressState:
    progress.see(event)
    return progress.state()


def test_dropped_lines_and_the_names_of_responses_move_with_the_answer() -> None:
    first, then = Progress(Dialect.RESPONSES.api), Progress(Dialect.RESPONSES.api)
    first.see(
        b'event: response.created\ndata: {"type":"response.created","sequence_number":5,"response":{"id":"r"}}\n\n'
    )
    state = first.state()._replace(strays=StraysState(2, 20, ("error", "(JSON)")))
    then.go_on_from(moved(PROGRESS, state))
    assert then.state() == state and then.response_id == "r" and then.sequence_number == 5
    assert then.strays is not None and then.strays.told() == "2 lines that are no events (error, (JSON))"


@pytest.mark.parametrize(
    "wrong",
    [
        {"terminal": True, "complete": False},
        {"finished": 2},
        {"begun": 1 << CHOICE_INDEX_MAX + 1},
        {"usage_at": -2},
        {"text_events": -1},
        {"strays": StraysState(5, 4, ())},
    ],
)
def test_an_answer_that_can_not_have_come_so_far_is_refused(wrong: dict[str, Any]) -> None:
    progress = Progress(Dialect.CHAT.api)
    with pytest.raises(ValueError, match="answer|lines"):
        progress.go_on_from(progress.state()._replace(**wrong))
