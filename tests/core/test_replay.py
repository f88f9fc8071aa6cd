"""The replay log: every event comes back byte for byte; coalesced, an SDK accumulates the same; bounds hold."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.core import replay
from streamd.core.replay import Cursor, ReplayLog, check_parts
from streamd.wire import shapes
from streamd.wire.template import learn

# Texts that could mislead a log of texts between templates: structure, escapes, its own marks, halves of characters.
TEXTS = st.sampled_from(
    [
        *(
            "",
            " the",
            "token",
            "a",
            ",",
            "\n",
            "\n\n",
            "\t",
            "é",
            "中文",
            "😀",
            "\x01",
            "\x01\xff",
            "\x1f",
            "\x7f",
            "\0",
        ),
        *(
            '"',
            '\\"',
            "\\",
            "\\n",
            '"},"finish_reason":null}]}\n\n',
            '"content":"',
            "data: [DONE]\n\n",
            "streamd",
            "streamd-0-",
        ),
        *("\ud83d", "\ude00", "\ud83d\ude00", "x" * 300, "y" * 600, "z" * 9000, "\u2028", "/", "</script>"),
    ]
)
SMALL = st.integers(0, 2)
NULLABLE: Any = st.one_of(st.none(), st.just("x"), st.just(1), st.just(1.0), st.just(True))


def chat(**more: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"} | more


def choice(text: str, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "finish_reason": None} | more


def wire(parsed: Any, *, name: str = "", compact: bool = True, ascii_only: bool = False) -> bytes:
    """The event as a server writes it. Lone halves of characters can only be written as escapes."""
    separators = (",", ":") if compact else (", ", ": ")
    try:
        text = json.dumps(parsed, ensure_ascii=ascii_only, separators=separators).encode()
    except UnicodeEncodeError:
        text = json.dumps(parsed, separators=separators).encode()
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text + b"\n\n"


def gemini(parts: list[Any], made: int, index: int = 0, finish: str | None = None, thoughts: bool = False) -> Any:
    candidate = {"content": {"parts": parts, "role": "model"}, "index": index}
    counts = {"promptTokenCount": 8, "candidatesTokenCount": made, "totalTokenCount": made + 8}
    return {
        "candidates": [candidate | ({"finishReason": finish} if finish else {})],
        "usageMetadata": counts | ({"thoughtsTokenCount": made} if thoughts else {}),
        "modelVersion": "m",
        "responseId": "r",
    }


@st.composite
def deltas(draw: st.DrawFn) -> dict[str, Any]:
    """The delta of a choice: mostly text of a single kind, sometimes a delta that must not be merged."""
    kinds = ["reasoning_content", "refusal", "twins", "tool", "tool_start", "role", "channel", "details", "odd"]
    kind = draw(st.sampled_from(["content"] * 6 + kinds))
    text = draw(TEXTS)
    if kind == "twins":
        return {"reasoning": text, "reasoning_content": text}
    if kind == "tool":
        return {"tool_calls": [{"index": draw(SMALL), "function": {"arguments": text}}]}
    if kind == "tool_start":
        call = {"index": draw(SMALL), "id": "c1", "type": "function", "function": {"name": "f", "arguments": text}}
        return {"tool_calls": [call]}
    if kind == "role":
        return {"role": "assistant", "content": text}
    if kind == "channel":
        return {"channel": draw(st.sampled_from(["analysis", "", None])), "reasoning": text}
    if kind == "details":
        return {
            "reasoning": text,
            "reasoning_details": [{"type": "reasoning.text", "text": draw(st.just(text) | TEXTS)}],
        }
    if kind == "odd":
        return {"content": text, "annotations": draw(NULLABLE), "content_extra": draw(NULLABLE)}
    return {kind: text}


def spelt(text: str) -> list[int]:
    return list(text.encode("utf-8", "replace"))


@st.composite
def varied(draw: st.DrawFn, text: str) -> dict[str, Any]:
    """Members of a choice that vary with each token: its ids, or its probability and those of others."""
    if draw(st.booleans()):
        return {"token_ids": draw(st.lists(st.integers(0, 150_000), max_size=3))}
    number = st.one_of(st.floats(-20, 0), st.integers(-9999, 0), st.just(-1e-9))
    token = draw(st.one_of(st.just(text), TEXTS))
    entry: dict[str, Any] = {"token": token, "logprob": draw(number)}
    if draw(st.booleans()):
        entry["bytes"] = draw(st.sampled_from([spelt(token), None, [], [7]]))
    if draw(st.booleans()):
        others = draw(st.lists(st.tuples(TEXTS, number), max_size=2))
        entry["top_logprobs"] = [{"token": each, "logprob": p, "bytes": spelt(each)} for each, p in others]
    if draw(st.booleans()):
        return {"logprobs": {"content": [entry] * draw(SMALL), "refusal": None}}
    return {"logprobs": {"tokens": [token], "token_logprobs": [entry["logprob"]], "top_logprobs": [{token: -0.5}]}}


@st.composite
def chat_events(draw: st.DrawFn) -> bytes:
    """Chat chunks: choices, tool calls, usage, changing dates, padding, unknown fields."""
    rare = st.sampled_from([False] * 7 + [True])
    indexes = draw(st.sampled_from([[0], [0], [0], [0], [1], [2], [0, 1], []]))
    choices = []
    for index in indexes:
        made: dict[str, Any] = {"index": index, "delta": draw(deltas()), "finish_reason": None}
        if draw(rare):
            made["finish_reason"] = draw(st.sampled_from(["stop", None, "", "null"]))
        if draw(rare):
            made["logprobs"] = draw(st.sampled_from([None, {"content": [{"token": "x", "logprob": -1}]}]))
        if draw(rare):
            made |= draw(varied(str(made["delta"].get("content", ""))))
        for name in ("unknown", "token_ids", "stop_reason"):
            if draw(rare):
                made[name] = draw(st.one_of(NULLABLE, st.sampled_from([[], [912]])))
        choices.append(made)
    parsed = chat(choices=choices, created=1_700_000_000 + draw(SMALL))
    if draw(rare):
        parsed["usage"] = draw(st.sampled_from([None, {"completion_tokens": 1}, {"completion_tokens": 2}]))
    if draw(rare):
        parsed["timings"] = {"predicted_n": draw(SMALL)}
    for name in ("unknown", "provider", "x_groq"):
        if draw(rare):
            parsed[name] = draw(NULLABLE)
    if draw(rare):
        parsed["obfuscation"] = draw(st.sampled_from(["", "a", "Zx91", "\x01", 'q"']))
    if draw(rare):
        parsed = dict(reversed(parsed.items()))
    return wire(parsed, compact=not draw(rare), ascii_only=draw(rare))


@st.composite
def other_dialects(draw: st.DrawFn) -> bytes:
    text, number, index = draw(TEXTS), draw(st.integers(0, 9)), draw(SMALL)
    kind = draw(
        st.sampled_from(
            ["completion", "responses", "responses_first", "messages", "messages_json", "topic", "gemini", "gemini"]
        )
    )
    if kind == "completion":
        return wire(chat(choices=[{"index": index, "text": text, "finish_reason": None, "logprobs": None}]))
    if kind.startswith("responses"):
        name = "response.output_text.delta"
        head: dict[str, Any] = {"type": name, "item_id": "i", "output_index": index, "content_index": 0}
        numbered = (
            {"sequence_number": number} | head if kind == "responses_first" else head | {"sequence_number": number}
        )
        return wire(numbered | {"delta": text, "logprobs": []}, name=name)
    if kind == "gemini":
        shapes = [{"text": text}] * 5 + [{"text": text, "thought": True}, {"functionCall": {"name": text}}]
        return wire(gemini(draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=2)), number, index=index))
    if kind == "topic":
        return wire({"delta": text})
    name = "content_block_delta"
    delta = (
        {"type": "text_delta", "text": text}
        if kind == "messages"
        else {"type": "input_json_delta", "partial_json": text}
    )
    event = wire({"type": name, "index": index, "delta": delta}, name=name)
    return event.replace(b"}\n\n", b" " * draw(SMALL) + b"}\n\n")


@st.composite
def broken_events(draw: st.DrawFn) -> bytes:
    """A good event with bytes inserted, cut out or doubled at any place."""
    event = draw(st.one_of(chat_events(), other_dialects()))[:-2]
    at, to = sorted((draw(st.integers(0, len(event))), draw(st.integers(0, len(event)))))
    inserted = draw(
        st.sampled_from(
            [
                b"",
                b'"',
                b"\\",
                b"\\x",
                b"\\u00",
                b"\xe4",
                b"\xff",
                b"\xed\xa0\x80",
                b"\x01",
                b"\x1f",
                b"\n",
                b"\r",
                b"\0",
            ]
        )
    )
    return event[:at] + inserted + event[draw(st.sampled_from([at, at, to])) :] + b"\n\n"


RAW = st.one_of(
    st.just(b"data: [DONE]\n\n"),
    st.binary(max_size=40).map(lambda raw: b"data: " + raw + b"\n\n"),
    st.sampled_from(
        [
            b"\n\n",
            b"\x01\x00\n\n",
            b"\x01\xff\0\0\0\x01\n\n",
            b"data: \x01\xfe1234567890\n\n",
            b"data: " + b"q" * 5000 + b"\n\n",
        ]
    ),
)
EVENTS = st.one_of(chat_events(), chat_events(), other_dialects(), broken_events(), RAW)


@st.composite
def runs(draw: st.DrawFn) -> list[bytes]:
    """A stream that keeps the same shape for a while, as real streams do, with strange events in between."""
    events: list[bytes] = []
    for _ in range(draw(st.integers(1, 4))):
        some = draw(st.lists(EVENTS, min_size=1, max_size=6))
        texts = draw(st.lists(TEXTS, max_size=12))
        take_turns = draw(st.booleans())
        dated = draw(st.booleans())
        numbered = draw(st.booleans())
        padded = draw(st.booleans())
        google = draw(st.sampled_from([False, False, True]))
        varies = draw(st.sampled_from([None, None, "logprobs", "token_ids"]))
        for at, text in enumerate(texts):
            if google:
                part = {"text": text} | ({"thought": True} if numbered and at < 5 else {})
                index = at % 2 if take_turns else 0
                events.append(wire(gemini([part], 11 * at, index, thoughts=padded and (dated or at > 6))))
            elif numbered:
                name = "response.output_text.delta"
                fields = {
                    "type": name,
                    "sequence_number": at + 8,
                    "item_id": "i",
                    "output_index": 0,
                    "content_index": 0,
                }
                events.append(
                    wire(fields | {"delta": text} | ({"obfuscation": "p" * (at % 3)} if padded else {}), name=name)
                )
            else:
                entry = {"token": text, "logprob": -at / 8, "bytes": spelt(text), "top_logprobs": []}
                more = {None: {}, "token_ids": {"token_ids": [7**at]}, "logprobs": {"logprobs": {"content": [entry]}}}
                fields = {"choices": [choice(text, at % 2 if take_turns else 0, **more[varies])]}
                fields |= {"created": 1_700_000_000 + at // 3} if dated else {}
                fields |= {"obfuscation": "p" * (at % 3)} if padded else {}
                events.append(wire(chat(**fields)))
        events += some
    return events


def filled(events: list[bytes], *, bytes_max: int = 1 << 20, events_max: int = 1 << 20) -> ReplayLog:
    log = ReplayLog(bytes_max=bytes_max, events_max=events_max)
    for event in events:
        log.append(event)
    return log


def read_all(log: ReplayLog, cursor: Cursor, bytes_max: int = 1 << 20) -> list[tuple[int, bytes]]:
    out: list[tuple[int, bytes]] = []
    while events := log.read(cursor, bytes_max=bytes_max):
        out += events
    assert cursor.seq == log.seq_next
    return out


def coalesce_all(log: ReplayLog, cursor: Cursor, bytes_max: int = 16384) -> list[tuple[int, bytes]]:
    out: list[tuple[int, bytes]] = []
    while events := log.read_coalesced(cursor, bytes_max=bytes_max):
        out += events
    assert cursor.seq == log.seq_next
    return out


# An accumulator that treats a stream as SDKs do. It follows the OpenAI SDK's accumulate_delta, which concatenates
# strings and adds numbers, whatever they mean.


def accumulate(held: Any, delta: Any) -> Any:
    if held is None:
        return delta
    if isinstance(held, str) and isinstance(delta, str):
        return held + delta
    if isinstance(held, dict) and isinstance(delta, dict):
        return held | {k: v if k in ("index", "type") else accumulate(held.get(k), v) for k, v in delta.items()}
    if isinstance(held, list) and isinstance(delta, list):
        return held + delta
    if isinstance(held, int | float) and isinstance(delta, int | float):
        return held + delta
    return held if delta is None else delta


# Members of which a reader keeps the last value. All others, known or not, may be accumulated.
SINGLE = ("id", "object", "model", "provider", "index", "finish_reason")


class Sdk:
    """The state of a reader. `others` holds the events that are no deltas, unchanged."""

    def __init__(self) -> None:
        self.choices: dict[int, Any] = {}
        self.parts: dict[Any, str] = {}
        self.top: dict[str, Any] = {}
        self.created: Any = None
        self.others: list[bytes] = []

    def take(self, event: bytes) -> None:
        *head, data = event.removesuffix(b"\n\n").split(b"\n")
        try:
            parsed = json.loads(data.removeprefix(b"data:").decode())
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict) or not data.startswith(b"data:") or len(head) > 1:
            self.others.append(event)
        elif isinstance(parsed.get("choices"), list) and all(isinstance(one, dict) for one in parsed["choices"]):
            self.take_choices(parsed)
        elif isinstance(parsed.get("candidates"), list):
            self.take_candidates(parsed)
        elif isinstance(parsed.get("delta"), dict) and "index" in parsed:
            self.part((parsed.get("type"), parsed["index"], parsed["delta"].get("type")), parsed["delta"])
        elif isinstance(parsed.get("delta"), str) and "output_index" in parsed:
            self.part((parsed.get("type"), parsed.get("item_id"), parsed["output_index"]), {"delta": parsed["delta"]})
            self.top["sequence_number"] = parsed.get("sequence_number")
        elif parsed.keys() == {"delta"} and isinstance(parsed["delta"], str):
            self.part("topic", parsed)  # a published text
        else:
            self.others.append(event)

    def take_candidates(self, parsed: dict[str, Any]) -> None:
        """Texts by candidate and kind, in runs: google-genai hands out parts, and its users join those of a kind."""
        self.top |= {k: repr(v) for k, v in parsed.items() if k != "candidates"}
        for one in parsed["candidates"]:
            mine = self.choices.setdefault(("google", one.get("index", 0)), {"parts": []})
            mine |= {k: repr(v) for k, v in one.items() if k != "content"}
            for part in one.get("content", {}).get("parts", []):
                *_, last = mine["parts"] or [{}]
                if "text" in part and "text" in last and part.keys() == last.keys():
                    last["text"] += part["text"]
                else:
                    mine["parts"].append(dict(part))

    def part(self, key: Any, fields: dict[str, Any]) -> None:
        for name, text in fields.items():
            if name != "type":
                self.parts[repr((key, name))] = accumulate(self.parts.get(repr((key, name))), text)

    def take_choices(self, parsed: dict[str, Any]) -> None:
        self.created = self.created or parsed.get("created")
        self.top["usage"], self.top["timings"] = parsed.get("usage"), parsed.get("timings")
        for name, value in parsed.items():
            if name in SINGLE:
                self.top[name] = repr(value)
            elif name not in ("choices", "created", "usage", "timings", "obfuscation"):
                self.top[name] = accumulate(self.top.get(name), value)
        for one in parsed["choices"]:
            mine = self.choices.setdefault(one.get("index"), {"delta": {}, "tools": {}, "text": "", "logprobs": []})
            delta = dict(one.get("delta") or {})
            for call in delta.pop("tool_calls", None) or []:
                mine["tools"][call["index"]] = accumulate(mine["tools"].get(call["index"]), call)
            mine["delta"] = accumulate(mine["delta"], delta)
            mine["text"] += one.get("text") or ""
            mine["logprobs"].append(one["logprobs"]) if one.get("logprobs") else None
            for name, value in one.items():
                if name in SINGLE:
                    mine[name] = repr(value)
                elif name not in ("delta", "text", "logprobs"):
                    mine[name] = accumulate(mine.get(name), value)

    def state(self) -> str:
        """The state in a comparable form: two halves are a single character, however they came."""
        held = {name: {str(k): v for k, v in getattr(self, name).items()} for name in ("choices", "parts", "top")}
        text = json.dumps([held, self.created], ensure_ascii=False, sort_keys=True, default=repr)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text + repr(self.others)


def assert_same_for_an_sdk(events: list[bytes], coalesced: list[tuple[int, bytes]], seq: int = 1) -> None:
    """Check that at each coalesced event a reader holds the same as after the full stream up to its id."""
    full, short = Sdk(), Sdk()
    for last, event in coalesced:
        while seq <= last:
            full.take(events[seq - 1])
            seq += 1
        short.take(event)
        assert short.state() == full.state()
    assert seq == len(events) + 1


@settings(max_examples=150, deadline=None)
@given(runs(), st.integers(1, 3000))
def test_every_event_comes_back_byte_for_byte(events: list[bytes], bytes_max: int) -> None:
    log = filled(events)
    assert read_all(log, log.seek(1), bytes_max) == list(enumerate(events, 1))
    assert log.last_event() == events[-1]


@settings(max_examples=60, deadline=None)
@given(runs())
def test_every_seq_can_be_sought(events: list[bytes]) -> None:
    log = filled(events)
    for seq, event in enumerate(events, 1):
        cursor = log.seek(seq)
        assert cursor.seq == seq
        assert log.read(cursor, bytes_max=1) == [(seq, event)]
    end = log.seek(len(events) + 1)
    assert log.read(end, bytes_max=1) == log.read_coalesced(end) == []
    for seq in (0, -1, len(events) + 2):
        with pytest.raises(LookupError):
            log.seek(seq)


@settings(max_examples=150, deadline=None)
@given(runs(), st.data())
def test_an_sdk_accumulates_the_same_from_a_coalesced_stream(events: list[bytes], data: st.DataObject) -> None:
    log = filled(events)
    start = data.draw(st.integers(1, len(events)))
    bytes_max = data.draw(st.sampled_from([1, 300, 4000, 16384]))
    assert_same_for_an_sdk(events, coalesce_all(log, log.seek(start), bytes_max), start)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_an_event_that_append_counts_as_text_is_plain_text(events: list[bytes]) -> None:
    log = ReplayLog(bytes_max=1 << 20, events_max=1 << 20)
    joined, text_bytes = [], 0
    for event in events:
        if log.append(event):
            joined.append(event)
            text_bytes += next(len(fill.text) for each in log._templates or () if (fill := each.match(event)))
        assert (log.text_events, log.text_bytes) == (len(joined), text_bytes)
    for event in joined:
        parsed = json.loads(event.split(b"\n")[-3].removeprefix(b"data:"))
        assert not any(one.get("finishReason") for one in parsed.get("candidates", ()))
        choices = parsed.get("choices") or []
        assert len(choices) <= 1
        assert not parsed.get("usage") and not parsed.get("timings") and parsed.get("unknown") is None
        assert all(one.get("finish_reason") in (None, "", "null") for one in choices)
        assert not any(one.get("unknown") for one in choices)


def padded(text: str) -> bytes:
    return wire(chat(choices=[choice(text)], obfuscation="Xy8"))


def numbered(text: str) -> bytes:
    name = "response.refusal.delta"
    return wire({"type": name, "sequence_number": 9, "item_id": "i", "output_index": 0, "delta": text}, name=name)


def spaced(text: str) -> bytes:
    name = "content_block_delta"
    event = wire({"type": name, "index": 0, "delta": {"type": "text_delta", "text": text}}, name=name)
    return event.replace(b"}\n\n", b"   }\n\n")


def counted(text: str) -> bytes:
    return wire(gemini([{"text": text}], 7))


SHAPES = st.sampled_from([lambda text: wire(chat(choices=[choice(text)])), padded, numbered, spaced, counted])
INSIDES = st.lists(
    st.sampled_from(
        [
            *(
                b"a",
                b"\\",
                b'"',
                b"u",
                b"00",
                b"\\n",
                b"\\u00e9",
                b"\\ud83d",
                b"\\x",
                b"\\u00",
                b"\xe4\xb8\xad",
                b"\xe4",
            ),
            *(
                b"\xb8\xad",
                b"\xed\xa0\x80",
                b"\x00",
                b"\x01",
                b"\x1f",
                b"\n",
                b"\n\n",
                b"\x01\xff",
                b"\xff",
                b"\x7f",
                b" }",
            ),
            *(b'"}', b'"},"finish_reason":null}],"obfuscation":"', b'","x":"', b"\\/"),
        ]
    ),
    max_size=4,
).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(SHAPES, INSIDES, st.booleans())
def test_only_the_inside_of_one_whole_string_joins(shape: Any, inside: bytes, in_padding: bool) -> None:
    """Any bytes in the place of the text or the padding, between the beginning and the end of a known template."""
    place = b"Xy8" if in_padding and shape is padded else b"TEXT"
    event = shape("TEXT").replace(place, inside)
    log = filled([shape("first"), shape("second")])
    if log.append(event):
        lines = event.removesuffix(b"\n\n").split(b"\n")
        parsed = json.loads(lines[-1].removeprefix(b"data:").decode())  # json would let halves pass as UTF-8
        assert parsed.keys() == json.loads(shape("TEXT").partition(b"data:")[2]).keys()
    log.append(shape("third"))
    events = [shape("first"), shape("second"), event, shape("third")]
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))
    assert_same_for_an_sdk(events, coalesce_all(log, log.seek(1)))


def test_a_character_cut_by_an_escape_does_not_join() -> None:
    log = filled([wire(chat(choices=[choice("TEXT")]))])
    assert not log.append(wire(chat(choices=[choice("TEXT")])).replace(b"TEXT", b"\xe4\\n\xb8\xad"))
    assert not log.append(wire(chat(choices=[choice("TEXT")])).replace(b"TEXT", b"\xe4"))


@pytest.mark.parametrize("overlap", range(1, 40))
def test_a_beginning_and_an_end_that_overlap_do_not_join(overlap: int) -> None:
    text = wire(chat(choices=[choice("TEXT")]))
    before, after = text.split(b"TEXT")
    log = filled([text, text])
    event = before + after[overlap:]
    assert log.append(event) is False
    # An event in which the end of the prefix is also the beginning of the suffix.
    doubled = wire(chat(choices=[choice('"},"finish_reason":null}]}')]))
    log.append(doubled)
    assert [event for _, event in read_all(log, log.seek(1))] == [text, text, event, doubled]


def test_an_end_that_is_in_the_beginning_does_not_join() -> None:
    """The shortest event that begins and ends like the template: both share the quote."""
    first = b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}\n\n'
    log = filled([first, first])
    assert log._prefix.endswith(b'"') and log._suffix.startswith(b'"')
    event = log._prefix + log._suffix[1:]
    assert log.append(event) is False
    assert read_all(log, log.seek(3)) == [(3, event)]


def test_templates_that_differ_in_padding_alone_take_turns() -> None:
    plain = wire(chat(choices=[choice("x")]))
    events = [padded("a"), plain, padded("b"), plain, padded("c"), numbered("d"), padded("e"), spaced("f"), plain] * 3
    log = filled(events)
    assert log.text_events == len(events) - 4
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))
    assert_same_for_an_sdk(events, coalesce_all(log, log.seek(1)))


def test_a_log_can_be_trimmed_to_every_size() -> None:
    events = [wire(chat(choices=[choice(f" word{n}")])) for n in range(300)]
    held = filled(events).bytes_held
    firsts = []
    for bytes_max in range(held, 0, -64):
        log = filled(events)
        log.trim_to(bytes_max)
        firsts.append(log.seq_first)
        assert (log.seq_first == 301) == (log.bytes_held == ReplayLog(bytes_max=1, events_max=1).bytes_held)
        assert read_all(log, log.seek(log.seq_first)) == list(enumerate(events, 1))[log.seq_first - 1 :]
    assert firsts == sorted(firsts)
    assert (firsts[0], firsts[-1]) == (1, 301)


def test_text_bytes_are_the_texts_as_on_the_wire() -> None:
    log = filled([wire(chat(choices=[choice("first is not counted")]))])
    for text, length in (("word", 4), ("\n", 2), ("é", 2), ('"', 2), ("\ud83d", 6), ("", 0)):
        before = log.text_bytes
        assert log.append(wire(chat(choices=[choice(text)])))
        assert log.text_bytes - before == length


OPS = st.sampled_from(["append"] * 6 + ["read", "coalesce", "end", "seek", "trim"])


@settings(max_examples=100, deadline=None)
@given(runs(), st.data())
def test_cursors_live_through_appends_and_trims(events: list[bytes], data: st.DataObject) -> None:
    """Against a plain list: only events that the log reports as dropped are lost, and no event comes twice."""
    bytes_max = data.draw(st.sampled_from([900, 2500, 1 << 20]))
    events_max = data.draw(st.sampled_from([3, 1 << 20]))
    log = ReplayLog(bytes_max=bytes_max, events_max=events_max)
    model: list[bytes] = []
    cursors = [log.cursor_at_end()]
    for op in data.draw(st.lists(OPS, min_size=20, max_size=60)):
        if op == "append":
            model.append(events[len(model) % len(events)])
            log.append(model[-1])
        elif op == "end":
            cursors.append(log.cursor_at_end())
        elif op == "seek":
            cursors.append(log.seek(data.draw(st.integers(log.seq_first, log.seq_next))))
        elif op == "trim":
            log.trim_to(data.draw(st.integers(0, 3000)))
        else:
            cursor = cursors[data.draw(st.integers(0, len(cursors) - 1))]
            read_on(log, model, cursor, coalesced=op == "coalesce")
        assert 1 <= log.seq_first <= log.seq_next == len(model) + 1
        assert all(1 <= cursor.seq <= log.seq_next for cursor in cursors)
    assert read_all(log, log.seek(log.seq_first)) == list(enumerate(model, 1))[log.seq_first - 1 :]
    assert log.last_event() == (model[-1] if log.seq_first < log.seq_next else None)


def read_on(log: ReplayLog, model: list[bytes], cursor: Cursor, *, coalesced: bool) -> None:
    seq = cursor.seq
    if seq < log.seq_first:
        for read in (log.read, log.read_coalesced):
            with pytest.raises(LookupError):
                read(cursor, bytes_max=100)
        return
    if coalesced:
        out = log.read_coalesced(cursor, bytes_max=400)
        assert_same_for_an_sdk(model[: cursor.seq - 1], out, seq)
    else:
        assert log.read(cursor, bytes_max=400) == list(enumerate(model, 1))[seq - 1 : cursor.seq - 1]
    assert cursor.seq > seq or seq == log.seq_next


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(0, 6000))
def test_trimming_drops_the_oldest_and_says_exactly_which(events: list[bytes], bytes_max: int) -> None:
    log = filled(events)
    log.trim_to(bytes_max)
    assert log.bytes_held <= max(bytes_max, ReplayLog(bytes_max=1, events_max=1).bytes_held)
    assert read_all(log, log.seek(log.seq_first)) == list(enumerate(events, 1))[log.seq_first - 1 :]
    if log.seq_first > 1:
        with pytest.raises(LookupError):
            log.seek(log.seq_first - 1)
    log.append(events[0])
    assert log.last_event() == events[0]


def test_an_overflow_drops_down_to_seven_eighths() -> None:
    events = [wire(chat(choices=[choice(f" word{n}")])) for n in range(3000)]
    whole = filled(events)
    assert whole.seq_first == 1
    log = ReplayLog(bytes_max=10_000, events_max=1 << 20)
    firsts = set()
    for event in events:
        log.append(event)
        firsts.add(log.seq_first)
        assert log.bytes_held <= 10_000 or log.seq_first == 1
    assert len(firsts) < 60  # in portions, not for each event
    assert read_all(log, log.seek(log.seq_first)) == list(enumerate(events, 1))[log.seq_first - 1 :]
    assert log.bytes_held > 10_000 * 3 // 4


def test_events_are_bounded_in_number() -> None:
    events = [wire(chat(choices=[choice("a")])) for _ in range(3000)]
    log = filled(events, events_max=1000)
    in_one_segment = 479 // 2
    assert 875 - in_one_segment <= log.seq_next - log.seq_first <= 1000 + in_one_segment


def reachable_bytes(log: ReplayLog) -> int:
    seen: dict[int, Any] = {}
    ahead: list[Any] = [log]
    while ahead:
        found = ahead.pop()
        if id(found) in seen or isinstance(found, type) or (isinstance(found, int) and found <= 256):
            continue
        seen[id(found)] = found
        ahead += gc.get_referents(found)
    return sum(map(sys.getsizeof, seen.values()))


@settings(max_examples=80, deadline=None)
@given(runs())
def test_bytes_held_are_the_bytes_of_the_objects(events: list[bytes]) -> None:
    log = filled(events)
    # The tail is charged as a full segment; only it and the log's integers may differ.
    assert 0.9 * reachable_bytes(log) - 300 <= log.bytes_held <= 1.1 * reachable_bytes(log) + 1000


@settings(max_examples=300, deadline=None)
@given(runs(), st.lists(st.integers(1, 9), max_size=12), st.integers(1, 4000))
def test_events_kept_in_runs_make_the_same_log(events: list[bytes], sizes: list[int], bytes_max: int) -> None:
    expected = ReplayLog(bytes_max=bytes_max, events_max=1 << 20)
    log = ReplayLog(bytes_max=bytes_max, events_max=1 << 20)
    at = 0
    for size in [*sizes, len(events)]:
        some = events[at : at + size]
        at += size
        texts = [expected.append(event) for event in some]
        k = 0
        while k < len(some):
            taken = log.append_run(some, k)
            assert texts[k : k + taken] == [True] * taken
            k += taken
            if k < len(some):
                assert log.append(some[k]) == texts[k]
                k += 1
        assert log.parts() == expected.parts()
        assert log.bytes_held == expected.bytes_held


def test_a_run_ends_where_an_event_does_not_fit() -> None:
    log = filled([wire(chat(choices=[choice("a")]))])
    fits, done = wire(chat(choices=[choice(" more")])), b"data: [DONE]\n\n"
    assert log.append_run([fits, fits, done, fits]) == 2
    assert log.append_run([done, fits]) == 0
    assert log.append_run([done, fits], 1) == 1
    assert log.append_run([fits + fits, fits]) == 0  # two events in a payload
    assert log.append_run([fits, wire(chat(choices=[choice("")])), fits]) == 1
    assert log.append_run([fits.replace(b'" more"', b'"'), fits]) == 0  # its beginning and its end overlap
    assert log.seq_next == 6


def test_an_idle_log_and_500_tokens_take_the_promised_bytes() -> None:
    log = ReplayLog(bytes_max=1 << 20, events_max=100_000)
    assert reachable_bytes(log) < 600
    head = wire(chat(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]))
    tail = [wire(chat(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])), b"data: [DONE]\n\n"]
    for event in [head, *(wire(chat(choices=[choice(" word"[: 2 + n % 4])])) for n in range(500)), *tail]:
        log.append(event)
    assert reachable_bytes(log) <= 5500


def test_a_run_of_deltas_becomes_one_event_of_the_same_shape_and_the_newest_id() -> None:
    events = [wire(chat(choices=[choice(text)])) for text in ("Hel", "lo", " wor", "ld\n")]
    log = filled(events)
    assert log.read_coalesced(log.seek(1)) == [(4, wire(chat(choices=[choice("Hello world\n")])))]
    assert log.read_coalesced(log.seek(3)) == [(4, wire(chat(choices=[choice(" world\n")])))]


def test_halves_of_a_character_come_out_right() -> None:
    events = [wire(chat(choices=[choice(text)])) for text in ("a", "\ud83d", "\ude00", "b")]
    log = filled(events)
    ((_, event),) = log.read_coalesced(log.seek(1))
    assert json.loads(event[6:])["choices"][0]["delta"]["content"] == "a😀b"


def test_alternating_choices_become_one_event_with_each_index_once() -> None:
    events = [wire(chat(choices=[choice(f"{n}\ud83d" if n < 2 else f"\ude00{n}", n % 2)])) for n in range(4)]
    log = filled(events)
    ((last, event),) = log.read_coalesced(log.seek(1))
    assert last == 4
    choices = json.loads(event[6:])["choices"]
    assert [(one["index"], one["delta"]["content"]) for one in choices] == [(0, "0😀2"), (1, "1😀3")]


def test_a_role_beside_each_text_is_never_merged_but_still_kept_small() -> None:
    """The OpenAI SDK would concatenate the roles."""
    one = [{"index": 0, "delta": {"role": "assistant", "content": "x"}, "finish_reason": None}]
    events = [wire(chat(choices=one)) for _ in range(200)]
    log = filled(events)
    assert coalesce_all(log, log.seek(1)) == list(enumerate(events, 1))
    assert log.text_events == 199
    assert log.bytes_held < 3000


def test_usage_in_each_chunk_takes_a_few_bytes_and_the_last_wins() -> None:
    """vLLM's continuous_usage_stats: 500 events took 160 KB when each was kept whole."""
    usage = [{"prompt_tokens": 12, "total_tokens": 12 + n, "completion_tokens": n} for n in range(500)]
    events = [wire(chat(choices=[choice(f" {n}")], usage=usage[n])) for n in range(500)]
    log = filled(events)
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))
    assert log.text_events == 499
    assert log.bytes_held < 12_000
    ((last, event),) = log.read_coalesced(log.seek(1))
    parsed = json.loads(event[6:])
    assert (last, parsed["usage"]) == (500, usage[-1])
    assert parsed["choices"][0]["delta"]["content"] == "".join(f" {n}" for n in range(500))


