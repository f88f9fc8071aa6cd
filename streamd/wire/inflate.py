"""Bodies in the content codings gzip and deflate (RFC 9110 8.4.1), undone piece by piece.

An upstream is asked for identity, and some encode all the same. Before a stream's head such an answer passes as it is,
because its client may undo the coding. Behind the head streamd has to: the reader was promised events.

A few bytes may unpack to a thousand times as many. So a call gives at most OUTPUT_BYTES_MAX, and `has_more` says that
the next call has more without further bytes of the connection: the work of a turn is counted by what comes out, and
what waits is what went in, a step of a read. br and zstd can't be undone with the standard library.

A body that doesn't begin as gzip does, though its head says gzip, passes as it is: proxies undo a coding and leave its
name in the head.
"""

from __future__ import annotations

import zlib
from typing import Final

from streamd.wire.chunked import BodyDecoder
from streamd.wire.http1 import RemoteProtocolError

# Output of a call: 512 of the smallest events, 2 to 4 ms of work.
OUTPUT_BYTES_MAX: Final = 4096

# Memory of a decompressor: a window of 32 KiB, and zlib's own state of some 7 KiB.
STATE_BYTES: Final = 40 * 1024

_MAGIC: Final = b"\x1f\x8b"
_GZIP: Final = 16 + zlib.MAX_WBITS
_RAW: Final = -zlib.MAX_WBITS
_DEFLATED: Final = 8  # the method in a zlib header, whose two bytes are a multiple of 31 (RFC 1950 2.2)


# Members of a gzip'd body that a call may begin, 10 us each: an empty member has 20 bytes.
_MEMBERS_MAX: Final = 16


class InflatingDecoder:
    """A BodyDecoder behind another, which undoes the framing."""

    __slots__ = ("_framing", "_is_gzip", "_is_known", "_is_over", "_tail", "_zlib", "done", "has_more", "rest")

    def __init__(self, framing: BodyDecoder, coding: bytes) -> None:
        """`coding`: gzip or deflate. Of deflate both forms in use are taken: with zlib's header, and without it."""
        self._framing = framing
        self._is_gzip = coding == b"gzip"
        self._zlib: zlib._Decompress | None = None  # None: between two members of gzip, or not begun
        self._is_known = coding != b"gzip"  # whether the body is encoded at all
        self._is_over = False  # the coding has ended, and further bytes mean nothing
        self._tail = b""  # encoded bytes that wait
        self.has_more = False  # whether feed(b"") gives more; until it doesn't, no other bytes may be fed
        self.done = framing.done  # the body has ended, and all of it was given
        self.rest = framing.rest

    def feed(self, chunk: bytes) -> list[bytes]:
        """The connection's next bytes in, at most OUTPUT_BYTES_MAX of the content out. Raises RemoteProtocolError."""
        tail = self._tail + b"".join(self._framing.feed(chunk)) if chunk else self._tail
        if not self._is_known and not self._is_encoded(tail):
            self._tail = b"" if self._is_over else tail
            self.done, self.rest = self._framing.done, self._framing.rest
            return [tail] if self._is_over and tail else []
        try:
            out = self._inflate(tail)
        except zlib.error as error:
            raise RemoteProtocolError(f"its content coding can't be undone ({error})", "bad_content_coding") from None
        self.done, self.rest = self._framing.done and not self.has_more, self._framing.rest
        if self.done and not self._is_whole:
            broken = RemoteProtocolError("its content coding has no end", "bad_content_coding")
            broken.before = [out]
            raise broken
        return [out] if out else []

    def eof(self) -> bool:
        """Note that the connection has ended; return whether the body is complete."""
        return self._framing.eof() and not self.has_more and self._is_whole

    @property
    def _is_whole(self) -> bool:
        return self._is_over or (self._zlib is None and not self._tail)

    def _inflate(self, tail: bytes) -> bytes:
        """Undo the coding of `tail` as far as a call may; the bytes behind that wait."""
        out: list[bytes] = []
        room, members = OUTPUT_BYTES_MAX, 0
        self.has_more, was_full = False, self.has_more
        while not self._is_over and (tail or was_full):
            if self._zlib is None:
                members += 1
                if members > _MEMBERS_MAX or not room:
                    self.has_more = True
                    break
                self._zlib = self._begun(tail)
                if self._zlib is None:
                    break
            piece = self._zlib.decompress(tail, room)
            out.append(piece)
            room -= len(piece)
            was_full = False
            if self._zlib.eof:
                tail, self._zlib = self._zlib.unused_data, None
                self._is_over = not self._is_gzip or (tail != b"" and tail[:1] != b"\x1f")
            else:
                tail = self._zlib.unconsumed_tail
                if not room:
                    self.has_more = True
                    break
        self._tail = b"" if self._is_over else tail
        return b"".join(out)

    def _is_encoded(self, tail: bytes) -> bool:
        """Whether a body that is said to be gzip begins so. Otherwise it passes, unless more bytes decide."""
        if self._is_over:
            return False
        self._is_known = tail.startswith(_MAGIC)
        self._is_over = not _MAGIC.startswith(tail[:2]) or (self._framing.done and not self._is_known)
        return self._is_known

    def _begun(self, tail: bytes) -> zlib._Decompress | None:
        """A decompressor for what begins with `tail`; None: more bytes decide."""
        if self._is_gzip:
            return zlib.decompressobj(_GZIP)
        if len(tail) < 2:
            return None
        has_header = tail[0] & 0x0F == _DEFLATED and (tail[0] << 8 | tail[1]) % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if has_header else _RAW)
