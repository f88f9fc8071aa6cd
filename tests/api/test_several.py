"""Answers that need all workers, at any worker: lists, look-ups, responses by id, limits, health, counts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, Read, events_in, get, post
from loopback import PATIENCE_S, Daemon, run
from pair import Pair, pair
from test_rights import bearer, line, write

from streamd.addresses import parse_address
from streamd.api import responses as responses_module
from streamd.api.llama import owner_of
from streamd.api.responses import FORGOTTEN, LEARNED
from streamd.core.hub import ID_LEN
from streamd.daemon import listen
from streamd.mockllm import MockOptions
from streamd.net import inquiry
from streamd.net.inquiry import INQUIRIES_MAX
from streamd.net.peers import MEMORY_BYTES_MAX, Note
from streamd.net.totals import BEAT_AT, RESIDENT_AT
from streamd.reasons import CloseReason

SLOW = MockOptions(interval_s=0.005, ttft_s=0, tokens=30)
ENDLESS = MockOptions(interval_s=0.01, ttft_s=0, tokens=100_000)
MINE = "x-api-key: somebody"


async def publish(p: Pair, count: int, *fields: str) -> list[str]:
    """Open `count` streams of chosen names, alternating between both workers; return them in that order."""
    names = [f"stream-{k:04}" for k in range(count)]  # in one millisecond the name decides
    for k, name in enumerate(names):
        put = get(f"/v1/streams/{name}", "Content-Length: 0", *fields, method="PUT")
        assert (await p.both[k % 2].ask(put, method="PUT")).status == 201
    assert all(each.streams for each in p.both)
    return names


async def listed(daemon: Daemon, query: str = "", *fields: str) -> dict[str, Any]:
    answer = await daemon.ask(get(f"/v1/streams{query}", *fields))
    assert answer.status == 200, answer.body
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def stop_all(p: Pair) -> None:
    for each in p.both:
        for stream in each.streams:
            each.worker.streams.stop_stream(stream)


# -- lists


def test_a_list_has_every_workers_streams_in_the_order_of_their_opening() -> None:
    async def main() -> None:
        async with pair() as p:
            names = await publish(p, 20, MINE)
            for each in p.both:
                found = await listed(each, "", MINE)
                assert [entry["id"] for entry in found["data"]] == names
                assert (found["has_more"], found["last_id"]) == (False, names[-1])
                assert "workers_missing" not in found
                assert (await listed(each))["data"] == []  # another principal's
            await stop_all(p)

    run(main)


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 100])
def test_pages_have_every_stream_once(limit: int) -> None:
    async def main() -> None:
        async with pair() as p:
            names = await publish(p, 20, MINE)
            seen: list[str] = []
            query, k = f"?limit={limit}", 0
            while True:
                page = await listed(p.both[k % 2], query, MINE)
                k += 1
                seen += [entry["id"] for entry in page["data"]]
                if not page["has_more"]:
                    break
                assert len(page["data"]) == limit
                query = f"?limit={limit}&after={page['last_id']}"
            assert seen == names
            await stop_all(p)

    run(main)


def test_a_list_can_show_only_live_or_only_sealed_streams() -> None:
    async def main() -> None:
        async with pair() as p:
            names = await publish(p, 10, MINE)
            for name in names[::3]:
                await p.a.ask(get(f"/v1/streams/{name}", MINE, method="DELETE"), method="DELETE")
            for each in p.both:
                live = await listed(each, "?state=live&limit=4", MINE)
                rest = [name for k, name in enumerate(names) if k % 3]
                assert [entry["id"] for entry in live["data"]] == rest[:4] and live["has_more"]
                sealed = await listed(each, "?state=sealed", MINE)
                assert [entry["id"] for entry in sealed["data"]] == names[::3]
            for query in ("?after=unheard-of", "?after=s_" + "x" * (ID_LEN - 2), "?limit=0", "?state=odd"):
                statuses = {(await each.ask(get(f"/v1/streams{query}", MINE))).status for each in p.both}
                assert statuses <= {400, 410}, query
            foreign = await p.b.ask(get(f"/v1/streams?after={names[0]}"))
            assert foreign.status == 400 and foreign.error["code"] == "bad_after"
            await stop_all(p)

    run(main)


def test_a_long_list_comes_whole() -> None:
    """Answers between workers that are larger than a datagram."""

    async def main() -> None:
        async with pair() as p:
            names = await publish(p, 600, MINE)
            found = await listed(p.a, "?limit=1000", MINE)
            assert [entry["id"] for entry in found["data"]] == names
            assert len(json.dumps(found["data"])) // 2 > 64 * 1024
            await stop_all(p)

    run(main)


def test_a_list_counts_a_worker_that_does_not_answer_as_missing() -> None:
    async def main() -> None:
        async with pair(answer_s=0.05) as p:
            names = await publish(p, 10, MINE)
            p.deaf(p.b)
            found = await listed(p.a, "", MINE)
            assert found["workers_missing"] == 1
            assert [entry["id"] for entry in found["data"]] == [
                name for name in names if p.peers[0].owner_of_name(name) == 0
            ]
            answer = await p.a.ask(post({"conversation_ids": [f"c{k}" for k in range(9)]}, path="/v1/streams/lookup"))
            assert answer.status == 503 and answer.error["code"] == "worker_busy"
            inquiry.ANSWER_S = PATIENCE_S  # the pair sets it back
            p.hears_again(p.b)  # late questions are answered, and late answers go nowhere
            assert "workers_missing" not in await listed(p.a, "", MINE)
            inquiries = p.a.runtime.inquiries
            assert inquiries is not None and len(inquiries) == 0
            await stop_all(p)

    run(main)


def test_a_client_that_leaves_while_workers_are_asked_gets_no_answer() -> None:
    async def main() -> None:
        async with pair() as p:
            p.deaf(p.b)
            p.b.runtime.sweep.stop()
            p.boards[1].row[BEAT_AT] = 0  # or fresh connections would be sent there
            conns = [await p.a.connect(get("/v1/streams")) for _ in range(INQUIRIES_MAX + 5)]
            inquiries = p.a.runtime.inquiries
            assert inquiries is not None
            for conn in conns[INQUIRIES_MAX:]:  # beyond the bound no other worker is asked: the answer comes at once
                assert b'"workers_missing":1' in (await conn.answer()).body
            assert len(inquiries) == INQUIRIES_MAX
            conns[0].fin()
            conns[1].abort()
            await p.a.until(lambda: len(p.a.runtime.clients) == len(conns) - 2)
            for number in tuple(inquiries._under_way):
                inquiries._end(number)  # as their timers do
            assert len(inquiries) == 0
            assert (await conns[2].answer()).status == 200
            assert await conns[0].to_the_end() == b""
            p.hears_again(p.b)

    run(main)


# -- tables


class Operator:
    """A client of a worker's admin surface."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.sock = listen.bind(parse_address("127.0.0.1:0"))

    async def ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        daemon = self.daemon
        if self.sock not in daemon.worker._sockets[True]:
            await daemon.worker.listen([self.sock], "admin")
        port, daemon.port = daemon.port, self.sock.getsockname()[1]
        answer = await daemon.ask(get(path, method=method), method=method)
        daemon.port = port
        assert answer.status == 200, answer.body
        found: dict[str, Any] = json.loads(answer.body)
        return found


