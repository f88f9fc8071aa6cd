"""UpstreamConnection and Upstream: a connection to an inference server, and the server with its pool and its health.

A connection carries a single request at a time:

    IDLE     in the pool; a byte or a close here takes it out
    HEAD     a request is out, its answer's head is awaited
    BODY     the answer's body goes to the exchange as bytes
    EVENTS   the answer's body is a stream: events go straight into it
    CLOSED

EVENTS is the hot path: data_received keeps the bytes read, and at the end of the loop's turn append_if_templated()
makes them a frame in the common case. All other bytes go through the chunked decoder, the splitter and Stream.append.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
from pathlib import Path
from typing import Protocol, cast

from streamd.choice import Choice
from streamd.config import UpstreamSettings
from streamd.core.guard import guarded
from streamd.core.stream import Stream
from streamd.files import read_regular
from streamd.keepalive import set_keepalive
from streamd.net.read_batch import ReadBatch
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason
from streamd.wire.chunked import BodyDecoder, ChunkedDecoder, decoder_for
from streamd.wire.fast_chunk import one_chunk
from streamd.wire.http1 import (
    RESPONSE_OPENING,
    Framing,
    HeadReader,
    RemoteProtocolError,
    ResponseHead,
    parse_response,
)
from streamd.wire.sse import EventSplitter, EventTooLarge

# Time for which a failing upstream is left out: doubles from half a second to half a minute, with jitter.
LEFT_OUT_S_MIN = 0.5
LEFT_OUT_S_MAX = 30.0

# Mozilla's whole bundle is 230 KB.
CA_FILE_BYTES_MAX = 4 * 1024 * 1024


class UpstreamState(Choice):
    """The state of a connection to an upstream; the module's docstring explains each."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    EVENTS = "events"
    CLOSED = "closed"


TRANSITIONS: dict[UpstreamState, frozenset[UpstreamState]] = {
    UpstreamState.IDLE: frozenset((UpstreamState.HEAD, UpstreamState.CLOSED)),
    UpstreamState.HEAD: frozenset((UpstreamState.BODY, UpstreamState.EVENTS, UpstreamState.CLOSED)),
    UpstreamState.BODY: frozenset((UpstreamState.IDLE, UpstreamState.CLOSED)),
    UpstreamState.EVENTS: frozenset((UpstreamState.IDLE, UpstreamState.CLOSED)),
    UpstreamState.CLOSED: frozenset(),
}


class Asker(Protocol):
    """The sender of a request, which gets its answer."""

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        """The final head. Calls take_events() or take_body() on the link, or aborts it."""

    def on_piece(self, piece: bytes) -> None:
        """Bytes of the body, in BODY."""

    def on_end(self, link: UpstreamConnection) -> None:
        """The framing ended properly; the link is in the pool or closed already."""

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        """The answer can't be completed; the link is closed."""

    def on_bug(self, where: str, error: Exception) -> None:
        """A callback raised while the answer was read; the link is closed. Counts the error, and never raises."""


class _UpstreamPerToken:
    """The attributes that a token touches. Slots of a base class come first, so they are neighbours in memory."""

    __slots__ = ("_fast_path", "_read", "_read_batch", "at", "stream")

    at: UpstreamState
    _read_batch: ReadBatch
    _read: bytes | None  # bytes read in this turn of the loop and not processed yet
    _fast_path: bool  # EVENTS, with both decoders between two pieces; then `stream` is set
    stream: Stream | None


