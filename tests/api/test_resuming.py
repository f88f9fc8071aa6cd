"""The position that a reader comes back with, in every spelling, on every route that resumes."""

from __future__ import annotations

import json

import pytest
from fakes import DONE, LAST, SSE_HEAD, Answer, Rig, chunk, event, events_in, get, post, rig, whole_answer

EVENTS = "Accept: text/event-stream"
RESPONSE = "/v1/responses/resp_1?stream=true"

# How clients say it: a field of the head, or a parameter of the query.
FIELDS = ["Last-Event-ID", "last-event-id"]
PARAMETERS = [
    *("last_event_id", "lastEventId", "last-event-id", "Last-Event-ID", "Last-Event-Id", "lastEventID", "LastEventID"),
    *("lasteventid", "evs_last_event_id", "last%5Fevent%5fid"),
]


def typed(kind: str, number: int, **members: object) -> bytes:
    body = json.dumps({"type": kind, "sequence_number": number, **members})
    return f"event: {kind}\ndata: {body}\n\n".encode()


ANSWERS = {
    "/v1/chat/completions": [event("a"), event("b"), event("c"), DONE],
    "/v1/responses": [
        typed("response.created", 0, response={"id": "resp_1"}),
        typed("response.output_text.delta", 1, delta="a", item_id="i"),
        typed("response.output_text.delta", 2, delta="b", item_id="j"),
        typed("response.completed", 3, response={"id": "resp_1"}),
    ],
}


def finished(r: Rig, path: str, *fields: str) -> str:
    """A finished stream of four events; returns its id."""
    asker = r.client(post({"model": "m", "stream": True}, *fields, path=path))
    r.reply(SSE_HEAD + chunk(*ANSWERS[path]) + LAST)
    return asker.answer.get("x-stream-id") or ""


def ask(r: Rig, data: bytes) -> Answer:
    return r.client(data).answer


def resumed_at(answer: Answer) -> tuple[int, list[int]]:
    return answer.status, [each.seq for each in events_in(answer.body)]


ROUTES = [
    ("/v1/chat/completions", "GET", "/v1/streams/{}"),
    ("/v1/chat/completions", "POST", "/v1/chat/completions"),
    ("/v1/responses", "GET", "/v1/streams/{}"),
    ("/v1/responses", "GET", RESPONSE),
    ("/v1/responses", "GET", f"{RESPONSE}&starting_after=0"),
    ("/v1/responses", "GET", f"{RESPONSE}&starting_after=3"),
    ("/v1/responses", "POST", "/v1/responses"),
]


@pytest.mark.parametrize(("path", "method", "route"), ROUTES)
@pytest.mark.parametrize("where", [*(("field", name) for name in FIELDS), *(("query", name) for name in PARAMETERS)])
def test_a_reader_goes_on_after_its_last_event_and_is_told_the_end(
    where: tuple[str, str], path: str, method: str, route: str
) -> None:
    with rig() as r:
        stream_id = finished(r, path)
        for seq, expected in [(2, (200, [3, 4])), (4, (204, []))]:
            fields, target = [EVENTS], route.format(stream_id)
            position = f"{stream_id}:{seq}"
            if where[0] == "field":
                fields.append(f"{where[1]}: {position}")
            else:
                target += f"{'&' if '?' in target else '?'}{where[1]}={position}"
            request = post({"model": "m", "stream": True}, *fields, path=target)
            assert resumed_at(ask(r, request if method == "POST" else get(target, *fields))) == expected
        assert len(r.links) == 1, "no second generation"


def test_the_header_is_newer_than_the_query_and_a_polyfills_parameter_comes_last() -> None:
    with rig() as r:
        stream_id = finished(r, "/v1/chat/completions")
        path = f"/v1/streams/{stream_id}?last_event_id={stream_id}:1"
        assert resumed_at(ask(r, get(path, f"Last-Event-ID: {stream_id}:3"))) == (200, [4])
        assert resumed_at(ask(r, get(f"{path}&lastEventId={stream_id}:3"))) == (200, [4])
        assert resumed_at(ask(r, get(f"{path}&lastEventId=", "Last-Event-ID: "))) == (200, [3, 4])


