"""Server-sent events: a byte stream cut into whole events, and events framed for a reader (WHATWG HTML, 9.2).

Nothing is re-encoded. An event goes downstream as the bytes that came, but for four rules (docs/PROTOCOL.md, section
3): line ends become LF, the stream's leading BOM is removed, upstream `id` and `retry` lines are removed, and streamd's
own `id` line is put in front. Readers come back to streamd, so when they come is streamd's to say: with a server's
`retry: 1` in each answer, all readers of a restarted daemon would come at once.

**No blank line is ever written without a `data` line before it.** Once they have seen an `id` or `retry` line, the
OpenAI SDKs dispatch at *every* blank line and raise on the empty data. So a block without a data line never leaves here
as a block. Its comments, which a reader may still want, become *loose lines*: they end in a single LF and stand in
front of the next write. Its other lines have no effect by the standard ("if the data buffer is an empty string, set the
event type buffer to the empty string and return"), and neither have lines of other fields beside data.
They may be an upstream's error all the same, so the splitter shows them to a StrayTaker, whose events take their place.

Where an event ends: at the first byte that ends its blank line. After CR CR the event is whole, and delivered, though
an LF may follow and belong to that line end; such an LF is swallowed. Waiting for it would hold each event back
until the next token.

Line ends become LF as the bytes arrive, so that a block's end is always two LFs, and the search for it never looks at a
byte twice. A pending block is bounded by `event_bytes_max`: it counts as it will be delivered, blank line included, but
with its id and retry lines. The bound falls on the same byte however the stream was cut.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import orjson

# A comment line without a blank line: the only form that the SDKs of all APIs survive.
HEARTBEAT: Final = b": hb\n"

_LF: Final = 0x0A
_CR: Final = 0x0D
BOM: Final = b"\xef\xbb\xbf"

# Patterns for lines begin with the LF in front of the line, and a block's first line gets one (_lines_of). With `^` the
# engine stops at each byte: 8 MiB took 50 ms. It jumps from LF to LF in 3.
_data_line = re.compile(rb"\ndata[:\n]").search
_own_line = re.compile(rb"\n(?:id|retry)[:\n]").search
_without_own_lines = re.compile(rb"\n(?:id|retry)(?::[^\n]*)?(?=\n)").sub
_loose_lines = re.compile(rb"\n:[^\n]*").findall
_not_lf = re.compile(rb"[^\n]").search
# Lines of no field that parsers know; and of a block without data, all that are dropped but `id` and `retry`.
_stray_lines = re.compile(rb"\n(?!(?:data|event|id|retry)[:\n]|:)[^\n]+").findall
_dropped_lines = re.compile(rb"\n(?!(?:id|retry)[:\n]|:)[^\n]+").findall

_SLICED_MAX: Final = 4096

# Position of the next byte, as far as it changes the byte's meaning.
_PLAIN: Final = 0
_AFTER_CR: Final = 1  # an LF is the second half of that line end
_AT_START: Final = 2  # a BOM is dropped


# Lines of a block. A line costs 0.25 us in each of several passes, so a megabyte of lines of two bytes took 70 ms. Data
# that is pretty-printed has lines of 20 to 100 bytes; the longest answer of the models here has some 20,000.
EVENT_LINES_MAX: Final = 32 * 1024


# A last block that lacks its end is read up to this size: a chunk has some hundred bytes, a tool call some thousand.
WHOLE_BYTES_MAX: Final = 64 * 1024


class EventTooLarge(Exception):
    """A block is larger than `event_bytes_max`, or has more than EVENT_LINES_MAX lines.

    `bound` says which; `before`: the whole pieces in front of it, from the same read.
    """

    def __init__(self, bound: str, before: list[bytes]) -> None:
        super().__init__(f"an event is larger than {bound}")
        self.bound = bound
        self.before = before


def is_event(piece: bytes) -> bool:
    """Whether a piece of an EventSplitter is an event, and not loose lines."""
    return piece[-2:] == b"\n\n"


class StrayTaker(Protocol):
    """Judges lines that have no effect by the standard."""

    def take_strays(self, lines: bytes, before: list[bytes], *, dropped: bool) -> list[bytes]:
        """Events to deliver in their place. `before`: the pieces of the same read in front of them. dropped: else no
        reader gets the lines, since they don't stand beside data.
        """


def first_has_id(data: bytes) -> bool | None:
    """Whether the first event of these bytes, or a block without data in front of it, has an id; None: more is needed.

    The bytes are the beginning of a body as it came, with line ends of any kind.
    """
    text = data.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for block in text.split(b"\n\n")[:-1]:
        names = {line.partition(b":")[0] for line in block.split(b"\n")}
        if b"id" in names:
            return True
        if b"data" in names:
            return False
    return None


class Edge(enum.Enum):
    """Position of the next byte, as it is told to another process."""

    PLAIN = "plain"
    AFTER_CR = "after_cr"
    AT_START = "at_start"


_EDGES: Final = {_PLAIN: Edge.PLAIN, _AFTER_CR: Edge.AFTER_CR, _AT_START: Edge.AT_START}
_BY_EDGE: Final = {edge: number for number, edge in _EDGES.items()}


class SplitterState(NamedTuple):
    """An EventSplitter between two reads: the block that has begun, with LF line ends."""

    held: bytes
    edge: Edge


class EventSplitter:
    """Cuts an upstream's bytes into events. Any split of the input gives the same output.

    Each piece returned is either an *event*: it ends in a blank line, has a data line, LF line ends, no id and no
    retry; or *loose lines*: comments of a block without data, ending in exactly one LF. is_event() tells which.
    """

    __slots__ = ("_edge", "_event_bytes_max", "_held", "_strays", "pending", "stray_blocks")

    def __init__(self, *, event_bytes_max: int, strays: StrayTaker | None = None) -> None:
        self._event_bytes_max = event_bytes_max
        self._strays = strays
        self.stray_blocks = 0  # blocks whose strays were shown to the taker
        self.pending = 0  # bytes held; 0: at a block's boundary
        self._held: bytearray | None = None  # the block begun, LF line ends; None when pending == 0
        self._edge = _AT_START

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take a read's bytes; return the pieces that are whole now. EventTooLarge ends the use of the splitter."""
        if not self.pending and _is_plain(chunk) and len(chunk) <= self._event_bytes_max:  # the common case, uncopied
            self._edge = _PLAIN
            return [chunk]
        return self._blocks(self._with_lf(chunk))

    def feed_all(self, chunks: list[bytes]) -> list[bytes]:
        """As feed() with the chunks end to end. Most servers write an event into a chunk, and then none is copied."""
        if not self.pending:
            for chunk in chunks:
                if not _is_plain(chunk) or len(chunk) > self._event_bytes_max:
                    break
            else:
                self._edge = _PLAIN
                return chunks
        return self.feed(b"".join(chunks))

    def finish(self) -> list[bytes]:
        """The body has ended properly: complete a last block that lacks its blank line. Raises EventTooLarge."""
        if self._held is None:
            return []
        rest = b"\n" if self._held.endswith(b"\n") else b"\n\n"
        self._edge = _PLAIN
        return self._blocks(rest)

    @property
    def at_rest(self) -> bool:
        """Whether the next byte begins an event as it is: nothing is held, and no BOM or half of a CRLF may come."""
        return not self.pending and self._edge == _PLAIN

    @property
    def in_comment(self) -> bool:
        """Whether the block that has begun is only comments so far, as that of a server whose heartbeat is a line."""
        held = self._held
        return held is not None and held[:1] == b":" and b"\ndata" not in held

    def state(self) -> SplitterState:
        """What go_on_from() takes. The blocks that were counted are not in it: nothing asks for more than a growth."""
        return SplitterState(bytes(self._held or b""), _EDGES[self._edge])

    def go_on_from(self, state: SplitterState) -> None:
        """Take the state of another splitter; this one is new. Raises ValueError for a state that no splitter has."""
        held = state.held
        if state.edge is Edge.AT_START:
            is_right = BOM.startswith(held) and held != BOM
        else:
            is_begun = held[:1] != b"\n" and b"\n\n" not in held and b"\r" not in held
            is_right = is_begun and (not held or state.edge is Edge.PLAIN or held.endswith(b"\n"))
        if not is_right or len(held) > self._event_bytes_max or held.count(b"\n") > EVENT_LINES_MAX:
            raise ValueError("a block of an event stream that can't have begun so, or is too large")
        self._edge = _BY_EDGE[state.edge]
        self._hold(held)

    def _with_lf(self, chunk: bytes) -> bytes:
        """The chunk without a BOM and with LF line ends; `_edge` remembers a CR at its end for the next chunk."""
        if not chunk:
            return chunk
        if self._edge == _AT_START:
            return self._after_bom(chunk)
        if self._edge == _AFTER_CR and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._edge = _PLAIN
        if _CR in chunk:
            if chunk.endswith(b"\r"):
                self._edge = _AFTER_CR
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return chunk

    def _after_bom(self, chunk: bytes) -> bytes:
        """The first bytes: hold them while they may be a part of a BOM."""
        if self._held is not None:
            chunk = bytes(self._held) + chunk
            self._hold(b"")
        if len(chunk) < len(BOM) and BOM.startswith(chunk):
            self._hold(chunk)
            return b""
        self._edge = _PLAIN
        return self._with_lf(chunk.removeprefix(BOM))

    def _hold(self, rest: bytes) -> None:
        self._held = bytearray(rest) if rest else None
        self.pending = len(rest)

    def _blocks(self, text: bytes) -> list[bytes]:
        """Append text with LF line ends; return the pieces that are whole now and hold the unfinished block."""
        held = self._held
        pieces: list[bytes] = []
        if held is None:
            self._cut(text, pieces)
            return pieces
        searched = len(held) - 1  # only new bytes are looked at, and the last old byte
        held += text
        self.pending = len(held)
        blank = held.find(b"\n\n", searched)
        if blank < 0:
            if self.pending > self._event_bytes_max:
                raise EventTooLarge(f"{self._event_bytes_max} bytes", [])
            return []
        self._hold(b"")
        with memoryview(held) as view:  # each part is copied once
            block, rest = bytes(view[: blank + 2]), bytes(view[blank + 2 :])
        self._cut(block, pieces, blank)
        self._cut(rest, pieces)
        return pieces

    def _cut(self, text: bytes, pieces: list[bytes], searched: int = 0) -> None:
        """Append the whole pieces of `text`, and hold its end; `searched`: no blank line begins before."""
        start = 0
        while start < len(text):
            if text[start] == _LF:  # blank lines between blocks
                more = _not_lf(text, start)
                if more is None:
                    break
                start = more.start()
            blank = text.find(b"\n\n", max(start, searched))
            end = len(text) if blank < 0 else blank + 2
            if end - start > self._event_bytes_max:
                raise EventTooLarge(f"{self._event_bytes_max} bytes", pieces)
            block = text[start:end]
            start = end
            if blank >= 0 and _is_plain(block):
                pieces.append(block)
                continue
            if len(block) > 2 * EVENT_LINES_MAX and block.count(b"\n") > EVENT_LINES_MAX:
                raise EventTooLarge(f"{EVENT_LINES_MAX} lines", pieces)
            if blank < 0:
                self._hold(block)
            else:
                self._take_block(block, pieces)

    def _take_block(self, block: bytes, pieces: list[bytes]) -> None:
        """Append the pieces that a block with LF line ends makes: events of its strays, and an event or loose lines."""
        has_data = _has_data_line(block)
        if self._strays is not None:
            lines = _lines_of(block, _stray_lines if has_data else _dropped_lines)
            if lines:
                self.stray_blocks += 1
                pieces += self._strays.take_strays(lines, pieces, dropped=not has_data)
        piece = _for_readers(block) if has_data else _lines_of(block, _loose_lines)
        if piece:
            pieces.append(piece)

    def give_up(self) -> list[bytes]:
        """The body has been cut: a last block whose data is whole by itself, or the events of a last block without
        data, whose strays may say the reason.
        """
        held, self._held, self.pending = self._held, None, 0
        if held is not None and _has_data_line(bytes(held)):
            block, pieces = _without_half_field(bytes(held)).rstrip(b"\n") + b"\n\n", list[bytes]()
            if len(block) <= self._event_bytes_max and _is_whole(block):
                self._cut(block, pieces)
            return pieces
        if held is None or self._strays is None:
            return []
        lines = _lines_of(bytes(held) + b"\n", _dropped_lines)
        return self._strays.take_strays(lines, [], dropped=True) if lines else []


