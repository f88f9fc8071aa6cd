"""llama.cpp's resumable streams: conversations with readers that count bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    WHOLE,
    Answer,
    Client,
    FakePeers,
    Rig,
    chunk,
    event,
    get,
    post,
    rig,
    whole_answer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.api.llama import LOOKUP_MAX, Llama, owner_asked
from streamd.core.stream import CountedStream
from streamd.core.terms import Terms
from streamd.reasons import CloseReason
from streamd.wire.dialect import Dialect

CONVERSATION = "X-Conversation-Id: c"
EVENTS = [event(f"word {k} ") for k in range(30)]
SAID = b"".join(EVENTS)


@contextmanager
def conversing(**settings: Any) -> Iterator[Rig]:
    with rig(**{"retention_s": 20.0, "detach_grace_max_s": 50.0, **settings}) as r:
        yield r
    assert not r.runtime.hub._by_conversation
    assert not r.runtime.hub._conversation_of


def ask(r: Rig, data: bytes) -> Answer:
    return r.client(data).answer


def begun(r: Rig, *fields: str, events: list[bytes] = EVENTS) -> Client:
    """A conversation's generation that has sent all EVENTS and has not ended."""
    asker = r.client(post(CHAT, *(fields or (CONVERSATION,))))
    r.reply(SSE_HEAD + chunk(*events))
    return asker


def finish(r: Rig) -> None:
    r.reply(chunk(DONE) + LAST)


def read(at: int | str, conversation: str = "c") -> bytes:
    return get(f"/v1/stream?conv_id={conversation}&from={at}")


def lookup(r: Rig, *ids: object, fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    answer = ask(r, post({"conversation_ids": list(ids)}, *fields, path="/v1/streams/lookup"))
    assert answer.status == 200
    found: list[dict[str, Any]] = json.loads(answer.body)
    return found


# -- the answer


def test_the_answer_consists_of_the_events_alone() -> None:
    with conversing() as r:
        asker = begun(r)
        r.reply(chunk(b": ping\n\n"))
        r.pass_time(40)  # heartbeats would have come
        finish(r)
        assert asker.answer.body == SAID + DONE
        assert asker.answer.whole
        assert (asker.answer.get("content-type") or "").startswith("text/event-stream")


def test_a_stalled_conversation_is_not_coalesced() -> None:
    with conversing() as r:
        asker = r.client(post(CHAT, CONVERSATION), capacity=1000)
        r.reply(SSE_HEAD)
        for each in EVENTS * 10:
            r.reply(chunk(each))
        asker.take()
        assert asker.answer.body == SAID * 10
        finish(r)


def test_without_the_header_the_answer_is_an_ordinary_stream() -> None:
    with conversing() as r:
        asker = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(*EVENTS, DONE) + LAST)
        assert asker.answer.body.startswith(b"retry: ")
        assert b"id: s_" in asker.answer.body
        assert not isinstance(next(iter(r.runtime.hub)), CountedStream)


def test_the_header_does_not_go_upstream() -> None:
    with conversing() as r:
        begun(r)
        assert b"conversation" not in bytes(r.link.sent).lower()
        finish(r)


def test_an_answer_without_a_stream_passes_unchanged_and_opens_no_conversation() -> None:
    with conversing() as r:
        asker = r.client(post(WHOLE, CONVERSATION))
        r.reply(whole_answer(b'{"ok":1}'))
        assert asker.answer.body == b'{"ok":1}'
        assert lookup(r, "c") == []


def test_a_conversation_read_by_its_stream_id_has_event_ids() -> None:
    with conversing() as r:
        asker = begun(r)
        finish(r)
        own = ask(r, get(f"/v1/streams/{asker.answer.get('x-stream-id')}"))
        assert b"id: s_" in own.body


# -- resuming by bytes


@pytest.mark.parametrize("at", [0, 1, len(EVENTS[0]) - 1, len(EVENTS[0]), len(EVENTS[0]) + 1, 1000, len(SAID)])
def test_a_reader_resumes_at_the_byte_that_it_names(at: int) -> None:
    with conversing() as r:
        begun(r).fin()
        reader = r.client(read(at))
        assert reader.answer.body == SAID[at:]
        r.reply(chunk(event("more")))
        finish(r)
        assert reader.answer.body == (SAID + event("more") + DONE)[at:]
        assert reader.answer.whole
        assert ask(r, read(at)).body == (SAID + event("more") + DONE)[at:]


