"""Several workers as processes: deaths, signals, reloads, and what systemd is told of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import events_in
from served import WAIT_S, Held, Served, holding, refused, served, upstream

from streamd.config import Settings
from streamd.daemon import systemd
from streamd.daemon.orders import WORKER_VARIABLE, Launch
from streamd.daemon.supervisor import RESTART_FORGET_S, START_S_MAX, Supervisor

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    with upstream("--interval-ms", "10") as url:
        yield url


@pytest.fixture
def held() -> Iterator[Held]:
    with holding() as upstream:
        yield upstream


@contextlib.contextmanager
def workers(mock: str, *args: str, count: int = 2, **environ: str) -> Iterator[Served]:
    with served("--workers", str(count), "--admin", "127.0.0.1:0", "--upstream", mock, *args, **environ) as d:
        d.line(" serving ")
        yield d


def admin(d: Served, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
    port = int(d.line(r" serving .*admin=\S*?:(\d+)")[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    connection.request(method, path, body)
    return connection.getresponse()


def status(d: Served) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(admin(d, "GET", "/status").read())
    return found


def pids(d: Served) -> list[int]:
    """By slot; 0 for none."""
    return [int(each["pid"]) for each in status(d)["workers"]]


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"no {what}")


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def slot_of(stream_id: str) -> int:
    return "ABCDEFGH".index(stream_id[2])


def one_in_each(d: Served, tokens: int = 0) -> dict[int, http.client.HTTPResponse]:
    """A running generation in each of two workers, by slot. `tokens`: of the mock; a Held has one until it goes on."""
    running: dict[int, http.client.HTTPResponse] = {}
    while len(running) < 2:
        answer = d.generation(tokens=tokens)
        running.setdefault(slot_of(answer.getheader("x-stream-id") or ""), answer)
        assert len(d.lines) < 1000
        hold.append(answer)
    return running


hold: list[http.client.HTTPResponse] = []  # connections that stay open, so that fresh ones are spread


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    yield
    for answer in hold:
        answer.close()
    hold.clear()


def ask(d: Served, method: str, path: str) -> tuple[int, dict[str, Any]]:
    answer = d.request(method, path)
    body = answer.read()
    return answer.status, json.loads(body) if body.startswith(b"{") else {}


def counted(d: Served, name: str) -> float:
    text = admin(d, "GET", "/metrics").read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    assert found is not None, name
    return float(found[1])


# -- deaths


def test_a_worker_that_dies_takes_only_its_own_streams_along(held: Held) -> None:
    with workers(held.url) as d:
        running = one_in_each(d)
        ids = {slot: answer.getheader("x-stream-id") or "" for slot, answer in running.items()}
        before = pids(d)
        opened = until(lambda: (n := counted(d, "streamd_streams_opened_total")) >= 2 and n, "both workers' counts")
        until(lambda: status(d)["workers"][1]["bytes_resident"] > 1_000_000, "the worker's memory, told now and then")
        os.kill(before[0], signal.SIGKILL)
        d.line(r"ERROR .*worker died.* slot=0 .*wait_s=0\.1")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            running[0].read()
        after = until(lambda: (now := pids(d))[0] not in (0, before[0]) and now, "successor")
        assert after[1] == before[1] and not alive(before[0])
        # Whoever is asked, also before the successor is there: gone, and not unknown.
        for _ in range(6):
            code, body = ask(d, "GET", f"/v1/streams/{ids[0]}")
            assert code == 410 and body["error"]["code"] == "stream_gone"
        held.go_on()
        assert text_ended(running[1].read())
        assert counted(d, "streamd_streams_opened_total") >= opened
        new = one_in_each(d)[0]
        assert new.getheader("x-stream-id") != ids[0] and text_ended(new.read())
        assert [each for each in d.lines if "Traceback" in each] == []
        d.signal(signal.SIGTERM)
        assert d.ended() == 0


def text_ended(body: bytes) -> bool:
    return events_in(body)[-1].data == b"[DONE]"


def test_requests_for_a_dead_owner_wait_for_its_successor(mock: str) -> None:
    with workers(mock) as d:
        running = one_in_each(d, 300)
        stream_id = running[1].getheader("x-stream-id")
        os.kill(pids(d)[1], signal.SIGKILL)
        code, body = ask(d, "GET", f"/v1/streams/{stream_id}")
        assert code == 410 and body["error"]["code"] == "stream_gone"


def test_deaths_in_a_row_are_answered_more_and_more_slowly(mock: str) -> None:
    with workers(mock) as d:
        for k, wait_s in enumerate(("0.1", "0.2", "0.4")):
            pid = until(lambda: pids(d)[0], "worker")
            os.kill(pid, signal.SIGKILL)
            d.until(lambda k=k: sum("worker died" in line for line in d.lines) == k + 1, "death")
            assert f"wait_s={wait_s}" in [line for line in d.lines if "worker died" in line][-1]
            until(lambda pid=pid: pids(d)[0] not in (0, pid), "successor")
        assert ask(d, "GET", "/healthz")[0] == 200


def test_a_stuck_worker_is_killed_and_replaced(mock: str) -> None:
    with workers(mock, "--worker-stuck", "2s") as d:
        running = one_in_each(d, 400)
        before = pids(d)
        os.kill(before[1], signal.SIGSTOP)
        d.line(r"ERROR .*worker is stuck; killed.* slot=1")
        after = until(lambda: (now := pids(d))[1] not in (0, before[1]) and now, "successor")
        assert after[0] == before[0] and not alive(before[1])
        assert text_ended(running[0].read())


def test_workers_end_with_their_supervisor(mock: str) -> None:
    with workers(mock) as d:
        before = pids(d)
        d.signal(signal.SIGKILL)
        d.ended()
        until(lambda: not any(map(alive, before)), "end of the workers")


def test_a_supervisor_that_was_stopped_blames_nobody(mock: str) -> None:
    with workers(mock, "--worker-stuck", "2s") as d:
        before = pids(d)
        d.signal(signal.SIGSTOP)
        # Longer than worker_stuck: the condition is the clock itself.
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 2.5, "time")
        d.signal(signal.SIGCONT)
        d.signal(signal.SIGHUP)
        d.line(" reloaded ")
        assert pids(d) == before and not any("stuck" in line for line in d.lines)


# -- start


def test_settings_that_no_worker_can_use_end_the_start() -> None:
    with served("--workers", "2", "--memory-limit", "1MiB") as d:
        assert d.ended() == 2
        assert "memory" in "\n".join(d.lines) and "Traceback" not in "\n".join(d.lines)
        assert d.notify.names() == []


def test_a_port_that_is_taken_ends_the_start() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        served("--workers", "2", "--listen", f"127.0.0.1:{taken.getsockname()[1]}") as d,
    ):
        assert d.ended() == 1
        assert "already in use" in "\n".join(d.lines)


def test_a_launch_is_read_back() -> None:
    launch = Launch(3, 4, 5, 6, (7, 8), (9,), True, 15, 10, (11, 12, 13, 14))
    assert Launch.decode(launch.encode()) == launch
    assert sorted(launch.descriptors()) == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert WORKER_VARIABLE.startswith("STREAMD__")  # no setting's name


# -- stop


def test_a_drain_lets_generations_end_and_adds_up(held: Held) -> None:
    with workers(held.url, "--drain-delay", "0s") as d:
        running = one_in_each(d)
        d.signal(signal.SIGTERM)
        d.line(" draining signal=SIGTERM")
        until(lambda: refused(d), "refusal")
        held.go_on()
        assert all(text_ended(answer.read()) for answer in running.values())
        finished = len(hold)
        for answer in hold:
            with contextlib.suppress(Exception):
                answer.read()
        assert d.ended() == 0
        last = d.lines[-1]
        found = re.search(r" stopped finished=(\d+) moved=0 cut=0", last)
        assert found is not None and int(found[1]) == finished
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", d.port))


def test_nobody_is_let_in_while_a_generation_ends(held: Held) -> None:
    """No listener is left that nobody accepts at."""
    with workers(held.url, "--drain-delay", "0s") as d:
        answer = d.generation()
        d.signal(signal.SIGTERM)
        until(lambda: refused(d), "refusal")
        assert d.process.poll() is None
        held.go_on()
        assert text_ended(answer.read())
        assert d.ended() == 0


def test_a_second_signal_a_second_later_hurries(mock: str) -> None:
    with workers(mock, "--drain-delay", "0s") as d:
        answer = d.generation(tokens=100_000)
        d.signal(signal.SIGTERM)
        d.line(" draining ")
        began = time.monotonic()
        d.signal(signal.SIGTERM)  # the same Ctrl-C, as it were
        until(lambda: time.monotonic() - began > 1.1, "a second")
        assert d.process.poll() is None and not any("hurrying" in line for line in d.lines)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        assert b"event: reconnect" in rest(answer)
        assert re.search(r" stopped finished=0 moved=0 cut=1", d.lines[-1])


def rest(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read()
    except http.client.IncompleteRead as cut:
        return cut.partial


def test_ctrl_c_at_a_terminal_is_quick(mock: str) -> None:
    with workers(mock) as d:
        answer = d.generation(tokens=100_000)
        d.signal(signal.SIGINT)
        assert b"event: reconnect" in rest(answer)
        assert d.ended() == 0


def test_a_drain_asked_for_at_any_worker_is_everybodys(mock: str) -> None:
    with workers(mock, "--drain-delay", "0s") as d:
        running = one_in_each(d, 100)
        assert admin(d, "POST", "/drain").status == 202
        d.line(" draining signal=admin")
        assert all(text_ended(answer.read()) for answer in running.values())
        assert d.ended() == 0


def test_the_file_of_a_unix_listener_goes_with_it(mock: str, tmp_path: Path) -> None:
    path = tmp_path / "streamd.sock"
    with workers(mock, "--listen", f"unix:{path}", "--drain-delay", "0s") as d:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        d.signal(signal.SIGTERM)
        assert d.ended() == 0 and not path.exists()


# -- reloads and the log


def config(path: Path, mock: str, level: str) -> None:
    path.write_text(f'log_level = "{level}"\nworkers = 2\n[[upstream]]\nname = "{level}"\nurl = "{mock}"\n')


def test_a_reload_reaches_all_workers_and_a_bad_one_none(mock: str, tmp_path: Path) -> None:
    path = tmp_path / "streamd.toml"
    config(path, mock, "info")
    with served("--config", str(path), "--admin", "127.0.0.1:0") as d:
        d.line(" serving ")
        config(path, mock, "debug")
        d.signal(signal.SIGHUP)
        d.line(" reloaded upstreams=debug")
        until(lambda: upstreams_of(d) == {"debug"}, "the new upstream everywhere")
        assert sum(" reloaded " in line for line in d.lines) == 1
        path.write_text("no_such_key = 1\n")
        d.signal(signal.SIGHUP)
        d.line(r"ERROR .*reload refused.*no_such_key")
        config(path, mock, "warning")
        path.write_text(path.read_text().replace("workers = 2", 'workers = 3\nkeys_file = "keys"'))
        (tmp_path / "keys").write_text("no key at all")
        (tmp_path / "keys").chmod(0o600)
        d.signal(signal.SIGHUP)
        d.until(lambda: sum("reload refused" in line for line in d.lines) == 2, "second refusal")
        assert upstreams_of(d) == {"debug"} and len(pids(d)) == 2
        path.write_text(path.read_text().replace('keys_file = "keys"', ""))
        d.signal(signal.SIGHUP)
        d.line(r"WARNING .*only a restart changes.*workers")
        until(lambda: upstreams_of(d) == {"warning"}, "the new upstream everywhere")
        # A worker that starts later has the new settings, too.
        before = pids(d)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: pids(d)[0] not in (0, before[0]), "successor")
        assert upstreams_of(d) == {"warning"}
        assert d.generation(tokens=1).getheader("x-upstream") == "warning"


def upstreams_of(d: Served) -> set[str]:
    """Who answers, over enough connections to come to every worker."""
    answers = [d.generation(tokens=1) for _ in range(12)]
    names = {answer.getheader("x-upstream") or "" for answer in answers}
    for answer in answers:
        answer.close()
    return names


def test_the_log_level_reaches_all_workers(mock: str) -> None:
    with workers(mock) as d:
        one_in_each(d, 1)
        assert admin(d, "PUT", "/log-level", b"error").status == 204
        until(lambda: not logs_requests(d), "silence")
        assert admin(d, "PUT", "/log-level", b"info").status == 204
        until(lambda: logs_requests(d), "words")


def logs_requests(d: Served) -> bool:
    """Whether any of many requests leaves a line."""
    before = sum("/quiet" in line for line in d.lines)
    for _ in range(12):
        d.request("GET", "/quiet").read()
    return sum("/quiet" in line for line in d.lines) > before


# -- systemd


def test_systemd_hears_the_supervisor_alone(mock: str) -> None:
    pid_unknown = {"WATCHDOG_USEC": "200000"}
    with served("--workers", "2", "--upstream", mock, "--drain-delay", "0s", **pid_unknown) as d:
        d.notify.until("READY=1")
        assert " serving " in d.lines[-1] and " workers=2 " in d.lines[-1]
        d.notify.until("WATCHDOG=1", 3)
        d.signal(signal.SIGHUP)
        d.notify.until("READY=1", 2)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        names = [name for name in d.notify.names() if name not in ("WATCHDOG", "EXTEND_TIMEOUT_USEC")]
        assert names == ["READY", "RELOADING", "READY", "STOPPING"]
        states = [line for line in d.notify.told if line.startswith("STATUS=")]
        assert states[0].startswith("STATUS=serving: 0 connections") and states[0].endswith(", 2 workers")


def test_the_watchdog_is_silent_without_a_worker(mock: str) -> None:
    with served("--workers", "2", "--upstream", mock, "--admin", "127.0.0.1:0", WATCHDOG_USEC="200000") as d:
        d.notify.until("WATCHDOG=1", 2)
        for pid in pids(d):
            os.kill(pid, signal.SIGKILL)
        d.until(lambda: sum("worker died" in line for line in d.lines) == 2, "deaths")
        d.notify.names()
        before = d.notify.told.count("WATCHDOG=1")
        d.notify.until("WATCHDOG=1", before + 1)  # with the first successor that is ready
        assert any(map(alive, pids(d)))


def test_systemds_sockets_are_the_workers_and_stay_open(mock: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        served("--workers", "2", "--upstream", mock, listen_fds=[("http", held.fileno())]) as d,
    ):
        d.line(" serving ")
        port = held.getsockname()[1]
        assert d.port == port
        assert text_ended(d.generation(tokens=3).read())
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        waiting = socket.create_connection(("127.0.0.1", port))  # for the next process
        waiting.close()


# -- without processes


class Process:
    """A worker's, as far as the supervisor touches it."""

    killed = False

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def alone() -> Iterator[Supervisor]:
    """A supervisor that has started nothing. Its clock is what the tests say."""
    loop = asyncio.new_event_loop()
    settings = Settings(workers=2, worker_stuck_s=2.0)
    supervisor = Supervisor(loop, settings, lambda: settings, systemd.Notifier.from_environ({}, os.getpid()), [])
    yield supervisor
    for fd in (supervisor._fd, *supervisor._kept):
        os.close(fd)
    for sock in (sock for pair in supervisor._pairs for sock in pair):
        sock.close()
    loop.close()


def test_a_worker_that_starts_slowly_is_not_stuck(alone: Supervisor) -> None:
    member, process = alone._members[0], Process()
    member.process = process  # type: ignore[assignment]
    alone._look_after(member, member.heard_at + START_S_MAX - 0.1)
    assert not process.killed
    member.ready = True
    alone._look_after(member, member.heard_at + 1.9)
    assert not process.killed
    alone._look_after(member, member.heard_at + 2.0)
    assert process.killed


def test_a_worker_that_never_starts_is_stuck_in_the_end(alone: Supervisor) -> None:
    member, process = alone._members[0], Process()
    member.process = process  # type: ignore[assignment]
    alone._look_after(member, member.heard_at + START_S_MAX)
    assert process.killed


def test_a_death_long_after_the_last_is_the_first_again(alone: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(alone._loop, "time", lambda: now)
    member = alone._members[0]
    for pause_s, wait_s in ((0.0, 0.1), (1.0, 0.2), (RESTART_FORGET_S - 0.1, 0.4), (RESTART_FORGET_S, 0.1)):
        now += pause_s
        alone._plan_successor(member, -9)
        assert member.start_at == pytest.approx(now + wait_s)
