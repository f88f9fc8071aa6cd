"""Streams as inference servers and gateways have been seen to send them (README.md has the reports)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import DONE, LAST, SSE_HEAD, chunk, events_in, get, post, rig, text_of

from streamd.reasons import CloseReason

CHAT_PATH = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
GEMINI = "/v1beta/models/g:streamGenerateContent?alt=sse"


def data(body: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return data({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})


def typed(kind: str, **fields: Any) -> bytes:
    return data({"type": kind, **fields}, kind)


STOP = delta("stop")


class Told:
    """How a stream of these reads ended: for its reader, and for streamd."""

    def __init__(
        self, events: list[bytes], *, path: str = CHAT_PATH, head: bytes = SSE_HEAD, end: bytes = LAST
    ) -> None:
        with rig(idle_timeout_s=120.0) as r:
            client = r.client(post({"model": "m", "stream": True}, path=path))
            r.reply(head + chunk(*events) + end)
            if not end:
                r.link.fin()
                r.turn()
            r.pass_time(2)
            self.answer = client.answer
            self.whole = self.answer.whole
            self.events = events_in(self.answer.body)
            streams = list(r.runtime.hub)
            self.reason = streams[0].reason if streams else None
            later = r.client(get(f"/v1/streams/{self.answer.get('x-stream-id')}")) if streams else client
            self.later = events_in(later.answer.body)

    @property
    def datas(self) -> list[bytes]:
        return [each.data for each in self.events]


def datas_of(events: list[bytes]) -> list[bytes]:
    return [each.data for each in events_in(b"".join(events))]


# -- heads


@pytest.mark.parametrize("coding", ["none", "None", "identity", "Identity", "identity, identity", "", "none,identity"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_coding_that_names_no_coding_leaves_a_stream_a_stream(coding: str, complete: bool) -> None:
    head = SSE_HEAD[:-2] + f"content-encoding: {coding}\r\n\r\n".encode()
    told = Told([delta(content="half"), *([STOP, DONE] if complete else [])], head=head)
    assert told.events[0].id is not None, "the stream can be resumed"
    assert told.whole is complete
    assert told.reason is (CloseReason.COMPLETE if complete else CloseReason.UPSTREAM_TRUNCATED)


# -- ends


@pytest.mark.parametrize("reason", ["end_turn", "max_tokens", "tool_use", "refusal"])
@pytest.mark.parametrize("done", [True, False])
def test_messages_without_message_stop_are_complete_by_their_stop_reason(reason: str, done: bool) -> None:
    events = [
        typed("message_start", message={"id": "msg"}),
        typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "all"}),
        typed("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 3}),
        *([DONE] if done else []),
    ]
    told = Told(events, path=MESSAGES)
    assert told.whole and told.reason is CloseReason.COMPLETE and told.datas == datas_of(events)
    assert not Told(events, path=MESSAGES, end=b"").whole, "the framing has to end properly"


@pytest.mark.parametrize("stop", [None, "", "null"])
def test_messages_whose_stop_reason_says_nothing_are_cut(stop: str | None) -> None:
    events = [typed("message_start", message={"id": "msg"}), typed("message_delta", delta={"stop_reason": stop})]
    told = Told(events, path=MESSAGES)
    assert not told.whole and told.events[-1].name == "error"


@pytest.mark.parametrize("usage", [None, {"promptTokenCount": 12}])
def test_a_blocked_prompt_is_a_whole_answer_of_gemini(usage: Any) -> None:
    blocked = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage, "modelVersion": "g"}
    told = Told([data(blocked)], path=GEMINI)
    assert told.whole and told.reason is CloseReason.COMPLETE and len(told.events) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("end", [LAST, b""])
def test_a_number_that_json_has_not_hides_no_end(number: str, end: bytes) -> None:
    last = (
        b'data: {"choices":[{"index":0,"delta":{},"logprobs":{"content":[{"logprob":%s}]},"finish_reason":"stop"}]}\n\n'
    )
    events = [delta(content="all"), last % number.encode()]
    told = Told(events, end=end)
    assert told.whole is bool(end)
    assert told.datas[:2] == datas_of(events), "the bytes pass as they are"


@pytest.mark.parametrize(
    "after", [[data({"choices": [{"index": 0, "delta": {}}], "usage": {"completion_tokens": 8}})], []]
)
def test_usage_behind_the_finish_reason_arrives_in_every_shape(after: list[bytes]) -> None:
    usage = [*after, data({"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 2}})]
    events = [delta(content="a"), STOP, *usage, DONE]
    told = Told(events)
    assert told.whole and told.datas == datas_of(events) and told.reason is CloseReason.COMPLETE


def test_a_filter_that_judges_behind_the_end_takes_the_end_back_from_nobody() -> None:
    judged = {"index": 0, "finish_reason": None, "content_filter_offsets": {"check_offset": 44}}
    events = [
        data({"id": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
        delta(content="a"),
        STOP,
        data({"id": "", "object": "", "created": 0, "model": "", "choices": [judged]}),
    ]
    told = Told(events)
    assert told.whole and told.datas == datas_of(events)


# -- failures

FAILURES = {
    "the choice's own error": data({"choices": [{"index": 0, "delta": {}, "error": {"code": 502, "message": "x"}}]}),
    "a finish_reason": delta("error", content=""),
    "beside the choice": data(
        {"error": {"code": 502, "message": "x"}, "choices": [{"index": 0, "finish_reason": "error"}]}
    ),
    "a named event of text": b"event: error\ndata: the engine died\n\n",
    "a named event of another shape": data({"message": "the engine died", "code": 500}, "error"),
    "a named event of Anthropic's": data(
        {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, "error"
    ),
    "text-generation-inference": data({"error": "Input validation error", "error_type": "validation"}),
}


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=list(FAILURES))
@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
def test_a_failure_in_any_of_these_shapes_is_told_once_and_counts(path: str, failure: bytes, done: bool) -> None:
    events = [delta(content="half"), failure, *([DONE] if done else [])]
    told = Told(events, path=path)
    assert told.whole and told.datas == datas_of(events), "nothing is added"
    assert told.reason is CloseReason.UPSTREAM_ERROR


@pytest.mark.parametrize("value", [None, {}, "", False])
@pytest.mark.parametrize("inside", [True, False])
def test_an_error_that_says_nothing_is_none(value: Any, inside: bool) -> None:
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": None, **({"error": value} if inside else {})}
    events = [data({"choices": [choice], **({} if inside else {"error": value})}), STOP, DONE]
    told = Told(events)
    assert told.whole and told.reason is CloseReason.COMPLETE


# -- events


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_character_cut_by_a_chunk_or_a_read_arrives_whole(cut: int) -> None:
    said = "北“😀"
    body = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": said}}]}, ensure_ascii=False).encode()
    at = body.index(said.encode()) + cut
    with rig() as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(body[:at]))
        r.reply(chunk(body[at:] + b"\n\n", STOP, DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == said and client.answer.whole
        later = r.client(get(f"/v1/streams/{client.answer.get('x-stream-id')}"))
        assert text_of(events_in(later.answer.body)) == said


PRINTED = {
    "over many data lines": b'data: {"choices":\ndata:   [{"index":0,\ndata:  "delta":{"content":"a"}}]}\n\n',
    "a line end behind the colon": b'data:\n {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n',
    "indented, the lines without their name": b'data: {\n  "choices": [{"index":0,"delta":{"content":"a"}}]\n}\n\n',
}


@pytest.mark.parametrize("printed", PRINTED.values(), ids=list(PRINTED))
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_json_that_is_printed_over_lines_passes_line_by_line(printed: bytes, line_end: bytes) -> None:
    told = Told([printed.replace(b"\n", line_end), STOP, DONE])
    assert told.whole and printed in told.answer.body


def test_comments_of_a_router_stay_comments() -> None:
    with rig(heartbeat_s=0.0) as r:
        client = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD)
        for _ in range(3):
            r.reply(chunk(b": OPENROUTER PROCESSING\n\n"))
        r.reply(chunk(delta(content="a"), STOP, DONE) + LAST)
        body = client.answer.body
        assert (
            body.count(b"\n: OPENROUTER PROCESSING\n: OPENROUTER PROCESSING\n: OPENROUTER PROCESSING\n") == 1
            and b"data: :" not in body
        )
        assert len(events_in(body)) == 3


LATE = {
    "calls without an index": [delta(tool_calls=[{"function": {"arguments": part}}]) for part in ("{", "}")],
    "arguments as objects": [delta(tool_calls=[{"index": 0, "function": {"arguments": {"a": 1}}}])] * 2,
    "audio": [delta(audio={"data": "QQ=="})] * 3,
    "content in parts": [delta(content=[{"type": "text", "text": part}]) for part in "ab"],
    "the whole text so far beside the delta": [
        data({"choices": [{"index": 0, "delta": {"content": "a"}, "message": {"content": "a" * count}}]})
        for count in (1, 2, 3)
    ],
    "citations that grow": [
        data({"citations": ["u"] * count, "choices": [{"index": 0, "delta": {"content": "a"}}]}) for count in (1, 2)
    ],
    "images": [delta(content="", images=[{"image_url": {"url": "data:image/png;base64,QQ=="}}])] * 2,
    "annotations": [delta(content="a", annotations=[{"type": "url_citation"}])] * 2,
    "reasoning_details": [delta(reasoning="a", reasoning_details=[{"type": "reasoning.text", "text": "a"}])] * 2,
}


@pytest.mark.parametrize("events", LATE.values(), ids=list(LATE))
def test_a_late_reader_gets_members_that_cant_be_joined_each_on_its_own(events: list[bytes]) -> None:
    told = Told([*events, STOP, DONE])
    assert [each.data for each in told.later] == told.datas == datas_of([*events, STOP, DONE])


LATE_TYPED = {
    "signatures": (
        MESSAGES,
        [typed("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "Eq"})] * 2,
    ),
    "citations": (
        MESSAGES,
        [typed("content_block_delta", index=0, delta={"type": "citations_delta", "citation": {}})] * 2,
    ),
    "audio": (RESPONSES, [typed("response.audio.delta", sequence_number=n, delta="QQ==") for n in (1, 2)]),
    "partial images": (
        RESPONSES,
        [
            typed("response.image_generation_call.partial_image", partial_image_b64="QQ==", partial_image_index=n)
            for n in (0, 1)
        ],
    ),
    "log probabilities": (
        RESPONSES,
        [typed("response.output_text.delta", sequence_number=n, delta="a", logprobs=[{"token": "a"}]) for n in (1, 2)],
    ),
    "thought signatures": (
        GEMINI,
        [data({"candidates": [{"content": {"parts": [{"text": "a", "thoughtSignature": "s"}]}, "index": 0}]})] * 2,
    ),
    "inline data": (
        GEMINI,
        [data({"candidates": [{"content": {"parts": [{"inlineData": {"data": "QQ=="}}]}, "index": 0}]})] * 2,
    ),
}


@pytest.mark.parametrize(("path", "events"), LATE_TYPED.values(), ids=list(LATE_TYPED))
def test_pieces_that_are_no_text_are_never_joined(path: str, events: list[bytes]) -> None:
    end = {
        MESSAGES: typed("message_stop"),
        RESPONSES: typed("response.completed", response={"id": "r"}),
        GEMINI: data({"candidates": [{"index": 0, "finishReason": "STOP"}]}),
    }[path]
    told = Told([*events, end], path=path)
    assert told.whole and [each.data for each in told.later] == datas_of([*events, end])
