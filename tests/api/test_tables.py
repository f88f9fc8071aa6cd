"""The tables of the admin surface, and the ends that an operator makes: readers, streams and keys of all workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, events_in, get, post, rig
from test_rights import bearer, line, logged, write

from streamd.api import tables
from streamd.api.ending import Ended
from streamd.api.tables import ROWS, ROWS_MAX, TableQuery, merged
from streamd.config import UpstreamSettings
from streamd.core import auth
from streamd.net.inquiry import ANSWER_S, Inquiries
from streamd.net.peers import Note, Peers
from streamd.reasons import CloseReason

TABLES = ("readers", "streams", "keys")
TWO = (
    UpstreamSettings(name="a", url="http://a.test:1", models=("m", "big")),
    UpstreamSettings(name="b", url="http://b.test:2", models=("other",)),
)


def admin(r: Rig, path: str, *, method: str = "GET") -> Client:
    """A request on the admin listener, after its turns."""
    client = r.client(get(path, method=method), listener="admin")
    r.turn()
    return client


def table(r: Rig, path: str) -> dict[str, Any]:
    answer = admin(r, path).answer
    assert answer.status == 200 and answer.get("content-type") == "application/json", answer.body
    found: dict[str, Any] = json.loads(answer.body)
    assert "workers_missing" not in found
    return found


def rows(r: Rig, path: str) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], table(r, path)["data"])


def row(r: Rig, path: str) -> dict[str, Any]:
    (only,) = rows(r, path)
    return only


def reading(r: Rig, *fields: str, model: str = "m", tokens: int = 1, peer: str = "") -> Client:
    """A reader of a generation that has sent this number of tokens."""
    client = Client(r)
    if peer:
        client.transport.peer = (peer, 40000)
    client.send(post({**CHAT, "model": model}, *fields))
    r.reply(SSE_HEAD + chunk(event("taken")))
    for _ in range(tokens - 1):
        r.reply(chunk(event("taken")))
    return client


def slow(r: Rig, client: Client, lag: int) -> None:
    """The reader takes nothing more while its generation, the last that was begun, goes on."""
    client.transport.capacity = 0
    for _ in range(lag):
        r.reply(chunk(event("not taken")))


def stream_of(client: Client) -> str:
    return client.answers[0].get("x-stream-id") or ""


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """A key file: alice and bob, each with its name as id."""
    path = tmp_path / "keys"
    write(path, line("alice", streams_max=8, requests_per_minute=60, tokens_per_minute=600), line("bob"))
    return str(path)


# -- the request for a table


@pytest.mark.parametrize("name", TABLES)
def test_without_anything_a_table_is_empty(name: str) -> None:
    with rig() as r:
        assert table(r, f"/{name}") == {"data": [], "total": 0}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("sort=size", "bad_sort"),
        ("sort=", "bad_sort"),
        ("limit=0", "bad_limit"),
        (f"limit={ROWS_MAX + 1}", "bad_limit"),
        ("limit=-1", "bad_limit"),
        ("limit=ten", "bad_limit"),
        ("stram=s_1", "bad_filter"),
        ("Key=alice", "bad_filter"),
    ],
)
def test_a_request_that_no_table_understands_is_refused(name: str, query: str, code: str) -> None:
    with rig() as r:
        answer = admin(r, f"/{name}?{query}").answer
        assert (answer.status, answer.error["code"]) == (400, code)


def test_a_state_that_no_stream_has_is_refused() -> None:
    with rig() as r:
        answer = admin(r, "/streams?state=running").answer
        assert (answer.status, answer.error["code"]) == (400, "bad_state")
        assert admin(r, "/readers?state=live").answer.error["code"] == "bad_filter"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_the_loop_for_a_slice_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SLICE_MEMBERS", 2)
    for module in ("key_table",):
        monkeypatch.setattr(f"streamd.api.{module}.SLICE_MEMBERS", 2)
    with rig() as r:
        for _ in range(9):
            reading(r, f"X-Api-Key: {len(r.links)}")
        client = Client(r, listener="admin")
        client.transport.feed(get(f"/{name}"))
        turns = 0
        while not client.raw:
            r.loop.call_soon(r.loop.stop)
            r.loop.run_forever()
            turns += 1
        assert turns >= 9 / 2
        assert json.loads(client.answer.body)["total"] == 9 and len(r.worker.slow_work) == 0
        r.turn()


def test_too_many_tables_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamd.net.in_turns.WORKS_MAX", 3)
    with rig() as r:
        clients = [Client(r, listener="admin") for _ in range(5)]
        for client in clients:
            client.transport.feed(get("/readers"))
        r.turn()
        assert sorted(client.answer.status for client in clients) == [200, 200, 200, 503, 503]


# -- readers


def test_a_row_names_the_reader_and_says_how_far_it_is(keys: str) -> None:
    with rig(keys_file=keys) as r:
        client = reading(r, bearer("alice"), "X-Request-Id: mine", peer="203.0.113.9")
        r.pass_time(2)
        slow(r, client, 3)
        r.pass_time(5)
        found = row(r, "/readers")
        assert found["id"].startswith("r_A") and found["request"] == "mine" and found["peer"] == "203.0.113.9:40000"
        assert (found["key"], found["key_name"]) == ("alice", "alice")
        assert (found["stream"], found["model"], found["upstream"]) == (stream_of(client), "m", "up")
        assert found["state"] == "paused" and found["policy"] == "coalesce"
        # The first event that wasn't taken whole is in the transport.
        assert (found["last_seq"], found["position"], found["lag_events"]) == (4, 2, 2)
        assert found["lag_s"] == pytest.approx(5, abs=1.5) and found["paused_s"] == pytest.approx(5, abs=0.1)
        assert found["unsent_bytes"] == len(client.transport.held) > 0
        assert (found["tokens"], found["dropped_events"], found["worker"]) == (4, 0, 0)
        assert found["first_s"] == 0 and found["age_s"] == pytest.approx(7, abs=0.1)


def test_a_reader_without_lag_has_no_seconds_of_lag_and_is_not_paused() -> None:
    with rig() as r:
        reading(r, tokens=3)
        r.pass_time(60)
        found = row(r, "/readers")
        assert (found["lag_events"], found["lag_s"], found["paused_s"], found["unsent_bytes"]) == (0, 0, 0, 0)
        assert (found["key"], found["key_name"], found["events"]) == (None, None, 3)


def test_a_reader_that_goes_on_is_not_paused_any_more() -> None:
    with rig() as r:
        client = reading(r)
        slow(r, client, 2)
        r.pass_time(4)
        assert row(r, "/readers")["paused_s"] == pytest.approx(4, abs=0.1)
        client.take()
        assert row(r, "/readers")["paused_s"] == 0
        slow(r, client, 1)
        r.pass_time(1)
        assert row(r, "/readers")["paused_s"] == pytest.approx(1, abs=0.1), "a pause begins anew"


def test_a_resuming_reader_has_no_time_to_a_first_token() -> None:
    with rig() as r:
        client = reading(r, tokens=3)
        r.client(get(f"/v1/streams/{stream_of(client)}?from=3"))
        r.turn()
        assert sorted((found["first_s"] is None, found["events"]) for found in rows(r, "/readers")) == [
            (False, 3),
            (True, 1),
        ]


@pytest.mark.parametrize(
    ("sort", "expected"), [("lag", ["1", "2", "0"]), ("paused", ["2", "1", "0"]), ("age", ["0", "2", "1"])]
)
def test_readers_are_sorted_worst_first(sort: str, expected: list[str]) -> None:
    with rig() as r:
        reading(r, "X-Request-Id: 0")
        r.pass_time(1)
        slow(r, reading(r, "X-Request-Id: 2"), 2)
        r.pass_time(1)
        slow(r, reading(r, "X-Request-Id: 1"), 9)
        r.pass_time(1)
        assert [found["request"] for found in rows(r, f"/readers?sort={sort}")] == expected
        found = table(r, f"/readers?sort={sort}&limit=2")
        assert [each["request"] for each in found["data"]] == expected[:2] and found["total"] == 3


def test_readers_are_filtered(keys: str) -> None:
    with rig(keys_file=keys, upstreams=TWO) as r:
        first = reading(r, bearer("alice"), "X-Request-Id: 1")
        reading(r, bearer("bob"), "X-Request-Id: 2", model="big")
        reading(r, bearer("bob"), "X-Request-Id: 3", model="other")
        for query, expected in {
            "": {"1", "2", "3"},
            "key=alice": {"1"},
            "key=bob": {"2", "3"},
            "key=bob&model=big": {"2"},
            "upstream=a": {"1", "2"},
            "upstream=b": {"3"},
            f"stream={stream_of(first)}": {"1"},
            "key=nobody": set(),
            "stream=s_1": set(),
        }.items():
            found = table(r, f"/readers?{query}")
            assert {each["request"] for each in found["data"]} == expected, query
            assert found["total"] == len(expected)


def test_a_filter_takes_a_keys_name_as_its_id(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("k1").replace(b'"name": "k1"', b'"name": "the batch job"'), line("k2"))
    with rig(keys_file=str(path)) as r:
        reading(r, bearer("k1"))
        reading(r, bearer("k2"))
        for query in ("key=k1", "key=the%20batch%20job"):
            assert row(r, f"/readers?{query}")["key_name"] == "the batch job"


def test_the_table_ends_at_its_limit() -> None:
    with rig() as r:
        readers = [reading(r) for _ in range(ROWS + 2)]
        slow(r, readers[-1], 4)
        found = table(r, "/readers")
        assert (len(found["data"]), found["total"]) == (ROWS, ROWS + 2)
        assert found["data"][0]["stream"] == stream_of(readers[-1])
        assert len(rows(r, f"/readers?limit={ROWS_MAX}")) == ROWS + 2


# -- streams


def test_streams_are_sorted_and_have_their_owners_and_paces(keys: str) -> None:
    with rig(keys_file=keys, detach_grace_s=60.0) as r:
        lagging = reading(r, bearer("alice"))
        slow(r, lagging, 5)
        r.pass_time(4)
        done = reading(r, bearer("bob"))
        r.reply(chunk(DONE) + LAST)
        left = reading(r, bearer("bob"), tokens=3)
        left.fin()
        r.turn()
        waiting = r.client(post(CHAT, bearer("bob")))
        r.turn()
        assert waiting.raw == b""
        found = rows(r, "/streams")
        assert (found[0]["lag_max"], found[0]["state"], len(found)) == (4, "live", 4)
        by_id = {each["id"]: each for each in found}
        first = by_id[stream_of(lagging)]
        assert (first["key"], first["key_name"], first["tokens"], first["subscribers"]) == ("alice", "alice", 6, 1)
        assert first["tokens_per_s"] == pytest.approx(6 / 4, abs=0.1) and first["idle_s"] == pytest.approx(4, abs=0.1)
        assert by_id[stream_of(done)]["state"] == "sealed" and by_id[stream_of(done)]["tokens_per_s"] == 0
        assert by_id[stream_of(left)]["state"] == "detached" and by_id[stream_of(left)]["grace_s"] > 0
        (unborn,) = (each for each in found if each["last_seq"] == 0)
        assert unborn["first_s"] is None and unborn["state"] == "live"
        for query, expected in {"state=sealed": 1, "state=detached": 1, "state=live": 2, "key=bob": 3}.items():
            assert table(r, f"/streams?{query}")["total"] == expected, query
        assert rows(r, "/streams?sort=tokens")[0]["tokens"] == 6
        assert rows(r, "/streams?sort=idle")[0]["id"] == rows(r, "/streams?sort=age")[0]["id"] == stream_of(lagging)
        assert rows(r, "/streams?sort=readers&limit=1")[0]["subscribers"] == 1


# -- keys


def test_a_key_shows_what_it_holds_against_its_limits(keys: str) -> None:
    with rig(keys_file=keys) as r:
        for _ in range(3):
            reading(r, bearer("alice"), tokens=10)
        r.client(post(WHOLE, bearer("alice")))
        r.pass_time(2)
        found = {each["key"]: each for each in rows(r, "/keys")}
        assert list(found) == ["alice", "bob"], "the key with the most tokens a second comes first"
        alice, bob = found["alice"], found["bob"]
        assert (alice["key_name"], alice["streams"], alice["streams_max"]) == ("alice", 3, 8)
        assert (alice["readers"], alice["requests"], alice["detached"]) == (3, 1, 0)
        assert alice["tokens_per_s"] == pytest.approx(15, abs=1)
        assert (alice["requests_total"], alice["requests_per_minute"]) == (4, 60)
        assert alice["requests_left"] == pytest.approx(58, abs=1)
        assert (alice["tokens_total"], alice["tokens_per_minute"]) == (30, 600)
        assert alice["tokens_left"] == pytest.approx(590, abs=15) and alice["wait_s"] == 0
        assert (bob["streams"], bob["streams_max"], bob["requests_left"], bob["tokens_left"]) == (0, None, None, None)


def test_a_key_over_its_limit_says_when_it_may_ask_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, line("alice", requests_per_minute=1))
    with rig(keys_file=str(path)) as r:
        assert row(r, "/keys")["requests_left"] == 1
        reading(r, bearer("alice"))
        found = row(r, "/keys")
        assert found["requests_left"] == 0 and found["wait_s"] == pytest.approx(60, abs=1)
        r.pass_time(30)
        assert row(r, "/keys")["wait_s"] == pytest.approx(30, abs=1)


def test_without_a_key_file_the_rows_are_principals() -> None:
    with rig() as r:
        reading(r, "X-Api-Key: somebody")
        reading(r)
        found = {each["key"]: each for each in rows(r, "/keys?sort=streams")}
        assert set(found) == {"anonymous", auth.principal_without_keys({b"x-api-key": b"somebody"}.get).id}
        assert all(each["streams"] == each["readers"] == 1 and "tokens_left" not in each for each in found.values())


def test_a_look_at_the_keys_changes_no_limit(keys: str) -> None:
    with rig(keys_file=keys) as r:
        reading(r, bearer("alice"))
        before = rows(r, "/keys")[0]["requests_left"]
        for _ in range(5):
            rows(r, "/keys")
        assert rows(r, "/keys")[0]["requests_left"] == before
        assert len(r.worker.rights._accounts) == 1, "no account is made for a key that only the table names"


# -- ends


def ended(r: Rig, path: str) -> dict[str, int]:
    answer = admin(r, path, method="DELETE").answer
    assert answer.status == 200, answer.body
    found: dict[str, int] = json.loads(answer.body)
    return found


def test_a_reader_is_sent_away_with_its_position_and_its_generation_goes_on() -> None:
    with rig() as r:
        client, other = reading(r, tokens=3), reading(r)
        found = next(each for each in rows(r, "/readers") if each["stream"] == stream_of(client))
        assert ended(r, f"/readers/{found['id']}") == {"streams": 0, "readers": 1, "requests": 0}
        assert client.gone and not other.gone
        last = events_in(client.answer.body)[-1]
        assert last.json["last_id"] == f"{stream_of(client)}:3"
        assert r.ended[-2][1] is CloseReason.CANCELLED
        assert row(r, "/streams?state=detached")["id"] == stream_of(client)
        r.pass_time(0.01)
        again = r.client(get(f"/v1/streams/{stream_of(client)}", f"Last-Event-ID: {last.json['last_id']}"))
        assert again.answer.status == 200
        assert admin(r, f"/readers/{found['id']}", method="DELETE").answer.error["code"] == "nothing_to_end"


def test_a_paused_reader_is_ended_too() -> None:
    with rig() as r:
        client = reading(r)
        slow(r, client, 4)
        assert ended(r, f"/readers/{row(r, '/readers')['id']}")["readers"] == 1
        r.pass_time(10)
        assert client.gone and rows(r, "/readers") == []


def test_all_readers_of_a_request_id_are_ended() -> None:
    with rig() as r:
        clients = [reading(r, "X-Request-Id: same") for _ in range(3)]
        other = reading(r, "X-Request-Id: another")
        assert ended(r, "/readers/same") == {"streams": 0, "readers": 3, "requests": 0}
        assert all(client.gone for client in clients) and not other.gone


def test_ids_of_readers_tell_the_requests_of_a_connection_apart() -> None:
    with rig() as r:
        ids = set()
        client = Client(r)
        for _ in range(3):
            client.send(post(CHAT))
            r.reply(SSE_HEAD + chunk(event("a")))
            ids.add(row(r, "/readers")["id"])
            r.reply(chunk(DONE) + LAST)
            r.pass_time(0.01)
        assert len(ids) == 3


def test_a_stream_is_ended_and_its_upstream_is_aborted() -> None:
    with rig() as r:
        client = reading(r)
        assert ended(r, f"/streams/{stream_of(client)}") == {"streams": 1, "readers": 0, "requests": 0}
        r.pass_time(1)
        assert client.gone and r.link.closed
        assert events_in(client.answer.body)[-1].json["error"]["code"] == "cancelled"


def test_a_stream_that_waits_for_its_first_event_is_ended() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.turn()
        assert ended(r, f"/streams/{row(r, '/streams?sort=idle')['id']}")["streams"] == 1
        assert (client.answer.status, client.answer.error["code"]) == (409, "cancelled") and r.link.closed


def test_everything_of_a_key_is_ended_and_nothing_of_another(keys: str) -> None:
    with rig(keys_file=keys) as r:
        other = reading(r, bearer("bob"))
        streams = [reading(r, bearer("alice")) for _ in range(3)]
        foreign = r.client(get(f"/v1/streams/{stream_of(other)}", bearer("alice")))
        whole = r.client(post(WHOLE, bearer("alice")))
        r.turn()
        assert ended(r, "/keys/alice") == {"streams": 3, "readers": 1, "requests": 1}
        r.pass_time(1)
        assert all(client.gone for client in (*streams, foreign, whole)) and not other.gone
        assert (whole.answer.status, whole.answer.error["code"]) == (409, "cancelled")
        assert whole.answer.get("x-should-retry") == "false"
        found = {each["key"]: each["streams"] for each in rows(r, "/keys")}
        assert found == {"alice": 0, "bob": 1}
        assert ended(r, "/keys/alice") == {"streams": 0, "readers": 0, "requests": 0}, "the key is known"
        reading(r, bearer("alice"))  # it isn't shut out


@pytest.mark.parametrize("what", list(Ended))
def test_an_end_of_something_unknown_is_a_404_that_says_so(what: Ended) -> None:
    with rig() as r:
        answer = admin(r, f"/{what.value}/s_unheard-of", method="DELETE").answer
        assert (answer.status, answer.error["code"]) == (404, "nothing_to_end")


def test_an_operators_act_and_the_names_of_keys_are_in_the_log(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(keys_file=keys) as r, logged(monkeypatch) as lines:
        client = reading(r, bearer("alice"))
        ended(r, f"/streams/{stream_of(client)}")
        r.pass_time(1)
        by_name = {each["name"]: each for each in lines}
        assert by_name["ended by an operator"]["path"] == f"/streams/{stream_of(client)}"
        assert by_name["ended by an operator"]["streams"] == 1
        assert by_name["stream"]["key_name"] == by_name["stream"]["principal"] == "alice"
        line_of_request = next(each for each in lines if each.get("path") == "/v1/chat/completions")
        assert line_of_request["key_name"] == "alice"


# -- several workers


class Others:
    """Workers 1 and 2 beside that of the rig: they answer as the test tells them to."""

    slot = 0

    def __init__(self, r: Rig) -> None:
        self.r = r
        self.asked: list[Note] = []
        self.inquiries = r.runtime.inquiries = Inquiries(
            r.loop, cast(Peers, self), r.worker._answerers, slow_work=r.worker.slow_work
        )
        r.runtime.peers = cast(Peers, self)

    def others(self) -> list[int]:
        return [1, 2]

    def owner_of_stream(self, stream_id: str) -> int:
        return 0

    def tell(self, slot: int, kind: str, body: bytes) -> bool:
        self.asked.append(Note(slot, kind, body))
        return True

    def answer(self, slot: int, body: bytes) -> None:
        number = next(note.body[:8] for note in self.asked if note.slot == slot)
        assert self.inquiries.take(Note(slot, "!", number + body))
        self.r.turn()


def part(total: int, *ranked: tuple[str, float]) -> bytes:
    head = json.dumps([total, [rank for _, rank in ranked]]).encode()
    return b"\n".join([head, *(json.dumps({"id": name}).encode() for name, _ in ranked)])


def test_the_tables_of_all_workers_become_one_table() -> None:
    with rig() as r:
        slow(r, reading(r), 11)
        own = row(r, "/readers")
        others = Others(r)
        client = admin(r, "/readers?limit=5")
        assert [(note.slot, note.kind) for note in others.asked] == [(1, "?readers"), (2, "?readers")]
        others.answer(2, part(70, ("two", 999), ("both", 3)))
        assert client.raw == b"", "worker 1 is still to answer"
        others.answer(1, part(7, *((f"one-{k}", 4) for k in range(5))))
        found = json.loads(client.answer.body)
        assert [each["id"] for each in found["data"]] == ["two", own["id"], "one-0", "one-1", "one-2"]
        assert found["total"] == 78 and "workers_missing" not in found


def test_a_worker_that_does_not_answer_is_counted_as_missing() -> None:
    with rig() as r:
        reading(r)
        others = Others(r)
        client = admin(r, "/readers")
        others.answer(2, part(1, ("two", 999)))
        r.pass_time(ANSWER_S * 0.9)
        assert client.raw == b""
        r.pass_time(ANSWER_S * 0.2)
        found = json.loads(client.answer.body)
        assert found["workers_missing"] == 1 and len(found["data"]) == 2
        others.answer(1, part(1, ("late", 5)))
        assert client.statuses == [200]


def test_an_asker_that_leaves_gets_no_answer_and_leaves_no_work_behind() -> None:
    with rig() as r:
        others = Others(r)
        client = admin(r, "/streams")
        client.reset()
        others.answer(1, part(0))
        others.answer(2, part(0))
        assert client.raw == b"" and len(others.inquiries) == len(r.worker.slow_work) == 0
        assert r.ended[-1][:2] == ("GET /streams", CloseReason.READER_GONE)


def test_a_worker_answers_another_worker_with_its_own_best_rows() -> None:
    with rig() as r:
        for lag in (1, 3, 2):
            slow(r, reading(r), lag)
        others = Others(r)
        question = TableQuery("lag", 2, None, {}).encode()
        assert others.inquiries.take(Note(1, "?readers", b"\0\0\0\0\0\0\0\x09" + question))
        assert others.asked == [], "the answer takes slices"
        r.turn()
        (answer,) = others.asked
        assert (answer.slot, answer.kind, answer.body[:8]) == (1, "!", b"\0\0\0\0\0\0\0\x09")
        shown = merged([answer.body[8:]], 10)
        assert shown.total == 3 and [json.loads(each)["lag_events"] for each in shown.rows] == [2, 1]


def test_the_numbers_of_a_key_are_added_up_over_workers() -> None:
    with rig() as r:
        reading(r, tokens=5)
        r.pass_time(1)
        others = Others(r)
        client = admin(r, "/keys")
        others.answer(1, json.dumps({"anonymous": [100.0, 2, 1, 1, 3], "h-x": [1.0, 1, 0, 1, 0]}).encode())
        others.answer(2, b"{}")
        first, second = json.loads(client.answer.body)["data"]
        assert (first["key"], first["streams"], first["detached"], first["readers"]) == ("anonymous", 3, 1, 2)
        assert first["requests"] == 3 and first["tokens_per_s"] == pytest.approx(105, abs=1)
        assert second["key"] == "h-x"


def test_an_end_that_another_worker_made_is_told_and_a_missing_worker_makes_it_doubtful() -> None:
    with rig() as r:
        others = Others(r)
        client = admin(r, "/readers/r_B1", method="DELETE")
        others.answer(1, b"[0,1,0]")
        others.answer(2, b"[0,0,0]")
        assert json.loads(client.answer.body) == {"streams": 0, "readers": 1, "requests": 0}
        others.asked.clear()
        client = admin(r, "/readers/r_B2", method="DELETE")
        others.answer(1, b"[0,0,0]")
        r.pass_time(ANSWER_S * 1.1)
        assert (client.answer.status, client.answer.error["code"]) == (503, "worker_busy")
