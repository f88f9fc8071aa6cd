"""Readers of streams without connections: sinks with a peer that takes as many bytes as the test says, on a loop that
the test drives."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

from fakes import PLENTY, Read, event, events_in, text_of

from streamd.core.fanout import SlicedFanout
from streamd.core.hub import Hub
from streamd.core.ring import Ring
from streamd.core.stream import Form, Policy, Stream, Subscriber, SubscriberState
from streamd.reasons import CloseReason
from streamd.wire.chunked import ChunkedDecoder
from streamd.wire.dialect import Dialect

RING_SLOTS = 32
RING_BYTES_MAX = 32 * 1024


class Loop:
    """The part of a loop that core modules use: turns, and timers that fire when the test says so."""

    def __init__(self) -> None:
        self.turns: deque[Callable[[], None]] = deque()
        self.timers: list[Timer] = []
        self.now = 0.0
        self.held_s: list[float] = []  # of each pass of a dispatcher, how long its first event has waited

    def soon(self, turn: Callable[[], None]) -> None:
        self.turns.append(turn)

    def later(self, seconds: float, turn: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self, seconds, turn))
        return self.timers[-1]

    def time(self) -> float:
        return self.now

    def turn(self) -> None:
        """Run the callbacks that are scheduled now, but not those that they schedule."""
        for _ in range(len(self.turns)):
            self.turns.popleft()()

    def rest(self) -> None:
        """Run turns until no callback is left."""
        while self.turns:
            self.turn()

    def ring(self) -> None:
        """Let the time pass until each timer has fired, and run until no callback is left."""
        timers, self.timers = self.timers, []
        for timer in sorted(timers, key=lambda timer: timer.at):
            self.now = max(self.now, timer.at)
            timer.turn()
        self.rest()

    def fanout(self, stream: Stream, interval_s: float = 0.0) -> SlicedFanout:
        """A dispatcher with a fixed write interval."""
        return SlicedFanout(
            stream,
            soon=self.soon,
            later=self.later,
            time=self.time,
            interval_s=lambda: interval_s,
            on_pass=self.held_s.append,
        )


class Timer:
    """A call that the loop makes when the test says so, unless it is cancelled before."""

    def __init__(self, loop: Loop, seconds: float, turn: Callable[[], None]) -> None:
        self.loop = loop
        self.seconds = seconds
        self.at = loop.now + seconds
        self.turn = turn

    def cancel(self) -> None:
        self.loop.timers.remove(self)


class Watched:
    """The times of a generation's firsts."""

    def __init__(self) -> None:
        self.first_event_at = self.first_token_at = 0.0

    def first_event(self, now: float) -> None:
        self.first_event_at = now

    def first_token(self, now: float) -> None:
        self.first_token_at = now


class Source:
    """The source of a test's events."""

    def __init__(self, *, needs_reader: bool = True) -> None:
        self.needs_reader = needs_reader
        self.cancelled: list[CloseReason] = []
        self.terminal_at = 0.0  # when the stream told its last event
        self.watch = Watched()

    def cancel(self, reason: CloseReason) -> None:
        self.cancelled.append(reason)

    def on_terminal(self, now: float) -> None:
        self.terminal_at = now


