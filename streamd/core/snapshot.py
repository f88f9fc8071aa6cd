"""Snapshots of streams, and the makers of objects that upstreams keep: content, the file format, and restoring.

The format, all numbers big-endian. Only streamd writes it; a reader of it trusts nothing:

    header     "streamd-state" NUL, version (1 byte), save id (8 bytes, random), saved at (8 bytes, unix time, double)
    record     kind (1 byte: S a stream, M makers, E the end), length of the body (4 bytes), BLAKE2b-64 of kind and body
               (8 bytes), body
    body of S  facts, a JSON object: length (4 bytes), bytes
               templates: count (1 byte), each: merges (1 byte), count of holes (1 byte), holes, pieces (length 2 bytes)
               segments of the log (core/replay.py): count (4 bytes), each: length (2 bytes; 4 with the first bit set)
    body of M  JSON, a list of at most MADE_PER_RECORD lists: an object's id, a principal, an upstream's name
    body of E  number of records in front (4 bytes)

Each record has its own checksum and is judged by itself: a damaged or senseless record costs its own stream or makers,
and all records in front of it and behind it can be restored. The length leads to the next record, so damage there costs
the rest. A file that ends without its E is truncated. Copies of the same save have the same save id. Every file that a
process can have written loads; anything else raises StateError, after work and memory bounded by the size of the file.

The two processes share wall-clock time: retention goes on while no process runs. If the clock was set back meanwhile, a
stream counts as sealed now.

Not stored: readers and graces (all ended in the drain), the source (a generation's upstream is cut, a publisher has to
come back), the account of the key (limits count anew), and how far the answer of a cut generation had come by its
dialect's rules.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, NamedTuple

import orjson

from streamd.core.hub import Hub, StreamNames
from streamd.core.makers import ID_CHARS_MAX, OBJECTS_MAX, Made, Makers
from streamd.core.replay import LogParts, ReplayLog, check_parts
from streamd.core.stream import CountedStream, Stream
from streamd.core.terms import Terms
from streamd.core.write_interval import INTERVAL_S_MAX, WriteInterval
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect, dialect_named
from streamd.wire.event_id import SEQ_MAX, valid_name, valid_stream_id

MAGIC: Final = b"streamd-state\0"
VERSION: Final = 2
_HEADER: Final = struct.Struct(">14sB8sd")
_RECORD: Final = struct.Struct(">cI8s")
_STREAM, _MAKERS, _END = b"S", b"M", b"E"

# Records are read in bounded pieces, so a forged length can't allocate more than the file holds.
READ_BYTES: Final = 1024 * 1024
# A segment is at most 479 bytes, except for an event stored whole; 15 bits suffice for nearly all.
_LONG: Final = 0x8000

# Bound of times and durations: the last second of the year 9999, as for the expiry of keys.
TIME_S_MAX: Final = 253_402_300_799.0

# A stream's facts, without its log: about 600 B of JSON.
FACTS_BYTES: Final = 1024

# Makers in a record: 100 KB as a rule, and a damaged record costs a twentieth of all.
MADE_PER_RECORD: Final = OBJECTS_MAX // 20
# A maker in a record: an id of 55 characters, a principal of 24, an upstream's name, and the signs around; doubled.
MADE_BYTES: Final = 200
# Longest name of a principal or an upstream: a hash has 24 characters, the names of keys and upstreams 64.
_NAME_CHARS_MAX: Final = 256
# Three names of four bytes a character, and the signs around them.
_MAKERS_BYTES_MAX: Final = MADE_PER_RECORD * (3 * 4 * ID_CHARS_MAX + 16)

_REASONS: Final = {reason.word: reason for reason in CloseReason}
_epoch = re.compile(r"(?:[A-Za-z0-9_-]{6})?").fullmatch
_field_value = re.compile(r"[ -~]*").fullmatch  # it becomes a header: X-Upstream
_hex = re.compile(r"(?:[0-9a-f]{2})*").fullmatch


class StateError(ValueError):
    """These bytes are not a state that this version can read in full. The text says what is wrong."""


class Header(NamedTuple):
    """The identity of a save, and its time."""

    save_id: bytes
    saved_unix: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of a stream but its log. Times are unix times, durations seconds."""

    id: str
    epoch: str
    dialect: str
    owner: str
    public: bool
    published: bool
    model: str
    upstream: str
    # rules
    policy: str
    retention_s: float
    write_interval_s: float
    write_adaptive: bool
    catchup_bytes_max: int
    log_bytes_max: int
    log_events_max: int
    # life
    opened_unix: float
    sealed_unix: float
    reason: str  # "": events may still come
    ended_clean: bool
    # names beside the id
    key_principal: str
    key: str  # Idempotency-Key; "": none
    key_body_hash: str  # hexadecimal
    conversation: str
    counted: bool  # its readers count bytes
    event_bytes: int
    # progress
    terminal: bool
    complete: bool
    input_tokens: int  # -1: unknown
    output_tokens: int
    text_events: int
    text_bytes: int
    sequence_number: int  # -1: none
    response_id: str
    chunk_head: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stream as values. `facts.id` tells which worker it belongs to (docs/PROTOCOL.md, sections 2 and 8)."""

    facts: Facts
    log: LogParts

    @property
    def live(self) -> bool:
        """Whether more events may come: the stream is published, and its publisher may come back."""
        return not self.facts.reason


@dataclass(frozen=True, slots=True)
class MadeObjects:
    """Objects that upstreams keep, each with a maker."""

    made: tuple[tuple[str, Made], ...]


Kept = Snapshot | MadeObjects


# From a hub


def choose(streams: Iterable[Stream], bytes_max: int) -> list[Stream]:
    """The streams to keep within bytes_max: live streams first, then the most recently ended.

    The others are gone, as if their retention were over. Streams of other nodes stay with those.
    """
    own = [stream for stream in streams if not stream.terms.is_copy]
    ordered = sorted(own, key=lambda stream: (stream.reason is not None, -stream.sealed_at))
    chosen = []
    for stream in ordered:
        held = stream.log.bytes_held + FACTS_BYTES
        if held <= bytes_max:
            bytes_max -= held
            chosen.append(stream)
    return chosen


def take_snapshot(hub: Hub, stream: Stream, now: float, now_unix: float) -> Snapshot:
    """A stream of this hub as values. `now` in monotonic seconds, `now_unix` the same instant's wall-clock time."""
    progress, name = stream.progress, hub.name_of(stream)
    input_tokens, output_tokens = progress.usage or (-1, -1)
    retention_s = stream.terms.retention_s
    if stream.reason is CloseReason.RESTARTED:
        # Its readers were told to come back; without a retention they would find nothing.
        retention_s = max(retention_s, stream.terms.resume_grace_s)
    facts = Facts(
        id=stream.id,
        epoch=stream.epoch,
        dialect=stream.dialect.value,
        owner=stream.terms.owner,
        public=stream.terms.name_public,
        published=stream.terms.published,
        model=stream.terms.model,
        upstream=stream.upstream,
        policy=stream.terms.policy.value,
        retention_s=retention_s,
        write_interval_s=stream.terms.write_interval.least_s,
        write_adaptive=stream.terms.write_interval.adaptive,
        catchup_bytes_max=stream.terms.catchup_bytes_max,
        log_bytes_max=stream.log.bytes_max,
        log_events_max=stream.log.events_max,
        opened_unix=now_unix - (now - stream.opened_at),
        sealed_unix=now_unix - (now - stream.sealed_at) if stream.reason is not None else 0.0,
        reason=stream.reason.word if stream.reason is not None else "",
        ended_clean=stream.ended_clean,
        key_principal=name.principal,
        key=name.key,
        key_body_hash=name.body_hash.hex(),
        conversation=name.conversation,
        counted=isinstance(stream, CountedStream),
        event_bytes=stream.event_bytes if isinstance(stream, CountedStream) else 0,
        terminal=progress.terminal,
        complete=progress.complete,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        text_events=progress.text_events,
        text_bytes=progress.text_bytes,
        sequence_number=-1 if progress.sequence_number is None else progress.sequence_number,
        response_id=progress.response_id or "",
        chunk_head=progress.chunk_head.decode(),
    )
    return Snapshot(facts, stream.log.parts())