def _without_half_field(block: bytes) -> bytes:
    """A cut block without the half of an ignored field; nothing if the half may be its type or more data."""
    at = block.rfind(b"\n") + 1
    half = block[at:]
    if not half or half.startswith(b"data:"):
        return block
    name, colon, _ = half.partition(b":")
    if name == b"event" or (not colon and (b"data".startswith(name) or b"event".startswith(name))):
        return b""
    return block[:at]


def _is_whole(block: bytes) -> bool:
    """Whether a block that lacks its end can't have been cut: its data is `[DONE]` or a JSON object."""
    data = parse_event(block)[1].strip() if len(block) <= WHOLE_BYTES_MAX else b""
    if data == b"[DONE]":
        return True
    try:
        return data.startswith(b"{") and isinstance(orjson.loads(data), dict)
    except orjson.JSONDecodeError:
        return False


def _is_plain(block: bytes) -> bool:
    """Whether this is exactly one event of a single data line, perhaps behind an event type, as most events are."""
    # Why slices and single numbers: `x[:5] ==` took half the time of startswith, `13 in` a sixth of `b"\r" in` (CPython
    # 3.11). A slice of megabytes takes milliseconds, so find() looks through those.
    if block[-2:] != b"\n\n" or _CR in block:
        return False
    if len(block) > _SLICED_MAX:
        data = 0 if block[:6] != b"event:" else block.find(b"\n") + 1
        return block[data : data + 5] == b"data:" and block.find(b"\n", data, len(block) - 2) < 0
    if block[:5] == b"data:":
        return _LF not in block[5:-2]
    if block[:6] != b"event:":
        return False
    data = block.find(_LF) + 1
    return block[data : data + 5] == b"data:" and _LF not in block[data + 5 : -2]