def test_an_http10_reader_resumes_at_a_byte() -> None:
    with conversing() as r:
        begun(r).fin()
        finish(r)
        client = r.client(get("/v1/stream?conv_id=c&from=100", version="1.0"))
        assert client.answer.body == (SAID + DONE)[100:]


def test_without_a_position_reading_begins_at_the_start() -> None:
    with conversing() as r:
        begun(r)
        finish(r)
        assert ask(r, get("/v1/stream?conv_id=c&from=")).body == SAID + DONE
        assert ask(r, get("/v1/stream?conv_id=c&from=0")).body == SAID + DONE


def test_at_the_end_of_a_finished_conversation_the_answer_is_empty() -> None:
    with conversing() as r:
        begun(r)
        finish(r)
        answer = ask(r, read(len(SAID + DONE)))
        assert (answer.status, answer.body, answer.whole) == (200, b"", True)


def test_a_reader_that_is_cut_100_times_loses_and_repeats_nothing() -> None:
    with conversing() as r:
        reader = r.client(post(CHAT, CONVERSATION))
        r.reply(SSE_HEAD)
        got = b""
        for k, each in enumerate(EVENTS):
            half = each[: 7 * k % len(each)], each[7 * k % len(each) :]
            r.reply(chunk(*filter(None, half)))
            part = reader.answer.body
            part = part[: len(part) - 11 * k % (len(part) + 1)]  # the bytes in flight are lost
            got += part
            reader.reset()
            reader = r.client(read(len(got)))
        finish(r)
        assert got + reader.answer.body == SAID + DONE


@pytest.mark.parametrize("at", ["x", "-1", "1.5", "1e3", "9" * 16])
def test_a_position_that_is_no_number_is_refused(at: str) -> None:
    with conversing() as r:
        begun(r)
        answer = ask(r, read(at))
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "bad_from", "from")
        finish(r)


def test_a_position_beyond_the_last_byte_is_refused() -> None:
    with conversing() as r:
        begun(r)
        assert ask(r, read(len(SAID) + 1)).error["code"] == "position_not_reached"
        finish(r)
        answer = ask(r, read(len(SAID + DONE) + 1))
        assert (answer.status, answer.error["code"]) == (400, "position_not_reached")


def test_a_position_that_has_left_the_log_is_refused() -> None:
    with conversing(log_events_max=128) as r:
        events = [event(f"{k} ") for k in range(3000)]
        begun(r, events=events).fin()
        finish(r)
        whole = b"".join(events) + DONE
        answer = ask(r, read(100))
        assert (answer.status, answer.error["code"]) == (400, "position_lost")
        assert ask(r, read(len(whole) - 5000)).body == whole[-5000:]


def test_a_reader_whose_next_byte_has_left_the_log_is_cut_off_and_then_refused() -> None:
    with conversing(log_events_max=128) as r:
        events = [event(f"{k} ") for k in range(4000)]
        slow = r.client(post(CHAT, CONVERSATION), capacity=2000)
        r.reply(SSE_HEAD)
        for start in range(0, len(events), 50):
            r.reply(chunk(*events[start : start + 50]))
        slow.take()
        assert slow.gone
        assert not slow.answer.whole
        assert b"gap" not in slow.answer.body
        assert b"".join(events).startswith(slow.answer.body)
        assert ask(r, read(len(slow.answer.body))).error["code"] == "position_lost"
        finish(r)


def test_the_error_event_of_a_broken_upstream_counts_among_the_bytes() -> None:
    with conversing() as r:
        reader = begun(r)
        r.link.reset()
        r.turn()
        body = reader.answer.body
        assert body.startswith(SAID)
        assert json.loads(body[len(SAID) :].removeprefix(b"data: "))["error"]["code"] == "upstream_truncated"
        assert not reader.answer.whole
        assert ask(r, read(len(SAID))).body == body[len(SAID) :]


# -- how long the generation goes on


def test_without_readers_a_conversation_goes_on_for_the_largest_grace() -> None:
    with conversing() as r:
        begun(r).fin()
        r.pass_time(49)
        assert not r.link.closed
        back = r.client(read(0))
        for _ in range(4):
            r.reply(chunk(event("more")))
            r.pass_time(25)
        back.fin()
        r.pass_time(49)
        assert not r.link.closed
        r.pass_time(2)
        assert r.link.closed