def entry_of(text: str, others: int = 0) -> dict[str, Any]:
    """A token's log probability as OpenAI, vLLM and SGLang tell it."""
    tops = [{"token": f" {n}{text}", "logprob": -n / 7, "bytes": spelt(f" {n}{text}")} for n in range(others)]
    return {"token": text, "logprob": -len(text) / 3, "bytes": spelt(text), "top_logprobs": tops}


# The form of an event with members that vary with each token, of text n; and the bytes that 500 of these may take.
VARYING: dict[str, tuple[Callable[[str, int], bytes], int]] = {
    "token ids": (lambda text, n: wire(chat(choices=[choice(text, token_ids=[n * 31])])), 11_000),
    "token ids, spaced": (lambda t, n: wire(chat(choices=[choice(t, token_ids=[n, n])]), compact=False), 13_000),
    "logprobs": (lambda text, n: wire(chat(choices=[choice(text, logprobs={"content": [entry_of(text)]})])), 18_000),
    "logprobs, spaced and escaped": (
        lambda text, n: wire(
            chat(choices=[choice(text, logprobs={"content": [entry_of(text)], "refusal": None})]),
            compact=False,
            ascii_only=True,
        ),
        18_000,
    ),
    "alternatives": (
        lambda text, n: wire(chat(choices=[choice(text, logprobs={"content": [entry_of(text, 5)]})])),
        175_000,
    ),
    "both, with usage": (
        lambda text, n: wire(
            chat(
                choices=[choice(text, logprobs={"content": [entry_of(text)]}, token_ids=[n])],
                usage={"prompt_tokens": 5, "completion_tokens": n},
            )
        ),
        24_000,
    ),
    "completions": (
        lambda text, n: wire(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1_700_000_000,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "text": text,
                        "logprobs": {
                            "text_offset": [n * 4],
                            "token_logprobs": [-n / 7],
                            "tokens": [text],
                            "top_logprobs": [{text: -n / 7, f" x{n}": -9.5}],
                        },
                        "finish_reason": None,
                    }
                ],
            }
        ),
        45_000,
    ),
    "Responses": (
        lambda text, n: wire(
            {
                "type": "response.output_text.delta",
                "sequence_number": n + 4,
                "item_id": "msg_1",
                "output_index": 0,
                "content_index": 0,
                "delta": text,
                "logprobs": [entry_of(text)],
                "obfuscation": "x" * (n % 9),
            },
            name="response.output_text.delta",
        ),
        22_000,
    ),
}


