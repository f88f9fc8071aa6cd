"""SlicedFanout: events to ten thousand readers, without the loop standing still meanwhile.

A write costs about 10 us, so ten thousand are 0.1 s in which nothing else would be accepted, relayed or answered.
With more than DIRECT_READERS_MAX readers (or while its events wait for each other) a stream hands its frames to this
dispatcher instead. It goes over the readers in passes, `SLICE_MAX` readers a loop turn. Each reader gets all frames
that are new since the last pass, in a single write. While a pass is under way new events only join the frames at hand:
when the machine is busy, passes take in more events each and the cost per event falls by itself.

A pass begins in the next turn of the loop, or once the interval is over since the pass before began, so the first event
after a silence never waits. A terminal event, an error or the seal ends the wait (flush()), and so do frames that fill
a half of the room for them.

Bounds: the frames at hand keep to FRAMES_MAX and FRAMES_BYTES_MAX, but a single frame may be of any size. If a reader's
next frame is no longer among them, it is served from the replay log like any other that lags. Readers that join, leave
or end between slices harm nothing: a pass goes over a snapshot, each reader knows its own position, and readers that
have ended are skipped.

When a pass is over, all readers have the frames that were at hand when it began: those of the snapshot from the pass,
those that joined meanwhile because they went LIVE at the log's end. So these frames are dropped. Another pass is needed
only for news since then: events, comments, or the seal, of which the readers in front of the slice have not been told.

Rejected: a queue per reader (memory), timestamps to decide which readers are due (positions say it), a slice measured
in time (reading the clock for each reader costs more than the unevenness).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from streamd.core.stream import LARGE_EVENT_BYTES_MIN, Stream, Subscriber, SubscriberState

# Readers served in a loop turn: 256 writes of 10 us are 2.6 ms, well under the 20 ms between two tokens of the fastest
# streams beside them.
SLICE_MAX = 256

# Bounds of the frames at hand. A pass over 10,000 readers takes 0.1 to 0.2 s: 10 events at 50 a second, 100 (25 KB) at
# 500 a second. Not more, because all new frames go out in a single write, which may stay whole in the buffer of a
# reader that stalls at it.
FRAMES_MAX = 256
FRAMES_BYTES_MAX = 64 * 1024

Soon = Callable[[Callable[[], None]], object]


class Timer(Protocol):
    """A call that is planned."""

    def cancel(self) -> None:
        """Don't call."""


Later = Callable[[float, Callable[[], None]], Timer]


def _no_wait() -> float:
    return 0.0


def _not_counted(held_s: float) -> None:
    """Does nothing with a pass."""