def test_a_conversation_may_ask_for_a_shorter_grace() -> None:
    with conversing() as r:
        begun(r, CONVERSATION, "X-Stream-Detach-Grace: 5").fin()
        r.pass_time(6)
        assert r.link.closed


def test_a_conversation_id_that_is_sent_again_cancels_its_running_generation() -> None:
    with conversing() as r:
        first = begun(r)
        old, old_link = next(iter(r.runtime.hub)), r.link
        second = r.client(post(CHAT, CONVERSATION))
        assert old.reason is CloseReason.CANCELLED
        assert old_link.closed
        assert not first.answer.whole
        r.reply(SSE_HEAD + chunk(event("new"), DONE) + LAST)
        assert second.answer.body == event("new") + DONE
        assert ask(r, read(0)).body == event("new") + DONE


def test_a_conversation_id_that_is_sent_again_before_the_first_byte_cancels_too() -> None:
    with conversing() as r:
        first = r.client(post(CHAT, CONVERSATION))
        second = r.client(post(CHAT, CONVERSATION))
        assert (first.answer.status, first.answer.error["code"]) == (409, "cancelled")
        r.reply(SSE_HEAD + chunk(DONE) + LAST)
        assert second.answer.body == DONE


def test_a_failed_request_leaves_no_conversation_behind() -> None:
    with conversing() as r:
        refused = r.client(post(CHAT, CONVERSATION))
        r.reply(whole_answer(b'{"error":{}}', "400 Bad Request"))
        assert refused.answer.status == 400
        assert lookup(r, "c") == []
        assert ask(r, read(0)).status == 404


def test_respond_async_starts_a_conversation_without_a_reader() -> None:
    with conversing() as r:
        assert ask(r, post(CHAT, CONVERSATION, "Prefer: respond-async")).status == 202
        r.reply(SSE_HEAD + chunk(*EVENTS, DONE) + LAST)
        assert ask(r, read(5)).body == (SAID + DONE)[5:]


def test_a_retry_with_the_same_idempotency_key_is_raw_too() -> None:
    with conversing() as r:
        fields = (CONVERSATION, "Idempotency-Key: k")
        begun(r, *fields).fin()
        again = r.client(post(CHAT, *fields))
        finish(r)
        assert again.answer.body == SAID + DONE
        assert len(r.links) == 1


# -- stop


def test_a_stop_cancels_the_generation_and_forgets_the_conversation() -> None:
    with conversing() as r:
        reader = begun(r)
        stop = get("/v1/stream?conv_id=c", method="DELETE")
        assert ask(r, stop).status == 204
        assert r.link.closed
        assert not reader.answer.whole
        assert lookup(r, "c") == []
        assert ask(r, read(0)).status == 404
        assert ask(r, stop).status == 204  # a second stop is no error


def test_a_stop_of_a_finished_conversation_forgets_it() -> None:
    with conversing() as r:
        begun(r)
        finish(r)
        assert ask(r, get("/v1/stream?conv_id=c", method="DELETE")).status == 204
        assert not tuple(r.runtime.hub)


# -- lookup


def test_a_lookup_returns_the_state_of_each_known_conversation() -> None:
    with conversing() as r:
        began = r.runtime.unix_time()
        for name in ("c", "c::org/model", "c::other", "cc", "d"):
            begun(r, f"X-Conversation-Id: {name}")
        finish(r)
        ids = [each["conversation_id"] for each in lookup(r, "d", "c", "nobody", "c", 7)]
        assert ids == ["d", "c", "c::org/model", "c::other"]
        (done,), (running,) = lookup(r, "d"), lookup(r, "cc")
        assert (done["is_done"], done["total_bytes"]) == (True, len(SAID + DONE))
        assert (running["is_done"], running["total_bytes"], running["completed_at"]) == (False, len(SAID), 0)
        assert abs(done["completed_at"] - began) < 60
        assert abs(running["started_at"] - began) < 60
        assert [each["conversation_id"] for each in lookup(r, "c::other")] == ["c::other"]
        for link in r.links[:4]:
            link.feed(chunk(DONE) + LAST)


def named(r: Rig, names: Iterable[str]) -> None:
    """Finished conversations of these names, without their bytes."""
    for name in names:
        stream = r.runtime.hub.open_conversation(
            Dialect.CHAT, r.runtime.time(), conversation=name, terms=Terms(owner="anonymous", retention_s=20.0)
        )
        stream.seal(CloseReason.COMPLETE, r.runtime.time(), clean=True)


