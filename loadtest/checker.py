"""Does a reader get its stream whole? Bytes of an HTTP response in, counts of lost and doubled tokens out.

Written for the load programs and deliberately without streamd's own parsers: shared code could hide a shared mistake.
Lean, because a process holds ten thousand of these.

Two things are checked. Seqs: ids (`<stream>:<seq>`) rise; a `gap` event names exactly the missing range. Text: either
`Numbered` tokens "@<k>.<ns> " (source.c), which also give their age, or `Reference`, a text that is known beforehand.
Between two ids that are not neighbours no text may be missing either, since a coalesced event has the id of its last
event: only the text shows it."""

from __future__ import annotations

import json
import re
import time
from array import array

_TOKEN = re.compile(rb"@(\d+)\.(\d+) ")
_CONTENT = b'"content":"'


class Tally:
    """The counts of all readers of a group together."""

    __slots__ = ("announced", "doubled", "events", "gap_events", "lost", "tokens", "wrong")

    def __init__(self) -> None:
        self.events = 0
        self.tokens = 0  # Numbered: tokens; Reference: pieces of text
        self.lost = 0  # missing and not announced
        self.doubled = 0
        self.wrong = 0  # impossible seqs or texts
        self.gap_events = 0
        self.announced = 0  # seqs that gap events named


class Histogram:
    """Durations in 0.1 ms steps up to 20 s."""

    __slots__ = ("_counts",)
    STEPS, STEPS_PER_S = 200_000, 10_000

    def __init__(self) -> None:
        self._counts = array("L", bytes(8 * self.STEPS))

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[min(max(int(seconds * self.STEPS_PER_S), 0), self.STEPS - 1)] += 1

    def ms(self, quantile: float) -> float | None:
        """A quantile in milliseconds; None without a duration."""
        due = sum(self._counts) * quantile
        seen = 0
        for step, count in enumerate(self._counts):
            seen += count
            if count and seen >= due:
                return round((step + 1) * 1000 / self.STEPS_PER_S, 1)
        return None


class Numbered:
    """The text as tokens that carry their number and their birth."""

    __slots__ = ("_due", "_excused", "_rest", "ages")

    def __init__(self, ages: Histogram | None = None) -> None:
        self._due = 0
        self._excused = False  # a gap was announced: the next number may be any later one
        self._rest = b""
        self.ages = ages

    def take(self, piece: bytes, tally: Tally) -> None:
        """Check a piece of text."""
        text = self._rest + piece
        end = 0
        for found in _TOKEN.finditer(text):
            self._token(int(found[1]), tally)
            if self.ages is not None:
                self.ages.add(time.monotonic() - int(found[2]) / 1e9)
            end = found.end()
        self._rest = text[end:]

    def _token(self, number: int, tally: Tally) -> None:
        tally.tokens += 1
        if number < self._due:
            tally.doubled += 1
            return
        if not self._excused:
            tally.lost += number - self._due
        self._excused = False
        self._due = number + 1

    def excuse(self) -> None:
        """Note an announced gap: its tokens are not lost in silence."""
        self._excused = True
        self._rest = b""

    def whole(self, count: int | None) -> bool:
        """Whether all `count` tokens have arrived (None: at any number)."""
        return not self._rest and (count is None or self._due == count)


class Reference:
    """A text that is known beforehand; a reader keeps only its place in it."""

    __slots__ = ("_at", "_excused", "_text")

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0
        self._excused = False

    def take(self, piece: bytes, tally: Tally) -> None:
        """Check a piece of text."""
        tally.tokens += 1
        if self._text.startswith(piece, self._at):
            self._at += len(piece)
            return
        # Where does the piece occur? Later: text is missing. Earlier: it came twice. Nowhere: it isn't of this text.
        later = self._text.find(piece, self._at)
        if later >= 0:
            tally.lost += not self._excused
            self._at = later + len(piece)
        elif self._text.rfind(piece, 0, self._at) >= 0:
            tally.doubled += 1
        else:
            tally.wrong += 1
        self._excused = False

    def excuse(self) -> None:
        """Note an announced gap: its tokens are not lost in silence."""
        self._excused = True

    def whole(self, count: int | None) -> bool:
        """Whether the whole text has arrived."""
        return self._at == len(self._text)


Text = Numbered | Reference


