"""Entries of a copy: the content of the stream in the engine that holds the copy of a log.

An entry's id is `<fence>-<seq>`. The engine takes only ids that grow, and that rule is all that the copy needs: it
refuses a record that is there already, and it refuses an owner that another member has shut out.

    <fence>-<seq>   `d`: the record (core/log_record.py) whose last event is seq; `e` beside it: the stream's end
    <fence>-0       the one entry that raises the fence, with `w`, the member that wrote it, and `n`, the last seq that
                    this member knew. Beside these `s`, a record that starts over (with `f`, the stream's facts), `e`,
                    the end, or `t`, a takeover

Of several members that raise the fence at the same time the engine takes the first and refuses the others, since all
ids are equal. So a reader of the newest entry reads `<fence>-0` as well, and goes on only if it is its own. With the
last seq in the id, as in `<fence>-<seq>`, a second raiser with a higher seq would be taken too.

A later version may write more fields. A name with a small letter is for those that know it, and is passed over; a name
with a capital letter has to be understood, and the copy is left to nodes that do (NewerVersion).

All that is read here is untrusted: parse() raises ValueError, and sizes are bounded by the reply's.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import orjson

from streamd.wire.event_id import SEQ_MAX

# Ids have 64 bits for each half; a fence is raised a few times in the life of a stream.
FENCE_MAX: Final = 1 << 53

_is_id = re.compile(rb"(0|[1-9][0-9]{0,15})-(0|[1-9][0-9]{0,15})").fullmatch
_FIELDS: Final = frozenset((b"d", b"s", b"f", b"e", b"t", b"w", b"n"))


class NewerVersion(ValueError):
    """The copy was written by a newer streamd: this one can't read it, and another can."""


class Position(NamedTuple):
    """A place in a copy. The order of positions is the order of the engine's ids."""

    fence: int
    seq: int  # 0: the entry that raised the fence

    def __str__(self) -> str:
        return f"{self.fence}-{self.seq}"


class End(NamedTuple):
    """The end of a stream, as an entry tells it."""

    reason: str  # a word of streamd/reasons.py, or `node_lost`
    clean: bool


class Entry(NamedTuple):
    """An entry of a copy. Empty bytes: there is no such field."""

    position: Position
    record: bytes  # packed
    starts_over: bool
    facts: bytes
    end: End | None
    taken_by: str  # `t`
    raised_by: str  # `w`
    last_seq: int  # of the copy, from this entry on


def fields_of(
    *,
    record: bytes = b"",
    starts_over: bool = False,
    facts: bytes = b"",
    end: End | None = None,
    raised_by: str = "",
    last_seq: int = 0,
) -> list[bytes | str | int]:
    """The fields of an entry, as XADD takes them. An entry that raises the fence has `raised_by` and `last_seq`."""
    fields: list[bytes | str | int] = []
    if raised_by:
        fields += ("w", raised_by, "n", last_seq)
    if record or facts:  # a stream that ends without an event starts over with nothing
        fields += ("s" if starts_over else "d", record)
    if facts:
        fields += ("f", facts)
    if end is not None:
        fields += ("e", orjson.dumps({"reason": end.reason, "clean": end.clean}))
    return fields


def parse(reply: Any) -> Entry:
    """An entry as XRANGE returns it: its id, and its fields in turn. Raises ValueError for anything else."""
    if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[1], list) or len(reply[1]) % 2:
        raise ValueError("a reply that is no entry")
    position, parts = position_of(reply[0]), reply[1]
    if not all(isinstance(part, bytes) for part in parts):
        raise ValueError("an entry with a field that is no text")
    names, values = parts[::2], parts[1::2]
    fields = dict(zip(names, values, strict=True))
    if len(fields) != len(names):
        raise ValueError("an entry with a field twice")
    if any(name[:1].isupper() for name in fields):
        raise NewerVersion("the copy was written by a newer version of streamd")
    if fields.keys().isdisjoint(_FIELDS):
        raise ValueError("an entry that is none of streamd's")
    raises = position.seq == 0
    if raises != (b"w" in fields) or raises != (b"n" in fields) or (raises and b"d" in fields):
        raise ValueError("an entry that raises the fence without its writer, or has a writer and raises no fence")
    if b"s" in fields and not raises:
        raise ValueError("an entry that starts over without raising the fence")
    return Entry(
        position,
        record=fields.get(b"s") or fields.get(b"d") or b"",
        starts_over=b"s" in fields,
        facts=fields.get(b"f", b""),
        end=_end_of(fields[b"e"]) if b"e" in fields else None,
        taken_by=_member(fields.get(b"t", b"")),
        raised_by=_member(fields.get(b"w", b"")),
        last_seq=_seq(fields[b"n"]) if raises else position.seq,
    )


class Told(NamedTuple):
    """A message on a stream's channel: the newest place that its owner knows, perhaps with the events up to there."""

    position: Position
    record: bytes  # packed; empty: read the copy
    is_end: bool  # the copy has the stream's end


def told(position: Position, *, record: bytes = b"", is_end: bool = False) -> bytes:
    """The text of a message: `<fence>-<seq>`, then `!` for an end, or a blank and the record."""
    place = str(position).encode()
    return b"%b!" % place if is_end else b"%b %b" % (place, record) if record else place


def parse_told(text: bytes) -> Told:
    """A message. Raises ValueError for any other text."""
    place, blank, record = text.partition(b" ")
    is_end = not blank and place.endswith(b"!")
    return Told(position_of(place[:-1] if is_end else place), record, is_end)


def position_of(entry_id: Any) -> Position:
    """An entry's id. Raises ValueError for a text that is none, or with numbers that streamd never uses."""
    found = _is_id(entry_id) if isinstance(entry_id, bytes) else None
    if found is None or int(found[1]) > FENCE_MAX or int(found[2]) > SEQ_MAX:
        raise ValueError("an id that is no position in a copy")
    return Position(int(found[1]), int(found[2]))


def _seq(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 16:
        raise ValueError("a seq that is no number")
    return int(digits)


def _member(name: bytes) -> str:
    if len(name) > 64 or not name.isascii():
        raise ValueError("a member's name that is none")
    return name.decode()


def _end_of(json: bytes) -> End:
    try:
        given = orjson.loads(json)
    except orjson.JSONDecodeError:
        raise ValueError("an end that is not JSON") from None
    if not isinstance(given, dict) or type(given.get("reason")) is not str or type(given.get("clean")) is not bool:
        raise ValueError("an end without its reason")
    return End(given["reason"], given["clean"])