class UpstreamConnection(_UpstreamPerToken, asyncio.Protocol):
    """A connection to an inference server."""

    __slots__ = (
        "__weakref__",
        "_asker",
        "_bodiless",
        "_decoder",
        "_heads",
        "_held_bytes",
        "_keep_alive",
        "_runtime",
        "_splitter",
        "_time",
        "answers",
        "any_byte",
        "idle_since",
        "touched_at",
        "transport",
        "upstream",
    )

    def __init__(self, runtime: Runtime, upstream: Upstream) -> None:
        # process
        self._runtime = runtime
        self._time = runtime.time
        self._read_batch = runtime.read_batch
        self.upstream = upstream
        # connection
        self.at = UpstreamState.IDLE
        self.transport: asyncio.Transport
        self.answers = 0  # complete answers so far: above 0 the connection is reused
        self.idle_since = 0.0
        # request
        self._asker: Asker | None = None
        self._bodiless = "GET"  # the request's method: an answer to HEAD has no body
        self.any_byte = False  # whether a byte of this answer has come
        self._heads: HeadReader | None = None
        self._held_bytes = 0  # of a head or an event that has begun, as charged to admission
        self._keep_alive = False
        # answer
        self._decoder: BodyDecoder | None = None
        self._splitter: EventSplitter | None = None
        self.stream = None
        self._read = None
        self._fast_path = False
        self.touched_at = 0.0  # time of the last bytes, in BODY; a stream has its own

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
            self.flush_read()
            self._take(data)
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

    def flush_read(self) -> None:
        """The turn ends, or another event comes first: process the bytes that wait, of any shape."""
        data, self._read = self._read, None
        if data is not None:
            self._take(data)

    @guarded
    def _take(self, data: bytes) -> None:
        try:
            if self.at is UpstreamState.EVENTS:
                self._take_events(data)
            elif self.at is UpstreamState.BODY:
                self._take_body(data)
            elif self.at is UpstreamState.HEAD:
                self._take_head(data)
            else:
                self.close()  # no request is out, so these bytes belong to none
        except RemoteProtocolError as broken:
            self._take_before(broken.before)
            self._break(CloseReason.UPSTREAM_PROTOCOL, f"The upstream's answer is malformed: {broken}.")
        except EventTooLarge as large:
            self._append(large.before)
            self._break(CloseReason.EVENT_TOO_LARGE, f"The upstream sent too much: {large}.")

    def _take_before(self, payloads: list[bytes]) -> None:
        """Deliver the payloads that were complete before a malformed part of the same read."""
        if self._splitter is not None:
            try:
                self._append(self._splitter.feed(b"".join(payloads)))
            except EventTooLarge as large:
                self._append(large.before)
            return
        for payload in payloads:
            if self._asker is not None:  # a piece may have been too much for the asker, which then closes
                self._asker.on_piece(payload)

    @guarded
    def eof_received(self) -> bool:
        self.flush_read()
        self._ended(None)
        return False

    @guarded
    def connection_lost(self, exc: Exception | None) -> None:
        self.flush_read()
        self._ended(exc)

    # -- requests out

    def send(self, request: bytes, asker: Asker, *, method: str) -> None:
        """Send a whole request; its answer goes to the asker."""
        self._go(UpstreamState.HEAD)
        self._asker = asker
        self._bodiless = method
        self.any_byte = False
        self._heads = HeadReader(self._runtime.limits, opening=RESPONSE_OPENING)
        self.transport.write(request)

    def take_events(self, stream: Stream, head: ResponseHead) -> None:
        """The body is a stream; called from on_head()."""
        self._go(UpstreamState.EVENTS)
        self.stream = stream
        self._splitter = EventSplitter(event_bytes_max=self._runtime.settings.event_bytes_max)
        self._begin_body(head)

    def take_body(self, head: ResponseHead) -> None:
        """The body is bytes; called from on_head()."""
        self._go(UpstreamState.BODY)
        self.touched_at = self._time()
        self._begin_body(head)

    def close(self) -> None:
        """Close the connection at once, even with a request under way."""
        if self.at is UpstreamState.CLOSED:
            return
        self.upstream.forget(self)
        self._go(UpstreamState.CLOSED)
        self._fast_path = False
        self._read = None
        if self._asker is not None:
            with self._runtime.guard:
                _hang_up(self.transport)
        self._asker = self.stream = self._splitter = self._decoder = self._heads = None
        self._charge_held()
        self.transport.abort()

    def give_up(self) -> None:
        """close(), also for a connection that isn't established yet."""
        if hasattr(self, "transport"):
            self.close()
        else:
            self._go(UpstreamState.CLOSED)

    def pause(self) -> None:
        """The reader takes nothing: stop reading (in BODY; a stream's source is never paused)."""
        if self.at is UpstreamState.BODY:
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.at is UpstreamState.BODY:
            self.touched_at = self._time()
            self.transport.resume_reading()

    # -- answers in

    def _take_head(self, data: bytes) -> None:
        self.any_byte = True
        while True:
            assert self._heads is not None and self._asker is not None
            found = self._heads.feed(data)
            if found is None:
                self._charge_held()
                return
            head_bytes, data = found
            head = parse_response(head_bytes, self._bodiless, self._runtime.limits)
            if head.status >= 200:
                break
        self._heads = None
        self._charge_held()
        self._asker.on_head(self, head)
        if data or self.at in (UpstreamState.BODY, UpstreamState.EVENTS):
            self._after_head(data)

    def _after_head(self, data: bytes) -> None:
        """Process the bytes after the head; an answer without a body ends here."""
        decoder = self._decoder
        if self.at is UpstreamState.CLOSED or decoder is None:
            return
        if decoder.done:
            decoder.rest = data
            self._finish()
        elif data and self.at is UpstreamState.EVENTS:
            self._take_events(data)
        elif data:
            self._take_body(data)

    def _begin_body(self, head: ResponseHead) -> None:
        self._keep_alive = head.keep_alive and head.framing is not Framing.UNTIL_CLOSE
        self._decoder = decoder_for(head.framing, head.content_length)

    def _take_events(self, data: bytes) -> None:
        decoder, splitter, stream = self._decoder, self._splitter, self.stream
        assert decoder is not None and splitter is not None and stream is not None
        payloads = decoder.feed(data)
        if payloads:
            # All events of a read go out in one write, even if each came in its own chunk.
            pieces = splitter.feed(payloads[0] if len(payloads) == 1 else b"".join(payloads))
            if splitter.pending or self._held_bytes:
                self._charge_held()
            if pieces:
                stream.append_pieces(pieces, self._time())
        self._fast_path = type(decoder) is ChunkedDecoder and decoder.at_boundary and splitter.at_rest
        if decoder.done:
            self._append(splitter.finish())
            self._finish()

    def _charge_held(self) -> None:
        """Charge the bytes of a head or an event that has begun. On the long way only: at rest nothing is held."""
        held = self._heads.bytes_held if self._heads is not None else 0
        if self._splitter is not None:
            held = self._splitter.pending
        self._runtime.admission.charge_held(held - self._held_bytes)
        self._held_bytes = held

    def _append(self, pieces: list[bytes]) -> None:
        if self.stream is not None and pieces:
            self.stream.append_pieces(pieces, self._time())

    def _take_body(self, data: bytes) -> None:
        decoder, asker = self._decoder, self._asker
        assert decoder is not None and asker is not None
        self.touched_at = self._time()
        for piece in decoder.feed(data):
            asker.on_piece(piece)
            if self.at is not UpstreamState.BODY:
                return
        if decoder.done:
            self._finish()

    def _finish(self) -> None:
        """The framing ended properly. A connection with bytes after the end isn't used again: no request owns them."""
        asker, decoder = self._asker, self._decoder
        assert asker is not None and decoder is not None
        reusable = self._keep_alive and not decoder.rest and not self.transport.get_write_buffer_size()
        self._fast_path = False
        self._asker = self.stream = self._splitter = self._decoder = None
        self._charge_held()
        self.answers += 1
        try:
            if reusable:
                self.transport.resume_reading()  # a slow reader may have paused it up to the last byte
                self._go(UpstreamState.IDLE)
                self.upstream.keep(self, self._time())
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
                    self._append(self._splitter.finish())
                self._finish()
            except EventTooLarge as large:
                self._break(CloseReason.EVENT_TOO_LARGE, f"The upstream sent too much: {large}.")
        elif self.at is UpstreamState.IDLE:
            self.close()
        elif self.at is UpstreamState.HEAD:
            text = "The upstream closed the connection before it answered."
            self._break(CloseReason.UPSTREAM_RESET, text)
        else:
            text = "The upstream's connection ended before its answer did."
            self._break(CloseReason.UPSTREAM_TRUNCATED, text)

    def _break(self, reason: CloseReason, text: str) -> None:
        asker = self._asker
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