def told(r: Rig, *ids: str) -> list[str]:
    return [each["conversation_id"] for each in lookup(r, *ids)]


def test_a_lookup_tells_each_conversation_once_however_many_names_find_it() -> None:
    names = [
        *("::" * 200 + f"{k:03d}" for k in range(50)),
        "a",
        "a::b",
        "a::b::c",
        "a::b!",
        "a!",
        "ab",
        "a:::b",
        "b::c",
    ]
    with conversing() as r:
        named(r, names)
        assert sorted(told(r, *("::" * k for k in range(1, 200)))) == sorted(names[:50])
        for asked in (("a", "a::b", "a::b::c"), ("a::b::c", "a", "a::b"), ("a::b", "a")):
            assert sorted(told(r, *asked)) == ["a", "a:::b", "a::b", "a::b!", "a::b::c"]
        assert told(r, "a::b") == ["a::b", "a::b::c"]
        assert told(r, "a:", "a\0b", "a::", ":b") == []
        assert told(r, "b", "a!", "nobody") == ["b::c", "a!"]
        r.pass_time(21)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab:", min_size=1, max_size=7), max_size=12, unique=True),
    st.lists(st.text("ab:", min_size=1, max_size=7), max_size=8),
)
def test_a_lookup_finds_what_each_name_finds_by_itself(names: list[str], asked: list[str]) -> None:
    with conversing() as r:
        named(r, names)
        parts = [name.split("::") for name in asked]
        wanted = [name for name in names if any(name.split("::")[: len(each)] == each for each in parts)]
        assert sorted(told(r, *asked)) == sorted(wanted)
        r.pass_time(21)


def test_a_lookup_of_very_many_is_refused_and_says_so() -> None:
    with conversing() as r:
        assert lookup(r, *(f"n{k}" for k in range(LOOKUP_MAX))) == []
        named(r, (f"c::{k}" for k in range(LOOKUP_MAX)))
        assert len(lookup(r, "c")) == LOOKUP_MAX
        named(r, ["c"])
        for ids in (["c"], [f"n{k}" for k in range(LOOKUP_MAX + 1)]):
            answer = ask(r, post({"conversation_ids": ids}, path="/v1/streams/lookup"))
            assert (answer.status, answer.error["code"]) == (413, "too_many_found")
        r.pass_time(21)


def test_of_the_names_in_a_lookup_each_worker_is_asked_for_its_own() -> None:
    with conversing() as r:
        named(r, ["c", "c::x"])
        there = FakePeers(r, "d", "e")
        client = r.client(post({"conversation_ids": ["d::y", "c", "e"]}, path="/v1/streams/lookup"))
        ((kind, questions, over),) = there.asked
        assert (kind, {slot: json.loads(each) for slot, each in questions.items()}) == (
            "/v1/streams/lookup",
            {1: ["anonymous", ["d::y", "e"]]},
        )
        assert client.answers == []
        over({1: json.dumps({"e": [{"conversation_id": "e"}], "d::y": [{"conversation_id": "d::y"}]}).encode()})
        r.turn()
        assert [each["conversation_id"] for each in json.loads(client.answer.body)] == ["d::y", "c", "c::x", "e"]
        r.pass_time(21)


def test_a_lookup_that_another_worker_does_not_answer_is_refused() -> None:
    with conversing() as r:
        there = FakePeers(r, "d")
        client = r.client(post({"conversation_ids": ["d"]}, path="/v1/streams/lookup"))
        there.asked[0][2]({})
        r.turn()
        assert (client.answer.status, client.answer.error["code"]) == (503, "worker_busy")


def test_another_workers_lookup_is_answered_with_the_conversations_that_live_here() -> None:
    with conversing() as r:
        named(r, ["c", "c::x", "d"])
        llama = Llama(r.runtime, r.worker.router._streams, r.worker.router._rights)
        found = json.loads(llama.answer_lookup(json.dumps(["anonymous", ["c", "nobody"]]).encode()))
        assert {name: [each["conversation_id"] for each in states] for name, states in found.items()} == {
            "c": ["c", "c::x"],
            "nobody": [],
        }
        assert json.loads(llama.answer_lookup(json.dumps(["alice", ["c"]]).encode())) == {"c": []}
        r.pass_time(21)


