"""Events from publishers: bytes of a request's body in, events out. Except for plain text, the events don't depend on
how the body is cut into reads.

    text/event-stream      events as they are (wire/sse.py), ids and retry removed
    application/x-ndjson   each line is the data of an event
    text/plain             each read is the text of an event: {"delta": "…"}; never cut inside a character

`[DONE]` as an event's data, or as a line, is passed on and ends the stream; plain text has no such word. Refused, with
the place: bytes that are no UTF-8, NUL, a CR inside a line, a line that is no JSON, an event over its size, an event of
a type that readers take for streamd's own word.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import NamedTuple, Protocol

import orjson

from streamd.wire.json_scan import JsonError, JsonScan
from streamd.wire.sse import EventSplitter, EventTooLarge, SplitterState, is_event, parse_event

DONE_EVENT = b"data: [DONE]\n\n"

_BOM = b"\xef\xbb\xbf"  # shells and editors on Windows put it in front of what they write

# The types of streamd's own events: a loss, and a farewell with a position.
RESERVED_TYPES = ("gap", "reconnect")


# Containers in each other up to which orjson reads.
ORJSON_DEPTH_MAX = 1024
# A line up to this size is parsed when it is whole, in 5 ms at the worst. It may come in a single piece.
PARSED_LINE_BYTES_MAX = 64 * 1024
# An unfinished line above this size is scanned as it comes, with the bounds of wire/json_scan.py on its values and
# containers: 4 Ki brackets take 6 to 12 ms.
UNSCANNED_LINE_BYTES_MAX = 4 * 1024


class PublishError(Exception):
    """A body that can't be published; the text names the mistake and its place. `status`: 400 or 413.

    before: the good events in front of the mistake in the same piece, so that the cut of a body makes no difference.
    """

    def __init__(self, text: str, code: str, status: int = 400) -> None:
        super().__init__(text)
        self.code = code
        self.status = status
        self.before: list[bytes] = []


class PublicationState(NamedTuple):
    """A Publication between two pieces of a body."""

    done: bool
    containers: int
    seen: int  # bytes of a text, lines or events so far
    held: bytes  # of a character, or a line, that has begun
    splitter: SplitterState | None  # of events


class Publication(Protocol):
    """A request's body on its way to events."""

    done: bool  # [DONE] was seen: nothing may follow
    containers: int  # lists and objects that were looked at one by one so far, 1 to 3 us each

    @property
    def held_bytes(self) -> int:
        """The bytes of an event that isn't whole yet."""

    def feed(self, piece: bytes) -> list[bytes]:
        """The next bytes in; whole events (ending in a blank line) and loose comment lines out. Raises PublishError."""

    def finish(self) -> list[bytes]:
        """The body is complete: return its last events. Raises PublishError. Call it once."""

    def state(self) -> PublicationState:
        """What go_on_from() takes."""

    def go_on_from(self, state: PublicationState) -> None:
        """Take the state of another publication of the same type. Raises ValueError for a state that none has."""