@pytest.mark.parametrize("kind", VARYING)
def test_members_that_vary_with_each_token_take_little_more_than_their_values(kind: str) -> None:
    make, held_bytes = VARYING[kind]
    words = [" the", " fox", ' "q"', " Grüße", " 你好", "\n", " x", "😀"]
    events = [make(words[n % len(words)], n) for n in range(500)]
    log = filled(events)
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))
    assert coalesce_all(log, log.seek(1)) == list(enumerate(events, 1)), "they are never merged"
    assert log.text_events >= 490 and log.bytes_held <= held_bytes
    parts = log.parts()
    check_parts(parts)
    again = ReplayLog.of_parts(parts, bytes_max=1 << 20, events_max=1 << 20)
    assert read_all(again, again.seek(1)) == list(enumerate(events, 1))


@pytest.mark.parametrize(
    "other",
    [
        {"logprobs": {"content": [entry_of(" a") | {"logprob": float("-inf")}]}},
        {"logprobs": {"content": [entry_of(" a") | {"logprob": None}]}},
        {"logprobs": {"content": [entry_of(" a")] * 2}},
        {"logprobs": {"content": [entry_of(" a") | {"bytes": None}]}},
        {"logprobs": {"content": [entry_of(" b") | {"bytes": [1]}]}},
        {"logprobs": {"content": [entry_of(" \ud83d") | {"bytes": [1]}]}},
        {"logprobs": {"content": [entry_of(" a")]}, "finish_reason": "stop"},
        {"logprobs": {"content": [entry_of(" a")]}, "stop_reason": 128009},
        {"logprobs": None},
    ],
)
def test_another_form_among_events_that_vary_is_kept_as_it_is(other: dict[str, Any]) -> None:
    usual = [wire(chat(choices=[choice(f" {n}", logprobs={"content": [entry_of(f" {n}")]})])) for n in range(9)]
    events = [*usual, wire(chat(choices=[choice(" a") | other])), *usual]
    log = filled(events)
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))
    kinds = [ReplayLog(bytes_max=1 << 20, events_max=1 << 20)]
    taken = [kinds[0].append(event) for event in events]
    assert taken[9] is False and taken[1:9] == taken[11:] == [True] * 8, "an end is always looked at"


