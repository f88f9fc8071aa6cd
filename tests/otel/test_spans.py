"""The span of a generation: names, times and attributes, for streams, whole answers and failures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, chunk, event, get, post, rig, whole_answer
from opentelemetry.trace import SpanKind, StatusCode
from traced import UNIX_S, facts, only, traced

from streamd.config import UpstreamSettings

JSON = "content-type: application/json"


def data(**body: Any) -> bytes:
    return (
        b"data: "
        + json.dumps({"id": "c1", "object": "chat.completion.chunk", "model": "m-1", **body}).encode()
        + b"\n\n"
    )


FINISH = data(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE = data(choices=[], usage={"prompt_tokens": 11, "completion_tokens": 2})
FIRST = data(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])


def test_a_stream_is_a_span_with_its_times_and_all_that_it_states() -> None:
    with rig() as r:
        spans = traced(r)
        begun = r.runtime.time()
        r.client(post(CHAT))
        r.pass_time(3)
        r.reply(SSE_HEAD + chunk(FIRST))
        r.pass_time(2)
        r.reply(chunk(event("a"), event("b"), FINISH, USAGE, DONE) + LAST)
        span = only(spans)
        assert span.name == "chat m" and span.kind is SpanKind.CLIENT and span.status.status_code is StatusCode.UNSET
        assert span.start_time == pytest.approx((UNIX_S + begun) * 1e9, abs=1e3)
        assert span.end_time == pytest.approx((UNIX_S + begun + 5) * 1e9, abs=1e8)
        assert facts(span).pop("gen_ai.response.time_to_first_chunk") == pytest.approx(3, abs=0.1)
        assert facts(span) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "m",
            "gen_ai.request.stream": True,
            "gen_ai.response.id": "c1",
            "gen_ai.response.model": "m-1",
            "gen_ai.response.finish_reasons": ("stop",),
            "gen_ai.response.time_to_first_chunk": facts(span)["gen_ai.response.time_to_first_chunk"],
            "gen_ai.usage.input_tokens": 11,
            "gen_ai.usage.output_tokens": 2,
            "http.response.status_code": 200,
            "server.address": "up.test",
            "server.port": 1,
            "streamd.reason": "complete",
            "streamd.response.status_code": 200,
            "streamd.upstream": "up",
        }


def test_a_whole_answer_is_a_span() -> None:
    choices = [
        {"index": k, "message": {"content": "Hi"}, "finish_reason": reason}
        for k, reason in enumerate(("stop", "length"))
    ]
    body = {"id": "c2", "model": "m-2", "choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": 9}}
    with rig(upstreams=(UpstreamSettings(name="openai", url="https://api.openai.com"),)) as r:
        spans = traced(r)
        r.client(post(WHOLE))
        r.pass_time(1)
        r.reply(whole_answer(json.dumps(body).encode(), "200 OK", JSON))
        assert facts(only(spans)) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "m",
            "gen_ai.response.id": "c2",
            "gen_ai.response.model": "m-2",
            "gen_ai.response.finish_reasons": ("stop", "length"),
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.output_tokens": 9,
            "http.response.status_code": 200,
            "server.address": "api.openai.com",
            "server.port": 443,
            "streamd.reason": "complete",
            "streamd.response.status_code": 200,
            "streamd.upstream": "openai",
        }


def test_a_server_on_a_socket_has_a_path_and_no_port() -> None:
    with rig(upstreams=(UpstreamSettings(name="local", url="unix:/run/llm.sock"),)) as r:
        spans = traced(r)
        writer = r.runtime.tracing
        assert writer is not None
        c = r.client(post(WHOLE))
        r.pass_time(10)
        found = facts(only(spans))
        assert found["server.address"] == "/run/llm.sock" and "server.port" not in found and c.statuses


@pytest.mark.parametrize(
    ("path", "body", "name", "answer", "expected"),
    [
        (
            "/v1/messages",
            {"model": "claude"},
            "chat claude",
            {"id": "msg_1", "type": "message", "model": "claude-4", "content": [], "stop_reason": "end_turn"},
            ("msg_1", "claude-4", ("end_turn",)),
        ),
        (
            "/v1/responses",
            {"model": "gpt"},
            "chat gpt",
            {"id": "resp_1", "object": "response", "model": "gpt-5", "status": "completed", "output": []},
            ("resp_1", "gpt-5", ("completed",)),
        ),
        (
            "/v1beta/models/gemini-2:generateContent",
            {},
            "generate_content gemini-2",
            {"responseId": "r1", "modelVersion": "gemini-2.5", "candidates": [{"finishReason": "STOP"}]},
            ("r1", "gemini-2.5", ("STOP",)),
        ),
        (
            "/v1/embeddings",
            {"model": "e", "input": "x"},
            "embeddings e",
            {"data": [], "model": "e-1"},
            (None, "e-1", None),
        ),
        ("/v1/completions", {"prompt": "x"}, "text_completion", {}, (None, None, None)),
    ],
)
def test_each_api_has_its_operation_and_facts(
    path: str, body: dict[str, Any], name: str, answer: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(body, path=path))
        r.reply(whole_answer(json.dumps(answer).encode(), "200 OK", JSON))
        span = only(spans)
        found = facts(span)
        assert span.name == name
        names = ("gen_ai.response.id", "gen_ai.response.model", "gen_ai.response.finish_reasons")
        assert tuple(map(found.get, names)) == expected


@pytest.mark.parametrize(
    ("reply", "client", "upstream", "error", "reason"),
    [
        (whole_answer(b"{}", "500 Oops", JSON), 500, 500, "500", "complete"),
        (whole_answer(b"{}", "400 No", JSON), 400, 400, "400", "complete"),
        (b"HTTP/1.1 nonsense\r\n\r\n", 502, None, "upstream_protocol", "upstream_protocol"),
        (SSE_HEAD + chunk(event("a")) + LAST, 200, 200, "upstream_truncated", "upstream_truncated"),
        (
            SSE_HEAD + chunk(b'data: {"error": {"message": "no"}}\n\n') + LAST,
            200,
            200,
            "upstream_error",
            "upstream_error",
        ),
    ],
)
def test_a_failure_is_an_error_with_its_type(
    reply: bytes, client: int, upstream: int | None, error: str, reason: str
) -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(CHAT))
        r.reply(reply)
        span = only(spans)
        found = facts(span)
        assert span.status.status_code is StatusCode.ERROR and span.status.description is None
        assert (found["error.type"], found["streamd.reason"]) == (error, reason)
        assert found["streamd.response.status_code"] == client
        assert found.get("http.response.status_code") == upstream


def test_a_server_that_cannot_be_reached_and_the_lack_of_any_are_errors() -> None:
    with rig() as r:
        spans = traced(r)
        r.refusing = {1}
        assert r.client(post(CHAT)).statuses == [502]
        found = facts(only(spans))
        assert found["error.type"] == "upstream_connect" and found["streamd.response.status_code"] == 502
        assert "http.response.status_code" not in found
    with rig(upstreams=(UpstreamSettings(name="up", url="http://up.test:1", inflight_max=1),)) as r:
        r.client(post(CHAT))
        spans = traced(r)
        assert r.client(post(WHOLE)).statuses == [503]
        found = facts(only(spans))
        assert found["error.type"] == "no_upstream" and "server.address" not in found


def test_a_reader_that_leaves_ends_its_generation_without_an_error() -> None:
    with rig() as r:
        spans = traced(r)
        c = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(FIRST, event("a")))
        c.reset()
        r.turn()
        span = only(spans)
        assert facts(span)["streamd.reason"] == "reader_gone" and span.status.status_code is StatusCode.UNSET
        assert facts(span)["gen_ai.response.id"] == "c1"


def test_no_span_holds_a_text_of_the_request_or_the_answer_a_key_or_a_client() -> None:
    secrets = ["my-prompt", "the-answer", "sk-client-key", "alices-id", "203.0.113.9", "the-reply", "the-user"]
    body = {
        "messages": [{"role": "user", "content": secrets[0]}],
        "user": "the-user",
        "metadata": {"model": secrets[0]},
    }
    with rig(trusted_proxies=("127.0.0.1", "unix")) as r:
        spans = traced(r)
        fields = [
            f"Authorization: Bearer {secrets[2]}",
            f"X-Request-Id: {secrets[3]}",
            f"X-Forwarded-For: {secrets[4]}",
        ]
        c = r.client(post({"model": "m", "stream": True} | body, *fields))
        r.reply(SSE_HEAD + chunk(FIRST, event(secrets[1]), FINISH, USAGE, DONE) + LAST)
        stream_id = c.answer.get("x-stream-id")
        r.client(post({"model": f"x/{secrets[2]}"} | body, *fields))
        choice = {"message": {"content": secrets[5], "id": secrets[5], "model": secrets[5]}, "finish_reason": "stop"}
        r.reply(whole_answer(json.dumps({"choices": [choice], "user": "the-user"}).encode(), "200 OK", JSON))
        written = spans.get_finished_spans()
        assert len(written) == 2 and stream_id
        told = "".join(span.to_json() for span in written)
        assert [secret for secret in [*secrets, stream_id] if secret in told] == []
        assert written[1].name == "chat x/sk-***"


def test_a_child_of_the_clients_span_tells_its_retries_in_their_time() -> None:
    ups = (UpstreamSettings(name="a", url="http://a.test:1"), UpstreamSettings(name="b", url="http://b.test:2"))
    with rig(upstreams=ups) as r:
        spans = traced(r)
        r.client(post(WHOLE, f"traceparent: 00-{'a' * 32}-{'b' * 16}-01"))
        r.pass_time(2)
        r.reply(whole_answer(b"{}", "503 Busy"))
        r.pass_time(1)
        r.reply(whole_answer(b"{}"))
        span = only(spans)
        assert span.parent is not None and span.parent.span_id == int("b" * 16, 16)
        (retry,) = span.events
        assert span.start_time is not None and span.end_time is not None
        assert retry.timestamp - span.start_time == pytest.approx(2e9, abs=1e8)
        assert span.end_time - retry.timestamp == pytest.approx(1e9, abs=1e8)


def test_two_generations_have_spans_of_their_own() -> None:
    with rig() as r:
        spans = traced(r)
        first = r.client(post(WHOLE))
        link = r.link
        second = r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        link.feed(whole_answer(b"{}"))
        r.turn()
        assert first.statuses == second.statuses == [200]
        ids = {(span.context.trace_id, span.context.span_id) for span in spans.get_finished_spans() if span.context}
        assert len(ids) == 2
        assert r.client(get()).statuses == [200] and len(spans.get_finished_spans()) == 2
