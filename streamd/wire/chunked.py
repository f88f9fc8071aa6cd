"""Bodies by their framing: chunked transfer coding (RFC 9112 7.1), a length, or until the close. And chunks, written.

All have the interface `BodyDecoder`: `feed` takes the connection's bytes and gives payload pieces; `done` says that the
body has ended; `rest` has the bytes after its end; `eof` says whether the body may end where the connection did.

The chunked decoder is strict where leniency is how bodies are smuggled: a size is hexadecimal digits and nothing else
(no sign, `0x`, underscore or blank; 8 significant digits, so 4 GiB), lines end with CRLF alone, the two bytes behind a
chunk's data *are* CRLF (h11, CVE-2025-43859, took any two), extensions follow their grammar and hold no bare CR or LF
(Kestrel, CVE-2025-55315; Go, CVE-2025-22871), trailers are field lines, bounded, and dropped: merged into the head they
could add a length or a host to it.

A size in an *answer* may have blanks behind it (`2a  `): servers and balancers pad sizes so, and the parsers of SDKs
(h11, fasthttp, akka) take them. Nothing can be smuggled in an answer so: every chunk is written anew, and the bytes
behind the last belong to no request. In a request they stay refused.

The decoder lies on a token's path. Most reads from an inference server hold a single whole chunk, and come when the
decoder stands at a boundary. Then a table parses and checks the size line with a single look-up, and the payload is a
slice. A caller with a faster path of its own asks `at_boundary`, and may pass the decoder by for whole chunks.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple, Protocol

from streamd.wire.http1 import Framing, RemoteProtocolError
from streamd.wire.possessive import compiled

LAST_CHUNK = b"0\r\n\r\n"

EXTENSION_BYTES_MAX = 256  # RFC 9112 7.1.1 asks for a bound; the longest in use, a signature of AWS's, takes 85
SIZE_DIGITS_MAX = 16  # leading zeros included
TRAILER_BYTES_MAX = 4096  # all trailer lines together
TRAILERS_MAX = 32

_SIZE_LINE_BYTES_MAX = SIZE_DIGITS_MAX + EXTENSION_BYTES_MAX + 2

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*+"'
# RFC 9112 7.1.1, but without blanks in front of the first ';', right behind the size: a size has none.
_EXTENSION = rb";[ \t]*+" + _TOKEN + rb"(?:[ \t]*+=[ \t]*+(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?+(?:[ \t]*+(?=;))?+"
_SIZE_LINE = compiled(rb"(?=[0-9A-Fa-f]{1,16}(?:;|\Z))0*+([0-9A-Fa-f]{0,8})((?:" + _EXTENSION + rb")*+)", re.DOTALL)
_SIZE_BEGUN = compiled(rb"[0-9A-Fa-f]{1,16}(?:;[^\r\n]*+)?+\r?")
_SIZE_BEGUN_LOOSELY = compiled(rb"[0-9A-Fa-f]{1,16}[ \t]*+(?:;[^\r\n]*+)?+\r?")
_PADDED = compiled(rb"([0-9A-Fa-f]++)[ \t]++(?=;|\Z)")
_TRAILER = compiled(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+")

# Size lines of SSE events as servers write them, in either case. Any other line takes the slow, careful parse.
USUAL_SIZES = {line: size for size in range(1, 1024) for line in (b"%x" % size, b"%X" % size)}


class BodyDecoder(Protocol):
    """The interface of all decoders. After `done` nothing may be fed any more."""

    done: bool
    rest: bytes

    def feed(self, chunk: bytes) -> list[bytes]:
        """The connection's next bytes in, the payload in them out. Raises RemoteProtocolError."""

    def eof(self) -> bool:
        """Note that the connection has ended; return whether the body is complete."""


class ChunkPart(enum.Enum):
    """The part of the coding that the next byte belongs to."""

    SIZE = "size"
    DATA = "data"
    DATA_END = "data_end"  # the CRLF behind the data
    TRAILER = "trailer"
    END = "end"


