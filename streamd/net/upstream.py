"""UpstreamConnection and Upstream: a connection to an inference server, and the server with its pool and its health.

A connection carries a single request at a time:

    IDLE     in the pool; a byte or a close here takes it out
    HEAD     a request is out, its answer's head is awaited
    OPENING  the first bytes of the answer's body go to the exchange, which decides between the next two
    BODY     the answer's body goes to the exchange as bytes
    EVENTS   the answer's body is a stream: events go straight into it
    CLOSED

EVENTS is the hot path: data_received keeps the bytes read, and at the end of the loop's turn append_if_templated()
makes them a frame in the common case. All other bytes go through the chunked decoder, the splitter and Stream.append:
work() takes a turn's share of them (net/turns.py). While more wait, nothing is read, and an end of the connection waits
behind them.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from pathlib import Path
from typing import Protocol, cast

from streamd.choice import Choice
from streamd.config import UpstreamSettings
from streamd.core.guard import guarded
from streamd.core.health import Health
from streamd.core.stream import Stream
from streamd.files import read_regular
from streamd.keepalive import set_keepalive
from streamd.net.dialer import Dialer
from streamd.net.pacing import Pacing
from streamd.net.proxy_tunnel import open_tunnel
from streamd.net.read_batch import ReadBatch
from streamd.net.reading import BACKPRESSURE, PACE, READ_BYTES_MAX, TURN, pause_reading, read_past, resume_reading
from streamd.net.runtime import Runtime
from streamd.net.tls_files import TlsFilesError, load_pair
from streamd.net.turns import CONNECTION_PIECES_MAX, STEP_SIZES_BYTES, TakesTurns, event_pieces, pieces_of, step_bytes
from streamd.reasons import CloseReason
from streamd.wire import inner
from streamd.wire.chunked import BodyDecoder, ChunkedDecoder, decoder_for
from streamd.wire.fast_chunk import chunk_bytes, one_chunk, several_chunks
from streamd.wire.http1 import (
    RESPONSE_OPENING,
    Framing,
    HeadReader,
    RemoteProtocolError,
    ResponseHead,
    parse_response,
)
from streamd.wire.inflate import STATE_BYTES, InflatingDecoder
from streamd.wire.json_lines import JsonLines
from streamd.wire.quick_head import whole_head
from streamd.wire.sse import EventSplitter, EventTooLarge

# The work on an answer's head, in pieces: 30 to 60 us.
HEAD_PIECES = 8

# The work on a block with lines that are no part of an event, in pieces: up to 10 us, most of it for JSON.
STRAY_PIECES = 2

# Interim answers (1xx) in front of an answer. A server sends one or two, or a 102 every 20 s of a long request
# (RFC 2518 10.1): an hour of these are 180, and no generation's head takes that long.
INTERIM_ANSWERS_MAX = 64

# Bytes of a connection that its peer has acknowledged when nothing was sent on it: the SYN.
_ACKED_BYTES_MIN = 1
# tcpi_bytes_acked of Linux' struct tcp_info (since 4.1): a u64 at 120.
_TCP_INFO = struct.Struct("=120xQ")

# Mozilla's whole bundle is 230 KB.
CA_FILE_BYTES_MAX = 4 * 1024 * 1024


class UpstreamState(Choice):
    """The state of a connection to an upstream; the module's docstring explains each."""

    IDLE = "idle"
    HEAD = "head"
    OPENING = "opening"
    BODY = "body"
    EVENTS = "events"
    CLOSED = "closed"


TRANSITIONS: dict[UpstreamState, frozenset[UpstreamState]] = {
    UpstreamState.IDLE: frozenset((UpstreamState.HEAD, UpstreamState.CLOSED)),
    UpstreamState.HEAD: frozenset((UpstreamState.OPENING, UpstreamState.BODY, UpstreamState.CLOSED)),
    UpstreamState.OPENING: frozenset(
        (UpstreamState.BODY, UpstreamState.EVENTS, UpstreamState.IDLE, UpstreamState.CLOSED)
    ),
    UpstreamState.BODY: frozenset((UpstreamState.EVENTS, UpstreamState.IDLE, UpstreamState.CLOSED)),
    UpstreamState.EVENTS: frozenset((UpstreamState.IDLE, UpstreamState.CLOSED)),
    UpstreamState.CLOSED: frozenset(),
}