def test_whole_events_merge_and_the_last_usage_wins() -> None:
    events = [wire(chat(choices=[choice(f" {n}")], usage={"cost": n / 8})) for n in range(5)]
    log = filled(events)
    ((last, event),) = log.read_coalesced(log.seek(1))
    parsed = json.loads(event[6:])
    assert (last, parsed["usage"]) == (5, {"cost": 0.5})
    assert parsed["choices"][0]["delta"]["content"] == " 0 1 2 3 4"


def test_sequence_numbers_are_read_back_and_the_last_wins() -> None:
    name = "response.output_text.delta"
    fields = {"type": name, "item_id": "i", "output_index": 0, "content_index": 0}
    numbers = [*range(5, 105), *range(107, 200)]
    events = [wire(fields | {"sequence_number": n, "delta": " x"}, name=name) for n in numbers]
    log = filled(events)
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))
    assert log.text_events == len(events) - 1
    coalesced = coalesce_all(log, log.seek(1))
    assert json.loads(coalesced[-1][1].partition(b"data:")[2])["sequence_number"] == 199
    assert log.bytes_held < 2700


@pytest.mark.parametrize("templated", [True, False])
def test_text_in_one_event_is_bounded(templated: bool) -> None:
    more = {} if templated else {"usage": {"completion_tokens": 1}}
    events = [wire(chat(choices=[choice("0123456789" * 10)], **more)) for _ in range(1000)]
    log = filled(events, bytes_max=1 << 24)
    coalesced = coalesce_all(log, log.seek(1))
    texts = [len(json.loads(event[6:])["choices"][0]["delta"]["content"]) for _, event in coalesced]
    assert sum(texts) == 100_000
    assert max(texts) <= 16384
    assert len(texts) < 20 if templated else len(texts) < 40