def test_the_streams_and_readers_of_all_workers_are_in_the_tables_of_each() -> None:
    async def main() -> None:
        async with pair(ENDLESS) as p:
            for each in p.both:
                await (await each.connect(post(CHAT, "X-Mock-Interval-Ms: 5"))).begun()
            for each in p.both:
                operator = Operator(each)
                for path in ("/streams", "/readers"):
                    found = (await operator.ask(path))["data"]
                    member = "id" if path == "/streams" else "stream"
                    assert {row[member] for row in found} == {s.id for each in p.both for s in each.streams}
                    assert {row["worker"] for row in found} == {0, 1}

    run(main)


def test_the_slow_reader_is_found_and_named_and_ended_through_any_worker(tmp_path: Path) -> None:
    """On call: memory grows. The table names the reader that takes nothing, by its key and its address."""
    keys = tmp_path / "keys"
    write(keys, line("batch"), line("web"))

    async def main() -> None:
        large = MockOptions(interval_s=0.001, ttft_s=0, tokens=100_000)
        async with pair(large, keys_file=str(keys), resume_grace_s=0.0) as p:
            quick = [await each.connect(post(CHAT, bearer("web"))) for each in p.both]
            reading = [asyncio.ensure_future(conn.to_the_end()) for conn in quick]
            slow = await p.b.connect(post(CHAT, bearer("batch")), receive_bytes=4096, limit=1024)
            await p.b.until(lambda: any(client.paused for client in p.b.runtime.clients))
            found = (await Operator(p.a).ask("/readers?sort=paused&limit=1"))["data"][0]
            own_end = slow._writer.get_extra_info("sockname")
            assert (found["key"], found["peer"]) == ("batch", f"127.0.0.1:{own_end[1]}")
            assert found["paused_s"] > 0 and found["unsent_bytes"] > 0 and found["worker"] == 1
            ended = await Operator(p.a).ask(f"/readers/{found['id']}", "DELETE")
            assert ended == {"streams": 0, "readers": 1, "requests": 0}
            assert b"event: reconnect" in await slow.to_the_end()
            await p.b.until(lambda: len([s for s in p.b.streams if s.reason is None]) == 1)
            assert not any(task.done() for task in reading), "the other readers notice nothing"
            for conn in quick:
                conn.close()
            await asyncio.gather(*reading, return_exceptions=True)

    run(main)