def made_records(makers: Makers) -> Iterator[MadeObjects]:
    """The makers in portions for a record each, the oldest first; without those whose names can't be written."""
    made = [each for each in makers if all(map(_is_utf8, (each[0], *each[1])))]
    for start in range(0, len(made), MADE_PER_RECORD):
        yield MadeObjects(tuple(made[start : start + MADE_PER_RECORD]))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


# To a hub


def restore(hub: Hub, snapshot: Snapshot, now: float, now_unix: float) -> Stream | None:
    """Register the stream with this hub, under its id; None if its retention is over or the id is registered already.

    A live stream comes back without source and fan-out: the caller adds both, since it knows publishers and loops.
    """
    facts = snapshot.facts
    sealed_at = now - max(0.0, now_unix - facts.sealed_unix)
    if not snapshot.live and sealed_at + facts.retention_s <= now:
        return None
    log = ReplayLog.of_parts(
        snapshot.log,
        bytes_max=min(facts.log_bytes_max, hub.stream_log_bytes_max),
        events_max=min(facts.log_events_max, hub.stream_log_events_max),
    )
    name = StreamNames(facts.key_principal, facts.key, bytes.fromhex(facts.key_body_hash), facts.conversation)
    opened_at = now - max(0.0, now_unix - facts.opened_unix)
    stream = hub.restore(
        facts.id,
        log,
        dialect_named(facts.dialect),
        opened_at,
        kind=CountedStream if facts.counted else Stream,
        terms=_terms_of(facts),
        epoch=facts.epoch,
    )
    if stream is None:
        return None
    _restore_progress(stream, facts)
    stream.upstream = facts.upstream
    stream.touched_at = now
    if not snapshot.live:
        stream.reason = _REASONS[facts.reason]
        stream.sealed_at = sealed_at
        stream.ended_clean = facts.ended_clean
    hub.restore_names(stream, name)
    return stream


