"""Presence: tells the owners of followed streams that these have readers here.

Owners end generations without a reader after a grace, so a reader here has to be known there. A stream is told with its
first reader, again every RENEW_S, and once more with the reason when its last reader has left. What is told between two
ticks goes to each owner in a single note: a node with a thousand followed streams sends some notes a second.

Nothing waits for a note. What can't be sent is told at a later tick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import orjson

from streamd.core.stream import Stream
from streamd.engine.notes import NoteKind, Notes, NoteShard
from streamd.reasons import CloseReason

RENEW_S: Final = 10.0
# Streams of a note: 500 ids of 29 characters, each with a reason, are 24 KB.
NOTE_STREAMS_MAX: Final = 500


class Readership:
    """What an owner was told of a followed stream."""

    __slots__ = ("left_for", "member", "told_at")

    def __init__(self) -> None:
        self.member = ""  # that was told of readers here; "": none
        self.told_at = 0.0
        self.left_for = CloseReason.NETWORK_LOST  # why the last reader here left


class Presence:
    """What the owners of followed streams are told."""

    def __init__(self, notes: Notes, time: Callable[[], float]) -> None:
        self._notes = notes
        self._time = time
        self._follows: dict[tuple[NoteShard, str], list[tuple[Readership, str]]] = {}  # by server and owner
        self._lefts: dict[tuple[NoteShard, str], list[tuple[Readership, str, str]]] = {}

    def look(self, readership: Readership, shard: NoteShard, owner: str, stream: Stream) -> None:
        """Compare what is with what was told; called for each followed stream at each tick, before tell()."""
        is_read = bool(stream.readers) and stream.reason is None
        now = self._time()
        if is_read and (readership.member != owner or now - readership.told_at >= RENEW_S):
            self._follows.setdefault((shard, owner), []).append((readership, stream.id))
        elif not is_read and readership.member:
            self._left(readership, shard, stream)

    def _left(self, readership: Readership, shard: NoteShard, stream: Stream) -> None:
        if stream.reason is not None:
            readership.member = ""  # the owner knows of the end
            return
        place = (shard, readership.member)
        self._lefts.setdefault(place, []).append((readership, stream.id, readership.left_for.word))

    def tell(self) -> None:
        """Send what look() has found."""
        now = self._time()
        follows, self._follows = self._follows, {}
        for (shard, owner), streams in follows.items():
            for start in range(0, len(streams), NOTE_STREAMS_MAX):
                some = streams[start : start + NOTE_STREAMS_MAX]
                body = orjson.dumps([each for _, each in some])
                if self._notes.tell(shard, owner, NoteKind.FOLLOW, body):
                    for readership, _ in some:
                        readership.member, readership.told_at = owner, now
        lefts, self._lefts = self._lefts, {}
        for (shard, owner), leavings in lefts.items():
            for start in range(0, len(leavings), NOTE_STREAMS_MAX):
                part = leavings[start : start + NOTE_STREAMS_MAX]
                if self._notes.tell(shard, owner, NoteKind.LEFT, orjson.dumps([row[1:] for row in part])):
                    for readership, *_ in part:
                        readership.member = ""
