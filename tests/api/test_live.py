"""GET /live: the snapshots of the operations page, once a second, and nothing without a page."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, Client, Rig, chunk, event, get, post, rig
from loopback import PATIENCE_S, run
from pair import Pair, pair
from test_several import publish, stop_all

from streamd.addresses import parse_address
from streamd.api.live import EVERY_S, FRESH_S, REST, VIEWERS_MAX, bounded
from streamd.api.tables import ROWS, Shown, TableQuery
from streamd.daemon import listen
from streamd.daemon.control import DaemonState
from streamd.net.answer import Answer
from streamd.net.in_turns import Steps


def watch(r: Rig, query: str = "", *fields: str) -> Client:
    """A page of the admin listener, after its first snapshot."""
    client = r.client(get(f"/live{query}", *fields), listener="admin")
    r.pass_time(FRESH_S)
    return client


def snapshots(client: Client) -> list[dict[str, Any]]:
    (answer,) = client.answers
    assert answer.status == 200 and answer.get("content-type") == "text/event-stream"
    events = answer.body.split(b"\n\n")
    assert events[0] == b"retry: 1000" and events[-1] == b""
    assert all(each.startswith(b"event: snapshot\ndata: {") for each in events[1:-1])
    return [json.loads(each.partition(b"data: ")[2]) for each in events[1:-1]]


def reading(r: Rig, model: str = "m") -> Client:
    client = Client(r)
    client.send(post({**CHAT, "model": model}))
    r.reply(SSE_HEAD + chunk(event("a")))
    return client


def looks(r: Rig, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which the numbers of /status are made from now on."""
    made: list[float] = []
    live = r.worker.router._admin.live
    status = live._status
    monkeypatch.setattr(live, "_status", lambda: made.append(r.loop.time()) or status())
    return made


def test_a_page_gets_the_numbers_and_its_table_once_a_second() -> None:
    with rig() as r:
        reading(r, "small")
        r.pass_time(0.01)
        reading(r, "big")
        page = watch(r, "?table=readers&sort=age")
        (first,) = snapshots(page)
        assert first["unix_s"] > 0 and first["status"]["state"] == "serving" and first["status"]["subscribers"] == 2
        table = first["table"]
        assert [table["name"], table["sort"], table["total"], table["workers_missing"]] == ["readers", "age", 2, 0]
        assert [row["model"] for row in table["data"]] == ["small", "big"]
        r.pass_time(2 * EVERY_S)
        assert len(snapshots(page)) == 3
        filtered = watch(r, "?table=readers&model=big")
        assert [row["model"] for row in snapshots(filtered)[0]["table"]["data"]] == ["big"]
        assert snapshots(watch(r))[0]["table"] is None


def test_without_a_page_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        made = looks(r, monkeypatch)
        r.pass_time(5)
        assert made == []
        page = watch(r)
        assert len(made) == 1
        page.reset()
        r.pass_time(5)
        assert len(made) == 1 and not r.worker.router._admin.live


def test_pages_of_the_same_table_share_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        pages = [r.client(get("/live?table=streams"), listener="admin") for _ in range(VIEWERS_MAX)]
        r.pass_time(FRESH_S)
        made = looks(r, monkeypatch)
        r.pass_time(4 * EVERY_S)
        assert len(made) == 4
        assert len({json.dumps(snapshots(page)[-1]) for page in pages}) == 1


def test_more_pages_than_there_are_operators_are_refused() -> None:
    with rig() as r:
        pages = [r.client(get("/live"), listener="admin") for _ in range(VIEWERS_MAX + 1)]
        answer = pages[-1].answer
        assert (answer.status, answer.error["code"]) == (503, "too_many_viewers") and answer.get("retry-after")
        pages[0].reset()
        assert r.client(get("/live"), listener="admin").answer.status == 200


def test_pages_that_come_and_go_cost_no_more_than_four_snapshots_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        made = looks(r, monkeypatch)
        for _ in range(50):
            page = r.client(get("/live?table=keys"), listener="admin")
            r.pass_time(0.1)
            page.reset()
        assert len(made) <= 5 / FRESH_S + 1
        assert all(later - earlier >= FRESH_S - 1e-6 for earlier, later in itertools.pairwise(made))


