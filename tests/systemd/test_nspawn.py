"""streamd under a real systemd: installed, started, activated, reloaded, stuck, killed, restarted, stopped, booted.

`make test-systemd` runs these, as root. The tree is installed into the container with its own `make install`; the mock
upstream and the readers run outside and meet it on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import nspawn
import pytest
import resuming_reader
from resuming_reader import Outcome

pytestmark = pytest.mark.systemd

T = TypeVar("T")

PATIENCE_S = 60.0  # for a condition that normally comes within a second or five
RAMP_PER_S = 400  # new readers per second
READERS = int(
    os.environ.get("STREAMD_READERS", "100")
)  # for the restart under load; the tests themselves need two cores
SETTINGS = "/etc/streamd/streamd.toml"
UNITS = ("streamd.socket", "streamd-admin.socket", "streamd.service")
DROP_IN = "/etc/systemd/system/streamd.service.d/test.conf"
STOP_DROP_IN = "/etc/systemd/system/streamd.service.d/stop.conf"
INSTALL = ("make", "-C", "/src", "install", "PIP_FLAGS=--no-index --find-links=/wheels")


class Installed:
    """A booted machine with streamd installed, and the upstream outside."""

    def __init__(self, machine: nspawn.Machine, port: int, mock_port: int) -> None:
        self.machine = machine
        self.port = port
        self.mock_port = mock_port
        self.run = machine.run
        self.ran = machine.ran

    def write(self, path: str, text: str) -> None:
        there = Path(str(self.machine.root) + path)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(text)

    def settings(self, more: str = "", upstreams: str = "") -> str:
        """streamd.toml for these tests, with further lines at its top, and the mock unless `upstreams` are given."""
        mock = f'[[upstream]]\nname = "mock"\nurl = "http://127.0.0.1:{self.mock_port}"\n'
        key = 'key_file = "credential:upstream_mock"\n'
        return f'{more}\nstate_dir = "/var/lib/streamd"\nworker_stuck = "2s"\n{upstreams or mock + key}'

    def fresh(self, more: str = "", upstreams: str = "") -> None:
        """Stop and start streamd, with these settings and a clean record."""
        self.run("systemctl", "stop", *UNITS)
        self.write(SETTINGS, self.settings(more, upstreams))
        # This also resets the count of recent starts, which has a limit.
        self.ran("systemctl", "reset-failed", *UNITS)
        self.run("systemctl", "start", "streamd.service")

    def show(self, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, "streamd.service").strip()

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def worker_pids(self) -> list[int]:
        pid = self.main_pid()
        return [int(child) for child in self.run("cat", f"/proc/{pid}/task/{pid}/children").split()]

    def journal(self) -> str:
        return self.run("journalctl", "-o", "cat", "-u", "streamd.service")

    def warnings(self) -> list[str]:
        """What an on-call person sees first: `journalctl -p warning` of the service since its last start."""
        invocation = f"_SYSTEMD_INVOCATION_ID={self.show('InvocationID')}"
        return self.run("journalctl", "-p", "warning", "-o", "cat", invocation).splitlines()

    def chat(self) -> int:
        """The status of a short chat."""
        asked = {"model": "mock-llm", "messages": [{"role": "user", "content": "Hi"}]}
        return self.get("/v1/chat/completions", json.dumps(asked).encode())

    def get(self, path: str, body: bytes | None = None) -> int:
        """The status of a GET, or of a POST with a body; 0 without a listener or if the connection breaks."""
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"} if body else {}
        )
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except OSError:
            return 0

    def admin(self, path: str) -> str:
        return self.run("curl", "-sf", "--unix-socket", "/run/streamd/admin.sock", f"http://admin{path}")

    async def reader(self, seed: int, *, tokens: int = 40, interval_ms: int = 50, resume: bool = True) -> Outcome:
        return await resuming_reader.read(self.port, seed=seed, tokens=tokens, interval_ms=interval_ms, resume=resume)

    def is_whole(self, outcome: Outcome, seed: int, tokens: int = 40) -> bool:
        whole = resuming_reader.whole_text(self.mock_port, seed, tokens)
        return outcome.end == "complete" and outcome.gaps == 0 and outcome.text == whole


def until(condition: Callable[[], T], what: str) -> T:
    """Wait for a condition and return its value."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {PATIENCE_S:.0f} s for {what}")


