"""The commands for a running daemon, against a worker with a Unix socket: their output, their JSON, their statuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT
from inprocess import Live, live
from tools import skip_without

from streamd import cli
from streamd.addresses import parse_address
from streamd.api.key_table import KeyTable
from streamd.api.reader_table import ReaderTable
from streamd.api.stream_table import StreamTable
from streamd.config import ROWS
from streamd.daemon import admin_cli, completion, listen
from streamd.daemon.admin_cli import TABLES, seconds, shown, size, status_lines
from streamd.daemon.admin_client import AdminClient, AdminUnreachableError
from streamd.daemon.control import DaemonState
from streamd.mockllm import MockOptions
from streamd.net.in_turns import at_once

ENDLESS = MockOptions(interval_s=0.01, ttft_s=0, tokens=100_000)


class Operated:
    """A worker in a thread, and the commands on its admin socket."""

    def __init__(self, served: Live, address: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.live = served
        self.address = address
        self._capsys = capsys
        self._answers: list[Any] = []

    def run(self, *words: str) -> tuple[int, str, str]:
        """The exit status, stdout and stderr of a command."""
        self._capsys.readouterr()
        command, *rest = words
        status = cli.main([command, "--admin", self.address, *rest])
        out, err = self._capsys.readouterr()
        return status, out, err

    def json(self, *words: str) -> Any:
        status, out, err = self.run(*words, "--json")
        assert (status, err) == (0, ""), err
        return json.loads(out)

    def generation(self, **fields: str) -> str:
        """Begin a generation with a reader, and return its stream's id."""
        request = urllib.request.Request(
            f"{self.live.url}/v1/chat/completions",
            json.dumps(CHAT).encode(),
            {"Content-Type": "application/json"} | fields,
        )
        answer = urllib.request.urlopen(request)
        self._answers.append(answer)
        answer.readline()
        return str(answer.headers["x-stream-id"])

    def close(self) -> None:
        for answer in self._answers:
            answer.close()


@pytest.fixture
def operated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Operated]:
    with live(ENDLESS) as served:
        served.worker.state = DaemonState.SERVING
        address = f"unix:{tmp_path}/admin.sock"
        sock = listen.bind(parse_address(address), mode=listen.ADMIN_MODE)
        served.call(served.worker.listen([sock], "admin"))
        made = Operated(served, address, capsys)
        yield made
        made.close()
        sock.close()


def cells(line: str) -> list[str]:
    return re.split(r"  +", line)


# -- tables


def test_an_empty_daemon_has_tables_of_heads_alone(operated: Operated) -> None:
    for name, table in TABLES.items():
        status, out, err = operated.run(name)
        assert (status, err) == (0, "")
        assert [cells(line) for line in out.splitlines()] == [[column.head for column in table.columns]]
        assert operated.run(name, "--ids")[1] == ""
        assert operated.json(name) == {"data": [], "total": 0}


def test_the_tables_show_what_runs(operated: Operated) -> None:
    stream = operated.generation(**{"X-Request-Id": "mine", "X-Api-Key": "somebody"})
    status, out, _ = operated.run("readers", "--sort", "age")
    head, line = out.splitlines()
    row = dict(zip(cells(head), cells(line), strict=True))
    assert status == 0 and row["STREAM"] == stream and row["PEER"].startswith("127.0.0.1:")
    assert row["UPSTREAM"] == "mock" and row["KEY"].startswith("h-")
    assert operated.run("readers", "--ids")[1].strip() == row["ID"]
    (found,) = operated.json("streams", "--state", "live", "--stream", stream)["data"]
    assert found["id"] == stream and found["subscribers"] == 1
    assert operated.json("streams", "--state", "sealed")["data"] == []
    (key,) = operated.json("usage")["data"]
    assert key["key"] == row["KEY"] and operated.run("usage", "--ids")[1].strip() == row["KEY"]
    assert operated.json("readers", "--key", "nobody")["total"] == 0


def test_a_table_that_is_cut_says_how_many_rows_there_are_more(operated: Operated) -> None:
    for _ in range(3):
        operated.generation()
    status, out, err = operated.run("streams", "--limit", "2")
    assert status == 0 and len(out.splitlines()) == 3 and err == "streamd: 1 more; --limit shows up to 1000\n"


