"""Hub: the registry of streams. Ids, names, idempotency keys; retention, graces, and the memory budget of all logs.

Bounds
    streams live      bounded by admission (core/admission.py)
    streams kept      a sealed stream stays for its retention, and until its copy elsewhere has its end, unless the
                      logs' budget runs short: then the logs of
                      finished streams go first, then the oldest halves of live logs. A reader that still needs a
                      removed event gets a gap (docs/PROTOCOL.md, section 3), never a lie. kept_max bounds their number,
                      and with it that of names, idempotency keys and conversations
    detached          generations that run without a reader: detached_max

Each of these bounds is for all principals together. Where it is reached, the principal that holds most gives way
(core/shares.py): its oldest grace, its oldest stream without a reader, its oldest finished log, its longest live log. A
stream with a reader is never ended.

What a stream is charged. Admission charges a live stream's price until its seal. The logs' budget has its log, its
names, and from the seal on the stream itself (RECORD_BYTES): a short stream with a long key takes three times the
memory of its log, and ten thousand of them may wait for the end of their retention.

Invariants: log_bytes is the sum of charged_bytes over all streams, and each charge follows its log at every sweep; a
stream with a reader is never removed; a name, a key, a response id or a conversation always points to a registered
stream; detached is the number of streams with a grace.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import heapq
import itertools
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from streamd.core.guard import BARE, Guard
from streamd.core.replay import ReplayLog
from streamd.core.shares import Shares
from streamd.core.stream import CountedStream, Fanout, Stream, Subscriber
from streamd.core.terms import Terms
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect
from streamd.wire.shapes import KnownShapes

# s_ + worker slot (1) + incarnation of the worker (4) + 22 characters that hold 128 random bits.
SLOT_CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
INCARNATION_LEN = 4
ID_LEN = 2 + 1 + INCARNATION_LEN + 22


# From base64's last two letters to those of its alphabet for URLs (RFC 4648 5).
_URL_SAFE = bytes.maketrans(b"+/", b"-_")

S = TypeVar("S", bound=Stream)


def new_incarnation() -> str:
    """24 random bits: they tell the ids of earlier processes of the same slot from those of this process."""
    return base64.urlsafe_b64encode(secrets.token_bytes(3)).decode()


class Gone(LookupError):
    """The id was made by a worker that has ended: its streams ended with it."""


@dataclass(frozen=True, slots=True)
class IdempotentRequest:
    """The meaning of an Idempotency-Key: the stream it opened (None: no stream), and the hash of the request's body."""

    stream: Stream | None
    body_hash: bytes


class StreamNames(NamedTuple):
    """The ways to find a stream other than by its id; empty where there is none."""

    principal: str
    key: str  # Idempotency-Key of that principal
    body_hash: bytes
    conversation: str


# A finished stream beside its log: the stream, its log's frame, its entries here; 3 KB, and a third for its names.
KEPT_STREAM_BYTES = 4096

# Sweeps from charge to charge of a live stream: it is charged once a second.
CHARGE_TURNS = 4
EVERY_TURN = -1

# A shorter silence isn't noted: a sweep comes every 250 ms, so it sees most silences of that length, and no shorter one
# but by chance.
SILENCE_S_MIN = 0.25

# Memory of a finished stream beside its log: the object, its id, terms, progress and ledger, and its place here
# (loadtest/books.py, "finished").
RECORD_BYTES = 1_000
# Memory of an entry that finds a stream by a name, beside the name's own text: tuple, value, and places in two dicts.
ENTRY_BYTES = 400


DEFAULT_TERMS = Terms()


class StreamCopies(Protocol):
    """Keeps copies of this worker's streams elsewhere (engine/cluster.py)."""

    def grown(self, stream: Stream) -> None:
        """A second of the live stream's life is over; its accounts are up to date. Never raises, and never waits."""

    def left(self, stream: Stream, reason: CloseReason) -> None:
        """The last reader here of a live stream has left, and its source needs none."""

    def is_read_elsewhere(self, stream: Stream) -> bool:
        """Whether a stream of this worker has readers at other nodes."""

    def need(self, stream: Stream) -> bool:
        """Whether the copy of the finished stream lacks the end, for which its readers elsewhere wait."""