def test_a_long_look_is_followed_by_a_rest_nine_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        page = watch(r)
        live = r.worker.router._admin.live
        monkeypatch.setattr(live._runtime, "time", r.loop.time)
        status = live._status

        def slow() -> dict[str, Any]:
            r.loop._jumping.now += 0.5
            return status()

        monkeypatch.setattr(live, "_status", slow)
        before = len(snapshots(page))
        r.pass_time(10 * (0.5 + REST * 0.5))
        assert len(snapshots(page)) - before <= 11


def test_a_page_that_takes_nothing_gets_the_newest_snapshot_later_and_none_between() -> None:
    with rig(stall_timeout_s=60.0) as r:
        page, other = watch(r, "?table=streams"), watch(r, "?table=streams")
        page.transport.capacity = 100
        r.pass_time(5 * EVERY_S)
        held = len(page.transport.held)
        r.pass_time(5 * EVERY_S)
        assert len(snapshots(other)) > 9
        assert 0 < len(page.transport.held) == held, "one snapshot, and no more"
        page.take()
        before = len(snapshots(page))
        r.pass_time(EVERY_S)
        assert len(snapshots(page)) == before + 1


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("?table=upstreams", "bad_table"),
        ("?sort=lag", "bad_table"),
        ("?table=readers&sort=name", "bad_sort"),
        ("?table=readers&state=live", "bad_filter"),
        (f"?table=readers&limit={ROWS + 1}", "bad_limit"),
    ],
)
def test_a_query_that_no_table_takes_is_refused(query: str, code: str) -> None:
    with rig() as r:
        answer = r.client(get(f"/live{query}"), listener="admin").answer
        assert (answer.status, answer.error["code"]) == (400, code)


@pytest.mark.parametrize("listener", ["public", "loopback"])
def test_no_other_listener_has_it(listener: str) -> None:
    with rig() as r:
        assert r.client(get("/live"), listener=listener).answer.status == 404


def test_a_page_is_not_shown_to_itself_and_does_not_hold_a_drain_up() -> None:
    with rig(drain_timeout_s=60.0) as r:
        page = watch(r, "?table=keys")
        assert snapshots(page)[0]["table"]["data"] == [] and snapshots(page)[0]["status"]["subscribers"] == 0
        r.client(get("/drain", "Content-Length: 0", method="POST"), listener="admin")
        r.pass_time(EVERY_S)
        assert r.worker.state is DaemonState.STOPPED and page.gone
        r.runtime.sweep.start()  # the drain stopped it, and the remaining connections have deadlines


def test_of_many_upstreams_those_that_fail_or_work_most_are_shown() -> None:
    upstreams = {f"u{k}": {"state": "up", "in_flight": k} for k in range(2 * ROWS)}
    upstreams["u0"]["state"] = "out"
    shown = bounded({"upstreams": upstreams, "workers": [{}, {}]})
    assert len(shown["upstreams"]) == ROWS and shown["upstreams_total"] == 2 * ROWS and shown["workers"] == 2
    assert next(iter(shown["upstreams"])) == "u0" and f"u{2 * ROWS - 1}" in shown["upstreams"]


async def one_snapshot(p: Pair, query: str) -> dict[str, Any]:
    """The first snapshot that worker a sends to a page."""
    sock = listen.bind(parse_address("127.0.0.1:0"))
    await p.a.worker.listen([sock], "admin")
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    writer.write(get(f"/live{query}"))
    line = b""
    while not line.startswith(b"data: "):
        line = await reader.readline()
    writer.close()
    found: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return found


@pytest.mark.parametrize("is_late", [False, True])
def test_a_snapshot_has_the_rows_of_all_workers_and_counts_those_that_are_late(is_late: bool) -> None:
    async def main() -> None:
        async with pair(answer_s=0.1 if is_late else PATIENCE_S) as p:
            await publish(p, 8)
            if is_late:
                p.deaf(p.b)
            table = (await one_snapshot(p, "?table=streams&sort=age"))["table"]
            assert {row["worker"] for row in table["data"]} == ({0} if is_late else {0, 1})
            assert table["total"] == len(table["data"]) and (is_late or table["total"] == 8)
            assert table["workers_missing"] == int(is_late)
            if is_late:
                p.hears_again(p.b)
            await stop_all(p)

    run(main)


def test_a_head_alone_is_answered_without_a_page() -> None:
    with rig() as r:
        client = Client(r, listener="admin")
        client.methods = ("HEAD",)
        client.send(get("/live", method="HEAD"))
        assert client.answer.status == 200 and client.answer.get("content-type") == "text/event-stream"
        assert not r.worker.router._admin.live