class SlicedFanout:
    """The dispatcher of a stream. Invariant: frames at hand are the seqs first <= seq < log.seq_next."""

    __slots__ = (
        "_at",
        "_begun_at",
        "_bytes",
        "_end_at_start",
        "_first",
        "_frames",
        "_interval_s",
        "_is_urgent",
        "_later",
        "_loose",
        "_loose_of_pass",
        "_on_pass",
        "_readers",
        "_sealed_at_start",
        "_soon",
        "_stream",
        "_time",
        "_timer",
        "_waits_since",
        "running",
    )

    def __init__(
        self,
        stream: Stream,
        *,
        soon: Soon,
        later: Later,
        time: Callable[[], float] = _no_wait,
        interval_s: Callable[[], float] = _no_wait,
        on_pass: Callable[[float], None] = _not_counted,
    ) -> None:
        """`interval_s` is asked for the present interval in seconds; `on_pass` hears, for each pass with new events,
        how long the first of them has waited.
        """
        self._stream = stream
        self._soon = soon
        self._later = later
        self._time = time
        self._interval_s = interval_s
        self._on_pass = on_pass
        self._frames: deque[bytes] = deque()  # bounded in add()
        self._bytes = 0
        self._first = stream.log.seq_next
        self._loose = b""  # the newest comments
        # wait
        self._timer: Timer | None = None  # of the next pass
        self._waits_since = 0.0  # when _wake() planned the next pass
        self._begun_at = -math.inf  # when the pass before began
        self._is_urgent = False  # the next pass doesn't wait
        # pass
        self.running = False
        self._readers: tuple[Subscriber, ...] = ()
        self._at = 0
        self._end_at_start = 0
        self._sealed_at_start = False
        self._loose_of_pass = b""

    def add(self, seq: int, frame: bytes) -> None:
        """Take the frame of a new event, which the log has already."""
        assert seq == self._first + len(self._frames), f"{seq} after {self._first} + {len(self._frames)}"
        self._frames.append(frame)
        self._bytes += len(frame)
        while len(self._frames) > FRAMES_MAX or (self._bytes > FRAMES_BYTES_MAX and len(self._frames) > 1):
            self._drop_first()
        if len(self._frames) > FRAMES_MAX // 2 or self._bytes > FRAMES_BYTES_MAX // 2:
            self.flush()
        elif not self.running:
            self._wake()

    def _drop_first(self) -> None:
        self._bytes -= len(self._frames.popleft())
        self._first += 1

    def loose(self, lines: bytes) -> None:
        """Take comments for the readers that the next pass finds at the live end; the newest replace the older."""
        self._loose = lines
        self._wake()

    def flush(self) -> None:
        """Don't wait for further events: a terminal event is the next, or the stream was sealed, or much is at hand."""
        self._is_urgent = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._soon(self._begin)
        else:
            self._wake()

    @property
    def batches(self) -> bool:
        """Whether events wait for each other, so that a few readers too are served in passes."""
        return self._interval_s() > 0

    def _wake(self) -> None:
        if self.running:
            return
        self.running = True
        now = self._waits_since = self._time()
        wait_s = 0.0 if self._is_urgent else self._begun_at + self._interval_s() - now
        if wait_s > 0:
            self._timer = self._later(wait_s, self._begin)
        else:
            self._soon(self._begin)

    def _begin(self) -> None:
        """Begin a pass over the readers of this moment."""
        now = self._begun_at = self._time()
        self._timer = None
        self._is_urgent = False
        if self._frames:
            self._on_pass(now - self._waits_since)
        self._readers = tuple(self._stream.readers)
        self._at = 0
        self._end_at_start = self._stream.log.seq_next
        self._sealed_at_start = self._stream.reason is not None
        self._loose_of_pass, self._loose = self._loose, b""
        self._turn()

    def _turn(self) -> None:
        """Serve the next slice of the pass."""
        stream, live = self._stream, SubscriberState.LIVE
        end, end_bytes = stream.log.seq_next, stream.frame_bytes
        pieces: dict[int, bytes] = {}  # position to all frames from there, made once a slice and shared
        position, piece = -1, b""  # of the reader before: nearly all readers of a slice stand at the same place
        readers = self._readers[self._at : self._at + SLICE_MAX]
        for reader in readers:
            try:
                if reader.state is live:
                    if reader.own_position != position:
                        if not self._has_next_of(reader, end):
                            continue
                        piece = pieces.get(reader.own_position) or self._from(reader.own_position)
                        pieces[reader.own_position] = piece
                        position = reader.own_position
                    if len(piece) >= LARGE_EVENT_BYTES_MIN:
                        reader.lag()  # the log has it without a copy
                        continue
                    reader.own_position = end
                    reader.own_bytes = end_bytes
                    reader.write(piece)
                elif reader.state is SubscriberState.PAUSED:
                    self._serve_paused(reader, end)
                elif reader.state is SubscriberState.FOLLOWING:
                    reader.push(b"")
            except Exception as error:
                reader.fail(error)
        self._say_the_rest(readers)
        self._at += SLICE_MAX
        if self._at < len(self._readers):
            self._soon(self._turn)
        else:
            self._end_pass()

    def _has_next_of(self, reader: Subscriber, end: int) -> bool:
        """Whether the frames at hand have news for this LIVE reader. If its next frame is gone, it lags."""
        if reader.own_position == end:
            return False
        if reader.own_position < self._first:
            reader.lag()
            return False
        return True

    def _say_the_rest(self, readers: tuple[Subscriber, ...]) -> None:
        """Give the readers the comments, and the end, which follow the events."""
        sealed, loose = self._stream.reason is not None, self._loose_of_pass
        if sealed or loose:
            for reader in readers:
                try:
                    if loose:
                        reader.loose(loose)
                    if sealed:
                        reader.finish_if_done()
                except Exception as error:
                    reader.fail(error)

    def _serve_paused(self, reader: Subscriber, end: int) -> None:
        """Push the frames into the reader's ring; stop when an overflow, by the policy, ends its pause."""
        seq = reader.position + reader.ring.held
        if seq < self._first:
            reader.frames_gone(self._first)
            seq = self._first
        for k in range(seq - self._first, end - self._first):
            if reader.state is not SubscriberState.PAUSED:
                return
            reader.push(self._frames[k])

    def _from(self, position: int) -> bytes:
        skip = position - self._first
        if skip == len(self._frames) - 1:
            return self._frames[-1]
        return b"".join(list(self._frames)[skip:])

    def _end_pass(self) -> None:
        """Drop the frames that all readers have; begin another pass if there is news."""
        stream = self._stream
        self._readers = ()
        self.running = False
        while self._frames and self._first < self._end_at_start:
            self._drop_first()
        if self._frames or self._loose or (stream.reason is not None and not self._sealed_at_start):
            self._wake()
        else:
            stream.maybe_direct()