def test_the_worker_of_a_conversation_serves_all_its_variants_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[int | None] = []

    def spied(peers: Any, request: Any) -> None:
        owners.append(owner_asked(peers, request))

    monkeypatch.setattr("streamd.api.llama.owner_asked", spied)
    requests = {
        post(CHAT, "X-Conversation-Id: theirs::model"): 1,
        post(CHAT, "X-Conversation-Id: c"): 0,
        post(CHAT): None,
        get("/v1/stream?conv_id=theirs&from=3"): 1,
        get("/v1/stream", method="DELETE"): 0,
        get("/v1/models", "X-Conversation-Id: theirs"): None,
    }
    with conversing() as r:
        FakePeers(r, "theirs")
        for data in requests:
            r.client(data)
        assert owners == list(requests.values())


@pytest.mark.parametrize("over", [False, True])
def test_a_look_for_a_running_answer_is_204_unless_it_runs(over: bool) -> None:
    with conversing() as r:
        look = get("/v1/stream?conv_id=c")
        assert (ask(r, look).status, ask(r, get("/v1/stream?conv_id=nobody")).status) == (204, 204)
        begun(r)
        if over:
            finish(r)
            assert ask(r, look).status == 204
            return
        reader = r.client(look)
        finish(r)
        assert reader.answer.body == SAID + DONE


def test_after_its_retention_a_conversation_is_forgotten() -> None:
    with conversing() as r:
        begun(r)
        finish(r)
        r.pass_time(21)
        assert lookup(r, "c") == []
        assert ask(r, read(0)).status == 404


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"conversation_ids": "c"}', b'{"conversation_ids": []}'])
def test_a_lookup_without_ids_returns_an_empty_list(body: bytes) -> None:
    with conversing() as r:
        begun(r)
        assert json.loads(ask(r, post(body, path="/v1/streams/lookup")).body) == []
        finish(r)


def test_a_lookup_whose_body_is_no_json_is_refused() -> None:
    with conversing() as r:
        answer = ask(r, post(b"{", path="/v1/streams/lookup"))
        assert (answer.status, answer.error["code"]) == (400, "bad_json")


# -- ids


def test_each_principal_has_its_own_conversations() -> None:
    with conversing() as r:
        mine, theirs = "Authorization: Bearer x", "Authorization: Bearer y"
        begun(r, CONVERSATION, mine)
        assert lookup(r, "c", fields=(theirs,)) == []
        assert ask(r, get("/v1/stream?conv_id=c&from=0", theirs)).status == 404
        assert ask(r, get("/v1/stream?conv_id=c", theirs, method="DELETE")).status == 204
        begun(r, CONVERSATION, theirs)
        assert [len(lookup(r, "c", fields=(who,))) for who in (mine, theirs)] == [1, 1]
        for link in r.links:
            link.feed(chunk(DONE) + LAST)


def test_a_conversation_id_may_have_any_characters() -> None:
    with conversing() as r:
        name = "chat é::org/model & more"
        begun(r, f"X-Conversation-Id: {name.encode().decode('latin-1')}".encode("latin-1").decode())
        finish(r)
        assert [each["conversation_id"] for each in lookup(r, name)] == [name]
        quoted = "chat%20%C3%A9%3A%3Aorg%2Fmodel%20%26%20more"
        assert ask(r, read(0, quoted)).body == SAID + DONE


@pytest.mark.parametrize("name", ["x" * 513, "%F0%9F%99%82" * 129])
def test_a_conversation_id_that_is_too_long_is_refused(name: str) -> None:
    with conversing() as r:
        answer = ask(r, read(0, name))
        assert (answer.status, answer.error["code"]) == (400, "bad_conversation")


def test_a_conversation_id_that_is_no_utf_8_is_refused() -> None:
    with conversing() as r:
        answer = ask(r, post(CHAT, "X-Conversation-Id: name").replace(b": name", b": \xff"))
        assert (answer.status, answer.error["code"], answer.error["param"]) == (
            400,
            "bad_conversation",
            "x-conversation-id",
        )


def test_a_read_without_a_conversation_id_is_refused() -> None:
    with conversing() as r:
        for method in ("GET", "DELETE"):
            answer = ask(r, get("/v1/stream", method=method))
            assert (answer.status, answer.error["code"]) == (400, "no_conversation")
        assert ask(r, post(CHAT, "X-Conversation-Id: " + "x" * 600)).error["code"] == "bad_conversation"
        assert ask(r, get("/v1/stream/c")).status == 404
        assert ask(r, get("/v1/stream", "Content-Length: 0", method="POST")).get("allow") == "GET, DELETE, HEAD"
