"""The screen of `streamd top`, before a daemon that the test plays: keys, dialogs, loss, small terminals."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Static

from streamd.daemon.admin_client import AdminClient, AdminRefusedError, AdminUnreachableError
from streamd.top.app import LATE_S, TopApp
from streamd.top.dialogs import ConfirmScreen, DetailsScreen

WAIT_S = 5.0


def reader(name: str, **members: Any) -> dict[str, Any]:
    row = {"id": f"r_{name}", "peer": f"10.0.0.7:{len(name)}", "key": f"h-{name}", "key_name": name, "state": "live"}
    numbers = {"stream": f"s_{name}", "model": "m", "upstream": "gpu1", "lag_events": 0, "lag_s": 0.0, "age_s": 5.0}
    return {**row, **numbers, "paused_s": 0.0, "unsent_bytes": 0, **members}


class Played:
    """A daemon that the test plays, in the place of AdminClient."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {
            "version": "0.1.0",
            "state": "serving",
            "uptime_s": 60.0,
            "tokens_total": 100,
            "streams": {"live": 3, "detached": 0, "sealed": 0},
            "subscribers": 3,
            "admission": {
                "saturation": {"memory": 0.1},
                "budget": {"memory_limit_bytes": 1 << 30},
                "resident_bytes": 1 << 20,
                "loop_lag_s": 0.001,
            },
            "upstreams": {"gpu1": {"state": "up", "in_flight": 3}, "gpu2": {"state": "out", "in_flight": 0}},
            "drain": None,
        }
        self.rows: dict[str, list[dict[str, Any]]] = {"/readers": [], "/streams": [], "/keys": []}
        self.more: dict[str, Any] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.error: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def ask(self, method: str, path: str, query: Any = None) -> Any:
        self.asked.append((method, path, query))
        self.may_answer.wait()
        if self.error is not None:
            raise self.error
        if method == "DELETE" and path != "/drain":
            return {"streams": 0, "readers": 1, "requests": 0, **self.more}
        if method != "GET":
            return {"state": "draining"}
        return (
            self.status if path == "/status" else {"data": self.rows[path], "total": len(self.rows[path]), **self.more}
        )

    def changes(self) -> list[tuple[str, str]]:
        """The requests that change something."""
        return [(method, path) for method, path, _ in self.asked if method != "GET"]