def test_the_key_that_takes_everything_is_found_and_ended_in_all_workers(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write(keys, line("greedy", streams_max=50, tokens_per_minute=100_000), line("modest"))

    async def main() -> None:
        async with pair(ENDLESS, keys_file=str(keys), detach_grace_s=0.0) as p:
            for each in p.both:
                for _ in range(3):
                    await (await each.connect(post(CHAT, bearer("greedy")))).begun()
            modest = await p.a.connect(post(CHAT, bearer("modest")))
            await modest.begun()
            await p.a.until(lambda: sum(s.text_events for each in p.both for s in each.streams) > 70)
            operator = Operator(p.b)
            first, second = (await operator.ask("/keys"))["data"]
            assert (first["key_name"], first["streams"], first["streams_max"]) == ("greedy", 6, 50)
            assert first["tokens_per_s"] > second["tokens_per_s"] > 0 and first["tokens_left"] <= 100_000
            assert (second["key_name"], second["streams"]) == ("modest", 1)
            assert await operator.ask("/keys/greedy", "DELETE") == {"streams": 6, "readers": 0, "requests": 0}
            first, second = (await operator.ask("/keys"))["data"]
            assert (first["key_name"], second["streams"]) == ("modest", 0)

    run(main)


# -- conversations


def conversation_in(p: Pair, daemon: Daemon, stem: str = "c") -> str:
    slot = p.slot_of(daemon)
    return next(f"{stem}{k}" for k in range(100) if owner_of(p.peers[0], "anonymous", f"{stem}{k}") == slot)


def test_a_conversation_lives_in_the_worker_that_its_id_chooses() -> None:
    async def main() -> None:
        async with pair(SLOW) as p:
            conversations = [conversation_in(p, each) for each in p.both]
            for conversation in (*conversations, conversations[1] + "::some/model"):
                asker = await p.a.connect(post(CHAT, f"X-Conversation-Id: {conversation}"))
                said = (await asker.answer()).body
                for each in p.both:
                    read = await each.ask(get(f"/v1/stream?conv_id={conversation}&from=10"))
                    assert read.body == said[10:]
            asked = {"conversation_ids": [*conversations, "unheard-of"]}
            for each in p.both:
                found = json.loads((await each.ask(post(asked, path="/v1/streams/lookup"))).body)
                assert [state["conversation_id"] for state in found] == [
                    conversations[0],
                    conversations[1],
                    conversations[1] + "::some/model",
                ]
                assert all(state["is_done"] for state in found)
            for conversation in conversations:
                stop = get(f"/v1/stream?conv_id={conversation}", method="DELETE")
                assert (await p.a.ask(stop, method="DELETE")).status == 204
                assert (await p.b.ask(get(f"/v1/stream?conv_id={conversation}"))).status == 204
            assert (await p.a.ask(get("/v1/stream"))).status == 400

    run(main)


def test_a_conversation_id_sent_again_at_another_worker_cancels_the_first() -> None:
    async def main() -> None:
        async with pair(ENDLESS) as p:
            conversation = conversation_in(p, p.b)
            first = await p.a.connect(post(CHAT, f"X-Conversation-Id: {conversation}"))
            await first.begun()
            again = await p.b.connect(post(CHAT, f"X-Conversation-Id: {conversation}"))
            await again.begun()
            reasons = [stream.reason for stream in p.b.streams]
            assert reasons == [CloseReason.CANCELLED, None] and not p.a.streams
            await p.a.ask(get(f"/v1/stream?conv_id={conversation}", method="DELETE"), method="DELETE")

    run(main)


# -- responses


def test_a_response_is_read_by_its_id_at_any_worker() -> None:
    async def main() -> None:
        async with pair(SLOW) as p:
            ask = post({"model": "m", "stream": True, "input": "Hello"}, path="/v1/responses")
            for first, other in (p.both, p.both[::-1]):
                asker = await first.connect(ask)
                await asker.until(lambda conn: b"response.created" in conn.received)
                found = re.search(rb'"id":"(resp[^"]+)"', asker.received)
                assert found is not None
                path = f"/v1/responses/{found[1].decode()}?stream=true"
                await other.until(lambda other=other: other.worker.responses._elsewhere)
                before = p.handed_over
                reader = await other.connect(get(path + "&starting_after=3"))
                whole = events_in((await asker.answer()).body)
                read = events_in((await reader.answer()).body)
                assert p.handed_over == before + 1
                assert [event.json["sequence_number"] for event in whole] == list(range(len(whole)))
                check_rest(3, whole, read)
            # Forgotten with its stream; from then on it goes upstream.
            for each in p.both:
                each.sweep_later(1000)
            for each in p.both:
                await each.until(lambda each=each: not each.worker.responses._elsewhere)

    run(main)


def check_rest(number: int, whole: list[Read], read: list[Read]) -> None:
    """A reader got every event with a greater number. A late reader gets joined texts, with the number of the last."""
    left = [event.json for event in whole if event.json["sequence_number"] > number]
    for event in read:
        count = sum(each["sequence_number"] <= event.json["sequence_number"] for each in left)
        pieces, left = left[:count], left[count:]
        assert count == 1 or all("delta" in each for each in pieces)
        texts = {"delta": "".join(each["delta"] for each in pieces)} if "delta" in event.json else {}
        assert event.json == pieces[-1] | texts
    assert left == []


def test_the_directory_of_responses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_module, "ELSEWHERE_MAX", 3)

    async def main() -> None:
        async with pair() as p:
            responses = p.a.worker.responses
            for k in range(5):
                assert responses.take(Note(1, LEARNED, json.dumps(["me", f"r{k}"]).encode()))
            assert [name for _, name in responses._elsewhere] == ["r2", "r3", "r4"]
            responses.take(Note(2, LEARNED, b'["me", "r3"]'))  # the same, asked for again in another worker
            responses.take(Note(1, FORGOTTEN, b'["me", "r3"]'))
            assert responses._elsewhere["me", "r3"] == 2
            responses.take(Note(2, FORGOTTEN, b'["me", "r3"]'))
            responses.take(Note(2, FORGOTTEN, b'["me", "never heard"]'))
            assert [name for _, name in responses._elsewhere] == ["r2", "r4"]
            assert not responses.take(Note(1, "another kind", b""))

    run(main)


