"""Cut off and resumed, joined, abandoned, stopped, too slow: every reader gets exactly the stream, or an error."""

from __future__ import annotations

import json

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Read, Rig, chunk, event, events_in, get, post, rig, text_of
from hypothesis import given
from hypothesis import strategies as st
from loopback import Conn, Daemon, run, serving

from streamd.mockllm import MockOptions
from streamd.net.client import BROKEN_END_S
from streamd.policy import Policy
from streamd.reasons import CloseReason

GRACE = "X-Stream-Detach-Grace: 60"
WORDS = [f"word{n} " for n in range(30)]
EVENTS = [*map(event, WORDS), DONE]


class ResumingReader:
    """A reader over several connections that resumes after the last whole event, as an EventSource does."""

    def __init__(self, rig: Rig, *fields: str) -> None:
        self.rig = rig
        self.client = rig.client(post(CHAT, GRACE, *fields))
        self.events: list[Read] = []
        self.last_id = ""
        self.stream_id = ""

    def note(self) -> None:
        """Add the whole events of this connection."""
        answers = self.client.answers
        if not answers:
            return
        self.stream_id = self.stream_id or answers[0].get("x-stream-id") or ""
        body = answers[0].body
        found = events_in(body[: body.rfind(b"\n\n") + 2]) if b"\n\n" in body else []
        self.events += found
        if found:
            self.last_id = found[-1].id or ""

    def cut(self) -> None:
        self.client.reset()
        self.note()

    def resume(self, capacity: int = 1 << 60) -> None:
        field = (f"Last-Event-ID: {self.last_id}",) if self.last_id else ()
        self.client = self.rig.client(get(f"/v1/streams/{self.stream_id}", *field), capacity=capacity)

    def check_whole(self, words: list[str] = WORDS) -> None:
        seqs = [each.seq for each in self.events]
        assert seqs == sorted(set(seqs)), "none twice"
        assert text_of(self.events) == "".join(words)
        assert self.events[-1].data == b"[DONE]" and seqs[-1] == len(words) + 1


def test_a_reader_that_is_cut_after_every_event_gets_the_whole_stream() -> None:
    with rig() as r:
        reader = ResumingReader(r)
        r.reply(SSE_HEAD)
        for each in EVENTS:
            r.reply(chunk(each))
            reader.cut()
            reader.resume()
        r.reply(LAST)
        assert [each.seq for each in reader.events] == list(range(1, len(EVENTS) + 1))
        reader.check_whole()
        assert reader.client.answer.whole
        assert len(r.links) == 1


@given(
    st.lists(st.integers(0, 900), min_size=1, max_size=12),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.sampled_from([policy.value for policy in Policy]),
)
def test_a_reader_that_is_cut_at_any_byte_gets_the_whole_stream(cuts: list[int], steps: list[int], policy: str) -> None:
    """The reader's connection takes `capacity` bytes and breaks; meanwhile the generation goes on by its own steps."""
    with rig() as r:
        reader = ResumingReader(r, f"X-Stream-Policy: {policy}")
        r.reply(SSE_HEAD)
        left = list(EVENTS)
        for k, capacity in enumerate(cuts):
            reader.client.transport.capacity = capacity
            step = steps[k % len(steps)]
            if left:
                r.reply(chunk(*left[:step]))
                del left[:step]
            reader.cut()
            reader.resume()
        if left:
            r.reply(chunk(*left))
        r.reply(LAST)
        if reader.client.answers[0].status == 200:
            reader.note()
            assert reader.client.answer.whole
        else:
            assert reader.client.answer.status == 204  # it had everything already
        reader.check_whole()
        assert len(r.links) == 1


def test_a_late_joiners_prefix_comes_coalesced() -> None:
    with rig() as r:
        first = r.client(post(CHAT))
        words = [f"{n} " for n in range(3000)]
        r.reply(SSE_HEAD)
        for start in range(0, 3000, 100):
            r.reply(chunk(*map(event, words[start : start + 100])))
        late = r.client(get(f"/v1/streams/{first.answer.get('x-stream-id')}"))
        events = events_in(late.answer.body)
        assert len(events) < 10 and events[-1].seq == 3000 and text_of(events) == "".join(words)
        r.reply(chunk(event("and "), event("on"), DONE) + LAST)
        for client in (first, late):
            events = events_in(client.answer.body)
            assert text_of(events) == "".join(words) + "and on" and client.answer.whole
            assert [each.seq for each in events[-3:]] == [3001, 3002, 3003]


