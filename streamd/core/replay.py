"""ReplayLog: the history of a stream in about ten bytes an event, read back byte for byte, or coalesced.

Neighbouring chunks of a generation differ only in the delta's text. So the log keeps the bytes around the text once, as
a *template* (wire/template.py), and then only texts. A text is kept as the JSON-escaped inside of its string, which can
hold no control byte. So a newline ends a text, and the log needs no offsets and no object for each event. Concatenating
the texts of a template *is* the coalesced event, without parsing.

The form. An event of a template is its text, and perhaps a *padding*: a second varying field behind the text
(`obfuscation`), or the *counts*, which are the numbers in holes of the template, or the contents of holes in members
that vary with each token (log probabilities, token ids). The log is a list of sealed *segments*
and a tail, all immutable bytes. A segment is

    first seq (5 bytes), then records:
    text [US padding] LF                    an event of the current template
    SOH k [number]                          from here on template k. A mark of a numbered template ends with the
                                            sequence_number of the next text (5 bytes)
    SOH 0xFE created                        from here on this `created` (10 digits), for all templates
    SOH 0xFF length (4 bytes) event         an event kept whole, as it is; the current template stays

and opens with the marks for template and `created` if there are any yet, so each segment can be read without those
before it. The sequence_number grows by 1 with each text; where it doesn't, a mark says so. Bytes of an event can't be
taken for a mark: texts and padding hold no control bytes, and whole events are skipped by their length.

Why segments of at most 479 bytes (a single larger record makes a segment of its own size): with the 33 of a bytes
object they fill pymalloc's class of 512, so that the tail, made anew by each append, never leaves the small-object
allocator: no realloc, no fragmentation. Tried and rejected: a single bytearray (over-allocates by an eighth, fragments,
and a live memoryview makes an append raise BufferError), a list of tuples (58 KB for 500 tokens), offsets in arrays
(7.4 KB).

Bounds. Both caps are checked when a segment is sealed, never for each event: the log may exceed them by a segment and
an event. Templates stay while the log lives. So a log learns no more of them when all together, in use or not, would
take more than half of its bytes: an upstream may give each event an id of its own, and then each would cost a template.
The first template is learnt in any case.

An event may be larger than the cap in bytes by itself (images, audio); the newest of these is kept beside all that the
cap allows, until as much has followed it. The log holds the events seq_first <= seq < seq_next; those in front of
seq_first have been dropped.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from streamd.core.log_record import TEMPLATES_MAX, LogRecord, TemplateParts
from streamd.wire.shapes import Shapes, learnt_alone
from streamd.wire.template import (
    AGAIN,
    COUNT,
    COUNT_DIGITS_MAX,
    CREATED,
    NUMBER,
    PAD,
    PLAIN,
    SEVERAL,
    SPACED,
    SPACES,
    SPELT,
    TEMPLATE_BYTES_MAX,
    TEXT,
    VARIED,
    Delta,
    Fill,
    Template,
    combine,
    is_string_inside,
)

SEGMENT_BYTES_MAX: Final = 479  # see above
# Most text in a coalesced event (docs/PROTOCOL.md, section 3); a single event with more text stays whole.
COALESCED_TEXT_BYTES_MAX: Final = 16 * 1024
# Templates that take turns: as many choices or parallel tool calls as an answer usually has. Each takes some 400 bytes.
AIMS_MAX: Final = 8
# Attempts to learn a template: this many at first, then in every 16th event. An attempt parses, 10-30 us, so an append
# to a stream that never repeats itself costs 2 us more on average.
LEARNT_AT_ONCE_MAX: Final = 24
LEARN_EVERY_LOG2: Final = 4
# Limit on the work of a coalesced read: a run of texts counts 1 (1-2 us), a whole event parsed as JSON 8 (10-15 us). So
# a call takes at most 1-2 ms of a loop turn, whatever the stream.
WORK_MAX: Final = 1024
_WORK_OF_PARSING: Final = 8

# An event of this size is kept whole without a look for its template, which takes 30 us a KiB: it is much larger than
# what neighbours are merged to, and all its readers share its bytes (large_event).
LARGE_EVENT_BYTES_MIN: Final = 64 * 1024

# Sizes of CPython 3.11 on 64 bits, for bytes_held (tests compare with sys.getsizeof).
_BYTES_OBJECT: Final = 33
_TEMPLATE_OBJECT: Final = 64 + 40  # the object, and the tuple of its pieces without its places
_TUPLE_PLACE: Final = 8
_LOG_OBJECT: Final = 256 + 8 * 32  # slots and the garbage collector's head; the log's integers
_AIMS: Final = 64 + 288  # a dictionary of up to ten
_AIM: Final = 72
_LIST: Final = 56
_LIST_PLACE: Final = 9  # a pointer, over-allocated by an eighth

_HEAD: Final = 5
_MARK: Final = 0x01
_MARK_BYTE: Final = b"\x01"
_DATE: Final = 0xFE
_WHOLE: Final = 0xFF
_PAD_MARK: Final = b"\x1f"
_ZERO: Final = 0x30
_LF: Final = b"\n"
_PADDING: Final = re.compile(rb"\x1f[^\n]*")
# Bytes allowed in a run of texts (with its LF and US), and in a template's fixed pieces.
_IN_TEXTS: Final = bytes((*range(0x20, 256), 0x0A, 0x1F))
_IN_PIECES: Final = bytes((*range(0x20, 256), 0x09, 0x0A))
_NEVER: Final = b"\0"  # no event ends in NUL: as prefix and suffix it shuts append_text() until a template is in use

# The bytes that append compares with, for a template: prefix, suffix, _padding and _counting of ReplayLog.
Aim = tuple[bytes, bytes, tuple[bytes, bytes, bytes] | None, tuple[bytes, ...] | None]
Event = tuple[int, bytes]  # its seq (the last seq, if coalesced), and its bytes
# (segment, start, end, whole): the bytes between are an event kept whole, or texts with their line ends.
Run = tuple[bytes, int, int, bool]


class LogParts(NamedTuple):
    """The content of a log as values, for its snapshot (core/snapshot.py). The segments have the form above."""

    seq_first: int
    seq_next: int
    text_events: int
    text_bytes: int
    templates: tuple[TemplateParts, ...]
    segments: tuple[bytes, ...]


class Cursor:
    """A reader's position: `seq` is the next event to read. The other fields let reading go on from there in O(1)."""

    __slots__ = ("_created", "_number", "_offset", "_segment", "_template", "seq")

    def __init__(self, seq: int, segment: int) -> None:
        self.seq = seq
        self._segment = segment  # its number, counted from the log's first segment, which may be gone
        self._offset = 0  # 0: at the segment's start, where marks set the state below
        self._template: Template | None = None
        self._created = b""
        self._number = -1


