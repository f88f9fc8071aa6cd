"""The upstreams' answers in the simulation: events of all dialects, and their bytes on the wire.

Written without the code under test. A Script is one answer. `events` is the second model of a stream: the plain list of
the events that the relay has received whole, in the form in which a reader has to get them (LF line ends, no id lines,
no comment-only blocks).
"""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from typing import Any

# Insides of JSON strings, many of which look like another element. Halves of a surrogate pair come in separate events.
TEXTS = (
    *(
        b" the",
        b" of",
        b" a",
        b"token",
        b" stream",
        b",",
        b".",
        b"s",
        b"ing",
        b" 42",
        b" and",
        b" \xe4\xb8\xad\xe6\x96\x87",
    ),
    *(
        b"\xc3\xa9",
        b"\\n",
        b"\\n\\n",
        b'\\"',
        b"\\\\",
        b"\\u00e9",
        b"\\t",
        b"data: ",
        b"[DONE]",
        b"id: 7",
        b"{}",
        b": hb",
    ),
    *(b"\xf0\x9f\x98\x80", b"0", b"event: gap", b" x" * 40, b"\\u0001", b"\\/"),
)
HALVES = (b"\\ud83d", b"\\ude00")

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "gemini": "/v1beta/models/m:streamGenerateContent?alt=sse",
    "unknown": "/v1/other",
}
DIALECTS = ("chat", "chat", "chat", "completions", "responses", "messages", "gemini", "unknown")


def _line(body: bytes, name: bytes = b"") -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, body) if name else b"data: %b\n\n" % body


