"""The cost of a request: streams of a single token over kept connections, and the ramp of streams that stay open.

    python loadtest/request_cost.py [--before DIR] [--nginx] [--rounds 5] [--json FILE]

CPU is user and system time of the server's process tree in a window, divided by the answers of the window. streamd runs
with one worker, at log level info, into a file. `--before` is the source of another version. The servers take turns in
each round, and ratios are taken within a round. Three measurements:

    cost    `--rate` requests a second: microseconds a request, user and system
    first   50 requests a second: the time from a request to its first event, less the same without a server between
    ramp    new connections at `--ramp` a second, each with a stream that stays open: microseconds a stream, which says
            how many of them a worker can take in a second; and the time to the first token meanwhile
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contenders
import rig

PROJECT = Path(__file__).parents[1]
WARM_S = 1.0
FIRST_RATE = 50.0

Figures = dict[str, float]
Server = Callable[[rig.Rig, int], tuple[int, int]]  # from the upstream's port to its own pid and port


def streamd(source: Path) -> Server:
    """streamd of that source, with one worker."""

    def start(running: rig.Rig, upstream: int) -> tuple[int, int]:
        port = rig.free_port()
        addresses = ["--listen", f"127.0.0.1:{port}", "--upstream", f"http://127.0.0.1:{upstream}"]
        argv = [sys.executable, "-m", "streamd", "serve", *addresses, "--log-level", "info"]
        # The source of our own folder must not come first (PYTHONSAFEPATH), in the worker either.
        pid = running.start("streamd", argv, port, {"PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"})
        return pid, port

    return start


def nginx(running: rig.Rig, upstream: int) -> tuple[int, int]:
    """nginx with connections to its upstream that are kept, as streamd keeps them, and with an access log."""
    port = rig.free_port()
    argv = contenders.nginx(running.folder, port, upstream)
    config = Path(argv[-1])
    pool = f"upstream source {{ server 127.0.0.1:{upstream}; keepalive 64; }}\n server"
    text = config.read_text().replace("access_log off", f"access_log {running.folder}/access.log")
    text = text.replace(" server", f" {pool}", 1).replace(
        f"proxy_pass http://127.0.0.1:{upstream}", "proxy_pass http://source"
    )
    config.write_text(text)
    return running.start("nginx", argv, port), port


def asked(running: rig.Rig, pid: int, port: int, rate: float, options: argparse.Namespace) -> Figures:
    """The cost of a request, and the time to its first event."""
    command = [rig.build("asker"), *map(str, (port, options.connections, rate, WARM_S, options.seconds, options.head))]
    asker = subprocess.Popen(command, stdout=subprocess.PIPE)
    running.processes.append(asker)
    time.sleep(WARM_S + 0.2)
    before, began = rig.cpu_s(pid), time.monotonic()
    time.sleep(options.seconds - 0.4)
    after, ended = rig.cpu_s(pid), time.monotonic()
    seen: dict[str, Any] = rig.result(asker, 60)
    if seen["failed"] or not seen["complete"]:
        raise RuntimeError(f"not every request was answered: {seen}")
    requests = seen["per_s"] * (ended - began)
    user_us, system_us = ((b - a) / requests * 1e6 for a, b in zip(before, after, strict=True))
    return {
        "user_us": user_us,
        "system_us": system_us,
        "all_us": user_us + system_us,
        "per_s": seen["per_s"],
        "first_ms": seen["first_event_ms"]["p50"],
        "first_p99_ms": seen["first_event_ms"]["p99"],
    }


def cost(server: Server, options: argparse.Namespace) -> Figures:
    """Microseconds a request."""
    with rig.rig() as running:
        pid, port = server(running, running.source(1000, 1))
        return asked(running, pid, port, options.rate, options)


def first(server: Server, options: argparse.Namespace) -> Figures:
    """Milliseconds that the server adds to the time to a first event."""
    with rig.rig() as running:
        upstream = running.source(1000, 1)
        pid, port = server(running, upstream)
        direct = asked(running, pid, upstream, FIRST_RATE, options)
        through = asked(running, pid, port, FIRST_RATE, options)
        return {
            "added_ms": through["first_ms"] - direct["first_ms"],
            "added_p99_ms": through["first_p99_ms"] - direct["first_p99_ms"],
        }


def ramp(server: Server, options: argparse.Namespace) -> Figures:
    """Microseconds a stream that begins on new connections and stays open."""
    with rig.rig() as running:
        pid, port = server(running, running.source(1 / 15, 100))
        warm = running.sink(port=port, readers=100, ramp=500, warm=0, seconds=1)
        rig.result(warm, 60)
        before = rig.cpu_s(pid)
        sink = running.sink(port=port, readers=options.streams, ramp=options.ramp, warm=0, seconds=2)
        time.sleep(options.streams / options.ramp + 1.0)
        after = rig.cpu_s(pid)
        seen = rig.result(sink, 60)
        if seen["not_200"] or seen["failed"] or seen["closed"]:
            raise RuntimeError(f"not every stream began: {seen}")
        all_us = (sum(after) - sum(before)) / options.streams * 1e6
        return {
            "all_us": all_us,
            "streams_per_s": 1e6 / all_us,
            "first_ms": seen["ttft_ms"]["p50"],
            "first_p99_ms": seen["ttft_ms"]["p99"],
        }


MEASUREMENTS: dict[str, tuple[Callable[[Server, argparse.Namespace], Figures], str]] = {
    "cost": (cost, "all_us"),
    "first": (first, "added_ms"),
    "ramp": (ramp, "all_us"),
}


def in_rounds(name: str, servers: dict[str, Server], options: argparse.Namespace) -> dict[str, Figures]:
    """Each server once in each round; the medians, and the median of the rounds' ratios to the present version."""
    measure, figure = MEASUREMENTS[name]
    runs: dict[str, list[Figures]] = {server: [] for server in servers}
    for number in range(options.rounds):
        for server in list(servers)[:: -1 if number % 2 else 1]:
            runs[server].append(measure(servers[server], options))
    medians = {}
    for server, figures in runs.items():
        medians[server] = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        pairs = zip(runs["now"], figures, strict=True)
        medians[server]["now_to_it"] = statistics.median(now[figure] / it[figure] for now, it in pairs)
        told = "  ".join(f"{key} {value:.2f}" for key, value in medians[server].items())
        print(f"{name:6} {server:7} {told}", flush=True)
    return medians


def main(argv: Sequence[str]) -> int:
    """Measure, print the medians, and write them with the machine that they come from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", metavar="MEASUREMENT", help="cost, first, ramp [all]")
    parser.add_argument("--before", type=Path, help="the source of another version, to compare with")
    parser.add_argument("--nginx", action="store_true", help="compare with nginx, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each window")
    parser.add_argument("--rate", type=float, default=400, help="requests a second for `cost`; 0: as fast as they go")
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--head", choices=("sdk", "short"), default="sdk", help="the fields of a request")
    parser.add_argument("--ramp", type=float, default=500, help="new streams a second")
    parser.add_argument("--streams", type=int, default=2000, help="of the ramp")
    parser.add_argument("--json", type=Path, help="write the medians to a file")
    options = parser.parse_args(argv)
    servers: dict[str, Server] = {"now": streamd(PROJECT)}
    if options.before:
        servers["before"] = streamd(options.before.resolve())
    if options.nginx:
        servers["nginx"] = nginx
    names = options.measurements or list(MEASUREMENTS)
    results = {name: in_rounds(name, servers, options) for name in names}
    if options.json:
        figures = {
            "machine": rig.machine(),
            "options": {k: str(v) for k, v in vars(options).items()},
            "results": results,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
