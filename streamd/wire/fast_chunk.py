"""The common case of a relayed token: a read that is a single HTTP chunk, nearly always with a single event in it.

Inference servers write each token so, and on a network that keeps up it arrives so. one_chunk() decodes such a read
with half a dozen C-level operations and no object but the payload. It is only a short cut: a read that it doesn't know
goes through wire/chunked.py, which gives the same payload for the same bytes (a property test holds it).
"""

from __future__ import annotations

_CRLF = b"\r\n"


def _totals() -> dict[bytes, int]:
    """The first five bytes of a chunk with a size of two or three digits, mapped to the chunk's length.

    Five bytes are the whole size line of three digits, or that of two and the first byte of a payload that begins as
    events do: a field, or a comment.
    """
    totals = {b"%b\r\n%c" % (size, first): n + 6 for n in range(16, 256) for size in _hex(n) for first in b"dei:r"}
    return totals | {size + _CRLF: n + 7 for n in range(256, 4096) for size in _hex(n)}


def _hex(n: int) -> set[bytes]:
    return {b"%x" % n, b"%X" % n}


TOTALS = _totals()
_TWO_DIGITS_MAX = 255 + 6


def one_chunk(read: bytes) -> bytes | None:
    """The payload if `read` is exactly one chunk of 16 to 4,095 bytes; None for any other: the decoder has to take it.

    Valid only while the chunked decoder stands between chunks.
    """
    total = len(read)
    if TOTALS.get(read[:5]) != total or read[-2:] != _CRLF:
        return None
    return read[4:-2] if total <= _TWO_DIGITS_MAX else read[5:-2]


# Chunks that several_chunks() takes at most. A tenth of a second of the fastest model's tokens, and no more work than a
# few reads: net/turns.py counts the others.
CHUNKS_MAX = 32


def several_chunks(read: bytes) -> list[bytes] | None:
    """The payloads if `read` is 2 to CHUNKS_MAX whole chunks as one_chunk() knows them; None for any other read.

    Valid only while the chunked decoder stands between chunks.
    """
    payloads: list[bytes] = []
    at, end = 0, len(read)
    while at < end:
        total = TOTALS.get(read[at : at + 5])
        if total is None or len(payloads) == CHUNKS_MAX:
            return None
        first, at = at, at + total
        if at > end or read[at - 2 : at] != _CRLF:
            return None
        payloads.append(read[first + 4 if total <= _TWO_DIGITS_MAX else first + 5 : at - 2])
    return payloads


def chunk_bytes(payload: bytes) -> int:
    """The size of the chunk around a payload of several_chunks()."""
    total = len(payload) + 6
    return total if total <= _TWO_DIGITS_MAX else total + 1
