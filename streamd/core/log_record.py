"""Records of a replay log's growth, for a copy of the log in another place: the bytes since a mark, and nothing else.

ReplayLog.since() makes a record, ReplayLog.extend() applies it to the copy: the segments and templates of both logs are
equal byte for byte afterwards. A record is 2 bytes and the new bytes of the log, thus some 10 bytes for a token.

The form, all numbers as varints (7 bits a byte, the lowest first, the first bit set in all but the last byte):

    flags      1: there are templates; 2: there are several pieces; 4: the record starts over
    events     the number of events in the record
    templates  if there are some: the index of the first, their number, then each: merges (1 byte), number of holes,
               holes, pieces with their lengths
    pieces     a single piece without a length, or their number and each piece with its length

The first piece continues the tail of the copy, and may be empty; each further piece begins a segment. In a record that
starts over, all pieces are segments, and the templates are all that the log has: the copy forgets its former content.
The seq of the last event isn't in the record. It comes beside it, as the position in the place that holds the copy.

A record is untrusted input. unpack() checks lengths and counts, extend() every mark and text; neither takes more work
or memory than the record has bytes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# A byte names a template in the log. An answer of many parts (tool calls, choices, outputs of Responses) needs a few
# dozen: a template for each part. An event that fits none is compared with all of them, which takes 10-20 us.
TEMPLATES_MAX: Final = 64

TemplateParts = tuple[tuple[bytes, ...], bytes, bool]  # fixed pieces, holes, merges

_WITH_TEMPLATES: Final = 1
_IN_PIECES: Final = 2
_STARTS_OVER: Final = 4
_FLAGS: Final = _WITH_TEMPLATES | _IN_PIECES | _STARTS_OVER

# 35 bits: more than a log has bytes or events.
_VARINT_BYTES_MAX: Final = 5


class LogRecord(NamedTuple):
    """The events seq_first <= seq <= seq_last of a log, as they stand in its bytes."""

    starts_over: bool  # the copy forgets its content; else seq_first follows its last event
    events: int
    seq_last: int
    templates_from: int  # the index of the first of `templates` in the log
    templates: tuple[TemplateParts, ...]
    pieces: tuple[bytes, ...]

    @property
    def seq_first(self) -> int:
        """The seq of the first event; seq_last + 1 if the record has no event."""
        return self.seq_last - self.events + 1


def pack(record: LogRecord) -> bytes:
    """The record's bytes, without its seq_last."""
    pieces = record.pieces
    flags = _STARTS_OVER if record.starts_over else 0
    if not record.templates and len(pieces) == 1:  # nearly all records
        return b"%c%b%b" % (flags, _varint(record.events), pieces[0])
    out = [b"", _varint(record.events)]
    if record.templates:
        flags |= _WITH_TEMPLATES
        out += (_varint(record.templates_from), _varint(len(record.templates)))
        for fixed, holes, merges in record.templates:
            out += (bytes((merges,)), _with_length(holes), *map(_with_length, fixed))
    if len(pieces) != 1:
        flags |= _IN_PIECES
        out += (_varint(len(pieces)), *map(_with_length, pieces))
    else:
        out.append(pieces[0])
    out[0] = bytes((flags,))
    return b"".join(out)


def unpack(data: bytes, seq_last: int) -> LogRecord:
    """The record in these bytes, whose last event has the number seq_last. Raises ValueError for any other bytes."""
    rest = _RecordBytes(data)
    flags = rest.byte()
    if flags & ~_FLAGS:
        raise ValueError("a record with flags that this version doesn't know")
    events = rest.number()
    if events > seq_last or seq_last >> 8 * 5:
        raise ValueError("a record with more events than seqs, or with seqs beyond 5 bytes")
    first, templates = 0, []
    if flags & _WITH_TEMPLATES:
        first = rest.number()
        count = rest.number()
        if not 0 < count <= TEMPLATES_MAX - first:
            raise ValueError(
                "a record with more templates than a log can have, or with none where there should be some"
            )
        for _ in range(count):
            merges, holes = rest.byte(), rest.take(rest.number())
            if merges > 1:
                raise ValueError("a template that neither merges nor doesn't")
            templates.append((tuple([rest.take(rest.number()) for _ in range(len(holes) + 1)]), holes, bool(merges)))
    if flags & _IN_PIECES:
        # Each piece takes at least the byte of its length, so a forged number ends with the bytes.
        pieces = [rest.take(rest.number()) for _ in range(rest.number())]
        if not rest.over:
            raise ValueError("a record longer than the lengths in it say")
    else:
        pieces = [rest.all()]
    return LogRecord(bool(flags & _STARTS_OVER), events, seq_last, first, tuple(templates), tuple(pieces))


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _with_length(piece: bytes) -> bytes:
    return _varint(len(piece)) + piece


class _RecordBytes:
    """Reads a record from the front. Each step raises ValueError where the bytes end."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at == len(self._data)

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        value = shift = 0
        for _ in range(_VARINT_BYTES_MAX):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number of more than five bytes")

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ValueError("a record shorter than the lengths in it say")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def all(self) -> bytes:
        taken = self._data[self._at :]
        self._at = len(self._data)
        return taken