def _terms_of(facts: Facts) -> Terms:
    return Terms(
        owner=facts.owner,
        name_public=facts.public,
        published=facts.published,
        model=facts.model,
        policy=Policy(facts.policy),
        retention_s=facts.retention_s,
        write_interval=WriteInterval(facts.write_interval_s, facts.write_adaptive),
        catchup_bytes_max=facts.catchup_bytes_max,
    )


def _restore_progress(stream: Stream, facts: Facts) -> None:
    if isinstance(stream, CountedStream):
        stream.event_bytes = facts.event_bytes
    progress = stream.progress
    progress.terminal, progress.complete = facts.terminal, facts.complete
    progress.usage = (facts.input_tokens, facts.output_tokens) if facts.input_tokens >= 0 else None
    progress.text_events, progress.text_bytes = facts.text_events, facts.text_bytes
    progress.sequence_number = facts.sequence_number if facts.sequence_number >= 0 else None
    progress.response_id = facts.response_id or None
    progress.chunk_head = facts.chunk_head.encode()


# Writing


def save(kept: Iterable[Kept], save_id: bytes, saved_unix: float) -> Iterator[bytes]:
    """The bytes, a record at a time: only the stream at hand is in memory twice."""
    yield _HEADER.pack(MAGIC, VERSION, save_id, saved_unix)
    count = 0
    for each in kept:
        if isinstance(each, MadeObjects):
            yield _record(_MAKERS, orjson.dumps([(object_id, *made) for object_id, made in each.made]))
        else:
            yield _record(_STREAM, _body(each))
        count += 1
    yield _record(_END, count.to_bytes(4, "big"))


def _record(kind: bytes, body: bytes) -> bytes:
    return _RECORD.pack(kind, len(body), _digest(kind, body)) + body


def _digest(kind: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8, person=kind).digest()


