"""Templates of text deltas: which events are pure text, which part of them is the text, and how neighbours join.

An event is a *text delta* if it adds text and nothing else. The event's API decides whether it is (the modules in
wire/dialects/); the consequences are here, the same for all APIs. Two uses:

- A `Template` is learnt from an event and cuts it into fixed pieces and *holes*: the text, and the values beside it
  that change from event to event: `created`, `sequence_number`, padding. The replay log stores the pieces once. A later
  event belongs to the template if the pieces are in their places and the content of each hole is allowed for its kind;
  the text has to be the inside of exactly one JSON string, every escape checked, valid UTF-8 by itself. So no JSON is
  parsed, and rendering is byte-exact.
- A `Delta` is a parsed event, for events that fit no template: neighbours of the same kind and index merge by value.

A doubtful event is no delta: the price is bytes, never correctness.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import orjson

from streamd.wire.dialect import APIS
from streamd.wire.dialects.api import Api, Part
from streamd.wire.dialects.members import Json, objects_of, shallow_object
from streamd.wire.dialects.merging import merges

# The kinds of holes. AGAIN is the same text once more (vLLM sends `reasoning` and `reasoning_content` side by side, and
# log probabilities name the token), PAD is OpenAI's `obfuscation`, SPACES Anthropic's padding in front of the last
# brace. COUNT is a number of Gemini's usage; a template may have several: their contents are held as a single padding,
# blanks between.
# VALUE is a number, STRING the inside of a string and INTS the numbers in a list, inside of a member that varies with
# each token (log probabilities, token ids). A template may have many; their contents are a single padding, US between.
# SPELT is the text's UTF-8 bytes as a list of numbers with commas between, SPACED the same with blanks behind them.
TEXT, AGAIN, CREATED, NUMBER, PAD, SPACES, COUNT, VALUE, STRING, INTS, SPELT, SPACED = b"TACNPSUVQLBW"
# Kinds whose contents are kept, and kinds of which a template with any of these may have several.
VARIED: Final = bytes((VALUE, STRING, INTS))
SEVERAL: Final = bytes((AGAIN, COUNT, *VARIED))
# Bound of the holes of a template: 20 alternatives of a token have 60. A snapshot counts them in a byte.
HOLES_MAX: Final = 64
_BETWEEN: Final = b"\x1f"

# Bound of the event that a template is learnt from, without its texts: 2 KiB is ten times an ordinary chunk (200 B).
# With the log's 64 templates it makes at most 128 KiB, an eighth of the log's cap.
TEMPLATE_BYTES_MAX: Final = 2048

_SENTINEL: Final = "streamd"
_COUNT_MARK: Final = 730_214_886_100  # a number that no event has; the numbers after it stand for further counts

# Bytes that may stand unescaped in a text on the shortest path: printable ASCII without quote and backslash.
# `translate` returns the same object if nothing changed, which makes it the quickest test (35 ns; a regex 130).
PLAIN: Final = bytes(c if 0x20 <= c <= 0x7E and c not in b'"\\' else c ^ 0xFF for c in range(256))
_UNQUOTED: Final = bytes(c if c >= 0x20 and c not in b'"\\' else c ^ 0xFF for c in range(256))
ONLY_SPACES: Final = bytes(c if c == 0x20 else c ^ 0xFF for c in range(256))
_ESCAPE: Final = re.compile(rb'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_TO_QUOTE: Final = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_PAD: Final = re.compile(rb"[ !#-\[\]-~]*")
_SPACES: Final = re.compile(rb" *")
_NUMBER: Final = re.compile(rb"0|[1-9][0-9]{0,11}")
# As many digits as a sequence_number: a trillion tokens.
COUNT_DIGITS_MAX: Final = 12
_VALUE: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?=[\s,}\]])")
_INTS: Final = re.compile(rb"(?:[0-9]{1,10}(?:, ?[0-9]{1,10})*)?(?=\])")
_COUNT: Final = re.compile(rb"(?:0|[1-9][0-9]{0,11})(?=[\s,}\]])")
_CREATED: Final = re.compile(rb"[1-9][0-9]{9}")

# An event of a single data line, with or without an `event:` line before it. No pattern admits control bytes.
_EVENT: Final = re.compile(rb"((?:event:[^\x00-\x1f]*\n)?data:)([^\x00-\x08\x0a-\x1f]*)\n\n")
_TEXT_KEYS: Final = dict.fromkeys(key for api in APIS for key in api.text_keys)
_TEXT_KEY: Final = re.compile(rb'"(?:%b)"\s*:\s*"(?!")' % "|".join(_TEXT_KEYS).encode())
_CREATED_KEY: Final = re.compile(rb'"created"\s*:\s*(?=[1-9][0-9]{9}[\s,}])')
_NUMBER_KEY: Final = re.compile(rb'"sequence_number"\s*:\s*(?=(?:0|[1-9][0-9]{0,11})[\s,}])')
_PAD_KEY: Final = re.compile(rb'"obfuscation"\s*:\s*"(?=[ !#-\[\]-~]*")')
_LAST_BRACE: Final = re.compile(rb" *\}\s*\n\n\Z")
# orjson reads a whole number beyond 64 bits as a float; such an event is not rewritten.
_BIG_NUMBER: Final = re.compile(rb"[:,\[]\s*-?[0-9]{19}")

# An event with more brackets than this is kept whole, without a scan for its depth, which could take milliseconds. Text
# deltas have a dozen brackets, and counting them costs 0.1 us.
_BRACKETS_MAX: Final = 200


def is_string_inside(text: bytes) -> bool:
    """Whether `text` is the inside of exactly one JSON string (RFC 8259 section 7): escapes whole, UTF-8 valid.

    Lone surrogate halves pass as escapes: a pair that is cut in two by a delta comes out right when joined.
    """
    if b"\\" in text:
        text = _ESCAPE.sub(b" ", text)  # a space, so that the bytes on both sides can't join into a character
    if text.translate(_UNQUOTED) is not text:
        return False
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class Fill(NamedTuple):
    """The content of a template's holes: `created` as digits or b"", `number` or -1, text and padding as sent."""

    created: bytes
    number: int
    text: bytes
    pad: bytes


