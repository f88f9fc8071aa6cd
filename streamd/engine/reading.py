"""CopyReader: makes the log of a stream from the entries of its copy.

Everything in the engine is untrusted: an entry that doesn't continue the log is refused, and the log stays as it was.
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

    __slots__ = ("_new_log", "end", "facts", "log", "member", "position")

    def __init__(self, new_log: Callable[[], ReplayLog]) -> None:
        self._new_log = new_log
        self.position = Position(0, 0)  # of the newest entry that was read
        self.log: ReplayLog | None = None  # None until an entry starts over
        self.facts: StreamFacts | None = None
        self.end: End | None = None
        self.member = ""  # that raised the newest fence

    def take(self, entry: Entry) -> None:
        """Read the next entry.

        Raises NotNext if it isn't the next, NewerVersion for a copy of a newer streamd, and ValueError for an entry
        that no owner writes. The reader is as before then.
        """
        if entry.position <= self.position:
            raise NotNext("an entry that was read already, or of an older fence")
        if entry.starts_over:
            self._start(entry)
        elif self.log is None:
            raise NotNext("a copy that begins in its middle")
        elif entry.position.seq == 0:
            if entry.last_seq != self.log.seq_next - 1:
                raise NotNext("a fence raised at another place")
        elif entry.position.fence != self.position.fence:
            raise NotNext("an entry of another fence")
        else:
            self._extend(entry, self.log)
        self.position, self.end = entry.position, entry.end
        self.member = entry.raised_by or self.member

    def _start(self, entry: Entry) -> None:
        facts = parse_facts(entry.facts)
        log = self._new_log()
        if entry.record:
            log.extend(unpack(entry.record, entry.last_seq))
        self.log, self.facts = log, facts

    @staticmethod
    def _extend(entry: Entry, log: ReplayLog) -> None:
        record = unpack(entry.record, entry.last_seq)
        if record.seq_first != log.seq_next:
            raise NotNext("events are missing")
        log.extend(record)
