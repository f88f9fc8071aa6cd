"""CopyOwner: writes the copies of this process's streams to the engine, and heals them.

THE RULE. The owner's log is the truth while the owner lives; the copy heals. So no write is waited for, none is queued
and none is sent twice on suspicion. A copy knows how far it was written (its mark). Whatever goes wrong on the way, the
owner looks where the copy ends and goes on from there. That alone makes failovers, restarts, emptied engines and
evictions lossless; acknowledgements can't, since an old primary goes on acknowledging for seconds what the new one
never gets.

    NEW         nothing of the stream is in the engine: the next write starts over
    WRITTEN     the copy is ours, up to the mark
    VERIFYING   nothing is known of the copy: its newest entry, and the entry that raised its fence, are read next
    REVIVING    another member has declared this owner dead, but it lives: the next write starts over, above its fence
    HELD        the engine refused a write in its own words (no right, wrong type): a pause, then VERIFYING
    YIELDED     another member has taken the stream over: nothing is written any more
    DONE        the end is in the copy

A write that starts over begins with the log's first event, under a fence that was never used (engine/entry.py). It is
the answer to a copy that is gone, shorter or older than the log can continue, another member's, or twice as large as
the log. A large log takes several entries. The former entries are removed when the last of them is written: an owner
that dies before has lost nothing (engine/reading.py).

WHEN. grown() comes from the sweep that charges a stream's log, once a second while it grows, so nothing is added to the
way of a token: ten tokens cost the engine a command. sealed() writes the end at once. A stream has at most a single
write on its way, and writes only while its server's link has room. What can't be written now is written by a later
grown(), or by tick() for a copy that is unsettled: neither keeps anything but a reference to the copy.

PUSHES. After a write the engine is asked how many members listen to the stream's channel (PUBSUB NUMSUB, for all the
streams that were written since the last tick). While there are some, push() sends them the new events every
engine_push, from the end of the copy on, and each write is told there as well. Pushes are hints: each says its place,
and nothing depends on its arrival.

AFTER A LOSS. When a link is up again all of its copies are VERIFYING. tick() goes over them, live streams first, in
slices of SLICE_MAX a turn, while the link has room and HEAL_BYTES_S_MAX allows: an engine that came back empty isn't
stormed. A full engine (OOM) is probed by a single write a second.

BOUNDS. A copy is at most twice its log and an entry, and while it starts over its log once more. In flight are the
link's 1,000 commands or 1 MiB. A copy's object takes some 250 B with its place in the table of copies: it is its own
mark, and shares times with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final, Protocol

from streamd.choice import Choice
from streamd.core.guard import Guard
from streamd.core.log_record import LogRecord, pack
from streamd.core.replay import Mark
from streamd.core.stream import Stream
from streamd.engine.connection import EngineError, EngineLost, OnReply, Reply, packed
from streamd.engine.entry import End, Entry, Position, fields_of, parse, told
from streamd.engine.shards import CopyKeys

# Entries of a large log, and of a burst: a reader of the copy gets some thousand tokens with each, and checks them in
# 0.2 ms.
ENTRY_BYTES_MAX: Final = 16 * 1024

# Passes over all copies in a time to live, each of which renews it.
RENEWALS_PER_TTL: Final = 4
# A reader elsewhere, on its way to the end, finds the copy for this long at least.
ENDED_TTL_S_MIN: Final = 10

NEVER: Final = float("inf")
_LONG_AGO: Final = -NEVER

# A copy starts over for an eviction once in this time: an engine that evicts all it gets isn't fed in a circle.
RENEW_EVERY_S: Final = 10.0
# After a refusal that a second try won't change.
HELD_S: Final = 10.0
PROBE_EVERY_S: Final = 1.0

# Channels of a PUBSUB NUMSUB: some 0.1 us each for the engine, and a command of 12 KB.
CHANNELS_ASKED_MAX: Final = 256

# Unit in which the size of a copy is counted: of most copies it stays a number that Python keeps a single object for.
WRITTEN_UNIT_BYTES: Final = 128

# Copies looked at in a turn: some 10 us each.
SLICE_MAX: Final = 64
# Bytes a second of a worker to an engine whose copies it heals.
HEAL_BYTES_S_MAX: Final = 4 * 1024 * 1024


class CopyState(Choice):
    """States of a copy, as its owner knows it; the module's docstring explains each."""

    NEW = "new"
    WRITTEN = "written"
    VERIFYING = "verifying"
    REVIVING = "reviving"
    HELD = "held"
    YIELDED = "yielded"
    DONE = "done"


