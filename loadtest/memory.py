"""Scenarios about memory: the cost of a live stream, and more connections than memory for them."""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rig
import target
from checker import Response
from crowd import Holding
from figures import Report, Scenario

sys.path.insert(0, str(rig.HERE.parent))
from streamd import config
from streamd.daemon.budget import budget_of

STREAM_KIB_MAX = 13.0
LIMIT_MOST_BYTES = 2**40  # the setting's own bound
SAMPLE_S = 4.0  # between two measurements of memory: `ss` is slow with 40,000 sockets

EVENTS = "streamd_text_events_total"

_text = re.compile(rb'"content":"([^"]*)"')
_seq = re.compile(rb"(?m)^id: [^\n]*:(\d+)$")


# The cost of a live stream


def stream_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of stream-memory."""
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=500, help="replayable tokens of each stream")
    parser.add_argument("--ramp", type=float, default=80, help="streams opened a second; each is fed within seconds")
    parser.add_argument("--interval-ms", type=int, default=4, help="between the tokens of a stream while it is fed")
    parser.add_argument("--sample", type=int, default=50, help="further streams that are resumed from 1 and compared")


def stream_memory(options: argparse.Namespace, report: Report) -> None:
    """Compare the PSS of a worker before and with the live streams, each with a reader and a whole log."""
    asked = {"interval_ms": options.interval_ms, "silent_after": options.tokens, "words": 1}
    body = json.dumps({"model": "synthetic", "stream": True, "messages": [], **asked})
    streams = options.streams + options.sample
    with rig.rig() as running:
        daemon = target.start(running, running.source(50), "--idle-timeout", "0", "--stall-timeout", "0")
        idle, events_before = daemon.idle_bytes(running), daemon.metric(EVENTS)
        samples = sampled(daemon.port, body, options)
        sink = running.sink(
            port=daemon.port, readers=options.streams, ramp=options.ramp, body=body, warm=0, seconds=900
        )
        whole_by = time.monotonic() + options.streams / options.ramp * 3 + 60
        while (
            events := daemon.metric(EVENTS) - events_before
        ) < streams * options.tokens and time.monotonic() < whole_by:
            time.sleep(1)
        time.sleep(1)
        pss, status = rig.pss_bytes(daemon.pid), daemon.status()
        paused = daemon.metric("streamd_subscribers_paused")
        replayed = sum(sample.replays(options.tokens) for sample in samples)
        sink.terminate()
        seen = rig.result(sink, 30)
    report.exactly("streams_live", status["streams"]["live"], streams)
    report.exactly("readers", status["subscribers"], streams)
    report.exactly("readers_paused", paused, 0)
    report.exactly("refused_or_closed", seen["not_200"] + seen["failed"] + seen["closed"], 0)
    report.exactly("tokens_of_each", events / streams, options.tokens)
    report.exactly("streams_replayed_whole", replayed, options.sample)
    report.tell("log_kib_per_stream", status["log_bytes"] / streams / 1024)
    report.tell("pss_idle_mib", idle / 2**20)
    report.at_most("user_kib_per_stream", (pss - idle) / streams / 1024, STREAM_KIB_MAX)


class Sampled:
    """A live stream with its text, for comparison with a resume from its first event."""

    def __init__(self, port: int, body: str, tokens: int) -> None:
        self.port = port
        self.connection = target.connect(port)
        fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n{body}".encode())
        self.text, response = read_until(self.connection, tokens)
        self.stream = (response.field(b"x-stream-id") or b"").decode()

    def replays(self, tokens: int) -> bool:
        """Whether reading from the first event gives the same text as the live stream."""
        with target.connect(self.port) as again:
            again.sendall(f"GET /v1/streams/{self.stream}?from=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            text, _ = read_until(again, tokens)
        self.connection.close()
        return text == self.text


def sampled(port: int, body: str, options: argparse.Namespace) -> list[Sampled]:
    """The sampled streams, read at the same time, so that each text is that of the live stream."""
    with ThreadPoolExecutor(max(1, options.sample)) as pool:
        return list(pool.map(lambda _: Sampled(port, body, options.tokens), range(options.sample)))


def read_until(connection: socket.socket, seq: int) -> tuple[bytes, Response]:
    """The text of a stream up to an event. Raises RuntimeError if the stream ends before."""
    response, pieces, last = Response(), [b""], 0
    while last < seq:
        part = connection.recv(65536)
        if not part:
            raise RuntimeError(f"the stream ended at {last} of {seq}")
        for block in response.take(part):
            pieces += _text.findall(block)
            last = max(last, *map(int, _seq.findall(block)), 0)
    return b"".join(pieces), response


# More connections than memory


def budget_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of over-budget."""
    parser.add_argument(
        "--fit", type=int, default=8000, help="connections with a stream each that fit the memory limit"
    )
    parser.add_argument("--come", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=60, help="of each stream, one a second")
    parser.add_argument("--ramp", type=float, default=1000)
    parser.add_argument("--stalled", type=float, default=0, help="share of the readers that stop reading")


