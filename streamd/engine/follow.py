"""Follow: the source of a stream that lives in another process, whose copy is read from the engine.

A follower is a Stream like any other: readers, rings, policies and late joiners are unchanged. Its source is a Follow,
one for a stream however many readers it has here.

    SUBSCRIBING  the channel isn't confirmed yet. Only then the copy is read: a message between the two is lost
    BUILDING     the copy is being read from its first entry; messages are kept (the stash)
    FOLLOWING    pushes continue the log
    LOOKING      nothing was heard for SILENT_S: the copy is read on
    STALE        the engine can't be asked for `patience_s`: readers are told to come back
    ENDED        the end has come, or another member's declaration
    ABSENT       there is no copy
    OVER         nobody reads here any more

THE RULE. Messages are hints, the copy is the truth. A push is taken if it begins with the event after the log's last,
under the fence that was read; an older one is passed over. All else (a hole, a higher fence, an overlap) is answered by
reading the copy: on from the last entry, or from its first where it has started over. Nothing is ever applied in part.
The stash is bounded; what it loses, a read finds. A copy that is gone, or shorter than what the readers have (after a
failover to a replica that was behind), changes nothing: its owner heals it, or is lost, and then the declaration does.
Of a copy that is gone the owner is told (engine/followed.py), since an owner with nothing to write doesn't notice.

A copy is read READ_ENTRIES entries at a time, one reply after the other. All of it is untrusted: an entry that can't be
read ends the attempt, and the next look comes by the clock, RETRY_S later. A copy that a newer streamd wrote sends
the readers away: another node can read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final, NamedTuple

from streamd.choice import Choice
from streamd.core.log_record import pack, unpack
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine.channels import ChannelReceiver, Channels
from streamd.engine.connection import EngineError, Reply, packed
from streamd.engine.entry import End, Entry, NewerVersion, Position, Told, fields_of, parse, parse_told, told
from streamd.engine.facts import StreamFacts, pack_facts
from streamd.engine.owner import ENDED_TTL_S_MIN, Commands
from streamd.engine.reading import CopyReader, NotNext
from streamd.reasons import CloseReason

# Entries of a reply: an entry has the tokens of a second, or 16 KiB of a large log. Checking 256 KiB takes 3 ms.
READ_ENTRIES: Final = 16

# Owners write once a second, and tell it: three silent seconds are no accident.
SILENT_S: Final = 3.0
RETRY_S: Final = 1.0
# Looks that find nothing new, of which the last sees whether the copy is there at all.
LOOKS_MAX: Final = 4

# Messages that wait for a read: those of 256 turns of 30 ms, thus of 8 s.
STASH_MESSAGES_MAX: Final = 256
STASH_BYTES_MAX: Final = 64 * 1024

_REASONS: Final = {reason.word: reason for reason in CloseReason}
_LOST: Final = End(CloseReason.NODE_LOST.word, clean=False)


class FollowState(Choice):
    """States of a follow; the module's docstring explains each."""

    SUBSCRIBING = "subscribing"
    BUILDING = "building"
    FOLLOWING = "following"
    LOOKING = "looking"
    STALE = "stale"
    ENDED = "ended"
    ABSENT = "absent"
    OVER = "over"


_LAST: Final = (FollowState.ENDED, FollowState.ABSENT, FollowState.OVER)
_NEXT: Final[dict[FollowState, tuple[FollowState, ...]]] = {
    FollowState.SUBSCRIBING: (FollowState.BUILDING, FollowState.STALE, FollowState.OVER),
    FollowState.BUILDING: (
        *(FollowState.SUBSCRIBING, FollowState.FOLLOWING, FollowState.LOOKING, FollowState.STALE, *_LAST),
    ),
    FollowState.FOLLOWING: (FollowState.BUILDING, FollowState.LOOKING, FollowState.STALE, *_LAST),
    FollowState.LOOKING: (FollowState.BUILDING, FollowState.FOLLOWING, FollowState.STALE, *_LAST),
    FollowState.STALE: (FollowState.BUILDING, FollowState.FOLLOWING, FollowState.LOOKING, *_LAST),
    FollowState.ENDED: (FollowState.OVER,),
    FollowState.ABSENT: (FollowState.OVER,),
    FollowState.OVER: (),
}


class CopyPlace(NamedTuple):
    """The place of a copy in the engine, and the ways there."""

    key: bytes
    channel: bytes
    link: Commands
    channels: Channels


class FollowOwner(NamedTuple):
    """The callbacks of a follow."""

    on_built: Callable[[StreamFacts, ReplayLog], Stream]  # opens the stream that the follow feeds
    on_absent: Callable[[], None]  # there is no copy, or none that can be read
    on_stale: Callable[[], None]  # readers have to be told to come back
    on_declared: Callable[[End], None]  # the end isn't the owner's own: its node is lost
    may_build: Callable[[], bool] = lambda: True  # the copy is there: is there room for it? False: this follow is over