def test_a_catch_up_read_is_about_as_long_as_asked_for() -> None:
    log = filled([wire(chat(choices=[choice("0123456789", 0)])) for _ in range(2000)])
    cursor = log.seek(1)
    for _ in range(3):
        assert sum(len(event) for _, event in log.read_coalesced(cursor, bytes_max=3000)) <= 3500


def test_reads_keep_to_their_bytes_but_give_one_event_at_least() -> None:
    events = [wire(chat(choices=[choice(" word")])) for _ in range(300)]
    log = filled(events)
    cursor = log.seek(1)
    while out := log.read(cursor, bytes_max=1000):
        assert sum(len(event) for _, event in out) <= 1000
        assert len(out) == 1000 // len(events[0]) or cursor.seq == log.seq_next
    assert [seq for seq, _ in log.read(log.seek(7), bytes_max=0)] == []
    assert log.read(log.seek(7), bytes_max=1) == [(7, events[6])]


def test_a_stream_without_repetition_rarely_learns_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(shapes, "learn", lambda event: (tried.append(event), learn(event))[1])
    events = [wire(chat(id=f"chatcmpl-{n}", choices=[choice("x")])) for n in range(2000)]
    log = filled(events)
    assert len(tried) <= replay.LEARNT_AT_ONCE_MAX + (2000 >> replay.LEARN_EVERY_LOG2)
    assert len(log._templates or ()) <= replay.TEMPLATES_MAX
    assert read_all(log, log.seek(1)) == list(enumerate(events, 1))