def sealed(r: Rig) -> str:
    """The id of a finished stream."""
    client = r.client(post(CHAT))
    r.reply(SSE_HEAD + chunk(*EVENTS) + LAST)
    return client.answer.get("x-stream-id") or ""


@pytest.mark.parametrize(
    ("path", "fields", "first"),
    [
        ("/v1/streams/{id}", (), 1),
        ("/v1/streams/{id}", ("Last-Event-ID: {id}:0",), 1),
        ("/v1/streams/{id}", ("Last-Event-ID: {id}:29",), 30),
        ("/v1/streams/{id}", ("Last-Event-ID:",), 1),
        ("/v1/streams/{id}?last_event_id={id}:29", (), 30),
        ("/v1/streams/{id}?last_event_id={id}%3A29", (), 30),
        ("/v1/streams/{id}?from=30", (), 30),
        ("/v1/streams/{id}?from=1", (), 1),
        ("/v1/streams/{id}?from=5", ("Last-Event-ID: {id}:29",), 30),
    ],
)
def test_a_reader_begins_after_its_last_event_id_or_at_from(path: str, fields: tuple[str, ...], first: int) -> None:
    with rig() as r:
        stream_id = sealed(r)
        answer = r.client(get(path.format(id=stream_id), *[field.format(id=stream_id) for field in fields])).answer
        assert answer.status == 200 and answer.whole
        events = events_in(answer.body)
        assert text_of(events) == "".join(WORDS[first - 1 :]) and events[-1].seq == 31


@pytest.mark.parametrize(
    ("path", "fields", "code"),
    [
        ("/v1/streams/{id}", ("Last-Event-ID: nonsense",), "bad_last_event_id"),
        ("/v1/streams/{id}", ("Last-Event-ID: {id}",), "bad_last_event_id"),
        ("/v1/streams/{id}", ("Last-Event-ID: {id}:-1",), "bad_last_event_id"),
        ("/v1/streams/{id}", ("Last-Event-ID: {id}:01",), "bad_last_event_id"),
        ("/v1/streams/{id}?last_event_id={id}:x", (), "bad_last_event_id"),
        ("/v1/streams/{id}", ("Last-Event-ID: {other}:3",), "wrong_stream"),
        ("/v1/streams/{id}?from=0", (), "bad_from"),
        ("/v1/streams/{id}?from=-1", (), "bad_from"),
        ("/v1/streams/{id}?from=x", (), "bad_from"),
        ("/v1/streams/{id}", ("X-Stream-Policy: hurry",), "bad_policy"),
        ("/v1/streams/{id}", ("X-Stream-Policy: coalesce, close",), "bad_policy"),
    ],
)
def test_a_bad_position_is_refused_and_the_connection_stays_open(path: str, fields: tuple[str, ...], code: str) -> None:
    with rig() as r:
        names = {"id": sealed(r), "other": sealed(r)}
        client = r.client(get(path.format(**names), *[field.format(**names) for field in fields]) + get())
        refused, health = client.answers
        assert (refused.status, refused.error["code"], health.status) == (400, code, 200)


@pytest.mark.parametrize("seq", [31, 32, 99])
def test_at_or_past_the_end_of_a_sealed_stream_the_answer_is_204(seq: int) -> None:
    with rig() as r:
        stream_id = sealed(r)
        for wire in (
            get(f"/v1/streams/{stream_id}", f"Last-Event-ID: {stream_id}:{seq}"),
            get(f"/v1/streams/{stream_id}?from={seq + 1}"),
            post(CHAT, f"Last-Event-ID: {stream_id}:{seq}"),
        ):
            client = r.client(wire)
            assert client.answer.status == 204 and client.answer.get("x-stream-id") == stream_id
            assert client.answer.get("content-length") is None and not client.gone


