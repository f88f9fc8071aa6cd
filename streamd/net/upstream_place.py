"""UpstreamPlace: the state of a connection to an upstream between two reads, and a connection that goes on from it.

The state is told to another process, which has the socket. TLS and content codings have a state that can't be told.

Why functions that look into UpstreamConnection: it has as many methods as a class here may have, and none of them is
called while it serves.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.core.stream import Stream
from streamd.net.frozen import NotNow
from streamd.net.reading import BACKPRESSURE, TURN
from streamd.net.upstream import Asker, UpstreamConnection, UpstreamState
from streamd.wire.chunked import ChunkedDecoder, DecoderState, LengthDecoder, UntilCloseDecoder, decoder_of
from streamd.wire.http1 import RESPONSE_OPENING, HeadReader, HeadState
from streamd.wire.inflate import InflatingDecoder
from streamd.wire.inner import InnerState
from streamd.wire.json_lines import LinesState
from streamd.wire.splitters import splitter_of, state_of
from streamd.wire.sse import SplitterState


class UpstreamPlace(NamedTuple):
    """A connection without its upstream, its asker and its stream."""

    at: UpstreamState
    method: str  # of the request
    read: bytes | None  # bytes that were read and not processed yet, as in UpstreamConnection
    head: HeadState | None  # of an answer's head that has begun
    decoder: DecoderState | None
    splitter: SplitterState | InnerState | LinesState | None
    keep_alive: bool
    any_byte: bool
    answers: int
    interim_answers: int
    idle_since: float
    touched_at: float
    read_at: float


# The parts that a connection has in each state: its answer's body has a decoder, its events a splitter.
_PARTS: Final[dict[UpstreamState, tuple[bool, bool]]] = {
    UpstreamState.IDLE: (False, False),
    UpstreamState.HEAD: (False, False),
    UpstreamState.OPENING: (True, False),
    UpstreamState.BODY: (True, False),
    UpstreamState.EVENTS: (True, True),
}


def check(link: UpstreamConnection) -> None:
    """Whether the connection can be frozen: raises NotNow, or ValueError for a connection that stays."""
    if link.at is UpstreamState.CLOSED:
        raise ValueError("the connection is over")
    if link.upstream.settings.origin.tls or type(link._decoder) is InflatingDecoder:
        raise ValueError("TLS and content codings have a state that can't be told")
    if link.transport.is_closing() or link._ended_by is not None:
        raise NotNow("the connection has ended, and its last bytes are processed first")
    if link.pauses & TURN or (link._read is not None and not link.pauses & BACKPRESSURE):
        raise NotNow("bytes of the upstream wait for this turn's end, or for another turn")


def place_of(link: UpstreamConnection) -> UpstreamPlace:
    """The state of this connection. Raises ValueError for a connection that can't be told."""
    check(link)
    decoder, splitter = link._decoder, link._splitter
    if link.unwritten_bytes:
        raise NotNow("bytes of the request have not left yet")
    return UpstreamPlace(
        link.at,
        link._bodiless,
        link._read,
        link._heads.state() if link._heads is not None else None,
        decoder.state() if isinstance(decoder, ChunkedDecoder | LengthDecoder | UntilCloseDecoder) else None,
        state_of(splitter) if splitter is not None else None,
        link._keep_alive,
        link.any_byte,
        link.answers,
        link._interim_answers,
        link.idle_since,
        link.touched_at,
        link.read_at,
    )


def go_on_at(link: UpstreamConnection, place: UpstreamPlace, asker: Asker | None, stream: Stream | None) -> None:
    """Make a new connection, which has its transport, the connection that another process has told of.

    go_on() follows, and an IDLE connection still has to be put into the pool. Raises ValueError for a state that no
    connection has, and then the connection has to be closed.
    """
    _check(place, asker, stream)
    runtime = link._runtime
    if place.head is not None:
        link._heads = HeadReader(runtime.limits, opening=RESPONSE_OPENING)
        link._heads.go_on_from(place.head)
    decoder = link._decoder = decoder_of(place.decoder) if place.decoder is not None else None
    if decoder is not None and decoder.done:
        raise ValueError("a connection behind the end of its answer")
    if stream is not None and place.splitter is not None:
        size = runtime.settings.event_bytes_max
        splitter = splitter_of(place.splitter, stream.dialect.api, event_bytes_max=size, strays=stream)
        link._splitter = splitter
        link._fast_path = type(decoder) is ChunkedDecoder and decoder.at_boundary and splitter.at_rest
        link.stream = runtime.held_back(stream)
        runtime.read_batch.pacing.enter(stream.terms.write_interval)
    link.at, link._asker, link._bodiless = place.at, asker, place.method
    link._keep_alive, link.any_byte, link.answers = place.keep_alive, place.any_byte, place.answers
    link._interim_answers, link.idle_since = place.interim_answers, place.idle_since
    link.touched_at, link.read_at = place.touched_at, place.read_at
    link._charge_held()
    link._read = place.read


def go_on(link: UpstreamConnection) -> None:
    """The connection is thawed: process what it has read before."""
    if link._read is not None:
        link.work_or_wait()


def leave(link: UpstreamConnection) -> None:
    """The connection goes on in another process: give back all that it holds here. Nobody hears of an end."""
    link.upstream.forget(link)
    link._asker = link._read = link._splitter = link._decoder = link._heads = None
    link._fast_path = False
    link.at = UpstreamState.CLOSED
    link._leave_stream()
    link._unsent_bytes = 0
    link._charge_held()


def _check(place: UpstreamPlace, asker: Asker | None, stream: Stream | None) -> None:
    has_decoder, has_splitter = _PARTS.get(place.at, (False, False))
    if place.at is UpstreamState.CLOSED or (asker is None) != (place.at is UpstreamState.IDLE):
        raise ValueError("a connection that is over, or without the sender of its request")
    if (place.decoder is None) is has_decoder or (place.splitter is None) is has_splitter:
        raise ValueError("a connection with parts of another state")
    if (stream is None) is has_splitter or (place.head is not None and place.at is not UpstreamState.HEAD):
        raise ValueError("a connection with a head behind the head, or events without a stream")
    if place.at is UpstreamState.IDLE and place.read is not None:
        raise ValueError("an idle connection with bytes of no request")