def _body(snapshot: Snapshot) -> bytes:
    log = snapshot.log
    counts = (log.seq_first, log.seq_next, log.text_events, log.text_bytes)
    facts = orjson.dumps({**asdict(snapshot.facts), "log": counts})
    out = [len(facts).to_bytes(4, "big"), facts, bytes((len(log.templates),))]
    for pieces, holes, merges in log.templates:
        out.append(bytes((merges, len(holes))) + holes)
        out += [len(piece).to_bytes(2, "big") + piece for piece in pieces]
    out.append(len(log.segments).to_bytes(4, "big"))
    for segment in log.segments:
        size = len(segment)
        out.append(size.to_bytes(2, "big") if size < _LONG else (_LONG << 16 | size).to_bytes(4, "big"))
        out.append(segment)
    return b"".join(out)


# Reading

Read = Callable[[int], bytes]  # the next bytes, at most the given number; b"" at the end


def read_header(read: Read) -> Header:
    """The first bytes of a state. Raises StateError for any other file, and for another version."""
    header = _exactly(read, _HEADER.size)
    magic, version, save_id, saved_unix = _HEADER.unpack(header)
    if magic != MAGIC:
        raise StateError("it is not a file of streamd's saved streams: its first bytes are wrong")
    if version != VERSION:
        raise StateError(
            f"it is written in version {version} of the format, and this streamd reads version {VERSION} only"
        )
    if not math.isfinite(saved_unix):
        raise StateError("its time of saving is not a number")
    return Header(save_id, saved_unix)


def load(read: Read) -> Iterator[Kept]:
    """The good records after the header, in turn. Then raises StateError if anything was not as it should be."""
    spoiled = _Spoiled()
    count = 0
    try:
        while True:
            kind, length, digest = _RECORD.unpack(_exactly(read, _RECORD.size))
            body = _exactly(read, length)
            if kind == _END and _digest(kind, body) == digest:
                break
            count += 1
            try:
                kept = _kept_in(kind, body, digest)
            except StateError as error:
                spoiled.note(f"record {count} {error}")
            else:
                yield kept
        if body != count.to_bytes(4, "big"):
            raise StateError("records are missing in front of its end")
        if read(1):
            raise StateError("bytes follow the record that ends it")
    except StateError as error:
        spoiled.note(str(error))
    if spoiled.count:
        raise StateError(spoiled.told())


class _Spoiled:
    """What was wrong with a state: the first fault in words, and the number of all."""

    def __init__(self) -> None:
        self.first = ""
        self.count = 0

    def note(self, text: str) -> None:
        self.first = self.first or text
        self.count += 1

    def told(self) -> str:
        return self.first if self.count == 1 else f"{self.first}; {self.count - 1} more faults"


def _exactly(read: Read, count: int) -> bytes:
    pieces = []
    while count:
        piece = read(min(count, READ_BYTES))
        if not piece:
            raise StateError("it is cut short: the record that ends it is missing")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


class _Body:
    """Reads the body of a record from the front."""

    __slots__ = ("_at", "_body")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._body):
            raise StateError("a record is shorter than the lengths in it say")
        taken = self._body[self._at : end]
        self._at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def segment(self) -> bytes:
        size = self.number(2)
        if size & _LONG:
            size = (size & ~_LONG) << 16 | self.number(2)
        return self.take(size)

    @property
    def over(self) -> bool:
        return self._at == len(self._body)


def _kept_in(kind: bytes, body: bytes, digest: bytes) -> Kept:
    """The stream or the makers in a record. Raises StateError, whose text follows the record's number."""
    if _digest(kind, body) != digest:
        raise StateError("is damaged: its checksum is wrong")
    if kind == _MAKERS:
        return _makers_of(body)
    if kind != _STREAM:
        raise StateError("is of an unknown kind")
    try:
        return _stream_of(body)
    except StateError as error:
        raise StateError(f"makes no stream: {error}") from None


def _makers_of(body: bytes) -> MadeObjects:
    try:
        given = orjson.loads(body) if len(body) <= _MAKERS_BYTES_MAX else None
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, list) or len(given) > MADE_PER_RECORD or not all(map(_is_made, given)):
        raise StateError("holds no makers: each is an object's id, a principal and an upstream's name")
    return MadeObjects(tuple((object_id, Made(principal, upstream)) for object_id, principal, upstream in given))