class Asker(Protocol):
    """The sender of a request, which gets its answer."""

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        """The final head. Calls take_opening() or take_body() on the link, or aborts it."""

    def on_piece(self, piece: bytes) -> None:
        """Bytes of the body, in OPENING, where it may call read_events() or read_body(), and in BODY, where it may call
        read_events().
        """

    def on_end(self, link: UpstreamConnection) -> None:
        """The framing ended properly; the link is in the pool or closed already."""

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        """The answer can't be completed; the link is closed."""

    def on_bug(self, where: str, error: Exception) -> None:
        """A callback raised while the answer was read; the link is closed. Counts the error, and never raises."""


def _is_unread(transport: asyncio.Transport, exc: Exception | None) -> bool:
    """Whether the peer ended the connection, by FIN or by a loss, without reading what was sent: it did no work.

    That is certain if its system acknowledged no byte, or answered the bytes behind a FIN with a reset. A reset
    alone proves nothing: a program may have read everything and broken off.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family == socket.AF_UNIX:
        return False
    try:
        if exc is None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return True
        (acked,) = _TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except (OSError, struct.error):
        return False
    return bool(acked <= _ACKED_BYTES_MIN)


class _UpstreamPerToken:
    """The attributes that a token touches. Slots of a base class come first, so they are neighbours in memory."""

    __slots__ = ("_fast_path", "_read", "_read_batch", "at", "read_at", "stream")

    at: UpstreamState
    _read_batch: ReadBatch
    _read: bytes | None  # bytes that were read and not processed yet; empty while only a decoder holds some
    _fast_path: bool  # EVENTS, with both decoders between two pieces; then `stream` is set
    read_at: float  # the time of the turn in which it was read last, while there are write intervals (net/pacing.py)
    stream: Stream | None


class UpstreamConnection(_UpstreamPerToken, TakesTurns, asyncio.Protocol):
    """A connection to an inference server."""

    _runtime: Runtime

    __slots__ = (
        "__weakref__",
        "_asker",
        "_bodiless",
        "_decoder",
        "_ended_by",
        "_heads",
        "_held_bytes",
        "_interim_answers",
        "_keep_alive",
        "_runtime",
        "_splitter",
        "_unsent_bytes",
        "answers",
        "any_byte",
        "idle_since",
        "pauses",
        "touched_at",
        "transport",
        "turned_away",
        "upstream",
    )

    def __init__(self, runtime: Runtime, upstream: Upstream) -> None:
        # process
        self._runtime = runtime
        self._read_batch = runtime.read_batch
        self.upstream = upstream
        # connection
        self.at = UpstreamState.IDLE
        self.transport: asyncio.Transport
        self.answers = 0  # complete answers so far: above 0 the connection is reused
        self.idle_since = 0.0
        self.pauses = 0  # reasons for which the socket isn't read (net/reading.py)
        self._ended_by: tuple[Exception | None] | None = None  # the end of the connection, behind bytes that wait
        # request
        self._asker: Asker | None = None
        self._bodiless = "GET"  # the request's method: an answer to HEAD has no body
        self.any_byte = False  # whether a byte of this answer has come
        self.turned_away = False  # the connection ended, and the peer has not read the request
        self._heads: HeadReader | None = None
        self._held_bytes = 0  # of a head or an event that has begun, or for a slow reader, as charged to admission
        self._unsent_bytes = 0  # of a slow reader's transport
        self._interim_answers = 0
        self._keep_alive = False
        # answer
        self._decoder: BodyDecoder | None = None
        self._splitter: EventSplitter | None = None
        self.stream = None
        self._read = None
        self._fast_path = False
        # Time of the last sign of life: any bytes in BODY, in EVENTS comments, blank lines and the end of a pause. A
        # stream has its own.
        self.touched_at = 0.0
        self.read_at = 0.0

    # -- transport callbacks

    @guarded
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has another base
        self.transport = transport
        if self.at is UpstreamState.CLOSED:  # given up while it was being established
            transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            set_keepalive(sock)

    def data_received(self, data: bytes) -> None:
        try:
            if self.at is UpstreamState.EVENTS and self._read is None:
                self._read = data
                self._read_batch.at_end(self)
                return
            if self.at is UpstreamState.IDLE:
                self.close()  # no request is out, so these bytes belong to none
                return
            self._read = data if self._read is None else self._read + data
            self.flush_read()
        except Exception as error:  # Why not @guarded: a token comes this way
            self.crash("upstream.data_received", error)

    def append_if_templated(self, now: float) -> bytes:
        """The turn ends. The common case: the read is a single chunk with an event of a shape that the log knows."""
        data = self._read
        if data is not None and self._fast_path:
            event = one_chunk(data)
            if event is not None:
                # _fast_path implies a stream
                frame = self.stream.append_if_templated(event, now)  # type: ignore[union-attr]
                if frame:
                    self._read = None
                    return frame
        return b""

    def append_run(self, now: float) -> tuple[list[bytes], bytes]:
        """The turn ends. The common case under load: several chunks, each an event of a shape that the log knows.

        Returns the events that were taken, and their frames; other bytes of the read stay.
        """
        data = self._read
        if data is not None and self._fast_path:
            events = several_chunks(data)
            if events is not None:
                count = len(events)
                frames = self.stream.append_run(events, now)  # type: ignore[union-attr]
                if frames:
                    self._read = data[sum(map(chunk_bytes, events)) :] if len(events) < count else None
                    return events, frames
        return [], b""

    def flush_read(self) -> None:
        """The turn ends, or another event comes first: process the bytes that wait, of any shape."""
        if self._read is None:
            return
        if self.pauses & (TURN | BACKPRESSURE):  # the next turn, or the reader's resume, goes on with them
            if self.pauses & BACKPRESSURE:
                self._charge_held()
            return
        self.work_or_wait()

    def rest(self, pacing: Pacing, since_s: float, now: float) -> bool:
        """What was read is processed: read the next events later, all of them together (net/pacing.py). True if so."""
        stream = self.stream
        if stream is None or self.pauses & ~PACE or self._read is not None or self.at is not UpstreamState.EVENTS:
            return False
        if stream.progress.terminal:  # the end of the framing is awaited, for the next request
            return False
        return pacing.rest(self, stream.terms.write_interval, since_s, now)

    def read_rested(self) -> bool:
        """A rest is over: take what has come meanwhile, with the transport still at rest. False: it has to read on."""
        if self.pauses != PACE or self._read is not None or self.at is not UpstreamState.EVENTS:
            return False
        if self.upstream.settings.origin.tls:
            return False  # the socket's bytes are ciphertext
        try:
            data = read_past(self.transport)
        except OSError as error:
            self._end(error)
            return False
        if data:
            self.data_received(data)
        return 0 < len(data) < READ_BYTES_MAX

    @property
    def share(self) -> str:
        return f"upstream {self.upstream.settings.name}"

    @guarded
    def work(self) -> bool:
        """Process a turn's share of the bytes that were read. True: more wait for the next turn."""
        left = CONNECTION_PIECES_MAX
        while (data := self._read) is not None and left > 0 and not self._is_held_back(data):
            size = self._step_bytes(data)
            if size >= len(data):
                self._read = None
            else:
                self._read, data = data[size:], data[:size]
            left -= self._take(data)
            if self._read is None and self._waits_in_decoder:
                self._read = b""
        self._runtime.turns.spend(CONNECTION_PIECES_MAX - left)
        if self.at is UpstreamState.CLOSED:
            return False
        if self._read is None and self._ended_by is not None:
            (exc,), self._ended_by = self._ended_by, None
            self._ended(exc)
            return False
        if left <= 0 or (self._read is not None and not self.pauses & BACKPRESSURE):
            return True
        resume_reading(self, TURN)
        return False

    def _is_held_back(self, data: bytes) -> bool:
        """Whether these bytes wait for a slow reader. A small rest goes to it at once: it may end the answer, and then
        the connection is free for another request.
        """
        return bool(self.pauses) and bool(self.pauses & BACKPRESSURE) and len(data) > STEP_SIZES_BYTES[0]

    @property
    def _waits_in_decoder(self) -> bool:
        """Whether more comes out of an encoded body before further bytes may go in."""
        decoder = self._decoder
        return type(decoder) is InflatingDecoder and decoder.has_more

    def _step_bytes(self, data: bytes) -> int:
        """How many of the first bytes of `data` to process at once, so that the work on them is bounded."""
        if self._waits_in_decoder:
            return 0
        if self.at is UpstreamState.BODY and type(self._decoder) is not ChunkedDecoder:
            return STEP_SIZES_BYTES[0]  # passed on as they are
        return step_bytes(data)

    def _take(self, data: bytes) -> int:
        """Process bytes; returns the work done, in pieces."""
        try:
            if self.at is UpstreamState.EVENTS:
                return self._take_events(data)
            if self.at in (UpstreamState.BODY, UpstreamState.OPENING):
                return self._take_body(data)
            if self.at is UpstreamState.HEAD:
                return self._take_head(data)
        except RemoteProtocolError as broken:
            self._take_before(broken.before)
            self._break(CloseReason.UPSTREAM_PROTOCOL, f"The upstream's answer is malformed: {broken}.")
        except (EventTooLarge, inner.SentAway) as end:
            self._end_by(end)
        return pieces_of(len(data))

    def _end_by(self, end: EventTooLarge | inner.SentAway) -> None:
        """Something in the stream ends it; the pieces in front are delivered."""
        self._append(end.before)
        self._break(*reason_of(end))

    def _take_before(self, payloads: list[bytes]) -> None:
        """Deliver the payloads that were complete before a malformed part of the same read."""
        try:
            if self._splitter is not None:
                self._append(self._splitter.feed(b"".join(payloads)))
            elif payloads and self._asker is not None:
                self._asker.on_piece(b"".join(payloads))
        except (EventTooLarge, inner.SentAway) as end:
            self._append(end.before)

    @guarded
    def eof_received(self) -> bool:
        self._end(None)
        return False

    @guarded
    def connection_lost(self, exc: Exception | None) -> None:
        """The end. uvloop tells of TLS's own end by eof_received() before, and of a bare FIN under TLS only here."""
        if exc is None and self.at is not UpstreamState.CLOSED and self.transport.get_extra_info("ssl_object"):
            exc = ssl.SSLEOFError("the connection ended without close_notify")
        self._end(exc)

    def _end(self, exc: Exception | None) -> None:
        """The connection has ended, but the bytes that it sent before come first."""
        self.flush_read()
        if self._read is None:
            self._ended(exc)
        elif self._ended_by is None:
            self._ended_by = (exc,)

    # -- requests out

    def send(self, request: bytes, asker: Asker, *, method: str) -> None:
        """Send a whole request; its answer goes to the asker."""
        self._go(UpstreamState.HEAD)
        self._asker = asker
        self._bodiless = method
        self.any_byte = False
        self._interim_answers = 0
        self.transport.write(request)

    def take_opening(self, head: ResponseHead, coding: bytes | None = None) -> None:
        """The body's first bytes decide whether it is a stream; called from on_head(). `coding` is undone."""
        self._go(UpstreamState.OPENING)
        self._begin_body(head, coding)

    def read_events(self, stream: Stream, first: bytes, *, is_inner: bool = False, has_lines: bool = False) -> None:
        """The body is a stream; called from on_piece(), with all of it that has come. is_inner: the upstream is another
        streamd. has_lines: the events are lines of JSON.
        """
        self._go(UpstreamState.EVENTS)
        self.stream = self._runtime.held_back(stream)
        self._read_batch.pacing.enter(stream.terms.write_interval)
        size, api = self._runtime.settings.event_bytes_max, stream.dialect.api
        if has_lines:
            self._splitter = JsonLines(api, event_bytes_max=size, strays=stream)
        else:
            self._splitter = inner.splitter_for(api.heartbeat, is_inner=is_inner, event_bytes_max=size, strays=stream)
        self._split([first], self._splitter, stream)

    def read_body(self) -> None:
        """The body is bytes; called from on_piece()."""
        self._go(UpstreamState.BODY)
        self.touched_at = self._runtime.time()

    def take_body(self, head: ResponseHead, coding: bytes | None = None) -> None:
        """The body is bytes; called from on_head(). `coding` is undone."""
        self._go(UpstreamState.BODY)
        self.touched_at = self._runtime.time()
        self._begin_body(head, coding)

    def close(self) -> None:
        """Close the connection at once, even with a request under way."""
        if self.at is UpstreamState.CLOSED:
            return
        self.upstream.forget(self)
        self._go(UpstreamState.CLOSED)
        self._fast_path = False
        self._read = None
        self._unsent_bytes = 0
        if self._asker is not None:
            with self._runtime.guard:
                _hang_up(self.transport)
        self._leave_stream()
        self._asker = self._splitter = self._decoder = self._heads = None
        self._charge_held()
        self.transport.abort()

    def _leave_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            self._read_batch.pacing.leave(stream.terms.write_interval)

    def give_up(self) -> None:
        """close(), also for a connection that isn't established yet."""
        if hasattr(self, "transport"):
            self.close()
        else:
            self._go(UpstreamState.CLOSED)

    @property
    def unwritten_bytes(self) -> int:
        """Bytes of the request that the peer's system hasn't taken; they are gone with the connection."""
        return 0 if self.at is UpstreamState.CLOSED else self.transport.get_write_buffer_size()

    def pause(self, unsent_bytes: int) -> None:
        """The reader takes nothing: stop reading (in BODY; a stream's source is never paused).

        What was read already waits here, and `unsent_bytes` of it in the reader's transport.
        """
        if self.at is UpstreamState.BODY:
            pause_reading(self, BACKPRESSURE)
            self._unsent_bytes = unsent_bytes
            self._charge_held()

    def resume(self) -> None:
        if self.at is UpstreamState.BODY and self.pauses & BACKPRESSURE:
            self.touched_at = self._runtime.time()
            if self._read is not None:
                self.wait_for_turn()
            resume_reading(self, BACKPRESSURE)
            self._charge_held()

    # -- answers in

    def _take_head(self, data: bytes) -> int:
        self.any_byte = True
        spent = pieces_of(len(data))
        asker, limits = self._asker, self._runtime.limits
        assert asker is not None
        while True:
            size = whole_head(data, limits) if self._heads is None else 0
            if size:
                head_bytes, data = data[:size], data[size:]
            else:
                if self._heads is None:
                    self._heads = HeadReader(limits, opening=RESPONSE_OPENING)
                found = self._heads.feed(data)
                if found is None:
                    self._charge_held()
                    return spent
                head_bytes, data = found
                self._heads = None
            head = parse_response(head_bytes, self._bodiless, limits)
            spent += HEAD_PIECES
            if head.status >= 200:
                break
            self._interim_answers += 1
            if self._interim_answers > INTERIM_ANSWERS_MAX:
                text = f"send at most {INTERIM_ANSWERS_MAX} interim answers (1xx) in front of an answer"
                raise RemoteProtocolError(text, "too_many_interim_answers", 502)
        self._charge_held()
        if data:
            self._read = data + (self._read or b"")
        asker.on_head(self, head)
        if self._decoder is not None and self._decoder.done and self.at is not UpstreamState.CLOSED:
            self._finish()  # an answer without a body
        return spent

    def _begin_body(self, head: ResponseHead, coding: bytes | None) -> None:
        self._keep_alive = head.keep_alive and head.framing is not Framing.UNTIL_CLOSE
        self._decoder = decoder_for(head.framing, head.content_length, loose=True)
        if coding is not None:
            self._decoder = InflatingDecoder(self._decoder, coding)
            self._charge_held()

    def _take_events(self, data: bytes) -> int:
        decoder, splitter, stream = self._decoder, self._splitter, self.stream
        assert decoder is not None and splitter is not None and stream is not None
        payloads = decoder.feed(data)
        spent = self._spent_on(data, payloads)
        if payloads:
            # All events of a step go out in one write, even if each came in its own chunk.
            spent += self._split(payloads, splitter, stream)
        self._settle_events(decoder, splitter)
        return spent

    def _spent_on(self, data: bytes, payloads: list[bytes]) -> int:
        """The work on a step's bytes, in pieces; of an encoded body more may come out than went in."""
        size = sum(map(len, payloads)) if type(self._decoder) is InflatingDecoder else len(data)
        return pieces_of(size) + len(payloads)

    def _split(self, payloads: list[bytes], splitter: EventSplitter, stream: Stream) -> int:
        """Put the events of a step into the stream; returns the work done, in pieces."""
        strays = splitter.stray_blocks
        pieces = splitter.feed(payloads[0]) if len(payloads) == 1 else splitter.feed_all(payloads)
        work = STRAY_PIECES * (splitter.stray_blocks - strays)
        if splitter.pending or self._held_bytes:
            self._charge_held()
        if pieces or not splitter.pending or splitter.in_comment:
            self.touched_at = self._runtime.time()
        if pieces:
            self._append(pieces)
            work += len(pieces) * event_pieces(stream)
        return work

    def _settle_events(self, decoder: BodyDecoder, splitter: EventSplitter) -> None:
        """A step's events are in the stream: may the next read take the short way, or was it the last?"""
        self._fast_path = type(decoder) is ChunkedDecoder and decoder.at_boundary and splitter.at_rest
        if decoder.done:
            self._append_last(splitter)
            self._finish()

    def _append_last(self, splitter: EventSplitter) -> None:
        """The stream has ended properly."""
        self._append(splitter.finish())
        if isinstance(splitter, JsonLines) and self.stream is not None:
            self._append(splitter.closing(self.stream.progress))

    def _charge_held(self) -> None:
        """Charge the bytes of a head or an event that has begun, and those that wait for a slow reader.

        On the long way only: at rest nothing is held.
        """
        held = self._heads.bytes_held if self._heads is not None else 0
        if self._splitter is not None:
            held = self._splitter.pending
        elif self.pauses & BACKPRESSURE:
            held = self._unsent_bytes + len(self._read or b"")
        if type(self._decoder) is InflatingDecoder:
            held += STATE_BYTES
        if held != self._held_bytes:
            self._runtime.admission.charge_held(held - self._held_bytes)
            self._held_bytes = held

    def _append(self, pieces: list[bytes]) -> None:
        stream = self.stream
        if stream is None or not pieces:
            return
        if stream.progress.strays is not None and not stream.events:
            pieces = stream.behind_strays(pieces)
        self._runtime.counters.event_writes += stream.direct
        stream.append_pieces(pieces, self._runtime.time())

    def _take_body(self, data: bytes) -> int:
        decoder, asker = self._decoder, self._asker
        assert decoder is not None and asker is not None
        if self.at is UpstreamState.BODY:
            self.touched_at = self._runtime.time()
        payloads = decoder.feed(data)
        spent = self._spent_on(data, payloads)
        if payloads:
            # A single write for all chunks of a step.
            asker.on_piece(payloads[0] if len(payloads) == 1 else b"".join(payloads))
        if self.at is UpstreamState.EVENTS and self._splitter is not None and self.stream is not None:
            spent += self.stream.events * event_pieces(self.stream)  # the first bytes were events
            self._settle_events(decoder, self._splitter)
            return spent
        if self.at is UpstreamState.OPENING:
            self.touched_at = self._runtime.time()  # blank bytes in front of an answer are signs of life
        if decoder.done and self.at is not UpstreamState.CLOSED:
            self._finish()
        return spent

    def _finish(self) -> None:
        """The framing ended properly. A connection with bytes after the end isn't used again: no request owns them."""
        asker, decoder = self._asker, self._decoder
        assert asker is not None and decoder is not None
        is_clean = not decoder.rest and self._read is None and self._ended_by is None
        reusable = self._keep_alive and is_clean and not self.transport.get_write_buffer_size()
        self._fast_path = False
        self._leave_stream()
        self._asker = self._splitter = self._decoder = None
        self._charge_held()
        self.answers += 1
        try:
            if reusable:
                resume_reading(self, BACKPRESSURE)  # a slow reader may have paused it up to the last byte
                self._charge_held()
                self._go(UpstreamState.IDLE)
                self.upstream.keep(self, self._runtime.time())
            else:
                self.close()
        except Exception as error:  # Why: the answer is complete, and its asker has to hear of that
            self.crash("upstream.keep", error)
        try:
            asker.on_end(self)
        except Exception as error:
            asker.on_bug("upstream.on_end", error)

    def _ended(self, exc: Exception | None) -> None:
        """The connection has ended, by FIN or by a loss."""
        if self.at is UpstreamState.CLOSED:
            return
        decoder = self._decoder
        if exc is None and decoder is not None and decoder.eof():
            self._keep_alive = False
            try:
                if self._splitter is not None:
                    self._append_last(self._splitter)
                self._finish()
            except (EventTooLarge, inner.SentAway) as end:
                self._end_by(end)
        elif self.at is UpstreamState.IDLE:
            self.close()
        elif self.at is UpstreamState.HEAD:
            self.turned_away = not self.any_byte and not self.answers and _is_unread(self.transport, exc)
            text = "The upstream closed the connection before it answered."
            self._break(CloseReason.UPSTREAM_RESET, text)
        else:
            text = "The upstream's connection ended before its answer did."
            if isinstance(exc, ssl.SSLEOFError):  # RFC 9112 9.8: an answer that the close ends may have been cut
                text = "The upstream's TLS connection ended without close_notify, so its answer may have been cut."
            self._break(CloseReason.UPSTREAM_TRUNCATED, text)

    def _break(self, reason: CloseReason, text: str) -> None:
        asker = self._asker
        if self._splitter is not None and reason is not CloseReason.EVENT_TOO_LARGE:
            self._append(self._splitter.give_up())
        self.close()
        if asker is not None:
            try:
                asker.on_broken(self, reason, text)
            except Exception as error:
                asker.on_bug("upstream.on_broken", error)

    def crash(self, where: str, error: Exception) -> None:
        """A callback raised: the answer can't be trusted any more. Never raises."""
        asker = self._asker
        with self._runtime.guard:
            self.close()
        if asker is None:  # the answer had ended, and its asker has released the connection
            self._runtime.bug(where, error)
        else:
            asker.on_bug(where, error)

    def _go(self, at: UpstreamState) -> None:
        assert at in TRANSITIONS[self.at], f"{self.at} to {at}"
        self.at = at