# The container shares our network, where the kernel assigns ports from 32768 on to any process: such a port may be
# taken between two starts.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    for port in random.sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@contextlib.contextmanager
def mock_llm() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An inference server: its process and its port."""
    command = [sys.executable, "-m", "streamd", "mock-llm", "--listen", "127.0.0.1:0", "--ttft-ms", "20"]
    with subprocess.Popen(command, cwd=nspawn.PROJECT, stdout=subprocess.PIPE, text=True) as mock:
        assert mock.stdout is not None
        listening = re.search(r":(\d+)\s*$", mock.stdout.readline())
        assert listening is not None
        try:
            yield mock, int(listening[1])
        finally:
            mock.kill()


@pytest.fixture(scope="module")
def mock_port() -> Iterator[int]:
    with mock_llm() as (_, port):
        yield port


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    try:
        with nspawn.overlay(nspawn.debian_root()) as root:
            yield root
    except nspawn.Unavailable as missing:
        pytest.skip(str(missing))


@contextlib.contextmanager
def booted(root: Path, log: Path) -> Iterator[nspawn.Machine]:
    try:
        machine = nspawn.Machine(root, {nspawn.PROJECT: "/src", nspawn.wheels(): "/wheels"}, log)
    except nspawn.Unavailable as missing:
        pytest.skip(str(missing))
    with machine:
        yield machine


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boot") / "boot.log"


@pytest.fixture(scope="module")
def streamd(root: Path, log: Path, mock_port: int) -> Iterator[Installed]:
    with booted(root, log) as machine:
        installed = Installed(machine, free_port(), mock_port)
        machine.run(*INSTALL, timeout_s=300)
        installed.write("/etc/streamd/credentials/mock", "sk-upstream\n")
        socket_unit = "/etc/systemd/system/streamd.socket.d/test.conf"
        installed.write(socket_unit, f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{installed.port}\n")
        installed.write(DROP_IN, "[Service]\nWatchdogSec=4\n")
        installed.write(SETTINGS, installed.settings())
        machine.run("systemctl", "daemon-reload")
        yield installed


# Installing


def test_a_second_installation_changes_nothing_and_keeps_a_changed_file(streamd: Installed) -> None:
    streamd.write(SETTINGS, streamd.settings("# mine"))
    again = streamd.ran(*INSTALL, check=True, timeout_s=300)
    assert f"{SETTINGS}: kept as you changed it" in again.stderr
    assert streamd.run("head", "-1", SETTINGS) == "# mine\n"
    assert streamd.run("streamd", "--version").startswith("streamd ")
    assert streamd.run("id", "-un", "streamd") == "streamd\n"
    assert streamd.run("stat", "-c", "%a %U", "/etc/streamd/credentials") == "700 root\n"


# Starting


def test_enable_now_starts_the_service_as_its_own_user(streamd: Installed) -> None:
    streamd.run("systemctl", "enable", "--now", "streamd.service")
    assert streamd.show("ActiveState") == "active"
    assert streamd.get("/readyz") == 200
    until(lambda: streamd.show("StatusText"), "a STATUS=")
    pid = streamd.main_pid()
    assert streamd.run("stat", "-c", "%U", f"/proc/{pid}") == "streamd\n"
    assert re.search(r"NoNewPrivs:\s+1\n", streamd.run("cat", f"/proc/{pid}/status"))


def test_a_stream_goes_through_the_sandbox_whole(streamd: Installed) -> None:
    streamd.fresh()
    outcome = asyncio.run(streamd.reader(1))
    assert streamd.is_whole(outcome, 1)


def test_only_the_group_may_use_the_admin_socket(streamd: Installed) -> None:
    streamd.fresh()
    assert streamd.run("stat", "-c", "%a %U %G", "/run/streamd/admin.sock") == "660 streamd streamd\n"
    assert isinstance(json.loads(streamd.admin("/status")), dict)
    stranger = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    refused = streamd.ran(*stranger, "curl", "-s", "--unix-socket", "/run/streamd/admin.sock", "http://admin/status")
    assert refused.returncode == 7  # curl's exit code for a failed connection


def test_wrong_settings_fail_the_start_once_and_are_logged(streamd: Installed) -> None:
    streamd.fresh()
    streamd.run("systemctl", "stop", *UNITS)
    streamd.write(SETTINGS, streamd.settings('heartbeet = "15s"'))
    assert streamd.ran("systemctl", "start", "streamd.service").returncode != 0
    assert streamd.show("ExecMainStatus") == "2"
    assert streamd.show("NRestarts") == "0"
    assert "heartbeet" in streamd.journal()


# Socket activation


def test_a_connection_starts_the_service(streamd: Installed) -> None:
    streamd.fresh()
    streamd.run("systemctl", "stop", "streamd.service")
    assert streamd.show("ActiveState") == "inactive"
    assert streamd.get("/readyz") == 200
    assert streamd.show("ActiveState") == "active"


def test_a_connection_to_the_admin_socket_starts_the_service(streamd: Installed) -> None:
    streamd.fresh()
    streamd.run("systemctl", "stop", "streamd.service")
    streamd.admin("/status")
    assert streamd.show("ActiveState") == "active"


def test_without_its_public_socket_the_service_does_not_start(streamd: Installed) -> None:
    streamd.fresh()
    streamd.run("systemctl", "stop", *UNITS)
    with socket.create_server(("127.0.0.1", streamd.port)):
        assert streamd.ran("systemctl", "start", "streamd.service").returncode != 0
        assert streamd.show("ActiveState") == "inactive"
    streamd.fresh()
    assert streamd.get("/readyz") == 200


# Reloading


def test_a_reload_changes_settings_and_drops_no_reader(streamd: Installed) -> None:
    streamd.fresh()
    pid = streamd.main_pid()

    async def reload_in_mid_stream() -> Outcome:
        reading = asyncio.create_task(streamd.reader(2))
        await until_streams(streamd, 1)
        streamd.write(SETTINGS, streamd.settings("heartbeat = '7s'"))
        await asyncio.to_thread(streamd.run, "systemctl", "reload", "streamd.service")
        return await reading

    outcome = asyncio.run(reload_in_mid_stream())
    assert streamd.is_whole(outcome, 2)
    assert outcome.resumes == 0
    assert streamd.main_pid() == pid
    until(lambda: streamd.show("ActiveState") == "active", "READY=1 after RELOADING=1")


def test_a_reload_of_a_wrong_file_fails_and_changes_nothing(streamd: Installed) -> None:
    streamd.fresh()
    pid = streamd.main_pid()
    streamd.write(SETTINGS, streamd.settings('heartbeat = "soon"'))
    assert streamd.ran("systemctl", "reload", "streamd.service").returncode != 0
    assert re.search(r"streamd\.toml.*1.*heartbeat.*soon", streamd.journal())
    assert streamd.show("ActiveState") == "active"
    assert streamd.main_pid() == pid
    assert streamd.is_whole(asyncio.run(streamd.reader(3)), 3)


# Stuck and killed


async def until_streams(streamd: Installed, count: int) -> None:
    """Wait until the metrics show `count` live streams."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        metrics = await asyncio.to_thread(streamd.admin, "/metrics")
        running = re.findall(r'^streamd_streams\{state="live"\} ([\d.e+]+)$', metrics, re.M)
        if sum(map(float, running)) >= count:
            return
    raise AssertionError(f"waited {PATIENCE_S:.0f} s for {count} running streams")