class ChunkedState(NamedTuple):
    """A ChunkedDecoder between two reads, in the middle of a body."""

    is_loose: bool
    at: ChunkPart
    data_bytes_left: int
    line: bytes
    trailers: int
    trailer_bytes: int


class LengthState(NamedTuple):
    """A LengthDecoder between two reads."""

    bytes_left: int


class UntilCloseState(NamedTuple):
    """An UntilCloseDecoder: it has no state."""


class ChunkedDecoder:
    """Chunked transfer coding, decoded incrementally. Holds at most one unfinished line."""

    __slots__ = (
        "_at",
        "_data_bytes_left",
        "_is_loose",
        "_line",
        "_trailer_bytes",
        "_trailers",
        "at_boundary",
        "done",
        "rest",
    )

    def __init__(self, *, loose: bool = False) -> None:
        """`loose`: blanks behind a size are taken, as far as a size line may be long."""
        self._is_loose = loose
        self.done = False
        self.rest = b""
        self.at_boundary = True  # the next byte begins a size line, and nothing is held
        self._at = ChunkPart.SIZE
        self._data_bytes_left = 0  # > 0 exactly in DATA
        self._line = b""  # the unfinished line: a size line, a CRLF behind data, or a trailer
        self._trailers = 0
        self._trailer_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The connection's next bytes in, the payload in them out. RemoteProtocolError ends the use of the decoder."""
        if self.at_boundary:
            line_end = chunk.find(b"\r\n", 0, 8)
            size = USUAL_SIZES.get(chunk[:line_end])
            if size is not None and len(chunk) == line_end + size + 4 and chunk.endswith(b"\r\n"):
                return [chunk[line_end + 2 : -2]]
        return self._decode(chunk)

    def eof(self) -> bool:
        """Complete only if the last chunk and its trailers came (RFC 9112 8)."""
        return self.done

    def state(self) -> ChunkedState:
        """What decoder_of() goes on from."""
        return ChunkedState(
            self._is_loose, self._at, self._data_bytes_left, self._line, self._trailers, self._trailer_bytes
        )

    def go_on_from(self, state: ChunkedState) -> None:
        """Take the state of another decoder; this one is new. Raises ValueError for a state that no decoder has."""
        has_data = state.at is ChunkPart.DATA
        if state.at is ChunkPart.END or has_data != (0 < state.data_bytes_left < 1 << 32):
            raise ValueError("a chunked body at its end, or in the middle of data that it doesn't have")
        is_counted = 0 <= state.trailers <= TRAILERS_MAX and 0 <= state.trailer_bytes <= TRAILER_BYTES_MAX
        if not is_counted or (state.at is not ChunkPart.TRAILER and (state.trailers or state.trailer_bytes)):
            raise ValueError("a chunked body with trailers that can't be")
        self._at, self._data_bytes_left = state.at, 0 if not has_data else state.data_bytes_left
        self._trailers, self._trailer_bytes = state.trailers, state.trailer_bytes
        if state.line and has_data:
            raise ValueError("a chunked body with a line in the middle of data")
        self._hold_line(state.line)

    def _hold_line(self, line: bytes) -> None:
        """Take a line that is begun, as feed() would: it has to be held as it is."""
        before = self._at
        try:
            pieces = self._decode(line)
        except RemoteProtocolError as broken:
            raise ValueError(f"a chunked body with a line that can't be held: {broken}") from None
        if pieces or self._line != line or self._at is not before:
            raise ValueError("a chunked body with a line that is whole")

    def _decode(self, chunk: bytes) -> list[bytes]:
        assert not self.done
        if self._line:
            chunk = self._line + chunk  # bounded: a held line is at most a size line or a trailer
            self._line = b""
        pieces: list[bytes] = []
        start, end = 0, len(chunk)
        try:
            while start < end and self._at is not ChunkPart.END:
                next_start = self._take(chunk, start, pieces)
                if next_start == start:
                    break
                start = next_start
        except RemoteProtocolError as broken:
            broken.before = pieces
            raise
        self._settle(chunk, start)
        return pieces

    def _settle(self, chunk: bytes, start: int) -> None:
        if self._at is ChunkPart.END:
            self.done = True
            self.rest = chunk[start:]
        else:
            self._line = chunk[start:]
        self.at_boundary = self._at is ChunkPart.SIZE and not self._line

    def _take(self, chunk: bytes, start: int, pieces: list[bytes]) -> int:
        """Decode a step from `start` on; return where the next step begins, or `start` if a line isn't whole yet."""
        if self._at is ChunkPart.SIZE:
            return _take_whole_chunks(chunk, start, pieces) or self._take_size_line(chunk, start)
        if self._at is ChunkPart.DATA:
            return self._take_data(chunk, start, pieces)
        if self._at is ChunkPart.DATA_END:
            return self._take_data_end(chunk, start)
        return self._take_trailer(chunk, start)

    def _take_data(self, chunk: bytes, start: int, pieces: list[bytes]) -> int:
        piece = chunk[start : start + self._data_bytes_left]
        pieces.append(piece)
        self._data_bytes_left -= len(piece)
        if not self._data_bytes_left:
            self._at = ChunkPart.DATA_END
        return start + len(piece)

    def _take_data_end(self, chunk: bytes, start: int) -> int:
        if chunk.startswith(b"\r\n", start):
            self._at = ChunkPart.SIZE
            return start + 2
        if chunk[start:] != b"\r":
            raise RemoteProtocolError("end each chunk's data with CRLF, at the size announced", "bad_chunk_end")
        return start

    def _take_size_line(self, chunk: bytes, start: int) -> int:
        line_end = chunk.find(b"\r\n", start, start + _SIZE_LINE_BYTES_MAX)
        if line_end < 0:
            held = chunk[start : start + _SIZE_LINE_BYTES_MAX]
            begun = _SIZE_BEGUN_LOOSELY if self._is_loose else _SIZE_BEGUN
            if len(held) == _SIZE_LINE_BYTES_MAX or not begun.fullmatch(held):
                raise _bad_size_line(held)
            return start
        line = chunk[start:line_end]
        padded = _PADDED.match(line) if self._is_loose else None
        match = _SIZE_LINE.fullmatch(padded[1] + line[padded.end() :] if padded else line)
        if match is None or len(match[2]) > EXTENSION_BYTES_MAX:
            raise _bad_size_line(line)
        self._data_bytes_left = int(match[1] or b"0", 16)
        self._at = ChunkPart.DATA if self._data_bytes_left else ChunkPart.TRAILER
        return line_end + 2

    def _take_trailer(self, chunk: bytes, start: int) -> int:
        bytes_left = TRAILER_BYTES_MAX - self._trailer_bytes
        line_end = chunk.find(b"\r\n", start, start + bytes_left)
        if line_end == start:
            self._at = ChunkPart.END
            return start + 2
        if line_end < 0:
            held = chunk[start:]
            if len(held) >= bytes_left or b"\n" in held or b"\r" in held[:-1]:
                raise RemoteProtocolError(_BAD_TRAILER, "bad_trailer")
            return start
        self._trailers += 1
        self._trailer_bytes += line_end + 2 - start
        if self._trailers > TRAILERS_MAX or not _TRAILER.fullmatch(chunk, start, line_end):
            raise RemoteProtocolError(_BAD_TRAILER, "bad_trailer")
        return line_end + 2