class Template:
    """An event with holes: fixed[0] hole fixed[1] hole … fixed[-1].

    `merges` says whether neighbours may be concatenated. Invariant: len(fixed) == len(holes) + 1, one TEXT among the
    holes, any padding after it; no merging with VARIED, SPELT or SPACED.
    """

    __slots__ = ("fixed", "holes", "merges", "varied")

    def __init__(self, fixed: tuple[bytes, ...], holes: bytes, merges: bool) -> None:
        self.fixed = fixed
        self.holes = holes
        self.merges = merges
        self.varied = len(holes.translate(None, _OF_VARIED)) != len(holes)  # a member varies with the text

    @property
    def numbered(self) -> bool:
        """Whether there is a sequence_number that changes with each event."""
        return NUMBER in self.holes

    @property
    def padded(self) -> bool:
        """Whether a value of random length stands beside the text."""
        return PAD in self.holes or SPACES in self.holes or COUNT in self.holes or self.varied

    @property
    def counted(self) -> bool:
        """Whether there are counts after the text."""
        return COUNT in self.holes

    @property
    def counts_around(self) -> tuple[bytes, ...]:
        """The pieces between the counts and after them: templates with equal pieces there may share their counts."""
        return self.fixed[self.holes.index(COUNT) + 1 :] if self.counted else ()

    @property
    def pad_table(self) -> bytes:
        """The `translate` table that leaves a right padding as it is."""
        return ONLY_SPACES if SPACES in self.holes else PLAIN

    def match(self, event: bytes) -> Fill | None:
        """The content of the holes if `event` belongs to this template, else None. One pass forward, no guessing."""
        created, number, text, pad = b"", -1, b"", b""
        varied: list[bytes] = []
        at = 0
        for piece, hole in zip(self.fixed, self.holes, strict=False):
            if not event.startswith(piece, at):
                return None
            at += len(piece)
            quick = _QUICK.get(hole)
            found = quick(event, at) if quick is not None else None
            end = found.end() if found is not None else hole_end(hole, event, at, text)
            if end < 0:
                return None
            if hole == TEXT:
                text = event[at:end]
            elif hole == CREATED:
                created = event[at:end]
            elif hole == NUMBER:
                number = int(event[at:end])
            elif hole == COUNT:
                pad = b"%b %b" % (pad, event[at:end]) if pad else event[at:end]
            elif hole in VARIED:
                varied.append(event[at:end])
            elif hole in (PAD, SPACES):
                pad = event[at:end]
            at = end
        if event[at:] != self.fixed[-1] or not is_string_inside(text):
            return None
        return Fill(created, number, text, _BETWEEN.join(varied) if varied else pad)

    def around(self, created: bytes, number: int, pad: bytes = b"", text: bytes = b"") -> list[bytes]:
        """The pieces around the text, other holes filled: `text.join(pieces)` is the event. Mostly before and after.

        The pieces of a varied template depend on the text itself.
        """
        return self.pieces(created, b"%d" % number, pad, text)

    def pieces(self, created: bytes, number: bytes, pad: bytes, text: bytes = b"") -> list[bytes]:
        """As `around`, with the number as its digits, or as a mark to be found again."""
        pieces = [b""]
        counts: list[bytes] | None = None
        varied = pad.split(_BETWEEN)[::-1] if self.varied else []
        for piece, hole in zip(self.fixed, self.holes, strict=False):
            pieces[-1] += piece
            if hole in (TEXT, AGAIN):
                pieces.append(b"")
            elif hole == CREATED:
                pieces[-1] += created
            elif hole == NUMBER:
                pieces[-1] += number
            elif hole == COUNT:
                counts = pad.split(b" ")[::-1] if counts is None else counts
                pieces[-1] += (counts.pop() if counts else b"") or b"0"
            elif hole in VARIED:
                pieces[-1] += varied.pop() if varied else b""
            elif hole in (SPELT, SPACED):
                pieces[-1] += _spelt(text, hole)
            else:
                pieces[-1] += pad
        pieces[-1] += self.fixed[-1]
        return pieces

    def render(self, fill: Fill) -> bytes:
        """The event for which `match` returned this fill."""
        return fill.text.join(self.around(fill.created, fill.number, fill.pad, fill.text))


