"""Scenarios about readers that leave: how soon is the upstream's request cancelled, and when must it not be?

The upstream is watched_upstream.py, which notes the end of its connections. The time of leaving is taken right before
the reader's close(), so the measurement covers the whole way: the kernel, streamd's loop, the kernel again, and the
upstream's own wake-up."""

from __future__ import annotations

import argparse
import json
import queue
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import rig
import target
from checker import Response
from figures import Report, Scenario, quantile, spread_of

ONE_MS_MAX = 5.0
CROWD_MS_MAX = 50.0
STOP_MS_MAX = 100.0
LATE_MS_MAX = 500.0  # after the end of a grace: the sweep runs every 250 ms, in slices

WAIT_S = 30.0
REST_S = 0.5

# Ways to leave, by the phase of the answer: the upstream's answer, and whether it is a stream.
WAYS = {
    "before_first_byte": ("silence", True),
    "mid_stream": ("stream", True),
    "not_streaming_before_head": ("silence", False),
    "not_streaming_mid_body": ("half", False),
}


@dataclass
class Watched:
    """The upstream's notes."""

    process: subprocess.Popen[str]
    port: int
    asked_ns: dict[int, int] = field(default_factory=dict)
    ended_ns: dict[int, int] = field(default_factory=dict)
    requests: int = 0
    _notes: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def listen(self) -> None:
        """Begin to take notes."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._notes.put(line)

    def wait_for(self, which: dict[int, int], numbers: range, limit_s: float = WAIT_S) -> bool:
        """Whether all of these numbers were noted within `limit_s`."""
        deadline = time.monotonic() + limit_s
        while not all(number in which for number in numbers):
            try:
                self._take(self._notes.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return False
        return True

    def _take(self, line: str) -> None:
        what, number, at_ns = line.split()
        if number == "None":  # rig.py checks for a listener
            return
        self.requests += what == "asked"
        (self.asked_ns if what == "asked" else self.ended_ns)[int(number)] = int(at_ns)


def watched(running: rig.Rig) -> Watched:
    """Start the upstream."""
    port = rig.free_port()
    argv = [sys.executable, str(rig.HERE / "watched_upstream.py"), str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    running.processes.append(process)  # type: ignore[arg-type]
    rig.wait_port(port, process)  # type: ignore[arg-type]
    upstream = Watched(process, port)
    upstream.listen()
    return upstream


def ask(port: int, number: int, answer: str, *, stream: bool, fields: str = "") -> socket.socket:
    """A reader that has sent its request."""
    body = json.dumps({"model": "m", "n": number, "answer": answer, "stream": stream, "messages": []})
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{fields}"
    connection = target.connect(port)
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n{body}".encode())
    return connection


def await_first(connection: socket.socket, answer: str) -> Response:
    """Read the answer as far as this upstream sends it."""
    response = Response()
    wanted = {"silence": b"", "stream": b'"one "', "half": b'[{"te'}[answer]
    seen = b""
    while wanted and wanted not in seen:
        part = connection.recv(65536)
        if not part:
            raise RuntimeError(f"ended after {seen!r}")
        seen += part
        response.take(part)
    return response


# Cancel


def cancel_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of cancel."""
    parser.add_argument("--times", type=int, default=100, help="readers that leave in turn, each way")
    parser.add_argument("--crowd", type=int, default=1000, help="readers that leave at once, each way")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of crowds; the target holds for their median")
    parser.add_argument("--workers", type=int, default=1)


def cancel(options: argparse.Namespace, report: Report) -> None:
    """Readers leave one at a time and all at once; measured from each close() to the end of its upstream connection."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with rig.rig() as running:
        upstream = watched(running)
        daemon = target.start(running, upstream.port, workers=options.workers)
        numbers = iter(range(10**9))
        for way, (answer, stream) in WAYS.items():
            alone = [left_ms(upstream, daemon.port, [next(numbers)], answer, stream)[0] for _ in range(options.times)]
            report.at_most(f"{way}_alone_median_ms", quantile(alone, 0.5), ONE_MS_MAX)
            for name, figure in spread_of(f"{way}_alone", alone).items():
                report.tell(name, figure)
            report.tell(f"{way}_alone_over_{ONE_MS_MAX:g}_ms", sum(took > ONE_MS_MAX for took in alone))
        for way, (answer, stream) in WAYS.items():
            crowds = [
                left_ms(upstream, daemon.port, [next(numbers) for _ in range(options.crowd)], answer, stream)
                for _ in range(options.rounds)
            ]
            p99s = [quantile(crowd, 0.99) or 0.0 for crowd in crowds]
            report.at_most(f"{way}_crowd_p99_ms", statistics.median(p99s), CROWD_MS_MAX)
            report.tell(f"{way}_crowd_p99_ms_of_rounds", [round(p99, 1) for p99 in p99s])
            report.tell(f"{way}_crowd_median_ms", statistics.median(quantile(crowd, 0.5) or 0.0 for crowd in crowds))


def left_ms(upstream: Watched, port: int, numbers: list[int], answer: str, stream: bool) -> list[float]:
    """Readers ask, read the available answer, and leave at once: each reader's time until the upstream saw it."""
    every = range(numbers[0], numbers[-1] + 1)
    readers = [ask(port, number, answer, stream=stream) for number in every]
    if not upstream.wait_for(upstream.asked_ns, every):
        raise RuntimeError("not all requests reached the upstream")
    for reader in readers:
        await_first(reader, answer)
    time.sleep(REST_S if len(readers) > 1 else REST_S / 25)  # their requests are fully handled before they leave
    left_ns = []
    for reader in readers:
        left_ns.append(time.monotonic_ns())
        reader.close()
    if not upstream.wait_for(upstream.ended_ns, every):
        raise RuntimeError("upstream connections outlive their readers")
    return [(upstream.ended_ns[number] - at_ns) / 1e6 for number, at_ns in zip(every, left_ns, strict=True)]


