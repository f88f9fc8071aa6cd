"""Stream and Subscriber: a generation, its readers, and the policy for readers that can't keep up.

THE PROBLEM. A model makes a token every 20 to 80 ms and never waits. Readers do: a phone in a tunnel, a laptop with its
lid closed, a debugger at a breakpoint. A proxy between the two either buffers without bound (and is killed together
with all its connections), or blocks the source (and one reader stops all others), or decides. This module decides what
a slow reader gets. The stall timeout decides when a reader that takes nothing is closed (net/outlet.py).

THE MECHANISM. A stream has a replay log and any number of subscribers. An event goes into the log first. Then it
goes to each subscriber's `push` as a frame: the event with its id line and HTTP chunk, made once, the same bytes
object for all subscribers:

    LIVE       push is the transport's own write: nothing stands between the token and the kernel
    PAUSED     the kernel did not take all bytes: the ring counts the frames that wait. Besides the ring the reader
               keeps a cursor, taken when the pause began, to its place in the log
    BEHIND     the ring was full under policy `coalesce`: the ring is emptied, only the cursor is left. Lag costs a
               position instead of a buffer
    CATCHING   writable again and behind: each loop turn writes a piece read from the log, about
               `catchup_bytes_max` and at least one event, the texts of neighbouring deltas concatenated; at the
               log's end it goes LIVE. A LIVE reader also comes here when the fan-out has dropped frames that it had
               still to get
    FOLLOWING  at the log's end, for a reader with another wire form than the shared form (HTTP/1.0, raw, data lines):
               each event is read from the log with the reader's framing. The cursor is that of CATCHING; there is no
               second mechanism
    ENDED      nothing is written any more

    A late joiner and a resuming reader are subscribers that begin in CATCHING with a cursor of their choice.

    The policy decides about a full ring, and only a reader that pauses while LIVE has frames in its ring. A reader that
    pauses while CATCHING or FOLLOWING goes BEHIND under every policy: it reads from the log anyway.

    A raw reader counts bytes and comes back with their number (llama.cpp's dialect). So it gets the log's events and
    nothing else: no ids, no heartbeats, no comments, no farewell. Announcing a gap would make its count wrong. So it is
    cut off instead, and its resume is refused because the log no longer has the bytes it asks for.

    A reader of data lines only (Gemini's) gets events and nothing else as well, because its parser breaks on any other
    line. But gaps and the farewell are events of its dialect, and texts are merged for it.

INVARIANTS
    1. append() puts an event into the log before any subscriber sees it. So the log's end, taken when pause_writing()
       fires inside a write, is exactly the first seq that was not given to the transport.
    2. No subscriber joins or leaves inside append(): sinks end a subscription at once (push becomes a no-op) but
       leave the stream from their own callback (connection_lost, or the end of the answer).
    3. For each subscriber, frames in the ring are the seqs position … position + ring.held - 1, without a hole. The
       events that drop_oldest skipped lie directly in front of them: gap_from <= seq < position.
    4. position <= log.seq_next; a position < log.seq_first is a gap. The gap is announced before anything else is
       written; a raw reader is cut off instead.
    5. The source is never paused for a subscriber.
    6. A subscriber that gets an error event gets it from the log, with its own seq, like any other event.

REJECTED. A queue and a task per reader (30 times the memory, and a wake-up per token). Pausing the source for the
slowest reader (it stops all others). A ring per stream with a read index per reader: the slowest reader decides how
long frames live, and catching up writes hundreds of small events where a single large event will do. Coalescing
inside the ring: it costs JSON for every reader on the hot path, while the log coalesces once, late, and mostly without
parsing.

TIME comes in as `now`, monotonic seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, assert_never

from streamd.choice import Choice
from streamd.core.guard import Guard
from streamd.core.log_record import LogRecord
from streamd.core.replay import LARGE_EVENT_BYTES_MIN as LARGE_EVENT_BYTES_MIN
from streamd.core.replay import Cursor, ReplayLog
from streamd.core.ring import Ring
from streamd.core.terms import Terms
from streamd.policy import Policy as Policy
from streamd.reasons import By, CloseReason
from streamd.wire import sse
from streamd.wire.chunked import encode_chunk
from streamd.wire.dialect import (
    Dialect,
    Progress,
    error_event,
    failure_event,
    gap_event,
    reconnect_event,
    sequence_number_of,
    stray_events,
)
from streamd.wire.dialects.api import UPSTREAM_ERROR
from streamd.wire.dialects.failure import Failure
from streamd.wire.strays import Strays

# Above this number of subscribers an event is handed out in slices over several loop turns (core/fanout.py); up to it,
# at once: 64 writes of 10 us are 0.6 ms, about the time of a TLS handshake.
DIRECT_READERS_MAX = 64

# The `code` of an error where an upstream sent lines in place of events.
NOT_EVENTS = "upstream_not_events"

# The message of the error event when the node of a stream is lost.
NODE_LOST = "The node that carried this stream is gone, and the stream ends here. Start it again with a new request."

# Bound of the events of a read that go out in a single write. The whole write may stay in the buffer of a reader that
# stalls at it; the next write goes to the reader's ring. 64 KiB are more than most servers write at once.
APPEND_BYTES_MAX = 64 * 1024

# Writes of loose lines of a read, each to every reader; an upstream sends a comment in seconds. With 64 readers these 4
# and the events between them are 9 writes of 10 us each, 6 ms.
LOOSE_WRITES_MAX = 4

# CountedStream notes (seq, byte offset) once in this number of events: finding an offset scans at most this number of
# events (0.15 ms). A mark takes about 130 B.
MARK_EVENTS = 1024


class Form(Choice):
    """The framing of events on a connection."""

    CHUNKED = "chunked"  # HTTP/1.1, with id lines: the shared frame
    BARE = "bare"  # HTTP/1.0: no transfer coding, ended by close
    RAW_CHUNKED = "raw_chunked"  # the events' own bytes and nothing else, so that they can be counted
    RAW_BARE = "raw_bare"
    DATA_CHUNKED = "data_chunked"  # the dialect's events without ids: its clients accept no other line
    DATA_BARE = "data_bare"


RAW = (Form.RAW_CHUNKED, Form.RAW_BARE)
# Forms in which nothing but events may be written.
EVENTS_ONLY = (*RAW, Form.DATA_CHUNKED, Form.DATA_BARE)
# Forms in which an event's lines are rewritten.
DATA_LINES = (Form.DATA_CHUNKED, Form.DATA_BARE)
# Forms with an HTTP/1.1 chunk around each write.
IN_CHUNKS = (Form.CHUNKED, Form.RAW_CHUNKED, Form.DATA_CHUNKED)


class SubscriberState(Choice):
    """States of a subscriber; the essay above explains each."""

    LIVE = "live"
    PAUSED = "paused"
    BEHIND = "behind"
    CATCHING = "catching"
    FOLLOWING = "following"
    ENDED = "ended"


class SubscriberEvent(Choice):
    """Events in the life of a subscriber."""

    PAUSE = "pause"  # pause_writing()
    RESUME = "resume"  # resume_writing()
    OVERFLOW = "overflow"  # the ring is full under `coalesce`
    CAUGHT_UP = "caught_up"  # the cursor is at the log's end; shared form
    CAUGHT_UP_ALONE = "caught_up_alone"  # the same, in any other form
    LAG = "lag"  # the fan-out has dropped frames that the reader had still to get; the log has them
    END = "end"


TRANSITIONS: dict[SubscriberState, dict[SubscriberEvent, SubscriberState]] = {
    SubscriberState.LIVE: {
        SubscriberEvent.PAUSE: SubscriberState.PAUSED,
        SubscriberEvent.LAG: SubscriberState.CATCHING,
        SubscriberEvent.END: SubscriberState.ENDED,
    },
    SubscriberState.PAUSED: {
        SubscriberEvent.RESUME: SubscriberState.LIVE,
        SubscriberEvent.OVERFLOW: SubscriberState.BEHIND,
        SubscriberEvent.END: SubscriberState.ENDED,
    },
    SubscriberState.BEHIND: {
        SubscriberEvent.RESUME: SubscriberState.CATCHING,
        SubscriberEvent.END: SubscriberState.ENDED,
    },
    SubscriberState.CATCHING: {
        SubscriberEvent.PAUSE: SubscriberState.BEHIND,
        SubscriberEvent.CAUGHT_UP: SubscriberState.LIVE,
        SubscriberEvent.CAUGHT_UP_ALONE: SubscriberState.FOLLOWING,
        SubscriberEvent.END: SubscriberState.ENDED,
    },
    SubscriberState.FOLLOWING: {
        SubscriberEvent.PAUSE: SubscriberState.BEHIND,
        SubscriberEvent.END: SubscriberState.ENDED,
    },
    SubscriberState.ENDED: {},
}


class Sink(Protocol):
    """The target of a subscriber's writes: the answer, as the core sees it."""

    def write(self, frame: bytes) -> None:
        """Take the frame whole. May call the subscriber's pause() before it returns."""

    def write_large(self, parts: list[bytes | memoryview]) -> None:
        """Take the parts in order, as fast as the peer does. May call the subscriber's pause() before it returns, and
        then calls its resume() once all is written.
        """

    def soon(self, turn: Callable[[], None]) -> None:
        """Run `turn` in the next loop turn."""

    def share_packets(self) -> None:
        """The frame of the last event comes next, and the end of the answer soon, perhaps in this turn."""

    def stream_ended(self, clean: bool) -> None:
        """All is written. clean: the answer may end as HTTP ends it; otherwise it has to look broken off."""

    def slow_consumer(self) -> None:
        """The reader is too slow for policy `close`, or lags in a form that knows no gap: end this connection now."""

    def refused(self, error: Exception) -> None:
        """A write, or the work for it, raised: count the error and end this connection now."""


