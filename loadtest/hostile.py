"""Do hostile clients hurt the others? 200 new hostile clients a second, of all kinds, beside 1,000 readers.

Quiet and hostile runs alternate over the same daemon, so a drift of the machine's speed affects both. Printed for each
run: the ages of tokens at the readers (p50, p99), whether every token reached them, and the daemon's descriptors, live
objects of its own kinds and memory after the run, once every deadline has passed. The verdict: no token lost, medians
of the ratios at most 1.2 (p50) and 1.5 (p99), descriptors and objects exactly as after the first hostile run, memory
within 10 MB.

    hostile.py                               three rounds of 40 s: two minutes of hostility, about seven minutes in all
    hostile.py --rounds 1 --seconds 5        a quick check that it runs
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import json
import os
import random
import runpy
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import contenders
import rig

P50_RATIO_MAX, P99_RATIO_MAX, MEMORY_BYTES_MAX = 1.2, 1.5, 10_000_000

# Deadlines of the daemon under test: short, so that all leftovers of a run are due before the next measurement.
LIMITS = {
    "--head-timeout": "10s",
    "--body-grace": "5s",
    "--keepalive-timeout": "10s",
    "--stall-timeout": "10s",
    "--retention": "5s",
    "--resume-grace": "5s",
    "--log-level": "error",
}
SETTLE_S_MAX = 60
WARM_S = 4
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
HELD_S = 30  # a hostile client gives up after this time if streamd hasn't closed it
DRIP_S = 0.5

CHAT = json.dumps({"model": "synthetic", "stream": True, "tokens": 100, "messages": []}).encode()


def asking(body: bytes = CHAT, length: int | None = None) -> bytes:
    """A chat request; `length` may be wrong."""
    size = len(body) if length is None else length
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + fields.encode() + body


# -- the hostile side: a separate process


@dataclass
class Kind:
    """A kind of client: its first bytes, and its behaviour afterwards."""

    name: str
    first: bytes = b""
    drips: bool = False  # sends a byte every half second after `first`
    reads: bool = True
    fin: bool = False  # half-closes after `first`
    reset_after_s: float | None = None


def kinds() -> list[Kind]:
    """All kinds, including rows of the tables of malformed requests."""
    made = [
        Kind("never sends"),
        Kind("half a head", b"GET /healthz HTTP/1.1\r\nHo"),
        Kind("byte by byte", b"GET /healthz HTTP/1.1\r\nX: ", drips=True),
        Kind("half a body", asking(length=9999)),
        Kind("body byte by byte", asking(length=9999), drips=True),
        Kind("half a chunk", b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nx"),
        Kind("idles", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        Kind("never reads", asking(), reads=False),
        Kind("floods behind", asking() + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000),
        Kind("half-closes", asking(), fin=True),
        Kind("half-closes early", asking(length=9999), fin=True),
        Kind("resets at once", reset_after_s=0.0),
        Kind("resets behind its request", asking(), reset_after_s=0.0),
        Kind("resets in mid-stream", asking(), reset_after_s=1.0),
        Kind("garbage", random.Random(7).randbytes(4096)),
        Kind("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ]
    rows = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "corpus" / "http_requests.py"))["ROWS"]
    refused = [row for row in rows if row[-1] != "accept"]
    return made + [Kind("malformed", row[1]) for row in refused[:: max(1, len(refused) // 8)]]


class Attack:
    """Opens clients of all kinds in turn, and drives them until streamd closes them or HELD_S is over."""

    def __init__(self, port: int, per_second: float, seconds: float) -> None:
        self._address = ("127.0.0.1", port)
        self._interval_s = 1 / per_second
        self._ends_at = time.monotonic() + seconds
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, Kind]] = {}
        self._due: list[tuple[float, int, socket.socket, str]] = []  # (time, tie breaker, socket, action)
        self._number = 0
        self._ties = itertools.count()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        todo = kinds()
        next_at = time.monotonic()
        while (now := time.monotonic()) < self._ends_at or (self._open and now < self._ends_at + HELD_S):
            while next_at <= now < self._ends_at:
                self._begin(todo[self._number % len(todo)], now)
                next_at += self._interval_s
            self._do_due(now)
            for fd, mask in self._poll.poll(0.005):
                self._react(fd, mask)
        for sock, _ in tuple(self._open.values()):
            self._end(sock, "given up")

    def _begin(self, kind: Kind, now: float) -> None:
        self._number += 1
        sock = socket.socket()
        if not kind.reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            sock.connect(self._address)  # on loopback this connects at once or is refused
        except OSError:
            self.counts["not accepted"] += 1
            sock.close()
            return
        sock.setblocking(False)
        self.counts[kind.name] += 1
        self._open[sock.fileno()] = (sock, kind)
        self._poll.register(sock, (select.EPOLLIN if kind.reads else 0) | select.EPOLLRDHUP)
        self._send(sock, kind.first)
        if kind.fin:
            self._quietly(sock.shutdown, socket.SHUT_WR)
        if kind.reset_after_s is not None:
            self._later(now + kind.reset_after_s, sock, "reset")
        if kind.drips:
            self._later(now + DRIP_S, sock, "drip")
        self._later(now + HELD_S, sock, "given up")

    def _later(self, at: float, sock: socket.socket, what: str) -> None:
        heapq.heappush(self._due, (at, next(self._ties), sock, what))

    def _do_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, sock, what = heapq.heappop(self._due)
            if sock.fileno() < 0:
                continue
            if what == "drip":
                self._send(sock, b"x")
                self._later(now + DRIP_S, sock, what)
            else:
                if what == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                self._end(sock, what)

    def _react(self, fd: int, mask: int) -> None:
        sock, kind = self._open[fd]
        if kind.reads and mask & select.EPOLLIN:
            try:
                if sock.recv(65536):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
        self._end(sock, "closed by streamd")

    def _send(self, sock: socket.socket, data: bytes) -> None:
        if data:
            self._quietly(sock.send, data)

    def _quietly(self, call: Any, argument: Any) -> None:
        try:
            call(argument)
        except OSError:
            self.counts["closed in the middle"] += 1

    def _end(self, sock: socket.socket, why: str) -> None:
        self.counts[f"({why})"] += 1
        self._poll.unregister(sock)
        del self._open[sock.fileno()]
        sock.close()


# -- streamd with a count of its objects


def serve(arguments: list[str], report: Path) -> int:
    """Run streamd's own command line; on SIGUSR1 it writes the numbers of its live objects to `report`."""
    from streamd.cli import main

    def write(number: int, frame: object) -> None:
        gc.collect()
        found = Counter(
            type(each).__name__
            for each in gc.get_objects()
            if type(each).__module__.startswith(("streamd", "uvloop")) and type(each).__name__ not in NOT_COUNTED
        )
        beside = report.with_suffix(".new")
        beside.write_text(json.dumps(found))
        beside.rename(report)

    signal.signal(signal.SIGUSR1, write)
    return main(["serve", *arguments])