def test_a_position_beyond_a_running_stream_is_refused() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        stream_id = client.answer.get("x-stream-id")
        assert r.client(get(f"/v1/streams/{stream_id}?from=3")).answer.error["code"] == "position_not_reached"
        tail = r.client(get(f"/v1/streams/{stream_id}?from=2"))
        r.reply(chunk(event("b"), DONE) + LAST)
        assert text_of(events_in(tail.answer.body)) == "b"


def test_a_finished_stream_stays_for_its_retention() -> None:
    with rig(retention_s=60.0) as r:
        stream_id = sealed(r)
        r.pass_time(59)
        assert r.client(get(f"/v1/streams/{stream_id}")).answer.whole
        r.pass_time(2)
        answer = r.client(get(f"/v1/streams/{stream_id}")).answer
        assert answer.status == 404 and answer.error["code"] == "stream_not_found"
        again = r.client(post(CHAT, f"Last-Event-ID: {stream_id}:3")).answer
        assert again.status == 404 and len(r.links) == 1  # never a new generation


def test_a_reader_keeps_a_finished_stream_beyond_its_retention() -> None:
    with rig(retention_s=10.0, stall_timeout_s=0.0) as r:
        client = r.client(post(CHAT), capacity=700)
        r.reply(SSE_HEAD + chunk(*EVENTS) + LAST)
        r.pass_time(30)
        assert len(tuple(r.runtime.hub)) == 1
        client.take()
        assert text_of(events_in(client.answer.body)) == "".join(WORDS) and client.answer.whole
        r.pass_time(1)
        assert not tuple(r.runtime.hub)


def test_an_id_of_an_ended_process_is_gone() -> None:
    with rig() as r:
        stream_id = sealed(r)
        dead = stream_id[:3] + ("AAAA" if stream_id[3:7] != "AAAA" else "BBBB") + stream_id[7:]
        assert r.client(get(f"/v1/streams/{dead}")).answer.status == 410
        assert r.client(post(CHAT, f"Last-Event-ID: {dead}:3")).answer.status == 410
        assert len(r.links) == 1


# -- the same POST again


def test_the_same_post_with_a_last_event_id_joins_the_stream() -> None:
    with rig() as r:
        reader = ResumingReader(r)
        r.reply(SSE_HEAD + chunk(*EVENTS[:10]))
        reader.cut()
        reader.client = r.client(post(CHAT, f"Last-Event-ID: {reader.last_id}"))
        r.reply(chunk(*EVENTS[10:]) + LAST)
        reader.note()
        reader.check_whole()
        assert len(r.links) == 1


def test_an_idempotency_key_joins_a_running_or_finished_stream() -> None:
    with rig(retention_s=60.0) as r:
        first = r.client(post(CHAT, "Idempotency-Key: k"))
        early = r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(SSE_HEAD + chunk(*EVENTS[:10]))
        later = r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(chunk(*EVENTS[10:]) + LAST)
        last = r.client(post(CHAT, "Idempotency-Key: k"))
        for client in (first, early, later, last):
            assert text_of(events_in(client.answer.body)) == "".join(WORDS) and client.answer.whole
        assert len(r.links) == 1
        assert len({client.answer.get("x-stream-id") for client in (first, early, later, last)}) == 1
        other = r.client(post(CHAT, "Idempotency-Key: k", "Authorization: Bearer somebody-else"))
        assert other.answers == [] and r.exchanges  # a new request goes upstream: keys are per principal
        other.fin()
        r.pass_time(61)
        anew = r.client(post(CHAT, "Idempotency-Key: k"))
        assert anew.answers == [] and r.exchanges


def test_an_idempotency_key_with_another_body_is_refused() -> None:
    with rig() as r:
        r.client(post(CHAT, "Idempotency-Key: k"))
        answer = r.client(post({**CHAT, "temperature": 1}, "Idempotency-Key: k")).answer
        assert answer.status == 422 and answer.error["code"] == "idempotency_key_reused"


def test_an_idempotency_key_of_an_answer_without_a_stream_joins_nothing() -> None:
    with rig() as r:
        first = r.client(post(WHOLE, "Idempotency-Key: k"))
        second = r.client(post(WHOLE, "Idempotency-Key: k")).answer
        assert second.status == 409 and second.error["code"] == "request_in_progress"
        first.fin()
        assert r.client(post(WHOLE, "Idempotency-Key: k")).answers == []  # the first is over: this one runs


