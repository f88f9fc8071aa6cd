"""Lines of JSON behind a stream's head: each becomes an event as it comes.

Servers stream lines of JSON (`application/x-ndjson`) in place of events. As long as nothing was sent, such an answer
passes as it is. Behind a stream's head each line that holds an object is the data of an event, with the event's type in
an API whose events have types; `[DONE]` alone is the end; any other line is read as a line of an event stream, so that
an error or a loss in it is told like any other.

Lines are known by the first: it is whole, and an event of the API that doesn't end the answer. A whole answer on a
single line is none, and neither is JSON that is printed over several lines.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from streamd.wire.dialects.api import Api, Progress
from streamd.wire.dialects.excerpt import excerpt
from streamd.wire.dialects.members import json_object, string_of
from streamd.wire.sse import BOM, EventSplitter, EventTooLarge, SplitterState, StrayTaker

# The first line is parsed up to this size: a chunk has some hundred bytes, a whole answer may have megabytes.
FIRST_LINE_BYTES_MAX: Final = 64 * 1024

_DONE: Final = b"data: [DONE]\n\n"
_BLANKS: Final = b" \t\r"
# The bytes around a line's text in an event.
_AROUND: Final = len(b"data: \n\n")
_type = re.compile(r"[A-Za-z0-9_.-]{1,100}").fullmatch


def begins_lines(api: Api, opening: bytes) -> bool | None:
    """Whether JSON that begins like this is lines of events; None: its first line isn't whole yet."""
    line, end, _ = opening.removeprefix(BOM).lstrip().partition(b"\n")
    if len(line) > FIRST_LINE_BYTES_MAX:
        return False
    if not end:
        return None
    body = json_object(line)
    if body is None:
        return False
    progress = Progress(api)
    progress.see(b"data: %b\n\n" % line.strip(_BLANKS))
    if progress.complete:
        return False
    found = api.as_events(body)
    if api.error_name is not None:
        return found is None and string_of(body, "type") is not None
    return found is not None and len(found) == 1 and found[0][1] is body


class LinesState(NamedTuple):
    """A JsonLines between two reads."""

    splitter: SplitterState
    line: bytes


class JsonLines(EventSplitter):
    """An EventSplitter for lines of JSON. Any split of the input gives the same output."""

    __slots__ = ("_api", "_line", "_line_bytes_max")

    def __init__(self, api: Api, *, event_bytes_max: int, strays: StrayTaker) -> None:
        super().__init__(event_bytes_max=event_bytes_max, strays=strays)
        self._api = api
        self._line = bytearray()  # that has begun
        self._line_bytes_max = event_bytes_max - _AROUND

    @property
    def lines_state(self) -> LinesState:
        """What go_on_from_lines() takes."""
        return LinesState(self.state(), bytes(self._line))

    def go_on_from_lines(self, state: LinesState) -> None:
        """As go_on_from()."""
        if b"\n" in state.line or len(state.line) > self._line_bytes_max or state.splitter.held:
            raise ValueError("a line of JSON that is whole already, or too long")
        self.go_on_from(state.splitter)
        self._line = bytearray(state.line)
        self.pending = len(self._line)

    def feed(self, chunk: bytes) -> list[bytes]:
        pieces: list[bytes] = []
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._line += line
            self._take_line(pieces)
        self._line += rest
        self._check_line(pieces)
        self.pending = len(self._line)
        return pieces

    def feed_all(self, chunks: list[bytes]) -> list[bytes]:
        return self.feed(b"".join(chunks))

    def finish(self) -> list[bytes]:
        pieces: list[bytes] = []
        self._take_line(pieces)
        return pieces

    def closing(self, progress: Progress) -> list[bytes]:
        """The last event, if the answer is complete by its lines: clients of this API look for it."""
        return [_DONE] if self._api.done_ends and progress.complete and not progress.terminal else []

    def give_up(self) -> list[bytes]:
        line, self._line, self.pending = bytes(self._line), bytearray(), 0
        return self._strays.take_strays(line + b"\n", [], dropped=True) if line and self._strays is not None else []

    @property
    def at_rest(self) -> bool:
        """Never: no read is an event as it is."""
        return False

    @property
    def in_comment(self) -> bool:
        return False

    def _check_line(self, pieces: list[bytes]) -> None:
        if len(self._line) > self._line_bytes_max:
            raise EventTooLarge(f"{self._line_bytes_max + _AROUND} bytes", pieces)

    def _take_line(self, pieces: list[bytes]) -> None:
        """The line is whole: append the pieces that it makes."""
        self._check_line(pieces)
        text = bytes(self._line).removeprefix(BOM).strip(_BLANKS).replace(b"\r", b" ")
        self._line, self.pending = bytearray(), 0
        if text == b"[DONE]":
            pieces.append(_DONE)
        elif text.startswith(b"{"):
            pieces.append(self._event(text))
        elif text:
            pieces += super().feed(text + b"\n\n")

    def _event(self, text: bytes) -> bytes:
        event = b"data: %b\n\n" % text
        if self._api.error_name is None:
            return event
        kind = string_of(excerpt(event).body or {}, "type") or ""
        return b"event: %b\n%b" % (kind.encode(), event) if _type(kind) else event
