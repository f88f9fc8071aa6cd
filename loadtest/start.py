"""The start of streamd with one worker: time to READY=1 and to the first answer, and the memory of each process.

    python loadtest/start.py [--starts 20] [--before DIR] [--json FILE]

Each start gets a listening socket, as from systemd, with a waiting request: its answer comes as early as possible.
`--before` is the source of another version, started in turn with the present version. Times count from fork and exec;
PSS is read after the answer, while no other part of the same start runs. Targets: the parent at most 15 MiB, the first
answer at most 150 ms later than `--before`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import rig

PROJECT = Path(__file__).parents[1]
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
WAIT_S = 60.0

# LISTEN_PID must be the daemon's process id: the shell's, which exec keeps.
SHELL = 'LISTEN_PID=$$ exec "$@"'

MIB = 1024 * 1024
PARENT_BYTES_MAX = 15 * MIB
LATER_S_MAX = 0.150

Figures = dict[str, float]


@contextlib.contextmanager
def started(source: Path, listener: socket.socket, notify: str, options: Sequence[str]) -> Iterator[int]:
    """Run a daemon of that source; yields its pid."""
    daemon = [sys.executable, "-m", "streamd", "serve", "--log-level", "error", *options]
    environ = os.environ | {"NOTIFY_SOCKET": notify, "LISTEN_FDS": "1", "PYTHONPATH": str(source)}
    saved = os.dup(3) if _is_open(3) else -1
    os.dup2(listener.fileno(), 3)
    try:
        process = subprocess.Popen(["/bin/sh", "-c", SHELL, "sh", *daemon], cwd=source, env=environ, pass_fds=[3])
    finally:
        os.close(3)
        if saved >= 0:
            os.dup2(saved, 3)
            os.close(saved)
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_S)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def measured(source: Path, options: Sequence[str]) -> Figures:
    """The figures of a start."""
    with contextlib.ExitStack() as stack:
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        name = f"streamd-start-{os.getpid()}-{os.urandom(4).hex()}"
        notify.bind("\0" + name)
        notify.settimeout(WAIT_S)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        client.settimeout(WAIT_S)
        client.sendall(REQUEST)
        began = time.monotonic()
        pid = stack.enter_context(started(source, listener, f"@{name}", options))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        answered_s = time.monotonic() - began
        while not notify.recv(4096).startswith(b"READY=1"):
            pass
        ready_s = time.monotonic() - began
        main, *workers = rig.tree(pid)
        everything = rig.pss_bytes(main)
        workers_bytes = sum(map(rig.pss_bytes, workers))
        return {
            "answered_s": answered_s,
            "ready_s": ready_s,
            "main_bytes": everything - workers_bytes,
            "workers_bytes": workers_bytes,
        }


def summary(name: str, starts: Sequence[Figures]) -> Figures:
    """Print the medians, with quartiles for the times."""
    medians = {key: statistics.median(each[key] for each in starts) for key in starts[0]}
    print(f"{name}, {len(starts)} starts")
    for key in ("answered_s", "ready_s"):
        low, middle, high = statistics.quantiles((each[key] for each in starts), n=4)
        print(f"  {key:14} {1000 * middle:6.0f} ms   (quartiles {1000 * low:.0f} to {1000 * high:.0f})")
    for key in ("main_bytes", "workers_bytes"):
        print(f"  {key:14} {medians[key] / MIB:6.1f} MiB")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description="The start of streamd with one worker.")
    parser.add_argument("--starts", type=int, default=20, help="of each version [20]")
    parser.add_argument("--before", type=Path, help="the source of another version, to compare with")
    parser.add_argument("--json", type=Path, help="write the medians to a file")
    args, options = parser.parse_known_args()
    sources = {"now": PROJECT} | ({"before": args.before.resolve()} if args.before else {})
    for source in sources.values():  # compiles all modules, and warms the file cache
        measured(source, options)
    starts: dict[str, list[Figures]] = {name: [] for name in sources}
    for _ in range(args.starts):
        for name, source in sources.items():
            starts[name].append(measured(source, options))
    medians = {name: summary(name, starts[name]) for name in reversed(sources)}
    met = medians["now"]["main_bytes"] <= PARENT_BYTES_MAX
    print(f"the parent: at most {PARENT_BYTES_MAX // MIB} MiB: {'met' if met else 'missed'}")
    if "before" in medians:
        later_s = medians["now"]["answered_s"] - medians["before"]["answered_s"]
        print(f"the first answer: {1000 * later_s:+.0f} ms, at most {1000 * LATER_S_MAX:+.0f}:", end=" ")
        print("met" if later_s <= LATER_S_MAX else "missed")
    if args.json:
        args.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
