"""The shape of a body on the wire: additions to events (comments, ids, line ends) and cuts in the bytes.

Only faulty answers are dressed and cut; a plain answer is a chunk per step, written as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from typing import Final

from streamd.mockllm.faults import Faults
from streamd.mockllm.script import Script
from streamd.wire import chunked

CUT_CHUNK_BYTES_MAX: Final = 97  # well under the size of an event (about 250 B), so that most events are cut
CUT_WRITE_BYTES_MAX: Final = 211  # coprime with the chunks' bound: writes and chunks rarely end together


class Whole:
    """An answer that is not streamed; in two halves if a fault may break it in its middle."""

    __slots__ = ("_body", "_cut_at")

    def __init__(self, body: bytes, in_halves: bool) -> None:
        self._body = body
        self._cut_at = len(body) // 2 if in_halves else len(body)

    def preamble(self) -> bytes:
        return self._body[: self._cut_at]

    def tokens(self) -> Iterator[bytes]:
        return iter(())

    def tail(self) -> bytes:
        return self._body[self._cut_at :]


class Plain:
    """A stream without changes to its dialect's events."""

    __slots__ = ("_script",)

    def __init__(self, script: Script) -> None:
        self._script = script

    def preamble(self) -> bytes:
        return self._script.preamble()

    def tokens(self) -> Iterator[bytes]:
        return self._script.tokens()

    def tail(self) -> bytes:
        return self._script.finish() + self._script.terminal()


class Dressed:
    """A stream with the oddities of `faults`, made in advance because its length has to be known."""

    __slots__ = ("_events", "_faults", "_preamble", "_tail", "_tokens")

    def __init__(self, script: Script, faults: Faults) -> None:
        self._faults = faults
        self._events = 0
        self._preamble = (b"\xef\xbb\xbf" if faults.bom else b"") + self._dress(script.preamble())
        self._tokens = [self._dress(step) for step in script.tokens()]
        # Why: both are called with any faults, because a dialect may count its events.
        finish, terminal = script.finish(), script.terminal()
        tail = b"" if faults.no_finish else finish if faults.no_done else finish + terminal
        self._tail = self._dress(tail)
        if faults.no_blank:
            self._tail = self._tail[: -len(self._line_end())]

    def _line_end(self) -> bytes:
        return b"\r\n" if self._faults.crlf else b"\r" if self._faults.cr else b"\n"

    def _dress(self, step: bytes) -> bytes:
        dressed = b"".join(self._dress_event(event) for event in step.split(b"\n\n") if event)
        return dressed.replace(b"\n", self._line_end())

    def _dress_event(self, event: bytes) -> bytes:
        faults = self._faults
        self._events += 1
        block = b""
        if faults.retry and self._events == 1:
            block += b"retry: 2500\n\n"
        if faults.comments and self._events % 3 == 1:
            block += b": mock comment before event %d\n\n" % self._events
        if faults.comments:
            block += b": mock comment inside\n"
        if faults.retry and self._events % 4 == 2:
            block += b"retry: 3000\n"
        if faults.ids:
            block += b"id: mock-%d\n" % self._events
        return block + event + b"\n\n"

    def length(self) -> int:
        """All bytes of the body."""
        return len(self._preamble) + sum(map(len, self._tokens)) + len(self._tail)

    def preamble(self) -> bytes:
        return self._preamble

    def tokens(self) -> Iterator[bytes]:
        return iter(self._tokens)

    def tail(self) -> bytes:
        return self._tail


class Cutter:
    """Cuts an answer's bytes into chunks and the chunks into writes, each of which leaves in a loop turn of its own."""

    __slots__ = ("_bytewise", "_chunked", "_held", "_random")

    def __init__(self, faults: Faults, is_chunked: bool) -> None:
        self._bytewise = faults.bytewise
        self._chunked = is_chunked
        self._random = random.Random(faults.cuts or 0)
        self._held = b""  # the end of a step, sent with the next step: a chunk may hold parts of several events

    def head(self, head: bytes) -> Iterator[bytes]:
        """The writes of the response head."""
        return _single_bytes(head) if self._bytewise else self._cut(head, CUT_WRITE_BYTES_MAX)

    def step(self, payload: bytes, last: bool) -> Iterator[bytes]:
        """The writes of a step's bytes. `last`: hold nothing back, and end the body."""
        if self._bytewise:
            writes: Iterator[bytes] = (self._frame(byte) for byte in _single_bytes(payload))
            return chain(writes, self._end()) if last else writes
        payload = self._held + payload
        keep = 0 if last else self._random.randrange(len(payload) // 2 + 1)
        self._held = payload[len(payload) - keep :]
        framed = b"".join(map(self._frame, self._cut(payload[: len(payload) - keep], CUT_CHUNK_BYTES_MAX)))
        return self._cut(framed + b"".join(self._end() if last else ()), CUT_WRITE_BYTES_MAX)

    def flush(self) -> bytes:
        """The bytes held back, framed: all bytes before a break have to be sent."""
        held, self._held = self._held, b""
        return self._frame(held) if held else b""

    def _frame(self, payload: bytes) -> bytes:
        return chunked.encode_chunk(payload) if self._chunked else payload

    def _end(self) -> Iterator[bytes]:
        return iter((chunked.LAST_CHUNK,) if self._chunked else ())

    def _cut(self, whole: bytes, bytes_max: int) -> Iterator[bytes]:
        at = 0
        while at < len(whole):
            size = self._random.randint(1, bytes_max)
            yield whole[at : at + size]
            at += size


def _single_bytes(whole: bytes) -> Iterator[bytes]:
    return (whole[at : at + 1] for at in range(len(whole)))