def hole_end(hole: int, event: bytes, at: int, text: bytes) -> int:
    """Where the hole that begins at `at` ends, -1 if its content is not allowed."""
    if hole == TEXT:
        found = _TO_QUOTE.match(event, at)
    elif hole == AGAIN:
        return at + len(text) if event.startswith(text, at) else -1
    elif hole == CREATED:
        found = _CREATED.match(event, at)
    elif hole == NUMBER:
        found = _NUMBER.match(event, at)
    elif hole == COUNT:
        found = _COUNT.match(event, at)
    elif hole in (VALUE, INTS):
        return -1
    elif hole == STRING:
        found = _TO_QUOTE.match(event, at)
        return found.end() if found and is_string_inside(found[0]) else -1
    elif hole in (SPELT, SPACED):
        spelt = _spelt(text, hole)
        return at + len(spelt) if event.startswith(spelt, at) else -1
    else:
        found = (_PAD if hole == PAD else _SPACES).match(event, at)
    return found.end() if found else -1


def _spelt(text: bytes, hole: int) -> bytes:
    """The UTF-8 bytes of a text as numbers; b"" for a text with half a surrogate pair."""
    if b"\\" in text:
        try:
            text = orjson.loads(b'"%b"' % text).encode()
        except orjson.JSONDecodeError:
            return b""
    return (b"," if hole == SPELT else b", ").join([b"%d" % byte for byte in text])


def learn(event: bytes) -> Template | None:
    """A template made of an event, if it is a text delta in a known shape; None if there is the least doubt.

    Proof, not belief: the text is found by its key, a sentinel is put in its place, and the parsed result has to be a
    pure text delta with known fields only and the sentinel as its text.
    """
    framed = _EVENT.fullmatch(event)
    if not framed or has_many_brackets(event):
        return None
    holes = _text_holes(event, framed.start(2))
    if not holes:
        return None
    texts = sum(end - start for start, end, _ in holes)
    if len(event) - texts > VARIED_BYTES_MAX:
        return None
    parsed = shallow_object(_replaced(event, holes)[framed.start(2) :])
    if parsed is None:
        return None
    api, parts, may_merge = _parts(parsed)
    if len(parts) != 1 or parts[0].texts() != [_SENTINEL] * len(holes) or not _repeats(parsed, api):
        return None
    varied = _varied_holes(event, holes, api)
    if varied is None:
        return None
    template = _cut(event, sorted(holes + _other_holes(event, holes, varied, api)), merges=may_merge)
    if sum(map(len, template.fixed)) > TEMPLATE_BYTES_MAX or len(template.holes) > HOLES_MAX:
        return None
    fill = template.match(event)
    return template if fill and template.render(fill) == event else None