def test_a_request_that_the_daemon_refuses_ends_with_its_words(operated: Operated) -> None:
    status, out, err = operated.run("streams", "--limit", "none")
    assert (status, out) == (admin_cli.EXIT_REFUSED, "") and "limit has to be a number" in err


@pytest.mark.parametrize("name", TABLES)
def test_the_choices_of_a_table_are_those_of_the_daemon(operated: Operated, name: str) -> None:
    table = TABLES[name]
    for sort in table.sorts:
        assert operated.run(name, "--sort", sort)[0] == 0
    for each in table.filters:
        assert operated.run(name, f"--{each}", "live")[0] == 0, each


def test_the_choices_are_all_that_the_daemon_has() -> None:
    for kind, command in ((ReaderTable, "readers"), (StreamTable, "streams"), (KeyTable, "usage")):
        assert TABLES[command].sorts == kind.sorts and set(TABLES[command].filters) == {"key", *kind.filters}


# -- status and upstreams


def test_status_says_how_the_daemon_is(operated: Operated) -> None:
    operated.generation()
    status, out, err = operated.run("status")
    assert (status, err) == (0, "")
    assert (
        re.match(r"streamd \S+: serving for ", out) and "streams 1 live (0 of them without a reader), 0 sealed" in out
    )
    assert "upstream mock: up, 1 requests" in out
    assert operated.json("status")["state"] == "serving"
    operated.live.worker.state = DaemonState.DRAINING
    assert operated.run("status")[0] == admin_cli.EXIT_UNWELL


def test_a_drain_and_the_workers_are_in_the_status() -> None:
    drain = {"since_s": 3.0, "deadline_s": 27.0, "by": "admin", "left": 4, "finished": 2, "sent_away": 1, "cut": 0}
    found = {
        "version": "1",
        "state": "draining",
        "uptime_s": 90_000.0,
        "workers": [{}, {}],
        "connections": 9,
        "subscribers": 8,
        "streams": {"live": 4, "detached": 1, "sealed": 2},
        "admission": {"saturation": {"memory": 0.1, "streams": 0.5}},
        "log_bytes": 2048,
        "upstreams": {"gpu\x1b[31m": {"in_flight": 4, "idle": 0, "left_out": 1}},
        "drain": drain,
    }
    lines = status_lines(found)
    assert lines[0] == "streamd 1: draining for 1d01h, 2 workers" and "saturation 0.50 (streams)" in lines[3]
    assert lines[4] == "upstream gpu\\x1b[31m: out, 4 requests"
    assert lines[-1] == (
        "draining for 3.0s (by admin), at most 27s more: 4 generations left, 2 finished, 1 readers sent away"
    )


def test_upstreams_that_are_out_are_an_exit_status(operated: Operated) -> None:
    status, out, _ = operated.run("upstreams")
    head, line = out.splitlines()
    assert status == 0 and cells(head)[:3] == ["NAME", "STATE", "REQUESTS"] and cells(line)[:2] == ["mock", "up"]
    assert list(operated.json("upstreams")) == ["mock"]


# -- kill


def test_kill_ends_what_the_ids_name(operated: Operated) -> None:
    stream, other = operated.generation(), operated.generation(**{"X-Request-Id": "req_1"})
    status, out, _ = operated.run("kill", stream, "req_1")
    assert status == 0
    assert out.splitlines() == [
        f"{stream}: ended 1 streams, 0 readers, 0 waiting requests",
        "req_1: ended 0 streams, 1 readers, 0 waiting requests",
    ]
    assert operated.json("kill", other)[other]["streams"] == 1
    operated.generation(**{"X-Api-Key": "somebody"})
    (key,) = operated.run("usage", "--ids")[1].split()
    assert operated.json("kill", "--as", "key", key)[key]["streams"] == 1


def test_kill_of_nothing_and_of_a_word_without_a_kind(operated: Operated) -> None:
    status, out, err = operated.run("kill", "s_nothing", "r_nothing")
    assert (status, out) == (admin_cli.EXIT_NOTHING, "")
    assert err == "streamd: s_nothing: there is no such stream\nstreamd: r_nothing: there is no such reader\n"
    status, _, err = operated.run("kill", "room")
    assert status == 2 and "--as" in err
    assert operated.run("kill", "--as", "stream", "a/b?c=d#e")[0] == admin_cli.EXIT_NOTHING