def test_a_refused_request_leaves_its_key_free() -> None:
    with rig() as r:
        for body in (CHAT, WHOLE):
            for _ in range(2):
                client = r.client(post(body, "Idempotency-Key: k"))
                r.reply(b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}")
                assert client.answer.status == 400


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
def test_a_bad_idempotency_key_is_refused(key: str) -> None:
    with rig() as r:
        answer = r.client(post(CHAT, f"Idempotency-Key: {key}")).answer
        assert answer.status == 400 and answer.error["code"] == "bad_idempotency_key"


# -- detached


def test_a_reader_that_returns_within_the_grace_gets_the_whole_stream() -> None:
    with rig() as r:
        reader = ResumingReader(r)
        r.reply(SSE_HEAD + chunk(*EVENTS[:5]))
        reader.cut()
        assert r.runtime.hub.detached == 1
        for each in EVENTS[5:20]:
            r.reply(chunk(each))
            r.pass_time(2.5)
        reader.resume()
        assert r.runtime.hub.detached == 0
        r.pass_time(60)  # the grace is no longer running
        r.reply(chunk(*EVENTS[20:]) + LAST)
        reader.note()
        reader.check_whole()
        assert len(r.links) == 1 and r.runtime.counters.upstream_requests == {"up": 1}


def test_a_generation_whose_reader_does_not_return_is_cancelled_after_the_grace() -> None:
    with rig() as r:
        reader = ResumingReader(r)
        r.reply(SSE_HEAD + chunk(*EVENTS[:5]))
        reader.cut()
        r.pass_time(59)
        assert not r.link.closed
        r.pass_time(1.5)
        assert r.link.aborted and r.runtime.counters.upstream_cancels == {"up": 1}
        (stream,) = r.runtime.hub
        assert stream.reason is CloseReason.ABANDONED
        reader.resume()
        r.pass_time(BROKEN_END_S)
        reader.note()
        assert reader.events[-1].json["error"]["code"] == "abandoned" and not reader.client.answer.whole


def test_the_grace_counts_from_the_last_reader() -> None:
    with rig() as r:
        first = ResumingReader(r)
        r.reply(SSE_HEAD + chunk(*EVENTS[:5]))
        second = r.client(get(f"/v1/streams/{first.client.answer.get('x-stream-id')}"))
        first.cut()
        assert r.runtime.hub.detached == 0
        r.pass_time(100)
        second.fin()
        assert r.runtime.hub.detached == 1
        r.pass_time(61)
        assert r.link.aborted


def test_the_grace_and_the_number_of_detached_streams_are_bounded() -> None:
    with rig(detach_grace_max_s=20.0, detached_max=1) as r:
        one, two = ResumingReader(r), None
        first = r.link
        r.reply(SSE_HEAD)
        two = ResumingReader(r)
        r.reply(SSE_HEAD)
        one.cut()
        two.cut()
        assert r.link.aborted and not first.closed  # no room for a second detached stream
        r.pass_time(21)
        assert first.aborted


@pytest.mark.parametrize("grace", ["x", "-1", "1e9", ""])
def test_a_bad_grace_is_refused(grace: str) -> None:
    with rig() as r:
        answer = r.client(post(CHAT, f"X-Stream-Detach-Grace: {grace}")).answer
        assert answer.status == 400 and answer.error["code"] == "bad_detach_grace"


def test_a_detached_stream_that_finishes_is_kept_for_its_reader() -> None:
    with rig() as r:
        reader = ResumingReader(r)
        r.reply(SSE_HEAD + chunk(*EVENTS[:5]))
        reader.cut()
        r.reply(chunk(*EVENTS[5:]) + LAST)
        assert r.runtime.hub.detached == 0
        r.pass_time(50)
        reader.resume()
        reader.note()
        reader.check_whole()


# -- stopped