def test_a_stuck_worker_takes_only_its_own_streams_along(streamd: Installed) -> None:
    streamd.fresh("workers = 2")
    until(lambda: len(streamd.worker_pids()) == 2, "two workers")
    workers = streamd.worker_pids()
    main_pid = streamd.main_pid()

    async def stop_one() -> list[Outcome]:
        reading = [asyncio.create_task(streamd.reader(seed, tokens=160, resume=False)) for seed in range(16)]
        await until_streams(streamd, len(reading))
        await asyncio.to_thread(streamd.run, "sh", "-c", f"kill -STOP {workers[0]}")
        return await asyncio.gather(*reading)

    outcomes = asyncio.run(stop_one())
    whole = [streamd.is_whole(outcome, seed, 160) for seed, outcome in enumerate(outcomes)]
    assert 0 < sum(whole) < len(outcomes)
    until(lambda: workers[0] not in streamd.worker_pids() and len(streamd.worker_pids()) == 2, "another worker")
    assert streamd.main_pid() == main_pid
    assert streamd.show("NRestarts") == "0"
    assert streamd.is_whole(asyncio.run(streamd.reader(4)), 4)


def test_a_killed_only_worker_is_replaced_without_a_restart_or_a_refused_connection(streamd: Installed) -> None:
    streamd.fresh()
    main_pid, (worker,) = streamd.main_pid(), streamd.worker_pids()
    streamd.run("sh", "-c", f"kill -KILL {worker}")
    assert streamd.get("/healthz") == 200  # the connection waited in the kernel's queue
    assert worker not in streamd.worker_pids()
    assert streamd.main_pid() == main_pid and streamd.show("NRestarts") == "0"
    assert "worker died" in streamd.journal()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stuck_main_process_is_restarted_by_the_watchdog(streamd: Installed, workers: int) -> None:
    streamd.fresh(f"workers = {workers}")
    streamd.run("systemctl", "kill", "--kill-who=main", "--signal=STOP", "streamd.service")
    until(lambda: streamd.show("NRestarts") == "1" and streamd.show("ActiveState") == "active", "the restart")
    assert "Watchdog timeout" in streamd.journal()
    assert streamd.is_whole(asyncio.run(streamd.reader(5)), 5)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_main_process_is_restarted_without_a_refused_connection(streamd: Installed, workers: int) -> None:
    streamd.fresh(f"workers = {workers}")
    before = streamd.worker_pids()
    streamd.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "streamd.service")
    # Connections that a worker accepts in the moment until systemd kills it end with it.
    until(lambda: all(streamd.ran("kill", "-0", str(pid)).returncode for pid in before), "the end of the workers")
    assert streamd.get("/healthz") == 200  # the connection waited in the kernel's queue
    until(lambda: streamd.show("NRestarts") == "1" and streamd.show("ActiveState") == "active", "the restart")
    cgroup = streamd.run("cat", f"/proc/{streamd.main_pid()}/cgroup")
    assert "streamd.service" in cgroup
    until(lambda: len(streamd.worker_pids()) == workers, "the workers")