def reason_of(end: EventTooLarge | inner.SentAway) -> tuple[CloseReason, str]:
    """Why a stream ends by something in it, for programs and for people."""
    if isinstance(end, EventTooLarge):
        return CloseReason.EVENT_TOO_LARGE, f"The upstream sent too much: {end}."
    return CloseReason.UPSTREAM_TRUNCATED, f"{end}."


def _hang_up(transport: asyncio.Transport) -> None:
    """Tell the server now that no client waits for its answer.

    Why: uvloop closes an aborted transport's socket in the next turn of the loop. When a thousand readers leave at
    once, the first of their GPUs would run on until the present turn has dealt with all of them.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or transport.is_closing() or transport.get_extra_info("ssl_object") is not None:
        return  # the descriptor must surely still be the transport's
    borrowed = socket.socket(sock.family, sock.type, fileno=sock.fileno())
    try:
        borrowed.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is gone already
    finally:
        borrowed.detach()


class InFlightBoard(Protocol):
    """Shared numbers: the requests that each worker has under way."""

    def set_in_flight(self, upstream: str, count: int) -> None:
        """Publish this worker's number."""

    def in_flight_elsewhere(self, upstream: str) -> int:
        """The sum over all other workers."""


def context_of(settings: UpstreamSettings) -> ssl.SSLContext:
    """A client's context: it trusts ca_file's certificates, or the machine's, and shows client_cert. Raises OSError."""
    context = ssl.create_default_context()
    if settings.ca_file:
        content = read_regular(Path(settings.ca_file), CA_FILE_BYTES_MAX)
        try:
            context = ssl.create_default_context(cadata=content.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError) as error:
            raise OSError(errno.EINVAL, f"no certificates that can be used ({error})", settings.ca_file) from None
    if settings.client_cert:
        try:
            load_pair(context, Path(settings.client_cert), Path(settings.client_key))
        except TlsFilesError as error:
            raise OSError(errno.EINVAL, str(error), settings.client_cert) from None
    return context