class Screen:
    """An app under its pilot."""

    def __init__(self, app: TopApp, pilot: Pilot[None], daemon: Played) -> None:
        self.app = app
        self.pilot = pilot
        self.daemon = daemon

    async def until(self, condition: Callable[[], object], what: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while not condition():
            assert loop.time() < deadline, f"no {what}:\n{self.text}\n{self.lines()}"
            await self.pilot.pause(0.02)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    @property
    def table(self) -> DataTable[Any]:
        return cast("DataTable[Any]", self.app.screen_stack[0].query_one(DataTable))

    def lines(self) -> list[list[str]]:
        """The cells of the table."""
        return [[str(cell) for cell in self.table.get_row_at(y)] for y in range(self.table.row_count)]

    def column(self, head: str) -> list[str]:
        heads = [str(column.label).removesuffix(" ▼").removesuffix(" ▲") for column in self.table.ordered_columns]
        return [line[heads.index(head)] for line in self.lines()] if head in heads else []

    def static(self, name: str) -> str:
        found = self.app.screen_stack[0].query_one(f"#{name}", Static)
        return str(found.render()) if found.display else ""

    @property
    def text(self) -> str:
        return "\n".join(self.static(name) for name in ("head", "trouble", "alarms", "caption"))

    def notified(self) -> list[str]:
        return [each.message for each in self.app._notifications]

    async def wakes(self) -> None:
        """Wait for a whole look from now on."""
        before = len(self.daemon.asked)
        await self.until(lambda: len(self.daemon.asked) >= before + 4, "looks")


@contextlib.asynccontextmanager
async def screen(
    daemon: Played, *, size: tuple[int, int] = (120, 30), rows: bool = True, **told: Any
) -> AsyncIterator[Screen]:
    options = {"interval_s": 0.2, "view": "readers", **told}
    app = TopApp(cast(AdminClient, daemon), **options)
    async with app.run_test(size=size) as pilot:
        made = Screen(app, pilot, daemon)
        if rows:
            await made.until(lambda: made.table.row_count, "rows")
        yield made
        daemon.may_answer.set()


@pytest.fixture
def daemon() -> Played:
    played = Played()
    played.rows["/readers"] = [
        reader("alice", lag_events=3, age_s=50.0),
        reader("bob", lag_events=90, state="paused", paused_s=12.0, unsent_bytes=16_384, age_s=20.0),
        reader("carol", age_s=30.0),
    ]
    played.rows["/streams"] = [{"id": "s_alice", "state": "live", "key": "h-alice", "key_name": "alice"}]
    played.rows["/keys"] = [{"key": "h-bob", "key_name": "bob", "tokens_per_s": 4.0}]
    return played


def test_the_head_the_alarms_and_the_reader_that_lags_most_are_seen(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            assert "streamd 0.1.0   serving, up 1m00s   workers 1   streams 3   readers 3" in s.static("head")
            assert s.static("alarms") == "! 1 of 2 upstreams out: gpu2 (out)"
            assert s.column("KEY") == ["bob", "alice", "carol"]
            assert s.column("STATE") == ["!paused", "live", "live"]
            assert s.static("caption") == "Readers by LAG, highest first: 3 of 3"
            assert s.daemon.asked[1] == ("GET", "/readers", {"limit": "200", "sort": "lag"})

    asyncio.run(main())


def test_every_column_sorts_both_ways_and_a_click_sorts_as_well(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon, size=(200, 30)) as s:
            seen = []
            for _ in range(14):
                seen.append(s.static("caption").split(",")[0].removeprefix("Readers by "))
                await s.press("s")
            assert sorted(seen) == sorted(column.head for column in s.app._view.columns)
            await s.press("S", "s", "r")
            assert s.column("KEY") == ["carol", "alice", "bob"] and "LAG, lowest first" in s.static("caption")
            x = next(k for k, each in enumerate(s.table.ordered_columns) if str(each.label).startswith("AGE"))
            left = sum(each.get_render_width(s.table) for each in s.table.ordered_columns[:x])
            await s.pilot.click(DataTable, offset=(left + 2, 0))
            await s.until(lambda: s.column("KEY") == ["alice", "carol", "bob"], "order by age")
            await s.pilot.click(DataTable, offset=(left + 2, 0))
            await s.until(lambda: s.column("KEY") == ["bob", "carol", "alice"], "the other order")

    asyncio.run(main())


def test_the_four_tables_are_reached_by_numbers_and_by_tab(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("1")
            await s.until(lambda: s.lines() and s.lines()[0][0] == "gpu2", "upstreams, the bad one first")
            await s.press("2")
            await s.until(lambda: s.lines() and s.column("KEY") == ["alice"] and s.column("READERS"), "streams")
            await s.press("tab", "tab")
            await s.until(lambda: s.lines() and s.column("NAME") == ["bob"], "keys")
            await s.press("tab", "shift+tab", "shift+tab")
            await s.until(lambda: len(s.lines()) == 3, "readers")

    asyncio.run(main())


def test_a_filter_narrows_as_it_is_typed_and_escape_shows_all(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("slash", "b", "o")
            await s.until(lambda: s.column("KEY") == ["bob"], "a row")
            assert "1 of 3; filter: bo" in s.static("caption")
            await s.press("enter")
            assert isinstance(s.app.focused, DataTable) and not s.app.query_one(Input).display
            await s.press("escape")
            await s.until(lambda: len(s.lines()) == 3, "all rows")
            await s.press("slash", *"key=bob")
            await s.until(lambda: (s.daemon.asked[-1][2] or {}).get("key") == "bob", "a filter of the daemon's")
            await s.press("1", "q"), "letters and numbers are the filter's"
            assert s.app.query_one(Input).value == "key=bob1q"

    asyncio.run(main())


def test_the_filter_of_the_command_line_holds_from_the_start(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon, filter_text="carol") as s:
            assert s.column("KEY") == ["carol"]

    asyncio.run(main())


def test_the_cursor_stays_on_its_row_when_rows_move(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("down")
            assert s.table.cursor_row == 1
            daemon.rows["/readers"][0]["lag_events"] = 1000
            await s.until(lambda: s.column("KEY")[0] == "alice", "new order")
            assert s.table.cursor_row == 0
            del daemon.rows["/readers"][1]
            await s.until(lambda: len(s.lines()) == 2, "a row fewer")
            daemon.rows["/readers"].append(reader("dave"))
            await s.until(lambda: len(s.lines()) == 3, "a row more")
            assert s.table.cursor_row == 0

    asyncio.run(main())


def test_nothing_is_ended_before_the_choice_is_confirmed(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            for way_out in (("tab", "1", "escape"), ("enter",), ("n",)):
                await s.press("k")
                await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
                await s.press(*way_out)
                await s.until(lambda: not isinstance(s.app.screen, ConfirmScreen), "end of the dialog")
            assert daemon.changes() == [] and s.app._view.name == "readers"
            daemon.more["workers_missing"] = 1
            await s.press("k")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
            daemon.rows["/readers"].reverse()
            daemon.rows["/readers"][2]["lag_events"] = 9_999  # alice's row moves to the cursor's line
            await s.wakes()
            await s.press("down", "enter")
            await s.until(lambda: daemon.changes() == [("DELETE", "/readers/r_bob")], "the chosen reader's end")
            await s.until(s.notified, "word")
            assert "r_bob: ended 0 streams, 1 readers" in s.notified()[0] and "didn't answer" in s.notified()[0]
            await s.until(lambda: "1 worker(s) didn't answer" in s.static("caption"), "word in the caption")

    asyncio.run(main())


def test_a_stream_and_a_key_of_a_reader_are_ended_too(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            for steps in (2, 3):
                await s.press("k")
                await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
                await s.press(*["down"] * steps, "enter")
                await s.until(lambda count=steps - 1: len(daemon.changes()) == count, "request")
            assert daemon.changes() == [("DELETE", "/streams/s_bob"), ("DELETE", "/keys/h-bob")]
            await s.press("1", "k")
            await s.until(lambda: any("nothing to end" in each for each in s.notified()), "word")

    asyncio.run(main())


def test_an_end_that_is_not_answered_yet_is_told_though_another_dialog_is_open(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("k")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
            daemon.may_answer.clear()
            await s.press("down", "enter")
            await s.until(daemon.changes, "request")
            await s.press("d")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "the other dialog")
            daemon.may_answer.set()
            await s.until(lambda: any("1 readers" in each for each in s.notified()), "word")

    asyncio.run(main())


def test_a_refused_request_is_said_and_the_screen_goes_on(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("k")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
            daemon.error = AdminRefusedError(404, "nothing_to_end", "There is nothing [of] this id.")
            await s.press("down", "enter")
            await s.until(lambda: "There is nothing [of] this id." in s.notified(), "word")
            assert "refuses" in s.static("trouble")
            daemon.error = None
            await s.until(lambda: not s.static("trouble"), "good answer")

    asyncio.run(main())


def test_a_drain_is_begun_taken_back_and_hurried_after_confirmations(daemon: Played) -> None:
    async def choose(s: Screen, steps: int) -> str:
        await s.press("d")
        await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
        choices = str([str(each) for each in cast(ConfirmScreen, s.app.screen)._choices])
        await s.press(*["down"] * steps, "enter")
        await s.until(lambda: not isinstance(s.app.screen, ConfirmScreen), "end of the dialog")
        return choices

    async def main() -> None:
        async with screen(daemon) as s:
            await choose(s, 0)
            assert daemon.changes() == []
            assert "Drain and stop the daemon" in await choose(s, 1)
            await s.until(lambda: daemon.changes() == [("POST", "/drain")], "drain")
            numbers = {"left": 3, "finished": 1, "sent_away": 0, "cut": 0}
            drain = {"by": "admin", "since_s": 1.0, "deadline_s": 29.0, "may_be_taken_back": True, **numbers}
            daemon.status.update(state="draining", drain=drain)
            await s.until(lambda: "draining for 1.0s (by admin)" in s.static("alarms"), "progress")
            await choose(s, 1)
            await s.until(lambda: daemon.changes()[1:] == [("DELETE", "/drain")], "drain taken back")
            drain["may_be_taken_back"] = False
            await s.wakes()
            assert "Take" not in await choose(s, 1)
            await s.until(lambda: daemon.changes()[2:] == [("POST", "/drain")], "the end at once")

    asyncio.run(main())


def test_a_drain_that_another_operator_began_is_not_hurried_by_a_choice_from_before(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("p")
            await s.until(lambda: "paused" in s.static("caption"), "pause")
            await s.press("d")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
            numbers = {"left": 3, "finished": 1, "sent_away": 0, "cut": 0}
            drain = {"by": "admin", "since_s": 1.0, "deadline_s": 29.0, "may_be_taken_back": True, **numbers}
            daemon.status = {**daemon.status, "state": "draining", "drain": drain}
            await s.press("down", "enter")
            await s.until(lambda: any("begun or taken back meanwhile" in each for each in s.notified()), "word")
            assert daemon.changes() == []
            await s.press("d")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")
            assert "Take the drain back" in cast(ConfirmScreen, s.app.screen)._choices

    asyncio.run(main())


def test_a_row_has_all_its_members_in_its_details(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon, size=(40, 10)) as s:
            await s.press("enter")
            await s.until(lambda: isinstance(s.app.screen, DetailsScreen), "details")
            shown = str(s.app.screen.query_one(Static).render())
            assert "r_bob" in shown and "unsent_bytes  16384" in shown
            await s.press("down", "up", "escape")
            assert not isinstance(s.app.screen, DetailsScreen)

    asyncio.run(main())


def test_a_lost_daemon_is_said_its_last_rows_stay_and_it_is_found_again(daemon: Played) -> None:
    async def main() -> None:
        daemon.error = AdminUnreachableError("no daemon answers at unix:/run/streamd/admin.sock: No such file")
        async with screen(daemon, rows=False) as s:
            await s.until(lambda: "admin.sock: No such file" in s.static("trouble"), "word at the start")
            assert "Last answer" not in s.static("trouble")
            await s.press("d", "k", "enter")
            await s.until(lambda: len(s.notified()) == 2, "no drain and no end of nothing")
            daemon.error = None
            await s.until(lambda: len(s.lines()) == 3 and not s.static("trouble"), "daemon")
            daemon.error = AdminUnreachableError(
                "no daemon answers at unix:/run/streamd/admin.sock: Connection refused"
            )
            await s.until(lambda: "Connection refused. Last answer" in s.static("trouble"), "word")
            assert "Trying again every 0.2s" in s.static("trouble") and len(s.lines()) == 3
            daemon.error = None
            daemon.status.update(uptime_s=1.0, tokens_total=0)
            await s.until(lambda: not s.static("trouble") and "up 1.0s" in s.static("head"), "daemon, started again")

    asyncio.run(main())


def test_keys_are_obeyed_while_the_daemon_does_not_answer(daemon: Played) -> None:
    now = [100.0]

    async def main() -> None:
        async with screen(daemon, clock=lambda: now[0]) as s:
            daemon.may_answer.clear()
            await s.until(lambda: s.app._asked_at is not None, "a look")
            await s.press("r")
            await s.until(lambda: s.column("KEY") == ["carol", "alice", "bob"], "other order")
            now[0] += LATE_S + 1
            await s.until(lambda: "No answer for 3.5s" in s.static("trouble"), "word")
            daemon.may_answer.set()
            await s.until(lambda: not s.static("trouble"), "good answer")

    asyncio.run(main())


def test_a_pause_stops_the_looks_and_says_so(daemon: Played) -> None:
    async def main() -> None:
        async with screen(daemon) as s:
            await s.press("p")
            await s.until(lambda: "paused" in s.static("caption") and s.app._asked_at is None, "pause")
            count = len(daemon.asked)
            await s.press("r", "r", "r")
            assert len(daemon.asked) == count
            await s.press("p")
            await s.wakes()
            assert "paused" not in s.static("caption")

    asyncio.run(main())


def test_names_are_shown_as_they_are_and_no_terminal_obeys_them(daemon: Played) -> None:
    async def main() -> None:
        daemon.rows["/readers"] = [reader("[red]x[/red]"), reader("[/]", model="\x1b[31mm"), reader("模型" * 20)]
        daemon.status["upstreams"] = {"[bold]": {"state": "out"}}
        async with screen(daemon) as s:
            assert {"[red]x[/red]", "[/]"} < set(s.column("KEY"))
            assert any(cell.endswith("…") for cell in s.column("KEY"))
            assert "\\x1b[31mm" in s.column("MODEL")
            assert "[bold] (out)" in s.static("alarms")
            await s.press("enter", "escape", "k")
            await s.until(lambda: isinstance(s.app.screen, ConfirmScreen), "dialog")

    asyncio.run(main())


@pytest.mark.parametrize("size", [(20, 6), (250, 60)])
def test_the_screen_works_at_any_size_and_after_a_change_of_size(daemon: Played, size: tuple[int, int]) -> None:
    async def main() -> None:
        async with screen(daemon, size=size) as s:
            assert s.column("LAG") == ["90", "3", "0"]
            assert sum(each.get_render_width(s.table) for each in s.table.ordered_columns) <= max(size[0], 24)
            await s.pilot.resize_terminal(60, 12)
            await s.until(lambda: s.static("head").count("\n") == 0 and len(s.column("STATE")) == 3, "a line of facts")
            await s.press("k", "escape")
            await s.pilot.resize_terminal(120, 30)
            await s.until(lambda: len(s.column("PAUSED")) == 3, "more columns")

    asyncio.run(main())


def test_a_table_of_many_rows_draws_some_screens_of_them_and_says_so(daemon: Played) -> None:
    async def main() -> None:
        daemon.rows["/readers"] = [reader(f"u{k}", lag_events=k) for k in range(300)]
        daemon.more["total"] = 5000
        async with screen(daemon) as s:
            await s.press("slash", "u", "enter")
            await s.until(lambda: "filter" in s.static("caption"), "filter")
            told = "Readers by LAG, highest first: 200 of 5000; 100 more pass the filter; chosen among 300; filter: u"
            assert s.static("caption") == told and s.column("LAG")[0] == "299"

    asyncio.run(main())


@pytest.mark.parametrize("colours", [True, False])
def test_without_colours_the_screen_has_none(daemon: Played, monkeypatch: pytest.MonkeyPatch, *, colours: bool) -> None:
    if colours:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", "1")

    async def main() -> None:
        async with screen(daemon, colours=colours) as s:
            strips = s.app.screen._compositor.render_strips()
            filtered = list(strips)
            for each in s.app._filters:
                filtered = [strip.apply_filter(each, s.app.background_colors[0]) for strip in filtered]
            styles = [segment.style for strip in filtered for segment in strip if segment.style is not None]
            coloured = [style for style in styles if style.color is not None and not style.color.is_default]
            assert bool(coloured) is colours

    asyncio.run(main())