class Script:
    """An answer: made event by event, recorded as it is read by the relay."""

    __slots__ = (
        "_begun",
        "_half",
        "_number",
        "_padded",
        "_parts",
        "_rng",
        "_shape",
        "cut",
        "dialect",
        "ended",
        "event_at",
        "events",
        "final",
        "finished_at",
        "name",
        "partly_finished",
        "pending",
        "read_whole",
        "said",
        "terminal_at",
        "total",
    )

    def __init__(self, rng: random.Random, dialect: str, name: str, total: int) -> None:
        self._rng = rng
        self.dialect = dialect
        self.name = name.encode()
        self.total = total
        self.said = 0
        self.events: list[bytes] = []  # the second model
        self.pending: list[tuple[int, bytes]] = []  # (offset on the wire at which the event is whole, the event)
        self.cut: list[bytes] = []  # the event that was on its way when the upstream was lost
        # The numbers of events with which all choices are finished, and with which the dialect's terminal is sent.
        self.finished_at = self.terminal_at = 1 << 60
        self.partly_finished = False  # some choices never get their finish_reason
        self.ended = False  # its framing ended properly
        self.read_whole = False  # and the relay has read the end
        self.event_at = 0.0  # when the relay was given the newest event
        self.final: bytes | None = None  # the error event that ended it, as its first reader got it
        self._parts = rng.choice((1, 1, 1, 1, 2, 3))  # choices, or outputs
        self._shape = rng.randrange(6)
        self._padded = rng.random() < 0.1
        self._number = 0
        self._begun = -1  # the candidate of the last event with a candidate
        self._half = 0

    def confirm(self, stream: Any) -> None:
        """When the upstream is lost, an event whose data is whole counts without its blank line, and without an ignored
        field.
        """
        cut = [event for _, event in self.pending[:1]] or self.cut
        seq, log = len(self.events) + 1, stream.log
        if not cut or not log.seq_first <= seq < log.seq_next:
            return
        event = log.read(log.seek(seq), bytes_max=1)[0][1]
        if event in (cut[0], _without_ignored_field(cut[0])):
            self.events.append(event)
            self.pending.clear()
            self.cut.clear()

    def lose(self) -> None:
        """The relay gets no more of it."""
        self.cut = [event for _, event in self.pending[:1]]
        self.pending.clear()

    # -- events

    def opening(self) -> list[bytes]:
        if self.dialect == "chat":
            return [self._chat(k, b'{"role":"assistant","content":""}') for k in range(self._parts)]
        if self.dialect == "responses":
            return [self._response(b"response.created", b'"response":{"id":"resp_%b","output":[]}' % self.name)]
        if self.dialect == "messages":
            start = b'{"type":"message_start","message":{"id":"m_%b","usage":{"input_tokens":5,"output_tokens":1}}}'
            block = b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'
            return [_line(start % self.name, b"message_start"), _line(block, b"content_block_start")]
        return []

    def token(self) -> bytes:
        """The next event in the middle."""
        self.said += 1
        roll = self._rng.random()
        if roll < 0.02:
            return self._odd()
        text = self._text()
        part = self._rng.randrange(self._parts) if self._parts > 1 else 0
        if self.dialect == "chat":
            return self._chat(part, self._delta(text))
        if self.dialect == "completions":
            row = (
                b'{"id":"cmpl-%b","object":"text_completion","choices":[{"index":%d,"text":"%b","finish_reason":null}]}'
            )
            return _line(row % (self.name, part, text))
        if self.dialect == "responses":
            fields = b'"item_id":"i%d","output_index":%d,"content_index":0,"delta":"%b"' % (part, part, text)
            return self._response(b"response.output_text.delta", fields)
        if self.dialect == "messages":
            kind = (b"text_delta", b"text") if self._shape < 3 else (b"thinking_delta", b"thinking")
            row = b'{"type":"content_block_delta","index":0,"delta":{"type":"%b","%b":"%b"}}'
            return _line(row % (*kind, text), b"content_block_delta")
        if self.dialect == "gemini":
            return self._candidate(part, self._part(text))
        return _line(b'{"delta":"%b"}' % text)

    def closing(self) -> list[bytes]:
        """The events that make the answer complete."""
        before = len(self.events) + len(self.pending)
        if self.dialect in ("chat", "gemini"):
            return self._chat_closing(before) if self.dialect == "chat" else self._gemini_closing(before)
        if self.dialect == "completions":
            ends = [_line(b"[DONE]")]
        elif self.dialect == "responses":
            ends = [self._response(b"response.completed", b'"response":{"id":"resp_%b"}' % self.name)]
        elif self.dialect == "messages":
            ends = [_line(b'{"type":"message_stop"}', b"message_stop")]
        else:
            return []
        self.terminal_at = before + len(ends)
        return ends

    def _chat_closing(self, before: int) -> list[bytes]:
        """Finish reasons, for all choices or for some; then usage and [DONE], or not."""
        finished = self._parts
        if self._parts > 1 and self._rng.random() < 0.2:
            finished = self._rng.randrange(self._parts)
            self.partly_finished = True
        ends = [self._chat(k, b"{}", b'"stop"') for k in range(finished)]
        if finished == self._parts:
            self.finished_at = before + finished
        if self._rng.random() < 0.5:
            usage = b'{"id":"c","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":%d}}'
            ends.append(_line(usage % self.said))
        if self._rng.random() < (0.5 if self.partly_finished else 0.8):
            ends.append(_line(b"[DONE]"))
            self.terminal_at = before + len(ends)
        return ends

    def _gemini_closing(self, before: int) -> list[bytes]:
        """Finish reasons, for all candidates or all begun but one; or the prompt was blocked. No terminal."""
        if not self.said:
            ends = [_line(b'{"promptFeedback":{"blockReason":"SAFETY"}}')]
            self.finished_at = before + 1
        else:
            self.partly_finished = self._begun >= 0 and self._rng.random() < 0.1
            spared = self._begun if self.partly_finished else -1
            parts = [k for k in range(self._parts) if k != spared]
            ends = [self._candidate(k, b'{"text":""}', b'"finishReason":"STOP",') for k in parts]
            if not self.partly_finished:
                self.finished_at = before + len(ends)
        if self._rng.random() < 0.3:
            ends.append(_line(b"{%b}" % self._usage()))
        return ends

    def _candidate(self, index: int, part: bytes, finish: bytes = b"") -> bytes:
        row = b'{"candidates":[{"content":{"parts":[%b],"role":"model"},%b"index":%d}],%b,"responseId":"%b"}'
        self._begun = index
        name = b"%b-%d" % (self.name, self.said // 15) if self._shape == 5 else self.name
        return _line(row % (part, finish, index, self._usage(), name))

    def _part(self, text: bytes) -> bytes:
        """A text, a thought in the first third, or a call now and then."""
        if self._shape in (1, 2) and self.said < self.total // 3:
            return b'{"text":"%b","thought":true}' % text
        if self._shape == 2 and self.said % 40 == 0:
            return b'{"functionCall":{"name":"f","args":{"n":%d}}}' % self.said
        return b'{"text":"%b"}' % text

    def _usage(self) -> bytes:
        """Counts that grow with each event, or with every fifth."""
        said = self.said // 5 * 5 if self._shape == 3 else self.said
        row = (
            b'"usageMetadata":{"promptTokenCount":5,"candidatesTokenCount":%d,"totalTokenCount":%d},"modelVersion":"g"'
        )
        return row % (said, said + 5)

    def _text(self) -> bytes:
        if self._half:
            self._half = 0
            return HALVES[1]
        roll = self._rng.random()
        if roll < 0.01:
            self._half = 1
            return HALVES[0]
        if roll < 0.012:
            return b" long" * self._rng.choice((200, 1200))
        return TEXTS[int(roll * len(TEXTS))]

    def _delta(self, text: bytes) -> bytes:
        third = self.total // 3
        if self._shape == 1 and self.said < third:
            return b'{"reasoning_content":"%b"}' % text
        if self._shape == 2 and self.said >= third:
            if self.said % 40 == 0:
                return b'{"tool_calls":[{"index":%d,"id":"t%d","function":{"name":"f","arguments":""}}]}' % (
                    self.said // 40 % 3,
                    self.said,
                )
            return b'{"tool_calls":[{"index":%d,"function":{"arguments":"%b"}}]}' % (self.said // 40 % 3, text)
        return b'{"content":"%b"}' % text

    def _chat(self, choice: int, delta: bytes, finish: bytes = b"null") -> bytes:
        created = 1_700_000_000 + (self.said // 20 if self._shape == 3 else 0)
        tail = b',"obfuscation":"%b"' % (b"Ab9x" * self._rng.randrange(1, 5)) if self._padded else b""
        if self._shape == 4:  # vLLM's continuous_usage_stats: fits no template
            tail += b',"usage":{"prompt_tokens":5,"completion_tokens":%d}' % self.said
        # A server behind a balancer that begins anew, or two answers in one: such chunks belong to two messages.
        name = b"%b-%d" % (self.name, self.said // 15) if self._shape == 5 else self.name
        row = (
            b'{"id":"c-%b","object":"chat.completion.chunk","created":%d,"model":"m","choices":[{"index":%d,"delta":%b,'
        )
        return _line(row % (name, created, choice, delta) + b'"finish_reason":%b}]%b}' % (finish, tail))

    def _response(self, kind: bytes, fields: bytes) -> bytes:
        number, self._number = self._number, self._number + 1
        return _line(b'{"type":"%b","sequence_number":%d,%b}' % (kind, number, fields), kind)

    def _odd(self) -> bytes:
        """An event that is unexpected and has to be passed on all the same."""
        return self._rng.choice(
            (
                _line(b'{"choices":[{"index":0,"delta":{"content":"x"},"logprobs":{"content":[]}}]}'),
                _line(b"not json at all"),
                _line(b'{"error":false,"x":[1,2,{"y":null}]}'),
                b": inside\nevent: odd\ndata: 1\ndata: 2\n\n",
                b"data\n\n",
                _line(b'{"choices":[{"index":0,"delta":{"content":""}}]}'),
                _line(b'{"choices":[{"index":0,"delta":{"content":"\\udc00"}}]}'),
                b"data:{}\nother: field\n\n",
                b"event: odd\n" + (self._chat(0, self._delta(b"odd")) if self.dialect == "chat" else _line(b"{}")),
            )
        )

    # -- the record

    @property
    def complete(self) -> bool:
        """Whether the relay was given all events that make an answer of this dialect complete."""
        if self.dialect == "unknown":
            return bool(self.events)
        return len(self.events) >= min(self.finished_at, self.terminal_at)

    @property
    def said_terminal(self) -> bool:
        """Whether the relay was given the dialect's terminal event."""
        return len(self.events) >= self.terminal_at

    def given(self, offset: int, now: float) -> None:
        """The relay is about to read up to this offset of the wire."""
        pending = self.pending
        count = 0
        while count < len(pending) and pending[count][0] <= offset:
            self.events.append(pending[count][1])
            count += 1
        if count:
            self.event_at = now
        del pending[:count]


def _without_ignored_field(event: bytes) -> bytes:
    """The event without its last line, if that is neither its type nor data."""
    lines = event[:-2].split(b"\n")
    if len(lines) > 1 and not lines[-1].startswith((b"data", b"event")):
        del lines[-1]
    return b"\n".join(lines) + b"\n\n"


class Wire:
    """Events to bytes: the upstream's choice of line ends, ids, comments and framing; where each event is whole."""

    __slots__ = ("_chunked", "_ends", "_first", "_first_id", "_frills", "_rng", "cut", "offset")

    def __init__(self, rng: random.Random, *, chunked: bool, offset: int, first_id: bool) -> None:
        """first_id: the first event may have an id, which in no known dialect makes the stream its server's own."""
        self._rng = rng
        self._first_id = first_id
        self._chunked = chunked
        self._ends = rng.choice((b"\n", b"\n", b"\n", b"\n", b"\r\n", b"\r"))
        self._frills = rng.random() < 0.15
        self._first = True
        self.offset = offset  # of the bytes made so far, on the connection
        self.cut = 0  # in the bytes of the last encode(): where its first chunk ends, if a read is to end there as well

    def encode(self, events: list[bytes], script: Script) -> bytes:
        """The bytes of some events; tells the script where each is whole."""
        raw = b""
        wholes: list[int] = []
        for event in events:
            raw += self._raw(event)
            wholes.append(len(raw) - (1 if self._ends == b"\r\n" else 0))
        if not self._chunked:
            script.pending += [(self.offset + whole, event) for whole, event in zip(wholes, events, strict=True)]
            self.offset += len(raw)
            return raw
        return self._chunks(raw, wholes, events, script)

    def comment(self) -> bytes:
        """A sign of life without an event."""
        raw = b": life" + self._ends + self._ends
        wire = b"%x\r\n%b\r\n" % (len(raw), raw) if self._chunked else raw
        self.offset += len(wire)
        return wire

    def _raw(self, event: bytes) -> bytes:
        may_have_id = self._frills and (self._first_id or not self._first)
        if may_have_id and self._rng.random() < 0.3:
            event = b"id: %d\n" % self._rng.randrange(9999) + event
        if may_have_id and self._rng.random() < 0.1:
            event = b"id\n" + event
        if self._first and self._frills:
            event = b"\xef\xbb\xbf" + event
        self._first = False
        return event if self._ends == b"\n" else event.replace(b"\n", self._ends)

    def _chunks(self, raw: bytes, wholes: list[int], events: list[bytes], script: Script) -> bytes:
        cuts = [0, len(raw)]
        self.cut = 0
        line_end = raw.find(b"\n", 0, len(raw) - 2) + 1
        by_lines = line_end and (self._rng.random() < 0.02 or raw.startswith(b"event: odd"))
        if by_lines:  # a chunk, and a read, that ends between two lines of one event
            cuts = [0, line_end, len(raw)]
        elif self._rng.random() < 0.05 and len(raw) > 1:
            cuts = [0, *sorted({self._rng.randrange(1, len(raw)) for _ in range(2)}), len(raw)]
        wire = b""
        at = 0
        for begin, end in pairwise(cuts):
            size = b"%x\r\n" % (end - begin)
            while at < len(wholes) and wholes[at] <= end:
                script.pending.append((self.offset + len(wire) + len(size) + wholes[at] - begin, events[at]))
                at += 1
            wire += size + raw[begin:end] + b"\r\n"
            if by_lines and not self.cut:
                self.cut = len(wire)
        self.offset += len(wire)
        return wire


# The accumulation that an SDK does

_TEXT_KEYS = {
    "content",
    "reasoning_content",
    "reasoning",
    "refusal",
    "arguments",
    "text",
    "delta",
    "partial_json",
    "thinking",
}
_MARKS = ("type", "output_index", "content_index", "item_id", "index", "thought")
_IGNORED = {"created", "obfuscation"}  # the first `created` stands, and padding is dropped


_TOTAL = re.compile(rb'"totalTokenCount":[0-9]+')


def effects(events: list[bytes]) -> dict[Any, Any] | None:
    """The events' joint effect: texts added up by place, of other values the last. None: not all are JSON."""
    found: dict[Any, Any] = {}
    for event in events:
        name, data = "", []
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif field == b"event":
                name = value.decode()
        try:
            body = json.loads(b"\n".join(data))
        except ValueError:
            return None
        found["event"] = name
        _walk(body, (), found)
    for place, value in found.items():
        if isinstance(value, str):
            found[place] = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return found


def merges_to(events: list[bytes], block: bytes) -> bool:
    """Whether these events together say what the block says. The usage is repeated in each event: the last stands."""
    said = effects([block])
    if said is None or effects(events) != said:
        return False
    total = _TOTAL.search(block)
    if total is None:
        return not any(_TOTAL.search(event) for event in events)
    return total[0] in events[-1]


def data_of(event: bytes) -> bytes:
    """The event as its data lines alone."""
    lines = [line.removeprefix(b"data").removeprefix(b":").removeprefix(b" ") for line in _data_lines(event)]
    return b"".join(b"data: %b\n" % line for line in lines) + b"\n"


def _data_lines(event: bytes) -> list[bytes]:
    return [line for line in event.split(b"\n") if line == b"data" or line.startswith(b"data:")]


def _walk(value: Any, place: tuple[Any, ...], found: dict[Any, Any]) -> None:
    if isinstance(value, dict):
        marks = tuple(value.get(mark) for mark in _MARKS if not isinstance(value.get(mark), (dict, list)))
        for key, inner in value.items():
            if key in _IGNORED or inner is None:
                continue
            if key in ("id", "responseId"):  # which messages the events belong to: all of them, in order
                named = found.setdefault((*place, key), [])
                if not named or named[-1] != inner:
                    named.append(inner)
                continue
            if key in _TEXT_KEYS and isinstance(inner, str):
                where = (*place, marks, key)
                found[where] = found.get(where, "") + inner
            else:
                _walk(inner, (*place, key) if key != "delta" else (*place, marks, key), found)
    elif isinstance(value, list):
        for k, inner in enumerate(value):
            _walk(inner, (*place, inner.get("index", k) if isinstance(inner, dict) else k), found)
    else:
        found[place] = value