class Mark:
    """How far a log is known in another place: all events before `seq_next`. since() moves it."""

    __slots__ = ("_offset", "_segment", "_templates", "seq_next")

    def __init__(self, seq_next: int, segment: int, offset: int, templates: int) -> None:
        self.seq_next = seq_next
        self._segment = segment  # as in a Cursor
        self._offset = offset  # 0: the next record starts over
        self._templates = templates  # at least this many templates are known there

    def move_to(self, other: Mark) -> None:
        """Stand where `other` does."""
        self.seq_next, self._segment = other.seq_next, other._segment
        self._offset, self._templates = other._offset, other._templates


class _Joined:
    """The fields that append_text() touches. Slots of a base class come first and so are neighbours in memory: over
    thousands of streams, where each line of the cache is a miss, a token costs two lines here and not five.
    """

    __slots__ = ("_cut", "_from", "_number", "_prefix", "_suffix", "_tail", "seq_next")

    # The bytes of the current template's events before and after the text (padding empty), and the length of each.
    _prefix: bytes
    _suffix: bytes
    _from: int
    _cut: int
    _tail: bytes
    _number: int  # the sequence_number expected of the next text; below 0: none
    seq_next: int  # the seq of the next append


class ReplayLog(_Joined):
    """The bounded history of a stream.

    `bytes_max` bounds bytes_held, `events_max` the number of events; both may be exceeded by a segment and an event.
    """

    __slots__ = (
        "_aims",
        "_base",
        "_counting",
        "_created",
        "_current",
        "_learnt",
        "_numbering",
        "_other_events",
        "_padding",
        "_segments",
        "_templates",
        "_text_base",
        "bytes_held",
        "bytes_max",
        "events_max",
        "seq_first",
        "shapes",
    )

    def __init__(self, *, bytes_max: int, events_max: int) -> None:
        assert bytes_max > 0 and events_max > 0
        self.bytes_max = bytes_max
        self.events_max = events_max
        self.seq_first = 1  # the oldest seq held; seq_next if there is none
        self.seq_next = 1
        # append_text() updates no counter of texts: text_events and text_bytes are derived from everything else.
        # `_other_events` counts the events that aren't texts. `_text_base` + len(`_tail`) is the size of all texts with
        # their line ends: a byte of another kind is subtracted from the base when it is written.
        self._other_events = 0
        self._text_base = 0
        self.bytes_held = 0  # user space: objects and payload, the tail counted as a full segment
        self._learnt = 0  # attempts to learn a template
        self.shapes: Shapes | None = None  # those of the stream's upstream and model, known from other streams
        self._base = 0  # number of the first held segment
        self._forget()

    def _forget(self) -> None:
        """Return to the state of an empty log, which allocates nothing."""
        self._segments: list[bytes] | None = None
        self._tail = b""
        self._templates: list[Template] | None = None
        # The state of writing: the current template and the content of its holes.
        self._current = -1
        self._created = b""
        self._number = -1
        self._prefix = self._suffix = _NEVER
        self._from = self._cut = 0
        # With padding: the bytes between text and padding, those after it, and a table that leaves padding as it is.
        self._padding: tuple[bytes, bytes, bytes] | None = None
        # With counts: the bytes between text and first count, those between the counts, and those after the last count.
        self._counting: tuple[bytes, ...] | None = None
        # With a sequence_number in front of the text: the bytes before and after the number.
        self._numbering: list[bytes] | None = None
        # Of templates that were in use since `created` changed, and aren't now: choices take turns. None numbered.
        self._aims: dict[int, Aim] | None = None
        self.bytes_held = _LOG_OBJECT

    @property
    def text_events(self) -> int:
        """Number of events for which append() returned True."""
        return self.seq_next - 1 - self._other_events

    @property
    def text_bytes(self) -> int:
        """Size of their texts as on the wire, without the line ends that the log adds."""
        return self._text_base + len(self._tail) - self.text_events

    # Writing.

    def append(self, event: bytes) -> bool:
        """Keep `event` (LF line ends, no `id:` line, blank line included) as number seq_next.

        True if it joined a known template: then it is a pure text delta without finish_reason and usage, known without
        parsing. False if it was kept whole, or a template was learnt from it: the caller has to look at it.
        """
        if len(event) >= LARGE_EVENT_BYTES_MIN:
            self.keep_whole(event)
            return False
        return self.append_text(event) or self._append_other(event)

    def append_text(self, event: bytes) -> bool:
        """Keep `event` as number seq_next if it fits the template in use; else return False and change nothing.

        The bytes may come unchecked from a read: bytes that fit begin and end like the event that the template was
        learnt from, and the inside of a JSON string, thus no line end, is between. So they are exactly one event.
        """
        if event.startswith(self._prefix) and event.endswith(self._suffix):
            # If beginning and end overlap, this slice is empty.
            text = event[self._from : -self._cut]
            if text and text.translate(PLAIN) is text:  # translate() returns the same object if every byte is plain
                tail = self._tail + text + _LF
                if len(tail) <= SEGMENT_BYTES_MAX:
                    self._tail = tail
                else:
                    self._roll(text + _LF)
                self.seq_next += 1
                if self._number >= 0:
                    self._renumber()
                return True
        return False

    def append_run(self, events: list[bytes], start: int = 0) -> int:
        """Keep the events from index `start` on, as append() keeps each, as far as they fit the template in use.

        Returns their number. Like append_text() it takes bytes unchecked from a read; all of them are text deltas.
        """
        if self._padding or self._counting or (self._number >= 0 and not self._numbering):
            return self._append_one_by_one(events, start)
        prefix, suffix, cut, numbering, number = self._prefix, self._suffix, self._cut, self._numbering, self._number
        if start >= len(events) or not events[start].startswith(prefix):
            return 0
        texts = []
        for event in events[start:] if start else events:
            if not event.startswith(prefix) or not event.endswith(suffix):
                break
            text = event[len(prefix) : -cut]
            if not text:  # none, or beginning and end overlap
                break
            texts.append(text)
            if numbering:
                number += 1
                prefix = (b"%d" % number).join(numbering)
        together = b"".join(texts)
        if together.translate(PLAIN) is not together:
            del texts[next((k for k, text in enumerate(texts) if not is_string_inside(text)), len(texts)) :]
        if texts:
            self._put_texts(texts)
        return len(texts)

    def _append_one_by_one(self, events: list[bytes], start: int) -> int:
        """As append_run(), for events with more than a text that varies."""
        for k in range(start, len(events)):
            if not self.append_text(events[k]) and not self._append_filled(events[k]):
                return k - start
        return len(events) - start

    def _put_texts(self, texts: list[bytes]) -> None:
        """Write texts of the template in use."""
        tail = b"%b%b\n" % (self._tail, _LF.join(texts))
        if len(tail) <= SEGMENT_BYTES_MAX:
            self._tail = tail
            self.seq_next += len(texts)
            if self._numbering:
                self._number += len(texts) - 1
                self._renumber()
            return
        for text in texts:
            self._put(text + _LF)
            self._count(is_text=True)

    def _append_filled(self, event: bytes) -> bool:
        """Keep an event that differs from the template in use only in its text, and in padding or counts."""
        fill = self._fill(event)
        if fill is None:
            return False
        record = self._record(*fill)
        self._put(record)
        self._text_base -= len(record) - len(fill[0]) - 1
        return self._count(is_text=True)

    def _append_other(self, event: bytes) -> bool:
        """Keep an event that isn't plain text in the current template."""
        if self._templates and self._append_filled(event):
            return True
        found = self._find(event)
        if found:
            record = self._put_switching(*found)
            self._text_base -= len(record) - len(found[1].text) - 1
            return self._count(is_text=True)
        found = self._learn(event)
        if found:
            record = self._put_switching(*found)
            self._text_base -= len(record)
            self.keep_bounds()  # the template takes room, too
            return self._count(is_text=False)
        self.keep_whole(event)
        return False

    def keep_whole(self, event: bytes) -> None:
        """Append an event without looking for its template and without learning from it."""
        mark = b"\x01\xff" + len(event).to_bytes(4, "big")
        size = len(mark) + len(event)
        if self._tail and len(self._tail) + size <= SEGMENT_BYTES_MAX:
            self._tail = b"%b%b%b" % (self._tail, mark, event)
        else:
            self._roll(mark, event)
        self._text_base -= size
        self.seq_next += 1
        self._other_events += 1

    def _count(self, *, is_text: bool) -> bool:
        self.seq_next += 1
        if not is_text:
            self._other_events += 1
        if self._number >= 0:
            self._renumber()
        return is_text

    def _fill(self, event: bytes) -> tuple[bytes, bytes] | None:
        """Text and padding of an event of the current template; None if anything else in it differs."""
        if not event.startswith(self._prefix):
            return None
        if event.endswith(self._suffix) and len(event) >= self._from + self._cut:
            text = event[self._from : -self._cut]
            return (text, b"") if is_string_inside(text) else None
        if self._counting:
            return self._fill_counted(event, self._counting)
        if not self._padding:
            return None
        middle, after, table = self._padding
        text, found, pad = event[self._from : -len(after)].partition(middle)
        # A plain text holds no quote and `middle` begins with a quote, so the text ends at the first `middle`.
        if found and text.translate(PLAIN) is text and pad.translate(table) is pad and event.endswith(after):
            return text, pad
        return None

    def _fill_counted(self, event: bytes, pieces: tuple[bytes, ...]) -> tuple[bytes, bytes] | None:
        """As _fill, for counts. A plain text holds no quote, so the first piece ends it; the other pieces follow."""
        at = end = event.find(pieces[0], self._from)
        text = event[self._from : end]
        if end < 0 or text.translate(PLAIN) is not text:
            return None
        counts = []
        for before, after in pairwise(pieces):
            at += len(before)
            end = event.find(after, at)
            count = event[at:end]
            if not count.isdigit() or len(count) > COUNT_DIGITS_MAX or (count[0] == _ZERO and len(count) > 1):
                return None
            counts.append(count)
            at = end
        return (text, b" ".join(counts)) if at + len(pieces[-1]) == len(event) else None

    @staticmethod
    def _record(text: bytes, pad: bytes) -> bytes:
        return b"%b\x1f%b\n" % (text, pad) if pad else text + _LF

    def _find(self, event: bytes) -> tuple[int, Fill] | None:
        """The template that `event` fits. The search goes round from the current template, as choices take turns."""
        templates = self._templates
        if not templates:
            return None
        for k, (prefix, suffix, _, _) in (self._aims or {}).items():
            if event.startswith(prefix) and event.endswith(suffix):
                text = event[len(prefix) : -len(suffix)]
                if text and is_string_inside(text):
                    return k, Fill(self._created, -1, text, b"")
        current, count = max(0, self._current), len(templates)
        for k in (*range(current, count), *range(current)):
            fill = templates[k].match(event)
            if fill:
                return k, fill
        return None

    def _learn(self, event: bytes) -> tuple[int, Fill] | None:
        if b"{" not in event:  # `[DONE]`, mostly: it has no text
            return None
        count = len(self._templates or ())
        if count == TEMPLATES_MAX or self._learnt >= LEARNT_AT_ONCE_MAX + (self.seq_next >> LEARN_EVERY_LOG2):
            return None
        self._learnt += 1
        learnt = learnt_alone(event) if self.shapes is None else self.shapes.learn(event)
        if learnt is None or not self._has_room_for(learnt[0]):
            return None
        template, fill = learnt
        self._add_template(template)
        return count, fill

    def _has_room_for(self, template: Template) -> bool:
        """Whether the log may keep one more template, within the half of its bytes that templates and aims may take."""
        known = self._templates
        return not known or 2 * sum(map(_template_held_max, (*known, template))) <= self.bytes_max

    def _add_template(self, template: Template) -> None:
        if self._templates is None:
            self._templates = []
        templates = self._templates
        templates.append(template)
        # The log also holds the current template's pieces joined to prefix and suffix. That memory is counted once,
        # with the first template.
        copies = 1 if len(templates) > 1 or template.varied else 2 + (template.numbered or template.padded)
        self.bytes_held += _template_held(template, copies)

    def _keep_aim(self) -> None:
        """The current template goes out of use for a while."""
        if self._aims is None:
            self._aims = {}
            self.bytes_held += _AIMS
        if self._current not in self._aims and len(self._aims) < AIMS_MAX:
            aim = self._aims[self._current] = self._prefix, self._suffix, self._padding, self._counting
            self.bytes_held += _aim_held(aim)

    def _drop_aims(self) -> None:
        """`created` has changed, which is a part of each aim."""
        if self._aims is not None:
            self.bytes_held -= _AIMS + sum(map(_aim_held, self._aims.values()))
            self._aims = None

    def _aim(self) -> None:
        """Set the bytes that append compares with, from the current template and the content of its holes."""
        assert self._templates
        template = self._templates[self._current]
        aim = self._aims.get(self._current) if self._aims is not None else None
        self._prefix, self._suffix, self._padding, self._counting = aim or self._aim_at(template)
        self._from, self._cut = len(self._prefix), len(self._suffix)
        self._numbering = None
        if template.numbered and self._suffix is not _NEVER:
            halves = template.pieces(self._created, _MARK_BYTE, b"")[0].split(_MARK_BYTE)
            self._numbering = halves if len(halves) == 2 else None

    def _aim_at(self, template: Template) -> Aim:
        if template.varied:
            return _NEVER, _NEVER, None, None
        pieces = template.around(self._created, self._number)
        if len(pieces) != 2:  # the text stands in it twice
            return _NEVER, _NEVER, None, None
        prefix, suffix = pieces
        if not template.padded:
            return prefix, suffix, None, None
        marks = b" ".join([_PAD_MARK] * max(1, template.holes.count(COUNT)))
        split = template.around(self._created, self._number, marks)[1].split(_PAD_MARK)
        if template.counted:
            return prefix, suffix, None, tuple(split)
        middle, after = split
        return prefix, suffix, (middle, after, template.pad_table), None

    def _renumber(self) -> None:
        """Put the next sequence_number into the bytes that append compares with."""
        self._number += 1
        if not self._numbering:
            self._aim()
            return
        self._prefix = (b"%d" % self._number).join(self._numbering)
        self._from = len(self._prefix)

    def _put(self, record: bytes) -> None:
        """Write a record that needs no mark before it."""
        if self._tail and len(self._tail) + len(record) <= SEGMENT_BYTES_MAX:
            self._tail += record
        else:
            self._roll(record)

    def _put_switching(self, k: int, fill: Fill) -> bytes:
        """Write a text of template `k` with the marks that it needs; return the record without them."""
        marks = b""
        if k != self._current and self._number < 0 <= self._current and self._from:
            self._keep_aim()
        if k != self._current or fill.number != self._number:
            self._current, self._number = k, fill.number
            marks = self._switch()
        if fill.created and fill.created != self._created:
            self._created = fill.created
            self._drop_aims()
            marks += self._date()
        if marks or not self._from:  # extend() leaves the template in use without an aim
            self._aim()
        record = self._record(fill.text, fill.pad)
        tail = b"%b%b%b" % (self._tail, marks, record)
        if self._tail and len(tail) <= SEGMENT_BYTES_MAX:
            self._tail = tail
            self._text_base -= len(marks)
        else:
            self._roll(record)
        return record

    def _switch(self) -> bytes:
        number = self._number.to_bytes(5, "big") if self._number >= 0 else b""
        return b"\x01%c%b" % (self._current, number)

    def _date(self) -> bytes:
        return b"\x01\xfe" + self._created

    def _roll(self, *record: bytes) -> None:
        """Seal the tail and begin another with a record, whose event is seq_next. It comes in parts, so that an event
        of megabytes is copied once.
        """
        if self._tail:
            self._seal_tail()
        head = self.seq_next.to_bytes(_HEAD, "big")
        if self._current >= 0:
            head += self._switch()
        if self._created:
            head += self._date()
        self._text_base += len(self._tail) - len(head)
        self._tail = b"".join((head, *record))
        self.bytes_held += _tail_held(self._tail)
        self.keep_bounds()

    def _seal_tail(self) -> None:
        """The tail becomes a segment; the caller begins another."""
        if self._segments is None:
            self._segments = []
            self.bytes_held += _LIST
        self._segments.append(self._tail)
        self.bytes_held += _held(self._tail) - _tail_held(self._tail)

    # Forgetting.

    def keep_bounds(self) -> None:
        """Above a bound, drop an eighth at once, so that the next segments drop nothing."""
        if self.bytes_held > self.bytes_max or self.seq_next - self.seq_first >= self.events_max:
            self._drop(self.bytes_max * 7 // 8, self.events_max * 7 // 8)

    def _drop(self, bytes_max: int, events_max: int, *, spares: bool = True) -> None:
        """Drop the oldest sealed segments until the log keeps to both bounds, or only the tail is left.

        Unless `spares` is False, the newest event that is larger than the log's bound by itself isn't counted: what is
        older and newer may have the whole bound, and a reader that pauses for a moment doesn't lose the event.
        """
        segments = self._segments or []
        large = self._newest_oversize(segments) if spares else -1
        spared = 0 if large < 0 else _held(segments[large]) if large < len(segments) else _tail_held(self._tail)
        dropped, held = 0, self.bytes_held - spared
        while dropped < len(segments) and (held > bytes_max or self.seq_next - _first(segments[dropped]) > events_max):
            if dropped == large:
                spared = 0
            else:
                held -= _held(segments[dropped])
            dropped += 1
        if dropped:
            del segments[:dropped]
            self._base += dropped
            self.bytes_held = held + spared
            self.seq_first = _first(segments[0] if segments else self._tail)

    def _newest_oversize(self, segments: list[bytes]) -> int:
        """The index of the newest segment, or of the tail behind them, above the log's bound; -1: there is none."""
        if len(self._tail) > self.bytes_max:
            return len(segments)
        newest_first = range(len(segments) - 1, -1, -1)
        return next((index for index in newest_first if len(segments[index]) > self.bytes_max), -1)

    def trim_to(self, bytes_max: int) -> None:
        """Drop the oldest events until bytes_held <= bytes_max, all if need be; an empty log's object remains."""
        self._drop(bytes_max, self.events_max, spares=False)
        if self.bytes_held > bytes_max and self._tail:
            self._base += 1
            self.seq_first = self.seq_next
            self._text_base += len(self._tail)
            self._forget()

    # Outliving the process.

    def parts(self) -> LogParts:
        """The content from which of_parts() makes the same log. No copies: segments are immutable."""
        templates = tuple((each.fixed, each.holes, each.merges) for each in self._templates or ())
        segments = (*(self._segments or ()), *((self._tail,) if self._tail else ()))
        return LogParts(self.seq_first, self.seq_next, self.text_events, self.text_bytes, templates, segments)

    @classmethod
    def of_parts(cls, parts: LogParts, *, bytes_max: int, events_max: int) -> ReplayLog:
        """A log with this content, trimmed to its caps; parts that don't come from parts() have to pass check_parts().

        The state of writing starts anew: the next event looks for its template and writes the marks for it.
        """
        log = cls(bytes_max=bytes_max, events_max=events_max)
        log.seq_first, log.seq_next = parts.seq_first, parts.seq_next
        log._other_events = log.seq_next - 1 - parts.text_events
        for fixed, holes, merges in parts.templates:
            log._add_template(Template(fixed, holes, merges))
        log._learnt = len(parts.templates)
        if len(parts.segments) > 1:
            log._segments = list(parts.segments[:-1])
            log.bytes_held += _LIST + sum(map(_held, log._segments))
        if parts.segments:
            log._tail = parts.segments[-1]
            log.bytes_held += _tail_held(log._tail)
        log._text_base = parts.text_bytes + parts.text_events - len(log._tail)
        log.keep_bounds()
        return log

    # A copy in another place (core/log_record.py).

    def mark_at_start(self) -> Mark:
        """The mark of a log that isn't known elsewhere: the next record starts over with the oldest event held."""
        return Mark(self.seq_first, self._base, 0, 0)

    def mark_behind(self, seq: int) -> Mark:
        """The mark of a log that is known elsewhere up to event `seq`. LookupError unless the log holds that event.

        It stands at the end of that event's segment, not at the start of the next. Else the copy would not learn that a
        segment was sealed between the two.
        """
        if seq >= self.seq_next:
            raise LookupError(seq)
        cursor = self.seek(seq)
        self._skip(cursor, seq + 1)
        # The templates that were in use at an older event aren't known here, so the next record has all of them.
        templates = len(self._templates or ()) if seq + 1 == self.seq_next else 0
        return Mark(seq + 1, cursor._segment, cursor._offset, templates)

    def since(self, mark: Mark, *, bytes_max: int) -> LogRecord | None:
        """The events behind the mark, which moves to their end; None if there are none.

        A record has at most `bytes_max` bytes and a segment, beside its templates: the next call returns the rest.
        LookupError if the log has dropped the segment at the mark: then mark_at_start() is the way on.
        """
        if mark.seq_next == self.seq_next:
            return None
        if mark._segment < self._base:
            raise LookupError(mark.seq_next)
        segments = self._segments or ()
        index = mark._segment - self._base
        held = segments[index] if index < len(segments) else self._tail
        pieces = [held[mark._offset :]]
        length = len(pieces[0])
        while index < len(segments) and length <= bytes_max:
            index += 1
            held = segments[index] if index < len(segments) else self._tail
            pieces.append(held)
            length += len(held)
        seq_next = self.seq_next
        if index < len(segments):
            seq_next = _first(segments[index + 1] if index + 1 < len(segments) else self._tail)
        known, templates = mark._templates, self._templates or []
        new = tuple([(each.fixed, each.holes, each.merges) for each in templates[known:]])
        record = LogRecord(
            mark._offset == 0, seq_next - mark.seq_next, seq_next - 1, known if new else 0, new, tuple(pieces)
        )
        mark.seq_next, mark._templates = seq_next, len(templates)
        mark._segment, mark._offset = self._base + index, len(held)
        return record

    def extend(self, record: LogRecord) -> None:
        """As add(), and then keep to the bounds."""
        self.add(record)
        self.keep_bounds()

    def add(self, record: LogRecord) -> None:
        """Add a record that since() of another log returned: the bytes of both logs are equal then, up to its end. The
        caller calls keep_bounds() once it has read the new events: a small log may not have room for all of them.

        The record may come from a stranger. Raises ValueError, with nothing changed, unless the record continues this
        log, or starts over and this log is new, and every byte of it can be read. Texts are counted from the bytes, so
        events that the other log had dropped before it started over count as events without text.
        """
        if record.seq_first != self.seq_next if not record.starts_over else self.seq_next != 1:
            raise ValueError("a record that doesn't begin with the event after the log's last event")
        known = len(self._templates or ())
        new = self._new_templates(record)
        holes = [*(each.holes for each in self._templates or ()), *(holes for _, holes, _ in new)]
        walk = _Check(holes, min(self._learnt, known))
        pieces = record.pieces
        if not record.starts_over:
            if not self._tail or not pieces:
                raise ValueError("a record that continues a segment which isn't there")
            walk.go_on(self._current, self._created, self._number)
            pieces = (self._tail + pieces[0], *pieces[1:])
        walk.check(pieces, record.seq_first, 0 if record.starts_over else len(self._tail))
        if walk.events != record.events:
            raise ValueError("a record with another number of events than it says")
        if record.starts_over:
            self.seq_first = self.seq_next = record.seq_first
            self._other_events = record.seq_first - 1
        texts = self._text_base + len(self._tail)
        for parts in new:
            self._add_template(Template(*parts))
        self._add_pieces(pieces)
        self._text_base = texts + walk.text_bytes + walk.text_events - len(self._tail)
        self.seq_next += walk.events
        self._other_events += walk.events - walk.text_events
        self._stop_writing(walk)

    def replace(self, fresh: ReplayLog) -> None:
        """Take over the content of another log of the same stream, which ends here or later. Cursors keep their seqs.

        For a copy whose other side has started over: the bytes of the two logs are different, the events the same.
        """
        assert fresh.seq_next >= self.seq_next
        base = self._base + len(self._segments or ()) + 1  # no cursor's segment is held any more
        for name in (*_Joined.__slots__, *ReplayLog.__slots__):
            setattr(self, name, getattr(fresh, name))
        self._base = base

    def extension(self, cursor: Cursor) -> list[tuple[bytes, bool]]:
        """The events behind the cursor, which moves to the end; of each, whether it is a text of a template.

        For the events that extend() has added, of which append() would have told it.
        """
        events: list[tuple[bytes, bool]] = []
        while run := self._next(cursor):
            segment, start, end, whole = run
            if whole:
                events.append((segment[start:end], False))
                cursor.seq += 1
                cursor._offset = end
                continue
            texts: list[Event] = []
            self._read_texts(cursor, run, 1 << 60, texts)
            events += [(event, True) for _, event in texts]
        return events

    def _new_templates(self, record: LogRecord) -> tuple[TemplateParts, ...]:
        """The templates of the record that this log lacks. ValueError if others are missing, differ or can't be."""
        if not record.templates:
            return ()
        known = self._templates or []
        first = record.templates_from
        if first > len(known):
            raise ValueError("a record that lacks templates")
        both = zip(known[first:], record.templates, strict=False)
        if any((each.fixed, each.holes, each.merges) != given for each, given in both):
            raise ValueError("a record with another template in the place of one that the log has")
        new = record.templates[len(known) - first :]
        for fixed, holes, merges in new:
            _check_template(fixed, holes, merges)
            if sum(map(len, fixed)) > TEMPLATE_BYTES_MAX:
                raise ValueError("a template larger than a log learns")
        return new

    def _add_pieces(self, pieces: Sequence[bytes]) -> None:
        """The first piece takes the tail's place, each further piece begins a segment."""
        for number, piece in enumerate(pieces):
            if self._tail and number == 0:
                self.bytes_held -= _tail_held(self._tail)
            elif self._tail:
                self._seal_tail()
            self._tail = piece
            self.bytes_held += _tail_held(piece)

    def _stop_writing(self, walk: _Check) -> None:
        """Keep the state at the log's end for readers. An append() finds its template anew."""
        self._current, self._created, self._number, self._learnt = walk.current, walk.created, walk.number, walk.used
        if self._from:
            self._prefix = self._suffix = _NEVER
            self._from = self._cut = 0
            self._padding = self._counting = self._numbering = None
            self._drop_aims()

    # Reading.

    def cursor_at_end(self) -> Cursor:
        """The position after the newest event. O(1)."""
        cursor = Cursor(self.seq_next, self._base + len(self._segments or ()))
        if self._tail:
            cursor._offset = len(self._tail)
            if self._templates and self._current >= 0:
                cursor._template = self._templates[self._current]
            cursor._created, cursor._number = self._created, self._number
        return cursor

    def seek(self, seq: int) -> Cursor:
        """The position before event `seq`. LookupError unless seq_first <= seq <= seq_next."""
        if not self.seq_first <= seq <= self.seq_next:
            raise LookupError(seq)
        if seq == self.seq_next:
            return self.cursor_at_end()
        segments = self._segments or []
        index = bisect_right(segments, seq, key=_first)
        if index < len(segments) or seq < _first(self._tail):
            index -= 1
        held = segments[index] if index < len(segments) else self._tail
        cursor = Cursor(_first(held), self._base + index)
        while cursor.seq < seq:
            self._skip(cursor, seq)
        return cursor

    def _skip(self, cursor: Cursor, seq: int) -> None:
        """Move over a run, but not further than `seq`."""
        run = self._next(cursor)
        assert run
        segment, start, end, whole = run
        if whole:
            cursor.seq += 1
            cursor._offset = end
            return
        lines = segment[start:end].split(_LF, seq - cursor.seq)
        self._pass(cursor, len(lines) - 1, end - start - len(lines[-1]))

    @staticmethod
    def _pass(cursor: Cursor, events: int, length: int) -> None:
        """Move over `events` texts of `length` bytes."""
        cursor.seq += events
        cursor._offset += length
        if cursor._number >= 0:
            cursor._number += events

    def _next(self, cursor: Cursor) -> Run | None:
        """The run at the cursor, which moves over marks but not over events; None at the end of the log."""
        if cursor._segment < self._base:
            self._find_again(cursor)
        segments = self._segments or ()
        while True:
            index = cursor._segment - self._base
            segment = segments[index] if index < len(segments) else self._tail
            at = cursor._offset or _HEAD
            if at < len(segment):
                if segment[at] != _MARK:
                    end = segment.find(_MARK_BYTE, at)
                    cursor._offset = at
                    return segment, at, end if end >= 0 else len(segment), False
                if segment[at + 1] == _WHOLE:
                    cursor._offset = at
                    end = at + 6 + int.from_bytes(segment[at + 2 : at + 6], "big")
                    return segment, at + 6, end, True
                self._follow(cursor, segment, at)
            elif index < len(segments):
                cursor._segment += 1
                cursor._offset = 0
            else:
                return None

    def _find_again(self, cursor: Cursor) -> None:
        """The cursor's segment was dropped, or belongs to the log that replace() put away."""
        found = self.seek(cursor.seq)
        cursor._segment, cursor._offset = found._segment, found._offset
        cursor._template, cursor._created, cursor._number = found._template, found._created, found._number

    def _follow(self, cursor: Cursor, segment: bytes, at: int) -> None:
        """Apply the mark at `at` to the cursor."""
        assert self._templates
        kind = segment[at + 1]
        cursor._offset = at + 2
        if kind == _DATE:
            cursor._created = segment[at + 2 : at + 12]
            cursor._offset = at + 12
            return
        cursor._template = template = self._templates[kind]
        cursor._number = -1
        if template.numbered:
            cursor._number = int.from_bytes(segment[at + 2 : at + 7], "big")
            cursor._offset = at + 7

    def read(self, cursor: Cursor, *, bytes_max: int) -> list[Event]:
        """The next events as they came, at most `bytes_max` bytes but at least one event; [] at the end.

        LookupError if the event at the cursor has been dropped.
        """
        events: list[Event] = []
        left = bytes_max
        while left > 0 and (run := self._next(cursor)):
            segment, start, end, whole = run
            if whole:
                if events and end - start > left:
                    break
                events.append((cursor.seq, segment[start:end]))
                cursor.seq += 1
                cursor._offset = end
                left -= end - start
            else:
                left = self._read_texts(cursor, run, left, events)
        return events

    def _read_texts(self, cursor: Cursor, run: Run, left: int, events: list[Event]) -> int:
        """Append a run's events as long as `left` bytes last; return the bytes left then, 0 or less if no more fit."""
        template = cursor._template
        assert template
        segment, start, end, _ = run
        pieces = template.around(cursor._created, cursor._number)
        lines = segment[start : end - 1].split(_LF)
        if not template.padded and not template.numbered:
            length = len(lines) * sum(map(len, pieces)) + (end - start - len(lines)) * (len(pieces) - 1)
            if length <= left:
                events += enumerate([text.join(pieces) for text in lines], cursor.seq)
                self._pass(cursor, len(lines), end - start)
                return left - length
        for line in lines:
            text, _, pad = line.partition(_PAD_MARK)
            if template.padded or template.numbered:
                pieces = template.around(cursor._created, cursor._number, pad, text)
            event = text.join(pieces)
            if events and len(event) > left:
                return 0
            events.append((cursor.seq, event))
            left -= len(event)
            self._pass(cursor, 1, len(line) + 1)
            if left <= 0:
                return 0
        return left

    def read_coalesced(self, cursor: Cursor, *, bytes_max: int = COALESCED_TEXT_BYTES_MAX) -> list[Event]:
        """The next events, the texts of neighbours concatenated: (last seq in it, event) each; [] at the end.

        About `bytes_max` bytes in all, at least one event. LookupError if the event at the cursor has been dropped.
        """
        return _Coalescing(self, cursor, bytes_max).read()

    def large_event(self, cursor: Cursor) -> memoryview | None:
        """The next event without a copy, if it is large; the cursor moves behind it.

        The log may drop the event meanwhile: the view keeps its bytes, which all readers of the event share.
        LookupError if the event at the cursor has been dropped.
        """
        run = self._next(cursor)
        if run is None:
            return None
        segment, start, end, whole = run
        if not whole or end - start < LARGE_EVENT_BYTES_MIN:
            return None
        cursor.seq += 1
        cursor._offset = end
        return memoryview(segment)[start:end]

    def last_event(self) -> bytes | None:
        """The newest event, None if there is none. It costs reading a segment."""
        if self.seq_first == self.seq_next:
            return None
        return self.read(self.seek(self.seq_next - 1), bytes_max=1)[0][1]


def check_parts(parts: LogParts) -> None:
    """Raise ValueError unless a log can consist of these parts: reading trusts every mark, length and seq.

    It is a single pass, with a step for each mark and each run of texts.
    """
    if len(parts.templates) > TEMPLATES_MAX:
        raise ValueError("too many templates")
    for fixed, holes, merges in parts.templates:
        _check_template(fixed, holes, merges)
    if not (parts.seq_first >= 1 and 0 <= parts.text_events < parts.seq_next and parts.text_bytes >= 0):
        raise ValueError("impossible counts")
    walk = _Check([holes for _, holes, _ in parts.templates], 0)
    walk.check(parts.segments, parts.seq_first, 0)
    if parts.seq_first + walk.events != parts.seq_next:
        raise ValueError("events are missing")


def _check_template(fixed: tuple[bytes, ...], holes: bytes, merges: bool) -> None:
    known = (TEXT, AGAIN, CREATED, NUMBER, PAD, SPACES, COUNT, *VARIED, SPELT, SPACED)
    single = bytes(hole for hole in holes if hole not in SEVERAL)
    once = len(set(single)) == len(single) and set(holes) <= set(known)
    text = holes.find(TEXT)
    after = [holes.find(hole) for hole in known if hole in holes and hole not in (TEXT, CREATED, NUMBER)]
    is_varied = Template(fixed, holes, merges).varied
    padded_once = sum(hole in holes for hole in (PAD, SPACES, COUNT)) + is_varied <= 1 and not (is_varied and merges)
    if len(fixed) != len(holes) + 1 or not once or text < 0 or not padded_once or any(at < text for at in after):
        raise ValueError("a template with an impossible set of holes")
    if any(piece.translate(None, _IN_PIECES) for piece in fixed) or fixed[-1][-2:] != b"\n\n":
        raise ValueError("a template whose pieces can't make an event")


class _Check:
    """Goes over segments as reading does, with a check of every byte and a count of the texts."""

    def __init__(self, holes: Sequence[bytes], used: int) -> None:
        self._holes = holes  # of each template
        self.used = used  # templates that earlier segments use: templates are learnt in their order
        self._segment = b""
        self._at = 0
        self._is_learning = False
        self.events = 0
        # Texts of a known template, as ReplayLog counts them: not the event that a template was learnt from.
        self.text_events = 0
        self.text_bytes = 0
        self._begin()

    def _begin(self) -> None:
        """The state at the start of a segment, which can be read without those before it."""
        self.go_on(-1, b"", -1)

    def go_on(self, current: int, created: bytes, number: int) -> None:
        """Take up the state at the end of a log."""
        self.current, self.created, self.number = current, created, number

    def check(self, segments: Sequence[bytes], seq: int, checked: int) -> None:
        """Go over the segments, the first event of which is `seq`. The first `checked` bytes of the first are known.

        Raises ValueError if reading would fail or go astray.
        """
        for number, segment in enumerate(segments):
            at = checked if number == 0 else 0
            if not at:
                if len(segment) <= _HEAD or _first(segment) != seq + self.events:
                    raise ValueError("a segment that doesn't begin with the seq after its predecessor")
                self._begin()
            before = self.events
            self._over(segment, at or _HEAD)
            events = self.events - before
            if not events and not at:
                raise ValueError("a segment without events")
            if len(segment) > SEGMENT_BYTES_MAX and (events != 1 if not at else len(segment) > at):
                raise ValueError("a segment of several events, larger than a log makes them")

    def _over(self, segment: bytes, at: int) -> None:
        self._segment, self._at = segment, at
        while self._at < len(segment):
            if segment[self._at] != _MARK:
                self._texts()
            elif (kind := self._take(2)[1]) == _WHOLE:
                event = self._take(int.from_bytes(self._take(4), "big"))
                if event[-2:] != b"\n\n":
                    raise ValueError("an event without its blank line")
                self.events += 1
            elif kind == _DATE:
                self.created = self._take(10)
                if not self.created.isdigit():
                    raise ValueError("a `created` that isn't 10 digits")
            else:
                self._switch(kind)

    def _take(self, count: int) -> bytes:
        taken = self._segment[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError("a segment cut short")
        self._at += count
        return taken

    def _switch(self, kind: int) -> None:
        if kind >= len(self._holes):
            raise ValueError("a mark for a template that the log doesn't have")
        self.current = kind
        self.number = int.from_bytes(self._take(5), "big") if NUMBER in self._holes[kind] else -1
        if kind >= self.used:
            self.used = kind + 1
            self._is_learning = True

    def _texts(self) -> None:
        end = self._segment.find(_MARK_BYTE, self._at)
        run = self._take((end if end >= 0 else len(self._segment)) - self._at)
        if self.current < 0 or (CREATED in self._holes[self.current] and not self.created):
            raise ValueError("texts without a template")
        if run[-1:] != _LF or run.translate(None, _IN_TEXTS):
            raise ValueError("texts with a forbidden byte, or without their line end")
        lines = run.count(_LF)
        if self.number >= 0:
            self.number += lines
            if self.number >> 8 * 5:
                raise ValueError("a sequence_number beyond five bytes")
        self.events += lines
        if _PAD_MARK in run:
            run = _PADDING.sub(b"", run)
        if self._is_learning:
            self._is_learning = False
            lines -= 1
            run = run[run.index(_LF) + 1 :]
        self.text_events += lines
        self.text_bytes += len(run) - lines


class _Coalescing:
    """A coalesced read. Its pending event, gathered and not given out, is either texts by template or a Delta."""

    __slots__ = (
        "_created",
        "_cursor",
        "_delta",
        "_event",
        "_left",
        "_log",
        "_number",
        "_pad",
        "_seq",
        "_siblings",
        "_text_bytes",
        "_texts",
        "_work",
        "events",
    )

    def __init__(self, log: ReplayLog, cursor: Cursor, bytes_max: int) -> None:
        # the read
        self._log = log
        self._cursor = cursor
        self._left = bytes_max
        self._work = 0
        self._siblings: dict[tuple[Template, Template], bool] = {}
        self.events: list[Event] = []
        # the pending event
        self._seq = 0  # of the newest event in it
        self._text_bytes = 0
        self._texts: dict[Template, list[bytes]] = {}
        self._created = b""  # of the first text: SDKs take it from the first chunk
        self._number = -1  # of the last text
        self._pad = b""
        self._delta: Delta | None = None
        self._event = b""  # the delta's event, until another is absorbed

    def read(self) -> list[Event]:
        """Each step takes the next run, adds it to the pending event or gives it out.

        Or it gives out the pending event alone: then the cursor stays, and the next step sees the same run again.
        """
        log, cursor = self._log, self._cursor
        while self._left > 0 and self._work < WORK_MAX and (run := log._next(cursor)):
            segment, start, end, whole = run
            self._work += 1
            if whole:
                self._take_whole(segment[start:end], end)
            else:
                self._take_texts(segment[start:end], run)
        self._flush()
        return self.events

    def _take_texts(self, lines: bytes, run: Run) -> None:
        cursor = self._cursor
        template = cursor._template
        assert template
        if not template.merges:
            self._flush()
            if self._left > 0:
                self._left = self._log._read_texts(cursor, run, self._left, self.events)
            return
        if not self._fits(template, len(lines)):
            self._flush()
            return
        if not self._texts:
            self._created = cursor._created
        count = lines.count(_LF)
        if template.padded:
            lines, self._pad = _without_pads(lines)
        text = lines.replace(_LF, b"")
        self._texts.setdefault(template, []).append(text)
        self._text_bytes += len(text)
        self._log._pass(cursor, count, run[2] - run[1])
        self._number = cursor._number - 1
        self._seq = cursor.seq - 1

    def _fits(self, template: Template, text_bytes: int) -> bool:
        """Whether texts of `template` may join the pending event."""
        if self._delta:
            return False
        if not self._texts:
            return True
        if self._text_bytes + text_bytes > min(COALESCED_TEXT_BYTES_MAX, self._left):
            return False
        return template in self._texts or all(self._are_siblings(other, template) for other in self._texts)

    def _are_siblings(self, first: Template, other: Template) -> bool:
        known = self._siblings.get((first, other))
        if known is None:
            fill = Fill(b"1700000000", 0, b"", b"")
            alike = first.counts_around == other.counts_around
            known = self._siblings[first, other] = alike and combine([(first, fill), (other, fill)]) is not None
        return known

    def _take_whole(self, event: bytes, end: int) -> None:
        if self._texts:
            self._flush()
            return
        delta = None
        if len(event) <= 2 * COALESCED_TEXT_BYTES_MAX:
            delta = Delta.of(event)
            self._work += _WORK_OF_PARSING
        if self._delta:
            limit = min(COALESCED_TEXT_BYTES_MAX, self._left)
            if not delta or self._delta.text_bytes + delta.text_bytes > limit or not self._delta.absorb(delta):
                self._flush()
                return
            self._event = b""
        elif delta:
            self._delta, self._event = delta, event
        elif self.events and len(event) > self._left:
            self._left = 0
            return
        else:
            self.events.append((self._cursor.seq, event))
            self._left -= len(event)
        self._seq = self._cursor.seq
        self._cursor.seq += 1
        self._cursor._offset = end

    def _flush(self) -> None:
        """Give out the pending event."""
        if self._texts:
            event = self._merged_texts()
        elif self._delta:
            event = self._event or self._delta.event()
        else:
            return
        self.events.append((self._seq, event))
        self._left -= len(event)
        self._texts.clear()
        self._text_bytes = 0
        self._pad = b""
        self._delta = None

    def _merged_texts(self) -> bytes:
        runs = [
            (template, Fill(self._created, self._number, b"".join(texts), self._pad))
            for template, texts in self._texts.items()
        ]
        if len(runs) == 1:
            return runs[0][0].render(runs[0][1])
        event = combine(runs)
        assert event is not None  # all are siblings
        return event


def _without_pads(lines: bytes) -> tuple[bytes, bytes]:
    """The lines without their padding, and the padding of the last."""
    pad = lines[lines.rfind(_LF, 0, -1) + 1 : -1].partition(_PAD_MARK)[2]
    return _PADDING.sub(b"", lines), pad


def _first(segment: bytes) -> int:
    """The seq of a segment's first event."""
    return int.from_bytes(segment[:_HEAD], "big")


def _template_held(template: Template, copies: int) -> int:
    """Memory of a template whose pieces are held so many times."""
    fixed = template.fixed
    objects = _TEMPLATE_OBJECT + _TUPLE_PLACE * len(fixed) + len(template.holes)
    return objects + copies * (_BYTES_OBJECT * len(fixed) + sum(map(len, fixed)))


def _template_held_max(template: Template) -> int:
    """The same with its aim, which holds the pieces joined, and those around padding once more."""
    return _AIM + _template_held(template, 2 + template.padded)


def _aim_held(aim: Aim) -> int:
    prefix, suffix, padding, counting = aim
    pieces = (prefix, suffix, *(padding[:2] if padding else ()), *(counting or ()))
    return _AIM + sum(_BYTES_OBJECT + len(piece) for piece in pieces)


def _held(segment: bytes) -> int:
    """Memory of a sealed segment: the object in steps of 16 bytes, and its place in the list."""
    return (_BYTES_OBJECT + len(segment) + 15 & ~15) + _LIST_PLACE


def _tail_held(tail: bytes) -> int:
    """Memory charged for the tail, as if it were full: it will be."""
    return _BYTES_OBJECT + max(len(tail), SEGMENT_BYTES_MAX)