def _nothing(stream: Stream) -> None:
    """The default of the callbacks: do nothing."""


def _at_once(turn: Callable[[], None]) -> None:
    turn()


def _no_fanout(stream: Stream) -> Fanout:
    raise NotImplementedError("the worker gives the hub its loop")


class Hub:
    """All streams of a worker. One thread, no locks; `now` in monotonic seconds."""

    __slots__ = (
        "_by_conversation",
        "_by_key",
        "_by_response",
        "_conversation_of",
        "_forget_on_remove",
        "_graces",
        "_incarnation",
        "_live",
        "_next_turn",
        "_random",
        "_slot",
        "_streams",
        "copies",
        "detached",
        "detached_max",
        "event_bytes_total",
        "events_total",
        "guard",
        "kept_max",
        "log_bytes",
        "log_bytes_max",
        "new_fanout",
        "on_removed",
        "on_response_id",
        "on_sealed",
        "record_bytes",
        "shapes",
        "soon",
        "stream_log_bytes_max",
        "stream_log_events_max",
        "text_events_total",
    )

    def __init__(
        self,
        *,
        log_bytes_max: int,
        stream_log_bytes_max: int,
        stream_log_events_max: int,
        detached_max: int,
        slot: int = 0,
        incarnation: str = "",
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        on_sealed: Callable[[Stream], None] = _nothing,
        on_removed: Callable[[Stream], None] = _nothing,
        on_response_id: Callable[[Stream], None] = _nothing,
        new_fanout: Callable[[Stream], Fanout] = _no_fanout,
        soon: Callable[[Callable[[], None]], object] = _at_once,
    ) -> None:
        """`soon` runs a call in a later turn of the loop; `new_fanout` makes the dispatcher of a stream with many
        readers; the `on_…` callbacks hear of a stream that is sealed, removed, or named by its API.
        """
        self.guard: Guard = BARE  # the runtime's, once there is one
        self.copies: StreamCopies | None = None
        self._slot = SLOT_CHARS[slot]
        self._incarnation = incarnation or new_incarnation()
        self._random = random_bytes
        self._streams: dict[str, Stream] = {}
        self._next_turn = 0
        self._by_key: dict[tuple[str, str], IdempotentRequest] = {}
        self._by_response: dict[tuple[str, str], Stream] = {}  # principal and id
        self._by_conversation: dict[str, dict[str, CountedStream]] = {}  # principal -> id -> stream
        self._conversation_of: dict[str, str] = {}  # stream id -> its conversation
        self._forget_on_remove: dict[str, tuple[str, str]] = {}  # stream id -> its idempotency key
        self._live: Shares[Stream] = Shares()  # streams that are not sealed
        self._graces: Shares[Stream] = Shares()
        self.kept_max = max(1, log_bytes_max // KEPT_STREAM_BYTES)  # finished streams
        self.record_bytes = RECORD_BYTES
        self.log_bytes = 0
        self.log_bytes_max = log_bytes_max
        self.stream_log_bytes_max = stream_log_bytes_max
        self.stream_log_events_max = stream_log_events_max
        # counters, for metrics: folded in by charge()
        self.events_total = 0
        self.event_bytes_total = 0  # bytes of frames; a frame counts once, however many readers it has
        self.text_events_total = 0
        self.shapes = KnownShapes()  # of relayed events
        self.detached = 0
        self.detached_max = detached_max
        self.on_removed = on_removed
        self.on_response_id = on_response_id
        self.on_sealed = on_sealed
        self.new_fanout = new_fanout
        self.soon = soon

    # -- opening and finding

    @property
    def member(self) -> str:
        """The characters by which ids name the worker that drew them."""
        return self._slot + self._incarnation

    def take_incarnation(self, incarnation: str) -> None:
        """Draw ids as the worker before did, whose streams go on here: its ids stay valid, and those of its ended
        streams unknown. Raises ValueError for anything but an incarnation.
        """
        if len(incarnation) != INCARNATION_LEN or not all(each in SLOT_CHARS for each in incarnation):
            raise ValueError("an incarnation that no worker has")
        self._incarnation = incarnation

    def new_id(self) -> str:
        """An unguessable id: knowing it is the right to read (docs/PROTOCOL.md, section 2)."""
        drawn = binascii.b2a_base64(self._random(16), newline=False).translate(_URL_SAFE, b"=")
        return f"s_{self._slot}{self._incarnation}{drawn.decode()}"

    def open(
        self,
        dialect: Dialect,
        now: float,
        *,
        name: str = "",
        epoch: str = "",
        log_bytes_max: int = 0,
        log_events_max: int = 0,
        terms: Terms = DEFAULT_TERMS,
    ) -> Stream:
        """Register a new stream, under the publisher's `name` if given (KeyError if that name is live)."""
        log = ReplayLog(
            bytes_max=min(log_bytes_max or self.stream_log_bytes_max, self.stream_log_bytes_max),
            events_max=min(log_events_max or self.stream_log_events_max, self.stream_log_events_max),
        )
        return self._register(Stream, name or self.new_id(), log, dialect, now, terms, epoch)

    def open_conversation(self, dialect: Dialect, now: float, *, conversation: str, terms: Terms) -> CountedStream:
        """Register a new stream and make it the conversation's stream (llama.cpp's dialect)."""
        log = ReplayLog(bytes_max=self.stream_log_bytes_max, events_max=self.stream_log_events_max)
        principal = terms.owner
        stream = self._register(CountedStream, self.new_id(), log, dialect, now, terms)
        self.forget_conversation(principal, conversation)
        self._name_conversation(stream, conversation)
        return stream

    def _name_conversation(self, stream: CountedStream, conversation: str) -> None:
        self._by_conversation.setdefault(stream.terms.owner, {})[conversation] = stream
        self._conversation_of[stream.id] = conversation
        self._charge_name(stream, conversation, 1)

    def _register(
        self, kind: type[S], stream_id: str, log: ReplayLog, dialect: Dialect, now: float, terms: Terms, epoch: str = ""
    ) -> S:
        if stream_id in self._streams:
            raise KeyError(stream_id)
        stream = kind(
            stream_id,
            log,
            dialect,
            now=now,
            epoch=epoch,
            keeper=self,
            terms=terms,
        )
        self._next_turn = (self._next_turn + 1) % CHARGE_TURNS
        stream.charge_turn = self._next_turn
        if log.seq_next > 1:
            self._count_from_here(stream)
        self._live.add(terms.owner, stream)
        try:
            self.charge(stream)
        except Exception:
            self._live.discard(terms.owner, stream)
            raise
        self._streams[stream_id] = stream
        return stream

    @staticmethod
    def _count_from_here(stream: Stream) -> None:
        """Start the counters at a restored stream's totals: the process that received its events has counted them."""
        stream.ledger.counted_events, stream.ledger.counted_text_events = stream.events, stream.text_events

    def get(self, stream_id: str) -> Stream | None:
        """The stream, or None. Raises Gone for an id made by a worker that has ended."""
        stream = self._streams.get(stream_id)
        if stream is None and self._is_of_the_dead(stream_id):
            raise Gone(stream_id)
        return stream

    def _is_of_the_dead(self, stream_id: str) -> bool:
        if len(stream_id) != ID_LEN or not stream_id.startswith("s_"):
            return False
        return stream_id[2 : 3 + INCARNATION_LEN] != self._slot + self._incarnation

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(tuple(self._streams.values()))

    # -- requests that must not be paid for twice

    def by_key(self, principal: str, key: str) -> IdempotentRequest | None:
        return self._by_key.get((principal, key))

    def keep_key(self, principal: str, key: str, body_hash: bytes, stream: Stream | None) -> None:
        """Remember a request until its stream is removed, or forget_key()."""
        self._by_key[(principal, key)] = IdempotentRequest(stream, body_hash)
        if stream is not None:
            self._forget_on_remove[stream.id] = (principal, key)
            self._charge_name(stream, key, 1)

    def forget_key(self, principal: str, key: str) -> None:
        kept = self._by_key.pop((principal, key), None)
        if kept is not None and kept.stream is not None:
            self._forget_on_remove.pop(kept.stream.id, None)
            self._charge_name(kept.stream, key, -1)

    # -- names that other APIs give to streams: kept apart for each principal, because they may be guessable

    def stream_named(self, stream: Stream) -> None:
        """OpenAI Responses names its own streams, in their first event."""
        response_id = stream.progress.response_id
        if response_id is not None:
            self._by_response[stream.terms.owner, response_id] = stream
            self._charge_name(stream, response_id, 1)
            self.on_response_id(stream)

    def by_response_id(self, principal: str, response_id: str) -> Stream | None:
        return self._by_response.get((principal, response_id))

    def by_conversation(self, principal: str, conversation: str) -> CountedStream | None:
        return self._by_conversation.get(principal, {}).get(conversation)

    def conversations(self, principal: str) -> Mapping[str, CountedStream]:
        """The streams of a principal's conversations, by conversation id."""
        return self._by_conversation.get(principal, {})

    def forget_conversation(self, principal: str, conversation: str) -> None:
        """Part a conversation from its stream, which stays registered. No effect if it had none."""
        streams = self._by_conversation.get(principal, {})
        stream = streams.pop(conversation, None)
        if stream is not None:
            del self._conversation_of[stream.id]
            self._charge_name(stream, conversation, -1)
            if not streams:
                del self._by_conversation[principal]

    # -- streams that outlive their process (core/snapshot.py)

    def restore(
        self,
        stream_id: str,
        log: ReplayLog,
        dialect: Dialect,
        opened_at: float,
        *,
        kind: type[S],
        terms: Terms,
        epoch: str = "",
    ) -> S | None:
        """Register a stream of an earlier process under its old id; None if the id is registered already."""
        if stream_id in self._streams:
            return None
        return self._register(kind, stream_id, log, dialect, opened_at, terms, epoch)

    def name_of(self, stream: Stream) -> StreamNames:
        """The argument for restore_names()."""
        principal, key = self._forget_on_remove.get(stream.id, ("", ""))
        kept = self._by_key.get((principal, key))
        return StreamNames(principal, key, kept.body_hash if kept else b"", self._conversation_of.get(stream.id, ""))

    def restore_names(self, stream: Stream, name: StreamNames) -> None:
        """Make a restored stream findable by its names again."""
        if name.key:
            self.keep_key(name.principal, name.key, name.body_hash, stream)
        if name.conversation and isinstance(stream, CountedStream):
            self._name_conversation(stream, name.conversation)
        if stream.reason is not None:
            self._live.discard(stream.terms.owner, stream)
        self.stream_named(stream)
        self._count_from_here(stream)
        self.charge(stream)  # the stream may be sealed by now

    def restore_grace(self, stream: Stream, until: float) -> None:
        """The grace of a detached generation goes on as in the process before. Its place was given there."""
        stream.grace_until = until
        self.detached += 1
        self._graces.add(stream.terms.owner, stream)

    # -- streams that nothing may touch, while they are told to another process

    def set_aside(self, stream: Stream) -> None:
        """Until take_back() do nothing with this stream by oneself: no sweep, no grace's end, no relief of memory.

        Its accounts, its grace and its names stay. No client may ask for it meanwhile: the caller holds their requests.
        """
        del self._streams[stream.id]

    def take_back(self, stream: Stream) -> None:
        """The opposite of set_aside()."""
        self._streams[stream.id] = stream

    # -- readers leave

    def leave(self, reader: Subscriber, reason: CloseReason, now: float) -> None:
        """Remove an ended reader from its stream. If it was the last, the stream gets a grace or ends."""
        stream = reader.stream
        stream.leave(reader)
        source = stream.source
        if stream.readers or stream.reason is not None or source is None:
            return
        try:
            if source.needs_reader:
                self.orphan(stream, stream.grace_s(reason), reason, now)
            elif self.copies is not None:
                self.copies.left(stream, reason)
        except Exception as error:
            self.crash(stream, "Hub.leave", error, now)

    def orphan(self, stream: Stream, grace_s: float, reason: CloseReason, now: float) -> None:
        """A generation without a reader here: it may go on for grace_s, if there is room among the detached; or for as
        long as another node has readers of it.
        """
        self.end_grace(stream)
        if self._is_read_elsewhere(stream):
            return
        if grace_s <= 0 or not self.make_room_for_grace(stream.terms.owner, now):
            self._stop(stream, reason, now)
            return
        stream.grace_until = now + grace_s
        self.detached += 1
        self._graces.add(stream.terms.owner, stream)

    def left_elsewhere(self, stream: Stream, reason: CloseReason, now: float) -> None:
        """The last reader of this worker's live stream at another node has left."""
        source = stream.source
        if not stream.readers and not stream.grace_until and source is not None and source.needs_reader:
            self.orphan(stream, stream.grace_s(reason), reason, now)

    def _is_read_elsewhere(self, stream: Stream) -> bool:
        return self.copies is not None and self.copies.is_read_elsewhere(stream)

    def _stop(self, stream: Stream, reason: CloseReason, now: float) -> None:
        """Cancel the upstream now and seal the stream in a later turn: when 1,000 readers leave at once, the last GPU
        is freed before 1,000 streams have been sealed.
        """
        stream.stop_source(reason)
        message = "The generation was stopped because its reader left."

        def seal() -> None:
            try:
                stream.cancel(reason, now, message=message)
            except Exception as error:
                self.crash(stream, "Hub.stop", error, now)

        self.soon(seal)

    # -- bounds for all: the principal that holds most gives way

    def make_room_for_grace(self, owner: str, now: float) -> bool:
        """Whether another generation of this principal may go on without a reader; another's grace may end for it."""
        if self.detached < self.detached_max:
            return True
        # A published stream has no grace, so a stream here has no reader.
        yielding = self._graces.yielding(owner, self._has_no_reader) if self.detached_max > 0 else None
        if yielding is not None:
            self._give_way(yielding, now)
        return self.detached < self.detached_max

    def make_place(self, owner: str, now: float, *, relayed: bool, upstreams: Collection[str] = ()) -> bool:
        """End a stream without a reader, of the principal that holds most places, in favour of `owner`.

        `relayed`: a generation within its grace alone, because its upstream's place is wanted; at any of `upstreams`,
        if they are given. False: there is none.
        """

        def may_yield(stream: Stream) -> bool:
            is_idle = bool(stream.grace_until) or (stream.terms.published and not stream.terms.is_copy and not relayed)
            is_there = not upstreams or stream.upstream in upstreams
            if not is_idle or not is_there or not self._has_no_reader(stream) or stream.source is None:
                return False
            return not self._is_read_elsewhere(stream)

        yielding = self._live.yielding(owner, may_yield)
        if yielding is not None:
            self._give_way(yielding, now)
        return yielding is not None

    def _has_no_reader(self, stream: Stream) -> bool:
        return not stream.readers and self._streams.get(stream.id) is stream

    def _give_way(self, stream: Stream, now: float) -> None:
        """Sealed at once, and not in a later turn: a publisher's request must find it ended."""
        text = "The stream had no reader, and made room: its owner had the most of what there is for all."
        stream.cancel(CloseReason.ABANDONED, now, message=text)

    def rejoin(self, stream: Stream, reader: Subscriber) -> None:
        """Add a reader to a stream that may have none, and end the stream's grace."""
        self.end_grace(stream)
        stream.add_reader(reader)

    def stream_sealed(self, stream: Stream) -> None:
        """Keeper: settle the stream's accounts."""
        self.end_grace(stream)
        self._live.discard(stream.terms.owner, stream)
        try:
            self.charge(stream)
        except Exception as error:
            self.guard.caught("hub.charge", error)
        account = stream.terms.account
        if account is not None:
            account.close_stream()
            # A publisher's usage never counts: it would pay the debts of its key, or make debts for a key of others.
            if stream.terms.pays_tokens and not stream.terms.published:
                with self.guard:
                    account.settle(stream.text_events, stream.progress.tokens(stream.text_events))
        self.on_sealed(stream)

    # -- sweeping

    def sweep(self, streams: Iterable[Stream], now: float, charge_turn: int = EVERY_TURN) -> None:
        """Charge logs, end graces, remove streams after their retention. The caller passes a slice of the streams.

        Of live streams, only those with this charge_turn are charged: charging thousands of streams costs as much as a
        token for each, and no figure is needed more often than once in CHARGE_TURNS sweeps.
        """
        for stream in streams:
            if stream.reason is None and now - stream.touched_at >= SILENCE_S_MIN:
                ledger, silent_s = stream.ledger, now - stream.touched_at
                if ledger.first_token_at and silent_s > ledger.longest_gap_s:
                    ledger.longest_gap_s = silent_s
            charging = charge_turn in (stream.charge_turn, EVERY_TURN)
            if not charging and stream.reason is None and not stream.grace_until:
                continue
            if self._streams.get(stream.id) is not stream:
                continue  # removed since the snapshot was taken: its charge would never be given back
            try:
                if charging and stream.log.seq_next - 1 != stream.ledger.counted_events:
                    self.charge(stream)
                    if not stream.ledger.first_token_at and stream.text_events:
                        stream.speak(stream.touched_at)
                if stream.reason is None:
                    if self.copies is not None and charging:
                        self.copies.grown(stream)
                    if stream.grace_until and stream.grace_until <= now:
                        self.abandon(stream, now)
                    continue
                if stream.readers or stream.sealed_at + stream.terms.retention_s > now:
                    continue
                if self.copies is None or not self.copies.need(stream):
                    self.remove(stream)
            except Exception as error:
                self.crash(stream, "Hub.sweep", error, now)
        if self.log_bytes > self.log_bytes_max:
            with self.guard:
                self.free_log_memory()

    def crash(self, stream: Stream, where: str, error: Exception, now: float) -> None:
        """The sweep's work on a stream raised: the stream ends, and without readers it is removed. Never raises."""
        self.guard.caught(where, error)
        with self.guard:
            stream.cancel(CloseReason.INTERNAL, now, message="streamd made a mistake; its log says more.")
        if not stream.readers:
            with self.guard:
                self.remove(stream)

    def abandon(self, stream: Stream, now: float) -> None:
        """The grace is over and no reader came back."""
        self.end_grace(stream)
        stream.cancel(
            CloseReason.ABANDONED, now, message="The generation was stopped because no reader came back in time."
        )

    def end_grace(self, stream: Stream) -> None:
        """End the stream's grace, if any: a reader came, or the stream ended."""
        if stream.grace_until:
            stream.grace_until = 0.0
            self.detached -= 1
            self._graces.discard(stream.terms.owner, stream)

    def remove(self, stream: Stream) -> None:
        """Forget a stream without readers, its log and its names."""
        assert not stream.readers
        if self._streams.pop(stream.id, None) is None:
            return
        try:
            self._forget(stream)
        except Exception:
            self._streams[stream.id] = stream  # the removal is tried again
            raise
        self.on_removed(stream)

    def give_away(self, stream: Stream) -> None:
        """Forget a stream without readers that goes on in another process: nobody is told of an end."""
        assert not stream.readers
        if self._streams.pop(stream.id, None) is stream:
            stream.source = None
            self._forget(stream)
            if stream.terms.account is not None and stream.reason is None:
                stream.terms.account.close_stream()

    def _forget(self, stream: Stream) -> None:
        stream.fanout = None  # the two refer to each other, and the garbage collector hardly runs
        self.end_grace(stream)
        self._live.discard(stream.terms.owner, stream)
        with self.guard:
            self.charge(stream)
        key = self._forget_on_remove.pop(stream.id, None)
        if key is not None:
            self._by_key.pop(key, None)
        named = (stream.terms.owner, stream.progress.response_id or "")
        if self._by_response.get(named) is stream:
            del self._by_response[named]
        conversation = self._conversation_of.get(stream.id)
        if conversation is not None:
            self.forget_conversation(stream.terms.owner, conversation)
        self.log_bytes -= stream.ledger.charged_bytes
        stream.ledger.charged_bytes = 0

    # -- memory

    def charge(self, stream: Stream) -> None:
        """Bring the accounts up to the log's present size and the events since the last charge."""
        held, events, text_events = stream.log.bytes_held, stream.events, stream.text_events
        held += stream.ledger.names_bytes
        if stream.reason is not None:
            held += self.record_bytes
        self.log_bytes += held - stream.ledger.charged_bytes
        stream.ledger.charged_bytes = held
        self.events_total += events - stream.ledger.counted_events
        self.event_bytes_total += stream.frame_bytes - stream.ledger.counted_bytes
        self.text_events_total += text_events - stream.ledger.counted_text_events
        if stream.terms.account is not None and stream.terms.pays_tokens:
            stream.terms.account.count_tokens(text_events - stream.ledger.counted_text_events)
        stream.ledger.counted_events, stream.ledger.counted_bytes = events, stream.frame_bytes
        stream.ledger.counted_text_events = text_events

    def _charge_name(self, stream: Stream, name: str, sign: int) -> None:
        """Charge a stream for a name that finds it now (sign 1), or that no longer does (-1)."""
        delta = sign * (ENTRY_BYTES + sys.getsizeof(name))
        ledger = stream.ledger
        ledger.names_bytes += delta
        ledger.charged_bytes += delta
        self.log_bytes += delta

    def free_log_memory(self) -> None:
        """Above the logs' budget: remove finished streams, oldest first; then halve the longest logs. Each is of the
        principal that holds most bytes at that time.
        """
        held = _sums(self._streams.values(), lambda stream: stream.log.bytes_held)
        finished = [s for s in self._streams.values() if s.reason is not None and not s.readers]
        for stream in _of_the_largest(sorted(finished, key=lambda s: s.sealed_at), held):
            if self.log_bytes <= self.log_bytes_max:
                return
            held[stream.terms.owner] -= stream.log.bytes_held
            self.remove(stream)
        # Down to seven eighths, so that the next token doesn't bring us back here.
        for stream in _of_the_largest(sorted(self._streams.values(), key=lambda s: -s.log.bytes_held), held):
            if self.log_bytes <= self.log_bytes_max * 7 // 8:
                return
            before = stream.log.bytes_held
            stream.log.trim_to(before // 2)
            held[stream.terms.owner] -= before - stream.log.bytes_held
            self.charge(stream)

    def free_kept(self) -> None:
        """Above kept_max: remove finished streams, oldest first, each of the principal that has most of them then."""
        if len(self._streams) <= self.kept_max:
            return
        finished = [s for s in self._streams.values() if s.reason is not None]
        excess = len(finished) - self.kept_max
        if excess <= 0:
            return
        held = _sums(finished, lambda stream: 1)
        left = excess + self.kept_max // 8  # to seven eighths, as above
        idle = (s for s in sorted(finished, key=lambda s: s.sealed_at) if not s.readers)
        for stream in itertools.islice(_of_the_largest(idle, held), left):
            held[stream.terms.owner] -= 1
            self.remove(stream)


def _sums(streams: Iterable[Stream], size: Callable[[Stream], int]) -> dict[str, int]:
    """The sum of the streams' sizes for each principal."""
    sums: dict[str, int] = {}
    for stream in streams:
        sums[stream.terms.owner] = sums.get(stream.terms.owner, 0) + size(stream)
    return sums


def _of_the_largest(streams: Iterable[Stream], held: Mapping[str, int]) -> Iterator[Stream]:
    """The streams in their order, but each of the principal that holds most. The caller changes `held` meanwhile."""
    by_owner: dict[str, list[Stream]] = {}
    for stream in streams:
        by_owner.setdefault(stream.terms.owner, []).append(stream)
    largest = [(-held[owner], owner, iter(own)) for owner, own in by_owner.items()]
    heapq.heapify(largest)
    while largest:
        _, owner, rest = largest[0]
        following = next(rest, None)
        if following is None:
            heapq.heappop(largest)
            continue
        yield following
        heapq.heapreplace(largest, (-held[owner], owner, rest))


def body_hash(body: bytes) -> bytes:
    """A digest that distinguishes request bodies under the same Idempotency-Key."""
    return hashlib.blake2b(body, digest_size=16).digest()
