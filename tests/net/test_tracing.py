"""Trace context goes upstream with the generation's own span, and a generation has one span, whoever reads it."""

from __future__ import annotations

import re

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Rig, chunk, event, get, post, rig, whole_answer
from traced import events, facts, only, traced

from streamd.config import UpstreamSettings
from streamd.core.answer_edges import AnswerEdges
from streamd.net.trace import EVENTS_MAX, Trace
from streamd.wire.trace_context import TraceParent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TWO = (UpstreamSettings(name="a", url="http://a.test:1"), UpstreamSettings(name="b", url="http://b.test:2"))


def sent(r: Rig, name: str = "traceparent") -> list[str]:
    """The values of a field in the last request that went upstream."""
    return re.findall(rf"^{name}: (.*)\r$", bytes(r.link.sent).decode(), re.MULTILINE)


def parent(flags: str = "01") -> str:
    return f"traceparent: 00-{TRACE}-{SPAN}-{flags}"


def ended(r: Rig, *words: bytes) -> None:
    r.reply(chunk(*words, DONE) + LAST)


def test_the_upstream_is_told_the_generations_own_span() -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(CHAT, parent(), "tracestate: vendor=1"))
        r.reply(SSE_HEAD)
        ended(r, event("a"))
        span = only(spans)
        assert span.context is not None and span.parent is not None
        assert sent(r) == [f"00-{TRACE}-{span.context.span_id:016x}-01"]
        assert sent(r, "tracestate") == ["vendor=1"]
        assert f"{span.context.trace_id:032x}" == TRACE
        assert f"{span.parent.span_id:016x}" == SPAN and span.parent.is_remote


@pytest.mark.parametrize("field", ["traceparent: nonsense", f"traceparent: 00-{'0' * 32}-{SPAN}-01", "x-other: 1"])
def test_an_invalid_traceparent_is_replaced(field: str) -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(WHOLE, field, "tracestate: vendor=1"))
        r.reply(whole_answer(b"{}"))
        span = only(spans)
        assert span.context is not None and span.parent is None
        assert sent(r) == [f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"]
        assert sent(r, "tracestate") == []


def test_without_tracing_the_fields_pass_as_they_came() -> None:
    with rig() as r:
        r.client(post(WHOLE, "traceparent: nonsense", "tracestate: vendor=1"))
        assert sent(r) == ["nonsense"] and sent(r, "tracestate") == ["vendor=1"]
        r.reply(whole_answer(b"{}"))


def test_a_request_for_no_generation_has_no_span_and_passes_its_fields() -> None:
    with rig() as r:
        spans = traced(r)
        r.client(get("/v1/files", parent()))
        assert sent(r) == [f"00-{TRACE}-{SPAN}-01"]
        r.reply(whole_answer(b"{}"))
        assert spans.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("ratio", "flags", "recorded"), [(1.0, "00", False), (0.0, "01", True), (0.0, None, False), (1.0, None, True)]
)
def test_the_caller_decides_what_is_sampled_and_else_the_ratio(ratio: float, flags: str | None, recorded: bool) -> None:
    with rig() as r:
        spans = traced(r, ratio=ratio)
        r.client(post(CHAT, *([parent(flags)] if flags else [])))
        r.reply(SSE_HEAD)
        ended(r, event("a"))
        assert len(spans.get_finished_spans()) == recorded
        assert sent(r)[0].endswith("-01" if recorded else "-00")
        assert sent(r)[0].split("-")[2] != SPAN


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_only_for_a_span_are_the_ends_of_a_whole_answer_kept(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[AnswerEdges] = []
    monkeypatch.setattr(AnswerEdges, "passed", lambda edges, piece: kept.append(edges))
    with rig() as r:
        traced(r, ratio=ratio)
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"{}", "200 OK", "content-type: application/json"))
        assert client.answer.status == 200 and bool(kept) == bool(ratio)