def test_templates_take_at_most_half_of_a_log() -> None:
    """Each event of this upstream has an id of its own, so each would cost a template, and templates stay."""
    bytes_max = 16 * 1024
    answers = [
        {
            "candidates": [{"content": {"parts": [{"text": f"word{n}"}], "role": "model"}, "index": n % 3}],
            "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": n + 1, "totalTokenCount": n + 6},
            "responseId": f"r-{n}",
        }
        for n in range(2000)
    ]
    events = [wire(answer) for answer in answers]
    log = filled(events, bytes_max=bytes_max)
    segments = [*(log._segments or ()), log._tail]
    assert log.bytes_held <= bytes_max + replay.SEGMENT_BYTES_MAX + len(events[-1])
    assert 1 < len(log._templates or ()) < 16
    assert sum(map(len, segments)) > bytes_max * 3 // 8  # an eighth is dropped at once
    assert read_all(log, log.seek(log.seq_first)) == list(enumerate(events, 1))[log.seq_first - 1 :]


def test_a_stream_that_changes_its_shape_stays_small() -> None:
    kinds = [
        lambda n: {"reasoning_content": f" {n}"},
        lambda n: {"content": f" {n}"},
        lambda n: {"tool_calls": [{"index": 0, "function": {"arguments": f" {n}"}}]},
        lambda n: {"tool_calls": [{"index": 1, "function": {"arguments": f" {n}"}}]},
    ]
    events = [
        wire(chat(choices=[{"index": 0, "delta": kind(n), "finish_reason": None}]))
        for kind in kinds
        for n in range(100)
    ]
    log = filled(events)
    assert log.text_events == len(events) - len(kinds)
    assert len(coalesce_all(log, log.seek(1))) == len(kinds)
    assert log.bytes_held < 6500


