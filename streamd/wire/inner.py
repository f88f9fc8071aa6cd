"""The events of a streamd behind this streamd. Its own events speak of its ids, which mean nothing to readers here.

    heartbeat   a sign of life, and no event: this streamd's readers have heartbeats of its own
    gap         stays a gap, at its own place: the inner seqs would point somewhere else in this stream
    farewell    SentAway: the inner daemon drains, and its stream ends with it. To readers here that is a truncation,
                and the inner `last_id` would lead nowhere

An error event passes as any upstream's does.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from streamd.wire.dialects.members import Json, json_object
from streamd.wire.sse import HEARTBEAT, EventSplitter, EventTooLarge, SplitterState, StrayTaker, is_event, parse_event

# Heartbeats that are lines have no blank line: the splitter sees them as the first lines of the event behind them.
_heartbeat_lines: Final = re.compile(rb"\A(?:%b)+" % re.escape(HEARTBEAT)).sub
# As gap_event() writes it. In a text of a model the quotes have backslashes.
_gap: Final = re.compile(rb'"gap":\{"from":[0-9]+,"to":[0-9]+(?:,"reset":true)?\}').sub


class SentAway(Exception):
    """The inner streamd asks its reader to come back. `before`: the pieces in front of that, of the same read."""

    def __init__(self, before: list[bytes]) -> None:
        super().__init__("The upstream, another streamd, drains and has sent its readers away")
        self.before = before


class InnerState(NamedTuple):
    """An InnerSplitter between two reads."""

    splitter: SplitterState
    next_seq: int


class InnerSplitter(EventSplitter):
    """An EventSplitter whose pieces are those for the outer stream. All of its ways to give some may raise SentAway."""

    __slots__ = ("_heartbeat", "_next_seq")

    def __init__(self, heartbeat: bytes, *, event_bytes_max: int, strays: StrayTaker) -> None:
        super().__init__(event_bytes_max=event_bytes_max, strays=strays)
        self._heartbeat = heartbeat
        self._next_seq = 1

    @property
    def inner_state(self) -> InnerState:
        """What go_on_from_inner() takes."""
        return InnerState(self.state(), self._next_seq)

    def go_on_from_inner(self, state: InnerState) -> None:
        """As go_on_from()."""
        if state.next_seq < 1:
            raise ValueError("an inner stream before its first event")
        self.go_on_from(state.splitter)
        self._next_seq = state.next_seq

    def feed(self, chunk: bytes) -> list[bytes]:
        try:
            pieces = super().feed(chunk)
        except EventTooLarge as large:
            large.before = self._outer(large.before)
            raise
        return self._outer(pieces)

    def finish(self) -> list[bytes]:
        return self._outer(super().finish())

    def give_up(self) -> list[bytes]:
        try:
            return self._outer(super().give_up())
        except SentAway as away:  # the body has been cut as well, which is a truncation anyway
            return away.before

    def _outer(self, pieces: list[bytes]) -> list[bytes]:
        out: list[bytes] = []
        for piece in pieces:
            if piece.startswith(HEARTBEAT):
                piece = _heartbeat_lines(b"", piece)
            if not piece or piece == self._heartbeat:
                continue
            if b'"last_id"' in piece and _is_farewell(json_object(parse_event(piece)[1]) or {}):
                raise SentAway(out)
            if b'"gap":' in piece:
                piece = _gap(b'"gap":{"from":%d,"to":%d}' % (self._next_seq, self._next_seq), piece, count=1)
            self._next_seq += is_event(piece)
            out.append(piece)
        return out

    def feed_all(self, chunks: list[bytes]) -> list[bytes]:
        return self.feed(b"".join(chunks))

    @property
    def at_rest(self) -> bool:
        """Never: any event may be the inner daemon's own, and is looked at."""
        return False


def splitter_for(
    heartbeat: bytes, *, is_inner: bool, event_bytes_max: int, strays: StrayTaker
) -> EventSplitter | InnerSplitter:
    """The splitter for an upstream's stream; `is_inner`: that is another streamd, and `heartbeat` its dialect's."""
    if is_inner:
        return InnerSplitter(heartbeat, event_bytes_max=event_bytes_max, strays=strays)
    return EventSplitter(event_bytes_max=event_bytes_max, strays=strays)


def _is_farewell(body: Json) -> bool:
    is_placed = isinstance(body.get("last_id"), str) and isinstance(body.get("retry_ms"), int)
    return is_placed and isinstance(body.get("error"), dict)