class FollowCounts:
    """Counted for metrics, over all follows."""

    def __init__(self) -> None:
        self.pushes = self.pushes_old = self.reads = self.rebuilds = self.holes = self.broken = 0


class Follow:
    """The source of a stream that lives elsewhere."""

    needs_reader = False  # engine/followed.py ends it, a while after its last reader
    watch = None  # a generation's figures are counted by the worker that asks for it

    def __init__(
        self,
        place: CopyPlace,
        owner: FollowOwner,
        counts: FollowCounts,
        *,
        new_log: Callable[[], ReplayLog],
        time: Callable[[], float],
        patience_s: float = 20.0,
    ) -> None:
        # process
        self._place = place
        self._owner = owner
        self._counts = counts
        self._new_log = new_log
        self._time = time
        self._patience_s = patience_s
        # state
        self.state = FollowState.SUBSCRIBING
        self.stream: Stream | None = None
        self._position = Position(0, 0)  # of the newest entry that the stream has
        self._found_end: End | None = None  # in that entry
        self._fence_seen = 0  # the highest of a copy, also of what was shorter than the log here
        self._facts: StreamFacts | None = None
        self.member = ""  # that wrote the copy's newest fence
        self._heard_at = self._asked_at = self._answered_at = time()
        self._looks = 0  # that found nothing new
        self.gone_at = 0.0  # since when the copy is known to be gone; 0: it isn't known
        # reading
        self._reader: CopyReader | None = None  # reads the copy from its first entry
        self._is_reading = False
        self._reads_again = False
        self._may_read_at = self._may_rebuild_at = 0.0
        self._stash: list[Told] = []
        self._stash_bytes = 0

    # -- life

    def start(self) -> None:
        """Listen, and then read the copy."""
        self._place.channels.subscribe(self._place.channel, ChannelReceiver(self._ready, self._text))

    def cancel(self, reason: CloseReason) -> None:
        """As a stream's source: nobody reads here any more. The stream lives on where it is."""
        self._stop()

    def on_terminal(self, now: float) -> None:
        """As a stream's source: the end comes from the copy, with its reason."""

    def _stop(self) -> None:
        if self.state is not FollowState.OVER:
            self._place.channels.unsubscribe(self._place.channel)
            self._go(FollowState.OVER)
            self._reader = None
            self._stash.clear()

    def _go(self, state: FollowState) -> None:
        if state is not self.state:
            assert state in _NEXT[self.state], (self.state, state)
            self.state = state

    # -- the clock

    def tick(self, now: float) -> None:
        """Look into silence; the sweep calls it four times a second."""
        if self.state in _LAST:
            return
        if self._is_reading or not self._place.link.has_room:
            silent_s = now - max(self._heard_at, self._answered_at)  # the engine's; a stream may be silent for long
            if silent_s > self._patience_s and self.state is not FollowState.STALE:
                self._go(FollowState.STALE)
                self._owner.on_stale()
            return
        if self.state is FollowState.SUBSCRIBING or now - self._asked_at < RETRY_S:
            return
        if self.state is FollowState.FOLLOWING and now - self._heard_at > SILENT_S:
            self._go(FollowState.LOOKING)
        if self.state in (FollowState.LOOKING, FollowState.STALE):
            self._looks += 1
            if self._looks % LOOKS_MAX:
                self._read()
            else:
                self._see_whether_it_is_there()
        elif self.state is FollowState.BUILDING:
            self._rebuild()

    def _see_whether_it_is_there(self) -> None:
        """A copy that is gone has nothing new, as that of a silent stream."""
        self._asked_at = self._time()
        self._is_reading = True
        command = packed("XRANGE", self._place.key, "-", "+", "COUNT", 1)
        self._place.link.ask(command, self._seen)

    def _seen(self, reply: Reply) -> None:
        self._is_reading = False
        if self.state in _LAST or not isinstance(reply, list):
            return
        self._answered_at = self._time()
        self._note_whether_gone(is_gone=not reply)
        self._read_soon()

    def _note_whether_gone(self, *, is_gone: bool) -> None:
        self.gone_at = (self.gone_at or self._time()) if is_gone else 0.0

    # -- messages

    def _ready(self) -> None:
        """The channel is confirmed, for the first time or again: what was sent before is missing."""
        if self.state in _LAST:
            return
        if self.stream is None:
            self._rebuild()
        else:
            self._read()

    def _text(self, text: bytes) -> None:
        try:
            message = parse_told(text)
        except ValueError:
            self._counts.broken += 1
            return
        if self.state in _LAST:
            return
        if self._is_reading or self.stream is None:
            self._keep(message)
        elif not self._take(message):
            self._keep(message)
            self._read_soon()

    def _keep(self, message: Told) -> None:
        """Keep a message until the read is done. A stash that is full is emptied: the next read finds all."""
        self._stash.append(message)
        self._stash_bytes += len(message.record)
        if len(self._stash) > STASH_MESSAGES_MAX or self._stash_bytes > STASH_BYTES_MAX:
            self._stash.clear()
            self._stash_bytes = 0
            self._reads_again = True

    def _take(self, message: Told) -> bool:
        """Whether the stream has all that this message tells of, now or before."""
        stream = self.stream
        assert stream is not None
        position, log = message.position, stream.log
        if message.is_end or position.fence > self._position.fence:
            return position.fence < self._position.fence
        if position.fence < self._position.fence or position.seq < log.seq_next:
            self._counts.pushes_old += 1
            return True
        if not message.record:
            return False
        try:
            record = unpack(message.record, position.seq)
            if record.starts_over or record.seq_first != log.seq_next:
                self._counts.holes += 1
                return False
            stream.take_record(record, self._time())
        except ValueError:
            self._counts.broken += 1
            return False
        self._counts.pushes += 1
        self._heard()
        return True

    def _heard(self) -> None:
        self._heard_at = self._time()
        self._looks, self.gone_at = 0, 0.0
        if self.state in (FollowState.LOOKING, FollowState.STALE):
            self._go(FollowState.FOLLOWING)

    # -- reading

    def _rebuild(self) -> None:
        """Read the copy from its first entry."""
        if self._is_reading:
            self._reads_again = True
            return
        self._go(FollowState.BUILDING)
        self._reader = CopyReader(self._new_log)
        self._ask(b"-")

    def _read(self) -> None:
        """Read the copy on from the newest entry that the stream has."""
        if self._is_reading:
            self._reads_again = True
        elif self.stream is None or self._reader is not None:
            self._rebuild()
        else:
            self._ask(b"(%b" % str(self._position).encode())

    def _ask(self, first: bytes) -> None:
        if not self._place.link.has_room:
            self._asked_at = 0.0
            return  # the next tick() tries again
        self._asked_at = self._time()
        self._is_reading = True
        self._reads_again = False
        self._counts.reads += 1
        self._place.link.ask(packed("XRANGE", self._place.key, first, "+", "COUNT", READ_ENTRIES), self._entries)

    def _entries(self, reply: Reply) -> None:
        """A reply of the copy's next entries."""
        self._is_reading = False
        if self.state in _LAST:
            return
        if not isinstance(reply, list) or isinstance(reply, EngineError):
            return  # tick() tries again
        self._answered_at = self._time()
        try:
            entries = [parse(each) for each in reply]
            if self._reader is not None:
                self._build(self._reader, entries)
            else:
                self._go_on(entries)
        except NotNext:
            self._counts.holes += 1
            self._rebuild_soon()
        except NewerVersion:
            self._counts.broken += 1
            self._reader = None
            self._go(FollowState.STALE)
            self._owner.on_stale()
        except ValueError:
            self._counts.broken += 1
            if self.stream is None:
                self._absent()
            else:
                self._reader = None
                self._may_read_at = self._time() + RETRY_S
                self._go(FollowState.LOOKING)

    def _rebuild_soon(self) -> None:
        """From the first entry, but once in RETRY_S at most: a copy that is being healed isn't read in a circle."""
        now = self._time()
        self._reader = None
        self._counts.rebuilds += 1
        self._go(FollowState.BUILDING)
        if now >= self._may_rebuild_at:
            self._may_rebuild_at = now + RETRY_S
            self._rebuild()

    def _absent(self) -> None:
        self._go(FollowState.ABSENT)
        self._place.channels.unsubscribe(self._place.channel)
        self._owner.on_absent()

    def _build(self, reader: CopyReader, entries: list[Entry]) -> None:
        if entries and self.stream is None and not self._owner.may_build():
            return
        for entry in entries:
            # What stands in front of a start belongs to a log that is no more; a trim is on its way.
            if reader.log is not None or entry.starts_over:
                reader.take(entry)
        if len(entries) == READ_ENTRIES:
            self._ask(b"(%b" % str(entries[-1].position).encode())
            return
        log, facts = reader.log, reader.facts
        self._fence_seen = max(self._fence_seen, reader.fence)
        if self.stream is None:
            if log is None or facts is None:
                self._absent()
                return
            self.stream = self._owner.on_built(facts, log)
        elif log is None or facts is None or log.seq_next < self.stream.log.seq_next + (not reader.is_whole):
            self._reader = None
            self._may_read_at = self._time() + RETRY_S
            self._note_whether_gone(is_gone=log is None)
            self._go(FollowState.LOOKING)
            return
        elif log.seq_first > self.stream.log.seq_next:
            self._go(FollowState.STALE)  # events between are gone: readers come back to a stream without them
            self._owner.on_stale()
            return
        else:
            self.stream.replace_log(log, self._time())
        self._reader = None
        self._position, self._found_end = reader.position, reader.end
        self._facts, self.member = facts, reader.member
        self._go(FollowState.FOLLOWING)
        self._heard()
        self._read_all(has_gained=True)

    def _go_on(self, entries: list[Entry]) -> None:
        """Entries behind those that the stream has."""
        stream = self.stream
        assert stream is not None
        for entry in entries:
            self._add(entry, stream)
            self._position, self._found_end = entry.position, entry.end
            self.member = entry.raised_by or self.member
        if len(entries) == READ_ENTRIES:
            self._read()
            return
        if entries:
            self._heard()
        self._read_all(has_gained=bool(entries))

    def _add(self, entry: Entry, stream: Stream) -> None:
        log, last = stream.log, stream.log.seq_next - 1
        if entry.starts_over or (entry.last_seq > last and entry.position.seq == 0):
            raise NotNext("the copy has started over")
        if entry.last_seq < last and (entry.position.seq == 0 or entry.end is not None):
            raise NotNext("an end in front of events that were pushed")
        if entry.position.seq == 0:
            return
        if entry.position.fence != self._position.fence:
            raise NotNext("an entry of another fence")
        if entry.last_seq <= last:
            return  # pushes had it
        record = unpack(entry.record, entry.last_seq)
        if record.seq_first != log.seq_next:
            raise NotNext("events are missing, or overlap")
        stream.take_record(record, self._time())

    def _read_all(self, *, has_gained: bool) -> None:
        """The copy is read to its end: now the messages that waited, or the stream's end."""
        stash, self._stash, self._stash_bytes = self._stash, [], 0
        if self._found_end is not None:
            self._end(self._found_end)
            return
        for message in stash:
            if not self._take(message):
                self._keep(message)
        now = self._time()
        self._may_read_at = now if has_gained else now + RETRY_S
        if self._stash or self._reads_again:
            self._read_soon()

    def _read_soon(self) -> None:
        """A message tells of more than the stream has. After a read that found nothing, the clock says when."""
        if self._time() >= self._may_read_at:
            self._read()
        elif self.state is FollowState.FOLLOWING:
            self._go(FollowState.LOOKING)

    # -- the owner's death

    def declare_lost(self, by: str) -> None:
        """The owner is lost: end the copy behind the last event that is here. `by` is this process's member id.

        Only while nothing comes (LOOKING). Of several members the first wins, and an owner that lives after all takes
        its stream back (engine/owner.py, REVIVING).
        """
        stream, link, facts = self.stream, self._place.link, self._facts
        if self.state is not FollowState.LOOKING or self._is_reading or not link.has_room:
            return
        assert stream is not None and facts is not None
        # The whole log: pushes may have brought more than the copy has, and a failover may have shortened it.
        record = stream.log.since(stream.log.mark_at_start(), bytes_max=sys.maxsize)
        fields = fields_of(
            record=pack(record) if record is not None else b"",
            starts_over=True,
            facts=pack_facts(facts),
            end=_LOST,
            raised_by=by,
            last_seq=stream.events,
        )
        position = Position(max(self._position.fence, self._fence_seen) + 1, 0)
        self._is_reading = True
        command = packed("XADD", self._place.key, str(position), *fields)
        link.ask(command, lambda reply: self._declared(position, reply))

    def _declared(self, position: Position, reply: Reply) -> None:
        self._is_reading = False
        if self.state in _LAST:
            return
        if isinstance(reply, EngineError):
            self._read_soon()  # another member was first, or the owner lives
        else:
            assert self._facts is not None
            ttl_ms = round(max(ENDED_TTL_S_MIN, self._facts.retention_s) * 1000)
            self._place.link.ask(packed("PEXPIRE", self._place.key, ttl_ms), _ignore)
            self._place.link.ask(packed("PUBLISH", self._place.channel, told(position, is_end=True)), _ignore)
            self._position = position
            self._end(_LOST)

    def _end(self, end: End) -> None:
        stream = self.stream
        assert stream is not None
        self._go(FollowState.ENDED)
        self._place.channels.unsubscribe(self._place.channel)
        reason = _REASONS.get(end.reason)
        if reason is None or reason is CloseReason.NODE_LOST:
            self._owner.on_declared(end)
        elif stream.reason is None:
            stream.seal(reason, self._time(), clean=end.clean)


def _ignore(reply: Reply) -> None:
    """The reply to a command that needs none."""
