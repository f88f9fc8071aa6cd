"""Shared parts of the load scripts: build and run the C source and sink, start a server, and read its CPU and memory.

CPU is user and system time of a server's whole process tree. User-space memory is PSS. Kernel memory is the size of the
queues of the server's sockets by `ss -m`; the sockets themselves (4 KB of slab each) are the same for every server and
are left out. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# The sink's source addresses, by group.
SLOW_ADDRESS = "127.0.1.1"
STALLED_ADDRESS = "127.0.2.1"


class Missing(Exception):
    """A measurement lacks a program; the text names it and the command that installs it."""


def build(name: str) -> str:
    """Compile loadtest/NAME.c if needed, and return the path of the program. Raises Missing without cc."""
    source = HERE / f"{name}.c"
    compiler = shutil.which("cc")
    if compiler is None:
        raise Missing("no C compiler: apt-get install gcc libc6-dev")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "streamd-loadtest"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"{name}-{source.stat().st_mtime_ns}"
    if not program.exists():
        fresh = folder / f"{program.name}.{os.getpid()}"
        subprocess.run([compiler, "-O2", "-o", str(fresh), str(source)], check=True)
        fresh.rename(program)
    return str(program)


def free_port() -> int:
    """A port of 127.0.0.1 without a listener at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int, process: subprocess.Popen[bytes], limit_s: float = 60) -> None:
    """Wait until 127.0.0.1:port takes connections. Raises RuntimeError if the process ends or time is over before."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before it listened: {process.args!r}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"did not listen within {limit_s:.0f} s: {process.args!r}")


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                pids += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return pids


def cpu_s(pid: int) -> tuple[float, float]:
    """User and system seconds of the whole tree."""
    user = system = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            user, system = user + int(fields[11]), system + int(fields[12])
    return user / TICKS_PER_S, system / TICKS_PER_S


def pss_bytes(pid: int) -> int:
    """User-space memory of the whole tree; shared pages count by their share."""
    return _rollup(pid, "Pss:")


def anonymous_bytes(pid: int) -> int:
    """User-space memory of the whole tree without the pages of files: their share depends on other processes."""
    return _rollup(pid, "Anonymous:")


def _rollup(pid: int, key: str) -> int:
    total = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(key):
                    total += int(line.split()[1]) * 1024
    return total


def queue_bytes(filter_: str) -> list[int]:
    """Kernel memory in the queues of each socket that `ss` finds (receive, send, and memory allocated ahead).

    `filter_` is ss's expression, e.g. "sport = :8080 and dst 127.0.2.1". Raises Missing without ss.
    """
    if shutil.which("ss") is None:
        raise Missing("no ss: apt-get install iproute2")
    listing = subprocess.run(
        ["ss", "-tmnH", "state", "established", f"( {filter_} )"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"skmem:\(r(\d+),.*?,f(\d+),w(\d+),", listing)
    return [sum(map(int, parts)) for parts in found]


@dataclass
class Usage:
    """The CPU and memory of a server at a moment."""

    at_s: float
    user_s: float
    system_s: float
    pss_bytes: int


def look(pid: int) -> Usage:
    """CPU and memory of a server now."""
    user, system = cpu_s(pid)
    return Usage(time.monotonic(), user, system, pss_bytes(pid))


@dataclass
class Rig:
    """The programs of a measurement; all end with it."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="streamd-load-")))
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, argv: Sequence[str], port: int, env: dict[str, str] | None = None) -> int:
        """Start a program, wait until it listens on `port`, and return its pid."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **(env or {})})
        self.processes.append(process)
        wait_port(port, process)
        return process.pid

    def source(self, per_s: float, tokens: int = 0, *, due: bool = False) -> int:
        """Start the synthetic upstream and return its port. due: tokens are dated by when they were due (source.c)."""
        port = free_port()
        more = ["due"] if due else []
        self.start("source", [build("source"), str(port), str(round(1000 / per_s)), str(tokens), *more], port)
        return port

    def run(self, name: str, argv: Sequence[object]) -> subprocess.Popen[bytes]:
        """Start a program that ends by itself; its output goes to a log."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen([str(part) for part in argv], stdout=log, stderr=log)
        self.processes.append(process)
        return process

    @staticmethod
    def wait(process: subprocess.Popen[bytes], limit_s: float) -> bool:
        """Whether a program ended within `limit_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)
        return process.returncode is not None

    def sink(self, **options: object) -> subprocess.Popen[bytes]:
        """Start readers; `result` returns their report."""
        argv = [build("sink"), *(f"{key}={value}" for key, value in options.items())]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End all programs, the last first."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    """A Rig for the length of a `with`; when it fails, the programs' logs are shown."""
    running = Rig()
    try:
        yield running
    except Exception:
        for log in sorted(running.folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
        raise
    finally:
        running.close()


def result(sink: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any]:
    """Wait for the sink's report."""
    report: dict[str, Any] = json.loads(sink.communicate(timeout=limit_s)[0])
    return report


def machine() -> dict[str, object]:
    """The machine on which the figures were taken."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