def _is_made(given: Any) -> bool:
    if not isinstance(given, list) or len(given) != 3 or not all(isinstance(each, str) for each in given):
        return False
    object_id, principal, upstream = given
    is_named = 0 < len(principal) <= _NAME_CHARS_MAX and 0 < len(upstream) <= _NAME_CHARS_MAX
    return is_named and 0 < len(object_id) <= ID_CHARS_MAX and _field_value(upstream) is not None


def _stream_of(body: bytes) -> Snapshot:
    rest = _Body(body)
    facts, counts = _facts_of(rest.take(rest.number(4)))
    templates = []
    for _ in range(rest.number(1)):
        merges, holes = bool(rest.number(1)), rest.take(rest.number(1))
        pieces = tuple(rest.take(rest.number(2)) for _ in range(len(holes) + 1))
        templates.append((pieces, holes, merges))
    segments = tuple(rest.segment() for _ in range(rest.number(4)))
    if not rest.over:
        raise StateError("a record is longer than the lengths in it say")
    log = LogParts(*counts, tuple(templates), segments)
    try:
        check_parts(log)
    except ValueError as error:
        raise StateError(f"the log of stream {facts.id} can't be read: {error}") from None
    return Snapshot(facts, log)


_KINDS: Final[dict[str, type]] = {"str": str, "bool": bool, "int": int, "float": float}
_FACTS: Final = {field.name: _KINDS[str(field.type)] for field in fields(Facts)}


def _facts_of(json: bytes) -> tuple[Facts, tuple[int, int, int, int]]:
    try:
        given = orjson.loads(json)
    except orjson.JSONDecodeError:
        raise StateError("the facts of a stream are not JSON") from None
    if not isinstance(given, dict) or given.keys() != {*_FACTS, "log"}:
        raise StateError("the facts of a stream are not those that this version writes")
    counts = given.pop("log")
    if not isinstance(counts, list) or len(counts) != 4 or not all(map(_is_count, counts)):
        raise StateError("the counts of a stream's log are not four whole numbers from 0 on")
    for name, kind in _FACTS.items():
        if kind is float and type(given[name]) is int:
            given[name] = float(given[name])
        if type(given[name]) is not kind or (kind is int and not -1 <= given[name] <= SEQ_MAX):
            raise StateError(f"the value of {name} in the facts of a stream has the wrong type, or is out of range")
    facts = Facts(**given)
    _check_facts(facts)
    return facts, (counts[0], counts[1], counts[2], counts[3])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= SEQ_MAX


def _check_facts(facts: Facts) -> None:
    """Raises StateError for values that no stream has. Values that readers will see are checked to the letter."""
    name = facts.id.encode("utf-8", "replace")
    right = (
        (valid_name(name) and len(facts.epoch) == 6) or (valid_stream_id(name) and not facts.epoch),
        _epoch(facts.epoch),
        facts.dialect in [dialect.value for dialect in Dialect],
        facts.policy in [policy.value for policy in Policy],
        facts.reason in _REASONS or (not facts.reason and facts.published),
        _field_value(facts.upstream),
        _hex(facts.key_body_hash),
        min(facts.event_bytes, facts.text_events, facts.text_bytes) >= 0,
        all(abs(each) <= TIME_S_MAX for each in (facts.opened_unix, facts.sealed_unix)),
        0 <= facts.retention_s <= TIME_S_MAX,
        0 <= facts.write_interval_s <= INTERVAL_S_MAX,
        min(facts.log_bytes_max, facts.log_events_max, facts.catchup_bytes_max) > 0,
        (facts.input_tokens < 0) == (facts.output_tokens < 0),
        not facts.chunk_head or _is_members(facts.chunk_head),
        facts.counted or not facts.conversation,
    )
    if not all(right):
        raise StateError(
            f"the facts of stream {facts.id[:100]!r} have a value that no stream can have, or contradict each other"
        )


def _is_members(text: str) -> bool:
    """Whether the text is the inside of a JSON object that isn't empty, on a single line."""
    try:
        found = orjson.loads(f"{{{text}}}")
    except orjson.JSONDecodeError:
        return False
    return bool(found) and "\n" not in text and "\r" not in text