class Firsts(Protocol):
    """Takes note of what happens to a generation, for figures that people see."""

    def first_event(self, now: float) -> None:
        """The first event has come, inside an append."""

    def first_token(self, now: float) -> None:
        """The first text has come, inside an append."""


class Source(Protocol):
    """The origin of a stream's events, as far as the stream may touch it."""

    @property
    def watch(self) -> Firsts | None:
        """Of a generation."""

    @property
    def needs_reader(self) -> bool:
        """Whether the source ends, after a grace, when the last reader has left. Generations do, publishers don't."""

    def cancel(self, reason: CloseReason) -> None:
        """The rest is not wanted. May be called once; the source must not append to the stream any more."""

    def on_terminal(self, now: float) -> None:
        """The last event of the answer has come, inside an append: nothing that is needed can follow."""


class Fanout(Protocol):
    """Hands events to very many readers, in slices (core/fanout.py)."""

    running: bool

    @property
    def batches(self) -> bool:
        """Whether even a few readers are served through the fan-out."""

    def add(self, seq: int, frame: bytes) -> None:
        """A new event; it reaches every LIVE reader within the next passes."""

    def loose(self, lines: bytes) -> None:
        """Comments, for the readers that are at the live end in the next pass."""

    def flush(self) -> None:
        """Don't let events wait for each other: the answer's last event is the next, or the stream was sealed."""


class Keeper(Protocol):
    """The registry of a stream (core/hub.py)."""

    @property
    def guard(self) -> Guard:
        """Ends what a step raises."""

    @property
    def new_fanout(self) -> Callable[[Stream], Fanout]:
        """Makes the dispatcher of a stream with many readers."""

    def stream_sealed(self, stream: Stream) -> None:
        """The stream takes no more events."""

    def stream_named(self, stream: Stream) -> None:
        """OpenAI Responses has named the stream: progress.response_id is known now."""


class StreamLedger:
    """The hub's accounts of a stream: bytes charged, those of its names among them, totals counted so far, and times
    for its figures at the end (net/generation.py).
    """

    __slots__ = (
        "charged_bytes",
        "counted_bytes",
        "counted_events",
        "counted_text_events",
        "first_token_at",
        "longest_gap_s",
        "names_bytes",
    )

    def __init__(self) -> None:
        self.charged_bytes = 0
        self.names_bytes = 0
        self.counted_bytes = 0
        self.counted_events = 0
        self.counted_text_events = 0
        self.first_token_at = 0.0  # time of the first text
        self.longest_gap_s = 0.0  # the longest silence since then that a sweep has seen


def _skip(frame: bytes) -> None:
    """push of a subscriber that reads the log, or has ended."""


class ReaderPlace(NamedTuple):
    """A subscriber's state, for another process. Its ring is in none: the frames in it are in the log, from `position`
    on, and a reader of the log gets them.
    """

    policy: Policy
    form: Form
    position: int
    seq_start: int
    dropped: int
    gap_from: int  # 0: no gap to announce
    bytes_written: int


class _PerEvent:
    """Fields that the fan-out touches for each of ten thousand readers. Slots of a base class come first: they are
    neighbours in memory, and the objects stored into them are the same for all readers of a pass.
    """

    __slots__ = ("own_bytes", "own_position", "state", "write")

    state: SubscriberState
    write: Callable[[bytes], None]
    own_position: int  # the first seq not yet written; while LIVE in direct mode, the stream's seq_next holds instead
    own_bytes: int  # LIVE, not direct: the stream's frame_bytes at own_position


