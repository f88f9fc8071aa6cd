"""A scan of JSON (RFC 8259) that builds nothing: the places of a few members, how deep the text is, how much is in it.

A body is built by others: parsed, 12 MiB of empty lists became 389 MiB of objects here, only to find its `model`. So a
body is read once, as it arrives, and stays bytes. The scan keeps a byte for each container that is open, and the place
of each member that it was told to watch; its memory doesn't depend on the text.

What is checked is what decides where a value begins and ends, and which name it has: the grammar, all of it, except
that a string may hold control characters, unknown escapes and bytes that aren't UTF-8. So no parser can see a watched
member where the scan sees none, unless it takes more than JSON (comments, single quotes), which the scan refuses. Those
strings go on to the server as they came; it is its matter to refuse them.

Names are compared as careless parsers do. Go's encoding/json ignores case and takes the last of several, protobuf's
JSON takes `snake_case` and `camelCase`, C programs stop at a NUL. A watched member that stands twice by such a reading,
or stands in a spelling of its own, is refused: streamd and the server could read two different values.

Three bounds, each with its own error: containers in each other, values in all, digits of a number.

Speed comes from regular expressions that take a *run* at once: elements or members, with a comma behind each, whose
values are scalars or containers of scalars. What is left, a step for each, is two things: containers of containers,
and names at watched places that only decoding can tell. Both are bounded, so that no text takes half a second in all.
A cut token is read again with the next bytes, which costs little because only strings may be long, and those are read
on in the middle.

Rejected: a parser with a bound (orjson and the standard library build first; msgspec skips, but knows neither places
nor doubled names, and is one more dependency), a step for each token (five times as slow), reducing a skeleton of the
text from the innermost containers outward (no places, and quadratic in the depth).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import orjson

from streamd.choice import Choice
from streamd.wire.possessive import compiled
from streamd.wire.quick_json import QuickMembers

# Containers in each other: serde_json's bound, half of what orjson can write. Schemas of tools have 10 to 20.
DEPTH_MAX: Final = 128
# Commas and opening brackets, so nearly values: OpenAI takes 300,000 token ids in a request for embeddings.
VALUES_MAX: Final = 500_000
# Containers: 2,000 messages with parts and calls of tools are 20,000. Those in others take 1 µs each.
CONTAINERS_MAX: Final = 50_000
# Digits in a row: Python itself refuses whole numbers of more than 4,300.
DIGITS_MAX: Final = 4_000
# A watched value that is read: names of models take 512 bytes at most, and the options of a stream less.
READ_BYTES_MAX: Final = 4_096
# Containers in which members are watched: Google takes 100 requests, each with a model, in one.
LOOKED_INTO_MAX: Final = 1_000
# Names beside watched ones that aren't printable ASCII: they are decoded, 3 µs each. Clients have none.
ODD_NAMES_MAX: Final = 1_000


class JsonError(ValueError):
    """The text isn't taken. `code` is the word for an error answer; `param` the member, if it is a single member's."""

    def __init__(self, text: str, *, code: str = "bad_json", param: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.param = param


class Found(NamedTuple):
    """A watched member: its name, the place of its value, and how many containers it is in."""

    name: str
    start: int
    end: int
    depth: int


class _At(Choice):
    """What may come next."""

    VALUE = "value"
    VALUE_OR_END = "value or end"  # a list was opened
    NAME = "name"
    NAME_OR_END = "name or end"  # an object was opened
    COLON = "colon"
    AFTER = "after"  # a comma, or the end of the container
    STRING = "string"  # inside a string that wasn't whole when it was read
    END = "end"


Bytes = bytes | bytearray

# RFC 8259 8.1: no sender may add a byte order mark, a reader may ignore it. PowerShell adds it, Python's json takes it.
_BOM: Final = b"\xef\xbb\xbf"

_LIST, _OBJECT = b"[{"
_QUOTE, _COLON, _COMMA, _BACKSLASH = b'":,\\'

_SPACE: Final = rb"[ \t\n\r]*+"
# A string ends at a quote behind an even number of backslashes. `[^"]` is four times as fast as `[^"\\]`, so one and
# two backslashes have patterns of their own, and only three and more take the long way.
_CHUNKS: Final = rb'(?:[^"]*+(?<=[^\\]\\)")*+'
_REST: Final = _CHUNKS + rb'(?:[^"]*+(?:(?<!\\)|(?<=[^\\]\\\\))"|[^"\\]*+(?:\\.[^"\\]*+)*+")'
_STRING: Final = rb'"' + _REST
_DIGITS: Final = b"[0-9]{1,%d}+" % DIGITS_MAX
_NUMBER: Final = rb"-?+(?:0|(?=[1-9])%b)(?:\.%b)?+(?:[eE][+-]?+%b)?+(?![0-9.eE+-])" % (_DIGITS, _DIGITS, _DIGITS)
_SCALAR: Final = rb"(?:%b|%b|true|false|null)" % (_STRING, _NUMBER)
_PAIR: Final = rb"%b%b:%b" % (_STRING, _SPACE, _SPACE)
_FLAT_LIST: Final = rb"\[%b(?:%b%b(?:,%b%b%b)*+)?+\]" % (_SPACE, _SCALAR, _SPACE, _SPACE, _SCALAR, _SPACE)
_FLAT_MEMBER: Final = rb"%b%b%b" % (_PAIR, _SCALAR, _SPACE)
_FLAT_OBJECT: Final = rb"\{%b(?:%b(?:,%b%b)*+)?+\}" % (_SPACE, _FLAT_MEMBER, _SPACE, _FLAT_MEMBER)
_FLAT: Final = rb"(?:%b|%b|%b)" % (_SCALAR, _FLAT_LIST, _FLAT_OBJECT)

_space = compiled(_SPACE).match
_string = compiled(_STRING, re.DOTALL).match
_rest = compiled(_REST, re.DOTALL).match
_scalar = compiled(_SCALAR, re.DOTALL).match
_scalars = compiled(rb"(?:%b%b%b,)*+" % (_SPACE, _SCALAR, _SPACE), re.DOTALL).match
# A member's plain name with its colon; and its value, a scalar, with the comma behind it.
_key = compiled(rb'%b("[A-Za-z_][A-Za-z0-9_]*+")%b:%b' % (_SPACE, _SPACE, _SPACE)).match
_scalar_member = compiled(rb"(%b)%b," % (_SCALAR, _SPACE), re.DOTALL).match
# The beginning of a number or a word, cut by the end of the bytes.
_cut = compiled(
    rb"(?:-|-?[0-9][0-9.eE+-]{0,%d}|t(?:r(?:ue?)?)?|f(?:a(?:l(?:se?)?)?)?|n(?:u(?:ll?)?)?)\Z" % (3 * DIGITS_MAX + 4)
).match
# Where nothing is watched: a run in a container, and behind it, if it is there, the last value and the container's end,
# or the opening of the next container. The last byte tells which: a comma if nothing is behind the run.
_skips: Final = {
    _LIST: compiled(
        rb"(?:%b%b%b,)*+(?:%b(?:%b%b\]|[\[{]))?+" % (_SPACE, _FLAT, _SPACE, _SPACE, _FLAT, _SPACE), re.DOTALL
    ).match,
    _OBJECT: compiled(
        rb"(?:%b%b%b%b,)*+(?:%b%b(?:%b%b\}|[\[{]))?+" % (_SPACE, _PAIR, _FLAT, _SPACE, _SPACE, _PAIR, _FLAT, _SPACE),
        re.DOTALL,
    ).match,
}
# The same in the innermost container that is allowed, where nothing may open another.
_scalar_skips: Final = {
    _LIST: compiled(
        rb"(?:%b%b%b,)*+(?:%b%b%b\])?+" % (_SPACE, _SCALAR, _SPACE, _SPACE, _SCALAR, _SPACE), re.DOTALL
    ).match,
    _OBJECT: compiled(
        rb"(?:%b%b%b%b,)*+(?:%b%b%b%b\})?+" % (_SPACE, _PAIR, _SCALAR, _SPACE, _SPACE, _PAIR, _SCALAR, _SPACE),
        re.DOTALL,
    ).match,
}


def folded(name: str) -> str:
    """What the most careless parser compares: no case, no underscores, nothing behind a NUL."""
    return name.partition("\0")[0].replace("_", "").casefold()


def _run_without(names: Iterable[str]) -> Callable[[Bytes, int], re.Match[bytes] | None]:
    """Matches a run of flat members with plain names that aren't read as one of `names`, which are folded."""
    spellings = b"|".join(b"_*+".join(re.escape(letter.encode()) for letter in name) for name in names)
    other = rb'"(?!_*+(?i:%b)_*+")[ !#-\[\]-~]*+"' % (spellings or rb"(?!)")
    pattern = rb"(?:%b%b%b:%b%b%b,)*+" % (_SPACE, other, _SPACE, _SPACE, _FLAT, _SPACE)
    return compiled(pattern, re.DOTALL).match