def _has_data_line(block: bytes) -> bool:
    return block[:5] in (b"data:", b"data\n") or _data_line(block) is not None


def _lines_of(block: bytes, find: Callable[[bytes], list[bytes]]) -> bytes:
    """The lines that a pattern finds, each with its LF."""
    lines = find(b"\n" + block[: block.find(b"\n") + 1]) + find(block)
    return b"".join(lines)[1:] + b"\n" if lines else b""


def _for_readers(block: bytes) -> bytes:
    """The block without the lines that are streamd's to write: ids, and when to come back."""
    if block.startswith((b"id", b"retry")) or _own_line(block) is not None:
        return _without_own_lines(b"", b"\n" + block)[1:]
    return block


# Two tables, for speed: frame() runs once per token and took 205 ns with them, 300 without (CPython 3.11; % formatting
# of the whole frame 370). 2,048 covers an ordinary answer's seqs, and its events' sizes; larger numbers are formatted.
_TABLE_SIZE: Final = 2048
_SEQ_LINES: Final = tuple(b"%d\n" % seq for seq in range(_TABLE_SIZE))
_SIZE_LINES: Final = tuple(b"%x\r\n" % size for size in range(_TABLE_SIZE))


def frame(id_prefix: bytes, seq: int, event: bytes, *, chunked: bool) -> bytes:
    """An event ready for the wire, id line in front, as an HTTP chunk or bare. id_prefix: `id: s_x:`; seq >= 1."""
    seq_line = _SEQ_LINES[seq] if seq < _TABLE_SIZE else b"%d\n" % seq
    if not chunked:
        return b"".join((id_prefix, seq_line, event))
    size = len(id_prefix) + len(seq_line) + len(event)
    size_line = _SIZE_LINES[size] if size < _TABLE_SIZE else b"%x\r\n" % size
    return b"".join((size_line, id_prefix, seq_line, event, b"\r\n"))