class TextPublication:
    """text/plain: each read of the body is an event, a large read several; a cut character waits for its rest."""

    __slots__ = ("_decoder", "_event_bytes_max", "_offset", "containers", "done")

    def __init__(self, event_bytes_max: int) -> None:
        self.done = False
        self.containers = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._event_bytes_max = event_bytes_max
        self._offset = 0

    @property
    def held_bytes(self) -> int:
        return len(self._decoder.getstate()[0])

    def state(self) -> PublicationState:
        return PublicationState(self.done, self.containers, self._offset, self._decoder.getstate()[0], None)

    def go_on_from(self, state: PublicationState) -> None:
        if state.splitter is not None or len(state.held) > 3:
            raise ValueError("a text that holds more than a part of a character")
        self._decoder.setstate((state.held, 0))
        self.done, self.containers, self._offset = state.done, state.containers, state.seen

    def feed(self, piece: bytes) -> list[bytes]:
        return self._decode(piece, final=False)

    def finish(self) -> list[bytes]:
        return self._decode(b"", final=True)

    def _decode(self, piece: bytes, *, final: bool) -> list[bytes]:
        offset = self._offset - len(self._decoder.getstate()[0])  # a part of a character may be held
        try:
            text = self._decoder.decode(piece, final)
        except UnicodeDecodeError as broken:
            error = PublishError(f"The text is not UTF-8 at byte {offset + broken.start}.", "bad_utf8")
            error.before = self._events(bytes(broken.object[: broken.start]).decode())
            raise error from None
        self._offset += len(piece)
        return self._events(text)

    def _events(self, text: str) -> list[bytes]:
        # A character takes at most 6 bytes as JSON (\u0000), and the event around the text 21: no event is too large.
        step = max(1, self._event_bytes_max // 6 - 8)
        return [
            b"data: " + orjson.dumps({"delta": text[start : start + step]}) + b"\n\n"
            for start in range(0, len(text), step)
        ]


class LinesPublication:
    """application/x-ndjson: each line is a JSON value; empty lines are skipped, byte order marks in front left out."""

    __slots__ = ("_event_bytes_max", "_held", "_lines", "_scan", "containers", "done")

    def __init__(self, event_bytes_max: int) -> None:
        self.done = False
        self.containers = 0
        self._event_bytes_max = event_bytes_max
        self._held = bytearray()  # bounded by event_bytes_max
        self._lines = 0
        self._scan: JsonScan | None = None  # of a long line that isn't whole yet

    @property
    def held_bytes(self) -> int:
        return len(self._held)

    def state(self) -> PublicationState:
        return PublicationState(self.done, self.containers, self._lines, bytes(self._held), None)

    def go_on_from(self, state: PublicationState) -> None:
        if state.splitter is not None or b"\n" in state.held:
            raise ValueError("lines that hold more than a part of a line")
        self.done, self._lines = state.done, state.seen
        try:
            self._hold(state.held)
        except PublishError as error:
            raise ValueError(str(error)) from None
        self.containers = state.containers

    def feed(self, piece: bytes) -> list[bytes]:
        if b"\n" not in piece:
            self._hold(piece)
            return []
        self._held += piece
        *lines, rest = bytes(self._held).split(b"\n")
        self._held = bytearray()
        events: list[bytes] = []
        try:
            for line in lines:
                events += self._events(line)
            self._hold(rest)
        except PublishError as error:
            error.before = events
            raise
        return events

    def finish(self) -> list[bytes]:
        return self._events(bytes(self._held))

    def _hold(self, rest: bytes) -> None:
        self._held += rest
        if len(self._held) > self._event_bytes_max:
            raise _too_large(self._lines + 1, "line", self._event_bytes_max)
        if len(self._held) > UNSCANNED_LINE_BYTES_MAX:
            self._scan_on(self._held, self._lines + 1, last=False)

    def _events(self, line: bytes) -> list[bytes]:
        """The event of a line; none for an empty line."""
        self._lines += 1
        whole, line = line, line.removeprefix(_BOM).removesuffix(b"\r").strip(b" \t")
        if not line:
            self._scan = None
            return []
        if self.done:
            raise PublishError(f"Line {self._lines} comes after [DONE].", "after_done")
        if line == b"[DONE]":
            self.done = True
            return [DONE_EVENT]
        if len(line) + 8 > self._event_bytes_max:
            raise _too_large(self._lines, "line", self._event_bytes_max)
        if b"\r" in line:
            raise PublishError(f"Line {self._lines} has a CR inside; an event has no room for it.", "bad_line")
        self._check(whole)
        return [b"data: " + line + b"\n\n"]

    def _check(self, line: bytes) -> None:
        """Raise PublishError unless the line is JSON, nested to any depth: orjson reads 1,024 levels."""
        if len(line) <= PARSED_LINE_BYTES_MAX:
            try:
                orjson.loads(line.removeprefix(_BOM))
            except orjson.JSONDecodeError as error:
                if line.count(b"[") + line.count(b"{") <= ORJSON_DEPTH_MAX:
                    text = f"Line {self._lines} is not JSON: {error.msg} at column {error.colno}."
                    raise PublishError(text, "bad_json") from None
            else:
                self._scan = None
                return
        self._scan_on(line, self._lines, last=True)
        self._scan = None
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise PublishError(f"Line {self._lines} is not UTF-8 at its byte {error.start}.", "bad_utf8") from None

    def _scan_on(self, line: bytes | bytearray, number: int, *, last: bool) -> None:
        """Read on in a long line, which begins as before. Raises PublishError as soon as it is no JSON."""
        if self._scan is None:
            self._scan = JsonScan(depth_max=self._event_bytes_max)
        before = self._scan.containers
        try:
            self._scan.feed(line, last=last)
        except JsonError as error:
            is_json = error.code != "bad_json"
            where = f"is too much: {error}" if is_json else f"is not JSON at column {self._scan.position + 1}."
            raise PublishError(f"Line {number} {where}", error.code) from None
        finally:
            self.containers += self._scan.containers - before


class EventsPublication:
    """text/event-stream."""

    __slots__ = ("_events", "_splitter", "containers", "done")

    def __init__(self, event_bytes_max: int) -> None:
        self.done = False
        self.containers = 0
        self._splitter = EventSplitter(event_bytes_max=event_bytes_max)
        self._events = 0

    @property
    def held_bytes(self) -> int:
        return self._splitter.pending

    def state(self) -> PublicationState:
        return PublicationState(self.done, self.containers, self._events, b"", self._splitter.state())

    def go_on_from(self, state: PublicationState) -> None:
        if state.splitter is None or state.held:
            raise ValueError("events without a splitter")
        self._splitter.go_on_from(state.splitter)
        self.done, self.containers, self._events = state.done, state.containers, state.seen

    def feed(self, piece: bytes) -> list[bytes]:
        try:
            return self._checked(self._splitter.feed(piece))
        except EventTooLarge as large:
            raise self._too_large(large) from None

    def finish(self) -> list[bytes]:
        try:
            return self._checked(self._splitter.finish())
        except EventTooLarge as large:
            raise self._too_large(large) from None

    def _too_large(self, large: EventTooLarge) -> PublishError:
        good = self._checked(large.before)
        text = f"Event {self._events + 1} is larger than {large.bound}."
        error = PublishError(text, "event_too_large", 413)
        error.before = good
        return error

    def _checked(self, pieces: list[bytes]) -> list[bytes]:
        good: list[bytes] = []
        for piece in pieces:
            try:
                self._check(piece)
            except PublishError as error:
                error.before = good
                raise
            good.append(piece)
        return good

    def _check(self, piece: bytes) -> None:
        """Raise PublishError if the event, or the loose lines, may not go out."""
        whole = is_event(piece)
        self._events += whole
        if self.done and whole:
            raise PublishError(f"Event {self._events} comes after [DONE].", "after_done")
        where = f"Event {self._events}" if whole else f"What follows event {self._events}"
        if b"\0" in piece:
            raise PublishError(f"{where} has a NUL byte.", "bad_event")
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            raise PublishError(f"{where} is not UTF-8 at its byte {error.start}.", "bad_utf8") from None
        if (b"gap" in piece or b"reconnect" in piece) and parse_event(piece)[0] in RESERVED_TYPES:
            text = f"{where} is of a type of streamd's own: {' and '.join(RESERVED_TYPES)} are events that it writes."
            raise PublishError(text, "bad_event")
        if b"[DONE]" in piece and whole:
            self.done = parse_event(piece)[1] == b"[DONE]"


PUBLICATIONS: dict[str, Callable[[int], Publication]] = {
    "text/plain": TextPublication,
    "application/x-ndjson": LinesPublication,
    "text/event-stream": EventsPublication,
}
# Lines of JSON have no registered type; programs and languages' tables of types write these as well.
_NAMES_OF_LINES = ("ndjson", "jsonl", "x-jsonl", "jsonlines", "x-jsonlines", "json-lines")
_OTHER_NAMES = {f"application/{name}": "application/x-ndjson" for name in _NAMES_OF_LINES}


def publication_of(media_type: str) -> Callable[[int], Publication] | None:
    """The reader of bodies of this type, in any of its names; None for a type that isn't published."""
    return PUBLICATIONS.get(_OTHER_NAMES.get(media_type, media_type))


def _too_large(number: int, unit: str, bytes_max: int) -> PublishError:
    return PublishError(f"{unit.capitalize()} {number} is larger than {bytes_max} bytes.", "event_too_large", 413)