def broken(wanted: TableQuery, parts: list[bytes]) -> Steps[Shown]:
    """Work with a bug."""
    yield
    raise ZeroDivisionError


def test_a_bug_in_a_table_ends_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        page = watch(r, "?table=readers")
        other = watch(r, "?table=streams")
        table = r.worker.router._admin.live._tables["readers"]
        with monkeypatch.context() as patch:
            patch.setattr(table, "whole", broken)
            before = len(snapshots(page)), len(snapshots(other))
            r.pass_time(2 * EVERY_S)
        forget(r, ZeroDivisionError, 2)
        assert (len(snapshots(page)), len(snapshots(other))) == (before[0], before[1] + 2)
        r.pass_time(EVERY_S)
        assert len(snapshots(page)) == before[0] + 1


def test_a_table_that_cannot_be_begun_stops_no_other_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        page, other = watch(r, "?table=readers"), watch(r, "?table=streams")
        before = len(snapshots(page)), len(snapshots(other))
        with monkeypatch.context() as patch:
            patch.setattr(r.worker.router._admin.live._tables["readers"], "part", lambda wanted: 1 / 0)
            r.pass_time(2 * EVERY_S)
        assert (len(snapshots(page)), len(snapshots(other))) == (before[0], before[1] + 2)
        forget(r, ZeroDivisionError, 2)
        r.pass_time(EVERY_S)
        assert len(snapshots(page)) == before[0] + 1


def test_a_page_that_cannot_be_written_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        page, other = watch(r), watch(r)
        before = len(snapshots(page)), len(snapshots(other))
        first = next(iter(r.worker.router._admin.live._viewers)).answer
        write = Answer.proxy_body

        def written(answer: Answer, piece: bytes) -> None:
            if answer is first:
                raise MemoryError
            write(answer, piece)

        with monkeypatch.context() as patch:
            patch.setattr(Answer, "proxy_body", written)
            r.pass_time(2 * EVERY_S)
        assert (len(snapshots(page)), len(snapshots(other))) == (before[0], before[1] + 2)
        forget(r, MemoryError, 2)
        r.pass_time(EVERY_S)
        assert len(snapshots(page)) == before[0] + 1


def forget(r: Rig, kind: type[Exception], count: int) -> None:
    """The bugs that a test has made are no faults of the rig."""
    assert [type(error) for error in r.bugs] == [kind] * count
    r.bugs.clear()
    r.runtime.counters.bugs = 0


def test_a_page_that_takes_not_even_its_first_snapshot_makes_no_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        for _ in range(2):  # the second comes too soon for a snapshot
            r.client(get("/live"), listener="admin")
        (viewer,) = (each for each in r.worker.router._admin.live._viewers if not each.has_seen)
        viewer.on_paused()
        r.pass_time(EVERY_S)
        made = looks(r, monkeypatch)
        r.pass_time(4 * EVERY_S)
        assert len(made) == 4


@pytest.mark.parametrize("free", [0, 1])
def test_a_worker_with_too_much_other_work_leaves_tables_out(free: int) -> None:
    """`free`: the works for which there is still room; a snapshot needs a second after its first."""
    with rig() as r:
        page = watch(r, "?table=readers")
        numbers = watch(r)
        before = len(snapshots(page)), len(snapshots(numbers))
        slow_work = r.worker.slow_work
        asked = 0
        do = slow_work.do

        def full(*work: Any) -> bool:
            nonlocal asked
            asked += 1
            return asked <= free and do(*work)

        slow_work.do = full  # type: ignore[method-assign]
        r.pass_time(EVERY_S)
        assert len(snapshots(numbers)) == before[1] + 1
        assert len(snapshots(page)) == before[0] + free
        assert not free or snapshots(page)[-1]["table"] is None


def test_a_page_that_comes_while_a_snapshot_is_made_gets_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        page, late = watch(r, "?table=readers"), Client(r, listener="admin")
        table = r.worker.router._admin.live._tables["readers"]
        part = table.part

        def slow(wanted: TableQuery) -> Steps[bytes]:
            late.transport.feed(get("/live"))
            for _ in range(20):
                yield
            return (yield from part(wanted))

        with monkeypatch.context() as patch:
            patch.setattr(table, "part", slow)
            r.pass_time(EVERY_S - FRESH_S)
        assert len(snapshots(page)) == 2 and snapshots(late) == []
        r.pass_time(FRESH_S)
        assert len(snapshots(late)) == 1
