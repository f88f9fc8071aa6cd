"""`streamd top` before a real daemon of two workers: a slow reader is found and ended, a restart met; once in tmux."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loaded import Loaded, loaded
from served import PROJECT, WAIT_S, served
from textual.pilot import Pilot
from textual.widgets import DataTable, Static
from tools import needs, which

from streamd.addresses import parse_address
from streamd.daemon.admin_client import AdminClient
from streamd.top.app import TopApp
from streamd.top.dialogs import ConfirmScreen


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """Readers in both workers, which keep up."""
    with loaded(tmp_path_factory.mktemp("top"), "alice", "bob", "mallory") as d:
        for count, name in enumerate(["bob", "bob", *["alice"] * 30], 1):
            d.reader(name)
            d.until(lambda wanted=count: len(d.rows("readers")) == wanted, "reader")
            if count > 4 and {row["worker"] for row in d.rows("readers")} == {0, 1}:
                break
        yield d


def slow_reader(d: Loaded) -> str:
    """A reader that has begun to lag; returns its address."""
    address = d.reader("mallory", stalls=True, interval_ms=1)
    d.until(lambda: any(row["peer"] == address and row["lag_events"] > 100 for row in d.rows("readers")), "lag")
    return address


async def until(pilot: Pilot[None], condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        await pilot.pause(0.05)


def shown(app: TopApp) -> list[dict[str, str]]:
    """The rows of the table by the heads of its columns."""
    table: DataTable[Any] = app.screen_stack[0].query_one(DataTable)
    heads = [str(column.label).split(" ")[0] for column in table.ordered_columns]
    rows = [map(str, table.get_row_at(y)) for y in range(table.row_count)]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def line(app: TopApp, name: str) -> str:
    return str(app.screen_stack[0].query_one(f"#{name}", Static).render())


def test_a_slow_reader_is_found_by_its_lag_ended_after_a_confirmation_and_gone(busy: Loaded) -> None:
    address = slow_reader(busy)
    count = len(busy.rows("readers"))

    async def main() -> None:
        app = TopApp(busy.client, interval_s=0.2, view="readers")
        async with app.run_test(size=(120, 30)) as pilot:
            await until(pilot, lambda: len(shown(app)) == count, "readers of both workers")
            await pilot.press("S", "S", "S")
            await until(pilot, lambda: [row["KEY"] for row in shown(app)][:3] == ["alice"] * 3, "order by key")
            await pilot.press("s", "s", "s")
            await until(pilot, lambda: shown(app)[0]["KEY"] == "mallory", "the slow reader on top")
            first = shown(app)[0]
            assert first["PEER"] == address and int(first["LAG"]) > 100 and first["STATE"] in ("!paused", "!behind")
            assert "workers 2" in line(app, "head") and f"readers {count}" in line(app, "head")
            await pilot.press("k")
            await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "dialog")
            await pilot.press("down", "enter")
            await until(pilot, lambda: address not in [row["PEER"] for row in shown(app)], "end of the reader")
            assert len(shown(app)) == count - 1 and "ended 0 streams, 1 readers" in "".join(
                n.message for n in app._notifications
            )
            await until(pilot, lambda: "tokens/s -" not in line(app, "head"), "rate")

    asyncio.run(main())
    assert address not in [row["peer"] for row in busy.rows("readers")]


def test_a_daemon_that_was_drained_and_started_again_is_found_by_itself(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/admin.sock"
    args = ("--workers", "2", "--admin", address, "--upstream", "http://127.0.0.1:9")

    async def main() -> None:
        app = TopApp(AdminClient(parse_address(address)), interval_s=0.2, view="upstreams")
        async with app.run_test(size=(100, 24)) as pilot:
            await until(pilot, lambda: "No such file" in line(app, "trouble"), "word")
            with served(*args) as d:
                await until(pilot, lambda: len(shown(app)) == 1, "daemon")
                await pilot.press("d")
                await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "dialog")
                await pilot.press("down", "enter")
                assert await asyncio.to_thread(d.ended) == 0
                await until(pilot, lambda: "no daemon answers" in line(app, "trouble"), "word")
                assert "Last answer" in line(app, "trouble") and len(shown(app)) == 1
            with served(*args):
                await until(pilot, lambda: not app.screen.query_one("#trouble").display, "the next daemon")

    asyncio.run(main())


# -- in tmux


class Tmux:
    """A terminal of a server of its own."""

    def __init__(self, folder: Path) -> None:
        self._command = (which("tmux") or "tmux", "-u", "-f", "/dev/null", "-S", f"{folder}/tmux")
        self._environ = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(PROJECT)}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):  # a size in the environment goes before the terminal's
            self._environ.pop(name, None)

    def run(self, *words: str) -> str:
        ran = subprocess.run(
            [*self._command, *words], env=self._environ, stdout=subprocess.PIPE, text=True, timeout=WAIT_S, check=True
        )
        return ran.stdout

    def screen(self) -> str:
        return self.run("capture-pane", "-p")

    def until(self, condition: Callable[[str], object], what: str) -> str:
        deadline = time.monotonic() + WAIT_S
        while not condition(screen := self.screen()):
            assert time.monotonic() < deadline, f"no {what}:\n{screen}"
            time.sleep(0.05)
        return screen


@contextlib.contextmanager
def tmux(folder: Path, command: str) -> Iterator[Tmux]:
    made = Tmux(folder)
    made.run("new-session", "-d", "-x", "110", "-y", "30", command)
    try:
        yield made
    finally:
        made.run("kill-server")


@needs("tmux")
def test_a_person_finds_and_ends_a_slow_reader_in_a_real_terminal(busy: Loaded, tmp_path: Path) -> None:
    address = slow_reader(busy)
    command = f"{sys.executable} -m streamd top --admin {busy.address} --interval 200ms; echo status=$?; exec cat"
    with tmux(tmp_path, command) as t:
        screen = t.until(lambda text: address in text and "q quit" in text.splitlines()[-1], "the slow reader")
        lines = screen.splitlines()
        assert lines[0].startswith(" streamd ") and "k kill" in lines[-1]
        (row,) = [text for text in lines if address in text]
        assert "mallory" in row and lines.index(row) == min(k for k, text in enumerate(lines) if "127.0.0.1:" in text)
        t.run("send-keys", "k")
        t.until(lambda text: f"End the reader at {address}" in text, "dialog")
        t.run("send-keys", "Down", "Enter")
        t.until(lambda text: address not in text and "1 readers" in text, "end of the reader")
        t.run("send-keys", "/")
        t.until(lambda text: "words, key=NAME" in text, "line for the filter")
        t.run("send-keys", "-l", "bob")
        t.until(lambda text: "filter: bob" in text and "alice" not in text, "filter")
        t.run("resize-window", "-x", "46", "-y", "12")
        screen = t.until(lambda text: len(text.splitlines()[0]) <= 46 and "PEER" in text, "the narrow screen")
        assert "UNSENT" not in screen
        t.run("send-keys", "Enter")
        t.until(lambda text: "q quit" in text.splitlines()[-1], "table")
        t.run("send-keys", "q")
        assert "status=0" in t.until(lambda text: "status=" in text, "end"), "the terminal is as it was before"


@needs("tmux")
@pytest.mark.parametrize(("way", "status"), [("TERM", 143), ("C-c", 0)])
def test_a_killed_or_interrupted_screen_leaves_the_terminal_as_it_was(tmp_path: Path, way: str, status: int) -> None:
    top = f"exec {sys.executable} -m streamd top --admin unix:{tmp_path}/none.sock"
    with tmux(tmp_path, f"echo before; sh -c 'echo $$ > {tmp_path}/pid; {top}'; echo status=$?; exec cat") as t:
        t.until(lambda text: "no daemon answers" in text and "before" not in text, "the screen")
        if way == "TERM":
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        else:
            t.run("send-keys", way)
        assert "before" in t.until(lambda text: f"status={status}" in text, "end")