# -- ids


def test_an_id_of_an_earlier_process_is_gone_at_every_worker() -> None:
    async def main() -> None:
        async with pair() as p:
            for start in ("A", "B", "C", "9"):
                stream_id = "s_" + start + "x" * (ID_LEN - 3)
                for each in p.both:
                    answer = await each.ask(get(f"/v1/streams/{stream_id}"))
                    assert answer.status == 410 and answer.error["code"] == "stream_gone", start
            resume = await p.a.ask(post(CHAT, "Last-Event-ID: s_B" + "x" * (ID_LEN - 3) + ":5"))
            assert resume.status == 410 and p.mock.stats.requests.total() == 0

    run(main)


# -- limits


def test_bodies_are_bounded_over_all_workers() -> None:
    async def main() -> None:
        async with pair(bodies_bytes_max=100_000, body_bytes_max=90_000) as p:
            half = get("/v1/embeddings", "Content-Length: 80000", method="POST") + b"a" * 60_000
            one = await p.a.connect(half, method="POST")
            await p.a.until(lambda: p.a.runtime.bodies_bytes == 60_000)
            two = await p.b.connect(half, method="POST")
            refused = await two.answer()
            assert refused.status == 503 and refused.error["code"] == "bodies_over_budget"
            one.close()
            await p.a.until(lambda: p.a.runtime.bodies_bytes == 0)
            await p.b.until(lambda: p.b.runtime.bodies_bytes == 0)

    run(main)