def has_many_brackets(event: bytes) -> bool:
    """Whether the event is kept whole for its number of brackets alone; shallow_object() looks at the depth."""
    return event.count(b"[") + event.count(b"{") > _BRACKETS_MAX


# Bound of an event with members that vary, without its texts: 20 alternatives of a token take 2 KiB.
VARIED_BYTES_MAX: Final = 8192
# Most contents of holes that vary, without a call; a string with escapes or other characters is looked at by itself.
_QUICK: Final = {VALUE: _VALUE.match, INTS: _INTS.match, STRING: re.compile(rb'[ !#-\[\]-~]*(?=")').match}
_OF_VARIED: Final = bytes((*VARIED, SPELT, SPACED))
_AS_VARIED: Final = {PAD: STRING, COUNT: VALUE}
# Signs of a list or object, with strings as a whole.
_SIGN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]')
_VARIES: Final = re.compile(
    rb"\[(?P<ints>[0-9]{1,10}(?:, ?[0-9]{1,10})*)\]"
    rb'|"(?P<inside>[^"\\]*(?:\\.[^"\\]*)*)"(?P<name>\s*:)?'
    rb"|(?P<number>-?[0-9][0-9.eE+-]*)"
)
# Names of members in log probabilities: of OpenAI's two APIs, of vLLM, SGLang and llama.cpp, and of Google. Other names
# there are tokens (OpenAI's completions).
_KNOWN_NAMES: Final = frozenset(
    (
        *(b"content", b"refusal", b"token", b"logprob", b"bytes", b"top_logprobs", b"id", b"rank", b"decoded_token"),
        *(b"text_offset", b"token_logprobs", b"tokens", b"top_logprob", b"prob", b"probs", b"top_probs"),
        *(b"chosenCandidates", b"topCandidates", b"candidates", b"tokenId", b"logProbability"),
    )
)

_FRACTION: Final = re.compile(rb"[:,\[]-?[0-9]+[.e]")

Hole = tuple[int, int, int]  # from, to, kind


def _text_holes(event: bytes, start: int) -> list[Hole]:
    """The only text that isn't empty, or the same text twice; [] if there is no text or there are different texts."""
    holes: list[Hole] = []
    for key in _TEXT_KEY.finditer(event, start):
        to_quote = _TO_QUOTE.match(event, key.end())
        end = to_quote.end() if to_quote else len(event)
        holes.append((key.end(), end, AGAIN if holes else TEXT))
    texts = {event[start:end] for start, end, _ in holes}
    return holes if len(texts) == 1 and len(holes) <= 2 else []


def _replaced(event: bytes, holes: list[Hole]) -> bytes:
    sentinel = _SENTINEL.encode()
    for start, end, _ in reversed(holes):
        event = event[:start] + sentinel + event[end:]
    return event


def _varied_holes(event: bytes, texts: list[Hole], api: Api) -> list[Hole] | None:
    """The holes in the members that vary with the text, which stand behind it; None if they stand elsewhere.

    Proof: with a sentinel in their place the parsed event has it in these members alone.
    """
    names = "|".join(path.rpartition(".")[2] for path in api.merging.varied)
    if not names:
        return []
    spans: list[tuple[int, int]] = []
    for key in re.finditer(rb'"(?:%b)"\s*:\s*(?=[\[{])' % names.encode(), event):
        end = _value_end(event, key.end())
        if key.end() < texts[-1][1] or (spans and key.start() < spans[-1][1]):
            return None
        spans.append((key.end(), end))
    if not spans:
        return []
    marked, sentinel = event, _SENTINEL.encode()
    for start, end in reversed(spans):
        marked = b'%b"%b"%b' % (marked[:start], sentinel, marked[end:])
    marked = _replaced(marked, texts)  # orjson refuses half a surrogate pair
    parsed = shallow_object(marked[marked.index(b"data:") + 5 :])
    if parsed is None or _marked(parsed, api) != len(spans):
        return None
    text = event[texts[0][0] : texts[0][1]]
    return [hole for start, end in spans for hole in _holes_within(event, start, end, text)]


def _marked(parsed: Json, api: Api) -> int:
    """The number of sentinels in members that may vary."""
    count = 0
    for path in api.merging.varied:
        level, _, name = path.rpartition(".")
        holders = objects_of(parsed, level.removesuffix("[]")) if level else [parsed]
        count += sum(holder.get(name) == _SENTINEL for holder in holders)
    return count