def _take_whole_chunks(chunk: bytes, start: int, pieces: list[bytes]) -> int:
    """Decode whole chunks of usual sizes, with a look-up each. Returns the end of the last one, 0 if there is none."""
    taken = 0
    while True:
        line_end = chunk.find(b"\r\n", start, start + 5)
        size = USUAL_SIZES.get(chunk[start:line_end]) if line_end > 0 else None
        if size is None:
            return taken
        data_end = line_end + 2 + size
        if not chunk.startswith(b"\r\n", data_end):
            return taken
        pieces.append(chunk[line_end + 2 : data_end])
        start = taken = data_end + 2


_BAD_TRAILER = f"send at most {TRAILERS_MAX} trailers, 'name: value' and CRLF, {TRAILER_BYTES_MAX} bytes in all"


def _bad_size_line(line: bytes) -> RemoteProtocolError:
    digits = re.match(rb"[0-9A-Fa-f]*", line)
    assert digits is not None
    if b"\n" in line or b"\r" in line[:-1]:
        return RemoteProtocolError(
            "end each chunk size line with CRLF, and put no bare CR or LF in it", "bad_chunk_line"
        )
    if digits.end() and line[digits.end() : digits.end() + 1] == b";" and digits.end() <= SIZE_DIGITS_MAX:
        return RemoteProtocolError(
            f"send chunk extensions of at most {EXTENSION_BYTES_MAX} bytes as ';name=value'", "bad_chunk_extension"
        )
    return RemoteProtocolError(
        f"write each chunk size as 1 to 8 hexadecimal digits (with leading zeros {SIZE_DIGITS_MAX}) and nothing else",
        "bad_chunk_size",
    )