class Watched:
    """Members to look for in an object, or what to look for in the elements of an array.

    `members` maps a name to the Watched of its value, None if only its place is wanted. An API's module lists them.
    """

    __slots__ = ("elements", "folded", "members", "quick", "run")

    def __init__(self, members: Mapping[str, Watched | None] | None = None, *, elements: Watched | None = None) -> None:
        self.members = dict(members or {})
        self.elements = elements
        self.folded = {folded(name): name for name in self.members}
        # Takes a run of flat members with names that are none of these in any reading.
        self.run = _run_without(self.folded)
        # Reads small whole texts, unless places within members are watched, or two names have the same reading.
        self.quick: QuickMembers | None = None
        if elements is None and not any(self.members.values()) and len(self.folded) == len(self.members):
            self.quick = QuickMembers(self.members, folded, depth_max=DEPTH_MAX, digits_max=DIGITS_MAX)

    def looks_into(self, is_list: bool) -> bool:
        """Whether anything is watched in a list, or in an object."""
        return self.elements is not None if is_list else bool(self.members)


_OPENED: Final = {_LIST: _At.VALUE_OR_END, _OBJECT: _At.NAME_OR_END}
_CLOSED: Final = {ord("]"): _LIST, ord("}"): _OBJECT}
_FURTHER: Final = {_LIST: _At.VALUE, _OBJECT: _At.NAME}
_MAY_END: Final = frozenset((_At.VALUE_OR_END, _At.NAME_OR_END, _At.AFTER))