_NEXT: Final[dict[CopyState, tuple[CopyState, ...]]] = {
    CopyState.NEW: (CopyState.WRITTEN, CopyState.VERIFYING, CopyState.HELD, CopyState.DONE),
    CopyState.WRITTEN: (CopyState.NEW, CopyState.VERIFYING, CopyState.REVIVING, CopyState.HELD, CopyState.DONE),
    CopyState.VERIFYING: (
        *(CopyState.NEW, CopyState.WRITTEN, CopyState.REVIVING, CopyState.HELD, CopyState.YIELDED, CopyState.DONE),
    ),
    CopyState.REVIVING: (CopyState.WRITTEN, CopyState.VERIFYING, CopyState.HELD, CopyState.DONE),
    CopyState.HELD: (CopyState.VERIFYING,),
    CopyState.YIELDED: (),
    CopyState.DONE: (CopyState.VERIFYING,),
}
_STARTS_OVER: Final = (CopyState.NEW, CopyState.REVIVING)


class CopyFound(Choice):
    """The outcome of a look at a copy."""

    CURRENT = "current"  # up to the log's end
    BEHIND = "behind"  # ours, and shorter than the log
    GONE = "gone"
    OLDER = "older"  # of an earlier fence, or of a part of the log that is no longer held
    SUPERSEDED = "superseded"  # another member declared the end, or took over
    BROKEN = "broken"  # no entries of streamd


class Commands(Protocol):
    """A link, as the owner uses it."""

    @property
    def is_up(self) -> bool:
        """Whether commands are carried out."""

    @property
    def has_room(self) -> bool:
        """Whether a command may be sent now."""

    def ask(self, command: bytes, on_reply: OnReply) -> None:
        """Send a command."""


class OwnerCounts:
    """Counted for metrics."""

    def __init__(self) -> None:
        self.writes_delta = self.writes_start = self.writes_end = 0
        self.written_bytes = 0
        self.found = dict.fromkeys(CopyFound, 0)
        self.refused_full = self.refused_order = self.refused_gone = self.refused_other = 0
        self.revived = self.pushes = 0


def id_of(stream: Stream) -> str:
    """The name of a stream's copy: the streams of a chosen name each have their own, told apart by the epoch."""
    return f"{stream.id}:{stream.epoch}" if stream.epoch else stream.id


class OwnedCopy(Mark):
    """The copy of a stream of this process.

    It is the mark of its stream's log, up to the last write that was sent; without a mark the next write starts over.
    """

    __slots__ = (
        "channel_mark",
        "confirmed_at",
        "confirmed_seq",
        "fence",
        "not_before",
        "renewed_at",
        "server",
        "state",
        "stream",
        "times_up",
        "whole_seq",
        "written_units",
    )

    def __init__(self, stream: Stream, server: EngineServer) -> None:
        super().__init__(0, 0, 0, 0)
        self.stream = stream
        self.server = server
        self.state = CopyState.NEW
        self.fence = 0  # the highest that is known
        self.channel_mark: Mark | None = None  # of the log, up to the last push; None: nobody listens
        self.confirmed_seq = 0  # up to the last write that the engine took
        self.confirmed_at = server.now  # when the copy was last known to have all events; an object that copies share
        self.renewed_at = _LONG_AGO  # when it last started over because it was gone; an object that copies share
        self.whole_seq = 0  # a copy that started over is whole with this seq; 0: it is, and is trimmed
        self.not_before = 0.0  # of the next write; NEVER: a command of this copy is on its way
        self.written_units = 0  # of WRITTEN_UNIT_BYTES, since the copy started over
        self.times_up = server.times_up  # the server's, when the state was right

    @property
    def id(self) -> str:
        """The copy's name."""
        return id_of(self.stream)

    @property
    def has_mark(self) -> bool:
        """Whether the next write goes on where the last ended."""
        return self.seq_next > 0

    def set_mark(self, mark: Mark | None) -> None:
        """The next write begins at this mark of the log, or starts over."""
        self.move_to(mark if mark is not None else _NO_MARK)

    @property
    def is_waiting(self) -> bool:
        """Whether a command of this copy is on its way."""
        return self.not_before == NEVER

    def waits(self, *, waiting: bool) -> None:
        """A command is on its way, or its reply has come."""
        if waiting != self.is_waiting:
            self.not_before = NEVER if waiting else 0.0

    @property
    def is_behind(self) -> bool:
        """Whether the engine lacks events of the stream, or its end."""
        if self.state in (CopyState.YIELDED, CopyState.DONE):
            return False
        stream = self.stream
        return stream.reason is not None or self.confirmed_seq < stream.log.seq_next - 1