# The loop's own bookkeeping: it depends on the instant, not on earlier clients.
NOT_COUNTED = ("Handle", "TimerHandle", "Loop")


@dataclass
class Held:
    """The daemon's descriptors, objects and memory without any connection."""

    descriptors: int
    objects: dict[str, int]
    pss_bytes: int


def look(pid: int, report: Path) -> Held:
    """Wait until the number of descriptors is stable, then measure."""
    lowest, since = count_descriptors(pid), time.monotonic()
    begun = since
    while time.monotonic() < min(since + 12, begun + SETTLE_S_MAX):
        time.sleep(0.5)
        if (now := count_descriptors(pid)) < lowest:
            lowest, since = now, time.monotonic()
    report.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    while not report.exists():
        time.sleep(0.05)
    return Held(count_descriptors(pid), json.loads(report.read_text()), rig.pss_bytes(pid))


def count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- the comparison


@dataclass
class Run:
    """The figures of a run."""

    age_p50_ms: float
    age_p99_ms: float
    cpu_s: float  # of the daemon
    complete: int
    lost: int
    doubled: int
    held: Held
    attack: dict[str, int] | None


def measure(running: rig.Rig, options: argparse.Namespace, pid: int, port: int, hostile: bool) -> Run:
    tokens = round((WARM_S + options.seconds) * options.per_second)
    attack, before_s = None, sum(rig.cpu_s(pid))
    sink = running.sink(
        port=port, readers=options.readers, ramp=500, tokens=tokens, warm=WARM_S, seconds=options.seconds, linger=15,
    )  # fmt: skip
    if hostile:
        length_s = options.readers / 500 + WARM_S + options.seconds
        argv = [sys.executable, __file__, "--attack", str(port), str(options.hostile_per_second), str(length_s)]
        attack = subprocess.Popen(argv, stdout=subprocess.PIPE)
        running.processes.append(attack)
    seen = rig.result(sink, options.seconds + 90)
    counts = json.loads(attack.communicate(timeout=HELD_S + 30)[0]) if attack is not None else None
    return Run(
        seen["age_ms"]["p50"],
        seen["age_ms"]["p99"],
        sum(rig.cpu_s(pid)) - before_s,
        seen["complete"]["watched"],
        seen["lost"],
        seen["doubled"],
        look(pid, running.folder / "objects.json"),
        counts,
    )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of a quiet and a hostile run over the same daemon, their ratios, and the verdict."""
    rounds: list[tuple[Run, Run]] = []
    with rig.rig() as running:
        tokens = round((WARM_S + options.seconds) * options.per_second)
        upstream, port = running.source(options.per_second, tokens), rig.free_port()
        command = [sys.executable, __file__, "--serve", str(running.folder / "objects.json")]
        address = ["--listen", f"127.0.0.1:{port}", "--upstream", f"http://127.0.0.1:{upstream}"]
        pid = running.start(
            "streamd", [*command, *address, *itertools.chain(*LIMITS.items())], port, contenders.environment()
        )
        for number in range(1, options.rounds + 1):
            order = (False, True) if number % 2 else (True, False)
            runs = {}
            for hostile in order:
                runs[hostile] = measure(running, options, pid, port, hostile)
                show(number, hostile, runs[hostile])
            rounds.append((runs[False], runs[True]))
    shown = [list(map(asdict, pair)) for pair in rounds]
    return {"summary": summarise(rounds), "holds": verdict(options, rounds), "rounds": shown}


def show(number: int, hostile: bool, run: Run) -> None:
    """Print a run as a line of the table."""
    if number == 1 and not hostile:
        print("                 age p50   p99 ms    CPU s  complete  lost  descriptors  objects   PSS MB")
    name, held = "hostile" if hostile else "quiet", run.held
    print(
        f"round {number} {name:9}{run.age_p50_ms:8.2f}{run.age_p99_ms:9.2f}{run.cpu_s:9.1f}"
        f"{run.complete:10}{run.lost:6}{held.descriptors:13}{sum(held.objects.values()):9}{held.pss_bytes / 1e6:9.1f}",
        flush=True,
    )
    if run.attack is not None and number == 1:
        print("   ", ", ".join(f"{name} {count}" for name, count in run.attack.items()), flush=True)


def summarise(rounds: list[tuple[Run, Run]]) -> dict[str, Any]:
    first, last = rounds[0][1].held, rounds[-1][1].held
    changed = {
        name: last.objects.get(name, 0) - first.objects.get(name, 0)
        for name in first.objects | last.objects
        if first.objects.get(name, 0) != last.objects.get(name, 0)
    }
    return {
        "age_p50_ratio": statistics.median(loud.age_p50_ms / quiet.age_p50_ms for quiet, loud in rounds),
        "age_p99_ratio": statistics.median(loud.age_p99_ms / quiet.age_p99_ms for quiet, loud in rounds),
        "lost": sum(run.lost for run in flat(rounds)),
        "doubled": sum(run.doubled for run in flat(rounds)),
        "hostile_connections": sum(
            count for _, loud in rounds for name, count in (loud.attack or {}).items() if name[0] != "("
        ),
        "descriptors": [loud.held.descriptors for _, loud in rounds],
        "objects_changed": changed,
        "pss_growth_bytes": last.pss_bytes - first.pss_bytes,
    }


def flat(rounds: list[tuple[Run, Run]]) -> Iterator[Run]:
    for pair in rounds:
        yield from pair


def verdict(options: argparse.Namespace, rounds: list[tuple[Run, Run]]) -> dict[str, bool]:
    summary = summarise(rounds)
    return {
        "p50": summary["age_p50_ratio"] <= P50_RATIO_MAX,
        "p99": summary["age_p99_ratio"] <= P99_RATIO_MAX,
        "complete": all(run.complete == options.readers and not run.lost + run.doubled for run in flat(rounds)),
        "descriptors": len(set(summary["descriptors"])) == 1,
        "objects": not summary["objects_changed"],
        "memory": summary["pss_growth_bytes"] <= MEMORY_BYTES_MAX,
    }


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--per-second", type=float, default=10, help="tokens of each stream")
    parser.add_argument("--hostile-per-second", type=float, default=200, help="connections")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40, help="measured in each run")
    parser.add_argument("--json", type=Path, help="write the report there too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run, print, and return whether the promise holds as the exit status."""
    if argv[:1] == ["--serve"]:
        return serve(argv[2:], Path(argv[1]))
    if argv[:1] == ["--attack"]:
        attack = Attack(int(argv[1]), float(argv[2]), float(argv[3]))
        attack.run()
        print(json.dumps(attack.counts))
        return 0
    options = options_of(argv)
    try:
        report = {"machine": rig.machine(), **compare(options)}
    except rig.Missing as missing:
        print(f"skipped: {missing}")
        return 0
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("summary", "holds")}))
    return int(not all(report["holds"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