class JsonScan:
    """Reads a text that grows: call `feed` with all of its bytes so far, and with `last` when there are no more."""

    __slots__ = (
        "_at",
        "_depth_max",
        "_looked_into",
        "_name",
        "_odd_names",
        "_open",
        "_quick",
        "_seen",
        "_since",
        "_string_is_name",
        "_under_way",
        "_watched",
        "containers",
        "found",
        "position",
        "root",
        "values",
    )

    def __init__(self, watched: Watched | None = None, *, depth_max: int = DEPTH_MAX) -> None:
        self.root = watched
        self._depth_max = depth_max
        self._at = _At.VALUE
        self._open = bytearray()  # the containers that are open, outermost first, as their opening brackets
        self._watched: list[Watched] = []  # what is watched in the outermost of them, as far as anything is,
        self._seen: list[set[str]] = []  # and the watched names that were in each of these, folded
        self._name: str | None = None  # the watched member whose value comes next
        self._under_way: list[Found] = []  # watched members whose values have begun; `end` isn't known yet
        self._since = 0  # where the string began that is being read
        self._string_is_name = False
        self.position = 0  # everything in front of it has been read
        self.values = 0  # commas and opening brackets so far
        self.containers = 0  # opening brackets so far
        self._looked_into = 0  # containers so far in which something is watched
        self._odd_names = 0  # names so far that had to be decoded
        self.found: list[Found] = []  # in the order of their ends; empty for a text that was read quickly (places())
        self._quick: dict[str, Any] | None = None  # the fields of such a text

    def feed(self, data: Bytes, *, last: bool = False) -> None:
        """Read on in `data`, which begins as before. Raises JsonError."""
        if not self.position:
            root = self.root
            if last and root is not None and root.quick is not None and self._depth_max >= DEPTH_MAX:
                self._quick = root.quick.read(data)
                if self._quick is not None:
                    self._at, self.position = _At.END, len(data)
                    return
            if not last and len(data) < len(_BOM) and _BOM.startswith(data):
                return  # it may be a byte order mark
            if data.startswith(_BOM):
                self.position = len(_BOM)
        begun, in_string, since = self.position, self._at is _At.STRING, self._since
        step, end = self._step, len(data)
        while self.position < end and step(data, end, last):
            pass
        if not in_string or self._since != since or self._at is not _At.STRING:
            self._count(data[begun : self.position], int(in_string))
        if last and self._at is not _At.END:
            self._fail(data, "it ends too early")

    def _count(self, piece: Bytes, inside: int) -> None:
        """Count commas and brackets outside strings, which are the odd parts between quotes; `inside` is 0 or 1."""
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[inside::2])
        self.containers += outside.count(b"[") + outside.count(b"{")
        self.values += len(outside) - len(outside.translate(None, b",[{"))
        if self.values > VALUES_MAX:
            raise JsonError(f"The JSON has more than {VALUES_MAX} values.", code="json_too_large")
        if self.containers > CONTAINERS_MAX:
            raise JsonError(f"The JSON has more than {CONTAINERS_MAX} lists and objects.", code="json_too_large")

    # -- a step: what is next, and what may follow it. Each returns whether it came on.

    def _step(self, data: Bytes, end: int, last: bool) -> bool:
        at = self._at
        if at is _At.STRING:
            return self._read_string_on(data, end)
        self._skip(data, end)
        found = _space(data, self.position)
        assert found is not None
        position = self.position = found.end()
        if position == end:
            return False
        byte, at = data[position], self._at
        if byte in _CLOSED and at in _MAY_END:
            self._close(data, byte)
        elif at is _At.VALUE or at is _At.VALUE_OR_END:
            return self._begin_value(data, byte, end, last)
        elif (at is _At.NAME or at is _At.NAME_OR_END) and byte == _QUOTE:
            self._begin_string(data, is_name=True)
        elif at is _At.COLON and byte == _COLON:
            self._at, self.position = _At.VALUE, position + 1
        elif at is _At.AFTER and byte == _COMMA:
            self._at, self.position = _FURTHER[self._open[-1]], position + 1
        else:
            self._fail(data)
        return True

    def _skip(self, data: Bytes, end: int) -> None:
        """Read on as far as whole runs go: flat members in a watched object, and anything where nothing is watched."""
        opened, watched, at, position = self._open, len(self._watched), self._at, self.position
        if len(opened) == watched:
            if opened:
                self._skip_watched(data)
            return
        while position < end and len(opened) > watched:
            top = opened[-1]
            if at is _At.AFTER:
                byte = data[position]
                if byte == _COMMA:
                    at = _FURTHER[top]
                elif _CLOSED.get(byte) == top:
                    opened.pop()
                else:
                    break
                position += 1
            elif at is _At.COLON or (at is _At.VALUE and top == _OBJECT):
                break
            else:
                found = (_skips if len(opened) < self._depth_max else _scalar_skips)[top](data, position)
                if found is None or found.end() == position:
                    break
                position = found.end()
                byte = data[position - 1]
                if byte == _COMMA:
                    at = _FURTHER[top]
                elif byte in _OPENED:
                    opened.append(byte)
                    at = _OPENED[byte]
                else:
                    opened.pop()
                    at = _At.AFTER
        self._at, self.position = at, position
        if at is _At.AFTER and len(opened) == watched:
            self._end_value()

    def _skip_watched(self, data: Bytes) -> None:
        """Read on over flat members that aren't watched, scalars that are, and scalars in a list whose objects are."""
        top, at = self._open[-1], self._at
        if (at is _At.AFTER) or (at is _At.COLON) or (at is _At.VALUE and top == _OBJECT):
            return
        watched = self._watched[-1]
        run = (watched.run if top == _OBJECT else _scalars)(data, self.position)
        if run is not None and run.end() > self.position:
            self._at, self.position = _FURTHER[top], run.end()
        while top == _OBJECT and (key := _key(data, self.position)):
            name = self._checked(key[1], watched)
            scalar = _scalar_member(data, key.end())
            if scalar is None:
                self._name, self._at, self.position = name, _At.VALUE, key.end()
                return
            if name is not None:
                self.found.append(Found(name, key.end(), scalar.end(1), len(self._open)))
            run = watched.run(data, scalar.end())
            self._at, self.position = _At.NAME, run.end() if run is not None else scalar.end()

    def _begin_value(self, data: Bytes, byte: int, end: int, last: bool) -> bool:
        position = self.position
        if byte in _OPENED:
            self._open_container(byte)
            return True
        if byte == _QUOTE:
            self._note_begin()
            self._begin_string(data, is_name=False)
            return True
        found = _scalar(data, position)
        is_cut = not last and (_cut(data, position) if found is None else found.end() == end)
        if is_cut:
            return False  # a number may go on
        if found is None:
            self._fail(data)
        self._note_begin()
        self.position = found.end()
        self._end_value()
        return True

    def _open_container(self, opening: int) -> None:
        if len(self._open) >= self._depth_max:
            raise JsonError(f"The JSON has more than {self._depth_max} containers in each other.", code="json_too_deep")
        watched = self._watched_next()
        self._note_begin()
        self._open.append(opening)
        if watched is not None and watched.looks_into(opening == _LIST):
            self._looked_into += 1
            if self._looked_into > LOOKED_INTO_MAX:
                text = f"The JSON has more than {LOOKED_INTO_MAX} objects in a list of requests."
                raise JsonError(text, code="json_too_large")
            self._watched.append(watched)
            self._seen.append(set())
        self._at = _OPENED[opening]
        self.position += 1

    def _watched_next(self) -> Watched | None:
        """What is watched in the value that comes next."""
        if not self._open:
            return self.root
        if len(self._watched) < len(self._open):
            return None
        around = self._watched[-1]
        if self._open[-1] == _LIST:
            return around.elements
        return around.members[self._name] if self._name is not None else None

    def _close(self, data: Bytes, closing: int) -> None:
        if not self._open or self._open[-1] != _CLOSED[closing]:
            self._fail(data)
        self._open.pop()
        del self._watched[len(self._open) :]
        del self._seen[len(self._open) :]
        self.position += 1
        self._end_value()

    def _note_begin(self) -> None:
        """A value begins here: keep its place if it is watched."""
        name, self._name = self._name, None
        if name is not None:
            self._under_way.append(Found(name, self.position, 0, len(self._open)))

    def _end_value(self) -> None:
        """A value has ended here."""
        self._at = _At.AFTER if self._open else _At.END
        if self._under_way and self._under_way[-1].depth == len(self._open):
            self.found.append(self._under_way.pop()._replace(end=self.position))

    # -- strings

    def _begin_string(self, data: Bytes, *, is_name: bool) -> None:
        self._since, self._string_is_name = self.position, is_name
        found = _string(data, self.position)
        if found is not None:
            self.position = found.end()
            self._end_string(data)
        else:
            self._at, self.position = _At.STRING, self.position + 1

    def _read_string_on(self, data: Bytes, end: int) -> bool:
        found = _rest(data, self.position)
        if found is not None:
            self.position = found.end()
            self._end_string(data)
            return True
        # Go on at the end, but in front of a backslash that belongs to the next byte.
        piece = data[self.position : end]
        self.position = end - (len(piece) - len(piece.rstrip(b"\\"))) % 2
        return False

    def _end_string(self, data: Bytes) -> None:
        if not self._string_is_name:
            self._end_value()
            return
        self._at = _At.COLON
        if len(self._watched) == len(self._open):
            self._name = self._checked(data[self._since : self.position], self._watched[-1])

    def _checked(self, quoted: Bytes, watched: Watched) -> str | None:
        """The name of a member if it is watched. Raises JsonError for its second, and for another spelling of it."""
        if _BACKSLASH in quoted or not quoted.isascii():
            self._odd_names += 1
            if self._odd_names > ODD_NAMES_MAX:
                text = f"The JSON has more than {ODD_NAMES_MAX} names of members that aren't plain ASCII."
                raise JsonError(text, code="json_too_large")
        name = _text_of(quoted)
        reading = folded(name)
        meant = watched.folded.get(reading)
        if meant is None:
            return None
        if name not in watched.members:
            text = f"The member {name[:50]!r} could be taken for {meant!r}: write {meant!r}, and once."
            raise JsonError(text, code="ambiguous_member", param=meant)
        if reading in self._seen[-1]:
            raise JsonError(
                f"The member {meant!r} is there twice: write it once.", code="ambiguous_member", param=meant
            )
        self._seen[-1].add(reading)
        return name

    def _fail(self, data: Bytes, why: str = "") -> NoReturn:
        line = data.count(b"\n", 0, self.position) + 1
        column = self.position - data.rfind(b"\n", 0, self.position)
        raise JsonError(f"The body is not valid JSON: {why or 'unexpected byte'} at line {line}, column {column}.")

    # -- what was found

    def fields(self, data: Bytes) -> dict[str, Any]:
        """The watched members of a whole text as a parser would give them; lists hold an object for each inner find.

        A container has no more in it than is watched there; where nothing is watched it is read whole if it is small.
        Raises JsonError for a value that can't be read.
        """
        if self._quick is not None:
            return dict(self._quick)
        fields: dict[str, Any] = {}
        inner: list[Found] = []
        for found in self.found:
            if found.depth > 1:
                inner.append(found)
                continue
            values = [(each.name, _value_of(data, each)) for each in inner]
            inner.clear()
            opening = data[found.start]
            if values and opening == _LIST:
                fields[found.name] = [{name: value} for name, value in values]
            elif values:
                fields[found.name] = dict(values)
            else:
                fields[found.name] = _value_of(data, found)
        return fields

    def places(self, data: Bytes) -> list[Found]:
        """The watched members of a whole text, in the order of their ends."""
        return self.found if self._quick is None else scan_slowly(data, self.root).found

    def with_names(self, data: bytes, name: str, others: Mapping[str, str]) -> bytes:
        """`data` with other strings in the places of the watched members `name`; every other byte stays as it is."""
        edits = []
        for found in self.places(data):
            value = _value_of(data, found) if found.name == name else None
            if isinstance(value, str) and value in others:
                edits.append((found.start, found.end, orjson.dumps(others[value])))
        return spliced(data, edits)