class Subscriber(_PerEvent):
    """A connection that reads a stream: a ring, a cursor, a policy."""

    __slots__ = (
        "_bytes_written",
        "_cursor",
        "_gap_from",
        "_live_from_bytes",
        "dropped",
        "form",
        "index",
        "policy",
        "push",
        "ring",
        "seq_start",
        "sink",
        "stream",
    )

    def __init__(self, stream: Stream, sink: Sink, *, policy: Policy, ring: Ring, form: Form = Form.CHUNKED) -> None:
        # connection
        self.sink = sink
        self.write = sink.write
        self.form = form
        # subscription
        self.stream = stream
        self.policy = policy
        self.ring = ring
        self.index = -1  # in stream.readers
        self.seq_start = 0
        self.dropped = 0  # events announced as gaps
        # position
        self.state = SubscriberState.CATCHING
        self.push: Callable[[bytes], None] = _skip
        self.own_position = self.own_bytes = 0
        self._cursor: Cursor | None = None
        self._gap_from = 0  # 0: no gap to announce
        self._live_from_bytes = 0
        self._bytes_written = 0

    # -- called by the answer

    def write_by(self, write: Callable[[bytes], None]) -> None:
        """Write by another function from here on: the sink holds the bytes of a turn back, or doesn't any more."""
        self.write = write
        if self.state is SubscriberState.LIVE:
            self.push = write
            self.stream.update_push()

    def pause(self) -> None:
        """The transport is full (pause_writing)."""
        if self.state is SubscriberState.LIVE:
            self.leave_live()
            if self.own_position == self.stream.log.seq_next:
                self._cursor = self.stream.log.cursor_at_end()  # free here, a search later
        self._go(SubscriberEvent.PAUSE)

    def resume(self) -> None:
        """The transport is empty again (resume_writing): write out the ring, or begin to catch up."""
        if self.state is SubscriberState.PAUSED and self.ring.bytes_held > max(
            self.ring.bytes_max, LARGE_EVENT_BYTES_MIN
        ):
            self.ring.clear()  # its only frame is large: the log has it without a copy
            self._go(SubscriberEvent.OVERFLOW)
        if self.state is SubscriberState.PAUSED:
            held = self._take_ring()
            self._go(SubscriberEvent.RESUME)
            if held:
                self._bytes_written += len(held)
                self.write(held)
            self._go_on_live()
        else:
            self._go(SubscriberEvent.RESUME)
            self.catch_up()

    def _go_on_live(self) -> None:
        """Go on after the ring was written: catch up with what only the log has, finish if the stream is sealed."""
        if self.state is not SubscriberState.LIVE:
            return
        if not self.at_end:
            self.lag()
        self.finish_if_done()

    def _take_ring(self) -> bytes:
        """The events that the ring counts, each framed anew from the log, behind a gap event if some are lost."""
        end = self.own_position + self.ring.held
        self.ring.clear()
        out = self._begin_reading()
        assert self._cursor is not None
        while self._cursor.seq < end:
            for seq, event in self.stream.log.read(self._cursor, bytes_max=self.stream.terms.catchup_bytes_max):
                out.append(self._encode(seq, event))
        self.own_position = self._cursor.seq
        self._cursor = None
        return b"".join(out)

    def end(self) -> None:
        """Write nothing any more. The answer leaves the stream afterwards, from a callback of its own."""
        if self.state is SubscriberState.ENDED:
            return
        try:
            if self.state is SubscriberState.LIVE:
                self.leave_live()
            self.ring.clear()
        finally:
            self._cursor = None
            self._go(SubscriberEvent.END)

    def fail(self, error: Exception) -> None:
        """A write, or the work for it, raised: this reader ends, and no other. Allowed within append(); never raises.

        What raises is the reader's transport, its TLS, or memory: the stream and its other readers have no part in it.
        """
        guard = self.stream.keeper.guard
        with guard:
            self.end()
        with guard:
            self.sink.refused(error)

    def announce_reset(self) -> None:
        """The reader's position is of an earlier epoch: its events are void, all events of this epoch follow."""
        event = gap_event(self.stream.dialect, self.stream.progress, 0, 0, reset=True)
        frame = self._encode(0, event)
        self._bytes_written += len(frame)
        self.write(frame)

    # -- catching up

    def start(self, seq: int, *, writable: bool = True) -> None:
        """Begin at `seq` (below the log's first it is a gap).

        1 <= seq <= log.seq_next; of a lost stream `seq` may be larger: its node had given the reader more than others
        know of.
        """
        self.seq_start = seq
        self.own_position = min(seq, self.stream.log.seq_next)
        if self.state is not SubscriberState.CATCHING:
            return  # announce_reset() filled the transport: resume() goes on from here
        if writable:
            self.catch_up()
        else:
            self._go(SubscriberEvent.PAUSE)

    def place(self) -> ReaderPlace:
        """The argument of another process's go_on_from()."""
        position = self.position
        first = min(self.seq_start, position)
        return ReaderPlace(self.policy, self.form, position, first, self.dropped, self._gap_from, self.bytes_delivered)

    def check(self, place: ReaderPlace) -> None:
        """Raises ValueError for a place that no reader of this stream has."""
        position, first = place.position, place.seq_start
        is_within = 1 <= first <= position <= self.stream.log.seq_next
        has_gap = place.gap_from == 0 or first <= place.gap_from < position
        if not is_within or not has_gap or not 0 <= place.dropped <= position - first or place.bytes_written < 0:
            raise ValueError("a reader at a place that its stream doesn't have")

    def go_on_from(self, place: ReaderPlace, *, writable: bool) -> None:
        """Begin where the reader was in another process, in place of start(). Policy and form are the constructor's.

        Raises ValueError, with nothing changed, for a place that no reader of this stream has.
        """
        self.check(place)
        position, first = place.position, place.seq_start
        self._bytes_written = place.bytes_written
        self._gap_from = place.gap_from
        self.dropped = place.dropped
        self.start(position, writable=writable)
        self.seq_start = first

    def catch_up(self) -> None:
        """A turn: write a piece of the log, at most `catchup_bytes_max`; then LIVE, another turn, or a pause."""
        if self.state is not SubscriberState.CATCHING:
            return
        if self.own_position < self.stream.log.seq_next:
            self._write_piece()
        if self.state is not SubscriberState.CATCHING:
            return
        if self.own_position < self.stream.log.seq_next:
            self.sink.soon(self.catch_up)
            return
        self._go(SubscriberEvent.CAUGHT_UP if self.form is Form.CHUNKED else SubscriberEvent.CAUGHT_UP_ALONE)
        self.finish_if_done()

    def _write_piece(self) -> None:
        """Write the frames of the next events in the log, coalesced; first a gap event if the log has dropped events.

        A raw reader that lost bytes ends instead.
        """
        stream, log = self.stream, self.stream.log
        raw = self.form in RAW
        if self.own_position < log.seq_first and raw:
            self.dropped += log.seq_first - self.own_position
            self.end()
            self.sink.slow_consumer()
            return
        out = self._begin_reading()
        cursor = self._cursor
        assert cursor is not None
        large = log.large_event(cursor)
        if large is not None:
            parts = [*out, *self._large_frame(self.own_position, large)]
            self.own_position = cursor.seq
            self._bytes_written += sum(map(len, parts))
            self.sink.write_large(parts)
            return
        if raw:
            events = log.read(cursor, bytes_max=stream.terms.catchup_bytes_max)
        else:
            events = log.read_coalesced(cursor, bytes_max=stream.terms.catchup_bytes_max)
        out += [self._encode(seq, event) for seq, event in events]
        self.own_position = cursor.seq
        piece = b"".join(out)
        if piece:
            self._bytes_written += len(piece)
            self.write(piece)

    def _large_frame(self, seq: int, event: memoryview) -> list[bytes | memoryview]:
        """The parts of a frame as _encode() makes it, around the event's own bytes."""
        parts: list[bytes | memoryview] = [event]
        if self.form in DATA_LINES:
            parts = sse.data_line_parts(event)
        elif self.form not in RAW:
            parts = [b"%b%d\n" % (self.stream.id_prefix, seq), event]
        if self.form not in IN_CHUNKS:
            return parts
        return [b"%x\r\n" % sum(map(len, parts)), *parts, b"\r\n"]

    def _begin_reading(self) -> list[bytes]:
        """Put the cursor at the reader's position; announce events that the log no longer has as a gap."""
        log = self.stream.log
        if self.own_position < log.seq_first:
            self._record_gap(self.own_position, log.seq_first)
            self.own_position = log.seq_first
            self._cursor = None
        gap = self._gap_frame()
        if self._cursor is None:
            self._cursor = log.seek(self.own_position)
        return [gap] if gap else []

    def _encode(self, seq: int, event: bytes) -> bytes:
        if self.form in EVENTS_ONLY:
            shown = event if self.form in RAW else sse.data_lines(event)
            return encode_chunk(shown) if self.form in IN_CHUNKS else shown
        return sse.frame(self.stream.id_prefix, seq, event, chunked=self.form is Form.CHUNKED)

    def _follow(self, frame: bytes) -> None:
        """push of a FOLLOWING subscriber: write the log's events that this connection hasn't got."""
        while self.state is SubscriberState.FOLLOWING and self.own_position < self.stream.log.seq_next:
            self._write_piece()

    # -- the ring

    def push_all(self, frames: list[bytes], joined: bytes) -> None:
        """Several events of a read; `joined` is their concatenation."""
        if self.state is SubscriberState.LIVE:
            self.write(joined)
            return
        for frame in frames:
            self.push(frame)

    def push_large(self, seq: int, frame_bytes: int) -> None:
        """As push, for a frame that isn't made: the reader takes the event from the log, in pieces."""
        if self.state is SubscriberState.LIVE:
            self._read_large(seq, frame_bytes)
        elif self.state is SubscriberState.PAUSED:
            self._hold_size(frame_bytes)
        else:
            self.push(b"")

    def _hold(self, frame: bytes) -> None:
        """push of a PAUSED subscriber."""
        self._hold_size(len(frame))

    def _hold_size(self, size: int) -> None:
        if not self.ring.push(size) and self._apply_policy():
            self._drop_for(size)

    def _drop_for(self, size: int) -> None:
        first = self.own_position
        self._cursor = None
        while True:
            self.ring.drop_oldest()
            self.own_position += 1
            if self.ring.push(size):
                break
        self._record_gap(first, self.own_position)

    def frames_gone(self, first: int) -> None:
        """Fan-out, PAUSED: frames between the ring's end and `first` are gone. The policy decides."""
        self._cursor = None
        if self._apply_policy():
            self.ring.clear()
            self._record_gap(self.own_position, first)
            self.own_position = first

    def _apply_policy(self) -> bool:
        """Apply the policy to a ring that can't hold the next frame. True: the caller drops frames until it fits."""
        match self.policy:
            case Policy.COALESCE:
                self.ring.clear()
                self._go(SubscriberEvent.OVERFLOW)
                return False
            case Policy.DROP_OLDEST:
                return True
            case Policy.CLOSE:
                self.end()
                self.sink.slow_consumer()
                return False
            case _:
                assert_never(self.policy)

    def _record_gap(self, first: int, until: int) -> None:
        """The seqs first <= seq < until are lost to this reader; the next write says so."""
        self.dropped += until - first
        if not self._gap_from:
            self._gap_from = first

    def _gap_frame(self) -> bytes:
        """The announcement of [_gap_from, position); empty if nothing was lost."""
        if not self._gap_from:
            return b""
        last = self.own_position - 1
        event = gap_event(self.stream.dialect, self.stream.progress, self._gap_from, last)
        self._gap_from = 0
        return self._encode(last, event)

    # -- the end

    def share_packets(self) -> None:
        """The last event is about to be written; what raises is the reader's own, as in push()."""
        try:
            self.sink.share_packets()
        except Exception as error:
            self.fail(error)

    def finish_if_done(self) -> None:
        """After the last event of a sealed stream, end the answer. Only from LIVE or FOLLOWING, with all written."""
        if (
            self.stream.reason is not None
            and self.state in (SubscriberState.LIVE, SubscriberState.FOLLOWING)
            and self.at_end
        ):
            if self.stream.reason is CloseReason.NODE_LOST and self.form not in RAW:
                self._tell_of_loss()
            self.end()
            self.sink.stream_ended(self.stream.ended_clean)

    def _tell_of_loss(self) -> None:
        """The stream's node is lost: an error event without a seq of its own, since the node may live and go on. Then
        the reader goes on behind the last event that it has, which others may have never got.
        """
        stream = self.stream
        event = stream.loss_event()
        if self.form in EVENTS_ONLY:
            event = sse.data_lines(event)
        else:
            event = b"id: %b!\n%b" % (stream.event_id(max(stream.events, self.seq_start - 1)).encode(), event)
        frame = encode_chunk(event) if self.form in IN_CHUNKS else event
        self._bytes_written += len(frame)
        self.write(frame)

    def heartbeat(self) -> bool:
        """Write the dialect's heartbeat if nothing else is on its way. True if it was written."""
        if self.state not in (SubscriberState.LIVE, SubscriberState.FOLLOWING) or self.form in EVENTS_ONLY:
            return False
        self.loose(self.stream.dialect.api.heartbeat)
        return True

    def loose(self, lines: bytes) -> None:
        """Lines without a seq, and heartbeats: written only to a reader that is at the live end."""
        if self.state in (SubscriberState.LIVE, SubscriberState.FOLLOWING) and self.form not in EVENTS_ONLY:
            frame = encode_chunk(lines) if self.form is Form.CHUNKED else lines
            self._bytes_written += len(frame)
            self.write(frame)

    def farewell(self, *, message: str, retry_ms: int) -> None:
        """Tell the reader its position, with an event that is not logged, and end. The answer has to look cut."""
        if self.state is SubscriberState.ENDED:
            return
        if self.form in RAW:
            self.end()
            return
        # Events skipped by drop_oldest and not yet announced may still be in the log: resume in front of them.
        last_id = self.stream.event_id((self._gap_from or self.position) - 1)
        event = reconnect_event(self.stream.dialect, message=message, last_id=last_id, retry_ms=retry_ms)
        if self.form in EVENTS_ONLY:
            event = sse.data_lines(event)
        frame = encode_chunk(event) if self.form in IN_CHUNKS else event
        self.end()
        self._bytes_written += len(frame)
        self.write(frame)

    def _go(self, event: SubscriberEvent) -> None:
        state = TRANSITIONS[self.state].get(event)
        assert state is not None, f"{event} in {self.state}"
        self.state = state
        if state is SubscriberState.LIVE:
            self.enter_live()
            self.push = self.write
        elif state is SubscriberState.PAUSED:
            self.push = self._hold
        elif state is SubscriberState.FOLLOWING:
            self.push = self._follow
        else:
            self.push = _skip
        self.stream.update_push()

    # A LIVE reader counts nothing per event: its position and bytes are the stream's, of now or of the last pass.

    def enter_live(self) -> None:
        """From here on the stream's own counters measure this reader's writes."""
        self._live_from_bytes = self.own_bytes = self.stream.frame_bytes

    def leave_live(self) -> None:
        """Fix position and bytes before the stream's counters stop being this reader's."""
        if self.stream.direct:
            self.own_position = self.stream.log.seq_next
            self.own_bytes = self.stream.frame_bytes
        self._bytes_written += self.own_bytes - self._live_from_bytes

    def lag(self) -> None:
        """Fan-out: this LIVE reader's next frame is no longer at hand; the log has it."""
        self.leave_live()
        self._go(SubscriberEvent.LAG)
        self._cursor = None
        self.catch_up()

    def _read_large(self, seq: int, frame_bytes: int) -> None:
        self.leave_live()
        self.own_position = seq
        self._bytes_written -= frame_bytes  # the stream has counted it already
        self._go(SubscriberEvent.LAG)
        self._cursor = None
        self.catch_up()

    # -- read by the fan-out and the reports

    @property
    def at_end(self) -> bool:
        """Whether all events of the stream were written to the transport."""
        return self.position == self.stream.log.seq_next

    @property
    def position(self) -> int:
        """The first seq that the transport has not got."""
        if self.state is SubscriberState.LIVE and self.stream.direct:
            return self.stream.log.seq_next
        return self.own_position

    @property
    def events_delivered(self) -> int:
        """Events handed to the transport, gaps not counted."""
        return max(0, self.position - self.seq_start - self.dropped)

    @property
    def bytes_delivered(self) -> int:
        """Bytes of the body handed to the transport, framing included."""
        if self.state is SubscriberState.LIVE and self.stream.direct:
            return self._bytes_written + self.stream.frame_bytes - self._live_from_bytes
        if self.state is SubscriberState.LIVE:
            return self._bytes_written + self.own_bytes - self._live_from_bytes
        return self._bytes_written