class Reader:
    """A subscriber with its sink. The peer takes `capacity` bytes and then no more until take()."""

    def __init__(
        self,
        stream: Stream,
        loop: Loop,
        *,
        policy: Policy = Policy.COALESCE,
        form: Form = Form.CHUNKED,
        capacity: int = PLENTY,
        seq: int = 1,
        leave: Callable[[Subscriber], None] | None = None,
        slots: int = RING_SLOTS,
    ) -> None:
        self.stream = stream
        self.loop = loop
        self.capacity = capacity
        self.sent = bytearray()
        self.held = bytearray()
        self.frames: list[bytes] = []  # the objects of all writes
        self.large_parts: list[bytes | memoryview] = []
        self.paused = False
        self.ended: bool | None = None  # as stream_ended() said: clean or not
        self.cut = 0  # slow_consumer()
        self.refusals: list[Exception] = []  # refused()
        self.refuses = False  # from now on every write raises
        self._leave = leave or stream.leave
        self.left = False
        self.subscriber = Subscriber(stream, self, policy=policy, ring=Ring(slots, RING_BYTES_MAX), form=form)
        stream.add_reader(self.subscriber)
        self.subscriber.start(seq)

    # -- Sink

    def write(self, frame: bytes) -> None:
        assert frame, "an empty write"
        if self.refuses:
            raise MemoryError
        assert not self.paused, "a write to a paused transport"
        self.frames.append(frame)
        self.held += frame
        self._flush()
        if self.held:
            self.paused = True
            self.subscriber.pause()

    def write_large(self, parts: list[bytes | memoryview]) -> None:
        self.large_parts += parts
        self.write(b"".join(parts))

    def soon(self, turn: Callable[[], None]) -> None:
        self.loop.soon(turn)

    def stream_ended(self, clean: bool) -> None:
        assert self.ended is None and not self.cut
        self.ended = clean
        self.leave()  # as a connection does, before this returns

    def share_packets(self) -> None:
        pass  # no packets here

    def slow_consumer(self) -> None:
        assert self.ended is None
        self.cut += 1
        self.loop.soon(self.leave)  # as a connection does, from connection_lost()

    def refused(self, error: Exception) -> None:
        self.refusals.append(error)
        self.loop.soon(self.leave)

    # -- the peer

    def take(self, count: int = PLENTY) -> None:
        self.capacity += count
        self._flush()
        if self.paused and not self.held:
            self.paused = False
            if self.state is not SubscriberState.ENDED:
                self.subscriber.resume()

    def stall(self) -> None:
        self.capacity = 0

    def leave(self) -> None:
        if not self.left:
            self.left = True
            self.subscriber.end()
            self._leave(self.subscriber)

    def _flush(self) -> None:
        taken = min(self.capacity, len(self.held))
        self.sent += self.held[:taken]
        del self.held[:taken]
        self.capacity -= taken

    # -- the received bytes

    @property
    def state(self) -> SubscriberState:
        return self.subscriber.state

    @property
    def body(self) -> bytes:
        """All written bytes without HTTP's framing."""
        written = bytes(self.sent + self.held)
        if self.subscriber.form in (Form.BARE, Form.RAW_BARE, Form.DATA_BARE):
            return written
        return b"".join(ChunkedDecoder().feed(written))

    @property
    def events(self) -> list[Read]:
        return events_in(self.body)

    @property
    def seqs(self) -> list[int]:
        return [each.seq for each in self.events if each.name != "gap"]

    @property
    def gaps(self) -> list[tuple[int, int]]:
        return [(each.json["gap"]["from"], each.json["gap"]["to"]) for each in self.events if each.name == "gap"]

    @property
    def text(self) -> str:
        return text_of(self.events)


def new_hub(loop: Loop | None = None, **bounds: int) -> Hub:
    given: dict[str, Any] = {
        "log_bytes_max": 1 << 30,
        "stream_log_bytes_max": 1 << 20,
        "stream_log_events_max": 100_000,
        "detached_max": 100,
    }
    hub = Hub(**{**given, **bounds})
    hub.new_fanout = (loop or Loop()).fanout
    return hub


def new_stream(loop: Loop | None = None, dialect: Dialect = Dialect.CHAT, **bounds: int) -> Stream:
    """A stream of a new hub."""
    return new_hub(loop, **bounds).open(dialect, 0.0)


def agree(stream: Stream, **terms: Any) -> None:
    """Change some of a stream's terms, which it is opened with elsewhere."""
    stream.terms = dataclasses.replace(stream.terms, **terms)


def feed(stream: Stream, count: int, *, now: float = 1.0) -> str:
    """Append `count` deltas one by one, each with its seq as text; return their texts."""
    said = ""
    for _ in range(count):
        text = f"{stream.log.seq_next} "
        stream.append(event(text), now)
        said += text
    return said


def said(stream: Stream) -> str:
    """The text of all events, if feed() made all of them."""
    return "".join(f"{seq} " for seq in range(1, stream.log.seq_next))