def _value_of(data: Bytes, found: Found) -> Any:
    """The value at a place. A container that is too large to be read is given empty."""
    opening = data[found.start]
    if found.end - found.start > READ_BYTES_MAX:
        if opening in _OPENED:
            return [] if opening == _LIST else {}
        text = f"{found.name} takes more than {READ_BYTES_MAX} bytes."
        raise JsonError(text, param=found.name)
    try:
        return orjson.loads(data[found.start : found.end])
    except orjson.JSONDecodeError as error:
        raise JsonError(f"The value of {found.name!r} can't be read: {error.msg}.", param=found.name) from None


def _text_of(quoted: Bytes) -> str:
    """A name as text. What isn't valid in it, is replaced: such a name is another than every watched name."""
    if _BACKSLASH in quoted:
        try:
            return str(json.loads(quoted, strict=False))
        except ValueError:
            return ""
    return quoted[1:-1].decode("utf-8", "replace")


def scan(data: bytes, watched: Watched | None = None, *, depth_max: int = DEPTH_MAX) -> JsonScan:
    """The scan of a whole text. Raises JsonError."""
    found = JsonScan(watched, depth_max=depth_max)
    found.feed(data, last=True)
    return found


def scan_slowly(data: Bytes, watched: Watched | None) -> JsonScan:
    """The scan of a whole text in two pieces, which no quick way takes. Raises JsonError."""
    found = JsonScan(watched)
    found.feed(data)
    found.feed(data, last=True)
    return found


def is_deep(data: bytes) -> bool:
    """Whether more than DEPTH_MAX containers are in each other, or the bytes are no JSON; quick for ordinary events."""
    if data.count(b"[") + data.count(b"{") <= DEPTH_MAX:
        return False
    try:
        scan(data)
    except JsonError:
        return True
    return False


def loaded(data: bytes, watched: Watched | None = None) -> Any:
    """The value of a small text, built only if the scan takes it. Raises JsonError."""
    scan(data, watched)
    try:
        return orjson.loads(data.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        raise JsonError(f"The body is not valid JSON: {error.msg}.") from None


def spliced(data: Bytes, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    """`data` with other bytes in some places, (from, to, new), which don't overlap; all others stay as they are."""
    pieces: list[Bytes] = []
    at = 0
    for start, end, new in sorted(edits):
        pieces += (data[at:start], new)
        at = end
    pieces.append(data[at:])
    return b"".join(pieces)