def _value_end(event: bytes, start: int) -> int:
    """Where the list or object that begins at `start` ends."""
    depth = 0
    for sign in _SIGN.finditer(event, start):
        if sign[0] in (b"[", b"{"):
            depth += 1
        elif sign[0] in (b"]", b"}"):
            depth -= 1
            if not depth:
                return sign.end()
    return start


def _holes_within(event: bytes, start: int, end: int, text: bytes) -> list[Hole]:
    """The holes in a list or an object: numbers, lists of whole numbers, strings, and names that aren't known."""
    holes: list[Hole] = []
    is_named = False  # the text stands in it, and its bytes may follow
    for found in _VARIES.finditer(event, start, end):
        if found["ints"]:
            at, kind = found.span("ints"), INTS
            spelling = next((each for each in (SPELT, SPACED) if _spelt(text, each) == found["ints"]), INTS)
            if is_named and spelling != INTS:
                kind, is_named = spelling, False
        elif found["number"]:
            at, kind = found.span("number"), VALUE
        elif found["name"] and found["inside"] in _KNOWN_NAMES:
            continue
        else:
            at, kind = found.span("inside"), STRING
            if found["inside"] == text and not found["name"] and not any(each[2] == AGAIN for each in holes):
                kind, is_named = AGAIN, True
        holes.append((*at, kind))
    return holes


def _other_holes(event: bytes, texts: list[Hole], varied: list[Hole], api: Api) -> list[Hole]:
    """The holes beside the text: of each kind the only one, and outside the text; padding only after it. Beside holes
    that vary, padding and counts are such holes, too.
    """
    found: list[Hole] = []
    kinds = [(_CREATED_KEY, _CREATED, CREATED), (_NUMBER_KEY, _NUMBER, NUMBER), (_PAD_KEY, _PAD, PAD)]
    for key, value, kind in kinds:
        keys = list(key.finditer(event))
        if len(keys) != 1 or (kind == PAD and keys[0].end() < texts[-1][1]):
            continue
        filled = value.match(event, keys[0].end())
        if filled:
            found.append((filled.start(), filled.end(), kind))
    padded = any(kind == PAD for _, _, kind in found)
    if not padded and api.spaces_end and (brace := _LAST_BRACE.search(event, texts[-1][1])):
        start = brace.start()
        found.append((start, start + event[start:].index(b"}"), SPACES))
    if not padded and api.counts is not None:
        found += _count_holes(event, texts[-1][1], api)
    found = [hole for hole in found if not any(start <= hole[0] < end for start, end, _ in texts)]
    if not varied:
        return found
    return varied + [(start, end, _AS_VARIED.get(kind, kind)) for start, end, kind in found if kind != SPACES]


def _count_holes(event: bytes, after: int, api: Api) -> list[Hole]:
    """The numbers after the API's keys of counts, if each is inside a counted member."""
    keys = api.counts
    assert keys is not None
    counts = [count for key in keys.finditer(event, after) if (count := _COUNT.match(event, key.end()))]
    holes = [(count.start(), count.end(), COUNT) for count in counts]
    marks = range(_COUNT_MARK, _COUNT_MARK + len(holes))
    for (start, end, _), mark in zip(reversed(holes), reversed(marks), strict=True):
        event = b"%b%d%b" % (event[:start], mark, event[end:])
    parsed = shallow_object(event[event.index(b"data:") + 5 :]) or {}
    counted = orjson.dumps({name: parsed[name] for name in api.merging.counted if name in parsed})
    return holes if all(b"%d" % mark in counted for mark in marks) else []


def _cut(event: bytes, holes: list[Hole], merges: bool) -> Template:
    fixed, at = [], 0
    for start, end, _ in holes:
        fixed.append(event[at:start])
        at = end
    return Template((*fixed, event[at:]), bytes(kind for _, _, kind in holes), merges)


def _repeats(parsed: Json, api: Api) -> bool:
    """Whether an event like this may follow with the same values: counts change, and fit only as holes. A fraction, of
    a cost or a time, changes as well and has no hole.
    """
    counted = {name: parsed[name] for name in api.merging.counted if parsed.get(name) is not None}
    return not counted or (api.counts is not None and not _FRACTION.search(orjson.dumps(counted)))