class _StreamPerToken:
    """Fields of a stream that each token touches. Slots of a base class come first in memory (core/replay.py)."""

    __slots__ = ("frame_bytes", "id_prefix", "log", "push", "touched_at")

    log: ReplayLog
    id_prefix: bytes
    # `write` of the only reader, if it is alone and served directly; else None
    push: Callable[[bytes], None] | None
    frame_bytes: int  # all shared frames made so far
    touched_at: float  # the time of the last event, or comment that takes the place of a heartbeat


class Stream(_StreamPerToken):
    """A generation or a published topic: an id, a replay log, readers, a source, an end.

    Invariants: seqs run from 1 without holes; reason is None while events may come; after the seal the log is not
    appended to.
    """

    __slots__ = (
        "charge_turn",
        "dialect",
        "direct",
        "drops",
        "ended_clean",
        "epoch",
        "fanout",
        "first_event_at",
        "grace_until",
        "id",
        "keeper",
        "ledger",
        "opened_at",
        "progress",
        "readers",
        "reason",
        "sealed_at",
        "source",
        "terms",
        "upstream",
    )

    def __init__(
        self,
        stream_id: str,
        log: ReplayLog,
        dialect: Dialect,
        *,
        now: float,
        keeper: Keeper,
        terms: Terms,
        epoch: str = "",
    ) -> None:
        # identity
        self.id = stream_id
        self.epoch = epoch
        self.id_prefix = b"id: " + (f"{stream_id}:{epoch}:" if epoch else f"{stream_id}:").encode()
        self.dialect = dialect
        self.upstream = ""
        self.terms = terms
        # events
        self.log = log
        self.progress = Progress(dialect.api)
        self.frame_bytes = 0
        self.touched_at = now
        self.first_event_at = 0.0
        # readers
        self.readers: list[Subscriber] = []
        self.push = None
        self.direct = True  # an event is written to each reader at once; False: the fan-out writes it
        self.fanout: Fanout | None = None
        self.drops = 0  # events lost by readers that have left
        # life
        self.source: Source | None = None
        self.keeper = keeper
        self.opened_at = now
        self.grace_until = 0.0  # the hub's: when a generation without a reader ends; 0: it isn't counted as detached
        self.reason: CloseReason | None = None
        self.ended_clean = False
        self.sealed_at = 0.0
        # accounting, kept by the hub
        self.charge_turn = 0  # its number among the hub's CHARGE_TURNS sweeps
        self.ledger = StreamLedger()

    # -- events in

    def append(self, event: bytes, now: float, *, synthetic: bool = False) -> None:
        """Take an event, as wire/sse.py makes it. synthetic: the error event of a seal, which fits no template."""
        seq = self.log.seq_next
        if synthetic:
            self.log.keep_whole(event)
            # An error event is looked into for the time of the first event, and for numbered dialects' next number.
            unseen = seq == 1 or self.dialect.api.numbered
        else:
            unseen = not self.log.append(event)
        if unseen:
            self._see(seq, event, now)
        self.touched_at = now
        if len(event) >= LARGE_EVENT_BYTES_MIN and self.direct:
            self._hand_out_large(seq, sse.frame_size(self.id_prefix, seq, len(event)))
            return
        frame = sse.frame(self.id_prefix, seq, event, chunked=True)
        self.frame_bytes += len(frame)
        self.hand_out(frame)

    def _hand_out_large(self, seq: int, frame_bytes: int) -> None:
        """As hand_out(), but no frame is made, and no transport gets it: what it doesn't take would stay there."""
        self.frame_bytes += frame_bytes
        for reader in self.readers:
            try:
                reader.push_large(seq, frame_bytes)
            except Exception as error:
                reader.fail(error)

    def append_if_templated(self, event: bytes, now: float) -> bytes:
        """The hot path, first half: append unparsed bytes if they fit the log's template; else b"", and no change.

        Bytes that fit are exactly one event (ReplayLog.append_text). The next call on this stream has to be hand_out()
        with the returned frame: a relay takes all events of a loop turn first and hands them out afterwards
        (net/read_batch.py).
        """
        log = self.log
        seq = log.seq_next
        if not log.append_text(event):
            return b""
        frame = sse.frame(self.id_prefix, seq, event, chunked=True)
        self.frame_bytes += len(frame)
        self.touched_at = now
        return frame

    def hand_out(self, frame: bytes) -> None:
        """Give the frame of the log's newest event to every reader. Where `push` is set, calling it does the same."""
        if self.direct:
            for reader in self.readers:
                try:
                    reader.push(frame)
                except Exception as error:
                    reader.fail(error)
        elif self.fanout is not None:
            self.fanout.add(self.log.seq_next - 1, frame)

    def append_run(self, events: list[bytes], now: float) -> bytes:
        """As append_if_templated(), for the events of a read: append the first of them that fit the template in use.

        The next call on this stream has to be hand_out_run() with these events and the returned frames, if there are
        any.
        """
        log = self.log
        seq = log.seq_next
        taken = log.append_run(events)
        if not taken:
            return b""
        if taken < len(events):
            del events[taken:]
        frames = sse.frames(self.id_prefix, seq, events)
        self.frame_bytes += len(frames)
        self.touched_at = now
        return frames

    def hand_out_run(self, events: list[bytes], joined: bytes) -> None:
        """Give the log's newest events to every reader. `joined` is their frames, end to end.

        A reader that is LIVE gets them in a single write. All others need each event's frame.
        """
        first = self.log.seq_next - len(events)
        frames: list[bytes] = []
        if not self.direct or any(reader.state is not SubscriberState.LIVE for reader in self.readers):
            frames = [sse.frame(self.id_prefix, first + k, event, chunked=True) for k, event in enumerate(events)]
        if self.direct:
            for reader in self.readers:
                try:
                    reader.push_all(frames, joined)
                except Exception as error:
                    reader.fail(error)
        elif self.fanout is not None:
            for k, frame in enumerate(frames):
                self.fanout.add(first + k, frame)

    def append_all(self, events: list[bytes], now: float) -> None:
        """Several events of a read: a single write for each LIVE reader."""
        if len(events) == 1:
            self.append(events[0], now)
            return
        log = self.log
        seq = log.seq_next
        # Why the frames come after the loop: made between the log's segments they would leave a hole behind each of
        # them when they are freed, and a log of events of 1 KB would take 1.5 times its size.
        k = 0
        while (k := k + log.append_run(events, k)) < len(events):
            if not log.append(events[k]):
                self._see(seq + k, events[k], now)
            k += 1
        joined = sse.frames(self.id_prefix, seq, events)
        self.frame_bytes += len(joined)
        self.touched_at = now
        self.hand_out_run(events, joined)

    def take_record(self, record: LogRecord, now: float) -> None:
        """Events of the stream that another process owns, as its log's record: they reach the readers as usual.

        Raises ValueError, with nothing changed, for a record that doesn't continue the log.
        """
        log = self.log
        cursor, seq = log.cursor_at_end(), log.seq_next
        log.add(record)
        try:
            self._hand_out_from(cursor, seq, now, shows_first=bool(record.templates))
        finally:
            log.keep_bounds()

    def look_into_log(self, now: float) -> None:
        """Learn from the log of a copy as much as its readers may need: of its first event, and of its last."""
        log = self.log
        for seq in sorted({log.seq_first, log.seq_next - 1} - {log.seq_next}):
            if seq >= log.seq_first:
                self._see(seq, log.read(log.seek(seq), bytes_max=1)[0][1], now)

    def replace_log(self, fresh: ReplayLog, now: float) -> None:
        """The owner's log has started over: go on with `fresh`, which has this log's last event or follows it at once.

        Raises ValueError for any other log: between the two events would be missing.
        """
        log = self.log
        seq = log.seq_next
        if not fresh.seq_first <= seq <= fresh.seq_next:
            raise ValueError("a log that doesn't continue the stream")
        log.replace(fresh)
        self._hand_out_from(log.seek(seq), seq, now, shows_first=True)

    def _hand_out_from(self, cursor: Cursor, seq: int, now: float, *, shows_first: bool) -> None:
        """Give the log's newest events, from `seq` on, to every reader. `shows_first`: of each template's texts the
        first may be the event that the template was learnt from, and append() would have looked into it.
        """
        events: list[bytes] = []
        was_text = False
        for event, is_text in self.log.extension(cursor):
            if not is_text or (shows_first and not was_text) or seq == 1:
                self._see(seq + len(events), event, now)
            was_text = is_text
            events.append(event)
        if not events:
            return
        joined = sse.frames(self.id_prefix, seq, events)
        self.frame_bytes += len(joined)
        self.touched_at = now
        self.hand_out_run(events, joined)

    def append_pieces(self, pieces: list[bytes], now: float) -> None:
        """Events and loose lines of a read, in order; neighbouring events go out in a single write.

        Loose lines beyond LOOSE_WRITES_MAX follow all events of the read, in a single write: they have no seq.
        """
        if len(pieces) == 1 and pieces[0][-2:] == b"\n\n":  # is_event(), without its call
            self.append(pieces[0], now)
            return
        events: list[bytes] = []
        events_bytes = loose_writes = 0
        late: list[bytes] = []
        for piece in pieces:
            is_event = sse.is_event(piece)
            if not is_event and loose_writes == LOOSE_WRITES_MAX:
                late.append(piece)
                continue
            if events and not (is_event and events_bytes + len(piece) <= APPEND_BYTES_MAX):
                self.append_all(events, now)
                events, events_bytes = [], 0
            if is_event:
                events.append(piece)
                events_bytes += len(piece)
            else:
                loose_writes += 1
                self.loose(piece, now)
        if events:
            self.append_all(events, now)
        if late:
            self.loose(b"".join(late), now)

    def take_strays(self, lines: bytes, before: list[bytes], *, dropped: bool) -> list[bytes]:
        """Lines of the upstream's that no parser takes: the events that they stand for. If they stand for none and no
        reader gets them, they are counted for the log.
        """
        progress = self.progress
        events, is_failure = stray_events(self.dialect, lines, sequence_number=self._next_number(before))
        if is_failure:
            progress.failed = True  # an unknown dialect doesn't know its event for an error
        if dropped and not events:
            strays = progress.strays = progress.strays or Strays()
            strays.add(lines)
        return events

    def behind_strays(self, pieces: list[bytes]) -> list[bytes]:
        """The first pieces, behind lines that were dropped. An error goes in front of `[DONE]`: an answer that was lost
        must not look like an empty answer.
        """
        first, strays = next(filter(sse.is_event, pieces), b""), self.progress.strays
        if strays is None or not sse.parse_event(first)[1].startswith(b"[DONE]"):
            return pieces
        lost = error_event(
            self.dialect,
            message=f"The upstream sent no event, but {strays.told()}.",
            type=UPSTREAM_ERROR,
            code=NOT_EVENTS,
            sequence_number=0,
        )
        self.progress.failed = True
        return [lost, *pieces]

    def _see(self, seq: int, event: bytes, now: float) -> None:
        """Parse an event that isn't plain text of a known shape, as the first event never is."""
        source = self.source
        if seq == 1:
            self.first_event_at = now
            if source is not None and source.watch is not None:
                source.watch.first_event(now)
        progress = self.progress
        known, had_ended, had_failed = progress.response_id, progress.terminal, progress.failed
        progress.see(event, self.log.text_events)
        if progress.text_events and not self.ledger.first_token_at:
            self.speak(now)
        if progress.response_id != known:
            self.keeper.stream_named(self)
        if progress.terminal and not had_ended and source is not None:
            if len(self.readers) == 1:  # of a crowd each has a turn of its own
                self.readers[0].share_packets()
            source.on_terminal(now)
        if self.fanout is not None and (progress.terminal, progress.failed) != (had_ended, had_failed):
            self.fanout.flush()

    def speak(self, now: float) -> None:
        """The first text has come; called once. A text that joins the template of an empty one isn't looked at: then
        the hub's next sweep finds it.
        """
        self.ledger.first_token_at = now
        if self.source is not None and self.source.watch is not None:
            self.source.watch.first_token(now)

    def loose(self, lines: bytes, now: float) -> None:
        """An upstream's comments, passed to live readers and stored nowhere. They take the place of a heartbeat if that
        is a comment, too; clients that count events still need theirs.
        """
        if self.dialect.api.heartbeat is sse.HEARTBEAT:
            self.touched_at = now
        if self.fanout is not None:
            self.fanout.loose(lines)
            return
        for reader in self.readers:
            try:
                reader.loose(lines)
            except Exception as error:
                reader.fail(error)

    # -- the end

    def seal(self, reason: CloseReason, now: float, *, clean: bool) -> None:
        """Take no more events. Readers end when they have all events. Called once; can't fail."""
        assert self.reason is None, f"sealed as {self.reason}, again as {reason}"
        self.reason = reason
        self.sealed_at = now
        self.ended_clean = clean
        self.source = None
        guard = self.keeper.guard
        try:
            self.keeper.stream_sealed(self)
        except Exception as error:
            guard.caught("stream.sealed", error)
        if self.fanout is not None and not self.direct:
            with guard:
                self.fanout.flush()
            return
        for reader in tuple(self.readers):
            try:
                reader.finish_if_done()
            except Exception as error:
                reader.fail(error)

    def fail(
        self, reason: CloseReason, now: float, *, message: str, code: str = "", failure: Failure | None = None
    ) -> None:
        """Seal after an error event in the stream's dialect: the log's last entry, for resuming readers too. `failure`
        is the upstream's own error, if it gave one.

        Can't fail: a stream whose error event can't be made, for lack of memory, is sealed without it.
        """
        if not self.terms.is_copy:  # its seqs are another's to give
            with self.keeper.guard:
                self._append_error(reason, now, message, code, failure)
        self.seal(reason, now, clean=False)

    def _append_error(self, reason: CloseReason, now: float, message: str, code: str, failure: Failure | None) -> None:
        next_number = self._next_number()
        if failure is not None:
            event = failure_event(self.dialect, failure, sequence_number=next_number)
        else:
            event = self._error(reason, message, next_number, code)
        self.append(event, now, synthetic=True)

    def _error(self, reason: CloseReason, message: str, sequence_number: int, code: str = "") -> bytes:
        """An error event of streamd's own, in the stream's dialect."""
        return error_event(
            self.dialect,
            message=message,
            type=UPSTREAM_ERROR if reason.by is By.UPSTREAM else "stream_error",
            code=code or reason.word,
            sequence_number=sequence_number,
        )

    def loss_event(self) -> bytes:
        """The error event for readers when the node of the stream is lost."""
        return self._error(CloseReason.NODE_LOST, NODE_LOST, self._next_number())

    def _next_number(self, before: list[bytes] | None = None) -> int:
        """The dialect's own number of an event that streamd adds, behind these pieces that aren't in the log yet."""
        if not self.dialect.api.numbered:
            return 0
        last = next(filter(sse.is_event, reversed(before or [])), None) or self.log.last_event()
        number = sequence_number_of(last) if last is not None else None
        return number + 1 if number is not None else 0

    def cancel(self, reason: CloseReason, now: float, *, message: str) -> None:
        """The rest is not wanted: end the source, tell the remaining readers, seal. No effect after the end."""
        if self.reason is not None:
            return
        self.stop_source(reason)
        self.fail(reason, now, message=message)

    def stop_source(self, reason: CloseReason) -> None:
        """Stop the source alone, at once. The caller calls cancel() afterwards."""
        source, self.source = self.source, None
        if source is not None:
            with self.keeper.guard:
                source.cancel(reason)

    # -- readers

    def add_reader(self, reader: Subscriber) -> None:
        """Take a reader; its start() follows."""
        reader.index = len(self.readers)
        self.readers.append(reader)
        self.update_push()
        if self.direct and len(self.readers) > DIRECT_READERS_MAX:
            self.use_fanout(self.keeper.new_fanout(self))

    def use_fanout(self, fanout: Fanout) -> None:
        """From here on events go out in passes."""
        self._count_anew(direct=False)
        self.fanout = fanout
        self.update_push()

    def update_push(self) -> None:
        """Set `push` anew: readers came or went, or the only reader has another push now."""
        self.push = self.readers[0].push if self.direct and len(self.readers) == 1 else None

    def maybe_direct(self) -> None:
        """If few readers are left and none waits for a pass, write to them directly again."""
        fanout = self.fanout
        few = len(self.readers) <= DIRECT_READERS_MAX // 2
        if self.direct or fanout is None or not few or fanout.running or fanout.batches:
            return
        self._count_anew(direct=True)
        self.fanout = None
        self.update_push()

    def _count_anew(self, *, direct: bool) -> None:
        """Switch how live readers are counted; all of them are at the log's end."""
        live = [reader for reader in self.readers if reader.state is SubscriberState.LIVE]
        for reader in live:
            reader.leave_live()
        self.direct = direct
        for reader in live:
            reader.enter_live()

    def leave(self, reader: Subscriber) -> None:
        """Remove a reader, which has ended. O(1): the last reader takes its place in the list.

        No effect on a reader that has not joined, or has left.
        """
        assert reader.state is SubscriberState.ENDED, reader.state
        if reader.index < 0:
            return
        last = self.readers.pop()
        if last is not reader:
            last.index = reader.index
            self.readers[reader.index] = last
        reader.index = -1
        self.update_push()
        self.drops += reader.dropped
        if not self.direct:
            self.maybe_direct()

    def grace_s(self, left: CloseReason) -> float:
        """How long the generation may go on after its last reader left; depends on which side closed the connection."""
        if left.by is By.READER:
            return self.terms.detach_grace_s
        return max(self.terms.detach_grace_s, self.terms.resume_grace_s)

    # -- reports

    def event_id(self, seq: int) -> str:
        """The SSE id of an event."""
        return f"{self.id_prefix[4:].decode()}{seq}"

    @property
    def events(self) -> int:
        return self.log.seq_next - 1

    @property
    def has_failed(self) -> bool:
        """Whether the stream ended without its whole answer, and not because a client wanted it to end."""
        if self.reason is None or self.reason is CloseReason.CANCELLED:
            return False
        return not self.ended_clean or self.reason is CloseReason.UPSTREAM_ERROR

    @property
    def text_events(self) -> int:
        """Events with text: the tokens of limits, until the upstream's usage corrects them."""
        return self.log.text_events + self.progress.text_events

    @property
    def text_bytes(self) -> int:
        return self.log.text_bytes + self.progress.text_bytes