def test_a_log_trimmed_to_nothing_goes_on() -> None:
    log = filled([wire(chat(choices=[choice("x")])) for _ in range(50)])
    old, end = log.seek(10), log.cursor_at_end()
    log.trim_to(0)
    assert (log.seq_first, log.seq_next, log.last_event()) == (51, 51, None)
    assert log.read(end, bytes_max=100) == []
    with pytest.raises(LookupError):
        log.read(old, bytes_max=100)
    event = wire(chat(choices=[choice("y")]))
    assert [log.append(event) for _ in range(3)] == [False, True, True]
    assert log.read(end, bytes_max=1000) == [(51, event), (52, event), (53, event)]


def test_earlier_texts_do_not_count_against_the_bound_of_later_texts() -> None:
    """A read of half its bytes, then an event that fits no other, then short texts: three events."""
    long = [wire(chat(choices=[choice("0123456789" * 10)])) for _ in range(100)]
    other = b'event: ping\ndata: {"type":"ping"}\n\n'
    short = [wire(chat(choices=[choice("0123456789")])) for _ in range(200)]
    log = filled([*long, other, *short], bytes_max=1 << 20)
    coalesced = log.read_coalesced(log.seek(1))
    assert [seq for seq, _ in coalesced] == [100, 101, 301]