class Checker:
    """A reader's stream, over all its connections."""

    __slots__ = ("_text", "error", "finished", "last_id", "retry_ms", "seq", "tally")

    def __init__(self, text: Text, tally: Tally) -> None:
        self._text = text
        self.tally = tally
        self.seq = 0
        self.last_id = b""
        self.retry_ms: int | None = None
        self.finished = False  # the terminal event was seen
        self.error = ""  # the code of an error event

    def take(self, block: bytes) -> bool:
        """Check an SSE event (without its blank line). True if it had text; raises ValueError if it is broken."""
        self.tally.events += 1
        before = self.seq
        is_gap = text = False
        for line in block.split(b"\n"):
            if line.startswith(b"data: "):
                if is_gap:
                    self._gap(line[6:], before)
                else:
                    text = self._data(line[6:])
            elif line.startswith(b"id: "):
                self._id(line[4:])
            elif line == b"event: gap":
                is_gap = True
            elif line.startswith(b"retry: "):
                self.retry_ms = int(line[7:])
        return text

    def take_rest(self, rest: bytes) -> None:
        """Read the bytes after the last block of an answer: the `retry:` line of a polite refusal."""
        for line in rest.split(b"\n"):
            if line.startswith(b"retry: "):
                self.retry_ms = int(line[7:])

    def whole(self, count: int | None) -> bool:
        """Whether the stream ended with all its text."""
        return self.finished and not self.error and self._text.whole(count)

    def _id(self, event_id: bytes) -> None:
        seq = int(event_id.rpartition(b":")[2])
        if seq <= self.seq:
            self.tally.doubled += 1
        self.seq = max(seq, self.seq)
        self.last_id = event_id

    def _data(self, data: bytes) -> bool:
        at = data.find(_CONTENT)
        if at >= 0:
            begin = at + len(_CONTENT)
            piece = data[begin : data.index(b'"', begin)]
            if b"\\" in piece:
                piece = json.loads(data)["choices"][0]["delta"]["content"].encode("utf-8", "surrogatepass")
            if piece:
                self._text.take(piece, self.tally)
            return bool(piece)
        if data == b"[DONE]":
            self.finished = True
        elif data.startswith(b'{"error"'):
            self.error = str(json.loads(data)["error"].get("code"))
        return False

    def _gap(self, data: bytes, before: int) -> None:
        """Check that the range begins after the last received seq and ends at the gap's own id."""
        missing = json.loads(data).get("gap") or {}
        if (missing.get("from"), missing.get("to")) != (before + 1, self.seq) or before >= self.seq:
            self.tally.wrong += 1
        self.tally.gap_events += 1
        self.tally.announced += max(0, self.seq - before)
        self._text.excuse()


class Response:
    """An HTTP response, cut anywhere: its head, then SSE blocks. Chunked, or until the connection ends."""

    __slots__ = ("_body", "_cut", "chunked", "ended", "head", "status")

    def __init__(self) -> None:
        self.status = 0
        self.head = b""
        self.chunked = False
        self.ended = False  # the terminating chunk was seen
        self._cut = b""  # bytes of an unfinished head or chunk
        self._body = b""  # an unfinished block

    @property
    def rest(self) -> bytes:
        """The bytes after the last whole block."""
        return self._body

    def field(self, name: bytes) -> bytes | None:
        """A header field's value."""
        found = re.search(rb"(?i)\r\n" + re.escape(name) + rb":[ \t]*([^\r\n]*)", self.head)
        return found[1] if found else None

    def take(self, data: bytes) -> list[bytes]:
        """The blocks that are complete now. Raises ValueError for bytes that are no HTTP."""
        if self._cut:
            data = self._cut + data
            self._cut = b""
        if not self.status:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._cut = data
                return []
            self.head, data = data[: end + 2], data[end + 4 :]
            self.status = int(self.head[9:12])
            self.chunked = b"chunked" in (self.field(b"transfer-encoding") or b"")
            self.ended = self.status == 204 or self.field(b"content-length") == b"0"
        body = self._body + (self._decode(data) if self.chunked else data)
        *blocks, self._body = body.split(b"\n\n")
        return blocks

    def _decode(self, data: bytes) -> bytes:
        if self.ended:
            return b""
        whole: list[bytes] = []
        at = 0
        while at < len(data):
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            size = int(data[at:end].partition(b";")[0], 16)
            after = end + 2 + size + 2
            if size == 0:
                self.ended = True
                return b"".join(whole)
            if after > len(data):
                break
            whole.append(data[end + 2 : after - 2])
            at = after
        self._cut = data[at:]
        return whole[0] if len(whole) == 1 else b"".join(whole)