# -- drain and log level


def test_a_drain_is_begun_once_and_taken_back(operated: Operated) -> None:
    worker = operated.live.worker
    operated.live.call(_apply(worker, drain_delay_s=60.0))
    assert operated.run("drain", "--undo")[0] == admin_cli.EXIT_NOTHING
    assert operated.run("drain")[:2] == (0, "draining\n")
    status, out, _ = operated.run("drain")
    assert status == 0 and "drains already" in out and not worker.draining._hurried.is_set()
    assert operated.run("drain", "--undo")[:2] == (0, "the drain is taken back; streamd serves\n")
    assert operated.json("status")["state"] == "serving"


def test_a_watcher_sees_that_the_drain_is_taken_back(operated: Operated, monkeypatch: pytest.MonkeyPatch) -> None:
    operated.live.call(_apply(operated.live.worker, drain_delay_s=60.0))
    undo = AdminClient(parse_address(operated.address))
    watch = types.SimpleNamespace(sleep=lambda seconds: undo.ask("DELETE", "/drain"))
    monkeypatch.setattr(admin_cli, "time", watch)
    status, out, err = operated.run("drain", "--wait")
    assert status == admin_cli.EXIT_UNWELL and "taken back" in err
    assert out.splitlines()[0] == "draining" and "draining for 0" in out.splitlines()[1]


@pytest.mark.parametrize(("unheard", "expected"), [(2, 0), (3, admin_cli.EXIT_UNWELL)])
def test_a_watcher_bears_with_a_worker_that_has_not_heard_of_the_drain(
    monkeypatch: pytest.MonkeyPatch, unheard: int, expected: int
) -> None:
    drain = {"since_s": 3.0, "deadline_s": 27.0, "by": "admin", "left": 4, "finished": 2, "sent_away": 1, "cut": 0}
    answers: list[Any] = [{"drain": None}, {"state": "draining"}, *[{"drain": None}] * unheard, {"drain": drain}]

    def ask(*given: object, **named: object) -> Any:
        if not answers:
            raise AdminUnreachableError("ended")
        return answers.pop(0)

    monkeypatch.setattr(AdminClient, "ask", ask)
    monkeypatch.setattr(admin_cli, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    assert cli.main(["drain", "--wait"]) == expected


async def _apply(worker: Any, **settings: Any) -> None:
    worker.apply(at_once(worker.prepare(dataclasses.replace(worker.settings, **settings))))


def test_drain_now_and_wait_return_at_the_end(operated: Operated) -> None:
    operated.generation()
    status, out, _ = operated.run("drain", "--now", "--wait")
    assert status == 0 and out.splitlines()[0] == "ending now"
    assert operated.live.call(_report(operated.live.worker)).cut == 1
    assert operated.run("status")[0] == admin_cli.EXIT_UNREACHABLE


async def _report(worker: Any) -> Any:
    return await worker.drained


def test_the_log_level_is_changed(operated: Operated) -> None:
    assert operated.run("log-level", "error")[:2] == (0, "the log level is error\n")
    assert operated.json("log-level", "warning") == {"level": "warning"}
    assert operated.run("log-level", "--key", "h-x", "--for", "1m")[:2] == (0, "the log level is debug for h-x\n")
    status, out, _ = operated.run("log-level")
    assert status == 0 and "h-x is watched" in out and operated.json("log-level")["watches"][0]["key"] == "h-x"
    assert operated.run("log-level", "--key", "h-x", "--for", "0s")[0] == 0
    assert operated.run("log-level", "debug", "--for", "soon")[0] == admin_cli.EXIT_REFUSED


# -- the way there


@pytest.mark.parametrize("command", ["status", "readers", "upstreams", "drain"])
def test_without_a_daemon_every_command_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    assert cli.main([command, "--admin", address]) == admin_cli.EXIT_UNREACHABLE
    assert capsys.readouterr().err == f"streamd: no daemon answers at {address}: Connection refused\n"


def test_the_address_comes_from_the_flag_or_the_variable_or_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMD_ADMIN", "unix:/nowhere/at/all")
    assert cli.main(["status"]) == admin_cli.EXIT_UNREACHABLE
    assert "unix:/nowhere/at/all: No such file" in capsys.readouterr().err
    assert cli.main(["status", "--admin", "nonsense"]) == admin_cli.EXIT_UNREACHABLE
    assert "nonsense is no address" in capsys.readouterr().err
    monkeypatch.delenv("STREAMD_ADMIN")
    monkeypatch.setattr(admin_cli, "DEFAULT_ADDRESS", "unix:/also/nowhere")
    assert cli.main(["status"]) == admin_cli.EXIT_UNREACHABLE
    assert "unix:/also/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 404 No\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    ],
)
def test_a_server_that_is_not_streamd_is_no_traceback(reply: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def answer() -> None:
            conn, _ = sock.accept()
            conn.recv(65536)
            conn.sendall(reply)
            conn.close()

        thread = threading.Thread(target=answer)
        thread.start()
        status = cli.main(["status", "--admin", f"127.0.0.1:{sock.getsockname()[1]}"])
        thread.join()
    assert status in (admin_cli.EXIT_UNREACHABLE, admin_cli.EXIT_REFUSED) and capsys.readouterr().err


def test_a_worker_that_is_missing_is_an_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [{"data": [], "total": 0, "workers_missing": 1}, {"streams": 1, "readers": 0, "requests": 0}]
    answers[1]["workers_missing"] = 1
    monkeypatch.setattr(admin_cli.AdminClient, "ask", lambda *given, **named: answers.pop(0))
    assert cli.main(["readers"]) == cli.main(["kill", "s_1"]) == admin_cli.EXIT_INCOMPLETE
    assert "didn't answer" in capsys.readouterr().err


# -- cells


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.0s"),
        (9.94, "9.9s"),
        (59.4, "59s"),
        (302, "5m02s"),
        (11_400, "3h10m"),
        (187_200, "2d04h"),
    ],
)
def test_durations_are_short(value: float | None, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (1023, "1023"), (1536, "1.5K"), (20_971_520, "20M"), (2**41, "2048G")]
)
def test_sizes_are_short(value: int | None, text: str) -> None:
    assert size(value) == text


