"""The daemon as a process: its parent, signals, reloads, deaths, systemd, restarts; with one worker and with two."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, events_in, text_of
from served import WAIT_S, Held, Served, holding, refused, served, upstream

from streamd.config import ConfigError, Settings
from streamd.daemon import control, systemd
from streamd.daemon.control import STATE_VARIABLE, WORKER_VARIABLE, Launch, Standing, StateLaunch, ToParent, ToWorker
from streamd.daemon.parent import SECOND_SIGNAL_S, Parent, check_inherited, signal_name
from streamd.daemon.reload import as_far_as_running
from streamd.daemon.slot import MEANINGLESS

STATE = "streams.state"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    with upstream() as url:
        yield url


@pytest.fixture
def held() -> Iterator[Held]:
    with holding() as upstream:
        yield upstream


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def count(request: pytest.FixtureRequest) -> str:
    """The number of workers."""
    return str(request.param)


def opened(answer: http.client.HTTPResponse) -> str:
    """Wait for the first event and return the stream's id."""
    while not answer.readline().startswith(b"data:"):
        pass
    return answer.getheader("x-stream-id") or ""


def rest(answer: http.client.HTTPResponse) -> tuple[bytes, bool]:
    """The remaining bytes, and whether the body ended as HTTP requires."""
    try:
        return answer.read(), True
    except http.client.IncompleteRead as cut:
        return cut.partial, False


def resumed(d: Served, stream_id: str, last_id: str = "") -> tuple[bytes, bool]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    answer = d.request("GET", f"/v1/streams/{stream_id}", headers=headers)
    assert answer.status == 200, answer.read()
    return rest(answer)


@contextlib.contextmanager
def workers(mock: str, *args: str, count: str = "2", **environ: str) -> Iterator[Served]:
    with served("--workers", count, "--admin", "127.0.0.1:0", "--upstream", mock, *args, **environ) as d:
        d.line(" serving ")
        yield d