def test_an_event_source_on_a_response_is_told_the_end_and_an_sdk_gets_a_stream_without_events() -> None:
    with rig() as r:
        finished(r, "/v1/responses")
        at_the_end = f"{RESPONSE}&starting_after=3"
        assert ask(r, get(at_the_end, EVENTS)).status == 204
        answer = ask(r, get(at_the_end, "Accept: application/json"))
        assert (answer.status, answer.whole, events_in(answer.body)) == (200, True, [])


def test_a_position_of_another_stream_is_refused_on_a_response() -> None:
    with rig() as r:
        other = finished(r, "/v1/chat/completions")
        finished(r, "/v1/responses")
        answer = ask(r, get(RESPONSE, f"Last-Event-ID: {other}:1"))
        assert (answer.status, answer.error["code"]) == (400, "wrong_stream")


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_position_does_not_go_upstream_where_it_is_streamds(parameter: str) -> None:
    with rig() as r:
        stream_id = finished(r, "/v1/chat/completions")
        r.client(get(f"/v1/chat/completions/c1?{parameter}={stream_id}:4&x=1", f"Last-Event-ID: {stream_id}:4"))
        sent = bytes(r.link.sent).rpartition(b"GET ")[2]
        assert sent.startswith(b"/v1/chat/completions/c1?x=1 ") and b"last-event-id" not in sent.lower()
        r.reply(whole_answer(b"{}"))


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("position", ["17", "stream-1:abcdef:17", "0c9b_177", "a b"])
def test_on_a_route_of_no_known_dialect_a_foreign_position_goes_upstream(method: str, position: str) -> None:
    with rig() as r:
        target = "/v1/mcp?lastEventId=3"
        client = r.client(get(target, f"Last-Event-ID: {position}", method=method))
        sent = bytes(r.link.sent)
        assert sent.startswith(f"{method} {target} ".encode()) and f"last-event-id: {position}\r\n".encode() in sent
        r.reply(whole_answer(b"{}"))
        assert client.answer.status == 200


def test_a_get_of_no_known_dialect_goes_on_with_its_stream_as_long_as_that_has_more() -> None:
    with rig() as r:
        reader = r.client(get("/v1/feed", EVENTS))
        r.reply(SSE_HEAD + chunk(b"data: 1\n\n", b"data: 2\n\n"))
        stream_id = reader.answer.get("x-stream-id")
        again = r.client(get("/v1/feed", EVENTS, f"Last-Event-ID: {stream_id}:1"))
        r.reply(chunk(b"data: 3\n\n") + LAST)
        assert resumed_at(again.answer) == (200, [2, 3])
        r.client(get("/v1/feed", EVENTS, f"Last-Event-ID: {stream_id}:3"))
        sent = bytes(r.link.sent).rpartition(b"GET ")[2]
        assert sent.startswith(b"/v1/feed ") and b"last-event-id" not in sent
        r.reply(SSE_HEAD + LAST)


@pytest.mark.parametrize("conversation", ["c", "unknown"])
def test_a_resume_without_a_byte_gets_204_when_no_answer_of_the_conversation_runs(conversation: str) -> None:
    with rig(detach_grace_max_s=50.0) as r:
        asker = r.client(post({"model": "m", "stream": True}, "X-Conversation-Id: c"))
        r.reply(SSE_HEAD + chunk(event("a")))
        reader = r.client(get(f"/v1/stream?conv_id={conversation}"))
        if conversation == "c":
            assert reader.answer.status == 200 and reader.answer.body == event("a")
        r.reply(chunk(DONE) + LAST)
        assert asker.answer.whole
        over = r.client(get(f"/v1/stream?conv_id={conversation}"))
        assert (over.answer.status, over.answer.body) == (204, b"")