def test_a_terminal_gets_no_control_character_of_a_client() -> None:
    assert shown("m\x1b]0;owned\x07\n") == "m\\x1b]0;owned\\x07\\n" and shown("模型") == "模型" and shown("") == "-"


# -- completion


def test_completion_asks_the_daemon_for_ids(tmp_path: Path) -> None:
    skip_without("bash")
    (tmp_path / "streamd.bash").write_text(completion.bash(cli.build_parser(), ROWS))
    program = tmp_path / "streamd"
    program.write_text('#!/bin/sh\n[ "$2" = --ids ] && echo "$1-id"\n')
    program.chmod(0o755)

    def replies(*words: str) -> set[str]:
        asked = " ".join(f"'{word}'" for word in ("streamd", *words))
        shell = f"source streamd.bash; COMP_WORDS=({asked}); COMP_CWORD={len(words)}; _streamd; "
        shell += "printf '%s\\n' \"${COMPREPLY[@]}\""
        told = subprocess.run(
            [shutil.which("bash") or "bash", "--norc", "-c", shell],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return set(told.stdout.split())

    assert replies("kill", "") == {"streams-id", "readers-id"}
    assert replies("kill", "s_1", "re") == {"readers-id"}
    assert replies("readers", "--key", "") == {"usage-id"}
    assert replies("readers", "--sort", "") == {"lag", "paused", "age"}
    assert replies("log-level", "d") == {"debug"}
    with contextlib.suppress(FileNotFoundError):
        program.unlink()
    assert replies("kill", "") == set(), "without the program there is nothing to complete"


def test_the_commands_load_nothing_of_the_data_path() -> None:
    """Completion waits for them."""
    code = (
        "import sys; from streamd import cli; cli.build_parser('readers');"
        "heavy = ('uvloop', 'asyncio', 'orjson', 'h11', 'streamd.net', 'streamd.core');"
        "print(sorted(name for name in heavy if name in sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert told.stdout.strip() == "[]"