# Servers that are out


def test_both_servers_killed_are_a_warning_each_and_named_in_the_status_line(streamd: Installed) -> None:
    with mock_llm() as (one, port_of_one), mock_llm() as (two, port_of_two):
        ports = {"gpu1": port_of_one, "gpu2": port_of_two}
        upstreams = (f'[[upstream]]\nname = "{name}"\nurl = "http://127.0.0.1:{ports[name]}"\n' for name in ports)
        streamd.fresh("workers = 2", "".join(upstreams))
        assert [streamd.chat() for _ in range(8)] == [200] * 8
        assert "upstreams out" not in streamd.show("StatusText") and streamd.warnings() == []
        for mock in (one, two):
            mock.kill()
            mock.wait()
        until(
            lambda: streamd.chat() in (502, 503) and "2 of 2 upstreams out: gpu1, gpu2" in streamd.show("StatusText"),
            "a status line with both servers",
        )
        found = until(lambda: [line for line in streamd.warnings() if "no upstream left" in line], "an error")
        assert len(found) == 1, found
        for _ in range(8):  # both workers go on to find both servers dead
            streamd.chat()
        told = streamd.warnings()
        for name in ports:
            assert len([line for line in told if re.search(rf"upstream out.* upstream={name} ", line)]) == 1, told


# Stopping and restarting


def test_a_stop_lets_a_running_generation_finish_and_exits_with_0(streamd: Installed) -> None:
    streamd.fresh()

    async def stop_in_mid_stream() -> Outcome:
        reading = asyncio.create_task(streamd.reader(6, resume=False))
        await until_streams(streamd, 1)
        await asyncio.to_thread(streamd.run, "systemctl", "stop", *UNITS)
        return await reading

    assert streamd.is_whole(asyncio.run(stop_in_mid_stream()), 6)
    assert (streamd.show("ActiveState"), streamd.show("Result")) == ("inactive", "success")
    assert streamd.show("ExecMainStatus") == "0"
    assert streamd.get("/healthz") == 0


def test_a_longer_drain_gets_more_time_from_systemd(streamd: Installed) -> None:
    streamd.fresh('drain_timeout = "60s"')
    streamd.write(STOP_DROP_IN, "[Service]\nTimeoutStopSec=2\n")
    streamd.run("systemctl", "daemon-reload")

    async def stop_in_mid_stream() -> Outcome:
        reading = asyncio.create_task(streamd.reader(7, tokens=120, resume=False))  # 6 s
        await until_streams(streamd, 1)
        await asyncio.to_thread(streamd.run, "systemctl", "stop", "streamd.service")
        return await reading

    try:
        assert streamd.is_whole(asyncio.run(stop_in_mid_stream()), 7, 120)
        assert streamd.show("Result") == "success"
    finally:
        streamd.run("rm", STOP_DROP_IN)
        streamd.run("systemctl", "daemon-reload")