def test_a_ratio_samples_its_share_by_the_trace_id_alone() -> None:
    with rig() as r:
        traced(r, ratio=0.25)
        seen = []
        for _ in range(200):
            c = r.client(post(WHOLE))
            seen.append(sent(r)[-1])
            r.reply(whole_answer(b"{}"))
            c.fin()
        for each in seen:
            _, trace_id, _, flags = each.split("-")
            assert (int(trace_id[16:], 16) < 2**62) == (flags == "01")
        assert 20 < sum(each.endswith("01") for each in seen) < 80


def test_every_try_of_a_request_is_asked_by_the_same_span() -> None:
    with rig(upstreams=TWO) as r:
        spans = traced(r)
        r.refusing = {1}
        r.client(post(CHAT))
        assert r.dialled == [1, 2]
        r.reply(SSE_HEAD)
        ended(r, event("a"))
        span = only(spans)
        assert span.context is not None and sent(r)[0].split("-")[2] == f"{span.context.span_id:016x}"
        assert events(span) == [("retry", {"streamd.upstream": "a", "streamd.reason": "upstream_connect"})]
        assert facts(span)["server.address"] == "b.test"


def test_an_upstream_that_refuses_and_another_that_answers_are_one_span() -> None:
    with rig(upstreams=TWO) as r:
        spans = traced(r)
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}", "503 Busy"))
        r.reply(whole_answer(b"{}"))
        span = only(spans)
        assert events(span) == [("retry", {"streamd.upstream": "a", "streamd.reason": "status 503"})]
        assert facts(span)["http.response.status_code"] == 200 and "error.type" not in facts(span)


def test_a_stale_connection_is_a_retry() -> None:
    with rig() as r:
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        spans = traced(r)
        r.client(post(WHOLE))
        r.link.fin()
        r.turn()
        r.reply(whole_answer(b"{}"))
        assert events(only(spans)) == [("retry", {"streamd.upstream": "up", "streamd.reason": "stale connection"})]


def test_a_reader_that_leaves_and_comes_back_is_told_in_the_span_of_its_generation() -> None:
    with rig() as r:
        spans = traced(r)
        c = r.client(post(CHAT, "X-Stream-Detach-Grace: 60"))
        r.reply(SSE_HEAD + chunk(event("a"), event("b")))
        stream_id = c.answer.get("x-stream-id")
        c.reset()
        r.pass_time(2)
        again = r.client(get(f"/v1/streams/{stream_id}", f"Last-Event-ID: {stream_id}:1"))
        assert spans.get_finished_spans() == ()
        ended(r, event("c"))
        assert again.answer.whole
        span = only(spans)
        (detach, left), (resume, back) = events(span)
        assert (detach, resume) == ("detach", "resume")
        assert left == {"streamd.reason": "reader_gone", "streamd.last_seq": 2, "streamd.grace_s": 60}
        assert back == {"streamd.last_seq": 2}
        assert span.events[1].timestamp - span.events[0].timestamp >= 2e9
        assert facts(span)["streamd.reason"] == "complete" and facts(span)["gen_ai.request.stream"] is True


def test_a_generation_that_nobody_waits_for_is_one_span() -> None:
    with rig() as r:
        spans = traced(r)
        c = r.client(post(CHAT, "Prefer: respond-async"))
        assert c.statuses == [202] and spans.get_finished_spans() == ()
        r.reply(SSE_HEAD)
        ended(r, event("a"))
        span = only(spans)
        assert [name for name, _ in events(span)] == ["detach"]
        assert facts(span)["http.response.status_code"] == 200
        assert facts(span)["streamd.response.status_code"] == 202


def test_a_grace_that_ends_is_an_end_of_the_span() -> None:
    with rig() as r:
        spans = traced(r)
        c = r.client(post(CHAT, "X-Stream-Detach-Grace: 5"))
        r.reply(SSE_HEAD + chunk(event("a")))
        c.reset()
        r.pass_time(6)
        span = only(spans)
        assert facts(span)["streamd.reason"] == "abandoned" and "error.type" not in facts(span)


