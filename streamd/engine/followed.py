"""FollowedStreams: the streams of other members that have readers here, each followed once.

seek() looks for the copy of a stream that isn't here. A seeker hears one answer: the stream, which is in the hub from
then on like any other, or that there is none, or that nobody can tell. However many seekers there are, a copy is read
once.

A stream without a copy is absent if its owner has given a sign of life while it was looked for, has been lost for long,
or never was. Else nobody can tell: its owner may be cut off, or the engine may have lost what it had.

BOUNDS. A followed stream holds a stream's place in admission, from the moment that its copy is found: an id that
somebody made up takes no room from others. How many look-ups a principal may have under way is decided by the seekers
(api/seeking.py).

ENDS. A stream without a reader is followed for IDLE_S longer; a finished stream is kept for its retention, at most
facts.COPY_KEPT_S. When the engine can't be asked for engine_patience, the readers are told to come back, and the stream
is dropped: then they get 503 until the engine is there. When nothing comes, the owner's sign of life is looked at; when
the copy is gone, the owner is told, and if it doesn't write it again within GONE_S it has the stream no more.
The owner is told of the readers here (engine/presence.py).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final, Protocol

from streamd.config import Settings
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.engine.connection import Reply, packed
from streamd.engine.entry import End
from streamd.engine.facts import StreamFacts
from streamd.engine.follow import CopyPlace, Follow, FollowCounts, FollowOwner, FollowState
from streamd.engine.members import Members, Sign
from streamd.engine.notes import NoteKind, Notes
from streamd.engine.owner import RENEW_EVERY_S
from streamd.engine.presence import Presence, Readership
from streamd.engine.servers import EngineServers, EngineShard
from streamd.engine.shards import CopyKeys
from streamd.net.answer import Answer
from streamd.net.http_error import HttpError
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason

# A reader that reloads its page comes back within this time.
IDLE_S: Final = 5.0

# A stream that was just opened has no copy yet: looks for it, and the time between them. Five of them are the second
# that an owner takes at most, and a half; a few more are longer than a beat and its way.
LOOKS_MIN: Final = 6
LOOKS_MAX: Final = 10
LOOK_AGAIN_S: Final = 0.3

# An owner that has the stream writes a copy that is gone within this time of hearing of it: three times the pause
# between two such writes. Later, it has the stream no more, though it lives.
GONE_S: Final = 3 * RENEW_EVERY_S
TELL_EVERY_S: Final = 5.0

# Followed streams looked at in a turn, some 2 us each.
SLICE_MAX: Final = 250
# Readers told to come back, and seekers answered, in a turn: some 30 us each.
TOLD_TURN_MAX: Final = 64

COME_BACK: Final = "The node that this stream is read through can't reach its engine; resume in a moment."


class Seeker(Protocol):
    """Waits for the outcome of a look-up. One of these is called, once, in a turn of its own."""

    def found(self, stream: Stream) -> None:
        """The stream is here from now on."""

    def absent(self) -> None:
        """No member has the stream, or none that this version can read."""

    def unreachable(self) -> None:
        """The engine can't be asked, or can't tell."""

    def no_room(self, refused: HttpError) -> None:
        """The stream is there, and this worker has no room for it."""


class _Followed:
    """A stream of another member: its follow, and the seekers that wait for it."""

    __slots__ = (
        "follow",
        "has_place",
        "id",
        "is_stale",
        "looks",
        "read_at",
        "readership",
        "seekers",
        "shard",
        "stream",
        "told_at",
    )

    def __init__(self, stream_id: str, shard: EngineShard, now: float) -> None:
        self.id = stream_id
        self.shard = shard
        self.seekers: list[Seeker] = []
        self.stream: Stream | None = None
        self.read_at = now  # when it was last seen with a reader, or sought
        self.is_stale = False
        self.has_place = False  # in admission
        self.looks = 0  # that found no copy
        self.told_at = 0.0  # when its owner was told that the copy is gone
        self.readership = Readership()
        self.follow: Follow


class FollowedStreams:
    """All streams of other members that are followed here."""

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        servers: EngineServers,
        keys: CopyKeys,
        members: Members,
        notes: Notes,
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._servers = servers
        self._keys = keys
        self._members = members
        self._notes = notes
        self._presence = Presence(notes, runtime.time)
        self._member = runtime.hub.member
        self._by_id: dict[str, _Followed] = {}
        self._left = 0  # of the pass under way
        self.counts = FollowCounts()
        self.lookups = self.lost = 0  # counted for metrics

    def __len__(self) -> int:
        return len(self._by_id)

    def use(self, settings: Settings) -> None:
        """New settings, for streams that are followed from now on."""
        self._settings = settings

    # -- seeking

    def seek(self, stream_id: str, seeker: Seeker) -> bool:
        """Look for a stream that isn't here. False: the engine can't be asked now, and the seeker hears nothing."""
        known = self._by_id.get(stream_id)
        if known is None:
            shard = self._servers.shard_of(stream_id)
            if not shard.link.is_up:  # the link for pushes may follow in a moment
                return False
            known = self._begin(stream_id, shard)
        elif known.stream is not None:
            return False  # it is being dropped
        known.seekers.append(seeker)
        known.read_at = self._runtime.time()
        return True

    def give_up(self, stream_id: str, seeker: Seeker) -> None:
        """The seeker is gone, or has waited long enough."""
        known = self._by_id.get(stream_id)
        if known is not None and seeker in known.seekers:
            known.seekers.remove(seeker)
            if not known.seekers and known.stream is None:
                self._drop(known)

    def _begin(self, stream_id: str, shard: EngineShard) -> _Followed:
        self.lookups += 1
        known = self._by_id[stream_id] = _Followed(stream_id, shard, self._runtime.time())
        self._follow(known)
        return known

    def _follow(self, known: _Followed) -> None:
        """Look for the copy, and follow it if it is there."""
        runtime, keys, shard = self._runtime, self._keys, known.shard
        place = CopyPlace(keys.log(known.id), keys.channel(known.id), shard.link, shard.channels)
        owner = FollowOwner(
            may_build=lambda: self._take_place(known),
            on_built=lambda facts, log: self._built(known, facts, log),
            on_absent=lambda: self._soon(lambda: self._absent(known)),
            on_stale=lambda: self._soon(lambda: self._stale(known)),
            on_declared=lambda end: self._declared(known, end),
        )
        known.follow = Follow(
            place,
            owner,
            self.counts,
            new_log=self._new_log,
            time=runtime.time,
            patience_s=self._settings.engine_patience_s,
        )
        known.follow.start()

    def _soon(self, call: Callable[[], None]) -> None:
        """In a turn of its own: the caller is in the middle of a reply."""

        def guarded() -> None:
            with self._runtime.guard:
                call()

        self._runtime.loop.call_soon(guarded)

    def _new_log(self) -> ReplayLog:
        hub = self._runtime.hub
        return ReplayLog(bytes_max=hub.stream_log_bytes_max, events_max=hub.stream_log_events_max)

    def _take_place(self, known: _Followed) -> bool:
        """The copy is there: take a stream's place for it. False: there is none, and the seekers are told."""
        if known.has_place:
            return True
        try:
            self._runtime.admit_stream()
        except HttpError as refused:
            why = refused
            self._soon(lambda: self._no_room(known, why))
            return False
        known.has_place = True
        return True

    def _no_room(self, known: _Followed, refused: HttpError) -> None:
        seekers, known.seekers = known.seekers, []
        self._drop(known)
        for seeker in seekers:
            with self._runtime.guard:
                seeker.no_room(refused)

    def _built(self, known: _Followed, facts: StreamFacts, log: ReplayLog) -> Stream:
        """The copy is read: it is a stream of the hub from now on. Raises ValueError for another stream's facts."""
        runtime = self._runtime
        if facts.id != known.id or facts.epoch:
            raise ValueError("a copy with the facts of another stream")
        now = runtime.time()
        opened_at = now - max(0.0, runtime.unix_time() - facts.opened_unix)
        terms = facts.terms(runtime.settings.catchup_bytes_max)
        stream = runtime.hub.restore(facts.id, log, facts.dialect, opened_at, kind=Stream, terms=terms)
        if stream is None:
            raise ValueError("a stream that is here")
        stream.upstream = facts.upstream
        stream.source = known.follow
        stream.touched_at = now
        known.stream = stream
        stream.look_into_log(now)
        self._soon(lambda: self._answer(known, stream))
        return stream

    def _answer(self, known: _Followed, stream: Stream) -> None:
        """Answer a turn's share of the seekers: thousands may wait for a single stream."""
        seekers, known.seekers = known.seekers[:TOLD_TURN_MAX], known.seekers[TOLD_TURN_MAX:]
        for seeker in seekers:
            with self._runtime.guard:
                seeker.found(stream)
        if known.seekers:
            self._soon(lambda: self._answer(known, stream))

    def _absent(self, known: _Followed) -> None:
        """There is no copy. A member that lives writes one within a second of a stream's first event."""
        known.looks += 1
        if self._by_id.get(known.id) is not known:
            return
        if known.id[2:7] == self._member:
            self._not_found(known)  # it was this worker's, and is kept nowhere any more
        else:
            self._members.ask_for_sign(known.shard, known.id[2:7], lambda sign: self._signed(known, sign))

    def _signed(self, known: _Followed, sign: Sign) -> None:
        """The sign of life of the stream's owner, beside a look that found no copy."""
        if sign in (Sign.UNKNOWN, Sign.LOST) or (sign is Sign.LIVES and known.looks >= LOOKS_MIN):
            self._not_found(known)
        elif known.looks < LOOKS_MAX:
            if known.looks == 1:
                self._notes.tell(known.shard, known.id[2:7], NoteKind.SYNC, known.id.encode())
            self._look_again_later(known)
        else:
            self._not_found(known, is_unsure=True)

    def _look_again_later(self, known: _Followed) -> None:
        def again() -> None:
            with self._runtime.guard:
                if self._by_id.get(known.id) is known and known.stream is None:
                    self._follow(known)

        self._runtime.loop.call_later(LOOK_AGAIN_S, again)

    def _not_found(self, known: _Followed, *, is_unsure: bool = False) -> None:
        if self._by_id.get(known.id) is not known:
            return  # given up meanwhile
        is_unsure = is_unsure or self._members.may_lack_copies(known.shard)
        seekers, known.seekers = known.seekers, []
        self._drop(known)
        for seeker in seekers:
            with self._runtime.guard:
                if is_unsure:
                    seeker.unreachable()
                else:
                    seeker.absent()

    # -- ends

    def _declared(self, known: _Followed, end: End) -> None:
        """Another member has declared the owner lost, or this one has: here the stream ends."""
        stream = known.stream
        if stream is not None and stream.reason is None:
            self.lost += 1
            stream.seal(CloseReason.NODE_LOST, self._runtime.time(), clean=False)

    def _stale(self, known: _Followed) -> None:
        """The engine can't be asked: send the readers away, and drop the stream when they have left."""
        known.is_stale = True
        seekers, known.seekers = known.seekers, []
        for seeker in seekers:
            with self._runtime.guard:
                seeker.unreachable()
        if known.stream is None:
            self._drop(known)
        else:
            self._send_away(tuple(known.stream.readers))

    def _send_away(self, readers: tuple[object, ...]) -> None:
        for reader in readers[:TOLD_TURN_MAX]:
            sink = getattr(reader, "sink", None)
            if isinstance(sink, Answer):
                with self._runtime.guard:
                    sink.send_away(CloseReason.ENGINE_UNREACHABLE, COME_BACK, among=len(readers))
        if len(readers) > TOLD_TURN_MAX:
            self._soon(lambda: self._send_away(readers[TOLD_TURN_MAX:]))

    def is_stale(self, stream: Stream) -> bool:
        """Whether a followed stream takes no more readers, because its copy can't be asked."""
        known = self._by_id.get(stream.id)
        return known is not None and known.is_stale

    def left(self, stream: Stream, reason: CloseReason) -> None:
        """The last reader here of a followed stream has left."""
        known = self._by_id.get(stream.id)
        if known is not None:
            known.readership.left_for = reason

    def awaited(self, stream: Stream, now: float) -> None:
        """A request waits for the stream to go on, and will be its reader, or will come again: the stream is followed
        until it is known whether its owner lives, who alone has the rest.
        """
        known = self._by_id.get(stream.id)
        if known is not None and not known.is_stale:
            known.read_at = now + self._settings.engine_lease_s

    def ask_owner(self, stream: Stream, kind: NoteKind, over: Callable[[bytes | None], None]) -> bool:
        """Ask the owner of a followed stream. `over` hears its answer, or None. False: it can't be asked now."""
        known = self._by_id.get(stream.id)
        if known is None or known.is_stale:
            return False
        return self._notes.ask(known.shard, known.follow.member, kind, stream.id.encode(), over)

    def forget(self, stream: Stream) -> None:
        """A followed stream without readers, finished, isn't wanted any more: remove it here, and its copy."""
        known = self._by_id.get(stream.id)
        if known is not None:
            if known.shard.link.has_room:
                known.shard.link.ask(packed("UNLINK", self._keys.log(known.id)), _ignore)
            self._drop(known)

    def removed(self, stream: Stream) -> None:
        """The hub has removed a followed stream."""
        known = self._by_id.get(stream.id)
        if known is not None and known.stream is stream:
            self._drop(known)

    def _drop(self, known: _Followed) -> None:
        """Follow no more, and forget the stream if it has no readers. Seekers that still wait may come again."""
        if self._by_id.pop(known.id, None) is None:
            return
        seekers, known.seekers = known.seekers, []
        for seeker in seekers:
            with self._runtime.guard:
                seeker.unreachable()
        known.follow.cancel(CloseReason.COMPLETE)
        if known.has_place:
            self._runtime.admission.release_stream()
        stream = known.stream
        if stream is not None:
            stream.source = None
            self._runtime.hub.remove(stream)

    def stop(self) -> None:
        """The process ends: streams of other members are not saved here."""
        for known in tuple(self._by_id.values()):
            if known.stream is None or not known.stream.readers:
                self._drop(known)

    # -- the clock

    def tick(self, now: float) -> None:
        """Look into silence, and drop streams without readers; the sweep calls it four times a second."""
        if not self._left:
            self._left = len(self._by_id)
            self._slice(now)

    def _slice(self, now: float) -> None:
        count = min(self._left, SLICE_MAX)
        self._left -= count
        for stream_id, known in tuple(islice(self._by_id.items(), count)):
            del self._by_id[stream_id]
            self._by_id[stream_id] = known  # at the end of the line
            with self._runtime.guard:
                self._look(known, now)
        if self._left:
            self._runtime.loop.call_soon(self._slice, now)
        else:
            with self._runtime.guard:
                self._presence.tell()

    def _look(self, known: _Followed, now: float) -> None:
        follow, stream = known.follow, known.stream
        follow.tick(now)
        if follow.state is FollowState.LOOKING:
            if follow.gone_at and now - known.told_at >= TELL_EVERY_S:
                known.told_at = now
                self._notes.tell(known.shard, follow.member, NoteKind.SYNC, known.id.encode())
            if self._is_lost(known, now):
                follow.declare_lost(self._member)
        if stream is None:
            return
        self._presence.look(known.readership, known.shard, follow.member, stream)
        if stream.readers and not known.is_stale:
            known.read_at = now
        is_over = stream.reason is not None and follow.state is not FollowState.ENDED  # by an operator, here
        is_idle = stream.reason is None and now - known.read_at > IDLE_S
        if not stream.readers and (known.is_stale or is_over or is_idle):
            self._drop(known)

    def _is_lost(self, known: _Followed, now: float) -> bool:
        """Whether the stream's owner is lost, or has the stream no more. This process owns none that it follows."""
        member, gone_at = known.follow.member, known.follow.gone_at
        if member == self._member or self._members.is_lost(known.shard, member):
            return True
        return gone_at > 0 and now - gone_at >= GONE_S and not self._members.may_lack_copies(known.shard)

    def states(self) -> dict[str, int]:
        """How many follows are in each state."""
        counts = dict.fromkeys((state.value for state in FollowState), 0)
        for known in self._by_id.values():
            counts[known.follow.state.value] += 1
        return counts


def _ignore(reply: Reply) -> None:
    """The reply to a command that needs none."""