def _parts(parsed: Json) -> tuple[Api, list[Part], bool]:
    """The API of an event, its texts, a part for each choice, and whether the event may be merged.

    No parts unless the event adds nothing but text, and all other members are such that it may repeat.
    """
    for api in APIS:
        parts = api.parts(parsed)
        if parts is not None:
            may_merge = merges(parsed, api.merging.top)
            if may_merge is None:
                break
            return api, parts, may_merge and all(part.merges for part in parts)
    return APIS[-1], [], False


class Delta:
    """A parsed text delta that can absorb its neighbours: several choices in an event, each index once.

    Every member is one that is known to be safe, and merges by the rule of its API (wire/dialects/merging.py).
    """

    __slots__ = ("_api", "_line", "_parsed", "_parts", "_rest", "_shapes", "_texts", "text_bytes")

    text_bytes: int  # of all texts in it, as UTF-8

    def __init__(self, line: bytes, parsed: Json, api: Api, parts: list[Part]) -> None:
        self._line = line
        self._api = api
        self._parsed = parsed
        self._parts = {part.index: part for part in parts}
        self._texts = {part.index: [part.texts()] for part in parts}
        self.text_bytes = sum(len(text.encode()) for part in parts for text in part.texts())
        for part in parts:
            for holder, name in part.places:
                holder[name] = ""
        # Compared as bytes, since 1 == 1.0 == True.
        self._shapes = {part.index: (tuple(name for _, name in part.places), _canonical(part.whole)) for part in parts}
        self._rest = _canonical(_comparable(parsed, api))

    @classmethod
    def of(cls, event: bytes) -> Delta | None:
        """The delta of an event; None if it is no text delta, can't be parsed, or must not be merged."""
        framed = _EVENT.fullmatch(event)
        if not framed or _BIG_NUMBER.search(event) or has_many_brackets(event):
            return None
        parsed = shallow_object(framed[2])
        if parsed is None:
            return None
        api, parts, may_merge = _parts(parsed)
        return cls(framed[1], parsed, api, parts) if parts and may_merge else None

    def absorb(self, later: Delta) -> bool:
        """Absorb the texts of `later`, the next event; False, with nothing changed, if the two differ."""
        if self._line != later._line or self._api is not later._api or self._rest != later._rest:
            return False
        if any(self._shapes.get(index, shape) != shape for index, shape in later._shapes.items()):
            return False
        for index, part in later._parts.items():
            if index not in self._parts:
                self._parts[index] = part
                self._parsed[self._api.listed].append(part.whole)
            self._texts.setdefault(index, []).extend(later._texts[index])
        self._shapes.update(later._shapes)
        self._parsed.update({name: later._parsed[name] for name in self._api.merging.last if name in later._parsed})
        self.text_bytes += later.text_bytes
        return True

    def event(self) -> bytes:
        """The merged event, of the shape of the first."""
        for index, part in self._parts.items():
            for (holder, name), texts in zip(part.places, zip(*self._texts[index], strict=True), strict=True):
                holder[name] = "".join(texts)
        return self._line + b" " + orjson.dumps(self._parsed) + b"\n\n"


def _comparable(parsed: Json, api: Api) -> Json:
    """The members that have to be equal: of counted members only their presence, of the choices nothing yet."""
    merging = api.merging
    rest = {name: value for name, value in parsed.items() if name not in merging.compared_not}
    return rest | {name: parsed[name] is None for name in merging.counted if name in parsed}


def _canonical(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


_PLACE: Final = re.compile(rb'"streamd-([0-9]+)-"')


def combine(runs: list[tuple[Template, Fill]]) -> bytes | None:
    """An event of the concatenated texts of several templates, each for a choice; None if they can't be combined.

    The texts are inserted as they are on the wire, so that texts which orjson would refuse pass unchanged.
    """
    merged: Delta | None = None
    for place, (template, fill) in enumerate(runs):
        delta = Delta.of(template.render(fill._replace(text=b"streamd-%d-" % place)))
        if delta is None or not template.merges or (merged is not None and not merged.absorb(delta)):
            return None
        merged = merged or delta
    if merged is None:
        return None
    event = merged.event()
    expected = sorted(b"%d" % place for place, (t, _) in enumerate(runs) for hole in t.holes if hole in (TEXT, AGAIN))
    if sorted(_PLACE.findall(event)) != expected:
        return None
    return _PLACE.sub(lambda place: b'"%b"' % runs[int(place[1])][1].text, event)