def test_requests_in_flight_at_an_upstream_are_counted_over_all_workers() -> None:
    async def main() -> None:
        async with pair(ENDLESS) as p:
            for each in p.both:
                settings = each.worker.settings
                (upstream,) = settings.upstreams
                each.worker.reload(
                    dataclasses.replace(settings, upstreams=(dataclasses.replace(upstream, inflight_max=2),))
                )
            await (await p.a.connect(post(CHAT))).begun()
            await (await p.b.connect(post(CHAT))).begun()
            for each in p.both:
                answer = await each.ask(post(CHAT))
                assert answer.status == 503 and answer.error["code"] == "no_upstream_available"

    run(main)


def test_the_bound_of_detached_streams_is_split_over_the_workers() -> None:
    async def main() -> None:
        async with pair(detached_max=5) as p:
            assert [each.runtime.hub.detached_max for each in p.both] == [3, 3]
            for each in p.both:
                each.worker.reload(each.worker.settings)
            assert [each.runtime.hub.detached_max for each in p.both] == [3, 3]

    run(main)


# -- health, metrics, memory


def test_every_worker_shows_the_counts_of_the_whole_daemon() -> None:
    async def main() -> None:
        async with pair(SLOW) as p:
            for each in p.both:
                for _ in range(2):
                    await each.ask(post(CHAT))
            for each in p.both:
                each.worker.totals()  # as the sweep does each second
            texts = [(await each.ask(get("/metrics"))).body.decode() for each in p.both]
            for text in texts:
                assert "streamd_streams_opened_total 4.0" in text
                assert 'streamd_upstream_requests_total{upstream="mock"} 4.0' in text
                assert 'streamd_streams{state="sealed"} 4.0' in text
            p.a.runtime.admission._own.refused[next(iter(p.a.runtime.admission._own.refused))] = 3
            p.a.worker.totals()
            p.b.runtime.admission.note_lag(1.0)
            p.b.worker.totals()
            found = [json.loads((await each.ask(get("/status"))).body) for each in p.both]
            for status in found:
                assert status["streams"]["sealed"] == 4
                assert status["admission"]["refused"]["connections"] == 3
                assert status["admission"]["loop_lag_s"] > 0.2
                assert status["admission"]["saturation"]["loop_lag"] > 0.2
                assert len(status["workers"]) == 2 and status["workers"][0]["bytes_resident"] > 1_000_000
                assert "beat_ms" not in status["workers"][0]

    run(main)


def test_memory_is_measured_for_the_whole_daemon() -> None:
    async def main() -> None:
        async with pair() as p:
            for each in p.both:
                each.worker._tick(each.loop.time() + 10, 0.0)
            own = p.boards[0].rows[0], p.boards[0].rows[1]
            assert all(row[RESIDENT_AT] > 1_000_000 for row in own)
            shown_bytes = sum(row[RESIDENT_AT] for row in own)  # a tick reads the rows first, then writes its own anew
            p.a.worker._tick(p.a.loop.time() + 20, 0.0)
            assert p.a.runtime.admission._own.resident_bytes == shown_bytes

    run(main)


def test_a_note_of_an_unknown_kind_is_counted_as_a_bug() -> None:
    async def main() -> None:
        async with pair(check=False) as p:
            assert p.peers[0].tell(1, "unheard-of", b"x")
            assert p.peers[0].tell(1, "?unheard-of", b"12345678x")
            assert p.peers[0].tell(1, "!", b"short")
            assert p.peers[0].tell(1, "!", b"12345678late")
            assert p.peers[0].tell(1, "response", b"no JSON")
            await p.b.until(lambda: p.b.runtime.counters.bugs == 4)
            assert not p.peers[0].tell(1, "x", bytes(MEMORY_BYTES_MAX + 1))
            assert (await p.b.ask(get("/healthz"))).status == 200

    run(main)