def _context_of(ca_file: str) -> ssl.SSLContext:
    """A client's context that trusts the file's certificates, or without a file the machine's. Raises OSError."""
    if not ca_file:
        return ssl.create_default_context()
    content = read_regular(Path(ca_file), CA_FILE_BYTES_MAX)
    try:
        return ssl.create_default_context(cadata=content.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise OSError(errno.EINVAL, f"no certificates that can be used ({error})", ca_file) from None


class Upstream:
    """An inference server: its requests in flight, its pooled connections, its health."""

    __slots__ = ("_failures", "_idle", "_in_flight", "_runtime", "_tls", "board", "out_until", "removed", "settings")

    def __init__(self, runtime: Runtime, settings: UpstreamSettings) -> None:
        self._runtime = runtime
        self.settings = settings
        self._tls: ssl.SSLContext | None = None
        if settings.origin.tls:
            self._tls = _context_of(settings.ca_file)
        self._idle: list[UpstreamConnection] = []
        self._in_flight = 0
        self.board: InFlightBoard | None = None  # shows `in_flight` to the other workers
        self._failures = 0  # in a row
        self.out_until = 0.0
        self.removed = False  # by a reload: running requests go on, new requests go elsewhere

    # -- choice

    def serves(self, model: str) -> bool:
        """Whether a request for the model may come here: named exactly, by alias, or any."""
        return "*" in self.settings.models or self.names(model)

    def names(self, model: str) -> bool:
        return model in self.settings.models or model in self.settings.aliases

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
        return now < self.out_until

    def failed(self, now: float, rng: random.Random) -> None:
        """Leave the upstream out, for a time that doubles with each failure in a row."""
        wait_s = min(LEFT_OUT_S_MIN * 2**self._failures, LEFT_OUT_S_MAX)
        self._failures = min(self._failures + 1, 16)
        self.out_until = now + wait_s * rng.uniform(0.75, 1.25)

    def succeeded(self) -> None:
        """The upstream answered: let it back in and forget its failures."""
        self._failures = 0
        self.out_until = 0.0

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
        origin, loop = self.settings.origin, self._runtime.loop
        link = UpstreamConnection(self._runtime, self)
        try:
            if self._tls is None:
                await loop.create_connection(lambda: link, origin.host, origin.port)
            else:
                await loop.create_connection(
                    lambda: link, origin.host, origin.port, ssl=self._tls, server_hostname=origin.host
                )
        except BaseException:
            link.give_up()
            raise
        return link