def test_a_restart_under_load_refuses_no_connection_and_loses_nothing_in_silence(streamd: Installed) -> None:
    """Half of the generations end within the drain, half are cut by it. STREAMD_READERS=2000 sets the full load."""
    interval_ms = max(50, READERS // 10)  # 10,000 tokens/s at most
    drain_s = 2 + 30 * interval_ms / 1000
    tokens = [30 if seed % 2 else 10 * round(drain_s * 1000 / interval_ms) for seed in range(READERS)]
    streamd.fresh(f'drain_timeout = "{drain_s:.0f}s"')
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def restart_under_readers() -> tuple[list[Outcome], float]:
        reading = []
        for seed, count in enumerate(tokens):
            reading.append(asyncio.create_task(streamd.reader(seed, tokens=count, interval_ms=interval_ms)))
            await asyncio.sleep(1 / RAMP_PER_S)
        await until_streams(streamd, READERS // 2)
        began_at = time.monotonic()
        await asyncio.to_thread(streamd.run, "systemctl", "restart", "streamd.service")
        return await asyncio.gather(*reading), time.monotonic() - began_at

    outcomes, took_s = asyncio.run(restart_under_readers())
    ends = Counter(outcome.end for outcome in outcomes)
    resumes, again = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("resumes", "refused_politely"))
    print(f"{READERS} readers: {ends}, {resumes} resumes, {again} times 503; all over {took_s:.1f} s after the restart")
    assert sum(outcome.refused for outcome in outcomes) == 0
    for seed, outcome in enumerate(outcomes):
        assert outcome.end in ("complete", "error"), (seed, outcome)
        assert outcome.gaps == 0
        whole = resuming_reader.whole_text(streamd.mock_port, seed, tokens[seed])
        assert outcome.text == whole if outcome.end == "complete" else whole.startswith(outcome.text), seed
    assert {outcome.end for seed, outcome in enumerate(outcomes) if seed % 2} == {"complete"}
    assert ends["error"] > 0, "nothing was cut"


@pytest.mark.parametrize("how", ["restart", "stop and start"])
def test_a_finished_stream_can_be_read_after_a_restart(streamd: Installed, how: str) -> None:
    streamd.fresh()
    before = asyncio.run(streamd.reader(8))
    if how == "restart":
        streamd.run("systemctl", "restart", "streamd.service")
    else:
        streamd.run("systemctl", "stop", "streamd.service")
        streamd.run("systemctl", "start", "streamd.service")
    again = Outcome()
    stream_id = before.ids[-1].split(":")[0]
    request = f"GET /v1/streams/{stream_id} HTTP/1.0\r\nHost: localhost\r\n\r\n"
    assert asyncio.run(resuming_reader.answer(streamd.port, request, again)) == 200
    assert streamd.is_whole(again, 8)


# After all tests


def test_no_test_of_the_module_met_a_bug(streamd: Installed) -> None:
    told = streamd.journal()
    assert "Traceback" not in told, told[told.index("Traceback") - 2000 :][:6000]


def test_uninstall_leaves_only_changed_and_added_files(
    root: Path, log: Path, mock_port: int, streamd: Installed
) -> None:
    """The last test of the module: first a second boot with the service enabled, then the removal."""
    streamd.fresh()
    streamd.run("systemctl", "enable", "streamd.service")
    streamd.machine.poweroff()
    with booted(root, log) as machine:
        again = Installed(machine, streamd.port, mock_port)
        assert again.show("ActiveState") == "active"
        assert again.is_whole(asyncio.run(again.reader(9)), 9)
        assert machine.run("systemctl", "is-system-running", "--wait").strip() == "running"

        gone = again.ran("make", "-C", "/src", "uninstall", check=True)
        assert f"{SETTINGS}: kept, because you changed it" in gone.stderr
        assert again.get("/healthz") == 0
        assert machine.ran("test", "-e", "/opt/streamd").returncode == 1
        assert machine.run("find", "/usr/local", "-name", "*streamd*") == ""
        assert machine.run("ls", "/etc/streamd").split() == ["credentials", "streamd.toml"]