_NO_MARK: Final = Mark(0, 0, 0, 0)


class EngineServer:
    """A server of the engine, with the copies that are kept there."""

    def __init__(self, link: Commands) -> None:
        self.link = link
        self.copies: dict[str, OwnedCopy] = {}
        self.followed: dict[str, OwnedCopy] = {}  # a member listens
        self.written: list[OwnedCopy] = []  # since the last tick; the members that listen aren't known
        self.unsettled: dict[str, OwnedCopy] = {}  # behind, or unknown; looked at by tick()
        self.to_renew: list[OwnedCopy] = []  # copies that the pass under way has still to renew
        self.heal_bytes = float(HEAL_BYTES_S_MAX)  # that may be written now to heal copies
        self.now = 0.0  # the time of the last tick
        self.times_up = 0
        self.left = 0  # unsettled copies that the pass under way has still to look at
        self.is_full = False
        self.probe_at = 0.0


class CopyOwner:
    """The copies of all streams of this process."""

    def __init__(
        self,
        servers: list[EngineServer],
        server_of: Callable[[str], EngineServer],
        *,
        member: str,
        keys: CopyKeys,
        guard: Guard,
        time: Callable[[], float],
        soon: Callable[[Callable[[], None]], object],
        facts: Callable[[Stream], bytes],
        live_ttl_s: float = 3600.0,
        on_followed: Callable[[], None] = lambda: None,
        on_gone: Callable[[EngineServer], None] = lambda server: None,
    ) -> None:
        """`server_of` finds the server of a stream's id; `soon` runs a call in a later turn of the loop; `facts` packs
        a stream's facts (engine/facts.py); `on_followed` hears of a stream that another member listens to, `on_gone` of
        a server that has lost a copy.

        `live_ttl_s`: the time to live of a copy with a silent owner; renewed while the stream lives.
        """
        self._servers = servers
        self._server_of = server_of
        self._member = member
        self._keys = keys
        self._guard = guard
        self._time = time
        self._soon = soon
        self._facts = facts
        self._live_ttl_s = live_ttl_s
        self._on_followed = on_followed
        self._on_gone = on_gone
        self._ticked_at = time()
        self._renew_at = time() + live_ttl_s / RENEWALS_PER_TTL
        for server in servers:
            server.now = self._ticked_at
        self.counts = OwnerCounts()

    def use(self, *, live_ttl_s: float) -> None:
        """A new setting, from the next renewal of each copy on."""
        self._live_ttl_s = live_ttl_s
        self._renew_at = min(self._renew_at, self._time() + live_ttl_s / RENEWALS_PER_TTL)

    # -- streams

    def grown(self, stream: Stream) -> None:
        """The stream has new events, or its end: write them if the engine has room. Never raises, and never waits."""
        with self._guard:
            server, copy_id = self._server_of(stream.id), id_of(stream)
            copy = server.copies.get(copy_id)
            if copy is None:
                copy = server.copies[copy_id] = OwnedCopy(stream, server)
            elif copy.state is CopyState.WRITTEN and not copy.is_behind and copy.times_up == server.times_up:
                copy.confirmed_at = server.now
                return
            self._write(copy, self._time())

    def wanted(self, stream: Stream) -> None:
        """Another member wants the stream: write at once what its copy lacks, or see whether the copy is there, and
        push to the members that listen. Never raises, and never waits.
        """
        self.grown(stream)
        with self._guard:
            copy = self._server_of(stream.id).copies[id_of(stream)]
            if copy.channel_mark is None:
                copy.server.written.append(copy)
            if copy.state in (CopyState.WRITTEN, CopyState.DONE) and not (copy.is_waiting or copy.is_behind):
                self._go(copy, CopyState.VERIFYING)
                self._write(copy, self._time())

    def need(self, stream: Stream) -> bool:
        """Whether the copy of a finished stream lacks its end: without it readers elsewhere would wait for ever.

        For live_ttl at most: by then the copy is gone.
        """
        copy = self._server_of(stream.id).copies.get(id_of(stream))
        return copy is not None and copy.is_behind and self._time() - stream.sealed_at < self._live_ttl_s

    def removed(self, stream: Stream) -> None:
        """The stream is no longer kept here. Its copy ends by its own time to live."""
        server = self._server_of(stream.id)
        copy_id = id_of(stream)
        for copies in (server.unsettled, server.followed, server.copies):
            copies.pop(copy_id, None)

    def forget(self, stream: Stream) -> None:
        """The stream's copy is not wanted any more: remove it, if the engine can be asked now."""
        server = self._server_of(stream.id)
        self.removed(stream)
        if server.link.has_room:
            server.link.ask(packed("UNLINK", self._keys.log(stream.id, stream.epoch)), _ignore)

    def lag_s(self, now: float) -> float:
        """The age of the oldest event, or end, that the engine lacks, in seconds; at most a second too high."""
        return max(lag_of(server.copies.values(), now) for server in self._servers)

    def push(self) -> None:
        """Send the new events of followed streams to the members that listen; called every engine_push."""
        for server in self._servers:
            for copy in list(islice(server.followed.values(), SLICE_MAX)):
                if not server.link.has_room:
                    break
                del server.followed[copy.id]
                if copy.channel_mark is not None:
                    server.followed[copy.id] = copy  # at the end of the line
                    with self._guard:
                        self._push(copy, copy.channel_mark)

    def _push(self, copy: OwnedCopy, mark: Mark) -> None:
        try:
            record = copy.stream.log.since(mark, bytes_max=ENTRY_BYTES_MAX)
        except LookupError:
            copy.channel_mark = None
            return
        if record is not None:
            self.counts.pushes += 1
            text = told(Position(copy.fence, record.seq_last), record=pack(record))
            self._ask(copy, packed("PUBLISH", self._channel(copy), text), lambda reply: self._heard(copy, reply))

    def _ask_who_listens(self, server: EngineServer) -> None:
        """Ask for the members that listen to the streams that were written since the last tick."""
        written, server.written = server.written, []
        for start in range(0, len(written), CHANNELS_ASKED_MAX):
            some = [copy for copy in written[start : start + CHANNELS_ASKED_MAX] if copy.channel_mark is None]
            if not server.link.has_room:
                return  # they are asked for after their next writes
            if some:
                command = packed("PUBSUB", "NUMSUB", *map(self._channel, some))
                server.link.ask(command, lambda reply, some=some: self._listening(some, reply))  # type: ignore[misc]

    def _listening(self, some: list[OwnedCopy], reply: Reply) -> None:
        if isinstance(reply, list) and len(reply) == 2 * len(some):
            for copy, count in zip(some, reply[1::2], strict=True):
                if copy.server.copies.get(copy.id) is copy and count:
                    self._heard(copy, count)

    def _tell_written(self, copy: OwnedCopy, *, is_end: bool) -> None:
        """Tell the copy's newest place on its channel. The reply is the number of members that listen."""
        text = told(Position(copy.fence, copy.confirmed_seq), is_end=is_end)
        self._ask(copy, packed("PUBLISH", self._channel(copy), text), lambda reply: self._heard(copy, reply))

    def _heard(self, copy: OwnedCopy, reply: Reply) -> None:
        if not isinstance(reply, int) or reply == 0:
            copy.channel_mark = None
            copy.server.followed.pop(copy.id, None)
        elif copy.channel_mark is None and copy.state is CopyState.WRITTEN and not copy.is_waiting:
            # The copy has all up to here, so pushes go on from here without a hole.
            try:
                copy.channel_mark = copy.stream.log.mark_behind(copy.confirmed_seq)
            except LookupError:
                return
            copy.server.followed[copy.id] = copy
            self._on_followed()
            self._tell_written(copy, is_end=False)  # of the write that was told nobody

    # -- the engine's life

    def server_up(self, server: EngineServer) -> None:
        """A link is up, perhaps to another server or to an empty one: each copy is verified when its turn comes."""
        server.times_up += 1
        server.is_full = False
        server.written.clear()
        copies = server.copies.items()
        live = {copy_id: copy for copy_id, copy in copies if copy.stream.reason is None}
        server.unsettled = live | {copy_id: copy for copy_id, copy in copies if copy.stream.reason is not None}

    def tick(self, now: float) -> None:
        """Go on with copies that are behind; the sweep calls it four times a second."""
        passed_s, self._ticked_at = now - self._ticked_at, now
        renews = now >= self._renew_at
        if renews:
            self._renew_at = now + self._live_ttl_s / RENEWALS_PER_TTL
        for server in self._servers:
            server.now = now
            most = float(HEAL_BYTES_S_MAX)
            server.heal_bytes = min(most, server.heal_bytes + passed_s * most)
            if renews:
                server.to_renew = list(server.copies.values())
            with self._guard:
                self._renew_some(server)
            if server.is_full and now >= server.probe_at:
                with self._guard:
                    self._probe(server, now)
            elif not server.left:
                server.left = len(server.unsettled)
                self._slice(server)
            with self._guard:
                self._ask_who_listens(server)

    def _renew_some(self, server: EngineServer) -> None:
        """Renew the time to live of a tick's share of the copies."""
        for _ in range(min(SLICE_MAX, len(server.to_renew))):
            if not server.link.has_room:
                return
            copy = server.to_renew.pop()
            if copy.state is CopyState.WRITTEN and server.copies.get(copy.id) is copy:
                self._renew(copy)

    def _probe(self, server: EngineServer, now: float) -> None:
        """A full engine: a single write a second tells whether it has room again. A turn's share of the copies is
        looked at for one to write.
        """
        server.probe_at = now + PROBE_EVERY_S
        server.is_full = False
        for copy_id, copy in tuple(islice(server.unsettled.items(), SLICE_MAX)):
            server.unsettled.pop(copy_id, None)
            self._write(copy, now)
            if copy.is_waiting and copy.state is not CopyState.VERIFYING:
                server.is_full = True  # until its reply
                return
        if server.unsettled:
            server.is_full, server.probe_at = True, now  # at the next tick

    def _slice(self, server: EngineServer) -> None:
        """A turn's share of a pass over the unsettled copies."""
        now, unsettled = self._time(), server.unsettled
        count = min(server.left, SLICE_MAX)
        server.left -= count
        for copy_id, copy in tuple(islice(unsettled.items(), count)):
            if not server.link.has_room or server.heal_bytes <= 0:
                server.left = 0
                return
            unsettled.pop(copy_id, None)
            try:
                self._write(copy, now)
            except Exception as error:
                self._guard.caught("CopyOwner.slice", error)
        if server.left:
            self._soon(lambda: self._slice(server))

    # -- writing

    def _go(self, copy: OwnedCopy, state: CopyState) -> None:
        if state is copy.state:
            return
        assert state in _NEXT[copy.state], (copy.state, state)
        copy.state = state
        if state in _STARTS_OVER:
            copy.set_mark(None)
        elif state is CopyState.HELD:
            copy.not_before = self._time() + HELD_S

    def _write(self, copy: OwnedCopy, now: float) -> None:
        """The next step of a copy, if there is room for it; else the copy is unsettled."""
        server = copy.server
        if copy.times_up != server.times_up:
            self._doubt(copy)
        if copy.state is CopyState.YIELDED:
            return
        if copy.is_waiting:
            server.unsettled[copy.id] = copy  # the stream may be silent from now on
            return
        reads = copy.state in (CopyState.VERIFYING, CopyState.HELD)
        if now < copy.not_before or not server.link.has_room or (server.is_full and not reads):
            if copy.state is not CopyState.DONE:
                server.unsettled[copy.id] = copy
            return
        if reads:
            self._go(copy, CopyState.VERIFYING)
            self._verify(copy)
        elif copy.state in _STARTS_OVER:
            self._start_over(copy)
        elif copy.state is CopyState.WRITTEN:
            self._add(copy)

    def _doubt(self, copy: OwnedCopy) -> None:
        """The link was up anew since the copy was looked at: its replies are lost, and its content is unknown."""
        copy.times_up = copy.server.times_up
        copy.not_before = 0.0
        if copy.fence and copy.state is not CopyState.YIELDED:
            self._go(copy, CopyState.VERIFYING)

    def _add(self, copy: OwnedCopy) -> None:
        """Write the events behind the mark, or the end alone."""
        log = copy.stream.log
        if not copy.has_mark or copy.written_units * WRITTEN_UNIT_BYTES > 2 * max(log.bytes_max, log.bytes_held):
            self._start_over(copy)
            return
        try:
            record = log.since(copy, bytes_max=ENTRY_BYTES_MAX)
        except LookupError:
            self._start_over(copy)
            return
        end = self._end(copy)
        if record is None:
            if end is not None:
                self._raise_fence(copy, None, end)
            return
        fields = fields_of(record=pack(record), end=end)
        position = Position(copy.fence, record.seq_last)
        self.counts.writes_delta += 1
        self._send(copy, ("XADD", self._key(copy), "NOMKSTREAM", str(position), *fields), record.seq_last, end)

    def _start_over(self, copy: OwnedCopy) -> None:
        """Write the log from its first event, under a new fence."""
        stream = copy.stream
        copy.set_mark(stream.log.mark_at_start())
        copy.whole_seq = stream.log.seq_next - 1
        record = stream.log.since(copy, bytes_max=ENTRY_BYTES_MAX)
        if record is None and stream.reason is None:
            return  # there is nothing yet
        self._raise_fence(copy, record, self._end(copy))

    def _raise_fence(self, copy: OwnedCopy, record: LogRecord | None, end: End | None) -> None:
        stream = copy.stream
        copy.fence += 1
        last = record.seq_last if record is not None else stream.log.seq_next - 1
        starts_over = copy.state in _STARTS_OVER or record is not None
        fields = fields_of(
            record=pack(record) if record is not None else b"",
            starts_over=True,
            facts=self._facts(stream) if starts_over else b"",
            end=end,
            raised_by=self._member,
            last_seq=last,
        )
        # A copy that isn't there is begun by an entry that starts over, and by no other.
        create = () if starts_over else ("NOMKSTREAM",)
        if starts_over:
            copy.written_units = 0
            self.counts.writes_start += 1
        self._send(
            copy, ("XADD", self._key(copy), *create, str(Position(copy.fence, 0)), *fields), last, end, new=starts_over
        )

    def _end(self, copy: OwnedCopy) -> End | None:
        """The stream's end, if the log is written up to it."""
        stream = copy.stream
        if stream.reason is None or copy.seq_next != stream.log.seq_next:
            return None
        self.counts.writes_end += 1
        return End(stream.reason.word, stream.ended_clean)

    def _send(
        self, copy: OwnedCopy, parts: tuple[bytes | str | int, ...], last: int, end: End | None, *, new: bool = False
    ) -> None:
        command = packed(*parts)
        copy.waits(waiting=True)
        copy.written_units += -(-len(command) // WRITTEN_UNIT_BYTES)
        copy.server.heal_bytes -= len(command)
        self.counts.written_bytes += len(command)
        known = copy.stream.log.seq_next - 1
        self._ask(copy, command, lambda reply: self._written(copy, reply, last, known, end is not None, new))

    def _ask(self, copy: OwnedCopy, command: bytes, on_reply: OnReply) -> None:
        """Ask for a copy. A reply that comes after the link was up anew is about another time, and is left out."""
        server, times_up = copy.server, copy.server.times_up

        def take(reply: Reply) -> None:
            if server.times_up == times_up and server.copies.get(copy.id) is copy:
                on_reply(reply)

        server.link.ask(command, take)

    def _written(self, copy: OwnedCopy, reply: Reply, last: int, known_seq: int, is_end: bool, new: bool) -> None:
        """The engine's answer to a write up to `last`, when the log ended at `known_seq`."""
        copy.waits(waiting=False)
        confirmed = copy.confirmed_seq
        now = self._time()
        if isinstance(reply, EngineError):
            self._refused(copy, reply, now)
            if new and copy.state is CopyState.WRITTEN:
                copy.set_mark(None)  # its fence isn't raised: nothing may be written under it but another start
        elif reply is None:
            # NOMKSTREAM: the copy was evicted, or the engine emptied.
            self.counts.refused_gone += 1
            copy.not_before = max(now, copy.renewed_at + RENEW_EVERY_S)
            copy.renewed_at = max(copy.not_before, copy.server.now)
            self._go(copy, CopyState.NEW)
            self._on_gone(copy.server)
        else:
            self._taken(copy, last, is_end, new)
        if copy.state is CopyState.WRITTEN and confirmed != copy.confirmed_seq:
            # Events that came meanwhile wait for the next grown(), once a second; the rest of a large log, and the end
            # of a stream that was sealed meanwhile, don't.
            if copy.confirmed_seq < known_seq or copy.stream.reason is not None:
                self._write(copy, now)
        elif copy.is_behind:
            copy.server.unsettled[copy.id] = copy

    def _taken(self, copy: OwnedCopy, last: int, is_end: bool, new: bool) -> None:
        copy.server.is_full = False
        if copy.state is CopyState.REVIVING:
            self.counts.revived += 1
        copy.confirmed_seq, copy.confirmed_at = last, copy.server.now
        self._go(copy, CopyState.DONE if is_end else CopyState.WRITTEN)
        if copy.whole_seq and last >= copy.whole_seq:
            # The former fences may go. Only now: a reader of the copy has them for as long as this log isn't whole.
            copy.whole_seq = 0
            if copy.fence > 1:
                self._tell(copy, packed("XTRIM", self._key(copy), "MINID", str(Position(copy.fence, 0))))
        if is_end or new:
            self._renew(copy)
        if copy.channel_mark is None and not is_end:
            copy.server.written.append(copy)
            return
        if copy.channel_mark is not None and is_end:
            self._push(copy, copy.channel_mark)  # in front of the end, so that followers needn't read for it
        self._tell_written(copy, is_end=is_end)
        if is_end:
            copy.channel_mark = None
            copy.server.followed.pop(copy.id, None)

    def _refused(self, copy: OwnedCopy, error: EngineError, now: float) -> None:
        if isinstance(error, EngineLost):
            self._go(copy, CopyState.VERIFYING)  # it may have been carried out
        elif error.word == "OOM":
            self.counts.refused_full += 1
            copy.server.is_full = True
            copy.server.probe_at = now + PROBE_EVERY_S
            self._rewind(copy)
        elif "equal or smaller" in str(error):
            self.counts.refused_order += 1
            self._go(copy, CopyState.VERIFYING)
        else:
            self.counts.refused_other += 1
            self._go(copy, CopyState.HELD)

    def _rewind(self, copy: OwnedCopy) -> None:
        """A write was refused, so the mark goes back to the last that was taken."""
        if copy.state is not CopyState.WRITTEN:
            return
        try:
            copy.set_mark(copy.stream.log.mark_behind(copy.confirmed_seq))
        except LookupError:
            copy.set_mark(None)

    def _renew(self, copy: OwnedCopy) -> None:
        """Set the copy's time to live."""
        if copy.state is CopyState.DONE:
            ttl_s = max(ENDED_TTL_S_MIN, copy.stream.terms.retention_s)
        else:
            ttl_s = self._live_ttl_s
        self._tell(copy, packed("PEXPIRE", self._key(copy), round(ttl_s * 1000)))

    def _tell(self, copy: OwnedCopy, command: bytes) -> None:
        """A command whose reply changes nothing."""
        copy.server.link.ask(command, _ignore)

    def _channel(self, copy: OwnedCopy) -> bytes:
        return self._keys.channel(copy.stream.id, copy.stream.epoch)

    def _key(self, copy: OwnedCopy) -> bytes:
        return self._keys.log(copy.stream.id, copy.stream.epoch)

    # -- verifying

    def _verify(self, copy: OwnedCopy) -> None:
        """Read the copy's newest entry."""
        copy.waits(waiting=True)
        command = packed("XREVRANGE", self._key(copy), "+", "-", "COUNT", 1)
        self._ask(copy, command, lambda reply: self._newest(copy, reply))

    def _newest(self, copy: OwnedCopy, reply: Reply) -> None:
        """The newest entry; then the entry that raised its fence, if that is another."""
        if isinstance(reply, EngineError):
            copy.waits(waiting=False)
            self._refused(copy, reply, self._time())
            return
        if reply == []:
            self._judge(copy, CopyFound.GONE)
            return
        newest = _entry_of(reply)
        if newest is None:
            self._judge(copy, CopyFound.BROKEN)
        elif newest.position.seq == 0:
            self._judged(copy, newest, newest)
        else:
            at = str(Position(newest.position.fence, 0))
            command = packed("XRANGE", self._key(copy), at, at)
            self._ask(copy, command, lambda reply: self._raiser(copy, newest, reply))

    def _raiser(self, copy: OwnedCopy, newest: Entry, reply: Reply) -> None:
        if isinstance(reply, EngineError):
            copy.waits(waiting=False)
            self._refused(copy, reply, self._time())
            return
        raiser = _entry_of(reply)
        if raiser is None:
            copy.fence = max(copy.fence, newest.position.fence)
            self._judge(copy, CopyFound.OLDER)
        else:
            self._judged(copy, newest, raiser)

    def _judged(self, copy: OwnedCopy, newest: Entry, raiser: Entry) -> None:
        fence, log = newest.position.fence, copy.stream.log
        if fence < copy.fence:
            self._judge(copy, CopyFound.OLDER)
            return
        copy.fence = fence
        if raiser.raised_by != self._member:
            self._judge(copy, CopyFound.SUPERSEDED, yields=bool(raiser.taken_by))
            return
        last = newest.last_seq
        try:
            copy.set_mark(log.mark_behind(last))
        except LookupError:
            self._judge(copy, CopyFound.OLDER)
            return
        copy.confirmed_seq = last
        is_whole = last == log.seq_next - 1
        if is_whole:
            copy.confirmed_at = copy.server.now
        if newest.end is not None and not (is_whole and copy.stream.reason is not None):
            self._judge(copy, CopyFound.OLDER)
            return
        self._judge(copy, CopyFound.CURRENT if is_whole else CopyFound.BEHIND, is_done=newest.end is not None)

    def _judge(self, copy: OwnedCopy, found: CopyFound, *, yields: bool = False, is_done: bool = False) -> None:
        """Go on after a look at the copy."""
        copy.waits(waiting=False)
        self.counts.found[found] += 1
        now = self._time()
        match found:
            case CopyFound.CURRENT | CopyFound.BEHIND:
                self._go(copy, CopyState.DONE if is_done else CopyState.WRITTEN)
                if is_done:
                    self._renew(copy)
                    return
            case CopyFound.SUPERSEDED:
                self._go(copy, CopyState.YIELDED if yields else CopyState.REVIVING)
            case CopyFound.GONE | CopyFound.OLDER:
                self._go(copy, CopyState.NEW)
            case _:
                self._go(copy, CopyState.HELD)
        if copy.state in _STARTS_OVER and copy.server.heal_bytes <= 0:
            copy.server.unsettled[copy.id] = copy
        else:
            self._write(copy, now)


def lag_of(copies: Iterable[OwnedCopy], now: float) -> float:
    """The age of the oldest event, or end, that the engine lacks of these copies."""
    oldest = min((max(copy.confirmed_at, copy.stream.opened_at) for copy in copies if copy.is_behind), default=now)
    return max(0.0, now - oldest)


def _ignore(reply: Reply) -> None:
    """The reply to a command that needs none."""


def _entry_of(reply: Any) -> Entry | None:
    """The single entry of a reply; None if it is none of streamd's."""
    try:
        return parse(reply[0]) if isinstance(reply, list) and len(reply) == 1 else None
    except ValueError:
        return None