# Stop


def stop_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of stop."""
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--grace", type=int, default=3, help="seconds of detach grace")


def stop(options: argparse.Namespace, report: Report) -> None:
    """Measure DELETE, a return within the grace, and no return."""
    with rig.rig() as running:
        upstream = watched(running)
        daemon = target.start(running, upstream.port)
        stopped = [stopped_ms(upstream, daemon.port, number) for number in range(options.times)]
        report.at_most("delete_max_ms", max(stopped), STOP_MS_MAX)
        report.tell("delete_median_ms", quantile(stopped, 0.5))
        first = options.times
        before = upstream.requests
        back = range(first, first + options.times)
        report.exactly("came_back_and_still_live", sum(come_back(options, upstream, daemon.port, back)), len(back))
        report.exactly("upstream_requests_each", (upstream.requests - before) / len(back), 1)
        gone = range(back.stop, back.stop + options.times)
        late = stayed_away_ms(options, upstream, daemon.port, gone)
        report.between("abandoned_first_after_grace_ms", min(late), 0, LATE_MS_MAX)
        report.at_most("abandoned_last_after_grace_ms", max(late), LATE_MS_MAX)
        report.tell("abandoned_median_after_grace_ms", quantile(late, 0.5))


def stopped_ms(upstream: Watched, port: int, number: int) -> float:
    """The time from the DELETE to the end of the upstream's connection."""
    with ask(port, number, "stream", stream=True) as reader:
        stream = await_first(reader, "stream").field(b"x-stream-id") or b""
        with target.connect(port) as other:
            at_ns = time.monotonic_ns()
            other.sendall(b"DELETE /v1/streams/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % stream)
            if not upstream.wait_for(upstream.ended_ns, range(number, number + 1)):
                raise RuntimeError("DELETE left the upstream alone")
    return (upstream.ended_ns[number] - at_ns) / 1e6


def come_back(options: argparse.Namespace, upstream: Watched, port: int, numbers: range) -> list[bool]:
    """Readers leave, stay away for half of their grace, and read on: for each, whether its generation still runs."""
    left = [leave(options, port, number) for number in numbers]
    time.sleep(options.grace / 2)
    back = []
    for stream in left:
        reader = target.connect(port)
        reader.sendall(b"GET /v1/streams/%b?from=1 HTTP/1.1\r\nHost: localhost\r\n\r\n" % stream)
        await_first(reader, "stream")
        back.append(reader)
    upstream.wait_for(upstream.ended_ns, numbers, options.grace)
    live = [number not in upstream.ended_ns for number in numbers]
    for reader in back:
        reader.close()
    return live


def stayed_away_ms(options: argparse.Namespace, upstream: Watched, port: int, numbers: range) -> list[float]:
    """Readers leave for good: the times from the end of their grace to the end of their upstream connections."""
    left_ns = []
    for number in numbers:
        leave(options, port, number)
        left_ns.append(time.monotonic_ns())
    if not upstream.wait_for(upstream.ended_ns, numbers, options.grace + WAIT_S):
        raise RuntimeError("generations outlive their grace")
    ended = [upstream.ended_ns[number] for number in numbers]
    return [(end - at) / 1e6 - options.grace * 1000 for end, at in zip(ended, left_ns, strict=True)]


def leave(options: argparse.Namespace, port: int, number: int) -> bytes:
    """A reader asks for a grace, reads its first event and leaves; return its stream's id."""
    fields = f"X-Stream-Detach-Grace: {options.grace}\r\n"
    with ask(port, number, "stream", stream=True, fields=fields) as reader:
        return await_first(reader, "stream").field(b"x-stream-id") or b""


SCENARIOS = (
    Scenario(
        "cancel",
        f"a reader is gone: its upstream connection ends within {ONE_MS_MAX:g} ms,"
        f" p99 {CROWD_MS_MAX:g} ms when 1,000 leave at once",
        cancel_flags,
        cancel,
    ),
    Scenario(
        "stop",
        f"DELETE ends the generation within {STOP_MS_MAX:g} ms; leaving and coming back is one upstream request in all",
        stop_flags,
        stop,
    ),
)
