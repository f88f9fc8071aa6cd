"""CopyReader: makes the log of a stream from the entries of its copy.

Everything in the engine is untrusted: an entry that doesn't continue the log is refused, and the log stays as it was.

A copy that starts over is whole only when it has all that the copy had before, which may take several entries. Its
owner removes the former entries then, and not earlier; an owner that dies on the way has lost nothing. So the reader
keeps the former log until the new one has got as far.
"""

from __future__ import annotations

from collections.abc import Callable

from streamd.core.log_record import unpack
from streamd.core.replay import ReplayLog
from streamd.engine.entry import End, Entry, Position
from streamd.engine.facts import StreamFacts, parse_facts


class NotNext(ValueError):
    """An entry that doesn't continue what was read: entries between are missing, or the copy has begun anew."""


class CopyReader:
    """Reads a copy from its first entry on. `new_log` makes an empty log with the bounds of this process."""

    __slots__ = ("_former", "_new_log", "_newest", "_place", "end", "facts", "member")

    def __init__(self, new_log: Callable[[], ReplayLog]) -> None:
        self._new_log = new_log
        self._place = Position(0, 0)  # of the newest entry that was read
        self._newest: ReplayLog | None = None  # None until an entry starts over
        self._former: tuple[ReplayLog, Position] | None = None  # longer than the newest, and its last entry's place
        self.facts: StreamFacts | None = None
        self.end: End | None = None
        self.member = ""  # that raised the newest fence

    @property
    def log(self) -> ReplayLog | None:
        """The longest log that was read; None: no entry has started over."""
        return self._newest if self._former is None else self._former[0]

    @property
    def position(self) -> Position:
        """The place of the log's last entry."""
        return self._place if self._former is None else self._former[1]

    @property
    def fence(self) -> int:
        """The newest fence that was read."""
        return self._place.fence

    @property
    def is_whole(self) -> bool:
        """Whether the newest log has all that the copy had before it."""
        return self._former is None

    def take(self, entry: Entry) -> None:
        """Read the next entry.

        Raises NotNext if it isn't the next, NewerVersion for a copy of a newer streamd, and ValueError for an entry
        that no owner writes. The reader is as before then.
        """
        if entry.position <= self._place:
            raise NotNext("an entry that was read already, or of an older fence")
        log = self._newest
        if entry.starts_over:
            self._start(entry)
        elif log is None:
            raise NotNext("a copy that begins in its middle")
        elif entry.position.seq == 0:
            if entry.last_seq != log.seq_next - 1:
                raise NotNext("a fence raised at another place")
        elif entry.position.fence != self._place.fence:
            raise NotNext("an entry of another fence")
        else:
            self._extend(entry, log)
        self._place, self.end = entry.position, entry.end
        self.member = entry.raised_by or self.member
        if self._former is not None and self._newest is not None and self._newest.seq_next >= self._former[0].seq_next:
            self._former = None

    def _start(self, entry: Entry) -> None:
        facts = parse_facts(entry.facts)
        log = self._new_log()
        if entry.record:
            log.extend(unpack(entry.record, entry.last_seq))
        if self.log is not None:
            self._former = (self.log, self.position)
        self._newest, self.facts = log, facts

    @staticmethod
    def _extend(entry: Entry, log: ReplayLog) -> None:
        record = unpack(entry.record, entry.last_seq)
        if record.seq_first != log.seq_next:
            raise NotNext("events are missing")
        log.extend(record)