def test_a_read_of_events_kept_whole_keeps_to_its_bytes_too() -> None:
    small, large = b"data: 1\n\n", b"data: %b\n\n" % (b"x" * 1000)
    log = filled([small, large, small])
    cursor = log.seek(1)
    assert log.read(cursor, bytes_max=500) == [(1, small)]
    assert log.read(cursor, bytes_max=500) == [(2, large)]


# -- an event that is larger than the log's bound


BOUND = 64 * 1024
OVERSIZE = b"data: " + b"x" * 2 * BOUND + b"\n\n"


def whole(k: int) -> bytes:
    return b"data: %d " % k + b"y" * 990 + b"\n\n"


def test_an_event_larger_than_the_log_stays_beside_a_whole_log() -> None:
    """Else the events before it would be lost to late readers, and it to readers that pause for a moment."""
    log = ReplayLog(bytes_max=BOUND, events_max=1000)
    for k in range(30):
        log.append(whole(k))
    log.append(OVERSIZE)
    for k in range(20):
        log.append(whole(k))
    assert log.seq_first == 1 and log.bytes_held <= BOUND + len(OVERSIZE) + 1000
    assert [event for _, event in log.read(log.seek(31), bytes_max=1)] == [OVERSIZE]


def test_an_event_larger_than_the_log_is_dropped_once_as_much_has_followed_it() -> None:
    log = ReplayLog(bytes_max=BOUND, events_max=1000)
    log.append(OVERSIZE)
    for k in range(100):
        log.append(whole(k))
        assert log.bytes_held <= BOUND + len(OVERSIZE) + 1000
    assert log.seq_first > 1 and log.bytes_held <= BOUND + 1000


def test_of_two_events_larger_than_the_log_the_newest_stays() -> None:
    log = ReplayLog(bytes_max=BOUND, events_max=1000)
    log.append(whole(1))
    log.append(OVERSIZE)
    log.append(whole(2))
    log.append(OVERSIZE)
    log.append(whole(3))
    assert log.seq_first == 3 and log.bytes_held <= BOUND + len(OVERSIZE) + 1000
    assert [event for _, event in log.read(log.seek(3), bytes_max=1 << 20)] == [whole(2), OVERSIZE, whole(3)]


def test_memory_that_runs_short_takes_the_largest_event_too() -> None:
    log = ReplayLog(bytes_max=BOUND, events_max=1000)
    log.append(OVERSIZE)
    log.append(whole(1))
    log.trim_to(BOUND // 2)
    assert log.seq_first == 2 and log.bytes_held <= BOUND // 2


@given(st.lists(st.sampled_from([10, 500, 1000, 3000, 9000]), max_size=60))
def test_the_books_of_a_log_with_events_of_any_size_are_right(sizes: list[int]) -> None:
    log = ReplayLog(bytes_max=4000, events_max=40)
    for k, size in enumerate(sizes):
        log.append(b"data: %d " % k + b"z" * size + b"\n\n")
        segments = [*(log._segments or []), *([log._tail] if log._tail else [])]
        sizes_held = [replay._held(each) for each in segments[:-1]] + [replay._tail_held(log._tail)]
        templates = log.bytes_held - sum(sizes_held)
        assert 0 < templates < 1000  # the objects around the segments
        assert log.seq_first == int.from_bytes(segments[0][:5], "big")
        assert len(log.read(log.seek(log.seq_first), bytes_max=1 << 30)) == log.seq_next - log.seq_first