class LengthDecoder:
    """A body of a known number of bytes; 0 if there is no body."""

    __slots__ = ("_bytes_left", "done", "rest")

    def __init__(self, content_length: int) -> None:
        assert content_length >= 0
        self.done = content_length == 0
        self.rest = b""
        self._bytes_left = content_length

    def state(self) -> LengthState:
        """What decoder_of() goes on from."""
        return LengthState(self._bytes_left)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The connection's next bytes in, the payload in them out."""
        assert not self.done
        if len(chunk) >= self._bytes_left:
            self.done = True
            chunk, self.rest = chunk[: self._bytes_left], chunk[self._bytes_left :]
        self._bytes_left -= len(chunk)
        return [chunk] if chunk else []

    def eof(self) -> bool:
        """Complete only if all announced bytes came (RFC 9112 8)."""
        return self.done


class UntilCloseDecoder:
    """A response body that ends with its connection."""

    __slots__ = ("done", "rest")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def state(self) -> UntilCloseState:
        """What decoder_of() goes on from."""
        return UntilCloseState()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The connection's next bytes in; all of them are payload."""
        assert not self.done
        return [chunk] if chunk else []

    def eof(self) -> bool:
        """Always complete: the framing can't tell a cut from an end (RFC 9112 8)."""
        self.done = True
        return True


def decoder_for(framing: Framing, content_length: int, *, loose: bool = False) -> BodyDecoder:
    """The decoder of a head's body. Without a body the decoder is done from the start. `loose`: of an answer."""
    if framing is Framing.CHUNKED:
        return ChunkedDecoder(loose=loose)
    if framing is Framing.UNTIL_CLOSE:
        return UntilCloseDecoder()
    return LengthDecoder(content_length)


DecoderState = ChunkedState | LengthState | UntilCloseState


def decoder_of(state: DecoderState) -> BodyDecoder:
    """A decoder that goes on where the decoder with this state has stopped. Raises ValueError for an impossible state:
    it comes from another process.
    """
    if isinstance(state, ChunkedState):
        decoder = ChunkedDecoder(loose=state.is_loose)
        decoder.go_on_from(state)
        return decoder
    if isinstance(state, UntilCloseState):
        return UntilCloseDecoder()
    if state.bytes_left < 0:
        raise ValueError("a body with less than no bytes left")
    return LengthDecoder(state.bytes_left)


def encode_chunk(payload: bytes) -> bytes:
    """The payload as a chunk. An empty payload can't be a chunk: it would be the last chunk, which ends the body."""
    assert payload
    return b"%x\r\n%b\r\n" % (len(payload), payload)