class LogPlace(NamedTuple):
    """The place of a byte offset: subscribe from `seq`, after writing `rest`, the end of the event in front of it."""

    seq: int
    rest: bytes


class CountedStream(Stream):
    """A stream that is resumed from a number of bytes: the bytes of its events, end to end, without any framing.

    The total can't be derived from frame_bytes, because the chunk size of a frame varies by a digit, and a walk over
    the log can't count events that have fallen off. So it is counted, 30 ns an event, but only for streams that need
    it. A mark each MARK_EVENTS events keeps the search for an offset short.
    """

    __slots__ = ("_marks", "event_bytes")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.event_bytes = 0
        self._marks = [(1, 0)]  # pairs of a seq and the bytes in front of it

    def marks(self) -> tuple[tuple[int, int], ...]:
        """The argument of another process's take_marks()."""
        return tuple(self._marks)

    def take_marks(self, marks: tuple[tuple[int, int], ...], event_bytes: int) -> None:
        """Count on from the bytes of another process. Raises ValueError for marks that no stream of this length has."""
        ends = (*marks, (self.log.seq_next, event_bytes))
        is_rising = all(mark[0] < later[0] and mark[1] < later[1] for mark, later in pairwise(marks))
        if ends[0] != (1, 0) or not is_rising or ends[-2][0] > ends[-1][0] or ends[-2][1] > event_bytes:
            raise ValueError("a count of bytes with marks that can't be")
        self._marks, self.event_bytes = list(marks), event_bytes

    def append(self, event: bytes, now: float, *, synthetic: bool = False) -> None:
        self._mark()
        self.event_bytes += len(event)
        super().append(event, now, synthetic=synthetic)

    def append_if_templated(self, event: bytes, now: float) -> bytes:
        self._mark()
        frame = super().append_if_templated(event, now)
        if frame:
            self.event_bytes += len(event)
        return frame

    def append_run(self, events: list[bytes], now: float) -> bytes:
        self._mark()
        frames = super().append_run(events, now)
        if frames:
            self.event_bytes += sum(map(len, events))
        return frames

    def append_all(self, events: list[bytes], now: float) -> None:
        if len(events) > 1:
            self._mark()
            self.event_bytes += sum(map(len, events))
        super().append_all(events, now)

    def _mark(self) -> None:
        if self.log.seq_next - self._marks[-1][0] >= MARK_EVENTS:
            self._marks.append((self.log.seq_next, self.event_bytes))

    def place(self, offset: int) -> LogPlace | None:
        """Where a reader with `offset` bytes goes on; None below the log. offset <= event_bytes."""
        assert 0 <= offset <= self.event_bytes
        log = self.log
        index = bisect_right(self._marks, offset, key=lambda mark: mark[1]) - 1
        seq, at = self._marks[index]
        if seq < log.seq_first:
            later = next((mark for mark in self._marks[index:] if mark[0] >= log.seq_first), None)
            end, at = later or (log.seq_next, self.event_bytes)
            seq = log.seq_first
            at -= sum(len(event) for _, event in self._walk(seq, end))
        for number, event in self._walk(seq, log.seq_next):
            if offset < at:
                return None
            if offset == at:
                return LogPlace(number, b"")
            at += len(event)
            if offset < at:
                return LogPlace(number + 1, event[offset - at :])
        return LogPlace(log.seq_next, b"") if offset == at else None

    def _walk(self, seq: int, end: int) -> Iterator[tuple[int, bytes]]:
        """The events seq <= number < end, a small piece of the log at a time."""
        cursor = self.log.seek(seq)
        while cursor.seq < end:
            for number, event in self.log.read(cursor, bytes_max=self.terms.catchup_bytes_max):
                if number < end:
                    yield number, event
