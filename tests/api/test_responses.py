"""OpenAI Responses resumed its own way: by the response's id and a sequence_number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import LAST, SSE_HEAD, Answer, Client, FakePeers, Rig, chunk, events_in, get, post, rig, whole_answer
from hypothesis import given
from hypothesis import strategies as st
from sinks import new_stream

from streamd.api.responses import FORGOTTEN, LEARNED, ResponsesRoute, _seq_after
from streamd.core.auth import ANONYMOUS
from streamd.net.http_error import HttpError
from streamd.net.peers import Note
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

ASK = {"model": "m", "stream": True, "input": "Hello"}
ID = "resp_1"


@contextmanager
def responding(**settings: Any) -> Iterator[Rig]:
    with rig(**{"retention_s": 20.0, "detach_grace_max_s": 50.0, **settings}) as r:
        yield r


def named(kind: str, number: int | None, **members: Any) -> bytes:
    body = {"type": kind} | ({} if number is None else {"sequence_number": number}) | members
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps(body).encode())


def created(number: int | None = 0, response_id: str = ID) -> bytes:
    return named("response.created", number, response={"id": response_id})


def delta(number: int | None, text: str = "") -> bytes:
    body = {"item_id": "i", "output_index": 0, "content_index": 0, "delta": text or f"{number} ", "logprobs": []}
    return named("response.output_text.delta", number, **body)


def completed(number: int | None) -> bytes:
    return named("response.completed", number, response={"id": ID})


def begun(r: Rig, count: int = 20, *fields: str) -> Client:
    """A response with `count` deltas, numbered from 1."""
    asker = r.client(post(ASK, *fields, path="/v1/responses"))
    r.reply(SSE_HEAD + chunk(created(), *(delta(k) for k in range(1, count + 1))))
    return asker


def finish(r: Rig, number: int = 21) -> None:
    r.reply(chunk(completed(number)) + LAST)


def read(query: str = "", *fields: str, response_id: str = ID, method: str = "GET") -> bytes:
    return get(f"/v1/responses/{response_id}?stream=true{query}", *fields, method=method)


def ask(r: Rig, data: bytes) -> Answer:
    return r.client(data).answer


def numbers(answer: Answer) -> list[int]:
    """The numbers in the events' texts: each text is its event's number."""
    said: list[int] = []
    for each in events_in(answer.body):
        said += map(int, each.json["delta"].split()) if "delta" in each.json else [each.json["sequence_number"]]
    return said


# -- responses that streamd serves


@pytest.mark.parametrize(("query", "first"), [("", 0), ("&starting_after=0", 1), ("&starting_after=7", 8)])
def test_the_events_with_a_greater_number_follow_starting_after(query: str, first: int) -> None:
    with responding() as r:
        begun(r)
        reader = r.client(read(query))
        assert numbers(reader.answer) == list(range(first, 21))
        r.reply(chunk(delta(21)))
        finish(r, 22)
        assert numbers(reader.answer) == list(range(first, 23))
        assert reader.answer.whole
        assert len(r.links) == 1


def test_a_sequence_number_differs_from_the_seq() -> None:
    with responding() as r:
        begun(r)
        finish(r)
        first = events_in(ask(r, read("&starting_after=19")).body)[0]
        assert (first.json["sequence_number"], first.seq) == (20, 21)


def test_a_catch_up_is_coalesced_and_its_number_is_the_last() -> None:
    with responding() as r:
        begun(r)
        finish(r)
        merged, last = events_in(ask(r, read("&starting_after=3")).body)
        assert merged.json["sequence_number"] == 20
        assert merged.json["delta"].split() == [str(k) for k in range(4, 21)]
        assert last.json["sequence_number"] == 21


def test_a_reader_that_has_the_last_event_gets_an_empty_answer() -> None:
    with responding() as r:
        begun(r)
        finish(r)
        answer = ask(r, read("&starting_after=21"))
        assert (answer.status, answer.body.count(b"data:"), answer.whole) == (200, 0, True)


def test_a_reader_at_the_live_end_gets_the_next_events() -> None:
    with responding() as r:
        begun(r)
        reader = r.client(read("&starting_after=20"))
        assert numbers(reader.answer) == []
        finish(r)
        assert numbers(reader.answer) == [21]


def test_a_sequence_number_beyond_the_last_is_refused() -> None:
    with responding() as r:
        begun(r)
        answer = ask(r, read("&starting_after=21"))
        assert (answer.status, answer.error["code"]) == (400, "position_not_reached")
        finish(r)
        assert ask(r, read("&starting_after=99")).status == 200


@pytest.mark.parametrize("value", ["-1", "x", "1.5", ""])
def test_a_starting_after_that_is_no_number_is_refused(value: str) -> None:
    with responding() as r:
        begun(r)
        answer = ask(r, read(f"&starting_after={value}"))
        assert (answer.status, answer.error["param"]) == (400, "starting_after")
        finish(r)


def test_events_that_have_left_the_log_are_a_gap() -> None:
    with responding(log_events_max=128) as r:
        begun(r, 2000)
        stream = next(iter(r.runtime.hub))
        finish(r, 2001)
        first = stream.log.seq_first
        gap, *rest = events_in(ask(r, read("&starting_after=10")).body)
        assert gap.json["gap"] == {"from": 12, "to": first - 1}  # number 11 is seq 12
        assert rest[0].json["delta"].split()[0] == str(first - 1)


def test_unnumbered_responses_can_be_read_but_not_resumed_by_number() -> None:
    with responding() as r:
        r.client(post(ASK, path="/v1/responses"))
        r.reply(SSE_HEAD + chunk(created(None), delta(None, "a"), delta(None, "b"), completed(None)) + LAST)
        answer = ask(r, read("&starting_after=1"))
        assert (answer.status, answer.error["code"]) == (400, "no_sequence_numbers")
        assert len(events_in(ask(r, read()).body)) == 3


def test_a_read_response_names_its_stream_and_upstream_and_answers_head() -> None:
    with responding() as r:
        asker = begun(r)
        answer = ask(r, read())
        assert answer.get("x-stream-id") == asker.answer.get("x-stream-id")
        assert answer.get("x-upstream") == "up"
        head = r.client(read(method="HEAD"))
        assert head.raw.startswith(b"HTTP/1.1 200 ")
        assert len(r.links) == 1
        finish(r)


def test_a_reader_that_was_cut_keeps_its_generation() -> None:
    with responding() as r:
        begun(r).reset(TimeoutError("timed out"))
        reader = r.client(read("&starting_after=5"))
        finish(r)
        assert numbers(reader.answer) == list(range(6, 22))


# -- responses that go upstream


def passed_on(r: Rig, data: bytes) -> bytes:
    """The request as the upstream got it; the upstream answers 404."""
    asked = len(r.links)
    client = r.client(data)
    assert len(r.links) == asked + 1
    seen = bytes(r.link.sent)
    r.reply(whole_answer(b'{"error":{"code":"not_found"}}', "404 Not Found"))
    assert client.answer.status == 404
    return seen


def test_an_id_that_is_not_known_goes_upstream() -> None:
    with responding() as r:
        seen = passed_on(r, read("&starting_after=3", response_id="resp_2"))
        assert seen.startswith(b"GET /v1/responses/resp_2?stream=true&starting_after=3 HTTP/1.1\r\n")


@pytest.mark.parametrize("query", ["", "?stream=false", "?include=x"])
def test_reading_a_response_as_an_object_goes_upstream(query: str) -> None:
    with responding() as r:
        begun(r)
        finish(r)
        r.pass_time(5)  # the pooled connection is not used again
        passed_on(r, get(f"/v1/responses/{ID}{query}"))


def test_cancelling_a_response_goes_upstream() -> None:
    with responding() as r:
        begun(r)
        seen = passed_on(r, get(f"/v1/responses/{ID}/cancel", "Content-Length: 0", method="POST"))
        assert seen.startswith(b"POST /v1/responses/resp_1/cancel HTTP/1.1\r\n")
        r.links[0].feed(chunk(completed(21)) + LAST)


def test_the_response_of_another_principal_is_not_there() -> None:
    with responding() as r:
        begun(r, 20, "Authorization: Bearer x")
        assert r.client(read("", "Authorization: Bearer y")).answer.status == 404 and len(r.links) == 1
        assert numbers(ask(r, read("", "Authorization: Bearer x")))[0] == 0
        r.links[0].feed(chunk(completed(21)) + LAST)


def test_a_response_that_ended_without_readers_goes_upstream() -> None:
    with responding() as r:
        begun(r).fin()
        assert next(iter(r.runtime.hub)).reason is CloseReason.READER_GONE
        passed_on(r, read("&starting_after=5"))


def test_a_response_that_broke_off_is_served_up_to_its_error() -> None:
    with responding() as r:
        begun(r)
        r.link.reset()
        r.turn()
        answer = ask(r, read("&starting_after=18"))
        events = events_in(answer.body)
        assert events[-1].name == "error"
        assert events[-1].json["sequence_number"] == 21
        assert not answer.whole


def test_after_its_retention_a_response_goes_upstream() -> None:
    with responding() as r:
        begun(r)
        finish(r)
        r.pass_time(21)
        passed_on(r, read())


def test_a_response_that_is_over_when_its_request_is_served_is_not_found() -> None:
    with responding() as r:
        begun(r)
        finish(r)
        answer: Any = SimpleNamespace(request=SimpleNamespace(path="/v1/responses/resp_2", principal=ANONYMOUS))
        with pytest.raises(HttpError, match="not known any more") as refused:
            r.worker.responses.read(answer)
        assert refused.value.status == 404


# -- an EventSource


def test_an_eventsource_comes_back_with_its_last_event_id_and_gets_204_at_the_end() -> None:
    with responding() as r:
        begun(r)
        events = "Accept: text/event-stream"
        source = r.client(read("&starting_after=2", events))
        seen = events_in(source.answer.body)
        assert seen[0].json["sequence_number"] >= 3
        source.reset(TimeoutError("timed out"))
        back = r.client(read("&starting_after=2", events, f"Last-Event-ID: {seen[-1].id}"))
        finish(r)
        assert numbers(back.answer) == [21]
        last = events_in(back.answer.body)[-1].id
        assert ask(r, read("&starting_after=2", events, f"Last-Event-ID: {last}")).status == 204


# -- several workers


def test_the_other_workers_learn_of_a_response_and_of_its_end() -> None:
    with responding() as r:
        there = FakePeers(r)
        begun(r)
        finish(r)
        of_it = json.dumps(["anonymous", ID], separators=(",", ":")).encode()
        assert (1, LEARNED, of_it) in there.told
        there.told.clear()
        r.client(post(ASK, path="/v1/responses"))  # ends before it has an id
        r.reply(SSE_HEAD + chunk(b'data: {"type":"error","message":"full"}\n\n') + LAST)
        r.pass_time(21)
        assert [each for each in there.told if each[1] in (LEARNED, FORGOTTEN)] == [(1, FORGOTTEN, of_it)]


def note(kind: str, slot: int = 1, response_id: str = "resp_2", principal_id: str = "anonymous") -> Note:
    return Note(slot, kind, json.dumps([principal_id, response_id]).encode())


def owner(r: Rig, monkeypatch: pytest.MonkeyPatch, data: bytes) -> int | None:
    """The worker that a request belongs to, as this worker knows it."""
    found: list[int | None] = []
    real = ResponsesRoute.owner

    def spied(self: ResponsesRoute, request: Any) -> None:
        found.append(real(self, request))

    with monkeypatch.context() as patch:
        patch.setattr(ResponsesRoute, "owner", spied)
        r.client(data).reset()
    return found[0]


def test_a_read_belongs_to_the_worker_that_learned_of_the_response_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with responding() as r:
        FakePeers(r)
        route, asked = r.worker.responses, read(response_id="resp_2")
        assert owner(r, monkeypatch, asked) is None
        assert route.take(note(LEARNED))
        assert owner(r, monkeypatch, asked) == 1
        assert owner(r, monkeypatch, get("/v1/responses/resp_2")) is None, "as an object it is the upstream's"
        assert route.take(note(LEARNED, slot=2)) and route.take(note(FORGOTTEN, slot=1))
        assert owner(r, monkeypatch, asked) == 2, "the later request of that id runs there"
        assert route.take(note(FORGOTTEN, slot=2)) and route.take(note(FORGOTTEN, slot=2))
        assert owner(r, monkeypatch, asked) is None
        assert route.take(note(LEARNED, principal_id="alice"))
        assert owner(r, monkeypatch, asked) is None, "it is another principal's"
        assert not route.take(note("another kind"))


def test_the_responses_of_other_workers_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with responding() as r:
        route = r.worker.responses
        monkeypatch.setattr("streamd.api.responses.ELSEWHERE_MAX", 2)
        for name in ("resp_2", "resp_3", "resp_2", "resp_4"):
            route.take(note(LEARNED, response_id=name))
        assert [response_id for _, response_id in route._elsewhere] == ["resp_2", "resp_4"]


# -- the search


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=60),
    st.integers(0, 5),
    st.integers(0, 200),
)
def test_the_event_after_a_number_is_found_in_any_numbering(
    steps: list[tuple[int, bool]], first: int, after: int
) -> None:
    """Numbers grow by any step, and some events are without a number (never many in a row)."""
    stream = new_stream(dialect=Dialect.RESPONSES)
    shown: list[int | None] = []
    number = first
    for k, (step, numbered) in enumerate([(0, True), *steps]):
        number += step
        shown.append(number if numbered or k % 5 == 0 else None)
        stream.append(delta(shown[-1], "x"), 1.0)
    expected = next((k for k, each in enumerate(shown) if each is not None and each > after), None)
    last = max(each for each in shown if each is not None)
    if after > last:
        with pytest.raises(HttpError, match="has not got as far"):
            _seq_after(stream, after)
        stream.seal(CloseReason.COMPLETE, 1.0, clean=True)
    seq = _seq_after(stream, after)
    if expected is None:
        assert all(each is None for each in shown[seq - 1 :])
    else:
        assert seq <= expected + 1
        assert all(each is None for each in shown[seq - 1 : expected])