def test_delete_sends_present_and_later_readers_an_error() -> None:
    with rig() as r:
        readers = [ResumingReader(r)]
        r.reply(SSE_HEAD + chunk(*EVENTS[:5]))
        readers[0].note()
        stream_id = readers[0].stream_id
        assert r.client(get(f"/v1/streams/{stream_id}", method="DELETE")).answer.status == 204
        assert r.link.aborted
        late = r.client(get(f"/v1/streams/{stream_id}"))
        r.pass_time(BROKEN_END_S)
        for client in (readers[0].client, late):
            assert client.gone and not client.answer.whole
            last = events_in(client.answer.body)[-1]
            assert last.seq == 6 and last.json["error"]["code"] == "cancelled"
        assert r.client(get(f"/v1/streams/{stream_id}", method="DELETE")).answer.status == 204  # forgotten now
        assert r.client(get(f"/v1/streams/{stream_id}")).answer.status == 404


# -- gaps


def test_a_position_that_has_left_the_log_begins_with_a_gap() -> None:
    with rig(log_events_max=128, log_bytes_max=4096, retention_s=60.0) as r:
        client = r.client(post(CHAT))
        words = [f"{n:05} " for n in range(2000)]
        r.reply(SSE_HEAD)
        for word in words:
            r.reply(chunk(event(word)))
        stream_id = client.answer.get("x-stream-id")
        r.reply(chunk(DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == "".join(words)  # a reader that keeps up loses nothing
        late = r.client(get(f"/v1/streams/{stream_id}", f"Last-Event-ID: {stream_id}:10"))
        gap, *rest = events_in(late.answer.body)
        assert gap.name == "gap" and gap.json["gap"]["from"] == 11
        lost_to = gap.json["gap"]["to"]
        assert gap.seq == lost_to and gap.json["choices"] == [] and gap.json["object"] == "chat.completion.chunk"
        assert gap.json["id"] == "c1" and gap.json["model"] == "m"
        assert text_of(rest) == "".join(words[lost_to:]) and rest[-1].data == b"[DONE]"


# -- slow readers


def feed_fast(r: Rig, words: list[str]) -> None:
    for start in range(0, len(words), 10):
        r.reply(chunk(*map(event, words[start : start + 10])))


def test_a_reader_that_stalls_and_reads_on_gets_everything_in_few_events() -> None:
    with rig(stall_timeout_s=60.0) as r:
        client = r.client(post(CHAT), capacity=2000)
        words = [f"word{n} " for n in range(1500)]
        r.reply(SSE_HEAD)
        for second in range(30):
            feed_fast(r, words[second * 50 : second * 50 + 50])
            r.pass_time(1.0)
        assert len(client.transport.held) < 20_000
        client.take()
        r.reply(chunk(DONE) + LAST)
        events = events_in(client.answer.body)
        assert text_of(events) == "".join(words) and len(events) < 60 and client.answer.whole


def test_drop_oldest_announces_exactly_the_missing_events() -> None:
    with rig(ring_slots=32) as r:
        client = r.client(post(CHAT, "X-Stream-Policy: drop_oldest"), capacity=2000)
        words = [f"word{n} " for n in range(500)]
        r.reply(SSE_HEAD)
        feed_fast(r, words[:300])
        client.take(3000)
        client.transport.capacity = 0
        feed_fast(r, words[300:])
        client.take()
        r.reply(chunk(DONE) + LAST)
        events = events_in(client.answer.body)
        lost: set[int] = set()
        for gap in (each for each in events if each.name == "gap"):
            lost |= set(range(gap.json["gap"]["from"], gap.json["gap"]["to"] + 1))
            assert gap.seq == gap.json["gap"]["to"]
        assert lost
        assert text_of(events) == "".join(word for k, word in enumerate(words) if k + 1 not in lost)
        assert sorted(lost | {each.seq for each in events}) == list(range(1, 502))
        assert client.answer.whole


def test_a_late_joiner_may_choose_another_policy() -> None:
    with rig(ring_slots=32) as r:
        client = r.client(post(CHAT, "X-Stream-Policy: drop_oldest"))
        r.reply(SSE_HEAD + chunk(event("a")))
        stream_id = client.answer.get("x-stream-id")
        same = r.client(get(f"/v1/streams/{stream_id}"))
        other = r.client(get(f"/v1/streams/{stream_id}", "X-Stream-Policy: coalesce"))
        for each in (same, other):
            each.transport.capacity = 0
        words = [f"word{n} " for n in range(200)]
        feed_fast(r, words)
        r.reply(chunk(DONE) + LAST)
        for each in (same, other):
            each.take()
        assert any(each.name == "gap" for each in events_in(same.answer.body))
        assert text_of(events_in(other.answer.body)) == "a" + "".join(words)


# -- over real sockets


async def stalled_reader(d: Daemon, tokens: int, policy: str) -> tuple[Conn, int]:
    """A reader that reads nothing until the generation is over, and the number of its events."""
    fields = (f"X-Stream-Policy: {policy}", f"X-Mock-Tokens: {tokens}")
    conn = await d.connect(post(CHAT, *fields, "Connection: close"), limit=1024)
    await d.until(lambda: d.streams and d.streams[0].reason is not None)
    return conn, d.streams[0].events


def joined(events: list[Read]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for each in events
        if each.data.startswith(b"{")
        for choice in json.loads(each.data).get("choices", ())
    )


@pytest.mark.parametrize("policy", ["coalesce", "drop_oldest"])
def test_a_stalled_socket_gets_a_fast_generation_whole_or_with_announced_gaps(policy: str) -> None:
    async def main() -> None:
        async with serving(MockOptions(interval_s=0, ttft_s=0)) as d:
            conn, total = await stalled_reader(d, 3000, policy)
            assert d.runtime.counters.paused > 0
            reference = await d.ask(get(f"/v1/streams/{d.streams[0].id}"))
            answer = await conn.answer()
            events, words = events_in(answer.body), joined(events_in(reference.body))
            assert answer.whole and events[-1].seq == total and events[-1].data == b"[DONE]"
            gaps = [each for each in events if each.name == "gap"]
            if policy == "coalesce":
                assert joined(events) == words and not gaps
                assert len(events) < total / 2
            else:
                lost = sum(each.json["gap"]["to"] - each.json["gap"]["from"] + 1 for each in gaps)
                assert lost and len(events) - len(gaps) == total - lost

    run(main)


def test_a_stalled_socket_under_close_is_cut_off_and_may_resume() -> None:
    async def main() -> None:
        async with serving(MockOptions(interval_s=0, ttft_s=0)) as d:
            conn = await d.connect(post(CHAT, "X-Stream-Policy: close", "X-Mock-Tokens: 3000"), limit=1024)
            await d.until(lambda: (d.ended or [("", None)])[-1][1] is CloseReason.SLOW_CONSUMER)
            received = await conn.to_the_end()
            body = conn.answers[0].body
            assert received and not conn.answers[0].whole
            (stream,) = d.streams
            last = events_in(body[: body.rfind(b"\n\n") + 2])[-1]
            rest = await d.ask(get(f"/v1/streams/{stream.id}", f"Last-Event-ID: {last.id}", "Connection: close"))
            assert rest.whole
            whole = joined(events_in(body[: body.rfind(b"\n\n") + 2])) + joined(events_in(rest.body))
            assert whole == joined(events_in((await d.ask(get(f"/v1/streams/{stream.id}"))).body))
            assert sum(d.mock.stats.requests.values()) == 1

    run(main)


def test_a_stalled_reader_does_not_hold_up_another() -> None:
    async def main() -> None:
        async with serving(MockOptions(interval_s=0, ttft_s=0)) as d:
            stalled = await d.connect(post(CHAT, "X-Mock-Tokens: 2000"), limit=1024)
            await d.until(lambda: d.streams and d.streams[0].events > 3)
            other = await d.connect(get(f"/v1/streams/{d.streams[0].id}"))
            answer = await other.answer()
            assert answer.whole and len(joined(events_in(answer.body))) > 2000
            assert not stalled.closed
            assert joined(events_in((await stalled.answer()).body)) == joined(events_in(answer.body))

    run(main)


def test_metrics_count_a_resume() -> None:
    with rig() as r:
        reader = ResumingReader(r)
        r.reply(SSE_HEAD + chunk(*EVENTS[:5]))
        reader.cut()
        reader.resume()
        counters = r.runtime.counters
        assert counters.subscriptions == 2 and counters.resumes == 1


def test_a_reader_of_a_sealed_stream_may_reuse_its_connection() -> None:
    """The reader joins by an id, without any header."""
    with rig() as r:
        stream_id = sealed(r)
        client: Client = r.client(get(f"/v1/streams/{stream_id}") + get())
        assert client.statuses == [200, 200]
