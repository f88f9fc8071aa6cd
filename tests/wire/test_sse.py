from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd.wire import sse
from streamd.wire.sse import (
    EVENT_LINES_MAX,
    HEARTBEAT,
    EventSplitter,
    EventTooLarge,
    data_lines,
    frame,
    frames,
    parse_event,
)

MAX = 1 << 20


def split(*chunks: bytes, event_bytes_max: int = MAX, finish: bool = True) -> list[bytes]:
    splitter = EventSplitter(event_bytes_max=event_bytes_max)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    return pieces + splitter.finish() if finish else pieces


def byte_wise(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


def reference(stream: bytes) -> list[bytes]:
    """The same pieces by the letter of the standard: whole and line by line, without regard to speed."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    lines = re.split(rb"\r\n|\r|\n", stream)
    lines += [] if lines[-1] == b"" else [b""]
    pieces, block = [], []
    for line in [*lines, b""]:
        if line:
            block.append(line)
        elif block:
            names = [row.split(b":")[0] for row in block]
            if b"data" in names:
                kept = [row for row, name in zip(block, names, strict=True) if name not in (b"id", b"retry")]
                pieces.append(b"\n".join(kept) + b"\n\n")
            else:
                kept = [row for row in block if row.startswith(b":")]
                pieces += [b"".join(row + b"\n" for row in kept)] if kept else []
            block = []
    return pieces


WHOLE = {
    "one event": (b"data: a\n\n", [b"data: a\n\n"]),
    "no space": (b"data:a\n\n", [b"data:a\n\n"]),
    "two": (b"data: a\n\ndata: b\n\n", [b"data: a\n\n", b"data: b\n\n"]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"data: a\n\n", b"data: b\n\n"]),
    "cr": (b"data: a\r\rdata: b\r\r", [b"data: a\n\n", b"data: b\n\n"]),
    "mixed": (
        b"data: a\rdata: b\r\n\ndata: c\n\r\n",
        [b"data: a\ndata: b\n\n", b"data: c\n\n"],
    ),
    "many blank lines": (
        b"\n\r\n\r\rdata: a\n\n\n\n\ndata: b\n\n\n",
        [b"data: a\n\n", b"data: b\n\n"],
    ),
    "event line": (b"event: x\ndata: a\n\n", [b"event: x\ndata: a\n\n"]),
    "data without colon": (b"data\n\n", [b"data\n\n"]),
    "data without colon, not first": (b"event: x\ndata\n\n", [b"event: x\ndata\n\n"]),
    "empty data": (b"data:\n\n", [b"data:\n\n"]),
    "dataset is no data": (b"dataset: a\n\n", []),
    "data in a value is no data": (b"event: data: a\n\n", []),
    "space before data is no data": (b" data: a\n\n", []),
    "id removed": (b"id: 1\ndata: a\nid\nid:\nid:2\n\n", [b"data: a\n\n"]),
    "retry removed": (b"retry: 1\ndata: a\nretry\nretry:\nretry:2\n\n", [b"data: a\n\n"]),
    "retry removed, CRLF": (b"retry: 1\r\ndata: a\r\nretry: 2\r\n\r\n", [b"data: a\n\n"]),
    "retry removed, CR": (b"event: x\rdata: a\rretry: 2\r\r", [b"event: x\ndata: a\n\n"]),
    "other names with retry stay": (
        b"retryx: 1\nretry : 2\n retry: 3\ndata: retry: 4\n\n",
        [b"retryx: 1\nretry : 2\n retry: 3\ndata: retry: 4\n\n"],
    ),
    "other names with id stay": (
        b"idx: 1\nid : 2\n id: 3\ndata: id: 4\n\n",
        [b"idx: 1\nid : 2\n id: 3\ndata: id: 4\n\n"],
    ),
    "comment in an event": (b": c\ndata: a\n: d\n\n", [b": c\ndata: a\n: d\n\n"]),
    "comment alone": (b": ping\n\ndata: a\n\n", [b": ping\n", b"data: a\n\n"]),
    "bare colon": (b":\n\n", [b":\n"]),
    "retry alone": (b"retry: 5\n\n", []),
    "retry without colon": (b"retry\nevent: x\n\n", []),
    "loose lines of a block": (
        b": a\nevent: x\nid: 1\nretry:2\nretryx: 3\n:b\n\n",
        [b": a\n:b\n"],
    ),
    "fields without data": (b"event: x\nid: 1\nfoo\n\n", []),
    "bom": (b"\xef\xbb\xbfdata: a\n\n", [b"data: a\n\n"]),
    "bom in front of a comment": (b"\xef\xbb\xbf: x\n\n", [b": x\n"]),
    "second bom is a name": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    "late bom is a name": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"data: a\n\n"]),
    "bom alone": (b"\xef\xbb\xbf", []),
    "a part of a bom": (b"\xef\xbb", []),
    "no blank line": (b"data: a", [b"data: a\n\n"]),
    "no blank line but a line end": (b"data: a\r\n", [b"data: a\n\n"]),
    "ends in cr": (b"data: a\r", [b"data: a\n\n"]),
    "comment without its end": (b": bye", [b": bye\n"]),
    "any bytes": (
        b"data: \x00\xff\xc3\x1b\x85\n\n",
        [b"data: \x00\xff\xc3\x1b\x85\n\n"],
    ),
    "unicode line ends are none": (
        "data: a\u2028b\x0b\x0cc\n\n".encode(),
        ["data: a\u2028b\x0b\x0cc\n\n".encode()],
    ),
    "empty": (b"", []),
    "trailing bytes": (b"data: a\n\ndata: b\n\nev", [b"data: a\n\n", b"data: b\n\n"]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_stream_is_split_alike_whole_byte_by_byte_and_in_two(name: str) -> None:
    stream, pieces = WHOLE[name]
    assert reference(stream) == pieces
    assert split(stream) == pieces
    assert split(*byte_wise(stream)) == pieces
    for at in range(len(stream) + 1):
        assert split(stream[:at], stream[at:]) == pieces
        assert split(stream[:at], b"", stream[at:]) == pieces


line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
words = st.sampled_from(
    [
        b"data",
        b"data:",
        b"data: ",
        b"id",
        b"id: ",
        b"retry: 1",
        b":",
        b"event: ",
        b"x",
        b" ",
        b"\xef\xbb\xbf",
        b"\xef",
        b"",
    ]
)
contents = st.lists(words, max_size=3).map(b"".join)
streams = st.lists(st.one_of(line_ends, contents), max_size=24).map(b"".join)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(position % (len(stream) + 1) for position in at), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(streams, st.lists(st.integers(0, 400), max_size=8))
@example(b"data\r\r\ndata\r\n\r\n", [6, 7, 8])
def test_any_stream_in_any_cut_is_split_as_the_standard_says(stream: bytes, at: list[int]) -> None:
    expected = reference(stream)
    assert split(*cut(stream, at)) == expected
    assert split(*byte_wise(stream)) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(streams, st.just(b"data: x\n\n")), max_size=6), streams, st.integers(4, 60))
def test_chunks_fed_together_give_the_same_as_end_to_end(chunks: list[bytes], first: bytes, size_max: int) -> None:
    def fed(together: bool) -> list[bytes]:
        splitter = EventSplitter(event_bytes_max=size_max)
        try:
            pieces = splitter.feed(first)
            more = splitter.feed_all(chunks) if together else splitter.feed(b"".join(chunks))
            return [*pieces, *more, *splitter.finish(), b"%d" % splitter.pending]
        except EventTooLarge as large:
            return [*large.before, large.bound.encode()]

    assert fed(together=True) == fed(together=False)


@given(st.integers(1, 5000), st.lists(st.binary(min_size=1, max_size=3000), max_size=5))
def test_frames_end_to_end_are_the_frames_of_each_event(seq: int, some: list[bytes]) -> None:
    expected = b"".join(frame(b"id: s:", seq + k, event, chunked=True) for k, event in enumerate(some))
    assert frames(b"id: s:", seq, some) == expected


value = st.binary(max_size=12).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b""))
event_lines = st.lists(
    st.tuples(st.sampled_from([b"data: ", b"event: ", b": ", b"x: "]), value).map(b"".join),
    max_size=3,
)
events = st.tuples(event_lines, value).map(lambda both: [*both[0], b"data: " + both[1]])


@settings(max_examples=200, deadline=None)
@given(st.lists(events, min_size=1, max_size=6), st.data())
def test_events_survive_any_cut_and_any_line_ends(blocks: list[list[bytes]], data: st.DataObject) -> None:
    expected = [b"".join(line + b"\n" for line in lines) + b"\n" for lines in blocks]
    stream = b""
    for line in [line for lines in blocks for line in [*lines, b""]]:
        # An LF right after a CR belongs to the line before, so an empty line after CR doesn't end with LF alone.
        ends = [b"\r", b"\r\n"] if not line and stream.endswith(b"\r") else [b"\n", b"\r\n", b"\r"]
        stream += line + data.draw(st.sampled_from(ends))
    at = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert split(*cut(stream, at)) == expected


@settings(max_examples=200, deadline=None)
@given(streams, st.lists(st.integers(0, 400), max_size=6))
def test_every_piece_is_an_event_or_loose_lines(stream: bytes, at: list[int]) -> None:
    for piece in split(*cut(stream, at)):
        assert b"\r" not in piece and b"\n\n" not in piece[:-2] and not piece.startswith(b"\n")
        names = [line.split(b":")[0] for line in piece.rstrip(b"\n").split(b"\n")]
        if piece.endswith(b"\n\n"):
            assert b"data" in names and not {b"id", b"retry"} & set(names)
        else:
            assert piece.endswith(b"\n") and set(names) == {b""}
        assert split(b"\n", piece) == [piece]  # not at the start, where a BOM would be removed


class Taker:
    """Makes an event of every line that begins with `!`, and notes all lines."""

    def __init__(self) -> None:
        self.taken: list[tuple[bytes, bool]] = []

    def take_strays(self, lines: bytes, before: list[bytes], *, dropped: bool) -> list[bytes]:
        self.taken.append((lines, dropped))
        return [b"data: %b\n\n" % line for line in lines.splitlines() if line.startswith(b"!")]


def strays_in(*chunks: bytes) -> tuple[list[bytes], list[tuple[bytes, bool]]]:
    taker = Taker()
    splitter = EventSplitter(event_bytes_max=MAX, strays=taker)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)] + splitter.finish()
    return pieces, taker.taken


STRAYS = {
    "beside data": (b"x: 1\ndata: a\nid: 2\n\n", [b"x: 1\ndata: a\n\n"], [(b"x: 1\n", False)]),
    "a block without data": (b"event: e\nid: 1\nx\n: c\n\n", [b": c\n"], [(b"event: e\nx\n", True)]),
    "an event in its place": (b"!\n\ndata: a\n\n", [b"data: !\n\n", b"data: a\n\n"], [(b"!\n", True)]),
    "in front of its block": (b"data: a\n!\n\n", [b"data: !\n\n", b"data: a\n!\n\n"], [(b"!\n", False)]),
    "names that only begin like fields": (b"dataset: 1\nidx\n\n", [], [(b"dataset: 1\nidx\n", True)]),
    "CRLF, and no blank line": (b"x: 1\r\ny", [], [(b"x: 1\ny\n", True)]),
    "none": (b"data: a\nevent: b\nretry: 1\n\n: c\n\nid: 7\n\n", [b"data: a\nevent: b\n\n", b": c\n"], []),
}


@pytest.mark.parametrize("name", STRAYS)
def test_lines_without_effect_are_shown_once_in_any_cut(name: str) -> None:
    stream, pieces, taken = STRAYS[name]
    for chunks in ([stream], byte_wise(stream), *([stream[:at], stream[at:]] for at in range(len(stream)))):
        assert strays_in(*chunks) == (pieces, taken)


@settings(max_examples=200, deadline=None)
@given(streams, st.lists(st.integers(0, 400), max_size=8))
def test_strays_change_nothing_for_a_taker_that_makes_no_events(stream: bytes, at: list[int]) -> None:
    pieces, taken = strays_in(*cut(stream, at))
    assert pieces == reference(stream)
    assert strays_in(stream) == (pieces, taken)


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        (b"x: 1", [(b"x: 1\n", True)]),
        (b"x: 1\ny: 2\n", [(b"x: 1\ny: 2\n", True)]),
        (b"data: a\nx: 1", []),
        (b"", []),
        (b": c", []),
    ],
)
def test_a_block_that_is_cut_is_shown_unless_it_has_data(held: bytes, taken: list[tuple[bytes, bool]]) -> None:
    taker = Taker()
    splitter = EventSplitter(event_bytes_max=MAX, strays=taker)
    splitter.feed(b"data: whole\n\n" + held)
    assert splitter.give_up() == [] and taker.taken == taken
    assert splitter.pending == 0 and splitter.give_up() == []
    assert EventSplitter(event_bytes_max=MAX).give_up() == []


@pytest.mark.parametrize(
    "half, kept",
    [
        (b"", True),
        (b"d", False),
        (b"data", False),
        (b"data: 1", False),
        (b"e", False),
        (b"event", False),
        (b"event: err", False),
        (b"o", True),
        (b"other: fie", True),
        (b"id: 1", True),
        (b"retry", True),
        (b": comm", True),
        (b"eventual", True),
        (b"database: x", True),
    ],
)
@pytest.mark.parametrize("first", [b"", b"event: x\n"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_block_cut_behind_whole_data_is_kept_without_the_half_field(
    half: bytes, kept: bool, first: bytes, line_end: bytes
) -> None:
    splitter = EventSplitter(event_bytes_max=MAX)
    held = first + b"data: {}\n" + half
    assert splitter.feed(held.replace(b"\n", line_end)) == []
    assert splitter.give_up() == ([first + b"data: {}\n\n"] if kept else [])
    assert splitter.pending == 0


def test_one_whole_event_is_not_copied() -> None:
    splitter = EventSplitter(event_bytes_max=MAX)
    for chunk in [b"data: one\n\n", b"data: two\n\n"]:
        (event,) = splitter.feed(chunk)
        assert event is chunk
    typed = b"event: x\ndata: three\n\n"
    (event,) = splitter.feed(typed)
    assert event is typed
    assert splitter.pending == 0


def test_an_event_is_whole_at_the_first_byte_that_ends_its_blank_line() -> None:
    splitter = EventSplitter(event_bytes_max=MAX)
    assert splitter.feed(b"data: a\r\n\r") == [b"data: a\n\n"]
    assert splitter.pending == 0
    assert splitter.feed(b"\ndata: b\r\r") == [b"data: b\n\n"]
    assert splitter.feed(b"\n") == []
    assert splitter.feed(b"\n") == []
    assert splitter.pending == 0
    assert splitter.feed(b"data: c\n\n") == [b"data: c\n\n"]


def test_an_lf_after_the_cr_of_a_blank_line_does_not_swallow_an_event() -> None:
    splitter = EventSplitter(event_bytes_max=MAX)
    splitter.feed(b"data: a\r\r")
    assert splitter.feed(b"data: b\n\n") == [b"data: b\n\n"]
    assert splitter.feed(b"data: c\n") == []
    assert splitter.feed(b"\n") == [b"data: c\n\n"]


def test_pending_counts_the_held_bytes() -> None:
    splitter = EventSplitter(event_bytes_max=MAX)
    seen = []
    for byte in byte_wise(b"\xef\xbb\xbf\ndata: a\r\n\r\n"):
        splitter.feed(byte)
        seen.append(splitter.pending)
    assert seen == [1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 0, 0]


def test_finish_leaves_the_splitter_at_a_boundary() -> None:
    splitter = EventSplitter(event_bytes_max=MAX)
    splitter.feed(b"data: a\r")
    assert splitter.finish() == [b"data: a\n\n"]
    assert splitter.pending == 0
    assert splitter.finish() == []


def feed_until_too_large(chunks: list[bytes], event_bytes_max: int) -> tuple[list[bytes], int]:
    """The pieces before the refusal, and the number of bytes that were fed."""
    splitter = EventSplitter(event_bytes_max=event_bytes_max)
    before: list[bytes] = []
    fed = 0
    for chunk in chunks:
        fed += len(chunk)
        try:
            before += splitter.feed(chunk)
        except EventTooLarge as too_large:
            return before + too_large.before, fed
    raise AssertionError("not refused")


@pytest.mark.parametrize("line", [b"data: aaaa", b": aaaaaaaa", b"data:\ndata", b"event: aaa"])
def test_an_event_of_the_largest_size_passes_and_one_byte_more_does_not(line: bytes) -> None:
    stream = b"data: ok\n\n" + line + b"\n\n"
    assert split(stream, event_bytes_max=12) == split(*byte_wise(stream), event_bytes_max=12) == split(stream)
    for chunks in ([stream], byte_wise(stream)):
        assert feed_until_too_large(chunks, 11)[0] == [b"data: ok\n\n"]


def test_a_too_large_event_is_refused_before_its_end() -> None:
    endless = [b"data: ok\n\nda", b"ta:", *[b"x"] * 1000]
    assert feed_until_too_large(endless, 100) == (
        [b"data: ok\n\n"],
        len(b"data: ok\n\n") + 101,
    )
    assert feed_until_too_large([b"data: ok\n\n" + b"x" * 1000], 100)[0] == [b"data: ok\n\n"]


def test_finish_keeps_the_bound_of_an_event() -> None:
    splitter = EventSplitter(event_bytes_max=12)
    splitter.feed(b"data: aaaaa")
    with pytest.raises(EventTooLarge):
        splitter.finish()


def test_huge_lines_and_byte_wise_arrival_are_searched_once() -> None:
    """Counts work instead of time: the searches of a held block together cover each of its bytes at most twice."""

    class Counting(bytearray):
        looked_at = 0

        def find(self, sub: bytes, start: int = 0) -> int:  # type: ignore[override]
            Counting.looked_at += len(self) - start
            return super().find(sub, start)

    splitter = EventSplitter(event_bytes_max=MAX)
    splitter.feed(b"d")
    splitter._held = Counting(splitter._held or b"")
    for byte in byte_wise(b"ata: " + b"x" * 20_000 + b"\n"):
        assert splitter.feed(byte) == []
    assert isinstance(splitter._held, Counting)
    assert Counting.looked_at <= 2 * splitter.pending
    assert splitter.feed(b"\n") == [b"data: " + b"x" * 20_000 + b"\n\n"]


PREFIX = b"id: s_" + b"x" * 27 + b":"


@pytest.mark.parametrize("seq", [1, 9, 10, 99, 100, 2046, 2047, 2048, 2049, 10**6, 2**53])
@pytest.mark.parametrize("size", [0, 1, 200, 1990, 2000, 2010, 2048, 70_000])
def test_a_frame_is_its_id_line_and_the_event(seq: int, size: int) -> None:
    event = b"data: " + b"y" * size + b"\n\n"
    bare = frame(PREFIX, seq, event, chunked=False)
    assert bare == PREFIX + str(seq).encode() + b"\n" + event
    size_line, _, rest = frame(PREFIX, seq, event, chunked=True).partition(b"\r\n")
    assert int(size_line, 16) == len(bare)
    assert rest == bare + b"\r\n"


def test_a_frame_read_back_is_the_event() -> None:
    for event in [
        b"data: a\n\n",
        b"event: x\ndata: a\ndata: b\n\n",
        b": c\nretryx: 3\ndata\n\n",
    ]:
        assert split(HEARTBEAT + frame(PREFIX, 7, event, chunked=False)) == [HEARTBEAT + event]


@pytest.mark.parametrize(
    ("event", "parsed"),
    [
        (b"data: a\n\n", (None, b"a")),
        (b"data:  a\n\n", (None, b" a")),
        (b"data:a\n\n", (None, b"a")),
        (b"data\n\n", (None, b"")),
        (b"data: a\ndata\ndata: b\n\n", (None, b"a\n\nb")),
        (b"event: x\ndata: a\n\n", ("x", b"a")),
        (b"event: x\nevent:y\ndata: a\n\n", ("y", b"a")),
        (b"event\ndata: a\n\n", (None, b"a")),
        (b": c\nretry: 1\nfoo: 2\ndata: a: b\n\n", (None, b"a: b")),
    ],
)
def test_an_event_is_parsed_into_its_name_and_data(event: bytes, parsed: tuple[str | None, bytes]) -> None:
    assert parse_event(event) == parsed


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        (b"data: a\n\n", b"data: a\n\n"),
        (b"data:a\n\n", b"data: a\n\n"),
        (b"data\n\n", b"data: \n\n"),
        (b"event: x\ndata: a\ndata\ndata:  b\n\n", b"data: a\ndata: \ndata:  b\n\n"),
        (b": c\nretry: 1\ndatabase: 2\ndata: a: b\n\n", b"data: a: b\n\n"),
        (b"data: a\nother: b\n\n", b"data: a\n\n"),
    ],
)
def test_data_lines_keep_the_data_and_no_other_line(event: bytes, lines: bytes) -> None:
    assert data_lines(event) == lines
    assert parse_event(lines) == (None, parse_event(event)[1])


def test_a_plain_event_in_one_read_is_bounded() -> None:
    splitter = EventSplitter(event_bytes_max=100)
    most = b"data: %b\n\n" % (b"x" * 92)
    assert splitter.feed(most) == [most]
    with pytest.raises(EventTooLarge):
        splitter.feed(most.replace(b"x", b"xx", 1))


@pytest.mark.parametrize("line", [b"data:\n", b":\n", b"id\n", b"x\n"])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_the_lines_of_an_event_are_bounded(line: bytes, size: int) -> None:
    for count, fits in ((EVENT_LINES_MAX - 3, True), (EVENT_LINES_MAX + 1, False)):
        block = line * count + b"data: end\n\n"
        splitter, found = EventSplitter(event_bytes_max=1 << 20), []
        wire = b"data: before\n\n" + block
        try:
            for at in range(0, len(wire), size):
                found += splitter.feed(wire[at : at + size])
        except EventTooLarge as large:
            assert not fits and large.bound == f"{EVENT_LINES_MAX} lines"
            found += large.before
        assert found[0] == b"data: before\n\n" and len(found) == 1 + fits


@given(
    st.lists(
        st.sampled_from(
            [b"data: a", b"data:b", b"data", b"data:", b"data:  c", b"event: x", b": hb", b"id: 1", b"dat: q"]
        ),
        min_size=1,
        max_size=2 * sse.VIEWED_LINES_MAX,
    )
)
def test_the_data_lines_of_a_large_event_are_those_of_any_event(lines: list[bytes]) -> None:
    event = b"\n".join(lines) + b"\n\n"
    assert b"".join(sse.data_line_parts(memoryview(event))) == sse.data_lines(event)


def test_a_large_event_of_a_data_line_is_not_copied() -> None:
    event = b"data: " + b"x" * 100_000 + b"\n\n"
    parts = sse.data_line_parts(memoryview(event))
    assert [part for part in parts if isinstance(part, memoryview) and part.obj is event and len(part) > 100_000]
    assert sum(len(part) for part in parts if isinstance(part, bytes)) < 20


@given(st.integers(1, 1 << 40), st.integers(0, 5000))
def test_the_size_of_a_frame_is_known_without_the_frame(seq: int, size: int) -> None:
    assert sse.frame_size(b"id: s_x:", seq, size) == len(sse.frame(b"id: s_x:", seq, b"e" * size, chunked=True))