def admin(d: Served, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
    port = int(d.line(r" serving .*admin=\S*?:(\d+)")[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    connection.request(method, path, body)
    return connection.getresponse()


def scraped(scraping: http.client.HTTPConnection, metric: str) -> float:
    """The value of a metric without labels."""
    scraping.request("GET", "/metrics")
    text = scraping.getresponse().read().decode()
    return float(re.search(rf"^{metric} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def status(d: Served) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(admin(d, "GET", "/status").read())
    return found


def pids(d: Served) -> list[int]:
    """The process ids by slot; 0 for an empty slot."""
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


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def only_worker(d: Served) -> int:
    (pid,) = children(d.process.pid)
    return pid


def slot_of(stream_id: str) -> int:
    return "ABCDEFGH".index(stream_id[2])


def one_in_each(d: Served, tokens: int = 0) -> dict[int, http.client.HTTPResponse]:
    """A running generation in each of two workers, by slot. `tokens` are the mock's; a Held sends a token and waits."""
    running: dict[int, http.client.HTTPResponse] = {}
    while len(running) < 2:
        answer = d.generation(tokens=tokens, interval_ms=10)
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


# -- messages to systemd


def test_systemd_gets_each_state_in_order_and_ready_means_listening(mock: str, count: str) -> None:
    with served("--upstream", mock, "--workers", count) as d:
        d.notify.until("READY=1")
        assert d.request("GET", "/readyz").status == 200
        d.signal(signal.SIGHUP)
        d.notify.until("READY=1", 2)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        names = [name for name in d.notify.names() if name != "EXTEND_TIMEOUT_USEC"]
        assert names == ["READY", "RELOADING", "READY", "STOPPING"]
        assert d.notify.told[0] == "READY=1"
        assert d.notify.told[d.notify.told.index("RELOADING=1") + 1].startswith("MONOTONIC_USEC=")
        assert d.notify.told[d.notify.told.index("STOPPING=1") + 1].startswith("STATUS=draining: 0 connections")


def test_a_drain_asks_for_time_and_its_streams_go_to_the_store(mock: str, count: str) -> None:
    with served("--upstream", mock, "--workers", count, "--drain-timeout", "1s") as d:
        d.notify.until("READY=1")
        answer = d.generation(tokens=1000, interval_ms=20)
        opened(answer)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        names = d.notify.names()
        assert names[:3] == ["READY", "STOPPING", "EXTEND_TIMEOUT_USEC"]
        assert names[-2:] == ["FDSTOREREMOVE", "FDSTORE"]
        assert set(names[3:-2]) <= {"EXTEND_TIMEOUT_USEC"}
        (fd,) = d.notify.fds
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:streamd-state")


def test_systemd_learns_of_a_drain_from_the_admin_surface(mock: str, count: str, tmp_path: Path) -> None:
    with served("--upstream", mock, "--workers", count, "--admin", f"unix:{tmp_path}/admin.sock") as d:
        d.notify.until("READY=1")
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(f"{tmp_path}/admin.sock")
            admin.sendall(b"POST /drain HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            assert b"202" in admin.recv(4096)
        assert d.ended() == 0
        assert [name for name in d.notify.names() if name != "EXTEND_TIMEOUT_USEC"] == ["READY", "STOPPING"]
        assert not (tmp_path / "admin.sock").exists()


def listening_at(sock: socket.socket) -> tuple[str, str]:
    return "--listen", f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_failed_start_never_reports_ready(mock: str, count: str) -> None:
    several = ("--upstream", mock, "--workers", count)
    with socket.create_server(("127.0.0.1", 0)) as taken, served(*several, *listening_at(taken)) as d:
        assert d.ended() == 1
        assert "Address already in use" in d.lines[-1]
        assert d.notify.names() == []
    with served(*several, "--conns-max", "10000000") as d:
        assert d.ended() == 2
        assert "conns_max" in d.lines[-1] and len(d.lines) == 1
        assert set(d.notify.names()) <= {"EXTEND_TIMEOUT_USEC"}


def test_signals_without_a_meaning_cost_a_line_and_nothing_else(mock: str, count: str) -> None:
    with workers(mock, count=count) as d:
        before = children(d.process.pid)
        for number in MEANINGLESS:
            for pid in before:
                os.kill(pid, number)
            d.process.send_signal(number)
            name = signal_name(number)
            d.line(rf"signal ignored; .* signal={re.escape(name)}$")
        assert d.request("GET", "/healthz").status == 200 and children(d.process.pid) == before


def test_a_second_daemon_on_a_state_dir_does_not_start(mock: str, count: str, tmp_path: Path) -> None:
    place = ("--state-dir", str(tmp_path / "state"))
    with workers(mock, *place, count=count) as d:
        with served("--upstream", mock, *place) as second:
            assert second.ended() == 1
            assert "another streamd uses this state_dir" in second.lines[-1]
        assert d.request("GET", "/healthz").status == 200
    with workers(mock, *place, count=count) as d:
        assert d.request("GET", "/healthz").status == 200


def test_a_start_that_fails_leaves_no_file_of_a_unix_listener(tmp_path: Path) -> None:
    with served("--listen", f"unix:{tmp_path}/s", "--keys-file", "/nowhere/keys") as d:
        assert d.ended() == 2
        assert "keys_file" in d.lines[-1] and os.listdir(tmp_path) == []


def test_only_the_parent_reports_to_systemd_for_all_workers(mock: str, count: str) -> None:
    with served("--workers", count, "--upstream", mock, "--drain-delay", "0s", WATCHDOG_USEC="200000") as d:
        d.notify.until("READY=1")
        assert (" workers=2 " in d.lines[-1]) == (count == "2")
        d.notify.until("WATCHDOG=1", 3)
        # The second comes with a worker's standing, seconds later: it is enough to await it once.
        states_min = 2 if count == "2" else 1
        d.notify.until("STATUS=serving: 0 connections", states_min)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        names = [name for name in d.notify.names() if name not in ("WATCHDOG", "EXTEND_TIMEOUT_USEC")]
        assert names == ["READY", "STOPPING"]
        states = [line for line in d.notify.told if line.startswith("STATUS=")]
        shown = r"STATUS=serving: 0 connections, 0 streams, 0 tokens/s, saturation 0\.\d\d"
        shown += ", 2 workers" if count == "2" else ""
        assert all(re.fullmatch(shown, state) for state in states[:states_min])


def test_the_watchdog_is_silent_without_a_worker(mock: str, count: str) -> None:
    with served("--workers", count, "--upstream", mock, WATCHDOG_USEC="200000") as d:
        d.notify.until("WATCHDOG=1", 2)
        d.notify.until("WATCHDOG=1", 3)
        for pid in children(d.process.pid):
            os.kill(pid, signal.SIGKILL)
        d.until(lambda: sum("worker died" in line for line in d.lines) == int(count), "deaths")
        d.notify.names()
        before = d.notify.told.count("WATCHDOG=1")
        d.notify.until("WATCHDOG=1", before + 1)  # with the first successor that is ready
        assert any(map(alive, children(d.process.pid)))


# -- the parent


LOADED = """
import runpy, sys
from streamd import cli
from streamd.daemon import slot
def spawn(*args):
    print(*sys.modules, file=sys.stderr)
    raise SystemExit(7)
slot.spawn = spawn
cli.main(["serve", "--listen", "127.0.0.1:0"])
"""


def test_the_parent_loads_nothing_of_the_data_path() -> None:
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=WAIT_S)
    assert ran.returncode == 7, ran.stderr
    loaded = set(ran.stderr.split())
    assert "streamd.daemon.parent" in loaded
    ours = {
        name for name in loaded if re.match(r"streamd\.(net|core|wire|api|mockllm|counters|metrics|reference)\b", name)
    }
    assert ours == set()
    packages = {"asyncio", "uvloop", "h11", "orjson", "prometheus_client", "cryptography", "jwt", "ssl", "http"}
    assert packages & loaded == set()


def pss_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) * 1024


def test_the_parent_is_small_beside_its_worker(mock: str) -> None:
    """12 MiB (`make bench-start`), doubled: an unwanted library would take more."""
    with workers(mock, count="1") as d:
        assert pss_bytes(d.process.pid) < min(24 * 1024 * 1024, pss_bytes(only_worker(d)))
        told = status(d)["admission"]["budget"]
        assert told["subtracted_bytes"]["parent"] == 16 * 1024 * 1024


def test_a_single_worker_has_none_of_the_objects_that_workers_share(mock: str) -> None:
    with workers(mock, count="1") as d:
        links = [os.readlink(link) for link in Path(f"/proc/{only_worker(d)}/fd").iterdir()]
        assert [link for link in links if "memfd" in link] == []
        assert "workers" not in status(d)


def test_a_launch_decodes_to_itself() -> None:
    launch = Launch(3, 4, 12.5, 5, (7, 8), True, (9,), False, (16,), True, (14,), True, 6, 15, 10, (11, 12, 13))
    assert Launch.decode(launch.encode()) == launch
    assert launch.descriptors() == (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
    alone = Launch(0, 1, 12.5, 5, (7,), False, (), False)
    assert Launch.decode(alone.encode()) == alone and alone.descriptors() == (5, 7)
    mover = StateLaunch(True, 5, (6, 7), (8,), True, "/state", "info", "text")
    assert StateLaunch.decode(mover.encode()) == mover and mover.descriptors() == (5, 6, 7, 8)
    assert WORKER_VARIABLE.startswith("STREAMD__") and STATE_VARIABLE.startswith(
        "STREAMD__"
    )  # not the variable of a setting


def test_messages_pass_with_a_descriptor_and_end_with_the_pipe() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open(os.devnull) as file:
        assert control.send(ours, ToParent.STORE, "name", file.fileno())
        assert control.send(ours, ToParent.STANDING, Standing(1, 2, 3.0, 0.5))
        message = control.receive(theirs, ToParent)
        assert message is not None and message[:2] == (ToParent.STORE, "name")
        assert os.readlink(f"/proc/self/fd/{message.fd}") == os.devnull and not os.get_inheritable(message.fd)
        os.close(message.fd)
        assert control.receive(theirs, ToParent) == (ToParent.STANDING, Standing(1, 2, 3.0, 0.5), -1)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            control.receive(theirs, ToParent)
        ours.close()
        assert control.receive(theirs, ToParent) is None
        assert not control.send(theirs, ToWorker.HURRY)


def test_internal_commands_refuse_to_be_run_by_hand() -> None:
    ran = subprocess.run([sys.executable, "-m", "streamd.daemon"], capture_output=True, text=True, timeout=WAIT_S)
    assert ran.returncode == 1 and "streamd serve" in ran.stderr


# -- deaths


def test_a_crash_of_the_only_worker_costs_its_connections_and_not_the_service(mock: str) -> None:
    with workers(mock, count="1") as d:
        answer = d.generation(tokens=1000, interval_ms=20)
        stream_id = opened(answer)
        before = only_worker(d)
        os.kill(before, signal.SIGSTOP)  # a connection made now waits in the listener's queue
        asking = http.client.HTTPConnection("127.0.0.1", d.port, timeout=WAIT_S)
        asking.request("GET", "/healthz")
        os.kill(before, signal.SIGKILL)
        d.line(r"ERROR .*worker died.* slot=0 status=-9 wait_s=0\.1")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
        assert d.request("GET", "/readyz").status == 200  # no request is refused before the successor serves, either
        with contextlib.suppress(ConnectionError):  # the dead worker had accepted it, or not
            assert asking.getresponse().status == 200
        assert only_worker(d) != before
        code, body = ask(d, "GET", f"/v1/streams/{stream_id}")
        assert code == 410 and body["error"]["code"] == "stream_gone"
        assert text_ended(d.generation(tokens=2).read())
        assert not any("Traceback" in line for line in d.lines)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        assert d.notify.names().count("READY") == 1


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
        # From either worker, also before the successor serves, the stream is gone and not unknown.
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


def test_a_worker_that_dies_again_and_again_is_replaced_more_and_more_slowly(mock: str, count: str) -> None:
    with workers(mock, count=count) as d:
        for k, wait_s in enumerate(("0.1", "0.2", "0.4")):
            pid = children(d.process.pid)[0]
            if count == "2":
                pid = until(lambda: pids(d)[0], "worker")
            os.kill(pid, signal.SIGKILL)
            d.until(lambda k=k: sum("worker died" in line for line in d.lines) == k + 1, "death")
            assert f"wait_s={wait_s}" in [line for line in d.lines if "worker died" in line][-1]
            until(lambda pid=pid: len(children(d.process.pid)) == int(count), "successor")
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


def test_a_stuck_only_worker_is_killed_and_replaced(mock: str) -> None:
    with workers(mock, "--worker-stuck", "2s", count="1") as d:
        before = only_worker(d)
        os.kill(before, signal.SIGSTOP)
        d.line(r"ERROR .*worker is stuck; killed.* slot=0")
        assert d.request("GET", "/healthz").status == 200
        assert not alive(before)


def test_workers_end_with_their_parent_and_leave_its_port(mock: str, count: str) -> None:
    with workers(mock, count=count) as d:
        answer = d.generation(tokens=1000, interval_ms=20)
        opened(answer)
        before, port = children(d.process.pid), d.port
        d.signal(signal.SIGKILL)
        d.ended()
        assert b"event: reconnect" in rest(answer)[0]
        until(lambda: not any(map(alive, before)), "end of the workers")
    with served("--upstream", mock, "--listen", f"127.0.0.1:{port}") as d:
        d.line(" serving ")


def test_a_parent_that_was_stopped_kills_no_worker(mock: str) -> None:
    with workers(mock, "--worker-stuck", "2s") as d:
        before = children(d.process.pid)
        d.signal(signal.SIGSTOP)
        # Longer than worker_stuck. The condition is the clock itself.
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 2.5, "time")
        d.signal(signal.SIGCONT)
        d.signal(signal.SIGHUP)
        d.line(" reloaded ")
        assert children(d.process.pid) == before and not any("stuck" in line for line in d.lines)


# -- start


def test_settings_that_no_worker_can_use_end_the_start(count: str) -> None:
    with served("--workers", count, "--memory-limit", "1MiB") as d:
        assert d.ended() == 2
        assert "memory" in "\n".join(d.lines) and "Traceback" not in "\n".join(d.lines)
        assert d.notify.names() == []


def test_a_worker_is_of_the_same_installation_as_its_parent(tmp_path: Path) -> None:
    """The working directory may hold another streamd, which `python -m` would take."""
    (tmp_path / "streamd").mkdir()
    (tmp_path / "streamd" / "__init__.py").write_text("raise SystemExit('another streamd')")
    probe = "from streamd.daemon import slot; import streamd, sys; sys.path.insert(0, ''); print(*slot._path_flags())"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S
    )
    assert ran.stdout.strip() == "-P", ran.stderr


# -- signals and stops


def test_a_running_generation_finishes_and_the_last_line_counts_it(held: Held, count: str) -> None:
    with served("--upstream", held.url, "--workers", count) as d:
        answer = d.generation()
        opened(answer)
        d.signal(signal.SIGTERM)
        until(lambda: refused(d), "refusal")  # the parent says "draining" before its workers hear of it
        held.go_on()
        body, whole = rest(answer)
        assert whole and body.endswith(b"data: [DONE]\n\n")
        assert d.ended() == 0
        assert d.lines[-1].endswith(" stopped finished=1 sent_away=0 cut=0")
        assert [line.split()[2] for line in d.lines if " signal=SIGTERM" in line] == ["draining"]


def test_ctrl_c_reaches_the_whole_group_and_drains_once_with_short_times(mock: str, count: str) -> None:
    args = ("--upstream", mock, "--workers", count)
    with served(*args, new_group=True) as d:
        answer = d.generation(tokens=2000, interval_ms=20)
        stream_id = opened(answer)
        os.killpg(d.process.pid, signal.SIGINT)
        body, whole = rest(answer)
        assert not whole
        told = events_in(body.partition(b"\n\n")[2])[-1]
        assert told.name == "reconnect" and told.json["last_id"].startswith(stream_id)
        assert d.ended() == 0
        assert d.lines[-1].endswith(" stopped finished=0 sent_away=0 cut=1")
        assert not any("Traceback" in line or "worker died" in line for line in d.lines)


def test_ctrl_c_during_the_start_of_the_worker_stops_cleanly(mock: str) -> None:
    with served("--upstream", mock, new_group=True) as d:
        d.until(lambda: children(d.process.pid), "worker")
        os.killpg(d.process.pid, signal.SIGINT)
        assert d.ended() == 0
        assert " stopped " in d.lines[-1]
        assert not any("Traceback" in line or "worker died" in line for line in d.lines)


class Clock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_second_signal_counts_only_a_second_later() -> None:
    """A shell may send Ctrl-C twice. On a clock that jumps."""
    clock = Clock()
    parent = Parent(Settings(), Settings, systemd.Notifier(), [], clock)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        parent._slots[0].take(os.getpid(), ours, clock.now)
        parent._stop("SIGTERM", quick=False)
        assert control.receive(theirs, ToWorker) == (ToWorker.DRAIN, (False, False, "SIGTERM"), -1)
        for wait_s in (SECOND_SIGNAL_S / 2, SECOND_SIGNAL_S / 4):
            clock.now += wait_s
            parent._stop("SIGTERM", quick=False)
            with pytest.raises(BlockingIOError):
                control.receive(theirs, ToWorker)
        clock.now += SECOND_SIGNAL_S / 4
        parent._stop("SIGTERM", quick=False)
        assert control.receive(theirs, ToWorker) == (ToWorker.HURRY, None, -1)


class Hearing(systemd.Notifier):
    """Keeps what systemd would be told."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self._words = words

    def _tell(self, data: bytes, *given: Any, **named: Any) -> bool:
        self._words.append(data.decode())
        return True


class Told:
    """A parent with a worker that the test plays, on a clock that jumps, and the words that systemd gets."""

    def __init__(self, sock: socket.socket, theirs: socket.socket, **settings: Any) -> None:
        self.clock = Clock()
        self.theirs = theirs
        theirs.setblocking(False)
        self.words: list[str] = []
        self.parent = Parent(Settings(**settings), Settings, Hearing(self.words), [], self.clock)
        self.parent._slots[0].take(os.getpid(), sock, self.clock.now)
        self.parent._worker_ready(self.parent._slots[0], "")
        self.words.clear()

    def orders(self) -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                message = control.receive(self.theirs, ToWorker)
                assert message is not None
                found.append(message.kind.value)
        return found

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.parent._tick()

    def kinds(self) -> list[str]:
        """The first words of the assignments since the last call, extensions left out."""
        kinds = [word.split("=")[0] for word in self.words]
        self.words.clear()
        return [kind for kind in kinds if kind != "EXTEND_TIMEOUT_USEC"]


@contextlib.contextmanager
def told(**settings: Any) -> Iterator[Told]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield Told(ours, theirs, **settings)


def test_systemd_hears_of_an_operators_drain_when_it_cannot_be_taken_back_any_more() -> None:
    with told(drain_delay_s=10.0) as t:
        t.parent._stop(control.ADMIN, quick=False)
        assert t.orders() == ["drain"] and t.kinds() == ["STATUS"]
        t.pass_time(9.9)
        assert t.orders() == [] and t.kinds() == []
        t.pass_time(0.2)
        assert t.orders() == ["close"] and t.kinds() == ["STOPPING"]
        t.parent._take_back(t.parent._slots[0])
        assert t.orders() == [] and t.parent._state is control.DaemonState.DRAINING


def test_systemd_hears_of_a_signals_drain_at_once() -> None:
    with told(drain_delay_s=10.0) as t:
        t.parent._stop("SIGTERM", quick=False)
        assert t.orders() == ["drain"] and t.kinds() == ["STOPPING"]
        t.parent._take_back(t.parent._slots[0])
        assert t.orders() == [], "systemd waits for the end"
        t.pass_time(10.1)
        assert t.orders() == ["close"] and t.kinds() == []


def test_a_drain_that_is_taken_back_leaves_nothing_behind() -> None:
    with told(drain_delay_s=10.0, drain_timeout_s=5.0) as t:
        for _ in range(2):
            t.parent._stop(control.ADMIN, quick=False)
            t.pass_time(3)
            t.parent._take_back(t.parent._slots[0])
            assert t.orders() == ["drain", "take_back"] and t.kinds() == ["STATUS", "STATUS"]
            assert t.parent._state is control.DaemonState.SERVING and t.parent._status_line().startswith("serving: ")
            t.parent._slots[0].heard_at = t.clock.now + 100
            t.pass_time(100)
            assert t.orders() == [], "no deadline of the drain is left"


def test_a_worker_that_takes_back_a_drain_that_there_is_not_is_told_so() -> None:
    with told(drain_delay_s=10.0) as t:
        t.parent._take_back(t.parent._slots[0])
        assert t.orders() == ["take_back"] and t.kinds() == []


def test_a_second_request_for_a_drain_counts_at_once_and_in_its_delay() -> None:
    with told(drain_delay_s=10.0) as t:
        t.parent._stop(control.ADMIN, quick=False)
        t.parent._stop(control.ADMIN, quick=False)
        assert t.orders() == ["drain", "close", "hurry"] and t.kinds() == ["STATUS", "STOPPING"]


def test_the_report_of_a_drain_adds_up_all_workers(held: Held) -> None:
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
        found = re.search(r" stopped finished=(\d+) sent_away=0 cut=0", last)
        assert found is not None and int(found[1]) == finished
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", d.port))


def test_new_connections_are_refused_while_a_generation_ends(held: Held, count: str) -> None:
    """A drain leaves no listener open without a process that accepts there."""
    with workers(held.url, "--drain-delay", "0s", count=count) as d:
        answer = d.generation()
        d.signal(signal.SIGTERM)
        until(lambda: refused(d), "refusal")
        assert d.process.poll() is None
        held.go_on()
        assert text_ended(answer.read())
        assert d.ended() == 0


def test_a_second_signal_a_second_later_cuts_at_once(mock: str, count: str) -> None:
    with workers(mock, "--drain-delay", "0s", count=count) as d:
        answer = d.generation(tokens=100_000)
        d.signal(signal.SIGTERM)
        d.line(" draining ")
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 1.1, "a second")
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        assert b"event: reconnect" in rest(answer)[0]
        assert re.search(r" stopped finished=0 sent_away=0 cut=1", d.lines[-1])


def test_a_drain_asked_for_at_any_worker_drains_all(mock: str) -> None:
    with workers(mock, "--drain-delay", "0s") as d:
        running = one_in_each(d, 100)
        assert admin(d, "POST", "/drain").status == 202
        d.line(" draining signal=admin")
        assert all(text_ended(answer.read()) for answer in running.values())
        assert d.ended() == 0


def test_a_drain_is_taken_back_and_the_next_is_watched_to_its_end(held: Held, tmp_path: Path) -> None:
    """On call: drained by mistake, taken back, drained again and watched. Two workers."""
    delayed = ("--drain-delay", "2s", "--admin", f"unix:{tmp_path}/admin.sock")
    with served("--workers", "2", "--upstream", held.url, *delayed) as d:
        d.notify.until("READY=1")
        operator = Operator(tmp_path / "admin.sock")
        assert operator.ask("DELETE", "/drain")[0] == 409
        running = [d.generation() for _ in range(4)]
        for answer in running:
            opened(answer)
        assert operator.ask("POST", "/drain")[0] == 202
        assert operator.ask("DELETE", "/drain") == (200, {"state": "serving"})
        d.line(" drain taken back")
        assert operator.ask("GET", "/status")[1]["drain"] is None and d.request("GET", "/readyz").status == 200
        assert operator.ask("POST", "/drain")[0] == 202
        until(lambda: refused(d), "refusal")
        assert operator.ask("DELETE", "/drain")[0] == 409
        # A worker's numbers are up to a second old in the others.
        drain = until(lambda: (s := operator.ask("GET", "/status")[1])["drain"]["left"] == 4 and s, "4 that are left")
        assert drain["state"] == "draining" and drain["drain"]["by"] == "admin" and drain["drain"]["deadline_s"] > 20
        held.go_on()
        assert text_ended(running[0].read())
        for answer in running[1:]:
            answer.read()
        assert d.ended() == 0 and not (tmp_path / "admin.sock").exists()
        assert " stopped finished=4 sent_away=0 cut=0" in d.lines[-1]
        assert d.notify.names().count("STOPPING") == 1


class Operator:
    """Asks over the admin socket, a connection for each request."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, method: str, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost", timeout=WAIT_S)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(WAIT_S)
        connection.sock.connect(str(self.path))
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


def test_the_file_of_a_unix_listener_is_removed_with_it(mock: str, count: str, tmp_path: Path) -> None:
    path = tmp_path / "streamd.sock"
    with workers(mock, "--listen", f"unix:{path}", "--drain-delay", "0s", count=count) as d:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        d.signal(signal.SIGTERM)
        assert d.ended() == 0 and not path.exists()


# -- reloads and the log


def write(path: Path, upstream_name: str, mock: str, *more: str) -> Path:
    path.write_text("\n".join((*more, "[[upstream]]", f'name = "{upstream_name}"', f'url = "{mock}"', "")))
    return path


def reload(d: Served) -> str:
    """Send SIGHUP and return the log line with its outcome."""
    before = sum(" reload" in line for line in d.lines)
    d.signal(signal.SIGHUP)
    d.until(lambda: sum(" reload" in line for line in d.lines) > before, "line about the reload")
    return [line for line in d.lines if " reload" in line][-1]


def test_a_reload_applies_to_new_requests_and_drops_no_connection(mock: str, held: Held, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", held.url)
    with served("--config", str(path)) as d:
        reader = d.generation()
        opened(reader)
        write(path, "two", mock)
        assert "reloaded upstreams=two" in reload(d)
        assert d.generation(tokens=1).getheader("x-upstream") == "two"
        # Limits: a stream runs, so there is no room for a second.
        write(path, "two", mock, "streams_max = 1", "conns_max = 8")
        reload(d)
        refused = d.request("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), JSON)
        assert refused.status == 503 and b"over_capacity" in refused.read()
        write(path, "two", mock, 'log_format = "json"')
        d.signal(signal.SIGHUP)
        d.until(lambda: any(line.startswith("{") and '"reloaded"' in line for line in d.lines), "a line of JSON")
        assert d.generation(tokens=1).status == 200
        held.go_on()
        body, whole = rest(reader)
        assert whole and body.endswith(b"[DONE]\n\n") and reader.getheader("x-upstream") == "one"


NOT_RIGHT = {
    'heartbeat = "soon"': r"s.toml.*heartbeat.*soon",
    "heartbeet = 1": "heartbeet",
    "this is no TOML": "s.toml",
    "conns_max = 10000000": "conns_max",
    'keys_file = "/nowhere/keys"': "keys_file",
}


def test_a_wrong_file_changes_nothing_and_is_logged_with_its_fault(mock: str, count: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", mock)
    with served("--config", str(path), "--workers", count, "--metrics-listen", "127.0.0.1:0") as d:
        d.notify.until("READY=1")
        for line, why in NOT_RIGHT.items():
            write(path, "two", mock, line)
            assert re.search(rf'ERROR "?reload refused.*{why}', reload(d)), line
            assert d.generation(tokens=1).getheader("x-upstream") == "one"
        scraping = http.client.HTTPConnection("127.0.0.1", int(d.line(r" serving .*metrics=\S*?:(\d+)")[1]))
        until(lambda: scraped(scraping, "streamd_config_last_reload_successful") == 0, "the refusal in the metrics")
        d.notify.until("READY=1", 1 + len(NOT_RIGHT))
        assert d.notify.names() == ["READY"] + ["RELOADING", "READY"] * len(NOT_RIGHT)
        # Settings that need a restart are named; the rest of that file is taken.
        write(path, "two", mock, 'admin = "127.0.0.1:1"')
        assert "reloaded upstreams=two" in reload(d)
        assert d.line(r"settings need a restart.*settings=(\S+)")[1] == "admin"
        until(lambda: scraped(scraping, "streamd_config_last_reload_successful") == 1, "the reload in the metrics")
        read_at = scraped(scraping, "streamd_config_last_reload_success_timestamp_seconds")
        assert scraped(scraping, "process_start_time_seconds") < read_at <= time.time()
        assert scraped(scraping, "process_cpu_seconds_total") > 0 < scraped(scraping, "process_resident_memory_bytes")


def test_a_reload_takes_all_settings_except_those_that_need_a_restart() -> None:
    running = Settings(workers=1, heartbeat_s=15.0)
    taken, fixed = as_far_as_running(running, Settings(workers=4, heartbeat_s=7.0, state_dir="/x"))
    assert fixed == ("workers", "state_dir")
    assert (taken.workers, taken.heartbeat_s, taken.state_dir) == (1, 7.0, "")
    assert taken.route("/v1/chat/completions").heartbeat_s == 7.0


def test_a_reload_while_stopping_is_refused(held: Held, count: str) -> None:
    with served("--upstream", held.url, "--workers", count) as d:
        answer = d.generation()
        opened(answer)
        d.signal(signal.SIGTERM)
        d.line("draining")
        d.signal(signal.SIGHUP)
        d.line("reload refused; streamd is stopping")
        held.go_on()
        assert rest(answer)[1]
        assert d.ended() == 0
        assert "RELOADING" not in d.notify.names()


def test_simultaneous_reloads_end_with_the_last_file(mock: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", mock)
    with served("--config", str(path), "--workers", "2") as d:
        d.notify.until("READY=1")
        for k in range(20):
            write(path, f"name{k}", mock)
            d.signal(signal.SIGHUP)
            d.notify.names()  # as systemd does, which never lets its queue fill up
        until(lambda: d.notify.names() and any("reloaded upstreams=name19" in line for line in d.lines), "last reload")
        assert upstreams_of(d) == {"name19"}
        until(lambda: d.notify.names()[-1] == "READY", "end of the last reload")
        names = d.notify.names()
        assert names == ["READY", *["RELOADING", "READY"] * (len(names) // 2)]


def test_a_reload_asked_for_during_the_start_waits_for_its_end(mock: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", mock)
    with served("--config", str(path)) as d:
        d.until(lambda: children(d.process.pid), "worker")
        write(path, "two", mock)
        d.signal(signal.SIGHUP)
        d.line("reloaded upstreams=two")
        d.notify.until("READY=1", 2)
        assert d.notify.names() == ["READY", "RELOADING", "READY"]


def test_a_reload_does_not_wait_for_a_dead_worker(mock: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.toml", "one", mock)
    with served("--config", str(path)) as d:
        d.line(" serving ")
        pid = only_worker(d)
        os.kill(pid, signal.SIGSTOP)
        write(path, "two", mock)
        d.signal(signal.SIGHUP)
        d.notify.until("RELOADING=1")
        os.kill(pid, signal.SIGKILL)
        d.line("reloaded upstreams=two")
        assert d.generation(tokens=1).getheader("x-upstream") == "two"


def test_a_worker_that_cannot_start_again_says_why_and_starts_after_a_reload(mock: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    path = write(tmp_path / "s.toml", "one", mock, f'keys_file = "{keys}"')
    with served("--config", str(path)) as d:
        d.line(" serving ")
        keys.unlink()
        os.kill(only_worker(d), signal.SIGKILL)
        d.line(r"worker died.*status=2 error=.*keys_file")
        write(path, "two", mock)
        d.signal(signal.SIGHUP)
        d.line("reloaded upstreams=two")
        assert d.generation(tokens=1).getheader("x-upstream") == "two"


def config(path: Path, mock: str, level: str) -> None:
    path.write_text(f'log_level = "{level}"\nworkers = 2\n[[upstream]]\nname = "{level}"\nurl = "{mock}"\n')


def test_a_reload_reaches_all_workers_and_a_bad_file_none(mock: str, tmp_path: Path) -> None:
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
        d.line(r"WARNING .*settings need a restart.*workers")
        until(lambda: upstreams_of(d) == {"warning"}, "the new upstream everywhere")
        # A worker that starts later has the new settings too.
        before = pids(d)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: pids(d)[0] not in (0, before[0]), "successor")
        assert upstreams_of(d) == {"warning"}
        assert d.generation(tokens=1).getheader("x-upstream") == "warning"


def upstreams_of(d: Served) -> set[str]:
    """The names of the upstreams that answer, over enough connections to reach every worker."""
    answers = [d.generation(tokens=1) for _ in range(12)]
    names = {answer.getheader("x-upstream") or "" for answer in answers}
    for answer in answers:
        answer.close()
    return names


def test_the_log_level_reaches_all_workers(mock: str, count: str) -> None:
    with workers(mock, count=count) as d:
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


# -- sockets from systemd


def test_sockets_from_systemd_are_served_by_their_names_and_stay_open(mock: str, count: str) -> None:
    here = ("127.0.0.1", 0)
    with (
        socket.create_server(here) as public,
        socket.create_server(here) as admin,
        socket.create_server(here) as metrics,
    ):
        fds = (("public", public.fileno()), ("admin", admin.fileno()), ("metrics", metrics.fileno()))
        with served("--upstream", mock, "--workers", count, listen_fds=fds) as d:
            assert d.port == public.getsockname()[1]
            assert d.request("GET", "/streams").status == 404
            scraping = http.client.HTTPConnection(*metrics.getsockname())
            scraping.request("GET", "/metrics")
            assert b"streamd_build_info" in scraping.getresponse().read()
            scraping.request("GET", "/v1/streams")
            assert scraping.getresponse().status == 404
            scraping.close()
            asking = http.client.HTTPConnection(*admin.getsockname())
            asking.request("GET", "/streams")
            assert asking.getresponse().status == 200
            d.signal(signal.SIGTERM)
            assert d.ended() == 0
        waiting = socket.create_connection(public.getsockname())  # no process runs: the kernel keeps the connection
        waiting.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with served("--upstream", mock, "--workers", count, listen_fds=fds) as d:
            assert waiting.recv(4096).startswith(b"HTTP/1.1 200")
            waiting.close()


def test_a_socket_from_systemd_beyond_loopback_needs_keys_as_listen_does(mock: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as public:
        with served("--upstream", mock, listen_fds=[("public", public.fileno())]) as d:
            assert d.ended() == 2
            assert "streamd.socket: ListenStream = 0.0.0.0:" in d.lines[-1] and "keys_file" in d.lines[-1]
        check_inherited(Settings(insecure_public=True), [public])
        check_inherited(Settings(keys_file="/keys"), [public])
        check_inherited(Settings(metrics_public=True), [], [public])
        for sockets in ([public], []), ([], [public]):
            with pytest.raises(ConfigError):
                check_inherited(Settings(), *sockets)


def test_a_connection_on_a_passed_socket_has_the_options_before_a_worker_is_up() -> None:
    parent = Parent(Settings(notsent_lowat_bytes=12_345), Settings, systemd.Notifier(), [], Clock())
    with socket.create_server(("127.0.0.1", 0)) as passed:
        passed.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)  # of the process before
        parent._take_sockets(systemd.Inherited([("public", passed)], [], []))
        with socket.create_connection(passed.getsockname()), passed.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 12_345
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000


# -- restart without loss


# Three starts on a busy machine may take longer than the default retention and publisher grace.
PATIENT = ("--publisher-grace", "10m", "--retention", "10m")


class Life:
    """Processes that follow each other, with the listener and the saved streams that pass between them."""

    def __init__(self, mock: str, place: str, tmp_path: Path) -> None:
        self.args = ["--upstream", mock, "--drain-timeout", "500ms", *PATIENT]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.fds = [("public", self.listener.fileno())]
        self.state_dir = tmp_path / "state"
        self._stored: int | None = None
        if place == "file":
            self.args += ["--state-dir", str(self.state_dir)]
        self._keeps = place == "store"

    def next(self) -> Served:
        stored = [] if self._stored is None else [(systemd.STATE_FDNAME, self._stored)]
        return Served(self.args, {}, [*self.fds, *stored])

    def stop(self, d: Served) -> None:
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
        d.notify.names()
        if self._keeps and d.notify.fds:
            if self._stored is not None:
                os.close(self._stored)
            self._stored = os.dup(d.notify.fds[-1])
        d.end()

    def crash(self, d: Served) -> None:
        told = d.notify.names()
        d.signal(signal.SIGKILL)
        d.ended()
        d.end()
        if self._stored is not None:
            assert "FDSTOREREMOVE" in told
            os.close(self._stored)
            self._stored = None

    def close(self) -> None:
        self.listener.close()
        if self._stored is not None:
            os.close(self._stored)


@pytest.fixture(params=[("file", 1), ("store", 2)], ids=lambda place: f"{place[0]}-{place[1]}")
def life(request: pytest.FixtureRequest, mock: str, tmp_path: Path) -> Iterator[Life]:
    place, workers = request.param
    life = Life(mock, place, tmp_path)
    life.args += ["--workers", str(workers)]
    yield life
    life.close()


def cut_off(d: Served, answer: http.client.HTTPResponse) -> tuple[bytes, str]:
    """Stop the daemon under a reader; return the bytes that the reader still got, and its last position."""
    d.signal(signal.SIGTERM)
    body, clean = rest(answer)
    assert not clean
    told = events_in(body.partition(b"\n\n")[2])[-1]
    assert told.name == "reconnect"
    return body, told.json["last_id"]


def test_a_restart_loses_nothing(life: Life) -> None:
    d = life.next()
    whole = d.generation(tokens=20, interval_ms=1)
    whole_text, whole_id = text_of(events_in(whole.read())), whole.getheader("x-stream-id") or ""
    cut = d.generation(tokens=5000, interval_ms=5)
    cut_id = opened(cut)
    epoch = d.request("PUT", "/v1/streams/news").read().partition(b'"epoch":"')[2][:6].decode()
    assert d.request("POST", "/v1/streams/news/events", b"one").read() == b'{"last_seq":1}'
    seen, last_id = cut_off(d, cut)
    assert last_id.startswith(f"{cut_id}:")
    life.stop(d)

    d = life.next()
    again, clean = resumed(d, whole_id)
    assert clean and text_of(events_in(again)) == whole_text
    body, clean = resumed(d, cut_id, last_id)
    *_, error = events_in(body)
    assert not clean and error.json["error"]["code"] == "restarted"
    from_start = text_of(events_in(resumed(d, cut_id)[0]))
    assert text_of(events_in(seen.partition(b"\n\n")[2])) in from_start
    more = d.request("POST", "/v1/streams/news/events", b"two", {"Expected-Seq": "1"})
    assert more.read() == b'{"last_seq":2}'
    life.stop(d)

    d = life.next()
    last = d.request("POST", "/v1/streams/news/events?seal=finished", b"three", {"Expected-Seq": "2"})
    assert last.read() == b'{"last_seq":3}'
    body, clean = resumed(d, "news", f"news:{epoch}:1")
    assert clean and events_in(body)[-1].id == f"news:{epoch}:3"
    assert d.request("GET", f"/v1/streams/{cut_id}", headers={"Last-Event-ID": f"{cut_id}:99999"}).status == 204
    life.crash(d)

    d = life.next()
    assert d.request("GET", f"/v1/streams/{cut_id}").status == 410  # a save that was restored is not restored again
    life.stop(d)


def test_a_port_that_is_taken_leaves_saved_streams_for_the_next_try(mock: str, tmp_path: Path) -> None:
    args = ("--upstream", mock, "--state-dir", str(tmp_path), *PATIENT)
    with served(*args) as d:
        answer = d.generation(tokens=3, interval_ms=1)
        answer.read()
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
    with socket.create_server(("127.0.0.1", 0)) as taken, served(*args, *listening_at(taken)) as d:
        assert d.ended() == 1
    with served(*args) as d:
        assert resumed(d, answer.getheader("x-stream-id") or "")[1]


def test_the_daemon_starts_despite_a_damaged_file(mock: str, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(os.urandom(1000))
    with served("--upstream", mock, "--state-dir", str(tmp_path)) as d:
        assert d.request("GET", "/readyz").status == 200
        d.line("ERROR .*can't be read.*not a file of streamd's saved streams")
        assert os.listdir(tmp_path) == [STATE + ".damaged"]