def test_events_that_a_reader_lost_are_a_gap() -> None:
    with rig(ring_bytes_max=1, ring_slots=32) as r:
        spans = traced(r)
        c = r.client(post(CHAT, "X-Stream-Policy: drop_oldest"), capacity=600)
        r.reply(SSE_HEAD + chunk(event("x" * 1000)))
        for k in range(60):
            r.reply(chunk(event(str(k))))
        c.take()
        ended(r)
        c.take()
        lost = sum(int(e) for _, found in events(only(spans)) if (e := found.get("streamd.events")))
        assert [name for name, _ in events(only(spans))] == ["gap"]
        assert lost == r.runtime.counters.dropped_events > 0


def test_another_reader_of_the_stream_has_no_span_but_its_gap_is_told() -> None:
    with rig(ring_bytes_max=1, ring_slots=32) as r:
        spans = traced(r)
        c = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("x" * 1000)))
        path = f"/v1/streams/{c.answer.get('x-stream-id')}"
        slow = r.client(get(path, "X-Stream-Policy: drop_oldest"))
        slow.transport.capacity = 0
        for k in range(60):
            r.reply(chunk(event(str(k))))
        slow.take()
        slow.reset()
        ended(r)
        assert [name for name, _ in events(only(spans))] == ["gap"]


def test_a_stream_that_turns_out_whole_ends_with_its_request() -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(CHAT))
        r.reply(whole_answer(b'{"id": "c9"}', "200 OK", "content-type: application/json"))
        found = facts(only(spans))
        assert found["gen_ai.response.id"] == "c9" and found["streamd.reason"] == "complete"
        assert "gen_ai.request.stream" not in found and r.runtime.tracing is not None and not r.runtime.tracing._live


def test_an_answer_that_is_a_stream_unasked_is_told_as_one() -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(b"{", path="/v1/chat/completions"))
        r.reply(SSE_HEAD)
        ended(r, event("a"))
        assert facts(only(spans))["gen_ai.request.stream"] is True


def test_a_stream_from_before_tracing_is_read_without_a_span() -> None:
    with rig() as r:
        c = r.client(post(CHAT, "X-Stream-Detach-Grace: 60"))
        r.reply(SSE_HEAD + chunk(event("a")))
        stream_id = c.answer.get("x-stream-id")
        c.reset()
        spans = traced(r)
        r.client(get(f"/v1/streams/{stream_id}", f"Last-Event-ID: {stream_id}:1"))
        ended(r, event("b"))
        assert spans.get_finished_spans() == ()


def test_a_repeated_request_joins_and_begins_no_span() -> None:
    with rig() as r:
        spans = traced(r)
        r.client(post(CHAT, "Idempotency-Key: k"))
        r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(SSE_HEAD)
        ended(r, event("a"))
        assert [name for name, _ in events(only(spans))] == ["resume"]


def test_the_log_line_has_the_generations_own_place_in_the_trace() -> None:
    with rig() as r:
        traced(r)
        c = r.client(post(WHOLE, parent()))
        answer = next(iter(r.runtime.clients)).answer  # type: ignore[attr-defined]
        assert answer.request.traceparent == sent(r)[0]
        r.reply(whole_answer(b"{}"))
        assert answer.request.trace is None and c.statuses == [200]


def test_events_are_bounded_and_none_is_kept_of_a_generation_without_a_span() -> None:
    own = TraceParent(1, 2, 1)
    recorded, ids_only = Trace("chat", own, None), Trace("chat", own._replace(flags=0), own)
    for k in range(EVENTS_MAX + 5):
        recorded.note(k, "retry")
        ids_only.note(k, "retry")
    assert len(recorded.events) == EVENTS_MAX and ids_only.events == []