def memory_limit_for(connections: int, workers: int) -> int:
    """The smallest memory_limit, in bytes, with which streamd's own arithmetic admits `connections`."""
    least, most = 64 * 2**20, LIMIT_MOST_BYTES
    while least < most:
        middle = (least + most) // 2
        if admitted(middle, workers) >= connections:
            most = middle
        else:
            least = middle + 1
    return least


def admitted(memory_limit_bytes: int, workers: int) -> int:
    """The number of connections in the budget of a daemon with this limit; 0 if it wouldn't start."""
    flags = {"workers": str(workers), "memory_limit": str(memory_limit_bytes)}
    try:
        return int(budget_of(config.load(file=None, environ={}, flags=flags)).connections_max)
    except ValueError:
        return 0


def over_budget(options: argparse.Namespace, report: Report) -> None:
    """More connections come than fit: the others are refused, no admitted reader suffers, and the limit holds."""
    limit = memory_limit_for(options.fit, options.workers)
    report.tell("memory_limit_mib", limit / 2**20)
    with rig.rig() as running:
        upstream = running.source(1, options.tokens)
        daemon = target.start(running, upstream, "--memory-limit", str(limit), workers=options.workers)
        admits = daemon.status()["admission"]["budget"]["connections_max"]
        report.exactly("connections_max", admits, options.fit)
        seen, most = _hold_and_look(options, running, daemon)
        report.tell("refused_by_gate", daemon.refused())
    _judge_budget(options, report, seen)
    report.tell("pss_mib", most["pss"] / 2**20)
    report.tell("kernel_mib", most["kernel"] / 2**20)
    report.tell("memory_price_charged_mib", most["charged"] / 2**20)
    report.at_most("pss_and_kernel_mib", most["both"] / 2**20, limit / 2**20)


def _hold_and_look(
    options: argparse.Namespace, running: rig.Rig, daemon: target.Target
) -> tuple[dict[str, Any], dict[str, int]]:
    """The holder's report, and the peak of each kind of memory meanwhile."""
    argv = ["--readers", options.come, "--tokens", options.tokens, "--ramp", options.ramp]
    argv += ["--stalled", options.stalled, "--seconds", options.come / options.ramp + options.tokens + 60]
    holding = Holding(running, daemon.port, argv)
    most = {"pss": 0, "kernel": 0, "both": 0, "charged": 0}
    time.sleep(options.come / options.ramp + 2)
    while not holding.over(SAMPLE_S):
        pss, kernel = rig.pss_bytes(daemon.pid), daemon.kernel_bytes()
        charged = daemon.status()["admission"]["in_use"]["memory"]
        looked = {"pss": pss, "kernel": kernel, "both": pss + kernel, "charged": charged}
        most = {key: max(size, looked[key]) for key, size in most.items()}
    return holding.report(1), most


def _judge_budget(options: argparse.Namespace, report: Report, seen: dict[str, Any]) -> None:
    """Judge the figures. Each further worker may admit a connection too many: it sums rows that others still write."""
    ends, groups = seen["ends"], seen["groups"]
    over = options.workers - 1
    left_over = options.come - options.fit
    refused = sum(count for end, count in ends.items() if end.endswith("refused 503"))
    complete = sum(count for end, count in ends.items() if end.endswith("complete"))
    report.tell("ends", ends)
    report.between("refused_503", refused, left_over - over, left_over)
    report.exactly("refused_without_retry_after", refused - seen["with_retry_after"], 0)
    stalled = seen["readers"].get("stalled", 0)
    report.between("complete", complete, options.fit - stalled, options.fit + over)
    for fault in ("lost", "doubled", "wrong"):
        report.exactly(fault, sum(tally[fault] for tally in groups.values()), 0)


SCENARIOS = (
    Scenario(
        "stream-memory",
        f"a live relayed stream with a reader and 500 replayable tokens costs at most {STREAM_KIB_MAX:g} KiB",
        stream_flags,
        stream_memory,
    ),
    Scenario(
        "over-budget",
        "more come than the memory limit has room for: those are told to come later, all others are complete",
        budget_flags,
        over_budget,
    ),
)
