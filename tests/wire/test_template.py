"""The JSON of events: the text deltas, the place of their text, and the events that may be merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.wire.dialect import APIS
from streamd.wire.dialects.api import Api
from streamd.wire.dialects.chat import Chat
from streamd.wire.dialects.merging import Merge
from streamd.wire.template import TEMPLATE_BYTES_MAX, Delta, Fill, Template, combine, is_string_inside, learn


def wire(parsed: Any, *, name: str = "", spaced: bool = False, ascii_only: bool = False) -> bytes:
    text = json.dumps(parsed, ensure_ascii=ascii_only, separators=(", ", ": ") if spaced else (",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def chat(delta: dict[str, Any], choice: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    one = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} | (choice or {})
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    return head | {"choices": [one]} | more


def tool(arguments: str, **call: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}} | call]}


def responses(kind: str, text: str, **more: Any) -> dict[str, Any]:
    head = {"type": f"response.{kind}.delta", "sequence_number": 7, "item_id": "msg_1", "output_index": 0}
    return head | {"delta": text} | more


def messages(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": delta} | more


def gemini(text: str, part: dict[str, Any] | None = None, made: int = 3, **candidate: Any) -> dict[str, Any]:
    content = {"parts": [{"text": text} | (part or {})], "role": "model"}
    counts = {"promptTokenCount": 8, "candidatesTokenCount": made, "totalTokenCount": made + 8}
    details = {"promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 8}]}
    return {
        "candidates": [{"content": content, "index": 0} | candidate],
        "usageMetadata": counts | details,
        "modelVersion": "gemini-2.5-flash",
        "responseId": "r1",
    }


# One chunk of each kind that servers send in the middle of a text; the text is always the same.
T = "TEXT"
DELTAS = {
    "openai": chat({"content": T}, service_tier="default", system_fingerprint="fp", usage=None, obfuscation="Xy8"),
    "vllm": chat({"content": T}, {"stop_reason": None, "token_ids": None}),
    "vllm reasoning": chat({"reasoning": T, "reasoning_content": T}),
    "sglang": chat({"role": None, "content": T, "reasoning_content": None, "tool_calls": None}, {"matched_stop": None}),
    "deepseek": chat({"content": None, "reasoning_content": T}),
    "empty beside": chat({"content": "", "reasoning_content": T}),
    "empty lists": chat({"content": T, "annotations": [], "tool_calls": [], "images": []}, {"token_ids": []}),
    "refusal": chat({"content": None, "refusal": T}),
    "finish_reason is empty": chat({"content": T}, {"finish_reason": ""}),
    "finish_reason is the word null": chat({"content": T}, {"finish_reason": "null"}),
    "gemini unfinished": gemini(T, finishReason="FINISH_REASON_UNSPECIFIED"),
    "azure": chat({"content": T}, {"content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}),
    "llama.cpp": {
        "choices": [{"finish_reason": None, "index": 0, "delta": {"content": T}}],
        "created": 1_700_000_000,
        "id": "chatcmpl-1",
        "model": "m",
        "system_fingerprint": "b1",
        "object": "chat.completion.chunk",
    },
    "tool": chat(tool(T)),
    "tool with nulls": chat(tool(T, id=None, type="function", function={"name": None, "arguments": T})),
    "second choice": chat({"content": T}, {"index": 3}),
    "completions": {"id": "cmpl", "object": "text_completion", "created": 1_700_000_000, "model": "m"}
    | {"choices": [{"index": 0, "text": T, "logprobs": None, "finish_reason": None}]},
    "responses": responses("output_text", T, content_index=0, logprobs=[], obfuscation="aB"),
    "responses arguments": responses("function_call_arguments", T),
    "responses reasoning": responses("reasoning_text", T, content_index=0),
    "responses summary": responses("reasoning_summary_text", T, summary_index=0),
    "messages": messages({"type": "text_delta", "text": T}),
    "messages thinking": messages({"type": "thinking_delta", "thinking": T}),
    "messages json": messages({"type": "input_json_delta", "partial_json": T}),
    "published text": {"delta": T},
    "gemini": gemini(T),
    "gemini thoughts": gemini(T, {"thought": True}),
    "gemini second candidate": gemini(T, index=1),
    "gemini without an index": {"candidates": [{"content": {"parts": [{"text": T}]}}]},
    "gemini rated": gemini(T, safetyRatings=[{"category": "HARM", "probability": "LOW"}]),
}
# Text beside other content, or in an unknown shape.
OTHERS = {
    "first": chat({"role": "assistant", "content": ""}),
    "finish": chat({"content": T}, {"finish_reason": "stop"}),
    "empty": chat({"content": ""}),
    "nothing": chat({}),
    "tool begins": chat(tool(T, id="call_1")),
    "tool's name": chat(tool(T, function={"name": "f", "arguments": T})),
    "two tools": chat({"tool_calls": [{"index": n, "function": {"arguments": T}} for n in (0, 1)]}),
    "tool and text": chat({"content": T} | tool(T)),
    "tool without index": chat({"tool_calls": [{"function": {"arguments": T}}]}),
    "unknown in delta": chat({"content": T, "unheard_of": []}),
    "unknown in choice": chat({"content": T}, {"unheard_of": 0}),
    "unknown beside choices": chat({"content": T}, unheard_of=""),
    "unknown in messages": messages({"type": "text_delta", "text": T}, unheard_of=0),
    "unknown in responses": responses("output_text", T, unheard_of=0),
    "unknown in gemini": gemini(T, unheard_of=0),
    "annotations": chat({"content": T, "annotations": [{"url": "u"}]}),
    "stop reason": chat({"content": T}, {"stop_reason": 7}),
    "groq's last": chat({"content": T}, x_groq={"id": "req_1"}),
    "llama.cpp's prompt": chat({"content": T}, prompt_progress={"total": 9}),
    "details of another text": chat({"reasoning": T, "reasoning_details": [{"type": "reasoning.text", "text": "U"}]}),
    "text is no string": chat({"content": ["T"]}),
    "index is no number": chat({"content": T}, {"index": "0"}),
    "delta is no object": chat({}) | {"choices": [{"index": 0, "delta": T}]},
    "choice is no object": chat({}) | {"choices": [T]},
    "both text and delta": chat({"content": T}, {"text": T}),
    "no index": chat({}) | {"choices": [{"delta": {"content": T}}]},
    "audio": responses("audio", T),
    "done": responses("output_text", T) | {"type": "response.output_text.done"},
    "signature": messages({"type": "signature_delta", "signature": T}),
    "message_start": {"type": "message_start", "message": {"content": [T]}},
    "more in delta": messages({"type": "text_delta", "text": T, "more": 1}),
    "type is no string": messages({"type": "text_delta", "text": T}) | {"type": 1},
    "published text and more": {"delta": T, "n": 1},
    "error": {"error": {"message": T}},
    "gemini finishes": gemini(T, finishReason="STOP"),
    "gemini signature": gemini(T, {"thoughtSignature": "abc"}),
    "gemini call": {"candidates": [{"content": {"parts": [{"functionCall": {"name": "f", "args": {"text": T}}}]}}]},
    "gemini two parts": {"candidates": [{"content": {"parts": [{"text": T}, {"text": T}]}, "index": 0}]},
    "gemini no parts": {"candidates": [{"content": {"role": "model"}, "index": 0}]},
    "gemini no content": {"candidates": [{"index": 0}]},
    "gemini candidate is no object": {"candidates": [T]},
    "gemini index is no number": gemini(T, index="0"),
    "gemini thought is no flag": gemini(T, {"thought": 1}),
    "gemini usage alone": {"usageMetadata": {"promptTokenCount": 8}, "candidates": []},
    "list": [T],
    "number": 1,
}


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("name", ["", "some"])
@pytest.mark.parametrize("parsed", DELTAS.values(), ids=DELTAS.keys())
def test_text_deltas_of_all_servers_are_learnt(parsed: dict[str, Any], name: str, spaced: bool) -> None:
    event = wire(parsed, name=name, spaced=spaced)
    template = learn(event)
    assert template and template.merges
    fill = template.match(event)
    assert fill and fill.text == b"TEXT" and template.render(fill) == event
    for text in ('a"b\\c\n', "é中😀", "", '"},"finish_reason":null'):
        changed = event.replace(b"TEXT", json.dumps(text, ensure_ascii=False)[1:-1].encode())
        fill = template.match(changed)
        assert fill and template.render(fill) == changed
        assert json.loads(b'"%b"' % fill.text) == text
    assert Delta.of(event)


@pytest.mark.parametrize("api", APIS, ids=lambda api: type(api).__name__)
def test_every_api_has_its_texts_in_the_table_above(api: Api) -> None:
    assert any(api.parts(dict(parsed)) for parsed in DELTAS.values())


@pytest.mark.parametrize("choices", [1, 1.5, True, {"index": 0}, "no list"])
@pytest.mark.parametrize("kind", ["published text", "messages", "responses"])
def test_choices_that_are_no_list_break_nothing(kind: str, choices: Any) -> None:
    event = wire(DELTAS[kind] | {"choices": choices})
    template = learn(event)
    assert template is None or template.match(event)
    Delta.of(event)


@pytest.mark.parametrize("parsed", OTHERS.values(), ids=OTHERS.keys())
def test_an_event_with_more_or_less_than_a_text_is_not_learnt(parsed: dict[str, Any]) -> None:
    assert learn(wire(parsed)) is None
    assert Delta.of(wire(parsed)) is None


@pytest.mark.parametrize(
    "more",
    [
        {"usage": {"completion_tokens": 1, "cost": 0.5}},
        {"timings": {"predicted_n": 1, "predicted_ms": 20.5}},
    ],
)
def test_events_with_changing_fields_are_merged_by_value_only(more: dict[str, Any]) -> None:
    assert learn(wire(chat({"content": T}, **more))) is None
    assert learn(wire(chat({"content": T, "reasoning_content": "other"}))) is None
    assert Delta.of(wire(chat({"content": T}, **more)))


@pytest.mark.parametrize(
    "event",
    [
        b"data: [DONE]\n\n",
        b"\n\n",
        b": comment\n\n",
        b'data: {"choices":\ndata: []}\n\n',
        wire(chat({"content": T}))[:-1],
        b"retry: 1\n" + wire(chat({"content": T})),
        b": c\n" + wire(chat({"content": T})),
        wire(chat({"content": T})).replace(b'"m"', b'"m\x01"'),
        wire(chat({"content": T})).replace(b"TEXT", b"\\x"),
        wire(chat({"content": T})).replace(b"TEXT", b"\xe4"),
        wire(chat({"content": T})).replace(b'"m"', b'"\xe4"'),
        wire(chat({"content": T})).replace(b'"content"', b'"c\\u006fntent"'),
        wire(chat({"content": T})).replace(b'"m"', b'"m","content":"TEXT"'),
        wire(chat({"content": T})).replace(b'{"content"', b'{"content":"other","content"'),
        wire(chat({"content": T})).replace(b'"TEXT"', b'"TEXT","content":null'),
        wire(chat({"content": T})).replace(b'"choices"', b'"choices":[],"choices"') + b"\n",
    ],
)
def test_an_event_of_unusual_bytes_is_not_learnt(event: bytes) -> None:
    assert learn(event) is None


def test_an_event_above_the_bound_of_a_template_is_not_learnt() -> None:
    assert learn(wire(chat({"content": T}, system_fingerprint="f" * TEMPLATE_BYTES_MAX))) is None
    assert learn(wire(chat({"content": T * TEMPLATE_BYTES_MAX})))


def test_a_text_whose_half_character_orjson_refuses_is_learnt() -> None:
    template = learn(wire(chat({"content": "\ud83d"}), ascii_only=True))
    assert template and template.match(wire(chat({"content": "\ude00"}), ascii_only=True))


DETAIL = {"type": "reasoning.text", "text": T, "format": "unknown", "index": 0}
REPEATED = {
    "a role": chat({"role": "assistant", "content": T}),
    "ollama": chat({"role": "assistant", "content": "", "reasoning": T}),
    "groq's channel": chat({"channel": "analysis", "reasoning": T}),
    "openrouter's details": chat({"role": "assistant", "content": "", "reasoning": T, "reasoning_details": [DETAIL]}),
    "a role and arguments": chat({"role": "assistant"} | tool(T)),
}


@pytest.mark.parametrize("parsed", REPEATED.values(), ids=REPEATED.keys())
def test_a_member_that_sdks_concatenate_is_learnt_beside_the_text_but_never_merged(parsed: dict[str, Any]) -> None:
    event = wire(parsed)
    template = learn(event)
    assert template and not template.merges
    other = event.replace(b"TEXT", b"another")
    assert template.render(fill_of(template, other)) == other
    assert Delta.of(event) is None
    assert combine([(template, fill_of(template, event))]) is None


def fill_of(template: Template, event: bytes) -> Fill:
    fill = template.match(event)
    assert fill
    return fill


def learnt(parsed: Any, name: str = "") -> Template:
    template = learn(wire(parsed, name=name))
    assert template
    return template


def test_fields_that_change_beside_the_text_are_holes_of_the_template() -> None:
    template = learnt(chat({"content": T}, obfuscation="abc"))
    other = wire(chat({"content": "b"}, obfuscation="", created=1_800_000_000))
    assert fill_of(template, other) == Fill(b"1800000000", -1, b"b", b"")
    template = learnt(responses("output_text", T))
    assert fill_of(template, wire(responses("output_text", "b", sequence_number=1234))) == Fill(b"", 1234, b"b", b"")
    template = learnt(messages({"type": "text_delta", "text": T}))
    spaced = wire(messages({"type": "text_delta", "text": "b"})).replace(b"}\n\n", b"    }\n\n")
    assert fill_of(template, spaced) == Fill(b"", -1, b"b", b"    ")


def test_the_counts_of_a_usage_are_holes_and_the_last_ones_stand() -> None:
    template = learnt(gemini(T, made=3))
    assert template.counted and template.padded
    later = wire(gemini("b", made=1234))
    fill = fill_of(template, later)
    assert fill == Fill(b"", -1, b"b", b"1234 1242") and template.render(fill) == later
    assert merged(gemini("a", made=1), gemini("b", made=2)) == gemini("ab", made=2)
    thinking = {"promptTokenCount": 8, "totalTokenCount": 9, "thoughtsTokenCount": 1}
    detailed = thinking | {"candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 7}]}
    for usage, pad in [(thinking, b"9 1"), (detailed, b"9 1 7"), ({"promptTokenCount": 8}, b"")]:
        event = wire(gemini(T) | {"usageMetadata": usage})
        assert fill_of(learnt(gemini(T) | {"usageMetadata": usage}), event).pad == pad


@pytest.mark.parametrize("digits", [b"07", b"-1", b"1.5", b"1e3", b"1234567890123", b'"7"', b"null", b""])
def test_a_count_of_another_kind_fits_no_template(digits: bytes) -> None:
    template, event = learnt(gemini(T, made=77)), wire(gemini(T, made=77))
    assert template.match(event.replace(b'"candidatesTokenCount":77', b'"candidatesTokenCount":' + digits)) is None


def test_a_count_outside_of_the_usage_is_no_hole() -> None:
    rated = gemini(T, safetyRatings=[{"totalTokenCount": 5}])
    template = learn(wire(rated))
    assert template and not template.counted


@pytest.mark.parametrize(
    "other",
    [
        gemini("b", {"thought": True}),
        gemini("b", {"thought": False}),
        gemini("b") | {"responseId": "r2"},
        {"delta": "b"},
    ],
)
def test_other_parts_of_gemini_do_not_merge(other: dict[str, Any]) -> None:
    assert merged(gemini("a"), other) is None and merged(other, gemini("a")) is None


def test_candidates_of_gemini_are_merged_each_index_once() -> None:
    parsed = merged(*(gemini(text, index=index) for index, text in [(1, "a"), (0, "b"), (1, "c")]))
    assert parsed
    assert [(one["index"], one["content"]["parts"]) for one in parsed["candidates"]] == [
        (1, [{"text": "ac"}]),
        (0, [{"text": "b"}]),
    ]


@pytest.mark.parametrize(
    "digits", [b"17000000000", b"170000000", b"0700000000", b"1700000000.5", b"-170000000", b"null"]
)
def test_a_created_of_another_kind_fits_no_template(digits: bytes) -> None:
    template, event = learnt(chat({"content": T})), wire(chat({"content": T}))
    assert template.match(event.replace(b"1700000000", digits)) is None


@pytest.mark.parametrize("number", [b"007", b"-1", b"1.0", b"1e3", b"1234567890123", b'"7"', b"null"])
def test_a_sequence_number_of_another_kind_fits_no_template(number: bytes) -> None:
    template, event = learnt(responses("refusal", T)), wire(responses("refusal", T))
    assert template.match(event.replace(b":7,", b":%b," % number)) is None


@pytest.mark.parametrize("pad", [b'"', b"\\n", b"\x01", b"\x1f", b"\n", "é".encode()])
def test_a_padding_of_another_kind_fits_no_template(pad: bytes) -> None:
    template, event = learnt(chat({"content": T}, obfuscation="zz")), wire(chat({"content": T}, obfuscation="zz"))
    assert template.match(event.replace(b"zz", b"z" + pad)) is None


@pytest.mark.parametrize("parsed", DELTAS.values(), ids=DELTAS.keys())
def test_an_event_cut_anywhere_or_with_bytes_after_it_fits_no_template(parsed: dict[str, Any]) -> None:
    event = wire(parsed)
    template = learnt(parsed)
    for cut in range(len(event)):
        assert template.match(event[:cut]) is None
        learn(event[:cut] + b"\n\n")  # must not raise
        Delta.of(event[:cut] + b"\n\n")
    assert template.match(event + b"\n") is None
    assert template.match(event + event) is None


INSIDES = st.lists(
    st.sampled_from(
        [
            *(
                b"a",
                b"\\",
                b'"',
                b"u",
                b"00",
                b"d83d",
                b"n",
                b"x",
                b"\\n",
                b"\\u00e9",
                b"\xc3",
                b"\xa9",
                b"\xe4\xb8\xad",
            ),
            *(
                b"\xed\xa0\x80",
                b"\x00",
                b"\x1f",
                b"\x7f",
                b"\n",
                b"\\/",
                b"\xf5",
                b"\xc0\x80",
                b"\xf0\x9f\x98",
                b"\x80",
            ),
        ]
    ),
    max_size=8,
).map(b"".join)


@settings(max_examples=500, deadline=None)
@given(INSIDES)
def test_the_inside_of_a_string_is_accepted_as_a_json_parser_accepts_it(inside: bytes) -> None:
    try:
        parsed = json.loads((b'"%b"' % inside).decode())  # json itself lets halves of characters pass as UTF-8
    except ValueError:
        parsed = None
    assert is_string_inside(inside) == isinstance(parsed, str)


@settings(max_examples=300, deadline=None)
@given(INSIDES, st.sampled_from(["openai", "llama.cpp", "vllm reasoning", "responses", "messages", "tool", "gemini"]))
def test_an_event_that_matches_a_template_is_the_same_json_with_another_text(inside: bytes, server: str) -> None:
    parsed = DELTAS[server]
    template, event = learnt(parsed), wire(parsed).replace(b"TEXT", inside)
    fill = template.match(event)
    try:
        text = json.loads((b'"%b"' % inside).decode())
    except ValueError:
        assert fill is None
        return
    assert fill and template.render(fill) == event
    assert json.loads(event.removeprefix(b"data: ")) == json.loads(
        json.dumps(parsed).replace('"TEXT"', json.dumps(text))
    )


def merged(*events: dict[str, Any], name: str = "") -> dict[str, Any] | None:
    first, *others = (Delta.of(wire(event, name=name)) for event in events)
    assert first and all(others)
    if not all(first.absorb(other) for other in others if other):
        return None
    event = first.event()
    assert event.startswith(f"event: {name}\ndata: {{".encode() if name else b"data: {") and event.endswith(b"}\n\n")
    parsed: dict[str, Any] = json.loads(event.partition(b"data: ")[2])
    return parsed


def test_neighbouring_deltas_are_merged_by_value() -> None:
    late = {"created": 1_700_000_009, "obfuscation": "z"}
    assert merged(chat({"content": "a"}), chat({"content": "b"}, **late)) == chat({"content": "ab"}, obfuscation="z")
    assert merged(chat(tool("{")), chat(tool("}"))) == chat(tool("{}"))
    twins = merged(*(chat({"reasoning": text, "reasoning_content": text}) for text in "ab"))
    assert twins == chat({"reasoning": "ab", "reasoning_content": "ab"})
    kind = "response.output_text.delta"
    numbered = [responses("output_text", text, sequence_number=number) for number, text in enumerate("abc")]
    assert merged(*numbered, name=kind) == responses("output_text", "abc", sequence_number=2)
    blocks = [messages({"type": "thinking_delta", "thinking": text}) for text in "ab"]
    assert merged(*blocks) == messages({"type": "thinking_delta", "thinking": "ab"})


def test_the_last_usage_and_timings_win() -> None:
    first, second = (
        chat({"content": "a"}, usage={"n": 1}, timings={"n": 1}),
        chat({"content": "b"}, usage={"n": 2}, timings={}),
    )
    assert merged(first, second) == chat({"content": "ab"}, usage={"n": 2}, timings={})
    assert merged(first, chat({"content": "b"}, usage=None, timings={})) is None
    assert merged(chat({"content": "a"}), first) is None


def test_choices_are_merged_each_index_once_in_the_order_of_arrival() -> None:
    parsed = merged(*(chat({"content": text}, {"index": index}) for index, text in [(1, "a"), (0, "b"), (1, "c")]))
    assert parsed
    assert [(one["index"], one["delta"]) for one in parsed["choices"]] == [
        (1, {"content": "ac"}),
        (0, {"content": "b"}),
    ]
    both = chat({}) | {"choices": [chat({"content": "d"}, {"index": index})["choices"][0] for index in (0, 1)]}
    parsed = merged(chat({"content": "a"}), both, both)
    assert parsed and [one["delta"]["content"] for one in parsed["choices"]] == ["add", "dd"]


@pytest.mark.parametrize(
    "other",
    [
        chat({"reasoning_content": "b"}),
        chat(tool("b")),
        chat({"content": "b", "role": None}),
        chat({"content": "b"}, {"finish_reason": ""}),
        chat({"content": "b"}, provider="other"),
        chat({"content": "b"}, model="other"),
        chat({"content": "b"}, {"logprobs": None, "stop_reason": None}),
        messages({"type": "text_delta", "text": "b"}),
    ],
)
def test_deltas_of_different_kinds_or_fields_do_not_merge(other: dict[str, Any]) -> None:
    first = Delta.of(wire(chat({"content": "a"})))
    later = Delta.of(wire(other))
    assert first and later and not first.absorb(later) and not later.absorb(first)
    assert json.loads(first.event()[6:]) == chat({"content": "a"})


def test_no_field_of_any_server_is_lost_to_a_merge() -> None:
    """Only texts, choices and the fields that are documented to change may differ between events that are merged."""
    may_change = {"choices", "created", "sequence_number", "obfuscation", "delta"}
    may_grow = {"usageMetadata"}  # if both have it
    for server, parsed in DELTAS.items():
        for field in parsed.keys() - may_change:
            first = Delta.of(wire(parsed))
            others = [{name: parsed[name] for name in parsed if name != field}]
            if field not in may_grow:
                others.append(parsed | {field: "other"})
            for other in others:
                later = Delta.of(wire(other))
                if later is None:  # without that field the event isn't a delta
                    continue
                assert first and not first.absorb(later) and not later.absorb(first), (server, field)
                assert json.loads(first.event()[6:]) == parsed


@pytest.mark.parametrize("make", [chat, lambda delta, **more: chat({}, **more) | {"choices": [{"index": 0} | delta]}])
def test_chunks_of_different_ids_stay_apart(make: Any) -> None:
    """Two answers of an upstream are never merged: neither by value nor by template."""
    delta = {"content": T} if make is chat else {"text": T}
    first, later = (make(delta, id=name) for name in ("chatcmpl-1", "chatcmpl-2"))
    assert merged(first, first) and merged(first, later) is None and merged(later, first) is None
    assert learnt(first).match(wire(later)) is None
    runs = [(learnt(each), fill_of(learnt(each), wire(each))) for each in (first, later)]
    assert combine(runs) is None


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0, False), (None, 0), ({"a": 1}, {"a": True})])
def test_members_are_equal_only_as_json(one: Any, other: Any) -> None:
    def make(value: Any) -> dict[str, Any]:
        return chat({"content": "a"}, {"content_filter_results": value}, provider=value)

    assert merged(make(one), make(one))
    assert merged(make(one), make(other)) is None


VALUES = [0, 1, 1.5, True, False, "", "a", [], [912], {}, {"a": 1}]
# Makers of a text delta with a member of any name and value, in each place where servers put members.
PLACES: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "chunk": lambda name, value: chat({"content": T}) | {name: value},
    "choice": lambda name, value: chat({"content": T}, {name: value}),
    "delta": lambda name, value: chat({"content": T, name: value}),
    "completion": lambda name, value: chat({}) | {"choices": [{"index": 0, "text": T, name: value}]},
    "tool call": lambda name, value: chat(tool(T, **{name: value})),
    "function": lambda name, value: chat(tool(T, function={"arguments": T, name: value})),
    "responses": lambda name, value: responses("output_text", T) | {name: value},
    "messages": lambda name, value: messages({"type": "text_delta", "text": T}) | {name: value},
    "messages' delta": lambda name, value: messages({"type": "text_delta", "text": T, name: value}),
    "published": lambda name, value: {"delta": T, name: value},
    "gemini": lambda name, value: gemini(T) | {name: value},
    "candidate": lambda name, value: gemini(T, **{name: value}),
    "part": lambda name, value: gemini(T, {name: value}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_an_event_with_a_member_that_is_not_known_to_be_safe_is_never_merged(place: str, value: Any) -> None:
    event = wire(PLACES[place]("unheard_of", value))
    assert Delta.of(event) is None and learn(event) is None
    if place != "published":  # streamd's own form has a single member
        assert Delta.of(wire(PLACES[place]("unheard_of", None)))


VARIED_PATHS = [path for path, rule in Chat.merging.table.items() if rule is Merge.VARIED]


@pytest.mark.parametrize("value", [[5], {"a": "b", "c": [1.5, -2]}, {"x": {"y": ["z", None]}}])
@pytest.mark.parametrize("path", VARIED_PATHS)
def test_a_member_that_varies_is_learnt_behind_the_text_alone_and_never_merged(path: str, value: Any) -> None:
    level, _, name = path.rpartition(".")
    parsed = PLACES[LEVELS[level]](name, value)
    event = wire(parsed)
    template = learn(event)
    assert Delta.of(event) is None
    assert template is not None and template.varied and not template.merges
    assert template.render(fill_of(template, event)) == event
    assert learn(wire(dict(reversed(parsed.items())))) is not None
    ahead = dict(parsed, choices=[dict(reversed(parsed["choices"][0].items()))])
    assert learn(wire(ahead)) is None, "in front of the text"
    for nothing in (None, "", []):
        assert Delta.of(wire(PLACES[LEVELS[level]](name, nothing)))


@pytest.mark.parametrize("place", ["chunk", "delta"])
@pytest.mark.parametrize("name", [path.rpartition(".")[2] for path in VARIED_PATHS])
def test_a_member_that_varies_is_known_by_its_place(place: str, name: str) -> None:
    assert learn(wire(PLACES[place](name, [5]))) is None


LEVELS = {
    "": "chunk",
    "choices[]": "choice",
    "choices[].delta": "delta",
    "choices[].delta.tool_calls[]": "tool call",
    "choices[].delta.tool_calls[].function": "function",
}


@pytest.mark.parametrize("path", [path for path, rule in Chat.merging.table.items() if rule is Merge.APART])
def test_a_listed_member_that_must_not_merge_does_not_unless_it_is_empty(path: str) -> None:
    level, _, name = path.rpartition(".")
    make = PLACES[LEVELS[level]]
    assert Delta.of(wire(make(name, [1]))) is None and learn(wire(make(name, "x"))) is None
    for nothing in (None, "", []):
        assert Delta.of(wire(make(name, nothing)))


def test_tool_calls_and_blocks_of_another_index_do_not_merge() -> None:
    assert merged(chat(tool("a")), chat(tool("b", index=1))) is None
    delta = {"type": "text_delta", "text": "a"}
    assert merged(messages(delta), messages(delta, index=1)) is None
    assert merged(responses("output_text", "a"), responses("output_text", "a", output_index=1)) is None
    first, later = Delta.of(wire(messages(delta), name="a")), Delta.of(wire(messages(delta), name="b"))
    assert first and later and not first.absorb(later)


def test_numbers_that_would_lose_digits_and_halves_of_characters_are_not_merged() -> None:
    assert Delta.of(wire(chat({"content": "a"}, provider=12345678901234567890123))) is None
    assert Delta.of(wire(chat({"content": "a"}, id="chatcmpl-12345678901234567890123")))
    assert Delta.of(wire(chat({"content": "\ud83d"}), ascii_only=True)) is None


@pytest.mark.parametrize("depth", [120, 140, 260, 700, 1020, 2000])
@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":[{"index":0,"delta":{"content":"a"}}],"usage":%b}',
        b'{"choices":[{"index":0,"delta":{"content":"a"}}],"model":%b}',
        b'{"type":"content_block_delta","index":0,"delta":{"type":%b,"text":"a"}}',
        b'{"candidates":[{"content":{"parts":[{"text":"a"}]}}],"usageMetadata":{"totalTokenCount":1,"x":%b}}',
        b'{"delta":"a","item_id":%b,"type":"response.output_text.delta"}',
    ],
)
def test_events_too_deep_to_be_written_again_are_not_merged_and_break_nothing(event: bytes, depth: int) -> None:
    framed = b"data: " + event % (b"[" * depth + b"]" * depth) + b"\n\n"
    template, first, second = learn(framed), Delta.of(framed), Delta.of(framed)
    if depth > 128:
        assert template is first is None
    if first is not None and second is not None and first.absorb(second):
        assert first.event().count(b"[") >= depth


def test_templates_of_several_choices_combine_around_texts_as_they_are_on_the_wire() -> None:
    runs = []
    for index, text in enumerate([b"\\ud83d", b'streamd-0-\\"streamd-1-\\"', b"streamd-0-"]):
        template = learnt(chat({"content": T}, {"index": index}))
        runs.append((template, Fill(b"1700000000", -1, text, b"")))
    event = combine(runs)
    assert event
    texts = [one["delta"]["content"] for one in json.loads(event[6:])["choices"]]
    assert texts == ["\ud83d", 'streamd-0-"streamd-1-"', "streamd-0-"]
    assert combine([runs[0], runs[0]]) is None
    other = learnt(chat({"reasoning_content": T}))
    assert combine([runs[0], (other, runs[0][1])]) is None
    assert combine([]) is None
    marked = learnt(chat({"content": T}, model="streamd-0-"))
    assert combine([(marked, runs[0][1])]) is None


def test_an_escape_does_not_make_a_character_of_its_neighbours() -> None:
    assert is_string_inside(b"\xc3\xa9\\n")
    assert not is_string_inside(b"\xc3\\n\xa9")