def frame_size(id_prefix: bytes, seq: int, event_bytes: int) -> int:
    """The size of frame(…, chunked=True) for an event of this size, without making it."""
    size = len(id_prefix) + len(b"%d\n" % seq) + event_bytes
    return len(b"%x\r\n" % size) + size + 2


def frames(id_prefix: bytes, seq: int, events: list[bytes]) -> bytes:
    """The chunked frames of neighbouring events, end to end; `seq` is that of the first."""
    parts: list[bytes] = []
    for event in events:
        seq_line = _SEQ_LINES[seq] if seq < _TABLE_SIZE else b"%d\n" % seq
        size = len(id_prefix) + len(seq_line) + len(event)
        size_line = _SIZE_LINES[size] if size < _TABLE_SIZE else b"%x\r\n" % size
        parts += (size_line, id_prefix, seq_line, event, b"\r\n")
        seq += 1
    return b"".join(parts)


def data_lines(event: bytes) -> bytes:
    """The event without any line but those of its data, each beginning with `data: `: all that some clients take."""
    if event.startswith(b"data: ") and event.count(b"\n") == 2:
        return event
    fields = (line.partition(b":") for line in event.split(b"\n"))
    return b"".join(b"data: %b\n" % value.removeprefix(b" ") for name, _, value in fields if name == b"data") + b"\n"


# Lines of a large event up to which data_line_parts() gives each as a view, of 200 B.
VIEWED_LINES_MAX: Final = 64


def data_line_parts(event: memoryview) -> list[bytes | memoryview]:
    """data_lines() of a large event as parts to be written in order, without a copy of ordinary events."""
    whole = bytes(event)
    if whole.count(b"\n") > VIEWED_LINES_MAX:
        return [data_lines(whole)]
    parts: list[bytes | memoryview] = []
    start = 0
    while (end := whole.find(b"\n", start) + 1) > 0:
        name, colon, _ = whole[start : min(start + 6, end - 1)].partition(b":")
        if name == b"data":
            value = start + len(name) + len(colon)
            value += whole[value : value + 1] == b" "
            parts += [b"data: ", event[value:end]]
        start = end
    return [*parts, b"\n"]


def parse_event(event: bytes) -> tuple[str | None, bytes]:
    """(event type, data) of an event as EventSplitter gives it: the last `event` line; the data lines joined by LF."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:  # most events
        return None, event[6:-2]
    name: bytes = b""
    data: list[bytes] = []
    for line in event.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return (name.decode("utf-8", "replace") or None, b"\n".join(data))
