"""RemoteReaders: the readers that this worker's streams have at other nodes.

All readers of a stream at another member count as one. They are there from the member's note `follow` on, until its
note `left`, or until it hasn't repeated itself for LAPSE_S: then it is dead or cut off, which is a lost connection and
no reader's wish. Where the last reader leaves there, the generation ends as if it had left here: the side that
closed the connection decides the grace.

BOUNDS. READERSHIPS_MAX members and streams in all; beyond it `follow` isn't heard. Only streams that are here and live
are kept, so what is forged takes no more than what is true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import orjson

from streamd.core.hub import Gone, Hub
from streamd.core.stream import Stream
from streamd.engine.notes import ClusterNote
from streamd.engine.presence import RENEW_S
from streamd.reasons import By, CloseReason

# Three notes of a member that went missing in turn.
LAPSE_S: Final = 3 * RENEW_S
# 10,000 streams, each read at six other members; some 300 B each.
READERSHIPS_MAX: Final = 65_536

_REASONS: Final = {reason.word: reason for reason in CloseReason if reason.by in (By.READER, By.NETWORK)}


class RemoteReaders:
    """The members that have readers of this worker's streams."""

    def __init__(self, hub: Hub, time: Callable[[], float], wanted: Callable[[Stream], None]) -> None:
        """`wanted` hears of a stream that another member begins to read."""
        self._hub = hub
        self._time = time
        self._wanted = wanted
        self._members: dict[str, set[str]] = {}  # by stream id
        self._until: dict[tuple[str, str], float] = {}  # by stream id and member; in the order of their lapse

    def __len__(self) -> int:
        return len(self._until)

    def has(self, stream: Stream) -> bool:
        """Whether another member has readers of the stream."""
        return stream.id in self._members

    def take_follow(self, note: ClusterNote) -> None:
        """A member has readers of these streams. Raises ValueError for a body of another form."""
        until = self._time() + LAPSE_S
        for stream_id in _texts(orjson.loads(note.body)):
            stream = self._own(stream_id)
            if stream is None:
                continue
            place = (stream_id, note.sender)
            if self._until.pop(place, None) is None:
                if len(self._until) >= READERSHIPS_MAX:
                    return
                self._members.setdefault(stream_id, set()).add(note.sender)
                self._hub.end_grace(stream)
                self._wanted(stream)
            self._until[place] = until

    def take_left(self, note: ClusterNote) -> None:
        """The last readers of these streams at a member have left. Raises ValueError for a body of another form."""
        rows = orjson.loads(note.body)
        if not isinstance(rows, list):
            raise ValueError("a note without its list")
        for row in rows:
            stream_id, word = _texts(row)
            self._leave(stream_id, note.sender, _REASONS.get(word, CloseReason.NETWORK_LOST))

    def _leave(self, stream_id: str, member: str, reason: CloseReason) -> None:
        if self._until.pop((stream_id, member), None) is None:
            return
        members = self._members[stream_id]
        members.discard(member)
        if members:
            return
        del self._members[stream_id]
        stream = self._own(stream_id)
        if stream is not None:
            self._hub.left_elsewhere(stream, reason, self._time())

    def _own(self, stream_id: str) -> Stream | None:
        """The live stream of this worker."""
        try:
            stream = self._hub.get(stream_id)
        except Gone:
            return None
        return stream if stream is not None and stream.reason is None and not stream.terms.is_copy else None

    def ended(self, stream: Stream) -> None:
        """The stream has its end: it takes no readers' wish to go on."""
        for member in self._members.pop(stream.id, ()):
            del self._until[stream.id, member]

    def tick(self, now: float) -> None:
        """Give up members that say nothing any more; the sweep calls it four times a second."""
        lapsed = []
        for place, until in self._until.items():
            if until > now:
                break
            lapsed.append(place)
        for stream_id, member in lapsed:
            self._leave(stream_id, member, CloseReason.NETWORK_LOST)


def _texts(given: Any) -> list[str]:
    if not isinstance(given, list) or not all(type(text) is str for text in given):
        raise ValueError("a note without its list of texts")
    return given