class Upstream:
    """An inference server: its requests in flight, its pooled connections, its health."""

    __slots__ = (
        "_dialer",
        "_idle",
        "_in_flight",
        "_runtime",
        "_tls",
        "board",
        "certificate_until",
        "health",
        "is_up",
        "listed",
        "removed",
        "settings",
    )

    def __init__(self, runtime: Runtime, settings: UpstreamSettings) -> None:
        self._runtime = runtime
        self.settings = settings
        self._tls: ssl.SSLContext | None = None
        if settings.origin.tls:
            self._tls = context_of(settings)
        dialled = settings.through.host if settings.through is not None else settings.origin.host
        self._dialer = Dialer(runtime.loop, dialled, tls=settings.origin.tls or settings.through is not None)
        self._idle: list[UpstreamConnection] = []
        self._in_flight = 0
        self.board: InFlightBoard | None = None  # shows `in_flight` to the other workers
        self.health = Health()
        self.is_up = True  # the daemon's verdict, of all workers together; requests follow `health` alone
        self.certificate_until = 0  # Unix time, whole seconds, at which client_cert expires; 0: there is none
        self.listed: frozenset[str] = frozenset()  # the models of its list when it was last read; empty: not known
        self.removed = False  # by a reload: running requests go on, new requests go elsewhere

    # -- choice

    def serves(self, model: str) -> bool:
        """Whether a request for the model may come here: named exactly, by alias, or any."""
        return "*" in self.settings.models or self.names(model)

    def names(self, model: str) -> bool:
        return model in self.settings.models or model in self.settings.aliases

    def lists(self, model: str) -> bool:
        """Whether the model, by the upstream's own name for it, was in its list."""
        return self.settings.aliases.get(model, model) in self.listed

    @property
    def in_flight(self) -> int:
        """Requests under way from this worker."""
        return self._in_flight

    @in_flight.setter
    def in_flight(self, count: int) -> None:
        self._in_flight = count
        if self.board is not None:
            self.board.set_in_flight(self.settings.name, count)

    def full(self) -> bool:
        """Whether all workers together have as many requests there as inflight_max allows."""
        most = self.settings.inflight_max
        if not most:
            return False
        elsewhere = self.board.in_flight_elsewhere(self.settings.name) if self.board is not None else 0
        return self._in_flight + elsewhere >= most

    def left_out(self, now: float) -> bool:
        """Whether no principal's request may come here, for the upstream's failures."""
        return not self.health.takes("", now)

    def models_named(self) -> list[str]:
        """The models that the settings name, then those of the upstream's list, if it takes any."""
        configured = [*(model for model in self.settings.models if model != "*"), *self.settings.aliases]
        return [*configured, *(sorted(self.listed - {*configured}) if "*" in self.settings.models else ())]

    def renew(self, context: ssl.SSLContext, certificate_until: int) -> None:
        """Use another TLS context for new connections: a certificate was renewed."""
        self._tls = context
        self.certificate_until = certificate_until
        self.close_idle()

    # -- connections

    def take_idle(self, now: float) -> UpstreamConnection | None:
        """The pooled connection used last. After pool_idle_timeout the server may be closing it, so it is dropped."""
        limit_s = self._runtime.settings.pool_idle_timeout_s
        while self._idle:
            link = self._idle.pop()
            if now - link.idle_since <= limit_s and limit_s:
                return link
            link.close()
        return None

    def keep(self, link: UpstreamConnection, now: float) -> None:
        """Pool a connection whose answer is complete."""
        if self.removed or len(self._idle) >= self._runtime.settings.pool_idle_max:
            link.close()
            return
        link.idle_since = now
        self._idle.append(link)

    def unfreeze(self, link: UpstreamConnection) -> None:
        """Take back an idle connection that was frozen, as it was."""
        if self.removed or len(self._idle) >= self._runtime.settings.pool_idle_max:
            link.close()
        else:
            self._idle.append(link)

    def forget(self, link: UpstreamConnection) -> None:
        if link.at is UpstreamState.IDLE and link in self._idle:
            self._idle.remove(link)

    def trim(self, now: float) -> None:
        """Close connections that have been idle for too long (the sweep calls this)."""
        limit_s = self._runtime.settings.pool_idle_timeout_s
        for link in [link for link in self._idle if now - link.idle_since > limit_s]:
            link.close()

    def close_idle(self) -> None:
        for link in tuple(self._idle):
            link.close()

    @property
    def idle(self) -> int:
        return len(self._idle)

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises OSError (ssl.SSLError is a subclass). If it raises, it leaves no connection."""
        if self.settings.origin.socket:
            return await self._connect_to_socket(self.settings.origin.socket)
        return await self._dialer.connect(self._connect_to)

    async def _connect_to_socket(self, path: str) -> UpstreamConnection:
        """A connection to the Unix socket of a server on this machine."""
        link = UpstreamConnection(self._runtime, self)
        try:
            await self._runtime.loop.create_unix_connection(lambda: link, path)
        except OSError as error:
            link.give_up()
            hint = "; connecting takes the right to write to it" if error.errno == errno.EACCES else ""
            raise OSError(error.errno, f"its socket: {error.strerror or error}{hint}") from None
        except BaseException:
            link.give_up()
            raise
        return link

    async def _connect_to(self, address: str) -> UpstreamConnection:
        """A connection to one of the host's addresses, or through the proxy's."""
        origin, loop, proxy = self.settings.origin, self._runtime.loop, self.settings.through
        tls, name = self._tls, origin.host if self._tls is not None else None
        link = UpstreamConnection(self._runtime, self)
        try:
            if proxy is None:
                await loop.create_connection(lambda: link, address, origin.port, ssl=tls, server_hostname=name)
            else:
                sock = await open_tunnel(loop, address, proxy, origin.host, origin.port)
                await loop.create_connection(lambda: link, sock=sock, ssl=tls, server_hostname=name)
        except BaseException:
            link.give_up()
            raise
        return link
